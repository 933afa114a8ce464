"""Labelled shards, a tiny classifier's configuration, and global batches, for tests of the task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packed_examples import random_image
from shard_factory import SIZES, encode, photo, write_shard

from navit_clip.data.builders.labelled import LabelledInputs
from navit_clip.distributed import Ranks
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.packed.images import ImagePatches, Planner, pack_images
from navit_clip.packed.ragged import Ragged

ALONE = Ranks(0, 1, torch.device("cpu"))
NAMES = ("red", "green", "blue")
TOWER = ImageTowerConfig(2, EncoderConfig(width=16, depth=2, heads=2), PositionConfig(table_side=9))
Labelled = tuple[str, ImagePatches, np.ndarray]


def write_labelled(root: Path, images: int = 45, shards: int = 3) -> Path:
    """Shards of images with ``cls`` and ``json.tags`` (none to two of the names)."""
    for shard in range(shards):
        samples = {}
        for index in range(shard, images, shards):
            tags = [NAMES[(index + i) % 3] for i in range(index % 3)]
            samples[str(index)] = {
                "png": encode(photo(index, *SIZES[index % len(SIZES)])),
                "cls": str(index % 3).encode(),
                "json": json.dumps({"tags": tags}).encode(),
            }
        write_shard(root / f"{shard:05d}.tar", samples)
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    return root


def classify_flags(data: Path, run_dir: Path, steps: int = 4, **overrides: object) -> list[str]:
    """Flags of ``navit-clip train`` for a run of a second; a double underscore stands for a dot."""
    options: dict[str, object] = {
        "run_dir": run_dir,
        "steps": steps,
        "task.kind": "classify",
        "task.model.image.patch_size": 8,
        "task.model.image.encoder.width": 16,
        "task.model.image.encoder.depth": 2,
        "task.model.image.encoder.heads": 2,
        "data.train": data,
        "data.workers": 0,
        "data.shuffle_buffer": 8,
        "data.look_ahead": 3,
        "data.resolution.min_side": 16,
        "data.resolution.max_side": 48,
        "data.resolution.max_tokens": 24,
        "data.drop.kind": "beta",
        "data.drop.rate": 0.3,
        "data.budget.tokens": '{"image": 60}',
        "data.budget.max_examples": 8,
        "optim.schedule.warmup_steps": 1,
        "optim.schedule.kind": "constant",
        "checkpoint.every_steps": 2,
        "log.every_steps": 1,
        "log.media_every_steps": 0,
        "device": "cpu",
    }
    options.update({name.replace("__", "."): value for name, value in overrides.items()})
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def examples(step: int, *, single: bool = False) -> list[Labelled]:
    """(id, image, labels) of all ranks and micro-batches at one step."""
    rng = np.random.default_rng(step)
    found = []
    for index in range(int(rng.integers(9, 14))):
        grid = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        count = 1 if single else int(rng.integers(0, 4))
        labels = np.sort(rng.permutation(3)[:count]).astype(np.int64)
        found.append((f"{step}/{index}", random_image(100 * step + index, grid), labels))
    return found


def pack(part: list[Labelled], planner: Planner | None = None) -> Batch[LabelledInputs]:
    """One batch."""
    inputs = LabelledInputs(
        pack_images([image for _, image, _ in part], planner=planner),
        Ragged.from_arrays([labels for _, _, labels in part]),
    )
    return Batch(inputs, tuple(name for name, _, _ in part), BatchCounts(len(part)))


def micro_batches(
    part: list[Labelled], ranks: Ranks, accumulate: int, planner: Planner | None = None
) -> list[Batch[Any]]:
    """One rank's share of the examples of a step, as unequal as they are."""
    mine = part[ranks.rank :: ranks.world_size]
    return [pack(mine[number::accumulate], planner) for number in range(accumulate)]
