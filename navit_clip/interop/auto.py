"""An exported CLIP as transformers' `AutoModel` and sentence-transformers load it.

The file ``modeling_navit_clip.py`` of an export (`navit_clip.export.pretrained`) imports these
classes; both libraries run it where they are told ``trust_remote_code=True``. The model is
`NaViTCLIP` either way: images of any size and texts are packed, and vectors are the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig

from navit_clip.data.decode import IMAGE_EXTENSIONS
from navit_clip.errors import UserError
from navit_clip.inference.images import size_images
from navit_clip.model import NaViTCLIP
from navit_clip.packed.images import pack_images
from navit_clip.packed.texts import pack_texts

if TYPE_CHECKING:
    from typing_extensions import Self

_IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_DOWNLOAD = {"revision", "token", "cache_dir", "force_download", "local_files_only"}
# What `AutoModel` passes on to any class, and what means nothing to packed towers.
_IGNORED = {"config", "trust_remote_code", "adapter_kwargs", "attn_implementation"}


class NaViTCLIPConfig(PretrainedConfig):
    """The values of ``config.json``, as transformers carries them; the model reads the file."""

    model_type = "navit_clip"


class NaViTCLIPModel(NaViTCLIP):
    """`NaViTCLIP`, loaded with the options of transformers."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """`AutoModel` calls it; what is saved says already how it is loaded."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        directory_or_repo: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """`NaViTCLIP.from_pretrained`, which `AutoModel.from_pretrained` calls.

        Args:
            directory_or_repo: As there.
            dtype: Of the parameters; None or ``auto`` is float32, as they are stored.
            device_map: The device of the whole model.
            options: As there, and those of `AutoModel`.

        Raises:
            UserError: If the model cannot be loaded, or an option is not known.
        """
        options = {name: value for name, value in options.items() if name not in _IGNORED}
        if unknown := options.keys() - _DOWNLOAD:
            raise UserError(f"NaViTCLIP knows no option {sorted(unknown)[0]}: leave it out")
        model = super().from_pretrained(directory_or_repo, device=device_map or "cpu", **options)
        if dtype not in (None, "auto"):
            model.to(dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype)))
        return model


class NaViTCLIPModule(nn.Module):
    """A `NaViTCLIP` as the one module of a `SentenceTransformer`, of texts and of images.

    Args:
        model: With tokenizer and preprocessing.

    Attributes:
        modalities: What `preprocess` takes.
        save_in_root: The files of `save` lie in the folder itself.
    """

    modalities = ("text", "image")
    save_in_root = True

    def __init__(self, model: NaViTCLIP) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **_: Any,
    ) -> Self:
        """The module of an export; called with more than it needs.

        Raises:
            UserError: If there is no such model, or its files are damaged.
        """
        return cls(
            NaViTCLIP.from_pretrained(
                model_name_or_path,
                token=token,
                cache_dir=cache_folder,
                revision=revision,
                local_files_only=local_files_only,
            )
        )

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Writes the export again.

        Raises:
            UserError: If the disk does not take it.
        """
        self.model.save_pretrained(output_path)

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """Texts or images, packed, for `forward`.

        Args:
            inputs: Texts alone; or images alone, as `NaViTCLIP.encode_image` takes them. A text
                that is the path of an image file is that image.
            prompt: Put before each text.

        Raises:
            ValueError: If something is neither, or cannot be read; names its index.
        """
        model = self.model
        if isinstance(inputs[0], str) and not _is_image_file(inputs[0]):
            assert model.tokenizer is not None
            context = model.config.text.context_length
            texts = [(prompt or "") + text for text in inputs]
            ids = [model.tokenizer.encode(text, context) for text in texts]
            return {"texts": pack_texts(ids)}
        sized = size_images(inputs, model.config.image, model.preprocess, None, model.max_pixels)
        return {"images": pack_images(list(sized))}

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds ``sentence_embedding``, unit vectors [E, D]."""
        model = self.model
        embed: dict[str, Any] = {"texts": model.embed_texts, "images": model.embed_images}
        ((name, packed),) = features.items()
        with model._autocast():
            return {**features, "sentence_embedding": embed[name](packed.to(model.device))}

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.model.config.embed_dim


def _is_image_file(text: str) -> bool:
    return text.lower().endswith(_IMAGE_SUFFIXES) and os.path.isfile(text)
