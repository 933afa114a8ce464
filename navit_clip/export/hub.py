"""Repositories of the Hugging Face Hub, which `NaViTCLIP.from_pretrained` downloads.

Only a name that is no directory is looked for there; a directory never asks the network.
Pushing is `huggingface_hub.ModelHubMixin.push_to_hub`, which uploads what
`NaViTCLIP.save_pretrained` writes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from navit_clip.errors import UserError
from navit_clip.export.pretrained import MODEL_FILES

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def find_directory(directory_or_repo: str | Path, **download: Any) -> Path:
    """The directory of a model's files: the one named, or a repository's in the Hub's cache.

    Args:
        directory_or_repo: As `NaViTCLIP.from_pretrained` takes it.
        download: Options of `huggingface_hub.snapshot_download`.

    Raises:
        UserError: If a repository cannot be downloaded.
    """
    directory = Path(directory_or_repo)
    repository = str(directory_or_repo)
    if directory.is_dir() or not _REPOSITORY.fullmatch(repository):
        return directory
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(MODEL_FILES), **download))
    # huggingface_hub and its HTTP client raise from a dozen families.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"no directory {repository}, and cannot download it from the Hub: {reason[0]}"
        ) from error
