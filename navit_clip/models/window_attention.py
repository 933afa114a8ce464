"""Attention within windows, by how two tokens lie to each other: a bias (Swin), or rotations.

In the blocks of `hierarchical_tower`. Rows of `Windows` that are equally long are one batched
product. It is an operator, as in `attention_op`: to the compiler one node that takes tensors alone,
and the backward pass computes scores again, which take more memory than all else in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from navit_clip.models.position import TABLE_STD
from navit_clip.models.rope import Rotary
from navit_clip.models.transformer import EncoderConfig, SegmentAttention
from navit_clip.packed.segments import Segments
from navit_clip.packed.windows import Windows

_SCORES = 1 << 20  # that are held at a time: 4 MB in float32, which a CPU's caches hold


class TurnedWindows(NamedTuple):
    """What a block knows of its tokens.

    Attributes:
        windows: Those of the block.
        rotary: Of their places, by position within a window; None for attention with a bias.
    """

    windows: Windows
    rotary: Rotary | None = None


class WindowAttention(SegmentAttention):
    """Multi-head self-attention within windows.

    Args:
        config: Of the stage.
        window: w, side of a window.
        biased: Whether there is a bias.

    Attributes:
        bias: [(2w − 1)², H] added to scores, by how far the query lies below and right of the key;
            None without.
    """

    def __init__(self, config: EncoderConfig, window: int, *, biased: bool = True) -> None:
        super().__init__(config)
        self.bias: nn.Parameter | None = None
        if biased:
            self.bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, config.heads))
            nn.init.trunc_normal_(self.bias, std=TABLE_STD)

    def forward(  # type: ignore[override]
        self, x_TC: Tensor, segments: Segments, turned: TurnedWindows
    ) -> Tensor:
        """Attends within windows; [T, C] to [T, C]."""
        windows = turned.windows
        qkv_S3HD = self.qkv(windows.gather(x_TC)).unflatten(-1, (3, self.heads, -1))
        out_SHD = attend_windows(
            *self._normalised(qkv_S3HD, turned.rotary),
            self.bias,
            windows.cells,
            windows.ids,
            windows.layout,
        )
        return windows.scatter(self.out(out_SHD.flatten(-2)), len(x_TC))


@torch.library.custom_op("navit_clip::attend_windows", mutates_args=())
def attend_windows(
    q_SHD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    bias_QH: Tensor | None,
    cells_S: Tensor,
    ids_S: Tensor | None,
    layout: Tensor,
) -> Tensor:
    """Softmax attention of each row of windows over itself.

    Args:
        q_SHD: [S, H, D] queries; on a CPU q and k may be float32 beside values in half precision.
        k_SHD: Keys.
        v_SHD: Values.
        bias_QH: [(2w − 1)², H] added to scores, if any.
        cells_S: `Windows.cells`.
        ids_S: `Windows.ids`; places of different ids do not see each other.
        layout: `Windows.layout`, on the host.

    Returns:
        [S, H, D] in the values' precision.
    """
    out_SHD = torch.empty_like(v_SHD, memory_format=torch.contiguous_format)
    with torch.autocast(v_SHD.device.type, enabled=False):
        for batch in _batches(cells_S, ids_S, layout, v_SHD.shape[1]):
            q, k, v = map(batch.read, (q_SHD, k_SHD, v_SHD))
            bias = batch.bias(bias_QH, q.dtype)
            batch.write(out_SHD, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    return out_SHD


@torch.library.custom_op("navit_clip::attend_windows_backward", mutates_args=())
def attend_windows_backward(
    grad_SHD: Tensor,
    q_SHD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    bias_QH: Tensor | None,
    cells_S: Tensor,
    ids_S: Tensor | None,
    layout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of queries, keys, values and bias, by that of `attend_windows`' output.

    The last is empty without a bias.
    """
    dq_SHD, dk_SHD, dv_SHD = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_SHD, k_SHD, v_SHD)
    )
    table_QH = q_SHD.new_empty(0) if bias_QH is None else bias_QH
    dbias_QH = torch.zeros_like(table_QH, dtype=torch.promote_types(table_QH.dtype, torch.float32))
    scale = q_SHD.shape[-1] ** -0.5
    with torch.autocast(v_SHD.device.type, enabled=False):
        for batch in _batches(cells_S, ids_S, layout, v_SHD.shape[1]):
            grad, q, k, v = map(batch.read, (grad_SHD, q_SHD, k_SHD, v_SHD))
            # In float32, as the kernels of the forward pass keep them: rounded ones would be the
            # gradient of other weights than it had.
            scores = _product(q, k) * scale
            if (bias := batch.bias(bias_QH, scores.dtype)) is not None:
                scores = scores + bias
            weights = scores.softmax(-1)
            dweights = _product(grad, v)
            dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
            if bias_QH is not None:
                batch.add_to_bias(dbias_QH, dscores)
            dscores = dscores.to(q.dtype)
            batch.write(dq_SHD, dscores @ k * scale)
            batch.write(dk_SHD, dscores.mT @ q * scale)
            batch.write(dv_SHD, weights.to(grad.dtype).mT @ grad)
    return dq_SHD, dk_SHD, dv_SHD, dbias_QH.to(table_QH.dtype)


