"""From shards to packed batches: every sample once per epoch, and the bad ones counted."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch
from loader_cases import ONE_BY_ONE, PATCH, epoch_of, naming_epochs, take
from shard_factory import HTML, encode, ids_of, make_shards, photo, png_of_size, sample, write_shard

from navit_clip.data.budgets import Budgets
from navit_clip.data.builders.base import Origin
from navit_clip.data.drop import DropConfig, mean_rate
from navit_clip.data.shards import read_shard
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.errors import UserError


def pairs_of(batch):
    """(patches, coords, grid, token ids) of each pair, unpacked one by one."""
    images, texts = batch.inputs.images, batch.inputs.texts
    for i in range(batch.counts.examples):
        place, text = int(images.order[i]), int(texts.order[i])
        pixels = slice(*images.segments.offsets[place : place + 2].tolist())
        words = slice(*texts.segments.offsets[text : text + 2].tolist())
        yield (
            images.patches[pixels].numpy(),
            images.coords[pixels].numpy(),
            tuple(images.grids[place].tolist()),
            texts.token_ids[words].tolist(),
        )


def one_by_one(data, reader=0, readers=1):
    """(epoch, id) of one reader's samples in the order in which it reads them, without end."""
    for batch in naming_epochs(data).batches_of(reader, readers):
        epoch, _, name = batch.ids[0].partition(":")
        yield int(epoch), name


def epochs(data, count, **reader):
    """Ids by epoch, in the order of reading."""
    found = [[] for _ in range(count)]
    for epoch, name in one_by_one(data, **reader):
        if epoch >= count:
            return found
        found[epoch].append(name)
    raise AssertionError("readers are endless")


@pytest.mark.parametrize(
    ("counts", "readers"),
    [([3, 1, 4, 2], n) for n in (1, 2, 3, 4)] + [([8], n) for n in (1, 3, 8)] + [([9, 5], 4)],
)
def test_all_readers_together_take_every_sample_once_per_epoch(counts, readers, pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path, counts), **ONE_BY_ONE)
    by_reader = [epochs(data, 3, reader=r, readers=readers) for r in range(readers)]
    for epoch in range(3):
        taken = [name for reader in by_reader for name in reader[epoch]]
        assert sorted(taken) == ids_of(counts)


def test_ranks_and_workers_take_every_sample_once_per_epoch(pipeline, tmp_path):
    counts = [5, 2, 3, 4, 1]
    data = naming_epochs(pipeline(make_shards(tmp_path, counts), **ONE_BY_ONE, workers=2))
    taken = []
    for rank in range(2):
        unfinished = {2 * rank, 2 * rank + 1}
        with closing(data.load(rank=rank, world_size=2)) as batches:
            for batch in batches:
                epoch, _, name = batch.ids[0].partition(":")
                if epoch == "0":
                    taken.append(name)
                else:
                    unfinished -= set(batch.state)
                if not unfinished:
                    break
    assert sorted(taken) == ids_of(counts)


def test_shuffling_and_packing_lose_nothing_and_repeat_nothing(pipeline, tmp_path):
    counts = [6, 9, 4]
    data = pipeline(make_shards(tmp_path, counts))
    consumed = Counter()
    for batch in take(data, 30):
        consumed.update(batch.ids)
        state = batch.state[0]
        held = Counter(f"{o.shard:05d}/{o.sample}" for o in (*state.buffer, *state.pending))
        read = consumed + held
        assert {read[name] for name in ids_of(counts)} <= {epoch_of(state), epoch_of(state) + 1}
    assert epoch_of(state) > 2


def test_a_buffer_of_one_keeps_each_shards_order(pipeline, tmp_path):
    (first,) = epochs(pipeline(make_shards(tmp_path, [9]), **ONE_BY_ONE), 1)
    assert first == ids_of([9])


def test_the_order_changes_with_epoch_and_seed_and_with_nothing_else(pipeline, tmp_path):
    shards = make_shards(tmp_path, [4] * 8)
    first, second = epochs(pipeline(shards, **ONE_BY_ONE), 2)
    assert first != second
    assert epochs(pipeline(shards, **ONE_BY_ONE), 1) == [first]
    assert epochs(pipeline(shards, **ONE_BY_ONE, seed=1), 1) != [first]


def test_the_buffer_shuffles_within_shards_and_by_seed(pipeline, tmp_path):
    shards = make_shards(tmp_path, [30])

    def order(**fields):
        data = pipeline(shards, **{**ONE_BY_ONE, "shuffle_buffer": 10, **fields})
        return [name for _, name in itertools.islice(one_by_one(data), 20)]

    assert order() != ids_of([30])[:20]
    assert order() == order()
    assert order() != order(seed=1)


