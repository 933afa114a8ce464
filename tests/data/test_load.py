"""Batches that know where they stand; the code of docs/loader.md runs as it stands there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_cases import CONFIG, PATCH, content, pair_pipeline, take
from shard_factory import make_shards

from navit_clip.data.augment import AugmentConfig
from navit_clip.data.load import Batches, pair_batches
from navit_clip.data.state_json import data_from_json
from navit_clip.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "loader.md"


def batches_of(root: Path, tokenizer: Any, **options: Any) -> Batches[Any]:
    shards = [str(path) for path in sorted(root.glob("*.tar"))]
    config = replace(CONFIG, train=shards)
    return pair_batches(config, tokenizer, patch_size=PATCH, context_length=24, seed=3, **options)


def test_a_state_from_a_file_continues_bit_for_bit(tmp_path, tokenizer):
    make_shards(tmp_path, [7, 5, 6])
    with batches_of(tmp_path, tokenizer) as batches:
        whole = [content(batch) for batch in islice(batches, 12)]
    with batches_of(tmp_path, tokenizer) as batches:
        first = [content(batch) for batch in islice(batches, 5)]
        state = batches.state_dict()
        next(batches)  # does not count any more
    torch.save(state, tmp_path / "state.pt")
    for saved in (json.loads(json.dumps(state)), torch.load(tmp_path / "state.pt")):
        with batches_of(tmp_path, tokenizer, resume=[saved]) as batches:
            assert first + [content(batch) for batch in islice(batches, 7)] == whole


def test_images_are_augmented_as_in_training(tmp_path, tokenizer):
    shards = list(map(str, make_shards(tmp_path, [6])))
    augment = AugmentConfig(min_area=0.3, flip=0.5, brightness=0.3)
    config = replace(CONFIG, train=shards, augment=augment)
    data = pair_pipeline(shards, tokenizer, seed=3, augment=augment)
    with pair_batches(config, tokenizer, patch_size=PATCH, context_length=24, seed=3) as batches:
        assert content(next(batches)) == content(take(data, 1)[0])
    with batches_of(tmp_path, tokenizer) as batches:
        assert content(next(batches)) != content(take(data, 1)[0])


def test_one_rank_goes_on_where_two_stopped(tmp_path, tokenizer):
    make_shards(tmp_path, [7, 5, 6])
    states = []
    for rank in range(2):
        with batches_of(tmp_path, tokenizer, rank=rank, world_size=2) as batches:
            next(batches)
            states.append(batches.state_dict())
    with batches_of(tmp_path, tokenizer, resume=states) as batches:
        found = [content(batch) for batch in islice(batches, 4)]
    data = pair_pipeline(sorted(tmp_path.glob("*.tar")), tokenizer, seed=3)
    state = data.begin([data_from_json(one) for one in states])
    assert found == [content(batch) for batch in take(data, 4, state=state)]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "resume is no state of batches"),
        ({"leftovers": {}, "readers": {}, "shards": "other"}, "taken with other training shards"),
    ],
)
def test_another_state_is_refused(tmp_path, tokenizer, state, message):
    make_shards(tmp_path, [3])
    with pytest.raises(UserError, match=message):
        batches_of(tmp_path, tokenizer, resume=[state])


def run_page(folder: Path, *skipped: str) -> dict[str, Any]:
    """Runs the code of the page but for some sections, in a folder of shards; returns its names."""
    (folder / "shards").mkdir()
    make_shards(folder / "shards", [20, 20, 20, 20])
    names: dict[str, Any] = {}
    for section in re.split("^#+ ", PAGE.read_text(), flags=re.MULTILINE):
        for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            if not section.startswith(skipped):
                # Worker processes take seconds to start.
                exec(compile(block.replace("workers=2", "workers=0"), str(PAGE), "exec"), names)
    return names


def test_the_lightning_loop_of_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="lightning, which only this example needs, is missing")
    monkeypatch.chdir(tmp_path)
    names = run_page(tmp_path, "Many ranks", "Samples of your own")
    assert len(names["whole"]) == 6


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(re.findall(r"^```(\w+)$", PAGE.read_text(), re.MULTILINE)) == {"python"}
    names = run_page(tmp_path, "Lightning")
    assert len(names["whole"]) == 6
    assert len(names["letters"]) > 1
    assert names["ids"]
