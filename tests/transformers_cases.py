"""Small CLIP, SigLIP and SigLIP 2 of transformers' own classes, with tokenizers made here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_examples import randomise
from shard_factory import CAPTIONS
from siglip_files import write_spiece

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra siglip) is not installed")
transformers = pytest.importorskip("transformers", reason="transformers (dev) is not installed")

PATCH = 4
MEAN, STD = (0.1, 0.4, 0.7), (0.2, 0.3, 0.4)
GRIDS = [(3, 3), (2, 5), (5, 4), (7, 1), (1, 1), (3, 3)]
TEXTS = [
    "",
    "A photo of a Dog, isn't it?",
    "many words " * 40,
    "naïve café ☃ 東京",
    "  two\n words ",
    *CAPTIONS,
]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {**SIZES, "hidden_size": 32, "intermediate_size": 73, "patch_size": PATCH}
TEXT = {**SIZES, "hidden_size": 24, "intermediate_size": 50, "max_position_embeddings": 9}


def clip(image: dict[str, Any], text: dict[str, Any]) -> Any:
    config = transformers.CLIPConfig(
        vision_config={**IMAGE, "image_size": 3 * PATCH, **image},
        text_config={**TEXT, "vocab_size": 49408, **text},
        projection_dim=12,
    )
    return transformers.CLIPModel(config)


def siglip(image: dict[str, Any], text: dict[str, Any]) -> Any:
    config = transformers.SiglipConfig(
        vision_config={**IMAGE, "image_size": 3 * PATCH, **image},
        text_config={**TEXT, "vocab_size": 110, "projection_size": 32, **text},
    )
    return transformers.SiglipModel(config)


def siglip2(image: dict[str, Any], text: dict[str, Any]) -> Any:
    config = transformers.Siglip2Config(
        vision_config={**IMAGE, "num_patches": 9, **image},
        text_config={**TEXT, "vocab_size": 110, "projection_size": 32, **text},
    )
    return transformers.Siglip2Model(config)


CASES = {
    "clip": lambda: clip({}, {}),
    "clip-gelu": lambda: clip(
        {"hidden_act": "gelu", "layer_norm_eps": 1e-2}, {"hidden_act": "gelu_pytorch_tanh"}
    ),
    "clip-old": lambda: clip({}, {"eos_token_id": 2, "layer_norm_eps": 1e-2}),
    "siglip": lambda: siglip({}, {}),
    "siglip-gelu": lambda: siglip({"hidden_act": "gelu"}, {"layer_norm_eps": 1e-2}),
    "naflex": lambda: siglip2({}, {}),
    "naflex-epsilon": lambda: siglip2({"layer_norm_eps": 1e-2}, {"hidden_act": "gelu"}),
}
every_case = pytest.mark.parametrize("name", CASES)


def clip_tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    vocabulary = dict(theirs.encoder)
    vocabulary["<|startoftext|>"] = vocabulary.pop("<start_of_text>")
    vocabulary["<|endoftext|>"] = vocabulary.pop("<end_of_text>")
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks))


def siglip_tokenizer(folder: Path) -> Any:
    return transformers.SiglipTokenizer(str(write_spiece(folder)))


def siglip2_tokenizer() -> Any:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trained.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=100, special_tokens=specials, show_progress=False
    )
    trained.train_from_iterator([text.lower() for text in CAPTIONS * 5], trainer)
    values = json.loads(trained.to_str())["model"]
    tokenizer = transformers.Siglip2Tokenizer(
        vocab=values["vocab"],
        merges=[tuple(merge) for merge in values["merges"]],
        padding_side="right",
    )
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


def save_cases(parent: Path) -> dict[str, Path]:
    """Saves each case as transformers does; returns its folder."""
    made = {
        "clip": clip_tokenizer(),
        "siglip": siglip_tokenizer(parent),
        "naflex": siglip2_tokenizer(),
    }
    images: dict[str, Any] = {
        "clip": transformers.CLIPImageProcessor,
        "siglip": transformers.SiglipImageProcessor,
        "naflex": transformers.Siglip2ImageProcessor,
    }
    result = {}
    for name, build in CASES.items():
        family = name.split("-")[0]
        torch.manual_seed(0)
        model = build()
        randomise(model, seed=1, std=0.1)
        result[name] = parent / name
        model.save_pretrained(parent / name)
        if name not in made:  # a variant's tokenizer is its family's
            for path in (parent / family).iterdir():
                if path.name not in ("config.json", "model.safetensors"):
                    shutil.copy(path, parent / name)
            continue
        made[family].save_pretrained(parent / name)
        size = {"patch_size": PATCH, "max_num_patches": 30} if family == "naflex" else {}
        images[family](image_mean=MEAN, image_std=STD, **size).save_pretrained(parent / name)
    return result
