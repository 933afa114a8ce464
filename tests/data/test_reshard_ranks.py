"""Ranks of another number go on: one of them reshards, and no other reads all the old states."""

import random
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from navit_clip.data.builders.base import Origin
from navit_clip.data.mixture import Dataset, Mixture
from navit_clip.data.order import Cursor, ShardOrder
from navit_clip.data.state import DataState, ReaderState, open_state, open_states
from navit_clip.distributed import Ranks
from navit_clip.errors import OutageError, UserError

NAMES = tuple(f"{i:05d}" for i in range(40))
MIXTURE = Mixture(
    NAMES, NAMES, (Dataset("one", 3.0, None, range(30)), Dataset("two", 1.0, None, range(30, 40)))
)
WORKERS = 2


class Saved(Sequence):
    """States as of the files of a checkpoint, and which of them were asked for."""

    def __init__(self, states, broken=()):
        self.states, self.broken, self.asked = states, broken, set()

    def __len__(self):
        return len(self.states)

    def __getitem__(self, rank):
        self.asked.add(range(len(self))[rank])
        if rank in self.broken:
            raise OutageError(f"cannot read rank-{rank}.json")
        return self.states[rank]


def states_of(ranks):
    """Of ranks in the middle of their epochs, each with other samples read ahead."""
    rng, found = random.Random(ranks), []
    for rank in range(ranks):
        state = DataState(MIXTURE.digest, 0, ["one", "two"], ranks * WORKERS, images=7, samples=70)
        for reader in range(rank * WORKERS, (rank + 1) * WORKERS):
            cursors, ahead = [], []
            for dataset in MIXTURE.datasets:
                slices = ShardOrder(dataset, 0, reader, ranks * WORKERS).slices(0)
                place = rng.randrange(len(slices))
                cursors.append(Cursor(0, place, 10))
                ahead += [Origin(0, slices[place].shard, i, reader) for i in (3, 5)]
            state.readers[reader] = ReaderState(cursors, [20, 20], 30, ahead[:3], ahead[3:])
        found.append(state)
    return found


def go_on(old, broken):
    """Where this rank goes on, or the error; and the states that it asked for."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    saved = Saved(states_of(old), broken.get(ranks.rank, ()))
    try:
        found = open_states(saved, MIXTURE, 0, workers=WORKERS, ranks=ranks)
    except UserError as error:
        found = str(error)
    return found, saved.asked


def go_on_in_turn(cases):
    return [go_on(*case) for case in cases]


@pytest.fixture(scope="module")
def results():
    cases = [(5, {}), (3, {}), (5, {0: (4,)}), (3, {1: (1,)})]
    return list(zip(*run_ranks(go_on_in_turn, 3, cases), strict=True))


def test_each_rank_goes_on_as_if_it_had_read_every_state(results):
    for old, result in zip((5, 3), results, strict=False):
        for rank, (state, _) in enumerate(result):
            expected = open_state(
                states_of(old), MIXTURE, 0, workers=WORKERS, rank=rank, world_size=3
            )
            assert state == expected
            assert state.samples == 70


def test_ranks_but_the_first_read_one_state_beside_their_own(results):
    other, same = ([asked for _, asked in result] for result in results[:2])
    assert other == [set(range(5)), {0}, {0}]
    assert same == [{0}, {0, 1}, {0, 2}]


def test_a_state_that_one_rank_cannot_read_ends_all(results):
    other, same = ([problem for problem, _ in result] for result in results[2:])
    assert other == ["cannot read rank-4.json"] * 3
    assert same == ["cannot read rank-1.json"] * 3
