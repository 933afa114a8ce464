"""Models as the evaluators see them: they size images and embed them and captions.

`PackedModel` is one of ours, in memory or exported; `navit_clip.evaluation.baselines` holds others
to compare with.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from navit_clip.data.decode import EncodedImage
from navit_clip.errors import UserError
from navit_clip.evaluation.cache import tensors_digest
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.inference.embed import image_vectors, size_image, text_vectors
from navit_clip.model import NaViTCLIP
from navit_clip.models.flops import image_flops
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.packed.images import ImagePatches, PackedImages

Sizer = Callable[[EncodedImage, EvalSetting], Any]


class Model(ABC):
    """A model under evaluation.

    Attributes:
        name: For tables and results.
        own_setting: The setting that it is meant for, of its headline figures.
    """

    name: str
    own_setting: EvalSetting

    @property
    @abstractmethod
    def sizer(self) -> Sizer:
        """`size` by itself, light and picklable, for worker processes.

        Raises:
            SkipSampleError: When called, if the pixels cannot be decoded.
        """

    def size(self, image: EncodedImage, setting: EvalSetting) -> Any:
        """What the model embeds of an image at a setting."""
        return self.sizer(image, setting)

    @abstractmethod
    def check(self, setting: EvalSetting) -> None:
        """Refuses a setting that the model cannot see.

        Raises:
            UserError: If so, naming the option.
        """

    @abstractmethod
    def length(self, sized: Any) -> int:
        """Tokens of a sized image."""

    @abstractmethod
    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Sized images of one setting to float32 [E, D] unit vectors on the host, in order."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions to float32 [T, D] unit vectors on the host, in order."""

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """D, width of the shared space."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """The factor on cosine similarities that makes logits."""

    @abstractmethod
    def image_flops(self, tokens: int) -> int:
        """Forward FLOPs of the image side for an image of so many tokens."""

    @property
    @abstractmethod
    def padding_tokens(self) -> int:
        """Tokens of padding that `embed_images` has computed so far, beside the images' own."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that embeddings depend on but the image or text and the setting."""


@dataclass(frozen=True)
class PackedSizer:
    """Sizes images for a packed tower.

    Attributes:
        config: Of the tower.
        square: Capped settings are squares of at most so many tokens, for models trained so.
    """

    config: ImageTowerConfig
    square: bool

    def __call__(self, image: EncodedImage, setting: EvalSetting) -> ImagePatches:
        """Patches of one image at one setting."""
        most = self.config.position.max_grid_side
        if setting.kind == "native":
            return size_image(image, self.config, most**2)
        if setting.kind == "square":
            assert setting.size is not None
            tokens = (setting.size // self.config.patch_size) ** 2
            return size_image(image, self.config, tokens, square=True)
        assert setting.size is not None
        return size_image(image, self.config, setting.size, square=self.square)


class PackedModel(Model):
    """A model of this library.

    Args:
        model: With its tokenizer and preprocessing.
        name: For tables and results.
        around: A context for each call of a tower, autocast for one; similarities and metrics stay
            in float32.
    """

    def __init__(
        self,
        model: NaViTCLIP,
        name: str,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        assert model.tokenizer is not None
        assert model.preprocess is not None
        self.model, self.name, self._around = model, name, around
        self.tokenizer, self.preprocess = model.tokenizer, model.preprocess
        self.own_setting = EvalSetting("capped", self.preprocess.max_tokens)
        self._padding_tokens = 0

    @property
    def sizer(self) -> PackedSizer:
        """Sizes images in worker processes."""
        return PackedSizer(self.model.config.image, self.preprocess.square)

    def check(self, setting: EvalSetting) -> None:
        """Squares must be whole patches that the positions know."""
        if setting.kind != "square":
            return
        assert setting.size is not None
        config = self.model.config.image
        patch, most = config.patch_size, config.position.max_grid_side
        if setting.size % patch:
            nearest = max(1, round(setting.size / patch)) * patch
            raise UserError(
                f"--square {setting.size} is no whole number of patches of {patch} pixels for "
                f"{self.name}: use {nearest}"
            )
        if setting.size > patch * most:
            raise UserError(
                f"--square {setting.size} is past the {patch * most} pixels whose positions "
                f"{self.name} knows"
            )

    def length(self, sized: ImagePatches) -> int:
        """Patches of a sized image."""
        return len(sized.patches)

    def embed_images(self, images: Sequence[ImagePatches]) -> Tensor:
        """Packed by token budget."""
        # Counted where the tower sees it: how streams are made is not this module's business.
        with self.model.image.register_forward_pre_hook(self._count), self._around():
            return image_vectors(self.model, images)

    def _count(self, tower: nn.Module, inputs: tuple[PackedImages, ...]) -> None:
        self._padding_tokens += inputs[0].segments.padding

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Packed by token budget."""
        with self._around():
            return text_vectors(self.model, self.tokenizer, texts)

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.model.config.embed_dim

    @property
    def scale(self) -> float:
        """The learned scale."""
        return self.model.log_scale.exp().item()

    def image_flops(self, tokens: int) -> int:
        """By `navit_clip.models.flops`."""
        config = self.model.config
        return image_flops(config.image, config.embed_dim, tokens)

    @property
    def padding_tokens(self) -> int:
        """Unused tokens at the ends of the streams."""
        return self._padding_tokens

    @cached_property
    def fingerprint(self) -> str:
        """Of weights, configuration and tokenizer, and of the device: CUDA rounds otherwise."""
        model = self.model
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save(Path(folder))
            files = [
                f"{file.name} {file.read_bytes()!r}" for file in sorted(Path(folder).iterdir())
            ]
        return tensors_digest(
            model.state_dict(),
            repr(model.config),
            repr(self.preprocess),
            model.device.type,
            *files,
        )
