"""The model card: README.md of an exported model, for people and for the Hub.

Holds what the files beside it say, and what its caller adds: the trainer how the model was trained,
each evaluation of it a line with its results.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData
from safetensors import SafetensorError, safe_open

from navit_clip.errors import printable
from navit_clip.export.description import CONFIG_FILE, Description, is_transformers
from navit_clip.files import atomic_write, locked, reading, writing
from navit_clip.models.classifier import ClassifierConfig
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.text_tower import TextTowerConfig

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
LIBRARY = "navit-clip"
TASK = "zero-shot-image-classification"
TAGS = ("clip", "image-text-retrieval", "navit")
MASKED_TASK, MASKED_TAGS = "image-feature-extraction", ("navit", "masked-autoencoder")
CLASSIFIER_TASK, CLASSIFIER_TAGS = "image-classification", ("navit",)

_LICENSE = (
    "# license: choose one before you publish, see https://hf.co/docs/hub/repositories-licenses"
)
_IMAGES = (
    "Images keep their aspect ratio and, up to the token limit, their size; they are packed "
    "without padding (NaViT)."
)
_CLIP = """An image tower and a text tower with one embedding space (CLIP). {images}

## Use

```python
from navit_clip import NaViTCLIP

model = NaViTCLIP.from_pretrained("path/to/this/directory")
image_vectors = model.encode_image(["photo.jpg"])  # paths, PIL images, arrays or tensors
text_vectors = model.encode_text(["a photo of a dog"])
probabilities = model.classify(["photo.jpg"], ["dog", "cat"])
```

`transformers.AutoModel` and `sentence_transformers.SentenceTransformer` load it too, with
`trust_remote_code=True` where navit-clip is installed."""
_CLASSIFIER = """An image tower with a head over {classes} classes: {names}. {images}

## Use

```python
from navit_clip import NaViTClassifier

model = NaViTClassifier.from_pretrained("path/to/this/directory")
probabilities = model.classify(["photo.jpg"])  # paths, PIL images, arrays or tensors
names = [model.classes[index] for index in probabilities.argmax(1)]
```"""
_MASKED = """An image tower pretrained by predicting hidden patches, and the decoder that predicts
them (MAE). {images}

## Use

```python
from navit_clip import NaViTMaskedImage

model = NaViTMaskedImage.from_pretrained("path/to/this/directory")
features = model.features(["photo.jpg"])  # paths, PIL images, arrays or tensors
predictions = model.predict(["photo.jpg"], rate=0.75)
```"""
_NAMED = 20  # classes
_KINDS = {
    "clip": (TASK, TAGS, _CLIP),
    "classifier": (CLASSIFIER_TASK, CLASSIFIER_TAGS, _CLASSIFIER),
    "masked_image": (MASKED_TASK, MASKED_TAGS, _MASKED),
}


_EVALUATIONS = re.compile(
    r"\n## Evaluation\n\n<!-- of the weights (\w+) -->\n\n\|.*\n\|.*\n((?:\|.*\n)*)"
)


def write_card(directory: Path, name: str = "NaViT", sections: Sequence[str] = ()) -> None:
    """Writes README.md into an exported model, over one that is there.

    Evaluations of the same weights that it lists stay.

    Args:
        directory: The model's, as `navit_clip.export.pretrained.save_pretrained` wrote it.
        name: Heading of the card.
        sections: Markdown to put below what is said of every model.

    Raises:
        UserError: If the model's files cannot be read, or the card cannot be written.
    """
    description = Description.read(directory / CONFIG_FILE)
    task, tags, text = _KINDS[description.kind]
    header = ModelCardData(library_name=LIBRARY, pipeline_tag=task, tags=list(tags))
    names = [*map(plain_text, description.classes[:_NAMED])]
    more = ["…"] * (len(description.classes) > _NAMED)
    parts = [
        f"---\n{header.to_yaml()}\n{_LICENSE}\n---",
        f"# {plain_text(name)}",
        text.format(
            images=_IMAGES, classes=f"{len(description.classes):,}", names=", ".join(names + more)
        ),
        "## Model",
        _model_table(description, _count_parameters(directory / WEIGHTS_FILE)),
        *sections,
    ]
    path = directory / CARD_FILE
    with writing(f"the model card of {directory}", ValueError):
        rows = _evaluations(path.read_text(encoding="utf-8"), description) if path.is_file() else []
        text = "\n\n".join(parts) + "\n"
        atomic_write(path, _with_evaluations(text, rows, description) if rows else text)


def add_evaluation(directory: Path, what: str, data: str, counts: str, results: str) -> None:
    """Puts a line into the table of evaluations of the card in an exported model.

    In place of an earlier one of the same `what` and `data`; those of other weights go. Processes
    that do so at once wait for each other. A card that was removed, is a link, or belongs to a
    model in transformers' layout, is left alone.

    Args:
        directory: The model's.
        what: Name of the evaluation.
        data: Name or path of its data.
        counts: How much that was.
        results: The metrics.

    Raises:
        UserError: If the card cannot be read or written.
    """
    path = directory / CARD_FILE
    if path.is_symlink() or not path.exists() or is_transformers(directory / CONFIG_FILE):
        return
    description, line = Description.read(directory / CONFIG_FILE), [what, data, counts, results]
    new = markdown_table(line, []).partition("\n")[0]
    key = markdown_table([what, data], []).partition("\n")[0]
    with writing(f"the model card of {directory}", ValueError), locked(directory):
        text = path.read_text(encoding="utf-8")
        rows = [row for row in _evaluations(text, description) if not row.startswith(key)]
        atomic_write(path, _with_evaluations(text, [*rows, new], description))


def _evaluations(text: str, description: Description) -> list[str]:
    """Lines of the table in a card, if they are of these weights."""
    found = _EVALUATIONS.search(text)
    return found[2].splitlines() if found and found[1] == str(description.weights_sha256) else []


def _with_evaluations(text: str, rows: Sequence[str], description: Description) -> str:
    """A card with these lines in the place of those that it has, or at its end."""
    header = markdown_table(["", "data", "", "results"], [])
    mark = f"<!-- of the weights {description.weights_sha256} -->"
    section = "\n".join(["", "## Evaluation", "", mark, "", header, *rows, ""])
    found = _EVALUATIONS.search(text)
    return text[: found.start()] + section + text[found.end() :] if found else text + section


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
    image = model.image
    patches = f"patches of {image.patch_size}×{image.patch_size}"
    if image.hierarchy.depths:
        patches += f" in {len(image.hierarchy.depths)} stages, windows of {image.hierarchy.window}"
    shape = "squashed to a square" if preprocess.square else "at their aspect ratio"
    rows = [
        ["parameters", f"{parameters / 1e6:.1f}M"],
        ["image tower", f"{tower(image)}, {patches}"],
        ["images", f"at most {preprocess.max_tokens} patches each, {shape}"],
    ]
    if isinstance(model, CLIPConfig):
        text = model.text
        rows.insert(1, ["embedding", f"{model.embed_dim} numbers"])
        rows.insert(3, ["text tower", tower(text)])
        rows.append(["texts", f"at most {text.context_length} of {text.vocab_size:,} tokens"])
    elif isinstance(model, ClassifierConfig):
        rows.append(["classes", f"{len(description.classes):,}, {model.output}"])
    else:
        decoder = model.decoder
        what = f"width {decoder.width}, depth {decoder.depth}" if decoder else "a linear layer"
        rows.append(["decoder", what])
    return markdown_table(["", ""], rows)
