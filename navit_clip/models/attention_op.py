"""Attention within segments as one operator, for CUDA and for compiled code.

Below `attention`, which chooses. To the compiler, and to tensors without content, it is one node
that takes tensors alone: lengths, which differ in every batch, come in a tensor on the host, which
is read without waiting for the device and guarded by nothing. CUDA in half precision runs
PyTorch's FlashAttention-2 on all segments at once, called below `varlen_attn`, whose choice of
kernels changes with PyTorch's version; a CPU runs its fused kernel on each group of equally long
neighbours; what neither takes (float32 on CUDA, heads wider than 256) is multiplied out.

Padding is neither read nor computed: outputs and gradients are zero there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from navit_clip.packed.segments import LAYOUT_HEAD

FLASH_WIDTH = 256  # of a head, at most
_FLASH_MULTIPLE = 8  # of which the width of a head must be one
_HALF = (torch.bfloat16, torch.float16)
# Scores that are held at a time where attention is multiplied out: 256 MB in float32.
_SCORES = 1 << 26
# No public function gives the softmax's normaliser, without which the backward pass would need
# the forward pass again; where a build lacks the kernel, attention is multiplied out.
_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_fused_backward = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None
)


class Group(NamedTuple):
    """Neighbouring segments that are equally long, among queries and among keys.

    Attributes:
        queries: Tokens of each segment.
        keys: Likewise, on the other side.
        segments: How many there are.
    """

    queries: int
    keys: int
    segments: int


def equal_groups(lengths_q: Sequence[int], lengths_k: Sequence[int]) -> list[Group]:
    """The segments in groups as large as may be, in their order."""
    pairs = zip(lengths_q, lengths_k, strict=True)
    return [Group(*pair, len(list(same))) for pair, same in groupby(pairs)]


def takes_flash(x_THD: Tensor) -> bool:
    """Whether FlashAttention's kernels can take such queries, keys or values."""
    return x_THD.is_cuda and x_THD.dtype in _HALF and x_THD.shape[-1] <= FLASH_WIDTH


@torch.library.custom_op("navit_clip::attend", mutates_args=())
def attend(
    q_THD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    layout_q: Tensor,
    layout_k: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query segment over the key segment of the same index.

    Args:
        q_THD: [T, H, D] queries; on a CPU q and k may be float32 beside values in half precision.
        k_SHD: [S, H, D] keys.
        v_SHD: [S, H, D] values.
        offsets_q: int32 [E + 1] or more, on the device: cumulative lengths of the queries'
            segments, what follows the E examples left unread.
        offsets_k: Of the keys' segments.
        layout_q: int32 [LAYOUT_HEAD + E], on the host: `Segments.layout` of the queries.
        layout_k: Of the keys.
        causal: Each token sees itself and what stands before it in its segment.

    Returns:
        [T, H, D] in the values' precision, zero on padding; and [H, T], the logarithms of the
        softmax's denominators, laid out as the kernels want them and for the backward pass only.
    """
    if takes_flash(v_SHD) and int(layout_q[0]):
        return _flash(q_THD, k_SHD, v_SHD, offsets_q, offsets_k, layout_q, layout_k, causal)
    dtype = torch.promote_types(v_SHD.dtype, torch.float32)
    out_THD = torch.empty_like(q_THD, dtype=v_SHD.dtype, memory_format=torch.contiguous_format)
    lse = out_THD.new_zeros(q_THD.shape[1::-1], dtype=dtype)
    q_THD, k_SHD, v_SHD = q_THD.to(dtype), k_SHD.to(dtype), v_SHD.to(dtype)
    for group, q, k in _slices(layout_q, layout_k, q_THD.shape[1]):
        inputs = [_heads_first(x, group.segments) for x in (q_THD[q], k_SHD[k], v_SHD[k])]
        out, lse_EHL = _forward(*inputs, causal=causal)
        _heads_first(out_THD[q], group.segments).copy_(out)
        _rows(lse, q).copy_(lse_EHL.flatten())
    out_THD[int(layout_q[1]) :] = 0
    return out_THD, lse


@torch.library.custom_op("navit_clip::attend_backward", mutates_args=())
def attend_backward(
    grad_THD: Tensor,
    q_THD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    out_THD: Tensor,
    lse: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    layout_q: Tensor,
    layout_k: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, by that of `attend`'s first output."""
    if takes_flash(v_SHD) and int(layout_q[0]):
        return _flash_backward(
            grad_THD,
            q_THD,
            k_SHD,
            v_SHD,
            out_THD,
            lse,
            offsets_q,
            offsets_k,
            layout_q,
            layout_k,
            causal,
        )
    dq_THD, dk_SHD, dv_SHD = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_SHD, v_SHD)
    )
    grad_THD, q_THD, k_SHD, v_SHD, out_THD = (
        x.to(lse.dtype) for x in (grad_THD, q_THD, k_SHD, v_SHD, out_THD)
    )
    for group, q, k in _slices(layout_q, layout_k, q_THD.shape[1]):
        rows = (grad_THD[q], q_THD[q], k_SHD[k], v_SHD[k], out_THD[q])
        inputs = [_heads_first(x, group.segments) for x in rows]
        lse_EHL = _rows(lse, q).unflatten(0, (group.segments, -1, group.queries))
        grads = _backward(lse_EHL, *inputs, causal=causal)
        for x, grad in zip((dq_THD[q], dk_SHD[k], dv_SHD[k]), grads, strict=True):
            _heads_first(x, group.segments).copy_(grad)
    dq_THD[int(layout_q[1]) :] = 0
    dk_SHD[(end := int(layout_k[1])) :] = 0
    dv_SHD[end:] = 0
    return dq_THD, dk_SHD, dv_SHD


