"""Configuration of a run: one dataclass tree, read from YAML and the command line.

Parsed by jsonargparse, so every field is a flag of its own name (``--optim.lr 1e-3``), typed and
documented by its docstring; `navit_clip.training.__main__` is the only reader of the command line.
Each part stands beside the class that it configures and is handed down to it; nothing but
`trainer` sees the whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache, partial, reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from navit_clip.checkpoints.checkpoint import CheckpointConfig
from navit_clip.configs import check_choices, check_finite, config_from_dict, leaves, parser_message
from navit_clip.data.config import DataConfig
from navit_clip.data.shard_sizes import samples_per_epoch
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.files import reading
from navit_clip.precision import PrecisionChoice, choose_precision
from navit_clip.recipes import with_recipe_paths
from navit_clip.tasks.base import TaskConfig
from navit_clip.tasks.registry import task_config
from navit_clip.tasks.source import InitConfig
from navit_clip.tokenizers.load import TokenizerConfig
from navit_clip.training.ema import EMAConfig
from navit_clip.training.evaluation import EvalConfig
from navit_clip.training.length import RunLength
from navit_clip.training.loggers import LogConfig
from navit_clip.training.optim import OptimConfig
from navit_clip.training.parallel import ParallelConfig

DEFAULT_TASK = "contrastive"
_LENGTHS = ("steps", "samples", "epochs")
_NAME = "task.model.name"
_MOST_VALUES = 100_000  # in a configuration; shards are listed in files of their own


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
        run_dir: Where config, metrics, checkpoints and the exported model go; the same directory
            again continues the run.
        steps: Optimiser steps of the whole run. One of `steps`, `samples` and `epochs` says how
            long it is; as a flag, it takes the place of what a recipe says.
        samples: Samples that the whole run trains on, over all ranks, such as 13e9; it ends with
            the first step at which so many are seen.
        epochs: Likewise, in multiples of what the shards hold.
        task: What is trained, chosen by ``task.kind``.
        tokenizer: How text becomes token ids; null takes that of `init`.
        init: The model whose weights the run starts from.
        data: What is read and how it is packed.
        optim: Optimiser and learning rate.
        parallel: How ranks share the model, and what is traded for memory and speed.
        ema: The EMA of the weights.
        checkpoint: When the state is saved.
        log: What is reported.
        eval: What is evaluated during the training.
        accumulate: Micro-batches of each rank per step. Their examples form one batch of the loss,
            as if they had fitted into memory together; a contrastive loss takes one more forward
            pass for it (GradCache).
        on_nonfinite: When the loss or the gradient is NaN or infinite: ``stop`` the run, or
            ``skip`` the step and leave the weights as they are.
        max_skipped_in_row: With ``skip``: a run that has skipped so many steps in a row stops.
        stall_timeout_s: A rank that makes no progress for so many seconds writes the stacks of its
            threads to stalls/ and standard error, and ends after as many again; checkpoints and
            the first step are given three times as much. 0 waits without limit.
        seed: Of initialisation and of everything random about the data.
        precision: ``bf16`` runs matrix products under autocast; parameters stay float32. ``auto``
            is what the run was begun with, and for a new one bf16 on CUDA and ``fp32`` on a CPU.
        device: ``auto`` takes CUDA if there is one.
    """

    run_dir: str
    task: TaskConfig
    steps: int | None = None
    samples: float | None = None
    epochs: float | None = None
    tokenizer: TokenizerConfig | None = None
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    accumulate: int = 1
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_in_row: int = 10
    stall_timeout_s: float = 600.0
    seed: int = 0
    precision: PrecisionChoice = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        check_finite(self)
        if "://" in self.run_dir:
            raise ValueError(
                f"run_dir={self.run_dir}: give a folder, and this as checkpoint.mirror"
            )
        given = {name: n for name in _LENGTHS if (n := getattr(self, name)) is not None}
        if len(given) != 1:
            found = " and ".join(f"{name}={n}" for name, n in given.items()) or "none"
            raise ValueError(f"{', '.join(_LENGTHS)}: give one, how long the run is; got {found}")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"epochs must be above 0, got {self.epochs}")
        for name in ("steps", "samples", "accumulate", "max_skipped_in_row"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.stall_timeout_s < 0:
            raise ValueError(f"stall_timeout_s must not be negative, got {self.stall_timeout_s}")
        if self.task.needs_tokenizer and self.tokenizer is None and self.init.model is None:
            raise ValueError(
                "tokenizer is missing: give tokenizer.path, or tokenizer.kind open_clip, or "
                "init.model with its own"
            )
        if self.steps and (misfit := self.optim.schedule.misfit(self.steps, math.inf)):
            raise ValueError(misfit)
        self.task.check(self.data)

    @property
    def length(self) -> RunLength:
        """Of the run, once `count_epochs` has replaced `epochs`."""
        return RunLength(self.steps, None if self.samples is None else math.ceil(self.samples))


def parse_config(argv: Sequence[str], prog: str = "navit-clip train") -> tuple[TrainConfig, str]:
    """Reads ``--config FILE`` and flags.

    Returns:
        The configuration, and its resolved form as YAML.

    Raises:
        UserError: For an unknown key, a bad value or a missing file; names it.
        SystemExit: After ``--print_config``.
    """
    argv = with_recipe_paths([_with_underscores(word) for word in argv])
    for flag, word in pairwise(["", *argv]):
        _check_spaces_of(flag, word)
    lengths = {name for name in _LENGTHS for word in argv if word.split("=")[0] == f"--{name}"}
    if lengths:  # instead of what a recipe says
        argv = [*argv, *(f"--{name}=null" for name in _LENGTHS if name not in lengths)]
    task = task_config(task_kind(argv))
    parser = _build_parser(task, prog)
    try:
        namespace = parser.parse_args(argv)
        init = config_from_dict(InitConfig, namespace["init"].as_dict(), "init")
        run_dir = Path(namespace["run_dir"])
        # What the configuration leaves out is as in the model that the run starts from, or as the
        # architecture named has it.
        defaults = task.defaults_from(init, run_dir)
        known = defaults
        if (name := namespace.pop(_NAME, None)) is not None:
            if defaults:
                raise ValueError(f"{_NAME}={name} and init.model={init.model}: leave one out")
            known = task.named_fields(name)
        if known:
            before = namespace["task"]
            parser = _build_parser.__wrapped__(task, prog)  # these defaults are of this call alone
            parser.set_defaults({f"task.{key}": value for key, value in known.items()})
            namespace = parser.parse_args(argv)
            namespace.pop(_NAME, None)
            as_given = namespace["task"] == before
            if name and as_given and any(before[key] != value for key, value in known.items()):
                raise ValueError(
                    f"{_NAME}={name} changes nothing, since a recipe or flag gives the fields of "
                    "task.model itself: leave them out of a copy of the recipe"
                )
        values = {f.name: namespace.as_dict()[f.name] for f in fields(TrainConfig)}
        values["task"] = config_from_dict(task, values["task"], "task")
        config = config_from_dict(TrainConfig, values)
        _check_null(config)
    except (ArgumentError, ValueError, TypeError, OverflowError) as error:
        message = parser_message(error)
        raise UserError(message + _hint(message, parser.get_defaults().keys())) from error
    given = asdict(values["task"])
    for name, known in defaults.items():
        init.check(f"task.{name}", reduce(getitem, name.split("."), given), known)
    return config, parser.dump(namespace, skip_validation=True)  # it has just been validated


@cache  # a third of a second for each of many configurations, as studies and tests read them
def _build_parser(task: type[TaskConfig], prog: str) -> ArgumentParser:
    # Help is that of `navit_clip.training.reference`.
    parser = ArgumentParser(prog=prog, add_help=False, exit_on_error=False)
    parser.add_argument(
        "--config", action="config", help="a recipe's name or a YAML file; later flags override it"
    )
    parser.add_class_arguments(TrainConfig, skip={"task"})
    parser.add_class_arguments(task, "task")
    if "model" in get_type_hints(task):
        parser.add_argument(f"--{_NAME}", type=str | None)
    return parser


def name_precision(config: TrainConfig, resolved: str, ranks: Ranks) -> tuple[TrainConfig, str]:
    """A configuration whose precision is named; every rank calls it.

    ``auto`` is what the run was begun with, whatever the device is now.
    """
    if config.precision != "auto":
        return config, resolved
    begun = None
    if ranks.is_first:
        with suppress(OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            begun = yaml.safe_load((Path(config.run_dir) / "config.yaml").read_text())["precision"]
    begun = ranks.broadcast(begun)
    named = begun if begun in ("fp32", "bf16") else choose_precision("auto", ranks.device)
    line = re.compile("^precision: auto$", re.MULTILINE)
    return replace(config, precision=named), line.sub(f"precision: {named}", resolved)


def count_epochs(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """A configuration of as many samples as its `epochs` have; every rank calls it.

    Raises:
        UserError: If it cannot be told how many samples an epoch has.
    """
    if config.epochs is None:
        return config
    samples = ranks.of_first(partial(samples_per_epoch, config.data))
    return replace(config, epochs=None, samples=config.epochs * samples)


def _with_underscores(word: str) -> str:
    """A flag as the fields are written; names of a user's own keep their dashes."""
    flag, equals, value = word.partition("=")
    if not flag.startswith("--") or flag.startswith(("--data.mix.", "--eval.evaluators.")):
        return word
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"


def _hint(message: str, known: Iterable[str]) -> str:
    """What to write instead, as far as the parser's message shows it."""
    if re.search(
        r"(Expected a dict|Unexpected config|Unable to load config).*\w:[^\s/]", message, re.S
    ):
        return "; write a space behind each colon, as in {name: value}"
    unknown = re.search(r"(?:arguments: --|[Oo]ption ')([\w.]+)", message)
    if unknown is None:
        return ""
    group = re.search(r"Group '([\w.]+)'", message)
    name = f"{group[1]}.{unknown[1]}" if group else unknown[1]
    close = get_close_matches(name, known, 1, 0.8)
    return f"; did you mean {close[0]}?" if close else ""


def task_kind(argv: Sequence[str]) -> str:
    """``task.kind`` of a command's words, by which the parser of all others is chosen."""
    kind = DEFAULT_TASK
    words = [part for word in argv for part in word.split("=", 1)]
    for flag, value in pairwise(words):
        if flag == "--task.kind":
            kind = value
        elif flag == "--config":
            kind = _kind_in(value) or kind
    return kind


def _kind_in(path: str) -> str | None:
    with reading(f"--config {path}", ValueError, yaml.YAMLError):
        values: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        _check_size(values, {})
        if not isinstance(values, dict):
            return None  # the parser says so
        _check_spaces(values)
        _check_groups(TrainConfig, values)
    kind = (values.get("task") or {}).get("kind")
    return kind if isinstance(kind, str) else None


def _check_groups(group: type, values: dict[str, Any], name: str = "") -> None:
    """Checks that where a group of fields is expected there is one: the parser drops the rest."""
    for key, hint in get_type_hints(group).items():
        value = values.get(key)
        if (is_dataclass(hint) or hint is TaskConfig) and value is not None:
            if not isinstance(value, dict):
                raise ValueError(f"{name}{key} must hold fields, got {value!r}")
            _check_groups(hint, value, f"{name}{key}.")  # type: ignore[arg-type]


def _check_spaces_of(flag: str, word: str) -> None:
    """Checks the value of a flag, see `_check_spaces`."""
    if word.startswith("--"):
        flag, _, word = word.partition("=")
    if word.startswith("{"):
        with suppress(yaml.YAMLError, RecursionError):  # the parser says so
            values = yaml.safe_load(word)
            try:
                _check_size(values, {})
                _check_spaces(values)
            except ValueError as error:
                raise UserError(f"{flag} {word}: {error}") from error


def _check_spaces(values: Any) -> None:
    """Checks that no ``{a:1}`` stands for ``{a: 1}``: YAML reads a word ``a:1`` without a value."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        if value is None and re.search(r"\w:[^\s/]", str(key)):
            spaced = str(key).replace(":", ": ")
            raise ValueError(f"write a space behind each colon, {spaced!r} and not {key!r}")
        if isinstance(value, (dict, list)):
            _check_spaces(value)


def _check_null(config: TrainConfig) -> None:
    """Checks that no ``null`` has become text, as it does where a field must have a value."""
    for name, value in leaves(config):
        if value == "null":
            raise ValueError(f"{name} cannot be null: leave it out, or write ./null for that file")


def _check_size(value: Any, known: dict[int, int]) -> int:
    """Number of values in what YAML gave, each alias counted as often as it is used.

    A few lines of aliases of aliases stand for more values than the parser would ever get through.
    """
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = _MOST_VALUES  # of a list that holds itself
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_check_size(item, known) for item in items)
    if known[id(value)] >= _MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
    return known[id(value)]
