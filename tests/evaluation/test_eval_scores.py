"""What the evaluators report of given embeddings, and the prompts and names behind them."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from eval_cases import ALONE
from hypothesis import example, given
from hypothesis import strategies as st
from shard_factory import CAPTIONS

from navit_clip.errors import UserError
from navit_clip.evaluation.breakdown import break_down
from navit_clip.evaluation.calibration import expected_calibration_error
from navit_clip.evaluation.embed import Embedded, embed_texts
from navit_clip.evaluation.labelled import Labelled
from navit_clip.evaluation.models import PackedModel
from navit_clip.evaluation.ranking import recall
from navit_clip.evaluation.registry import read_result
from navit_clip.evaluation.retrieval import Retrieval, RetrievalSpec
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.evaluation.zeroshot import (
    ZeroShot,
    ZeroShotSpec,
    class_prompts,
    class_vectors,
    load_classnames,
    load_templates,
)
from navit_clip.model import NaViTCLIP

# Metrics


def model_of(scale=1.0):
    """What an evaluator asks of a model beside embeddings."""
    return SimpleNamespace(
        name="a",
        own_setting=EvalSetting("capped", 4),
        precision="fp32",
        scale=scale,
        image_flops=lambda tokens: 10 * tokens,
    )


def scored(evaluator, model, data, texts_TD):
    """The result as JSON, which reads back as it was."""
    evaluator.data = data
    result = evaluator._result([(model, data, texts_TD)])
    written = json.loads(json.dumps(result.to_json()))
    assert read_result(written) == result
    for key in ("kind", "model", "data", "precision", "baselines"):
        written.pop(key)
    return written


def embedded(vectors, *, classes=None, captions=None, sizes=None, skipped=None):
    """Images at the model's own setting and at a square one, where they are all turned round."""
    count = len(vectors)
    own, square = EvalSetting("capped", 4), EvalSetting("square", 16)
    return Embedded(
        names=[str(i) for i in range(count)],
        classes=classes or [()] * count,
        captions=captions or [()] * count,
        sizes=sizes or [(10, 10)] * count,
        embeddings={own: vectors, square: -vectors},
        lengths={own: [1 + i % 3 for i in range(count)], square: [4] * count},
        padding={own: 0.25, square: 0.0},
        skipped=Counter(skipped or {}),
    )


NAMES = ["cat", "dog", "cow", "dog"]
CLASSES = {"cat": (1.0, 0.0), "dog": (0.0, 1.0), "cow": (-1.0, 0.0)}


def classified(data, names, vectors, *, scale=1.0, present=None):
    evaluator = ZeroShot(ZeroShotSpec("data", only_present=present is not None))
    evaluator.labelled = Labelled(None, classes=present)
    evaluator.names = names
    return scored(evaluator, model_of(scale), data, vectors)


def classified_as(labels, vectors, **options):
    """Classes are right as `labels` say: an index, or several where any of them will do."""
    classes = [label if isinstance(label, tuple) else (label,) for label in labels]
    data = embedded(F.normalize(torch.tensor(vectors), dim=-1), classes=classes, skipped={"x": 2})
    class_vectors = torch.tensor(list(CLASSES.values()))
    return classified(data, NAMES[:3], class_vectors, scale=2.0, **options)


def test_the_metrics_of_zero_shot():
    result = classified_as(
        [0, 0, 1, 1, 2], [(1.0, 0.1), (0.1, 1.0), (0.1, 1.0), (0.0, 1.0), (1.0, 0.2)]
    )
    assert {k: v for k, v in result.items() if k not in ("views", "ece")} == {
        "images": 5,
        "classes": 3,
        "skipped": {"x": 2},
        "max_tokens": 4,
        "top1": 3 / 5,
        "top5": 1.0,
        "mean_per_class": (1 / 2 + 1 + 0) / 3,
    }
    own, square = result["views"]
    assert (own["view"], own["label"], own["max_tokens"], own["side"], own["own"]) == (
        "capped",
        "4",
        4,
        None,
        True,
    )
    assert (square["view"], square["label"], square["max_tokens"], square["side"]) == (
        "square",
        "16²",
        None,
        16,
    )
    assert not square["own"]
    assert (own["mean_tokens"], own["flops_per_image"], own["padding"]) == (9 / 5, 18.0, 0.25)
    assert own["per_class"] == {"cat": 0.5, "dog": 1.0, "cow": 0.0}
    assert own["confusions"] == [
        {"class": "cow", "images": 1, "top1": 0.0, "taken_for": [{"class": "cat", "share": 1.0}]},
        {"class": "cat", "images": 2, "top1": 0.5, "taken_for": [{"class": "dog", "share": 0.5}]},
    ]
    assert own["by_aspect"] == [{"label": "1-1.1", "images": 5, "top1": 3 / 5, "top5": 1.0}]
    assert own["by_size"] == [{"label": "<128", "images": 5, "top1": 3 / 5, "top5": 1.0}]
    assert square["top1"] == 1 / 5


