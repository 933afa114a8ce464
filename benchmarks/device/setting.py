"""What every check is given, and how it takes time on a device."""

from __future__ import annotations

import io
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from PIL import Image
from torch import Tensor

from navit_clip.data.shards import add_member

# A GPU spins so long before the calls that are timed, so that all of them are queued when the first
# one begins; else launching, not the kernels, would be measured where kernels are short.
_HEAD_START_CYCLES = 25_000_000
_REPEATS = 12
_WARM_UPS = 3
_CLOCK_S = 0.4  # of work until the clock of an idle card has risen


class NeedsCudaError(Exception):
    """What a check raises on a CPU once all of it that a CPU can do is done."""


@dataclass(frozen=True)
class Setting:
    """How the checks are run.

    Attributes:
        device: Where they compute.
        tiny: At sizes that only show that their code runs.
        shards: Patterns of photos with captions; drawn ones without any.
        out: Folder of what is written.
    """

    device: torch.device
    tiny: bool
    shards: tuple[str, ...]
    out: Path

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def need_cuda(self) -> None:
        """Ends a check on a CPU.

        Raises:
            NeedsCudaError: Without a GPU.
        """
        if not self.cuda:
            raise NeedsCudaError

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        """Normal numbers on the device."""
        made = torch.randn(*shape, device=self.device).to(dtype)
        return made.requires_grad_() if grad else made

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Median of several calls on the device, without what the host takes to launch them."""
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        for _ in range(_WARM_UPS):
            call()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_REPEATS)]
        torch.cuda._sleep(_HEAD_START_CYCLES)
        for begin_mark, end_mark in marks:
            begin_mark.record()
            call()
            end_mark.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in marks)

    def time_both(
        self, name: str, call: Callable[[], Tensor], inputs: list[Tensor], gradient: Tensor
    ) -> dict[str, float]:
        """Microseconds of a forward and of a backward pass, ``NAME_fwd_us`` and ``NAME_bwd_us``."""

        def whole() -> None:
            torch.autograd.grad(call(), inputs, gradient)

        forward = 1e3 * self.milliseconds(call)
        return {
            f"{name}_fwd_us": forward,
            f"{name}_bwd_us": 1e3 * self.milliseconds(whole) - forward,
        }

    def product_rate(self, m: int, k: int, n: int, dtype: torch.dtype) -> float:
        """TFLOP/s of one matrix product [m, k] × [k, n]."""
        a, b = self.random(m, k, dtype=dtype), self.random(k, n, dtype=dtype)
        return 2 * m * k * n / self.milliseconds(lambda: a @ b) / 1e9

    def warm_up(self) -> float:
        """Works until the clocks have risen; TFLOP/s of a large product in bfloat16."""
        side = 8192 if self.cuda else 64
        a = self.random(side, side, dtype=torch.bfloat16)
        end = time.monotonic() + (_CLOCK_S if self.cuda else 0)
        while time.monotonic() < end:
            a @ a
            torch.cuda.synchronize()
        return self.product_rate(side, side, side, torch.bfloat16)

    def photos(self, folder: Path) -> list[str]:
        """The shards, or one of a few drawn pictures in this folder."""
        if self.shards:
            return list(self.shards)
        shard, rng = folder / "drawn.tar", np.random.default_rng(0)
        with tarfile.open(shard, "w") as tar:
            for number in range(24 if self.tiny else 1000):
                rows, columns = rng.integers(200, 400, 2)
                coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                content = io.BytesIO()
                picture = Image.fromarray(coarse).resize((int(columns), int(rows)))
                picture.save(content, "JPEG")
                caption = " ".join(["a picture of many colours"] * int(rng.integers(1, 4)))
                for suffix, data in (("jpg", content.getvalue()), ("txt", caption.encode())):
                    add_member(tar, f"{number:04}.{suffix}", data)
        return [str(shard)]


def extra_memory(setting: Setting, call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of one call, and the MB (10^6) that it needs above what is held before it."""
    setting.synchronize()
    held = 0
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    call()
    setting.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if setting.cuda else 0
    return milliseconds, (peak - held) / 1e6


Run = Callable[[Setting], Iterator[dict[str, Any]]]


def compiled_otherwise(
    setting: Setting, check: Run, settings: dict[str, object]
) -> Iterator[dict[str, Any]]:
    """A check with other settings of the compiler's backend."""
    with torch._inductor.config.patch(settings):
        yield from check(setting)
