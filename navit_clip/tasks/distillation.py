"""A teacher of the contrastive task: another CLIP, whose embeddings the model learns beside.

It is run packed, without gradients, on the very patches and token ids that the model is trained on,
and is no part of the model: not of checkpoints, not of what ranks share, not of the export.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from navit_clip.architectures import OPEN_CLIP
from navit_clip.configs import check_choices
from navit_clip.data.builders.pairs import PairInputs
from navit_clip.data.config import DataConfig
from navit_clip.errors import UserError
from navit_clip.losses.distillation import embedding_distillation_loss, logit_distillation_loss
from navit_clip.model import NaViTCLIP
from navit_clip.models.clip import CLIPConfig, CLIPOutput
from navit_clip.packed.batch import Inputs
from navit_clip.precision import autocast, choose_precision
from navit_clip.tasks.source import InitConfig
from navit_clip.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class DistillConfig:
    """A teacher, whose embeddings of the same pairs the model learns beside the contrastive loss.

    Attributes:
        teacher: As `init.model`: the directory of an exported model or of one of transformers, or
            ``open_clip:NAME``; null is none. It reads the model's patches and token ids.
        weights: Of ``open_clip:NAME``: a local checkpoint, or a tag of open_clip to download.
        kind: ``logits``: cross entropy of the teacher's and the model's softmaxes over all texts,
            and over all images (open_clip's DistillClipLoss); or ``embeddings``: 1 - cosine of
            their vectors, which must have one width.
        weight: The loss is that of the pairs plus so many times this one.

    Raises:
        ValueError: If `weight` is not positive, or `weights` is given for a teacher that is not
            from open_clip.
    """

    teacher: str | None = None
    weights: str | None = None
    kind: Literal["logits", "embeddings"] = "logits"
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")
        if self.weights is not None and not (self.teacher or "").startswith(OPEN_CLIP):
            raise ValueError(
                f"weights belongs to teacher: {OPEN_CLIP}NAME, got teacher={self.teacher}"
            )


class Teacher:
    """The teacher of a run.

    Args:
        config: With a `teacher`.
        student: Architecture of the model that learns.
        data: What is read.
        tokenizer: Of the run.

    Attributes:
        model: In evaluation mode, on the device of the inputs that it has seen.

    Raises:
        UserError: If it cannot be read, or does not take what the model is trained on; names what
            stands in the way.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: CLIPConfig,
        data: DataConfig,
        tokenizer: Tokenizer | None,
    ) -> None:
        assert config.teacher is not None
        self.config, self.model = config, _read(config.teacher, config.weights)
        problem = self._misfit(student, data, tokenizer)
        if problem is not None:
            raise UserError(f"task.distill.teacher={config.teacher} {problem}")

    def loss(
        self,
        outputs: CLIPOutput,
        inputs: Sequence[Inputs],
        counts: Sequence[int] | None,
        **options: Any,
    ) -> Tensor:
        """The loss over the pairs of all ranks, not yet weighted; a collective call.

        Args:
            outputs: Of the model that learns, over all micro-batches.
            inputs: Those micro-batches, on its device.
            counts: Pairs of each rank.
            options: Of `logit_distillation_loss`.
        """
        features = outputs.image_ED, outputs.text_ED
        image_EK, text_EK = self.embed(inputs)
        if self.config.kind == "embeddings":
            assert counts is not None
            return embedding_distillation_loss(*features, image_EK, text_EK, counts=counts)
        return logit_distillation_loss(
            *features,
            outputs.logit_scale,
            image_EK,
            text_EK,
            self.model.log_scale.exp(),
            counts=counts,
            **options,
        )

    @torch.no_grad()
    def embed(self, inputs: Sequence[Inputs]) -> tuple[Tensor, Tensor]:
        """Unit vectors [E, K] of all images, and of all texts."""
        images, texts = [], []
        for part in inputs:
            assert isinstance(part, PairInputs)
            device = part.images.patches.device
            model = self.model.to(device)
            with autocast(choose_precision("auto", device), device):
                # The batch's plan is for the tower that learns.
                images.append(model.embed_images(replace(part.images, plan=None)))
                texts.append(model.embed_texts(part.texts))
        return torch.cat(images), torch.cat(texts)

    def _misfit(
        self, student: CLIPConfig, data: DataConfig, tokenizer: Tokenizer | None
    ) -> str | None:
        """Why the teacher cannot read what the model is trained on; None if it can."""
        own, resolution = self.model.config, data.resolution
        for size in resolution.patch_sizes or [student.image.patch_size]:
            try:
                own.image.check_patch_size(size)
            except ValueError as error:
                return f"cannot read the run's patches: {error}"
        side = min(student.image.position.max_grid_side, resolution.max_tokens)
        if own.image.position.max_grid_side < side:
            return (
                f"has positions for {own.image.position.max_grid_side} patches in a row, images "
                f"may have {side}: lower data.resolution.max_tokens"
            )
        if own.image.stem != "none" and (data.drop.kind != "none" or data.packing != "fill"):
            return "reads whole images alone: leave data.drop out, and data.packing at fill"
        fills = own.text.fill_context, student.text.fill_context
        contexts = own.text.context_length, student.text.context_length
        if fills[0] != fills[1] or contexts[0] < contexts[1] or (fills[0] and len({*contexts}) > 1):
            return (
                f"reads captions of {contexts[0]} tokens (fill_context {fills[0]}), the run's have "
                f"{contexts[1]} (fill_context {fills[1]}): change task.model.text"
            )
        theirs = self.model.tokenizer
        assert theirs is not None
        assert tokenizer is not None
        if difference := tokenizer.difference(theirs, "its own"):
            return f"has another tokenizer than the run, which has {difference}"
        if self.config.kind == "embeddings" and own.embed_dim != student.embed_dim:
            return (
                f"has vectors of {own.embed_dim} numbers, the model of {student.embed_dim}: take "
                "task.distill.kind logits, or the same task.model.embed_dim"
            )
        return None


@cache  # training and validation share it
def _read(teacher: str, weights: str | None) -> NaViTCLIP:
    try:
        model = InitConfig(teacher, weights).read_model()
    except UserError as error:
        raise UserError(f"task.distill.teacher: {error}") from error
    if not isinstance(model, NaViTCLIP):
        raise UserError(f"task.distill.teacher={teacher} holds a {model.kind}, it must be a clip")
    return model.eval().requires_grad_(False)
