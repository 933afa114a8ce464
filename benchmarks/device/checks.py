"""The checks in the order of what they decide, each with its limit of seconds, and predictions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.device.attention import check_attention, check_short_attention
from benchmarks.device.evaluators import check_evaluators
from benchmarks.device.kernels import check_kernels
from benchmarks.device.loss import check_loss
from benchmarks.device.machine import (
    check_ceilings,
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
from benchmarks.device.setting import Run, compiled_otherwise
from benchmarks.device.steps import (
    check_step,
    check_step_eager,
    check_step_full,
    check_step_full_bf16,
    check_step_large,
    check_step_large_bf16,
)
from benchmarks.device.tasks import check_tasks
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
    run: Run


# What the host does between launches is what steps of few tokens wait for.
_cpp_wrapper = partial(compiled_otherwise, settings={"cpp_wrapper": True})
CHECKS = (
    Check("environment", 60, check_environment),
    Check("short_attention", 70, check_short_attention),
    Check("step", 90, check_step),
    Check("tests", 60, check_tests),
    Check("loss", 60, check_loss),
    Check("attention", 40, check_attention),
    Check("step_eager", 40, check_step_eager),
    Check("ours", 110, check_ours),
    Check("ours_bf16", 110, check_ours_bf16),
    Check("peer_eager", 40, check_peer_eager),
    Check("trainer", 150, check_trainer),
    Check("tasks", 200, check_tasks),
    Check("evaluators", 300, check_evaluators),
    Check("step_cpp_wrapper", 120, partial(_cpp_wrapper, check=check_step)),
    Check("step_full", 60, check_step_full),
    Check("step_full_bf16", 60, check_step_full_bf16),
    Check("step_large", 70, check_step_large),
    Check("step_large_bf16", 70, check_step_large_bf16),
    Check("kernel_tests", 90, check_kernel_tests),
    Check("peer_compiled", 120, check_peer_compiled),
    Check("ceilings", 30, check_ceilings),
    Check("kernels", 30, check_kernels),
    Check("group", 30, check_group),
)

# From a roofline of an H100: 600 TFLOP/s on the towers' products, 2.8 TB/s.
PREDICTED: dict[str, float] = {
    "attention.varlen_image_fwd_us": 73,
    "attention.varlen_image_bwd_us": 476,
    "attention.varlen_text_fwd_us": 65,
    "attention.varlen_text_bwd_us": 395,
    "short_attention.short_image_fwd_us": 51,
    "short_attention.short_image_bwd_us": 98,
    "short_attention.short_text_fwd_us": 18,
    "short_attention.short_text_bwd_us": 31,
    "step.ms": 52,
    "step.tflops": 210,
    "step.pairs_per_s": 6000,
    "step_eager.ms": 71,
    "step_eager.tflops": 153,
    "step_full.ms": 117,
    "step_large.ms": 186,
    "loss.32k_fp32.ms": 95,
    "loss.32k_bf16.ms": 9,
    "loss.256k_bf16.ms": 600,
    "loss.32k_open_clip_bf16.ms": 22,
    "loss.32k_open_clip_amp.ms": 34,
    "kernels.clip_ms": 0.6,
    "kernels.adamw_ms": 3.3,
    "ceilings.bf16": 790,
    "ratios.ours_times_peer_eager_all": 2.4,
    "ratios.ours_times_peer_eager_half": 4.0,
}


def compare(checks: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Predicted, measured and their quotient for what has been measured."""
    compared = {}
    for path, predicted in PREDICTED.items():
        value: Any = checks
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            compared[path] = [predicted, value, value / predicted]
    return compared
