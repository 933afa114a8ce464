"""The contrastive softmax over blocks of images × texts whose logits never leave the chip.

Launched by `navit_clip.losses` for bfloat16 features on CUDA, on plain tensors without autograd.
The forward pass needs two numbers per pair, the log-sum-exps of its row and column: each program
multiplies one block, reduces it in registers and writes a part of them, and a second kernel merges
the parts. The backward pass multiplies again and writes the weight of each logit in bfloat16, for
two matrix products to make gradients of. No atomics, so results are the same bit by bit in each
run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIDE = 16384
"""Images and texts of the largest launch of the forward pass: 2 · SIDE² / 128 parts in float32."""
ALIGNMENT = 16
"""The weights' row stride is a multiple of it."""
BLOCK = 128
"""Images and texts of one program. On an H100 twice as many texts were no faster."""


def softmax_statistics(
    image_ED: Tensor,
    text_MD: Tensor,
    scale: Tensor,
    row_lse_E: Tensor,
    column_lse_M: Tensor,
    matching_E: Tensor | None,
) -> None:
    """Adds the logits scale · image_i · text_j to the log-sum-exps of rows and columns.

    Args:
        image_ED: [E, D] bfloat16, contiguous.
        text_MD: [M, D] likewise.
        scale: 0-d, float32.
        row_lse_E: [E] log-sum-exps of each image's logits so far, float32; changed in place. -inf
            where there are none yet.
        column_lse_M: [M] likewise of each text.
        matching_E: If text i matches image i: set to their logits, [E] float32.
    """
    # Imported here: a PyTorch without CUDA comes without Triton.
    from navit_clip.kernels._contrastive import merge_kernel, statistics_kernel

    rows, columns = min(SIDE, len(image_ED)), min(SIDE, len(text_MD))
    row_parts = row_lse_E.new_empty(_blocks(columns) * rows)
    column_parts = row_lse_E.new_empty(_blocks(rows) * columns)
    with torch.cuda.device_of(image_ED):
        for top in range(0, len(image_ED), SIDE):
            image, row_lse = image_ED[top : top + SIDE], row_lse_E[top : top + SIDE]
            for left in range(0, len(text_MD), SIDE):
                text, column_lse = text_MD[left : left + SIDE], column_lse_M[left : left + SIDE]
                matching = None if matching_E is None or top != left else matching_E[top:][:SIDE]
                statistics_kernel[(_blocks(len(image)) * _blocks(len(text)),)](
                    image,
                    text,
                    scale,
                    row_parts,
                    column_parts,
                    matching,
                    len(image),
                    len(text),
                    MATCHES=matching is not None,
                    **_options(image),
                )
                for lse, parts, others in (
                    (row_lse, row_parts, text),
                    (column_lse, column_parts, image),
                ):
                    merge_kernel[(_blocks(len(lse)),)](
                        lse, parts, _blocks(len(others)), len(lse), PARTS=32, BLOCK=BLOCK
                    )


def softmax_weights(
    image_ED: Tensor,
    text_MD: Tensor,
    scale: Tensor,
    row_lse_E: Tensor,
    column_lse_M: Tensor,
    matches: bool,
    out_EM: Tensor,
) -> None:
    """Sets out to exp(logit - row_lse) + exp(logit - column_lse), less 2 for matching pairs.

    Arguments as of `softmax_statistics`, with `row_lse_E` over all texts and `column_lse_M` over
    all images; `matches` says whether text i matches image i. `out_EM` is [E, M], usually bfloat16;
    its rows lie a multiple of ALIGNMENT apart, of which what exceeds M is set to zero.
    """
    from navit_clip.kernels._contrastive import weights_kernel

    with torch.cuda.device_of(image_ED):
        weights_kernel[(_blocks(len(image_ED)) * _blocks(len(text_MD)),)](
            image_ED,
            text_MD,
            scale,
            row_lse_E,
            column_lse_M,
            out_EM,
            len(image_ED),
            len(text_MD),
            out_EM.stride(0),
            MATCHES=matches,
            **_options(image_ED),
        )


def _blocks(length: int) -> int:
    return -(-length // BLOCK)


def _options(image: Tensor) -> dict[str, Any]:
    import triton
    import triton.language as tl

    return {
        "D": image.shape[1],
        "BLOCK_M": BLOCK,
        "BLOCK_N": BLOCK,
        "BLOCK_K": 64,
        "DOT": tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
        "num_warps": 8,
        "num_stages": 3,
        # A logit that is multiplied and subtracted from at once is not the one whose exponential
        # is part of the sum, and near the optimum that difference is all there would be.
        "enable_fp_fusion": False,
    }
