"""Self-attention over packed segments: this project's against padding and against a dense mask.

The same tokens for all three: 64 segments of 20 to 260 tokens, 6 heads of 64, forward and backward,
by default float32 on the CPU and bfloat16 on CUDA.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.command import command, default_device
from benchmarks.measure import alternate
from benchmarks.sizes import HEAD_WIDTH
from navit_clip.commands import number
from navit_clip.models.attention import segment_attention
from navit_clip.packed.segments import Segments

HEADS = 6


def packed(qkv: Tensor, segments: Segments) -> None:
    """This project's segment attention."""
    q, k, v = qkv.unbind(1)
    segment_attention(q, k, v, segments, segments).sum().backward()


def padded(qkv: Tensor, segments: Segments) -> None:
    """Every segment padded to the longest, with a key mask, as batches of images usually are."""
    batch = torch.nn.utils.rnn.pad_sequence(qkv.split(segments.lengths), batch_first=True)
    lengths = torch.tensor(segments.lengths, device=qkv.device)
    mask = torch.arange(segments.max_length, device=qkv.device)[None, :] < lengths[:, None]
    q, k, v = batch.permute(2, 0, 3, 1, 4)
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).sum().backward()


def dense_mask(qkv: Tensor, segments: Segments) -> None:
    """One T×T mask over the stream, as packing is usually written."""
    ids = segments.ids
    mask = ids[:, None] == ids[None, :]
    q, k, v = qkv.permute(1, 2, 0, 3)[:, None]
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All three on the same segments."""
    device = default_device()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    lengths = sorted(torch.randint(20, 261, (args.segments,), generator=generator).tolist())
    segments = Segments.from_lengths(lengths, device=device)
    qkv = torch.randn(segments.num_tokens, 3, HEADS, HEAD_WIDTH, generator=generator)
    qkv = qkv.to(device, dtype).requires_grad_()

    variants = {f.__name__: partial(f, qkv, segments) for f in (packed, padded, dense_mask)}
    seconds = alternate(variants, args.rounds)
    return {
        "ratio_padded": seconds["padded"] / seconds["packed"],
        "ratio_dense_mask": seconds["dense_mask"] / seconds["packed"],
        "segments": args.segments,
        "tokens": segments.num_tokens,
        "seconds": seconds,
    }


main = command(
    __doc__,
    measure,
    "precision",
    rounds={"default": 5},
    segments={"type": number(1), "default": 64, "help": "images in the stream"},
)

if __name__ == "__main__":
    main()
