"""Pixels are normalised by the same constants whatever a model is converted to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from navit_clip.models.patch_embed import PatchEmbed

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def embedding() -> PatchEmbed:
    torch.manual_seed(0)
    return PatchEmbed(4, 24, MEAN, STD, bias=True)


def by_hand(embed: PatchEmbed, patches_TK: Tensor) -> Tensor:
    """In float64, with the weights that the layer has."""
    mean, std = (torch.tensor(x, dtype=torch.float64).repeat(16) for x in (MEAN, STD))
    pixels = (patches_TK.double() / 255 - mean) / std
    assert embed.bias is not None
    return pixels @ embed.weight.double().T + embed.bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_converted_layer_normalises_as_before(dtype):
    patches = torch.randint(0, 256, (50, 48), dtype=torch.uint8)
    embed = nn.Sequential(embedding()).to(dtype)[0]
    assert embed.pixel_scale.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(embed.pixel_scale.double(), embedding().pixel_scale.double())
    out = embed(patches)
    assert out.dtype == dtype
    expected = by_hand(embed, patches)
    error = (out.double() - expected).abs().max() / expected.abs().max()
    # Rounding goes both ways; a shift of the pixels would go one way, by 2^-8.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert error < 8 * eps
    assert abs((out.double() / expected).median() - 1) < eps / 2


def test_the_constants_survive_conversions_there_and_back_and_copies():
    layer = embedding()
    for change in ("bfloat16", "float", "half", "double", "bfloat16", "float"):
        layer = copy.deepcopy(getattr(layer, change)())
    assert torch.equal(layer.pixel_scale, embedding().pixel_scale)
    assert torch.equal(layer.pixel_shift, embedding().pixel_shift)


def test_it_is_made_without_memory():
    assert embedding().to("meta").bfloat16().pixel_scale.device.type == "meta"
