"""An export as transformers' `AutoModel` and sentence-transformers load it: the same vectors."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_factory import CAPTIONS, photo

from navit_clip import NaViTCLIP
from navit_clip.errors import UserError

transformers = pytest.importorskip("transformers", reason="transformers (dev) is not installed")
LONG = "many words " * 40
TEXTS = ["", LONG, *CAPTIONS]
SIDES = [(60, 80), (20, 150), (8, 8), (33, 70)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Where transformers copies the file that it runs."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def pictures() -> list[Any]:
    return [photo(seed, *side) for seed, side in enumerate(SIDES)]


def auto_model(directory: Path, **options: Any) -> Any:
    return transformers.AutoModel.from_pretrained(directory, trust_remote_code=True, **options)


def sentence_model(directory: Path) -> Any:
    library = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers (dev) is not installed"
    )
    return library.SentenceTransformer(str(directory), trust_remote_code=True, device="cpu")


def test_auto_model_gives_the_same_vectors(model_dir):
    ours, theirs = NaViTCLIP.from_pretrained(model_dir), auto_model(model_dir)
    assert isinstance(theirs, NaViTCLIP)
    assert not theirs.training
    assert torch.equal(theirs.encode_text(TEXTS), ours.encode_text(TEXTS))
    assert torch.equal(theirs.encode_image(pictures()), ours.encode_image(pictures()))
    assert torch.pdist(ours.encode_image(pictures())).min() > 1e-3
    config = transformers.AutoConfig.from_pretrained(model_dir, trust_remote_code=True)
    assert config.model["embed_dim"] == 8


def test_its_options_are_those_of_transformers(model_dir):
    model = auto_model(model_dir, dtype=torch.bfloat16, device_map="cpu", revision="main")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    vectors = NaViTCLIP.from_pretrained(model_dir).encode_image(pictures())
    assert (model.encode_image(pictures()) * vectors).sum(1).min() > 0.99
    with pytest.raises(UserError, match="no option offload_folder"):
        auto_model(model_dir, offload_folder="elsewhere")


def test_what_auto_model_saves_is_an_export_again(model_dir, tmp_path):
    auto_model(model_dir).save_pretrained(tmp_path / "again")
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    again["README.md"] = (model_dir / "README.md").read_bytes()  # evaluations stand in that one
    assert again == {path.name: path.read_bytes() for path in model_dir.iterdir()}


def test_sentence_transformers_gives_the_same_vectors(model_dir, tmp_path):
    ours, theirs = NaViTCLIP.from_pretrained(model_dir), sentence_model(model_dir)
    texts = theirs.encode(TEXTS, batch_size=3)
    np.testing.assert_allclose(texts, ours.encode_text(TEXTS), rtol=0, atol=1e-5)
    images = theirs.encode(pictures(), batch_size=3)
    expected = ours.encode_image(pictures())
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)
    for name in ("photo.png", "photo.tif", "photo.JP2"):
        path = str(tmp_path / name)
        pictures()[0].save(path, irreversible=False)
        np.testing.assert_allclose(theirs.encode(path), expected[0], rtol=0, atol=1e-5)
    prompted = theirs.encode(TEXTS[2:], prompt="a ")
    expected = ours.encode_text(["a " + text for text in TEXTS[2:]])
    np.testing.assert_allclose(prompted, expected, rtol=0, atol=1e-5)
    assert theirs.get_embedding_dimension() == 8
    assert theirs.similarity(images, texts).shape == (len(SIDES), len(TEXTS))


def test_what_sentence_transformers_saves_and_trains(model_dir, tmp_path):
    theirs = sentence_model(model_dir)
    theirs.save(str(tmp_path / "saved"))
    again = sentence_model(tmp_path / "saved")
    np.testing.assert_array_equal(again.encode(CAPTIONS), theirs.encode(CAPTIONS))
    assert NaViTCLIP.from_pretrained(tmp_path / "saved").tokenizer is not None
    vectors = theirs.train()(theirs.preprocess(CAPTIONS))["sentence_embedding"]
    vectors.sum().backward()
    assert theirs[0].model.text_projection.weight.grad.abs().sum() > 0


class Missing:
    """An import hook of a machine without navit_clip."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "navit_clip":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_machine_without_navit_clip_names_it_in_one_line(model_dir, monkeypatch):
    monkeypatch.delitem(sys.modules, "navit_clip")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ImportError) as error:
        auto_model(model_dir)
    assert "pip install navit_clip" in str(error.value)
    assert "\n" not in str(error.value)


def test_our_own_loading_needs_none_of_these_files(model_dir, tmp_path):
    names = {path.name for path in model_dir.iterdir()}
    assert {"modeling_navit_clip.py", "modules.json"} <= names
    assert "auto_map" in json.loads((model_dir / "config.json").read_text())
    shutil.copytree(model_dir, tmp_path / "model")
    for name in ("modeling_navit_clip.py", "modules.json"):
        (tmp_path / "model" / name).unlink()
    NaViTCLIP.from_pretrained(tmp_path / "model")
