"""One CLIP training step beside its peers: pairs per second, operations, memory.

``navit_clip``: packed towers, this project's loss. ``open_clip``: 224×224 squares and 77 slots.
``timm_naflex``: timm's NaFlexViT padded by buckets of like length, and ``vit_pytorch``: its NaViT
with rows under a dense mask, both with open_clip's text tower and on the same patches as ours.
Equal pairs in a step, equal widths and depths, precision and threads; photos and captions are
real, side ~ U(64, 256), never enlarged. With ``drop50`` half of the patches are dropped on average.
The image towers alone, on equal tokens, forward and backward, are ``*_image``; ``ratio_bf16`` is
this project's step in bfloat16 against its own in float32. Ratios are medians of the rounds'.

``peak_share`` is the fraction of a large matrix product's measured FLOP/s that the step reaches,
for its counted matrix products and attention; ``peak_mb`` is the memory above weights and batches.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.command import command
from benchmarks.comparison import WORKLOAD_FLAGS, Variant, compare
from benchmarks.needs import need_projects

OURS, DROP = Variant("navit_clip"), Variant("navit_clip", drop=0.5)
TOWER = Variant("navit_clip", "image")
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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The chosen comparisons, one after the other."""
    chosen = args.only or COMPARISONS
    need_projects(chosen)
    merged: dict[str, Any] = {}
    for name in chosen:
        # This project's results are those beside the first peer, each ratio its comparison's.
        merged = {**compare(OURS, COMPARISONS[name], args), **merged}
    return {"peak_share": merged["navit_clip"]["peak_share"], **merged}


main = command(
    __doc__,
    measure,
    *WORKLOAD_FLAGS,
    only={"nargs": "+", "choices": tuple(COMPARISONS), "help": "default: all"},
)

if __name__ == "__main__":
    main()
