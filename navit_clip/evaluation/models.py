"""Models as the evaluators see them: they size images and embed them and captions.

`PackedModel` and `PackedClassifier` are ours, in memory or exported;
`navit_clip.evaluation.baselines` holds others to compare with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from navit_clip.classifier import NaViTClassifier
from navit_clip.data.decode import EncodedImage
from navit_clip.errors import UserError
from navit_clip.evaluation.cache import tensors_digest
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.inference.embed import (
    feature_vectors,
    image_vectors,
    size_image,
    text_vectors,
)
from navit_clip.load import AnyModel
from navit_clip.masked_image import NaViTMaskedImage
from navit_clip.model import NaViTCLIP
from navit_clip.models.flops import image_flops
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.packed.images import ImagePatches, PackedImages
from navit_clip.precision import Precision, autocast
from navit_clip.tokenizers.base import Tokenizer

Sizer = Callable[[EncodedImage, EvalSetting], Any]

Around = Callable[[], AbstractContextManager[object]]


class Model(ABC):
    """A model under evaluation.

    Attributes:
        name: For tables and results.
        own_setting: The setting that it is meant for, of its headline metrics.
        sizer: Makes of an image at a setting what `embed_images` takes; light and picklable, for
            worker processes. Raises `SkipSampleError` if the pixels cannot be decoded.
        precision: Of its forward passes; similarities and metrics are float32 in any case.
        padding_tokens: Tokens of padding that `embed_images` has computed so far.
        reads_texts: Whether it has `embed_texts` and `scale`.
        around: A context for each of its forward passes, and for steps of what is fitted to them.
    """

    name: str
    own_setting: EvalSetting
    sizer: Sizer
    precision: Precision
    padding_tokens: int = 0
    reads_texts: bool = True
    around: Around = staticmethod(nullcontext)

    @abstractmethod
    def check(self, setting: EvalSetting) -> None:
        """Refuses a setting that is impossible for the model.

        Raises:
            UserError: If it is; names the option.
        """

    def set_patch_size(self, size: int) -> None:
        """Has images cut into patches of another size, if the model reads such.

        Raises:
            UserError: If it does not.
        """
        raise UserError(f"--patch-size: {self.name} has one size of patches: leave it out")

    @abstractmethod
    def length(self, sized: Any) -> int:
        """Tokens of a sized image."""

    @abstractmethod
    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Sized images of one setting to float32 [E, D] on the host, in order.

        Unit vectors of a model that reads texts; what its head reads of a classifier.
        """

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions to float32 [T, D] unit vectors on the host, in order."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """The factor on cosine similarities that makes logits."""

    @abstractmethod
    def image_flops(self, tokens: int) -> int:
        """Forward FLOPs of the image side for an image of so many tokens."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that embeddings depend on but the image or text and the setting."""


