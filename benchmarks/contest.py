"""Ways of training, each in a process of its own, made to take the same steps in turn.

Memory is so counted for each, and no way inherits what another left in an allocator; in turn, so
that a machine that slows down slows all of them. Everything that a data loader does is done before
the clock runs.
"""

from __future__ import annotations

import math
import pickle
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
import torch.multiprocessing as multiprocessing

from benchmarks.measure import Precision, flop_counter
from benchmarks.pairs import RealPair, draw_batches, read_samples
from benchmarks.peers import WAYS, WIDTHS, Way
from navit_clip.errors import UserError
from navit_clip.losses.contrastive import softmax_contrastive_loss

Part = Literal["step", "image", "text"]
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Entry:
    """One line of a contest.

    Attributes:
        way: A name of `benchmarks.peers.WAYS`.
        part: ``step``: both towers, loss, backward pass and AdamW. ``image`` or ``text``: one
            tower forward and backward.
        drop: Mean token drop.
        precision: ``fp32``, or ``bf16`` by autocast with float32 weights.
        compiled: With what the way offers to compile compiled.
    """

    way: str
    part: Part = "step"
    drop: float = 0.0
    precision: Precision = "fp32"
    compiled: bool = False

    @property
    def name(self) -> str:
        """Unique among those of one precision."""
        drop = f"_drop{self.drop * 100:.0f}" if self.drop else ""
        part = "" if self.part == "step" else f"_{self.part}"
        return f"{self.way}{part}{drop}{'_compiled' if self.compiled else ''}"


@dataclass(frozen=True)
class Course:
    """What all of them run on.

    Attributes:
        size: A name of `benchmarks.peers.WIDTHS`.
        pairs: Pairs per step.
        batches: Different batches.
        device: ``cpu`` or ``cuda``.
        shards: Tars of photos; none takes those beside the checkout.
        min_side: Smallest side drawn, px of √area.
        max_side: Largest.
    """

    size: str = "S/16"
    pairs: int = 64
    batches: int = 2
    device: str = "cpu"
    shards: tuple[str, ...] = ()
    min_side: int = 64
    max_side: int = 256


@dataclass(frozen=True)
class _Task:
    """What the process of one turn is given.

    Attributes:
        entry: Who runs.
        course: On what.
        batches: The file of its pairs, from `_draw`.
        threads: Of torch.
    """

    entry: Entry
    course: Course
    batches: Path
    threads: int


def hold(entries: Sequence[Entry], course: Course, rounds: int) -> dict[Entry, dict[str, Any]]:
    """Runs all entries in turn, round after round.

    A turn is a new process, the only one at work and the only one with a model: beside others a way
    that needs much memory is slower than alone (benchmarks/LOG.md). It takes one step on every
    batch to warm up, in which operations are counted, and then one on every batch, measured.

    Args:
        entries: Distinct ones.
        course: What they run on.
        rounds: Measured rounds.

    Returns:
        By entry: ``seconds`` a step, the median of the rounds, and ``rounds``, those of each;
        ``pairs_per_s``, ``real_tokens_per_s`` (patches and caption tokens of the pairs as this
        project's loader makes them; of a tower alone its own), ``flops_per_pair`` (matrix products
        and attention, forward and backward; compiled code's cannot be counted and are not a
        number), ``peak_share``, the median of the rounds' shares of what a large matrix product
        reached in them; ``peak_mb`` above what the process held before its first step.

    Raises:
        UserError: If there are no photos, or a way cannot run.
    """
    drops = {entry.drop for entry in entries}
    threads = torch.get_num_threads()
    turns: dict[Entry, list[list[dict[str, float]]]] = {entry: [] for entry in entries}
    peaks: dict[str, list[float]] = {entry.precision: [] for entry in entries}
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as drawing:
            drawing.submit(_draw, course, drops, Path(folder)).result()
        for _ in range(rounds):
            for precision, found in peaks.items():
                found.append(matmul_peak(course.device, precision))
            for entry in entries:
                task = _Task(entry, course, _batches_file(Path(folder), entry.drop), threads)
                turns[entry].append(_take_turn(task))
    return {entry: _summary(turns[entry], peaks[entry.precision]) for entry in entries}


def _batches_file(folder: Path, drop: float) -> Path:
    return folder / f"{drop}.pickle"


def _draw(course: Course, drops: Iterable[float], folder: Path) -> None:
    """Writes the batches, a file for each mean token drop.

    Drawing holds more than a gigabyte of photos, so it has a process of its own, which has ended
    when the first turn begins.
    """
    samples = read_samples(course.shards)
    for drop in drops:
        batches = draw_batches(
            samples,
            course.pairs,
            course.batches,
            drop=drop,
            min_side=course.min_side,
            max_side=course.max_side,
        )
        with _batches_file(folder, drop).open("wb") as file:
            pickle.dump(list(batches), file)


def _take_turn(task: _Task) -> list[dict[str, float]]:
    """The measured steps of one turn, one on every batch."""
    worker = _Worker(task)
    try:
        for _ in range(2):
            turn = [worker.ask(batch) for batch in range(task.course.batches)]
        return turn
    finally:
        worker.close()


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """How many times as fast, the median of the rounds: what slows a round slows both."""
    rounds = zip(ours["rounds"], theirs["rounds"], strict=True)
    return statistics.median(peer / own for own, peer in rounds)


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