def bad_samples():
    good = sample(0)
    return {
        "unreadable_image": [
            {**good, "png": HTML},
            {**good, "png": b""},
            {**good, "png": good["png"][:-30]},
        ],
        "too_large": [{**good, "png": png_of_size(30_000, 30_000)}],
        "no_image": [{"txt": b"words"}, {"txt": b"words", "mp4": b"film"}],
        "no_caption": [{"png": good["png"]}, {**good, "txt": b" \n"}],
        "bad_caption": [{**good, "txt": b"\xff\xfe"}],
    }


def test_bad_samples_are_skipped_named_and_counted_by_reason(pipeline, tmp_path):
    bad = [members for group in bad_samples().values() for members in group]
    everything = {
        "first": sample(1),
        **{f"bad{i}": m for i, m in enumerate(bad)},
        "last": sample(2),
    }
    shard = write_shard(tmp_path / "0.tar", everything)
    batches = take(pipeline([shard], **ONE_BY_ONE), 4)
    assert [batch.ids for batch in batches] == [("0/first",), ("0/last",)] * 2
    expected = {reason: len(group) for reason, group in bad_samples().items()}
    assert [dict(batch.counts.skipped) for batch in batches] == [expected, {}] * 2
    log = batches[0].counts.skip_log
    assert 0 < len(log) <= len(bad)
    assert all(line.startswith(f"0/bad{i}: ") for i, line in enumerate(log))
    assert batches[1].counts.skip_log == ()


def test_nothing_but_bad_shards_in_a_row_stops(pipeline, tmp_path):
    shards = make_shards(tmp_path, [1, *[1] * 12])
    for shard in shards[1:]:
        shard.write_bytes(HTML)
    with pytest.raises(UserError, match=r"10 unreadable shards in a row, the last one .*\.tar"):
        take(pipeline(shards, **ONE_BY_ONE), 10)


@pytest.mark.parametrize("wrong", [HTML, b""])
@pytest.mark.parametrize("readers", [5, 8, 12])
def test_a_bad_shard_stops_no_reader_that_has_no_other_in_an_epoch(
    readers, wrong, pipeline, tmp_path
):
    shards = make_shards(tmp_path, [4] * 8)
    shards[3].write_bytes(wrong)
    data = pipeline(shards, **ONE_BY_ONE)
    for reader in range(readers):
        assert len(epochs(data, 12, reader=reader, readers=readers)) == 12


def test_readers_that_share_shards_each_read_one_an_epoch(pipeline, tmp_path):
    counts, readers = [6, 7, 8], 8
    data = pipeline(make_shards(tmp_path, counts), **ONE_BY_ONE)
    by_reader = [epochs(data, 4, reader=r, readers=readers) for r in range(readers)]
    for epoch in range(4):
        read = [{name.split("/")[0] for name in reader[epoch]} for reader in by_reader]
        assert all(len(shards) == 1 for shards in read)
        assert sorted(name for r in by_reader for name in r[epoch]) == ids_of(counts)


def test_bad_shards_are_skipped_and_counted(pipeline, tmp_path):
    good, cut, wrong = make_shards(tmp_path, [2, 3, 1])
    cut.write_bytes(cut.read_bytes()[:-12_000])
    wrong.write_bytes(HTML)
    data = pipeline([good, cut, wrong], **ONE_BY_ONE)
    skipped, taken, epoch = Counter(), [], 0
    batches = data.load()
    while epoch < 5:
        batch = next(batches)
        skipped += batch.counts.skipped
        taken += batch.ids
        epoch = epoch_of(batch.state[0])
    assert set(skipped) == {"bad_shard"}
    assert 8 <= skipped["bad_shard"] <= 12  # two in each of five epochs, more or less at the ends
    assert {name.split("/")[0] for name in taken} == {"00000", "00001"}
    assert 0 < len({name for name in taken if name.startswith("00001")}) < 3


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_in_a_row_are_an_error(workers, pipeline, tmp_path):
    shard = write_shard(
        tmp_path / "0.tar",
        {"good": sample(0), **{f"bad{i}": {"png": HTML, "txt": b"a"} for i in range(6)}},
    )
    data = pipeline([shard], **{**ONE_BY_ONE, "workers": workers, "max_bad_samples": 6})
    with pytest.raises(UserError, match=r"6 unusable samples in a row.*0/bad5.*unreadable_image"):
        take(data, 3)
    # One more is allowed, and the good one in each epoch starts the count again.
    assert len(take(pipeline([shard], **ONE_BY_ONE, max_bad_samples=7), 5)) == 5


def test_no_room_in_shared_memory_is_an_error(pipeline, tmp_path, monkeypatch):
    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # the worker inherits it
    data = pipeline(make_shards(tmp_path, [4]), workers=1)
    with pytest.raises(UserError, match=r"a batch of 0\.\d MB \(.*No space.* --shm-size"):
        take(data, 1)


