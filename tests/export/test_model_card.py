"""The model card: what the files and the run say, in the Hub's format, and no secret."""

from __future__ import annotations

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from eval_cases import run, write_classes
from huggingface_hub import ModelCard

from navit_clip import NaViTCLIP
from navit_clip.errors import UserError
from navit_clip.export import card
from navit_clip.export.card import add_evaluation, write_card
from navit_clip.export.description import Description
from navit_clip.tasks.run_card import write_run_card
from navit_clip.training.config import parse_config


@pytest.fixture
def directory(model_dir: Path, tmp_path: Path) -> Path:
    """A run's export, without its run."""
    target = tmp_path / "shapes-b16" / "model"
    NaViTCLIP.from_pretrained(model_dir).save_pretrained(target)
    return target


def split(directory: Path) -> tuple[dict[str, Any], str]:
    """The header's values, and the rest."""
    _, header, body = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), body


def rows(body: str) -> dict[str, str]:
    """First to second cell of all tables."""
    cells = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("|")]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def write_run(run_dir: Path, captions: str = '{"txt": 1.0}', **data: object) -> None:
    """What a training run leaves, its configuration written by the trainer's own parser."""
    flags = {
        "run_dir": run_dir,
        "steps": 30,
        "tokenizer.kind": "open_clip",
        "optim.lr": 0.002,
        "seed": 5,
        "task.captions": captions,
        **{f"data.{name}": value for name, value in data.items()},
    }
    _, resolved = parse_config([word for k, v in flags.items() for word in (f"--{k}", str(v))])
    (run_dir / "config.yaml").write_text(resolved)
    lines = [
        {"step": 10 * i, "loss": 3.0 / i, "examples": 1000, "logit_scale": 14.3} for i in (1, 2)
    ]
    lines.append({"step": 20, "eval/held-out/top1": 0.5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text + '{"step": 30, "lo')  # cut by a kill


def test_a_card_without_a_run(directory):
    header, body = split(directory)
    assert header["library_name"] == "navit-clip"
    assert header["pipeline_tag"] == "zero-shot-image-classification"
    assert "license" not in header  # the user's choice
    assert ModelCard.load(directory / "README.md").data.to_dict() == header
    assert body.startswith("\n# ")
    model = NaViTCLIP.from_pretrained(directory)
    table = rows(body)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert table["parameters"] == f"{count / 1e6:.1f}M"
    assert table["embedding"] == "8 numbers"
    assert "patches of 8×8" in table["image tower"]
    assert table["images"].startswith("at most 12 patches")
    assert table["texts"].startswith("at most 16 of ")
    for heading in ("## Training", "## Evaluation"):
        assert heading not in body


def test_a_card_of_a_run(directory):
    run_dir = directory.parent
    write_run(run_dir, train="shards/{00..11}.tar", captions='{"txt": 1.0, "json.alt": 0.5}')
    write_run_card(directory, run_dir)
    _, body = split(directory)
    assert "# shapes-b16\n" in body
    table = rows(body)
    assert table["data"] == "`shards/{00..11}.tar`"
    assert table["captions"] == "txt, json.alt"
    assert table["steps"] == "20"
    assert table["examples seen"] == "2,000"
    assert table["last loss"] == "1.5"
    assert table["optimiser"].startswith("lr 0.002")
    assert table["seed"] == "5"
    assert "## Evaluation" not in body


def evaluations(directory: Path) -> list[str]:
    """Lines of the table of evaluations."""
    section = (directory / "README.md").read_text().partition("## Evaluation\n")[2]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def test_an_evaluation_becomes_a_line_of_the_card(directory):
    file = directory / "README.md"
    file.write_text(file.read_text().replace("# license: choose one", "license: mit #"))
    before = file.read_text()
    add_evaluation(directory, "Zero-shot", "a|b", "9 images", "top-1 50%")
    add_evaluation(directory, "Retrieval", "a|b", "9 images", "R@1 20%")
    assert file.read_text().startswith(before)
    file.write_text(file.read_text() + "\nMore of mine.\n")
    add_evaluation(directory, "Zero-shot", "a|b", "9 images", "top-1 60%")
    assert evaluations(directory) == [
        "| Retrieval | a\\|b | 9 images | R@1 20% |",
        "| Zero-shot | a\\|b | 9 images | top-1 60% |",
    ]
    assert file.read_text().startswith(before)
    assert file.read_text().endswith("\n\nMore of mine.\n")
    NaViTCLIP.from_pretrained(directory).save_pretrained(directory)
    write_run_card(directory, directory.parent)  # the same run started again
    assert len(evaluations(directory)) == 2


def test_results_of_other_weights_do_not_stay(directory):
    add_evaluation(directory, "Zero-shot", "a", "9 images", "top-1 50%")
    config = directory / "config.json"
    trained_on = replace(Description.read(config), weights_sha256="0" * 64)
    trained_on.write(config)
    add_evaluation(directory, "Retrieval", "a", "9 images", "R@1 20%")
    assert evaluations(directory) == ["| Retrieval | a | 9 images | R@1 20% |"]
    replace(trained_on, weights_sha256="1" * 64).write(config)
    write_run_card(directory, directory.parent)
    assert "## Evaluation" not in (directory / "README.md").read_text()


def test_evaluations_at_once_all_get_their_line(directory):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add_evaluation(directory, "Zero-shot", f"{i}", "", ""), range(32)))
    assert len(evaluations(directory)) == 32


