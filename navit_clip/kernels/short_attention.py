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
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

CLASSES = (16, 32, 64, 128, 256)
"""Longest segment of each class; a segment belongs to the first class that holds it."""
MAX_LENGTH = CLASSES[-1]


class Tile(NamedTuple):
    """How a class is launched.

    Attributes:
        keys: Keys in one block.
        warps: Warps of one program.
        stages: Blocks of keys in flight.
    """

    keys: int
    warps: int
    stages: int


# By class, for heads of up to 64 and of more: without register spills where one program can do so.
FORWARD = {
    64: (Tile(16, 1, 1), Tile(32, 2, 1), Tile(64, 4, 1), Tile(128, 8, 1), Tile(64, 8, 1)),
    128: (Tile(16, 1, 1), Tile(32, 2, 1), Tile(64, 4, 1), Tile(64, 8, 1), Tile(32, 8, 1)),
}
BACKWARD = {
    64: (Tile(16, 1, 1), Tile(32, 2, 1), Tile(64, 4, 1), Tile(128, 8, 1), Tile(32, 8, 1)),
    128: (Tile(16, 2, 1), Tile(32, 4, 1), Tile(64, 8, 1), Tile(32, 8, 1), Tile(16, 8, 1)),
}
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

    for i, count, options in _launches(forward_kernel, FORWARD, qkv_T3HD, bounds, q_weight, causal):
        forward_kernel[(count,)](
            qkv_T3HD, offsets, q_weight, k_weight, out_THD, bounds[i], eps, **options
        )


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

    Args:
        grad_THD: [T, H, D] gradient of the output, in the precision of `qkv_T3HD`, contiguous.
        qkv_T3HD: As in the forward pass, as are the next arguments.
        offsets: See above.
        bounds: See above.
        q_weight: See above.
        k_weight: See above.
        eps: See above.
        causal: See above.
        dqkv_T3HD: [T, 3, H, D] to write to, in the precision of `qkv_T3HD`, contiguous.

    Returns:
        [D] gradients of `q_weight` and `k_weight` in their precision, None without a norm.
    """
    from navit_clip.kernels._short_attention import backward_kernel

    _, _, heads, width = qkv_T3HD.shape
    segments = bounds[-1] - bounds[0]
    parts = None
    if q_weight is not None:
        parts = qkv_T3HD.new_empty(segments, heads, 2, width, dtype=torch.float32)
    launches = _launches(backward_kernel, BACKWARD, qkv_T3HD, bounds, q_weight, causal)
    for i, count, options in launches:
        backward_kernel[(count,)](
            grad_THD,
            qkv_T3HD,
            offsets,
            q_weight,
            k_weight,
            dqkv_T3HD,
            None if parts is None else parts[bounds[i] - bounds[0] :],
            bounds[i],
            eps,
            **options,
        )
    if parts is None or q_weight is None or k_weight is None:
        return None
    dq_weight, dk_weight = parts.sum((0, 1))
    return dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype)


def _launches(
    kernel: object,
    tiles: Mapping[int, Sequence[Tile]],
    qkv_T3HD: Tensor,
    bounds: Sequence[int],
    q_weight: Tensor | None,
    causal: bool,
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Index, number of programs and options of each class that holds segments."""
    import triton
    import triton.language as tl

    _, _, heads, width = qkv_T3HD.shape
    compiled = isinstance(kernel, triton.JITFunction)
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    for i, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            continue
        keys, warps, stages = tiles[64 if width <= 64 else MAX_WIDTH][i]
        options = {
            "scale": width**-0.5,
            "H": heads,
            "D": width,
            "WIDTH": triton.next_power_of_2(width),
            "LENGTH": CLASSES[i],
            "BLOCK_N": keys,
            "CAUSAL": causal,
            "NORM": q_weight is not None,
            "DOT": dot[qkv_T3HD.dtype] if compiled else tl.float32,
            "num_warps": warps,
            "num_stages": stages,
        }
        yield i, (last - first) * heads, options
