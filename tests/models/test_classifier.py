"""The classifier: a head that begins at zero over a tower that sees each image alone."""

import math

import pytest
import torch
from packed_examples import random_image, randomise

from navit_clip.data.builders.labelled import LabelledInputs
from navit_clip.models.classifier import Classifier, ClassifierConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.images import pack_images
from navit_clip.packed.ragged import Ragged

TOWER = ImageTowerConfig(2, EncoderConfig(width=16, depth=1, heads=2))


def inputs_of(images):
    nothing = Ragged(torch.zeros(0), torch.zeros(0, dtype=torch.int64), (0,) * len(images))
    return LabelledInputs(pack_images(images), nothing)


@pytest.mark.parametrize(("given", "bias"), [(None, -math.log(1000)), (-10.0, -10.0)])
def test_the_head_begins_at_zero_with_a_constant_bias(given, bias):
    model = Classifier(ClassifierConfig(TOWER, init_bias=given), 1000)
    logits = model(inputs_of([random_image(0, (2, 3)), random_image(1, (1, 1))])).logits_EL
    torch.testing.assert_close(logits, torch.full((2, 1000), bias))


@pytest.mark.parametrize("hidden", [0, 12])
def test_each_image_has_the_logits_that_it_has_alone(hidden):
    model = Classifier(ClassifierConfig(TOWER, hidden=hidden), 7)
    randomise(model, 0)
    images = [random_image(i, grid) for i, grid in enumerate([(2, 3), (1, 1), (4, 2), (3, 3)])]
    together = model(inputs_of(images)).logits_EL
    alone = torch.cat([model(inputs_of([image])).logits_EL for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_hidden_layer_stands_between_tower_and_head():
    model = Classifier(ClassifierConfig(TOWER, hidden=12), 7)
    randomise(model, 0)
    inputs = inputs_of([random_image(0, (2, 3)), random_image(1, (1, 1))])
    state = model.state_dict()
    x = torch.tanh(model.image(inputs.images) @ state["hidden.weight"].T + state["hidden.bias"])
    expected = x @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model(inputs).logits_EL, expected)
    torch.testing.assert_close(model.probabilities(model.image(inputs.images)), expected.softmax(1))


def test_probabilities_by_output():
    features = torch.randn(4, 16)
    for output, sums in (("softmax", True), ("sigmoid", False)):
        model = Classifier(ClassifierConfig(TOWER, output=output), 3)
        randomise(model, 0)
        found = model.probabilities(features)
        assert torch.allclose(found.sum(1), torch.ones(4)) == sums
        assert ((found > 0) & (found < 1)).all()
