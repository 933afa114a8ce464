"""Small open_clip models of each supported structure, and what to feed both sides.

Registered under names of their own, as a user registers a model with open_clip; the structure is
that of the released ones, so that all code for them runs, in milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from packed_examples import random_image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from navit_clip.interop.open_clip import config_of
from navit_clip.interop.open_clip.names import model_pairs
from navit_clip.interop.weights import to_ours
from navit_clip.model import NaViTCLIP
from navit_clip.models.clip import CLIPConfig
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.packed.texts import pack_texts

VOCAB = 49408  # of open_clip's tokenizer
PAD = 1  # as SigLIP's tokenizers pad

_CLIP: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 24, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 9, "vocab_size": VOCAB, "width": 24, "heads": 3, "layers": 2},
}
_SIGLIP: dict[str, Any] = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 24,
        "timm_model_name": "vit_tiny_case_siglip_24",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 7,
        "vocab_size": 90,
        "hf_tokenizer_name": "nobody/tiny",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 24,
        "heads": 3,
        "layers": 2,
        "mlp_ratio": 3.1,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}


def _changed(base: dict[str, Any], **changes: dict[str, Any] | Any) -> dict[str, Any]:
    values = copy.deepcopy(base)
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return values


SMALL = {
    "tiny-clip": _CLIP,
    "tiny-clip-quick": _changed(_CLIP, quick_gelu=True),
    # As in g-14 and bigG-14, where the MLP's width is no whole multiple.
    "tiny-clip-ratio": _changed(_CLIP, vision_cfg={"mlp_ratio": 3.37}),
    "tiny-siglip": _SIGLIP,
    "tiny-siglip2": _changed(
        _SIGLIP,
        vision_cfg={"timm_model_name": "vit_tiny_case_siglip2_24"},
        text_cfg={"act_kwargs": {"approximate": "tanh"}},
    ),
    # As the multilingual SO400M: text of the shared width, without a projection.
    "tiny-siglip-unprojected": _changed(
        _SIGLIP, text_cfg={"width": 32, "heads": 4, "proj_type": "none"}
    ),
}


def _vit(activation: str | None, **options: Any) -> VisionTransformer:
    for unused in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(unused, None)
    return VisionTransformer(
        img_size=24,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        mlp_ratio=3.7362,
        class_token=False,
        act_layer=activation,
        **options,
    )


@timm.models.register_model
def vit_tiny_case_siglip_24(**options: Any) -> VisionTransformer:
    """The structure of SigLIP's image towers."""
    return _vit(None, **options)


@timm.models.register_model
def vit_tiny_case_siglip2_24(**options: Any) -> VisionTransformer:
    """The structure of SigLIP 2's."""
    return _vit("gelu_tanh", **options)


@timm.models.register_model
def vit_tiny_case_scaled_24(**options: Any) -> VisionTransformer:
    """SigLIP's, with layer scales that no SigLIP has."""
    return _vit(None, init_values=0.1, **options)


@contextmanager
def small_models(extra: dict[str, dict[str, Any]] | None = None) -> Iterator[None]:
    """open_clip knows the small models, and any others given, as long as this lasts."""
    known = open_clip.factory._MODEL_CONFIGS
    names = {**SMALL, **(extra or {})}
    known.update(names)
    try:
        yield
    finally:
        for name in names:
            known.pop(name)


def perturb(module: nn.Module, seed: int, size: float) -> None:
    """Moves every parameter off its first value, by at most `size`; quick on large models."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.empty_like(parameter).uniform_(-size, size, generator=generator)


def both(name: str, size: float) -> tuple[nn.Module, NaViTCLIP]:
    """open_clip's model with perturbed weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(name, load_weights=False).eval()
    perturb(theirs, seed=1, size=size)
    config = config_of(name)
    ours = NaViTCLIP(config).eval()
    ours.load_state_dict(to_ours(model_pairs(config), theirs.state_dict()))
    return theirs, ours


def own_images(config: CLIPConfig, count: int) -> list[ImagePatches]:
    """Images of the model's own square size: random ones, the last nearly flat."""
    side, patch = config.image.position.table_side, config.image.patch_size
    images = [random_image(seed, (side, side), patch_size=patch) for seed in range(count)]
    images[-1].patches[:] = 124 + images[-1].patches % 2
    return images


def pixels(images: list[ImagePatches], config: CLIPConfig) -> Tensor:
    """The same images as open_clip takes them: float [E, 3, H, W], normalised."""
    side, patch = config.image.position.table_side, config.image.patch_size
    squares = [
        np.einsum("rcyxk->krycx", image.patches.reshape(side, side, patch, patch, 3)).reshape(
            3, side * patch, side * patch
        )
        for image in images
    ]
    mean, std = torch.tensor(config.image.pixel_mean), torch.tensor(config.image.pixel_std)
    batch = torch.from_numpy(np.stack(squares)).float() / 255
    return (batch - mean[:, None, None]) / std[:, None, None]


def captions(config: CLIPConfig, lengths: list[int]) -> list[list[int]]:
    """Captions of random ids with so many tokens, as the model's tokenizer would leave them."""
    rng = np.random.default_rng(2)
    context = config.text.context_length
    if config.text.fill_context:
        words = [rng.integers(2, config.text.vocab_size, length).tolist() for length in lengths]
        return [ids + [PAD] * (context - len(ids)) for ids in words]
    return [
        [VOCAB - 2, *rng.integers(1, VOCAB - 2, length - 2).tolist(), VOCAB - 1]
        for length in lengths
    ]


def padded(texts: list[list[int]], config: CLIPConfig) -> Tensor:
    """The same captions as open_clip takes them: int64 [E, context]."""
    ids = torch.zeros(len(texts), config.text.context_length, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return ids


@torch.no_grad()
def our_embeddings(
    model: NaViTCLIP, images: list[ImagePatches], texts: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Unit vectors of images and of captions, each side in one pack."""
    return model.embed_images(pack_images(images)), model.embed_texts(pack_texts(texts))


@torch.no_grad()
def their_embeddings(model: nn.Module, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """The same of open_clip's model."""
    return model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
