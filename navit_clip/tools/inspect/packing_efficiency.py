"""Packs batches of shards as a configuration would, and measures how full they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from navit_clip.data.builders.pairs import PairBuilder, PairInputs
from navit_clip.data.config import DataConfig
from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Mixture
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.packed.images import ImagePatches, PackedImages
from navit_clip.tokenizers.base import Tokenizer

MAX_BATCHES = 32  # enough for means; a whole epoch would decode everything twice


@dataclass(frozen=True)
class UnpackedPair:
    """One pair of a batch, taken out of it again.

    Attributes:
        id: ``shard/key``.
        image: Kept patches and the grid.
        caption: The text that was tokenised.
        text_tokens: Tokens it became.
        segments: Number of its segment in each packed stream.
    """

    id: str
    image: ImagePatches
    caption: str
    text_tokens: int
    segments: dict[str, int]

    @property
    def image_tokens(self) -> int:
        """Kept patches."""
        return len(self.image.patches)


@dataclass(frozen=True)
class PackingEfficiency:
    """How full batches are.

    Attributes:
        batches: Counts of each batch.
        lengths: Tokens of the first batch's segments in each stream, in the stream's order.
        pairs: The first batch's pairs, in the order of the image stream.
    """

    batches: list[BatchCounts]
    lengths: dict[str, tuple[int, ...]]
    pairs: list[UnpackedPair]

    @property
    def pairs_per_batch(self) -> np.ndarray:
        """int64 [batches]."""
        return np.array([counts.examples for counts in self.batches])

    @property
    def pairs_cv(self) -> float:
        """Coefficient of variation of pairs per batch."""
        return float(self.pairs_per_batch.std() / self.pairs_per_batch.mean())

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

    def padding(self, stream: str) -> float:
        """Unused fraction of the token budget."""
        return 1 - self.tokens(stream) / self.budget(stream)


def measure_packing(
    mixture: Mixture, build: PairBuilder, config: DataConfig, pairs: int
) -> PackingEfficiency:
    """Packs one epoch of the shards, or as much of it as fills `MAX_BATCHES`.

    Args:
        mixture: The shards; at least one of their samples must be usable.
        build: Makes pairs.
        config: How they are packed.
        pairs: Pairs of one epoch. A batch that holds more has some of them twice.

    Raises:
        UserError: If the shards cannot be read.
    """
    remembering = _RememberingTokenizer(build.tokenizer)
    batches: list[BatchCounts] = []
    first: Batch[PairInputs] | None = None
    taken = 0
    # Efficiency does not depend on who reads, and one process keeps one tokenizer.
    stream = load_batches(
        replace(build, tokenizer=remembering),
        replace(config, workers=0),
        build.seed,
        mixture=mixture,
    )
    with tqdm(desc="packing", unit="batch") as bar:
        while taken < pairs and len(batches) < MAX_BATCHES:
            batch = next(stream)
            first = first or batch
            batches.append(batch.counts)
            taken += batch.counts.examples
            bar.update()
    assert first is not None
    streams = {"image": first.inputs.images.segments, "text": first.inputs.texts.segments}
    lengths = {name: packed.lengths[: packed.num_examples] for name, packed in streams.items()}
    return PackingEfficiency(batches, lengths, _unpack(first, remembering.texts))


class _RememberingTokenizer(Tokenizer):
    """A tokenizer that keeps the texts of what it encoded, which a packed batch does not hold."""

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
    parts = zip(
        packed.patches.split(lengths), packed.coords.split(lengths), packed.grids, strict=True
    )
    images = [
        ImagePatches(patches.numpy(), coords.numpy(), (int(grid[0]), int(grid[1])))
        for patches, coords, grid in parts
    ]
    return images[: packed.segments.num_examples]


def _unpack(batch: Batch[PairInputs], texts: dict[tuple[int, ...], str]) -> list[UnpackedPair]:
    packed = batch.inputs
    images = unpack_images(packed.images)
    captions = [ids.tolist() for ids in packed.texts.token_ids.split(packed.texts.segments.lengths)]
    pairs = []
    for i, name in enumerate(batch.ids):
        segments = {"image": int(packed.images.order[i]), "text": int(packed.texts.order[i])}
        ids = captions[segments["text"]]
        image = images[segments["image"]]
        pairs.append(UnpackedPair(name, image, texts[tuple(ids)], len(ids), segments))
    return sorted(pairs, key=lambda pair: pair.segments["image"])
