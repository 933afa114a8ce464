"""Embeds prompts and captions, shared over ranks, and answers from memory afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.evaluation.cache import Cache, TextBlock
from navit_clip.evaluation.embed import progress_bar
from navit_clip.evaluation.models import Model, Sizer
from navit_clip.evaluation.settings import EvalSetting

# Texts that are embedded together, wherever that is; as `navit_clip.evaluation.datasets.BLOCK` for
# images.
TEXT_BLOCK = 256


class EmbeddedTexts(Model):
    """A model that answers from texts embedded before; everything else is the model's own.

    The harnesses judge on the first rank alone, where nothing that all ranks share can be called.

    Args:
        model: Whose texts they are.
        texts: The texts, any number of times.
        texts_TD: Their embeddings.
    """

    def __init__(self, model: Model, texts: Sequence[str], texts_TD: Tensor) -> None:
        self.model, self.name, self.own_setting = model, model.name, model.own_setting
        self._row = {text: row for row, text in enumerate(texts)}
        self._texts_TD = texts_TD

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """From memory; float32 [T, D].

        Raises:
            KeyError: If one was not among the texts.
        """
        return self._texts_TD[[self._row[text] for text in texts]]

    @property
    def sizer(self) -> Sizer:
        """The model's."""
        return self.model.sizer

    def check(self, setting: EvalSetting) -> None:
        """As the model."""
        self.model.check(setting)

    def length(self, sized: Any) -> int:
        """As the model."""
        return self.model.length(sized)

    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """As the model."""
        return self.model.embed_images(images)

    @property
    def padding_tokens(self) -> int:
        """As the model."""
        return self.model.padding_tokens

    @property
    def embed_dim(self) -> int:
        """As the model."""
        return self.model.embed_dim

    @property
    def scale(self) -> float:
        """As the model."""
        return self.model.scale

    def image_flops(self, tokens: int) -> int:
        """As the model."""
        return self.model.image_flops(tokens)

    @property
    def fingerprint(self) -> str:
        """As the model."""
        return self.model.fingerprint


def share_texts(
    model: Model, texts: Sequence[str], ranks: Ranks, cache: Cache | None
) -> EmbeddedTexts:
    """Embeds texts on all ranks, in blocks that do not depend on how many there are.

    Args:
        model: Embeds them.
        texts: Prompts or captions, the same on all ranks.
        ranks: This process among all of them.
        cache: Where embeddings are kept from one evaluation to the next.

    Returns:
        The model with all of them, on every rank.

    Raises:
        UserError: If the cache cannot be written; the same on all ranks.
    """
    failures: list[str] = []
    own: list[tuple[int, Tensor]] = []
    starts = list(range(0, len(texts), TEXT_BLOCK))[ranks.rank :: ranks.world_size]
    blocks = [(start, texts[start : start + TEXT_BLOCK]) for start in starts]
    with progress_bar("texts", sum(len(block) for _, block in blocks), ranks) as progress:
        for start, block in blocks:
            try:
                own.append((start, _embed(model, block, cache)))
            except UserError as error:
                failures.append(str(error))
                break
            progress.update(len(block))
    if failures := ranks.gather(failures):
        raise UserError(failures[0])
    parts = [part for _, part in sorted(ranks.gather(own), key=lambda pair: pair[0])]
    return EmbeddedTexts(model, texts, torch.cat(parts or [torch.zeros(0, model.embed_dim)]))


def _embed(model: Model, block: Sequence[str], cache: Cache | None) -> Tensor:
    if cache is None:
        return model.embed_texts(block)
    key = cache.text_key(model.fingerprint, block)
    found = cache.read(key, TextBlock)
    if found is None:
        found = TextBlock(model.embed_texts(block))
        cache.write(key, found)
    return found.embeddings
