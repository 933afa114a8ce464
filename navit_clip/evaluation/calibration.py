"""Calibration: whether a model is right as often as it is sure."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def expected_calibration_error(confidence_E: Tensor, correct_E: Tensor, bins: int = BINS) -> float:
    """Mean gap between confidence and accuracy, over bins of equal width.

    As defined in "On Calibration of Modern Neural Networks" (ICML 2017), equation 3: bin m holds
    the images whose confidence lies in ((m − 1)/M, m/M]; the gaps |accuracy − confidence| of the
    bins are averaged, weighted by their images. 0 is perfect.

    Args:
        confidence_E: Probability of the class chosen, 0 to 1. One that is no number counts as 1.
        correct_E: Whether that class is right, bool.
        bins: M.
    """
    confidence_E = confidence_E.double().nan_to_num(nan=1.0)
    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence_E.device) / bins
    place_E = torch.bucketize(confidence_E, edges)
    gap_M = torch.zeros(bins, dtype=torch.float64, device=confidence_E.device)
    gap_M.index_add_(0, place_E, correct_E.double() - confidence_E)
    return (gap_M.abs().sum() / len(confidence_E)).item()
