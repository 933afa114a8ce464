"""Sizes that all projects are given alike: widths and depths of the towers, patch, square, context.

`benchmarks.peers` builds each project's towers from them, `benchmarks.end_to_end` its trainer's
configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from navit_clip.models.clip import CLIPConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig

PATCH, SQUARE, CONTEXT, VOCABULARY = 16, 224, 77, 49408
HEAD_WIDTH = 64


@dataclass(frozen=True)
class Widths:
    """Widths of the image tower, the text tower and the shared space, and the towers' blocks."""

    image: int
    image_depth: int
    text: int
    text_depth: int
    embed: int = 512

    def config(self, vocabulary: int = VOCABULARY) -> CLIPConfig:
        """As this project describes it."""
        image = EncoderConfig(self.image, self.image_depth, self.image // HEAD_WIDTH)
        text = EncoderConfig(self.text, self.text_depth, self.text // HEAD_WIDTH)
        return CLIPConfig(
            self.embed, ImageTowerConfig(PATCH, image), TextTowerConfig(vocabulary, CONTEXT, text)
        )

    def open_clip_config(self) -> dict[str, Any]:
        """As open_clip describes it; the heads of its image tower are 64 wide by default."""
        return {
            "embed_dim": self.embed,
            "vision_cfg": {
                "image_size": SQUARE,
                "layers": self.image_depth,
                "width": self.image,
                "patch_size": PATCH,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": VOCABULARY,
                "width": self.text,
                "heads": self.text // HEAD_WIDTH,
                "layers": self.text_depth,
            },
        }


WIDTHS = {
    "XS/16": Widths(192, 4, 192, 4, 192),
    "S/16": Widths(384, 12, 512, 12),
    "B/16": Widths(768, 12, 512, 12),
    "L/16": Widths(1024, 24, 768, 12, 768),
}
