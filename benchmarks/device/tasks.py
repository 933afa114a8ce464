"""A few steps of every task and kind of tower, on the device and, in float32, on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.device.profiling import find_waits
from benchmarks.device.setting import Setting
from navit_clip.data.loader import load_batches
from navit_clip.data.patterns import expand_shards
from navit_clip.distributed import Ranks
from navit_clip.packed.batch import Batch
from navit_clip.precision import Precision
from navit_clip.tokenizers.load import build_tokenizer
from navit_clip.tools.shapes.write_shapes import write_shapes
from navit_clip.tools.train_tokenizer import train_tokenizer
from navit_clip.training.config import TrainConfig, parse_config
from navit_clip.training.late import Uploads
from navit_clip.training.parallel import ParallelConfig
from navit_clip.training.trainer import build_stepper

_BATCHES, _EXAMPLES, _TOKENS = 3, 24, 384
# Recipe and what of it is different.
_CASES: dict[str, tuple[str, dict[str, object]]] = {
    "contrastive": ("demo", {}),
    "sigmoid": ("demo", {"task.loss.kind": "sigmoid", "task.model.init_bias": -10}),
    "masked_features": ("demo", {"task.masked.weight": 0.25}),
    "rotary": ("demo", {"task.model.image.rotary": '{"kind": "mixed"}'}),
    "classify": ("classify_small", {}),
    "hierarchical": ("swin_small", {}),
    "masked_image": ("masked_image_small", {}),
    "green_mim": (
        "greenmim_swin_b",
        {"task.model.name": "swin_p", "task.model.decoder.width": 64, "precision": "auto"},
    ),
}


def check_tasks(setting: Setting) -> Iterator[dict[str, Any]]:
    """The largest relative difference of a loss from the CPU's, and where the host waits.

    Differences are those of a few steps in float32 and, compiled, in bfloat16; later steps have the
    weights that the first ones have left.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small_data(folder)
        for case, (recipe, changes) in _CASES.items():
            config = _config(folder, recipe, changes)
            batches = _batches(config)
            slow, _ = _losses(setting, config, batches, torch.device("cpu"), "fp32")
            same, _ = _losses(setting, config, batches, setting.device, "fp32")
            half, waits = _losses(setting, config, batches, setting.device, "bf16")
            yield {
                case: [_difference(slow, losses) for losses in (same, half)],
                "details": {case: {"losses": [slow, same, half], "waits": waits}},
            }


def write_small_data(folder: Path) -> None:
    """Writes two shards, class folders, retrieval data and a tokenizer."""
    write_shapes(
        folder, seed=0, train=96, shard_size=48, zeroshot_per_class=2, retrieval=8, workers=1
    )
    shards = expand_shards([str(folder / "train")])
    train_tokenizer(shards, ["json.captions"], 128, folder / "tokenizer.model", "bpe")


def small_flags(folder: Path, recipe: str, train: Path) -> dict[str, object]:
    """What of a recipe is different on this data, in small batches."""
    return {
        "data.train": train,
        "data.budget.max_examples": _EXAMPLES,
        "data.budget.tokens.image": _TOKENS,
        "optim.schedule.warmup_steps": 1,
        **({"tokenizer.path": folder / "tokenizer.model"} if recipe == "demo" else {}),
    }


def _config(folder: Path, recipe: str, changes: dict[str, object]) -> TrainConfig:
    flags: dict[str, object] = {
        **small_flags(folder, recipe, folder / ("train" if recipe == "demo" else "zeroshot")),
        "run_dir": folder / "run",
        "steps": 1000,
        **changes,
    }
    words = [word for field, value in flags.items() for word in (f"--{field}", str(value))]
    config, _ = parse_config(["--config", recipe, *words])
    return config


def _batches(config: TrainConfig) -> list[Batch[Any]]:
    tokenizer = None if config.tokenizer is None else build_tokenizer(config.tokenizer)
    build = config.task.build(config.data).build_samples(tokenizer, config.seed)
    batches = load_batches(build, replace(config.data, workers=0), config.seed)
    return list(islice(batches, _BATCHES))


def _losses(
    setting: Setting,
    config: TrainConfig,
    batches: list[Batch[Any]],
    device: torch.device,
    precision: Precision,
) -> tuple[list[float], list[str]]:
    compiled = ParallelConfig(compile=precision == "bf16" and setting.cuda)
    config = replace(config, precision=precision, parallel=compiled)
    torch.manual_seed(0)
    task = config.task.build(config.data)
    stepper = build_stepper(config, task, task.build_model(), Ranks(0, 1, device))
    uploads, losses = Uploads(device), list[float]()

    def take(number: int) -> None:
        batch = batches[number]
        batch = batch.pin_memory() if device.type == "cuda" else batch
        announced = stepper.announce([batch.inputs])
        begun = stepper.begin(uploads.copy([batch]), number, announced)
        losses.append(stepper.finish(begun).loss)

    for number in range(_BATCHES):
        take(number)
    return list(losses), find_waits(setting, take) if compiled.compile else []


def _difference(slow: list[float], losses: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(slow, losses, strict=True))
