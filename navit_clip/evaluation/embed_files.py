"""``navit-clip embed``: images or texts to a file of vectors and their ids.

Data is read and embedded as evaluations do it, block by block. Each block is a file beside the
output until the end, found again by a hash of model, settings and content (`cache`): the same
command after a kill continues, and what was embedded otherwise is never taken.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from navit_clip import before_torch  # noqa: F401
from navit_clip.commands import Parser, number
from navit_clip.data.annotations.folders import find_images
from navit_clip.data.annotations.rows import usable_captions
from navit_clip.data.annotations.tables import open_table
from navit_clip.data.image_header import MAX_PIXELS, check_max_pixels
from navit_clip.data.patterns import expand_shards
from navit_clip.distributed import Ranks, failing_at_once, join_ranks
from navit_clip.errors import UserError, one_line_errors, printable
from navit_clip.evaluation.arguments import load_models, model_flags
from navit_clip.evaluation.cache import Cache, ImageBlock
from navit_clip.evaluation.datasets import EvalDataset, FileDataset, UnlabelledShards
from navit_clip.evaluation.embed import (
    SHOWN_SKIPS,
    describe_skips,
    embed_blocks,
    embed_texts,
    fail_together,
)
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.files import atomic_write, reading, replacing, storable, writing

_DESCRIPTION = """\
Embeds images or texts and writes unit vectors, float32, with the id of each. After a kill the same
command continues; under torchrun all ranks share the work and the output is the same."""
_ROW_GROUP = 8192


def main(argv: Sequence[str] | None = None, prog: str = "navit-clip embed") -> None:
    """Embeds."""
    with one_line_errors(prog):
        args = _parser(prog).parse_args(argv)
        with join_ranks(args.device) as ranks, failing_at_once(ranks, prog):
            _run(args, ranks)


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description=_DESCRIPTION, parents=[model_flags()])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", type=Path, help="a folder: all images below it")
    what.add_argument("--table", type=Path, help="a .csv, .tsv, .jsonl or .parquet file of paths")
    what.add_argument("--shards", nargs="+", help="tars, folders of them or patterns")
    what.add_argument("--texts", type=Path, help="a file of texts, one a line")
    parser.add_argument("--image-column", default="path", help="of --table; default: path")
    parser.add_argument("--folder", type=Path, help="that --table's paths begin at; default: its")
    parser.add_argument(
        "--output", type=Path, required=True, help=".npy, with ids in .ids.json, or .parquet"
    )
    parser.add_argument("--max-tokens", type=number(1), help="of an image; default: the model's")
    parser.add_argument(
        "--max-pixels",
        type=number(1),
        default=MAX_PIXELS,
        help=f"images of more are skipped; default: {MAX_PIXELS}",
    )
    return parser


def _run(args: argparse.Namespace, ranks: Ranks) -> None:
    write = _writer(args.output)
    try:
        check_max_pixels(args.max_pixels)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    with writing(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
    cache = Cache(args.output.with_name(f"{args.output.name}.parts"))
    model, _ = load_models(args, ranks)
    embed = _embed_images if args.texts is None else _embed_texts
    ids, vectors, skipped = embed(args, model, ranks, cache)
    if skipped and ranks.is_first:
        print(printable(skipped))
    if not ids:
        raise UserError("nothing was embedded")
    with fail_together(ranks):
        if ranks.is_first:
            with writing(args.output):
                width = write(args.output, ids, vectors)
            shutil.rmtree(cache.directory)
            print(f"{len(ids):,} vectors of {width} numbers: {args.output}")


def _embed_images(
    args: argparse.Namespace, model: Model, ranks: Ranks, cache: Cache
) -> tuple[list[str], Iterator[Tensor], str]:
    """Ids and vectors in the data's order, and what was skipped; vectors are read on demand."""
    setting = model.own_setting
    if args.max_tokens is not None:
        setting = EvalSetting("capped", args.max_tokens)
        model.check(setting)
    dataset, folder = _open(args)
    found = []
    with fail_together(ranks):
        pairs = [(model, setting)]
        for block, (embedded,) in embed_blocks(
            pairs, dataset, ranks, args.workers, cache, args.max_pixels
        ):
            names = [item.name.removeprefix(folder) for item in block.items]
            bad = [(names[place], *why) for place, why in block.skipped.items()]
            ids = [names[row] for row in embedded.rows]
            found.append((block.items[0].key, block.keys[0], embedded.rows, ids, bad))
    found = sorted(ranks.gather(found))

    def vectors() -> Iterator[Tensor]:
        for _, key, rows, _, _ in found:
            block = cache.read(key, ImageBlock.from_file)
            if block is None:
                raise UserError(
                    f"{cache.directory} has lost a part: all hosts must share it; run this again"
                )
            yield block.only(rows).embeddings

    bad = [one for *_, some in found for one in some]
    counts = Counter(reason for _, reason, _ in bad) + Counter(dataset.skipped)
    shown = [f"{reason}: {name}: {detail}" for name, reason, detail in bad[:SHOWN_SKIPS]]
    ids = [name for *_, some, _ in found for name in some]
    return ids, vectors(), describe_skips(counts, shown) if counts else ""


