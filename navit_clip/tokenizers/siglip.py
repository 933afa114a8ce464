"""The tokenizer of SigLIP and SigLIP 2: cleaned captions that fill the whole context.

Their text towers attend to padding like to any token and read the last position, so padding is a
part of the input here and not the packer's. Ids are those of open_clip's `HFTokenizer` with
``clean='canonicalize'`` on the same file, or, lower-cased alone, those of transformers'
`Siglip2Tokenizer`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from navit_clip.errors import UserError
from navit_clip.files import reading
from navit_clip.tokenizers.base import PLAIN, Tokenizer
from navit_clip.tokenizers.sentencepiece import SentencePieceTokenizer

Cleaning = Literal["canonicalize", "lower"]


class SiglipTokenizer(Tokenizer):
    """Cleaned text in lower case, an end token, padding up to the context.

    Args:
        path: A ``tokenizer.json`` of Hugging Face, or a SentencePiece model.
        pad: Id of the padding token, or the token itself.
        clean: ``canonicalize`` removes punctuation too, as open_clip does and SigLIP's own
            tokenizer; ``lower`` leaves it, as that of SigLIP 2 in transformers.

    Raises:
        UserError: If the file is missing or neither of the two, has no end token, does not know
            `pad`, or the package that reads it is not installed.
    """

    kind = "huggingface"
    pad_id: int

    def __init__(self, path: Path, pad: int | str, clean: Cleaning = "canonicalize") -> None:
        try:
            self.model = path.read_bytes()
        except OSError as error:
            raise UserError(f"no tokenizer at {path}: {error.strerror}") from error
        vocabulary: _Json | SentencePieceTokenizer
        if self.model.lstrip().startswith(b"{"):
            vocabulary = _Json(path, self.model)
        else:
            expected = "a tokenizer.json or a SentencePiece model"
            vocabulary = SentencePieceTokenizer(path, expected)
        self._vocabulary = vocabulary
        pad_id = vocabulary.id_of(pad) if isinstance(pad, str) else pad
        if pad_id is None or not 0 <= pad_id < self.vocab_size:
            raise UserError(
                f"{path} has no padding token {pad!r} among its {self.vocab_size} ids: set pad_id"
            )
        self.pad_id = pad_id
        self.clean = clean
        self.settings = {"pad_id": pad_id, **({} if clean == "canonicalize" else {"clean": clean})}
        self.unknown_id = vocabulary.unknown_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self._vocabulary.vocab_size

    @property
    def end_id(self) -> int:
        """Id of the end token."""
        return self._vocabulary.end_id

    def token_of(self, id: int) -> str:
        """The token of an id."""
        return self._vocabulary.token_of(id)

    def encode(self, text: str, context_length: int) -> list[int]:
        """Exactly `context_length` ids: tokens, cut to leave room for the end, end, padding."""
        text = text.lower() if self.clean == "lower" else _canonical(text)
        ids = self._vocabulary.encode(text, context_length)
        return ids + [self.pad_id] * (context_length - len(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """The cleaned caption without end and padding."""
        return self._vocabulary.decode([int(i) for i in ids if i != self.pad_id])


def _canonical(text: str) -> str:
    # Imported on first use: open_clip takes seconds.
    from open_clip.tokenizer import basic_clean, canonicalize_text

    # There is nothing to fix in these, which would take most of the time.
    return canonicalize_text(text if PLAIN.fullmatch(text) else basic_clean(text))


class _Json:
    """A ``tokenizer.json``, read by the package tokenizers."""

    def __init__(self, path: Path, model: bytes) -> None:
        try:
            from tokenizers import Tokenizer as Rust
        except ImportError as error:
            raise UserError(
                f"reading {path} needs the package tokenizers: pip install 'navit-clip[siglip]'"
            ) from error
        try:
            self._tokenizer: Any = Rust.from_str(model.decode())
        # UnicodeDecodeError, or a bare Exception of the package's.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is no tokenizer.json: {reason}") from error
        # Captions are cut and padded here, whatever the file asks for.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        empty, word = self._tokenizer.encode("").ids, self._tokenizer.encode("a").ids
        if not empty or empty[-1] != word[-1]:
            raise UserError(f"{path} puts no end token behind a caption: it is not SigLIP's")
        self.end_id: int = empty[-1]
        self.unknown_id = self.id_of("<unk>")

    def encode(self, text: str, context_length: int) -> list[int]:
        return [*self._tokenizer.encode(text).ids[:-1][: context_length - 1], self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token_of(self, id: int) -> str:
        return str(self._tokenizer.id_to_token(id))


def released_pad(path: Path) -> str:
    """The padding token named by the ``tokenizer_config.json`` beside a released tokenizer's file.

    Raises:
        UserError: If it is missing, damaged, or names none.
    """
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        raise UserError(
            f"no {config} that names the padding token: put it there, or set tokenizer.pad_id "
            "(1 for SigLIP, 0 for SigLIP 2)"
        )
    with reading(f"a pad_token from {config}", ValueError, KeyError, TypeError):
        token = json.loads(config.read_text(encoding="utf-8"))["pad_token"]
        token = token["content"] if isinstance(token, dict) else token
        if not isinstance(token, str):
            raise TypeError(f"pad_token is {token!r}")
    return token
