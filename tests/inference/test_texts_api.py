"""The Python API: texts, comparing them with images, classification; as each alone by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from embedding_cases import ARRAYS, GOOD, TEXTS, by_hand, text_by_hand

from navit_clip import NaViTCLIP
from navit_clip.errors import UserError


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.usefixtures("small_streams")
def test_texts_are_embedded_as_each_alone_and_in_their_order(model, normalize):
    expected = torch.stack([text_by_hand(model, text) for text in TEXTS])
    if normalize:
        expected = F.normalize(expected, dim=-1)
    actual = model.encode_text(iter(TEXTS), normalize=normalize)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text", ["\0", "\x1b[2J", " ", "\u202e", "🐈" * 999, "\ufffe", "▁", "</s>", "a" * 99_999]
)
def test_any_string_has_a_vector(model, text):
    assert model.encode_text([text]).isfinite().all()


def test_half_a_character_is_named(model):
    with pytest.raises(ValueError, match=r"texts\[1\]: half a character"):
        model.encode_text(["a", "b\ud83d"])


@pytest.mark.parametrize("bad", [3, None, b"bytes", ["nested"]])
def test_what_is_no_text_is_named_by_its_index(model, bad):
    with pytest.raises(ValueError, match=r"texts\[1\]: .* is no string"):
        model.encode_text(["a", bad])


def test_one_text_is_no_list_of_texts(model):
    with pytest.raises(ValueError, match="texts must be a list of strings, got one str"):
        model.encode_text("a photo")


def test_similarity_is_the_cosine_of_every_pair(model):
    actual = model.similarity(ARRAYS[:5], TEXTS)
    for i, pixels in enumerate(ARRAYS[:5]):
        for j, text in enumerate(TEXTS):
            expected = F.cosine_similarity(by_hand(model, pixels), text_by_hand(model, text), dim=0)
            assert actual[i, j].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("templates", [None, ["{}"], ["a {}", "the {}, a {}", "{} alone"]])
@pytest.mark.usefixtures("small_streams")
def test_classification_is_a_softmax_over_mean_prompts(model, templates):
    labels = ["red square", "dot", "blue", "stripes"]
    actual = model.classify(ARRAYS[:3], labels, templates)
    for i, pixels in enumerate(ARRAYS[:3]):
        image = F.normalize(by_hand(model, pixels), dim=0).double().numpy()
        logits = []
        for label in labels:
            prompts = [t.replace("{}", label) for t in templates or ["a photo of a {}."]]
            mean = sum(F.normalize(text_by_hand(model, p), dim=0).double().numpy() for p in prompts)
            logits.append(model.log_scale.exp().item() * image @ mean / np.linalg.norm(mean))
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(actual[i], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "labels is empty"),
        ((["a"], []), "templates is empty"),
        ((["a"], ["{}", "a photo"]), r"templates\[1\] has no {} for the label: 'a photo'"),
        ((["a", 2],), r"labels\[1\]: int is no string"),
        (("dog",), "labels must be a list"),
        ((["a"], "a {}"), "templates must be a list"),
    ],
)
def test_labels_and_templates_that_make_no_sense(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.classify([GOOD], *arguments)


def test_a_model_that_was_built_says_what_it_lacks(model):
    bare = NaViTCLIP(model.config)
    with pytest.raises(UserError, match=r"no preprocess .*: give max_tokens"):
        bare.encode_image([GOOD])
    assert bare.encode_image([GOOD], max_tokens=4).shape == (1, 8)
    with pytest.raises(UserError, match="no tokenizer: load it with"):
        bare.encode_text(["a"])


def test_a_linear_probe_can_be_trained_on_the_vectors(model):
    vectors = model.encode_image(ARRAYS[:4])
    assert not vectors.requires_grad
    probe = torch.nn.Linear(8, 2)
    F.cross_entropy(probe(vectors), torch.tensor([0, 1, 0, 1])).backward()
    assert probe.weight.grad is not None


def test_a_model_in_half_precision_gives_float32(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    vectors = half.encode_image(ARRAYS)
    assert vectors.dtype == torch.float32
    assert F.cosine_similarity(vectors, model.encode_image(ARRAYS)).min() > 0.999
    assert half.classify(ARRAYS[:2], ["a", "b"]).dtype == torch.float32


def test_the_package_names_its_model():
    import navit_clip

    assert navit_clip.NaViTCLIP is NaViTCLIP
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = navit_clip.nothing
