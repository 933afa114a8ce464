"""A resume changes nothing: the same batches, bit for bit, from wherever a run was stopped."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
from loader_cases import ONE_BY_ONE, content, epoch_of, take
from shard_factory import HTML, encode, make_shards, photo, sample, write_shard

from navit_clip.data.augment import AugmentConfig
from navit_clip.data.budgets import Budgets
from navit_clip.data.builders.pairs import Pair, PairBuilder
from navit_clip.data.config import DatasetConfig
from navit_clip.data.drop import DropConfig
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.data.state_json import data_from_json, data_to_json
from navit_clip.errors import OutageError, UserError


def messy_shards(root):
    """Good samples, bad ones in between, and a shard cut off in the middle."""
    shards = make_shards(root, [7, 5, 6])
    write_shard(
        shards[1],
        {
            "0": sample(1),
            "1": {"png": HTML, "txt": b"not an image"},
            "2": sample(2),
            "3": {"png": sample(3)["png"], "txt": b"\xff"},
            "4": sample(4),
        },
    )
    cut = shards[2].read_bytes()
    shards[2].write_bytes(cut[: len(cut) // 2])
    return shards


def advance(state, batches):
    """The state after batches, as a checkpoint gives it back."""
    for batch in batches:
        state.advance(batch)
    return data_from_json(json.loads(json.dumps(data_to_json(state))))


SCHEDULED = DropConfig(
    kind="beta", schedule="sigmoid", schedule_images=60, schedule_midpoint=0.5, schedule_low=0.1
)


@pytest.mark.parametrize("packing", ["fill", "exact", "constant"])
def test_a_resume_after_any_batch_goes_on_as_if_nothing_had_happened(packing, pipeline, tmp_path):
    data = pipeline(
        messy_shards(tmp_path),
        drop=SCHEDULED,
        augment=AugmentConfig(0.3, flip=0.5, brightness=0.2, hue=0.1),
        packing=packing,
        budget=Budgets({"image": 48, "text": 40}, 3),
    )
    whole = [content(batch) for batch in take(data, 26)]
    assert epoch_of(whole[-1]["state"][0]) > 2
    state = data.begin()
    for done in range(22):
        batches = take(data, 4, state=state)
        assert [content(batch) for batch in batches] == whole[done : done + 4]
        state = advance(state, batches[:1])  # and again from there


@pytest.mark.parametrize("fields", [{}, {"shuffle_buffer": 3}, {"look_ahead": 5}])
def test_a_resume_at_the_very_end_of_an_epoch(fields, pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path, [3, 2]), **{**ONE_BY_ONE, **fields})
    whole = [content(batch) for batch in take(data, 15)]
    state = data.begin()
    for expected in whole:
        (batch,) = take(data, 1, state=state)
        assert content(batch) == expected
        state = advance(state, [batch])


def test_a_resume_among_images_that_never_share_a_batch(pipeline, tmp_path):
    # 20 and 24 patches by turns, in a budget of 24.
    sizes = [(32, 40), (32, 48)] * 4
    shard = write_shard(
        tmp_path / "0.tar",
        {str(i): {**sample(i), "png": encode(photo(i, *size))} for i, size in enumerate(sizes)},
    )
    data = pipeline(
        [shard],
        resolution=ResolutionConfig(mode="native", max_tokens=24),
        drop=DropConfig(kind="none"),
        budget=Budgets({"image": 24, "text": 96}, 4),
        look_ahead=1,
        shuffle_buffer=1,
    )
    whole = take(data, 12)
    assert {batch.counts.examples for batch in whole} == {1}
    for done in range(9):
        rest = take(data, 3, state=advance(data.begin(), whole[:done]))
        assert [content(b) for b in rest] == [content(b) for b in whole[done : done + 3]]


@dataclass(frozen=True)
class TallOrWide(Pair):
    """A pair that shares batches with images of its own orientation only."""

    @property
    def bucket(self):
        rows, columns = self.image.grid
        return rows > columns


class BucketBuilder(PairBuilder):
    def __call__(self, raw, origin, fields=None):
        pair = super().__call__(raw, origin, fields)
        return TallOrWide(**vars(pair))


@pytest.mark.parametrize("packing", ["fill", "exact"])
def test_a_resume_with_two_buckets(packing, pipeline, tmp_path):
    data = pipeline(
        make_shards(tmp_path, [11, 9, 8]),
        packing=packing,
        budget=Budgets({"image": 48, "text": 60}, 3),
        look_ahead=2,
    )
    data = replace(data, build=BucketBuilder(**vars(data.build)))
    whole = [content(batch) for batch in take(data, 24)]
    buckets = []
    for batch in take(data, 24):
        grids = batch.inputs.images.grids[: batch.counts.examples].tolist()
        buckets.append({rows > columns for rows, columns in grids})
        assert len(buckets[-1]) == 1
    assert buckets.count({True}) > 3
    assert buckets.count({False}) > 3
    state = data.begin()
    for done in range(21):
        batches = take(data, 3, state=state)
        assert [content(batch) for batch in batches] == whole[done : done + 3]
        state = advance(state, batches[:1])


def test_a_resume_with_patches_of_several_sizes(pipeline, tmp_path):
    sizes = {4: 1.0, 8: 2.0, 16: 1.0}
    data = pipeline(
        make_shards(tmp_path, [11, 9, 8]),
        resolution=ResolutionConfig(min_side=16, max_side=48, max_tokens=48, patch_sizes=sizes),
        look_ahead=2,
    )
    batches = take(data, 16)
    found = [batch.inputs.images.patch_size for batch in batches]
    assert set(found) == set(sizes)
    whole = [content(batch) for batch in batches]
    for done in (0, 3, 4, 9):
        state = advance(data.begin(), batches[:done])
        rest = take(data, 5, state=state)
        assert [content(batch) for batch in rest] == whole[done : done + 5]


# Torch thinks that so many are slow on few cores; these do next to nothing.
MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")


@MANY_WORKERS
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_resume_too_twice_in_a_row(workers, pipeline, tmp_path):
    data = pipeline(messy_shards(tmp_path), workers=workers)
    options = {"rank": 1, "world_size": 2}  # 2, 2 or 6 readers for 3 shards
    whole = [content(batch) for batch in take(data, 12, **options)]
    state, found = data.begin(**options), []
    for steps in (4, 3, 5):
        batches = take(data, steps, state=state, **options)
        found += [content(batch) for batch in batches]
        state = advance(state, batches)
    assert found == whole
    assert state.batches == 12
    assert len(state.readers) == max(1, workers)


@MANY_WORKERS
def test_a_resume_before_every_worker_had_a_turn(pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path, [6, 6, 6]), workers=3)
    whole = take(data, 7)
    rest = take(data, 5, state=advance(data.begin(), whole[:2]))
    assert [content(batch) for batch in rest] == [content(batch) for batch in whole[2:]]


def test_the_callers_state_is_its_own(pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path, [6]))
    state = advance(data.begin(), take(data, 1))
    before = deepcopy(state)
    take(data, 3, state=state)
    assert state == before


def test_a_resume_on_a_changed_shard_is_refused(pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path, [9]))
    state = advance(data.begin(), take(data, 1))
    make_shards(tmp_path, [1])
    with pytest.raises(UserError, match=r"00000\.tar no longer holds sample"):
        take(data, 1, state=state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resume_that_cannot_read_its_shards_may_be_tried_again(workers, pipeline, tmp_path):
    (shard,) = make_shards(tmp_path, [9])
    data = pipeline([shard], workers=workers)
    state = advance(data.begin(), take(data, 1))
    whole = shard.read_bytes()
    shard.write_bytes(HTML)
    with pytest.raises(OutageError, match=r"00000\.tar.*the checkpoint had read samples of it"):
        take(data, 1, state=state)
    shard.write_bytes(whole)
    (again,) = take(data, 1, state=state)
    assert content(again) == content(take(data, 2)[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_waiting_sample_that_other_captions_make_unusable_is_counted(workers, pipeline, tmp_path):
    dog = {"json": json.dumps({"caption": "a dog"}).encode()}
    samples = {str(i): sample(i) | (dog if i % 2 else {}) for i in range(20)}
    path = write_shard(tmp_path / "0.tar", samples)
    data = pipeline([path], workers=workers)
    state = advance(data.begin(), take(data, 1, state=data.begin()))
    waiting = [origin.sample for origin in state.readers[0].pending]
    assert {number % 2 for number in waiting} == {0, 1}
    changed = replace(data, build=replace(data.build, captions={"json.caption": 1.0}))
    (batch,) = take(changed, 1, state=state)
    assert batch.counts.skipped["no_caption"] >= sum(number % 2 == 0 for number in waiting)
    assert {int(name.rpartition("/")[2]) % 2 for name in batch.ids} == {1}


@pytest.mark.parametrize("readers", [1, 3])
def test_another_seed_or_name_of_a_dataset_is_refused(readers, pipeline, tmp_path):
    shards = make_shards(tmp_path, [6, 6])
    data = pipeline(shards)
    saved = [advance(data.begin(), take(data, 1, state=data.begin()))]
    renamed = data.with_mix({"web": DatasetConfig([str(shard) for shard in shards])})
    for other, named in (
        (replace(data, seed=1), r"another seed \(0, now 1\)"),
        (renamed, r"datasets of other names \(train, now web\)"),
    ):
        with pytest.raises(UserError, match=named):
            other.begin(saved, world_size=readers)
