"""Opens captioned images: what training reads, or a folder with a JSON or a table of captions.

From what the user names to a dataset of images, each with all its captions. Every caption is a
query, a repeated one as well; empty ones are none.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from navit_clip.data.annotations.caption_files import of_splits, read_caption_file
from navit_clip.data.annotations.image_files import FilesConfig
from navit_clip.data.annotations.rows import usable_captions
from navit_clip.data.annotations.tables import ARROW, open_table
from navit_clip.data.patterns import expand_shards
from navit_clip.errors import UserError
from navit_clip.evaluation.datasets import EvalDataset, FileDataset, ShardDataset

_TABLES = (".csv", ".tsv", ".jsonl", *ARROW)


def open_captioned(
    data: str | None,
    images: str | None,
    captions: str | None,
    fields: Sequence[str],
    split: str | None,
    image_column: str = "path",
    caption_columns: Sequence[str] = ("caption",),
) -> EvalDataset:
    """Opens captioned shards or what stands for them, or a folder with a file of captions.

    The arguments are fields of `navit_clip.evaluation.retrieval.RetrievalSpec`.

    Raises:
        UserError: If the files do not exist or hold no captioned image.
    """
    if data is not None:
        if images is not None or captions is not None:
            raise UserError("give --data SHARDS, or --images and --captions, not both")
        if split is not None:
            raise UserError("--split goes with a Karpathy file in --captions, not with --data")
        files = FilesConfig(image_column=image_column, caption_columns=tuple(caption_columns))
        return ShardDataset(expand_shards([data], files=files), fields)
    is_table = captions is not None and Path(captions).suffix.lower() in _TABLES
    if captions is None or (images is None and not is_table):
        raise UserError("give --data SHARDS, or both --images FOLDER and --captions FILE.json")
    file = Path(captions)
    folder = Path(images) if images is not None else file.parent
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}: check --images")
    if is_table:
        if split is not None:
            raise UserError(f"{file} has no splits: leave --split out")
        rows = open_table(file, folder, image_column, caption_columns).rows
    else:
        rows = read_caption_file(file)
        if split is None and any(row.split == "test" for row in rows):
            split = "test"
        rows = of_splits(rows, [split] if split is not None else [], file)
    read = [usable_captions(row.captions) for row in rows]
    if not any(usable for usable, _ in read):
        raise UserError(f"no captioned image in {file}")
    paths = [folder / row.name if row.name else None for row in rows]
    if not any(os.path.isfile(path) for path in paths if path):
        raise UserError(
            f"none of the {len(paths):,} images that {file} names is in {folder}: check --images"
        )
    dataset = FileDataset(paths, captions=[usable for usable, _ in read])
    dataset.skip(sum((skipped for _, skipped in read), Counter[str]()))
    return dataset
