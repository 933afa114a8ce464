"""One raw sample to one labelled image, and many of them to a packed stream with ragged labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.images import ImageBuilder, trim_image
from navit_clip.data.labels import LabelReader
from navit_clip.data.seeding import sample_generator
from navit_clip.data.shards import RawSample
from navit_clip.packed.batch import Inputs
from navit_clip.packed.images import ImagePatches, PackedImages, pack_images
from navit_clip.packed.ragged import Ragged


@dataclass(frozen=True)
class LabelledImage:
    """One image and the indices of its classes, ready to be packed; a `Sample`.

    Attributes:
        id: ``shard/key``.
        origin: Where it was read.
        image: Kept patches and the grid.
        labels: int64, rising.
        seed: Of the run.
    """

    id: str
    origin: Origin
    image: ImagePatches
    labels: np.ndarray
    seed: int

    @property
    def lengths(self) -> tuple[int]:
        """Image tokens after token drop."""
        return (len(self.image.patches),)

    @property
    def full_lengths(self) -> tuple[int]:
        """Patches of the whole grid."""
        return (self.image.tokens_before_drop,)

    @property
    def bucket(self) -> int:
        """The size of patches, of which a batch has one."""
        return self.image.patch_size

    def trimmed(self, tokens: int) -> LabelledImage:
        """The same with a random subset of its patches."""
        return replace(self, image=trim_image(self.image, tokens, self.seed, self.origin, self.id))


@dataclass(frozen=True)
class LabelledInputs(Inputs):
    """Many images, packed, and the labels of each in the order in which the images came.

    Attributes:
        images: All images.
        labels: int64 class indices.
    """

    images: PackedImages
    labels: Ragged


@dataclass(frozen=True)
class LabelledBuilder(ImageBuilder):
    """Builds labelled images; the same one for the same sample and epoch, wherever it runs.

    Attributes:
        labels: Reads the labels.
    """

    labels: LabelReader

    @property
    def streams(self) -> tuple[str]:
        """Name of the one stream."""
        return ("image",)

    def __call__(
        self, raw: RawSample, origin: Origin, fields: Mapping[str, float] | None = None
    ) -> LabelledImage:
        """Builds one labelled image.

        Raises:
            SkipSampleError: If the sample has no usable image or label.
        """
        labels = self.labels(raw.members)
        rng = sample_generator(self.seed, origin.epoch, raw.id)
        image = self.sample_image(raw.members, origin, rng, self.drop)
        return LabelledImage(raw.id, origin, image, labels, self.seed)

    def collate(
        self, samples: Sequence[LabelledImage], pad_to: tuple[int, ...] | None
    ) -> LabelledInputs:
        """Packs images into one stream."""
        return LabelledInputs(
            pack_images([one.image for one in samples], budget=pad_to[0] if pad_to else None),
            Ragged.from_arrays([one.labels for one in samples]),
        )
