"""Captions to token ids.

SentencePiece as the paper has it, or open_clip's byte-pair encoding, both without padding; or
SigLIP's (`navit_clip.tokenizers.siglip`), which pads because its model reads the padding. Every
caption ends with an end-of-text token, which survives truncation, so that `last` pooling always
reads it. A tokenizer saves itself beside the model, so that inference needs nothing else.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from navit_clip.files import atomic_write

DESCRIPTION_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
TOKENIZER_FILES = (DESCRIPTION_FILE, MODEL_FILE)  # all that any tokenizer saves
# Tokenizers of as many ids that cut this alike have the same vocabulary, in practice.
_PROBE = "Two dogs & a child's red kite, photographed at 10:45 on the north-eastern coast."
PLAIN = re.compile(r"[ -%'-~]*")  # printable ASCII without the ampersand


class Tokenizer(ABC):
    """Turns captions into ids.

    Attributes:
        kind: As in `TokenizerConfig`.
        pad_id: Of the token that every caption is filled up with to the context; None if captions
            stay as long as they are.
        unknown_id: Of the piece that stands for any text the vocabulary lacks; None if it lacks
            none, as with bytes for pieces.
        model: Content of the file that it was read from, None if it comes from none.
        settings: What `TokenizerConfig` needs beside `kind` to build it again.
    """

    kind: str
    pad_id: int | None = None
    unknown_id: int | None = None
    model: bytes | None = None
    settings: Mapping[str, Any] = MappingProxyType({})

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids."""

    @abstractmethod
    def encode(self, text: str, context_length: int) -> list[int]:
        """Ids of one caption, at most `context_length`, the last one marking its end."""

    def decode(self, ids: Sequence[int]) -> str:
        """What is known of a caption by its ids, for people; empty if nothing is."""
        return ""

    def difference(self, other: Tokenizer, name: str) -> str | None:
        """How its ids differ from those of another; None if they do not, in practice.

        Args:
            other: To compare with.
            name: Of the other, for the result.
        """
        if self.vocab_size != other.vocab_size:
            return f"{self.vocab_size} ids, {name} {other.vocab_size}"
        if self.encode(_PROBE, 256) != other.encode(_PROBE, 256):
            return f"other ids than {name}"
        return None

    def save(self, directory: Path) -> None:
        """Writes what `load_tokenizer` needs into a model's directory."""
        for name, content in self.files().items():
            atomic_write(directory / name, content)

    def files(self) -> dict[str, bytes]:
        """What `save` writes, by name."""
        description = json.dumps({"kind": self.kind, **self.settings})
        model = {} if self.model is None else {MODEL_FILE: self.model}
        return {DESCRIPTION_FILE: f"{description}\n".encode(), **model}
