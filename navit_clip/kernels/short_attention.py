"""Self-attention within short segments: one program per segment and head.

Launched by the attention of the encoder on CUDA, forward and backward, on plain tensors without
autograd. A variable-length kernel works in tiles of 128 queries by 128 keys, of which a caption of
14 tokens fills 1%; here segments are launched in classes by their length, each with tiles of its
size. Queries, keys and values are read where the QKV projection wrote them, the query-key norm is
computed on the way, and the backward pass computes scores again and writes the gradient of the
packed QKV directly: no copies, no buffer per score, no atomics, so results are the same bit by bit
in each run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from navit_clip.packed.segments import LENGTH_CLASSES

CLASSES = LENGTH_CLASSES
"""Longest segment of each class; a segment belongs to the first class that holds it."""
MAX_LENGTH = CLASSES[-1]


class Tile(NamedTuple):
    """How a class is launched.

    Attributes:
        rows: Queries of one program or, where a gradient of keys is computed, keys.
        columns: What these attend to, in one block.
        warps: Warps of one program.
        registers: Most registers of a thread, so that more programs are at work at a time; what
            does not fit is put into memory. None for as many as the compiler likes.
    """

    rows: int
    columns: int
    warps: int
    registers: int | None = None


# By width of heads, up to 64 and wider, and by class. The backward pass of a class in one tile has
# one kernel for all gradients; in several tiles, one for queries and then one for keys. Those of
# heads of up to 64 were the fastest of four to six on an H100; the wider ones were not measured.
FORWARD = {
    64: (Tile(16, 16, 1), Tile(32, 32, 2), Tile(64, 64, 4), Tile(64, 128, 4), Tile(64, 64, 4)),
    128: (Tile(16, 16, 1), Tile(32, 32, 2), Tile(64, 64, 4), Tile(128, 64, 8), Tile(128, 64, 8)),
}
BACKWARD = {
    64: (
        Tile(16, 16, 1, 128),
        Tile(32, 32, 2, 128),
        Tile(64, 64, 4, 168),
        Tile(128, 128, 8),
        Tile(64, 64, 4, 128),
    ),
    128: (Tile(16, 16, 2), Tile(32, 32, 4), Tile(64, 64, 8), Tile(64, 32, 4), Tile(64, 32, 4)),
}
BACKWARD_KEYS = {64: Tile(64, 32, 4, 168), 128: Tile(64, 32, 4)}
MAX_WIDTH = max(FORWARD)
"""Widest head."""


def short_attention_forward(
    qkv_T3HD: Tensor,
    offsets: Tensor,
    bounds: Sequence[int],
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    causal: bool,
    out_THD: Tensor,
) -> None:
    """Writes softmax attention of the segments of all classes, and no other rows, to `out_THD`.

    Args:
        qkv_T3HD: [T, 3, H, D] queries, keys and values in bfloat16, float16 or float32, contiguous.
        offsets: int32 [segments + 1] on the device, cumulative lengths from 0.
        bounds: `len(CLASSES) + 1` numbers: class i holds segments bounds[i] to bounds[i + 1],
            none of them longer than CLASSES[i]. Segments may be empty.
        q_weight: [D] weights of the queries' LayerNorm; None, with `k_weight`, for no norm.
        k_weight: [D] weights of the keys' LayerNorm.
        eps: Added to the variance in both norms.
        causal: Each token sees itself and what stands before it in its segment.
        out_THD: [T, H, D] in the precision of `qkv_T3HD`, contiguous.
    """
    # Imported here: a PyTorch without CUDA comes without Triton.
    from navit_clip.kernels._short_attention import forward_kernel

    tensors = (qkv_T3HD, offsets, q_weight, k_weight, out_THD)
    for launch in _launches(forward_kernel, FORWARD, qkv_T3HD, bounds, q_weight, causal):
        options = _options(launch.kind)
        forward_kernel[(launch.programs,)](*tensors, launch.segment, eps, **options)


def short_attention_backward(
    grad_THD: Tensor,
    qkv_T3HD: Tensor,
    offsets: Tensor,
    bounds: Sequence[int],
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    causal: bool,
    dqkv_T3HD: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Writes the gradient of the packed QKV for the segments of all classes, and no other rows.

    `grad_THD` is [T, H, D], the gradient of the output, and `dqkv_T3HD` [T, 3, H, D] is written to;
    both are contiguous and in the precision of `qkv_T3HD`. All others are the forward pass's.

    Returns:
        [D] gradients of `q_weight` and `k_weight` in their precision, None without a norm.
    """
    from navit_clip.kernels import _short_attention as kernels

    tokens, _, heads, width = qkv_T3HD.shape
    whole = kernels.backward_kernel
    launches = list(_launches(whole, BACKWARD, qkv_T3HD, bounds, q_weight, causal))
    programs = sum(launch.programs for launch in launches)
    parts_P2D = qkv_T3HD.new_empty(programs, 2, width, dtype=torch.float32)
    tensors = (grad_THD, qkv_T3HD, offsets, q_weight, k_weight, dqkv_T3HD)
    first, statistics_TH2 = 0, None
    for launch in launches:
        grid, arguments = (launch.programs,), (*tensors, parts_P2D[first:])
        first += launch.programs
        if launch.kind.tile.rows == launch.kind.length:
            whole[grid](*arguments, launch.segment, eps, **_options(launch.kind, whole=True))
            continue
        if statistics_TH2 is None:
            statistics_TH2 = parts_P2D.new_empty(tokens, heads, 2)
        longer = (*arguments, statistics_TH2, launch.segment, eps)
        kernels.backward_queries_kernel[grid](*longer, **_options(launch.kind))
        keys = launch.kind._replace(tile=BACKWARD_KEYS[_table(width)])
        assert keys.tile.rows == launch.kind.tile.rows  # parts have a place for both's programs
        kernels.backward_keys_kernel[grid](*longer, **_options(keys))
    if q_weight is None or k_weight is None:
        return None
    dq_weight, dk_weight = parts_P2D.sum(0)
    return dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype)


