"""Folders of transformers, and models for it, that cannot be taken: each named in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from navit_clip.architectures import architecture
from navit_clip.errors import UserError
from navit_clip.model import NaViTCLIP
from navit_clip.tokenizers.siglip import SiglipTokenizer


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def config(part: str | None, **values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        change = lambda found: (found[part] if part else found).update(values)  # noqa: E731
        changed(folder / "config.json", change)

    return damage


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return damage


def without(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def settings(**values: Any) -> Callable[[Path], None]:
    return lambda folder: changed(
        folder / "tokenizer_config.json", lambda found: found.update(values)
    )


BIAS = "vision_model.head.mlp.fc1.bias"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another": (config(None, model_type="blip"), "transformers' blip, the packed towers can be"),
    "activation": (config("text_config", hidden_act="relu"), "have no activation relu"),
    "head": (config("vision_config", vision_use_head=False), "has no pooling head"),
    "patches": (config("vision_config", patch_size=[4, 2]), "patch_size is not square"),
    "channels": (config("vision_config", num_channels=1), "images have 1 channels"),
    "heads": (config("vision_config", num_attention_heads=5), "heads must divide width"),
    "zero": (config("vision_config", hidden_size=0), "cannot read"),
    "word": (config("text_config", hidden_size="a"), "cannot read"),
    "depth": (config("text_config", num_hidden_layers=10**9), "smaller model than"),
    "width": (config("vision_config", intermediate_size=10**9), "do not fit its config.json"),
    "config": (lambda folder: config(None, text_config=[1])(folder), "cannot read"),
    "missing": (weights(lambda state: state.pop(BIAS)), f"they lack {BIAS}"),
    "unknown": (weights(lambda state: state.update(a=torch.ones(1))), "which has no a"),
    "no weights": (without("model.safetensors"), "no model.safetensors in"),
    "no tokenizer": (without("spiece.model"), "no tokenizer at"),
    "no settings": (without("tokenizer_config.json"), "names the padding token"),
    "left": (settings(padding_side="left"), "pads on the left"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_another_or_damaged_model_is_named_in_one_line(folders, tmp_path, damage, message):
    folder = shutil.copytree(folders["siglip"], tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError) as error:
        NaViTCLIP.from_pretrained(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_clip_needs_its_own_end_and_vocabulary(folders, tmp_path):
    folder = shutil.copytree(folders["clip"], tmp_path / "end")
    config("text_config", eos_token_id=5)(folder)
    with pytest.raises(UserError, match="texts end with the id 5, CLIP's with 49407"):
        NaViTCLIP.from_pretrained(folder)
    folder = shutil.copytree(folders["clip"], tmp_path / "vocabulary")
    (folder / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(UserError, match=r"vocab\.json is not CLIP's vocabulary"):
        NaViTCLIP.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "image.position.kind"),
        ({"text_projection": "linear"}, "no model with this text_projection"),
        ({"init_bias": None}, "no model with this init_bias"),
    ],
)
def test_a_model_without_counterpart_is_refused_by_the_switch(folders, tmp_path, change, message):
    ours = NaViTCLIP.from_pretrained(folders["siglip"])
    base = replace(ours.config, **change) if change else architecture("navit_b16")
    with torch.device("meta"):
        model = NaViTCLIP(base, ours.tokenizer, ours.preprocess)
    with pytest.raises(UserError, match=message):
        model.save_transformers(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_counterpart_is_refused(folders, tmp_path, tokenizer):
    ours = NaViTCLIP.from_pretrained(folders["naflex"])
    ours.tokenizer = tokenizer
    with pytest.raises(UserError, match="SigLIP has no tokenizer of the kind sentencepiece"):
        ours.save_transformers(tmp_path / "out")
    ours.tokenizer = SiglipTokenizer(folders["naflex"] / "tokenizer.json", "<pad>")
    with pytest.raises(UserError, match="SigLIP 2 keeps punctuation"):
        ours.save_transformers(tmp_path / "out")
    ours.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer to save"):
        ours.save_transformers(tmp_path / "out")
