"""The tokenizer that belongs to an open_clip model.

CLIP's comes with open_clip. SigLIP's is a file: it lies beside a local checkpoint, as in the
released directories, or on the Hugging Face hub under the name that open_clip has for it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from navit_clip.errors import UserError
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer
from navit_clip.tokenizers.siglip import SiglipTokenizer, released_pad

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"  # says how to pad


def own_tokenizer(
    text: Mapping[str, Any], checkpoint: Path | None, *, download: bool
) -> Tokenizer | None:
    """The tokenizer that open_clip gives a model.

    Args:
        text: open_clip's `text_cfg`.
        checkpoint: The weights' file, beside which a tokenizer is looked for first.
        download: Fetch the tokenizer if it is nowhere on this machine.

    Returns:
        The tokenizer; None where it is nowhere and may not be fetched.

    Raises:
        UserError: If it cannot be fetched or read, or is another model's.
    """
    repository = text.get("hf_tokenizer_name")
    if repository is None:
        return OpenClipTokenizer()
    path = None if checkpoint is None else checkpoint.with_name(TOKENIZER_FILE)
    if path is None or not path.is_file():
        path = _from_hub(repository, download=download)
    if path is None:
        return None
    tokenizer = SiglipTokenizer(path, released_pad(path))
    if tokenizer.vocab_size > text["vocab_size"]:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} ids, the model embeds {text['vocab_size']}: "
            "it is another model's tokenizer"
        )
    return tokenizer


def _from_hub(repository: str, *, download: bool) -> Path | None:
    """The files in Hugging Face's cache, fetched first if need be."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        for name in (SETTINGS_FILE, TOKENIZER_FILE):
            path = hf_hub_download(repository, name, local_files_only=not download)
    except Exception as error:  # each way to fail to fetch has its own
        if not download and isinstance(error, LocalEntryNotFoundError):
            return None
        raise UserError(
            f"cannot download the tokenizer {repository}: {textwrap.shorten(str(error), 300)}"
        ) from error
    return Path(path)
