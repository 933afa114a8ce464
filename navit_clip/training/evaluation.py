"""Evaluation during training: the harnesses of `eval` at their own cadences, on all ranks.

`navit_clip.training.trainer` asks `Evaluations` after each step. Each rank gets a second model, of
the very weights that would be exported: without sharding or an average they are shared, not copied.
The training goes on as if nothing had been: its model is never called, and its random generators
are put back.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import islice
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from navit_clip.data.decode import SkipSampleError
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.evaluation import retrieval
from navit_clip.evaluation.evaluator import (
    RetrievalSpec,
    Spec,
    ZeroShotSpec,
    evaluate,
    open_retrieval,
    open_zeroshot,
)
from navit_clip.evaluation.models import PackedModel
from navit_clip.evaluation.settings import EvalSetting, make_settings
from navit_clip.files import write_output
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.packed.images import ImagePatches
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.training.best import BestModel
from navit_clip.training.parallel import whole
from navit_clip.training.watchdog import StallWatch

if TYPE_CHECKING:  # the run's configuration contains this module's
    from navit_clip.training.config import TrainConfig
    from navit_clip.training.step import Stepper

_SPECS: dict[str, type[Spec]] = {"zeroshot": ZeroShotSpec, "retrieval": RetrievalSpec}
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_PROBED = 100  # images of which one must be readable for a run to begin
_RECALLS = tuple(f"R@{k}" for k in retrieval.KS)
_FIGURES: dict[type[Spec], tuple[str, ...]] = {
    ZeroShotSpec: ("top1", "top5", "mean_per_class", "ece"),
    RetrievalSpec: tuple(
        f"{way}/{figure}"
        for way in ("image_to_text", "text_to_image")
        for figure in (*_RECALLS, "median_rank")
    ),
}
_LOWER_IS_BETTER = ("ece", "median_rank")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training.

    Attributes:
        harnesses: By a name of your own, which figures and files are called by. ``kind`` of each is
            ``zeroshot`` or ``retrieval``, ``every_steps`` its cadence (default 1000; one evaluation
            is also made after the last step), and all else a field of
            `navit_clip.evaluation.evaluator.ZeroShotSpec` or `RetrievalSpec`: data, images,
            captions, classnames, templates, max_tokens and more.
        best: Keep the best model by this figure in best/ of the run directory, such as
            ``coco/text_to_image/R@1``; null keeps none.
        workers: Decoding processes per rank; 0 decodes in the trainer's.

    Raises:
        ValueError: If a harness is misconfigured or its name is no file name; names the field.
    """

    harnesses: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: str | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"eval.workers must not be negative, got {self.workers}")
        self.plans()

    def plans(self) -> dict[str, Plan]:
        """The harnesses, typed.

        Raises:
            ValueError: As above.
        """
        for name in self.harnesses:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"eval.harnesses: {name!r} is no name of letters, digits, '_', '.' and '-'"
                )
        return {name: _plan(name, dict(values)) for name, values in self.harnesses.items()}


@dataclass(frozen=True)
class Plan:
    """One harness of a run.

    Attributes:
        spec: What is judged, and on what.
        every_steps: Steps between evaluations.

    Raises:
        ValueError: If `every_steps` is below 1.
    """

    spec: Spec
    every_steps: int = 1000

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {self.every_steps}")


def _plan(name: str, values: dict[str, Any]) -> Plan:
    kind = values.pop("kind", None)
    if kind not in _SPECS:
        raise ValueError(
            f"eval.harnesses.{name}.kind must be one of {', '.join(_SPECS)}, got {kind!r}"
        )
    # Not types of the run's own parser: it would report every kind's objections to a mistake.
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--every_steps", type=int, default=Plan.every_steps)
    parser.add_class_arguments(_SPECS[kind], "spec")
    every = {"every_steps": values.pop("every_steps")} if "every_steps" in values else {}
    try:
        parsed = parser.instantiate(parser.parse_object({**every, "spec": values}))
        return Plan(parsed.spec, parsed.every_steps)
    except (ArgumentError, ValueError, TypeError) as error:
        said = str(error).replace("Parser key ", "").replace("spec.", "")
        raise ValueError(f"eval.harnesses.{name}: {said}") from error


