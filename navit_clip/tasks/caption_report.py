"""What a run reads of its captions, and what it leaves unread, found in the first samples.

Logged when a run starts: a caption field that nobody reads, or a script that the tokenizer does not
know, shows in no metric.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from os.path import isfile

from navit_clip.data.captions import find_captions
from navit_clip.data.mixture import Mixture
from navit_clip.data.pieces import Piece
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.errors import SkipSampleError
from navit_clip.tokenizers.base import Tokenizer

_SAMPLES = 64  # read of each dataset
_WHOLE = 1 << 20  # tokens; no caption is cut at it


def report_captions(
    mixture: Mixture, weights: Mapping[str, float], tokenizer: Tokenizer
) -> Iterator[str]:
    """Lines about each dataset: fields that are read, others with captions, unknown pieces.

    Only shards in files are looked into: a server or a command is not asked twice.
    """
    for dataset in mixture.datasets:
        fields = list(dataset.captions or weights)
        line = f"captions of {dataset.name}: read from {', '.join(fields)}"
        shards = [mixture.shards[shard] for shard in dataset.shards]
        path = next((s for s in shards if isinstance(s, Piece) or isfile(s)), None)
        members = _first_samples(path) if path is not None else []
        read: Counter[str] = Counter()
        unread: Counter[str] = Counter()
        for sample in members:
            captions = [text for field in fields for text in _captions(sample, field)]
            read.update(captions)
            for field in _text_fields(sample):
                unread[field] += bool(set(_captions(sample, field)) - set(captions))
        if members:
            line += f" ({read.total() / len(members):.1f} per sample)"
        if others := [field for field, count in unread.items() if count]:
            line += f"; not read: {', '.join(sorted(others))}"
        yield line
        if tokenizer.unknown_id is None:
            continue
        ids = [tokenizer.encode(text, _WHOLE) for text in read]
        pieces = sum(map(len, ids))
        if unknown := sum(row.count(tokenizer.unknown_id) for row in ids):
            yield (
                f"{unknown / pieces:.1%} of the pieces of these captions are unknown to the "
                "tokenizer, and captions that differ in them alone are one to the model: train it "
                "with train_tokenizer --byte-fallback"
            )


def _first_samples(path: str) -> list[dict[str, bytes]]:
    samples: list[dict[str, bytes]] = []
    with suppress(ShardError):  # the readers count it
        samples.extend(sample.members for sample in islice(read_shard(path), _SAMPLES))
    return samples


def _captions(members: Mapping[str, bytes], field: str) -> list[str]:
    try:
        return find_captions(members, field)
    except SkipSampleError:  # likewise
        return []


def _text_fields(members: Mapping[str, bytes]) -> list[str]:
    """Fields that may hold captions: text members, and strings of several words in the JSON."""
    fields = [e for e in members if e.split(".")[-1] in ("txt", "text", "caption")]
    try:
        values = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError):
        values = None
    for name, value in values.items() if isinstance(values, dict) else ():
        texts = value if isinstance(value, list) else [value]
        # Not a path, a status or an EXIF block.
        if any(isinstance(t, str) and " " in t.strip() and t[0] not in "{[" for t in texts):
            fields.append(f"json.{name}")
    return fields
