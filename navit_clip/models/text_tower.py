"""The packed text tower: token ids of many captions in, one vector per caption out.

The same encoder as for images (NaViT makes the same changes to both towers), with a token
embedding and learned positions that start at 0 in each caption.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from navit_clip.configs import check_choices
from navit_clip.models.interpolate import exact_dtype
from navit_clip.models.pooling import Pooling, build_pooling
from navit_clip.models.rope import RotaryConfig, build_rotary
from navit_clip.models.transformer import Encoder, EncoderConfig
from navit_clip.packed.texts import PackedTexts


@dataclass(frozen=True)
class TextTowerConfig:
    """Architecture of the text tower.

    Attributes:
        vocab_size: Number of token ids; at least the tokenizer's.
        context_length: Most tokens of one caption, special ones included; the paper cuts at 24.
        encoder: The transformer over the tokens.
        pooling: How a caption's tokens become one vector; ``cls`` reads the first token,
            ``last`` the last, which is the end-of-text token.
        fill_context: Every caption fills the context, padded by its tokenizer: SigLIP attends to
            padding like any token, and reads the last position whatever stands there.
        position: A ``learned`` table added to the tokens, or ``none``, for rotary positions alone.
        rotary: Rotations of queries and keys by the token's index; text takes kind ``none`` or
            ``axial``, and coordinates ``integer``.

    Raises:
        ValueError: If a size is below 1, `pooling` or `position` is unknown, heads are too narrow
            for `rotary`, or it is not of one axis.
    """

    vocab_size: int = 32000
    context_length: int = 24
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    pooling: Pooling = "map"
    fill_context: bool = False
    position: Literal["learned", "none"] = "learned"
    rotary: RotaryConfig = field(default_factory=RotaryConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("vocab_size", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rotary.kind == "mixed" or self.rotary.coordinates == "normalised":
            raise ValueError(
                "rotary.kind axial and rotary.coordinates integer are what text takes, got "
                f"{self.rotary.kind} and {self.rotary.coordinates}"
            )
        self.rotary.check_width(self.encoder, axes=1)


class TextTower(nn.Module):
    """Encodes packed captions to one vector of the encoder's width each."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder.width
        self.token = nn.Parameter(torch.empty(config.vocab_size, width))
        nn.init.normal_(self.token, std=0.02)
        self.position: nn.Parameter | None = None
        if config.position == "learned":
            self.position = nn.Parameter(torch.empty(config.context_length, width))
            nn.init.normal_(self.position, std=0.01)
        self.rotary = build_rotary(config.rotary, config.encoder, axes=1)
        self.encoder = Encoder(config.encoder)
        self.pool = build_pooling(config.pooling, config.encoder)

    def forward(self, texts: PackedTexts) -> Tensor:
        """[E, C]: one vector per caption, in the order in which the captions were packed.

        Raises:
            ValueError: If a caption is longer than the context, or shorter and must fill it.
        """
        segments, context = texts.segments, self.config.context_length
        lengths = segments.lengths[: segments.num_examples]
        if (longest := max(lengths, default=0)) > context:
            raise ValueError(
                f"a caption of {longest} tokens exceeds context_length={context}: "
                "the tokenizer must cut it"
            )
        if self.config.fill_context and (shortest := min(lengths, default=context)) < context:
            raise ValueError(
                f"a caption of {shortest} tokens does not fill context_length={context}: "
                "the tokenizer must pad it, as this model's own does"
            )
        index_T = torch.arange(segments.num_tokens, device=texts.token_ids.device)
        # Padding may run on past the context; what it embeds is never read.
        index_T = (index_T - segments.offsets[segments.ids]).clamp(max=context - 1)
        x_TC = F.embedding(texts.token_ids, self.token)
        if self.position is not None:
            x_TC = x_TC + F.embedding(index_T, self.position)
        rotary = ()
        if self.rotary is not None:
            rotary = self.rotary(index_T[:, None].to(exact_dtype(self.token.dtype)))
        return self.pool(self.encoder(x_TC, segments, rotary), segments)[texts.order]
