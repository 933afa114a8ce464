"""How many samples the training shards hold, which says how long an epoch is.

From what tools write beside the shards: ``manifest.jsonl`` (`navit-clip data make_shards`),
``NAME_stats.json`` (img2dataset), ``sizes.json`` (webdataset, open_clip). Without these a few local
shards are counted, header by header. Pieces of a table or a folder know their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from navit_clip.data.config import DataConfig
from navit_clip.data.hub import HUB
from navit_clip.data.mixture import Mixture
from navit_clip.data.patterns import is_stored
from navit_clip.data.pieces import Piece
from navit_clip.data.shards import EveryNth, ShardError, read_shard
from navit_clip.errors import UserError, printable
from navit_clip.retries import LISTING_TIMEOUT_S, RemoteError
from navit_clip.stores import ask, open_store

_MOST_COUNTED = 100  # shards; a count reads each header, a minute for a million samples


def samples_per_epoch(config: DataConfig) -> int:
    """Samples of all datasets together, unusable ones included.

    Raises:
        UserError: If there are no shards, or it cannot be told how many samples they hold.
    """
    if config.samples is not None:
        return int(config.samples)
    every = Mixture.find(config).shards
    shards = [shard for shard in every if not isinstance(shard, Piece)]
    recorded = _recorded(set(shards))
    sizes = {shard: size for shard, size in recorded if type(size) is int and size >= 0}
    unknown = [shard for shard in dict.fromkeys(shards) if shard not in sizes]
    remote = next((shard for shard in unknown if not os.path.isfile(shard)), None)
    if remote is not None or len(unknown) > _MOST_COUNTED:
        raise UserError(
            f"epochs needs the number of training samples, and nothing beside "
            f"{printable(remote or unknown[0])} says how many it holds (manifest.jsonl, "
            "NAME_stats.json or sizes.json): give data.samples"
        )
    sizes |= {shard: _count(shard) for shard in unknown}
    total = sum(s.size if isinstance(s, Piece) else sizes[s] for s in every)
    if not total:
        raise UserError(f"epochs needs training samples, and there is none in {len(every)} shards")
    return total


def _count(shard: str) -> int:
    """Samples of a shard, as far as it can be read."""
    none = EveryNth(1, part=-1, parts=1)
    with suppress(ShardError):
        for _ in read_shard(shard, none):
            pass
    return none.place + 1


def _recorded(shards: set[str]) -> Iterator[tuple[str, Any]]:
    """Shards, and what stands beside them of how many samples they hold."""
    for shard in shards:
        if not _is_listed(shard):  # a request for each would take minutes
            for stats in _objects(f"{os.path.splitext(shard)[0]}_stats.json"):
                yield shard, stats.get("successes")
    for folder in {os.path.dirname(shard) for shard in shards}:
        for sizes in _objects(os.path.join(folder, "sizes.json")):
            yield from ((os.path.join(folder, name), size) for name, size in sizes.items())
        yield from _of_manifest(folder)


def sizes_in_manifests(shards: Sequence[str]) -> dict[str, int]:
    """Samples by shard, where a manifest.jsonl beside it says so of a shard of as many bytes."""
    folders = {os.path.dirname(shard) for shard in shards if not isinstance(shard, Piece)}
    found = {shard: size for folder in folders for shard, size in _of_manifest(folder)}
    return {s: found[s] for s in shards if s in found and type(found[s]) is int and found[s] >= 0}


def _of_manifest(folder: str) -> Iterator[tuple[str, Any]]:
    records = list(_objects(os.path.join(folder, "manifest.jsonl"), lines=True))
    listing = _listing(folder) if records and _is_listed(folder) else None
    for record in records:
        shard = os.path.join(folder, str(record.get("shard")))
        if listing is None:
            found = os.path.getsize(shard) if os.path.isfile(shard) else None
        else:
            found = listing.get(shard)
        # Not if the shard was written again since.
        if found is not None and found == record.get("bytes"):
            yield shard, record.get("samples")


def _is_listed(address: str) -> bool:
    """Whether it lies in what fsspec reads and lists."""
    return is_stored(address) or address.startswith(HUB)


def _listing(folder: str) -> dict[str, int]:
    """Bytes of each object in a folder of a store; none if it cannot be listed."""
    store, path = open_store(folder)
    with suppress(RemoteError):
        found = ask(folder, partial(store.ls, path, detail=True), LISTING_TIMEOUT_S)
        return {store.unstrip_protocol(info["name"]): info["size"] for info in found}
    return {}


def _objects(path: str, *, lines: bool = False) -> Iterator[dict[str, Any]]:
    """The JSON objects in a file, up to where it is damaged; none if there is no file."""
    with suppress(OSError, ValueError, RecursionError):
        if _is_listed(path):
            store, name = open_store(path)
            text = ask(path, partial(store.cat_file, name)).decode()
        else:
            text = Path(path).read_text(encoding="utf-8")
        for part in text.splitlines() if lines else [text]:
            values = json.loads(part)
            if isinstance(values, dict):
                yield values