def _product(a_RHLD: Tensor, b_RHLD: Tensor) -> Tensor:
    """Products of all rows of both, in float32 at least."""
    if a_RHLD.dtype.itemsize >= 4:
        return a_RHLD @ b_RHLD.mT
    a, b = a_RHLD.flatten(0, 1), b_RHLD.flatten(0, 1)
    return torch.bmm(a, b.mT, out_dtype=torch.float32).unflatten(0, a_RHLD.shape[:2])


class _Batch(NamedTuple):
    """R rows of L places each.

    Attributes:
        places: Where they are.
        rows: R.
        cells: [R, L] those of the places; [1, L] if they lie the same in all rows.
        apart: bool [R, L, L], query and key are not of the same window; None if no such pair is.
    """

    places: slice
    rows: int
    cells: Tensor
    apart: Tensor | None

    def read(self, x_SHD: Tensor) -> Tensor:
        """The rows' places as [R, H, L, D], on a CPU in float32 at least."""
        x = x_SHD[self.places].unflatten(0, (self.rows, -1)).transpose(1, 2)
        return x.to(torch.promote_types(x.dtype, torch.float32)) if x.device.type == "cpu" else x

    def write(self, out_SHD: Tensor, x_RHLD: Tensor) -> None:
        """The same back."""
        out_SHD[self.places] = x_RHLD.transpose(1, 2).flatten(0, 1).to(out_SHD.dtype)

    def bias(self, bias_QH: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """[R or 1, H or 1, L, L] of the rows' scores, −∞ between windows; None if 0 everywhere."""
        if bias_QH is not None:
            bias = bias_QH.to(dtype)[self._places_in(bias_QH)].movedim(-1, 1)
        elif self.apart is not None:
            bias = self.apart.new_zeros((), dtype=dtype)
        else:
            return None
        return bias if self.apart is None else bias.masked_fill(self.apart[:, None], -torch.inf)

    def add_to_bias(self, dbias_QH: Tensor, dscores_RHLL: Tensor) -> None:
        """Adds the rows' part to the gradient of the table."""
        dscores = dscores_RHLL.sum_to_size(len(self.cells), *dscores_RHLL.shape[1:])
        places = self._places_in(dbias_QH).flatten()
        dbias_QH.index_add_(0, places, dscores.movedim(1, -1).flatten(0, 2).to(dbias_QH.dtype))

    def _places_in(self, bias_QH: Tensor) -> Tensor:
        """[R or 1, L, L] rows of the table, by the difference of each query's and key's cells."""
        # Two tokens at the same cell have the row in the middle.
        return self.cells[:, :, None] - self.cells[:, None, :] + len(bias_QH) // 2


def _batches(cells_S: Tensor, ids_S: Tensor | None, layout: Tensor, heads: int) -> Iterator[_Batch]:
    """The rows in parts of few enough scores."""
    start = 0
    for count, length, alike in layout.view(-1, 3).tolist():
        most = max(1, _SCORES // (heads * length**2))
        for begin in range(0, count, most):
            rows = min(most, count - begin)
            places = slice(start, start + rows * length)
            start = places.stop
            cells_RL = cells_S[places].view(rows, length)[: 1 if alike else None]
            apart = None
            if ids_S is not None:
                ids_RL = ids_S[places].view(rows, length)
                apart = ids_RL[:, :, None] != ids_RL[:, None, :]
            yield _Batch(places, rows, cells_RL, apart)


@attend_windows.register_fake
def _(q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, *_: Any) -> Tensor:
    return v_SHD.new_empty(v_SHD.shape)


@attend_windows_backward.register_fake
def _(_grad: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    *qkv, bias_QH = tensors[:4]
    grads = [x.new_empty(x.shape) for x in qkv]
    return (*grads, qkv[0].new_empty(0) if bias_QH is None else bias_QH.new_empty(bias_QH.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_SHD: Tensor) -> tuple[Tensor | None, ...]:
    *grads, dbias_QH = attend_windows_backward(grad_SHD, *ctx.saved_tensors)
    return (*grads, dbias_QH if len(dbias_QH) else None, None, None, None)


attend_windows.register_autograd(_differentiate, setup_context=_setup_context)


# Raw, as in `attention_op`: the cost is in the lengths and not in shapes.
@register_flop_formula(torch.ops.navit_clip.attend_windows, get_raw=True)
def _flops(q_SHD: Tensor, *args: Any, **_: Any) -> int:
    """Two products of each pair in a row."""
    return 4 * q_SHD[0].numel() * _pairs(args[5])


@register_flop_formula(torch.ops.navit_clip.attend_windows_backward, get_raw=True)
def _backward_flops(_grad: Tensor, q_SHD: Tensor, *args: Any, **_: Any) -> int:
    """Five, that of the scores included, which is computed again."""
    return 10 * q_SHD[0].numel() * _pairs(args[5])


def _pairs(layout: Tensor) -> int:
    rows, lengths, _ = layout.view(-1, 3).unbind(1)
    return int((rows * lengths**2).sum())
