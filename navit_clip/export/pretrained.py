"""A model's directory: all that inference needs, and nothing that runs code here.

``config.json`` (architecture, preprocessing, checksum of the weights, a classifier's class names),
``model.safetensors`` (weights), the tokenizer's own files if there is one, and a model card. Beside
a CLIP lie the two files by which transformers and sentence-transformers find the classes of
`navit_clip.interop.auto`; nothing here reads them.
Written by the trainer at its end and by a model's ``save_pretrained``, read by its
``from_pretrained`` (`navit_clip.export.hub`), the evaluation and the trainer. A repository of the
Hugging Face Hub holds the same files: pushing is `huggingface_hub.ModelHubMixin.push_to_hub`,
which uploads what `save_pretrained` writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from navit_clip.errors import UserError
from navit_clip.export.card import CARD_FILE, WEIGHTS_FILE, write_card
from navit_clip.export.description import CONFIG_FILE, BareModel, Description, is_transformers
from navit_clip.files import atomic_write, one_line, reading, replacing, sha256_of, writing
from navit_clip.inference.preprocess import Preprocess
from navit_clip.interop import transformers
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.masked_image import MaskedImageConfig
from navit_clip.tokenizers.base import TOKENIZER_FILES, Tokenizer
from navit_clip.tokenizers.load import load_tokenizer

# All that loading reads, and the card for whoever finds it.
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES, CARD_FILE)

# What transformers and sentence-transformers load an exported CLIP by.
AUTO_FILE = "modeling_navit_clip"
AUTO_MODULE = """\
# For transformers and sentence-transformers; navit_clip itself does not read it.
from navit_clip.interop.auto import NaViTCLIPConfig, NaViTCLIPModel, NaViTCLIPModule  # noqa: F401
"""
_AUTO_CONFIG = {
    "model_type": "navit_clip",
    "auto_map": {
        "AutoConfig": f"{AUTO_FILE}.NaViTCLIPConfig",
        "AutoModel": f"{AUTO_FILE}.NaViTCLIPModel",
    },
}
_MODULES = [{"idx": 0, "name": "0", "path": "", "type": f"{AUTO_FILE}.NaViTCLIPModule"}]
AUTO_FILES = {f"{AUTO_FILE}.py": AUTO_MODULE, "modules.json": json.dumps(_MODULES) + "\n"}

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")

Model = TypeVar("Model", bound=nn.Module)


def find_directory(directory_or_repo: str | Path, **download: Any) -> Path:
    """The directory of a model's files: the one named, or a repository's in the Hub's cache.

    Only a name that is no directory is looked for on the Hub; a directory never asks the network.
    `download` are options of `huggingface_hub.snapshot_download`.

    Raises:
        UserError: If a repository cannot be downloaded.
    """
    directory, repository = Path(directory_or_repo), str(directory_or_repo)
    if directory.is_dir() or not _REPOSITORY.fullmatch(repository):
        return directory
    from huggingface_hub import snapshot_download

    with one_line(f"no directory {repository}, and cannot download it from the Hub"):
        wanted = [*MODEL_FILES, *transformers.FILES]
        return Path(snapshot_download(repository, allow_patterns=wanted, **download))


def save_pretrained(
    directory: Path,
    model: BareModel,
    tokenizer: Tokenizer | None,
    preprocess: Preprocess,
    classes: Sequence[str] = (),
) -> None:
    """Writes a model's directory, each file atomically.

    A model card that is there already stays as it is.

    Args:
        directory: Made if need be.
        model: With its weights.
        tokenizer: None for a model that reads no texts.
        preprocess: How the model wants its images.
        classes: Names of a classifier's classes.

    Raises:
        UserError: If the disk does not take it.
    """
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    with writing(f"the model to {directory}", SafetensorError):
        directory.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save(directory)
        path = directory / WEIGHTS_FILE
        with replacing(path) as partial:
            save_file(weights, partial)
            checksum = sha256_of(partial)
        description = Description(model.config, preprocess, checksum, tuple(classes))
        clip = isinstance(model.config, CLIPConfig)
        description.write(directory / CONFIG_FILE, _AUTO_CONFIG if clip else {})
        for name, content in AUTO_FILES.items() if clip else ():
            atomic_write(directory / name, content)
        # safetensors gives it to its owner alone; others may read it as they may the rest.
        path.chmod((directory / CONFIG_FILE).stat().st_mode & 0o777)
        if not (directory / CARD_FILE).exists():
            write_card(directory)


def read_description(directory: Path) -> Description:
    """Which model a directory holds, ours or in transformers' layout.

    Raises:
        UserError: If there is none, or its files are damaged.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"no model at {directory}: expected {CONFIG_FILE} in it (RUN_DIR/model)")
    return transformers.describe(directory) if is_transformers(path) else Description.read(path)


def load_pretrained(
    directory: Path, build: Callable[[Description, Tokenizer | None], Model]
) -> Model:
    """Reads a model's directory into what `build` makes, such as a `NaViTCLIP`, on the host.

    The directory may be in transformers' layout. `build` gets None in place of the tokenizer of a
    model that reads no texts.

    Raises:
        UserError: If a file is missing, damaged, or does not fit the others.
    """
    path = directory / CONFIG_FILE
    description = read_description(directory)
    config = description.model
    if is_transformers(path):
        assert isinstance(config, CLIPConfig)
        state = transformers.read_weights(directory, config)
        model = build(description, transformers.read_tokenizer(directory, config))
        model.load_state_dict(state)
        return model
    tokenizer = _load_tokenizer(directory, config) if isinstance(config, CLIPConfig) else None
    _check_size(path, directory / WEIGHTS_FILE, description)
    with reading(path, ValueError):  # such as a width that the positions cannot have
        model = build(description, tokenizer)
    weights_path = directory / WEIGHTS_FILE
    with reading(weights_path, SafetensorError, RuntimeError, hint="; export it again"):
        model.load_state_dict(load_file(weights_path))
    # safetensors checks its header, not the numbers. The first exports have no checksum.
    expected = description.weights_sha256
    if expected is not None and sha256_of(weights_path) != expected:
        raise UserError(
            f"{weights_path} is damaged or belongs to another {CONFIG_FILE}: its SHA-256 is not "
            "the one written there; copy or export the model again"
        )
    return model


def _check_size(path: Path, weights_path: Path, description: Description) -> None:
    """Refuses an architecture far larger than its weights before memory is taken for it."""
    with reading(weights_path, SafetensorError, hint="; export it again"):
        with safe_open(weights_path, framework="pt") as weights:
            tensors = len(weights.keys())
        stored = weights_path.stat().st_size
    config = description.model
    depth = config.image.encoder.depth
    if isinstance(config, CLIPConfig):
        depth = max(depth, config.text.encoder.depth)
    elif isinstance(config, MaskedImageConfig) and config.decoder is not None:
        depth = max(depth, config.decoder.depth)
    numbers = 0
    if depth <= tensors:
        with reading(path, ValueError, RuntimeError, TypeError), torch.device("meta"):
            numbers = sum(parameter.numel() for parameter in description.build().parameters())
    # A number takes at least a byte; loading names what a little is missing from.
    if depth > tensors or numbers > stored + 10_000_000:
        raise UserError(
            f"{path} describes a larger model than {weights_path.name} holds: the files belong to "
            "different models, or one is damaged"
        )


def _load_tokenizer(directory: Path, config: CLIPConfig) -> Tokenizer:
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
    return tokenizer
