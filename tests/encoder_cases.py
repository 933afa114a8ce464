"""The encoder and the pooling heads as slow arithmetic, one example at a time.

Plain matrix algebra on the module's own weights, for one example without neighbours.
"""

from __future__ import annotations

import math

import pytest
import torch
from packed_examples import POOLINGS, randomise
from torch import Tensor, nn

from navit_clip.models.pooling import MapPooling
from navit_clip.models.transformer import Block, Encoder, EncoderConfig, Mlp, SegmentAttention

SMALL = {"width": 8, "depth": 2, "heads": 2, "mlp_ratio": 1.5}


SWITCHES = [
    EncoderConfig(**SMALL),
    EncoderConfig(**SMALL, qk_norm=False),
    EncoderConfig(**SMALL, qkv_bias=True),
    EncoderConfig(**SMALL, norm_bias=True),
    EncoderConfig(**SMALL, mlp_bias=False),
    EncoderConfig(**SMALL, activation="quick_gelu"),
    EncoderConfig(**SMALL, activation="gelu_tanh"),
    EncoderConfig(**SMALL, pre_norm=True),
    EncoderConfig(**SMALL, final_norm=False),
    EncoderConfig(**SMALL, norm_eps=0.1),
    EncoderConfig(**SMALL, causal=True),
    EncoderConfig(  # open_clip's text tower
        **SMALL,
        qk_norm=False,
        qkv_bias=True,
        norm_bias=True,
        activation="quick_gelu",
        causal=True,
    ),
]


def switch_names(config: EncoderConfig) -> str:
    default = EncoderConfig(**SMALL)
    changed = [f"{k}={v}" for k, v in vars(config).items() if v != getattr(default, k)]
    return ",".join(changed) or "navit"


every_switch = pytest.mark.parametrize("config", SWITCHES, ids=switch_names)


every_pooling = pytest.mark.parametrize("pooling", POOLINGS)


def norm(x: Tensor, layer: nn.Module, config: EncoderConfig) -> Tensor:
    if isinstance(layer, nn.Identity):
        return x
    assert isinstance(layer, nn.LayerNorm)
    centred = x - x.mean(-1, keepdim=True)
    x = centred / ((centred**2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * layer.weight
    return x if layer.bias is None else x + layer.bias


def affine(x: Tensor, layer: nn.Linear) -> Tensor:
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One head of one example: [n, D], [m, D], [m, D] to [n, D], row by row."""
    rows = []
    for i, query in enumerate(q):
        seen = i + 1 if causal else len(k)
        weights = torch.softmax(k[:seen] @ query / math.sqrt(len(query)), dim=0)
        rows.append(weights @ v[:seen])
    return torch.stack(rows)


def mlp(x: Tensor, layer: Mlp, activation: str) -> Tensor:
    hidden = affine(x, layer.up)
    if activation == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    elif activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        hidden = hidden * (1 + torch.tanh(inner)) / 2
    else:
        hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    return affine(hidden, layer.down)


def rotate(x: Tensor, angles: Tensor | None) -> Tensor:
    """One head of one example, [n, D]: each pair (i, i + D / 2) turned by its angle [n, D / 2]."""
    if angles is None:
        return x
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def attention(
    x: Tensor, layer: SegmentAttention, config: EncoderConfig, angles: Tensor | None = None
) -> Tensor:
    """With angles [H, n, D / 2] of queries and keys, if they are turned."""
    q, k, v = affine(x, layer.qkv).split(config.width, dim=-1)
    size = config.width // config.heads
    heads = []
    for head, begin in enumerate(range(0, config.width, size)):
        qh, kh, vh = (y[:, begin : begin + size] for y in (q, k, v))
        qh, kh = norm(qh, layer.q_norm, config), norm(kh, layer.k_norm, config)
        own = None if angles is None else angles[head]
        qh, kh = rotate(qh, own), rotate(kh, own)
        heads.append(attend(qh, kh, vh, config.causal))
    return affine(torch.cat(heads, dim=-1), layer.out)


def encode(x: Tensor, encoder: Encoder, angles: Tensor | None = None) -> Tensor:
    """One example's tokens [n, C] through the encoder, turned by [blocks, H, n, D / 2]."""
    config = encoder.config
    x = norm(x, encoder.pre_norm, config)
    for i, block in enumerate(encoder.blocks):
        assert isinstance(block, Block)
        own = None if angles is None else angles[i]
        x = x + attention(norm(x, block.attention_norm, config), block.attention, config, own)
        x = x + mlp(norm(x, block.mlp_norm, config), block.mlp, config.activation)
    return norm(x, encoder.norm, config)


def pool(x: Tensor, module: nn.Module, pooling: str, config: EncoderConfig) -> Tensor:
    """One example's tokens [n, C] to its vector [C]."""
    if pooling == "mean":
        return sum(x) / len(x)
    if pooling in ("cls", "last"):
        return x[0 if pooling == "cls" else -1]
    assert isinstance(module, MapPooling)
    q = affine(module.probe[None], module.q)
    k, v = affine(x, module.kv).split(config.width, dim=-1)
    size = config.width // config.heads
    heads = [
        attend(*(y[:, begin : begin + size] for y in (q, k, v)), causal=False)
        for begin in range(0, config.width, size)
    ]
    y = affine(torch.cat(heads, dim=-1), module.out)
    return (y + mlp(norm(y, module.norm, config), module.mlp, config.activation))[0]


def double(module: nn.Module, seed: int = 0) -> nn.Module:
    randomise(module, seed, std=0.3)
    return module.double()
