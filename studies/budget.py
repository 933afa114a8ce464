"""How many steps of an arm a budget of training FLOPs is: counted on batches, without training."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Mixture
from navit_clip.data.state import open_state
from navit_clip.tokenizers.load import build_tokenizer
from navit_clip.training.config import TrainConfig

_PLACES, _BATCHES = 8, 3  # where in a run batches are looked at, and how many there


class Length(NamedTuple):
    """A run's steps, and about how many images they take."""

    steps: int
    images: int


def length_of(config: TrainConfig, flops: float) -> Length:
    """Steps of a run until it has used a budget.

    What follows the images seen, such as a schedule of drop, is looked at where it would be. The
    configuration's own number of steps does not matter.
    """
    tokenizer = None if config.tokenizer is None else build_tokenizer(config.tokenizer)
    task = config.task.build(config.data)
    build = task.build_samples(tokenizer, config.seed)
    data = replace(config.data, workers=0)
    mixture = Mixture.find(data)
    steps = images = 0.0
    for _ in range(_PLACES):
        state = open_state([], mixture, config.seed, workers=0)
        state.images = round(images)
        batches = load_batches(build, data, config.seed, mixture=mixture, state=state)
        taken = list(islice(batches, _BATCHES))
        batches.close()
        each = sum(task.flops(batch.inputs) for batch in taken) / _BATCHES * config.accumulate
        more = flops / _PLACES / each
        steps += more
        images += more * sum(b.counts.examples for b in taken) / _BATCHES * config.accumulate
    return Length(max(1, round(steps)), round(images))
