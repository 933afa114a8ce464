"""The FLOPs meter: what a batch ought to cost, what its machine could do, and memory.

The task counts FLOPs; `FlopsMeter` compares them with the peak of the devices. MFU is PaLM's (arXiv
2204.02311, appendix B): the FLOPs of one forward and one backward pass of the model as it is, per
second, over the machine's peak. What padding, GradCache's extra forward pass and activation
checkpointing cost beyond that counts as time only.
"""

from __future__ import annotations

import os
import re
import time
from functools import cache
from pathlib import Path

import torch

from navit_clip.distributed import Ranks

# Dense TFLOP/s in bf16 (tensor cores, float32 sums) and fp32 (no TF32, PyTorch's default), from
# NVIDIA's data sheets and the white paper of Ada; the first name that matches is taken. Volta has
# no bf16.
_GPUS: tuple[tuple[str, float, float], ...] = (
    (r"\b(H100|H200) NVL\b", 835, 60),
    (r"\bH100 PCIe\b", 756, 51),
    (r"\b(H100|H200|GH200)\b", 989, 67),
    (r"\bA100\b", 312, 19.5),
    (r"\bL40S\b", 362, 91.6),
    (r"\bRTX 4090\b(?! D| Laptop)", 165, 82.6),
    (r"\bV100S?-PCIE\b", 0, 14),
    (r"\bV100-SXM", 0, 15.7),
)
_PRODUCT_SIDE = 1024  # of the matrices that a CPU is measured with
_MEASURING_S = 0.1


def gpu_peak(name: str, precision: str) -> float:
    """FLOP/s of dense matrix products of an NVIDIA GPU, by the name that CUDA reports.

    0 if it is not known; of a GPU that is cut into instances (MIG) it is not.
    """
    if re.search(r"\bMIG\b", name):
        return 0.0
    for pattern, bf16, fp32 in _GPUS:
        if re.search(pattern, name):
            return 1e12 * (bf16 if precision == "bf16" else fp32)
    return 0.0


def cpu_peak(precision: str) -> float:
    """FLOP/s of a matrix product on this process's threads, the best of a tenth of a second.

    Measured once in a process for a number of threads.
    """
    return _measure(precision, torch.get_num_threads())


@cache
def _measure(precision: str, threads: int) -> float:  # which PyTorch takes by itself
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(_PRODUCT_SIDE, _PRODUCT_SIDE, dtype=dtype)
    best, begin = float("inf"), time.perf_counter()
    a @ a  # the first one starts threads and allocates
    while True:
        before = time.perf_counter()
        a @ a
        now = time.perf_counter()
        best = min(best, now - before)
        if now - begin > _MEASURING_S:
            return 2 * _PRODUCT_SIDE**3 / best


def memory_bytes(device: torch.device) -> float:
    """Most memory that tensors held on a GPU since the last call; else what the process holds.

    0 on a CPU whose system does not say.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(peak)
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return float(resident_pages * os.sysconf("SC_PAGE_SIZE"))


class FlopsMeter:
    """Compares the FLOPs of batches with the machine; a collective constructor.

    Attributes:
        peak: FLOP/s of matrix products on the devices of all ranks; 0 if that of any is unknown.
    """

    def __init__(self, precision: str, ranks: Ranks) -> None:
        self.ranks = ranks
        if ranks.device.type == "cuda":
            peak = gpu_peak(torch.cuda.get_device_name(ranks.device), precision)
        else:
            ranks.barrier()  # all at once, as they will compute
            peak = cpu_peak(precision)
        total, unknown = ranks.sum([peak, float(not peak)])
        self.peak = 0.0 if unknown else total

    def describe(self) -> str:
        """The peak, for the line a run begins with."""
        if not self.peak:
            return "peak unknown"
        if self.ranks.device.type == "cuda":
            return f"peak {self.peak / 1e12:,.0f} TFLOP/s"
        return f"matrix products at {self.peak / 1e9:,.0f} GFLOP/s"

    def metrics(self, model_flops_per_s: float) -> dict[str, float]:
        """Metrics of a logged step, from the FLOPs counted over all ranks; every rank calls it.

        Returns:
            ``mfu`` if the peak is known, and ``memory_gb`` of the rank that holds the most, if
            its system tells.
        """
        memory = max(self.ranks.gather([memory_bytes(self.ranks.device) / 1e9]))
        return {
            **({"mfu": model_flops_per_s / self.peak} if self.peak else {}),
            **({"memory_gb": memory} if memory else {}),
        }
