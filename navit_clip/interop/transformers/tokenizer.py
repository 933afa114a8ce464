"""Tokenizers in transformers' folders as ours, and ours as files that its `AutoTokenizer` reads.

CLIP's vocabulary comes with open_clip, so a folder's is only compared with it. SigLIP's is a file,
``spiece.model`` or ``tokenizer.json``, which is read and written as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from navit_clip.errors import UserError
from navit_clip.files import reading
from navit_clip.models.clip import CLIPConfig
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer
from navit_clip.tokenizers.siglip import Cleaning, SiglipTokenizer, released_pad

SETTINGS_FILE, JSON_FILE, SPIECE_FILE = "tokenizer_config.json", "tokenizer.json", "spiece.model"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
TOKENIZER_FILES = (SETTINGS_FILE, JSON_FILE, SPIECE_FILE, VOCAB_FILE, MERGES_FILE)

_START, _END = "<|startoftext|>", "<|endoftext|>"


def read_tokenizer(directory: Path, config: CLIPConfig) -> Tokenizer:
    """The tokenizer in a folder of transformers.

    Raises:
        UserError: If there is none, it is damaged, or it is not the model's.
    """
    tokenizer = _read_siglip(directory) if config.text.fill_context else _read_clip(directory)
    if tokenizer.vocab_size > config.text.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} ids, its model embeds "
            f"{config.text.vocab_size}: the files belong to different models"
        )
    return tokenizer


def _read_clip(directory: Path) -> Tokenizer:
    tokenizer, path = OpenClipTokenizer(), directory / VOCAB_FILE
    if not path.is_file():
        path = directory / JSON_FILE
    if not path.is_file():
        raise UserError(f"no tokenizer in {directory}: expected {VOCAB_FILE} or {JSON_FILE}")
    with reading(path, ValueError, KeyError, TypeError):
        values = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = values if path.name == VOCAB_FILE else values["model"]["vocab"]
    # The rank of a merge is the id of what it makes, so that the vocabulary says it all.
    if vocabulary != tokenizer.vocabulary:
        raise UserError(f"{path} is not CLIP's vocabulary, which the model's texts would need")
    return tokenizer


def _read_siglip(directory: Path) -> Tokenizer:
    settings, path = directory / SETTINGS_FILE, directory / JSON_FILE
    pad = released_pad(path)
    with reading(settings, ValueError):
        values = json.loads(settings.read_text(encoding="utf-8"))
    if values.get("padding_side", "right") != "right":
        raise UserError(f"{settings} pads on the left, SigLIP's texts are padded on the right")
    own = values.get("tokenizer_class") in ("SiglipTokenizer", "SiglipTokenizerFast")
    if (own or not path.is_file()) and (directory / SPIECE_FILE).is_file():
        path = directory / SPIECE_FILE
    # Others, such as SigLIP 2's, leave punctuation.
    clean: Cleaning = "canonicalize" if own or path.name == SPIECE_FILE else "lower"
    return SiglipTokenizer(path, pad, clean)


def tokenizer_files(tokenizer: Tokenizer, config: CLIPConfig) -> dict[str, bytes]:
    """Content by name of the files that transformers reads a tokenizer from.

    Raises:
        UserError: If transformers has no such tokenizer for such a model.
    """
    settings: dict[str, Any] = {"model_max_length": config.text.context_length}
    if isinstance(tokenizer, OpenClipTokenizer) and not config.text.fill_context:
        settings |= {"tokenizer_class": "CLIPTokenizer", "bos_token": _START}
        settings |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END)
        merges = "\n".join(["#version: 0.2", *map(" ".join, tokenizer.merges)])
        return {
            VOCAB_FILE: json.dumps(tokenizer.vocabulary, ensure_ascii=False).encode(),
            MERGES_FILE: f"{merges}\n".encode(),
            SETTINGS_FILE: _json(settings),
        }
    if isinstance(tokenizer, SiglipTokenizer) and config.text.fill_context:
        assert tokenizer.model is not None
        settings |= {
            "padding_side": "right",
            # Not the mask of padding, which SigLIP attends to.
            "model_input_names": ["input_ids"],
            "eos_token": tokenizer.token_of(tokenizer.end_id),
            "pad_token": tokenizer.token_of(tokenizer.pad_id),
        }
        if tokenizer.unknown_id is not None:
            settings["unk_token"] = tokenizer.token_of(tokenizer.unknown_id)
        if not tokenizer.model.lstrip().startswith(b"{"):
            settings["tokenizer_class"] = "SiglipTokenizer"
            return {SPIECE_FILE: tokenizer.model, SETTINGS_FILE: _json(settings)}
        # AutoTokenizer takes Siglip2Tokenizer for NaFlex, whatever stands here.
        if config.image.position.interpolation == "bilinear" and tokenizer.clean != "lower":
            raise UserError(
                "transformers' SigLIP 2 keeps punctuation, this model's tokenizer removes it: the "
                "model cannot be exported to transformers"
            )
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        model = _with_cleaning(tokenizer.model.decode(), tokenizer.clean)
        return {JSON_FILE: model.encode(), SETTINGS_FILE: _json(settings)}
    family = "SigLIP" if config.text.fill_context else "CLIP"
    raise UserError(
        f"transformers' {family} has no tokenizer of the kind {tokenizer.kind}: "
        "the model cannot be exported to transformers"
    )


def _with_cleaning(model: str, clean: Cleaning) -> str:
    """A ``tokenizer.json`` that cleans texts itself, before whatever it does to them."""
    from tokenizers import Regex, normalizers
    from tokenizers import Tokenizer as Rust

    steps: list[Any] = [normalizers.Lowercase()]
    if clean == "canonicalize":
        steps = [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
            *steps,
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    backend = Rust.from_str(model)
    if backend.normalizer is not None:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)
    return str(backend.to_str())


def _json(values: dict[str, Any]) -> bytes:
    return f"{json.dumps(values, indent=2)}\n".encode()