def test_only_the_classes_that_are_asked_for_compete():
    labels, vectors = [0, 0, 1], [(1.0, 0.2), (-1.0, 0.1), (-1.0, 0.2)]
    every, some = (
        classified_as(labels, vectors),
        classified_as(labels, vectors, present=frozenset([0, 1])),
    )
    assert (every["classes"], every["top1"]) == (3, 1 / 3)
    assert (some["classes"], some["top1"]) == (2, 2 / 3)
    assert classified_as(labels, vectors, present=frozenset([0, 1, 2])) == every


def test_any_of_several_right_classes_will_do():
    any_of = (0, 2)
    labels = [any_of, any_of, any_of, 1]
    vectors = [(1.0, 0.1), (-1.0, 0.1), (0.1, 1.0), (0.1, 1.0)]
    result = classified_as(labels, vectors, present=frozenset([0, 1, 2]))
    assert (result["top1"], result["classes"]) == (3 / 4, 3)
    own = result["views"][0]
    assert own["per_class"] == {"cat / cow": 2 / 3, "dog": 1.0}
    assert own["confusions"][0]["taken_for"] == [{"class": "dog", "share": 1 / 3}]
    assert classified_as([(0, 1, 2)], [(1.0, 0.1)])["top1"] == 1.0


def test_classes_of_one_name_are_told_apart():
    data = embedded(torch.randn(4, 3), classes=[(0,), (1,), (2,), (3,)])
    result = classified(data, NAMES, torch.randn(4, 3))
    assert list(result["views"][0]["per_class"]) == ["cat", "dog (1)", "cow", "dog (3)"]


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ([0, 3], {}),
        ([0, (0, 3)], {}),
        ([0, 0], {"present": frozenset([0, 3])}),
    ],
)
def test_a_label_without_a_name_is_refused(labels, options):
    with pytest.raises(UserError, match=r"label .* has no name: there are 3 class names"):
        classified_as(labels, [(1.0, 0.0), (0.0, 1.0)], **options)


def test_the_ten_worst_classes_are_shown():
    names = [f"c{i:02}" for i in range(14)]
    vectors = torch.eye(14)
    classes = [(i,) for i in range(14) for _ in range(2)]
    # Every second class is always taken for the next one, the others once.
    taken = [(i + 1) % 14 if i % 2 or j else i for i in range(14) for j in range(2)]
    data = embedded(vectors[taken], classes=classes)
    result = classified(data, names, vectors)
    found = [(c["class"], c["top1"]) for c in result["views"][0]["confusions"]]
    expected = [(f"c{i:02}", 0.0) for i in range(1, 14, 2)] + [(f"c{i:02}", 0.5) for i in (0, 2, 4)]
    assert found == expected


