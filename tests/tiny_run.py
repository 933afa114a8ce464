"""A tiny but real training run for the trainer's tests: shards, a tokenizer, a small model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from navit_clip.data.patterns import expand_shards
from navit_clip.tools.shapes.write_shapes import write_shapes
from navit_clip.tools.train_tokenizer import train_tokenizer
from navit_clip.training.__main__ import main


def write_tiny_data(root: Path, train: int = 96, shard_size: int = 24) -> None:
    """Writes shards, held-out sets and a tokenizer under `root`."""
    write_shapes(
        root / "shapes",
        seed=0,
        train=train,
        shard_size=shard_size,
        zeroshot_per_class=1,
        retrieval=24,
        workers=1,
    )
    train_tokenizer(
        expand_shards([str(root / "shapes/train")]),
        ["json.captions"],
        128,
        root / "tok.model",
        "bpe",
    )


def run(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> object:
    """``navit-clip train`` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    try:
        main(prog="train")
    except SystemExit as stop:
        return stop.code
    return 0


def tiny_flags(root: Path, run_dir: Path, steps: int, **overrides: object) -> list[str]:
    """Flags of ``navit-clip train`` for a run of a second or two.

    Args:
        root: Where `write_tiny_data` wrote.
        run_dir: Of the run.
        steps: Of the run.
        overrides: More flags; a double underscore stands for the dot.
    """
    encoder = {"width": 32, "depth": 2, "heads": 2}
    flags: dict[str, object] = {
        "run_dir": run_dir,
        "steps": steps,
        "tokenizer.path": root / "tok.model",
        "task.model.embed_dim": 16,
        "task.model.text.vocab_size": 128,
        "task.model.text.context_length": 32,
        "data.train": root / "shapes/train",
        "data.workers": 0,
        "data.shuffle_buffer": 16,
        "data.look_ahead": 4,
        "data.resolution.min_side": 32,
        "data.resolution.max_side": 64,
        "data.resolution.max_tokens": 16,
        "data.budget.tokens.image": 96,
        "data.budget.tokens.text": 512,
        "data.budget.max_examples": 32,
        "optim.schedule.warmup_steps": 2,
        "log.every_steps": 1,
        "log.media_every_steps": 0,
        "device": "cpu",
    }
    for tower in ("image", "text"):
        for name, value in encoder.items():
            flags[f"task.model.{tower}.encoder.{name}"] = value
    flags.update({name.replace("__", "."): value for name, value in overrides.items()})
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]
