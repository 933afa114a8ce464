"""The configurations of a run: what a restart changed, what it may not, and those of before.

Every checkpoint holds the configuration of the command that wrote it. A command that continues from
it is compared with that; config.yaml in the run's directory is the newest, and configs/ has each
under the step from which on it was used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from navit_clip.errors import UserError
from navit_clip.files import reading, write_output
from navit_clip.training.length import RunLength
from navit_clip.training.optimizers import ADAMW

_NAME = re.compile(r"^step-(\d{8})\.yaml$")
_UNSET = "unset"
_LENGTHS = {"steps", "samples", "epochs", "data.samples"}


def check_changes(
    before: Path, resolved: str, start: int, seen: int, length: RunLength
) -> list[str]:
    """What differs from the configuration of a checkpoint, such as "optim.lr 0.001 → 0.01".

    Args:
        before: Configuration of the checkpoint, YAML.
        resolved: That of the command which continues from it, likewise.
        start: Step of the checkpoint.
        seen: Samples that were seen before it.
        length: Of the whole run, as the command says.

    Raises:
        UserError: If a run cannot go on so: with fewer steps than are done, another task, another
            architecture or other adapters, whose weights may well have the same shapes, or another
            optimiser.
    """
    if length.samples is not None and not seen:
        raise UserError(f"{before.parent} does not tell how many samples were seen: give steps")
    with reading(before, yaml.YAMLError):
        old = flat(yaml.safe_load(before.read_text()))
    old.setdefault("optim.name", ADAMW)  # of runs begun before there were others
    new = flat(yaml.safe_load(resolved))
    changes = {}
    for name in dict.fromkeys([*old, *new]):
        there, here = old.get(name, _UNSET), new.get(name, _UNSET)
        if there == here or name == "run_dir":
            continue
        if name in ("task.kind", "optim.name") or name.startswith(("task.model.", "task.lora.")):
            raise UserError(
                f"cannot resume from {before.parent}: {name} is {here}, was {there}: keep it, or "
                "use another run_dir"
            )
        changes[name] = f"{name} {there} → {here}"
    done, unit = length.done(start, seen), "steps" if length.steps else "samples"
    # Unchanged it is as long as it was to be: the last step may have gone past that.
    if length.total < done and not _LENGTHS.isdisjoint(changes):
        raise UserError(
            f"{unit}={length.total}, but the run in {before.parents[2]} has done {done}: "
            "make it longer, or use another run_dir"
        )
    return list(changes.values())


def keep_config(run_dir: Path, resolved: str, start: int) -> None:
    """Writes config.yaml, and under configs/ a copy named by the step from which on it holds.

    Those of later steps, which are to be done again, are removed as their lines of metrics.jsonl
    are.

    Raises:
        UserError: If the disk does not take it.
    """
    folder, where = run_dir / "configs", f"run_dir {run_dir}"
    kept = kept_configs(run_dir)
    for step, path in kept.items():
        if step > start:
            path.unlink(missing_ok=True)
    newest = max((step for step in kept if step <= start), default=None)
    if newest is None or kept[newest].read_text() != resolved:
        write_output(folder / f"step-{start:08d}.yaml", resolved, where)
    write_output(run_dir / "config.yaml", resolved, where)


def kept_configs(run_dir: Path) -> dict[int, Path]:
    """Files of a run's configurations by the step from which on each holds."""
    folder = run_dir / "configs"
    return {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.match(path.name))
    }


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Values of a configuration by dotted names."""
    if not isinstance(values, dict) or not values:
        return {name: values}
    return dict(_parts(values, name))


def _parts(values: dict[Any, Any], name: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield from flat(value, f"{name}.{key}" if name else str(key)).items()
