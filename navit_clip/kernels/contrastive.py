"""The contrastive softmax over blocks of images × texts whose logits never leave the chip.

Launched by `navit_clip.losses` for bfloat16 features on CUDA, on plain tensors without autograd.
The forward pass needs two numbers per pair, the log-sum-exps of its row and column: each program
multiplies one block, reduces it in registers and writes a part of them, and a second kernel merges
the parts. The backward pass multiplies again and writes the weight of each logit in bfloat16, for
two matrix products to make gradients of. No atomics, so results are the same bit by bit in each
run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

SIDE = 16384
"""Images and texts of the largest launch of the forward pass: 2 · SIDE² / 128 parts in float32."""
ALIGNMENT = 16
"""The weights' row stride is a multiple of it."""


class Block(NamedTuple):
    """What one program computes, and how.

    Attributes:
        images: Rows.
        texts: Columns.
        width: Numbers of each feature that are multiplied at a time.
        warps: Warps of the program.
        stages: Steps of `width` in flight.
        registers: Most that a thread may have, None for as many as it wants.
    """

    images: int
    texts: int
    width: int
    warps: int
    stages: int
    registers: int | None = None


FORWARD = Block(128, 128, 64, 8, 3)
BACKWARD = Block(128, 128, 64, 8, 3)


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

    row_parts, column_parts = (
        image_ED.new_empty(_blocks(min(SIDE, others), block) * min(SIDE, own), dtype=torch.float32)
        for own, others, block in (
            (len(image_ED), len(text_MD), FORWARD.texts),
            (len(text_MD), len(image_ED), FORWARD.images),
        )
    )
    with torch.cuda.device_of(image_ED):
        for top in range(0, len(image_ED), SIDE):
            image, row_lse = image_ED[top : top + SIDE], row_lse_E[top : top + SIDE]
            for left in range(0, len(text_MD), SIDE):
                text, column_lse = text_MD[left : left + SIDE], column_lse_M[left : left + SIDE]
                matching = None if matching_E is None or top != left else matching_E[top:][:SIDE]
                statistics_kernel[(_programs(image, text, FORWARD),)](
                    image,
                    text,
                    scale,
                    row_parts,
                    column_parts,
                    matching,
                    len(image),
                    len(text),
                    MATCHES=matching is not None,
                    **_options(image, FORWARD),
                )
                for lse, parts, count in (
                    (row_lse, row_parts, _blocks(len(text), FORWARD.texts)),
                    (column_lse, column_parts, _blocks(len(image), FORWARD.images)),
                ):
                    merge_kernel[(_blocks(len(lse), 64),)](
                        lse, parts, count, len(lse), PARTS=32, BLOCK=64, num_warps=4
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

    Args:
        image_ED: As above, as are the next four arguments.
        text_MD: See above.
        scale: See above.
        row_lse_E: See above; over all texts.
        column_lse_M: See above; over all images.
        matches: Whether text i matches image i.
        out_EM: [E, M], usually bfloat16; its rows lie a multiple of ALIGNMENT apart, of which what
            exceeds M is set to zero.
    """
    from navit_clip.kernels._contrastive import weights_kernel

    with torch.cuda.device_of(image_ED):
        weights_kernel[(_programs(image_ED, text_MD, BACKWARD),)](
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
            **_options(image_ED, BACKWARD),
        )


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _programs(image: Tensor, text: Tensor, block: Block) -> int:
    return _blocks(len(image), block.images) * _blocks(len(text), block.texts)


def _options(image: Tensor, block: Block) -> dict[str, Any]:
    import triton
    import triton.language as tl

    dot = tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
    return {
        "D": image.shape[1],
        "BLOCK_M": block.images,
        "BLOCK_N": block.texts,
        "BLOCK_K": block.width,
        "DOT": dot,
        "num_warps": block.warps,
        "num_stages": block.stages,
        "maxnreg": block.registers,
        # A logit that is multiplied and subtracted from at once is not the one whose exponential
        # is part of the sum, and near the optimum that difference is all there would be.
        "enable_fp_fusion": False,
    }
