"""Attention within segments: one function, one backend per device.

Called by the encoder (self-attention) and by attention pooling (one query per example). Tokens
of different examples never see each other, and no mask is built: CUDA in half precision and
compiled code use the operator of `attention_op`; everywhere else each group of equally long
neighbours is one batched `scaled_dot_product_attention`, of views alone, without a copy of q, k
or v.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from navit_clip.models.attention_op import attend, equal_groups, takes_flash
from navit_clip.packed.segments import Segments


def segment_attention(
    q_THD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    segments_q: Segments,
    segments_k: Segments,
    *,
    causal: bool = False,
) -> Tensor:
    """Softmax attention of each query segment over the key segment of the same index.

    Args:
        q_THD: [T, H, D] queries; on a CPU q and k may be float32 beside values in half
            precision.
        k_SHD: [S, H, D] keys.
        v_SHD: [S, H, D] values.
        segments_q: Segments of the T query tokens.
        segments_k: Segments of the S key tokens, as many examples as `segments_q`, and padding
            if and only if `segments_q` has some.
        causal: Each token sees itself and what stands before it in its segment; query and key
            segments must then be the same.

    Returns:
        [T, H, D] in the values' precision; what it holds on padding is finite, and of no meaning.

    Raises:
        ValueError: If the two sides hold different numbers of examples, one alone is padded, or
            causal attention is asked for across different segments.
    """
    if segments_q.num_examples != segments_k.num_examples:
        raise ValueError(
            f"{segments_q.num_examples} query segments against {segments_k.num_examples} key ones"
        )
    if len(segments_q.lengths) != len(segments_k.lengths):
        # The variable-length kernel counts segments by the queries' offsets: it would read past
        # the keys' offsets, or leave the gradient of padded keys unwritten.
        raise ValueError(
            f"padding on one side only: {segments_q.padding} tokens of queries against "
            f"{segments_k.padding} of keys; see Segments.without_padding"
        )
    if causal and segments_q.lengths != segments_k.lengths:
        # The backends would align the triangle at different corners.
        raise ValueError("causal attention needs the same segments for queries and keys")
    return attend_segments(q_THD, k_SHD, v_SHD, segments_q, segments_k, causal)


def attend_segments(
    q_THD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    segments_q: Segments,
    segments_k: Segments,
    causal: bool,
) -> Tensor:
    """`segment_attention` of segments that go together; the compiler sees tensors alone."""
    if takes_flash(v_SHD) or torch.compiler.is_compiling():
        out_THD: Tensor = attend(
            q_THD,
            k_SHD,
            v_SHD,
            segments_q.offsets,
            segments_k.offsets,
            segments_q.layout,
            segments_k.layout,
            causal,
        )[0]
        return out_THD
    half = v_SHD.dtype in (torch.bfloat16, torch.float16)
    if half and q_THD.device.type == "cpu":
        # The CPU kernel takes twice as long backward in half precision, although its matrix
        # products are faster (benchmarks/LOG.md).
        with torch.autocast("cpu", enabled=False):
            out_THD = _by_groups(
                q_THD.float(), k_SHD.float(), v_SHD.float(), segments_q, segments_k, causal
            )
        return out_THD.to(v_SHD.dtype)
    return _by_groups(q_THD, k_SHD, v_SHD, segments_q, segments_k, causal)


def _by_groups(
    q_THD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    segments_q: Segments,
    segments_k: Segments,
    causal: bool,
) -> Tensor:
    examples = segments_q.num_examples
    groups = equal_groups(segments_q.lengths[:examples], segments_k.lengths[:examples])
    sizes_q = [group.segments * group.queries for group in groups] + [segments_q.padding]
    sizes_k = [group.segments * group.keys for group in groups] + [segments_k.padding]
    # split, not slicing: the backward of a slice writes a gradient of the full size each.
    blocks_q = q_THD.split(sizes_q)
    blocks_k = k_SHD.split(sizes_k)
    blocks_v = v_SHD.split(sizes_k)
    outputs = []
    for (length_q, length_k, count), q, k, v in zip(
        groups, blocks_q, blocks_k, blocks_v, strict=False
    ):
        out_EHLD = F.scaled_dot_product_attention(
            q.unflatten(0, (count, length_q)).transpose(1, 2),
            k.unflatten(0, (count, length_k)).transpose(1, 2),
            v.unflatten(0, (count, length_k)).transpose(1, 2),
            is_causal=causal,
        )
        outputs.append(out_EHLD.transpose(1, 2).flatten(0, 1))
    outputs.append(torch.zeros_like(blocks_q[-1]))
    return torch.cat(outputs)
