"""Trains and evaluates what is missing of a study; killed anywhere, the same command goes on.

Given several times at once, on one machine, each process takes runs that no other has. A run is
trained by the trainer from the ``train.yaml`` in its folder, which can be given to
``navit-clip train`` by hand as well, and resumes as every run does. Once its ``result.json`` is
there it is done, and its checkpoints are removed. A run that another study in the same folder has
done, of the same recipe and with the same tests, is taken from there.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.command import describe_run
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.files import locked, reading, write_output
from navit_clip.training.config import parse_config
from navit_clip.training.trainer import train
from studies.budget import Length, length_of
from studies.scores import load_for_scores, score
from studies.study import Run, Study, merged, trials

RESULT, RECIPE = "result.json", "train.yaml"
_SAVES = 4  # checkpoints for each that is evaluated
_POLL_S = 5.0  # between looks at what other processes have done


def run_study(study: Study, out: Path, ranks: Ranks, workers: int) -> None:
    """Runs all that has no result yet; `out` gets the study's data and a folder for each run.

    Raises:
        UserError: If data is missing or a recipe is wrong; or the study has changed since.
    """
    with locked(out.parent):
        _prepare(study)
    while todo := [run for run in _ready(study, out) if read_result(study, run, out) is None]:
        # After each the list is another one: rates have been chosen, others have done theirs.
        if not any(_complete(study, run, out, ranks, workers) for run in todo):
            time.sleep(_POLL_S)
    _say(f"all runs of the study are in {out / 'runs'}")


def _prepare(study: Study) -> None:
    """Makes the data that is missing.

    Raises:
        UserError: If a command fails.
    """
    for made, command in study.prepare.items():
        if not Path(made).exists():
            _say(f"python -m {command}")
            words = [sys.executable, "-m", *shlex.split(command)]
            if subprocess.run(words, check=False).returncode:
                raise UserError(f"python -m {command} failed: see above")


def _ready(study: Study, out: Path) -> Iterator[Run]:
    """The trials of rates, and the other seeds of the arms whose rate is chosen."""
    yield from trials(study)
    for seed in study.seeds[1:]:
        for arm in study.arms:
            tried = (Run(arm, lr, study.seeds[0]) for lr in study.lrs)
            if all(read_result(study, run, out) is not None for run in tried):
                yield Run(arm, best_lr(study, arm, out), seed)


def read_result(study: Study, run: Run, out: Path) -> dict[str, Any] | None:
    """What a run found, None if it is not done.

    Raises:
        UserError: If it is damaged, or was done before the study had all of its tests.
    """
    path = out / "runs" / run.name / RESULT
    if not path.exists():
        return None
    hint = "; delete it, and run the study again"
    with reading(path, ValueError, KeyError, TypeError, hint=hint):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lacking = study.all_tests.keys() - result["points"][-1]["scores"].keys()
    if lacking:
        raise UserError(f"{path} lacks the tests {', '.join(lacking)}: name another --out")
    return result


def best_lr(study: Study, arm: str, out: Path) -> float:
    """The learning rate of an arm with the best validation, the lowest of equal ones.

    Raises:
        UserError: If one of its trials has not been run.
    """
    return max(
        sorted(study.lrs), key=lambda lr: validated(study, Run(arm, lr, study.seeds[0]), out)
    )


def validated(study: Study, run: Run, out: Path) -> float:
    """Fraction of right answers in the validation, mean of both ways and of several validations.

    Raises:
        UserError: If the run is not done.
    """
    if (result := read_result(study, run, out)) is None:
        raise UserError(f"{run.name} is not done: run the study first")
    scores = [result["points"][-1]["scores"][name] for name in study.validations]
    right = study.right_within
    return statistics.fmean(
        statistics.fmean(
            sum(rank < right for rank in way) / len(way)
            for way in found["ranks"][found["own"]].values()
        )
        for found in scores
    )


def _complete(study: Study, run: Run, out: Path, ranks: Ranks, workers: int) -> bool:
    """Makes a run's result; whether no other process is at it."""
    with locked(out / "runs" / run.name, wait=False) as free:
        if free and read_result(study, run, out) is None:
            _train_and_score(study, run, out, ranks, workers)
        return free


