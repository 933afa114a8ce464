"""Ranks against brute force in float64; whatever is not certain counts as a miss.

The brute force compares one pair at a time with exactly rounded sums. A second reference sorts a
whole similarity matrix, as other evaluations do; it knows no ties.
"""

from __future__ import annotations

import math
from statistics import median

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from navit_clip.evaluation import ranking
from navit_clip.evaluation.ranking import Readout, classify, pair_ranks, recall


def dot(a, b) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def not_below(a: float, b: float) -> bool:
    """Whether `a` may count as at least `b`: also if one of them is no number."""
    return not a < b


def brute_text_to_image(images, texts, owner):
    return [
        sum(
            not_below(dot(t, image), dot(t, images[own]))
            for i, image in enumerate(images)
            if i != own
        )
        for t, own in zip(texts, owner, strict=True)
    ]


def brute_image_to_text(images, texts, owner):
    ranks = []
    for i, image in enumerate(images):
        own = [dot(image, t) for t, o in zip(texts, owner, strict=True) if o == i]
        best = math.nan if any(map(math.isnan, own)) else max(own, default=-math.inf)
        others = [t for t, o in zip(texts, owner, strict=True) if o != i]
        ranks.append(sum(not_below(dot(image, t), best) for t in others))
    return ranks


def brute_class_ranks(images, classes, right):
    ranks = []
    for image, found in zip(images, right, strict=True):
        scores = [dot(image, c) for c in classes]
        own = [scores[c] for c in found]
        best = math.nan if any(map(math.isnan, own)) else max(own)
        ranks.append(sum(not_below(s, best) for c, s in enumerate(scores) if c not in found))
    return ranks


def draw(rng, count, width, values):
    """Vectors; few `values` make many exact ties and duplicates, one of them no number at all."""
    if values is None:
        return rng.normal(size=(count, width))
    vectors = rng.integers(0, 3, (count, width)).astype(float)
    if values == "nan":
        vectors[rng.random(count) < 0.2, 0] = math.nan
    if values == "copies":
        vectors = rng.normal(size=(3, width))[rng.integers(0, 3, count)]
    return vectors


KINDS = st.sampled_from([None, "few", "copies", "nan"])


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    most=st.integers(1, 7),
    values=KINDS,
    shuffled=st.booleans(),
    scores=st.integers(1, 60),
)
def test_ranks_are_those_of_brute_force(seed, count, most, values, shuffled, scores):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(count), rng.integers(1, most + 1, count))
    if shuffled:
        rng.shuffle(owner)
    images, texts = draw(rng, count, 4, values), draw(rng, len(owner), 4, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_SCORES", scores)
        tensors = [torch.from_numpy(x) for x in (images, texts, owner)]
        to_text, to_image = pair_ranks(*tensors)
    assert to_text.tolist() == brute_image_to_text(images, texts, owner)
    assert to_image.tolist() == brute_text_to_image(images, texts, owner)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(1, 9),
    several=st.booleans(),
    values=KINDS,
    scores=st.integers(1, 40),
)
def test_class_ranks_are_those_of_brute_force(seed, classes, several, values, scores):
    rng = np.random.default_rng(seed)
    images, vectors = draw(rng, 12, 4, values), draw(rng, classes, 4, values)
    right = [
        set(rng.integers(0, classes, rng.integers(1, 4) if several else 1).tolist())
        for _ in range(5)
    ]
    group = rng.integers(0, 5, 12)
    right_LC = torch.tensor([[c in found for c in range(classes)] for found in right])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_SCORES", scores)
        tensors = [torch.from_numpy(x) for x in (images, vectors)]
        found = classify(Readout(*tensors, scale=3.0), right_LC, torch.from_numpy(group))
    expected = brute_class_ranks(images, vectors, [right[g] for g in group])
    assert found.rank_E.tolist() == expected
    for i, g in enumerate(group):
        similar = [3 * dot(images[i], v) for v in vectors]
        wrong = [s for c, s in enumerate(similar) if c not in right[g]]
        nearest = int(found.wrong_E[i])
        if not wrong:
            assert nearest == -1
        elif not any(map(math.isnan, similar)):
            assert nearest not in right[g]
            assert similar[nearest] == pytest.approx(max(wrong))
            sure = math.exp(max(similar)) / sum(map(math.exp, similar))
            assert found.confidence_E[i].item() == pytest.approx(sure)


