"""Loads an exported model of any kind, as evaluation and training do."""

from __future__ import annotations

from pathlib import Path

import torch

from navit_clip.classifier import NaViTClassifier
from navit_clip.export.description import Description
from navit_clip.export.pretrained import load_pretrained
from navit_clip.masked_image import NaViTMaskedImage
from navit_clip.model import NaViTCLIP
from navit_clip.tokenizers.base import Tokenizer

AnyModel = NaViTCLIP | NaViTClassifier | NaViTMaskedImage
_CLASSES: tuple[type[AnyModel], ...] = (NaViTCLIP, NaViTClassifier, NaViTMaskedImage)


def build_model(description: Description, tokenizer: Tokenizer | None) -> AnyModel:
    """A model of the kind described, with random weights."""
    kind = next(one for one in _CLASSES if one.kind == description.kind)
    return kind.from_description(description, tokenizer)


def load_model(directory: Path, device: torch.device | str = "cpu") -> AnyModel:
    """A model's directory, in evaluation mode.

    Raises:
        UserError: If there is no model, or its files are damaged.
    """
    return load_pretrained(directory, build_model).to(device).eval()
