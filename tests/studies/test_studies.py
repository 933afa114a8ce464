"""Studies: a small one that is interrupted and goes on, and what is made of results."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml
from tiny_run import run as train_by_hand
from tiny_run import write_tiny_data

from navit_clip.data.shards import add_member
from navit_clip.errors import UserError
from navit_clip.files import locked
from navit_clip.training.config import parse_config
from navit_clip.training.trainer import Progress
from studies import __file__ as package
from studies import report, runs
from studies.__main__ import main
from studies.split import part_of, split
from studies.study import Run, merged, read_study

HERE = Path(package).parent
PAGES, PUBLISHED = HERE.parent / "docs/studies", sorted(HERE.glob("results/*.tar.xz"))
ENCODER = {"width": 16, "depth": 1, "heads": 2}
NAMES = {"kind": "zeroshot", "data": "$data/shapes/zeroshot", "templates": "plain"}
STUDY = {
    "title": "Tiny",
    "question": "Does it run?",
    "flops": 8e7,
    "points": 1,
    "baseline": "square",
    "lrs": [1e-3],
    "seeds": [0],
    "recipe": {
        "steps": 1,
        "tokenizer": {"path": "$data/tok.model"},
        "task": {
            "model": {
                "embed_dim": 8,
                "image": {"encoder": ENCODER},
                "text": {"vocab_size": 128, "context_length": 32, "encoder": ENCODER},
            }
        },
        "data": {
            "train": "$data/shapes/train",
            "workers": 0,
            "shuffle_buffer": 16,
            "look_ahead": 4,
            "resolution": {"min_side": 32, "max_side": 48, "max_tokens": 9},
            "budget": {"tokens": {"image": 48, "text": 512}, "max_examples": 32},
        },
    },
    "arms": {
        "square": {"data": {"resolution": {"mode": "square"}}},
        "falling": {
            "data": {"drop": {"kind": "beta", "schedule": "sigmoid", "schedule_images": "$images"}}
        },
    },
    "validation": NAMES,
    "tests": {
        "names": {**NAMES, "max_tokens": [4], "square": [32]},
        "captions": {
            "kind": "retrieval",
            "images": "$data/shapes/retrieval/images",
            "captions": "$data/shapes/retrieval/captions.json",
        },
    },
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Threads that wait for each other take several times as long beside other tests."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root)
    return root


def write_study(folder: Path, name: str = "tiny", **changes: object) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    return path


def command(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: line[k] for k in ("step", "loss", "grad_norm", "flops", "examples")} for line in lines
    ]


def test_a_study_goes_on_where_it_was_interrupted(data, tmp_path, monkeypatch, capsys):
    path, out = write_study(tmp_path), tmp_path / "out"
    words = (path, "--data", data, "--out", out)
    advance, score, calls = Progress.advance, runs.score, []

    def interrupted(self: Progress, samples: int) -> None:
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        advance(self, samples)

    monkeypatch.setattr(Progress, "advance", interrupted)
    assert command("run", *words, "--workers", "0") == 130
    monkeypatch.setattr(Progress, "advance", advance)
    monkeypatch.setattr(runs, "score", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command("run", *words, "--workers", "0") == 130
    assert command("report", *words) == 2
    assert "square-lr0.001-seed0" in capsys.readouterr().err
    monkeypatch.setattr(runs, "score", score)
    assert command("run", *words, "--workers", "0") == 0

    results = {}
    for arm in STUDY["arms"]:
        folder = out / "tiny/runs" / Run(arm, 1e-3, 0).name
        assert not (folder / "checkpoints").exists()
        results[arm] = json.loads((folder / "result.json").read_text())
        end = results[arm]["points"][-1]
        assert end["step"] == len(metrics(folder))
        assert end["flops"] == sum(line["flops"] for line in metrics(folder))
        assert end["flops"] == pytest.approx(STUDY["flops"], rel=0.5)
    interrupted_run = out / "tiny/runs/square-lr0.001-seed0"
    hand = ["--config", str(interrupted_run / "train.yaml"), "--run_dir", str(tmp_path / "hand")]
    assert train_by_hand(monkeypatch, hand) == 0
    assert metrics(interrupted_run) == metrics(tmp_path / "hand")
    assert results["falling"]["points"][-1]["images"] > results["square"]["points"][-1]["images"]
    names = results["square"]["points"][-1]["scores"]["names"]
    assert names["own"] == "48px"
    assert set(names["ranks"]) == {"4", "9", "32px", "48px"}
    assert len(names["ranks"]["4"]["top-1"]) == len(names["sizes"]) == 48

    assert command("report", *words, "--docs", tmp_path / "docs") == 0
    page = (tmp_path / "docs/tiny.md").read_text()
    assert "On captions (T→I) `falling` needs" in page
    assert (tmp_path / "docs/tiny.png").stat().st_size > 10_000
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert command("run", *words) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    write_study(tmp_path, tests={**STUDY["tests"], "more": NAMES})
    assert command("report", *words) == 2
    assert "lacks the tests more" in capsys.readouterr().err
    write_study(tmp_path, flops=9e7)
    (out / "tiny/runs/square-lr0.001-seed0/result.json").unlink()
    assert command("run", *words) == 2
    assert "another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_study_goes_on(data, tmp_path):
    """As above, with a real SIGKILL; slow for the start of two processes."""
    path = write_study(tmp_path, arms={"square": STUDY["arms"]["square"]}, flops=3e8)
    words = ["--data", data, "--workers", "0"]
    killed = [sys.executable, "-m", "studies", "run", path, *words, "--out", tmp_path / "killed"]
    folder = "tiny/runs/square-lr0.001-seed0"
    with subprocess.Popen(list(map(str, killed)), stdout=subprocess.DEVNULL) as process:
        log = tmp_path / "killed" / folder / "metrics.jsonl"
        while not (log.exists() and log.read_bytes().count(b"\n") > 9):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert 9 < len(metrics(log.parent)) < 40
    for out in ("killed", "whole"):
        assert command("run", path, *words, "--out", tmp_path / out) == 0
    killed_run, whole = (tmp_path / out / folder for out in ("killed", "whole"))
    assert metrics(killed_run) == metrics(whole)
    results = [json.loads((one / "result.json").read_text()) for one in (killed_run, whole)]
    assert results[0]["points"][-1]["scores"] == results[1]["points"][-1]["scores"]


def test_several_validations_choose_the_rate_together(monkeypatch, tmp_path):
    captions = STUDY["tests"]["captions"]
    both = {"names": NAMES, "captions": captions}
    study = read_study(str(write_study(tmp_path, lrs=[1e-3, 2e-3, 4e-3], validation=both)), {})
    assert set(study.evaluators().plans()) == {
        "validation-names", "validation-captions", "names", "captions",
    }  # fmt: skip
    # Right by rate, of four names and of two captions each way: names alone are best at the third.
    right = {1e-3: (1, 2, 1), 2e-3: (3, 2, 1), 4e-3: (4, 0, 0)}

    def read_result(_, run, out):
        names, to_text, to_image = right[run.lr]
        ways = {
            "names": {"top-1": [0] * names + [1] * (4 - names)},
            "captions": {
                "I→T": [0] * to_text + [1] * (2 - to_text),
                "T→I": [0] * to_image + [1] * (2 - to_image),
            },
        }
        scores = {f"validation-{name}": {"own": "4", "ranks": {"4": ways[name]}} for name in both}
        return {"points": [{"scores": scores}]}

    monkeypatch.setattr(runs, "read_result", read_result)
    found = [runs.validated(study, Run("square", lr, 0), tmp_path) for lr in study.lrs]
    assert found == [(1 / 4 + 3 / 4) / 2, (3 / 4 + 3 / 4) / 2, 1 / 2]
    assert runs.best_lr(study, "square", tmp_path) == 2e-3
    right[2e-3] = right[4e-3]
    assert runs.best_lr(study, "square", tmp_path) == 1e-3, "the lowest of equal ones"


def test_each_test_at_each_rate_and_rates_at_the_edge(monkeypatch, tmp_path):
    study = read_study(str(write_study(tmp_path, lrs=[1e-3, 2e-3, 4e-3])), {})

    def read_result(_, run, out):
        found = {"way": [0] * round(1000 * run.lr) + [study.right_within]}
        score = {"own": "4", "image_of": found, "ranks": {"4": found}}
        return {"points": [{"scores": dict.fromkeys(study.tests, score)}]}

    monkeypatch.setattr(report, "read_result", read_result)
    monkeypatch.setattr(report, "validated", lambda *_: 0.5)
    results = {"square": [{"lr": 2e-3}], "falling": [{"lr": 4e-3}]}
    lines = [*report._rates(study, results, tmp_path)]
    for what, row in {
        "validation": "50.0% | 50.0% | 50.0%",
        "names, way": "50.0% | 66.7% | 80.0%",
        "captions, way": "50.0% | 66.7% | 80.0%",
    }.items():
        start = lines.index(f"| {what} | 0.001 | 0.002 | 0.004 |")
        assert lines[start + 2 : start + 4] == [f"| {arm} | {row} |" for arm in study.arms]
    assert lines[-1].startswith("The lowest or highest was best for `falling`: ")


@pytest.mark.parametrize(
    "results",
    [PUBLISHED[0], *(pytest.param(path, marks=pytest.mark.slow) for path in PUBLISHED[1:])],
    ids=lambda path: path.name,
)
def test_a_published_page_is_what_its_results_say(results, tmp_path):
    name = results.name.removesuffix(".tar.xz")
    with tarfile.open(results) as tar:
        tar.extractall(tmp_path, filter="data")
    if not (PAGES / f"{name}.md").exists():
        pytest.skip("no page of it yet")
    assert command("report", name, "--out", tmp_path, "--docs", tmp_path) == 0
    assert (tmp_path / f"{name}.md").read_text() == (PAGES / f"{name}.md").read_text()


def test_a_part_depends_on_the_sample_alone(tmp_path):
    names = [f"{i:04d}" for i in range(400)]
    with tarfile.open(tmp_path / "book.tar", "w") as tar:
        for name in names:
            add_member(tar, f"{name}.jpg", name.encode())
            add_member(tar, f"{name}.txt", b"a text")
    split([str(tmp_path / "book.tar")], tmp_path / "parts")
    found = {}
    for part in ("train", "validation", "test"):
        with tarfile.open(tmp_path / "parts" / f"{part}.tar") as tar:
            members = tar.getnames()
        keys = [name.removesuffix(".jpg") for name in members[::2]]
        assert members == [f"{key}.{ext}" for key in keys for ext in ("jpg", "txt")]
        assert all(part_of(key) == part for key in keys)
        found[part] = len(keys)
    assert sum(found.values()) == 400
    assert all(0.5 < found[part] / (4 * n) < 1.5 for part, n in (("test", 15), ("validation", 10)))


@pytest.mark.parametrize("name", sorted(path.stem for path in HERE.glob("*.yaml")))
def test_studies_are_valid(name, tmp_path):
    study = read_study(name, {"out": "o", "data": "d"})
    assert set(study.evaluators().plans()) == {*study.validations, *study.tests}
    for arm in study.arms:
        recipe = {**study.recipe_of(arm, 1000), "run_dir": "r", "steps": 1000}
        assert "$" not in repr(recipe)
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(recipe))
        parse_config(["--config", str(tmp_path / "train.yaml")])
    assert "$" not in repr({**vars(study), "arms": ()})


def test_a_study_extends_another(tmp_path):
    write_study(tmp_path)
    more = tmp_path / "more.yaml"
    base = str(tmp_path / "tiny.yaml")
    more.write_text(
        yaml.safe_dump({"extends": base, "flops": 1.0, "recipe": {"data": {"workers": 3}}})
    )
    study, tiny = read_study(str(more), {}), read_study(base, {})
    assert study.recipe == merged(tiny.recipe, {"data": {"workers": 3}})
    assert (study.flops, study.arms, study.tests) == (1.0, tiny.arms, tiny.tests)
    other = {**yaml.safe_load(Path(base).read_text()), "arms": str(more)}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    assert read_study(str(tmp_path / "other.yaml"), {}).arms == tiny.arms


def test_processes_share_a_study(data, tmp_path, monkeypatch, capsys):
    path, out = write_study(tmp_path), tmp_path / "out"
    words = ("run", path, "--data", data, "--out", out, "--workers", "0")
    others = out / "tiny/runs/square-lr0.001-seed0"
    monkeypatch.setattr(runs.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with locked(others, wait=False) as free:
        assert free
        assert command(*words) == 130
        assert [p.parent.name for p in out.rglob("result.json")] == ["falling-lr0.001-seed0"]
        assert not any(others.iterdir())
    assert command(*words) == 0
    assert len(list(out.rglob("result.json"))) == 2


def test_what_another_study_has_done_is_not_done_again(data, tmp_path, monkeypatch, capsys):
    arms = STUDY["arms"]
    renamed = {"plain": arms["square"], "falling": arms["falling"]}
    other_tests = {"names": NAMES}
    first = write_study(tmp_path, "first")
    second = write_study(tmp_path, "second", arms=renamed, baseline="plain")
    third = write_study(tmp_path, "third", tests=other_tests)
    words = ("--data", data, "--out", tmp_path / "out")
    assert command("run", first, *words, "--workers", "0") == 0
    monkeypatch.setattr(runs, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    capsys.readouterr()
    assert command("run", second, *words) == 0
    assert "plain-lr0.001-seed0: the same as square of first\n" in capsys.readouterr().out
    done, taken = (
        json.loads((tmp_path / "out" / run / "result.json").read_text())
        for run in ("first/runs/square-lr0.001-seed0", "second/runs/plain-lr0.001-seed0")
    )
    assert taken == {**done, "arm": "plain"}
    assert command("report", second, *words, "--docs", tmp_path) == 0
    assert "; some runs are those of first." in (tmp_path / "second.md").read_text()
    assert command("run", third, *words) == 130, "other tests need the model"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"flops": 0}, "flops"),
        ({"baseline": "none"}, "baseline"),
        ({"seeds": []}, "seeds"),
        ({"tests": {"names": {"kind": "what"}}}, "names.kind"),
        ({"arm": {}}, "arm"),
        ({"tests": {"validation": {"kind": "zeroshot"}}}, "must not be called validation"),
        ({"validation": {}}, "validation.kind is missing"),
        ({"validation": {"data": "x", "templates": "plain"}}, "validation.kind is missing"),
        ({"validation": {"names": {"kind": "what"}}}, "validation-names.kind"),
    ],
)
def test_mistakes_are_one_line(changes, named, tmp_path, capsys):
    path = write_study(tmp_path, **changes)
    assert command("run", path, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_an_unknown_study_names_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="aspect_figures"):
        read_study("none", {})
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