@pytest.mark.parametrize(("images", "captions"), [(1, 1), (1, 5), (90, 5), (300, 1)])
def test_recall_equals_that_of_a_sorted_matrix(images, captions):
    generator = torch.Generator().manual_seed(images)
    owner_T = torch.arange(images).repeat_interleave(captions)
    images_ED = F.normalize(torch.randn(images, 32, generator=generator), dim=-1)
    noise = torch.randn(len(owner_T), 32, generator=generator)
    texts_TD = F.normalize(images_ED[owner_T] + 0.5 * noise, dim=-1)
    matrix = (images_ED.double() @ texts_TD.double().T).numpy()
    owner = owner_T.numpy()
    to_text = [
        int(np.argmax(owner[np.argsort(-row, kind="stable")] == i)) for i, row in enumerate(matrix)
    ]
    to_image = [
        int(np.argmax(np.argsort(-column, kind="stable") == o))
        for column, o in zip(matrix.T, owner, strict=True)
    ]
    for ranks, expected in zip(
        pair_ranks(images_ED, texts_TD, owner_T), (to_text, to_image), strict=True
    ):
        assert ranks.tolist() == expected
        assert recall(ranks) == {
            "R@1": pytest.approx(np.mean([r < 1 for r in expected])),
            "R@5": pytest.approx(np.mean([r < 5 for r in expected])),
            "R@10": pytest.approx(np.mean([r < 10 for r in expected])),
            "median_rank": median(expected) + 1,
        }


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan])
def test_a_model_that_says_the_same_of_everything_finds_nothing(value):
    images, texts = torch.full((20, 4), value), torch.full((40, 4), value)
    for ranks in pair_ranks(images, texts, torch.arange(40) // 2):
        assert set(recall(ranks).values()) <= {0.0, 20.0, 39.0}
    classes, right_LC = torch.full((7, 4), value), torch.eye(7, dtype=torch.bool)
    found = classify(Readout(images, classes, scale=100.0), right_LC, torch.arange(20) % 7)
    assert found.rank_E.tolist() == [6] * 20


@pytest.mark.parametrize("width", [3, 64, 100, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_of_the_right_answer_are_ties_wherever_they_stand(width, dtype):
    # A matrix product may round the last columns otherwise than the first.
    generator = torch.Generator().manual_seed(width)
    count = 203
    one, query = (
        F.normalize(torch.randn(width, generator=generator, dtype=dtype), dim=0) for _ in range(2)
    )
    copies = one.expand(count, width).contiguous()
    to_text, to_image = pair_ranks(query[None].repeat(count, 1), copies, torch.arange(count))
    assert set(to_text.tolist()) == {count - 1}
    assert set(to_image.tolist()) == {count - 1}
    right_LC = torch.eye(count, dtype=torch.bool)
    queries = query[None].repeat(count, 1)
    found = classify(Readout(queries, copies, scale=100.0), right_LC, torch.arange(count))
    assert set(found.rank_E.tolist()) == {count - 1}


def test_a_copy_of_the_right_image_is_a_tie_and_no_hit():
    images = torch.eye(3)[[0, 0, 1, 2]]
    for ranks in pair_ranks(images, images, torch.arange(4)):
        assert ranks.tolist() == [1, 1, 0, 0]


def test_one_vector_that_is_no_number_spoils_no_one_elses_rank_for_the_better():
    images, texts, owner = torch.eye(4), torch.eye(4), torch.arange(4)
    images[2, 0] = math.nan
    to_text, to_image = pair_ranks(images, texts, owner)
    assert to_text.tolist() == [0, 0, 3, 0]
    assert to_image.tolist() == [1, 1, 3, 1]


def test_an_image_without_captions_finds_nothing():
    to_text, to_image = pair_ranks(torch.eye(3), torch.eye(3)[:2], torch.arange(2))
    assert to_text.tolist() == [0, 0, 2]
    assert to_image.tolist() == [0, 0]


def test_a_class_without_an_image_competes():
    images = torch.tensor([[1.0, 0.2], [0.2, 1.0]])
    classes = torch.tensor([[0.9, 0.0], [0.0, 0.9], [1.0, 0.0]])
    right_LC = torch.eye(3, dtype=torch.bool)[:2]
    found = classify(Readout(images, classes), right_LC, torch.arange(2))
    assert found.rank_E.tolist() == [1, 0]
    assert found.wrong_E.tolist() == [2, 2]
