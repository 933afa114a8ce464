"""Help and the page on the configuration: short, complete, and as the fields are."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from marks_task import MarksConfig

from navit_clip.configs import descriptions
from navit_clip.tasks.contrastive import ContrastiveConfig
from navit_clip.training.config import TrainConfig, parse_config
from navit_clip.training.reference import help_text, page, reference

PAGE = Path(__file__).parents[2] / "docs/configuration.md"
FLAGS = ["--run_dir", "x", "--steps", "3", "--tokenizer.path", "t.model"]


def test_the_page_is_that_of_the_fields():
    assert PAGE.read_text() == page(), (
        "a field has changed: python -m navit_clip.training.reference > docs/configuration.md"
    )


def test_the_reference_is_a_configuration_of_nothing_but_defaults(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(reference(ContrastiveConfig))
    assert parse_config(["--config", str(path), *FLAGS]) == parse_config(FLAGS)


def test_groups_that_may_be_null_are_printed_with_their_fields():
    text = reference(ContrastiveConfig)
    assert "tokenizer: null  # these fields | null\n#   # sentencepiece; open_clip for" in text
    assert "\n#   kind: sentencepiece  # sentencepiece | open_clip | huggingface\n" in text
    assert "\n  #   NAME:\n  #     # Its shards" in text
    assert "\n  #     # shards: str | list[str], required\n" in text
    described = "# Column of a table that holds the path"
    assert text.count(described) == 1  # of data.files alone


def test_the_fields_of_a_command_are_printed_with_what_they_are(tmp_path):
    flags = [*FLAGS, "--data.mix", "{a: {shards: a.tar}, b: {shards: [b.tar], weight: 2}}"]
    flags += ["--optim.betas", "[0.8, 0.9]", "--task.captions", "{txt: 1.0}", "--optim.lr", "1e-4"]
    text = help_text([*flags, "--print_config=comments"], "train")
    assert "# Peak learning rate.\n  lr: 0.0001  # float\n" in text
    (tmp_path / "all.yaml").write_text(text)
    assert parse_config(["--config", str(tmp_path / "all.yaml")])[0] == parse_config(flags)[0]


@pytest.mark.parametrize("task", [ContrastiveConfig, MarksConfig])
def test_every_field_is_described(task):
    def check(config: object) -> None:
        described = descriptions(type(config))
        for field in fields(config):
            assert described[field.name]
            if is_dataclass(value := getattr(config, field.name)):
                check(value)

    check(parse_config(FLAGS)[0])
    assert "task:\n" in reference(task)


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_a_screen(word):
    text = help_text(["--config", "demo", word], "navit-clip train")
    assert text.startswith("usage: navit-clip train --config")
    assert text.count("\n") < 40
    assert "--help-all" in text


def test_help_all_is_of_the_task_that_is_chosen():
    assert help_text(["--help-all"], "train") == reference(ContrastiveConfig)
    assert help_text(["--optim.lr", "1"], "train") is None
    assert {field.name for field in fields(TrainConfig)} <= {
        line.lstrip("# ").partition(":")[0] for line in reference(ContrastiveConfig).splitlines()
    }
