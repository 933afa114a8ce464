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

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]

# The coefficients of Keys' cubic kernel in `F.interpolate`, with and without antialiasing.
SMOOTH_CUBIC = -0.5
SHARP_CUBIC = -0.75


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of coordinates and weights for tables of `dtype`, float32 at least.

    bfloat16 rounds index 299 up to a side of 300, and the upper neighbour is past the table.
    """
    return torch.promote_types(dtype, torch.float32)


def resized(
    table_QC: Tensor,
    coords_TA: Tensor,
    sides_TA: Tensor,
    interpolation: Interpolation,
    *,
    antialias: bool,
) -> Tensor:
    """Cells of a table of one axis, or of a square one, resized to the grid in `sides_TA`.

    Args:
        table_QC: [S, C] or [S·S, C] float, a square row by row.
        coords_TA: Integer [T, 1] or [T, 2] cell wanted: its place on each axis, from 0 to the
            side - 1.
        sides_TA: Integer, likewise: sides of the resized table.
        interpolation: ``bilinear`` (linear on one axis) or ``bicubic``.
        antialias: Widen the kernel on each axis where the side is shorter than the table's.

    Returns:
        [T, C] in the table's precision; added up in float32 at least.
    """
    length = round(len(table_QC) ** (1 / coords_TA.shape[1]))
    exact = table_QC.to(exact_dtype(table_QC.dtype))
    (nodes, weights), *columns = (
        axis_weights(*axis, length, interpolation, antialias=antialias, dtype=exact.dtype)
        for axis in zip(coords_TA.unbind(1), sides_TA.unbind(1), strict=True)
    )
    for column_nodes, column_weights in columns:
        weights = (weights[:, :, None] * column_weights[:, None, :]).flatten(1)
        if nodes is not None:
            assert column_nodes is not None
            nodes = (nodes[:, :, None] * length + column_nodes[:, None, :]).flatten(1)
    if nodes is not None:
        # One kernel and no [T, C] tensor for each neighbour, forward or backward.
        sums = F.embedding_bag(nodes, exact, mode="sum", per_sample_weights=weights)
    else:
        # Autocast would round table and weights to bfloat16, also where a weight is 1.
        with torch.autocast(exact.device.type, enabled=False):
            sums = weights @ exact
    return sums.to(table_QC.dtype)


def axis_weights(
    index_T: Tensor,
    side_T: Tensor,
    length: int,
    interpolation: Interpolation,
    *,
    antialias: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """The weights of an axis of `length` places, resized to each token's side.

    Distances are quotients of exact integers: a float32 coordinate would lose digits that a table
    of 32 places, resized to thousands, shows. At a side of `length` one weight is 1 and the others
    are 0, to the last bit.

    Args:
        index_T: Integer [T] wanted place on the resized axis.
        side_T: Integer [T] places of the resized axis.
        length: S, places of the table.
        interpolation: As for `resized`.
        antialias: As for `resized`.
        dtype: Precision of the weights.

    Returns:
        int64 [T, K] places that each token reads, None where they are all S of them, in order; and
        [T, K] their weights, which add up to 1.
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
        return None, weights / weights.sum(1, keepdim=True)
    doubled = centre_T1 - side_T1
    below_T1 = torch.div(doubled, 2 * side_T1, rounding_mode="floor")
    above_T1 = (doubled - below_T1 * 2 * side_T1).to(dtype) / (2 * side_T1)
    taps = (0, 2) if interpolation == "bilinear" else (-1, 3)
    near = torch.arange(*taps, device=index_T.device)  # made there: a copy would wait
    weights = _kernel(above_T1 - near, interpolation, SHARP_CUBIC)
    return (below_T1 + near).clamp(0, length - 1), weights


def _kernel(distance: Tensor, interpolation: Interpolation, cubic: float) -> Tensor:
    """The weight of a place at a distance, in places; zero from 1 (bilinear) or 2 (bicubic) on."""
    x = distance.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    inner = ((cubic + 2) * x - (cubic + 3)) * x * x + 1
    outer = ((x - 5) * x + 8) * x * cubic - 4 * cubic
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0))
