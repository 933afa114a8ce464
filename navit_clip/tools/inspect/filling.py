"""Packs batches of shards as a configuration would, and measures how full they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from navit_clip.data.builders.pairs import PairBuilder, PairInputs
from navit_clip.data.config import DataConfig
from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Mixture
from navit_clip.errors import UserError
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.packed.images import ImagePatches, PackedImages
from navit_clip.tokenizers.base import Tokenizer

MAX_BATCHES = 32  # enough for means; a whole pass would decode everything twice


@dataclass(frozen=True)
class DrawnPair:
    """One pair of a batch, for people.

    Attributes:
        id: ``shard/key``.
        image: Kept patches and the grid.
        caption: The text that was tokenised.
        text_tokens: Tokens it became.
        place: Segment of the image in the packed stream.
        text_place: Segment of the caption in the packed stream.
    """

    id: str
    image: ImagePatches
    caption: str
    text_tokens: int
    place: int
    text_place: int

    @property
    def image_length(self) -> int:
        """Image tokens."""
        return len(self.image.patches)


@dataclass(frozen=True)
class Filling:
    """What packing reaches.

    Attributes:
        batches: Counts of each batch.
        image_tokens: Real image tokens of the first batch's segments, in the stream's order.
        text_tokens: Real text tokens of the first batch's segments, in the stream's order.
        pairs: The first batch's pairs, in the order of the image stream.
    """

    batches: list[BatchCounts]
    image_tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]
    pairs: list[DrawnPair]

    @property
    def pairs_per_batch(self) -> np.ndarray:
        """int64 [batches]."""
        return np.array([counts.examples for counts in self.batches])

    @property
    def pairs_cv(self) -> float:
        """Coefficient of variation of pairs per batch."""
        return float(self.pairs_per_batch.std() / self.pairs_per_batch.mean())

    @property
    def image_padding(self) -> float:
        """Unused share of the image budget."""
        return 1 - self.tokens("image") / self.budget("image")

    @property
    def text_padding(self) -> float:
        """Unused share of the text budget."""
        return 1 - self.tokens("text") / self.budget("text")

    @property
    def kept(self) -> float:
        """Share of image tokens that token drop leaves."""
        return self.tokens("image") / self.tokens_before_drop("image")

    def budget(self, stream: str) -> int:
        """Token budget of one batch."""
        return self.batches[0].streams[stream].budget

    def tokens(self, stream: str) -> float:
        """Real tokens of a batch after token drop, mean."""
        return float(np.mean([counts.streams[stream].tokens for counts in self.batches]))

    def tokens_before_drop(self, stream: str) -> float:
        """Tokens of a batch before token drop, mean."""
        return float(
            np.mean([counts.streams[stream].tokens_before_drop for counts in self.batches])
        )


def measure_filling(
    mixture: Mixture, build: PairBuilder, config: DataConfig, pairs: int
) -> Filling:
    """Packs one pass over the shards, or as much of it as fills `MAX_BATCHES`.

    Args:
        mixture: The shards; at least one of their samples must be usable.
        build: Makes pairs.
        config: How they are packed.
        pairs: Pairs of one pass. A batch that holds more shows some of them again.

    Raises:
        UserError: If the shards cannot be read, or a pair exceeds the budgets.
    """
    remembering = _RememberingTokenizer(build.tokenizer)
    batches: list[BatchCounts] = []
    first: Batch[PairInputs] | None = None
    taken = 0
    # What is measured does not depend on who reads, and one process keeps one tokenizer.
    stream = load_batches(
        replace(build, tokenizer=remembering),
        replace(config, workers=0),
        build.seed,
        mixture=mixture,
    )
    with tqdm(desc="packing", unit="batch") as bar:
        while taken < pairs and len(batches) < MAX_BATCHES:
            try:
                batch = next(stream)
            # A budget that one pair exceeds, which only the trainer's own checks would find.
            except ValueError as error:
                raise UserError(f"cannot pack with this configuration: {error}") from error
            first = first or batch
            batches.append(batch.counts)
            taken += batch.counts.examples
            bar.update()
    assert first is not None
    images, texts = first.inputs.images.segments, first.inputs.texts.segments
    return Filling(
        batches,
        images.lengths[: images.num_examples],
        texts.lengths[: texts.num_examples],
        _unpack(first, remembering.texts),
    )


class _RememberingTokenizer(Tokenizer):
    """A tokenizer that knows the texts of what it encoded, which a packed batch does not carry."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.kind = tokenizer.kind
        self.texts: dict[tuple[int, ...], str] = {}

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def encode(self, text: str, context_length: int) -> list[int]:
        ids = self._tokenizer.encode(text, context_length)
        self.texts[tuple(ids)] = text
        return ids


def unpack_images(packed: PackedImages) -> list[ImagePatches]:
    """Packed images one by one, in the stream's order."""
    lengths = packed.segments.lengths
    pieces = zip(
        packed.patches.split(lengths), packed.coords.split(lengths), packed.grids, strict=True
    )
    images = [
        ImagePatches(patches.numpy(), coords.numpy(), (int(grid[0]), int(grid[1])))
        for patches, coords, grid in pieces
    ]
    return images[: packed.segments.num_examples]


def _unpack(batch: Batch[PairInputs], texts: dict[tuple[int, ...], str]) -> list[DrawnPair]:
    packed = batch.inputs
    images = unpack_images(packed.images)
    captions = [ids.tolist() for ids in packed.texts.token_ids.split(packed.texts.segments.lengths)]
    pairs = []
    for i, name in enumerate(batch.ids):
        place, text_place = int(packed.images.order[i]), int(packed.texts.order[i])
        ids = captions[text_place]
        text = texts[tuple(ids)]
        pairs.append(DrawnPair(name, images[place], text, len(ids), place, text_place))
    return sorted(pairs, key=lambda pair: pair.place)
