"""One CLIP training step beside its peers: pairs per second, operations, memory.

``navit_clip``: packed towers, this project's loss. ``open_clip``: 224×224 squares and 77 slots.
``timm_naflex``: timm's NaFlexViT padded by buckets of like length, and ``vit_pytorch``: its NaViT
with rows under a dense mask, both with open_clip's text tower and on the same patches as ours.
Equal pairs in a step, equal widths and depths, precision and threads; photos and captions are
real, side ~ U(64, 256), never enlarged. With ``drop50`` half of the patches are dropped on average.
The image towers alone, on equal tokens, forward and backward, are ``*_image``; ``ratio_bf16`` is
this project's step in bfloat16 against its own in float32. Ratios are medians of the rounds'.

``--open-clip-main SRC`` adds open_clip's main branch beside this project, in float32 and bfloat16:
towers for native resolution on images of one length a batch, that of ours on average, and captions
padded to the batch's longest (`benchmarks.open_clip_main`).

``peak_share`` is the fraction of a large matrix product's measured FLOP/s that the step reaches,
for its counted matrix products and attention; ``peak_mb`` is the memory above weights and batches.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from torch import multiprocessing

from benchmarks.command import command
from benchmarks.comparison import WORKLOAD_FLAGS, Variant, compare
from benchmarks.measure import in_processes
from benchmarks.needs import need_projects
from benchmarks.open_clip_main import need_open_clip_main
from navit_clip.errors import UserError

OURS, DROP = Variant("navit_clip"), Variant("navit_clip", drop=0.5)
TOWER = Variant("navit_clip", "image")
MAIN = "open_clip_main"
COMPARISONS = {
    "open_clip": {
        "ratio_open_clip": (OURS, Variant("open_clip")),
        "ratio_open_clip_drop50": (DROP, Variant("open_clip")),
    },
    "timm_naflex": {
        "ratio_timm_naflex": (TOWER, Variant("timm_naflex", "image")),
        "ratio_step_timm_naflex": (OURS, Variant("timm_naflex")),
    },
    "vit_pytorch": {
        "ratio_vit_pytorch": (TOWER, Variant("vit_pytorch", "image")),
        "ratio_step_vit_pytorch": (OURS, Variant("vit_pytorch")),
    },
    "bf16": {
        "ratio_bf16": (
            Variant("navit_clip", precision="bf16"),
            Variant("navit_clip", precision="fp32"),
        )
    },
}


def _beside_main(source: str) -> dict[str, tuple[Variant, Variant]]:
    main = Variant("open_clip_main", source=source)
    return {
        f"ratio_open_clip_main_{precision}": (
            replace(OURS, precision=precision),
            replace(main, precision=precision),
        )
        for precision in ("fp32", "bf16")
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The chosen comparisons, one after the other."""
    comparisons = dict(COMPARISONS)
    merged: dict[str, Any] = {}
    if args.open_clip_main:
        spawned = multiprocessing.get_context("spawn")
        checked = [(args.open_clip_main,)]
        version = in_processes(spawned, need_open_clip_main, checked, "open_clip's main branch")
        merged["open_clip_main_version"] = version[0]
        comparisons[MAIN] = _beside_main(args.open_clip_main)
    chosen = args.only or comparisons
    if MAIN in chosen and not args.open_clip_main:
        raise UserError(f"--only {MAIN} needs --open-clip-main SRC")
    need_projects(chosen)
    for name in chosen:
        # This project's results are those beside the first peer, each ratio its comparison's.
        merged = {**compare(OURS, comparisons[name], args), **merged}
    return {"peak_share": merged["navit_clip"]["peak_share"], **merged}


_FLAGS: dict[str, dict[str, Any]] = {
    "open-clip-main": {"metavar": "SRC", "help": "src of a checkout of its main branch"},
    "only": {"nargs": "+", "choices": (*COMPARISONS, MAIN), "help": "default: all"},
}
main = command(__doc__, measure, *WORKLOAD_FLAGS, **_FLAGS)

if __name__ == "__main__":
    main()
