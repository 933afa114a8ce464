"""One raw sample to one image with hidden patches, and many of them to two packed streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.images import ImageBuilder, trim_places
from navit_clip.data.drop import DropConfig, hide_patches, sample_rate
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.seeding import sample_generator
from navit_clip.errors import SkipSampleError
from navit_clip.packed.images import ImagePatches
from navit_clip.packed.masked import MaskedInputs, pack_masked


@dataclass(frozen=True)
class MaskedSample:
    """One image and which of its patches are visible, ready to be packed; a `Sample`.

    Attributes:
        id: ``shard/key``.
        origin: Where it was read.
        image: All patches.
        visible: int64 [n], rising.
        seed: Of the run.
        full: The model computes all patches, in one stream.
    """

    id: str
    origin: Origin
    image: ImagePatches
    visible: np.ndarray
    seed: int
    full: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Visible patches, and all."""
        every = len(self.image.patches)
        return (every,) if self.full else (len(self.visible), every)

    @property
    def full_lengths(self) -> tuple[int, ...]:
        """All patches, in each stream."""
        return (len(self.image.patches),) * len(self.lengths)

    @property
    def bucket(self) -> tuple[()]:
        """All images may share a batch."""
        return ()

    def trimmed(self, tokens: int) -> MaskedSample:
        """The same with fewer visible patches."""
        kept = trim_places(len(self.visible), tokens, self.seed, self.origin, self.id)
        return replace(self, visible=self.visible[kept])


@dataclass(frozen=True)
class MaskedBuilder(ImageBuilder):
    """Builds images whose patches that `drop` leaves out are hidden, not lost.

    Attributes:
        full: The model computes all patches, in one stream, and has no decoder.
        shared: Images of one grid in a batch have the same patches hidden; of as many patches as
            many must be.
    """

    full: bool = False
    shared: bool = False

    @property
    def streams(self) -> tuple[str, ...]:
        """What the tower reads, and what the decoder reads."""
        return ("image",) if self.full else ("image", "decoder")

    def __call__(
        self, raw: RawSample, origin: Origin, fields: Mapping[str, float] | None = None
    ) -> MaskedSample:
        """Builds one image with hidden patches.

        Raises:
            SkipSampleError: If the sample has no usable image, or one of a single patch.
        """
        rng = sample_generator(self.seed, origin.epoch, raw.id)
        image = self.sample_image(raw.members, origin, rng, DropConfig())
        tokens = len(image.patches)
        if tokens < 2:
            raise SkipSampleError("one_patch", "the image has a single patch, none to predict")
        rate = sample_rate(self.drop, tokens, origin.images_seen, rng)
        visible = hide_patches(tokens, rate, rng)
        return MaskedSample(raw.id, origin, image, visible, self.seed, self.full)

    def collate(
        self, samples: Sequence[MaskedSample], pad_to: tuple[int, ...] | None
    ) -> MaskedInputs:
        """Packs visible patches and whole images into two streams, or into one."""
        images, visible = zip(*((one.image, one.visible) for one in samples), strict=True)
        if self.shared:
            first = dict[tuple[int, int], np.ndarray]()
            visible = tuple(first.setdefault(one.image.grid, one.visible) for one in samples)
        return pack_masked(images, visible, pad_to, full=self.full, planner=self.planner)
