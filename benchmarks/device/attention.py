"""Attention within segments on one GPU: each kernel there is, on the lengths of NaViT's recipe.

What decides which of them the encoder takes, and what padding at the end of a stream costs. This
project's kernel for short segments is compared with a reference in float32, class by class, before
it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.device.batches import draw_lengths
from benchmarks.device.setting import Setting
from navit_clip.models.attention import segment_attention
from navit_clip.packed.segments import Segments

_HEADS, _WIDTH = 12, 64
_STREAMS = {"image": 16384, "text": 4288}
_EPS = 1e-6
_TOLERANCE = 2e-2  # of the norm, in bfloat16


def check_attention(setting: Setting) -> Iterator[dict[str, Any]]:
    """Microseconds of one layer's attention, forward and backward."""
    setting.warm_up()
    scale = 32 if setting.tiny else 1
    streams = {name: tokens // scale for name, tokens in _STREAMS.items()}
    images, captions = draw_lengths(*streams.values())
    for name, lengths in (("image", [kept for kept, _ in images]), ("text", captions)):
        lengths = sorted(lengths)
        rest = streams[name] - sum(lengths)
        for tail in (0, rest, 4096 // scale):
            segments, qkv, gradient = _stream(setting, lengths, tail)

            label = f"varlen_{name}" + f"_tail{tail}" * bool(tail)
            varlen = partial(_varlen, qkv, segments)
            yield setting.time_both(label, varlen, [qkv], gradient)
        yield _pooling(setting, name, lengths)
        yield _padded(setting, name, lengths)


def _stream(
    setting: Setting, lengths: Sequence[int], padding: int = 0
) -> tuple[Segments, Tensor, Tensor]:
    """Segments, [T, 3, H, D] QKV and the [T, H, D] gradient of the output."""
    segments = Segments.from_lengths(lengths, padding=padding, device=setting.device)
    shape = segments.num_tokens, 3, _HEADS, _WIDTH
    qkv = setting.random(*shape, dtype=torch.bfloat16, grad=True)
    return segments, qkv, setting.random(shape[0], *shape[2:], dtype=torch.bfloat16)


def _varlen(qkv: Tensor, segments: Segments) -> Tensor:
    """What the encoder calls."""
    q, k, v = qkv.unbind(1)
    return segment_attention(q, k, v, segments, segments)


def _padded(setting: Setting, name: str, lengths: Sequence[int]) -> dict[str, float]:
    """Every segment padded to the longest, with a key mask."""
    longest = max(lengths)
    sizes = torch.tensor(lengths, device=setting.device)
    mask = torch.arange(longest, device=setting.device) < sizes[:, None]
    shape = len(lengths), _HEADS, longest, _WIDTH
    qkv = [setting.random(*shape, dtype=torch.bfloat16, grad=True) for _ in range(3)]

    def padded() -> Tensor:
        q, k, v = qkv
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])

    return setting.time_both(f"padded_{name}", padded, qkv, torch.ones_like(qkv[0]))


def _pooling(setting: Setting, name: str, lengths: Sequence[int]) -> dict[str, float]:
    """One query for each segment."""
    segments, qkv, gradient = _stream(setting, lengths)
    singles = Segments.singles(len(lengths), setting.device)
    probe = setting.random(1, _HEADS, _WIDTH, dtype=torch.bfloat16, grad=True)

    def pooling() -> Tensor:
        _, k, v = qkv.unbind(1)
        return segment_attention(probe.expand(len(lengths), -1, -1), k, v, singles, segments)

    return setting.time_both(f"map_{name}", pooling, [probe, qkv], gradient[: len(lengths)])


