"""How images are prepared for a model, and which settings an evaluation uses.

A model has a setting of its own, which its headline metrics belong to. The others measure it at
other resolutions: token limits, images at their own size, and squares as plain ViTs take them.
`Model.sizer` turns an image and a setting into what the model embeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from navit_clip.configs import check_choices


@dataclass(frozen=True)
class EvalSetting:
    """One way to prepare images for a model.

    Attributes:
        kind: ``capped``, at the image's own size and aspect ratio up to a token limit;
            ``native``, at its own size, up to what the model's positions know; ``square``, at
            exactly this side whatever its shape.
        size: The token limit (``capped``) or the side in pixels (``square``); None for ``native``.

    Raises:
        ValueError: If `size` is missing, below 1, or given for ``native``.
    """

    kind: Literal["capped", "native", "square"]
    size: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.kind == "native":
            if self.size is not None:
                raise ValueError(f"size must be None for a native setting, got {self.size}")
        elif self.size is None or self.size < 1:
            raise ValueError(f"size must be at least 1 for a {self.kind} setting, got {self.size}")

    @property
    def label(self) -> str:
        """For tables and plots: ``256``, ``native`` or ``224²``."""
        if self.kind == "native":
            return "native"
        return f"{self.size}²" if self.kind == "square" else str(self.size)

    @property
    def key(self) -> str:
        """`label` as one can type it: ``224px`` for a square."""
        return f"{self.size}px" if self.kind == "square" else self.label

    @property
    def max_tokens(self) -> int | None:
        """The token limit, None for the other kinds."""
        return self.size if self.kind == "capped" else None

    @property
    def side(self) -> int | None:
        """Side in pixels of a square, None for the other kinds."""
        return self.size if self.kind == "square" else None


def order_settings(settings: Iterable[EvalSetting]) -> list[EvalSetting]:
    """Each setting once: token limits in order, then native, then squares by side."""
    return sorted(set(settings), key=lambda one: (one.kind, one.size or 0))