def _size(
    config: ImageTowerConfig, square: bool, image: EncodedImage, setting: EvalSetting
) -> ImagePatches:
    """Patches of an image; `square` makes squares of token limits, for models trained so."""
    if setting.side is not None:
        tokens = (setting.side // config.patch_size) ** 2
        return size_image(image, config, tokens, square=True)
    if setting.max_tokens is None:
        return size_image(image, config, config.position.max_grid_side**2)
    return size_image(image, config, setting.max_tokens, square=square)


AnyPacked = TypeVar("AnyPacked", NaViTCLIP, NaViTClassifier, NaViTMaskedImage)


class _Packed(Model, Generic[AnyPacked]):
    """What our models have in common.

    Args:
        model: With its preprocessing.
        name: For tables and results.
        precision: Of forward passes.
        around: A context for each of them.

    Attributes:
        model: As given.
        preprocess: Of the model.
    """

    def __init__(
        self,
        model: AnyPacked,
        name: str,
        precision: Precision = "fp32",
        around: Around = nullcontext,
    ) -> None:
        assert model.preprocess is not None
        self.model: AnyPacked = model
        self._tower: nn.Module = model.image
        self._device, self.preprocess = model.device, model.preprocess
        self.name, self.precision, self.around = name, precision, around
        self._set_image(model.config.image)

    def _set_image(self, image: ImageTowerConfig) -> None:
        self._image = image
        tokens = self.preprocess.tokens_at(image.patch_size / self.model.config.image.patch_size)
        self.own_setting = EvalSetting("capped", tokens)
        self.sizer = partial(_size, image, self.preprocess.square)

    def set_patch_size(self, size: int) -> None:
        """Resizes the model's kernel to it; its own setting then covers the same area."""
        try:
            self._set_image(self._image.with_patch_size(size))
        except ValueError as error:
            raise UserError(f"--patch-size {size}: {error}") from error
        self.name += f" in patches of {size} px"

    def check(self, setting: EvalSetting) -> None:
        """Squares must be whole patches within the position table."""
        side, config = setting.side, self._image
        if side is None:
            return
        patch, most = config.patch_size, config.position.max_grid_side
        if side % patch:
            nearest = max(1, round(side / patch)) * patch
            raise UserError(
                f"--square {side} is no whole number of patches of {patch} pixels for "
                f"{self.name}: use {nearest}"
            )
        if side > patch * most:
            raise UserError(
                f"--square {side} is past the {patch * most} pixels of the position table of "
                f"{self.name}"
            )

    @property
    def patch_size(self) -> int:
        """Side in pixels of the patches that images are cut into."""
        return self._image.patch_size

    def length(self, sized: ImagePatches) -> int:
        """Patches of a sized image."""
        return len(sized.patches)

    def embed_images(self, images: Sequence[ImagePatches]) -> Tensor:
        """In packed streams."""
        # Counted where the tower sees it: how streams are made is not this module's business.
        with self._tower.register_forward_pre_hook(self._count), self._running():
            return self._embed(images)

    @abstractmethod
    def _embed(self, images: Sequence[ImagePatches]) -> Tensor: ...

    def _count(self, tower: nn.Module, inputs: tuple[PackedImages, ...]) -> None:
        self.padding_tokens += inputs[0].segments.padding

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self.around(), autocast(self.precision, self._device):
            yield


class PackedModel(_Packed[NaViTCLIP]):
    """A CLIP of this library; arguments as of `_Packed`."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    def _embed(self, images: Sequence[ImagePatches]) -> Tensor:
        return image_vectors(self.model, images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """In packed streams."""
        with self._running():
            return text_vectors(self.model, self.tokenizer, texts)

    @property
    def scale(self) -> float:
        """The learned scale."""
        return self.model.log_scale.exp().item()

    def image_flops(self, tokens: int) -> int:
        """By `navit_clip.models.flops`."""
        return image_flops(self._image, self.model.config.embed_dim, tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Of weights, configuration, tokenizer and precision, and the device, which rounds."""
        files = [f"{name} {content!r}" for name, content in sorted(self.tokenizer.files().items())]
        return tensors_digest(
            self.model.state_dict(),
            repr(self.model.config),
            repr(self._image.patch_size),
            repr(self.preprocess),
            self.model.device.type,
            self.precision,
            *files,
        )


class PackedTower(_Packed[AnyPacked]):
    """A model of this library without texts, as its image tower; arguments as of `_Packed`."""

    reads_texts = False

    def _embed(self, images: Sequence[ImagePatches]) -> Tensor:
        return feature_vectors(self.model.image, images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """There are none."""
        return torch.zeros(len(texts), 0)

    @property
    def scale(self) -> float:
        """Logits are products as they are."""
        return 1.0

    def image_flops(self, tokens: int) -> int:
        """By `navit_clip.models.flops`."""
        return image_flops(self._image, 0, tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Of the tower: a head reads what is kept."""
        return tensors_digest(
            self.model.image.state_dict(),
            repr(self._image),
            repr(self.preprocess),
            self._device.type,
            self.precision,
        )


class PackedClassifier(PackedTower[NaViTClassifier]):
    """A classifier of this library, which evaluators see before its head; as `_Packed`."""

    def image_flops(self, tokens: int) -> int:
        """By `navit_clip.models.flops`, head included."""
        return image_flops(self._image, len(self.model.classes), tokens)


class PackedMaskedImage(PackedTower[NaViTMaskedImage]):
    """A masked image model of this library, which evaluators see as its tower; as `_Packed`."""


def packed_model(
    model: AnyModel,
    name: str,
    precision: Precision,
    around: Around = nullcontext,
) -> PackedModel | PackedTower:
    """One of ours as evaluators see it, whichever it is."""
    if isinstance(model, NaViTCLIP):
        return PackedModel(model, name, precision, around)
    if isinstance(model, NaViTClassifier):
        return PackedClassifier(model, name, precision, around)
    return PackedMaskedImage(model, name, precision, around)
