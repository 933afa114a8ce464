"""A resume changes nothing: the same batches, bit for bit, from wherever a run was stopped."""

from __future__ import annotations

import json

import pytest
from loader_cases import ONE_BY_ONE, content, epoch_of, take
from shard_factory import HTML, encode, make_shards, photo, sample, write_shard

from navit_clip.data.drop import DropConfig
from navit_clip.data.mixture import Sources
from navit_clip.data.packer import Budgets
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.data.state import LoaderPosition, open_position
from navit_clip.errors import UserError


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


def begin(build, **ranks):
    return open_position([], Sources.find(build.config), build, **ranks)


def advance(position, batches):
    for batch in batches:
        position.advance(batch)
    return LoaderPosition(**json.loads(json.dumps(position.to_json())))


SCHEDULED = DropConfig(
    kind="beta", schedule="sigmoid", schedule_images=60, schedule_midpoint=0.5, schedule_low=0.1
)


@pytest.mark.parametrize("packing", ["greedy", "exact", "constant"])
def test_a_resume_after_any_batch_goes_on_as_if_nothing_had_happened(packing, builder, tmp_path):
    build = builder(
        messy_shards(tmp_path), drop=SCHEDULED, packing=packing, budget=Budgets(48, 40, 3)
    )
    whole = [content(batch) for batch in take(build, 26)]
    assert epoch_of(whole[-1]["position"]["0"]) > 2
    position = begin(build)
    for done in range(22):
        batches = take(build, 4, position=position)
        assert [content(batch) for batch in batches] == whole[done : done + 4]
        position = advance(position, batches[:1])  # and again from there


@pytest.mark.parametrize("fields", [{}, {"shuffle_buffer": 3}, {"look_ahead": 5}])
def test_a_resume_at_the_very_end_of_an_epoch(fields, builder, tmp_path):
    build = builder(make_shards(tmp_path, [3, 2]), **{**ONE_BY_ONE, **fields})
    whole = [content(batch) for batch in take(build, 15)]
    position = begin(build)
    for expected in whole:
        (batch,) = take(build, 1, position=position)
        assert content(batch) == expected
        position = advance(position, [batch])


def test_a_resume_among_images_that_never_share_a_batch(builder, tmp_path):
    # 20 and 24 patches by turns, in a budget of 24.
    sizes = [(32, 40), (32, 48)] * 4
    shard = write_shard(
        tmp_path / "0.tar",
        {str(i): {**sample(i), "png": encode(photo(i, *size))} for i, size in enumerate(sizes)},
    )
    build = builder(
        [shard],
        resolution=ResolutionConfig(mode="native", max_tokens=24),
        drop=DropConfig(kind="none"),
        budget=Budgets(image_tokens=24, text_tokens=96, max_pairs=4),
        look_ahead=1,
        shuffle_buffer=1,
    )
    whole = take(build, 12)
    assert {batch.counts.pairs for batch in whole} == {1}
    for done in range(9):
        rest = take(build, 3, position=advance(begin(build), whole[:done]))
        assert [content(b) for b in rest] == [content(b) for b in whole[done : done + 3]]


# Torch thinks that so many are slow on few cores; these do next to nothing.
MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")


@MANY_WORKERS
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_resume_too_twice_in_a_row(workers, builder, tmp_path):
    build = builder(messy_shards(tmp_path), workers=workers)
    options = {"rank": 1, "world_size": 2}  # 2, 2 or 6 readers for 3 shards
    whole = [content(batch) for batch in take(build, 12, **options)]
    position, found = begin(build, **options), []
    for steps in (4, 3, 5):
        batches = take(build, steps, position=position, **options)
        found += [content(batch) for batch in batches]
        position = advance(position, batches)
    assert found == whole
    assert position.batches == 12
    assert len(position.readers) == max(1, workers)


@MANY_WORKERS
def test_a_resume_before_every_worker_had_a_turn(builder, tmp_path):
    build = builder(make_shards(tmp_path, [6, 6, 6]), workers=3)
    whole = take(build, 7)
    rest = take(build, 5, position=advance(begin(build), whole[:2]))
    assert [content(batch) for batch in rest] == [content(batch) for batch in whole[2:]]


def test_the_callers_position_is_its_own(builder, tmp_path):
    build = builder(make_shards(tmp_path, [6]))
    position = advance(begin(build), take(build, 1))
    before = json.dumps(position.to_json())
    take(build, 3, position=position)
    assert json.dumps(position.to_json()) == before


def test_a_resume_on_a_changed_shard_is_refused(builder, tmp_path):
    build = builder(make_shards(tmp_path, [9]))
    position = advance(begin(build), take(build, 1))
    make_shards(tmp_path, [1])
    with pytest.raises(UserError, match=r"00000\.tar no longer holds sample"):
        take(build, 1, position=position)