class _Kind(NamedTuple):
    """What the options of a launch follow from; few differ within a run."""

    tile: Tile
    length: int
    heads: int
    width: int
    causal: bool
    norm: bool
    dtype: torch.dtype
    compiled: bool


class _Launch(NamedTuple):
    """Of one class that holds segments: the first one, number of programs, and kind."""

    segment: int
    programs: int
    kind: _Kind


def _launches(
    kernel: object,
    tiles: Mapping[int, Sequence[Tile]],
    qkv_T3HD: Tensor,
    bounds: Sequence[int],
    q_weight: Tensor | None,
    causal: bool,
) -> Iterator[_Launch]:
    import triton

    _, _, heads, width = qkv_T3HD.shape
    alike = heads, width, causal, q_weight is not None, qkv_T3HD.dtype
    compiled = isinstance(kernel, triton.JITFunction)
    for length, tile, (first, last) in zip(
        CLASSES, tiles[_table(width)], pairwise(bounds), strict=True
    ):
        if first != last:
            programs = (last - first) * heads * (length // tile.rows)
            yield _Launch(first, programs, _Kind(tile, length, *alike, compiled))


# Cached, as a step asks hundreds of times, while a GPU waits for its host.
@cache
def _options(kind: _Kind, *, whole: bool = False) -> Mapping[str, Any]:
    """Keyword arguments of a kernel; with `whole` of one whose tile is the class."""
    import triton
    import triton.language as tl

    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    rows, columns, warps, registers = kind.tile
    narrowest = 16  # that a product of two tiles may be
    return {
        "scale": kind.width**-0.5,
        "H": kind.heads,
        "D": kind.width,
        "WIDTH": max(narrowest, triton.next_power_of_2(kind.width)),
        "LENGTH": kind.length,
        "CAUSAL": kind.causal,
        "NORM": kind.norm,
        "DOT": dot[kind.dtype] if kind.compiled else tl.float32,
        "num_stages": 1,
        "num_warps": warps,
        "maxnreg": registers,
        **({} if whole else {"ROWS": rows, "COLUMNS": columns}),
    }


def _table(width: int) -> int:
    return 64 if width <= 64 else MAX_WIDTH
