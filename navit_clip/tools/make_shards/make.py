"""Makes all shards of a list of images, and checks them afterwards."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from navit_clip.data.annotations.class_names import CLASSNAMES
from navit_clip.data.annotations.image_files import check_files
from navit_clip.data.annotations.rows import ImageList
from navit_clip.data.pieces import shard_name, shuffle_rows
from navit_clip.data.workers import run_unordered
from navit_clip.errors import UserError
from navit_clip.files import atomic_write, writing
from navit_clip.tools.make_shards.shard_manifest import (
    MANIFEST,
    begin_manifest,
    existing_manifest,
    find_damage,
    sole_writer,
)
from navit_clip.tools.make_shards.write_shard import ShardRecord, ShardTask, write_shard


def make_shards(
    images: ImageList,
    output: Path,
    *,
    samples_per_shard: int = 1000,
    shuffle_seed: int | None = None,
    part: tuple[int, int] = (1, 1),
    workers: int = 1,
) -> tuple[list[ShardRecord], int]:
    """Writes the shards that are missing.

    Args:
        images: With their captions or labels.
        output: A folder that is new, empty or of an earlier run with the same images and settings.
        samples_per_shard: Rows per shard; those skipped leave it with fewer samples.
        shuffle_seed: Put the rows into a random order, the same for the same seed; None keeps
            their own.
        part: (k, n) makes every n-th shard from the k-th on, see `merge`.
        workers: Number of processes; it does not change what is written.

    Returns:
        A record of each shard in order, and how many were written now; the others were there.

    Raises:
        UserError: If the output cannot be used or no row has a usable image.
    """
    check_files(images, "--images")
    rows = shuffle_rows(images.rows, shuffle_seed)
    starts = range(0, len(rows), samples_per_shard)
    settings = {
        "rows": len(rows),
        "rows_sha256": images.digest(),
        "images": str(images.folder.resolve()),
        "samples_per_shard": samples_per_shard,
        "shuffle_seed": shuffle_seed,
        "shards": len(starts),
        **({"part": "{}/{}".format(*part)} if part[1] > 1 else {}),
    }
    hint = "; once that is fixed, the same command continues"
    with writing(f"--output {output}", hint=hint), sole_writer(output):
        manifest = begin_manifest(output, settings)
        tasks = [
            ShardTask(
                output / f"{shard_name(shard, len(starts))}.tar",
                images.folder,
                start,
                rows[start : start + samples_per_shard],
            )
            for shard, start in [*enumerate(starts)][part[0] - 1 :: part[1]]
        ]
        missing = [task for task in tasks if not manifest.is_whole(task.path.name)]
        sizes = {task.path.name: len(task.rows) for task in missing}
        total = sum(len(task.rows) for task in tasks)
        done = total - sum(sizes.values())
        with tqdm(total=total, initial=done, unit="image", desc="making shards") as bar:
            for record in run_unordered(write_shard, missing, workers):
                manifest.add(record)
                bar.update(sizes[record.shard])
        if images.classnames:
            atomic_write(output / CLASSNAMES, "\n".join(images.classnames) + "\n")
        for partial in output.glob("*.tar.partial"):
            partial.unlink()
        manifest.save()
    records = [manifest.records[task.path.name] for task in tasks]
    if records and not any(record.samples for record in records):
        raise UserError(f"no usable image among {len(rows):,}, the first: {records[0].skip_log[0]}")
    return records, len(missing)


def verify_shards(folder: Path, workers: int = 1) -> tuple[list[ShardRecord], list[str]]:
    """Reads every shard of a folder and compares it with the manifest.

    Args:
        folder: Written by `make_shards`.
        workers: Number of processes.

    Returns:
        The manifest's records, and a line for each error, none if all shards are intact.

    Raises:
        UserError: If the folder has no manifest.
    """
    manifest = existing_manifest(folder)
    records = [manifest.records[name] for name in sorted(manifest.records)]
    checks = [(folder / record.shard, record) for record in records]
    damage = run_unordered(find_damage, checks, workers)
    progress = tqdm(damage, total=len(checks), unit="shard", desc="verifying")
    found = [problem for problem in progress if problem is not None]
    unknown = {path.name for path in folder.glob("*.tar")} - set(manifest.records)
    found += [f"{folder / name}: not in {MANIFEST}" for name in unknown]
    if manifest.unfinished:
        found.append(f"{folder}: {manifest.unfinished} shards are not made yet, repeat the command")
    return records, sorted(found)
