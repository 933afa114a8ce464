"""The contrastive loss on one GPU: errors against float64, time and memory, and open_clip's.

What decides in which precision features are multiplied, and the side of tiles.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from benchmarks.device.setting import Setting, extra_memory
from navit_clip.kernels import contrastive as kernels
from navit_clip.losses import _tiles as tiles
from navit_clip.losses.contrastive import softmax_contrastive_loss

_WIDTH = 512
_WARM_UPS, _PASSES = 3, 3
_TRAINED_SCALE, _FIRST_SCALE = 100.0, 14.3


def check_loss(setting: Setting) -> Iterator[dict[str, Any]]:
    """Errors, then milliseconds and extra MB of a forward and backward pass over 32k and 256k."""
    small, large, largest = (64, 128, 192) if setting.tiny else (4096, 32768, 262144)
    setting.warm_up()
    for scale in (_FIRST_SCALE, _TRAINED_SCALE):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"error_{scale:g}_{_name(dtype)}"
            yield {name: _errors(setting, small, scale, dtype)}
    fp32, bf16 = torch.float32, torch.bfloat16
    ours, amp = softmax_contrastive_loss, partial(_under_autocast, setting, ClipLoss())
    measured = _measure(setting, ours, large, bf16)
    yield {"32k_bf16": measured}
    for name, peer, dtype in (("amp", amp, fp32), ("bf16", ClipLoss(), bf16)):
        theirs = _measure(setting, peer, large, dtype)
        yield {f"32k_open_clip_{name}": theirs}
        if measured and theirs:
            yield {f"of_open_clip_{name}": measured["ms"] / theirs["ms"]}
    yield {"256k_bf16": _measure(setting, ours, largest, bf16)}
    yield {"32k_autocast": _measure(setting, partial(_under_autocast, setting, ours), large, fp32)}
    for side in (4096, 16384):
        yield {
            f"32k_bf16_side{side}": _measure(setting, partial(ours, chunk_size=side), large, bf16)
        }
    yield _parts(setting, 64 if setting.tiny else 8192)
    yield {"32k_fp32": _measure(setting, ours, large, fp32)}
    with mock.patch.object(tiles, "has_kernels", return_value=False):
        yield {"32k_bf16_tiles": _measure(setting, ours, large, bf16)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _under_autocast(
    setting: Setting, loss: Callable[..., Tensor], image: Tensor, text: Tensor, scale: Tensor
) -> Tensor:
    """A loss of float32 features as a trainer in bfloat16 runs it."""
    with torch.autocast(setting.device.type, torch.bfloat16):
        return loss(image, text, scale)


def _parts(setting: Setting, side: int) -> dict[str, float]:
    """Microseconds of the kernels and of the products over side² logits; nothing on a CPU."""
    if not setting.cuda:
        return {}
    image, text = (_features(setting, side, torch.bfloat16).detach() for _ in range(2))
    scale = torch.tensor(_TRAINED_SCALE, device=setting.device)
    row_lse, column_lse, matching = torch.zeros(3, side, device=setting.device)
    weights = torch.empty(side, side, device=setting.device, dtype=torch.bfloat16)
    total = torch.zeros(side, _WIDTH, device=setting.device)
    calls: dict[str, Callable[[], None]] = {
        "statistics": partial(
            kernels.softmax_statistics, image, text, scale, row_lse, column_lse, matching
        ),
        "weights": partial(
            kernels.softmax_weights, image, text, scale, row_lse, column_lse, True, weights
        ),
        "product": partial(tiles.accumulate, total, weights, text),
        "product_of_transposed": partial(tiles.accumulate, total, weights.T, image),
    }
    return {f"{name}_us": 1e3 * setting.milliseconds(call) for name, call in calls.items()}


def _features(setting: Setting, pairs: int, dtype: torch.dtype) -> Tensor:
    """Unit vectors [pairs, D]."""
    return F.normalize(setting.random(pairs, _WIDTH), dim=1).to(dtype).requires_grad_()


def _errors(setting: Setting, pairs: int, scale: float, dtype: torch.dtype) -> list[float]:
    """Of the value, absolute; of the gradients of image, text and scale, relative norms.

    Both precisions get features that bfloat16 holds exactly, so that arithmetic alone differs.
    """
    torch.manual_seed(0)
    image = _features(setting, pairs, torch.bfloat16)
    # As alike as those of a model in training: closer, and every gradient is next to nothing.
    text = F.normalize(image.detach().float() + 4 * _features(setting, pairs, torch.float32), dim=1)
    inputs = [image.detach(), text.detach().to(torch.bfloat16), torch.tensor(scale)]
    ours, exact = (
        [x.to(setting.device, kind).requires_grad_() for x, kind in zip(inputs, kinds, strict=True)]
        for kinds in ((dtype, dtype, torch.float32), (torch.float64,) * 3)
    )
    logits = exact[2] * exact[0] @ exact[1].T
    labels = torch.arange(pairs, device=setting.device)
    wanted = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    got = softmax_contrastive_loss(ours[0], ours[1], ours[2])
    gradients = zip(torch.autograd.grad(got, ours), torch.autograd.grad(wanted, exact), strict=True)
    relative = [((a.double() - b).norm() / b.norm()).item() for a, b in gradients]
    return [abs(got.item() - wanted.item()), *relative]


def _measure(
    setting: Setting, loss: Callable[..., Tensor], pairs: int, dtype: torch.dtype
) -> dict[str, float]:
    """Median milliseconds and MB of later passes; nothing if memory did not suffice."""
    try:
        image, text = (_features(setting, pairs, dtype) for _ in range(2))
        scale = torch.tensor(_TRAINED_SCALE, device=setting.device, requires_grad=True)

        def both_passes() -> None:
            torch.autograd.grad(loss(image, text, scale), (image, text, scale))

        # The first compiles; after it the card's clocks have to rise again.
        for _ in range(1 + _WARM_UPS):
            both_passes()
        passes = [extra_memory(setting, both_passes) for _ in range(_PASSES)]
        milliseconds, extra_mb = map(statistics.median, zip(*passes, strict=True))
    except torch.OutOfMemoryError:
        return {}
    finally:
        if setting.cuda:
            torch.cuda.empty_cache()
    return {"ms": milliseconds, "extra_mb": extra_mb}
