"""Results read back, curves and tables: what people see of metrics."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
from eval_cases import run
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from report_cases import KINDS, SETTINGS, make_result, metrics_of

from navit_clip.errors import UserError
from navit_clip.evaluation.registry import read_result
from navit_clip.evaluation.report import charts
from navit_clip.evaluation.report.charts import COSTS, draw_curve, lines_of
from navit_clip.evaluation.report.drawing import new_figure
from navit_clip.evaluation.results import Metric, wilson_interval
from navit_clip.evaluation.summary import summarise, table


@KINDS
def test_rows_hold_what_the_result_says(kind):
    result = make_result(kind)
    read = read_result(result)
    entries = [(result["model"], 0, e) for e in result["views"]]
    entries += [
        (b["model"], i, e) for i, b in enumerate(result["baselines"], 1) for e in b["views"]
    ]
    assert len(read.rows) == len(entries)
    for row, (model, series, entry) in zip(read.rows, entries, strict=True):
        assert (row.model, row.series, row.setting.label) == (model, series, entry["label"])
        assert row.gflops == pytest.approx(entry["flops_per_image"] / 1e9)
        if kind == "zeroshot":
            assert list(row.metrics) == ["top1", "top5", "mean_per_class", "ece"]
            assert row.metrics["top1"] == entry["top1"]
            assert row.breakdowns["by_aspect"][1].metrics == {
                "top1": entry["by_aspect"][1]["top1"],
                "top5": entry["by_aspect"][1]["top5"],
            }
        else:
            assert row.metrics["image_to_text/R@5"] == entry["image_to_text"]["R@5"]
            assert row.metrics["text_to_image/median_rank"] == 3.5
            group = row.breakdowns["by_size"][0].metrics
            assert group["text_to_image/R@1"] == entry["by_size"][0]["text_to_image"]["R@1"]
    assert read.own is read.rows[0]
    compared = "classes" if kind == "zeroshot" else "captions"
    assert (read.counts, read.has_baselines) == ({"images": 1200, compared: 30}, True)


@KINDS
def test_a_result_is_written_as_it_was_read(kind):
    result = make_result(kind)
    named = {**result, "kind": kind, "precision": "fp32"}
    assert read_result(result).to_json() == named
    assert read_result(named).to_json() == named


def damaged_results():
    yield "neither", {}
    yield "no result", []
    yield "no result", None
    yield "views", {"top1": 0.5}
    for kind in ("zeroshot", "retrieval"):
        needed = ["views", "images", "skipped", "classes" if kind == "zeroshot" else "captions"]
        for key in needed:
            result = make_result(kind)
            del result[key]
            yield key, result
        for key in ("label", "mean_tokens", "own", "view"):
            result = make_result(kind)
            del result["views"][1][key]
            yield key, result
        for path, value in (
            (("views",), []),
            (("views",), 3),
            (("views", 0), None),
            (("views", 0, "mean_tokens"), "many"),
            (("views", 0, "by_size"), [{}]),
            (("baselines", 0), {"model": "x"}),
            (("baselines",), 5),
            (("skipped",), 1),
            (("images",), "x"),
        ):
            result = make_result(kind)
            place = result
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            yield "damaged result", result


@pytest.mark.parametrize(("named", "result"), list(damaged_results()))
def test_damaged_results_are_one_line(named, result):
    with pytest.raises(UserError, match=named) as caught:
        read_result(result)
    assert "\n" not in str(caught.value)


# Axes


def test_axes_hold_all_values_and_have_round_ticks_within():
    rng = random.Random(0)
    for _ in range(100):
        count, spread = rng.randint(1, 6), rng.choice([0.0, 0.001, 1, 3])
        costs = [10 ** rng.uniform(-2, 4) * 10 ** rng.uniform(0, spread) for _ in range(count)]
        if spread == 0:
            costs = costs[:1] * count
        values = [rng.random() for _ in range(count)] + rng.choice([[], [0.0], [1.0]])
        axes = Figure().subplots()
        charts._scale_costs(axes, costs)
        charts._scale_values(axes, values, Metric("top-1"))
        for axis, held in ((axes.xaxis, costs), (axes.yaxis, values)):
            low, high = axis.get_view_interval()
            assert low <= min(held)
            assert max(held) <= high
            ticks = [tick for tick in axis.get_ticklocs() if low - 1e-9 <= tick <= high + 1e-9]
            assert 1 <= len(ticks) <= 9
            assert all(float(f"{tick:.3g}") == pytest.approx(tick) for tick in ticks)
        assert all(0 <= tick <= 1 for tick in axes.get_yticks())


def test_an_axis_holds_values_below_zero():
    axes = Figure().subplots()
    charts._scale_values(axes, [-1.4, -0.6], Metric("explained"))
    low, high = axes.yaxis.get_view_interval()
    assert low < -1.4
    assert high > -0.6
    assert len(axes.get_yticks()) > 1


def test_labels_keep_clear_of_each_other_and_of_points():
    rng = random.Random(1)
    shown = total = 0
    for seed in range(30):
        sizes = sorted({rng.randint(10, 400) for _ in range(rng.randint(1, 9))})
        result = read_result(
            make_result("zeroshot", settings=[("capped", n) for n in sizes], seed=seed)
        )
        figure = new_figure(4.4, 2.8)
        axes = figure.subplots()
        lines = charts.lines_of(result, COSTS[0][1])
        charts._draw_panel(axes, lines, "tokens")
        figure.canvas.draw()
        charts._label_settings(axes, lines)
        points = [tuple(p) for line in lines for p in axes.transData.transform(line.points)]
        boxes = [text.get_window_extent() for text in axes.texts]
        shown, total = shown + len(boxes), total + len(sizes) + 2
        frame = axes.get_window_extent()
        for box in boxes:
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1
            assert frame.y0 <= box.y0 < box.y1 <= frame.y1
            assert not any(box.contains(*point) for point in points)
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
    assert shown > 0.6 * total  # most find a place


# The curve


@KINDS
def test_lines_join_the_right_views_in_order_of_cost(kind):
    result = make_result(kind)
    random.Random(2).shuffle(result["views"])
    result["views"][0]["flops_per_image"] = None
    missing = result["views"][0]["label"]
    read = read_result(result)
    ways = ("image_to_text", "text_to_image")
    main = ("top1", "top5") if kind == "zeroshot" else tuple(f"{way}/R@1" for way in ways)
    for (_, cost), without in zip(COSTS, ({}, {missing}), strict=True):
        found = {
            (line.series, line.key, line.rows[0].setting.kind == "square"): [
                r.setting.label for r in line.rows
            ]
            for line in lines_of(read, cost)
        }
        expected = {}
        for series, key in itertools.product(range(3), main):
            packed = ["64", "256", "native"] if series == 0 else []
            squares = ["224²", "336²"] if series == 0 else ["224²"]
            for square, labels in ((False, packed), (True, squares)):
                labels = [x for x in labels if series or x not in without]
                if labels:
                    expected[series, key, square] = labels
        assert found == expected


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("zeroshot", {}),
        ("retrieval", {"settings": SETTINGS[:1], "baselines": 0}),
        ("zeroshot", {"settings": [("capped", n) for n in range(1, 40)], "baselines": 9}),
    ],
)
def test_a_curve_is_a_picture_written_whole(kind, options, tmp_path):
    result = make_result(kind, **options)
    path = tmp_path / "new" / "curve.png"
    draw_curve(path, read_result(result))
    assert [p.name for p in path.parent.iterdir()] == ["curve.png"]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        colours = {tuple(c[:3]) for _, c in picture.convert("RGB").getcolors(1 << 24)}
    blue, orange = (0x25, 0x63, 0xEB), (0xC2, 0x57, 0x0C)
    assert blue in colours
    assert (orange in colours) == bool(result["baselines"])


def test_a_curve_without_costs_or_metrics(tmp_path):
    result = make_result("zeroshot", baselines=0)
    for entry in result["views"]:
        entry["flops_per_image"] = None
    result["views"][0]["top5"] = math.nan
    draw_curve(tmp_path / "a.png", read_result(result))
    for entry in result["views"]:
        entry["top1"] = entry["top5"] = None
    draw_curve(tmp_path / "b.png", read_result(result))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        draw_curve(tmp_path / "file" / "c.png", read_result(result))


# Tables


@KINDS
@pytest.mark.parametrize("baselines", [0, 2])
def test_tables_fit_a_terminal_and_say_everything(kind, baselines):
    result = make_result(kind, baselines=baselines)
    printed = table(read_result(result))
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "skipped: unreadable_image 3"
    assert f"1,200 images, 30 {'classes' if kind == 'zeroshot' else 'captions'}" in lines[0]
    entries = [e for b in result["baselines"] for e in b["views"]]
    body = lines[-4 - len(SETTINGS) - len(entries) : -4]
    for line, entry in zip(body, [*result["views"], *entries], strict=True):
        assert entry["label"] + (" *" if entry["own"] else "") in line
        words = line.split()
        for value in metrics_of(entry, kind):
            assert f"{value:.1%}" in words
        assert ("3.5" in words) == (kind == "retrieval")
    assert ("ViT-B-32" in printed or "weights" in printed) == bool(baselines)
    assert ("runs/a/model" in printed) == bool(baselines)


def test_a_table_says_what_guessing_gives_and_how_far_metrics_are_to_be_trusted():
    result = make_result("zeroshot", baselines=0)
    for entry in result["views"]:
        entry |= {"top1": 0.9, "top5": 1.0}
    result["views"][1]["top1"] = 0.5
    *_, chance, interval, _, _ = table(read_result(result)).splitlines()
    assert chance.split() == ["chance", "3.3%", "16.7%", "3.3%", "–"]
    # Of 1,200 images; that of 0.5 is the wider one of the column.
    assert interval.split() == ["95%", "±2.8%", "±0.3%", "–", "–"]
    found = read_result(make_result("retrieval"))
    assert found.chance("image_to_text/R@5") == found.chance("text_to_image/R@5") == 5 / 1200
    assert found.chance("text_to_image/median_rank") is None
    assert found.margin("text_to_image/median_rank") is None
    # Queries of this direction are the 30 captions.
    assert found.margin("text_to_image/R@1") > 4 * found.margin("image_to_text/R@1")


@given(hits=st.integers(0, 400), queries=st.integers(1, 400))
def test_wilson_intervals_are_the_fractions_that_a_test_would_not_reject(hits, queries):
    value = min(hits, queries) / queries
    low, high = wilson_interval(value, queries)
    assert 0 <= low <= value + 1e-9
    assert value - 1e-9 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            deviations = abs(value - end) / math.sqrt(end * (1 - end) / queries)
            assert deviations == pytest.approx(1.959964, rel=1e-4)


def test_a_summary_lists_results_reports_and_pictures(tmp_path, capsys):
    for name, kind in (("zeroshot", "zeroshot"), ("retrieval_coco", "retrieval")):
        (tmp_path / f"{name}.json").write_text(json.dumps(make_result(kind)))
    for name in ("b.html", "a.html", "curve.png", "other.txt"):
        (tmp_path / name).write_text("")
    assert run("summary", tmp_path) == 0
    printed = capsys.readouterr().out
    order = ["Zero-shot: 1,200", "Retrieval: 1,200", "a.html", "b.html", "curve.png"]
    places = [printed.index(word) for word in order]
    assert places == sorted(places)
    assert "other.txt" not in printed
    (tmp_path / "zeroshot.json").write_bytes(b"\xff\xfe{")
    assert run("summary", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "Not a result: cannot read zeroshot.json: 'utf-8' codec can't decode" in printed
    assert "Retrieval: 1,200" in printed


def test_a_summary_knows_results_by_what_they_say(tmp_path):
    result = {"kind": "zeroshot", **make_result("zeroshot")}
    for name in ("mine", "zeroshot-step-00000010", "retrieval-of-classes"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    for step in (1, 2):
        (tmp_path / f"coco-step-{step:08d}.json").write_text(json.dumps({"step": step, **result}))
    (tmp_path / "map.json").write_text('{"folder": 3}')
    (tmp_path / "half.json").write_text("{")
    (tmp_path / "zeroshot-b.json").write_text('{"kind": "zeroshot"}')
    lines = summarise(tmp_path).splitlines()
    headings = [line for line in lines if line.startswith("Zero-shot")]
    assert [line.rpartition(" ")[2] for line in headings] == [
        "(mine.json)",
        "(retrieval-of-classes.json)",
        "(zeroshot-step-00000010.json)",
    ]
    unread = ("half.json: Exp", "map.json: no result of", "zeroshot-b.json: damaged result: ")
    for line, start in zip(lines[-4:-1], unread, strict=True):
        assert line.startswith(f"Not a result: cannot read {start}")
    assert lines[-1] == "Made during training, see metrics.jsonl: 2"


def test_a_summary_of_training_alone_says_so(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"step": 1, **make_result("zeroshot")}))
    with pytest.raises(UserError, match=r"no result .*\(Made during training, .*: 1\)"):
        summarise(tmp_path)
