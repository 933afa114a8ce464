"""Pixels to patches: the last thing that happens to an image before it is packed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from navit_clip.packed.images import ImagePatches


def cut_patches(
    pixels_HWK: np.ndarray,
    patch_size: int,
    keep: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> ImagePatches:
    """Cuts an image into patches with their coordinates.

    Args:
        pixels_HWK: uint8 [rows·P, columns·P, 3].
        patch_size: P.
        keep: int64 [n] indices of the patches wanted, row by row; None wants all.
        targets: [rows·columns, ...] one entry per patch of the whole grid, row by row, for tasks
            whose targets sit at patches; dropped with them.
    """
    rows, columns = pixels_HWK.shape[0] // patch_size, pixels_HWK.shape[1] // patch_size
    coords = _grid_coords(rows, columns)
    if keep is not None:
        coords = coords[keep]
        targets = None if targets is None else targets[keep]
    return ImagePatches(patchify(pixels_HWK, patch_size, keep), coords, (rows, columns), targets)


def patchify(pixels_HWK: np.ndarray, patch_size: int, keep: np.ndarray | None = None) -> np.ndarray:
    """The pixels of the patches that `cut_patches` cuts; those not wanted are not copied.

    Returns:
        uint8 [rows·columns or n, P·P·3], each patch row by row with channels last.
    """
    height, width, channels = pixels_HWK.shape
    rows, columns = height // patch_size, width // patch_size
    # One row of a patch as one item, which numpy copies at once, not byte by byte.
    line = np.dtype((np.void, patch_size * channels))
    lines = np.ascontiguousarray(pixels_HWK).reshape(rows, patch_size, columns, -1).view(line)
    patches = lines[..., 0].swapaxes(1, 2)
    if keep is None or len(keep) == rows * columns:
        return np.ascontiguousarray(patches.reshape(rows * columns, patch_size)).view(np.uint8)
    return patches[np.divmod(keep, columns)].view(np.uint8)


def join_patches(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The inverse of `patchify` for all patches of a grid: uint8 [rows·P, columns·P, 3]."""
    rows, columns = grid
    side = round((patches.shape[1] // 3) ** 0.5)
    pixels = patches.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return pixels.reshape(rows * side, columns * side, 3)


@lru_cache(maxsize=4096)
def _grid_coords(rows: int, columns: int) -> np.ndarray:
    """int32 [rows·columns, 2]: row and column of each patch of a grid, read-only."""
    coords = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1).astype(np.int32)
    coords.setflags(write=False)  # shared by all images of this grid
    return coords
