"""The checks in the order of what they decide, each with its limit of seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.device.attention import check_attention, check_short_attention
from benchmarks.device.loss import check_loss
from benchmarks.device.machine import (
    check_environment,
    check_group,
    check_kernel_tests,
    check_tests,
)
from benchmarks.device.peer import (
    check_ours,
    check_ours_bf16,
    check_peer_compiled,
    check_peer_eager,
)
from benchmarks.device.setting import Setting
from benchmarks.device.steps import (
    check_step,
    check_step_eager,
    check_step_full,
    check_step_full_bf16,
    check_step_large,
    check_step_large_bf16,
)
from benchmarks.device.trainer import check_trainer


@dataclass(frozen=True)
class Check:
    """One check, which runs in a process of its own.

    Attributes:
        name: On the command line and in the result.
        limit_s: Seconds after which its process is killed.
        run: Gives what it finds as it finds it, to be printed, and under ``details`` what is only
            written.
    """

    name: str
    limit_s: float
    run: Callable[[Setting], Iterator[dict[str, Any]]]


CHECKS = (
    Check("environment", 60, check_environment),
    Check("short_attention", 70, check_short_attention),
    Check("step", 90, check_step),
    Check("tests", 60, check_tests),
    Check("loss", 60, check_loss),
    Check("attention", 40, check_attention),
    Check("step_eager", 40, check_step_eager),
    Check("ours", 70, check_ours),
    Check("ours_bf16", 70, check_ours_bf16),
    Check("peer_eager", 40, check_peer_eager),
    Check("trainer", 90, check_trainer),
    Check("step_full", 60, check_step_full),
    Check("step_full_bf16", 60, check_step_full_bf16),
    Check("step_large", 70, check_step_large),
    Check("step_large_bf16", 70, check_step_large_bf16),
    Check("kernel_tests", 90, check_kernel_tests),
    Check("peer_compiled", 120, check_peer_compiled),
    Check("group", 30, check_group),
)
