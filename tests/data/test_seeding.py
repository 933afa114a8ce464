"""Draws by weight, against numpy's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from navit_clip.data.seeding import draw_weighted

WEIGHTS = st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=7).filter(any)


@given(WEIGHTS, st.integers(0, 2**32))
def test_draws_what_numpy_draws(weights, seed):
    own, other = np.random.default_rng(seed), np.random.default_rng(seed)
    p = np.array(weights) / sum(weights)
    for _ in range(20):
        assert draw_weighted(weights, own) == other.choice(len(p), p=p)
    assert own.random() == other.random()


@pytest.mark.parametrize("u", [0.0, np.nextafter(1.0, 0.0)])
def test_nothing_of_no_weight_is_drawn(u):
    class Fixed:
        def random(self) -> float:
            return u

    assert draw_weighted([0, 2, 0.1, 0], Fixed()) == (1 if u == 0 else 2)
