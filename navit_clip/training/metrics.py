"""What a run measures of its steps, files of lines, and the line the user watches."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from navit_clip.distributed import Ranks
from navit_clip.errors import printable
from navit_clip.files import atomic_write, reading, writing
from navit_clip.packed.batch import Batch
from navit_clip.training.length import RunLength

_CONTINUES = "; once it can be written, the same command continues from the last checkpoint"
_LONG_S = 15.0  # after which a silent start says what it waits for
_NAMED = 8  # skipped samples at once


class Interval:
    """Counts of one logging interval on one rank.

    Attributes:
        steps: Steps taken.
        since: When the interval began.
    """

    def __init__(self, streams: Sequence[str], datasets: Sequence[str]) -> None:
        self.streams, self.datasets = streams, datasets
        self.steps = 0
        self.since = time.perf_counter()
        names = ["examples", "flops", "before_drop", "slots", "wait", "skipped"]
        names += [f"tokens/{name}" for name in streams] + [f"share/{name}" for name in datasets]
        self._sums: dict[str, float] = dict.fromkeys(names, 0)

    def add(self, batch: Batch[Any], wait: float, flops: float) -> None:
        """Counts one batch, the seconds it was waited for, and what training on it computes."""
        counts, sums = batch.counts, self._sums
        sums["examples"] += counts.examples
        sums["flops"] += flops
        sums["wait"] += wait
        sums["skipped"] += sum(counts.skipped.values())
        for name, stream in counts.streams.items():
            sums[f"tokens/{name}"] += stream.tokens
            sums["before_drop"] += stream.tokens_before_drop
            sums["slots"] += stream.slots
        for name, examples in counts.datasets.items():
            sums[f"share/{name}"] += examples

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as time of the training."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def rates(self, ranks: Ranks) -> dict[str, float]:
        """Metrics of the interval over all ranks; every rank calls it."""
        seconds = time.perf_counter() - self.since
        sums = dict(zip(self._sums, ranks.sum(list(self._sums.values())), strict=True))
        examples = sums["examples"]
        by_stream = {name: sums[f"tokens/{name}"] for name in self.streams}
        tokens = sum(by_stream.values())
        shares = {f"share/{name}": sums[f"share/{name}"] / examples for name in self.datasets}
        return {
            "examples": examples,
            "examples_per_s": examples / seconds,
            "tokens_per_s": tokens / seconds,
            **{f"{name}_tokens_per_s": count / seconds for name, count in by_stream.items()},
            "step_s": seconds / max(1, self.steps),
            "flops": sums["flops"],
            "model_flops_per_s": sums["flops"] / seconds,
            "padding": 1 - tokens / sums["slots"],
            "token_drop": 1 - tokens / sums["before_drop"],
            "data_wait": sums["wait"] / ranks.world_size / seconds,
            "skipped": sums["skipped"],
            **(shares if len(shares) > 1 else {}),
        }


class StepLog:
    """A file of JSON lines that each have a ``step``; a run that goes on appends to it.

    Args:
        path: The file.
        step: The step the run goes on from. Lines past it, from before a restart, are removed, and
            a last line that a kill cut short.

    Attributes:
        resumed: Keys that stand in the lines of that step.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept, self.resumed = [], set[str]()
        with reading(path):
            lines = path.read_bytes().splitlines() if path.exists() else []
        for line in lines:
            try:
                values = json.loads(line)
                if values["step"] <= step:
                    kept.append(line + b"\n")
                if values["step"] == step:
                    self.resumed.update(values)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        self._path = path
        with writing(path):
            atomic_write(path, b"".join(kept))
            self._file = path.open("ab")

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one line; visible at once to whoever follows the file.

        Raises:
            UserError: If the disk does not take it. What is there of the line then is removed when
                the run goes on.
        """
        with writing(self._path, hint=_CONTINUES):
            self._file.write(json.dumps(values).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with suppress(OSError):  # of a line that `write` has reported
            self._file.close()


# tqdm's default leaves 28 of 80 columns to the metrics, and cuts what is longer.
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


class Progress:
    """The bar on a terminal; plain lines at each logged step elsewhere.

    Args:
        length: Of the whole run, in whose unit it is shown.
        step: Steps done before.
        seen: Samples seen before.
        visible: False on all ranks but rank 0.
    """

    def __init__(self, length: RunLength, step: int, seen: int, *, visible: bool) -> None:
        self.length, self.visible = length, visible
        self.first = length.done(step, seen)
        self.since = time.perf_counter()
        plain = not (visible and sys.stderr.isatty())
        self._bar: tqdm[Any] = tqdm(
            total=length.total,
            initial=self.first,
            unit_scale=length.steps is None,
            dynamic_ncols=True,
            bar_format=_BAR,
            disable=plain,
        )
        # Python's own way would write into the bar.
        self._process, self._show_warning = os.getpid(), warnings.showwarning
        warnings.showwarning = self._warn  # type: ignore[assignment]

    def advance(self, samples: int) -> None:
        """One step further, of so many samples."""
        self._bar.update(self.length.done(1, samples))

    def show(self, values: dict[str, float]) -> None:
        """Shows metrics of a logged step."""
        speed = f"loss {values['loss']:.3f}, {values['examples_per_s']:,.0f} examples/s"
        wait = f"data wait {values['data_wait']:.1%}"
        self._bar.set_postfix_str(f"{speed}, {wait}")
        if self.visible and self._bar.disable:
            step, total = int(values["step"]), self.length.total
            done = self.length.done(step, int(values["samples_seen"]))
            place = f"/{total}" if self.length.steps else f", {done:,}/{total:,} samples"
            elapsed = time.perf_counter() - self.since
            left = elapsed / max(1, done - self.first) * max(0, total - done)
            print(
                f"step {step}{place}: {speed}, {values['tokens_per_s']:,.0f} tokens/s, "
                f"padding {values['padding']:.1%}, {wait}, {left / 60:.1f} min left",
                flush=True,
            )

    def log(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.visible:
            tqdm.write("\n".join(map(printable, line.split("\n"))))
            sys.stdout.flush()

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Names what is waited for if what is done inside takes long."""
        timer = threading.Timer(_LONG_S, self.log, [f"still waiting for {what}"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _warn(self, message: Any, category: Any, filename: str, lineno: int, *also: Any) -> None:
        if os.getpid() == self._process:
            self.log(f"warning: {' '.join(str(message).split())}")
        else:  # a data worker, which has no bar
            self._show_warning(message, category, filename, lineno, *also)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        warnings.showwarning = self._show_warning
        self._bar.close()


class SkipReport:
    """Names samples and shards that any rank skipped: the first few, then ever more rarely.

    A source of a million broken images would otherwise drown everything else.
    """

    def __init__(self) -> None:
        self._own, self._lines = Counter[str](), list[str]()  # of this rank, not told yet
        self._total = Counter[str]()
        self._next: dict[str, int] = {}

    def add(self, batch: Batch[Any]) -> None:
        """Notes what was skipped on the way to a batch."""
        counts = batch.counts
        self._own += counts.skipped
        shards = counts.skipped["bad_shard"] > 0  # of thousands of samples
        both = (counts.skip_log, self._lines) if shards else (self._lines, counts.skip_log)
        self._lines = [*both[0], *both[1]][:_NAMED]

    def report(self, ranks: Ranks, progress: Progress) -> dict[str, float]:
        """Prints what all ranks skipped since the last call; metrics of it, on rank 0.

        Every rank calls it.
        """
        found = ranks.gather_first([(self._own, self._lines)])
        self._own, self._lines = Counter(), []
        found.sort(key=lambda one: one[0]["bad_shard"], reverse=True)
        new = sum((counts for counts, _ in found), Counter[str]())
        self._total += new
        if due := [name for name in new if self._total[name] >= self._next.get(name, 1)]:
            for name in due:
                self._next[name] = max(2 * self._next.get(name, 1), self._total[name] + 1)
            for line in [line for _, lines in found for line in lines][:_NAMED]:
                progress.log(f"skipped {line}")
            total = ", ".join(f"{name} {count:,}" for name, count in self._total.most_common())
            progress.log(f"skipped so far: {total}")
        return {f"skipped/{name}": float(count) for name, count in new.items()}