def _summary(turns: Sequence[list[dict[str, float]]], peaks: Sequence[float]) -> dict[str, Any]:
    facts = [fact for turn in turns for fact in turn]
    tokens = statistics.mean(fact["real_tokens"] for fact in facts)
    flops = statistics.mean(fact["flops"] for fact in facts)
    pairs = facts[0]["pairs"]
    rounds = [statistics.mean(fact["seconds"] for fact in turn) for turn in turns]
    seconds = statistics.median(rounds)
    shares = [flops / step / peak for step, peak in zip(rounds, peaks, strict=True)]
    return {
        "seconds": seconds,
        "pairs_per_s": pairs / seconds,
        "real_tokens_per_s": tokens / seconds,
        "image_tokens_per_pair": statistics.mean(f["image_tokens"] for f in facts) / pairs,
        "text_tokens_per_pair": statistics.mean(f["text_tokens"] for f in facts) / pairs,
        "flops_per_pair": flops / pairs,
        "peak_share": statistics.median(shares),
        "matmul_peak": statistics.median(peaks),
        "peak_mb": max(fact["peak_mb"] for fact in facts),
        "kb_per_token": max(fact["peak_mb"] * 1024 / fact["real_tokens"] for fact in facts),
        "rounds": rounds,
    }


class _Worker:
    """A process that has an entry's model and takes steps when told."""

    def __init__(self, task: _Task) -> None:
        self._entry = task.entry
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(task, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, batch: int) -> dict[str, float]:
        """One step on a batch."""
        try:
            self._pipe.send(batch)
            if not self._pipe.poll(_TIMEOUT_S):
                raise UserError(f"{self._entry.name} took more than {_TIMEOUT_S} s for one step")
            answer: dict[str, float] | str = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                f"the process of {self._entry.way} ended, out of memory perhaps"
            ) from error
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


def _serve(task: _Task, pipe: Connection) -> None:
    torch.set_num_threads(task.threads)
    try:
        runner = _Runner(task)
        while (batch := pipe.recv()) is not None:
            pipe.send(runner.run(batch))
    except EOFError:  # the parent was ended
        pass
    except UserError as error:
        pipe.send(str(error))


class _Runner:
    """Inside a process: the model, its optimiser, and the batches."""

    def __init__(self, task: _Task) -> None:
        entry, course = task.entry, task.course
        # Kept: freed pairs would be room within the highest memory before the first step, and the
        # step's own would seem smaller.
        with task.batches.open("rb") as file:
            self.pairs: list[list[RealPair]] = pickle.load(file)
        torch.manual_seed(0)
        self.entry = entry
        self.device = torch.device(course.device)
        self.way: Way = WAYS[entry.way](WIDTHS[course.size]).to(self.device)
        if entry.compiled:
            self.way.compile_blocks()
        self.optimizer = torch.optim.AdamW(self.way.parameters(), lr=1e-4, fused=True)
        self.peer_loss = open_clip.ClipLoss()
        self.batches = [self.way.prepare(pairs, self.device) for pairs in self.pairs]
        self.sizes = [
            {
                "pairs": len(pairs),
                "image_tokens": sum(real.pair.image_length for real in pairs),
                "text_tokens": sum(real.pair.text_length for real in pairs),
            }
            for pairs in self.pairs
        ]
        self.flops: dict[int, float] = {}
        self.held_mb = 0.0

    def run(self, number: int) -> dict[str, float]:
        """One step, timed; the first time on a batch its operations are counted instead."""
        sizes = self.sizes[number]
        if not self.flops:
            self.held_mb = _memory_mb(self.device)
        begin = time.perf_counter()
        if number not in self.flops and not self.entry.compiled:
            with flop_counter() as counter:
                self._step(self.batches[number])
            self.flops[number] = counter.get_total_flops()
        else:
            # Under the counter nothing is compiled: a compiled way's warm-up goes without it.
            self.flops.setdefault(number, math.nan)
            self._step(self.batches[number])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        tokens = sizes["image_tokens"] + sizes["text_tokens"]
        return {
            **sizes,
            "seconds": time.perf_counter() - begin,
            "flops": self.flops[number],
            "real_tokens": sizes.get(f"{self.entry.part}_tokens", tokens),
            "peak_mb": _memory_mb(self.device) - self.held_mb,
        }

    def _step(self, batch: Any) -> None:
        entry = self.entry
        half = entry.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            if entry.part == "step":
                image_ED, text_ED = self.way(batch)
                scale = self.way.scale.exp()
                loss = (
                    softmax_contrastive_loss(image_ED, text_ED, scale)
                    if entry.way == "navit_clip"
                    else self.peer_loss(image_ED, text_ED, scale)
                )
            else:
                embed = self.way.embed_images if entry.part == "image" else self.way.embed_texts
                loss = embed(batch).float().square().sum()
        loss.backward()
        if entry.part == "step":
            self.optimizer.step()
        self.optimizer.zero_grad()


def _memory_mb(device: torch.device) -> float:
    """The highest so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
