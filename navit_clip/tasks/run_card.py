"""The model card of a trained model: how it was trained, and what its run's evaluations measured.

Written by a task with its export, on top of what `navit_clip.export.card.write_card` says of every
model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from navit_clip.errors import printable
from navit_clip.export.card import markdown_table, plain_text, write_card
from navit_clip.files import writing

_METRICS = ("loss", "logit_scale", "examples_per_s")


def write_run_card(directory: Path, run_dir: Path) -> None:
    """Writes README.md into a run's exported model, over one that is there.

    Args:
        directory: Of the exported model.
        run_dir: Of the run. The card holds what is found of ``config.yaml``, ``metrics.jsonl``
            (with the last results of evaluations during the training),
            ``eval/zeroshot.json``, ``eval/retrieval.json`` and ``eval/*.png``; pictures are copied
            beside it. Web addresses lose passwords and queries, commands are not repeated.

    Raises:
        UserError: If the model's files cannot be read, or the card cannot be written.
    """
    with writing(f"the model card of {directory}", ValueError, KeyError, TypeError):
        sections = _training(run_dir) + _evaluation(run_dir / "eval", directory)
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
        "schedule": _settings(_group(optim, "schedule"), ("kind", "warmup_steps")),
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
        if name.startswith("eval/") and not name.endswith("/seconds")
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


def _evaluation(folder: Path, directory: Path) -> list[str]:
    """Results at the model's own token limit, and pictures."""
    parts: list[str] = []
    zeroshot, retrieval = (
        _values(_text(folder / f"{name}.json"), json.loads) for name in ("zeroshot", "retrieval")
    )
    if "top1" in zeroshot:
        accuracy = [[f"top-{k}", f"{zeroshot[f'top{k}']:.1%}"] for k in (1, 5)]
        parts += [
            f"Zero-shot classification: {zeroshot.get('images', 0):,} images, "
            f"{zeroshot.get('classes', 0):,} classes, at most {zeroshot.get('max_tokens')} patches "
            "per image.",
            markdown_table(["", "accuracy"], accuracy),
        ]
    if "image_to_text" in retrieval:
        ways = {"image to text": "image_to_text", "text to image": "text_to_image"}
        ks = [k for k in retrieval["image_to_text"] if k.startswith("R@")]
        parts += [
            f"Retrieval: {retrieval.get('images', 0):,} images, {retrieval.get('captions', 0):,} "
            f"captions, at most {retrieval.get('max_tokens')} patches per image.",
            markdown_table(
                ["", *ks],
                [[way, *(f"{retrieval[key][k]:.1%}" for k in ks)] for way, key in ways.items()],
            ),
        ]
    for picture in sorted(folder.glob("*.png")):
        # A link might lead to any file, which an upload would publish.
        if picture.is_symlink() or not picture.is_file():
            continue
        shutil.copyfile(picture, directory / picture.name)
        parts.append(f"![{plain_text(picture.stem)}]({quote(picture.name)})")
    return ["## Evaluation", *parts] if parts else []


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
