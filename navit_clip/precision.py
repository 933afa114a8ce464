"""The precision of forward passes: float32, or bfloat16 under autocast with float32 parameters.

One rule for training, evaluation and the Python API, so that they compute the same: bfloat16 on a
GPU that has it, where float32 is several times slower, and float32 on a CPU.
"""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]

_BF16_CAPABILITY = 8  # of CUDA: Ampere and later


def choose_precision(asked: PrecisionChoice, device: torch.device) -> Precision:
    """What ``auto`` means on a device; any other choice is kept."""
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= _BF16_CAPABILITY else "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """A context for forward passes in a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def slow_precision(precision: Precision, device: torch.device) -> str | None:
    """A line of warning where a precision is slow on a device."""
    if precision == "bf16" or device.type != "cuda":
        return None
    return (
        "fp32 on CUDA is several times slower than bf16: its products miss the tensor cores, and "
        "attention takes one call per length"
    )
