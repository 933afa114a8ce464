"""Evaluation during training: evaluators at their own cadences, on all ranks.

`trainer` asks `Evaluations` after each step. Each rank gets a second model, of the very weights
that would be exported: without sharding or an EMA they are shared, not copied. The training goes on
as if nothing had been: its model is never called, and its random generators are put back.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import PositiveInt
from torch import Tensor

from navit_clip.configs import config_from_dict, parser_message
from navit_clip.data.listings import as_listed, list_stored
from navit_clip.distributed import Ranks
from navit_clip.errors import StopAskedError, UserError
from navit_clip.evaluation.embed import fail_together
from navit_clip.evaluation.evaluator import EvalSpec, Evaluator
from navit_clip.evaluation.registry import EVALUATORS
from navit_clip.evaluation.results import EvalResult
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.files import write_output
from navit_clip.tasks.base import ExportedModel, Task
from navit_clip.tasks.media import Media, nearest_captions
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.training.best import BestModel
from navit_clip.training.sections import NEAREST
from navit_clip.training.step import Stepper
from navit_clip.training.validation import Validation, ValidationConfig
from navit_clip.training.watchdog import Watchdog

VALIDATION = "validation loss"  # beside names of evaluators, which have no space
_VALIDATION_METRIC = "validation/loss"


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training.

    Attributes:
        evaluators: By a name of your own, which metrics and files are called by. ``kind`` of each
            is one of `navit_clip.evaluation.registry` (``zeroshot``, ``retrieval``, ``classify``,
            ``fewshot``, ``linear``, ``cascade``, ``rerank``, ``reconstruct``), ``every_steps`` its
            cadence (default 1000; one evaluation is also made after the last step), and all else a
            field of its specification, such as `navit_clip.evaluation.retrieval.RetrievalSpec`:
            data, images, captions, classnames, templates, max_tokens and more.
        validation: The loss on data.validation, when and in what batches.
        best: Keep the best model by this metric in best/ of the run directory, such as
            ``coco/text_to_image/R@1`` or ``validation/loss``; null keeps none.
        workers: Decoding processes per rank; 0 decodes in the trainer's.

    Raises:
        ValueError: If an evaluator is misconfigured or its name is no file name; names the field.
    """

    evaluators: dict[str, dict[str, Any]] = field(default_factory=dict)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    best: str | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        self.plans()

    def plans(self) -> dict[str, Plan]:
        """The evaluators, typed."""
        return {name: _plan(name, dict(values)) for name, values in self.evaluators.items()}


class Plan(NamedTuple):
    """One evaluator of a run.

    Attributes:
        kind: Which one. Made for each evaluation, since it keeps the embeddings of its last one.
        spec: What is evaluated, on what data.
        every_steps: Steps between evaluations, at least 1.
    """

    kind: type[Evaluator[Any]]
    spec: EvalSpec
    every_steps: int


