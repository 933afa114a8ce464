"""The page of one run or several: what it shows, and what it makes of runs in any state."""

import json
import re
from base64 import b64encode

import pytest
import yaml
from html_page import EVIL, Page
from PIL import Image
from report_cases import make_result

from navit_clip.__main__ import main
from navit_clip.tasks.media import webp
from navit_clip.training.report.charts import thin
from navit_clip.training.report.html import write_run_report
from navit_clip.training.report.read import read_run, read_runs

EVALUATOR = {"kind": "retrieval", "every_steps": 10}


def line_of(step, **more):
    return {
        "step": step,
        "samples_seen": 100 * step,
        "loss": 5.0 / step,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "step_s": 0.5,
        "examples_per_s": 200.0,
        "tokens_per_s": 40_000.0,
        "padding": 0.01,
        "data_wait": 0.002,
        **more,
    }


def make_run(root, name, steps=30, **config):
    """A run directory, made up."""
    directory = root / name
    directory.mkdir(parents=True)
    values = {
        "run_dir": str(directory),
        "steps": 30,
        "task": {"kind": "contrastive"},
        "optim": {"lr": 1e-3},
        "eval": {"evaluators": {"coco": EVALUATOR}},
        **config,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(values))
    lines = []
    for step in range(1, steps + 1):
        lines.append(line_of(step))
        if step % 10 == 0:
            value = {"eval/coco/text_to_image/R@1": step / 100, "eval/coco/seconds": 3.0}
            lines.append({"step": step, "samples_seen": 100 * step, **value})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
    return directory


