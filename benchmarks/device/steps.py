"""Whole training steps at the sizes of NaViT's recipe, through the trainer's own `Stepper`."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch._dynamo.utils import counters

from benchmarks.device.batches import draw_batch
from benchmarks.device.profiling import find_waits, profile_steps
from benchmarks.device.setting import Setting
from navit_clip.data.builders.pairs import PairInputs
from navit_clip.data.config import DataConfig
from navit_clip.distributed import Ranks
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.batch import Batch
from navit_clip.tasks.contrastive import ContrastiveConfig, ContrastiveTask
from navit_clip.training.ema import EMAConfig
from navit_clip.training.late import Uploads
from navit_clip.training.length import RunLength
from navit_clip.training.nonfinite import NonFiniteGuard
from navit_clip.training.optim import OptimConfig
from navit_clip.training.parallel import ParallelConfig
from navit_clip.training.step import PendingStep, Stepper

_SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16), "tiny": (32, 1, 2)}
_VOCABULARY, _CONTEXT = 32000, 24
_BATCHES = 4
# The first of them finds nothing queued for the device: of 6 that is seen in their mean.
_STEPS = 20
_WARM_UPS = 6  # the first compiles, and each batch is seen once
COMPILED = ParallelConfig(compile=True)
COMPILED_BF16 = ParallelConfig(compile=True, bf16_residual=True)
DATA_SHEET_TFLOPS = 989  # of an H100 or H200, dense bfloat16


def build_stepper(
    model: CLIPConfig,
    device: torch.device,
    parallel: ParallelConfig,
    precision: Literal["fp32", "bf16"] = "bf16",
) -> Stepper:
    """The trainer's step with its defaults."""
    if parallel.compile and device.type != "cuda":
        # The path through the compiler's entry points, without the minutes of a C++ compiler.
        torch.compiler.set_stance("force_eager")
    torch.manual_seed(0)
    task = ContrastiveTask(ContrastiveConfig(model=model), DataConfig())
    return Stepper(
        task,
        task.build_model().to(device),
        Ranks(0, 1, device),
        length=RunLength(1_000_000),  # the learning rate hardly changes
        optim=OptimConfig(),
        parallel=parallel,
        ema=EMAConfig(),
        guard=NonFiniteGuard("skip", 1000),
        precision=precision,
    )


def time_steps(
    setting: Setting, stepper: Stepper, batches: Sequence[Batch[PairInputs]], steps: int
) -> tuple[dict[str, Any], Callable[[int], object]]:
    """Steps over these batches in turn, copied to the device as in training.

    Returns:
        Seconds of the first step, milliseconds of a step and of the host in it, pairs per second,
        memory, graphs that were compiled after the first steps; and what takes one step.
    """
    if setting.cuda:
        batches = [batch.pin_memory() for batch in batches]
    losses: list[float] = []
    hosts: list[float] = []
    numbers, uploads = itertools.count(), Uploads(setting.device)
    pending: list[PendingStep] = []

    def take(number: int) -> None:
        # As the trainer does: the step before is read while the device works on this one.
        before = time.perf_counter()
        batch = batches[number % len(batches)]
        announced = stepper.announce([batch.inputs])
        begun = stepper.begin(uploads.copy([batch]), next(numbers), announced)
        hosts.append(time.perf_counter() - before)
        settle()
        pending.append(begun)

    def settle() -> None:
        while pending:
            losses.append(stepper.finish(pending.pop()).loss)

    begin = time.perf_counter()
    take(0)
    setting.synchronize()
    first_s = time.perf_counter() - begin
    for number in range(1, 2 if setting.tiny else _WARM_UPS):
        take(number)
    setting.synchronize()
    graphs = counters["stats"]["unique_graphs"]
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats()
    hosts.clear()
    begin = time.perf_counter()
    for number in range(steps):
        take(number)
    settle()
    setting.synchronize()
    step_s = (time.perf_counter() - begin) / steps
    found = {
        "ms": 1e3 * step_s,
        "host_ms": 1e3 * statistics.median(hosts),
        "pairs_per_s": statistics.mean(len(batch.ids) for batch in batches) / step_s,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if setting.cuda else 0.0,
        "first_s": first_s,
        "graphs": graphs,
        "late_graphs": counters["stats"]["unique_graphs"] - graphs,
        "breaks": sum(counters["graph_break"].values()),
        "loss": [losses[0], losses[-1]],
        "finite": all(map(math.isfinite, losses)),
    }
    return found, take


def _check_step(
    setting: Setting,
    size: str,
    image_tokens: int,
    text_tokens: int,
    parallel: ParallelConfig = COMPILED,
    steps: int = _STEPS,
    kernels: int = 4,
) -> Iterator[dict[str, Any]]:
    """Steps of one size of towers on full budgets; `kernels` of the longest are printed."""
    peak = setting.warm_up()
    if setting.tiny:
        size, image_tokens, text_tokens, steps = "tiny", 512, 64, 2
    encoder = EncoderConfig(*_SIZES[size])
    model = CLIPConfig(
        encoder.width,
        ImageTowerConfig(16, encoder),
        TextTowerConfig(_VOCABULARY, _CONTEXT, encoder),
    )
    stepper = build_stepper(model, setting.device, parallel)
    task = stepper.task
    assert isinstance(task, ContrastiveTask)
    batches = [draw_batch(task, image_tokens, text_tokens, seed) for seed in range(_BATCHES)]
    found, take = time_steps(setting, stepper, batches, steps)
    flops = statistics.mean(task.flops(batch.inputs) for batch in batches)
    tflops = flops / found["ms"] / 1e9
    yield {
        "tflops": tflops,
        "of_product": tflops / peak,
        "of_data_sheet": tflops / DATA_SHEET_TFLOPS,
        **found,
        "details": {"product_tflops": peak, "gflop": flops / 1e9},
    }
    yield {"waits_at": find_waits(setting, take)}
    seen, longest, calls = profile_steps(setting, take)
    yield {**seen, "top": longest[:kernels], "details": {"top": longest, "calls": calls}}


_check_small = partial(_check_step, size="B", image_tokens=16384, text_tokens=4288)
_check_full = partial(_check_step, size="B", image_tokens=65536, text_tokens=17152)
check_step = partial(_check_small, kernels=10)
check_step_eager = partial(_check_small, parallel=ParallelConfig())
check_step_full = partial(_check_full, kernels=10)
check_step_full_bf16 = partial(check_step_full, parallel=COMPILED_BF16)
check_step_large = partial(_check_step, size="L", image_tokens=32768, text_tokens=8576)
check_step_large_bf16 = partial(check_step_large, parallel=COMPILED_BF16)
