"""Several datasets in proportion to their weights, each with captions and epochs of its own."""

from __future__ import annotations

from collections import Counter

import pytest
from loader_cases import ONE_BY_ONE, content, naming_epochs, take
from shard_factory import make_shards, sample, write_shard

from navit_clip.data.config import DataConfig, DatasetConfig
from navit_clip.errors import UserError


@pytest.fixture
def mixed(pipeline, tmp_path):
    """A pipeline of three datasets whose weights are 5, 3 and 2."""

    def make(**fields):
        mix = {
            name: DatasetConfig(
                [str(path) for path in make_shards(tmp_path / name, counts)], weight
            )
            for name, counts, weight in (("a", [4, 3], 5), ("b", [9], 3), ("c", [2, 2, 2], 2))
        }
        return pipeline([], **fields).with_mix(mix)

    return make


def test_proportions_hold_at_any_time(mixed):
    taken = Counter()
    for number, batch in enumerate(take(mixed(**ONE_BY_ONE), 60), start=1):
        assert sum(batch.counts.datasets.values()) == batch.counts.examples == 1
        taken += batch.counts.datasets
        for name, weight in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
            assert abs(taken[name] - weight * number) < 1


def test_each_dataset_has_its_own_epochs(mixed):
    data = mixed(**ONE_BY_ONE)
    ids = [batch.ids[0] for batch in take(data, 70)]
    mixture = data.mixture
    datasets = {name: mixture.dataset_of(shard).name for shard, name in enumerate(mixture.names)}
    for dataset, size in (("a", 7), ("b", 9), ("c", 6)):
        own = [i for i in ids if datasets[i.rpartition("/")[0]] == dataset]
        whole = len(own) // size
        assert whole >= 2
        for epoch in range(whole):
            assert len(set(own[epoch * size : (epoch + 1) * size])) == size


def test_readers_share_every_dataset(mixed):
    data = naming_epochs(mixed(**ONE_BY_ONE))
    first = Counter()
    for reader in range(4):  # more than the shards of any dataset
        for batch in data.batches_of(reader, 4):
            state = batch.state[reader]
            first.update(name for name in batch.ids if name.startswith("0:"))
            held = (*state.cursors, *state.buffer, *state.pending)
            if all(place.epoch for place in held):
                break
    assert len(first) == 7 + 9 + 6
    assert set(first.values()) == {1}


def test_a_resume_keeps_the_proportions(mixed):
    data = mixed()
    whole = take(data, 14)
    state = data.begin()
    for done in range(10):
        rest = take(data, 4, state=state)
        assert [content(b) for b in rest] == [content(b) for b in whole[done : done + 4]]
        state.advance(whole[done])


def test_each_dataset_may_have_captions_of_its_own(pipeline, tokenizer, tmp_path):
    words = {"txt": b"a red dog", "title.txt": b"yellow", "json": b'{"ocr": "one old bicycle"}'}
    mix = {}
    for name, captions in (("t", {"title.txt": 1.0}), ("j", {"json.ocr": 1.0}), ("d", None)):
        shard = write_shard(
            tmp_path / name / "0.tar", {str(i): {**sample(i), **words} for i in range(3)}
        )
        mix[name] = DatasetConfig(str(shard), captions=captions)
    data = pipeline([], **ONE_BY_ONE).with_mix(mix)
    expected = {"t": "yellow", "j": "one old bicycle", "d": "a red dog"}
    for batch in take(data, 9):
        dataset = batch.ids[0].partition("/")[0]
        tokens = batch.inputs.texts.token_ids[: batch.counts.streams["text"].tokens]
        assert tokens.tolist() == tokenizer.encode(expected[dataset], 24)


def test_an_empty_dataset_is_named(mixed, tmp_path):
    data = mixed()
    write_shard(tmp_path / "b/00000.tar", {})
    with pytest.raises(UserError, match=r"dataset b.*b/00000\.tar"):
        take(data, 30)


def test_train_and_mix_exclude_each_other():
    with pytest.raises(ValueError, match="train and mix exclude each other"):
        DataConfig(train="a", mix={"b": DatasetConfig("b")})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 0.0}, "weight"),
        ({"captions": {}}, "captions must name fields"),
        ({"captions": {"json.": 1.0}}, "captions must name a field of the JSON"),
        ({"captions": {"txt": 0.0}}, "positive weights"),
    ],
)
def test_a_dataset_checks_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig("a", **fields)