def test_a_card_that_was_removed_or_is_a_link_is_left_alone(directory, tmp_path):
    (directory / "README.md").rename(tmp_path / "card")
    add_evaluation(directory, "Zero-shot", "a", "", "")
    assert not (directory / "README.md").exists()
    (directory / "README.md").symlink_to(tmp_path / "card")
    add_evaluation(directory, "Zero-shot", "a", "", "")
    assert "## Evaluation" not in (tmp_path / "card").read_text()


def test_the_command_adds_its_result_or_says_why_not(directory, tmp_path, monkeypatch, capsys):
    data = write_classes(tmp_path / "classes")
    words = ["zeroshot", "--model", directory, "--data", data, "--templates", "plain"]
    assert run(*words, "--workers", 0) == 0
    assert evaluations(directory) == []
    assert run(*words, "--workers", 0, "--output", tmp_path / "r.json") == 0
    (line,) = evaluations(directory)
    top1 = json.loads((tmp_path / "r.json").read_text())["top1"]
    assert line.startswith(f"| Zero-shot | {data} | 11 images, 4 classes, at most 12 patches, fp32")
    assert f"| top-1 {top1:.1%}, top-5 " in line

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(card, "atomic_write", refuse)
    assert run(*words, "--workers", 0, "--output", tmp_path / "r.json") == 0
    said = capsys.readouterr().err
    assert f"cannot write the model card of {directory}: Read-only file system; the result" in said


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "https://user:secret@host/a/{0..9}.tar?token=secret#secret",
            "`https://host/a/{0..9}.tar`",
        ),
        ("pipe:curl -H secret https://host/a.tar", "the output of a command"),
        ("train.txt", "`train.txt`"),
    ],
)
def test_what_may_be_secret_is_not_in_the_card(directory, source, expected):
    write_run(directory.parent, train=source, allow_commands="true")
    write_run_card(directory, directory.parent)
    _, body = split(directory)
    assert rows(body)["data"] == expected
    assert "secret" not in body


def test_a_mix_is_listed_by_name(directory):
    mix = {"web": {"shards": ["a.tar", "b.tar"]}, "coco": {"shards": "pipe:secret", "weight": 2}}
    write_run(directory.parent, mix=json.dumps(mix), allow_commands="true")
    write_run_card(directory, directory.parent)
    table = rows(split(directory)[1])
    assert table["data"] == "web: `a.tar`, web: `b.tar`, coco: the output of a command"
    assert table["captions"] == "txt"


def test_captions_are_those_of_each_dataset(directory):
    mix = {"web": {"shards": "a.tar", "captions": {"json.alt": 1, "txt": 2}}, "b": {"shards": "b"}}
    write_run(directory.parent, mix=json.dumps(mix))
    write_run_card(directory, directory.parent)
    table = rows(split(directory)[1])
    assert table["captions"] == "web: json.alt, web: txt, b: txt"


def test_the_last_results_of_evaluations_during_training_are_listed(directory):
    write_run(directory.parent)
    with (directory.parent / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 30, "eval/held-out/top1": 0.75, "eval/held-out/seconds": 3}\n')
    write_run_card(directory, directory.parent)
    _, body = split(directory)
    assert "| held-out/top1 | 30 | 0.75 |" in body
    assert "seconds" not in body


@pytest.mark.parametrize("content", ["", "[1]", "{", "\x00", "{data: 3}", "a: [", "null"])
def test_a_run_of_odd_files_still_gets_a_card(directory, content):
    run_dir = directory.parent
    for name in ("config.yaml", "metrics.jsonl"):
        (run_dir / name).write_text(content)
    write_run_card(directory, run_dir)
    assert split(directory)[0]["library_name"] == "navit-clip"


def test_a_pipe_in_a_value_does_not_break_the_table(directory):
    write_run(directory.parent, train="a|b.tar")
    write_run_card(directory, directory.parent)
    assert "| data | `a\\|b.tar` |" in split(directory)[1]


def test_no_model_no_card(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        write_card(tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        write_run_card(tmp_path, tmp_path)


def test_a_cards_names_are_plain_text(directory, tmp_path):
    write_run_card(directory, tmp_path / "run <img src=x> [a](b)")
    text = (directory / "README.md").read_text()
    assert "<img" not in text
    assert "[a]" not in text


def test_weights_may_be_read_by_whom_the_rest_may(model_dir):
    modes = {path.name: path.stat().st_mode & 0o777 for path in model_dir.iterdir()}
    assert len(set(modes.values())) == 1, modes
