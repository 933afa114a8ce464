"""The table of parameters: our name, open_clip's, and how the tensor lies in memory on each side.

Used in both directions, so that what comes in goes out bit for bit. A tensor is only ever
reordered or cut, never computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from navit_clip.models.clip import CLIPConfig


class Layout(NamedTuple):
    """How one tensor lies on either side.

    Attributes:
        ours: Their tensor to ours.
        theirs: Our tensor to theirs, or to the rows of it that are ours.
    """

    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor]


def _patches_to_kernel(weight_CK: Tensor) -> Tensor:
    side = round((weight_CK.shape[1] // 3) ** 0.5)
    return weight_CK.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)


SAME = Layout(lambda x: x, lambda x: x)
TRANSPOSED = Layout(lambda x: x.T, lambda x: x.T)
# A convolution over [3, P, P], and a product with a patch's pixels in rows of three channels.
KERNEL = Layout(lambda x: x.permute(0, 2, 3, 1).flatten(1), _patches_to_kernel)
FIRST_ROW = Layout(lambda x: x[0], lambda x: x[None])
OTHER_ROWS = Layout(lambda x: x[1:], lambda x: x)
BATCH_OF_ONE = Layout(lambda x: x[0], lambda x: x[None])
ONE_TOKEN = Layout(lambda x: x[0, 0], lambda x: x[None, None])


class Pair(NamedTuple):
    """One of our parameters and theirs; several of ours may be rows of one of theirs, in order."""

    ours: str
    theirs: str
    layout: Layout = SAME


def _layers(*names: tuple[str, str]) -> tuple[Pair, ...]:
    """Pairs of weights and biases of layers."""
    return tuple(
        Pair(f"{ours}.{part}", f"{theirs}.{part}")
        for ours, theirs in names
        for part in ("weight", "bias")
    )


OPEN_CLIP_BLOCK = (
    *_layers(("attention_norm", "ln_1"), ("attention.out", "attn.out_proj")),
    Pair("attention.qkv.weight", "attn.in_proj_weight"),
    Pair("attention.qkv.bias", "attn.in_proj_bias"),
    *_layers(("mlp_norm", "ln_2"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")),
)
TIMM_BLOCK = _layers(
    ("attention_norm", "norm1"),
    ("attention.qkv", "attn.qkv"),
    ("attention.out", "attn.proj"),
    ("mlp_norm", "norm2"),
    ("mlp.up", "mlp.fc1"),
    ("mlp.down", "mlp.fc2"),
)


def _within(ours: str, theirs: str, pairs: tuple[Pair, ...]) -> list[Pair]:
    """Pairs below a prefix of each side."""
    return [Pair(ours + pair.ours, theirs + pair.theirs, pair.layout) for pair in pairs]


def _blocks(ours: str, theirs: str, block: tuple[Pair, ...], depth: int) -> list[Pair]:
    return [pair for i in range(depth) for pair in _within(f"{ours}{i}.", f"{theirs}{i}.", block)]


def clip_image_tower(depth: int) -> list[Pair]:
    """CLIP's own image tower, with its projection."""
    tower = (
        Pair("embed.weight", "conv1.weight", KERNEL),
        Pair("class_token", "class_embedding"),
        Pair("class_position", "positional_embedding", FIRST_ROW),
        Pair("position.table", "positional_embedding", OTHER_ROWS),
        *_layers(("encoder.pre_norm", "ln_pre"), ("encoder.norm", "ln_post")),
    )
    return [
        *_within("image.", "visual.", tower),
        *_blocks("image.encoder.blocks.", "visual.transformer.resblocks.", OPEN_CLIP_BLOCK, depth),
        Pair("image_projection.weight", "visual.proj", TRANSPOSED),
    ]


def timm_image_tower(depth: int) -> list[Pair]:
    """SigLIP's image tower, timm's ViT with attention pooling; there is no projection."""
    tower = (
        Pair("embed.weight", "patch_embed.proj.weight", KERNEL),
        Pair("embed.bias", "patch_embed.proj.bias"),
        Pair("position.table", "pos_embed", BATCH_OF_ONE),
        Pair("pool.probe", "attn_pool.latent", ONE_TOKEN),
        *_layers(
            ("encoder.norm", "norm"),
            ("pool.q", "attn_pool.q"),
            ("pool.kv", "attn_pool.kv"),
            ("pool.out", "attn_pool.proj"),
            ("pool.norm", "attn_pool.norm"),
            ("pool.mlp.up", "attn_pool.mlp.fc1"),
            ("pool.mlp.down", "attn_pool.mlp.fc2"),
        ),
    )
    return [
        *_within("image.", "visual.trunk.", tower),
        *_blocks("image.encoder.blocks.", "visual.trunk.blocks.", TIMM_BLOCK, depth),
    ]


def text_tower(config: CLIPConfig, prefix: str) -> list[Pair]:
    """open_clip's text tower, with its projection if it has one.

    Args:
        config: The whole model's.
        prefix: Where open_clip keeps the tower: nowhere in CLIP, in ``text.`` with a timm tower.
    """
    tower = (
        Pair("token", "token_embedding.weight"),
        Pair("position", "positional_embedding"),
        *_layers(("encoder.norm", "ln_final")),
    )
    pairs = [
        *_within("text.", prefix, tower),
        *_blocks(
            "text.encoder.blocks.",
            f"{prefix}transformer.resblocks.",
            OPEN_CLIP_BLOCK,
            config.text.encoder.depth,
        ),
    ]
    projection = f"{prefix}text_projection"
    if config.text_projection == "linear":
        pairs.append(Pair("text_projection.weight", projection, TRANSPOSED))
    elif config.text_projection == "affine":
        pairs += _layers(("text_projection", projection))
    return pairs


def model_pairs(config: CLIPConfig) -> list[Pair]:
    """All parameters of a model of either family."""
    clip = config.image.pooling == "cls"
    depth = config.image.encoder.depth
    pairs = [
        *(clip_image_tower(depth) if clip else timm_image_tower(depth)),
        *text_tower(config, "" if clip else "text."),
        Pair("log_scale", "logit_scale"),
    ]
    if config.init_bias is not None:
        pairs.append(Pair("logit_bias", "logit_bias"))
    return pairs


def to_ours(pairs: list[Pair], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names; views where the layout allows."""
    return {pair.ours: pair.layout.ours(theirs[pair.theirs]) for pair in pairs}


def to_theirs(pairs: list[Pair], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names, contiguous."""
    rows: dict[str, list[Tensor]] = {}
    for pair in pairs:
        rows.setdefault(pair.theirs, []).append(pair.layout.theirs(ours[pair.ours]))
    return {
        name: (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()
        for name, parts in rows.items()
    }