def _plan(name: str, values: dict[str, Any]) -> Plan:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f"evaluators: {name!r} is no name of letters, digits, '_', '.' and '-'")
    kind = EVALUATORS.get(str(named := values.pop("kind", None)))
    if kind is None:
        raise ValueError(
            f"evaluators.{name}.kind must be one of {', '.join(EVALUATORS)}, got {named!r}"
        )
    # Not types of the run's own parser: it would report every kind's objections to a mistake.
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--every_steps", type=PositiveInt)
    parser.add_class_arguments(kind.Spec)
    every_steps = values.pop("every_steps", 1000)
    path = f"evaluators.{name}"
    try:
        parsed = parser.parse_object({"every_steps": every_steps, **values})
    except (ArgumentError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(parser_message(error, path)) from error
    values = parsed.as_dict()
    every_steps = values.pop("every_steps")
    return Plan(kind, config_from_dict(kind.Spec, values, path), every_steps)


class Evaluations:
    """The evaluations of one run.

    Args:
        config: What is evaluated, and when.
        run_dir: Gets eval/ and best/.
        task: Exports the weights, and says how evaluators see the exported model.
        tokenizer: Of the run.
        ranks: This process among all of them.
        validation: Of the run, if it has one.
        shows: Whether evaluators give examples too.

    Raises:
        UserError: If an evaluator has no data, or a setting or metric asked for does not exist.
    """

    def __init__(
        self,
        config: EvalConfig,
        run_dir: Path,
        task: Task,
        tokenizer: Tokenizer | None,
        ranks: Ranks,
        validation: Validation | None = None,
        *,
        shows: bool = False,
    ) -> None:
        self.config, self.ranks, self._validation = config, ranks, validation
        self._shows = shows
        self._run_dir = run_dir
        self._task, self._tokenizer = task, tokenizer
        self._plans = config.plans()
        self._best: BestModel | None = None
        if not self._plans and config.best is None:
            return
        with torch.device("meta"):  # of shapes alone
            model = task.eval_model(task.export(None, tokenizer), "the model")
        found = ranks.of_first(self._list_stored)
        self._plans = {
            name: plan._replace(spec=_with_listed(plan.spec, found))
            for name, plan in self._plans.items()
        }
        # Everything is opened once: better one line now than after a day.
        with fail_together(ranks):
            for name, plan in self._plans.items():
                with _naming(name):
                    plan.kind(plan.spec).check(model)
        if config.best is not None:
            lower = self._lower_is_better(config.best, model.own_setting)
            if ranks.is_first:
                self._best = BestModel(run_dir, config.best, lower=lower)

    def _list_stored(self) -> dict[str, list[str]]:
        """What stores hold for the evaluators, by pattern."""
        found: dict[str, list[str]] = {}
        for name, plan in self._plans.items():
            with _naming(name):
                found |= list_stored([shards for _, shards in _shards_of(plan.spec)])
        return found

    def due(self, step: int, *, last: bool, logged: Collection[str] = ()) -> list[str]:
        """Names of the evaluators that are due, `VALIDATION` among them.

        Args:
            step: Steps taken.
            last: Whether it is the last one of the run, which is always evaluated.
            logged: Keys already in the log for this step; what is there is not due again.
        """
        cadence = {name: (plan.every_steps, f"eval/{name}/") for name, plan in self._plans.items()}
        if self._validation is not None:
            cadence[VALIDATION] = self._validation.config.every_steps, "validation/"
        return [
            name
            for name, (every_steps, prefix) in cadence.items()
            if (step % every_steps == 0 or last)
            and not any(key.startswith(prefix) for key in logged)
        ]

    def run(
        self,
        names: Sequence[str],
        step: int,
        stepper: Stepper,
        watchdog: Watchdog,
        stops: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[dict[str, float], str, dict[str, Media]]]:
        """Evaluates the weights as they are; every rank consumes the whole iterator.

        Args:
            names: From `due`, the same on all ranks.
            step: Steps taken.
            stepper: Holds the weights; its precision is that of the evaluation too.
            watchdog: Gets a heartbeat whenever an evaluation has come further.
            stops: Whether this rank is asked to stop; looked at then too.

        Yields:
            Of each evaluator, on rank 0 alone: what to log (the step, and ``eval/NAME/METRIC`` of
            each metric, ``validation/METRIC``), a line for the terminal, and examples by name.

        Raises:
            UserError: If data has become unreadable, or the disk takes no result.
            StopAskedError: If any rank is asked to stop, on all of them.
        """
        if not names:
            return

        def beat_of(what: str) -> None:
            watchdog.heartbeat(f"the {what} of step {step}", slow=True)
            if stops():
                raise StopAskedError

        device = self.ranks.device
        # Whatever is drawn inside, the run's generators go on as if it had not been.
        kept = partial(torch.random.fork_rng, [device] if device.type == "cuda" else [])
        weights = stepper.full_weights()
        if self._validation is not None and VALIDATION in names:
            since = time.perf_counter()
            beat = partial(beat_of, VALIDATION)
            with kept():
                loss, skipped = self._validation.run(
                    weights, stepper.precision, self.config.workers, beat
                )
            if self.ranks.is_first:
                seconds = time.perf_counter() - since
                values = {"loss": loss, "skipped": skipped, "seconds": seconds}
                logged = {f"validation/{key}": value for key, value in values.items()}
                line = f"step {step}, {VALIDATION} {loss:.4f}, {skipped} skipped"
                with kept():
                    line += self._offer(logged, step, partial(self._export, weights))
                yield {"step": step, **logged}, f"{line} ({seconds:.1f} s)", {}
        evaluators = [name for name in names if name != VALIDATION]
        if not evaluators:
            return
        with kept():
            trained = self._export(weights)
        for name in evaluators:
            plan, since = self._plans[name], time.perf_counter()
            watchdog.heartbeat(f"the evaluation {name} of step {step}", slow=True)
            beat = partial(beat_of, f"evaluation {name}")
            title = f"{self._run_dir} step {step}"
            model = self._task.eval_model(
                trained, title, stepper.precision, partial(_reporting, beat)
            )
            evaluator = plan.kind(plan.spec)
            with kept():
                result = evaluator.run(model, self.ranks, self.config.workers)
            if result is not None:
                if evaluator.draws_in_training:
                    evaluator.draw_gallery(self._file(name, step, "png"))
                with kept():
                    shown = nearest_captions(evaluator.samples()) if self._shows else None
                examples: dict[str, Media] = {f"{NEAREST}{name}": shown} if shown else {}
                yield *self._log(name, step, result, trained, since), examples

    def _log(
        self, name: str, step: int, result: EvalResult, model: ExportedModel, since: float
    ) -> tuple[dict[str, float], str]:
        text = json.dumps({"step": step, **result.to_json()}, indent=2)
        write_output(self._file(name, step, "json"), f"{text}\n")
        values = {
            _key(name, None if row.is_own else row.setting, key): value
            for row in result.rows
            for key, value in row.metrics.items()
        }
        line = f"step {step}, {name}: " + ", ".join(
            f"{key.replace('/', ' ')} {metric.format(result.own.metrics[key])}"
            for key, metric in result.headline.items()
        )
        line += self._offer(values, step, lambda: model)
        seconds = time.perf_counter() - since
        logged = {"step": step, **{f"eval/{key}": value for key, value in values.items()}}
        logged[f"eval/{name}/seconds"] = seconds
        return logged, f"{line} ({seconds:.1f} s)"

    def _file(self, name: str, step: int, suffix: str) -> Path:
        return self._run_dir / "eval" / f"{name}-step-{step:08d}.{suffix}"

    def _export(self, weights: dict[str, Tensor]) -> ExportedModel:
        return self._task.export(weights, self._tokenizer)

    def _offer(
        self, values: dict[str, float], step: int, export: Callable[[], ExportedModel]
    ) -> str:
        """Keeps the model if it is the best, which the line for the terminal then says.

        To be called before the values are logged: what is logged is not evaluated again after a
        kill.
        """
        best = self._best

        def save(folder: Path) -> None:
            export().save_pretrained(folder)
            self._task.write_card(folder, self._run_dir)

        if best is None or best.metric not in values:
            return ""
        return ", the best so far" if best.offer(values[best.metric], step, save) else ""

    def _lower_is_better(self, best: str, own: EvalSetting) -> bool:
        known = {
            _key(name, None if setting == own else setting, key): metric.lower_is_better
            for name, plan in self._plans.items()
            for setting in (own, *plan.spec.settings)
            for key, metric in plan.kind.METRICS.items()
        }
        if self._validation is not None:
            known[_VALIDATION_METRIC] = True
        if best not in known:
            there = f"only {', '.join(known)}" if known else "there is no evaluator"
            raise UserError(f"eval.best: nothing reports {best!r}, {there}")
        return known[best]


@contextmanager
def _naming(evaluator: str) -> Iterator[None]:
    """Around what is done for one evaluator, which its errors then name."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"eval.evaluators.{evaluator}: {error}") from error


def _shards_of(spec: EvalSpec) -> list[tuple[str, str]]:
    """Fields of a specification that name data which may be shards, and what they name."""
    fields = ((name, getattr(spec, name, None)) for name in spec.SHARDS)
    return [(name, value) for name, value in fields if value is not None]


def _with_listed(spec: EvalSpec, found: Mapping[str, list[str]]) -> EvalSpec:
    listed: dict[str, Any] = {
        name: as_listed([value], found)[0] for name, value in _shards_of(spec)
    }
    return replace(spec, **listed)


@contextmanager
def _reporting(beat: Callable[[], None]) -> Iterator[None]:
    """Around each call of the model, which is progress."""
    beat()
    yield


def _key(name: str, setting: EvalSetting | None, metric: str) -> str:
    """NAME/METRIC at the model's own setting, NAME/SETTING/METRIC at the others."""
    return f"{name}/{metric}" if setting is None else f"{name}/{setting.key}/{metric}"
