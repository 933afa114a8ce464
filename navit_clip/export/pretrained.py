"""A model's directory: all that inference needs, and nothing that runs code.

``config.json`` (shape, preprocessing, checksum of the weights), ``model.safetensors`` (weights),
the tokenizer's own files, and a model card. Written by the trainer at its end and by
`NaViTCLIP.save_pretrained`, read by the harnesses and by users.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from navit_clip.errors import UserError
from navit_clip.export.card import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, write_card
from navit_clip.files import atomic_write, reading, sha256_of, writing
from navit_clip.models.clip import CLIPConfig, NaViTCLIP
from navit_clip.tokenizers.base import TOKENIZER_FILES, Tokenizer
from navit_clip.tokenizers.load import load_tokenizer

# All that loading reads, and the card for whoever finds it.
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES, CARD_FILE)
FORMAT = 1
# What JSON may hold for a field of each type; any other leaves the class to check.
_PLAIN: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}

Config = TypeVar("Config")


@dataclass(frozen=True)
class Preprocess:
    """How images are sized for a model.

    Attributes:
        max_tokens: Most patches of one image, the model's default budget.
        square: Squash images to a square, for models trained so.

    Raises:
        ValueError: If `max_tokens` is below 1.
    """

    max_tokens: int = 256
    square: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True)
class Pretrained:
    """A model with what it needs around it.

    Attributes:
        model: In evaluation mode.
        tokenizer: The one it was trained with.
        preprocess: How it wants its images.
    """

    model: NaViTCLIP
    tokenizer: Tokenizer
    preprocess: Preprocess


def save_pretrained(
    directory: Path, model: NaViTCLIP, tokenizer: Tokenizer, preprocess: Preprocess
) -> None:
    """Writes a model's directory; each file appears whole or not at all.

    A model card that is there already stays as it is.

    Raises:
        UserError: If the disk does not take it.
    """
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    with writing(f"the model to {directory}", SafetensorError):
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save(directory)
        partial = directory / (WEIGHTS_FILE + ".partial")
        save_file(weights, partial)
        config = {
            "format": FORMAT,
            "model": asdict(model.config),
            "preprocess": asdict(preprocess),
            "weights_sha256": sha256_of(partial),
        }
        partial.replace(directory / WEIGHTS_FILE)
        atomic_write(directory / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        if not (directory / CARD_FILE).exists():
            write_card(directory)


def load_pretrained(directory: Path, device: torch.device | str = "cpu") -> Pretrained:
    """Reads a model's directory.

    Args:
        directory: As `save_pretrained` wrote it.
        device: Where the model goes.

    Returns:
        The model with its tokenizer and preprocessing, which it also has as attributes.

    Raises:
        UserError: If a file is missing, damaged, or does not fit the others.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"no model at {directory}: expected {CONFIG_FILE} in it (RUN_DIR/model)")
    with reading(path, KeyError, ValueError, TypeError):
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise UserError(f"{path} has format {values['format']}, this version reads {FORMAT}")
        config = config_from_dict(CLIPConfig, values["model"])
        preprocess = config_from_dict(Preprocess, values["preprocess"])
        # Some values are refused only here: a width that the positions cannot have, say.
        model = NaViTCLIP(config)
    weights_path = directory / WEIGHTS_FILE
    with reading(weights_path, SafetensorError, RuntimeError, hint="; export it again"):
        model.load_state_dict(load_file(weights_path))
    # safetensors checks its header, not the numbers. Exports of before the checksum have none.
    expected = values.get("weights_sha256")
    if expected is not None and sha256_of(weights_path) != expected:
        raise UserError(
            f"{weights_path} is damaged or belongs to another {CONFIG_FILE}: its SHA-256 is not "
            "the one written there; copy or export the model again"
        )
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > config.text.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} ids, its model embeds "
            f"{config.text.vocab_size}: the files belong to different models"
        )
    if config.text.fill_context and tokenizer.pad_id is None:
        raise UserError(
            f"the model in {directory} needs captions that fill its context, and its tokenizer "
            "does not pad: export it with its own tokenizer"
        )
    model.tokenizer, model.preprocess = tokenizer, preprocess
    return Pretrained(model.to(device).eval(), tokenizer, preprocess)


def config_from_dict(kind: type[Config], values: Any) -> Config:
    """Builds a tree of config dataclasses from plain values, as `asdict` and JSON leave them.

    Raises:
        TypeError: If a key is unknown or missing, or a plain value stands where keys belong.
        ValueError: If a field refuses its value.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} needs keys and values, got {values!r}")
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := values.keys() - known:
        raise TypeError(f"unknown key {sorted(unknown)[0]!r} for {kind.__name__}")
    built = {}
    for name, value in values.items():
        hint = hints[name]
        if is_dataclass(hint):
            value = config_from_dict(hint, value)  # type: ignore[arg-type]
        elif hint in _PLAIN and not isinstance(value, _PLAIN[hint]):
            raise TypeError(f"{name} of {kind.__name__} must be {hint.__name__}, got {value!r}")
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)
