"""What arrives on dashboards: compared key by key with docs/dashboard.md, and when they fail."""

import json
import math
import re
import tarfile
from pathlib import Path

import pytest
from html_page import Page
from step_cases import ALONE
from tiny_run import run, tiny_flags, write_tiny_data
from wandb_file import OfflineRun

from navit_clip.__main__ import main
from navit_clip.data.shards import add_member
from navit_clip.training import loggers
from navit_clip.training.loggers import LogConfig, Loggers
from navit_clip.training.nonfinite import NonFinite
from navit_clip.training.reporter import Reporter
from navit_clip.training.sections import AXES, SECTIONS, dashboard_key
from navit_clip.training.watchdog import Watchdog

PAGE = Path(__file__).parents[2] / "docs/dashboard.md"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run that logged to everything, evaluated and was validated."""
    root = tmp_path_factory.mktemp("dashboards")
    write_tiny_data(root)
    train, held_out = root / "shapes/train", root / "shapes/retrieval"
    with tarfile.open(train / "00000.tar", "a") as tar:
        for number in range(20):
            add_member(tar, f"no-image-{number}.txt", b"a caption alone")
    evaluator = {
        "kind": "retrieval",
        "every_steps": 4,
        "images": str(held_out / "images"),
        "captions": str(held_out / "captions.json"),
    }
    mix = {name: {"shards": f"{train}/0000{i}.tar"} for i, name in enumerate(("a", "b"))}
    flags = tiny_flags(
        root,
        root / "run",
        4,
        data__mix=json.dumps(mix),
        data__train="[]",
        data__validation=train / "00003.tar",
        eval__validation__every_steps=2,
        eval__validation__batch=8,
        eval__evaluators=json.dumps({"held-out": evaluator}),
        eval__workers=0,
        log__every_steps=2,
        log__media_every_steps=2,
        log__tensorboard=True,
        log__wandb="offline",
        log__wandb_group="tests",
        log__wandb_job_type="tiny",
        log__wandb_tags="[one, two]",
        log__wandb_notes="of a test",
        log__wandb_entity="someone",
        log__wandb_model=True,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, flags) == 0
    return root / "run"


def documented():
    """Keys of the page's tables, as dashboards call them, with an evaluator's name in them."""
    keys = set()
    for row in re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE):
        found = re.findall(r"`([\w/-]+)`", row)
        keys.update(key if key.startswith("media/") else dashboard_key(key) for key in found)
    return {key.replace("NAME", "held-out") for key in keys}


def test_an_offline_run_has_every_key_of_the_page_and_no_other(finished):
    found = {
        re.sub("^data/share/[ab]$", "data/share/DATASET", key).replace("no_image", "REASON")
        for key in OfflineRun(finished).keys
        if not key.startswith("eval/")
    }
    # A table's or a histogram's parts are no keys of their own.
    found = {key.split(".")[0] for key in found}
    assert found == documented()


def test_axes_summaries_and_what_is_known_of_the_run(finished):
    offline = OfflineRun(finished)
    assert offline.metrics["learning/*"].step_metric == "step"
    assert set(AXES) <= offline.metrics.keys()
    assert all(set(AXES) <= row.keys() for row in offline.history[1:])  # the first: a picture
    assert [row["step"] for row in offline.history if "learning/loss" in row] == [2, 4]
    losses = [row["learning/loss"] for row in offline.history if "learning/loss" in row]
    summary = offline.summary["learning/loss"]
    assert summary == {"min": min(losses), "max": max(losses), "last": losses[-1]}
    assert offline.summary["eval/held-out/image_to_text/R@1"]["max"] >= 0
    assert offline.run.run_group == "tests"
    assert offline.run.job_type == "tiny"
    assert list(offline.run.tags) == ["one", "two"]
    assert offline.run.notes == "of a test"
    assert offline.run.entity == "someone"
    assert offline.artifacts == ["model"]
    assert offline.summary["media/confusions._type"] == "html-file"
    (path,) = finished.glob(f"wandb/offline-*/files/{offline.summary['media/confusions.path']}")
    page = Page(path.read_text())
    assert page.tags["img"] == page.tags["tr"] - 1 > 3
    assert page.words[:3] == ["margin", "own caption", "best other"]
    facts = offline.config["facts"]
    assert facts == json.loads((finished / "facts.json").read_text())
    assert facts["parameters"] > 1000
    assert {"ranks", "navit_clip", "data", "precision"} <= facts.keys()
    assert offline.config["optim"]["lr"] > 0


def test_lines_have_axes_that_add_up(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["flops_seen"] == sum(line["flops"] for line in steps)
    tokens = [line["tokens_per_s"] * line["step_s"] * 2 for line in steps]
    assert steps[-1]["tokens_seen"] == pytest.approx(sum(tokens))
    assert lines[-1]["step"] == 4
    assert all(lines[-1][axis] == steps[-1][axis] for axis in AXES)  # of an evaluation


def test_tensorboard_has_the_same(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    logged = {dashboard_key(key) for line in lines for key in line} - {"step"}
    assert set(tags["scalars"]) == logged
    losses = [(event.step, event.value) for event in events.Scalars("learning/loss")]
    expected = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert losses == [(step, pytest.approx(loss)) for step, loss in expected]
    assert {"media/tokens_per_image", "media/logit_margin"} <= set(tags["histograms"])
    assert {"media/first_batch", "media/confusions/1"} <= set(tags["images"])


def test_the_workspace_names_only_what_is_logged(finished):
    from navit_clip.training.dashboard import workspace

    offline = OfflineRun(finished)
    found = workspace("someone", "a-project", ["held-out"])
    assert [section.name for section in found.sections] == [s.title for s in SECTIONS]
    shown = set()
    for panel in (panel for section in found.sections for panel in section.panels):
        if getattr(panel, "metric_regex", None):
            matching = {key for key in offline.keys if re.search(panel.metric_regex, key)}
            assert matching, panel
            shown |= matching
        else:
            keys = {*(getattr(panel, "y", None) or panel.media_keys)}
            assert keys <= {key.split(".")[0] for key in offline.keys}, panel
            shown |= keys
    numbers = {key for key in offline.keys if not key.startswith("media/")}
    assert {key for key in documented() if key.startswith("media/")} <= shown
    assert numbers - shown == {*AXES, "validation/skipped", "validation/seconds"}
    # What wandb's library would send.
    spec = found._to_model().spec.section
    assert spec.settings.x_axis == "step"
    panels = [panel for section in spec.panel_bank_config.sections for panel in section.panels]
    assert all(not getattr(panel.config, "x_axis", None) for panel in panels)  # they follow it


def test_the_report_of_it_shows_examples(finished, monkeypatch):
    monkeypatch.setattr("navit_clip.training.report.html.SECTIONS", ())  # curves take seconds
    assert main(["report", str(finished)]) == 0
    text = (finished / "report.html").read_text()
    assert text.count("<img") > 10
    assert "first batch" in text
    assert "nearest, held-out" in text
    assert len(text) < 2_000_000


class Broken:
    """A dashboard whose network fails at the third call."""

    def __init__(self, *_):
        self.calls = []

    def log(self, values):
        self.calls.append(values["step"])
        if len(self.calls) == 3:
            raise ConnectionError("no route\nto host")

    def alert(self, title, text):
        self.calls.append(title)

    def finish(self):
        raise AssertionError("left out before")


def open_loggers(tmp_path, monkeypatch, step=0, broken=Broken, **options):
    from navit_clip.training import wandb_logger

    monkeypatch.setattr(wandb_logger, "Wandb", broken)
    lines = []
    config = LogConfig(wandb="online", **options)
    return Loggers(tmp_path, config, {}, {}, step, lines.append), lines


def test_a_dashboard_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    opened, lines = open_loggers(tmp_path, monkeypatch)
    (dashboard,) = opened._dashboards.values()
    for step in range(1, 6):
        opened.write({"step": step, "loss": math.nan})
    opened.close()
    assert dashboard.calls == [1, 2, 3]
    (line,) = lines
    assert line.startswith("wandb: no route to host; the run goes on without it")
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == [
        {"step": step, "loss": None} for step in range(1, 6)
    ]


def test_a_dashboard_that_cannot_be_opened_refuses_a_new_run_and_not_one_that_goes_on(
    tmp_path, monkeypatch
):
    def refused(*_):
        raise ConnectionError("no network")

    with pytest.raises(ConnectionError):
        open_loggers(tmp_path, monkeypatch, broken=refused)
    opened, lines = open_loggers(tmp_path, monkeypatch, step=3, broken=refused)
    opened.write({"step": 4})
    opened.close()
    assert len(lines) == 1


def test_points_past_a_restart_are_hidden_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from navit_clip.training.tensorboard_logger import TensorBoard

    for start, end, loss in ((0, 5, 1.0), (3, 6, 2.0)):
        board = TensorBoard(tmp_path, start)
        for step in range(start + 1, end):
            board.log({"step": step, "loss": loss, "mfu": math.nan})
        board.finish()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("learning/loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    assert events.Tags()["scalars"] == ["learning/loss"]


def test_steps_that_are_not_finite_and_stalls_are_alerts(tmp_path, monkeypatch):
    reporter = Reporter(LogConfig(), tmp_path, None, None, None, ALONE)
    found = NonFinite(3, math.nan, 1.0, (), ("a/b",))
    reporter.nonfinite(found)  # before it is open, as on other ranks
    reporter.loggers, _ = open_loggers(tmp_path, monkeypatch)
    (dashboard,) = reporter.loggers._dashboards.values()
    reporter.nonfinite(found)
    watchdog = Watchdog(tmp_path, 0, 1e-3, alert=reporter.stalled)
    watchdog._report(7.0, "nothing")
    assert dashboard.calls == ["a step that is not finite", "stalled"]
    assert len((tmp_path / "nonfinite.jsonl").read_text().splitlines()) == 1


def test_waiting_for_data_is_an_alert_once(tmp_path, monkeypatch):
    opened, _ = open_loggers(tmp_path, monkeypatch)
    (dashboard,) = opened._dashboards.values()
    dashboard.log = lambda values: None
    for wait in (0.5, 0.5, 0.01, 0.5, 0.5, 0.5, 0.5):
        opened.write({"step": 1, "data_wait": wait})
    assert dashboard.calls == ["waiting for data"]


def test_tensorboard_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"navit-clip\[tensorboard\]"):
        LogConfig(tensorboard=True)


@pytest.mark.parametrize("found", ["no login", "no project", "no network"])
def test_a_dashboard_that_cannot_be_written_is_one_line(found, monkeypatch, capsys):
    import wandb
    from wandb_workspaces.workspaces import Workspace

    def fail(*_):
        raise {
            "no login": wandb.errors.UsageError("not logged in"),
            "no project": ValueError("Project `a/b` not found.  Do you have access?"),
            "no network": ConnectionError("no route to host"),
        }[found]

    monkeypatch.setattr(wandb, "Api", fail)
    monkeypatch.setattr(Workspace, "from_url", fail)
    words = ["dashboard", "--project=b", *([] if found == "no login" else ["--entity=a"])]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "dashboard: error: wandb" in line


def test_a_dashboard_saved_again_replaces_itself(monkeypatch, capsys):
    from types import SimpleNamespace

    from wandb_workspaces.workspaces import Workspace

    views = {}

    def save(self):
        self._internal_id = self._internal_id or f"id-{len(views)}"
        views[self._internal_id] = self._internal_name

    def from_url(url):
        name = f"nw-{url.partition('nw=')[2]}-v"
        for found, known in views.items():
            if known == name:
                return SimpleNamespace(_internal_id=found)
        raise ValueError(f"Workspace `{name}` not found in project `b`")

    monkeypatch.setattr(Workspace, "save", save)
    monkeypatch.setattr(Workspace, "from_url", from_url)
    monkeypatch.setattr(Workspace, "url", "https://wandb.ai/a/b?nw=navitclip")
    for _ in range(2):
        assert main(["dashboard", "--project", "b", "--entity", "a"]) == 0
    assert views == {"id-0": "nw-navitclip-v"}
    assert capsys.readouterr().out.count("Dashboard: https://wandb.ai/a/b?nw=navitclip\n") == 2
