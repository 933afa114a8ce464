"""Attention pooling, segment by segment in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from navit_clip.kernels.pool_attention import pool_attention, pool_attention_backward
from navit_clip.models import pooling
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.segments import Segments

HEADS = 2
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def pool_each(q_HD: Tensor, kv_T2HD: Tensor, lengths: Sequence[int]) -> Tensor:
    """[E, H, D], zeros for an example without tokens."""
    pooled = []
    for kv_L2HD in kv_T2HD.split(list(lengths)):
        k_LHD, v_LHD = kv_L2HD.unbind(1)
        scores_LH = (q_HD * k_LHD).sum(-1) / q_HD.shape[-1] ** 0.5
        pooled.append((scores_LH.softmax(0)[:, :, None] * v_LHD).sum(0))
    return torch.stack(pooled)


def check(
    lengths: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    width: int = 64,
    seed: int = 0,
) -> None:
    """Compares values and gradients, and the gradients with those of a second run."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, HEADS, width, generator=generator).to(device, dtype)

    q_HD, kv_T2HD, grad_EHD = 2 * random(), random(sum(lengths), 2), random(len(lengths))
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    out_EHD = pool_attention(q_HD, kv_T2HD, offsets)
    actual = pool_attention_backward(grad_EHD, q_HD, kv_T2HD, offsets)
    again = pool_attention_backward(grad_EHD, q_HD, kv_T2HD, offsets)
    assert all(map(torch.equal, actual, again))

    leaves = [x.double().requires_grad_() for x in (q_HD, kv_T2HD)]
    expected_EHD = pool_each(leaves[0], leaves[1], lengths)
    grads = torch.autograd.grad((expected_EHD * grad_EHD).sum(), leaves)
    names = ("out", "q.grad", "kv.grad")
    pairs = zip(names, (out_EHD, *actual), (expected_EHD, *grads), strict=True)
    for name, got, expected in pairs:
        assert got.dtype == dtype
        error = (got.double() - expected).abs().max().item()
        limit = TOLERANCES[dtype] * max(1.0, expected.abs().max().item())
        assert error <= limit, f"{name}: error {error:.3g} exceeds {limit:.3g}"


def check_no_segments(*, device: str) -> None:
    q_HD, kv_T2HD = torch.ones(HEADS, 64, device=device), torch.ones(0, 2, HEADS, 64, device=device)
    offsets = torch.zeros(1, dtype=torch.int32, device=device)
    out_EHD = pool_attention(q_HD, kv_T2HD, offsets)
    assert out_EHD.shape == (0, HEADS, 64)
    dq_HD, dkv_T2HD = pool_attention_backward(out_EHD, q_HD, kv_T2HD, offsets)
    assert dkv_T2HD.shape == kv_T2HD.shape
    assert not dq_HD.any()


def check_map_pooling(*, device: str) -> None:
    """The module with the kernels and without, in value and in the gradients of all parameters."""
    torch.manual_seed(0)
    module = pooling.MapPooling(EncoderConfig(width=64, heads=HEADS)).to(device)
    segments = Segments.from_lengths([3, 70, 1], padding=5, device=device)
    x_TC = torch.randn(79, 64, device=device, requires_grad=True)
    leaves = [x_TC, *module.parameters()]
    results = []
    for _ in range(2):
        y_EC = module(x_TC, segments)
        results.append([y_EC, *torch.autograd.grad(y_EC.sin().sum(), leaves)])
        module.pack_attention()
        pooling.takes_kernels = lambda kv: True  # run by the interpreter in a process of its own
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not results[1][1][74:].any()
