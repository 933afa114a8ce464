"""One raw sample to one image–caption pair, and many pairs to two packed streams.

The middle of the pipeline: choose a caption, make the image (`images`), tokenise. Everything random
about it follows from (seed, epoch, id).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.images import ImageBuilder, trim_image
from navit_clip.data.captions import choose_caption
from navit_clip.data.drop import hide_patches
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.seeding import generator, sample_generator
from navit_clip.packed.batch import Inputs
from navit_clip.packed.images import ImagePatches, PackedImages, pack_images
from navit_clip.packed.masked import hidden_weights
from navit_clip.packed.texts import PackedTexts, pack_texts
from navit_clip.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Pair:
    """One image and one caption, ready to be packed; a `Sample`.

    Attributes:
        id: ``shard/key``.
        origin: Where it was read.
        image: Kept patches and the grid.
        token_ids: The caption.
        seed: Of the run.
    """

    id: str
    origin: Origin
    image: ImagePatches
    token_ids: list[int]
    seed: int

    @property
    def lengths(self) -> tuple[int, int]:
        """Image tokens after token drop, and text tokens."""
        return len(self.image.patches), len(self.token_ids)

    @property
    def full_lengths(self) -> tuple[int, int]:
        """Patches of the whole grid, and text tokens."""
        return self.image.tokens_before_drop, len(self.token_ids)

    @property
    def bucket(self) -> int:
        """The size of patches, of which a batch has one."""
        return self.image.patch_size

    def trimmed(self, tokens: int) -> Pair:
        """The pair with a random subset of its patches, in their order.

        A function of (seed, epoch, id) and `tokens`, as every choice about a sample is.
        """
        return replace(self, image=trim_image(self.image, tokens, self.seed, self.origin, self.id))


@dataclass(frozen=True)
class PairInputs(Inputs):
    """Many images and their captions, packed; the i-th image belongs to the i-th caption.

    Attributes:
        images: All images.
        texts: Their captions.
        hidden: float32 [T], above 0 at patches to be predicted, see `hidden_weights`; None if none
            are.
    """

    images: PackedImages
    texts: PackedTexts
    hidden: Tensor | None = None


@dataclass(frozen=True)
class PairBuilder(ImageBuilder):
    """Builds pairs; the same one for the same sample and epoch, wherever it runs.

    Attributes:
        captions: Weight of each caption field, for datasets without weights of their own.
        tokenizer: Turns captions into ids.
        context_length: Most text tokens.
        hide: Fraction of an image's kept patches to be predicted from the others; 0 hides none.
    """

    captions: Mapping[str, float]
    tokenizer: Tokenizer
    context_length: int
    hide: float = field(default=0.0, kw_only=True)

    @property
    def streams(self) -> tuple[str, str]:
        """Names of the two streams."""
        return "image", "text"

    def __call__(
        self, raw: RawSample, origin: Origin, fields: Mapping[str, float] | None = None
    ) -> Pair:
        """Builds one pair, with a caption of the fields given or of `captions`.

        Raises:
            SkipSampleError: If the sample has no usable image or caption.
        """
        rng = sample_generator(self.seed, origin.epoch, raw.id)
        caption = choose_caption(raw.members, fields or self.captions, rng)
        patches = self.sample_image(raw.members, origin, rng, self.drop)
        token_ids = self.tokenizer.encode(caption, self.context_length)
        return Pair(raw.id, origin, patches, token_ids, self.seed)

    def collate(self, samples: Sequence[Pair], pad_to: tuple[int, ...] | None) -> PairInputs:
        """Packs pairs into an image stream and a text stream."""
        image_budget, text_budget = pad_to or (None, None)
        images = pack_images(
            [pair.image for pair in samples], budget=image_budget, planner=self.planner
        )
        texts = pack_texts([pair.token_ids for pair in samples], budget=text_budget)
        hidden = hidden_weights(images, list(map(self._visible, samples))) if self.hide else None
        return PairInputs(images, texts, hidden)

    def _visible(self, pair: Pair) -> np.ndarray:
        """Which of a pair's patches are not hidden: a function of (seed, epoch, id)."""
        rng = generator(self.seed, pair.origin.epoch, "hide", pair.id)
        return hide_patches(len(pair.image.patches), self.hide, rng)
