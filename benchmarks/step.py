"""One CLIP training step beside its peers: pairs per second, operations, memory.

``navit_clip``: packed towers, this project's loss. ``open_clip``: 224×224 squares and 77 slots.
``timm_naflex``: timm's NaFlexViT padded by buckets of like length, and ``vit_pytorch``: its NaViT
with rows under a dense mask, both with open_clip's text tower and on the same patches as ours.
Equal pairs in a step, equal widths and depths, precision and threads; photos and captions are
real, side ~ U(64, 256), never enlarged. With ``drop50`` half of the patches are dropped on average.
The image towers alone, on equal tokens, forward and backward, are ``*_image``.

``peak_share`` is the share of a large matrix product's measured FLOP/s that the step reaches, for
its counted matrix products and attention; ``peak_mb`` is the memory above weights and batches.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.contest import Course, Entry, Precision, hold
from benchmarks.measure import output_argument, report, versions
from benchmarks.peers import WIDTHS
from navit_clip.errors import one_line_errors

OURS, DROP = Entry("navit_clip"), Entry("navit_clip", drop=0.5)
TOWER = Entry("navit_clip", "image")
# One contest per peer: four projects' memory at once is more than many machines have.
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
}


def course_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what all contests can be told."""
    parser = output_argument(description)
    parser.add_argument("--size", default="S/16", choices=tuple(WIDTHS), help="of the towers")
    parser.add_argument("--pairs", type=int, default=64, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA")
    parser.add_argument("--shards", nargs="+", default=[], help="tars of photos with captions")
    return parser


def course_of(args: argparse.Namespace, **more: Any) -> Course:
    """The course that the arguments describe."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Precision = args.precision or ("bf16" if device == "cuda" else "fp32")
    return Course(
        args.size, args.pairs, precision=precision, device=device, shards=tuple(args.shards), **more
    )


def compare(peer: str, course: Course, rounds: int) -> dict[str, Any]:
    """This project beside one peer: the ratios, the entries, the share of the peak."""
    ratios = CONTESTS[peer]
    entries = list(dict.fromkeys(entry for pair in ratios.values() for entry in pair))
    results = hold(entries, course, rounds)
    return {
        **{
            name: results[ours.name]["pairs_per_s"] / results[theirs.name]["pairs_per_s"]
            for name, (ours, theirs) in ratios.items()
        },
        "peak_share": results[OURS.name]["peak_share"],
        **results,
    }


def main() -> None:
    """The command line."""
    parser = course_arguments(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(CONTESTS), help="peers to run beside; default: all"
    )
    args = parser.parse_args()
    with one_line_errors("benchmarks.step"):
        course = course_of(args)
        found = {peer: compare(peer, course, args.rounds) for peer in args.only or CONTESTS}
    merged: dict[str, Any] = {}
    for result in found.values():
        # This project's figures are those beside the first peer, each ratio that of its contest.
        merged = {**result, **merged}
    facts = {"size": course.size, "precision": course.precision, "pairs": course.pairs}
    report({**merged, **facts, **versions(course.device), "rounds": args.rounds}, args.output)


if __name__ == "__main__":
    main()
