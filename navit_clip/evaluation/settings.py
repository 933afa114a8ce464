"""Views: how images are shown to a model, and which ones an evaluation looks at.

A model has a view of its own, which its headline figures belong to. The others say what it does at
other resolutions: capped token budgets, images at their own size, and squares as plain ViTs see
them. `Model.size` turns an image and a view into what the model embeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from navit_clip.configs import check_choices


@dataclass(frozen=True)
class View:
    """One way to show images to a model.

    Attributes:
        kind: ``capped``, at the image's own size and aspect ratio up to a token budget;
            ``native``, at its own size, up to what the model's positions know; ``square``, at
            exactly this side whatever its shape.
        size: Most tokens (``capped``) or the side in pixels (``square``); None for ``native``.

    Raises:
        ValueError: If `size` is missing, below 1, or given for ``native``.
    """

    kind: Literal["capped", "native", "square"]
    size: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.kind == "native":
            if self.size is not None:
                raise ValueError(f"size must be None for a native view, got {self.size}")
        elif self.size is None or self.size < 1:
            raise ValueError(f"size must be at least 1 for a {self.kind} view, got {self.size}")

    @property
    def label(self) -> str:
        """For tables and plots: ``256``, ``native`` or ``224²``."""
        if self.kind == "native":
            return "native"
        return f"{self.size}²" if self.kind == "square" else str(self.size)

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of a capped view, None for the others."""
        return self.size if self.kind == "capped" else None

    @property
    def side(self) -> int | None:
        """Side in pixels of a square view, None for the others."""
        return self.size if self.kind == "square" else None


_KINDS = ("capped", "native", "square")


def order_views(views: Sequence[View]) -> list[View]:
    """Each view once: capped by budget, then native, then squares by side."""
    return sorted(set(views), key=lambda view: (_KINDS.index(view.kind), view.size or 0))


def make_views(
    max_tokens: Sequence[int] = (), native: bool = False, square: Sequence[int] = ()
) -> list[View]:
    """The views that options ask for, each once, in the order of `order_views`."""
    wanted = [View("capped", size) for size in max_tokens]
    wanted += [View("native")] if native else []
    wanted += [View("square", side) for side in square]
    return order_views(wanted)
