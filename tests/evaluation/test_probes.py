"""Few-shot and linear probes: their fits against independent ones, and whole evaluations."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from classify_cases import classify_flags
from eval_cases import ALONE, write_classes
from shard_factory import encode, photo, write_shard
from test_eval_classify import new_model
from tiny_run import run as run_training
from torch.utils._python_dispatch import TorchDispatchMode

from navit_clip.data.seeding import generator
from navit_clip.errors import StopAskedError, UserError
from navit_clip.evaluation import linear, linear_fit
from navit_clip.evaluation.__main__ import main
from navit_clip.evaluation.fewshot import FewShot, FewShotSpec
from navit_clip.evaluation.linear import Linear, LinearSpec, fit_validated
from navit_clip.evaluation.linear_fit import fit_logistic, fit_ridge, logistic_losses, whiten
from navit_clip.evaluation.models import PackedClassifier, PackedModel
from navit_clip.evaluation.registry import read_result
from navit_clip.evaluation.report.html import write_report
from navit_clip.evaluation.summary import table
from navit_clip.model import NaViTCLIP


def draw(seed, count, width, classes):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, width))
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    x = centres[labels] + 2 * rng.standard_normal((count, width)) + 5
    return x, labels


def ridge_by_eigenvectors(x, labels, classes, test):
    """As big_vision's fewshot_lsr does it, in NumPy: scores of the test features."""
    mean, std = x.mean(0, keepdims=True), x.std(0, keepdims=True) + 1e-5
    padded = [
        np.pad((part - mean) / std, ((0, 0), (0, 1)), constant_values=100.0) for part in (x, test)
    ]
    y = 2.0 * np.eye(classes)[labels] - 1.0
    if len(x) >= padded[0].shape[1]:
        values, vectors = np.linalg.eigh(padded[0].T @ padded[0])
        w = vectors @ ((vectors.T @ (padded[0].T @ y)) / (values + 2.0**10)[:, None])
    else:
        values, vectors = np.linalg.eigh(padded[0] @ padded[0].T)
        w = padded[0].T @ (vectors @ ((vectors.T @ y) / (values + 2.0**10)[:, None]))
    return padded[1] @ w


@pytest.mark.parametrize(
    ("count", "width", "classes"), [(200, 20, 5), (21, 20, 3), (20, 20, 3), (8, 40, 4), (3, 7, 3)]
)
def test_ridge_is_that_of_an_independent_solution(count, width, classes):
    x, labels = draw(count, count, width, classes)
    test, _ = draw(1, 30, width, classes)
    train, others = whiten(*map(torch.from_numpy, (x, test)))
    weight, bias = fit_ridge(train, torch.from_numpy(labels), classes, 2.0**10)
    found = others @ weight.T + bias
    expected = ridge_by_eigenvectors(x, labels, classes, test)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9)


