"""One raw sample to one pair ready to be packed.

The middle of the pipeline: choose a caption, tokenise, read the header, draw a size, decode to it,
cut into patches, drop some. Everything random about it follows from (seed, epoch, id).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from navit_clip.data.captions import choose_caption
from navit_clip.data.config import DataConfig
from navit_clip.data.decode import EncodedImage, find_image, patchify
from navit_clip.data.drop import keep_patches, sample_rate
from navit_clip.data.seeding import sample_generator
from navit_clip.data.shards import RawSample
from navit_clip.data.sizing import sample_grid
from navit_clip.data.tokenizer import Tokenizer
from navit_clip.packing import ImagePatches


@dataclass(frozen=True)
class Origin:
    """Where a sample was read, enough to read it again and get the same pair.

    Attributes:
        epoch: The reader's pass over the data.
        shard: Index of the shard in the sorted list.
        index: Index of the sample within its shard.
        images_seen: Images all readers had taken when it was drawn, for scheduled token drop.
    """

    epoch: int
    shard: int
    index: int
    images_seen: int


@dataclass(frozen=True)
class Pair:
    """One image and one caption, ready to be packed.

    Attributes:
        id: ``shard/key``.
        origin: Where it was read.
        image: Kept patches and the grid.
        token_ids: The caption.
    """

    id: str
    origin: Origin
    image: ImagePatches
    token_ids: list[int]

    @property
    def image_length(self) -> int:
        """Image tokens."""
        return len(self.image.patches)

    @property
    def text_length(self) -> int:
        """Text tokens."""
        return len(self.token_ids)


@dataclass(frozen=True)
class PairBuilder:
    """Builds pairs; the same one for the same sample and epoch, wherever it runs.

    Attributes:
        config: Caption weights, sizes and drop.
        tokenizer: Turns captions into ids.
        context_length: Most text tokens.
        patch_size: P.
        max_grid_side: Most rows or columns that the model's positions know.
        seed: Of the whole run.
    """

    config: DataConfig
    tokenizer: Tokenizer
    context_length: int
    patch_size: int
    max_grid_side: int
    seed: int

    def __call__(self, sample: RawSample, origin: Origin) -> Pair:
        """Builds one pair.

        Raises:
            SkipSampleError: If the sample has no usable image or caption.
        """
        rng = sample_generator(self.seed, origin.epoch, sample.id)
        caption = choose_caption(sample.members, self.config.captions, rng)
        image = EncodedImage(find_image(sample.members))
        rows, columns = grid = sample_grid(
            self.config.resolution,
            image.height,
            image.width,
            self.patch_size,
            self.max_grid_side,
            rng,
        )
        rate = sample_rate(self.config.drop, rows * columns, origin.images_seen, rng)
        keep = keep_patches(rows * columns, rate, rng)
        pixels = image.pixels(rows * self.patch_size, columns * self.patch_size)
        patches = patchify(pixels, self.patch_size)[keep]
        coords = np.stack(np.divmod(keep, columns), axis=1).astype(np.int32)
        token_ids = self.tokenizer.encode(caption, self.context_length)
        return Pair(sample.id, origin, ImagePatches(patches, coords, grid), token_ids)