def test_budgets_of_other_streams_are_an_error(pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path, [4]), budget=Budgets({"image": 64}, 6))
    message = r"data\.budget\.tokens must name the streams image, text, got image"
    with pytest.raises(UserError, match=message):
        take(data, 1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("wrong", [None, HTML])
def test_a_share_without_a_sample_is_an_error(workers, wrong, pipeline, tmp_path):
    shard = write_shard(tmp_path / "0.tar", {})
    if wrong is not None:
        shard.write_bytes(wrong)
    with pytest.raises(UserError, match=r"no sample in 1 shard.*0\.tar"):
        take(pipeline([shard], workers=workers), 1)


def test_missing_training_data_is_an_error(pipeline, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.tar"):
        take(pipeline([tmp_path / "nowhere.tar"]), 1)
    with pytest.raises(UserError, match=r"--data\.train"):
        take(pipeline([]), 1)


@pytest.mark.parametrize("pad", [True, False])
def test_budgets_padding_and_counts(pad, pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path, [12, 9]), pad_to_budget=pad)
    budget = data.config.budget
    sizes = set()
    for batch in take(data, 20):
        images, texts, counts = batch.inputs.images, batch.inputs.texts, batch.counts
        assert 1 <= len(batch.ids) == counts.examples <= budget.max_examples
        assert images.segments.num_examples == texts.segments.num_examples == counts.examples
        grids = images.grids[: counts.examples].prod(1)
        image, text = counts.streams["image"], counts.streams["text"]
        assert image.tokens < image.tokens_before_drop == grids.sum()
        assert text.tokens_before_drop == text.tokens
        for packed, stream, tokens, most in (
            (images, image, len(images.patches), 64),
            (texts, text, len(texts.token_ids), 96),
        ):
            assert stream.budget == most
            assert packed.segments.num_real_tokens == stream.tokens <= most
            assert packed.segments.num_tokens == tokens == stream.slots
            assert tokens == most if pad else packed.segments.padding == 0
        sizes.add(counts.examples)
    assert len(sizes) > 1  # images differ in size, so batches differ in number


def test_a_sample_is_the_same_read_alone_and_in_a_batch(pipeline, tmp_path):
    shards = make_shards(tmp_path, [12, 12])
    data = pipeline(shards)
    samples = {s.id: s for shard in shards for s in read_shard(str(shard))}
    for batch in take(data, 2):  # all of the first epoch
        for name, (patches, coords, grid, ids) in zip(batch.ids, pairs_of(batch), strict=True):
            shard, index = map(int, name.split("/"))
            alone = data.build(samples[name], Origin(0, shard, index, 0))
            np.testing.assert_array_equal(patches, alone.image.patches)
            np.testing.assert_array_equal(coords, alone.image.coords)
            assert grid == alone.image.grid
            assert ids == alone.token_ids


def test_pixels_captions_and_coordinates_belong_together(pipeline, tokenizer, tmp_path):
    shards = make_shards(tmp_path, [6])
    # Native and sizes of whole patches, so that patches are the image's own pixels.
    write_shard(
        shards[0],
        {str(i): {"png": encode(photo(i, 16, 24)), "txt": f"{i}".encode()} for i in range(6)},
    )
    data = pipeline(shards, resolution=ResolutionConfig(mode="native", max_tokens=24))
    for batch in take(data, 3):
        for name, (patches, coords, grid, ids) in zip(batch.ids, pairs_of(batch), strict=True):
            number = name.split("/")[1]
            pixels = np.asarray(photo(int(number), 16, 24))
            assert grid == (2, 3)
            for patch, (row, column) in zip(patches, coords, strict=True):
                y, x = row * PATCH, column * PATCH
                np.testing.assert_array_equal(
                    patch.reshape(PATCH, PATCH, 3), pixels[y : y + PATCH, x : x + PATCH]
                )
            assert ids == tokenizer.encode(number, 24)


def test_each_epoch_shows_a_sample_differently(pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path, [1]), **ONE_BY_ONE)
    sizes = {
        (*batch.inputs.images.grids[0].tolist(), batch.counts.streams["image"].tokens)
        for batch in take(data, 12)
    }
    assert len(sizes) > 3


def test_scheduled_drop_follows_the_images_that_all_readers_took(pipeline, tmp_path):
    drop = DropConfig(kind="fixed", schedule="sigmoid", schedule_images=100, schedule_midpoint=0.5)
    data = pipeline(
        make_shards(tmp_path, [5, 5]),
        **ONE_BY_ONE,
        drop=drop,
        resolution=ResolutionConfig(mode="native", max_tokens=24),
    )
    fractions = []
    for drawn, batch in enumerate(itertools.islice(data.batches_of(1, 2), 40)):
        image = batch.counts.streams["image"]
        rate = mean_rate(drop, 2 * drawn)
        assert image.tokens == max(1, round(image.tokens_before_drop * (1 - rate)))
        fractions.append(image.tokens / image.tokens_before_drop)
    assert np.mean(fractions[-10:]) > np.mean(fractions[:10]) + 0.2  # the rate falls
