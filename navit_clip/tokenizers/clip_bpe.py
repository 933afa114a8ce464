"""open_clip's byte-pair encoding, without its padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from navit_clip.tokenizers.base import PLAIN, Tokenizer

_SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")
_MAX_WORD = 512  # characters; open_clip takes minutes over 100 kB without a space
_MAX_WORDS = 100_000


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

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens, by the names that OpenAI's and transformers' files give them."""
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        return {names.get(token, token): id for token, id in self._tokenizer.encoder.items()}

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens that are joined, in order of rank."""
        return list(self._tokenizer.bpe_ranks)

    def encode(self, text: str, context_length: int) -> list[int]:
        """Start, tokens, end; cut as open_clip cuts, keeping the end.

        The text of an end token within the caption ends it: open_clip's towers read the first one.
        """
        tokenizer = self._tokenizer
        # Fixing broken Unicode and HTML entities takes most of open_clip's time, and there are none
        # in these.
        text = text.lower() if PLAIN.fullmatch(text) else tokenizer.clean_fn(text)
        ids = [tokenizer.sot_token_id]
        # No token spans a space, so that words are looked up as wholes.
        for word in text.split():
            ids += self._words.get(word) or self._encode_word(word)
            # The rest of a caption of 100 kB would be cut anyway.
            if len(ids) >= context_length - 1:
                break
        end = tokenizer.eot_token_id
        ids = ids[: context_length - 1]
        return [*(ids[: ids.index(end)] if end in ids else ids), end]

    def decode(self, ids: Sequence[int]) -> str:
        """The words without the special tokens."""
        tokenizer = self._tokenizer
        special = tokenizer.sot_token_id, tokenizer.eot_token_id
        text: str = tokenizer.decode([int(i) for i in ids if i not in special])
        return text.strip()

    def _encode_word(self, word: str) -> list[int]:
        """Ids of one word, cached."""
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
