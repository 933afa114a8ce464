"""Packs batches of shards as a configuration would, and measures how full they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Sources
from navit_clip.errors import UserError
from navit_clip.packed.batch import BatchCounts, PackedBatch
from navit_clip.packed.images import ImagePatches
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
        return np.array([counts.pairs for counts in self.batches])

    @property
    def pairs_cv(self) -> float:
        """Coefficient of variation of pairs per batch."""
        return float(self.pairs_per_batch.std() / self.pairs_per_batch.mean())

    @property
    def image_padding(self) -> float:
        """Unused share of the image budget."""
        return 1 - _share(self.batches, "image_tokens", "image_budget")

    @property
    def text_padding(self) -> float:
        """Unused share of the text budget."""
        return 1 - _share(self.batches, "text_tokens", "text_budget")

    @property
    def kept(self) -> float:
        """Share of image tokens that token drop leaves."""
        return _share(self.batches, "image_tokens", "image_tokens_before_drop")


def _share(batches: list[BatchCounts], part: str, whole: str) -> float:
    return sum(getattr(b, part) for b in batches) / sum(getattr(b, whole) for b in batches)


def measure_filling(sources: Sources, build: PairBuilder, pairs: int) -> Filling:
    """Packs one pass over the shards, or as much of it as fills `MAX_BATCHES`.

    Args:
        sources: The shards; at least one of their samples must be usable.
        build: Makes pairs, and holds the configuration.
        pairs: Pairs of one pass. A batch that holds more shows some of them again.

    Raises:
        UserError: If the shards cannot be read, or a pair exceeds the budgets.
    """
    remembering = _RememberingTokenizer(build.tokenizer)
    batches: list[BatchCounts] = []
    first: PackedBatch | None = None
    taken = 0
    stream = load_batches(replace(build, tokenizer=remembering), sources=sources)
    with tqdm(desc="packing", unit="batch") as bar:
        while taken < pairs and len(batches) < MAX_BATCHES:
            try:
                batch = next(stream)
            # A budget that one pair exceeds, which only the trainer's own checks would find.
            except ValueError as error:
                raise UserError(f"cannot pack with this configuration: {error}") from error
            first = first or batch
            batches.append(batch.counts)
            taken += batch.counts.pairs
            bar.update()
    assert first is not None
    return Filling(
        batches,
        first.images.segments.lengths[: first.images.segments.num_examples],
        first.texts.segments.lengths[: first.texts.segments.num_examples],
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


def unpack_images(batch: PackedBatch) -> list[ImagePatches]:
    """The images of a batch in the stream's order."""
    packed = batch.images
    lengths = packed.segments.lengths
    pieces = zip(
        packed.patches.split(lengths), packed.coords.split(lengths), packed.grids, strict=True
    )
    images = [
        ImagePatches(patches.numpy(), coords.numpy(), (int(grid[0]), int(grid[1])))
        for patches, coords, grid in pieces
    ]
    return images[: packed.segments.num_examples]


def _unpack(batch: PackedBatch, texts: dict[tuple[int, ...], str]) -> list[DrawnPair]:
    images = unpack_images(batch)
    captions = [ids.tolist() for ids in batch.texts.token_ids.split(batch.texts.segments.lengths)]
    pairs = []
    for i, name in enumerate(batch.ids):
        place, text_place = int(batch.images.order[i]), int(batch.texts.order[i])
        ids = captions[text_place]
        text = texts[tuple(ids)]
        pairs.append(DrawnPair(name, images[place], text, len(ids), place, text_place))
    return sorted(pairs, key=lambda pair: pair.place)
