"""Every value that a configuration refuses is named by the full path of its field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest

from navit_clip.configs import config_from_dict, leaves
from navit_clip.errors import UserError
from navit_clip.export.description import Description
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.clip import CLIPConfig
from navit_clip.training.config import TrainConfig, parse_config

FLAGS = ["--run_dir", "x", "--steps", "10", "--tokenizer.path", "t"]
MIX = ["--data.mix", "{a: {shards: x, captions: {txt: 1}}}"]
NATIVE = ["--eval.evaluators", "{a: {kind: zeroshot, data: x, native: 3}}"]
SQUARE = ["--eval.evaluators", "{a: {kind: zeroshot, data: x, square: [0]}}"]
TASKS = {
    "contrastive": [],
    "classify": ["--tokenizer", "null", "--data.budget.tokens", "{image: 16384}"],
    "masked_image": [
        *("--tokenizer", "null", "--data.budget.tokens", "{image: 16384, decoder: 16384}"),
        *("--data.drop.kind", "fixed", "--task.model.image.pooling", "mean"),
    ],
}
NUMBERS = (-1, 0, 7, 10**9, 1.5, float("nan"))


def refusals(
    values: dict[str, Any], build: Callable[[dict[str, Any]], object]
) -> Iterator[tuple[str, str]]:
    """Path of each number and word, and what is said where another is refused in its place."""
    for path, value in leaves(values):
        *groups, last = path.split(".")
        group: Any = values
        for key in groups:
            group = group[key] if isinstance(group, dict) else None
        if not (isinstance(group, dict) and isinstance(value, int | float | str)):
            continue  # one of several numbers, or unset
        for other in ("nonsense",) if isinstance(value, str) else NUMBERS:
            group[last] = other
            try:
                build(values)
            except TypeError:
                pass  # of another type, which command line and JSON are checked for before
            except ValueError as error:
                yield path, str(error)
        group[last] = value


def check(found: Iterable[tuple[str, str]], fields: set[str]) -> set[str]:
    """Checks that what is refused is named by a full path; returns what was."""
    refused = set()
    for path, message in found:
        (named,) = re.findall(r"^[\w.]+", message)
        assert any(each == named or each.startswith(f"{named}.") for each in fields), message
        # Of the same group, or of two that do not fit each other.
        assert named.split(".")[0] == path.split(".")[0] or path in message, (path, message)
        refused.add(path)
    return refused


def test_every_value_of_a_run_is_refused_by_its_full_path():
    config, _ = parse_config([*FLAGS, *MIX])
    values = {**asdict(config), "task": config.task}
    del values["optim"]["name"]  # all of timm's are looked up for it
    found = refusals(values, partial(config_from_dict, TrainConfig))
    refused = check(found, {path for path, _ in leaves(values)})
    assert {"data.mix.a.captions.txt", "tokenizer.kind", "eval.workers", "optim.lr"} < refused
    assert len(refused) > 50


@pytest.mark.parametrize("kind", TASKS)
def test_and_every_value_of_a_task(kind):
    config, _ = parse_config([*FLAGS, "--task.kind", kind, *TASKS[kind]])
    task, data = type(config.task), config.data

    def build(values: dict[str, Any]) -> None:
        config_from_dict(task, values["task"], "task").check(data)

    values = {"task": asdict(config.task)}
    fields = {path for path, _ in leaves({"data": asdict(data), **values})}
    refused = check(refusals(values, build), fields)
    assert {"task.kind", "task.model.image.encoder.heads"} < refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task.model.text.encoder.heads", "7"], "task.model.text.encoder.heads must divide"),
        (["--data.mix.a.weight", "0"], "data.mix.a.weight must be a positive number"),
        (["--tokenizer.path", ""], "tokenizer.path must name"),
        (["--tokenizer", "{kind: x}"], "tokenizer.kind: Expected one of ['sentencepiece', "),
        (["--optim.schedule.kind", "x"], "optim.schedule.kind: Expected one of ['cosine', "),
        (NATIVE, "eval.evaluators.a.native: Expected a bool"),
        (SQUARE, "eval.evaluators.a.square must hold"),
        (["--eval.evaluators", "{a: {kind: [3]}}"], "eval.evaluators.a.kind must be one of"),
    ],
)
def test_so_it_is_on_the_command_line(words, message):
    with pytest.raises(UserError) as caught:
        parse_config([*FLAGS, *MIX, *words])
    assert str(caught.value).startswith(message)


def test_so_it_is_in_an_export(tmp_path):
    path = tmp_path / "config.json"
    Description(CLIPConfig(), Preprocess(9)).write(path)
    values = json.loads(path.read_text())

    def build(changed: dict[str, Any]) -> None:
        path.write_text(json.dumps(changed))
        try:
            Description.read(path)
        except UserError as error:
            raise ValueError(str(error).removeprefix(f"cannot read {path}: ")) from error

    said = [message for each, message in refusals(values, build) if "." in each]
    assert all(re.match(r"(model|preprocess)\.", message) for message in said)
    assert any(message.startswith("model.image.encoder.heads must divide") for message in said)
    assert any(message.startswith("preprocess.max_tokens must be") for message in said)