def test_the_metrics_of_retrieval():
    images = torch.eye(4)
    captions = [("0a", "0b"), ("1a",), ("2a",), ("3a", "3b")]
    # Caption 0b belongs with image 1, and 2a with nothing.
    places = {"0a": 0, "0b": 1, "1a": 1, "3a": 3, "3b": 3}
    vectors = {text: images[place] for text, place in places.items()} | {"2a": torch.zeros(4)}
    texts = torch.stack([vectors[text] for of_image in captions for text in of_image])
    sizes = [(10, 10), (10, 30), (600, 800), (10, 10)]
    data = embedded(images, captions=captions, sizes=sizes)
    result = scored(Retrieval(RetrievalSpec("data")), model_of(), data, texts)
    # Image 1 ties with the foreign 0b, image 2 with all other five, 2a with all other images.
    to_text = {"R@1": 2 / 4, "R@5": 3 / 4, "R@10": 1.0, "median_rank": 1.5}
    to_image = {"R@1": 4 / 6, "R@5": 1.0, "R@10": 1.0, "median_rank": 1.0}
    assert {k: v for k, v in result.items() if k != "views"} == {
        "image_to_text": to_text,
        "text_to_image": to_image,
        "max_tokens": 4,
        "images": 4,
        "captions": 6,
        "skipped": {},
    }
    own = result["views"][0]
    assert own["by_aspect"] == [
        {
            "label": "1-1.1",
            "images": 2,
            "image_to_text": {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "median_rank": 1.0},
            "text_to_image": {"R@1": 3 / 4, "R@5": 1.0, "R@10": 1.0, "median_rank": 1.0},
        },
        {
            "label": "1.1-1.4",
            "images": 1,
            "image_to_text": {"R@1": 0.0, "R@5": 0.0, "R@10": 1.0, "median_rank": 6.0},
            "text_to_image": {"R@1": 0.0, "R@5": 1.0, "R@10": 1.0, "median_rank": 4.0},
        },
        {
            "label": ">2",
            "images": 1,
            "image_to_text": {"R@1": 0.0, "R@5": 1.0, "R@10": 1.0, "median_rank": 2.0},
            "text_to_image": {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "median_rank": 1.0},
        },
    ]
    assert [(group["label"], group["images"]) for group in own["by_size"]] == [
        ("<128", 3),
        (">=640", 1),
    ]


def test_recall_is_the_share_of_ranks_below_k():
    assert recall(torch.tensor([0, 0, 1, 4, 5, 9, 10, 200])) == {
        "R@1": 2 / 8,
        "R@5": 4 / 8,
        "R@10": 6 / 8,
        "median_rank": 5.5,
    }
    assert recall(torch.tensor([2, 0, 7]))["median_rank"] == 3


# Groups and calibration


def indices_of(index):
    return dict.fromkeys(index.tolist(), 0.0)


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), max_size=40))
@example([(10, 11), (14, 10), (10, 16), (10, 20), (10, 10), (128, 128), (640, 640), (1, 2000)])
def test_every_image_is_in_the_group_of_its_shape_and_size(sizes):
    bounds = {"1-1.1": (1, 1.1), "1.1-1.4": (1.1, 1.4), "1.4-1.6": (1.4, 1.6), "1.6-2": (1.6, 2)}
    bounds[">2"] = (2, math.inf)
    found = break_down(sizes, indices_of)
    for group in found["by_aspect"]:
        low, high = bounds[group.label]
        for i in group.metrics:
            assert low <= max(sizes[i]) / min(sizes[i]) < high
    lows = {"<128": 0, "<224": 128, "<320": 224, "<448": 320, "<640": 448, ">=640": 640}
    highs = [*list(lows.values())[1:], math.inf]
    for group in found["by_size"]:
        for i in group.metrics:
            side = (sizes[i][0] * sizes[i][1]) ** 0.5
            assert lows[group.label] <= side < highs[list(lows).index(group.label)]
    for groups in found.values():
        indices = [i for group in groups for i in group.metrics]
        assert sorted(indices) == list(range(len(sizes)))
        assert all(group.images == len(group.metrics) > 0 for group in groups)


@given(
    st.lists(
        st.tuples(
            st.one_of(st.floats(0, 1), st.integers(0, 15).map(lambda i: i / 15)), st.booleans()
        ),
        min_size=1,
        max_size=50,
    )
)
def test_calibration_error_is_the_sum_over_bins(pairs):
    expected = 0.0
    for m in range(1, 16):
        inside = [(c, hit) for c, hit in pairs if (m == 1 or (m - 1) / 15 < c) and c <= m / 15]
        if m == 15:
            inside = [(c, hit) for c, hit in pairs if c > 14 / 15]
        if inside:
            confidence = math.fsum(c for c, _ in inside) / len(inside)
            accuracy = sum(hit for _, hit in inside) / len(inside)
            expected += len(inside) / len(pairs) * abs(accuracy - confidence)
    hits = torch.tensor([hit for _, hit in pairs])
    confidence = torch.tensor([c for c, _ in pairs], dtype=torch.float64)
    assert expected_calibration_error(confidence, hits) == pytest.approx(expected, abs=1e-12)


