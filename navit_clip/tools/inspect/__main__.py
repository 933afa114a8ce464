"""``navit-clip data inspect shards/ --config run.yaml --picture a.png``."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from navit_clip.commands import Parser, number, run_command
from navit_clip.data.mixture import Mixture
from navit_clip.errors import UserError
from navit_clip.files import write_output
from navit_clip.recipes import find_recipe
from navit_clip.tasks.draw_batch import draw_batch
from navit_clip.tools.files_flags import add_files_flags, files_of
from navit_clip.tools.inspect.describe import to_json, to_text
from navit_clip.tools.inspect.packing_efficiency import measure_packing
from navit_clip.tools.inspect.settings import read_settings
from navit_clip.tools.inspect.statistics import collect_statistics

_DESCRIPTION = """Counts what shards hold, what training would skip and why, and how full its
batches would be; draws one batch patch by patch."""


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.tools.inspect"
) -> int:
    """Inspects shards, see `run_command`."""
    parser = Parser(prog=prog, description=_DESCRIPTION)
    parser.add_argument("shards", nargs="*", help="tars, folders, tables; the config's if none")
    add_files_flags(parser)
    parser.add_argument("--config", help="a recipe or a training YAML: also measure its packing")
    parser.add_argument("--tokenizer", help="a SentencePiece model or open_clip; the config's")
    parser.add_argument(
        "--captions", nargs="+", help="caption fields, such as txt json.title; the config's, or all"
    )
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw one batch")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write what is printed")
    parser.add_argument(
        "--max-samples", type=number(1), help="read so many, taken from the front of every shard"
    )
    parser.add_argument("--workers", type=number(1), default=os.cpu_count() or 1, help="processes")
    return run_command(parser, _inspect, argv)


def _inspect(args: argparse.Namespace) -> int:
    if not args.shards and args.config is None:
        raise UserError("no shards given: name tars, folders or patterns, or a --config with them")
    config = find_recipe(args.config) if args.config else None
    files = files_of(args)
    settings = read_settings(config, args.shards, args.captions, args.tokenizer, files)
    data, build = settings.data, settings.build
    mixture = Mixture.find(data)
    statistics = collect_statistics(
        mixture,
        build,
        data.resolution.max_pixels,
        max_samples=args.max_samples,
        workers=args.workers,
    )
    if not statistics.samples:
        raise UserError(
            f"no sample in {len(mixture.shards)} shard(s), the first one {mixture.shards[0]}"
            + "".join(f": {line}" for line in statistics.skip_log[:1])
        )
    packing = None
    if statistics.usable and (args.config or args.picture):
        packing = measure_packing(mixture, build, data, settings.seed, statistics.usable)
    found = to_json(statistics, packing, settings.context_length)
    print(to_text(found))
    if packing and statistics.usable < packing.batches[0].examples:
        print("\nOne batch holds more samples than were read: some are in it several times.")
    if args.output is not None:
        report = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
        write_output(args.output, report, f"--output {args.output}")
    if args.picture and packing:
        title = config.name if config else "the default settings"
        file = io.BytesIO()
        picture = draw_batch(packing.batches[0], packing.samples, title)
        picture.save(file, format="PNG", optimize=True)
        write_output(args.picture, file.getvalue(), f"--picture {args.picture}")
        print(f"\ndrew {args.picture}")
    elif args.picture:
        raise UserError("no usable sample: nothing to draw")
    return 0


if __name__ == "__main__":
    sys.exit(main())
