"""Tiles of logits: cut from images × texts, multiplied once, reduced or turned into gradients.

The arithmetic of `navit_clip.losses.contrastive` on this rank's images and one visiting block of
texts (`_ring`, `_gather`). The four steps at the end (`softmax_statistics`, …) are all that happens
to a tile between its matrix products. The CPU runs them as they stand, in two buffers that every
tile shares. CUDA runs the same functions compiled, which makes a few kernels of a dozen; there
every tile is one square buffer, ragged ones filled up with pairs that count for nothing, because
ranks hold other numbers of pairs at every step and each new shape would be compiled again. The
softmax of bfloat16 features goes further there: kernels of `navit_clip.kernels` take its logits'
place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from navit_clip.kernels.contrastive import ALIGNMENT


def default_chunk_size(features: Tensor, *, kernels: bool = False) -> int:
    """Side of a tile.

    Large enough on a GPU to be worth the launches, the more so where kernels make the weights and
    nothing else is stored of a tile. On the CPU the smallest is fast too, but every operation on a
    tile waits for the slowest core, and on a machine with other work one of them is always late
    (6 s became 40 s): the fewer tiles the better, as long as the two tiles that exist take no more
    memory than the features.
    """
    if kernels:
        return 8192
    side, largest = 1024, 4096
    if features.is_cuda:
        return largest
    while (
        side < largest and 2 * (2 * side) ** 2 * logit_dtype(features).itemsize <= features.nbytes
    ):
        side *= 2
    return side


def logit_dtype(features: Tensor) -> torch.dtype:
    """Precision of logits and of everything that is summed up: at least float32."""
    return torch.promote_types(features.dtype, torch.float32)


def is_fused(device: torch.device) -> bool:
    """Whether the steps are compiled. On the CPU the matrix products take nearly all the time."""
    return device.type == "cuda" and find_spec("triton") is not None


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What autocast makes of features: float32 becomes bfloat16 where that is multiplied as it is.

    Unlike a matrix product's, the results stay float32.
    """
    if (
        device.type == "cuda"
        and dtype == torch.float32
        and torch.is_autocast_enabled("cuda")
        and torch.get_autocast_dtype("cuda") == torch.bfloat16
    ):
        return torch.bfloat16
    return dtype


def operand_dtype(features: Tensor) -> torch.dtype:
    """What matrices are multiplied in.

    CUDA multiplies bfloat16 as it is and sums up in float32, at many times the rate of float32.
    float16 stays out: most weights of a large batch are too small for its range.
    """
    if features.is_cuda and features.dtype == torch.bfloat16:
        return features.dtype
    return logit_dtype(features)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Sets out to a · b, summed up in the precision of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a · b to total, summed up in the precision of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """`total`, contiguous, in another dtype, in its own memory if that is narrower.

    At a quarter of a million pairs a copy is a quarter of what the backward pass may take.
    """
    if total.dtype.itemsize <= dtype.itemsize:
        return total.to(dtype)
    flat, length = total.view(-1), 2**20
    narrow = flat.view(dtype)[: len(flat)]
    for start in range(0, len(flat), length):
        # Ends before the first number that is still to be read.
        narrow[start : start + length] = flat[start : start + length].to(dtype)
    return narrow.view(total.shape)


def has_kernels(features: Tensor) -> bool:
    """Whether the softmax runs in kernels that keep logits on the chip (`kernels.contrastive`)."""
    bfloat16 = features.is_cuda and features.dtype == torch.bfloat16
    return bfloat16 and find_spec("triton") is not None


class Raw(NamedTuple):
    """A tile's products as the steps take them.

    Attributes:
        logits: [rows, columns]; compiled, both are the full side.
        scale: 0-d, still to be multiplied in; None if the operands carried it.
        row_padding: [rows], 0 for a pair and -inf past the end; None where tiles are not padded.
        column_padding: [columns], likewise.
        scratch: Buffer like `logits`. Given, a step may overwrite it and `logits`; None leaves
            memory to the compiler.
    """

    logits: Tensor
    scale: Tensor | None
    row_padding: Tensor | None
    column_padding: Tensor | None
    scratch: Tensor | None

    def matching(self, rows: int) -> Tensor:
        """Logits of the matching pairs, [rows]; to be taken before a step."""
        logits = self.logits.diagonal()[:rows]
        return logits if self.scale is None else logits * self.scale


