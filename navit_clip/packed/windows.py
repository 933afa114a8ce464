"""Windows of a hierarchical tower: which of an image's tokens attend to each other.

A token of the stream is a unit of an image, a square of pixels that all stages but the last divide
further: a stage's tokens are the cells of the units present, each unit's one after another, so that
units may be missing (dropped, masked) and images may have any grid. `cells_of` lists a unit's cells
such that four in a row are the square that the next stage merges.

`arrange` sorts a stage's tokens into windows, every window a segment of its own. A shifted window
is only another way to sort: nothing is rolled, no mask is built, and windows at an image's edge,
or with tokens missing, are smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from navit_clip.packed.images import PackedImages
from navit_clip.packed.movable import Movable
from navit_clip.packed.window_groups import WindowGroups, best_groups

# Rows and columns of four cells that are merged, in Swin's order.
_SQUARE = np.array([(0, 0), (1, 0), (0, 1), (1, 1)])


class EqualRows(NamedTuple):
    """Equally long pieces of a stream, one after another, each of which attends to itself.

    Attributes:
        rows: How many there are.
        length: Places of each.
        alike: Their tokens lie at the same places of their windows, one row like the other.
    """

    rows: int
    length: int
    alike: bool


# Not frozen: see Segments.
@dataclass(eq=False)
class Windows(Movable):
    """A stage's tokens in their windows, S places for the stage's T tokens; never changed.

    Attributes:
        order: int64 [S], the token at each place; None if the stream's first S tokens lie so
            already.
        places: int64 [T], where each token lies, the first place for padding; None likewise.
        cells: int64 [S], row · (2w − 1) + column of each token within its window: the difference
            of two says how they lie to each other.
        ids: int64 [S], the window at each place, −1 where there is none, if rows hold more than
            one; None if each row is a window.
        rows: What attends to what.
    """

    order: Tensor | None
    places: Tensor | None
    cells: Tensor
    ids: Tensor | None
    rows: tuple[EqualRows, ...]

    def gather(self, x_TC: Tensor) -> Tensor:
        """[T, C] in the stream's order to [S, C], window by window."""
        return x_TC[: len(self.cells)] if self.order is None else x_TC.index_select(0, self.order)

    def scatter(self, x_SC: Tensor, tokens: int) -> Tensor:
        """[S, C] back to [T, C] in the stream's order; finite at padding, of no meaning."""
        if self.places is None:
            return F.pad(x_SC, (0, 0, 0, tokens - len(x_SC)))
        return x_SC.index_select(0, self.places)

    def coords(self, window: int) -> Tensor:
        """int64 [S, 2]: row and column of each token within its window, of side `window`."""
        side = 2 * window - 1
        return torch.stack([self.cells // side, self.cells % side], 1)

    @cached_property
    def layout(self) -> Tensor:
        """int64 [3R], always on the host: `rows` for operators that take tensors alone."""
        # Flat, since a compiler compiles a dimension of 1 apart.
        return torch.tensor(self.rows, dtype=torch.int64).flatten()


@dataclass(eq=False)
class StageWindows(Movable):
    """What `PackedImages.plan` is for a hierarchical tower.

    Attributes:
        windows: Of each stage the plain ones, then the shifted ones.
    """

    windows: tuple[Windows, ...]


class Units(NamedTuple):
    """Where the units of packed images lie, on the host.

    Attributes:
        coords_U2: int64 [U, 2] row and column of each on its image's grid.
        sides_U2: int64 [U, 2] rows and columns of that grid.
        images_U: int64 [U] its image.
        padding: Units at the stream's end that belong to no image.
    """

    coords_U2: np.ndarray
    sides_U2: np.ndarray
    images_U: np.ndarray
    padding: int

    @classmethod
    def of(cls, images: PackedImages) -> Units:
        """Those of packed images, whose patches are units; waits for their device."""
        segments = images.segments
        count = segments.num_real_tokens
        lengths = segments.lengths[: segments.num_examples]
        images_U = np.arange(len(lengths)).repeat(lengths)
        sides_U2 = images.grids.cpu().numpy().astype(np.int64)[images_U]
        coords_U2 = images.coords[:count].cpu().numpy().astype(np.int64)
        return cls(coords_U2, sides_U2, images_U, segments.padding)


def plan_windows(
    images: PackedImages, *, window: int, widths: tuple[int, ...], grouped: bool
) -> StageWindows:
    """Sorts the tokens of each stage of a tower into windows; waits for the images' device.

    Args:
        images: Whose patches are units.
        window: w, side of a window.
        widths: Of a token in each stage; the last has one for a unit.
        grouped: Put windows together in groups of one length, the one that costs least (GreenMIM),
            in place of computing each by itself; changes time, not results.
    """
    units, windows = Units.of(images), list[Windows]()
    for merges, width in zip(reversed(range(len(widths))), widths, strict=True):
        group = partial(best_groups, width=width) if grouped else None
        for shifted in (False, True):
            windows.append(arrange(units, merges, window, shifted=shifted, group=group))
    return StageWindows(tuple(windows))


def cells_of(merges: int) -> np.ndarray:
    """int64 [4^merges, 2]: row and column of each cell of a unit, squares of four in a row."""
    cells = np.zeros((1, 2), dtype=np.int64)
    for _ in range(merges):
        cells = (2 * cells[:, None] + _SQUARE).reshape(-1, 2)
    return cells


def arrange(
    units: Units,
    merges: int,
    window: int,
    *,
    shifted: bool,
    group: Callable[[np.ndarray], WindowGroups] | None = None,
) -> Windows:
    """Sorts the tokens of a stage into windows.

    A window starts at every w-th row and column of an image. Shifted, all start w // 2 later, and
    what lies before them is a smaller one; but an axis no longer than a window is never divided.

    Args:
        units: Any units of any images.
        merges: How often the stage's cells are still merged until a unit is one token.
        window: w, side of a window in cells of the stage.
        shifted: Whether windows are shifted.
        group: Puts windows, by their lengths, together in rows of one length; None makes each a
            row of its own.
    """
    window_T, lengths_W, cells_T = _sort(units, merges, window, shifted)
    if group is None and (np.diff(window_T) >= 0).all():
        return Windows(None, None, torch.from_numpy(cells_T), None, _rows(lengths_W, cells_T))
    order_S = np.lexsort((cells_T, window_T))  # cell by cell: whole windows are then alike
    places_T, cells_S, ids = np.argsort(order_S), cells_T[order_S], None
    rows = _rows(lengths_W, cells_S)
    if group is not None:
        groups = group(lengths_W)
        moved_S = groups.places(lengths_W)
        spread = partial(_spread, places_S=moved_S, length=groups.count * groups.size)
        ids = torch.from_numpy(spread(window_T[order_S], empty=-1))
        order_S, cells_S = spread(order_S, empty=0), spread(cells_S, empty=0)
        places_T = moved_S[places_T]
        rows = (EqualRows(groups.count, groups.size, alike=False),)
    padding = units.padding * 4**merges
    return Windows(
        torch.from_numpy(order_S),
        torch.from_numpy(np.pad(places_T, (0, padding))),
        torch.from_numpy(cells_S),
        ids,
        rows,
    )


def _sort(
    units: Units, merges: int, window: int, shifted: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The window of each token, the tokens of each window, and `Windows.cells` in stream order.

    Windows are numbered in the order of their lengths, so that those of one length are one batch.
    """
    cells_K2 = cells_of(merges)
    side, count = 1 << merges, len(cells_K2)
    coords_T2 = (side * units.coords_U2[:, None] + cells_K2).reshape(-1, 2)
    shift_U2 = np.where(side * units.sides_U2 > window, window // 2, 0) * shifted
    corners_T2, within_T2 = np.divmod(coords_T2 + (-shift_U2 % window).repeat(count, 0), window)
    rows, columns = corners_T2.max(0) + 1
    images_T = units.images_U.repeat(count)
    keys_T = (images_T * rows + corners_T2[:, 0]) * columns + corners_T2[:, 1]
    _, window_T, lengths_W = np.unique(keys_T, return_inverse=True, return_counts=True)
    by_length_W = np.argsort(lengths_W, kind="stable")
    window_T = np.argsort(by_length_W)[window_T]
    return window_T, lengths_W[by_length_W], within_T2 @ (2 * window - 1, 1)


def _spread(values_S: np.ndarray, *, places_S: np.ndarray, length: int, empty: int) -> np.ndarray:
    """The values at their places of a longer array, `empty` elsewhere."""
    spread = np.full(length, empty)
    spread[places_S] = values_S
    return spread


def _rows(lengths_W: np.ndarray, cells_S: np.ndarray) -> tuple[EqualRows, ...]:
    """Each window a row; windows lie in the order of their lengths."""
    rows, end = [], 0
    for length, count in zip(*np.unique(lengths_W, return_counts=True), strict=True):
        start, end = end, end + length * count
        cells_RL = cells_S[start:end].reshape(count, length)
        rows.append(EqualRows(int(count), int(length), bool((cells_RL == cells_RL[0]).all())))
    return tuple(rows)
