"""A model as a directory or a repository on the Hugging Face Hub: load, save, push.

A part of `NaViTCLIP`; the files themselves are `navit_clip.export.pretrained`'s. Only the name of
a repository makes it ask the network; a directory never does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import ModelHubMixin

from navit_clip.errors import UserError
from navit_clip.export.card import LIBRARY, TAGS, TASK

if TYPE_CHECKING:
    from typing_extensions import Self

    from navit_clip.models.clip import NaViTCLIP

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class HubMixin(ModelHubMixin, library_name=LIBRARY, pipeline_tag=TASK, tags=list(TAGS)):
    """Loading, saving and ``push_to_hub``, which is huggingface_hub's own."""

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
        """A trained model with its tokenizer and preprocessing, in evaluation mode.

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
        return cls._from_pretrained(
            model_id=str(directory_or_repo),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            device=device,
        )

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, device: torch.device | str = "cpu", **download: Any
    ) -> Self:
        from navit_clip.export.pretrained import load_pretrained

        directory = Path(model_id)
        if not directory.is_dir() and _REPOSITORY.fullmatch(model_id):
            directory = _download(model_id, **download)
        return cast("Self", load_pretrained(directory, device).model)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Writes the model's directory: configuration, weights, tokenizer and a model card.

        Args:
            save_directory: Made if need be. A card that is there already stays.
            _: What the mixin's ``push_to_hub`` passes about its own configuration and card, which
                ours replace.

        Raises:
            UserError: If the model has no tokenizer or preprocess, or the disk does not take it.
        """
        # Not the mixin's own: it removes the old config.json before it knows that a new one fits.
        self._save_pretrained(Path(save_directory))

    def _save_pretrained(self, save_directory: Path) -> None:
        from navit_clip.export.pretrained import save_pretrained

        model = cast("NaViTCLIP", self)
        for name in ("tokenizer", "preprocess"):
            if getattr(model, name) is None:
                raise UserError(f"this model has no {name} to save: set model.{name} first")
        assert model.tokenizer is not None
        assert model.preprocess is not None
        save_pretrained(save_directory, model, model.tokenizer, model.preprocess)


def _download(repository: str, **options: Any) -> Path:
    """The directory of a repository's files in the cache.

    Raises:
        UserError: If it cannot be had.
    """
    from huggingface_hub import snapshot_download

    from navit_clip.export.pretrained import MODEL_FILES

    try:
        return Path(snapshot_download(repository, allow_patterns=list(MODEL_FILES), **options))
    # huggingface_hub and its HTTP client raise from a dozen families.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"no directory {repository}, and cannot download it from the Hub: {reason[0]}"
        ) from error
