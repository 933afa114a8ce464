"""Other ranks and workers go on from a checkpoint: within an epoch nothing is lost or repeated."""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loader_cases import ONE_BY_ONE, naming_epochs, take
from shard_factory import HTML, ids_of, make_shards, sample, write_shard

from navit_clip.data.budgets import Budgets
from navit_clip.data.config import DatasetConfig
from navit_clip.data.drop import DropConfig, mean_rate
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.data.state import reshard
from navit_clip.data.state_json import data_from_json, data_to_json
from navit_clip.errors import UserError


class Run:
    """All ranks of a run, one after the other, with one reader each."""

    def __init__(self, data, ranks):
        self.data = data
        self.consumed = Counter()
        self.states = []
        self.open(ranks)

    def open(self, ranks):
        """Begins, or goes on with another number of ranks, from what a checkpoint would hold."""
        saved = [
            data_from_json(json.loads(json.dumps(data_to_json(state)))) for state in self.states
        ]
        self.states = [self.data.begin(saved, rank=rank, world_size=ranks) for rank in range(ranks)]
        self.batches = [
            self.data.batches_of(rank, state=replace(state, readers=dict(state.readers)))
            for rank, state in enumerate(self.states)
        ]

    def step(self, rank):
        batch = next(self.batches[rank])
        self.consumed.update(batch.ids)
        self.states[rank].advance(batch)

    def has_left(self, epoch, rank):
        """Whether a rank is done with an epoch, the samples it holds included."""
        state = self.states[rank].readers.get(rank)
        if state is None:
            return False
        held = (*state.cursors, *state.buffer, *state.pending)
        return all(place.epoch >= epoch for place in held)

    def finish(self, epoch):
        for rank in range(len(self.batches)):
            while not self.has_left(epoch, rank):
                self.step(rank)

    def times(self, name, epoch):
        return self.consumed[f"{epoch}:{name}"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=5).filter(lambda c: sum(c) >= 4),
    stops=st.lists(
        st.tuples(st.integers(1, 4), st.lists(st.integers(0, 5), min_size=4, max_size=4)),
        min_size=2,
        max_size=4,
    ),
    buffer=st.integers(1, 6),
)
def test_any_sequence_of_readers_takes_every_sample_once_per_epoch(
    counts, stops, buffer, pipeline, tmp_path_factory
):
    shards = make_shards(tmp_path_factory.mktemp("shards"), counts)
    budget = Budgets({"image": 48, "text": 96}, 3)
    data = naming_epochs(pipeline(shards, shuffle_buffer=buffer, budget=budget, look_ahead=2))
    run = Run(data, stops[0][0])
    for ranks, steps in stops:
        run.open(ranks)
        for rank in range(ranks):
            for _ in range(steps[rank]):
                run.step(rank)
    run.finish(2)
    for epoch in range(2):
        assert {name: run.times(name, epoch) for name in ids_of(counts)} == dict.fromkeys(
            ids_of(counts), 1
        )


def test_the_same_number_of_readers_goes_on_bit_for_bit(pipeline, tmp_path):
    run = Run(naming_epochs(pipeline(make_shards(tmp_path, [5, 4, 3]))), 2)
    for rank in (0, 1, 1, 0, 1):
        run.step(rank)
    before = deepcopy(run.states)
    run.open(2)
    assert run.states == before


def test_bad_samples_and_cut_shards_cost_only_themselves(pipeline, tmp_path):
    shards = make_shards(tmp_path, [6, 6, 6, 6])
    write_shard(
        shards[1], {**{str(i): sample(i) for i in range(5)}, "5": {"png": HTML, "txt": b"no"}}
    )
    cut = shards[2].read_bytes()
    shards[2].write_bytes(cut[: len(cut) // 2])
    readable = set(ids_of([6, 6, 0, 6])) - {"00001/5"}
    run = Run(naming_epochs(pipeline(shards)), 3)
    for ranks in (3, 1, 4, 2):
        run.open(ranks)
        for rank in range(ranks):
            run.step(rank)
    run.finish(1)
    for name in readable:
        assert run.times(name, 0) == 1
    assert all(count == 1 for count in run.consumed.values())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_worker_processes_of_other_ranks_go_on(pipeline, tmp_path):
    counts = [4, 6, 5, 3, 6, 4, 5]
    shards = make_shards(tmp_path, counts)
    consumed, saved = Counter(), []
    for ranks, workers, batches in ((2, 1, 3), (1, 3, 4), (3, 2, 30)):
        data = naming_epochs(pipeline(shards, workers=workers))
        states = [data.begin(saved, rank=rank, world_size=ranks) for rank in range(ranks)]
        for rank, state in enumerate(states):
            options = {"rank": rank, "world_size": ranks, "state": state}
            for batch in take(data, batches, **options):
                consumed.update(batch.ids)
                state.advance(batch)
        saved = states
    assert all(count == 1 for count in consumed.values())
    assert {f"0:{name}" for name in ids_of(counts)} <= consumed.keys()


def test_each_dataset_of_a_mixture_is_resharded(pipeline, tmp_path):
    one, two = make_shards(tmp_path / "one", [5, 5]), make_shards(tmp_path / "two", [4])
    mix = {
        "one": DatasetConfig([str(path) for path in one], 3.0),
        "two": DatasetConfig([str(path) for path in two], 1.0),
    }
    run = Run(naming_epochs(pipeline([]).with_mix(mix)), 3)
    for ranks in (3, 2, 1):
        run.open(ranks)
        for rank in range(ranks):
            run.step(rank)
    run.finish(1)
    names = {f"one/{name}" for name in ids_of([5])} | {f"00001/{i}" for i in range(5)}
    names |= {f"two/{name}" for name in ids_of([4])}
    assert {name for name in names if run.times(name, 0) != 1} == set()


def test_what_is_left_is_shared_by_all_and_read_once(pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path, [3] * 8), **ONE_BY_ONE)
    state = data.begin()
    for batch in take(data, 4):
        state.advance(batch)
    images, leftovers = reshard([state], data.mixture, data.seed, 3)
    slices = [own for (leftover,) in leftovers for own in leftover.slices]
    assert len({own.shard for own in slices}) == len(slices)
    assert {len(leftover.slices) for (leftover,) in leftovers} <= {2, 3}
    assert images == 4


def test_scheduled_drop_goes_on_from_the_images_seen(pipeline, tmp_path):
    drop = DropConfig(kind="fixed", schedule="sigmoid", schedule_images=40, schedule_midpoint=0.5)
    data = pipeline(
        make_shards(tmp_path, [8] * 4),
        **ONE_BY_ONE,
        drop=drop,
        resolution=ResolutionConfig(mode="native", max_tokens=24),
    )
    run = Run(data, 1)
    for _ in range(20):
        run.step(0)
    run.open(2)
    image = next(run.batches[1]).counts.streams["image"]
    assert image.tokens == max(1, round(image.tokens_before_drop * (1 - mean_rate(drop, 20))))


def test_other_shards_are_refused(pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path, [4, 4]))
    state = data.begin()
    fewer = pipeline(make_shards(tmp_path, [4]))
    with pytest.raises(UserError, match="other training shards"):
        fewer.begin([state])


def test_shards_that_moved_are_the_same(pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path / "here", [4, 4]))
    state = data.begin()
    moved = pipeline(make_shards(tmp_path / "there", [4, 4]))
    assert moved.begin([state]) == state
