"""``navit-clip eval classify``: metrics against loops, data of every form, and bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from classify_cases import NAMES, classify_flags
from eval_cases import ALONE, write_classes
from shard_factory import SIZES, encode, photo, write_shard
from tiny_run import run as run_training

from navit_clip import NaViTClassifier
from navit_clip.errors import UserError
from navit_clip.evaluation import ranking
from navit_clip.evaluation.__main__ import main
from navit_clip.evaluation.classes import map_of
from navit_clip.evaluation.classification import Classify, ClassifySpec
from navit_clip.evaluation.models import PackedClassifier
from navit_clip.evaluation.ranking import Readout, average_precision
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.classifier import ClassifierConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.transformer import EncoderConfig

FOLDERS = (
    "bicycle",
    "boat",
    "lake",
    "red dog",
)  # of `write_classes`; one is empty, one has a space
TOWER = ImageTowerConfig(8, EncoderConfig(width=16, depth=1, heads=2), PositionConfig(table_side=9))


def new_model(names=FOLDERS, output="softmax", seed=0):
    torch.manual_seed(seed)
    model = NaViTClassifier(ClassifierConfig(TOWER, output), names, Preprocess(12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def evaluate(model, **spec):
    evaluator = Classify(ClassifySpec(**spec))
    return evaluator, evaluator.run(PackedClassifier(model, "tiny"), ALONE, 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("data") / "classes")


# Metrics


def precision_slowly(scores, right):
    """Of each class: for each of its images, the precision among all that score no less."""
    found = []
    for column, hits in zip(scores.T, right.T, strict=True):
        places = [
            np.mean([hits[j] for j in range(len(column)) if not column[j] < column[i]])
            for i in range(len(column))
            if hits[i]
        ]
        found.append(np.mean(places) if places else np.nan)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_is_that_of_brute_force(seed, monkeypatch):
    monkeypatch.setattr(ranking, "_SCORES", 20)
    rng = np.random.default_rng(seed)
    images, classes = int(rng.integers(1, 12)), int(rng.integers(1, 9))
    features = rng.integers(-2, 3, (images, 3)).astype(np.float64)  # many scores are equal
    weights, bias = rng.integers(-1, 2, (classes, 3)), rng.integers(-1, 2, classes)
    right = rng.random((images, classes)) < 0.4
    tensors = [torch.from_numpy(x) for x in (features, weights, bias)]
    found = average_precision(Readout(*tensors), torch.from_numpy(right))
    scores = features @ weights.T + bias
    np.testing.assert_allclose(found.numpy(), precision_slowly(scores, right), rtol=1e-12)


def test_average_precision_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 9, (50, 4)).astype(float), rng.random((50, 4)) < 0.3
    readout = Readout(torch.from_numpy(scores), torch.eye(4))
    expected = metrics.average_precision_score(right, scores, average=None)
    np.testing.assert_allclose(average_precision(readout, torch.from_numpy(right)), expected)


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_metrics_are_those_of_what_the_model_says_of_each_image(folders, output):
    model = new_model(output=output)
    _, result = evaluate(model, data=str(folders), max_tokens=(6,))
    paths = sorted(path for path in folders.glob("*/*.png"))
    truth = [FOLDERS.index(path.parent.name.replace("_", " ")) for path in paths]
    for row, tokens in zip(result.rows, (6, 12), strict=True):
        probabilities = model.classify(paths, max_tokens=tokens)
        right = probabilities.argmax(1) == torch.tensor(truth)
        assert row.metrics["top1"] == pytest.approx(right.double().mean().item())
        assert row.metrics["top5"] == 1
        by_class = [right[torch.tensor(truth) == c].double().mean().item() for c in (1, 2, 3)]
        assert row.metrics["mean_per_class"] == pytest.approx(np.mean(by_class))
        assert row.per_class == pytest.approx(dict(zip(FOLDERS[1:], by_class, strict=True)))
        bins = {}
        for confidence, hit in zip(probabilities.amax(1).tolist(), right.tolist(), strict=True):
            bins.setdefault(int(np.ceil(confidence * 15 - 1e-9)), []).append(hit - confidence)
        gaps = sum(abs(sum(found)) for found in bins.values()) / len(paths)
        assert row.metrics["ece"] == pytest.approx(gaps, abs=1e-6)
        assert set(row.breakdowns) == {"by_aspect", "by_size"}
    assert result.counts == {"images": 11, "classes": 4}
    assert result.skipped == {"unreadable_image": 1}


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_a_number_is_one_class_though_two_have_its_name(tmp_path, output):
    labels = [0, 1, 2, 0]
    samples = {
        str(i): {"png": encode(photo(i, *SIZES[0])), "cls": str(label).encode()}
        for i, label in enumerate(labels)
    }
    write_shard(tmp_path / "0.tar", samples)
    results = []
    for names in (["missile", "missile", "dog"], ["a", "b", "c"]):
        evaluator, result = evaluate(new_model(names, output), data=str(tmp_path))
        assert evaluator.data.classes == [(label,) for label in labels]
        results.append(result.own.metrics)
    assert results[0] == results[1]


def test_folders_are_found_as_they_are_written_and_with_spaces_for_underscores():
    found = map_of(["hot_dog", "hot dog", "a_b c", "d e"])
    assert [found.find(name) for name in ("hot_dog", "hot dog", "a_b c")] == [(0,), (1,), (2,)]
    assert [found.find(name) for name in ("a b c", "a_b_c", "d_e", "d e")] == [
        (2,),
        (2,),
        (3,),
        (3,),
    ]
    assert map_of(["missile", "missile"]).find("missile") == (0, 1)
    assert found.find("unknown") is None


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """Twelve images with none to three tags each, by name."""
    root, samples = tmp_path_factory.mktemp("tagged"), {}
    for i in range(12):
        tags = [NAMES[(i + j) % 3] for j in range(i % 4)]
        image = encode(photo(i, *SIZES[i % len(SIZES)]))
        samples[str(i)] = {"png": image, "json": json.dumps({"tags": tags}).encode()}
    write_shard(root / "0.tar", samples)
    return root


def test_many_labels_have_a_mean_average_precision(tagged):
    model = new_model(NAMES, "sigmoid")
    evaluator, result = evaluate(model, data=str(tagged), field="json.tags")
    images = [photo(i, *SIZES[i % len(SIZES)]) for i in range(12)]
    scores = model.classify(images).logit().double().numpy()
    right = np.array([[(c - i) % 3 < i % 4 for c in range(3)] for i in range(12)])
    expected = precision_slowly(scores, right)
    own = result.own
    assert own.metrics["map"] == pytest.approx(np.mean(expected))
    assert own.per_class == pytest.approx(dict(zip(NAMES, expected, strict=True)))
    hits = [right[i, scores[i].argmax()] for i in range(12) if right[i].any()]
    assert own.metrics["top1"] == pytest.approx(np.mean(hits))
    assert "mean_per_class" not in own.metrics
    assert own.confusions == ()
    assert len(evaluator.samples().classified) == 8
    groups = own.breakdowns["by_aspect"]
    assert sum(group.images for group in groups) == 12


# Data and the command line


def test_shards_and_folders_of_other_orders_are_told_apart_by_name(folders, tmp_path):
    turned = ("red dog", "lake", "boat", "bicycle")
    paths = sorted(folders.glob("*/*.png"))
    samples = {
        str(i): {
            "png": path.read_bytes(),
            "cls": str(turned.index(path.parent.name.replace("_", " "))).encode(),
        }
        for i, path in enumerate(paths)
    }
    write_shard(tmp_path / "0.tar", samples)
    (tmp_path / "classnames.txt").write_text("\n".join(turned))
    model = new_model()
    _, expected = evaluate(model, data=str(folders))
    _, found = evaluate(model, data=str(tmp_path))
    assert found.own.metrics == pytest.approx(expected.own.metrics)
    (tmp_path / "classnames.txt").unlink()  # then an index is the model's
    _, other = evaluate(new_model(turned), data=str(tmp_path))
    _, same = evaluate(new_model(turned), data=str(folders))
    assert other.own.metrics == pytest.approx(same.own.metrics)


def test_only_classes_that_are_present_compete(folders):
    _, result = evaluate(new_model(), data=str(folders), only_present=True)
    assert result.counts["classes"] == 3


def test_the_command_writes_table_json_and_report(folders, tmp_path, capsys):
    new_model().save_pretrained(tmp_path / "model")
    words = ["classify", "--model", str(tmp_path / "model"), "--data", str(folders)]
    words += ["--workers", "0", "--max-tokens", "6", "--device", "cpu"]
    words += ["--baseline", str(tmp_path / "model")]
    main([*words, "--report", str(tmp_path / "a.html"), "--output", str(tmp_path / "a.json")])
    assert "Classification: 11 images, 4 classes, fp32" in capsys.readouterr().out
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["kind"] == "classify"
    assert content["top1"] == content["baselines"][0]["views"][1]["top1"]
    assert "Calibration" in (tmp_path / "a.html").read_text()
    main(["summary", str(tmp_path)])
    assert "Classification" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "more", "named"),
    [
        ("zeroshot", [], "zeroshot compares images with texts, which"),
        ("classify", ["--class-map", "nowhere.json"], "class map nowhere.json"),
        ("classify", ["--field", "json.tags"], "--field json.tags goes with shards"),
    ],
)
def test_a_mistake_is_one_line(folders, tmp_path, capsys, kind, more, named):
    new_model().save_pretrained(tmp_path / "model")
    words = [kind, "--model", str(tmp_path / "model"), "--data", str(folders), "--workers", "0"]
    with pytest.raises(SystemExit) as stop:
        main([*words, *more])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line


def test_models_and_data_that_do_not_fit(folders, model_dir, tmp_path):
    with pytest.raises(
        UserError, match=r"class folder 'red_dog' is not in class map of the known classes"
    ):
        evaluate(new_model(("bicycle", "boat", "lake")), data=str(folders))
    evaluator = Classify(ClassifySpec(data=str(folders)))
    baselines = [PackedClassifier(new_model(("a", "b")), "other")]
    with pytest.raises(UserError, match="other has other classes"):
        evaluator.run(PackedClassifier(new_model(), "tiny"), ALONE, 0, baselines=baselines)
    with pytest.raises(SystemExit):
        main(["classify", "--model", str(model_dir), "--data", str(folders), "--workers", "0"])


def test_a_run_is_evaluated_by_its_head_and_the_best_is_kept(tmp_path, monkeypatch, capsys):
    data = tmp_path / "shards"
    samples = {
        str(i): {"png": encode(photo(i, 24, 32)), "cls": str(i % 3).encode()} for i in range(12)
    }
    write_shard(data / "0.tar", samples)
    (data / "classnames.txt").write_text("\n".join(NAMES))
    spec = {"held-out": {"kind": "classify", "every_steps": 1, "data": str(data)}}
    flags = classify_flags(
        data,
        tmp_path / "run",
        2,
        eval__evaluators=json.dumps(spec),
        eval__best="held-out/top1",
        eval__workers=0,
    )
    assert run_training(monkeypatch, flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["step"] for line in lines if "eval/held-out/top1" in line] == [1, 2]
    assert NaViTClassifier.from_pretrained(tmp_path / "run/best").classes == NAMES
    capsys.readouterr()
    words = ["classify", "--run", str(tmp_path / "run"), "--data", str(data), "--workers", "0"]
    main([*words, "--output", str(tmp_path / "last.json")])
    found = json.loads((tmp_path / "last.json").read_text())["top1"]
    assert found == pytest.approx(lines[-1]["eval/held-out/top1"])
