"""SentencePiece models, as the paper has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from navit_clip.errors import UserError
from navit_clip.tokenizers.base import Tokenizer


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; ids end with its end-of-sentence piece.

    Args:
        path: The model file.
        expected: What the file may be, for messages.

    Raises:
        UserError: If the file is missing or no SentencePiece model.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, expected: str = "a SentencePiece model") -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self.model = path.read_bytes()
            self._processor = SentencePieceProcessor(model_proto=self.model)
        except OSError as error:
            raise UserError(
                f"no tokenizer at {path}: {error.strerror}; train one with "
                "python -m navit_clip.tools.train_tokenizer"
            ) from error
        except RuntimeError as error:
            raise UserError(f"{path} is not {expected}") from error
        self.end_id = self._processor.eos_id()
        if self.end_id < 0:
            raise UserError(f"{path} has no end-of-sentence piece; train it with one")
        # With a piece for each byte nothing is unknown.
        if not self._processor.is_byte(self._processor.piece_to_id("<0x00>")):
            self.unknown_id = self._processor.unk_id()

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.vocab_size()

    def encode(self, text: str, context_length: int) -> list[int]:
        """Pieces of the caption, cut to leave room for the end piece."""
        return [*self._processor.encode(text)[: context_length - 1], self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the pieces spell."""
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    def id_of(self, token: str) -> int | None:
        """Id of a piece, None if there is no such piece."""
        index = self._processor.piece_to_id(token)
        return index if self._processor.id_to_piece(index) == token else None

    def token_of(self, id: int) -> str:
        """The piece of an id."""
        return str(self._processor.id_to_piece(id))
