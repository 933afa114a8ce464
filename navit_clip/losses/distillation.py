"""Losses by which a model learns from the embeddings of another, over the pairs of all ranks.

What `navit_clip.losses.contrastive` is for the pairs themselves, with the same contract: one value
on all ranks, a feature's gradient is that of the global loss, that of `logit_scale` this rank's
share. Logits of either model exist in tiles of at most `chunk_size` × `chunk_size` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from navit_clip.losses import _tiles as tiles
from navit_clip.losses._gather import Exchange, Gather, choose_exchange
from navit_clip.losses._members import Members
from navit_clip.losses._ring import Ring
from navit_clip.losses.mean import mean_over_ranks


def logit_distillation_loss(
    image_ED: Tensor,
    text_ED: Tensor,
    logit_scale: Tensor,
    teacher_image_EK: Tensor,
    teacher_text_EK: Tensor,
    teacher_scale: Tensor,
    *,
    chunk_size: int | None = None,
    counts: Sequence[int] | None = None,
    exchange: Exchange = "auto",
) -> Tensor:
    """Cross entropy of a teacher's and the model's softmaxes, from images to texts and back.

    With logits s of the model and t of the teacher over all N pairs, 1/(2N) times the sum of
    -softmax(t)·log softmax(s) over all rows and all columns; open_clip's `DistillClipLoss`. A
    collective call, see `softmax_contrastive_loss` for what is not said here.

    Args:
        image_ED: Unit vectors of this rank's images.
        text_ED: Of its texts, in the same order.
        logit_scale: One element.
        teacher_image_EK: The teacher's of the same images, of any width; no gradient.
        teacher_text_EK: Of the same texts.
        teacher_scale: One element.
        chunk_size: Side of the largest tile; None takes what suits the device.
        counts: Pairs of each rank, where the caller knows them.
        exchange: How texts reach the images of other ranks.

    Returns:
        Scalar, float32 at least.
    """
    dtype = tiles.autocast_dtype(image_ED.device, image_ED.dtype)
    features = (image_ED, text_ED, teacher_image_EK, teacher_text_EK)
    student_image, student_text, *teacher = (part.to(dtype).contiguous() for part in features)
    members = Members.join(student_text.detach(), counts=counts)
    scales = (
        scale.reshape(()).to(image_ED.device, tiles.logit_dtype(student_image))
        for scale in (logit_scale, teacher_scale.detach())
    )
    with torch.autocast(image_ED.device.type, enabled=False):
        loss: Tensor = _LogitDistillation.apply(
            student_image,
            student_text,
            *scales,
            *teacher,
            choose_exchange(exchange, members),
            chunk_size or tiles.default_chunk_size(student_image),
        )
    return loss


def embedding_distillation_loss(
    image_ED: Tensor,
    text_ED: Tensor,
    teacher_image_ED: Tensor,
    teacher_text_ED: Tensor,
    *,
    counts: Sequence[int],
) -> Tensor:
    """Mean of 1 - cosine between the model's and a teacher's vectors, of images and of texts.

    All are unit vectors of one width; see `logit_distillation_loss`.
    """
    cosines_ED = image_ED * teacher_image_ED + text_ED * teacher_text_ED
    return mean_over_ranks(1 - cosines_ED.sum(1) / 2, counts)


class _Logits:
    """Logits of a model, tile by tile, and their log-sum-exps over all ranks.

    Args:
        image: This rank's vectors [E, D].
        text: Likewise, in the same order.
        scale: 0-d.
        exchange: Brings texts of all ranks.
        chunk_size: Side of a tile.
    """

    def __init__(
        self, image: Tensor, text: Tensor, scale: Tensor, exchange: Ring | Gather, chunk_size: int
    ) -> None:
        self.image, self.scale = image.to(tiles.operand_dtype(image)), scale
        self.rows_E = scale.new_full((len(image),), -torch.inf)

        def visit(_: bool, blocks: tuple[Tensor, ...]) -> Tensor:
            columns_M = scale.new_full((len(blocks[0]),), -torch.inf)
            for rows, columns in _tiles(len(image), len(blocks[0]), chunk_size):
                logits = self.tile(rows, blocks[0][columns])
                for lse, dim in ((self.rows_E[rows], 1), (columns_M[columns], 0)):
                    torch.logaddexp(lse, logits.logsumexp(dim), out=lse)
            return columns_M

        self.columns_E = exchange.circulate((text,), visit, merge="logaddexp")

    def tile(self, rows: slice, text: Tensor) -> Tensor:
        """Logits of some images and texts."""
        image = self.image[rows]
        logits = self.scale.new_empty((len(image), len(text)))
        tiles.multiply(image, text.to(image.dtype).T, logits)
        return logits.mul_(self.scale)


class _LogitDistillation(torch.autograd.Function):
    """Computes gradients with the value, so that the backward pass exchanges nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        image_ED: Tensor,
        text_ED: Tensor,
        scale: Tensor,
        teacher_scale: Tensor,
        teacher_image_EK: Tensor,
        teacher_text_EK: Tensor,
        exchange: Ring | Gather,
        chunk_size: int,
    ) -> Tensor:
        model = _Logits(image_ED, text_ED, scale, exchange, chunk_size)
        teacher = _Logits(teacher_image_EK, teacher_text_EK, teacher_scale, exchange, chunk_size)
        loss = torch.zeros_like(scale)
        image_gradient_ED = torch.zeros_like(image_ED, dtype=scale.dtype)

        def visit(_: bool, blocks: tuple[Tensor, ...]) -> Tensor:
            text_MD, columns_M, teacher_text_MK, teacher_columns_M = blocks
            text_gradient_MD = torch.zeros_like(text_MD, dtype=scale.dtype)
            for rows, columns in _tiles(len(image_ED), len(text_MD), chunk_size):
                text = text_MD[columns].to(model.image.dtype)
                logits = model.tile(rows, text)
                targets = teacher.tile(rows, teacher_text_MK[columns])
                weights = torch.zeros_like(logits)
                for lse, teacher_lse in (
                    (model.rows_E[rows, None], teacher.rows_E[rows, None]),
                    (columns_M[columns], teacher_columns_M[columns]),
                ):
                    target, log_probability = (targets - teacher_lse).exp_(), logits - lse
                    loss.sub_((target * log_probability).sum())
                    weights += log_probability.exp_().sub_(target)
                weights = weights.to(text.dtype)
                tiles.accumulate(image_gradient_ED[rows], weights, text)
                tiles.accumulate(text_gradient_MD[columns], weights.T, model.image[rows])
            return text_gradient_MD

        blocks = (text_ED, model.columns_E, teacher_text_EK, teacher.columns_E)
        text_gradient_ED = exchange.circulate(blocks, visit, merge="add")
        factor = 1 / (2 * exchange.members.total)
        ctx.save_for_backward(
            (image_gradient_ED * (factor * scale)).to(image_ED.dtype),
            (text_gradient_ED * (factor * scale)).to(text_ED.dtype),
            (image_ED * image_gradient_ED).sum() * factor,
        )
        return exchange.members.sum(loss) * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (loss_gradient.to(part.dtype) * part for part in ctx.saved_tensors)
        return (*gradients, None, None, None, None, None)


def _tiles(rows: int, columns: int, side: int) -> Any:
    """Slices of images and of texts, one tile after the other."""
    starts = product(range(0, rows, side), range(0, columns, side))
    return ((slice(row, row + side), slice(column, column + side)) for row, column in starts)
