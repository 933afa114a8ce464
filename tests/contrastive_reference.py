"""The contrastive losses as one full matrix in float64 under autograd: slow and obvious."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from navit_clip.losses.contrastive import sigmoid_contrastive_loss, softmax_contrastive_loss

KINDS = ("softmax", "sigmoid")


class Result(NamedTuple):
    loss: Tensor
    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor  # zero for the softmax loss


def random_features(
    n: int, width: int, seed: int, *, dtype: torch.dtype = torch.float64, normalise: bool = True
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    if normalise:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    return image.to(dtype), text.to(dtype)


def reference(kind: str, image: Tensor, text: Tensor, scale: float, bias: float) -> Result:
    leaves = [x.detach().double().requires_grad_() for x in (image, text)]
    leaves += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (scale, bias)]
    logits = leaves[2] * leaves[0] @ leaves[1].T
    n = len(image)
    if kind == "softmax":
        target = torch.arange(n)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss = loss + 0 * leaves[3]
    else:
        sign = 2 * torch.eye(n, dtype=torch.float64) - 1
        loss = -F.logsigmoid(sign * (logits + leaves[3])).sum() / n
    loss.backward()
    return Result(loss.detach(), *(x.grad for x in leaves))


def chunked(
    kind: str,
    image: Tensor,
    text: Tensor,
    scale: float,
    bias: float,
    *,
    factor: float = 1.0,
    **options,
) -> Result:
    """The library's loss; the gradients are those of `factor` times the loss."""
    leaves = [x.detach().clone().requires_grad_() for x in (image, text)]
    dtype = torch.promote_types(image.dtype, torch.float32)
    leaves += [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (scale, bias)]
    if kind == "softmax":
        loss = softmax_contrastive_loss(*leaves[:3], **options)
        leaves[3].grad = torch.zeros_like(leaves[3])
    else:
        loss = sigmoid_contrastive_loss(*leaves, **options)
    (factor * loss).backward()
    return Result(loss.detach(), *(x.grad for x in leaves))


def assert_agree(actual: Result, expected: Result, tolerance: float) -> None:
    """Relative to the largest entry of each tensor: small entries are sums that cancel."""
    for name, a, e in zip(Result._fields, actual, expected, strict=True):
        assert a.shape == e.shape, name
        assert torch.isfinite(a).all(), name
        if a.numel():
            error = (a.double() - e).abs().max().item()
            limit = tolerance * max(e.abs().max().item(), 1e-3)
            assert error <= limit, f"{name}: error {error:.3g} exceeds {limit:.3g}"
