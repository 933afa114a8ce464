"""The pixel loss of masked image pretraining, over the hidden patches of packed images."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-6  # added to the variance, as MAE and SimMIM's successors have it


def normalise_patches(patches_TK: Tensor) -> Tensor:
    """uint8 [T, P·P·3] to float32: every patch with mean 0 and variance 1 (MAE, section 3)."""
    mean_T1, std_T1 = _moments(patches_TK)
    return (patches_TK / 255 - mean_T1) / std_T1


def restore_patches(pixels_TK: Tensor, patches_TK: Tensor) -> Tensor:
    """The inverse, uint8: predicted pixels with the mean and deviation of the true ones."""
    mean_T1, std_T1 = _moments(patches_TK)
    restored_TK = 255 * (pixels_TK * std_T1 + mean_T1)
    return restored_TK.round().clamp(0, 255).to(torch.uint8)


def _moments(patches_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch's pixels on [0, 1], float32 [T, 1]."""
    variance_T1, mean_T1 = torch.var_mean(patches_TK / 255, 1, keepdim=True)
    return mean_T1, (variance_T1 + _EPS).sqrt()


def masked_pixel_loss(pixels_TK: Tensor, patches_TK: Tensor, weights_T: Tensor) -> Tensor:
    """Squared error of normalised pixels, its mean over a patch summed with the patches' weights.

    Args:
        pixels_TK: [T, P·P·3] as predicted, in any precision; computed in float32 at least.
        patches_TK: uint8 [T, P·P·3].
        weights_T: float32 [T], 0 where a patch does not count; see `MaskedInputs.weights`.

    Returns:
        A scalar: the sum over images of the mean over their hidden patches.
    """
    error_T = patch_errors(pixels_TK, patches_TK)
    return error_T @ weights_T.to(error_T.dtype)


def patch_errors(pixels_TK: Tensor, patches_TK: Tensor) -> Tensor:
    """Mean squared error of the normalised pixels of each patch, [T] in float32 at least."""
    pixels_TK = pixels_TK.to(torch.promote_types(pixels_TK.dtype, torch.float32))
    return (pixels_TK - normalise_patches(patches_TK)).square().mean(1)
