"""The model card of a trained model: how it was trained, and what evaluations measured meanwhile.

Written by a task with its export, on top of what `navit_clip.export.card.write_card` says of every
model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from navit_clip.errors import printable
from navit_clip.export.card import markdown_table, write_card
from navit_clip.files import writing

_METRICS = ("loss", "accuracy", "logit_scale", "examples_per_s")


def write_run_card(directory: Path, run_dir: Path) -> None:
    """Writes README.md into a run's exported model, over one that is there.

    Args:
        directory: Of the exported model.
        run_dir: Of the run. The card holds what is found of ``config.yaml`` and ``metrics.jsonl``,
            with the last results of evaluations during the training. Web addresses lose passwords
            and queries, commands are not repeated.

    Raises:
        UserError: If the model's files cannot be read, or the card cannot be written.
    """
    with writing(f"the model card of {directory}", ValueError, KeyError, TypeError):
        sections = _training(run_dir)
    write_card(directory, run_dir.resolve().name, sections)


def _training(run_dir: Path) -> list[str]:
    """What config.yaml and metrics.jsonl of a run say."""
    config = _values(_text(run_dir / "config.yaml"), yaml.safe_load)
    lines = [_values(line, json.loads) for line in _text(run_dir / "metrics.jsonl").splitlines()]
    metrics = [line for line in lines if "loss" in line]  # the others are of evaluations
    last = metrics[-1] if metrics else {}
    data, optim, task = (_group(config, name) for name in ("data", "optim", "task"))
    resolution, drop = _group(data, "resolution"), _group(data, "drop")
    sides = ("min_side", "max_side") if resolution.get("mode") == "sampled" else ()
    rates = {
        "fixed": ("rate",),
        "beta": ("rate", "max_rate"),
        "resolution": ("low_rate", "high_rate"),
    }
    examples = sum(line.get("examples") or 0 for line in metrics)
    table = {
        "began with": _settings(_group(config, "init"), ("model", "weights")),
        "data": ", ".join(_sources(data)),
        "captions": ", ".join(_captions(data, task)),
        "resolution": _settings(resolution, ("mode", *sides, "max_tokens")),
        "token drop": _settings(drop, ("kind", *rates.get(drop.get("kind", ""), ()))),
        "steps": f"{last.get('step', 0):,}" if metrics else None,
        "examples seen": f"{examples:,.0f}" if examples else None,
        "optimiser": _settings(optim, ("lr", "weight_decay")),
        "schedule": _settings(
            _group(optim, "schedule"), ("kind", "warmup_steps", "warmup_samples")
        ),
        "loss": _group(task, "loss").get("kind"),
        "precision": config.get("precision"),
        "seed": config.get("seed"),
        **{
            f"last {name}": f"{last[name]:.4g}"
            for name in _METRICS
            if isinstance(last.get(name), int | float)
        },
    }
    rows = [[name, value] for name, value in table.items() if value not in (None, "")]
    parts = ["## Training", markdown_table(["", ""], rows)] if rows else []
    evaluated = {
        name.removeprefix("eval/"): [line.get("step"), f"{value:.4g}"]
        for line in lines
        for name, value in line.items()
        if name == "validation/loss" or (name.startswith("eval/") and not name.endswith("/seconds"))
        if isinstance(value, int | float)
    }
    if evaluated:
        rows = [[name, *values] for name, values in evaluated.items()]
        parts += ["Evaluated during the training:", markdown_table(["", "step", ""], rows)]
    return parts


def _captions(data: Mapping[str, Any], task: Mapping[str, Any]) -> list[str]:
    """The caption fields that are read, of each dataset that has its own."""
    named = [(name, _group(source, "captions")) for name, source in _group(data, "mix").items()]
    if not any(own for _, own in named):
        return list(_group(task, "captions"))
    return [f"{name}: {field}" for name, own in named for field in own or _group(task, "captions")]


def _sources(data: Mapping[str, Any]) -> list[str]:
    """The shards as the configuration names them, without what may be secret."""
    mix = _group(data, "mix").items()
    named = [(f"{name}: ", source.get("shards")) for name, source in mix]
    return [
        f"{prefix}{_public(str(spec))}"
        for prefix, specs in named or [("", data.get("train"))]
        for spec in (specs if isinstance(specs, list) else [specs])
        if spec
    ]


def _public(spec: str) -> str:
    if spec.startswith("pipe:"):
        return "the output of a command"
    return f"`{printable(spec)}`"


def _settings(values: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names if values.get(name) is not None)


def _group(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    group = values.get(name)
    return group if isinstance(group, dict) else {}


def _text(path: Path) -> str:
    """Contents of a file, none if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _values(text: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Keys and values; none of what is damaged, or cut short by a kill."""
    try:
        values = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}
