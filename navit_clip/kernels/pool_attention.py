"""Attention of one learned query over each segment, of any length: attention pooling.

Launched by `MapPooling` on CUDA, forward and backward, on plain tensors without autograd. A
variable-length kernel spends a tile of 128 queries on the only one of a segment; here one program
per segment and head reads keys and values once. No atomics: results are the same bit by bit in
each run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK, _WARPS = 64, 4


def pool_attention(q_HD: Tensor, kv_T2HD: Tensor, offsets: Tensor) -> Tensor:
    """Softmax attention of one query over the tokens of each segment.

    Args:
        q_HD: [H, D] the query of all segments.
        kv_T2HD: [T, 2, H, D] keys and values, contiguous.
        offsets: int32 [E + 1] on the device, cumulative lengths from 0.

    Returns:
        [E, H, D] in the precision of `kv_T2HD`; zeros for a segment without tokens.
    """
    # Imported here: a PyTorch without CUDA comes without Triton.
    from navit_clip.kernels._pool_attention import forward_kernel

    segments = len(offsets) - 1
    out_EHD = kv_T2HD.new_empty(segments, *kv_T2HD.shape[2:])
    if segments:
        grid, options = _launch(kv_T2HD, segments)
        forward_kernel[grid](q_HD.contiguous(), kv_T2HD, offsets, out_EHD, **options)
    return out_EHD


def pool_attention_backward(
    grad_EHD: Tensor, q_HD: Tensor, kv_T2HD: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the query and of keys and values.

    Of the output's gradient [E, H, D] and the forward pass's arguments; `offsets` must end with T,
    else rows behind it stay undefined.

    Returns:
        [H, D] and [T, 2, H, D], in the precision of `q_HD` and of `kv_T2HD`.
    """
    from navit_clip.kernels._pool_attention import backward_kernel

    segments = len(offsets) - 1
    dkv_T2HD = torch.empty_like(kv_T2HD)
    parts_EHD = torch.empty_like(
        grad_EHD, dtype=torch.float32, memory_format=torch.contiguous_format
    )
    if segments:
        grid, options = _launch(kv_T2HD, segments)
        backward_kernel[grid](
            grad_EHD.contiguous(),
            q_HD.contiguous(),
            kv_T2HD,
            offsets,
            dkv_T2HD,
            parts_EHD,
            **options,
        )
    return parts_EHD.sum(0).to(q_HD.dtype), dkv_T2HD


def _launch(kv_T2HD: Tensor, segments: int) -> tuple[tuple[int], dict[str, Any]]:
    import triton

    _, _, heads, width = kv_T2HD.shape
    options = {
        "scale": width**-0.5,
        "H": heads,
        "D": width,
        "WIDTH": triton.next_power_of_2(width),
        "BLOCK": _BLOCK,
        "num_warps": _WARPS,
    }
    return (segments * heads,), options