def test_a_model_as_sure_as_it_is_right_is_calibrated():
    confidence = torch.tensor([0.8] * 10 + [0.5] * 4)
    hits = torch.tensor([True] * 8 + [False] * 2 + [True] * 2 + [False] * 2)
    assert expected_calibration_error(confidence, hits) == pytest.approx(0, abs=1e-7)
    assert expected_calibration_error(torch.tensor([math.nan]), torch.tensor([False])) == 1.0


# Prompts


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts(model_dir):
    model = NaViTCLIP.from_directory(model_dir)
    templates = [lambda name: f"a {name}", lambda name: f"the photo of one {name} at night"]
    names = ["red dog", "bird", "boat"]
    prompts = class_prompts(names, templates)
    packed = PackedModel(model, "tiny")
    vectors = class_vectors(embed_texts(packed, prompts, ALONE, None), len(names))
    assert vectors.shape == (3, 8)
    for name, vector in zip(names, vectors, strict=True):
        # One prompt at a time, so that none can be taken for another's.
        prompts = [model.encode_text([template(name)])[0].double() for template in templates]
        mean = sum(p / p.norm() for p in prompts) / len(prompts)
        torch.testing.assert_close(vector.double(), mean / mean.norm(), atol=1e-5, rtol=0)


def test_captions_are_embedded_in_order_with_their_owners(model_dir):
    model = NaViTCLIP.from_directory(model_dir)
    captions = [CAPTIONS[:2], CAPTIONS[2:3], CAPTIONS[3:7]]
    data = embedded(torch.eye(3), captions=captions)
    every = Retrieval(RetrievalSpec("data")).texts(data)
    texts = embed_texts(PackedModel(model, "tiny"), every, ALONE, None)
    assert data.image_of_texts.tolist() == [0, 0, 1, 2, 2, 2, 2]
    alone = torch.cat([model.encode_text([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(texts, alone, atol=1e-5, rtol=0)


def test_templates_by_name():
    assert [template("dog") for template in load_templates("plain")] == ["a photo of a dog."]
    assert len(load_templates("openai")) == 80
    assert len(load_templates("simple")) == 7
    assert all("dog" in template("dog") for template in load_templates("openai"))


def test_templates_from_a_file(tmp_path):
    (tmp_path / "t.txt").write_text("a {}.\n\n  {} and another {}  \na {c}?", encoding="utf-8")
    found = [template("Kälte") for template in load_templates(str(tmp_path / "t.txt"))]
    assert found == ["a Kälte.", "Kälte and another Kälte", "a Kälte?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a photo\n", r"template without \{\} in .*t\.txt: 'a photo'"),
        (b"", r"templates .*t\.txt is empty"),
        (b"\n \n", r"templates .*t\.txt is empty"),
        (b"\xff{}", r"cannot read templates .*t\.txt"),
        (None, r"cannot read templates .*t\.txt"),
    ],
)
def test_unusable_templates_are_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_templates(str(tmp_path / "t.txt"))


def test_class_names(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("red dog\nblue bird\n", encoding="utf-8-sig")  # as Windows writes it
    assert load_classnames(None, ["red_dog", "bird"]) == ["red dog", "bird"]
    assert load_classnames(str(names), None) == ["red dog", "blue bird"]
    assert load_classnames(str(names), ["n01", "n02"]) == ["red dog", "blue bird"]
    imagenet = load_classnames("imagenet", None)
    assert len(imagenet) == 1000
    assert "tench" in imagenet
    with pytest.raises(UserError, match=r"2 class names for 3 class folders.*--class-map"):
        load_classnames(str(names), ["a", "b", "c"])
    # ImageNet-V2's folders 0, 1, 10, 100, … in sorted order are not the classes 0, 1, 2, 3, …
    assert load_classnames(str(names), ["2", "9"]) == ["red dog", "blue bird"]
    with pytest.raises(UserError, match=r"numbers that sort as 10, 9, …: .*--class-map index"):
        load_classnames(str(names), ["10", "9"])
    with pytest.raises(UserError, match="--classnames"):
        load_classnames(None, None)
    with pytest.raises(UserError, match=r"class names .*none\.txt"):
        load_classnames(str(tmp_path / "none.txt"), None)
