"""Distillation losses against open_clip's over one full matrix: value, gradients, ranks, memory."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from contrastive_reference import random_features
from distributed import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss_memory import Memory
from torch import Tensor

from navit_clip.losses import _gather
from navit_clip.losses.distillation import embedding_distillation_loss, logit_distillation_loss

SCALES = (12.0, 30.0)  # of the model and of the teacher
NAMES = ("loss", "image", "text", "scale")


def examples(n: int, seed: int, widths: tuple[int, int] = (6, 5)) -> tuple[Tensor, ...]:
    """Images and texts of the model, then of the teacher."""
    mine, theirs = (random_features(n, width, seed + i) for i, width in enumerate(widths))
    return (*mine, *theirs)


def reference(features: tuple[Tensor, ...], scales: tuple[float, float]) -> list[Tensor]:
    from open_clip.loss import DistillClipLoss  # seconds, which ranks need not wait for

    image, text, *teacher = (part.double() for part in features)
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    leaves.append(torch.tensor(scales[0], dtype=torch.float64, requires_grad=True))
    _, loss = DistillClipLoss()(*leaves, *teacher, scales[1])
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def chunked(
    features: tuple[Tensor, ...], scales: tuple[float, float], **options: Any
) -> list[Tensor]:
    """The library's, its gradients those of three times the loss, divided again."""
    image, text, *teacher = features
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    leaves.append(torch.tensor(scales[0], dtype=torch.float64, requires_grad=True))
    teacher_scale = torch.tensor(scales[1], dtype=torch.float64)
    loss = logit_distillation_loss(*leaves, *teacher, teacher_scale, **options)
    (3 * loss).backward()
    return [loss.detach(), *(leaf.grad / 3 for leaf in leaves)]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        limit = tolerance * max(1e-3, e.abs().max().item() if e.numel() else 0)
        torch.testing.assert_close(a.double(), e, rtol=0, atol=limit, msg=name)


@settings(max_examples=40)
@given(
    n=st.integers(1, 9),
    chunk_size=st.integers(1, 10),
    scales=st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)),
    widths=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 1000),
)
def test_tiles_of_any_size_give_the_loss_of_open_clip(n, chunk_size, scales, widths, seed):
    features = examples(n, seed, widths)
    actual = chunked(features, scales, chunk_size=chunk_size)
    assert_same(actual, reference(features, scales))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 1e-2)]
)
def test_other_precisions_stay_close(dtype, tolerance):
    features = tuple(part.to(dtype) for part in examples(40, seed=1))
    actual = chunked(features, SCALES, chunk_size=16)
    assert [part.dtype for part in actual[1:3]] == [dtype] * 2
    assert_same(actual, reference(features, SCALES), tolerance)


def test_a_model_that_agrees_with_its_teacher_has_no_gradient():
    features = examples(7, seed=2)[:2] * 2
    loss, *gradients = chunked(features, (20.0, 20.0), chunk_size=3)
    assert loss > 0  # the entropy of the teacher
    assert all(part.abs().max() < 1e-12 for part in gradients)


@pytest.mark.parametrize("n", [1, 5])
def test_embeddings_are_compared_by_their_cosine(n):
    features = examples(n, seed=3, widths=(6, 6))
    leaves = [part.clone().requires_grad_() for part in features[:2]]
    loss = embedding_distillation_loss(*leaves, *features[2:], counts=[n])
    copies = [part.clone().requires_grad_() for part in features[:2]]
    cosines = [F.cosine_similarity(a, b) for a, b in zip(copies, features[2:], strict=True)]
    expected = (1 - torch.stack(cosines)).mean()
    torch.testing.assert_close(loss, expected)
    # Of unit vectors: what changes their length is no matter of the loss.
    for leaf, vector, target in zip(leaves, features[:2], features[2:], strict=True):
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        torch.testing.assert_close(gradient, -target / (2 * n))
        assert vector.shape == gradient.shape


COUNTS = [(4, 4), (7, 2), (0, 5), (1, 0)]
WAYS = [
    {"exchange": exchange, "round_rows": rows, "known": known}
    for exchange, rows, known in (("ring", 64, True), ("gather", 2, False), ("gather", 64, True))
]


def on_ranks() -> list[Any]:
    """Every case on this rank: loss, its gradients, and those of the embeddings' loss."""
    results = []
    for counts in COUNTS:
        features = examples(sum(counts), seed=sum(counts), widths=(6, 6))
        own = tuple(part.split(counts)[dist.get_rank()] for part in features)
        for way in WAYS:
            options = {"counts": counts if way["known"] else None, "exchange": way["exchange"]}
            with mock.patch.object(_gather, "ROUND_ROWS", way["round_rows"]):
                results.append(chunked(own, SCALES, chunk_size=3, **options))
        leaf = own[0].clone().requires_grad_()
        loss = embedding_distillation_loss(leaf, *own[1:], counts=counts)
        loss.backward()
        results.append([loss.detach(), leaf.grad])
    return results


def test_two_ranks_share_one_loss():
    first, second = (iter(results) for results in run_ranks(on_ranks, 2))
    for counts in COUNTS:
        features = examples(sum(counts), seed=sum(counts), widths=(6, 6))
        expected = reference(features, SCALES)
        for _ in WAYS:
            a, b = next(first), next(second)
            assert torch.equal(a[0], b[0])
            image, text = torch.cat([a[1], b[1]]), torch.cat([a[2], b[2]])
            assert_same([a[0], image, text, a[3] + b[3]], expected)
        (loss, gradient), (other, rest) = next(first), next(second)
        assert torch.equal(loss, other)
        alone = embedding_distillation_loss(*features, counts=[sum(counts)])
        torch.testing.assert_close(loss, alone)
        torch.testing.assert_close(
            torch.cat([gradient, rest]), -features[2] / (2 * sum(counts)), rtol=1e-9, atol=0
        )


def test_no_more_than_a_few_tiles_exist_at_a_time():
    n, side = 1024, 128
    features = tuple(part.float() for part in examples(n, seed=4, widths=(8, 8)))
    scale = torch.tensor(10.0, requires_grad=True)
    image, text = (part.requires_grad_() for part in features[:2])
    with Memory(*features, scale) as memory:
        loss = logit_distillation_loss(image, text, scale, *features[2:], scale, chunk_size=side)
        torch.autograd.grad(loss, (image, text, scale))
    vectors = 4 * n * 4 * (8 + 1)
    assert memory.peak < 7 * side**2 * 4 + 4 * vectors < n**2 * 4
