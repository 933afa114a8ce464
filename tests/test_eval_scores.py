"""Recall and accuracy against brute force in float64; whatever is not certain counts as a miss."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_factory import CAPTIONS

from eval import retrieval, zeroshot
from eval.encode import Embedded
from eval.retrieval import image_to_text_ranks, recall, text_to_image_ranks
from eval.zeroshot import class_vectors, load_classnames, load_templates, topk_hits
from navit_clip.embedding import embed_texts
from navit_clip.errors import UserError
from navit_clip.interop.pretrained import load_pretrained


def dot(a, b) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def brute_text_to_image(texts, images, owner):
    return [
        sum(dot(t, image) >= dot(t, images[own]) for i, image in enumerate(images) if i != own)
        for t, own in zip(texts, owner, strict=True)
    ]


def brute_image_to_text(images, texts, owner):
    ranks = []
    for i, image in enumerate(images):
        best = max(dot(image, t) for t, own in zip(texts, owner, strict=True) if own == i)
        others = [t for t, own in zip(texts, owner, strict=True) if own != i]
        ranks.append(sum(dot(image, t) >= best for t in others))
    return ranks


def random_pairs(seed, count, *, values, shuffled=False):
    """Images with 1 to 7 captions each; few `values` make many exact ties and duplicates."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(count), rng.integers(1, 8, count))
    if shuffled:
        rng.shuffle(owner)
    draw = (
        (lambda n: rng.normal(size=(n, 4)))
        if values is None
        else (lambda n: rng.integers(0, values, (n, 4)).astype(float))
    )
    return draw(count), draw(len(owner)), owner


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    values=st.sampled_from([None, 2, 3]),
    shuffled=st.booleans(),
    block=st.integers(1, 9),
)
def test_ranks_are_those_of_brute_force(seed, count, values, shuffled, block):
    images, texts, owner = random_pairs(seed, count, values=values, shuffled=shuffled)
    tensors = [torch.from_numpy(x).to(torch.float64) for x in (images, texts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_BLOCK", block)
        to_image = text_to_image_ranks(tensors[1], tensors[0], torch.from_numpy(owner))
        to_text = image_to_text_ranks(tensors[0], tensors[1], torch.from_numpy(owner))
    assert to_image.tolist() == brute_text_to_image(texts, images, owner)
    assert to_text.tolist() == brute_image_to_text(images, texts, owner)


def test_float32_ranks_of_ordinary_embeddings_equal_those_in_float64():
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(n, 32, generator=generator), dim=-1) for n in (90, 300)
    )
    owner = torch.arange(300) % 90
    for ranks, first, second in (
        (text_to_image_ranks, texts, images),
        (image_to_text_ranks, images, texts),
    ):
        exact = ranks(first.double(), second.double(), owner)
        assert torch.equal(ranks(first, second, owner), exact)


def test_recall_is_the_share_of_ranks_below_k():
    assert recall(torch.tensor([0, 0, 1, 4, 5, 9, 10, 200])) == {
        "R@1": 2 / 8,
        "R@5": 4 / 8,
        "R@10": 6 / 8,
    }


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan])
def test_a_model_that_says_the_same_of_everything_finds_nothing(value):
    images, texts, owner = (
        torch.full((20, 4), value),
        torch.full((40, 4), value),
        torch.arange(40) // 2,
    )
    assert recall(text_to_image_ranks(texts, images, owner)) == dict.fromkeys(
        ("R@1", "R@5", "R@10"), 0.0
    )
    assert set(recall(image_to_text_ranks(images, texts, owner)).values()) == {0.0}
    classes, labels = torch.full((7, 4), value), torch.arange(20) % 7
    assert not topk_hits(images, classes, labels, 1).any()
    assert not topk_hits(images, classes, labels, 5).any()


def test_a_copy_of_the_right_image_is_a_tie_and_no_hit():
    images = torch.eye(3)[[0, 0, 1, 2]]
    assert text_to_image_ranks(images, images, torch.arange(4)).tolist() == [1, 1, 0, 0]
    assert image_to_text_ranks(images, images, torch.arange(4)).tolist() == [1, 1, 0, 0]


