"""Triton kernels behind `short_attention`.

One program attends within one segment for one head. All its queries are one tile of LENGTH rows;
keys and values pass in blocks of BLOCK_N. Rows beyond the segment and columns beyond the head's
width are read as zeros and never written.

A kernel run by Triton's interpreter multiplies in float32 (DOT): its `tl.dot` mistakes bfloat16
for integers. What a device would round to the input's precision is rounded there too.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Finite: a row of a segment without tokens stays free of NaN.
_MASKED = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(base, rows, columns, stride, length, D: tl.constexpr):
    """[rows, columns] of one head, zero outside of the segment and of the head's width."""
    inside = (rows[:, None] < length) & (columns[None, :] < D)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, columns, stride, length, x, D: tl.constexpr):
    inside = (rows[:, None] < length) & (columns[None, :] < D)
    x = x.to(base.dtype.element_ty)
    tl.store(base + rows[:, None] * stride + columns[None, :], x, mask=inside)


@triton.jit
def _standardise(x, columns, eps, D: tl.constexpr):
    """(x - mean) / sqrt(variance + eps) of each row in float32, and the factor."""
    x = x.to(tl.float32)
    centred = x - tl.sum(x, 1)[:, None] / D
    centred = tl.where(columns[None, :] < D, centred, 0.0)
    factor = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * factor[:, None], factor


@triton.jit
def _normed(x, weight, columns, eps, NORM: tl.constexpr, DOT: tl.constexpr, D: tl.constexpr):
    """The LayerNorm of each row as autocast has it: in float32, then rounded to x's precision."""
    if NORM:
        standard, _ = _standardise(x, columns, eps, D)
        x = (standard * weight[None, :]).to(x.dtype)
    return x.to(DOT)


@triton.jit
def _norm_backward(x, dy, weight, columns, eps, D: tl.constexpr):
    """Gradients of a row's LayerNorm: of x, and of the weight summed over rows."""
    standard, factor = _standardise(x, columns, eps, D)
    scaled = dy * weight[None, :]
    along = tl.sum(scaled * standard, 1)[:, None] / D
    dx = (scaled - tl.sum(scaled, 1)[:, None] / D - standard * along) * factor[:, None]
    return dx, tl.sum(dy * standard, 0)


