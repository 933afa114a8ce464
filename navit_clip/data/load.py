"""The data pipeline for a training loop of one's own: batches that know where they stand.

`docs/loader.md` has whole loops. The trainer uses `navit_clip.data.loader`, on which this stands,
and keeps its own checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from navit_clip.data.builders.base import SampleBuilder
from navit_clip.data.builders.pairs import PairBuilder, PairInputs
from navit_clip.data.config import DataConfig
from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Mixture
from navit_clip.data.state import open_state
from navit_clip.data.state_json import data_from_json, data_to_json
from navit_clip.errors import UserError
from navit_clip.packed.batch import Batch, Inputs
from navit_clip.tokenizers.base import Tokenizer

AnyInputs = TypeVar("AnyInputs", bound=Inputs)
ANY_SIDE = 1 << 20


class Batches(Iterator[Batch[AnyInputs]], Generic[AnyInputs]):
    """One rank's batches without end; a context manager that ends the reading processes.

    Args:
        build: Makes samples of raw ones, and inputs of many samples; see `pair_batches`.
        config: What is read, and how it is shuffled and packed.
        seed: Of the order and of all that is random about samples.
        rank: This process.
        world_size: Number of processes.
        resume: `state_dict` of every rank of the stopped run, in their order, whatever their
            number; empty to begin.
        pin_memory: Hand out batches in page-locked memory.

    Raises:
        UserError: If the shards are missing or unusable, or `resume` is of other shards or another
            seed.
    """

    def __init__(
        self,
        build: SampleBuilder[Any, AnyInputs],
        config: DataConfig,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        resume: Sequence[Mapping[str, Any]] = (),
        pin_memory: bool = False,
    ) -> None:
        mixture = Mixture.find(config)
        try:
            saved = [data_from_json(dict(state)) for state in resume]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"resume is no state of batches: {error!r}") from error
        self._state = open_state(
            saved, mixture, seed, workers=config.workers, rank=rank, world_size=world_size
        )
        self._batches = load_batches(
            build,
            config,
            seed,
            mixture=mixture,
            rank=rank,
            world_size=world_size,
            state=self._state,
            pin_memory=pin_memory,
        )

    def __next__(self) -> Batch[AnyInputs]:
        batch = next(self._batches)
        self._state.advance(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands after the batches handed out so far, as plain values.

        JSON and `torch.save` take them. What is prefetched does not count.
        """
        plain: dict[str, Any] = json.loads(json.dumps(data_to_json(self._state)))
        return plain

    def close(self) -> None:
        """Ends the reading processes."""
        self._batches.close()

    def __enter__(self) -> Batches[AnyInputs]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pair_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    patch_size: int = 16,
    context_length: int = 77,
    captions: Mapping[str, float] | None = None,
    max_grid_side: int = ANY_SIDE,
    seed: int = 0,
    **options: Any,
) -> Batches[PairInputs]:
    """Batches of images and their captions, each side packed end to end.

    Args:
        config: What is read, and how it is sized, dropped and packed; the streams of
            ``budget.tokens`` are ``image`` and ``text``.
        tokenizer: Turns captions into ids.
        patch_size: Side of a patch in pixels.
        context_length: Most tokens of a caption.
        captions: Weight of each caption field; by default, as in training, ``all`` that an image
            has.
        max_grid_side: Most rows or columns of patches that the model knows.
        seed: As in `Batches`.
        options: Others of `Batches`.

    Raises:
        UserError: As `Batches`.
    """
    build = PairBuilder(
        config.resolution,
        config.drop,
        patch_size,
        max_grid_side,
        seed,
        captions or {"all": 1.0},
        tokenizer,
        context_length,
        augment=config.augment,
    )
    return Batches(build, config, seed, **options)
