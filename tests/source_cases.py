"""Small evaluation data on disk, and all that a dataset makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shard_factory import encode, photo

from navit_clip.evaluation.datasets import EvalDataset, Item


def read(dataset: EvalDataset) -> list[Item]:
    """All items."""
    return list(dataset.read(0, 1))


def in_parts(dataset: EvalDataset, parts: int) -> list[Item]:
    """All parts' items in the order of their keys."""
    items = [item for part in range(parts) for item in dataset.read(part, parts)]
    return sorted(items, key=lambda item: item.key)


def image(path: Path, seed: int = 0) -> Path:
    """An image at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(photo(seed, 16, 16)))
    return path


def write(path: Path, content: Any) -> str:
    """Text, or JSON of anything else, at a path."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)
