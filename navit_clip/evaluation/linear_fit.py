"""Linear classifiers fitted to features: ridge regression in closed form, and logistic regression.

In float64 throughout, on the device of the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from navit_clip.evaluation.models import Around

_EPS = 1e-5  # added to standard deviations
_BIAS = 100.0  # a constant feature as large as this is hardly regularised
_ITERATIONS = 1000
# Computed at a time, 128 MiB of them: all of ImageNet's take 10 GB, several times.
_LOGITS = 1 << 24


def whiten(train_ND: Tensor, *others: Tensor) -> list[Tensor]:
    """Features with the mean of `train_ND` subtracted, divided by its standard deviation + 1e-5.

    Returns:
        Those of `train_ND` and of all others, float64.
    """
    train_ND = train_ND.double()
    std_D, mean_D = torch.std_mean(train_ND, 0, correction=0)
    return [(features - mean_D) / (std_D + _EPS) for features in (train_ND, *others)]


def fit_ridge(x_ND: Tensor, label_N: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Least squares with targets of ±1 and a penalty of l2·‖W‖², solved exactly.

    As big_vision's ``fewshot_lsr`` has it, where features are whitened and get a constant one of
    100 for the bias, which the penalty includes.

    Args:
        x_ND: Whitened features.
        label_N: Class of each, int64.
        classes: L.
        l2: λ of (XᵀX + λI) W = XᵀY.

    Returns:
        Weights [L, D] and biases [L].
    """
    x_ND = F.pad(x_ND.double(), (0, 1), value=_BIAS)
    count, width = x_ND.shape
    y_NL = 2 * F.one_hot(label_N, classes).double() - 1
    if count >= width:
        gram = x_ND.T @ x_ND
        right = x_ND.T @ y_NL
    else:  # the dual: as many unknowns as there are images
        gram, right = x_ND @ x_ND.T, y_NL
    gram.diagonal().add_(l2)
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    weight_LD = (solved if count >= width else x_ND.T @ solved).T
    return weight_LD[:, :-1], weight_LD[:, -1] * _BIAS


def fit_logistic(
    x_ND: Tensor,
    label_N: Tensor,
    classes: int,
    l2: float,
    start: tuple[Tensor, Tensor] | None = None,
    around: Around = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: mean cross-entropy + l2/2·‖W‖², biases free; by L-BFGS.

    scikit-learn's ``LogisticRegression(C=1 / (l2 * N))`` has the same minimum.

    Args:
        x_ND: Features.
        label_N: Class of each, int64.
        classes: L.
        l2: Above 0, else classes that are apart have no finite minimum.
        start: Weights and biases to begin with; zeros if None.
        around: A context for each step; all of them may take an hour.

    Returns:
        Weights [L, D] and biases [L].
    """
    x_ND = x_ND.double()
    width = x_ND.shape[1]
    theta_LD = x_ND.new_zeros(classes, width + 1)
    if start is not None:
        theta_LD.copy_(torch.cat([start[0], start[1][:, None]], 1))
    theta_LD.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta_LD],
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        with around():
            optimizer.zero_grad()
            loss = theta_LD.new_zeros(())
            for part in logistic_losses(theta_LD[:, :-1], theta_LD[:, -1], x_ND, label_N, l2):
                part.backward()
                loss += part.detach()
            return loss

    with torch.enable_grad():
        optimizer.step(closure)
    found = theta_LD.detach()
    return found[:, :-1], found[:, -1]


def logistic_losses(
    weight_LD: Tensor, bias_L: Tensor, x_ND: Tensor, label_N: Tensor, l2: float
) -> Iterator[Tensor]:
    """What `fit_logistic` makes the sum of small: the penalty, and parts of the features."""
    yield 0.5 * l2 * weight_LD.square().sum()
    for x, labels in in_parts(len(bias_L), x_ND, label_N):
        logits = torch.addmm(bias_L, x, weight_LD.T)
        yield F.cross_entropy(logits, labels, reduction="sum") / len(label_N)


def in_parts(classes: int, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Consecutive rows of all tensors, as many as have few enough logits."""
    size = max(1, _LOGITS // classes)
    return zip(*(tensor.split(size) for tensor in rows), strict=True)
