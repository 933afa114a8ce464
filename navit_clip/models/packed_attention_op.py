"""Self-attention from packed queries, keys and values, the query-key norm inside, as one operator.

Beside `attention_op`, whose operator it is where kernels of our own do not apply: those of
`navit_clip.kernels.short_attention` take the short segments, with which a batch begins, and read
them where the QKV projection wrote them; longer ones are normalised here and go to `attend`.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from navit_clip.kernels import short_attention
from navit_clip.models.attention_op import attend, attend_backward, scores
from navit_clip.packed.segments import LAYOUT_HEAD

_ENDS = slice(3, LAYOUT_HEAD)  # of the classes, in a layout


@torch.library.custom_op("navit_clip::attend_packed", mutates_args=())
def attend_packed(
    qkv_T3HD: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offsets: Tensor,
    layout: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Softmax attention within segments, of queries and keys that are normalised first.

    Args:
        qkv_T3HD: [T, 3, H, D] queries, keys and values.
        q_weight: [D] weights of the queries' LayerNorm, which has no bias; None, with `k_weight`,
            for queries and keys that are taken as they are.
        k_weight: [D] weights of the keys' LayerNorm.
        eps: Added to the variance in both norms.
        offsets: int32 [E + 1] or more, on the device, what follows the E examples left unread.
        layout: int32 [LAYOUT_HEAD + E], on the host: `Segments.layout`.
        causal: Each token sees itself and what stands before it in its segment.

    Returns:
        [T, H, D] in the inputs' precision, zero on padding; and [H, T] for the backward pass.
    """
    qkv_T3HD = qkv_T3HD.contiguous()
    out_THD, lse = _outputs(qkv_T3HD)
    short = _short(qkv_T3HD, layout)
    if short.segments:
        short_attention.short_attention_forward(
            qkv_T3HD, offsets, short.bounds, q_weight, k_weight, eps, causal, out_THD
        )
    if rest := _rest(short, offsets, layout):
        q_THD, k_THD, v_THD = qkv_T3HD[rest.rows].unbind(1)
        q_THD, k_THD = _norm(q_THD, q_weight, eps).y, _norm(k_THD, k_weight, eps).y
        out, rest_lse = attend(q_THD, k_THD, v_THD, *rest.segments, causal)
        out_THD[rest.rows] = out
        lse.view(-1)[: rest_lse.numel()] = rest_lse.flatten()
    out_THD[int(layout[1]) :] = 0
    return out_THD, lse


