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

from collections.abc import Sequence

from torch import Tensor

CLASSES = (16, 32, 64, 128, 256)
"""Longest segment of each class; a segment belongs to the first class that holds it."""
MAX_LENGTH = CLASSES[-1]


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
    raise NotImplementedError


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
    raise NotImplementedError
