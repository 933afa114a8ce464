"""The record of a folder of shards: what it was made of, and which shards are complete.

``manifest.jsonl`` begins with the settings and has one line per shard. Lines are added as shards
are finished, in any order, and put into the shards' order at the end, so that an interrupted and
continued run leaves the same file as an undisturbed one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from navit_clip.data.shards import MANIFEST
from navit_clip.errors import UserError
from navit_clip.files import atomic_write, locked, reading, sha256_of
from navit_clip.tools.make_shards.write_shard import ShardRecord

VERSION = 2  # raised when the same rows and files give other bytes


@dataclass
class Manifest:
    """A manifest in memory.

    Attributes:
        folder: Where it and the shards lie.
        settings: What the shards were made of; ``shards`` is how many there are to be, ``part``,
            such as ``3/16``, which of them are made here.
        records: Finished shards by file name.
    """

    folder: Path
    settings: dict[str, Any]
    records: dict[str, ShardRecord]

    @property
    def unfinished(self) -> int:
        """How many shards are still to be made here."""
        part, _, parts = self.settings.get("part", "1/1").partition("/")
        return len(range(int(part) - 1, self.settings["shards"], int(parts))) - len(self.records)

    def add(self, record: ShardRecord) -> None:
        """Adds a finished shard; on the disk when this returns."""
        self.records[record.shard] = record
        with (self.folder / MANIFEST).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self) -> None:
        """Writes the whole file again, shards in order."""
        records = [asdict(self.records[name]) for name in sorted(self.records)]
        lines = [json.dumps(line, ensure_ascii=False) for line in (self.settings, *records)]
        atomic_write(self.folder / MANIFEST, "\n".join(lines) + "\n")

    def is_whole(self, shard: str) -> bool:
        """Whether a shard is recorded and its file there at its full size."""
        record, path = self.records.get(shard), self.folder / shard
        if record is None or not record.samples:
            return record is not None
        return path.is_file() and path.stat().st_size == record.bytes


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None if it has none.

    Raises:
        UserError: If it is not one.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    with reading(path):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        settings = json.loads(lines[0])
        # What follows the last line's end was cut off when the writer was killed.
        records = [ShardRecord(**json.loads(line)) for line in lines[1:-1]]
        if settings["version"] != VERSION:
            raise UserError(f"{path} was written by another version: make the shards again")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): make the shards again") from error
    return Manifest(folder, settings, {record.shard: record for record in records})


def existing_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards.

    Raises:
        UserError: If it has none, or it is not one.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"no {MANIFEST} in {folder}: only shards made by make_shards have one")
    return manifest


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two settings, in words, nothing if they are alike."""
    return ", ".join(
        f"{key} was {before.get(key)}, now {now.get(key)}"
        for key in {**now, **before}
        if before.get(key) != now.get(key)
    )


def begin_manifest(folder: Path, settings: Mapping[str, Any]) -> Manifest:
    """Goes on with a folder's manifest or begins one.

    Args:
        folder: Exists.
        settings: What the shards are made of, as plain JSON values.

    Raises:
        UserError: If the folder holds something else, or shards of other settings.
        OSError: If it cannot be written.
    """
    wanted = {"version": VERSION, **settings}
    manifest = read_manifest(folder)
    if manifest is None:
        if any(folder.iterdir()):
            raise UserError(f"--output {folder} holds other files: name a new or empty folder")
        manifest = Manifest(folder, wanted, {})
    if other := differences(manifest.settings, wanted):
        raise UserError(
            f"--output {folder} has shards made otherwise ({other}): repeat the command "
            "they were made with, name another folder or delete this one"
        )
    # Also drops a line that was cut off.
    manifest.save()
    return manifest


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps a second run out.

    Raises:
        UserError: If another run is writing there.
        OSError: If the folder cannot be made.
    """
    with locked(folder, wait=False) as free:
        if not free:
            raise UserError(f"another run is writing to {folder}: wait for it")
        yield


def find_damage(check: tuple[Path, ShardRecord]) -> str | None:
    """Compares a shard with its record; returns a line about what is wrong, None if all is well."""
    path, record = check
    try:
        if not record.samples:
            return f"{path}: should not exist" if path.exists() else None
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path}: {size:,} bytes instead of {record.bytes:,}"
        if sha256_of(path) != record.sha256:
            return f"{path}: content differs from its SHA-256"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None
