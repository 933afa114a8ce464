"""One raw sample to one labelled image, and many of them to a packed stream with ragged labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.images import ImageBuilder, trim_image
from navit_clip.data.drop import DropConfig, keep_patches, sample_rate
from navit_clip.data.labels import LabelReader
from navit_clip.data.mixup import mix, partners
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.seeding import generator, sample_generator
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
        whole: uint8 [rows·columns, P·P·3] all patches, if images are mixed.
    """

    id: str
    origin: Origin
    image: ImagePatches
    labels: np.ndarray
    seed: int
    whole: np.ndarray | None = None

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
        labels: int64 class indices; of a mixed image those of both, each perhaps in both.
        weights: float32, the fraction of its image that each label is of; None if none is mixed.
    """

    images: PackedImages
    labels: Ragged
    weights: Tensor | None = None


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
        if not self.augment.mixes:
            image = self.sample_image(raw.members, origin, rng, self.drop)
            return LabelledImage(raw.id, origin, image, labels, self.seed)
        image = self.sample_image(raw.members, origin, rng, DropConfig())
        tokens, whole = len(image.patches), image.patches
        keep = keep_patches(tokens, sample_rate(self.drop, tokens, origin.images_seen, rng), rng)
        return LabelledImage(raw.id, origin, image.kept(keep), labels, self.seed, whole)

    def collate(
        self, samples: Sequence[LabelledImage], pad_to: tuple[int, ...] | None
    ) -> LabelledInputs:
        """Packs images into one stream, mixed if so configured."""
        images = [one.image for one in samples]
        labels = [one.labels for one in samples]
        weights = None
        if self.augment.mixes:
            images, labels, weights = self._mixed(samples)
        packed = pack_images(images, budget=pad_to[0] if pad_to else None, planner=self.planner)
        return LabelledInputs(packed, Ragged.from_arrays(labels), weights)

    def _mixed(
        self, samples: Sequence[LabelledImage]
    ) -> tuple[list[ImagePatches], list[np.ndarray], Tensor]:
        """Images, their labels, and weights of the labels; a function of seed, epochs and ids."""
        images, labels, weights = [], [], []
        for one, index in zip(samples, partners([one.image.grid for one in samples]), strict=True):
            other, image, own = samples[index], one.image, 1.0
            if other is not one:
                assert other.whole is not None
                rng = generator(self.seed, one.origin.epoch, "mix", one.id)
                image, own = mix(self.augment, one.image, other.whole, rng)
            images.append(image)
            labels.append(np.concatenate([one.labels, other.labels]))
            weights += [own] * len(one.labels) + [1 - own] * len(other.labels)
        return images, labels, torch.tensor(weights, dtype=torch.float32)