class Tile(NamedTuple):
    """Consecutive image rows and consecutive text rows of the visiting block.

    Attributes:
        rows: Which images, up to the side of the tile: in a tensor of one number per image a slice
            ends with the last of them, in a vector from `Tiler.vector` it takes in the padding.
        columns: Which texts, likewise.
        image: [rows, D] operands of the products.
        text: [columns, D].
        scaled: `image` times the scale, where the products of logits take it.
        has_matches: Whether the tile's diagonal holds the matching pairs.
    """

    rows: slice
    columns: slice
    image: Tensor
    text: Tensor
    scaled: Tensor
    has_matches: bool


class Tiler:
    """Cuts images × text block into tiles, all in the same buffers of at most chunk² numbers.

    Args:
        image_ED: This rank's images.
        scale: 0-d factor of the logits, in their precision.
        largest: Most texts of one block.
        chunk_size: Side of the largest tile.
        kernels: Logits are left to kernels, and buffers hold nothing but the weights made of them.
    """

    def __init__(
        self,
        image_ED: Tensor,
        scale: Tensor,
        largest: int,
        chunk_size: int,
        *,
        kernels: bool = False,
    ) -> None:
        self.image_ED, self.scale, self.kernels = image_ED, scale, kernels
        self.fused = is_fused(image_ED.device) and not kernels
        self._operand = operand_dtype(image_ED)
        # Scaled images save a pass over each tile, but would be rounded in half precision.
        self._scale_after = None if self._operand == scale.dtype else scale
        self._side = chunk_size
        if self.fused:
            # Few sizes, so that few are compiled; not one, so that a small batch is not all padding
            while self._side % 2 == 0 and chunk_size < 4 * self._side and largest <= self._side / 2:
                self._side //= 2
            self._edge = scale.new_zeros(2 * self._side)
            self._edge[self._side :] = -torch.inf
        self._rows = min(self._side, len(image_ED))
        # Few images and many texts: wider tiles, of which a kernel still fills the device.
        self._width = self._side**2 // max(1, self._rows) if kernels else self._side
        self._columns = min(self._width, largest)

    @cached_property
    def _buffers(self) -> Tensor:
        if self.kernels:
            stride = -(-self._columns // ALIGNMENT) * ALIGNMENT
            return self.image_ED.new_empty((1, self._rows * stride), dtype=self._operand)
        if self.fused:
            return self.scale.new_zeros((1, self._side**2))
        return self.scale.new_empty((2, self._rows * self._columns))

    @cached_property
    def _scaled(self) -> Tensor:
        return self.scale.new_empty((self._rows, self.image_ED.shape[1]))

    def vector(self, length: int, value: float) -> Tensor:
        """`length` numbers, and in fused tiles as many more as the last tile is padded by."""
        return self.padded(self.scale.new_full((length,), value))

    def padded(self, values: Tensor) -> Tensor:
        """`values` as long as a `vector`."""
        return F.pad(values, (0, -len(values) % self._side if self.fused else 0))

    def slices(self, length: int) -> list[slice]:
        """Consecutive slices of images, one side each; the last may end later."""
        return [slice(start, start + self._side) for start in range(0, length, self._side)]

    def strip(self, rows: slice, text_MD: Tensor, is_own: bool) -> Iterator[Tile]:
        """Yields the tiles of some images and all of `text_MD`."""
        image = self.image_ED[rows].to(self._operand)
        scaled = image
        if self._scale_after is None:
            scaled = torch.mul(image, self.scale, out=self._scaled[: len(image)])
        for start in range(0, len(text_MD), self._width):
            columns = slice(start, start + self._width)
            text = text_MD[columns].to(self._operand)
            # Wider than high is a tile only where it takes all images, and so all matches.
            yield Tile(rows, columns, image, text, scaled, is_own and rows.start == start)

    def multiply(self, tile: Tile) -> Raw:
        """The tile's products, valid until the next tile's."""
        rows, columns = len(tile.image), len(tile.text)
        if self.fused:
            logits = self._buffers[0].view(self._side, self._side)
            multiply(tile.scaled, tile.text.T, logits[:rows, :columns])
            # What an earlier tile left beyond is finite, hence -inf once the padding is added.
            paddings = self._padding(rows), self._padding(columns)
            return Raw(logits, self._scale_after, *paddings, None)
        # Cut from a flat buffer, the tile stays contiguous at ragged edges too.
        logits, scratch = (b[: rows * columns].view(rows, columns) for b in self._buffers)
        multiply(tile.scaled, tile.text.T, logits)
        return Raw(logits, self._scale_after, None, None, scratch)

    def run(self, step: Callable[..., Any], raw: Raw, *args: Any) -> Any:
        """Calls one of the steps below, compiled where that is worth it."""
        return (_compiled(step) if self.fused else step)(raw, *args)

    def weights_buffer(self, tile: Tile) -> Tensor:
        """Memory of the tile's weights as a kernel wants it, valid until the next tile's."""
        rows, columns = len(tile.image), len(tile.text)
        stride = -(-columns // ALIGNMENT) * ALIGNMENT
        return self._buffers[0, : rows * stride].view(rows, stride)[:, :columns]

    def _padding(self, length: int) -> Tensor:
        return self._edge[self._side - length : 2 * self._side - length]


@cache
def _compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(step, fullgraph=True, dynamic=False)


def softmax_statistics(raw: Raw, row_lse: Tensor, column_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exps, the tile's added to those so far.

    Shifted by the maximum of each row or column. One shift for both would save an exponential per
    logit, but underflows: with a scale of 100 the maxima lie up to 200 apart, exp(-104) is 0.
    """
    logits = _scaled(raw)
    return _add_log_sum_exp(row_lse, logits, 1, raw.scratch), _add_log_sum_exp(
        column_lse, logits, 0, raw.scratch
    )


def softmax_weights(
    raw: Raw, row_lse: Tensor, column_lse: Tensor, has_matches: bool, dtype: torch.dtype
) -> Tensor:
    """∂(2N·loss)/∂logits: both softmaxes, less 2 for a matching pair, in `dtype`."""
    logits = _scaled(raw)
    by_row = torch.sub(logits, row_lse[:, None], out=raw.scratch).exp_()
    weights = logits.sub_(column_lse).exp_().add_(by_row)
    if has_matches:
        # Before the rounding to `dtype`: near the optimum little is left of the difference.
        weights.diagonal().sub_(2)
    return weights.to(dtype)


def sigmoid_losses(raw: Raw, bias: Tensor, has_matches: bool) -> Tensor:
    """Losses of the tile's pairs, summed up per column."""
    logits = _scaled(raw).add_(bias)
    if has_matches:
        logits.diagonal().neg_()
    # softplus without its cut-off at 20
    return torch.logaddexp(logits, torch.zeros_like(bias), out=raw.scratch).sum(0)


def sigmoid_weights(
    raw: Raw, bias: Tensor, has_matches: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """∂(N·loss)/∂logits in `dtype`, and its sums per column."""
    weights = _scaled(raw).add_(bias)
    # sigmoid(l) - 1 = -sigmoid(-l), the right side without cancellation.
    if has_matches:
        weights.diagonal().neg_()
    weights.sigmoid_()
    if has_matches:
        weights.diagonal().neg_()
    return weights.to(dtype), weights.sum(0)


def _scaled(raw: Raw) -> Tensor:
    logits = raw.logits
    if raw.row_padding is None or raw.column_padding is None:
        return logits if raw.scale is None else logits.mul_(raw.scale)
    if raw.scale is not None:
        logits = logits * raw.scale
    # Added after the scale, of which nothing keeps it from being 0.
    return logits + raw.row_padding[:, None] + raw.column_padding


def _add_log_sum_exp(total: Tensor, logits: Tensor, dim: int, scratch: Tensor | None) -> Tensor:
    peak = logits.amax(dim, keepdim=True)
    partial = torch.sub(logits, peak, out=scratch).exp_().sum(dim).log_().add_(peak.squeeze(dim))
    return torch.logaddexp(total, partial)
