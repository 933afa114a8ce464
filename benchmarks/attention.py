"""Self-attention over packed segments: this project's against padding and against a dense mask.

The same tokens for all three: 64 segments of 20 to 260 tokens, 6 heads of 64, forward and backward,
by default float32 on the CPU and bfloat16 on CUDA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import (
    alternate,
    device_and_precision,
    output_argument,
    precision_argument,
    report,
)
from navit_clip.models.attention import segment_attention
from navit_clip.packed.segments import Segments

HEADS, HEAD_WIDTH = 6, 64


def packed(qkv: Tensor, segments: Segments) -> None:
    """This project's segment attention."""
    q, k, v = qkv.unbind(1)
    segment_attention(q, k, v, segments, segments).sum().backward()


def padded(qkv: Tensor, segments: Segments) -> None:
    """Every segment padded to the longest, with a key mask, as batches of images usually are."""
    parts = [part.transpose(0, 1) for part in qkv.split(segments.lengths)]
    batch = torch.nn.utils.rnn.pad_sequence([p.transpose(0, 1) for p in parts], batch_first=True)
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


def main() -> None:
    """The command line."""
    parser = output_argument(__doc__)
    parser.add_argument("--segments", type=int, default=64, help="images in the stream")
    parser.add_argument("--rounds", type=int, default=5, help="measured passes of each")
    precision_argument(parser)
    args = parser.parse_args()
    device, precision = device_and_precision(args.precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    lengths = sorted(torch.randint(20, 261, (args.segments,), generator=generator).tolist())
    segments = Segments.from_lengths(lengths, device=device)
    qkv = torch.randn(segments.num_tokens, 3, HEADS, HEAD_WIDTH, generator=generator)
    qkv = qkv.to(device, dtype).requires_grad_()

    def run(way: object) -> None:
        assert callable(way)
        way(qkv, segments)
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = alternate(
        {
            "packed": lambda: run(packed),
            "padded": lambda: run(padded),
            "dense_mask": lambda: run(dense_mask),
        },
        rounds=args.rounds,
    )
    report(
        {
            "ratio_padded": seconds["padded"] / seconds["packed"],
            "ratio_dense_mask": seconds["dense_mask"] / seconds["packed"],
            "precision": precision,
            "segments": args.segments,
            "tokens": segments.num_tokens,
            "rounds": args.rounds,
            "seconds": seconds,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
