"""Checks of the contrastive kernels, for a GPU or Triton's interpreter (`interpreter`)."""

import random
from contextlib import ExitStack
from unittest import mock

import torch
import torch.nn.functional as F
from contrastive_reference import assert_agree, chunked, reference
from torch import Tensor

from navit_clip.kernels import contrastive as kernels
from navit_clip.losses import _tiles as tiles


def _features(rows: int, columns: int, width: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Random unit vectors in bfloat16; the first of both are pairs that match well."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(n, width, generator=generator) for n in (rows, columns))
    shared = min(rows, columns)
    text[:shared] += image[:shared]
    image, text = (F.normalize(x, dim=1).to(device, torch.bfloat16) for x in (image, text))
    return image, text


def _logits(image: Tensor, text: Tensor, scale: float) -> Tensor:
    return scale * image.double() @ text.double().T


def check_statistics(rows, columns, width, scale, seed, side=kernels.SIDE, device="cpu"):
    """Twice: into log-sum-exps of nothing, and into those of an earlier block."""
    image, text = _features(rows, columns, width, seed, device)
    logits = _logits(image, text, scale)
    row_lse, column_lse = (torch.full((n,), -torch.inf, device=device) for n in (rows, columns))
    matching = torch.full((rows,), torch.nan, device=device) if rows == columns else None
    factor = torch.tensor(scale, device=device)
    for times in (1, 2):
        with mock.patch.object(kernels, "SIDE", side):
            kernels.softmax_statistics(image, text, factor, row_lse, column_lse, matching)
        many = torch.tensor(float(times), dtype=torch.float64).log().to(device)
        limits = {"rtol": 1e-6, "atol": 1e-5 * max(1.0, abs(scale) / 10), "check_dtype": False}
        torch.testing.assert_close(row_lse, logits.logsumexp(1) + many, **limits)
        torch.testing.assert_close(column_lse, logits.logsumexp(0) + many, **limits)
        if matching is not None:
            torch.testing.assert_close(matching, logits.diagonal(), **limits)


def check_weights(rows, columns, width, scale, seed, device="cpu"):
    image, text = _features(rows, columns, width, seed, device)
    logits = _logits(image, text, scale)
    # As if there were more images and texts than these.
    row_lse, column_lse = logits.logsumexp(1) + 0.5, logits.logsumexp(0) + 0.25
    matches = rows == columns
    expected = (logits - row_lse[:, None]).exp() + (logits - column_lse).exp()
    expected -= 2 * matches * torch.eye(rows, columns, device=device)
    factor = torch.tensor(scale, device=device)
    stride = -(-columns // kernels.ALIGNMENT) * kernels.ALIGNMENT
    for dtype in (torch.bfloat16, torch.float32):
        whole = torch.full((rows + 1, stride), torch.nan, device=device, dtype=dtype)
        out = whole[:rows, :columns]
        kernels.softmax_weights(
            image, text, factor, row_lse.float(), column_lse.float(), matches, out
        )
        assert torch.isnan(whole[rows]).all()
        assert not whole[:rows, columns:].any()
        error = (out - expected).abs()
        # The interpreter rounds towards zero, which loses a bit of the eight.
        rounding = expected.abs() * 2**-7 if dtype == torch.bfloat16 else 0.0
        assert (error <= 1e-5 * max(1.0, abs(scale) / 10) + rounding).all()


def check_sums_of_one_pair_are_its_logit(device="cpu"):
    image, text = _features(1, 1, 24, 0, device)
    row_lse, column_lse = torch.full((2, 1), -torch.inf, device=device)
    matching = torch.empty(1, device=device)
    scale = torch.tensor(100.0, device=device)
    kernels.softmax_statistics(image, text, scale, row_lse, column_lse, matching)
    assert row_lse == column_lse == matching


def check_weights_of_matches_far_above_all_others_are_zero(device="cpu"):
    """The loss is zero to all digits, and so is its gradient."""
    image = F.normalize(torch.randn(200, 64), dim=1).to(device, torch.bfloat16)
    scale = torch.tensor(300.0, device=device)
    row_lse, column_lse = torch.full((2, 200), -torch.inf, device=device)
    matching = torch.empty(200, device=device)
    kernels.softmax_statistics(image, image, scale, row_lse, column_lse, matching)
    out = torch.empty(200, 208, device=device)[:, :200]
    kernels.softmax_weights(image, image, scale, row_lse, column_lse, True, out)
    assert torch.equal(row_lse, matching)
    assert not out.diagonal().any()


def check_random_shapes(seed, device="cpu"):
    draw = random.Random(seed)
    rows, columns = draw.randint(1, 300), draw.randint(1, 300)
    width, scale = draw.choice((8, 40, 64, 72)), draw.uniform(-5, 100)
    check_statistics(rows, columns, width, scale, seed, device=device)
    check_statistics(rows, rows, width, scale, seed, side=128, device=device)
    check_weights(rows, columns, width, scale, seed, device=device)


def check_two_runs_are_the_same_bits(device="cpu"):
    image, text = _features(200, 200, 64, 0, device)
    scale = torch.tensor(30.0, device=device)
    runs = []
    for _ in range(2):
        row_lse, column_lse = torch.full((2, 200), -torch.inf, device=device)
        kernels.softmax_statistics(image, text, scale, row_lse, column_lse, None)
        runs.append(torch.cat([row_lse, column_lse]))
    assert torch.equal(*runs)


def check_loss(pairs, width, scale, seed, chunk_size, device="cpu"):
    """The loss with the kernels in place of its tiles; products as CUDA computes them."""
    image, text = _features(pairs, pairs, width, seed, device)
    patches = {
        "has_kernels": lambda features: True,
        "operand_dtype": lambda features: torch.bfloat16,
        "accumulate": lambda total, a, b: total.add_(a.float() @ b.float()),
    }
    with ExitStack() as stack:
        for name, patch in patches.items() if device == "cpu" else ():
            stack.enter_context(mock.patch.object(tiles, name, patch))
        actual = chunked("softmax", image, text, scale, 0.0, chunk_size=chunk_size)
    expected = reference("softmax", image.cpu(), text.cpu(), scale, 0.0)
    assert actual.image.dtype == torch.bfloat16
    assert_agree(type(actual)(*(x.cpu() for x in actual)), expected, 1e-2)
