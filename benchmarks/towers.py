"""One tower at a time, forward and backward, beside its peers: pairs per second, memory per token.

The image tower against open_clip's (224×224 squares), timm's NaFlexViT and vit-pytorch's NaViT on
the same patches, and the text tower against open_clip's 77 slots; projects, widths and pairs are
those of `benchmarks.step`, ratios medians of the rounds' ratios. ``--compile`` adds this project's
blocks compiled against the same ones eager, ``ratio_compile_*``.

``real_tokens_per_s`` and ``kb_per_token`` count the tokens that this project's loader makes of the
pairs, whatever a project makes of them. ``kb_per_token`` is what the first pass needs above weights
and batch, the gradients of the weights included.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from benchmarks.command import command
from benchmarks.comparison import WORKLOAD_FLAGS, Part, Variant, compare
from benchmarks.needs import need_projects

PEERS: dict[Part, tuple[str, ...]] = {
    "image": ("open_clip", "timm_naflex", "vit_pytorch"),
    "text": ("open_clip",),
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Each tower of this project and those of the chosen peers that have one of their own."""
    need_projects(args.peers)
    found: dict[str, Any] = {}
    for part, peers in PEERS.items():
        tower = Variant("navit_clip", part)
        ratios = {
            f"ratio_{peer}_{part}": (tower, replace(tower, project=peer))
            for peer in peers
            if peer in args.peers
        }
        if args.compile:
            ratios[f"ratio_compile_{part}"] = (replace(tower, compiled=True), tower)
        found |= compare(tower, ratios, args)
    return found


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
