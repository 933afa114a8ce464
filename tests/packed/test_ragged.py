"""Ragged targets: any number of values per example, values and gradients, and how they travel."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from navit_clip.data.shared_batch import SharedBatch
from navit_clip.packed.ragged import Ragged


def boxes(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((length, 4)) for length in lengths]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_values_and_gradients_are_those_of_each_example_alone(lengths):
    arrays = boxes(lengths)
    ragged = Ragged.from_arrays(arrays)
    assert len(ragged) == len(lengths)
    assert ragged.lengths == tuple(lengths)
    for own, array in zip(ragged.examples(), arrays, strict=True):
        np.testing.assert_array_equal(own.numpy(), array)
    assert ragged.ids.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    # The sum of squares of an example, weighed by its number: at once, and one by one.
    weights = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)
    at_once, one_by_one = (ragged.values.clone().requires_grad_() for _ in range(2))
    squares = at_once.square().sum(1)
    sums = torch.zeros(len(lengths), dtype=torch.float64).index_add(0, ragged.ids, squares)
    (sums * weights).sum().backward()
    examples = Ragged(one_by_one, ragged.ids, ragged.lengths).examples()
    sum((own.square().sum() * w for own, w in zip(examples, weights, strict=True))).backward()
    torch.testing.assert_close(at_once.grad, one_by_one.grad)
    start = 0
    for array, weight in zip(arrays, weights.tolist(), strict=True):
        end = start + len(array)
        np.testing.assert_allclose(at_once.grad[start:end].numpy(), 2 * weight * array)
        start = end


@pytest.mark.parametrize("lengths", [[0, 0], [2, 0, 1]])
def test_it_moves_whole_and_comes_out_of_shared_memory(lengths):
    ragged = Ragged.from_arrays(boxes(lengths))
    moved = ragged.to("meta")
    assert (moved.values.device.type, moved.ids.device.type) == ("meta", "meta")
    assert moved.lengths == ragged.lengths
    received = ForkingPickler.loads(ForkingPickler.dumps(SharedBatch(ragged)))
    assert torch.equal(received.values, ragged.values)
    assert torch.equal(received.ids, ragged.ids)
    assert received.lengths == ragged.lengths


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="at least one example"):
        Ragged.from_arrays([])
    with pytest.raises(ValueError, match="dimension"):
        Ragged.from_arrays([np.zeros((1, 4)), np.zeros((1, 5))])
