"""Attention within the windows of a hierarchical tower: each window a row, or groups of windows.

Every stage of Swin-T, plain and shifted, on images of 7×7 units: whole, and with three quarters of
the units of each hidden (GreenMIM). The block's attention with its projections, forward and
backward. ``pairs`` are those of a query and a key for each token, ``padding`` is the fraction of
places without a token, ``saved_mb`` what the backward pass keeps, ``arrange_ms`` how long the host
sorts tokens.
``curve`` is the cost of groups of every size up to three windows' area, for the first stage of one
image with units hidden, by the paper's formula and over that of the best.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.command import command, default_device
from benchmarks.measure import alternate
from navit_clip.architectures import architecture
from navit_clip.commands import number
from navit_clip.models.window_attention import TurnedWindows, WindowAttention
from navit_clip.packed.images import ImagePatches, PackedImages, pack_images
from navit_clip.packed.segments import Segments
from navit_clip.packed.window_groups import attention_cost, best_groups, fill_groups
from navit_clip.packed.windows import Units, arrange

SIDE = 7  # of an image, in units: 224 pixels
VISIBLE = 12


def some_images(count: int, visible: int) -> PackedImages:
    """So many units of each, chosen at random; without pixels."""
    rng = np.random.default_rng(0)
    coords = np.stack(np.divmod(np.arange(SIDE**2), SIDE), axis=1).astype(np.int32)
    whole = ImagePatches(np.zeros((SIDE**2, 3), np.uint8), coords, (SIDE, SIDE))
    return pack_images(
        [whole.kept(np.sort(rng.permutation(SIDE**2)[:visible])) for _ in range(count)]
    )


def saved_mb(attend: Any) -> float:
    """Memory of the tensors that a call keeps for its backward pass, each counted once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = attend()
    del output
    return sum(kept.values()) / 2**20


def measure_stage(
    units: Units, stage: int, window: int, shifted: bool, rounds: int
) -> dict[str, dict[str, float]]:
    """Both ways on the same tokens."""
    device, swin = default_device(), architecture("swin_t").image
    config, merges = swin.hierarchy.stages(swin.encoder)[stage], swin.hierarchy.merges - stage
    attention = WindowAttention(config, window).to(device)
    tokens = 4**merges * len(units.coords_U2)
    x_TC = torch.randn(tokens, config.width, device=device, requires_grad=True)
    segments, found, variants = Segments.singles(tokens, device), {}, {}
    for name, group in (("windows", None), ("groups", partial(best_groups, width=config.width))):
        begin = time.perf_counter()
        windows = arrange(units, merges, window, shifted=shifted, group=group)
        milliseconds = 1e3 * (time.perf_counter() - begin)
        windows = windows.to(device)
        attend = partial(attention, x_TC, segments, TurnedWindows(windows))
        found[name] = {
            "lengths": len(windows.rows),
            "pairs": sum(rows.rows * rows.length**2 for rows in windows.rows) / tokens,
            "padding": 1 - tokens / len(windows.cells),
            "saved_mb": saved_mb(attend),
            "arrange_ms": milliseconds,
        }
        variants[name] = lambda attend=attend: attend().sum().backward()
    for name, seconds in alternate(variants, rounds).items():
        found[name]["ms"] = 1e3 * seconds
    return found


def cost_curve(window: int) -> dict[int, float]:
    """Cost by the size of groups, over the least."""
    swin = architecture("swin_t").image
    (width, *_), merges = [c.width for c in swin.hierarchy.stages(swin.encoder)], 3
    windows = arrange(Units.of(some_images(1, VISIBLE)), merges, window, shifted=False)
    lengths_W = np.repeat(*np.array([(rows.length, rows.rows) for rows in windows.rows]).T)
    sizes = range(int(lengths_W.max()), 3 * window**2 + 1)
    costs = {s: attention_cost(fill_groups(lengths_W, s).count, s, width) for s in sizes}
    return {size: cost / min(costs.values()) for size, cost in costs.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All stages."""
    curve = cost_curve(args.window)
    result: dict[str, Any] = {"best_size": min(curve, key=curve.__getitem__), "curve": curve}
    for name, images in (
        ("whole", some_images(args.images, SIDE**2)),
        ("hidden", some_images(args.images * SIDE**2 // VISIBLE, VISIBLE)),
    ):
        units = Units.of(images)
        result[name] = {
            f"stage {stage + 1}, {'shifted' if shifted else 'plain'}": measure_stage(
                units, stage, args.window, shifted, args.rounds
            )
            for stage in range(4)
            for shifted in (False, True)
        }
    return result


main = command(
    __doc__,
    measure,
    rounds={"default": 5},
    images={"type": number(1), "default": 8, "help": "whole images; four times as many others"},
    window={"type": number(1), "default": 7, "help": "side of a window in tokens"},
)

if __name__ == "__main__":
    main()
