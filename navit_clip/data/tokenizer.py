"""Captions to token ids.

SentencePiece as the paper has it, or open_clip's byte-pair encoding, both without padding; or
SigLIP's (`navit_clip.data.siglip_tokenizer`), which pads because its model reads the padding. Every
caption ends with an end-of-text token, which survives truncation, so that `last` pooling always
reads it. A tokenizer saves itself beside the model, so that inference needs nothing else.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from navit_clip.choices import check_choices
from navit_clip.errors import UserError
from navit_clip.files import write_whole

DESCRIPTION_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
TOKENIZER_FILES = (DESCRIPTION_FILE, MODEL_FILE)  # all that any tokenizer saves
PLAIN = re.compile(r"[ -%'-~]*")  # printable ASCII without the ampersand
_SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")
_MAX_WORD = 512  # characters; open_clip takes minutes over 100 kB without a space
_MAX_WORDS = 100_000


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer captions go through.

    Attributes:
        kind: ``sentencepiece``; ``open_clip`` for its lower-cased byte-pair encoding; or
            ``huggingface`` for that of a SigLIP or SigLIP 2, with its cleaning and its padding.
        path: The SentencePiece model file, as `python -m navit_clip.data.train_tokenizer` writes;
            or the ``tokenizer.json`` (or SentencePiece model) of a released SigLIP.
        pad_id: Of the token that ``huggingface`` fills the context with (1 in SigLIP, 0 in
            SigLIP 2); null to read it from the ``tokenizer_config.json`` beside the file.

    Raises:
        ValueError: If `path` is missing, or `pad_id` is given to a kind that does not pad.
    """

    kind: Literal["sentencepiece", "open_clip", "huggingface"] = "sentencepiece"
    path: str | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.kind == "sentencepiece" and not self.path:
            raise ValueError(
                "path must name a SentencePiece model; train one with "
                "python -m navit_clip.data.train_tokenizer"
            )
        if self.kind == "huggingface" and not self.path:
            raise ValueError("path must name the tokenizer.json of a released model")
        if self.kind != "huggingface" and self.pad_id is not None:
            raise ValueError(f"pad_id belongs to kind: huggingface, {self.kind} does not pad")


class Tokenizer(ABC):
    """Turns captions into ids.

    Attributes:
        kind: As in `TokenizerConfig`.
        pad_id: Of the token that every caption is filled up with to the context; None if captions
            stay as long as they are.
    """

    kind: str
    pad_id: int | None = None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids."""

    @abstractmethod
    def encode(self, text: str, context_length: int) -> list[int]:
        """Ids of one caption, at most `context_length`, the last one marking its end."""

    def save(self, directory: Path) -> None:
        """Writes what `load_tokenizer` needs into a model's directory."""
        write_whole(directory / DESCRIPTION_FILE, json.dumps({"kind": self.kind}) + "\n")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; ids end with its end-of-sentence piece.

    Args:
        path: The model file.

    Raises:
        UserError: If the file is missing or no SentencePiece model.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = path.read_bytes()
            self._processor = SentencePieceProcessor(model_proto=self._model)
        except OSError as error:
            raise UserError(
                f"no tokenizer at {path}: {error.strerror}; train one with "
                "python -m navit_clip.data.train_tokenizer"
            ) from error
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model") from error
        self._end = self._processor.eos_id()
        if self._end < 0:
            raise UserError(f"{path} has no end-of-sentence piece; train it with one")

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.vocab_size()

    def encode(self, text: str, context_length: int) -> list[int]:
        """Pieces of the caption, cut to leave room for the end piece."""
        return [*self._processor.encode(text)[: context_length - 1], self._end]

    def save(self, directory: Path) -> None:
        """Writes the SentencePiece model beside the kind."""
        super().save(directory)
        write_whole(directory / MODEL_FILE, self._model)


class OpenClipTokenizer(Tokenizer):
    """open_clip's byte-pair encoding with its start and end tokens, without the padding."""

    kind = "open_clip"

    @cached_property
    def _tokenizer(self) -> Any:
        # Imported on first use: open_clip takes seconds, and most runs do not need it.
        from open_clip.tokenizer import SimpleTokenizer

        return SimpleTokenizer()

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self._tokenizer.vocab_size

    def encode(self, text: str, context_length: int) -> list[int]:
        """Start, tokens, end; cut as open_clip cuts, keeping the end."""
        tokenizer = self._tokenizer
        # open_clip's repair of broken Unicode and of HTML entities takes most of its time, and
        # finds nothing in these.
        text = text.lower() if PLAIN.fullmatch(text) else tokenizer.clean_fn(text)
        ids = [tokenizer.sot_token_id]
        # No token spans a space, so what stands between two is looked up as a whole.
        for word in text.split():
            ids += self._words.get(word) or self._encode_word(word)
            # Nobody reads on in a caption of 100 kB.
            if len(ids) >= context_length - 1:
                break
        return [*ids[: context_length - 1], tokenizer.eot_token_id]

    def _encode_word(self, word: str) -> list[int]:
        """Ids of what stands between two spaces, kept for the next time."""
        tokenizer = self._tokenizer
        word = word[:_MAX_WORD]
        letters = (
            "".join(map(tokenizer.byte_encoder.__getitem__, part.encode()))
            for part in tokenizer.pat.findall(word)
        )
        ids = [tokenizer.encoder[t] for part in letters for t in tokenizer.bpe(part).split(" ")]
        if len(self._words) == _MAX_WORDS:
            # open_clip's own cache has no end, and the web has no end of words.
            self._words.clear()
            tokenizer.cache = {token: token for token in _SPECIAL_TOKENS}
        self._words[word] = ids
        return ids

    @cached_property
    def _words(self) -> dict[str, list[int]]:
        return {}


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer a configuration names.

    Raises:
        UserError: If its files cannot be read.
    """
    if config.kind == "open_clip":
        return OpenClipTokenizer()
    if config.kind == "huggingface":
        from navit_clip.data.siglip_tokenizer import SiglipTokenizer, released_pad

        path = Path(str(config.path))
        return SiglipTokenizer(path, released_pad(path) if config.pad_id is None else config.pad_id)
    return SentencePieceTokenizer(Path(str(config.path)))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer saved in a model's directory.

    Raises:
        UserError: If its files are missing or damaged.
    """
    path = directory / DESCRIPTION_FILE
    try:
        values = json.loads(path.read_text())
        kind = values["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}; export the model again") from error
    if kind == OpenClipTokenizer.kind:
        return OpenClipTokenizer()
    if kind == SentencePieceTokenizer.kind:
        return SentencePieceTokenizer(directory / MODEL_FILE)
    if kind == "huggingface":
        from navit_clip.data.siglip_tokenizer import SiglipTokenizer

        pad_id = values.get("pad_id")
        if not isinstance(pad_id, int):
            raise UserError(f"{path} needs a whole number as pad_id, got {pad_id!r}")
        return SiglipTokenizer(directory / MODEL_FILE, pad_id)
    raise UserError(f"{path} names an unknown tokenizer: {kind!r}")
