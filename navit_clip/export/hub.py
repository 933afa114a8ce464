"""Loading and saving a model as its users do: a directory, or a repository of the Hub.

`navit_clip.model.NaViTCLIP`, `navit_clip.classifier.NaViTClassifier` and
`navit_clip.masked_image.NaViTMaskedImage` are each a `PretrainedModel` beside the bare model that
the trainer trains.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor

from navit_clip.data.image_header import MAX_PIXELS
from navit_clip.data.in_memory import ImageInput
from navit_clip.errors import UserError
from navit_clip.export.description import BareModel, Description
from navit_clip.export.pretrained import find_directory, load_pretrained, save_pretrained
from navit_clip.files import one_line
from navit_clip.inference.embed import feature_vectors
from navit_clip.inference.images import size_images
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.image_tower import ImageTower
from navit_clip.precision import PrecisionChoice, autocast, choose_precision
from navit_clip.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self


class PretrainedModel(ModelHubMixin):
    """A trained model with what it needs beside its weights; a base beside that of the bare model.

    Its methods for images and texts work without gradients and on the model's device; results are
    float32 on the host. Put the model into ``eval()``.

    Attributes:
        kind: Of `Description`.
        needed: Attributes without which a model is not saved.
        image: The tower.
        tokenizer: Of a model that reads texts; None for one that will get none.
        preprocess: How the model wants its images; None for one that will get none.
        classes: Names of a classifier's classes, by index.
        precision: Of those methods: ``auto`` is ``bf16`` on CUDA and ``fp32`` on a CPU, and leaves
            an autocast of the caller's as it is.
        max_pixels: Encoded images of more pixels are refused, before they take memory.
    """

    kind: ClassVar[str]
    needed: ClassVar[tuple[str, ...]] = ("preprocess",)
    image: ImageTower
    tokenizer: Tokenizer | None = None
    preprocess: Preprocess | None
    classes: tuple[str, ...] = ()
    precision: PrecisionChoice = "auto"
    max_pixels: int = MAX_PIXELS

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the parameters live."""

    @classmethod
    @abstractmethod
    def from_description(cls, description: Description, tokenizer: Tokenizer | None) -> Self:
        """A model of the class's own kind, with random weights."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        directory_or_repo: str | Path,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """A trained model with all that belongs to it, in evaluation mode.

        Args:
            directory_or_repo: An exported model, such as ``RUN_DIR/model``; or a repository of the
                Hub, such as ``name/model``, where there is no such directory.
            device: Where the model goes.
            revision: Branch, tag or commit of a repository; None for its main branch.
            token: For a private repository; None for the one of ``hf auth login``.
            cache_dir: Where downloads are kept; None for huggingface_hub's own place.
            force_download: Download again what is in the cache.
            local_files_only: Take a repository from the cache, without the network.

        Raises:
            UserError: If there is no such model, it cannot be had, or its files are damaged.
        """
        # Not the mixin's own: it reads config.json as arguments of the class, which ours are not,
        # and what it raises about a damaged one is several lines.
        directory = find_directory(
            directory_or_repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        return cls.from_directory(directory, device)

    @classmethod
    def from_directory(cls, directory: Path, device: torch.device | str = "cpu") -> Self:
        """`from_pretrained` of a directory alone, which never asks the network.

        Raises:
            UserError: If there is no model, its files are damaged, or it is of another kind.
        """

        def build(description: Description, tokenizer: Tokenizer | None) -> Any:
            if description.kind != cls.kind:
                raise UserError(
                    f"{directory} holds a {description.kind}, {cls.__name__} loads a {cls.kind}"
                )
            return cls.from_description(description, tokenizer)

        model: Self = load_pretrained(directory, build).to(device).eval()
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        config: Any = None,
        model_card_kwargs: Any = None,
        **push_options: Any,
    ) -> str | None:
        """Writes the model's directory: configuration, weights, tokenizer and a model card.

        Args:
            save_directory: Made if need be. A card that is there already stays.
            push_to_hub: Upload it too.
            repo_id: Where to; by default called as the directory.
            config: Of the mixin's `push_to_hub`, like the next; our own replace both.
            model_card_kwargs: Likewise.
            push_options: Of `push_to_hub`.

        Returns:
            The address of the commit, if it was uploaded.

        Raises:
            TypeError: If there are options of an upload without one.
            UserError: If the model lacks something `needed`, the disk does not take it, or the Hub
                cannot be reached or refuses.
        """
        if push_options and not push_to_hub:
            raise TypeError(f"without push_to_hub=True there is no {', '.join(push_options)}")
        # Not the mixin's own: it removes the old config.json before it knows that a new one fits.
        for name in self.needed:
            if getattr(self, name) is None:
                raise UserError(f"this model has no {name} to save: set model.{name} first")
        bare, preprocess = cast(BareModel, self), cast(Preprocess, self.preprocess)
        save_pretrained(Path(save_directory), bare, self.tokenizer, preprocess, self.classes)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or Path(save_directory).name, **push_options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what `save_pretrained` writes, with huggingface_hub's own method and options.

        Args:
            repo_id: Such as ``name/model``.
            options: Of `huggingface_hub.ModelHubMixin.push_to_hub`.

        Returns:
            The address of the commit.

        Raises:
            UserError: If the model cannot be saved, or the Hub cannot be reached or refuses.
        """
        hint = "; save_pretrained writes the same files without the network"
        with one_line(f"cannot push {repo_id}", hint=hint):
            address: str = super().push_to_hub(repo_id, **options)
        return address

    def features(
        self,
        images: Iterable[ImageInput],
        max_tokens: int | None = None,
        patch_size: int | None = None,
    ) -> Tensor:
        """The image tower's pooled vectors, which a head reads, for a classifier of your own.

        Args:
            images: Paths, Pillow images, arrays, tensors or bytes, as `size_images` takes them.
            max_tokens: Most patches of one image; None for the model's own limit.
            patch_size: Side of a patch in pixels, as in `NaViTCLIP.encode_image`.

        Returns:
            float32 [E, C] on the host, in the order of `images`.

        Raises:
            ValueError: If something is no image or cannot be read; names its index.
            UserError: If the model has no limit of its own and none is given.
        """
        sized = size_images(
            images, self.image.config, self.preprocess, max_tokens, self.max_pixels, patch_size
        )
        with self._autocast():
            return feature_vectors(self.image, sized)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "auto" and torch.is_autocast_enabled(self.device.type):
            return nullcontext()
        return autocast(choose_precision(self.precision, self.device), self.device)