@triton.jit
def _scores(q, k, rows, keys, length, scale, CAUSAL: tl.constexpr):
    """Scores in units of log2(e), so that exp2 gives the softmax."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2_E)
    allowed = keys[None, :] < length
    if CAUSAL:
        allowed = allowed & (keys[None, :] <= rows[:, None])
    return tl.where(allowed, s, _MASKED)


@triton.jit(do_not_specialize=["first_segment"])  # else compiled again for a 1 or a multiple of 16
def forward_kernel(
    qkv_ptr,
    offsets_ptr,
    q_weight_ptr,
    k_weight_ptr,
    out_ptr,
    first_segment,
    eps,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
):
    """Output of one segment and head; WIDTH is D rounded up to a power of two."""
    program = tl.program_id(0)
    head = program % H
    segment = first_segment + program // H
    start = tl.load(offsets_ptr + segment).to(tl.int64)  # times a row's width: beyond 32 bits
    length = (tl.load(offsets_ptr + segment + 1) - start).to(tl.int32)
    rows = tl.arange(0, LENGTH)
    columns = tl.arange(0, WIDTH)
    q_base = qkv_ptr + start * (3 * H * D) + head * D
    k_base = q_base + H * D
    v_base = k_base + H * D
    q_weight = 0.0
    k_weight = 0.0
    if NORM:
        q_weight = tl.load(q_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
        k_weight = tl.load(k_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    q = _load(q_base, rows, columns, 3 * H * D, length, D)
    q = _normed(q, q_weight, columns, eps, NORM, DOT, D)
    highest = tl.full([LENGTH], _MASKED, tl.float32)
    total = tl.zeros([LENGTH], tl.float32)
    out = tl.zeros([LENGTH, WIDTH], tl.float32)
    for first_key in range(0, LENGTH if LENGTH == BLOCK_N else length, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        k = _load(k_base, keys, columns, 3 * H * D, length, D)
        v = _load(v_base, keys, columns, 3 * H * D, length, D)
        k = _normed(k, k_weight, columns, eps, NORM, DOT, D)
        s = _scores(q, k, rows, keys, length, scale, CAUSAL)
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        p = p.to(v.dtype).to(DOT)
        out = out * shrink[:, None] + tl.dot(p, v.to(DOT), input_precision="ieee")
        highest = higher
    out_base = out_ptr + start * (H * D) + head * D
    _store(out_base, rows, columns, H * D, length, out / total[:, None], D)


@triton.jit(do_not_specialize=["first_segment"])  # else compiled again for a 1 or a multiple of 16
def backward_kernel(
    grad_ptr,
    qkv_ptr,
    offsets_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dqkv_ptr,
    dweight_ptr,
    first_segment,
    eps,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
):
    """Gradient of q, k and v of one segment and head, and its part of the norms' weights'.

    With P the softmax and dP = dO·Vᵀ: dV = Pᵀ·dO, dS = P ∘ (dP - rowsum(P ∘ dP)),
    dQ = dS·K, dK = dSᵀ·Q (FlashAttention, arXiv 2205.14135, appendix B.2). A first pass over the
    blocks of keys finds the softmax's denominator and rowsum(P ∘ dP).
    """
    program = tl.program_id(0)
    head = program % H
    segment = first_segment + program // H
    start = tl.load(offsets_ptr + segment).to(tl.int64)  # times a row's width: beyond 32 bits
    length = (tl.load(offsets_ptr + segment + 1) - start).to(tl.int32)
    rows = tl.arange(0, LENGTH)
    columns = tl.arange(0, WIDTH)
    here = start * (3 * H * D) + head * D
    q_base = qkv_ptr + here
    k_base = q_base + H * D
    v_base = k_base + H * D
    dq_base = dqkv_ptr + here
    dk_base = dq_base + H * D
    dv_base = dk_base + H * D
    q_weight = 0.0
    k_weight = 0.0
    if NORM:
        q_weight = tl.load(q_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
        k_weight = tl.load(k_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    q = _load(q_base, rows, columns, 3 * H * D, length, D)
    q = _normed(q, q_weight, columns, eps, NORM, DOT, D)
    grad_base = grad_ptr + start * (H * D) + head * D
    grad = _load(grad_base, rows, columns, H * D, length, D).to(DOT)

    WHOLE: tl.constexpr = LENGTH == BLOCK_N
    highest = tl.full([LENGTH], _MASKED, tl.float32)
    total = tl.zeros([LENGTH], tl.float32)
    delta = tl.zeros([LENGTH], tl.float32)
    if not WHOLE:
        for first_key in range(0, length, BLOCK_N):
            keys = first_key + tl.arange(0, BLOCK_N)
            k = _load(k_base, keys, columns, 3 * H * D, length, D)
            v = _load(v_base, keys, columns, 3 * H * D, length, D).to(DOT)
            k = _normed(k, k_weight, columns, eps, NORM, DOT, D)
            s = _scores(q, k, rows, keys, length, scale, CAUSAL)
            dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
            higher = tl.maximum(highest, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(p, 1)
            delta = delta * shrink + tl.sum(p * dp, 1)
            highest = higher
        delta = delta / total

    dq = tl.zeros([LENGTH, WIDTH], tl.float32)
    dk_weight = tl.zeros([WIDTH], tl.float32)
    for first_key in range(0, LENGTH if WHOLE else length, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        k = _load(k_base, keys, columns, 3 * H * D, length, D)
        v = _load(v_base, keys, columns, 3 * H * D, length, D).to(DOT)
        k = _normed(k, k_weight, columns, eps, NORM, DOT, D)
        s = _scores(q, k, rows, keys, length, scale, CAUSAL)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        if WHOLE:
            highest = tl.max(s, 1)
        p = tl.exp2(s - highest[:, None])
        if WHOLE:
            total = tl.sum(p, 1)
            delta = tl.sum(p * dp, 1) / total
        p = p / total[:, None]
        ds = (p * (dp - delta[:, None]) * scale).to(dqkv_ptr.dtype.element_ty).to(DOT)
        p = p.to(dqkv_ptr.dtype.element_ty).to(DOT)
        dv = tl.dot(tl.trans(p), grad, input_precision="ieee")
        _store(dv_base, keys, columns, 3 * H * D, length, dv, D)
        dq += tl.dot(ds, k, input_precision="ieee")
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
        if NORM:
            raw = _load(k_base, keys, columns, 3 * H * D, length, D)
            dk, dw = _norm_backward(raw, dk, k_weight, columns, eps, D)
            dk_weight += dw
        _store(dk_base, keys, columns, 3 * H * D, length, dk, D)
    if NORM:
        raw = _load(q_base, rows, columns, 3 * H * D, length, D)
        dq, dq_weight = _norm_backward(raw, dq, q_weight, columns, eps, D)
        dweight = dweight_ptr + program.to(tl.int64) * (2 * D) + columns
        tl.store(dweight, dq_weight, mask=columns < D)
        tl.store(dweight + D, dk_weight, mask=columns < D)
    _store(dq_base, rows, columns, 3 * H * D, length, dq, D)
