"""What is neither a matrix product nor attention, uncompiled: the order of what to fuse next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.device.setting import Setting
from navit_clip.training.parallel import clip_gradients

_MATRICES = 89  # of 3072 × 768: 210 million parameters


def check_kernels(setting: Setting) -> Iterator[dict[str, Any]]:
    """Norms, GELU, gathers from tables, the clipping of gradients and AdamW."""
    setting.warm_up()
    tokens, words, width, heads = (64, 32, 32, 2) if setting.tiny else (16384, 4288, 768, 12)
    hidden, head, rows = 4 * width, width // heads, 512 if setting.tiny else 32000
    found: dict[str, Any] = {}

    def both(name: str, call: Any, *inputs: Tensor) -> None:
        output = call(*inputs)
        found.update(
            setting.time_both(name, lambda: call(*inputs), list(inputs), torch.ones_like(output))
        )

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return setting.random(*shape, dtype=dtype, grad=True)

    weight, head_weight = random(width), random(head)
    both("norm", lambda x: F.layer_norm(x, (width,), weight), random(tokens, width))
    both("head_norm", lambda x: F.layer_norm(x, (head,), head_weight), random(tokens, heads, head))
    both("gelu", F.gelu, random(tokens, hidden, dtype=torch.bfloat16))
    places = torch.randint(0, 64, (tokens,), device=setting.device, dtype=torch.int32)
    both("position_table", lambda table: F.embedding(places, table), random(64, width))
    ids = torch.randint(0, rows, (words,), device=setting.device, dtype=torch.int32)
    both("token_table", lambda table: F.embedding(ids, table), random(rows, width))
    count = 2 if setting.tiny else _MATRICES
    parameters = [nn.Parameter(setting.random(hidden, width)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    found["clip_ms"] = setting.milliseconds(lambda: clip_gradients(parameters, 1.0))
    found["adamw_ms"] = setting.milliseconds(optimizer.step)
    yield found
