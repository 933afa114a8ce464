"""Stochastic depth: in training, some examples of a stream pass some of an encoder's layers by.

Each example loses the output of a block's attention or MLP with a probability that grows linearly
from 0 in the first block to the rate in the last; what is not lost is scaled up, so that the
expectation stays (Huang et al., arXiv 1603.09382; linear as in DeiT and BEiT). `Encoder` draws from
torch's default generator, whose state is part of a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from navit_clip.packed.segments import Segments


def draw_drop_path(segments: Segments, depth: int, rate: float) -> Tensor:
    """What the outputs of attention and MLP are multiplied by, token by token.

    Args:
        segments: Of the stream; its padding goes with the last example.
        depth: Blocks.
        rate: Of the last block, in [0, 1); of the only one where there is one.

    Returns:
        float32 [depth, T, 2]: 0 or 1 / (1 - the block's rate), the same for all tokens of an
        example.
    """
    device = segments.offsets.device
    first = 0.0 if depth > 1 else rate
    rate_N11 = torch.linspace(first, rate, depth, device=device)[:, None, None]
    drawn_NE2 = torch.rand(depth, segments.num_examples, 2, device=device)
    scale_NE2 = (drawn_NE2 >= rate_N11) / (1 - rate_N11)
    return scale_NE2[:, segments.ids.clamp(max=segments.num_examples - 1)]


def add_scaled(x_TC: Tensor, y_TC: Tensor, scale_T: Tensor | None) -> Tensor:
    """Adds scale · y to x, in the precision of x; None scales nothing."""
    if scale_T is not None:
        y_TC = (y_TC * scale_T[:, None]).to(x_TC.dtype)
    return x_TC + y_TC
