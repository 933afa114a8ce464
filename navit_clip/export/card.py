"""The model card: README.md of an exported model, for people and for the Hub.

Holds what the files beside it say, and what its caller adds: the trainer adds how the model was
trained. A model's merits are for its evaluation and its author.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData
from safetensors import SafetensorError, safe_open

from navit_clip.errors import printable
from navit_clip.export.description import CONFIG_FILE, Description
from navit_clip.files import atomic_write, reading, writing
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.text_tower import TextTowerConfig

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
LIBRARY = "navit-clip"
TASK = "zero-shot-image-classification"
TAGS = ("clip", "image-text-retrieval", "navit")

_LICENSE = (
    "# license: choose one before you publish, see https://hf.co/docs/hub/repositories-licenses"
)
_ABOUT = (
    "An image tower and a text tower with one embedding space (CLIP). Images keep their aspect "
    "ratio and, up to the token limit, their size; they are packed without padding (NaViT)."
)
_USE = """```python
from navit_clip import NaViTCLIP

model = NaViTCLIP.from_pretrained("path/to/this/directory")
image_vectors = model.encode_image(["photo.jpg"])  # paths, PIL images, arrays or tensors
text_vectors = model.encode_text(["a photo of a dog"])
probabilities = model.classify(["photo.jpg"], ["dog", "cat"])
```"""


def write_card(directory: Path, name: str = "NaViT CLIP", sections: Sequence[str] = ()) -> None:
    """Writes README.md into an exported model, over one that is there.

    Args:
        directory: The model's, as `navit_clip.export.pretrained.save_pretrained` wrote it.
        name: Heading of the card.
        sections: Markdown to put below what is said of every model.

    Raises:
        UserError: If the model's files cannot be read, or the card cannot be written.
    """
    description = Description.read(directory / CONFIG_FILE)
    header = ModelCardData(library_name=LIBRARY, pipeline_tag=TASK, tags=list(TAGS))
    parts = [
        f"---\n{header.to_yaml()}\n{_LICENSE}\n---",
        f"# {plain_text(name)}",
        _ABOUT,
        "## Use",
        _USE,
        "## Model",
        _model_table(description, _count_parameters(directory / WEIGHTS_FILE)),
        *sections,
    ]
    with writing(f"the model card of {directory}"):
        atomic_write(directory / CARD_FILE, "\n\n".join(parts) + "\n")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of Markdown; line breaks, bars, tags and links within a cell do no harm."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    return plain_text(" ".join(str(value).split()))


def plain_text(text: str) -> str:
    """Text without a tag, a link or a picture of its own."""
    text = printable(text).replace("|", "\\|")
    return re.sub(r"[<>\[\]!]", lambda found: f"&#{ord(found[0])};", text)


def _count_parameters(path: Path) -> int:
    with reading(path, SafetensorError), safe_open(path, framework="pt") as weights:
        return sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118


def _model_table(description: Description, parameters: int) -> str:
    def tower(config: ImageTowerConfig | TextTowerConfig) -> str:
        encoder = config.encoder
        return (
            f"width {encoder.width}, depth {encoder.depth}, heads {encoder.heads}, "
            f"{config.pooling} pooling"
        )

    model, preprocess = description.model, description.preprocess
    image, text = model.image, model.text
    shape = "squashed to a square" if preprocess.square else "at their aspect ratio"
    rows = [
        ["parameters", f"{parameters / 1e6:.1f}M"],
        ["embedding", f"{model.embed_dim} numbers"],
        ["image tower", f"{tower(image)}, patches of {image.patch_size}×{image.patch_size}"],
        ["text tower", tower(text)],
        ["images", f"at most {preprocess.max_tokens} patches each, {shape}"],
        ["texts", f"at most {text.context_length} of {text.vocab_size:,} tokens"],
    ]
    return markdown_table(["", ""], rows)
