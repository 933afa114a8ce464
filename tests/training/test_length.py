"""Runs of samples and epochs: where they end, their learning rate, and after a kill the same."""

import json
import math
import shutil

import pytest
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip.training.config import parse_config
from navit_clip.training.length import RunLength
from navit_clip.training.schedule import ScheduleConfig, lr_multiplier

PAIRS = 96  # of the tiny data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root, train=PAIRS)
    return root


def flags_of(data, run_dir, **changes):
    """Flags of a run without `steps`, those of the test in their place."""
    options = {"checkpoint__every_steps": 4, "data__budget__tokens__image": 192, **changes}
    flags = tiny_flags(data, run_dir, 0, **options)
    at = flags.index("--steps")
    return flags[:at] + flags[at + 2 :]


def metrics(run_dir):
    complete = (run_dir / "metrics.jsonl").read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def course(run_dir):
    names = ("step", "samples_seen", "loss", "lr", "grad_norm")
    return [tuple(line[name] for name in names) for line in metrics(run_dir)]


@pytest.mark.parametrize("kind", ["cosine", "rsqrt", "constant"])
def test_a_schedule_in_samples_is_that_in_steps_of_equally_many_samples(kind):
    steps, per_step = 40, 7
    by_steps = ScheduleConfig(kind, warmup_steps=6, cooldown_steps=8, timescale=5)
    by_samples = ScheduleConfig(
        kind, warmup_samples=6 * per_step, cooldown_samples=8 * per_step, timescale=5
    )
    length = RunLength(samples=steps * per_step)
    for step in range(1, steps):
        seen = step * per_step
        expected = length.expected_steps(step, seen)
        assert expected == pytest.approx(steps)
        wanted = lr_multiplier(by_steps, step, steps)
        for config in (by_steps, by_samples):
            assert lr_multiplier(config, step, expected, seen) == pytest.approx(wanted)
    assert lr_multiplier(by_steps, 0, length.expected_steps(0, 0)) == 1 / 7
    assert lr_multiplier(by_samples, 0, math.inf) == 0


def test_a_cosine_follows_the_samples_however_many_a_step_has():
    length, config = RunLength(samples=1000), ScheduleConfig("cosine", warmup_samples=100)
    for step, seen in ((3, 100), (50, 550), (400, 999)):
        wanted = 0.5 * (1 + math.cos(math.pi * (seen - 100) / 900))
        found = lr_multiplier(config, step, length.expected_steps(step, seen), seen)
        assert found == pytest.approx(wanted)


def test_a_run_of_samples_ends_with_the_step_that_reaches_them(data, tmp_path, monkeypatch):
    flags = flags_of(data, tmp_path / "run", samples=1e2, accumulate=2)
    assert run(monkeypatch, flags) == 0
    lines = metrics(tmp_path / "run")
    sums = [sum(line["examples"] for line in lines[: i + 1]) for i in range(len(lines))]
    assert [line["samples_seen"] for line in lines] == sums
    assert sums[-2] < 100 <= sums[-1]
    assert (tmp_path / f"run/checkpoints/step-{len(lines):08d}").is_dir()
    length, schedule = RunLength(samples=100), ScheduleConfig(warmup_steps=2)
    for step, seen in enumerate([0, *sums[:-1]]):
        wanted = lr_multiplier(schedule, step, length.expected_steps(step, seen), seen)
        assert lines[step]["lr"] == 1e-3 * wanted


def test_a_continued_run_of_epochs_ends_as_an_undisturbed_one(data, tmp_path, monkeypatch, capsys):
    changes = {"epochs": 1.5, "optim__schedule__cooldown_steps": 3, "ema__decay": 0.9}
    flags, run_dir = flags_of(data, tmp_path / "run", **changes), tmp_path / "run"
    assert run(monkeypatch, flags) == 0
    assert "144 samples are about" in capsys.readouterr().out
    whole = course(run_dir)
    assert whole[-2][1] < 144 <= whole[-1][1]
    checkpoints = sorted((run_dir / "checkpoints").iterdir())
    for later in checkpoints[1:]:
        shutil.rmtree(later)
    assert checkpoints[0].name < f"step-{len(whole):08d}"
    assert run(monkeypatch, flags) == 0
    assert course(run_dir) == whole
    capsys.readouterr()
    assert run(monkeypatch, flags) == 0  # finished: nothing more to do
    assert course(run_dir) == whole
    assert "changed since" not in capsys.readouterr().out
    assert run(monkeypatch, flags_of(data, run_dir, **{**changes, "epochs": 1})) == 2
    assert "samples=96, but the run in" in capsys.readouterr().err


def test_a_flag_takes_the_place_of_the_length_in_a_recipe(data, tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 7\n")
    flags = ["--config", str(recipe), *flags_of(data, tmp_path / "run")]
    assert parse_config(flags)[0].length == RunLength(steps=7)
    assert parse_config([*flags, "--samples=13e9"])[0].length == RunLength(samples=13_000_000_000)
    assert run(monkeypatch, [*flags, "--samples", "9", "--epochs", "2"]) == 2
    assert "got samples=9.0 and epochs=2.0" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [96, 960])
def test_data_that_repeats_within_a_batch_is_named(data, tmp_path, monkeypatch, capsys, tokens):
    changes = {"data__train": data / "shapes/train/00000.tar", "data__look_ahead": 1}
    changes |= {"data__shuffle_buffer": 1, "optim__schedule__warmup_steps": 0, "samples": 1}
    flags = flags_of(data, tmp_path / "run", data__budget__tokens__image=tokens, **changes)
    assert run(monkeypatch, flags) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("the first batch of ")]
    assert len(found) == (tokens == 960)
    assert all("samples has only 24 different ones: the data is small" in line for line in found)


MISTAKES = [
    ({}, "steps, samples, epochs: give one, how long the run is; got none"),
    ({"samples": 0}, "samples must be at least 1"),
    ({"epochs": -1}, "epochs must be above 0"),
    ({"epochs": "nan"}, "epochs"),
    ({"epochs": 1, "data__samples": 0}, "samples must be at least 1"),
    ({"epochs": 1, "data__train": "https://host/{0..3}.tar"}, "give data.samples"),
    ({"epochs": 1, "data__train": "nowhere"}, "nowhere"),
    ({"epochs": 1, "optim__schedule__warmup_steps": 900}, "steps cannot hold 900 of warm-up"),
    ({"samples": 90, "optim__schedule__warmup_samples": 100}, "optim.schedule.warmup_samples: "),
]


@pytest.mark.parametrize(("change", "named"), MISTAKES)
def test_a_mistake_gets_one_line(data, tmp_path, monkeypatch, capsys, change, named):
    assert run(monkeypatch, flags_of(data, tmp_path / "run", **change)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
    assert not (tmp_path / "run").exists()
