"""Puts parts that several machines made together: the folder that one run would have made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from navit_clip.data.annotations.class_names import CLASSNAMES
from navit_clip.data.workers import run_unordered
from navit_clip.errors import UserError
from navit_clip.files import replacing, writing
from navit_clip.tools.make_shards.shard_manifest import (
    Manifest,
    begin_manifest,
    differences,
    existing_manifest,
    find_damage,
    sole_writer,
)
from navit_clip.tools.make_shards.write_shard import ShardRecord


def merge_parts(folders: Sequence[Path], output: Path, workers: int = 1) -> list[ShardRecord]:
    """Links or copies all shards into one folder and compares each with its record.

    The parts remain as they are. After an interruption the same call continues.

    Args:
        folders: Of all parts, in any order.
        output: A folder that is new, empty or of an earlier call.
        workers: Number of processes.

    Returns:
        A record of each shard in order.

    Raises:
        UserError: If a part is missing, unfinished or damaged, is there twice, or was made with
            other arguments.
    """
    parts = [existing_manifest(folder) for folder in folders]
    settings = _common_settings(parts)
    with writing(f"--output {output}"), sole_writer(output):
        merged = begin_manifest(output, settings)
        tasks = [
            (part.folder, output, record)
            for part in parts
            for record in part.records.values()
            if not merged.is_whole(record.shard)
        ]
        taken = run_unordered(_take, tasks, workers)
        for record in tqdm(taken, total=len(tasks), unit="shard", desc="merging"):
            merged.add(record)
        for partial in output.glob(".*.partial"):  # of a call that was killed
            partial.unlink()
        if (names := parts[0].folder / CLASSNAMES).exists():
            shutil.copyfile(names, output / CLASSNAMES)
        merged.save()
    return [merged.records[name] for name in sorted(merged.records)]


def _common_settings(parts: Sequence[Manifest]) -> Mapping[str, Any]:
    """The settings of the run that the parts are of.

    Raises:
        UserError: If they are not all the parts of one run.
    """
    first, found = parts[0], dict[str, Path]()
    for part in parts:
        if "part" not in part.settings:
            raise UserError(f"{part.folder} is no part: it was made without --part")
        # Parts of three and of two are no parts of one run.
        before, now = (
            {**_without_part(one), "parts": one.settings["part"].partition("/")[2]}
            for one in (first, part)
        )
        if other := differences(before, now):
            raise UserError(f"{part.folder} was made otherwise than {first.folder} ({other})")
        name = part.settings["part"]
        if name in found:
            raise UserError(f"{found[name]} and {part.folder} are both part {name}: give one")
        found[name] = part.folder
        if part.unfinished:
            raise UserError(
                f"{part.folder}: {part.unfinished} shards are not made yet, repeat its command"
            )
    count = next(iter(found)).partition("/")[2]
    names = [f"{number}/{count}" for number in range(1, int(count) + 1)]
    if missing := [name for name in names if name not in found]:
        raise UserError(f"part {', '.join(missing)} is missing: name the folders of all parts")
    return _without_part(first)


def _without_part(manifest: Manifest) -> dict[str, Any]:
    return {key: value for key, value in manifest.settings.items() if key != "part"}


def _take(task: tuple[Path, Path, ShardRecord]) -> ShardRecord:
    folder, output, record = task
    source, path = folder / record.shard, output / record.shard
    if record.samples:
        with replacing(path) as partial:
            try:
                os.link(source, partial)
            except OSError:  # on another disk
                shutil.copyfile(source, partial)
            if problem := find_damage((partial, record)):
                problem = problem.replace(str(partial), str(source))
                raise UserError(f"{problem}: delete it and repeat the command of its part")
    return record
