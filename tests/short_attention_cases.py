"""Attention in short segments against a dense one over the whole stream, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from navit_clip.kernels.short_attention import (
    CLASSES,
    short_attention_backward,
    short_attention_forward,
)

HEADS, EPS = 2, 1e-6
# Triton's interpreter rounds to bfloat16 by cutting off.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def dense_attention(
    qkv_T3HD: Tensor, lengths: Sequence[int], norms: Sequence[Tensor], causal: bool
) -> Tensor:
    """LayerNorm of q and k, and softmax over all pairs of tokens with the forbidden at -inf."""
    q_THD, k_THD, v_THD = qkv_T3HD.unbind(1)
    if norms:
        q_THD, k_THD = (
            F.layer_norm(x, x.shape[-1:], weight, eps=EPS)
            for x, weight in zip((q_THD, k_THD), norms, strict=True)
        )
    allowed = torch.block_diag(*(torch.ones(n, n) for n in lengths)).to(q_THD)
    if causal:
        allowed = allowed.tril()
    scores_HTS = torch.einsum("thd,shd->hts", q_THD, k_THD) / q_THD.shape[-1] ** 0.5
    scores_HTS = scores_HTS.masked_fill(allowed == 0, -torch.inf)
    return torch.einsum("hts,shd->thd", scores_HTS.softmax(-1), v_THD)


def class_bounds(lengths: Sequence[int]) -> list[int]:
    """Where each class begins and ends among lengths in rising order."""
    return [0, *(sum(n <= longest for n in lengths) for longest in CLASSES)]


def run(
    qkv_T3HD: Tensor,
    grad_THD: Tensor,
    lengths: Sequence[int],
    norms: Sequence[Tensor],
    causal: bool,
    bounds: Sequence[int] | None = None,
) -> list[Tensor]:
    """Output and gradients, NaN where the kernels write nothing."""
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=qkv_T3HD.device)
    shared = (offsets, bounds or class_bounds(lengths), *(norms or (None, None)), EPS, causal)
    out_THD = torch.full_like(grad_THD, torch.nan)
    dqkv_T3HD = torch.full_like(qkv_T3HD, torch.nan)
    short_attention_forward(qkv_T3HD, *shared, out_THD)
    dnorms = short_attention_backward(grad_THD, qkv_T3HD, *shared, dqkv_T3HD)
    return [out_THD, dqkv_T3HD, *(dnorms or ())]


def random_inputs(
    tokens: int, width: int, dtype: torch.dtype, norm: bool, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """qkv, the gradient of the output, and the norms' weights."""
    generator = torch.Generator().manual_seed(seed)
    qkv_T3HD = torch.randn(tokens, 3, HEADS, width, generator=generator)
    grad_THD = torch.randn(tokens, HEADS, width, generator=generator)
    norms = list(1 + torch.randn(2, width, generator=generator) / 2) if norm else []
    return qkv_T3HD.to(device, dtype), grad_THD.to(device, dtype), [x.to(device) for x in norms]


def check(
    lengths: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    width: int = 64,
    causal: bool = False,
    norm: bool = True,
    seed: int = 0,
) -> None:
    """Compares values and gradients for lengths in rising order."""
    qkv_T3HD, grad_THD, norms = random_inputs(sum(lengths), width, dtype, norm, device, seed)
    actual = run(qkv_T3HD, grad_THD, lengths, norms, causal)
    leaves = [x.double().requires_grad_() for x in (qkv_T3HD, *norms)]
    out_THD = dense_attention(leaves[0], lengths, leaves[1:], causal)
    grads = torch.autograd.grad((out_THD * grad_THD).sum(), leaves)
    names = ("out", "qkv.grad", "q_weight.grad", "k_weight.grad")
    for name, got, expected in zip(names, actual, (out_THD, *grads), strict=False):
        error = (got.double() - expected).abs().max().item()
        limit = TOLERANCES[dtype] * max(1.0, expected.abs().max().item())
        assert error <= limit, f"{name}: error {error:.3g} exceeds {limit:.3g}"
    assert len(actual) == 1 + len(grads)


def check_rows_of_no_class_stay(*, device: str) -> None:
    """The first and the last two of six segments belong to no class, the third is empty."""
    lengths, bounds = (5, 3, 0, 20, 40, 2), [1, 3, 4, 4, 4, 4]
    qkv_T3HD, grad_THD, norms = random_inputs(sum(lengths), 64, torch.float32, True, device)
    out_THD, dqkv_T3HD, *_ = run(qkv_T3HD, grad_THD, lengths, norms, False, bounds)
    alone = run(qkv_T3HD[5:28], grad_THD[5:28], (3, 0, 20), norms, False, [0, 2, 3, 3, 3, 3])
    assert torch.equal(out_THD[5:28], alone[0])
    assert torch.equal(dqkv_T3HD[5:28], alone[1])
    for x in (out_THD, dqkv_T3HD):
        assert torch.isfinite(x[5:28]).all()
        assert x[:5].isnan().all()
        assert x[28:].isnan().all()


def check_neighbours_change_no_bit(*, device: str) -> None:
    lengths = (2, 5, 30, 40)
    qkv_T3HD, grad_THD, norms = random_inputs(sum(lengths), 64, torch.bfloat16, True, device)
    before = [x[2:37].clone() for x in run(qkv_T3HD, grad_THD, lengths, norms, False)[:2]]
    for x in (qkv_T3HD, grad_THD):
        x[:2], x[37:] = 1e4, torch.nan
    for x, expected in zip(run(qkv_T3HD, grad_THD, lengths, norms, False), before, strict=False):
        assert torch.equal(x[2:37], expected)


def check_two_runs_are_the_same_bits(*, device: str) -> None:
    lengths = (1, 14, 33, 100)
    inputs = random_inputs(sum(lengths), 64, torch.bfloat16, True, device)
    first, second = (run(*inputs[:2], lengths, inputs[2], True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def check_nothing_at_all(*, device: str) -> None:
    qkv_T3HD, grad_THD, norms = random_inputs(0, 64, torch.bfloat16, True, device)
    _, _, dq_weight, dk_weight = run(qkv_T3HD, grad_THD, (), norms, False)
    assert not dq_weight.any()
    assert not dk_weight.any()


def check_a_stream_beyond_32_bits(*, device: str) -> None:
    """2^31 elements and a few more, of which the last segment alone is computed."""
    before, lengths = 2**31 // (3 * HEADS * 64), (4, 10)
    qkv_T3HD, grad_THD, norms = random_inputs(14, 64, torch.bfloat16, True, device)
    expected = run(qkv_T3HD, grad_THD, lengths, norms, False)
    long_qkv, long_grad = (x.new_empty(before + 14, *x.shape[1:]) for x in (qkv_T3HD, grad_THD))
    long_qkv[before:], long_grad[before:] = qkv_T3HD, grad_THD
    bounds = [1, 3, 3, 3, 3, 3]
    actual = run(long_qkv, long_grad, (before, *lengths), norms, False, bounds)
    for got, x in zip(actual[:2], expected[:2], strict=True):
        assert torch.equal(got[before:], x)
