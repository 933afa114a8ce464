"""CLIP, SigLIP and SigLIP 2 in transformers' layout into the packed towers, and back.

A folder with ``config.json``, ``model.safetensors``, tokenizer and ``preprocessor_config.json``, as
`save_pretrained` writes it there and released models are. `load_pretrained`
(`navit_clip.export.pretrained`) leads here for such a folder, `NaViTCLIP.save_transformers` writes
one. transformers itself is not needed. At a model's own size the embeddings are those of
transformers; at others they are with its ``interpolate_pos_encoding=True``, and for NaFlex always.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from navit_clip.errors import UserError
from navit_clip.export.card import WEIGHTS_FILE
from navit_clip.export.description import CONFIG_FILE, Description
from navit_clip.files import atomic_write, reading, replacing, writing
from navit_clip.inference.preprocess import Preprocess
from navit_clip.interop.transformers.architecture import read_config, write_config
from navit_clip.interop.transformers.names import model_pairs
from navit_clip.interop.transformers.tokenizer import (
    TOKENIZER_FILES,
    read_tokenizer,
    tokenizer_files,
)
from navit_clip.interop.weights import fit_checkpoint, to_ours, to_theirs
from navit_clip.models.clip import CLIP, CLIPConfig
from navit_clip.tokenizers.base import Tokenizer

__all__ = ["FILES", "describe", "read_tokenizer", "read_weights", "save"]

INDEX_FILE = "model.safetensors.index.json"
IMAGES_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
# All that is read of a repository, beside the weights; the index names more of those.
_MODEL_FILES = (CONFIG_FILE, "model*.safetensors", INDEX_FILE, IMAGES_FILE, PROCESSOR_FILE)
FILES = (*_MODEL_FILES, *TOKENIZER_FILES)

_WRONG = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError)
# Of transformers' image processors; SigLIP and SigLIP 2 have halves.
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def describe(directory: Path) -> Description:
    """The model in a folder of transformers, without its weights.

    Raises:
        UserError: If its files are damaged, or the packed towers have no such model.
    """
    path = directory / CONFIG_FILE
    with reading(path, *_WRONG):
        values = json.loads(path.read_text(encoding="utf-8"))
        images = _image_settings(directory)
        clip = values["model_type"] == "clip"
        mean, std = (_CLIP_MEAN, _CLIP_STD) if clip else ((0.5,) * 3, (0.5,) * 3)
        try:
            config = read_config(
                values,
                tuple(images.get("image_mean") or mean),
                tuple(images.get("image_std") or std),
            )
        except UserError as error:
            raise UserError(f"cannot load {directory}: {error}") from error
        tokens = images.get("max_num_patches", 256)
        naflex = values["model_type"] == "siglip2"
        return Description(
            config, Preprocess(tokens if naflex else config.image.position.table_side**2)
        )


def read_weights(directory: Path, config: CLIPConfig) -> dict[str, Tensor]:
    """The weights in a folder of transformers, under our names.

    Raises:
        UserError: If they are damaged or not of this model.
    """
    state = {}
    for path in _weight_files(directory):
        with reading(path, SafetensorError):
            state.update(load_file(path))
    # Some versions store the numbers from 0 to the length.
    state = {key: x for key, x in state.items() if not key.endswith(".position_ids")}
    # Before an impossible depth takes its time.
    if max(config.image.encoder.depth, config.text.encoder.depth) > len(state):
        raise UserError(f"the weights in {directory} are of a smaller model than its {CONFIG_FILE}")
    with torch.device("meta"):  # shapes alone
        expected = _to_theirs(CLIP(config))
    state = fit_checkpoint(str(directory), f"its {CONFIG_FILE}", state, expected)
    return to_ours(_pairs(config), state)


def save(
    directory: Path, model: CLIP, tokenizer: Tokenizer | None, preprocess: Preprocess | None
) -> None:
    """Writes a folder that transformers loads; see `NaViTCLIP.save_transformers`."""
    config = model.config
    values = write_config(config)
    if tokenizer is None or preprocess is None:
        missing = "tokenizer" if tokenizer is None else "preprocess"
        raise UserError(f"this model has no {missing} to save: set model.{missing} first")
    files = tokenizer_files(tokenizer, config)
    if tokenizer.pad_id is not None:
        values["text_config"]["pad_token_id"] = tokenizer.pad_id
    files[CONFIG_FILE] = _json(values)
    files[IMAGES_FILE] = _json(_their_image_settings(config, values["model_type"], preprocess))
    with writing(f"the model to {directory}", SafetensorError):
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS_FILE) as partial:
            # transformers refuses files that do not say so.
            state = {key: tensor.cpu() for key, tensor in _to_theirs(model).items()}
            save_file(state, partial, metadata={"format": "pt"})
        for name, content in files.items():
            atomic_write(directory / name, content)


def _pairs(config: CLIPConfig) -> list[Any]:
    return model_pairs(config, write_config(config)["model_type"])


def _to_theirs(model: CLIP) -> dict[str, Tensor]:
    ours = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    return to_theirs(_pairs(model.config), ours)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if not (directory / WEIGHTS_FILE).is_file() and index.is_file():
        with reading(index, *_WRONG):
            names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
            # Not from other folders.
            return [directory / Path(name).name for name in sorted(names)]
    if not (directory / WEIGHTS_FILE).is_file():
        raise UserError(
            f"no {WEIGHTS_FILE} in {directory}: let transformers load a pytorch_model.bin and save "
            "it again"
        )
    return [directory / WEIGHTS_FILE]


def _image_settings(directory: Path) -> Mapping[str, Any]:
    """Of the folder's image processor; nothing if it has none."""
    for name in (IMAGES_FILE, PROCESSOR_FILE):
        path = directory / name
        if path.is_file():
            with reading(path, *_WRONG):
                values = json.loads(path.read_text(encoding="utf-8"))
                return dict(values if name == IMAGES_FILE else values["image_processor"])
    return {}


def _their_image_settings(
    config: CLIPConfig, model_type: str, preprocess: Preprocess
) -> dict[str, Any]:
    image = config.image
    side = image.position.table_side * image.patch_size
    square = {"height": side, "width": side}
    name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[model_type]
    own: dict[str, dict[str, Any]] = {
        "clip": {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True},
        "siglip": {"size": square},
        "siglip2": {"patch_size": image.patch_size, "max_num_patches": preprocess.max_tokens},
    }
    return {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "image_mean": image.pixel_mean,
        "image_std": image.pixel_std,
        "resample": 2 if model_type == "siglip2" else 3,  # Pillow's bilinear or bicubic
        "rescale_factor": 1 / 255,
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
        **own[model_type],
    }


def _json(values: dict[str, Any]) -> bytes:
    return f"{json.dumps(values, indent=2)}\n".encode()
