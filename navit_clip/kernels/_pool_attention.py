"""Triton kernels behind `pool_attention`: one program per segment and head.

A single query makes no matrix product: scores are sums over a row of keys, in float32. Keys and
values pass in blocks of BLOCK tokens; the softmax is that of the blocks so far.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _program(offsets_ptr, H: tl.constexpr, D: tl.constexpr):
    """Head, first token, length, and where the segment's first key lies in [T, 2, H, D]."""
    head = tl.program_id(0) % H
    segment = tl.program_id(0) // H
    start = tl.load(offsets_ptr + segment).to(tl.int64)  # times a row's width: beyond 32 bits
    length = (tl.load(offsets_ptr + segment + 1) - start).to(tl.int32)
    return head, length, start * (2 * H * D) + head * D


@triton.jit
def _block(first, length, columns, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Which rows are tokens; distance of each element from the segment's first; its mask."""
    rows = first + tl.arange(0, BLOCK)
    here = rows[:, None] * (2 * H * D) + columns[None, :]
    return rows < length, here, (rows[:, None] < length) & (columns[None, :] < D)


@triton.jit
def forward_kernel(
    q_ptr,
    kv_ptr,
    offsets_ptr,
    out_ptr,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Output of one segment and head; WIDTH is D rounded up to a power of two."""
    head, length, start = _program(offsets_ptr, H, D)
    columns = tl.arange(0, WIDTH)
    q = tl.load(q_ptr + head * D + columns, mask=columns < D, other=0.0).to(tl.float32) * scale
    highest = -float("inf")
    total = 0.0
    out = tl.zeros([WIDTH], tl.float32)
    for first in range(0, length, BLOCK):
        tokens, here, inside = _block(first, length, columns, H, D, BLOCK)
        k = tl.load(kv_ptr + start + here, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(kv_ptr + start + H * D + here, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(tokens, tl.sum(k * q[None, :], 1), -float("inf"))
        higher = tl.maximum(highest, tl.max(s, 0))
        p = tl.exp(s - higher)
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(p, 0)
        out = out * shrink + tl.sum(p[:, None] * v, 0)
        highest = higher
    out = tl.where(total > 0, out / total, 0.0)  # a segment without tokens: zeros
    out_ptrs = out_ptr + tl.program_id(0).to(tl.int64) * D + columns
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def backward_kernel(
    grad_ptr,
    q_ptr,
    kv_ptr,
    offsets_ptr,
    dkv_ptr,
    dq_ptr,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of k and v of one segment and head, and its part of the query's.

    With p the softmax and dp = V·dO: dV = p dOᵀ, ds = p ∘ (dp - sum(p ∘ dp)), dK = ds qᵀ,
    dq = Kᵀ ds. A first pass finds the softmax's denominator and sum(p ∘ dp).
    """
    head, length, start = _program(offsets_ptr, H, D)
    columns = tl.arange(0, WIDTH)
    q = tl.load(q_ptr + head * D + columns, mask=columns < D, other=0.0).to(tl.float32) * scale
    row = tl.program_id(0).to(tl.int64) * D + columns
    grad = tl.load(grad_ptr + row, mask=columns < D, other=0.0).to(tl.float32)
    highest = -float("inf")
    total = 0.0
    delta = 0.0
    for first in range(0, length, BLOCK):
        tokens, here, inside = _block(first, length, columns, H, D, BLOCK)
        k = tl.load(kv_ptr + start + here, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(kv_ptr + start + H * D + here, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(tokens, tl.sum(k * q[None, :], 1), -float("inf"))
        dp = tl.sum(v * grad[None, :], 1)
        higher = tl.maximum(highest, tl.max(s, 0))
        p = tl.exp(s - higher)
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(p, 0)
        delta = delta * shrink + tl.sum(p * dp, 0)
        highest = higher
    delta = delta / total

    dq = tl.zeros([WIDTH], tl.float32)
    for first in range(0, length, BLOCK):
        tokens, here, inside = _block(first, length, columns, H, D, BLOCK)
        k = tl.load(kv_ptr + start + here, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(kv_ptr + start + H * D + here, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(tokens, tl.sum(k * q[None, :], 1), -float("inf"))
        p = tl.exp(s - highest) / total
        ds = p * (tl.sum(v * grad[None, :], 1) - delta)
        dq += tl.sum(ds[:, None] * k, 0)
        dk = (ds[:, None] * q[None, :]).to(dkv_ptr.dtype.element_ty)
        dv = (p[:, None] * grad[None, :]).to(dkv_ptr.dtype.element_ty)
        tl.store(dkv_ptr + start + here, dk, mask=inside)
        tl.store(dkv_ptr + start + H * D + here, dv, mask=inside)
    tl.store(dq_ptr + row, dq * scale, mask=columns < D)