@attend.register_fake
def _(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(v_SHD.dtype, torch.float32)
    tokens, heads, _width = q_THD.shape
    return q_THD.new_empty(q_THD.shape, dtype=v_SHD.dtype), q_THD.new_empty(
        heads, tokens, dtype=dtype
    )


@attend_backward.register_fake
def _(_: Tensor, q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, *__: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q_THD, k_SHD, v_SHD))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal = inputs
    q_THD, k_SHD, v_SHD, *segments = tensors
    ctx.save_for_backward(q_THD, k_SHD, v_SHD, *output, *segments)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_THD: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grads = attend_backward(grad_THD, *ctx.saved_tensors, ctx.causal)
    return (*grads, None, None, None, None, None)


attend.register_autograd(_differentiate, setup_context=_setup_context)


# Raw: the tensors themselves, since the cost is in the lengths and not in shapes.
@register_flop_formula(torch.ops.navit_clip.attend, get_raw=True)
def _flops(q_THD: Tensor, k_SHD: Tensor, *args: Any, **_: Any) -> int:
    """Two products; causal attention counts whole, as in `navit_clip.models.flops`."""
    return 4 * q_THD[0].numel() * scores(len(q_THD) * len(k_SHD), *args[3:5])


@register_flop_formula(torch.ops.navit_clip.attend_backward, get_raw=True)
def _backward_flops(_grad: Tensor, q_THD: Tensor, k_SHD: Tensor, *args: Any, **_: Any) -> int:
    """Five products, that of the scores included, which is computed again."""
    return 10 * q_THD[0].numel() * scores(len(q_THD) * len(k_SHD), *args[5:7])


def scores(dense: int, layout_q: Tensor, layout_k: Tensor) -> int:
    """Pairs of a query and a key, by layouts, for the count of floating-point operations.

    Where layouts have no content: what equally long examples make of the `dense` pairs of all.
    """
    if isinstance(layout_q, FakeTensor):
        return dense // max(1, len(layout_q) - LAYOUT_HEAD)
    return int((layout_q[LAYOUT_HEAD:].long() * layout_k[LAYOUT_HEAD:]).sum())