def newton(x, labels, classes, l2):
    """The least loss of multinomial logistic regression, by Newton's method in float64."""
    x = np.pad(x, ((0, 0), (0, 1)), constant_values=1.0)
    count, width = x.shape
    w = np.zeros((width, classes))
    y, penalty = np.eye(classes)[labels], np.repeat([l2] * (width - 1) + [0.0], classes)
    for _ in range(50):
        p = np.exp(x @ w - (x @ w).max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = (x.T @ (p - y) / count).reshape(-1) + penalty * w.reshape(-1)
        hessian = np.zeros((w.size, w.size))
        for row, probability in zip(x, p, strict=True):
            inner = np.diag(probability) - np.outer(probability, probability)
            hessian += np.kron(np.outer(row, row), inner) / count
        step = np.linalg.lstsq(hessian + np.diag(penalty), gradient, rcond=None)[0]
        w -= step.reshape(w.shape)
    return w[:-1].T, w[-1]


@pytest.mark.parametrize("l2", [1e-2, 1.0])
@pytest.mark.parametrize(("count", "classes"), [(60, 3), (25, 2)])
def test_logistic_regression_reaches_the_least_loss(count, classes, l2):
    x, labels = draw(2, count, 4, classes)
    (x,) = whiten(torch.from_numpy(x))
    labels = torch.from_numpy(labels)
    found = fit_logistic(x, labels, classes, l2)
    exact = [torch.from_numpy(part) for part in newton(x.numpy(), labels.numpy(), classes, l2)]
    losses = [sum(logistic_losses(*fit, x, labels, l2)).item() for fit in (found, exact)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    torch.testing.assert_close(found[0], exact[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_logistic_regression_is_scikit_learns(l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = draw(3, 300, 20, 6)
    (x,) = whiten(torch.from_numpy(x))
    theirs = linear_model.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000)
    theirs.fit(x.numpy(), labels)
    labels = torch.from_numpy(labels)
    fits = fit_logistic(x, labels, 6, l2), map(torch.from_numpy, (theirs.coef_, theirs.intercept_))
    losses = [sum(logistic_losses(*fit, x, labels, l2)).item() for fit in fits]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


class Largest(TorchDispatchMode):
    """The most numbers that an operator returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_logits_are_never_there_all_at_once(monkeypatch):
    classes = 12
    x, labels = map(torch.from_numpy, draw(2, 200, 3, classes))
    monkeypatch.setattr(linear, "_L2", (1.0,))
    expected = fit_validated(x, labels, classes)
    monkeypatch.setattr(linear_fit, "_LOGITS", 40 * classes + 1)
    with Largest() as largest:
        found = fit_validated(x, labels, classes)
    assert largest.numbers <= 40 * classes
    for actual, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(actual, other, rtol=0, atol=1e-5)
    assert found[2] == expected[2]


def test_the_penalty_is_chosen_on_what_is_held_out(monkeypatch):
    monkeypatch.setattr(linear, "_L2", (10.0, 0.3, 0.01))
    x, labels = draw(4, 60, 10, 3)
    (x,), labels = whiten(torch.from_numpy(x)), torch.from_numpy(labels)
    weight, bias, l2 = fit_validated(x, labels, 3)
    order = torch.from_numpy(generator(0, "linear").permutation(60))
    held, rest = order[:12], order[12:]
    hits = {}
    for penalty in (10.0, 0.3, 0.01):
        w, b = fit_logistic(x[rest], labels[rest], 3, penalty)
        hits[penalty] = int(((x[held] @ w.T + b).argmax(1) == labels[held]).sum())
    assert l2 == max(hits, key=lambda penalty: (hits[penalty], penalty))
    again = fit_logistic(x, labels, 3, l2)
    torch.testing.assert_close(weight, again[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(bias, again[1], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="at least two images"):
        fit_validated(x[:1], torch.zeros(1, dtype=torch.int64), 2)


# Whole evaluations


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Shards of twelve images in each of three classes, named otherwise than `folders`."""
    root = tmp_path_factory.mktemp("train")
    samples = {
        str(i): {"png": encode(photo(i, 24, 30 + i)), "cls": str(i % 3).encode()} for i in range(36)
    }
    write_shard(root / "0.tar", samples)
    (root / "classnames.txt").write_text("red dog\nboat\nlake\n")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = write_classes(tmp_path_factory.mktemp("data") / "classes")
    (root / "bicycle").rmdir()
    return root


def features_of(evaluator, model, setting):
    trained = evaluator._trained[id(model)]
    labels = np.array([index for (index,) in trained.classes])
    data = evaluator.data
    return (
        trained.embeddings[setting].double().numpy(),
        labels,
        data.embeddings[setting].double().numpy(),
        np.array([index for (index,) in data.classes]),
    )


@pytest.mark.parametrize("kind", ["clip", "classifier"])
def test_few_shots_have_the_mean_accuracy_of_their_draws(train, folders, model_dir, kind, tmp_path):
    if kind == "clip":
        model = PackedModel(NaViTCLIP.from_directory(model_dir), "clip")
    else:
        model = PackedClassifier(new_model(), "classifier")
    evaluator = FewShot(
        FewShotSpec(data=str(folders), train=str(train), shots=(1, 5), seeds=2, max_tokens=(6,))
    )
    result = evaluator.run(model, ALONE, 0)
    assert result.counts == {"images": 11, "classes": 3}
    for row in result.rows:
        x, labels, test, truth = features_of(evaluator, model, row.setting)
        for shots in (1, 5):
            accuracies = []
            for seed in range(2):
                chosen = evaluator._draw(torch.from_numpy(labels), shots, seed).numpy()
                assert np.bincount(labels[chosen]).tolist() == [shots] * 3
                assert set(chosen) >= set(
                    evaluator._draw(torch.from_numpy(labels), 1, seed).tolist()
                )
                scores = ridge_by_eigenvectors(x[chosen], labels[chosen], 3, test)
                accuracies.append((scores.argmax(1) == truth).mean())
            assert row.metrics[f"shots/{shots}"] == pytest.approx(np.mean(accuracies))
        assert row.metrics["top1"] == row.metrics["shots/5"]
        assert row.metrics["spread"] == pytest.approx(np.std(accuracies))
        groups = row.breakdowns["by_size"]
        mean = sum(g.images * g.metrics["top1"] for g in groups) / 11
        assert mean == pytest.approx(row.metrics["top1"])
    assert read_result(json.loads(json.dumps(result.to_json()))).own == result.own
    write_report(tmp_path / "a.html", result, evaluator.samples())
    assert "5-shot" in (tmp_path / "a.html").read_text()
    assert "5-shot" in table(result)


def test_the_linear_probe_is_the_fit_on_its_features(train, folders, model_dir, tmp_path):
    words = ["linear", "--model", str(model_dir), "--data", str(folders), "--train", str(train)]
    words += ["--workers", "0", "--device", "cpu", "--max-tokens", "6"]
    words += ["--baseline", str(model_dir), "--report", str(tmp_path / "a.html")]
    main([*words, "--output", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())
    model = PackedModel(NaViTCLIP.from_directory(model_dir), "clip")
    evaluator = Linear(LinearSpec(data=str(folders), train=str(train)))
    evaluator.run(model, ALONE, 0)
    x, labels, test, truth = features_of(evaluator, model, model.own_setting)
    x, test = whiten(*map(torch.from_numpy, (x, test)))
    weight, bias, l2 = fit_validated(x, torch.from_numpy(labels), 3)
    hits = (test @ weight.T + bias).argmax(1).numpy() == truth
    assert found["top1"] == pytest.approx(hits.mean())
    assert found["l2"] == l2
    assert found["baselines"][0]["views"] == found["views"]
    assert "Most confident mistakes" in (tmp_path / "a.html").read_text()


def test_a_fit_is_progress_and_can_be_stopped_in_the_middle(train, folders, model_dir):
    calls = []

    @contextmanager
    def around():
        calls.append(len(calls))
        if len(calls) == stop:
            raise StopAskedError
        yield

    stop, clip = 0, NaViTCLIP.from_directory(model_dir)
    spec = LinearSpec(data=str(folders), train=str(train))
    FewShot(FewShotSpec(data=str(folders), train=str(train), shots=(1,))).run(
        PackedModel(clip, "clip", around=around), ALONE, 0
    )
    forward, calls[:] = len(calls), []
    Linear(spec).run(PackedModel(clip, "clip", around=around), ALONE, 0)
    assert len(calls) > forward + 8  # of as many penalties
    stop, calls[:] = forward + 4, []
    with pytest.raises(StopAskedError):
        Linear(spec).run(PackedModel(clip, "clip", around=around), ALONE, 0)
    assert len(calls) == stop


MISTAKES = [
    ("fewshot", ["--shots", "25"], "class red dog has 12 images in"),
    ("fewshot", ["--shots", "3"], "--shots must be of 1, 2, 4"),
    ("linear", ["--train", "nowhere"], "nowhere"),
    ("linear", ["--field", "json.x"], "goes with shards"),
]


@pytest.mark.parametrize(("kind", "more", "named"), MISTAKES)
def test_a_mistake_is_one_line(train, folders, model_dir, capsys, kind, more, named):
    words = [kind, "--model", str(model_dir), "--data", str(folders), "--train", str(train)]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--workers", "0", *more])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line


def test_probes_need_one_class_for_each_image(folders, model_dir, tmp_path):
    members = {"png": encode(photo(0, 20, 20)), "cls": b"0\n1"}
    write_shard(tmp_path / "0.tar", {"a": members, "b": members})
    evaluator = Linear(LinearSpec(data=str(folders), train=str(tmp_path), class_map=None))
    with pytest.raises(UserError):
        evaluator.run(PackedModel(NaViTCLIP.from_directory(model_dir), "clip"), ALONE, 0)


def test_probes_run_during_training(train, tmp_path, monkeypatch):
    spec = {
        "few": {"kind": "fewshot", "data": str(train), "train": str(train), "shots": [1, 2]},
        "all": {"kind": "linear", "data": str(train), "train": str(train)},
    }
    flags = classify_flags(
        train, tmp_path / "run", 1, eval__evaluators=json.dumps(spec), eval__workers=0
    )
    assert run_training(monkeypatch, flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    values = {key: value for line in lines for key, value in line.items()}
    assert 0 <= values["eval/few/shots/1"] <= 1
    assert 0 <= values["eval/all/top1"] <= 1
    assert values["eval/all/l2"] > 0
