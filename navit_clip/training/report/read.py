"""What there is of a run directory; a run that is empty, going on or damaged gives what it has."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from navit_clip.checkpoints.lock import LOCK_FILE, SILENT_S
from navit_clip.errors import UserError
from navit_clip.evaluation.registry import EVALUATORS, read_result
from navit_clip.evaluation.results import EvalResult, Metric
from navit_clip.files import reading
from navit_clip.training.history import flat, kept_configs

_FILES = ("config.yaml", "metrics.jsonl")
_PICTURE = "data:image/webp;base64,"
_DRAWN = 1e100  # a chart of larger values has no limits
_UNNAMED = Metric("", is_headline=True, is_fraction=False)


@dataclass(frozen=True)
class Run:
    """A run as its directory tells of it.

    Attributes:
        name: Of the directory.
        directory: As it was named.
        config: The newest configuration, resolved.
        lines: Those of metrics.jsonl in order; a value that was no number is NaN.
        changes: What was changed on the way, by the step from which on it holds.
        results: Evaluations of its model that lie in eval/, by file name.
        facts: What the trainer noted of model, machine and data.
        media: Pictures and tables of examples, by name; the newest of each.
        notes: What could not be read.
    """

    name: str
    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, float]] = field(default_factory=list)
    changes: dict[int, list[str]] = field(default_factory=dict)
    results: dict[str, EvalResult] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    media: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def keys(self) -> list[str]:
        """All that was logged, in the order of the file."""
        return list(dict.fromkeys(key for line in self.lines for key in line))

    def curve(self, key: str, axis: str) -> list[tuple[float, float]]:
        """Points of a metric over an axis, where both are known and can be drawn."""
        both = ((line.get(axis, math.nan), line.get(key, math.nan)) for line in self.lines)
        return [(x, y) for x, y in both if abs(x) < _DRAWN and abs(y) < _DRAWN]

    def last(self, key: str) -> float:
        """The last value of a metric, NaN without any."""
        return next((line[key] for line in reversed(self.lines) if key in line), math.nan)

    def median(self, key: str) -> float:
        """Of a metric's values, NaN without any."""
        values = sorted(y for _, y in self.curve(key, "step"))
        return values[len(values) // 2] if values else math.nan

    @property
    def hours(self) -> float:
        """Time of the training; evaluations count as none."""
        steps = self.curve("step_s", "step")
        before = [0.0, *(step for step, _ in steps)]
        return sum(s * max(0, at - b) for (at, s), b in zip(steps, before, strict=False)) / 3600

    @property
    def state(self) -> str:
        """Where it stands, in words."""
        step, seen = self.last("step"), self.last("samples_seen")
        if math.isnan(step):
            return "no step logged yet"
        steps, samples = self.config.get("steps"), self.config.get("samples")
        over = (isinstance(steps, int) and step >= steps) or (
            isinstance(samples, int | float) and seen >= samples
        )
        of = f" of {steps:,}" if isinstance(steps, int) else ""
        try:
            alive = time.time() - (self.directory / LOCK_FILE).stat().st_mtime < SILENT_S
        except OSError:
            alive = False
        return f"{'running' if alive else 'finished' if over else 'stopped'}, step {step:,.0f}{of}"

    def evaluated(self) -> Iterator[tuple[str, str, Metric]]:
        """Metrics of evaluations at the model's own setting: key, evaluator's name, what it is."""
        named = self.config.get("eval") or {}
        named = named.get("evaluators") or {} if isinstance(named, dict) else {}
        for key in self.keys:
            if not key.startswith("eval/") or key.endswith("/seconds"):
                continue
            name, _, rest = key.removeprefix("eval/").partition("/")
            spec = named.get(name) if isinstance(named, dict) else None
            kind = EVALUATORS.get(str(spec.get("kind"))) if isinstance(spec, dict) else None
            if kind is None:
                yield key, f"{name} {rest}", _UNNAMED
            elif rest in kind.METRICS:
                yield key, name, kind.METRICS[rest]


def read_run(directory: Path) -> Run:
    """Reads a run directory.

    Raises:
        UserError: If it holds no run at all.
    """
    if not any((directory / name).is_file() for name in _FILES):
        found = "no such folder" if not directory.is_dir() else f"neither {' nor '.join(_FILES)}"
        raise UserError(f"no run in {directory}: {found}; name a training's run_dir")
    notes: list[str] = []
    config = _read(directory / "config.yaml", yaml.safe_load, notes)
    run = Run(directory.resolve().name, directory, config, notes=notes)
    run.lines.extend(_lines(directory / "metrics.jsonl", notes))
    run.changes.update(_changes(directory))
    run.facts.update(_read(directory / "facts.json", json.loads, notes))
    for path in sorted((directory / "media").glob("*.json")):
        if (content := _read(path, json.loads, notes)) and _is_media(content):
            run.media[path.stem] = content
    for path in sorted((directory / "eval").glob("*.json")):
        content = _read(path, json.loads, notes)
        if "step" in content or not content:  # of the training itself: in metrics.jsonl too
            continue
        try:
            run.results[path.name] = read_result(content)
        except UserError as error:
            notes.append(f"{path.name}: {error}")
    return run


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Reads several, which get names of their own.

    Raises:
        UserError: If one of them holds no run.
    """
    runs = [read_run(directory) for directory in directories]
    names = [run.name for run in runs]
    for number, run in enumerate(runs):
        if names.count(run.name) > 1:
            runs[number] = replace(run, name=str(run.directory))
    return runs


def _read(path: Path, parse: Any, notes: list[str]) -> dict[str, Any]:
    """Keys and values of a file; none, and a note, if it is missing or damaged."""
    if not path.exists():
        return {}
    try:
        with reading(path.name, ValueError, yaml.YAMLError):
            values = parse(path.read_text(encoding="utf-8"))
            if isinstance(values, dict):
                return values
            raise ValueError("no keys and values in it")
    except UserError as error:
        notes.append(str(error))
    return {}


def _is_media(content: dict[str, Any]) -> bool:
    """Whether it is as `navit_clip.training.loggers` wrote it."""
    try:
        float(content["step"])
        if "counts" in content:
            counts, edges = content["counts"], content["edges"]
            drawn = all(abs(value) < _DRAWN for value in counts + edges)
            return drawn and len(edges) == len(counts) + 1 > 1
        pictures = [content["picture"]] if "picture" in content else []
        for row in content["rows"] if not pictures else ():
            row["texts"].items()
            pictures += [row["picture"]] if row["picture"] else []
        return all(picture.startswith(_PICTURE) for picture in pictures)
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


def _lines(path: Path, notes: list[str]) -> list[dict[str, float]]:
    """The lines of a file of metrics; a last one may be cut short by a kill, or on its way."""
    lines, damaged = [], 0
    try:
        with reading(path.name):
            content = path.read_bytes() if path.exists() else b""
    except UserError as error:
        notes.append(str(error))
        content = b""
    *whole, _ = content.split(b"\n")
    for line in whole:
        try:
            values = {k: math.nan if v is None else float(v) for k, v in json.loads(line).items()}
            if not math.isfinite(values["step"]):
                raise ValueError("no step")
            lines.append(values)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            damaged += 1
    if damaged:
        notes.append(f"{path.name}: {damaged} damaged line(s) left out")
    return lines


def _changes(directory: Path) -> dict[int, list[str]]:
    """What each configuration of a run changed of the one before."""
    changes: dict[int, list[str]] = {}
    before: dict[str, Any] | None = None
    for step, path in sorted(kept_configs(directory).items()):
        now = flat(_read(path, yaml.safe_load, []))
        if before is not None:
            differing = [k for k in {**before, **now} if before.get(k) != now.get(k)]
            changes[step] = [f"{k} {before.get(k)} → {now.get(k)}" for k in differing]
        before = now
    return changes
