"""One CLIP training step beside its peers: pairs per second, operations, memory.

``navit_clip``: packed towers, this project's loss. ``open_clip``: 224×224 squares and 77 slots.
``timm_naflex``: timm's NaFlexViT padded by buckets of like length, and ``vit_pytorch``: its NaViT
with rows under a dense mask, both with open_clip's text tower and on the same patches as ours.
Equal pairs in a step, equal widths and depths, precision and threads; photos and captions are
real, side ~ U(64, 256), never enlarged. With ``drop50`` half of the patches are dropped on average.
The image towers alone, on equal tokens, forward and backward, are ``*_image``; ``ratio_bf16`` is
this project's step in bfloat16 against its own in float32. Ratios are medians of the rounds'.

``peak_share`` is the share of a large matrix product's measured FLOP/s that the step reaches, for
its counted matrix products and attention; ``peak_mb`` is the memory above weights and batches.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from benchmarks.contest import Course, Entry, hold, ratio
from benchmarks.measure import (
    Precision,
    device_and_precision,
    output_argument,
    precision_argument,
    report,
)
from benchmarks.peers import WIDTHS
from navit_clip.errors import one_line_errors

OURS, DROP = Entry("navit_clip"), Entry("navit_clip", drop=0.5)
TOWER = Entry("navit_clip", "image")
CONTESTS = {
    "open_clip": {
        "ratio_open_clip": (OURS, Entry("open_clip")),
        "ratio_open_clip_drop50": (DROP, Entry("open_clip")),
    },
    "timm_naflex": {
        "ratio_timm_naflex": (TOWER, Entry("timm_naflex", "image")),
        "ratio_step_timm_naflex": (OURS, Entry("timm_naflex")),
    },
    "vit_pytorch": {
        "ratio_vit_pytorch": (TOWER, Entry("vit_pytorch", "image")),
        "ratio_step_vit_pytorch": (OURS, Entry("vit_pytorch")),
    },
    "bf16": {"ratio_bf16": (replace(OURS, precision="bf16"), OURS)},
}


def course_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what all contests can be told."""
    parser = output_argument(description)
    parser.add_argument("--size", default="S/16", choices=tuple(WIDTHS), help="of the towers")
    parser.add_argument("--pairs", type=int, default=64, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds")
    precision_argument(parser)
    parser.add_argument("--shards", nargs="+", default=[], help="tars of photos with captions")
    return parser


def course_of(args: argparse.Namespace) -> tuple[Course, Precision]:
    """What the arguments describe, and the precision of those who have none of their own."""
    device, precision = device_and_precision(args.precision)
    return Course(args.size, args.pairs, device=device, shards=tuple(args.shards)), precision


def compare(contest: str, course: Course, precision: Precision, rounds: int) -> dict[str, Any]:
    """One of `CONTESTS`: the ratios, this project's share of the peak, the entries."""
    ratios = {
        name: pair if contest == "bf16" else tuple(replace(e, precision=precision) for e in pair)
        for name, pair in CONTESTS[contest].items()
    }
    entries = dict.fromkeys(entry for pair in ratios.values() for entry in pair)
    results = hold(list(entries), course, rounds)
    ours = replace(OURS, precision=precision)
    return {
        **{name: ratio(results[own], results[peer]) for name, (own, peer) in ratios.items()},
        "peak_share": results[ours]["peak_share"],
        **{
            e.name + (f"_{e.precision}" if e.precision != precision else ""): result
            for e, result in results.items()
        },
    }


def main() -> None:
    """The command line."""
    parser = course_arguments(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(CONTESTS), help="contests to hold; default: all"
    )
    args = parser.parse_args()
    course, precision = course_of(args)
    with one_line_errors("benchmarks.step"):
        held = args.only or CONTESTS
        found = [compare(contest, course, precision, args.rounds) for contest in held]
    merged: dict[str, Any] = {}
    for result in found:
        # This project's figures are those beside the first peer, each ratio that of its contest.
        merged = {**result, **merged}
    facts = {"size": course.size, "precision": precision, "pairs": course.pairs}
    report({**merged, **facts, "rounds": args.rounds}, args.output)


if __name__ == "__main__":
    main()
