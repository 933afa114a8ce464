"""This project's contrastive loss beside open_clip's `ClipLoss`: time and extra memory.

Forward and backward over N pairs of width 512. On the CPU in float32, in one process and in two
gloo ranks that share the cores, this loss also in four where N allows several passes; on CUDA in
one process, in float32 and in bfloat16. `ClipLoss` comes in two forms that differ only between
ranks: `local` (local_loss, gather_with_grad) computes a rank's rows and columns, `gathered` (its
default) the full matrix on every rank.

Every measurement is one forward and backward pass in processes of its own, which have warmed up
on a small problem (CUDA: on the same one). Losses run in turn, so that a machine that slows down
slows all of them. Of the rounds the median of time is reported and the largest memory; over ranks,
the slowest and the largest count. Time runs from a barrier to the end of the backward pass.

Extra memory is what the pass needs on top of the features that go in, gradients included. CPU:
the kernel's high-water mark of the process's resident memory (VmHWM, set back through
/proc/self/clear_refs) after the pass, less the resident memory just before it. A process of its own
matters, since an allocator keeps what earlier passes freed. CUDA: torch.cuda.max_memory_allocated
less what was allocated before. MB are 10^6 bytes, ratios this loss over `ClipLoss` (two ranks: over
the better of its two forms).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from torch import Tensor

from benchmarks.command import command, default_device
from benchmarks.measure import in_processes, in_turn, resident_mb, synchronize
from benchmarks.needs import need_proc
from navit_clip.errors import UserError
from navit_clip.losses.contrastive import softmax_contrastive_loss

WIDTH = 512
SCALE = 100.0
SIZES = {"cpu": (4096, 16384, 65536), "cuda": (16384, 65536, 262144)}
# Beyond this many pairs one of the peer's N×N matrices is larger than most machines' memory.
CPU_PEER_LIMIT = 16384
LEAST = 1024  # fewer pairs take no memory that the resident set would show
OURS, LOCAL, GATHERED = "navit_clip", "local", "gathered"


@dataclass(frozen=True)
class Case:
    """One pass.

    Attributes:
        loss: OURS, LOCAL or GATHERED.
        pairs: Of all ranks.
        ranks: Processes.
        device: ``cpu`` or ``cuda``.
        dtype: Of the features, as torch names it.
    """

    loss: str
    pairs: int
    ranks: int
    device: str
    dtype: str

    def build(self, rank: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The loss as a function of image features, text features and scale."""
        if self.loss == OURS:
            return softmax_contrastive_loss
        local = self.loss == LOCAL
        return ClipLoss(local, gather_with_grad=local, rank=rank, world_size=self.ranks)


class Measured(NamedTuple):
    """Seconds, extra bytes and the mean of the ranks' losses."""

    seconds: float
    extra: float
    loss: float


def features(case: Case, pairs: int, seed: int) -> Tensor:
    """Random unit vectors [pairs / ranks, WIDTH], made in place: what is freed stays resident."""
    generator = torch.Generator(case.device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    made = torch.empty(pairs // case.ranks, WIDTH, device=case.device, dtype=dtype)
    made.normal_(generator=generator)
    made /= made.norm(dim=1, keepdim=True)
    return made.requires_grad_()


def one_pass(case: Case, pairs: int, rank: int) -> Measured:
    """Forward and backward on this rank."""
    loss_of = case.build(rank)
    image, text = (features(case, pairs, 2 * rank + side) for side in range(2))
    scale = torch.tensor(SCALE, device=case.device, requires_grad=True)
    cuda = case.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
        synchronize()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        before = resident_mb("VmRSS") * 2**20
    if case.ranks > 1:
        dist.barrier()
    begin = time.perf_counter()
    loss = loss_of(image, text, scale)
    loss.backward()
    synchronize()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if cuda else resident_mb("VmHWM") * 2**20
    return Measured(seconds, peak - before, loss.item())


def run_rank(case: Case, rank: int, directory: str) -> Measured | None:
    """One process: warms up and passes; None without enough memory on the device."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="open_clip")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // case.ranks))
    if case.ranks > 1:
        store = f"file://{directory}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=case.ranks)
    try:
        one_pass(case, case.pairs if case.device == "cuda" else 512, rank)
        measured = one_pass(case, case.pairs, rank)
    except torch.OutOfMemoryError:
        measured = None
    if case.ranks > 1:
        dist.barrier()  # gloo cannot tell a rank that is done from one that died
        dist.destroy_process_group()
    return measured


def measure_case(case: Case) -> Measured | None:
    """Runs a case in fresh processes; None if the device's memory did not suffice."""
    # Forked from a server that has imported torch and started no thread: fresh, but at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "open_clip.loss"])
    with tempfile.TemporaryDirectory(prefix="benchmark-loss-") as directory:
        ranks = [(case, rank, directory) for rank in range(case.ranks)]
        found = in_processes(context, run_rank, ranks, str(case))
    return _merge(found, max)


def _merge(
    found: Sequence[Measured | None], time_of: Callable[[Sequence[float]], float]
) -> Measured | None:
    """The largest memory and the mean loss of ranks or rounds; None if one had none."""
    complete = [one for one in found if one is not None]
    if len(complete) < len(found):
        return None
    seconds, extra, losses = zip(*complete, strict=True)
    return Measured(time_of(seconds), max(extra), statistics.fmean(losses))


def compare(
    pairs: int, ranks: int, device: str, dtype: str, peers: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Fields of one size: this loss, each peer, and the ratios.

    Raises:
        UserError: If the losses differ.
    """
    cases = {loss: Case(loss, pairs, ranks, device, dtype) for loss in (OURS, *peers)}
    trials = {loss: partial(measure_case, case) for loss, case in cases.items()}
    results = {
        loss: _merge(found, statistics.median)
        for loss, found in in_turn(trials, rounds, warm_up=False).items()
    }
    finished = {loss: found for loss, found in results.items() if found is not None}
    losses = [found.loss for found in finished.values()]
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    if any(not math.isclose(loss, losses[0], rel_tol=tolerance) for loss in losses):
        raise UserError(f"the losses of one batch differ: {losses}")
    ours = finished.pop(OURS, None)
    if ours is None:
        return {"out_of_memory": True}
    fields: dict[str, Any] = {
        "time_ratio": None,
        "memory_ratio": None,
        "extra_mb": ours.extra / 1e6,
        "seconds": ours.seconds,
        "rounds": rounds,
        "peers": dict.fromkeys(peers, "out of memory")
        | {p: {"seconds": r.seconds, "extra_mb": r.extra / 1e6} for p, r in finished.items()},
    }
    if finished:
        fields["time_ratio"] = ours.seconds / min(r.seconds for r in finished.values())
        fields["memory_ratio"] = ours.extra / min(r.extra for r in finished.values())
    elif not peers and pairs > CPU_PEER_LIMIT:
        matrix = pairs**2 * getattr(torch, dtype).itemsize / 1e9
        fields["peer_not_run"] = f"each of its several N x N matrices takes {matrix:.1f} GB"
    return fields


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sizes.

    Raises:
        UserError: If the device or a size cannot be measured.
    """
    device = default_device() if args.device == "auto" else args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device")
    if device == "cpu":
        need_proc()
    if any(size < LEAST or size % 4 for size in args.sizes or ()):
        raise UserError(f"--sizes must be {LEAST} or more, divisible by 4, got {args.sizes}")
    result: dict[str, Any] = {"device": device, "width": WIDTH}
    for pairs in args.sizes or SIZES[device]:
        if device == "cuda":
            fields = compare(pairs, 1, device, "float32", [LOCAL], args.rounds)
            fields["bfloat16"] = compare(pairs, 1, device, "bfloat16", [LOCAL], args.rounds)
        else:
            # Alone, a pass is long enough for its own variation to average out.
            alone = pairs > CPU_PEER_LIMIT
            one, two = ([], []) if alone else ([LOCAL], [LOCAL, GATHERED])
            rounds = 1 if alone else args.rounds
            fields = compare(pairs, 1, device, "float32", one, rounds)
            fields["two_ranks"] = compare(pairs, 2, device, "float32", two, rounds)
            if not alone:
                fields["four_ranks"] = compare(pairs, 4, device, "float32", [], 3 * rounds)
        result[str(pairs)] = fields
    return result


main = command(
    __doc__,
    measure,
    "rounds",
    device={"choices": ("auto", *SIZES), "default": "auto"},
    sizes={"type": int, "nargs": "+", "help": "pairs N, instead of the device's"},
)

if __name__ == "__main__":
    main()
