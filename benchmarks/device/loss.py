"""The contrastive loss on one GPU: errors against float64, time and memory, and open_clip's.

What decides in which precision features are multiplied, the side of tiles, and the blocks of the
kernels.
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
# Other blocks for the kernels of the forward and of the backward pass than those they have.
_BLOCKS = {
    "backward_two_per_processor": kernels.Block(128, 128, 64, 8, 3, registers=128),
    "backward_four_stages": kernels.Block(128, 128, 64, 8, 4),
    "forward_wide": kernels.Block(128, 256, 64, 8, 3),
    "forward_short_steps": kernels.Block(128, 128, 32, 8, 4),
}


def check_loss(setting: Setting) -> Iterator[dict[str, Any]]:
    """Errors, then milliseconds and extra MB of a forward and backward pass over 32k and 256k."""
    small, large, largest = (64, 128, 192) if setting.tiny else (4096, 32768, 262144)
    setting.warm_up()
    for scale in (_FIRST_SCALE, _TRAINED_SCALE):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"error_{scale:g}_{_name(dtype)}"
            yield {name: _errors(setting, small, scale, dtype)}
    fp32, bf16 = torch.float32, torch.bfloat16
    ours, amp = softmax_contrastive_loss, partial(_under_autocast, setting)
    measured = _measure(setting, ours, large, bf16)
    yield {"32k_bf16": measured}
    for name, peer, dtype in (("amp", amp, fp32), ("bf16", ClipLoss(), bf16)):
        theirs = _measure(setting, peer, large, dtype)
        yield {f"32k_open_clip_{name}": theirs}
        if measured and theirs:
            yield {f"of_open_clip_{name}": measured["ms"] / theirs["ms"]}
    yield {"256k_bf16": _measure(setting, ours, largest, bf16)}
    yield {"32k_fp32": _measure(setting, ours, large, fp32)}
    torch.backends.cuda.matmul.allow_tf32 = True
    yield {"32k_tf32": _measure(setting, ours, large, fp32)}
    torch.backends.cuda.matmul.allow_tf32 = False
    yield {"32k_bf16_side8192": _measure(setting, partial(ours, chunk_size=8192), large, bf16)}
    with mock.patch.object(tiles, "has_kernels", return_value=False):
        yield {"32k_bf16_tiles": _measure(setting, ours, large, bf16)}
    for name, block in _BLOCKS.items():
        with mock.patch.object(kernels, name.partition("_")[0].upper(), block):
            yield {f"32k_bf16_{name}": _measure(setting, ours, large, bf16)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _under_autocast(setting: Setting, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """open_clip's loss as its trainer runs it with ``--precision amp_bf16``."""
    with torch.autocast(setting.device.type, torch.bfloat16):
        loss: Tensor = ClipLoss()(image, text, scale)
    return loss


def _features(setting: Setting, pairs: int, dtype: torch.dtype) -> Tensor:
    """Unit vectors [pairs, D]."""
    return F.normalize(setting.random(pairs, _WIDTH), dim=1).to(dtype).requires_grad_()


def _errors(setting: Setting, pairs: int, scale: float, dtype: torch.dtype) -> list[float]:
    """Of the value, absolute; of the gradients of image, text and scale, relative norms.

    Both precisions get features that bfloat16 holds exactly, so that arithmetic alone differs.
    """
    torch.manual_seed(0)
    image = _features(setting, pairs, torch.bfloat16)
    # Half alike, as those of a model in training.
    text = F.normalize(image.detach().float() + _features(setting, pairs, torch.float32), dim=1)
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
