"""Windows against their definition, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packed_examples import random_image

from navit_clip.packed.images import pack_images
from navit_clip.packed.windows import Units, arrange, cells_of


def some_images(seed):
    rng = np.random.default_rng(seed)
    grids = [(int(r), int(c)) for r, c in rng.integers(1, 6, (4, 2))]
    return [
        random_image(i, (r, c), keep=rng.integers(1, r * c + 1)) for i, (r, c) in enumerate(grids)
    ]


def first_row(coord, side, window, shift):
    """Of the window of a row, or a column: windows begin at multiples of w, or `shift` later."""
    if side <= window:
        return 0
    return max(0, (coord - shift) // window * window + shift)


@pytest.mark.parametrize("merges", [0, 1, 2])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 14])
@pytest.mark.parametrize("shifted", [False, True])
def test_every_token_is_in_its_window(merges, window, shifted):
    side = 2**merges
    for seed in range(3):
        padding = 2 * seed
        images = some_images(seed)
        packed = pack_images(images, budget=sum(len(i.patches) for i in images) + padding)
        windows = arrange(Units.of(packed), merges, window, shifted=shifted)
        # Where each token of the stream should be: image, corner of its window, place within it.
        expected = []
        for unit, image in zip(packed.coords, packed.segments.ids, strict=True):
            if image < packed.segments.num_examples:
                rows, columns = (side * packed.grids[image]).tolist()
                for row, column in (side * unit.numpy() + cells_of(merges)).tolist():
                    shift = window // 2 if shifted else 0
                    top = first_row(row, rows, window, shift)
                    left = first_row(column, columns, window, shift)
                    expected.append((int(image), top, left, row, column))
        stream = torch.arange(side**2 * packed.segments.num_tokens)[:, None]
        there = windows.gather(stream)[:, 0]
        assert sorted(there.tolist()) == list(range(len(expected)))
        back = windows.scatter(there[:, None], len(stream))[:, 0]
        assert torch.equal(back[: len(expected)], stream[: len(expected), 0])
        assert len(back) == len(stream)
        start, seen = 0, set()
        for rows in windows.rows:
            cells_RL = windows.cells[start : start + rows.rows * rows.length].view(rows.rows, -1)
            assert rows.alike == bool((cells_RL == cells_RL[0]).all())
            for cells in cells_RL:
                tokens = [expected[i] for i in there[start : start + rows.length]]
                assert len({token[:3] for token in tokens}) == 1
                seen.add(tokens[0][:3])
                ours, theirs = cells.numpy(), np.array(tokens)[:, 3:]
                offsets = theirs[:, None] - theirs
                assert np.array_equal(ours[:, None] - ours, offsets @ (2 * window - 1, 1))
                start += rows.length
        assert len(seen) == sum(rows.rows for rows in windows.rows)
        assert start == len(expected)


def test_four_cells_in_a_row_are_a_square():
    assert cells_of(0).tolist() == [[0, 0]]
    assert cells_of(1).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    for merges in (1, 2, 3):
        cells = cells_of(merges)
        assert sorted(map(tuple, cells)) == [
            (r, c) for r in range(2**merges) for c in range(2**merges)
        ]
        assert np.array_equal(cells[::4] // 2, cells_of(merges - 1))
        assert (cells.reshape(-1, 4, 2) // 2 == (cells[::4] // 2)[:, None]).all()


def test_windows_that_lie_end_to_end_are_not_moved():
    images = [random_image(0, (2, 3)), random_image(1, (3, 5), keep=6)]
    units = Units.of(pack_images(images))
    assert arrange(units, 2, 4, shifted=False).order is None
    assert arrange(units, 2, 4, shifted=True).order is not None
    assert [rows.alike for rows in arrange(units, 2, 4, shifted=False).rows] == [True]


def test_whole_windows_of_any_place_are_alike():
    units = Units.of(pack_images([random_image(0, (7, 7)), random_image(1, (7, 14))]))
    windows = arrange(units, 1, 7, shifted=False)
    assert windows.rows == ((12, 49, True),)
    shifted = arrange(units, 1, 7, shifted=True)
    assert sum(rows.rows for rows in shifted.rows) == 9 + 15
    assert shifted.rows[-1] == (1 + 3, 49, True)