def test_one_vector_that_is_no_number_spoils_no_one_elses_rank_for_the_better():
    images, texts, owner = torch.eye(4), torch.eye(4), torch.arange(4)
    images[2, 0] = math.nan
    assert text_to_image_ranks(texts, images, owner).tolist() == [1, 1, 3, 1]
    assert image_to_text_ranks(images, texts, owner).tolist() == [0, 0, 3, 0]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(1, 9),
    k=st.sampled_from([1, 2, 5]),
    values=st.sampled_from([None, 2]),
)
def test_topk_is_that_of_brute_force(seed, classes, k, values):
    rng = np.random.default_rng(seed)
    images, vectors = rng.normal(size=(12, 4)), rng.normal(size=(classes, 4))
    if values:
        images, vectors = (
            rng.integers(0, values, x.shape).astype(float) for x in (images, vectors)
        )
    labels = rng.integers(0, classes, 12)
    expected = [
        sum(dot(image, v) >= dot(image, vectors[own]) for i, v in enumerate(vectors) if i != own)
        < k
        for image, own in zip(images, labels, strict=True)
    ]
    hits = topk_hits(*(torch.from_numpy(x) for x in (images, vectors, labels)), k)
    assert hits.tolist() == expected


def test_every_class_is_among_the_first_five_of_fewer():
    images, classes = torch.eye(4)[:3], torch.eye(4)[:3]
    assert topk_hits(images, classes, torch.tensor([2, 1, 0]), 5).all()


# Prompts


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts(model_dir):
    pretrained = load_pretrained(model_dir)
    templates = [lambda name: f"a {name}", lambda name: f"the photo of one {name} at night"]
    names = ["red dog", "bird", "boat"]
    vectors = class_vectors(pretrained, names, templates)
    assert vectors.shape == (3, 8)
    for name, vector in zip(names, vectors, strict=True):
        # One prompt at a time, so that none can be taken for another's.
        prompts = [embed_texts(pretrained, [template(name)])[0].double() for template in templates]
        mean = sum(p / p.norm() for p in prompts) / len(prompts)
        torch.testing.assert_close(vector.double(), mean / mean.norm(), atol=1e-5, rtol=0)


def test_captions_are_embedded_in_order_with_their_owners(model_dir):
    pretrained = load_pretrained(model_dir)
    captions = [CAPTIONS[:2], CAPTIONS[2:3], CAPTIONS[3:7]]
    data = Embedded(["a", "b", "c"], [-1] * 3, captions, {}, {}, Counter())
    texts, owner = retrieval.embed_captions(pretrained, data)
    assert owner.tolist() == [0, 0, 1, 2, 2, 2, 2]
    alone = torch.cat([embed_texts(pretrained, [caption]) for caption in CAPTIONS])
    torch.testing.assert_close(texts, alone, atol=1e-5, rtol=0)


def test_templates_by_name():
    assert [template("dog") for template in load_templates("plain")] == ["a photo of a dog."]
    assert len(load_templates("openai")) == 80
    assert len(load_templates("simple")) == 7
    assert all("dog" in template("dog") for template in load_templates("openai"))


def test_templates_from_a_file(tmp_path):
    (tmp_path / "t.txt").write_text("a {}.\n\n  {} and another {}  \n", encoding="utf-8")
    found = [template("Kälte") for template in load_templates(str(tmp_path / "t.txt"))]
    assert found == ["a Kälte.", "Kälte and another Kälte"]


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
    names.write_text("red dog\nblue bird\n")
    assert load_classnames(None, ["red_dog", "bird"]) == ["red dog", "bird"]
    assert load_classnames(str(names), None) == ["red dog", "blue bird"]
    assert load_classnames(str(names), ["n01", "n02"]) == ["red dog", "blue bird"]
    imagenet = load_classnames("imagenet", None)
    assert len(imagenet) == 1000
    assert "tench" in imagenet
    with pytest.raises(UserError, match="2 class names for 3 class folders"):
        load_classnames(str(names), ["a", "b", "c"])
    with pytest.raises(UserError, match="--classnames"):
        load_classnames(None, None)
    with pytest.raises(UserError, match=r"class names .*none\.txt"):
        zeroshot.load_classnames(str(tmp_path / "none.txt"), None)
