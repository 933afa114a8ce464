"""Pixels are normalised alike whatever a model is converted to; patches may have any size."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from navit_clip.models.patch_embed import PatchEmbed, resize_kernel

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


def bilinear(from_size: int, to_size: int) -> np.ndarray:
    """[to, from] one axis of a resize with half-pixel centres and without antialiasing."""
    matrix = np.zeros((to_size, from_size))
    for i in range(to_size):
        place = (i + 0.5) * from_size / to_size - 0.5
        below = int(np.floor(place))
        for pixel, weight in ((below, below + 1 - place), (below + 1, place - below)):
            matrix[i, min(max(pixel, 0), from_size - 1)] += weight
    return matrix


SIZES = [(4, 8), (8, 4), (5, 7), (6, 13), (7, 3), (4, 1), (1, 4), (32, 12), (12, 32)]


@pytest.mark.parametrize(("from_size", "to_size"), SIZES)
def test_a_kernel_is_resized_by_the_pseudo_inverse(from_size, to_size):
    # FlexiViT, as big_vision computes it: pinv(resize_mat.T) @ kernel, for each channel.
    axis = bilinear(from_size, to_size)
    resize_QP = np.kron(axis, axis)
    kernel = torch.randn(2, from_size**2 * 3, dtype=torch.float64)
    expected = np.einsum(
        "qp,cpk->cqk", np.linalg.pinv(resize_QP.T), kernel.unflatten(1, (-1, 3)).numpy()
    )
    actual = resize_kernel(kernel, from_size, to_size)
    np.testing.assert_allclose(actual.unflatten(1, (-1, 3)), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("size", "larger"), [(4, 8), (5, 7), (8, 32), (16, 48)])
def test_an_enlarged_patch_becomes_the_same_token(size, larger):
    torch.manual_seed(0)
    kernel = torch.randn(6, size**2 * 3) / size
    patch = torch.randn(5, 3, size, size)
    enlarged = F.interpolate(patch, (larger, larger), mode="bilinear")
    before, after = (x.permute(0, 2, 3, 1).flatten(1) for x in (patch, enlarged))
    token = after @ resize_kernel(kernel, size, larger).T
    torch.testing.assert_close(token, before @ kernel.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [2, 6])
def test_patches_of_any_size_are_normalised_and_the_stored_kernel_learns(size):
    embed = embedding().double()
    patches = torch.randint(0, 256, (7, 3 * size**2), dtype=torch.uint8)
    (embed(patches) ** 2).sum().backward()
    found, embed.weight.grad = embed.weight.grad, None
    mean, std = (torch.tensor(x, dtype=torch.float64).repeat(size**2) for x in (MEAN, STD))
    axis = torch.from_numpy(bilinear(4, size))
    inverse = torch.linalg.pinv(torch.kron(axis, axis).T)
    kernel = torch.stack([inverse @ embed.weight[:, k::3].T for k in range(3)], 1)
    expected = (patches / 255.0 - mean) / std @ kernel.flatten(0, 1) + embed.bias
    torch.testing.assert_close(embed(patches), expected, rtol=1e-5, atol=1e-5)
    (expected**2).sum().backward()
    torch.testing.assert_close(found, embed.weight.grad, rtol=1e-5, atol=1e-3)


def test_a_resized_kernel_is_exact_under_autocast():
    kernel = embedding().weight
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_kernel(kernel, 4, 6)
    assert torch.equal(found, resize_kernel(kernel, 4, 6))


def test_what_an_inference_resized_can_be_trained_on():
    kernel, side = embedding().weight, 9  # of which no other test knows the weights
    with torch.inference_mode():
        resize_kernel(kernel, 4, side)
    resize_kernel(kernel, 4, side).sum().backward()
    assert kernel.grad is not None
