"""A run's start says which captions are read, which are not, and what the tokenizer lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shard_factory import CAPTIONS, sample, write_shard

from navit_clip.data.config import DataConfig, DatasetConfig
from navit_clip.data.mixture import Mixture
from navit_clip.tasks.caption_report import report_captions
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer


def members(number: int, **fields: object) -> dict[str, bytes]:
    values = {"captions": [f"{CAPTIONS[0]} {number}", CAPTIONS[1]], "file_name": "a b.jpg"}
    captions = values["captions"]
    assert isinstance(captions, list)
    return {
        **sample(number),
        "txt": captions[0].encode(),
        "json": json.dumps({**values, **fields}).encode(),
    }


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(
        tmp_path / "a.tar", {str(i): members(i, file_name="a.jpg") for i in range(3)}
    )


def lines(config: DataConfig, weights, tokenizer) -> list[str]:
    return list(report_captions(Mixture.find(config), weights, tokenizer))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"all": 1.0}, "captions of train: read from all (2.0 per sample)"),
        (
            {"txt": 1.0},
            "captions of train: read from txt (1.0 per sample); not read: json.captions",
        ),
        ({"json.captions": 1.0}, "captions of train: read from json.captions (2.0 per sample)"),
    ],
)
def test_what_is_read_and_what_is_not(weights, expected, shard, tokenizer):
    assert lines(DataConfig(train=str(shard)), weights, tokenizer)[0] == expected


def test_each_dataset_of_a_mixture_and_other_fields(shard, tokenizer, tmp_path):
    other = write_shard(
        tmp_path / "b.tar", {"0": {**members(0, alt="a red cat", exif='{"a b"}'), "t.txt": b"x y"}}
    )
    mix = {"a": DatasetConfig(str(shard)), "b": DatasetConfig(str(other), captions={"txt": 1.0})}
    found = " ".join(lines(DataConfig(mix=mix), {"all": 1.0}, tokenizer))
    assert "not read: json.alt, json.captions, json.file_name, t.txt" in found


def test_the_share_of_unknown_pieces(tokenizer, tmp_path):
    texts = ["東京", "a red square"]
    shard = write_shard(
        tmp_path / "c.tar", {str(i): {**sample(i), "txt": t.encode()} for i, t in enumerate(texts)}
    )
    config = DataConfig(train=str(shard))
    found = lines(config, {"all": 1.0}, tokenizer)
    assert "of the pieces of these captions are unknown to the tokenizer" in found[1]
    assert "--byte-fallback" in found[1]
    assert len(lines(config, {"all": 1.0}, OpenClipTokenizer())) == 1


def test_damaged_shards_and_captions_say_nothing(tokenizer, tmp_path):
    (tmp_path / "d.tar").write_bytes(b"no tar" * 200)
    bad = write_shard(tmp_path / "e.tar", {"0": {"txt": b"\xff", "json": b"["}})
    for path in (tmp_path / "d.tar", bad):
        assert len(lines(DataConfig(train=str(path)), {"all": 1.0}, tokenizer)) == 1


@pytest.mark.parametrize(
    "shard", [f"http://127.0.0.1:1/a.tar?signature={'x' * 3000}", "pipe:" + "x" * 3000]
)
def test_a_server_and_a_command_are_not_asked(shard, tokenizer):
    config = DataConfig(train=shard, allow_commands=True)
    assert lines(config, {"txt": 1.0}, tokenizer) == ["captions of train: read from txt"]