def _train_and_score(study: Study, run: Run, out: Path, ranks: Ranks, workers: int) -> None:
    folder = out / "runs" / run.name
    with locked(out / "arms"):
        length, points = _length(study, run.arm, out)
    _say(f"{run.name}: {length.steps} steps, about {length.images:,} images")
    path = _write_recipe(study, run, folder, length)
    if (done := _done_elsewhere(study, path)) is not None:
        _say(f"{run.name}: the same as {done['arm']} of {done['study']}")
        write_output(folder / RESULT, json.dumps({**done, "arm": run.arm}) + "\n")
        shutil.rmtree(
            folder / "checkpoints", ignore_errors=True
        )  # of a start before that one's end
        return
    config, resolved = parse_config(["--config", str(path)])
    train(config, resolved, ranks)
    plans, validations, found = study.evaluators().plans(), study.validations, []
    for number, step in enumerate(points, start=1):
        last = number == len(points)
        model, own = load_for_scores(folder, step, ranks.device)
        # Rates are chosen by the end, and other settings than its own are of interest there.
        scores = {
            name: score(plan, model, own, ranks, workers, only_own=not last or name in validations)
            for name, plan in plans.items()
            if last or name not in validations
        }
        found.append({**_spent(folder, step), "scores": scores})
        _say(f"{run.name}: evaluated step {step}")
    made = describe_run()
    made.pop("command")
    result = {
        "study": out.name,
        "arm": run.arm,
        "lr": run.lr,
        "seed": run.seed,
        "tests": study.all_tests,
        "points": found,
        "made": made,
    }
    write_output(folder / RESULT, json.dumps(result) + "\n")
    shutil.rmtree(folder / "checkpoints")


def _done_elsewhere(study: Study, path: Path) -> dict[str, Any] | None:
    """The result of a run of the same recipe and with the same tests in another study, if any."""
    folder = path.parent
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for found in sorted(folder.parents[2].glob(f"*/runs/*-seed{recipe['seed']}/{RESULT}")):
        with reading(found, ValueError, KeyError, TypeError, yaml.YAMLError):
            theirs = yaml.safe_load((found.parent / RECIPE).read_text(encoding="utf-8"))
            if {**theirs, "run_dir": str(folder)} == recipe:
                result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
                if result.get("tests") == study.all_tests:
                    return result
    return None


def _length(study: Study, arm: str, out: Path) -> tuple[Length, list[int]]:
    """Steps and images of an arm, found once, and the steps after which it is evaluated."""
    path = out / "arms" / f"{arm}.json"
    asked = {"flops": study.flops, "points": study.points, "recipe": study.recipe_of(arm)}
    if path.exists():
        with reading(path, ValueError, KeyError, TypeError):
            before = json.loads(path.read_text(encoding="utf-8"))
            length = Length(*before["length"])
        if before["asked"] != asked:
            raise UserError(
                f"{path} is of another budget or recipe: name another --out for the changed study"
            )
    else:
        length = Length(10**6, 1)
        for _ in range(2):  # what follows the images of the whole run needs to know them
            recipe = _recipe(study, Run(arm, study.lrs[0], study.seeds[0]), out / "arms", length)
            write_output(out / "arms" / f"{arm}.yaml", yaml.safe_dump(recipe, sort_keys=False))
            config, _ = parse_config(["--config", str(out / "arms" / f"{arm}.yaml")])
            length = length_of(config, study.flops)
        write_output(path, json.dumps({"asked": asked, "length": length}) + "\n")
    each = max(1, round(length.steps / study.points / _SAVES)) * _SAVES
    points = [each * number for number in range(1, study.points + 1)]
    return Length(points[-1], length.images), points


def _recipe(study: Study, run: Run, folder: Path, length: Length) -> dict[str, Any]:
    saves = max(1, length.steps // study.points // _SAVES)
    return merged(
        study.recipe_of(run.arm, max(1, length.images)),
        {
            "run_dir": str(folder),
            "steps": length.steps,
            "seed": run.seed,
            "optim": {"lr": run.lr},
            # At a rate that diverges a run ends as the worst, else no other would get its turn.
            "on_nonfinite": "skip",
            "max_skipped_in_row": length.steps,
            # Each step is logged: after a restart all that has been computed is still counted.
            "log": {"every_steps": 1},
            "checkpoint": {"every_steps": saves, "keep_every": saves * _SAVES, "keep": 1},
        },
    )


def _write_recipe(study: Study, run: Run, folder: Path, length: Length) -> Path:
    path = folder / RECIPE
    text = yaml.safe_dump(_recipe(study, run, folder, length), sort_keys=False)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path} is of another study: name another --out for the changed one")
    write_output(path, text)
    return path


def _spent(folder: Path, step: int) -> Mapping[str, float]:
    """What a run had used after a step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken = [line for line in lines if line["step"] <= step]
    return {
        "step": step,
        "flops": sum(line["flops"] for line in taken),
        "images": sum(line["examples"] for line in taken),
        "seconds": sum(line["step_s"] for line in taken),
    }


def _say(line: str) -> None:
    print(f"studies: {line}", flush=True)