def _flash(
    q_THD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    layout_q: Tensor,
    layout_k: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    width = q_THD.shape[-1]
    out_THD, lse, *_ = torch.ops.aten._flash_attention_forward(
        *map(_widened, (q_THD, k_SHD, v_SHD)),
        *_extent(offsets_q, offsets_k, layout_q, layout_k),
        0.0,
        causal,
        return_debug_mask=False,
        scale=width**-0.5,
        window_size_left=-1,
        window_size_right=0 if causal else -1,
    )
    out_THD = out_THD[..., :width].contiguous()
    out_THD[int(layout_q[1]) :] = 0
    return out_THD, lse


def _flash_backward(
    grad_THD: Tensor,
    q_THD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    out_THD: Tensor,
    lse: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    layout_q: Tensor,
    layout_k: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = q_THD.shape[-1]
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q_THD.device)  # left unread
    grads = torch.ops.aten._flash_attention_backward(
        *map(_widened, (grad_THD, q_THD, k_SHD, v_SHD, out_THD)),
        lse,
        *_extent(offsets_q, offsets_k, layout_q, layout_k),
        0.0,
        causal,
        no_dropout,
        torch.empty(0, device=q_THD.device),
        scale=width**-0.5,
        window_size_left=-1,
        window_size_right=0 if causal else -1,
    )
    ends = [int(layout_q[1]), *[int(layout_k[1])] * 2]
    dq_THD, dk_SHD, dv_SHD = (grad[..., :width].contiguous() for grad in grads)
    for grad, end in zip((dq_THD, dk_SHD, dv_SHD), ends, strict=True):
        grad[end:] = 0
    return dq_THD, dk_SHD, dv_SHD


def _widened(x_THD: Tensor) -> Tensor:
    """With heads as wide as FlashAttention's kernels want them: zeros change no score."""
    if missing := -x_THD.shape[-1] % _FLASH_MULTIPLE:
        return F.pad(x_THD, (0, missing))
    return x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()


def _extent(
    offsets_q: Tensor, offsets_k: Tensor, layout_q: Tensor, layout_k: Tensor
) -> tuple[Tensor, Tensor, int, int]:
    """Offsets of the examples alone, and the longest of them."""
    end = int(layout_q[0]) + 1
    return offsets_q[:end], offsets_k[:end], int(layout_q[2]), int(layout_k[2])


def _slices(layout_q: Tensor, layout_k: Tensor, heads: int) -> Iterator[tuple[Group, slice, slice]]:
    """Groups of few enough scores, and where their queries and keys are."""
    start_q = start_k = 0
    for queries, keys, count in equal_groups(
        layout_q[LAYOUT_HEAD:].tolist(), layout_k[LAYOUT_HEAD:].tolist()
    ):
        most = max(1, _SCORES // (heads * queries * keys))
        for begin in range(0, count, most):
            group = Group(queries, keys, min(most, count - begin))
            end_q, end_k = start_q + group.segments * queries, start_k + group.segments * keys
            yield group, slice(start_q, end_q), slice(start_k, end_k)
            start_q, start_k = end_q, end_k


def _heads_first(x_THD: Tensor, count: int) -> Tensor:
    """A group's tokens as [E, H, L, D]."""
    return x_THD.unflatten(0, (count, -1)).transpose(1, 2)


def _rows(lse: Tensor, tokens: slice) -> Tensor:
    """The numbers of some tokens and all heads, next to each other."""
    heads = lse.shape[0]
    return lse.view(-1)[tokens.start * heads : tokens.stop * heads]


def _forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Of [E, H, L, D]; the output and [E, H, L]."""
    if q.device.type == "cpu" and _fused is not None:
        out, lse = _fused(q, k, v, 0.0, causal)
        return out, lse
    with torch.autocast(q.device.type, enabled=False):
        scores = _scores(q, k, causal)
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp() @ v, lse


def _backward(
    lse: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of [E, H, L, D], the logarithms [E, H, L] as `_forward` returned them."""
    if q.device.type == "cpu" and _fused_backward is not None:
        dq, dk, dv = _fused_backward(grad, q, k, v, out, lse, 0.0, causal)
        return dq, dk, dv
    with torch.autocast(q.device.type, enabled=False):
        weights = (_scores(q, k, causal) - lse[..., None]).exp()
        delta = (grad * out).sum(-1, keepdim=True)
        dscores = weights * (grad @ v.mT - delta) * q.shape[-1] ** -0.5
        return dscores @ k, dscores.mT @ q, weights.mT @ grad


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores
