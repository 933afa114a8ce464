"""Ways of training in processes of their own, made to take the same steps in turn.

One process a way, so that memory is counted for each and no way inherits what another left in an
allocator; in turn, so that a machine that slows down slows all of them. Everything that a data
loader does is done before the clock runs.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import open_clip
import torch
import torch.multiprocessing as multiprocessing

from benchmarks.measure import flop_counter
from benchmarks.pairs import draw_batches, read_samples
from benchmarks.peers import WAYS, WIDTHS, Way
from navit_clip.errors import UserError
from navit_clip.loss import softmax_contrastive_loss

Part = Literal["step", "image", "text"]
Precision = Literal["fp32", "bf16"]
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Entry:
    """One line of a contest.

    Attributes:
        way: A name of `benchmarks.peers.WAYS`.
        part: ``step``: both towers, loss, backward pass and AdamW. ``image`` or ``text``: one
            tower forward and backward.
        drop: Mean token drop.
        compiled: With what the way offers to compile compiled.
    """

    way: str
    part: Part = "step"
    drop: float = 0.0
    compiled: bool = False

    @property
    def name(self) -> str:
        """Unique within a contest."""
        drop = f"_drop{self.drop * 100:.0f}" if self.drop else ""
        part = "" if self.part == "step" else f"_{self.part}"
        return f"{self.way}{part}{drop}{'_compiled' if self.compiled else ''}"

    @property
    def process(self) -> tuple[str, bool]:
        """Entries for which this is equal share a process, which has one model."""
        return self.way, self.compiled


@dataclass(frozen=True)
class Course:
    """What all of them run on.

    Attributes:
        size: A name of `benchmarks.peers.WIDTHS`.
        pairs: Pairs per step.
        batches: Different batches, one a round, in turn.
        precision: ``fp32``, or ``bf16`` by autocast with float32 weights.
        device: ``cpu`` or ``cuda``.
        shards: Tars of photos; none takes those beside the checkout.
        min_side: Smallest side drawn, px of √area.
        max_side: Largest.
    """

    size: str = "S/16"
    pairs: int = 64
    batches: int = 2
    precision: Precision = "fp32"
    device: str = "cpu"
    shards: tuple[str, ...] = ()
    min_side: int = 64
    max_side: int = 256


def hold(entries: Sequence[Entry], course: Course, rounds: int) -> dict[str, dict[str, float]]:
    """Runs all entries in turn, round after round.

    Each has its warm-up on every batch; floating-point operations are counted in the first.

    Args:
        entries: Distinct ones; those of one way share a process.
        course: What they run on.
        rounds: Measured rounds.

    Returns:
        By entry: median ``seconds`` a step, ``pairs_per_s``, ``real_tokens_per_s`` (patches and
        caption tokens of the pairs as this project's loader makes them; of a tower alone its own),
        ``flops_per_pair`` (matrix products and attention, forward and backward; compiled code's
        cannot be counted and are not a number), ``peak_share`` of the matrix product's measured
        peak; by process: ``peak_mb`` above what it held before the first step.

    Raises:
        UserError: If there are no photos, or a way cannot run.
    """
    ways = {process: _Worker(*process, course) for process in {e.process: None for e in entries}}
    try:
        facts = {
            e.name: [ways[e.process].ask(e, b) for b in range(course.batches)] for e in entries
        }
        seconds: dict[str, list[float]] = {entry.name: [] for entry in entries}
        peaks = []
        for round_ in range(rounds):
            peaks.append(matmul_peak(course.device, course.precision))
            for entry in entries:
                fact = ways[entry.process].ask(entry, round_ % course.batches)
                seconds[entry.name].append(fact["seconds"] / fact["real_tokens"])
        return {
            entry.name: _summary(facts[entry.name], seconds[entry.name], max(peaks))
            for entry in entries
        }
    finally:
        for worker in ways.values():
            worker.close()


def matmul_peak(device: str, precision: str) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - begin))
    return best


def _summary(
    facts: Sequence[dict[str, float]], per_token: Sequence[float], peak: float
) -> dict[str, float]:
    """Of the batches' mean size: a round's batch may be larger than another's."""
    tokens = statistics.mean(fact["real_tokens"] for fact in facts)
    flops = statistics.mean(fact["flops"] for fact in facts)
    pairs = facts[0]["pairs"]
    seconds = statistics.median(per_token) * tokens
    return {
        "seconds": seconds,
        "pairs_per_s": pairs / seconds,
        "real_tokens_per_s": tokens / seconds,
        "image_tokens_per_pair": statistics.mean(f["image_tokens"] for f in facts) / pairs,
        "text_tokens_per_pair": statistics.mean(f["text_tokens"] for f in facts) / pairs,
        "flops_per_pair": flops / pairs,
        "peak_share": flops / seconds / peak,
        "matmul_peak": peak,
        "peak_mb": max(fact["peak_mb"] for fact in facts),
        "kb_per_token": max(fact["peak_mb"] * 1024 / fact["real_tokens"] for fact in facts),
    }


class _Worker:
    """A process that has one way's model and takes steps when told."""

    def __init__(self, way: str, compiled: bool, course: Course) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(way, compiled, course, torch.get_num_threads(), theirs),
            daemon=True,
        )
        self._process.start()
        theirs.close()

    def ask(self, entry: Entry, batch: int) -> dict[str, float]:
        """One step of an entry on a batch."""
        try:
            self._pipe.send((entry, batch))
            if not self._pipe.poll(_TIMEOUT_S):
                raise UserError(f"{entry.name} took more than {_TIMEOUT_S} s for one step")
            answer: dict[str, float] | str = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(f"the process of {entry.way} ended, out of memory perhaps") from error
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def close(self) -> None:
        """Ends the process."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _serve(way: str, compiled: bool, course: Course, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        runner = _Runner(way, compiled, course)
        while (asked := pipe.recv()) is not None:
            pipe.send(runner.run(*asked))
    except EOFError:  # the parent was ended
        pass
    except UserError as error:
        pipe.send(str(error))


class _Runner:
    """Inside a process: the model, its optimiser, and the batches."""

    def __init__(self, way: str, compiled: bool, course: Course) -> None:
        torch.manual_seed(0)
        self.name, self.course = way, course
        self.device = torch.device(course.device)
        self.way: Way = WAYS[way](WIDTHS[course.size]).to(self.device)
        self.compiled = compiled
        if compiled:
            self.way.compile_blocks()
        self.optimizer = torch.optim.AdamW(self.way.parameters(), lr=1e-4, fused=True)
        self.peer_loss = open_clip.ClipLoss()
        self.batches: dict[float, list[Any]] = {}
        self.sizes: dict[float, list[tuple[int, int]]] = {}
        self.flops: dict[tuple[str, int], float] = {}

    def run(self, entry: Entry, number: int) -> dict[str, float]:
        """One step, timed; the first time on a batch its operations are counted instead."""
        if entry.drop not in self.batches:
            self._prepare(entry.drop)
        image_tokens, text_tokens = self.sizes[entry.drop][number]
        real_tokens = {"image": image_tokens, "text": text_tokens}
        batch = self.batches[entry.drop][number]
        key = entry.name, number
        before = _memory_mb(self.device, reset=True)
        begin = time.perf_counter()
        if key not in self.flops and not self.compiled:
            with flop_counter() as counter:
                self._step(entry.part, batch)
            self.flops[key] = counter.get_total_flops()
        else:
            # Under the counter nothing is compiled: a compiled way's warm-up goes without it.
            self.flops.setdefault(key, math.nan)
            self._step(entry.part, batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {
            "seconds": time.perf_counter() - begin,
            "flops": self.flops[key],
            "pairs": self.course.pairs,
            "image_tokens": image_tokens,
            "text_tokens": text_tokens,
            "real_tokens": real_tokens.get(entry.part, image_tokens + text_tokens),
            "peak_mb": _memory_mb(self.device) - before,
        }

    def _prepare(self, drop: float) -> None:
        course = self.course
        self.batches[drop], self.sizes[drop] = [], []
        for pairs in draw_batches(
            read_samples(course.shards),
            course.pairs,
            course.batches,
            drop=drop,
            min_side=course.min_side,
            max_side=course.max_side,
        ):
            self.batches[drop].append(self.way.prepare(pairs, self.device))
            image = sum(real.pair.image_length for real in pairs)
            self.sizes[drop].append((image, sum(real.pair.text_length for real in pairs)))

    def _step(self, part: Part, batch: Any) -> None:
        half = self.course.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            if part == "step":
                image_ED, text_ED = self.way(batch)
                scale = self.way.scale.exp()
                loss = (
                    softmax_contrastive_loss(image_ED, text_ED, scale)
                    if self.name == "navit_clip"
                    else self.peer_loss(image_ED, text_ED, scale)
                )
            else:
                embed = self.way.embed_images if part == "image" else self.way.embed_texts
                loss = embed(batch).float().square().sum()
        loss.backward()
        if part == "step":
            self.optimizer.step()
        self.optimizer.zero_grad()


def _memory_mb(device: torch.device, *, reset: bool = False) -> float:
    """The highest so far; on CUDA since the last reset."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
