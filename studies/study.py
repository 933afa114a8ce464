"""What a study is: read from its YAML, with the configuration of each of its runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from string import Template
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from navit_clip.errors import UserError
from navit_clip.files import reading
from navit_clip.training.evaluation import EvalConfig

_VALIDATION = "validation"  # its name among the evaluators

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Study:
    """A study as its YAML has it.

    Names in paths: ``$data``, and ``$out``, a folder for data that studies make and share. A YAML
    that ``extends`` another has its fields but for those that it has itself; its `recipe` is what
    it changes in that of the other. The name of another study as `arms` takes those of that one.

    Attributes:
        title: Heading of the report.
        question: What it asks, and what it leaves open.
        flops: Training FLOPs of each run, forward and backward passes of both towers.
        recipe: The training configuration that all arms share, but for what the study sets:
            run_dir, seed, steps, optim.lr, checkpoints and logging.
        arms: By name what of the recipe is different; ``$images`` in one stands for the number of
            images that the whole run sees.
        baseline: The arm that the others are compared with.
        lrs: Learning rates; each arm takes the one with the best validation.
        seeds: Of the runs; rates are compared with the first.
        validation: What the rate is chosen by, an evaluator as in the trainer's
            ``eval.evaluators``, or several by name, which count alike.
        tests: What is compared, evaluators by name.
        prepare: Commands after ``python -m`` by a file that each makes, run once.
        points: Evaluations of each run, evenly over its steps.
        right_within: A query counts as right if its answer is among so many nearest.
    """

    title: str
    question: str
    flops: float
    recipe: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    baseline: str
    lrs: list[float]
    seeds: list[int]
    validation: dict[str, Any]
    tests: dict[str, dict[str, Any]]
    prepare: dict[str, str] = field(default_factory=dict)
    points: int = 6
    right_within: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.flops < math.inf or min(self.points, self.right_within) < 1:
            raise ValueError("flops must be positive, points and right_within at least 1")
        for name in ("lrs", "seeds", "tests"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline must be one of {', '.join(self.arms)}")
        several = self.validation.values()
        if "kind" not in self.validation and not (
            several and all(isinstance(one, Mapping) for one in several)
        ):
            raise ValueError("validation.kind is missing, or evaluators by name")
        if taken := self.validations.keys() & self.tests.keys():
            raise ValueError(f"a test must not be called {', '.join(sorted(taken))}")
        self.evaluators()

    def evaluators(self) -> EvalConfig:
        """The tests and validations; checks them."""
        return EvalConfig(self.all_tests)

    @property
    def validations(self) -> dict[str, dict[str, Any]]:
        """``validation``, or ``validation-NAME`` of several."""
        if "kind" in self.validation:
            return {_VALIDATION: self.validation}
        return {f"{_VALIDATION}-{name}": one for name, one in self.validation.items()}

    @property
    def all_tests(self) -> dict[str, dict[str, Any]]:
        """The validations and the tests, by name."""
        return {**self.validations, **self.tests}

    def recipe_of(self, arm: str, images: int = 1) -> dict[str, Any]:
        """The training configuration of an arm."""
        return merged(self.recipe, _filled(self.arms[arm], {"images": str(images)}))


@dataclass(frozen=True)
class Run:
    """One training of a study."""

    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-lr{self.lr:g}-seed{self.seed}"


def trials(study: Study) -> Iterator[Run]:
    """The runs that learning rates are chosen by."""
    return (Run(arm, lr, study.seeds[0]) for arm in study.arms for lr in study.lrs)


def read_study(name: str, places: Mapping[str, str]) -> Study:
    """Reads a study.

    Args:
        name: Of a file in this folder, or the path of another one.
        places: What stands for ``$out`` and ``$data``.

    Raises:
        UserError: If there is none, or it is not valid; names the field.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _HERE / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in _HERE.glob("*.yaml"))
        raise UserError(f"no study {name}: there are {', '.join(known)}; a path is taken too")
    with reading(path, ValueError, yaml.YAMLError):
        values = _filled(yaml.safe_load(path.read_text(encoding="utf-8")), places)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a study: it has no fields")
    if extended := values.pop("extends", None):
        base = vars(read_study(extended, places))
        values = {**base, **values, "recipe": merged(base["recipe"], values.get("recipe", {}))}
    if isinstance(values.get("arms"), str):
        values["arms"] = read_study(values["arms"], places).arms
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        if unknown := values.keys() - {f.name for f in fields(Study)}:
            raise ValueError(f"there is no field {', '.join(map(str, unknown))}")
        parsed = parser.instantiate(parser.parse_object(values))
        return Study(**{f.name: parsed[f.name] for f in fields(Study)})
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{path}: {str(error).replace('Parser key ', '')}") from error


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with some of its fields changed."""
    result = copy.deepcopy(dict(base))
    for key, value in change.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            value = merged(result[key], value)
        result[key] = value
    return result


def _filled(value: Any, places: Mapping[str, str]) -> Any:
    """Names in all texts replaced; a text that is nothing but a number then is one."""
    if isinstance(value, Mapping):
        return {_filled(k, places): _filled(v, places) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, places) for v in value]
    if isinstance(value, str) and "$" in value:
        filled = Template(value).safe_substitute(places)
        return int(filled) if filled.isdecimal() else filled
    return value
