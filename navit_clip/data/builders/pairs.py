"""One raw sample to one pair ready to be packed.

The middle of the pipeline: choose a caption, tokenise, read the header, draw a size, decode to it,
cut into patches, drop some. Everything random about it follows from (seed, epoch, id).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from navit_clip.data.captions import choose_caption
from navit_clip.data.config import DataConfig
from navit_clip.data.decode import EncodedImage, find_image, patchify
from navit_clip.data.drop import keep_patches, sample_rate
from navit_clip.data.seeding import generator, sample_generator
from navit_clip.data.shards import RawSample
from navit_clip.data.sizing import sample_grid
from navit_clip.packed.images import ImagePatches
from navit_clip.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Origin:
    """Where a sample was read, enough to read it again and get the same pair.

    Attributes:
        epoch: The reader's pass over the data.
        shard: Index of the shard in the sorted list.
        index: Index of the sample within its shard.
        images_seen: Images all readers had taken when it was drawn, for what follows a schedule.
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
        seed: Of the whole run.
    """

    id: str
    origin: Origin
    image: ImagePatches
    token_ids: list[int]
    seed: int

    @property
    def image_length(self) -> int:
        """Image tokens."""
        return len(self.image.patches)

    @property
    def text_length(self) -> int:
        """Text tokens."""
        return len(self.token_ids)

    def trimmed(self, tokens: int) -> Pair:
        """The pair with a random subset of its patches, in their order.

        A function of (seed, epoch, id) and `tokens`, as every choice about a sample is.

        Args:
            tokens: Patches to keep, at least 1.
        """
        rng = generator(self.seed, self.origin.epoch, "trim", self.id)
        keep = np.sort(rng.permutation(self.image_length)[:tokens])
        image = self.image
        image = replace(image, patches=image.patches[keep], coords=image.coords[keep])
        return replace(self, image=image)


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

    def __call__(
        self, sample: RawSample, origin: Origin, captions: Mapping[str, float] | None = None
    ) -> Pair:
        """Builds one pair.

        Args:
            sample: As the shard has it.
            origin: Where it was read.
            captions: Caption weights of its source; None takes those of the configuration.

        Raises:
            SkipSampleError: If the sample has no usable image or caption.
        """
        rng = sample_generator(self.seed, origin.epoch, sample.id)
        caption = choose_caption(sample.members, captions or self.config.captions, rng)
        image = EncodedImage(find_image(sample.members))
        rows, columns = grid = sample_grid(
            self.config.resolution,
            image.height,
            image.width,
            self.patch_size,
            self.max_grid_side,
            rng,
            origin.images_seen,
        )
        rate = sample_rate(self.config.drop, rows * columns, origin.images_seen, rng)
        keep = keep_patches(rows * columns, rate, rng)
        pixels = image.pixels(rows * self.patch_size, columns * self.patch_size)
        patches = patchify(pixels, self.patch_size, keep)
        coords = _grid_coords(rows, columns)[keep]
        token_ids = self.tokenizer.encode(caption, self.context_length)
        image_patches = ImagePatches(patches, coords, grid)
        return Pair(sample.id, origin, image_patches, token_ids, self.seed)


@lru_cache(maxsize=4096)
def _grid_coords(rows: int, columns: int) -> np.ndarray:
    """int32 [rows·columns, 2]: row and column of each patch of a grid."""
    return np.stack(np.divmod(np.arange(rows * columns), columns), axis=1).astype(np.int32)