@dataclass(frozen=True)
class Finding:
    """What one harness found, on the first rank.

    Attributes:
        values: For the log: the step, and ``eval/NAME/FIGURE`` of each figure.
        line: For the terminal.
    """

    values: dict[str, float]
    line: str


class Evaluations:
    """The evaluations of one run.

    Args:
        config: Of the run; its directory gets eval/ and best/.
        tokenizer: Of the run.
        preprocess: How the trained model wants its images.
        ranks: This process among all of them.

    Raises:
        UserError: If a harness has no data, or a setting or figure asked for does not exist.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        ranks: Ranks,
    ) -> None:
        self.config, self.ranks = config, ranks
        self._run_dir = Path(config.run_dir)
        self._tokenizer, self._preprocess = tokenizer, preprocess
        self._plans = config.eval.plans()
        if self._plans:
            self._check_specs()
        self._best: BestModel | None = None
        metric = config.eval.best
        if metric is not None:
            self._check_best(metric)
            if ranks.is_first:
                lower = metric.rpartition("/")[2] in _LOWER_IS_BETTER
                self._best = BestModel(self._run_dir, metric, lower=lower)

    def due(self, step: int, logged: Collection[str] = ()) -> list[str]:
        """Names of the harnesses whose turn it is.

        Args:
            step: Steps taken.
            logged: Keys already in the log for this step; what is there is not due again.
        """
        return [
            name
            for name, plan in self._plans.items()
            if (step % plan.every_steps == 0 or step == self.config.steps)
            and not any(key.startswith(f"eval/{name}/") for key in logged)
        ]

    def run(
        self, names: Sequence[str], step: int, stepper: Stepper, watch: StallWatch
    ) -> Iterator[Finding]:
        """Evaluates the weights as they are; every rank consumes the whole iterator.

        Args:
            names: From `due`, the same on all ranks.
            step: Steps taken.
            stepper: Holds the weights.
            watch: Told whenever an evaluation has come further.

        Yields:
            What each harness found, on the first rank alone.

        Raises:
            UserError: If data has become unreadable, or the disk takes no result.
        """
        if not names:
            return
        trained = exported(stepper)
        trained.tokenizer, trained.preprocess = self._tokenizer, self._preprocess
        for name in names:
            spec = self._plans[name].spec
            since = time.perf_counter()
            beat = partial(watch.begin, f"the evaluation {name} of step {step}", slow=True)
            beat()
            title = f"{self._run_dir} step {step}"
            model = _InTraining(trained, title, self.config.precision, beat)
            with _generators_kept(self.ranks.device):
                result = evaluate(model, spec, self.ranks, self.config.eval.workers)
            if result is not None:
                yield self._finding(name, step, result, trained, since)

    def _finding(
        self, name: str, step: int, result: dict[str, Any], model: NaViTCLIP, since: float
    ) -> Finding:
        spec = self._plans[name].spec
        path = self._run_dir / "eval" / f"{name}-step-{step:08d}.json"
        write_output(path, json.dumps({"step": step, **result}, indent=2) + "\n")
        figures = _figures(name, spec, result)
        headline = ("top1", "top5")
        if isinstance(spec, RetrievalSpec):
            headline = ("image_to_text/R@1", "text_to_image/R@1")
        line = f"step {step}, {name}: " + ", ".join(
            f"{figure.replace('/', ' ')} {figures[_key(name, None, figure)]:.1%}"
            for figure in headline
        )
        best = self._best
        # Before the log: what is logged is not evaluated again after a kill.
        if (
            best is not None
            and best.metric in figures
            and best.offer(figures[best.metric], step, model.save_pretrained)
        ):
            line += ", the best so far"
        seconds = time.perf_counter() - since
        values = {"step": step, **{f"eval/{key}": value for key, value in figures.items()}}
        values[f"eval/{name}/seconds"] = seconds
        return Finding(values, f"{line} ({seconds:.1f} s)")

    def _check_specs(self) -> None:
        """Opens everything once: better one line now than after a day."""
        with torch.device("meta"):  # of shapes alone
            model = NaViTCLIP(self.config.model, self._tokenizer, self._preprocess)
        packed = PackedModel(model, "")
        for name, plan in self._plans.items():
            spec = plan.spec
            try:
                for setting in _settings(spec):
                    packed.check(setting)
                _probe(spec)
            except UserError as error:
                raise UserError(f"eval.harnesses.{name}: {error}") from error

    def _check_best(self, metric: str) -> None:
        own = EvalSetting("capped", self._preprocess.max_tokens)
        known = [
            _key(name, None if setting == own else setting, figure)
            for name, plan in self._plans.items()
            for setting in (own, *_settings(plan.spec))
            for figure in _FIGURES[type(plan.spec)]
        ]
        if metric not in known:
            options = ", ".join(dict.fromkeys(known)) or "nothing without eval.harnesses"
            raise UserError(f"eval.best: no harness reports {metric!r}, only {options}")


class _InTraining(PackedModel):
    """A model under the run's precision, which says that it goes on."""

    def __init__(
        self,
        model: NaViTCLIP,
        name: str,
        precision: Literal["fp32", "bf16"],
        beat: Callable[[], None],
    ) -> None:
        super().__init__(model, name)
        self._beat = beat
        # Around the towers alone: similarities and figures stay in float32.
        self._autocast = torch.autocast(
            model.device.type, torch.bfloat16, enabled=precision == "bf16"
        )

    def embed_images(self, images: Sequence[ImagePatches]) -> Tensor:
        self._beat()
        with self._autocast:
            return super().embed_images(images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self._beat()
        with self._autocast:
            return super().embed_texts(texts)


def exported(stepper: Stepper) -> NaViTCLIP:
    """The whole model as it would be exported, on every rank's device; a collective call.

    Costs no memory for weights that this rank holds in whole, since these are shared; shards are
    gathered, all of them at once.
    """
    weights = stepper.weights()
    with _generators_kept(stepper.ranks.device):
        model = NaViTCLIP(stepper.model.config)
    model.load_state_dict({n: whole(w.detach()) for n, w in weights.items()}, assign=True)
    return model.to(stepper.ranks.device).eval()


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the run's generators go on as if it had not been."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _settings(spec: Spec) -> list[EvalSetting]:
    return make_settings(spec.max_tokens, spec.native, spec.square)


def _key(name: str, setting: EvalSetting | None, figure: str) -> str:
    if setting is None:
        return f"{name}/{figure}"
    label = (
        f"{setting.size}px" if setting.kind == "square" else setting.label
    )  # no ² on a command line
    return f"{name}/{label}/{figure}"


def _figures(name: str, spec: Spec, result: dict[str, Any]) -> dict[str, float]:
    """Figures by NAME/FIGURE, those of settings beside the model's own by NAME/VIEW/FIGURE."""
    found = {}
    for entry in result["views"]:
        setting = EvalSetting(entry["view"], entry["max_tokens"] or entry["side"])
        for figure in _FIGURES[type(spec)]:
            value = reduce(getitem, figure.split("/"), entry)
            found[_key(name, None if entry["own"] else setting, figure)] = float(value)
    return found


def _probe(spec: Spec) -> None:
    """Finds out whether there is anything to evaluate on.

    Raises:
        UserError: If not.
    """
    dataset = (
        open_zeroshot(spec)[0].dataset if isinstance(spec, ZeroShotSpec) else open_retrieval(spec)
    )
    first: SkipSampleError | None = None
    for item in islice(dataset.read(0, 1), _PROBED):
        if not isinstance(item.data, SkipSampleError):
            return
        first = first or item.data
    raise UserError(f"no image can be read: {first or 'there is none'}")
