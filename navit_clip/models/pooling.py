"""One vector per example from a packed stream of encoded tokens.

The last step of each tower before its projection. `map` is NaViT's masked attention pooling;
`cls` and `last` read one token, `mean` averages; padding is never read.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from navit_clip.models.attention import segment_attention
from navit_clip.models.linear import Linear
from navit_clip.models.packed_attention_op import takes_kernels
from navit_clip.models.pool_attention_op import attend_pool
from navit_clip.models.transformer import EncoderConfig, LayerNorm, Mlp
from navit_clip.packed.segments import Segments

Pooling = Literal["map", "mean", "cls", "last"]


def build_pooling(kind: Pooling, config: EncoderConfig) -> nn.Module:
    """The module for `kind`: (tokens [T, C], segments) to [E, C]."""
    if kind == "map":
        return MapPooling(config)
    if kind == "mean":
        return MeanPooling()
    return TokenPooling(last=kind == "last")


class MapPooling(nn.Module):
    """Multi-head attention pooling: one learned probe attends to each example's tokens.

    x = MHA(probe, tokens); x + MLP(LN(x)), as big_vision's MAP head, which NaViT uses.

    Attributes:
        packed: Attend by kernels of our own on CUDA; see `pool_attention_op`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.packed = False
        self.probe = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.probe, std=width**-0.5)
        self.q = Linear(width, width, bias=True)
        self.kv = Linear(width, 2 * width, bias=True, stacked=2)
        self.out = Linear(width, width, bias=True)
        self.norm = LayerNorm(width, config)
        self.mlp = Mlp(config)

    def forward(self, x_TC: Tensor, segments: Segments) -> Tensor:
        """[T, C] to [E, C]."""
        # Padding would otherwise get a gradient that no kernel writes.
        segments = segments.without_padding()
        kv_T2HD = self.kv(x_TC[: segments.num_tokens]).unflatten(-1, (2, self.heads, -1))
        q_HD = self.q(self.probe).unflatten(-1, (self.heads, -1))
        if self.packed and takes_kernels(kv_T2HD):
            pooled_EHD = attend_pool(q_HD, kv_T2HD, segments.offsets)
        else:
            k_THD, v_THD = kv_T2HD.unbind(-3)
            count = segments.num_examples
            probes = Segments.singles(count, x_TC.device)
            q_EHD = q_HD.expand(count, -1, -1)
            pooled_EHD = segment_attention(q_EHD, k_THD, v_THD, probes, segments)
        pooled_EC = self.out(pooled_EHD.flatten(-2))
        return pooled_EC + self.mlp(self.norm(pooled_EC))

    def pack_attention(self) -> None:
        """Sets `packed`, as `Encoder.pack_attention` does for its blocks."""
        self.packed = True


class MeanPooling(nn.Module):
    """The mean over each example's tokens."""

    def forward(self, x_TC: Tensor, segments: Segments) -> Tensor:
        """[T, C] to [E, C]."""
        segments = segments.without_padding()
        # Half precision would lose the small terms of a long sum.
        dtype = torch.promote_types(x_TC.dtype, torch.float32)
        sums_EC = torch.zeros(
            segments.num_examples, x_TC.shape[-1], dtype=dtype, device=x_TC.device
        ).index_add(0, segments.ids, x_TC[: segments.num_tokens].to(dtype))
        return (sums_EC / segments.offsets.diff()[:, None]).to(x_TC.dtype)


class TokenPooling(nn.Module):
    """The first or the last token of each example."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.last = last

    def forward(self, x_TC: Tensor, segments: Segments) -> Tensor:
        """[T, C] to [E, C]."""
        offsets = segments.without_padding().offsets
        return x_TC[offsets[1:] - 1 if self.last else offsets[:-1]]
