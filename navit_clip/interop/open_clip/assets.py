"""What goes with an open_clip model: its weights and its tokenizer; data only, never code.

Weights come from a local file or a download; tensors keep open_clip's names here, `names` maps
them to ours. CLIP's tokenizer comes with open_clip. SigLIP's is a file: it lies beside a local
checkpoint, as in the released directories, or on the Hugging Face hub under the name that open_clip
has for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from navit_clip.errors import UserError
from navit_clip.files import one_line, reading
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer
from navit_clip.tokenizers.siglip import SiglipTokenizer, released_pad

TOKENIZER_FILE = "tokenizer.json"
_TRANSFORMERS = ("vision_model.", "text_model.", "model.vision_model.")
SETTINGS_FILE = "tokenizer_config.json"  # says how to pad

Weights = str | Path | None  # a tag of open_clip's, a local checkpoint, or neither


def tag_config(name: str, pretrained: Weights) -> dict[str, Any] | None:
    """open_clip's entry for released weights, with their preprocessing; None if there is none.

    Raises:
        UserError: If the weights were trained with the other activation than the model's.
    """
    import open_clip

    values = open_clip.get_pretrained_cfg(name, str(pretrained)) if pretrained is not None else None
    if not values:
        return None
    model_quick = open_clip.get_model_config(name).get("quick_gelu", False)
    if values.get("quick_gelu", False) != model_quick:
        other = name.removesuffix("-quickgelu") if model_quick else f"{name}-quickgelu"
        raise UserError(
            f"the weights {pretrained} of {name} were trained "
            f"{'without' if model_quick else 'with'} QuickGELU: load them as {other}"
        )
    return values


def find_checkpoint(name: str, pretrained: Weights, tag: dict[str, Any] | None) -> Path | None:
    """The file of the weights, in open_clip's cache if it has to be fetched; None without any.

    Raises:
        UserError: If they cannot be had.
    """
    import open_clip

    if pretrained is None:
        return None
    if tag is not None:
        problem = f"cannot download the weights {pretrained} of {name}"
        with one_line(problem, hint="; name a local checkpoint instead"):
            return Path(open_clip.download_pretrained(tag))
    path = Path(pretrained)
    if not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"no weights {pretrained} for {name}: neither a file nor an open_clip tag ({tags})"
        )
    return path


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads a checkpoint through open_clip's loader, which unpickles nothing but tensors.

    Args:
        path: A safetensors file by its suffix, or one of `torch.save`; of a state or of
            open_clip's trainer.

    Raises:
        UserError: If the file is missing, damaged, or holds anything else.
    """
    from open_clip.factory import load_state_dict

    # A damaged or hostile file fails anywhere inside torch's reader, with any error.
    with reading(f"weights from {path}", Exception):
        state = load_state_dict(str(path), weights_only=True)
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"cannot read weights from {path}: {key} is no tensor")
    if any(key.startswith(_TRANSFORMERS) for key in state):
        raise UserError(
            f"{path} has transformers' names: give open_clip's file of the same model, such as "
            "open_clip_model.safetensors of its repository"
        )
    # torch.compile and DDP put their names before the model's.
    return {re.sub(r"^((_orig_mod|module)\.)+", "", key): tensor for key, tensor in state.items()}


def own_tokenizer(
    text: Mapping[str, Any], checkpoint: Path | None, *, download: bool
) -> Tokenizer | None:
    """The tokenizer that open_clip gives a model.

    Args:
        text: open_clip's `text_cfg`.
        checkpoint: The weights' file, beside which a tokenizer is looked for first.
        download: Fetch the tokenizer if it is nowhere on this machine.

    Returns:
        The tokenizer; None where it is nowhere and may not be fetched.

    Raises:
        UserError: If it cannot be fetched or read, or is another model's.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository = text.get("hf_tokenizer_name")
    if repository is None:
        return OpenClipTokenizer()
    if checkpoint is not None and checkpoint.with_name(TOKENIZER_FILE).is_file():
        path = checkpoint.with_name(TOKENIZER_FILE)
    else:
        local = not download
        with one_line(f"cannot download the tokenizer {repository}"):
            try:
                # Read beside the other.
                hf_hub_download(repository, SETTINGS_FILE, local_files_only=local)
                path = Path(hf_hub_download(repository, TOKENIZER_FILE, local_files_only=local))
            except LocalEntryNotFoundError:
                if not download:
                    return None
                raise
    tokenizer = SiglipTokenizer(path, released_pad(path))
    if tokenizer.vocab_size > text["vocab_size"]:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} ids, the model embeds {text['vocab_size']}: "
            "it is another model's tokenizer"
        )
    return tokenizer
