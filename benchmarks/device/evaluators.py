"""Short runs with every evaluator, a validation loss, pictures, an EMA and two micro-batches."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.device.setting import Setting
from benchmarks.device.tasks import small_flags, write_small_data

_ROOT = Path(__file__).parents[2]
_CLASSES: dict[str, object] = {"data": "{folder}/zeroshot"}
_PROBES: dict[str, dict[str, object]] = {
    "fewshot": {"train": "{folder}/zeroshot", "shots": [1], "seeds": 1, **_CLASSES},
    "linear": {"train": "{folder}/zeroshot", **_CLASSES},
}
_ZEROSHOT: dict[str, object] = {"templates": "{folder}/templates.txt", **_CLASSES}
_RETRIEVAL: dict[str, object] = {
    "images": "{folder}/retrieval/images",
    "captions": "{folder}/retrieval/captions.json",
}
_SECOND_LIMIT: dict[str, object] = {"max_tokens": [9]}
_CASES: dict[str, dict[str, dict[str, object]]] = {
    "demo": {
        "zeroshot": _ZEROSHOT,
        "retrieval": _RETRIEVAL,
        "cascade": _ZEROSHOT | _SECOND_LIMIT,
        **_PROBES,
    },
    "classify_small": {"classify": _CLASSES, "cascade": _CLASSES | _SECOND_LIMIT, **_PROBES},
    "swin_small": {"classify": _CLASSES, **_PROBES},
    "masked_image_small": {"reconstruct": _CLASSES, **_PROBES},
}


def check_evaluators(setting: Setting) -> Iterator[dict[str, Any]]:
    """Of each recipe the run's exit code, and which of its evaluators logged nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small_data(folder)
        first = {"demo": {"zeroshot": _ZEROSHOT, "retrieval": _RETRIEVAL}}
        for recipe, specs in (first if setting.tiny else _CASES).items():
            run_dir = folder / "runs" / recipe
            done = subprocess.run(
                _command(setting, folder, run_dir, recipe, specs),
                cwd=_ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            log = run_dir / "metrics.jsonl"
            lines = map(json.loads, log.read_text().splitlines() if log.exists() else ())
            keys = {key.split("/")[1] for line in lines for key in line if key.startswith("eval/")}
            missing = sorted(specs.keys() - keys)
            yield {
                recipe: [done.returncode, *missing],
                "details": {recipe: done.stdout[-2000:]},
            }
            if done.returncode or missing:
                raise RuntimeError(f"{recipe}: {done.stdout[-400:]}")


def _command(
    setting: Setting,
    folder: Path,
    run_dir: Path,
    recipe: str,
    specs: dict[str, dict[str, object]],
) -> list[str]:
    evaluators = {kind: {"kind": kind, "every_steps": 2, **spec} for kind, spec in specs.items()}
    train = folder / ("train/00000.tar" if recipe == "demo" else "zeroshot")
    flags = {
        **small_flags(folder, recipe, train),
        "run_dir": run_dir,
        "steps": 3,
        "device": setting.device.type,
        "accumulate": 2,
        "ema.decay": 0.9,
        "log.media_every_steps": 1,
        "eval.evaluators": json.dumps(evaluators).replace("{folder}", str(folder)),
        "eval.workers": 1,
    }
    if recipe == "demo":
        flags |= {"data.validation": folder / "train/00001.tar", "eval.validation.every_steps": 2}
    words = [word for field, value in flags.items() for word in (f"--{field}", str(value))]
    return [sys.executable, "-m", "train", "--config", recipe, *words]
