"""Triton kernels behind `short_attention`.

Each program attends within one segment for one head, or for some of its rows: queries in a tile of
ROWS, or keys in one, against the others in blocks. Rows beyond the segment and columns beyond the
head's width are read as zeros and never written.

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
def _place(offsets_ptr, first_segment, TILES: tl.constexpr, H: tl.constexpr):
    """Tile, head, first token and length of the segment, for this program."""
    program = tl.program_id(0)
    segment = first_segment + program // (TILES * H)
    start = tl.load(offsets_ptr + segment).to(tl.int64)  # times a row's width: beyond 32 bits
    length = (tl.load(offsets_ptr + segment + 1) - start).to(tl.int32)
    return program % TILES, program // TILES % H, start, length


@triton.jit
def _inside(rows, columns, length, D: tl.constexpr, WIDTH: tl.constexpr):
    inside = rows[:, None] < length
    if D < WIDTH:
        inside = inside & (columns[None, :] < D)
    return inside


@triton.jit
def _load(base, rows, columns, stride, length, D: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, columns] of one head, zero outside of the segment and of the head's width."""
    inside = _inside(rows, columns, length, D, WIDTH)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, columns, stride, length, x, D: tl.constexpr, WIDTH: tl.constexpr):
    inside = _inside(rows, columns, length, D, WIDTH)
    x = x.to(base.dtype.element_ty)
    tl.store(base + rows[:, None] * stride + columns[None, :], x, mask=inside)


@triton.jit
def _load_weight(weight_ptr, columns, NORM: tl.constexpr, D: tl.constexpr):
    """Zero beyond the head's width, which keeps what is computed there out of everything."""
    weight = 0.0
    if NORM:
        weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    return weight


