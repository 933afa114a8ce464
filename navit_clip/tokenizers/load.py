"""Builds the tokenizer that a configuration or a model's directory names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from navit_clip.configs import check_choices
from navit_clip.errors import UserError
from navit_clip.files import reading
from navit_clip.tokenizers.base import DESCRIPTION_FILE, MODEL_FILE, Tokenizer
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer
from navit_clip.tokenizers.sentencepiece import SentencePieceTokenizer
from navit_clip.tokenizers.siglip import Cleaning, SiglipTokenizer, released_pad


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer captions go through.

    Attributes:
        kind: ``sentencepiece``; ``open_clip`` for its lower-cased byte-pair encoding; or
            ``huggingface`` for that of a SigLIP or SigLIP 2, with its cleaning and its padding.
        path: The SentencePiece model file, as `navit-clip data train_tokenizer` writes it; or the
            ``tokenizer.json`` (or SentencePiece model) of a released SigLIP. ``open_clip`` has
            none.
        pad_id: Of the token that ``huggingface`` fills the context with (1 in SigLIP, 0 in
            SigLIP 2); null to read it from the ``tokenizer_config.json`` beside the file.
        clean: What ``huggingface`` does to captions: ``canonicalize`` (lower case, no punctuation)
            as open_clip, or ``lower`` as SigLIP 2 in transformers.

    Raises:
        ValueError: If `path` is missing, or `pad_id` is given to a kind that does not pad.
    """

    kind: Literal["sentencepiece", "open_clip", "huggingface"] = "sentencepiece"
    path: str | None = None
    pad_id: int | None = None
    clean: Cleaning = "canonicalize"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.kind == "sentencepiece" and not self.path:
            raise ValueError(
                "path must name a SentencePiece model; train one with "
                "python -m navit_clip.tools.train_tokenizer"
            )
        if self.kind == "huggingface" and not self.path:
            raise ValueError("path must name the tokenizer.json of a released model")
        if self.kind != "huggingface" and self.pad_id is not None:
            raise ValueError(f"pad_id belongs to kind: huggingface, {self.kind} does not pad")


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer a configuration names.

    Raises:
        UserError: If its files cannot be read.
    """
    if config.kind == "open_clip":
        return OpenClipTokenizer()
    if config.kind == "huggingface":
        path = Path(str(config.path))
        pad = released_pad(path) if config.pad_id is None else config.pad_id
        return SiglipTokenizer(path, pad, config.clean)
    return SentencePieceTokenizer(Path(str(config.path)))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer saved in a model's directory.

    Raises:
        UserError: If its files are missing or damaged.
    """
    path = directory / DESCRIPTION_FILE
    with reading(path, ValueError, KeyError, TypeError, hint="; export the model again"):
        values = json.loads(path.read_text())
        settings = {key: values[key] for key in ("pad_id", "clean") if key in values}
        config = TokenizerConfig(values["kind"], str(directory / MODEL_FILE), **settings)
    if config.kind == "huggingface" and not isinstance(config.pad_id, int):
        raise UserError(f"{path} needs a whole number as pad_id, got {config.pad_id!r}")
    return build_tokenizer(config)
