"""One tower at a time, forward and backward, beside its peers: pairs per second, memory per token.

The image tower against open_clip's (224×224 squares), timm's NaFlexViT and vit-pytorch's NaViT on
the same patches, and the text tower against open_clip's 77 slots; ways, widths and pairs are those
of `benchmarks.step`, ratios medians of the rounds' ratios. ``--compile`` adds this project's blocks
compiled against the same ones eager, ``ratio_compile_*``.

``real_tokens_per_s`` and ``kb_per_token`` count the tokens that this project's loader makes of the
pairs, whatever a way makes of them. ``kb_per_token`` is what the first pass needs above weights and
batch, the gradients of the weights included. A compiled tower's operations are those of the
eager one, whose kernels can be counted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.contest import Entry, Part, hold, ratio
from benchmarks.measure import Precision, report
from benchmarks.step import course_arguments, course_of
from navit_clip.errors import one_line_errors

OURS = "navit_clip"
PEERS: dict[Part, tuple[str, ...]] = {
    "image": ("open_clip", "timm_naflex", "vit_pytorch"),
    "text": ("open_clip",),
}


def entries_of(
    part: Part, peers: list[str], precision: Precision, *, compiled: bool
) -> list[Entry]:
    """This project's tower first, then the chosen peers that have one of their own."""
    ours = Entry(OURS, part, precision=precision)
    theirs = [replace(ours, way=peer) for peer in PEERS[part] if peer in peers]
    return [ours, *([replace(ours, compiled=True)] if compiled else []), *theirs]


def main() -> None:
    """The command line."""
    parser = course_arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="also this project's, compiled")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS["image"], default=PEERS["image"], help="default: all"
    )
    args = parser.parse_args()
    ratios: dict[str, float] = {}
    results: dict[str, dict[str, Any]] = {}
    with one_line_errors("benchmarks.towers"):
        course, precision = course_of(args)
        for part in PEERS:
            entries = entries_of(part, args.peers, precision, compiled=args.compile)
            found = hold(entries, course, args.rounds)
            ours = found[entries[0]]
            for entry in entries[1:]:
                other = found[entry]
                if entry.compiled:
                    ratios[f"ratio_compile_{part}"] = ratio(other, ours)
                    share = ours["flops_per_pair"] * other["pairs_per_s"] / ours["matmul_peak"]
                    other |= {"flops_per_pair": ours["flops_per_pair"], "peak_share": share}
                else:
                    ratios[f"ratio_{entry.way}_{part}"] = ratio(ours, other)
            results |= {entry.name: result for entry, result in found.items()}
    report(
        {
            **ratios,
            "size": course.size,
            "precision": precision,
            "pairs": course.pairs,
            "rounds": args.rounds,
            **results,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
