"""How images are sized for a model, as far as its architecture leaves that open.

Written beside the weights by `navit_clip.export`, applied by `navit_clip.model` and by the
evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocess:
    """How images are sized for a model.

    Attributes:
        max_tokens: Token limit: most patches of one image, unless the caller sets another.
        square: Squash images to a square, for models trained so.

    Raises:
        ValueError: If `max_tokens` is below 1.
    """

    max_tokens: int = 256
    square: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")

    def tokens_at(self, scale: float) -> int:
        """The token limit for patches of `scale` times the model's own side: the same area."""
        return max(1, round(self.max_tokens / scale**2))
