"""Attention within windows against each pair of tokens looked at alone."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from packed_examples import random_image

from navit_clip.models.window_attention import attend_windows
from navit_clip.packed.images import pack_images
from navit_clip.packed.window_groups import best_groups, fill_groups
from navit_clip.packed.windows import Units, arrange

HEADS, WIDTH = 2, 3
GROUPINGS = {
    "each a row": None,
    "groups of least cost": partial(best_groups, width=HEADS * WIDTH),
    "groups with padding": lambda lengths_W: fill_groups(lengths_W, int(lengths_W.max()) + 3),
}


def slowly(q_THD, k_THD, v_THD, bias_QH, units, merges, window, shifted):
    """All pairs of a stream's tokens, those in different windows masked."""
    windows = arrange(units, merges, window, shifted=shifted)
    ids, cells, place = torch.empty(len(q_THD)), torch.empty(len(q_THD), dtype=torch.int64), 0
    order = windows.gather(torch.arange(len(q_THD))[:, None])[:, 0]
    number = 0
    for rows in windows.rows:
        for _ in range(rows.rows):
            ids[order[place : place + rows.length]] = number
            number, place = number + 1, place + rows.length
    cells[order] = windows.cells
    index = cells[:, None] - cells
    centre = 2 * window * (window - 1)
    same = ids[:, None] == ids
    bias = bias_QH[torch.where(same, index + centre, 0)].movedim(-1, 0)
    scores = torch.einsum("thd,shd->hts", q_THD, k_THD) * WIDTH**-0.5 + bias
    weights = scores.masked_fill(~same, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v_THD)


@pytest.mark.parametrize("window", [1, 2, 4, 7])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("group", GROUPINGS.values(), ids=GROUPINGS)
def test_values_and_gradients(window, shifted, group, monkeypatch):
    monkeypatch.setattr("navit_clip.models.window_attention._SCORES", 300)  # many parts
    for seed in range(3):
        rng = np.random.default_rng(seed)
        grids = [(1, 1), *((int(r), int(c)) for r, c in rng.integers(1, 5, (3, 2)))]
        images = [
            random_image(i, (r, c), keep=rng.integers(1, r * c + 1))
            for i, (r, c) in enumerate(grids)
        ]
        units = Units.of(pack_images(images))
        windows = arrange(units, 2, window, shifted=shifted, group=group)
        tokens = 16 * len(units.coords_U2)
        generator = torch.Generator().manual_seed(seed)
        q, k, v, grad = (
            torch.randn(tokens, HEADS, WIDTH, generator=generator).double() for _ in range(4)
        )
        bias = torch.randn((2 * window - 1) ** 2, HEADS, generator=generator).double()
        inputs = [x.requires_grad_() for x in (q, k, v, bias)]
        there = [windows.gather(x.flatten(1)).unflatten(1, (HEADS, -1)) for x in (q, k, v)]
        out = attend_windows(*there, bias, windows.cells, windows.ids, windows.layout)
        actual = windows.scatter(out.flatten(1), tokens).unflatten(1, (HEADS, -1))
        expected = slowly(q, k, v, bias, units, 2, window, shifted)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        grads = [torch.autograd.grad((x * grad).sum(), inputs) for x in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_queries_and_keys_in_float32_beside_values_in_bfloat16():
    windows = arrange(Units.of(pack_images([random_image(0, (3, 4))])), 1, 3, shifted=True)
    q, k, v = torch.randn(3, 48, HEADS, WIDTH, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(25, HEADS)
    arguments = bias, windows.cells, windows.ids, windows.layout
    exact = attend_windows(q, k, v, *arguments)
    v = v.bfloat16().requires_grad_()
    rounded = attend_windows(q, k, v, *arguments)
    rounded.sum().backward()
    assert rounded.dtype == v.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.02)
