"""A tiny model, global batches, and ways to cut them, for the tests of one training step."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from packed_examples import random_caption, random_image

from navit_clip.data.builders.pairs import PairInputs
from navit_clip.data.drop import hide_patches
from navit_clip.data.seeding import generator
from navit_clip.distributed import Ranks
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.rope import RotaryConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.packed.images import ImagePatches, Planner, pack_images
from navit_clip.packed.masked import hidden_weights
from navit_clip.packed.texts import pack_texts
from navit_clip.tasks.contrastive import ContrastiveConfig, ContrastiveLossConfig
from navit_clip.tasks.locking import LockConfig
from navit_clip.tokenizers.load import TokenizerConfig
from navit_clip.training.config import TrainConfig
from navit_clip.training.optim import OptimConfig
from navit_clip.training.schedule import ScheduleConfig
from navit_clip.training.step import Stepper
from navit_clip.training.trainer import build_stepper

ALONE = Ranks(0, 1, torch.device("cpu"))
Pair = tuple[str, ImagePatches, list[int]]


def tiny_config(
    *,
    steps: int = 30,
    kind: str = "softmax",
    lock: LockConfig = LockConfig(),  # noqa: B008  frozen
    **changes: Any,
) -> TrainConfig:
    """A run of a model of three blocks of width 16; `changes` are fields of `TrainConfig`."""
    encoder = EncoderConfig(width=16, depth=1, heads=2)
    deeper = replace(encoder, depth=2)
    model = CLIPConfig(
        embed_dim=8,
        image=ImageTowerConfig(patch_size=2, encoder=deeper, position=PositionConfig(table_side=9)),
        text=TextTowerConfig(vocab_size=11, context_length=8, encoder=encoder),
        init_bias=-10.0 if kind == "sigmoid" else None,
    )
    schedule = ScheduleConfig(warmup_steps=2)
    defaults: dict[str, Any] = {
        "optim": OptimConfig(lr=1e-3, eps=1e-6, schedule=schedule),
    }
    loss = ContrastiveLossConfig(kind, chunk_size=4)
    task = ContrastiveConfig(model=model, loss=loss, lock=lock)
    tokenizer = TokenizerConfig(path="unused")
    return TrainConfig("unused", task, steps, tokenizer=tokenizer, **defaults | changes)


def rotary(config: TrainConfig) -> TrainConfig:
    """The same run with positions that turn queries and keys, in images those alone."""
    model = config.task.model
    image = replace(
        model.image, position=PositionConfig("none"), rotary=RotaryConfig("mixed", theta=10.0)
    )
    text = replace(model.text, rotary=RotaryConfig("axial"))
    return with_task(config, model=replace(model, image=image, text=text))


def with_task(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The same run with other fields of its task."""
    return replace(config, task=replace(config.task, **changes))


def global_batch(step: int) -> list[Pair]:
    """The pairs of all ranks and micro-batches at one step, another number at each."""
    rng = np.random.default_rng(step)
    pairs = []
    for index in range(int(rng.integers(18, 25))):
        seed = 1000 * step + index
        grid = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
        caption = random_caption(seed, int(rng.integers(1, 7)))
        pairs.append((f"{step}/{index}", random_image(seed, grid), caption))
    return pairs


def cut(pairs: list[Pair], parts: int) -> list[list[Pair]]:
    """Parts of unequal length, at least one pair each."""
    spare = len(pairs) - parts
    ends = [i + spare * i * (i + 1) // (parts * (parts + 1)) for i in range(parts + 1)]
    return [pairs[a:b] for a, b in itertools.pairwise(ends)]


def visible(pair: Pair) -> np.ndarray:
    """Of an image's patches, those that are not hidden: about half."""
    name, image, _ = pair
    return hide_patches(len(image.patches), 0.5, generator("visible", name))


def pack(
    pairs: list[Pair], planner: Planner | None = None, *, hide: bool = False
) -> Batch[PairInputs]:
    images = pack_images([image for _, image, _ in pairs], planner=planner)
    return Batch(
        PairInputs(
            images,
            pack_texts([caption for _, _, caption in pairs]),
            hidden_weights(images, list(map(visible, pairs))) if hide else None,
        ),
        ids=tuple(name for name, _, _ in pairs),
        counts=BatchCounts(len(pairs)),
    )


def micro_batches(
    step: int,
    ranks: Ranks,
    accumulate: int,
    planner: Planner | None = None,
    *,
    hide: bool = False,
) -> list[Batch[PairInputs]]:
    """One rank's share of the global batch of a step."""
    mine = cut(global_batch(step), ranks.world_size)[ranks.rank]
    return [pack(part, planner, hide=hide) for part in cut(mine, accumulate)]


def new_stepper(
    config: TrainConfig, ranks: Ranks = ALONE, dtype: torch.dtype | None = None
) -> Stepper:
    torch.manual_seed(config.seed)
    task = config.task.build(config.data)
    model = task.build_model()
    task.adapt(model)
    return build_stepper(config, task, model.to(dtype=dtype or torch.float32), ranks)


def measurements(stepper: Stepper, steps: range, accumulate: int = 1) -> np.ndarray:
    """[steps, 5]: loss, gradient norm, scale; at every fifth step norms of weights and update."""
    rows = []
    for step in steps:
        batches = micro_batches(step, stepper.ranks, accumulate)
        result = stepper.step(batches, step, measure=step % 5 == 0)
        norms = result.measured.values() if result.measured else (np.nan, np.nan)
        rows.append((result.loss, result.grad_norm, result.metrics["logit_scale"], *norms))
    return np.array(rows)


def weights(stepper):
    return {name: p.detach().clone() for name, p in stepper.model.named_parameters()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) or found[name].isnan().any(), name


def same(found, expected):
    return np.array_equal(found, expected, equal_nan=True)


def count_saved(config):
    """Numbers that one step keeps for its backward pass."""
    stepper, kept = new_stepper(config), 0

    def pack_hook(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        stepper._forward(pack(global_batch(0)).inputs)
    return kept
