"""The trainer from the outside: what a run writes, how it continues, what a mistake prints."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from launch import launch, run_to_end
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip.errors import UserError
from navit_clip.model import NaViTCLIP
from navit_clip.training.config import parse_config
from navit_clip.training.schedule import ScheduleConfig, lr_multiplier
from navit_clip.training.step import Stepper

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root)
    return root


def metrics(run_dir):
    complete = (run_dir / "metrics.jsonl").read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def losses(run_dir):
    keys = ("step", "loss", "grad_norm", "tokens_seen", "flops_seen")
    return [tuple(line[key] for key in keys) for line in metrics(run_dir)]


def test_a_run_writes_metrics_config_checkpoint_and_model(data, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    assert run(monkeypatch, tiny_flags(data, run_dir, 6, data__drop__rate=0.3)) == 0
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert {"loss", "lr", "logit_scale", "grad_norm", "examples_per_s", "tokens_per_s"} <= set(
            line
        )
        assert {"padding", "data_wait", "token_drop", "examples", "skipped"} <= set(line)
    assert (run_dir / "config.yaml").read_text().count("image: 96") == 1
    assert (run_dir / "checkpoints/step-00000006/run.json").is_file()
    pretrained = NaViTCLIP.from_directory(run_dir / "model")
    assert pretrained.preprocess.max_tokens == 16
    assert pretrained.encode_text(["a red circle"]).shape == (1, 16)
    output = capsys.readouterr().out
    assert "step 6/6: loss" in output
    assert "data.drop.kind is none, so no patch is dropped (unused: rate)" in output


def test_the_saved_config_starts_the_same_run(data, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    run(monkeypatch, tiny_flags(data, first, 3))
    code = run(monkeypatch, ["--config", str(first / "config.yaml"), "--run_dir", str(second)])
    assert code == 0
    assert losses(first) == losses(second)


def test_loss_falls(data, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    flags = tiny_flags(
        data, run_dir, 80, optim__lr=3e-3, data__budget__tokens__image=256, optim__weight_decay=0.0
    )
    assert run(monkeypatch, flags) == 0
    values = [line["loss"] for line in metrics(run_dir)]
    assert sum(values[-10:]) < 0.8 * sum(values[:10])


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_finished_run_continued_for_longer_equals_an_uninterrupted_one(
    data, tmp_path, monkeypatch, workers
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    constant = {"optim__schedule__kind": "constant", "data__workers": workers}
    run(monkeypatch, tiny_flags(data, whole, 9, **constant))
    for steps in (3, 6, 9):
        assert run(monkeypatch, tiny_flags(data, parts, steps, **constant)) == 0
    assert losses(parts) == losses(whole)
    ends = [NaViTCLIP.from_directory(d / "model").state_dict() for d in (whole, parts)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_finished_run_trains_no_further(data, tmp_path, monkeypatch, capsys):
    flags = tiny_flags(data, tmp_path / "run", 2)
    run(monkeypatch, flags)
    before = losses(tmp_path / "run")
    assert run(monkeypatch, flags) == 0
    assert losses(tmp_path / "run") == before
    assert "continuing from step 2" in capsys.readouterr().out


def has_logged(run_dir, steps):
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") >= steps


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_by_a_signal_continues_with_the_same_command(
    data, tmp_path, monkeypatch, stop, code
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    steps, options = 40, {"checkpoint__every_steps": 4, "data__workers": 1}
    command = [sys.executable, "-m", "train", *tiny_flags(data, stopped, steps, **options)]
    # Of a process that ends by itself the end is looked at too.
    with launch(command, tmp_path / "out", forked=stop == signal.SIGKILL) as running:
        running.until(lambda: has_logged(stopped, 10), "step 10")
        running.send_signal(stop)
        assert running.wait() == code, running.tail()
    output = running.output.read_text()
    # A worker whose trainer was killed in the middle of a batch may say so before it ends.
    assert stop == signal.SIGKILL or "Traceback" not in output
    assert stop == signal.SIGKILL or "stopping after this step" in output
    done = len(losses(stopped))
    assert 10 <= done < steps
    run_to_end(command, tmp_path / "more", forked=True)
    assert "continuing from step" in (tmp_path / "more").read_text()
    assert run(monkeypatch, tiny_flags(data, whole, steps, **options)) == 0
    assert losses(stopped) == losses(whole)


# torch tells of a killed worker by a signal, whose error may be raised in a destructor as well.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_data_worker_is_one_line(data, tmp_path, monkeypatch, capfd):
    begin_step = Stepper.begin
    others = multiprocessing.active_children()  # of other tests, such as Triton's interpreter

    def begin(stepper, batches, number, *announced, **options):
        if number == 5:
            (worker,) = (p for p in multiprocessing.active_children() if p not in others)
            os.kill(worker.pid, signal.SIGKILL)
        return begin_step(stepper, batches, number, *announced, **options)

    monkeypatch.setattr(Stepper, "begin", begin)
    run_dir = tmp_path / "run"
    options = {"data__workers": 1, "data__prefetch": 2, "checkpoint__every_steps": 4}
    assert run(monkeypatch, tiny_flags(data, run_dir, 100, **options)) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("train: error: DataLoader worker ")  # its pid, or how it ended
    assert "lower data.workers" in line
    assert (run_dir / "checkpoints/step-00000004/run.json").is_file()
    assert multiprocessing.active_children() == others


def test_sigmoid_loss_trains(data, tmp_path, monkeypatch):
    flags = tiny_flags(
        data, tmp_path / "run", 3, task__loss__kind="sigmoid", task__model__init_bias=-10
    )
    assert run(monkeypatch, flags) == 0
    # That of each step's loss, before the step changes it.
    before, after = (metrics(tmp_path / "run")[i]["logit_bias"] for i in (0, 2))
    assert before == -10 != after


def test_print_config_shows_every_default(data, tmp_path, monkeypatch, capsys):
    flags = tiny_flags(data, tmp_path / "run", 2)
    assert run(monkeypatch, [*flags, "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert "qk_norm: true" in shown
    assert "clip_norm: 1.0" in shown


@pytest.mark.parametrize("recipe", ["swin_small", "finetune_open_clip_b16_native"])
def test_print_config_resolves_what_a_name_gives_and_reads_it_again(
    recipe, tmp_path, monkeypatch, capsys
):
    assert run(monkeypatch, ["--config", recipe, "--print_config"]) == 0
    shown = capsys.readouterr().out
    wanted, _ = parse_config(["--config", recipe])
    assert f"width: {wanted.task.model.image.encoder.width}" in shown
    (tmp_path / "shown.yaml").write_text(shown)
    assert parse_config(["--config", str(tmp_path / "shown.yaml")])[0] == wanted


def test_a_models_name_that_changes_nothing_is_refused():
    with pytest.raises(UserError, match=r"task\.model\.name=navit_s14 changes nothing"):
        parse_config(["--config", "navit_b16_webli", "--task.model.name", "navit_s14"])


MISTAKES = [
    ({"data__train": "nowhere"}, "nowhere"),
    ({"optim__lrr": 1}, "optim.lrr"),
    ({"optim__lr": "fast"}, "optim.lr"),
    ({"optim__lr": -1}, "optim.lr"),
    ({"task__model__image__encoder__heads": 5}, "heads"),
    ({"data__budget__tokens__image": 8}, "data.budget.tokens.image"),
    ({"data__budget__tokens__text": 8}, "data.budget.tokens.text"),
    ({"tokenizer__path": "missing.model"}, "missing.model"),
    ({"task__model__text__vocab_size": 16}, "vocab_size"),
    ({"task__loss__kind": "sigmoid"}, "init_bias"),
    ({"task__captions": "{json.nothing: 1.0}", "data__max_bad_samples": 5}, "no_caption"),
    ({"config": "missing.yaml"}, "missing.yaml"),
    ({"optim__schedule__warmup_steps": 99}, "warm-up"),
]


@pytest.mark.parametrize(("change", "named"), MISTAKES)
def test_a_mistake_gets_one_line_that_names_it(data, tmp_path, monkeypatch, capsys, change, named):
    code = run(monkeypatch, tiny_flags(data, tmp_path / "run", 4, **change))
    captured = capsys.readouterr()
    assert code == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert named in lines[0]
    assert lines[0].startswith("train: error: ")


def test_a_run_directory_that_cannot_be_written(data, tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run(monkeypatch, tiny_flags(data, blocked / "run", 2)) == 2
    line = capsys.readouterr().err.strip()
    assert str(blocked) in line
    assert "\n" not in line


def test_an_empty_shard_and_a_corrupt_image(data, tmp_path, monkeypatch, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "0.tar").write_bytes(b"")
    flags = tiny_flags(data, tmp_path / "run", 2, data__train=shards)
    assert run(monkeypatch, flags) == 2
    assert "0.tar" in capsys.readouterr().err
    good = (data / "shapes/train/00000.tar").read_bytes()
    (shards / "1.tar").write_bytes(good)
    broken = bytearray(good)
    start_of_image = broken.find(b"\xff\xd8\xff")
    broken[start_of_image : start_of_image + 400] = bytes(400)
    (shards / "2.tar").write_bytes(broken)
    # Enough steps for every sample to be read.
    assert run(monkeypatch, tiny_flags(data, tmp_path / "run2", 8, data__train=shards)) == 0
    assert sum(line["skipped"] for line in metrics(tmp_path / "run2")) >= 2
    out = capsys.readouterr().out
    assert "unreadable_image" in out
    assert "bad_shard" in out


def test_another_number_of_workers_continues_a_run(data, tmp_path, monkeypatch, capsys):
    run(monkeypatch, tiny_flags(data, tmp_path / "run", 2))
    flags = tiny_flags(data, tmp_path / "run", 4, data__workers=2)
    assert run(monkeypatch, flags) == 0
    assert "continuing from step 2" in capsys.readouterr().out
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_non_finite_loss_stops_with_the_step_and_the_pairs(data, tmp_path, monkeypatch, capsys):
    flags = tiny_flags(
        data, tmp_path / "run", 30, optim__lr=1e12, optim__clip_norm=0, optim__weight_decay=0
    )
    assert run(monkeypatch, flags) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert "at step" in line
    assert "examples 0000" in line


def test_every_recipe_parses():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config, _ = parse_config(["--config", str(path)])
        assert config.steps > 0


def test_schedules():
    cosine = ScheduleConfig("cosine", warmup_steps=10)
    shares = [lr_multiplier(cosine, step, 100) for step in range(100)]
    assert shares[:10] == sorted(shares[:10])
    assert max(shares) == shares[10] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] < 1e-3
    rsqrt = ScheduleConfig("rsqrt", warmup_steps=10, cooldown_steps=20, timescale=30)
    assert lr_multiplier(rsqrt, 40, 200) == pytest.approx(2**-0.5)
    assert lr_multiplier(rsqrt, 199, 200) == pytest.approx((30 / (30 + 189)) ** 0.5 / 21)
    assert lr_multiplier(ScheduleConfig("constant"), 5, 10) == 1.0
    assert lr_multiplier(ScheduleConfig(final_share=0.1), 99, 100) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_the_wait_for_a_dead_server_at_once(data, tmp_path, workers):
    flags = {"data.train": "http://127.0.0.1:9/{0..3}.tar", "data.workers": str(workers)}
    words = tiny_flags(data, tmp_path / "run", 5, **flags)
    command = [sys.executable, "-m", "train", *words]
    with launch(command, tmp_path / "out", forked=True) as running:
        running.until(lambda: "waiting for http://127.0.0.1:9/" in running.tail(), "a notice")
        running.send_signal(signal.SIGINT)
        assert running.wait(8) == 130
        assert running.tail().endswith("interrupted\n")
        assert "Traceback" not in running.tail()
    assert not (tmp_path / "run").exists()