@triton.jit
def _normed(
    x,
    weight,
    columns,
    eps,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """LayerNorm as autocast has it, in float32 and then rounded; mean, 1 / deviation of rows."""
    mean = 0.0
    factor = 0.0
    y = x
    if NORM:
        x32 = x.to(tl.float32)
        mean = tl.sum(x32, 1) / D
        centred = x32 - mean[:, None]
        if D < WIDTH:
            centred = tl.where(columns[None, :] < D, centred, 0.0)
        factor = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
        y = (centred * factor[:, None] * weight[None, :]).to(x.dtype)
    return y.to(DOT), mean, factor


@triton.jit
def _norm_backward(x, dy, weight, mean, factor, D: tl.constexpr):
    """Gradients of the LayerNorm of rows: of x, and of the weight summed over them."""
    standard = (x.to(tl.float32) - mean[:, None]) * factor[:, None]
    dweight = tl.sum(dy * standard, 0)
    dy = dy * weight[None, :]
    along = tl.sum(dy * standard, 1) / D
    dx = (dy - (tl.sum(dy, 1) / D)[:, None] - standard * along[:, None]) * factor[:, None]
    return dx, dweight


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
):
    """Output of a tile of queries of one head; WIDTH is a power of two, at least D and 16."""
    tile, head, start, length = _place(offsets_ptr, first_segment, LENGTH // ROWS, H)
    stride = 3 * H * D
    q_base = qkv_ptr + start * stride + head * D
    k_base = q_base + H * D
    v_base = k_base + H * D
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    q_weight = _load_weight(q_weight_ptr, columns, NORM, D)
    k_weight = _load_weight(k_weight_ptr, columns, NORM, D)
    q = _load(q_base, rows, columns, stride, length, D, WIDTH)
    q, _q_mean, _q_factor = _normed(q, q_weight, columns, eps, NORM, DOT, D, WIDTH)
    highest = tl.full([ROWS], _MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    end = _end(tile, length, LENGTH, ROWS, COLUMNS, CAUSAL)
    for first_key in range(0, end, COLUMNS):
        keys = first_key + tl.arange(0, COLUMNS)
        k = _load(k_base, keys, columns, stride, length, D, WIDTH)
        v = _load(v_base, keys, columns, stride, length, D, WIDTH)
        k, _k_mean, _k_factor = _normed(k, k_weight, columns, eps, NORM, DOT, D, WIDTH)
        s = _scores(q, k, rows, keys, length, scale, CAUSAL)
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        p = p.to(v.dtype).to(DOT)
        out = out * shrink[:, None] + tl.dot(p, v.to(DOT), input_precision="ieee")
        highest = higher
    out = out / total[:, None]
    _store(out_ptr + start * (H * D) + head * D, rows, columns, H * D, length, out, D, WIDTH)


@triton.jit
def _end(
    tile,
    length,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Where the keys end that a tile of queries needs to see; a constant where one block does."""
    end = LENGTH
    if LENGTH > COLUMNS:
        end = tl.where(tile * ROWS < length, length, 0)
        if CAUSAL:
            end = tl.minimum(end, (tile + 1) * ROWS)
    return end


@triton.jit(do_not_specialize=["first_segment"])
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
    CAUSAL: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
):
    """Gradient of q, k and v of one segment and head, and its part of the norms' weights'.

    With P the softmax and dP = dO·Vᵀ: dV = Pᵀ·dO, dS = P ∘ (dP - rowsum(P ∘ dP)),
    dQ = dS·K, dK = dSᵀ·Q (FlashAttention, arXiv 2205.14135, appendix B.2).
    """
    _, head, start, length = _place(offsets_ptr, first_segment, 1, H)
    stride = 3 * H * D
    here = start * stride + head * D
    q_base = qkv_ptr + here
    k_base = q_base + H * D
    dq_base = dqkv_ptr + here
    dk_base = dq_base + H * D
    rows = tl.arange(0, LENGTH)
    columns = tl.arange(0, WIDTH)
    q_weight = _load_weight(q_weight_ptr, columns, NORM, D)
    k_weight = _load_weight(k_weight_ptr, columns, NORM, D)
    q = _load(q_base, rows, columns, stride, length, D, WIDTH)
    k = _load(k_base, rows, columns, stride, length, D, WIDTH)
    v = _load(k_base + H * D, rows, columns, stride, length, D, WIDTH)
    grad_base = grad_ptr + start * (H * D) + head * D
    grad = _load(grad_base, rows, columns, H * D, length, D, WIDTH).to(DOT)
    q, q_mean, q_factor = _normed(q, q_weight, columns, eps, NORM, DOT, D, WIDTH)
    k, k_mean, k_factor = _normed(k, k_weight, columns, eps, NORM, DOT, D, WIDTH)
    s = _scores(q, k, rows, rows, length, scale, CAUSAL)
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    dp = tl.dot(grad, tl.trans(v.to(DOT)), input_precision="ieee")
    ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * scale
    ds = ds.to(v.dtype).to(DOT)
    p = p.to(v.dtype).to(DOT)
    dv = tl.dot(tl.trans(p), grad, input_precision="ieee")
    _store(dk_base + H * D, rows, columns, stride, length, dv, D, WIDTH)
    dq = tl.dot(ds, k, input_precision="ieee")
    dweight = dweight_ptr + tl.program_id(0).to(tl.int64) * (2 * D) + columns
    # Read again, which is cheaper than registers for all of it.
    if NORM:
        raw = _load(q_base, rows, columns, stride, length, D, WIDTH)
        dq, dq_weight = _norm_backward(raw, dq, q_weight, q_mean, q_factor, D)
        tl.store(dweight, dq_weight, mask=columns < D)
    _store(dq_base, rows, columns, stride, length, dq, D, WIDTH)
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
    if NORM:
        raw = _load(k_base, rows, columns, stride, length, D, WIDTH)
        dk, dk_weight = _norm_backward(raw, dk, k_weight, k_mean, k_factor, D)
        tl.store(dweight + D, dk_weight, mask=columns < D)
    _store(dk_base, rows, columns, stride, length, dk, D, WIDTH)


@triton.jit(do_not_specialize=["first_segment"])
def backward_queries_kernel(
    grad_ptr,
    qkv_ptr,
    offsets_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dqkv_ptr,
    dweight_ptr,
    statistics_ptr,
    first_segment,
    eps,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of segments that are too long for `backward_kernel`: gradient of a tile of queries.

    A first pass over the keys finds each query's normaliser of the softmax and rowsum(P ∘ dP),
    which go to `statistics` [T, H, 2] for the gradient of the keys.
    """
    tile, head, start, length = _place(offsets_ptr, first_segment, LENGTH // ROWS, H)
    stride = 3 * H * D
    q_base = qkv_ptr + start * stride + head * D
    k_base = q_base + H * D
    v_base = k_base + H * D
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    q_weight = _load_weight(q_weight_ptr, columns, NORM, D)
    k_weight = _load_weight(k_weight_ptr, columns, NORM, D)
    q = _load(q_base, rows, columns, stride, length, D, WIDTH)
    q, q_mean, q_factor = _normed(q, q_weight, columns, eps, NORM, DOT, D, WIDTH)
    grad_base = grad_ptr + start * (H * D) + head * D
    grad = _load(grad_base, rows, columns, H * D, length, D, WIDTH).to(DOT)
    highest = tl.full([ROWS], _MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    delta = tl.zeros([ROWS], tl.float32)
    end = _end(tile, length, LENGTH, ROWS, COLUMNS, CAUSAL)
    for first_key in range(0, end, COLUMNS):
        keys = first_key + tl.arange(0, COLUMNS)
        k = _load(k_base, keys, columns, stride, length, D, WIDTH)
        v = _load(v_base, keys, columns, stride, length, D, WIDTH).to(DOT)
        k, _k_mean, _k_factor = _normed(k, k_weight, columns, eps, NORM, DOT, D, WIDTH)
        s = _scores(q, k, rows, keys, length, scale, CAUSAL)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        delta = delta * shrink + tl.sum(p * dp, 1)
        highest = higher
    normaliser = highest + tl.log2(total)
    delta = delta / total
    statistics = statistics_ptr + ((start + rows) * H + head) * 2
    tl.store(statistics, normaliser, mask=rows < length)
    tl.store(statistics + 1, delta, mask=rows < length)

    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    for first_key in range(0, end, COLUMNS):
        keys = first_key + tl.arange(0, COLUMNS)
        k = _load(k_base, keys, columns, stride, length, D, WIDTH)
        v = _load(v_base, keys, columns, stride, length, D, WIDTH)
        k, _k_mean, _k_factor = _normed(k, k_weight, columns, eps, NORM, DOT, D, WIDTH)
        p = tl.exp2(_scores(q, k, rows, keys, length, scale, CAUSAL) - normaliser[:, None])
        dp = tl.dot(grad, tl.trans(v.to(DOT)), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * scale
        dq += tl.dot(ds.to(v.dtype).to(DOT), k, input_precision="ieee")
    if NORM:
        raw = _load(q_base, rows, columns, stride, length, D, WIDTH)
        dq, dq_weight = _norm_backward(raw, dq, q_weight, q_mean, q_factor, D)
        dweight = dweight_ptr + tl.program_id(0).to(tl.int64) * (2 * D) + columns
        tl.store(dweight, dq_weight, mask=columns < D)
    _store(dqkv_ptr + start * stride + head * D, rows, columns, stride, length, dq, D, WIDTH)


@triton.jit(do_not_specialize=["first_segment"])
def backward_keys_kernel(
    grad_ptr,
    qkv_ptr,
    offsets_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dqkv_ptr,
    dweight_ptr,
    statistics_ptr,
    first_segment,
    eps,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
):
    """After `backward_queries_kernel`: gradients of a tile of ROWS keys and of their values.

    Queries pass in blocks of COLUMNS, and scores stand transposed: what the products sum over is a
    row then, as the tensor cores want it.
    """
    tile, head, start, length = _place(offsets_ptr, first_segment, LENGTH // ROWS, H)
    stride = 3 * H * D
    q_base = qkv_ptr + start * stride + head * D
    k_base = q_base + H * D
    keys = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    q_weight = _load_weight(q_weight_ptr, columns, NORM, D)
    k_weight = _load_weight(k_weight_ptr, columns, NORM, D)
    k = _load(k_base, keys, columns, stride, length, D, WIDTH)
    v = _load(k_base + H * D, keys, columns, stride, length, D, WIDTH).to(DOT)
    k, k_mean, k_factor = _normed(k, k_weight, columns, eps, NORM, DOT, D, WIDTH)
    grad_base = grad_ptr + start * (H * D) + head * D
    dk = tl.zeros([ROWS, WIDTH], tl.float32)
    dv = tl.zeros([ROWS, WIDTH], tl.float32)
    first = 0
    if CAUSAL:
        first = tile * ROWS // COLUMNS * COLUMNS
    for first_query in range(first, tl.where(tile * ROWS < length, length, 0), COLUMNS):
        rows = first_query + tl.arange(0, COLUMNS)
        q = _load(q_base, rows, columns, stride, length, D, WIDTH)
        grad = _load(grad_base, rows, columns, H * D, length, D, WIDTH)
        statistics = statistics_ptr + ((start + rows) * H + head) * 2
        normaliser = tl.load(statistics, mask=rows < length, other=0.0)
        delta = tl.load(statistics + 1, mask=rows < length, other=0.0)
        q, _q_mean, _q_factor = _normed(q, q_weight, columns, eps, NORM, DOT, D, WIDTH)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * _LOG2_E)
        p = tl.exp2(s - normaliser[None, :])
        allowed = rows[None, :] < length
        if CAUSAL:
            allowed = allowed & (keys[:, None] <= rows[None, :])
        p = tl.where(allowed, p, 0.0)
        dp = tl.dot(v, tl.trans(grad.to(DOT)), input_precision="ieee")
        ds = p * (dp - delta[None, :]) * scale
        dv += tl.dot(p.to(grad.dtype).to(DOT), grad.to(DOT), input_precision="ieee")
        dk += tl.dot(ds.to(grad.dtype).to(DOT), q, input_precision="ieee")
    dk_base = dqkv_ptr + start * stride + head * D + H * D
    _store(dk_base + H * D, keys, columns, stride, length, dv, D, WIDTH)
    if NORM:
        raw = _load(k_base, keys, columns, stride, length, D, WIDTH)
        dk, dk_weight = _norm_backward(raw, dk, k_weight, k_mean, k_factor, D)
        dweight = dweight_ptr + tl.program_id(0).to(tl.int64) * (2 * D) + columns
        tl.store(dweight + D, dk_weight, mask=columns < D)
    _store(dk_base, keys, columns, stride, length, dk, D, WIDTH)
