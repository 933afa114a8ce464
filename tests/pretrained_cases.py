"""Small models, one of them exported, and what can be done to it, for tests of exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from packed_examples import random_caption, random_image, randomise
from safetensors.torch import load_file, save_file

from navit_clip.export.pretrained import save_pretrained
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.clip import CLIP, CLIPConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.images import pack_images
from navit_clip.packed.texts import pack_texts
from navit_clip.tokenizers.sentencepiece import SentencePieceTokenizer

VOCAB = 49408  # open_clip's, the larger of the tokenizers used here
ENCODER = EncoderConfig(width=16, depth=1, heads=2)
CONFIGS = {
    "navit": CLIPConfig(6, ImageTowerConfig(2, ENCODER), TextTowerConfig(VOCAB, 8, ENCODER)),
    "other": CLIPConfig(
        6,
        ImageTowerConfig(
            2,
            EncoderConfig(width=8, depth=2, heads=1, qk_norm=False, qkv_bias=True, norm_bias=True),
            PositionConfig("factorised", "fractional", "sinusoidal", "stack", 5),
            "cls",
            pixel_mean=(0.48145466, 0.4578275, 0.40821073),
            pixel_std=(0.26862954, 0.26130258, 0.27577711),
        ),
        TextTowerConfig(
            VOCAB,
            8,
            EncoderConfig(width=12, depth=1, heads=3, activation="quick_gelu", causal=True),
            "last",
        ),
        init_scale=10.0,
        init_bias=-10.0,
    ),
}


def build(config: CLIPConfig) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(config)
    randomise(model, seed=1)
    return model


@torch.no_grad()
def embed(model: CLIP) -> tuple[torch.Tensor, torch.Tensor]:
    images = [random_image(seed, grid) for seed, grid in enumerate([(2, 3), (1, 1), (5, 4)])]
    texts = [random_caption(seed, length, vocab_size=60) for seed, length in enumerate((8, 1, 3))]
    return model.embed_images(pack_images(images)), model.embed_texts(pack_texts(texts))


def export_small(folder: Path, tokenizer: Path) -> Path:
    """The directory of the model ``navit``, in folders that do not exist yet."""
    path = Path(shutil.copy(tokenizer, folder / "gone.model"))
    directory = folder / "run" / "model"
    save_pretrained(
        directory, build(CONFIGS["navit"]), SentencePieceTokenizer(path), Preprocess(77)
    )
    path.unlink()  # the directory must be all that is needed
    return directory


def change_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], str]:
    def damage(directory: Path) -> str:
        path = directory / "config.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        return "config.json"

    return damage


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], str]:
    def damage(directory: Path) -> str:
        path = directory / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
        return path.name

    return damage


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.target,)
