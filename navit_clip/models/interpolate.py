"""Tables of learned positions resized to each patch's own grid, all images at once.

Called by the position embeddings, whose tables have one grid while every image of a packed stream
has another. Each value is what `F.interpolate(align_corners=False)` gives at that cell of the
resized table, but computed for the patches present alone: no loop over images, nothing resized as a
whole, no host sync.

Weights along rows and along columns are functions of the coordinate. Without antialiasing two
(bilinear) or four (bicubic) neighbours on each axis have a weight, and one weighted gather adds
them up. With antialiasing a side shorter than the table's takes in more of it the shorter it is,
up to all: the weights are dense, and a matrix product adds them up.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]

# The coefficients of Keys' cubic kernel in `F.interpolate`, with and without antialiasing.
SMOOTH_CUBIC = -0.5
SHARP_CUBIC = -0.75


class AxisWeights(NamedTuple):
    """Which places of one axis each token reads, and their weights.

    Attributes:
        nodes_TK: int64 [T, K] places on the axis; None where they are all S of them, in order.
        weights_TK: [T, K] their weights, which add up to 1.
    """

    nodes_TK: Tensor | None
    weights_TK: Tensor


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of coordinates and weights for tables of `dtype`, float32 at least.

    bfloat16 rounds index 299 up to a side of 300, and the upper neighbour is past the table.
    """
    return torch.promote_types(dtype, torch.float32)


def resized_axis(
    table_SC: Tensor,
    index_T: Tensor,
    side_T: Tensor,
    interpolation: Interpolation,
    *,
    antialias: bool,
) -> Tensor:
    """Rows of a table resized from its S rows to `side_T` rows.

    Args:
        table_SC: [S, C] float.
        index_T: Integer [T] row wanted, from 0 to its side - 1.
        side_T: Integer [T] rows of the resized table.
        interpolation: ``bilinear`` (linear on one axis) or ``bicubic``.
        antialias: Widen the kernel where the side is shorter than the table.

    Returns:
        [T, C] in the table's precision.
    """
    dtype = exact_dtype(table_SC.dtype)
    axis = axis_weights(
        index_T, side_T, len(table_SC), interpolation, antialias=antialias, dtype=dtype
    )
    return _weighted_sums(table_SC, axis)


def resized_square(
    table_QC: Tensor,
    coords_T2: Tensor,
    sides_T2: Tensor,
    interpolation: Interpolation,
    *,
    antialias: bool,
) -> Tensor:
    """Cells of a square table resized from its S × S cells to the grid in `sides_T2`.

    Args:
        table_QC: [S·S, C] float, row by row.
        coords_T2: Integer [T, 2] row and column wanted.
        sides_T2: Integer [T, 2] rows and columns of the resized table.
        interpolation: ``bilinear`` or ``bicubic``.
        antialias: Widen the kernel on each axis where the side is shorter than the table's.

    Returns:
        [T, C] in the table's precision.
    """
    length = round(len(table_QC) ** 0.5)
    dtype = exact_dtype(table_QC.dtype)
    row, column = (
        axis_weights(
            coords_T2[:, axis],
            sides_T2[:, axis],
            length,
            interpolation,
            antialias=antialias,
            dtype=dtype,
        )
        for axis in (0, 1)
    )
    weights = (row.weights_TK[:, :, None] * column.weights_TK[:, None, :]).flatten(1)
    nodes: Tensor | None = None
    if row.nodes_TK is not None and column.nodes_TK is not None:
        nodes = (row.nodes_TK[:, :, None] * length + column.nodes_TK[:, None, :]).flatten(1)
    return _weighted_sums(table_QC, AxisWeights(nodes, weights))


def axis_weights(
    index_T: Tensor,
    side_T: Tensor,
    length: int,
    interpolation: Interpolation,
    *,
    antialias: bool,
    dtype: torch.dtype,
) -> AxisWeights:
    """The weights of an axis of `length` places, resized to each token's side.

    Distances are quotients of exact integers: a float32 coordinate would lose digits that a table
    of 32 places, resized to thousands, shows. At a side of `length` one weight is 1 and the others
    are 0, to the last bit.

    Args:
        index_T: Integer [T] wanted place on the resized axis.
        side_T: Integer [T] places of the resized axis.
        length: S, places of the table.
        interpolation: As for `resized_axis`.
        antialias: As for `resized_axis`.
        dtype: Precision of the weights.
    """
    side_T1 = side_T.long()[:, None]
    # Twice the centre of the resized place, in units of 1 / side of a place of the table.
    centre_T1 = (2 * index_T.long()[:, None] + 1) * length
    if antialias:
        nodes = torch.arange(length, device=index_T.device)
        distance = (2 * nodes + 1) * side_T1 - centre_T1
        # Shrunk, the kernel is as much wider as the table is longer.
        reach_T1 = 2 * side_T1.clamp(min=length)
        weights = _kernel(distance.to(dtype) / reach_T1, interpolation, SMOOTH_CUBIC)
        return AxisWeights(None, weights / weights.sum(1, keepdim=True))
    doubled = centre_T1 - side_T1
    below_T1 = torch.div(doubled, 2 * side_T1, rounding_mode="floor")
    above_T1 = (doubled - below_T1 * 2 * side_T1).to(dtype) / (2 * side_T1)
    taps = (0, 1) if interpolation == "bilinear" else (-1, 0, 1, 2)
    near = torch.tensor(taps, device=index_T.device)
    weights = _kernel(above_T1 - near, interpolation, SHARP_CUBIC)
    return AxisWeights((below_T1 + near).clamp(0, length - 1), weights)


def _kernel(distance: Tensor, interpolation: Interpolation, cubic: float) -> Tensor:
    """The weight of a place at a distance, in places; zero from 1 (bilinear) or 2 (bicubic) on."""
    x = distance.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    inner = ((cubic + 2) * x - (cubic + 3)) * x * x + 1
    outer = ((x - 5) * x + 8) * x * cubic - 4 * cubic
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0))


def _weighted_sums(table: Tensor, axis: AxisWeights) -> Tensor:
    """[T, C]: rows of the table, weighted; added up in float32 at least."""
    exact = table.to(axis.weights_TK.dtype)
    if axis.nodes_TK is not None:
        # One kernel and no [T, C] tensor for each neighbour, forward or backward.
        sums = F.embedding_bag(axis.nodes_TK, exact, mode="sum", per_sample_weights=axis.weights_TK)
    else:
        # Autocast would round table and weights to bfloat16, also where a weight is 1.
        with torch.autocast(table.device.type, enabled=False):
            sums = axis.weights_TK @ exact
    return sums.to(table.dtype)
