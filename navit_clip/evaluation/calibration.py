"""Calibration: whether a model is right as often as it is sure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Bin:
    """Images whose best class has about the same probability.

    Attributes:
        images: How many.
        confidence: Mean probability of the best class.
        accuracy: Fraction of them whose best class is right.
    """

    images: int
    confidence: float
    accuracy: float


def expected_calibration_error(confidence_E: Tensor, correct_E: Tensor) -> float:
    """Mean gap between confidence and accuracy, over bins of equal width.

    As defined in "On Calibration of Modern Neural Networks" (ICML 2017), equation 3: bin m holds
    the images whose confidence lies in ((m − 1)/M, m/M]; the gaps |accuracy − confidence| of the
    bins are averaged, weighted by their images. 0 is perfect.

    Args:
        confidence_E: Probability of the class chosen, 0 to 1. NaN counts as 1.
        correct_E: Whether that class is right, bool.
    """
    confidence_E = confidence_E.double().nan_to_num(nan=1.0)
    gap_M = torch.zeros(BINS, dtype=torch.float64, device=confidence_E.device)
    gap_M.index_add_(0, _bin_of(confidence_E), correct_E.double() - confidence_E)
    return (gap_M.abs().sum() / len(confidence_E)).item()


def calibration_bins(confidence_E: Tensor, correct_E: Tensor) -> tuple[Bin, ...]:
    """The non-empty bins of `expected_calibration_error`, of the same arguments."""
    confidence_E = confidence_E.double().nan_to_num(nan=1.0)
    bin_E = _bin_of(confidence_E)
    bins = []
    for number in bin_E.unique().tolist():
        inside = bin_E == number
        confidence, accuracy = confidence_E[inside].mean(), correct_E[inside].double().mean()
        bins.append(Bin(int(inside.sum()), float(confidence), float(accuracy)))
    return tuple(bins)


def _bin_of(confidence_E: Tensor) -> Tensor:
    edges = torch.arange(1, BINS, dtype=torch.float64, device=confidence_E.device) / BINS
    return torch.bucketize(confidence_E, edges)
