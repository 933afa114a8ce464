"""Attention of one query over each segment as an operator, by kernels of our own.

Called by `MapPooling` on CUDA where `parallel.attention` says so; elsewhere pooling is a case of
`segment_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from navit_clip.kernels import pool_attention


@torch.library.custom_op("navit_clip::attend_pool", mutates_args=())
def attend_pool(q_HD: Tensor, kv_T2HD: Tensor, offsets: Tensor) -> Tensor:
    """Softmax attention of one query over the tokens of each segment.

    Args:
        q_HD: [H, D] the query of all segments.
        kv_T2HD: [T, 2, H, D] keys and values; every token lies in a segment.
        offsets: int32 [E + 1] on the device, cumulative lengths from 0.

    Returns:
        [E, H, D] in the precision of `kv_T2HD`.
    """
    return pool_attention.pool_attention(q_HD, kv_T2HD.contiguous(), offsets)


@torch.library.custom_op("navit_clip::attend_pool_backward", mutates_args=())
def attend_pool_backward(
    grad_EHD: Tensor, q_HD: Tensor, kv_T2HD: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the query and of keys and values."""
    return pool_attention.pool_attention_backward(grad_EHD, q_HD, kv_T2HD.contiguous(), offsets)


@attend_pool.register_fake
def _(q_HD: Tensor, kv_T2HD: Tensor, offsets: Tensor) -> Tensor:
    return kv_T2HD.new_empty(len(offsets) - 1, *q_HD.shape)


@attend_pool_backward.register_fake
def _(grad_EHD: Tensor, q_HD: Tensor, kv_T2HD: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return q_HD.new_empty(q_HD.shape), kv_T2HD.new_empty(kv_T2HD.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_EHD: Tensor) -> tuple[Tensor | None, ...]:
    return (*attend_pool_backward(grad_EHD, *ctx.saved_tensors), None)


attend_pool.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.navit_clip.attend_pool, get_raw=True)
def _flops(_q: Tensor, kv_T2HD: Tensor, *_: Any, **__: Any) -> int:
    """Two products."""
    return 2 * kv_T2HD.numel()


@register_flop_formula(torch.ops.navit_clip.attend_pool_backward, get_raw=True)
def _backward_flops(_grad: Tensor, _q: Tensor, kv_T2HD: Tensor, *_: Any, **__: Any) -> int:
    """Five products, that of the scores included, which is computed again."""
    return 5 * kv_T2HD.numel()
