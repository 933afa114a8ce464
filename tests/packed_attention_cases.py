"""A tower's encoder and pooling by our own kernels against the same without them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from navit_clip.models.pooling import MapPooling
from navit_clip.models.transformer import Encoder, EncoderConfig
from navit_clip.packed.segments import Segments

TAKES_KERNELS = "navit_clip.models.packed_attention_op.takes_kernels"
POOL_TAKES_KERNELS = "navit_clip.models.pooling.takes_kernels"


def check_tower(*, device: str, **options: Any) -> None:
    """Segments of some classes, one that is too long for them, and padding.

    In float32 by the interpreter; compiled, our kernels take half precision alone.
    """
    # Without qk-norm scores are large, and float32 itself is 2e-5 from float64 on some CPUs.
    exact = 1e-5 if options.get("qk_norm", True) else 1e-4
    dtype, tolerance = (torch.bfloat16, 3e-2) if device == "cuda" else (torch.float32, exact)
    torch.manual_seed(0)
    config = EncoderConfig(width=64, depth=1, heads=2, **options)
    packed, plain = (nn.ModuleList([Encoder(config), MapPooling(config)]) for _ in range(2))
    for parameter in packed.parameters():
        nn.init.normal_(parameter, 0.2, 0.2)
    plain.load_state_dict(packed.state_dict())
    for module in packed:
        module.pack_attention()
    segments = Segments.from_lengths([1, 14, 20, 300], padding=9, device=device)
    x_TC = torch.randn(segments.num_tokens, 64).to(device)
    weight = torch.randn(4, 64).to(device)
    results = []
    with patch(TAKES_KERNELS, lambda _: True), patch(POOL_TAKES_KERNELS, lambda _: True):
        for encoder, pool in (packed.to(device), plain.to(device)):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                pooled_EC = pool(encoder(x_TC, segments), segments)
            leaves = [*encoder.parameters(), *pool.parameters()]
            results.append([pooled_EC, *torch.autograd.grad((pooled_EC * weight).sum(), leaves)])
    largest = max(expected.norm().item() for expected in results[1])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= tolerance * largest
