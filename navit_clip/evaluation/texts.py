"""Embeds prompts and captions on all ranks, the counterpart of `embed` for texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.evaluation.cache import Cache, TextBlock
from navit_clip.evaluation.embed import progress_bar
from navit_clip.evaluation.models import Model

# Texts that are embedded together, wherever that is; as `navit_clip.evaluation.datasets.BLOCK` for
# images.
TEXT_BLOCK = 256


def embed_texts(model: Model, texts: Sequence[str], ranks: Ranks, cache: Cache | None) -> Tensor:
    """Embeds texts on all ranks, in blocks that do not depend on how many ranks there are.

    Args:
        model: Embeds them.
        texts: Prompts or captions, the same on all ranks.
        ranks: This process among all of them.
        cache: Where embeddings are kept from one evaluation to the next.

    Returns:
        All of them on every rank, float32 [T, D] unit vectors on the host. Equal texts have equal
        vectors, which else would differ in the last digits with their neighbours in a block.

    Raises:
        UserError: If the cache cannot be written; the same on all ranks.
    """
    failures: list[str] = []
    embedded: list[tuple[int, Tensor]] = []
    starts = list(range(0, len(texts), TEXT_BLOCK))[ranks.rank :: ranks.world_size]
    blocks = [(start, texts[start : start + TEXT_BLOCK]) for start in starts]
    with progress_bar("texts", sum(len(block) for _, block in blocks), ranks) as progress:
        for start, block in blocks:
            try:
                embedded.append((start, _embed(model, block, cache)))
            except UserError as error:
                failures.append(str(error))
                break
            progress.update(len(block))
    if failures := ranks.gather(failures):
        raise UserError(failures[0])
    parts = [part for _, part in sorted(ranks.gather(embedded), key=lambda pair: pair[0])]
    row = {text: index for index, text in enumerate(texts)}
    return torch.cat(parts or [torch.zeros(0, model.embed_dim)])[[row[text] for text in texts]]


def _embed(model: Model, block: Sequence[str], cache: Cache | None) -> Tensor:
    if cache is None:
        return model.embed_texts(block)
    key = cache.text_key(model.fingerprint, block)
    found = cache.read(key, TextBlock)
    if found is None:
        found = TextBlock(model.embed_texts(block))
        cache.write(key, found)
    return found.embeddings
