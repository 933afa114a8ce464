"""Small hierarchical towers, and what they compute, written on the whole grid of one image."""

from __future__ import annotations

import re
from itertools import accumulate

import numpy as np
import torch
from packed_examples import randomise
from torch import Tensor, nn

from navit_clip.models.hierarchical_tower import HierarchyConfig
from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.rope import Rotary, RotaryConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.images import ImagePatches

_SWIN_NAMES = {
    "patch_embed.proj": "embed",
    "patch_embed.norm": "encoder.pre_norm",
    "merge.reduction": "merge.linear",
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "attn.": "attention.",
    "attention.proj": "attention.out",
    "relative_position_bias_table": "bias",
    "fc1": "up",
    "fc2": "down",
}


def tower_config(
    depths: tuple[int, ...] = (2, 2, 3),
    window: int = 3,
    width: int = 16,
    heads: int = 4,
    patch: int = 2,
    rotary: RotaryConfig = RotaryConfig(),  # noqa: B008  frozen
) -> ImageTowerConfig:
    """As Swin is, with patches of `patch` pixels in the first stage."""
    encoder = EncoderConfig(
        width,
        sum(depths),
        heads,
        qk_norm=False,
        qkv_bias=True,
        norm_bias=True,
        pre_norm=True,
        norm_eps=1e-5,
    )
    return ImageTowerConfig(
        patch << len(depths) - 1,
        encoder,
        PositionConfig("none"),
        "mean",
        rotary=rotary,
        hierarchy=HierarchyConfig(depths, window),
    )


def swin_config(width: int, depths: tuple[int, ...], heads: tuple[int, ...]) -> ImageTowerConfig:
    """Swin with windows of 7, by the width of its first stage and the heads of all."""
    last = 1 << len(depths) - 1
    return tower_config(depths, 7, width * last, heads[-1], patch=4)


def swin_weights(swin: nn.Module) -> dict[str, Tensor]:
    """The weights of timm's Swin by the names of ours."""
    weights = {}
    firsts = [0, *accumulate(len(layer.blocks) for layer in swin.layers)]
    for name, value in swin.state_dict().items():
        name = re.sub(
            r"layers\.(\d+)\.(downsample|blocks\.(\d+))",
            lambda m: (
                f"encoder.blocks.{firsts[int(m[1])] + int(m[3] or 0)}" + ".merge" * (not m[3])
            ),
            name,
        )
        for theirs, ours in _SWIN_NAMES.items():
            name = name.replace(theirs, ours)
        if name == "embed.weight":
            value = value.permute(0, 2, 3, 1).flatten(1)
        weights[name if name.startswith(("embed", "encoder")) else f"encoder.{name}"] = value
    return weights


def random_tower(config: ImageTowerConfig, seed: int = 0) -> ImageTower:
    """In float64, every parameter off its first value."""
    tower = ImageTower(config)
    randomise(tower, seed)
    return tower.double()


def dense_tokens(tower: ImageTower, image: ImagePatches) -> Tensor:
    """[U, C] tokens of an image's units: all of its grid computed, hidden units masked."""
    hierarchy, unit = tower.config.hierarchy, image.patch_size
    (rows, columns), patch = image.grid, unit >> hierarchy.merges
    pixels = np.zeros((rows, unit, columns, unit, 3), dtype=np.uint8)
    seen = np.zeros((rows, columns), dtype=bool)
    for (row, column), values in zip(image.coords, image.patches, strict=True):
        pixels[row, :, column] = values.reshape(unit, unit, 3)
        seen[row, column] = True
    height, width = rows * unit // patch, columns * unit // patch
    patches = pixels.reshape(height, patch, width, patch, 3).transpose(0, 2, 1, 3, 4)
    x_HWC = tower.embed(torch.from_numpy(patches.reshape(height * width, -1)))
    x_HWC = tower.encoder.pre_norm(x_HWC.unflatten(0, (height, width)))
    index = iter(tower.encoder.blocks)
    for stage, depth in enumerate(hierarchy.depths):
        for number in range(depth):
            block = next(index)
            if stage and not number:
                squares = [x_HWC[i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
                x_HWC = block.merge.linear(block.merge.norm(torch.cat(squares, -1)))
            shift = number % 2 * (hierarchy.window // 2)
            y_HWC = block.attention_norm(x_HWC)
            rotary = None
            if tower.encoder.rotary is not None:
                cells = torch.cartesian_prod(*map(torch.arange, y_HWC.shape[:2])).double()
                rotary = tower.encoder.rotary[stage](cells)[number]
            x_HWC = x_HWC + _attend(block.attention, y_HWC, seen, hierarchy.window, shift, rotary)
            x_HWC = x_HWC + block.mlp(block.mlp_norm(x_HWC))
    return tower.encoder.norm(x_HWC)[torch.from_numpy(seen)]


def _attend(
    attention, x_HWC: Tensor, seen: np.ndarray, window: int, shift: int, rotary: Rotary | None
) -> Tensor:
    height, width = x_HWC.shape[:2]
    seen = np.kron(seen, np.ones((height // len(seen), width // seen.shape[1]), dtype=bool))
    cells = [(r, c) for r in range(height) for c in range(width)]

    def of(coord: int, side: int) -> int:
        """Window of a row or column: the first one ends after `shift` of them."""
        return coord // window if side <= window or not shift else (coord - shift) // window

    offsets = np.zeros((len(cells), len(cells)), dtype=np.int64)
    mask = np.eye(len(cells), dtype=bool)
    for i, (r, c) in enumerate(cells):
        for j, (other_r, other_c) in enumerate(cells):
            same = of(r, height) == of(other_r, height) and of(c, width) == of(other_c, width)
            if same:
                mask[i, j] |= seen[other_r, other_c]
                offset = r - other_r + window - 1, c - other_c + window - 1
                offsets[i, j] = offset[0] * (2 * window - 1) + offset[1]
    qkv_3HND = attention.qkv(x_HWC.flatten(0, 1)).unflatten(-1, (3, attention.heads, -1))
    q, k, v = qkv_3HND.unbind(1)
    if rotary is not None:
        q, k = rotary.rotate(q, k)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if rotary is None:
        scores = scores + attention.bias[torch.from_numpy(offsets)].movedim(-1, 0)
    weights = scores.masked_fill(~torch.from_numpy(mask), -torch.inf).softmax(-1)
    return attention.out((weights @ v).transpose(0, 1).flatten(1)).unflatten(0, (height, width))
