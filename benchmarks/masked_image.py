"""A step of masked image pretraining: towers that compute visible patches alone, or all of them.

Photos as squares of 224 pixels, three quarters of their patches hidden, the same images for all;
forward and backward pass and AdamW. Each trial is a process of its own, one after another, round
after round.

Plain towers: ``mae`` has MAE's decoder of eight blocks, ``mae_light`` one block; ``full`` computes
mask tokens in the tower and predicts by a linear layer (SimMIM). Hierarchical towers, of which 32
pixels are hidden or visible as one: ``greenmim`` has a decoder of one block, ``simmim`` is as
``full``. ``speed_*`` says how many times as fast as those that compute all a step is, the median of
the rounds' ratios, ``memory_*`` the fraction of their memory above weights, gradients and moments.

    python -m benchmarks.masked_image --size B/16 --images 16
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from benchmarks.command import command, default_device
from benchmarks.measure import flop_counter, in_processes, in_turn, peak_mb, synchronize
from benchmarks.needs import need_proc
from benchmarks.pairs import read_samples
from benchmarks.sizes import HEAD_WIDTH, PATCH, SQUARE, WIDTHS
from navit_clip.architectures import architecture
from navit_clip.commands import number
from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.masked import MaskedBuilder, MaskedSample
from navit_clip.data.drop import DropConfig
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.losses.masked_pixels import masked_pixel_loss
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.masked_image import MaskedImage, MaskedImageConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.masked import MaskedInputs

HIDDEN = 0.75
AGAINST = {"mae": "full", "mae_light": "full", "greenmim": "simmim"}
SWINS = {"XS/16": "swin_p", "S/16": "swin_s", "B/16": "swin_b", "L/16": "swin_l"}
TOWERS = ("plain", "hierarchical")


def models(size: str, towers: Sequence[str] = TOWERS) -> dict[str, MaskedImageConfig]:
    """Variants by name."""
    light, found = EncoderConfig(512, 1, 16), dict[str, MaskedImageConfig]()
    if "plain" in towers:
        width, depth = WIDTHS[size].image, WIDTHS[size].image_depth
        encoder = EncoderConfig(width, depth, width // HEAD_WIDTH)
        image = ImageTowerConfig(PATCH, encoder, pooling="mean")
        found |= {
            "mae": MaskedImageConfig(image),
            "mae_light": MaskedImageConfig(image, light),
            "full": MaskedImageConfig(image, None),
        }
    if "hierarchical" in towers:
        image = architecture(SWINS[size]).image
        found |= {
            "greenmim": MaskedImageConfig(image, light),
            "simmim": MaskedImageConfig(image, None),
        }
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All variants in turn."""
    device = default_device()
    if device == "cpu":
        need_proc()
    spawned = multiprocessing.get_context("spawn")
    variants = models(args.size, args.towers)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.pickle") for name in variants}
        drawn = (args.shards, args.images, variants, files)
        in_processes(spawned, _draw, [drawn], "drawing the images")

        def trial(name: str) -> dict[str, float]:
            values = (variants[name], files[name], device, args.precision, torch.get_num_threads())
            return in_processes(spawned, _trial, [values], name)[0]

        calls = {name: partial(trial, name) for name in variants}
        trials = in_turn(calls, args.rounds, warm_up=False)
    found: dict[str, Any] = {}
    for name, other in AGAINST.items():
        if name not in trials:
            continue
        both = list(zip(trials[name], trials[other], strict=True))
        found[f"speed_{name}"] = statistics.median(b["seconds"] / a["seconds"] for a, b in both)
        found[f"memory_{name}"] = statistics.median(a["peak_mb"] / b["peak_mb"] for a, b in both)
    for name, rounds in trials.items():
        found[name] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        found[name]["rounds"] = [one["seconds"] for one in rounds]
    return {"images": args.images, **found}


def _draw(
    shards: list[str],
    images: int,
    variants: Mapping[str, MaskedImageConfig],
    files: Mapping[str, Path],
) -> None:
    """Writes for each variant its inputs: all images, and the first alone."""
    samples = read_samples(shards)
    for name, config in variants.items():
        patch = config.image.patch_size
        sides = ResolutionConfig(mode="square", max_side=SQUARE, max_tokens=(SQUARE // patch) ** 2)
        drop = DropConfig("fixed", HIDDEN)
        build = MaskedBuilder(sides, drop, patch, 64, 0, full=config.decoder is None)
        drawn: list[MaskedSample] = []
        for sample in samples:
            with suppress(SkipSampleError):
                drawn.append(build(sample, Origin(0, 0, 0, 0)))
            if len(drawn) == images:
                break
        else:
            raise UserError(f"{len(drawn)} photos cannot make a batch of {images}")
        inputs = [build.collate(part, None) for part in (drawn, drawn[:1])]
        files[name].write_bytes(pickle.dumps(inputs))


def _trial(
    config: MaskedImageConfig, file: Path, device: str, precision: str, threads: int
) -> dict[str, float]:
    """One measured step, after one that warms up and one on a single image."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = MaskedImage(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, single = (part.to(device) for part in pickle.loads(file.read_bytes()))

    def step(batch: MaskedInputs) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            pixels_TK = model(batch).pixels_TK
        masked_pixel_loss(pixels_TK, batch.whole.patches, batch.weights).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        synchronize()

    step(single)  # makes gradients and moments, which are not counted
    held_mb = peak_mb(device)
    with flop_counter() as counter:
        step(inputs)
    begin = time.perf_counter()
    step(inputs)
    seconds = time.perf_counter() - begin
    images = inputs.whole.segments.num_examples
    return {
        "seconds": seconds,
        "images_per_s": images / seconds,
        "gflops_per_image": counter.get_total_flops() / images / 1e9,
        "peak_mb": peak_mb(device) - held_mb,
    }


main = command(
    __doc__,
    measure,
    "rounds",
    "size",
    "precision",
    "shards",
    images={"type": number(1), "default": 16, "help": "images a step"},
    towers={"nargs": "+", "choices": TOWERS, "default": TOWERS, "help": "default: both"},
)

if __name__ == "__main__":
    main()
