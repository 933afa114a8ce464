"""One tower at a time, forward and backward, beside its peers: pairs per second, memory per token.

The image tower against open_clip's (224×224 squares), timm's NaFlexViT and vit-pytorch's NaViT on
the same patches, and the text tower against open_clip's 77 slots; projects, widths and pairs are
those of `benchmarks.step`, ratios medians of the rounds' ratios. ``--compile`` adds this project's
blocks compiled against the same ones eager, ``ratio_compile_*``.

``real_tokens_per_s`` and ``kb_per_token`` count the tokens that this project's loader makes of the
pairs, whatever a project makes of them. ``kb_per_token`` is what the first pass needs above weights
and batch, the gradients of the weights included. A compiled tower's operations are those of the
eager one, whose kernels can be counted.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from benchmarks.command import command
from benchmarks.comparison import WORKLOAD_FLAGS, Part, Variant, compare, ratio
from benchmarks.needs import need_projects

PEERS: dict[Part, tuple[str, ...]] = {
    "image": ("open_clip", "timm_naflex", "vit_pytorch"),
    "text": ("open_clip",),
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Each tower of this project and those of the chosen peers that have one of their own."""
    need_projects(args.peers)
    ratios: dict[str, float] = {}
    results: dict[str, dict[str, Any]] = {}
    for part, peers in PEERS.items():
        tower = Variant("navit_clip", part, precision=args.precision)
        variants = [replace(tower, project=peer) for peer in peers if peer in args.peers]
        if args.compile:
            variants.insert(0, replace(tower, compiled=True))
        found = compare([tower, *variants], args)
        ours = found[tower]
        for variant in variants:
            other = found[variant]
            if variant.compiled:
                ratios[f"ratio_compile_{part}"] = ratio(other, ours)
                reached = ours["flops_per_pair"] * other["pairs_per_s"] / ours["matmul_peak"]
                other |= {"flops_per_pair": ours["flops_per_pair"], "peak_share": reached}
            else:
                ratios[f"ratio_{variant.project}_{part}"] = ratio(ours, other)
        results |= {variant.name: result for variant, result in found.items()}
    return {**ratios, **results}


main = command(
    __doc__,
    measure,
    *WORKLOAD_FLAGS,
    compile={"action": "store_true", "help": "also this project's, compiled"},
    peers={
        "nargs": "+",
        "choices": PEERS["image"],
        "default": PEERS["image"],
        "help": "default: all",
    },
)

if __name__ == "__main__":
    main()