def _embed_texts(
    args: argparse.Namespace, model: Model, ranks: Ranks, cache: Cache
) -> tuple[list[str], Iterator[Tensor], str]:
    if not model.reads_texts:
        raise UserError(f"{model.name} reads no texts: give images")
    with reading(args.texts, ValueError):
        lines = args.texts.read_text(encoding="utf-8-sig").split("\n")
    texts, skipped = usable_captions(lines[:-1] if lines[-1] == "" else lines)
    vectors = embed_texts(model, texts, ranks, cache)
    return list(texts), iter([vectors]), describe_skips(skipped, []) if skipped else ""


def _open(args: argparse.Namespace) -> tuple[EvalDataset, str]:
    """The images, and what their names begin with that ids leave out."""
    if args.shards is not None:
        return UnlabelledShards(expand_shards(args.shards)), ""
    if args.images is not None:
        folder, (names, skipped) = args.images, find_images(args.images)
    else:
        folder, skipped = args.folder or args.table.parent, Counter[str]()
        names = [row.name for row in open_table(args.table, folder, args.image_column, ()).rows]
    dataset = FileDataset([folder / name if name else None for name in names])
    dataset.skip(skipped)
    return dataset, storable(folder / "_").removesuffix("_")


def _writer(output: Path) -> Callable[[Path, Sequence[str], Iterator[Tensor]], int]:
    if output.suffix == ".npy":
        return _write_npy
    if output.suffix != ".parquet":
        raise UserError(f"--output {output}: expected a name that ends in .npy or .parquet")
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(
            "writing Parquet needs pyarrow: pip install 'navit-clip[parquet]'"
        ) from error
    return _write_parquet


def _write_npy(path: Path, ids: Sequence[str], vectors: Iterator[Tensor]) -> int:
    """Writes [n, D] and, before it, its ids; returns D."""
    first = next(vectors)
    width, row = first.shape[1], 0
    with replacing(path) as partial:
        # Row by row into a file: all of them may not fit into memory.
        rows = np.lib.format.open_memmap(partial, "w+", np.float32, (len(ids), width))
        for some in chain([first], vectors):
            rows[row : row + len(some)] = some
            row += len(some)
        rows.flush()
        atomic_write(path.with_suffix(".ids.json"), json.dumps(ids, ensure_ascii=False))
    return width


def _write_parquet(path: Path, ids: Sequence[str], vectors: Iterator[Tensor]) -> int:
    """Writes the columns ``id`` and ``embedding``; returns D."""
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    first = next(vectors)
    width, row, waiting = first.shape[1], 0, [first]
    schema = arrow.schema(
        [("id", arrow.string()), ("embedding", arrow.list_(arrow.float32(), width))]
    )
    with replacing(path) as partial, parquet.ParquetWriter(partial, schema) as file:
        for some in chain(vectors, [None]):
            if some is not None:
                waiting.append(some)
            if some is None or sum(map(len, waiting)) >= _ROW_GROUP:
                rows = torch.cat(waiting).numpy()
                flat = arrow.array(rows.reshape(-1))
                columns = [
                    arrow.array(ids[row : row + len(rows)]),
                    arrow.FixedSizeListArray.from_arrays(flat, width),
                ]
                file.write_table(arrow.table(columns, schema=schema))
                row, waiting = row + len(rows), [first[:0]]
    return width


if __name__ == "__main__":
    main()
