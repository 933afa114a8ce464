"""A model's directory: an exact round trip, and writes that fail leave what was there."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_cases import CONFIGS, ENCODER, build, change_config, embed, export_small

from navit_clip.configs import config_from_dict
from navit_clip.errors import UserError
from navit_clip.export import pretrained as pretrained_module
from navit_clip.export.description import Description
from navit_clip.export.pretrained import AUTO_FILES, MODEL_FILES, save_pretrained
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer
from navit_clip.tokenizers.sentencepiece import SentencePieceTokenizer


@pytest.fixture
def directory(tmp_path: Path, tokenizer_path: Path) -> Path:
    return export_small(tmp_path, tokenizer_path)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_round_trip_is_exact(tmp_path, config):
    model = build(config)
    save_pretrained(tmp_path, model, OpenClipTokenizer(), Preprocess(99, square=True))
    loaded = NaViTCLIP.from_directory(tmp_path)
    assert loaded.config == config
    assert loaded.preprocess == Preprocess(99, square=True)
    assert isinstance(loaded.tokenizer, OpenClipTokenizer)
    assert not loaded.training
    for actual, expected in zip(embed(loaded), embed(model), strict=True):
        assert torch.equal(actual, expected)
    expected_state = model.state_dict()
    assert loaded.state_dict().keys() == expected_state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected_state[name]), name


def test_a_tokenizer_that_the_model_cannot_embed_is_refused(tmp_path):
    config = CLIPConfig(6, ImageTowerConfig(2, ENCODER), TextTowerConfig(60, 8, ENCODER))
    save_pretrained(tmp_path, build(config), OpenClipTokenizer(), Preprocess())
    with pytest.raises(UserError, match=r"49408 ids, its model embeds 60"):
        NaViTCLIP.from_directory(tmp_path)


def test_saving_again_writes_the_same_files(directory, tmp_path):
    loaded = NaViTCLIP.from_directory(directory)
    again = tmp_path / "again"
    save_pretrained(again, loaded, loaded.tokenizer, loaded.preprocess)
    names = {path.name for path in directory.iterdir()}
    assert names == {path.name for path in again.iterdir()} == {*MODEL_FILES, *AUTO_FILES}
    for name in names:
        assert (again / name).read_bytes() == (directory / name).read_bytes(), name


def test_the_tokenizer_comes_back(directory, tokenizer_path):
    loaded = NaViTCLIP.from_directory(directory).tokenizer
    caption = "two red stripes and a dot"
    assert loaded.encode(caption, 8) == SentencePieceTokenizer(tokenizer_path).encode(caption, 8)


def test_a_write_that_fails_leaves_the_old_model_whole(directory, monkeypatch):
    before = embed(NaViTCLIP.from_directory(directory))
    loaded = NaViTCLIP.from_directory(directory)

    def full(weights: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained_module, "save_file", full)
    with pytest.raises(UserError, match=f"cannot write the model to {directory}.*No space left"):
        save_pretrained(directory, build(CONFIGS["other"]), loaded.tokenizer, Preprocess())
    after = embed(NaViTCLIP.from_directory(directory))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "model"
    with pytest.raises(UserError, match=f"cannot write the model to {target}"):
        save_pretrained(target, build(CONFIGS["navit"]), OpenClipTokenizer(), Preprocess())


def test_a_moved_directory_still_loads(directory, tmp_path):
    expected = embed(NaViTCLIP.from_directory(directory))
    shutil.move(directory, tmp_path / "elsewhere")
    actual = embed(NaViTCLIP.from_directory(tmp_path / "elsewhere"))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_what_is_left_out_of_a_configuration_has_its_default():
    assert config_from_dict(CLIPConfig, {}) == CLIPConfig()
    assert config_from_dict(CLIPConfig, {"init_scale": 1, "init_bias": -10}).init_bias == -10
    partly = config_from_dict(CLIPConfig, {"image": {"encoder": {"depth": 3}}})
    assert partly.image.encoder == EncoderConfig(depth=3)
    assert config_from_dict(ImageTowerConfig, {"pixel_std": [1, 2, 3]}).pixel_std == (1, 2, 3)


def test_a_model_that_fills_its_context_needs_a_tokenizer_that_pads(directory):
    change_config(lambda c: c["model"]["text"].update(fill_context=True))(directory)
    with pytest.raises(UserError, match="its tokenizer does not pad"):
        NaViTCLIP.from_directory(directory)


def test_the_description_alone_says_which_model_it_is(tmp_path):
    description = Description(CONFIGS["other"], Preprocess(99, square=True))
    description.write(tmp_path / "model.json")
    assert Description.read(tmp_path / "model.json") == description
    values = json.loads((tmp_path / "model.json").read_text())
    assert (values["format"], values["kind"]) == (2, "clip")
    assert "weights_sha256" not in values


def test_the_description_of_an_export_holds_the_checksum_too(directory):
    content = (directory / "model.safetensors").read_bytes()
    description = Description.read(directory / "config.json")
    assert description == Description(
        CONFIGS["navit"], Preprocess(77), hashlib.sha256(content).hexdigest()
    )


def test_an_export_of_format_1_is_read(directory):
    expected = embed(NaViTCLIP.from_directory(directory))

    def before(values: dict[str, Any]) -> None:
        values["format"] = 1
        del values["kind"]
        position = values["model"]["image"]["position"]
        position["max_side"] = position.pop("table_side")

    change_config(before)(directory)
    actual = embed(NaViTCLIP.from_directory(directory))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
