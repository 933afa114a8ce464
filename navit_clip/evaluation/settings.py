"""How images are prepared for a model, and which settings an evaluation uses.

A model has a setting of its own, which its headline metrics belong to. The others measure it at
other resolutions: token limits, images at their own size, and squares as plain ViTs take them.
`Model.sizer` turns an image and a setting into what the model embeds.
"""

from __future__ import annotations

import re
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
            exactly this side whatever its shape; ``cascade`` and ``rerank``, at a token limit and
            some images again at another.
        size: The side in pixels of a ``square``, the token limit of others; None for ``native``.
        then: Of ``cascade`` and ``rerank``: the other limit.
        percent: Of ``cascade``: how many of the images are evaluated again.
        top: Of ``rerank``: how many of a query's images are.

    Raises:
        ValueError: If a size is missing, below 1, or given for another kind.
    """

    kind: Literal["capped", "native", "square", "cascade", "rerank"]
    size: int | None = None
    then: int | None = None
    percent: int | None = None
    top: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.kind == "native":
            if self.size is not None:
                raise ValueError(f"size must be None for a native setting, got {self.size}")
        elif self.size is None or self.size < 1:
            raise ValueError(f"size must be at least 1 for a {self.kind} setting, got {self.size}")
        needed = {"cascade": {"then", "percent"}, "rerank": {"then", "top"}}.get(self.kind, set())
        given = {name for name in ("then", "percent", "top") if getattr(self, name) is not None}
        if given != needed:
            raise ValueError(
                "then and percent belong to a cascade setting, then and top to a rerank setting, "
                f"got {sorted(given)} for {self.kind}"
            )

    @classmethod
    def from_label(cls, kind: str, label: str) -> EvalSetting:
        """The setting of this kind and `label`.

        Raises:
            ValueError: If there is none.
        """
        names = ("size", "then", "top" if kind == "rerank" else "percent")
        sizes = map(int, re.findall(r"\d+", label))
        return cls(kind, **dict(zip(names, sizes, strict=False)))  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """For tables and plots: ``256``, ``native``, ``224²``, ``64→256 30%``, ``64→256 top 9``."""
        if self.kind == "native":
            return "native"
        if self.kind == "cascade":
            return f"{self.size}→{self.then} {self.percent}%"
        if self.kind == "rerank":
            return f"{self.size}→{self.then} top {self.top}"
        return f"{self.size}²" if self.kind == "square" else str(self.size)

    @property
    def key(self) -> str:
        """`label` as one can type it: ``224px``, ``64-256-30`` (a cascade), ``64-256-top9``."""
        if self.kind == "cascade":
            return f"{self.size}-{self.then}-{self.percent}"
        if self.kind == "rerank":
            return f"{self.size}-{self.then}-top{self.top}"
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