@torch.library.custom_op("navit_clip::attend_packed_backward", mutates_args=())
def attend_packed_backward(
    grad_THD: Tensor,
    qkv_T3HD: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    out_THD: Tensor,
    lse: Tensor,
    offsets: Tensor,
    layout: Tensor,
    eps: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the packed QKV and of the norms' weights, which are empty without norms."""
    grad_THD, qkv_T3HD = grad_THD.contiguous(), qkv_T3HD.contiguous()
    dqkv_T3HD = torch.empty_like(qkv_T3HD)
    weights = (q_weight, k_weight)
    dweights = tuple(
        qkv_T3HD.new_zeros(0) if weight is None else torch.zeros_like(weight) for weight in weights
    )
    short = _short(qkv_T3HD, layout)
    if short.segments:
        dshort = short_attention.short_attention_backward(
            grad_THD, qkv_T3HD, offsets, short.bounds, q_weight, k_weight, eps, causal, dqkv_T3HD
        )
        if dshort is not None:
            dq_weight, dk_weight = dshort
            # They may be parts of one tensor, which outputs of an operator must not be.
            dweights = (dq_weight, dk_weight.clone())
    if rest := _rest(short, offsets, layout):
        q_THD, k_THD, v_THD = qkv_T3HD[rest.rows].unbind(1)
        norms = _norm(q_THD, q_weight, eps), _norm(k_THD, k_weight, eps)
        heads = lse.shape[0]
        grads = attend_backward(
            grad_THD[rest.rows],
            *(norm.y for norm in norms),
            v_THD,
            out_THD[rest.rows],
            lse.view(-1)[: heads * len(v_THD)].view(heads, -1),
            *rest.segments,
            causal,
        )
        for i, (norm, grad, dweight) in enumerate(zip(norms, grads[:2], dweights, strict=True)):
            dx_THD, dw = norm.backward(grad)
            dqkv_T3HD[rest.rows, i] = dx_THD
            if dw is not None:
                dweight += dw
        dqkv_T3HD[rest.rows, 2] = grads[2]
    dqkv_T3HD[int(layout[1]) :] = 0
    return dqkv_T3HD, dweights[0], dweights[1]


@attend_packed.register_fake
def _outputs(qkv_T3HD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, _three, heads, width = qkv_T3HD.shape
    out_THD = qkv_T3HD.new_empty(tokens, heads, width)
    return out_THD, out_THD.new_zeros(heads, tokens, dtype=_precise(qkv_T3HD))


@attend_packed_backward.register_fake
def _(
    grad_THD: Tensor, qkv_T3HD: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    weights = (
        qkv_T3HD.new_empty(0) if w is None else torch.empty_like(w) for w in (q_weight, k_weight)
    )
    return (qkv_T3HD.new_empty(qkv_T3HD.shape), *weights)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv_T3HD, q_weight, k_weight, ctx.eps, offsets, layout, ctx.causal = inputs
    ctx.save_for_backward(qkv_T3HD, q_weight, k_weight, *output, offsets, layout)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_THD: Tensor, _: None) -> tuple[Tensor | None, ...]:
    dqkv_T3HD, dq_weight, dk_weight = attend_packed_backward(
        grad_THD, *ctx.saved_tensors, ctx.eps, ctx.causal
    )
    if ctx.saved_tensors[1] is None:
        return (dqkv_T3HD, *[None] * 6)
    return (dqkv_T3HD, dq_weight, dk_weight, *[None] * 4)


attend_packed.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.navit_clip.attend_packed, get_raw=True)
def _flops(qkv_T3HD: Tensor, *args: Any, **_: Any) -> int:
    """As of `attend`."""
    return 4 * qkv_T3HD[0, 0].numel() * scores(len(qkv_T3HD) ** 2, args[4], args[4])


@register_flop_formula(torch.ops.navit_clip.attend_packed_backward, get_raw=True)
def _backward_flops(_grad: Tensor, qkv_T3HD: Tensor, *args: Any, **_: Any) -> int:
    """As of `attend_backward`."""
    return 10 * qkv_T3HD[0, 0].numel() * scores(len(qkv_T3HD) ** 2, args[5], args[5])


class _Short(NamedTuple):
    """The segments that our own kernels take, all of them before the others.

    Attributes:
        segments: How many there are.
        bounds: Where the classes of the kernels begin, and where the last one ends.
    """

    segments: int
    bounds: list[int]


def _short(qkv_T3HD: Tensor, layout: Tensor) -> _Short:
    if not takes_kernels(qkv_T3HD):
        return _Short(0, [])
    bounds = layout[_ENDS].tolist()
    return _Short(bounds[-1], [0, *bounds])


def takes_kernels(qkv_T3HD: Tensor) -> bool:
    """Whether our own kernels can take short segments of these.

    They could take float32 too, but without tensor cores and out of registers.
    """
    half = qkv_T3HD.dtype in (torch.bfloat16, torch.float16)
    narrow = qkv_T3HD.shape[-1] <= short_attention.MAX_WIDTH
    return half and narrow and qkv_T3HD.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class _Rest(NamedTuple):
    """The segments behind those that our own kernels take.

    Attributes:
        rows: Their tokens.
        segments: Their offsets and layout twice, as `attend` wants them.
    """

    rows: slice
    segments: tuple[Tensor, Tensor, Tensor, Tensor]


def _rest(short: _Short, offsets: Tensor, layout: Tensor) -> _Rest | None:
    count, tokens = layout[:2].tolist()
    if short.segments == count:
        return None
    begin = 0
    if short.segments:
        behind = LAYOUT_HEAD + short.segments
        begin = int(layout[LAYOUT_HEAD:behind].sum())
        offsets = offsets[short.segments : count + 1] - begin
        layout = torch.cat([layout[:LAYOUT_HEAD], layout[behind:]])
        layout[0], layout[1] = count - short.segments, tokens - begin
    return _Rest(slice(begin, tokens), (offsets, offsets, layout, layout))


class _Norm(NamedTuple):
    """Normalised queries or keys, and what their gradient needs.

    Attributes:
        y: [T, H, D], in half precision if the kernels want it so.
        saved: Input, mean, inverse deviation and weight; None without a norm.
    """

    y: Tensor
    saved: tuple[Tensor, Tensor, Tensor, Tensor] | None

    def backward(self, grad_THD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of the input and of the weight."""
        if self.saved is None:
            return grad_THD, None
        x, mean, deviation, weight = self.saved
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad_THD.to(x.dtype),
            x,
            x.shape[-1:],
            mean,
            deviation,
            weight,
            None,
            [True, True, False],
        )
        return dx, dweight


def _norm(x_THD: Tensor, weight: Tensor | None, eps: float) -> _Norm:
    if weight is None:
        return _Norm(x_THD, None)
    x, w = x_THD.to(_precise(x_THD)).contiguous(), weight.to(_precise(x_THD))
    y, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], w, None, eps)
    # A CPU attends in float32 whatever the values' precision.
    return _Norm(y.to(x_THD.dtype) if y.is_cuda else y, (x, mean, deviation, w))


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
