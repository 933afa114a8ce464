"""Budgets and modes of packing, for tests of the packer and of what it chooses."""

from __future__ import annotations

from navit_clip.data.budgets import Budgets, PackingMode

MODES: tuple[PackingMode, ...] = ("fill", "exact", "constant")


STREAMS = ("image", "text", "audio")


def budgets_of(*tokens: int, most: int = 4096) -> Budgets:
    return Budgets(dict(zip(STREAMS, tokens, strict=False)), most)
