"""Triton kernels behind `contrastive`.

One program multiplies BLOCK_M images with BLOCK_N texts and keeps the logits in registers. Past the
last row or column the last one is read again, and what comes of it is masked.

A kernel run by Triton's interpreter multiplies in float32 (DOT): its `tl.dot` mistakes bfloat16
for integers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logits(
    image_ptr,
    text_ptr,
    scale_ptr,
    row,
    column,
    rows,
    columns,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] logits in float32 from a row and a column on."""
    r = tl.minimum(row + tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
    c = tl.minimum(column + tl.arange(0, BLOCK_N), columns - 1).to(tl.int64)
    d = tl.arange(0, BLOCK_K)
    image_ptrs = image_ptr + r[:, None] * D + d[None, :]
    text_ptrs = text_ptr + c[:, None] * D + d[None, :]
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            image = tl.load(image_ptrs + k)
            text = tl.load(text_ptrs + k)
        else:
            image = tl.load(image_ptrs + k, mask=d[None, :] < D - k, other=0.0)
            text = tl.load(text_ptrs + k, mask=d[None, :] < D - k, other=0.0)
        logits = tl.dot(image.to(DOT), tl.trans(text.to(DOT)), logits)
    return logits * tl.load(scale_ptr)


@triton.jit(do_not_specialize=["rows", "columns"])
def statistics_kernel(
    image_ptr,
    text_ptr,
    scale_ptr,
    row_parts_ptr,
    column_parts_ptr,
    matching_ptr,
    rows,
    columns,
    MATCHES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    """Log-sum-exps of a block's rows and columns, and its matching logits."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    row_block = tl.program_id(0) % row_blocks
    column_block = tl.program_id(0) // row_blocks
    row, column = row_block * BLOCK_M, column_block * BLOCK_N
    logits = _logits(
        image_ptr,
        text_ptr,
        scale_ptr,
        row,
        column,
        rows,
        columns,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        DOT,
    )
    r, c = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    if MATCHES and (row < column + BLOCK_N) & (column < row + BLOCK_M):
        matching = tl.sum(tl.where(r[:, None] == c[None, :], logits, 0.0), 1)
        inside = (r < rows) & (r >= column) & (r < column + BLOCK_N)
        tl.store(matching_ptr + r, matching, mask=inside)
    logits = tl.where((r < rows)[:, None] & (c < columns)[None, :], logits, float("-inf"))
    # Each row and column shifted by its own maximum, as in `softmax_statistics` of the loss.
    peak = tl.max(logits, 1)
    part = peak + tl.log(tl.sum(tl.exp(logits - peak[:, None]), 1))
    tl.store(row_parts_ptr + column_block * rows + r, part, mask=r < rows)
    peak = tl.max(logits, 0)
    part = peak + tl.log(tl.sum(tl.exp(logits - peak[None, :]), 0))
    tl.store(column_parts_ptr + row_block * columns + c, part, mask=c < columns)


@triton.jit(do_not_specialize=["count", "length"])
def merge_kernel(total_ptr, parts_ptr, count, length, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the log-sum-exps [count, length] of parts to those so far, always in one order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, PARTS)
    peak = tl.load(total_ptr + i, mask=i < length, other=0.0)
    total = tl.where(peak > float("-inf"), 1.0, 0.0)
    first = tl.zeros([], tl.int32)
    while first < count:  # no range: the interpreter of Triton 3.6 takes no number of the launch
        inside = (first + j < count)[:, None] & (i < length)[None, :]
        at = parts_ptr + (first + j)[:, None] * length + i[None, :]
        parts = tl.load(at, mask=inside, other=float("-inf"))
        larger = tl.maximum(peak, tl.max(parts, 0))
        total = total * tl.exp(peak - larger) + tl.sum(tl.exp(parts - larger[None, :]), 0)
        peak = larger
        first += PARTS
    tl.store(total_ptr + i, peak + tl.log(total), mask=i < length)


@triton.jit(do_not_specialize=["rows", "columns"])
def weights_kernel(
    image_ptr,
    text_ptr,
    scale_ptr,
    row_lse_ptr,
    column_lse_ptr,
    weights_ptr,
    rows,
    columns,
    stride,
    MATCHES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    """Both softmaxes of a block, less 2 for a matching pair; zero from `columns` to `stride`."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    row = tl.program_id(0) % row_blocks * BLOCK_M
    column = tl.program_id(0) // row_blocks * BLOCK_N
    logits = _logits(
        image_ptr,
        text_ptr,
        scale_ptr,
        row,
        column,
        rows,
        columns,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        DOT,
    )
    r, c = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    row_lse = tl.load(row_lse_ptr + r, mask=r < rows, other=0.0)
    # exp(-inf) is the zero of the columns past the last.
    column_lse = tl.load(column_lse_ptr + c, mask=c < columns, other=float("inf"))
    weights = tl.exp(logits - row_lse[:, None])
    weights = tl.where((c < columns)[None, :], weights, 0.0)
    weights += tl.exp(logits - column_lse[None, :])
    if MATCHES:
        weights = tl.where(r[:, None] == c[None, :], weights - 2.0, weights)
    # `stride` is a multiple of 16, unlike `columns`: such a mask leaves wide stores wide.
    inside = (r < rows)[:, None] & (c < stride)[None, :]
    weights_ptr += row.to(tl.int64) * stride + column
    at = tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_N)[None, :]
    tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), mask=inside)