def check_short_attention(setting: Setting) -> Iterator[dict[str, Any]]:
    """This project's kernel: errors by class of length, then times by class and for whole streams.

    Errors are relative norms against the same arithmetic in float32, of the output, the gradient of
    QKV and, with a query-key norm, those of the norms' weights.

    Results that are wrong have no times.
    """
    kernel = _kernel()
    if kernel is None:
        yield {"kernel": "none in this commit"}
        return
    setting.need_cuda()
    setting.warm_up()
    errors: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    shortest = (1, *(size + 1 for size in kernel.CLASSES))
    cases: dict[str, list[int]] = {
        str(longest): torch.randint(least, longest + 1, (40,), generator=generator).tolist()
        for least, longest in zip(shortest, kernel.CLASSES, strict=False)
    }
    cases["mixed"] = [length for lengths in cases.values() for length in lengths[:8]]
    for label, lengths in cases.items():
        for normed, causal in ((True, False), (False, True)):
            name = f"{label}{'_norm' * normed}{'_causal' * causal}"
            try:
                errors[name] = _errors(setting, kernel, sorted(lengths), normed, causal)
            except Exception as error:  # a class that does not compile leaves the others
                failed[name] = f"{type(error).__name__}: {error}"[-300:]
    wrong = {n: e for n, e in errors.items() if not max(e) < _TOLERANCE}
    yield {
        "worst_error": max((max(e) for e in errors.values()), default=None),
        "wrong": {name: [f"{error:.1e}" for error in e] for name, e in wrong.items()},
        "failed": {name: text[:120] for name, text in list(failed.items())[:3]},
        "details": {"errors": errors, "failed": failed},
    }
    if wrong or failed:
        yield {"RESULTS ARE WRONG": True}
        return
    images, captions = draw_lengths(*_STREAMS.values())
    timed = {
        "image": [n for n, _ in images if n <= kernel.MAX_LENGTH],
        "text": captions,
        **{f"only{longest}": [longest] * (16384 // longest) for longest in kernel.CLASSES},
    }
    for name, lengths in timed.items():
        yield _time(setting, kernel, f"short_{name}", sorted(lengths))
        if name.startswith("only"):
            segments, qkv, gradient = _stream(setting, lengths)
            varlen = partial(_varlen, qkv, segments)
            yield setting.time_both(f"varlen_{name}", varlen, [qkv], gradient)


def _kernel() -> ModuleType | None:
    """The launch functions, if this commit has them."""
    try:
        return import_module("navit_clip.kernels.short_attention")
    except ModuleNotFoundError:
        return None


def _bounds(kernel: ModuleType, lengths: Sequence[int]) -> list[int]:
    """Where each class begins among rising lengths, and where the last one ends."""
    counts = [sum(n <= longest for n in lengths) for longest in kernel.CLASSES]
    return [0, *counts]


def _launch(
    setting: Setting, kernel: ModuleType, lengths: Sequence[int], normed: bool, causal: bool
) -> tuple[Callable[[], Tensor], Callable[[], Any], Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Forward pass, backward pass, QKV, gradient of the output, and weights of the norms."""
    segments, qkv, gradient = _stream(setting, lengths)
    qkv = qkv.detach()
    weights = None
    if normed:
        weights = (1 + setting.random(_WIDTH) / 4, 1 + setting.random(_WIDTH) / 4)
    q_weight, k_weight = weights or (None, None)
    shared = (segments.offsets, _bounds(kernel, lengths), q_weight, k_weight, _EPS, causal)
    out, dqkv = torch.empty_like(gradient), torch.empty_like(qkv)

    def forward() -> Tensor:
        kernel.short_attention_forward(qkv, *shared, out)
        return out

    def backward() -> Any:
        return dqkv, kernel.short_attention_backward(gradient, qkv, *shared, dqkv)

    return forward, backward, qkv, gradient, weights


def _errors(
    setting: Setting, kernel: ModuleType, lengths: Sequence[int], normed: bool, causal: bool
) -> list[float]:
    """Relative norms of the differences from float32."""
    launched = _launch(setting, kernel, lengths, normed, causal)
    forward, backward, qkv, gradient, weights = launched
    dqkv, dweights = (forward(), backward())[1]
    inputs = [qkv.float().requires_grad_(), *(w.clone().requires_grad_() for w in weights or ())]
    q, k, v = inputs[0].unbind(1)
    if weights:
        q, k = (
            F.layer_norm(x, (_WIDTH,), w, None, _EPS).to(torch.bfloat16).float()
            for x, w in zip((q, k), inputs[1:], strict=True)
        )
    segments = Segments.from_lengths(lengths, device=setting.device)
    wanted = segment_attention(q, k, v, segments, segments, causal=causal)
    gradients = torch.autograd.grad(wanted, inputs, gradient.float())
    pairs = [(forward(), wanted), *zip((dqkv, *(dweights or ())), gradients, strict=True)]
    return [
        ((got.float() - want).norm() / want.norm()).item() if got.isfinite().all() else float("inf")
        for got, want in pairs
    ]


def _time(
    setting: Setting, kernel: ModuleType, name: str, lengths: Sequence[int]
) -> dict[str, float]:
    """With the query-key norm, which the other kernel leaves to further ones."""
    forward, backward, *_ = _launch(setting, kernel, lengths, normed=True, causal=False)
    return {
        f"{name}_fwd_us": 1e3 * setting.milliseconds(forward),
        f"{name}_bwd_us": 1e3 * setting.milliseconds(backward),
    }
