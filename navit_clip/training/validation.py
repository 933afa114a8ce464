"""The validation loss: the task's own loss on held-out shards, in batches of a fixed size.

`navit_clip.training.evaluation` asks for it when it is due. A rank computes the loss of whole
batches by itself, with a second model, of the weights that would be exported: the value is the same
on any number of ranks, however they share the model that is trained. Nothing is varied, nothing
dropped (unless the task predicts it), images are as large as the largest of training, and of
several captions a sample always has the same one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from navit_clip.data.augment import AugmentConfig
from navit_clip.data.config import DataConfig, DatasetConfig
from navit_clip.data.drop import DropConfig
from navit_clip.data.held_out import HeldOut
from navit_clip.data.mixture import Mixture
from navit_clip.data.shard_sizes import sizes_in_manifests
from navit_clip.data.sizing import CurriculumConfig
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.evaluation.embed import fail_together
from navit_clip.packed.batch import Inputs
from navit_clip.precision import Precision, autocast
from navit_clip.tasks.base import Task, TaskConfig
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.training.gradcache import concatenate

Beat = Callable[[], None]

_SEED = 0  # of what is random about a sample: runs of other seeds compare
_NONE_USABLE = "data.validation: there is no usable sample"


@dataclass(frozen=True)
class ValidationConfig:
    """The loss on data.validation.

    Attributes:
        every_steps: Steps between evaluations; one is also made after the last step.
        batch: Samples in a batch of the loss. A contrastive loss grows with it, so that only losses
            of the same batch compare.

    Raises:
        ValueError: If a field is below 1.
    """

    every_steps: int = 1000
    batch: int = 256

    def __post_init__(self) -> None:
        for name in ("every_steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Validation:
    """The validation of a run.

    Attributes:
        config: When, and in what batches.
        task: On the data as it is validated on.
        held_out: This rank's batches.
        ranks: This process among all of them.
    """

    config: ValidationConfig
    task: Task
    held_out: HeldOut
    ranks: Ranks

    def run(
        self, weights: dict[str, Tensor], precision: Precision, workers: int, beat: Beat
    ) -> tuple[float, int]:
        """The mean loss over all batches, weighted by what the task's loss is a mean over.

        A collective call.

        Args:
            weights: Of all parameters, in full; not copied.
            precision: Of forward passes.
            workers: Reader processes of each rank.
            beat: Called before each batch.

        Returns:
            The loss, and how many samples could not be used.

        Raises:
            UserError: If a shard cannot be read or no sample be used, on all ranks alike.
        """
        model = self.task.model_of(weights)
        model.to(self.ranks.device).eval()
        own = []
        with fail_together(self.ranks), torch.no_grad():
            for number, pieces, skipped in self.held_out.load(workers):
                beat()
                count, loss = sum(map(self.task.count, pieces)), 0.0
                if count:
                    with autocast(precision, self.ranks.device):
                        loss = self._loss(model, pieces, count)
                own.append((number, loss * count, count, skipped))
        # Sorted, floats add up as they do on one rank.
        _, losses, counts, skips = zip(*sorted(self.ranks.gather(own)), strict=True)
        if not sum(counts):
            raise UserError(_NONE_USABLE)
        return sum(losses) / sum(counts), sum(skips)

    def _loss(self, model: nn.Module, pieces: list[Inputs], count: float) -> float:
        pieces = [piece.to(self.ranks.device) for piece in pieces]
        outputs = [model(piece) for piece in pieces]
        parts = [(output, [piece]) for output, piece in zip(outputs, pieces, strict=True)]
        if self.task.couples_examples:
            parts = [(concatenate(outputs), pieces)]
        # One count alone: no other rank takes part.
        return sum(self.task.loss(*part, [count]).total.item() for part in parts)


def open_validation(
    config: ValidationConfig,
    task: TaskConfig,
    data: DataConfig,
    mixture: Mixture,
    tokenizer: Tokenizer | None,
    ranks: Ranks,
) -> Validation | None:
    """The validation of a run; None without data.validation.

    Args:
        config: When, and in what batches.
        task: Of the run.
        data: Of the run.
        mixture: The training shards.
        tokenizer: Of the run.
        ranks: This process among all of them.

    Raises:
        UserError: If there are no such shards, one is trained on too, or no sample can be used.
    """
    if not data.validation:
        return None
    held_out = {"data.validation": DatasetConfig(data.validation, files=data.validation_files)}
    try:
        own = Mixture.find(replace(data, train=[], mix=held_out))
    except UserError as error:
        raise type(error)(f"data.validation: {error}") from error
    names = set(map(os.path.basename, own.shards))  # to look up few of many links
    alike = [shard for shard in mixture.shards if os.path.basename(shard) in names]
    trained = set(map(os.path.realpath, alike))
    both = [shard for shard in own.shards if os.path.realpath(shard) in trained]
    if both:
        raise UserError(f"data.validation: {both[0]} is a training shard too; name another one")
    drop = data.drop if task.predicts_dropped else DropConfig()
    # Each image as large as at the end, which a smaller start would forbid.
    resolution = replace(
        data.resolution, min_side=data.resolution.max_side, curriculum=CurriculumConfig()
    )
    # Both: whether they mean the same by a class, say, is the task's to find out.
    mix = data.datasets | held_out
    read = replace(data, train=[], mix=mix, drop=drop, resolution=resolution)
    built = task.build(replace(read, augment=AugmentConfig()))
    build = built.build_samples(tokenizer, _SEED)
    every = HeldOut(own, build, data.budget.ordered(build.streams), config.batch)
    # One line now rather than after a day.
    if not any(one.pieces for one in replace(every, size=1).load(0)):
        raise UserError(_NONE_USABLE)
    # One rank alone asks, as for what there is: a store may hold the manifests.
    known = ranks.of_first(partial(sizes_in_manifests, own.shards))
    for number, shard in enumerate(own.shards):
        every.counts[number] = known.get(shard, every.counts[number])
    held_out_part = replace(every, part=ranks.rank, parts=ranks.world_size)
    return Validation(config, built, held_out_part, ranks)
