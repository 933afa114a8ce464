"""The table of parameters: our name, open_clip's, and how the tensor lies in memory on each side.

Used in both directions, so that what comes in goes out bit for bit. A tensor is only ever
reordered or cut, never computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from navit_clip.interop import timm_vit
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
FIRST = Layout(lambda x: x[0], lambda x: x[None])
OTHER_ROWS = Layout(lambda x: x[1:], lambda x: x)
ONE_TOKEN = Layout(lambda x: x[0, 0], lambda x: x[None, None])


class Pair(NamedTuple):
    """One of our parameters and theirs; several of ours may be rows of one of theirs, in order."""

    ours: str
    theirs: str
    layout: Layout = SAME


def _layers(names: Mapping[str, str]) -> tuple[Pair, ...]:
    """Pairs of weights and biases of layers, by our names and theirs."""
    return tuple(
        Pair(f"{ours}.{part}", f"{theirs}.{part}")
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    )


# Where a tower keeps its blocks, and one block's pairs.
OPEN_CLIP_BLOCKS = (
    "transformer.resblocks",
    (
        *_layers({"attention_norm": "ln_1", "attention.out": "attn.out_proj"}),
        Pair("attention.qkv.weight", "attn.in_proj_weight"),
        Pair("attention.qkv.bias", "attn.in_proj_bias"),
        *_layers({"mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}),
    ),
)
TIMM_BLOCKS = "blocks", _layers(timm_vit.BLOCK)
CLIP_IMAGE = (
    Pair("embed.weight", "conv1.weight", KERNEL),
    Pair("class_token", "class_embedding"),
    Pair("class_position", "positional_embedding", FIRST),
    Pair("position.table", "positional_embedding", OTHER_ROWS),
    *_layers({"encoder.pre_norm": "ln_pre", "encoder.norm": "ln_post"}),
)
TIMM_IMAGE = (  # with attention pooling, as SigLIP's
    Pair("embed.weight", "patch_embed.proj.weight", KERNEL),
    Pair("embed.bias", "patch_embed.proj.bias"),
    Pair("position.table", "pos_embed", FIRST),
    Pair("pool.probe", "attn_pool.latent", ONE_TOKEN),
    *_layers(timm_vit.TOWER),
)
TEXT = (
    Pair("token", "token_embedding.weight"),
    Pair("position", "positional_embedding"),
    *_layers({"encoder.norm": "ln_final"}),
)


def _tower(
    ours: str,
    theirs: str,
    tower: tuple[Pair, ...],
    blocks: tuple[str, tuple[Pair, ...]],
    depth: int,
) -> list[Pair]:
    """A tower's pairs below a prefix of each side, with those of each of its blocks."""
    folder, block = blocks
    in_blocks = [
        Pair(f"encoder.blocks.{i}.{pair.ours}", f"{folder}.{i}.{pair.theirs}")
        for i in range(depth)
        for pair in block
    ]
    return [
        Pair(ours + pair.ours, theirs + pair.theirs, pair.layout) for pair in (*tower, *in_blocks)
    ]


def model_pairs(config: CLIPConfig) -> list[Pair]:
    """All parameters of a model of either family."""
    depth = config.image.encoder.depth
    if config.image.pooling == "cls":
        text = ""
        pairs = _tower("image.", "visual.", CLIP_IMAGE, OPEN_CLIP_BLOCKS, depth)
        pairs.append(Pair("image_projection.weight", "visual.proj", TRANSPOSED))
    else:  # open_clip keeps the text beside a tower of timm's in a tower of its own
        text = "text."
        pairs = _tower("image.", "visual.trunk.", TIMM_IMAGE, TIMM_BLOCKS, depth)
    pairs += _tower("text.", text, TEXT, OPEN_CLIP_BLOCKS, config.text.encoder.depth)
    projection = f"{text}text_projection"
    if config.text_projection == "linear":
        pairs.append(Pair("text_projection.weight", projection, TRANSPOSED))
    elif config.text_projection == "affine":
        pairs += _layers({"text_projection": projection})
    pairs.append(Pair("log_scale", "logit_scale"))
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
