"""Cascades: rows and front against plain loops, as an evaluation and from Python."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from eval_cases import ALONE, run, write_classes
from test_eval_classify import FOLDERS, new_model

from navit_clip import NaViTCLIP
from navit_clip.errors import UserError
from navit_clip.evaluation.cascade import Cascade, CascadeSpec, front
from navit_clip.evaluation.models import PackedClassifier, PackedModel
from navit_clip.evaluation.registry import read_result
from navit_clip.evaluation.report.charts import COSTS, curve_svgs, lines_of
from navit_clip.evaluation.report.html import write_report
from navit_clip.evaluation.results import Row
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.evaluation.summary import table
from navit_clip.inference.cascade import least_sure
from navit_clip.training.evaluation import EvalConfig

PERCENTS = (10, 30, 70)


@pytest.fixture(scope="module")
def tiny_model(model_dir):
    return NaViTCLIP.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("data") / "classes")


def evaluate(model, data, **spec):
    evaluator = Cascade(CascadeSpec(str(data), percents=PERCENTS, max_tokens=(3, 6), **spec))
    return evaluator, evaluator.run(model, ALONE, 0)


def slowly(model, evaluator, few, many, percent):
    """Top-1, mean tokens and FLOPs of a cascade, image by image."""
    data, count = evaluator.data, len(evaluator.data.names)
    probability = {}
    for setting in (few, many):
        readout = evaluator.readout(model, data, evaluator.texts_TD, setting)
        probability[setting] = readout.probabilities(readout.scores())
    order = sorted(range(count), key=lambda i: (probability[few][i].max().item(), i))
    again = set(order[: math.ceil(count * percent / 100)])
    hits = tokens = flops = 0
    for i in range(count):
        last = many if i in again else few
        hits += int(probability[last][i].argmax()) in data.classes[i]
        for setting in (few, many) if i in again else (few,):
            tokens += data.lengths[setting][i]
            flops += model.image_flops(data.lengths[setting][i])
    return hits / count, tokens / count, flops / count


def test_a_baseline_without_limits_has_its_rows_alone(folders):
    model = PackedClassifier(new_model(FOLDERS), "tiny")
    evaluator, _ = evaluate(model, folders)
    square = EvalSetting("square", 16)
    data = replace(
        evaluator.data,
        **{
            field: {square: next(iter(getattr(evaluator.data, field).values()))}
            for field in ("embeddings", "lengths", "padding")
        },
    )
    (row,) = evaluator.score(model, data, evaluator.texts_TD)
    assert row.setting == square


def test_a_field_of_labels_goes_with_classifiers(folders, tiny_model):
    with pytest.raises(UserError, match="--field goes with classifiers"):
        evaluate(PackedModel(tiny_model, "tiny"), folders, field="json.labels")


@pytest.mark.parametrize("kind", ["classifier", "zeroshot"])
def test_rows_are_those_of_a_plain_loop(kind, folders, tiny_model):
    if kind == "classifier":
        model = PackedClassifier(new_model(FOLDERS, "sigmoid"), "tiny")
    else:
        model = PackedModel(tiny_model, "tiny")
    evaluator, result = evaluate(model, folders, templates="plain")
    limits = [row.setting for row in result.rows if row.setting.kind == "capped"]
    assert [setting.size for setting in limits] == [3, 6, 12]
    rows = {row.setting: row for row in result.rows}
    every = []
    for few, many in ((0, 1), (0, 2), (1, 2)):
        for percent in PERCENTS:
            found = slowly(model, evaluator, limits[few], limits[many], percent)
            setting = EvalSetting("cascade", limits[few].size, limits[many].size, percent)
            every.append((found[2], found[0], setting))
            if row := rows.get(setting):
                values = (row.metrics["top1"], row.mean_tokens, row.flops_per_image)
                np.testing.assert_allclose(values, found, rtol=1e-12)
    every += [(rows[s].flops_per_image, rows[s].metrics["top1"], s) for s in limits]
    shown = {setting for setting in rows if setting.kind == "cascade"}
    for cost, top1, setting in every:
        beaten = any(
            (other_cost <= cost and other > top1) or (other_cost < cost and other >= top1)
            for other_cost, other, _ in every
        )
        if beaten:
            assert setting not in shown
        elif setting.kind == "cascade":  # of equals one is enough
            assert any(rows[one].metrics["top1"] == top1 for one in shown)


def point(cost, top1, *setting):
    return Row(
        "m", 0, EvalSetting(*setting), False, cost, None, cost,
        {"top1": top1},
    )  # fmt: skip


def test_the_front_and_what_it_gains():
    limits = [point(1, 0.2, "capped", 1), point(3, 0.6, "capped", 3), point(9, 0.5, "capped", 9)]
    good, worse = point(2, 0.5, "cascade", 1, 3, 10), point(2, 0.4, "cascade", 1, 3, 20)
    under, past = point(2.5, 0.3, "cascade", 1, 3, 30), point(10, 0.9, "cascade", 3, 9, 50)
    flat = point(6, 0.7, "cascade", 3, 9, 10)
    found = front(limits, [past, under, worse, good, flat])
    assert [row.setting for row in found] == [good.setting, flat.setting, past.setting]
    assert found[0].metrics["gain"] == pytest.approx(0.5 - 0.4)
    assert found[1].metrics["gain"] == pytest.approx(0.7 - 0.6)  # of the limit 3, not below it
    assert "gain" not in found[2].metrics  # dearer than every limit


@pytest.mark.parametrize(
    ("share", "count", "expected"), [(0.1, 30, 3), (0.1, 31, 4), (0, 5, 0), (1, 5, 5), (0.3, 0, 0)]
)
def test_the_least_sure_are_so_many(share, count, expected):
    confidence = torch.from_numpy(np.random.default_rng(count).permutation(count) / 40)
    found = least_sure(confidence, share)
    assert len(found) == expected
    assert set(found.tolist()) == set(np.argsort(confidence.numpy())[:expected].tolist())
    assert least_sure(torch.ones(9), 0.3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["classifier", "zeroshot"])
def test_classify_in_python_is_the_plain_loop(kind, folders, tiny_model):
    model = new_model() if kind == "classifier" else tiny_model
    paths = sorted(folders.rglob("*.png"))
    words = () if kind == "classifier" else (["a dog", "a lake", "a boat"],)
    few, many = (model.classify(paths, *words, max_tokens=n) for n in (3, 12))
    for share in (0.0, 0.25, 1.0):
        found = model.classify(iter(paths), *words, cascade=(3, 12), share=share)
        again = few.amax(1).argsort(stable=True)[: math.ceil(share * len(paths))]
        expected = few.clone()
        expected[again] = many[again]
        torch.testing.assert_close(found, expected)
    for mistake in ({"cascade": (12, 3)}, {"cascade": (0, 3)}, {"cascade": (3, 12), "share": 2}):
        with pytest.raises(ValueError, match=r"cascade must hold|share must lie"):
            model.classify(paths, *words, **mistake)


def test_the_command_writes_what_is_read_again(folders, model_dir, tmp_path, capsys):
    path, curve = tmp_path / "cascade.json", tmp_path / "curve.png"
    flags = ["--data", folders, "--templates", "plain", "--max-tokens", "3,6"]
    model = shutil.copytree(model_dir, tmp_path / "model")  # its card gets a line
    assert run("cascade", "--model", model, *flags, "--output", path, "--curve", curve) == 0
    output = capsys.readouterr().out
    result = read_result(json.loads(path.read_text()))
    assert table(result) in output
    assert "Cascade" in (model / "README.md").read_text()
    assert curve.stat().st_size > 1000


def test_cascades_are_a_line_of_their_own_in_charts_and_report(folders, tmp_path):
    model = PackedClassifier(new_model(), "tiny")
    evaluator, result = evaluate(model, folders)
    kinds = {row.setting.kind for row in result.rows}
    lines = lines_of(result, COSTS[0][1])
    assert len(lines) == len(kinds)
    assert all(len({row.setting.kind == "cascade" for row in line.rows}) == 1 for line in lines)
    assert len(curve_svgs(result)) == 2
    write_report(tmp_path / "report.html", result, evaluator.samples(), command="eval cascade")
    assert "is a cascade" in (tmp_path / "report.html").read_text()


def test_labels_say_which_cascade_it_is():
    setting = EvalSetting("cascade", 64, 256, 30)
    assert (setting.label, setting.key) == ("64→256 30%", "64-256-30")
    for one in (setting, EvalSetting("capped", 9), EvalSetting("native"), EvalSetting("square", 8)):
        assert EvalSetting.from_label(one.kind, one.label) == one


def test_bad_input_is_one_line(folders):
    with pytest.raises(ValueError, match="percents must lie between 0 and 100"):
        CascadeSpec(str(folders), percents=(50, 100))
    with pytest.raises(ValueError, match="then and percent"):
        EvalSetting("cascade", 4)
    with pytest.raises(ValueError, match="then and percent"):
        EvalSetting("capped", 4, 8, 10)
    model = PackedClassifier(new_model(), "tiny")
    evaluator = Cascade(CascadeSpec(str(folders), max_tokens=(12,)))
    with pytest.raises(UserError, match="needs two token limits, and that of tiny is 12"):
        evaluator.run(model, ALONE, 0)


def test_a_run_may_have_it(folders):
    values = {"kind": "cascade", "data": str(folders), "max_tokens": [3], "percents": [20]}
    (plan,) = EvalConfig({"c": values}).plans().values()
    plan.kind(plan.spec).check(PackedClassifier(new_model(), "tiny"))