def report_of(*directories, **flags):
    """The page that the command writes."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    assert main(["report", *map(str, directories), *words]) == 0
    return Page(directories[0].joinpath("report.html").read_text(encoding="utf-8"))


def test_a_run_in_full(tmp_path, capsys):
    directory = make_run(tmp_path, "first")
    for step, lr in ((0, 1e-3), (12, 5e-4)):
        path = directory / f"configs/step-{step:08d}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({"optim": {"lr": lr}}))
    (directory / "facts.json").write_text(json.dumps({"parameters": 12_345_678, "ranks": 2}))
    (directory / "eval").mkdir()
    result = make_result("retrieval")
    (directory / "eval/retrieval.json").write_text(json.dumps(result))
    (directory / "eval/coco-step-00000010.json").write_text(json.dumps({"step": 10, **result}))
    picture = "data:image/webp;base64," + b64encode(webp(Image.new("RGB", (9, 9)))).decode()
    rows = [{"picture": picture, "texts": {"own caption": "a red square", "margin": "-1.5"}}]
    for name, content in {
        "first_batch": {"picture": picture},
        "confusions": {"rows": rows},
        "logit_margin": {"counts": [1, 2], "edges": [0.0, 1.0, 2.0]},
    }.items():
        (directory / "media").mkdir(exist_ok=True)
        (directory / f"media/{name}.json").write_text(json.dumps({"step": 20, **content}))
    page = report_of(directory)
    assert capsys.readouterr().out == f"Report: {directory / 'report.html'}\n"
    text = " ".join(page.words)
    assert "finished, step 30 of 30, contrastive, parameters 12,345,678, ranks 2" in text
    for shown in ("loss", "grad_norm", "tokens_per_s", "eval/coco/text_to_image/R@1"):
        assert shown in page.words
    assert "from step 12: optim.lr 0.001 → 0.0005" in text
    assert text.count("Retrieval: 1,200 images") == 1  # those of the training are curves
    assert "coco T→I R@1 30.0% 30.0% (30)" in text
    assert "a red square" in text
    assert page.tags["img"] == 2
    assert page.tags["script"] == 0
    assert (directory / "report.html").stat().st_size < 500_000


def test_runs_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [
        make_run(tmp_path / "a", "same"),
        make_run(tmp_path / "b", "same", optim={"lr": 3e-3}),
        make_run(tmp_path, "third", steps=5, data={"workers": 4}),
    ]
    assert main(["report", *map(str, runs), "--output", "out/all.html"]) == 0
    page = Page((tmp_path / "out/all.html").read_text(encoding="utf-8"))
    text = " ".join(page.words)
    assert "3 runs" in text
    assert "third : stopped, step 5 of 30" in text.replace("third:", "third :")
    differences = text[text.index("Configuration differences") :]
    assert re.search(r"optim\.lr 0\.001 0\.003 0\.001", differences)
    assert re.search(r"data\.workers – – 4", differences)
    assert "run_dir" not in differences[: differences.index("Evaluations")]
    assert "samples seen" in page.words  # the axis
    assert all(name in text for name in (str(runs[0]), str(runs[1])))  # of one name


@pytest.mark.parametrize(
    ("content", "state", "damaged"),
    [
        (None, "no step logged yet", 0),
        ("", "no step logged yet", 0),
        ("{", "no step logged yet", 0),
        (json.dumps(line_of(3)) + '\n{"step": 4, "lo', "stopped, step 3 of 30", 0),
        ("[1]\n\x00\n" + json.dumps(line_of(3)) + "\n", "stopped, step 3 of 30", 2),
        (json.dumps(line_of(3, loss=None)) + "\n", "stopped, step 3 of 30", 0),
        (json.dumps({"step": 30}) + "\n", "finished, step 30 of 30", 0),
        ('{"step": "x"}\n{"step": 1, "loss": [2]}\n', "no step logged yet", 2),
    ],
)
def test_an_empty_running_or_damaged_run_shows_what_it_has(tmp_path, content, state, damaged):
    directory = make_run(tmp_path, "run")
    metrics = directory / "metrics.jsonl"
    metrics.unlink() if content is None else metrics.write_text(content)
    run = read_run(directory)
    assert run.state == state
    assert run.notes == [f"metrics.jsonl: {damaged} damaged line(s) left out"] * bool(damaged)
    if "3 of 30" not in state:  # those are drawn elsewhere
        assert state in " ".join(report_of(directory).words)


def test_damaged_files_beside_the_metrics_are_named_or_left_out(tmp_path):
    directory = make_run(tmp_path, "run")
    (directory / "config.yaml").write_text("a: [")
    (directory / "facts.json").write_text("[]")
    (directory / "eval").mkdir()
    (directory / "eval/broken.json").write_text('{"top1": 1}')
    (directory / "media").mkdir()
    for number, content in enumerate(
        [
            "{}",
            '{"step": 1, "rows": 3}',
            '{"step": 1, "counts": [], "edges": [1]}',
            '{"step": 1, "counts": [1], "edges": [0, 1e308]}',
        ]
    ):
        (directory / f"media/{number}.json").write_text(content)
    (directory / "media/far.json").write_text('{"step": 1, "picture": "http://elsewhere"}')
    page = report_of(directory)
    text = " ".join(page.words)
    assert "cannot read config.yaml" in text
    assert "facts.json" in text
    assert "broken.json: damaged result" in text
    assert page.tags["img"] == 0


def test_what_holds_no_run_is_one_line(tmp_path, capsys):
    for words, expected in [
        ([str(tmp_path / "nowhere")], "nowhere: no such folder"),
        ([str(tmp_path)], "neither config.yaml nor metrics.jsonl"),
        ([str(make_run(tmp_path, "run")), "--axis=tokens_seen"], "--axis tokens_seen: no line"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["report", *words])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line


def test_hostile_text_stays_text(tmp_path):
    directory = make_run(tmp_path, "run", data={"train": EVIL}, task={"kind": EVIL})
    with (directory / "metrics.jsonl").open("a") as file:
        evil = {EVIL: 1.0, f"eval/{EVIL}/x": 0.5, r"$\frac$": 1.0, "huge": 1e308, "lr": -1e308}
        file.write(json.dumps({"step": 31, **evil}) + "\n")
        file.write(json.dumps({"step": 10**400}) + "\n" + json.dumps({"step": None}) + "\n")
    (directory / "facts.json").write_text(json.dumps({EVIL: EVIL}))
    (directory / "media").mkdir()
    rows = {"step": 1, "rows": [{"picture": "", "texts": {EVIL: EVIL}}]}
    (directory / "media/x.json").write_text(json.dumps(rows))
    page = report_of(directory)
    assert page.tags["script"] == 0
    assert " ".join(page.words).count(EVIL) > 4
    assert r"$\frac$" in page.words
    assert "2 damaged line(s)" in " ".join(page.words)


def test_a_long_run_of_many_metrics_is_small(tmp_path):
    runs = []
    for name in "abc":
        directory = make_run(tmp_path, name)
        lines = (line_of(s, **{f"box_{i}": s % 7 for i in range(4)}) for s in range(1, 900))
        (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        runs.append(read_run(directory))
    write_run_report(tmp_path / "all.html", runs, "step")
    size = (tmp_path / "all.html").stat().st_size
    assert size < 300_000  # of 12 charts


def test_curves_of_many_points_are_means():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert thinned[0] == (4.5, 0.5)
    assert thin(points[:100], 100) == points[:100]


def test_a_run_knows_its_hours_and_its_last_values(tmp_path):
    (run,) = read_runs([make_run(tmp_path, "run")])
    assert run.hours == pytest.approx(30 * 0.5 / 3600)
    assert run.last("loss") == 5 / 30
    assert run.median("examples_per_s") == 200
    assert run.last("missing") != run.last("missing")  # NaN
