"""Where a step's time goes on a GPU: launches, waits, and the kernels by kind and by name."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device.setting import Setting

_STEPS = 2
_TOP = 40
# The first that matches is a kernel's kind.
_KINDS = (
    ("compiled", r"^triton_"),
    # Also those of `navit_clip.kernels`.
    ("loss", r"^(statistics|merge|weights)_kernel"),
    ("attention", r"flash|fmha|attention|attn|^(forward|backward)\w*_kernel"),
    ("products", r"gemm|nvjet|cutlass|xmma|cublas|splitk"),
    ("optimiser", r"adam|multi_tensor|foreach|lpnorm"),
    ("copies", r"memcpy|memset|copy|catarray"),
    ("norms", r"layer_norm|gammabeta|welford|rowwise"),
    ("elementwise", r"elementwise|gelu|index|gather|scatter|embedding|reduce|sort"),
)


def profile_steps(
    setting: Setting, take: Callable[[int], object]
) -> tuple[dict[str, Any], list[tuple[float, float, str]], dict[str, float]]:
    """What two steps launch, per step.

    Returns:
        Numbers; milliseconds, launches and name of each of the longest kernels; the host's calls.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * setting.cuda
    with profile(activities=activities) as seen:
        for number in range(_STEPS):
            take(number)
        setting.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in seen.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            # Ranges such as the optimiser's step lie over kernels that are counted themselves.
            if not getattr(event, "is_user_annotation", False):
                times[event.name] += event.device_time_total
                counts[event.name] += 1
        elif event.name.startswith("cu"):
            calls[event.name] += 1
    kinds: Counter[str] = Counter()
    for name, microseconds in times.items():
        kinds[_kind(name)] += microseconds
    per_step = 1e3 * _STEPS
    found = {
        "launches": sum(count for name, count in calls.items() if "Launch" in name) / _STEPS,
        "waits": sum(count for name, count in calls.items() if "Synchronize" in name) / _STEPS,
        "busy_ms": sum(times.values()) / per_step,
        "by_kind_ms": {kind: value / per_step for kind, value in kinds.most_common()},
    }
    top = [
        (value / per_step, counts[name] / _STEPS, _short(name))
        for name, value in times.most_common(_TOP)
    ]
    return found, top, {name: count / _STEPS for name, count in calls.most_common()}


def find_waits(setting: Setting, take: Callable[[int], object]) -> list[str]:
    """The lines at which the host waits for the device within one step, each with how often."""
    if not setting.cuda:
        take(0)
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            take(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "synchroniz" in str(warning.message)
    )
    return [f"{line} ×{count}" for line, count in lines.most_common()]


def _kind(name: str) -> str:
    return next((kind for kind, words in _KINDS if re.search(words, name.lower())), "other")


def _short(name: str) -> str:
    """A kernel's name without what all of them have."""
    name = re.sub(r"^void |at::native::|\(anonymous namespace\)::|pytorch_flash::|std::", "", name)
    return name[:64]
