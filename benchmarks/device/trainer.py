"""The trainer's whole command on photos: stopped by a signal, then the same command again."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.device.setting import Setting

_ROOT = Path(__file__).parents[2]
_LOGGED = ("step", "loss", "examples_per_s", "mfu", "data_wait", "image_padding", "memory_gb")
_TINY = {
    **{
        f"task.model.{tower}.encoder.{field}": value
        for tower in ("image", "text")
        for field, value in (("width", 32), ("depth", 1), ("heads", 2))
    },
    "task.model.embed_dim": 32,
    "data.budget": '{"tokens": {"image": 512, "text": 128}, "max_examples": 16}',
    "data.workers": 1,
    "parallel.compile": "false",
    "log.every_steps": 2,
}


def check_trainer(setting: Setting) -> Iterator[dict[str, Any]]:
    """What the run logs before and after the stop, and how long each command took."""
    steps, stop_lines = (8, 2) if setting.tiny else (60, 6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "run" / "metrics.jsonl"
        command = _command(setting, folder, steps)
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while process.poll() is None and len(_lines(log)) < stop_lines:
            time.sleep(0.1)
        stopped_at = time.perf_counter()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        first, _ = process.communicate()
        first_end = time.perf_counter()
        before = _lines(log)
        again = subprocess.run(
            command,
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        end = time.perf_counter()
        lines = _lines(log)
        exported = (folder / "run" / "model").is_dir()
    after = lines[len(before) :]
    found: dict[str, Any] = {
        "exits": [process.returncode, again.returncode],
        "seconds": [stopped_at - begin, first_end - stopped_at, end - first_end],
        "exported": exported,
        "steps": [[line["step"] for line in part] for part in (before, after)],
    }
    for field in ("examples_per_s", "mfu", "data_wait", "memory_gb"):
        # The first line of each part holds the start of workers and the compilation.
        values = [line[field] for part in (before, after) for line in part[1:] if field in line]
        if values:
            found[field] = statistics.median(values)
    if process.returncode or again.returncode:
        found["tails"] = [text[-400:] for text in (first, again.stdout)]
    logged = [{name: line[name] for name in _LOGGED if name in line} for line in lines]
    details = {"lines": logged, "tails": [first[-3000:], again.stdout[-3000:]]}
    yield {**found, "details": details}


def _command(setting: Setting, folder: Path, steps: int) -> list[str]:
    flags: dict[str, object] = {
        "run_dir": folder / "run",
        "steps": steps,
        "device": setting.device.type,
        "data.train": json.dumps(setting.photos(folder)),
        "tokenizer": '{"kind": "open_clip"}',
        "task.model.text.vocab_size": 49408,
        "data.workers": max(1, (os.cpu_count() or 1) - 2),
        "parallel.compile": "true",
        "log.every_steps": 4,
        "checkpoint.every_steps": steps // 2,
        "optim.schedule.warmup_steps": 2,
        "optim.schedule.cooldown_steps": 0,
        **(_TINY if setting.tiny else {}),
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    recipe = ["--config", "configs/navit_b16_webli.yaml"]
    return [sys.executable, "-m", "train", *recipe, *words]


def _lines(log: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if "\n" in line]
