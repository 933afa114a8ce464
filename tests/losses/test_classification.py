"""The classification losses against loops over images and classes in float64."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from navit_clip.losses.classification import count_hits, sigmoid_loss, softmax_loss
from navit_clip.packed.ragged import Ragged


def ragged(rows):
    return Ragged.from_arrays([np.array(row, dtype=np.int64) for row in rows])


def sigmoid_slowly(logits, rows):
    """Every class of every image by itself: value and gradient."""
    total, gradient = 0.0, np.zeros_like(logits)
    for image, row in enumerate(rows):
        for index, x in enumerate(logits[image].tolist()):
            p, rest = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))
            total -= math.log(p if index in row else rest)
            gradient[image, index] = p - (index in row)
    return total, gradient


def softmax_slowly(logits, rows):
    total, gradient = 0.0, np.zeros_like(logits)
    for image, (right,) in enumerate(rows):
        powers = [math.exp(x) for x in logits[image].tolist()]
        total -= math.log(powers[right] / sum(powers))
        gradient[image] = [p / sum(powers) for p in powers]
        gradient[image, right] -= 1
    return total, gradient


def draw(seed, *, single):
    rng = np.random.default_rng(seed)
    images, classes = int(rng.integers(1, 9)), int(rng.integers(2, 12))
    counts = [1 if single else int(rng.integers(0, classes + 1)) for _ in range(images)]
    rows = [sorted(rng.permutation(classes)[:count].tolist()) for count in counts]
    return 4 * rng.standard_normal((images, classes)), rows


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("loss", "slowly"), [(sigmoid_loss, sigmoid_slowly), (softmax_loss, softmax_slowly)]
)
def test_value_and_gradient_are_those_of_a_loop(loss, slowly, seed):
    values, rows = draw(seed, single=loss is softmax_loss)
    logits = torch.tensor(values, requires_grad=True)
    found = loss(logits, ragged(rows))
    found.backward()
    total, gradient = slowly(values, rows)
    assert found.item() == pytest.approx(total, rel=1e-12)
    np.testing.assert_allclose(logits.grad.numpy(), gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
def test_weights_of_labels_are_targets_of_their_classes(loss, seed):
    rng = np.random.default_rng(seed)
    values, own = draw(seed, single=loss is softmax_loss)
    other = own[1:] + own[:1]
    targets, weights, hits = torch.zeros(values.shape, dtype=torch.float64), [], 0.0
    for image, (mine, theirs) in enumerate(zip(own, other, strict=True)):
        share = float(np.float32(rng.random()))
        for row, weight in ((mine, share), (theirs, 1 - share)):
            for index in row:
                targets[image, index] += weight
                weights.append(weight)
        hits += targets[image, values[image].argmax()].item()
    rows = [mine + theirs for mine, theirs in zip(own, other, strict=True)]
    labels, weights_N = ragged(rows), torch.tensor(weights, dtype=torch.float64)
    logits, dense = (torch.tensor(values, requires_grad=True) for _ in range(2))
    found = loss(logits, labels, weights_N)
    found.backward()
    whole = F.binary_cross_entropy_with_logits if loss is sigmoid_loss else F.cross_entropy
    expected = whole(dense, targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad, dense.grad, rtol=1e-11, atol=1e-13)
    assert count_hits(logits, labels, weights_N).item() == pytest.approx(hits, rel=1e-6)


def test_images_without_any_label_are_all_negative():
    logits = torch.randn(3, 5, dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="sum")
    assert sigmoid_loss(logits, ragged([[], [], []])).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(loss, dtype):
    logits = torch.tensor([[-3e4, 3e4, 60.0], [3e4, -3e4, -60.0]], dtype=dtype, requires_grad=True)
    total = loss(logits, ragged([[0], [0]]))
    total.backward()
    assert total.dtype == torch.float32
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


def test_tens_of_thousands_of_classes_need_no_targets_of_their_size():
    """What is kept for the backward pass is the logits, and nothing else as large."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(29_000)[:count].tolist() for count in (0, 1, 7, 300)]
    logits = torch.randn(4, 29_000, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        total = sigmoid_loss(logits, ragged(rows))
    assert {t.data_ptr() for t in saved if t.numel() >= logits.numel()} == {logits.data_ptr()}
    total.backward()
    one_hot = torch.zeros_like(logits)
    for image, row in enumerate(rows):
        one_hot[image, row] = 1
    torch.testing.assert_close(logits.grad, logits.detach().sigmoid() - one_hot, atol=1e-6, rtol=0)


def test_a_hit_is_an_image_whose_best_class_is_one_of_its_labels():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 1.0], [0.0, 5.0, 1.0]])
    assert count_hits(logits, ragged([[1, 2], [1, 2], [], [1]])).item() == 2
