"""The model card: README.md of an exported model, for people and for the Hub.

Says what the files beside it and, if there is one, the run that made them say, and nothing else: a
model's merits are for its evaluation and its author.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml
from safetensors import SafetensorError, safe_open

from navit_clip.errors import UserError
from navit_clip.files import atomic_write

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
LIBRARY = "navit-clip"
TASK = "zero-shot-image-classification"
TAGS = ("clip", "image-text-retrieval", "navit")

_METRICS = ("loss", "logit_scale", "examples_per_s")
_USE = """```python
from navit_clip import NaViTCLIP

model = NaViTCLIP.from_pretrained("path/to/this/directory")
image_vectors = model.encode_image(["photo.jpg"])  # paths, PIL images, arrays or tensors
text_vectors = model.encode_text(["a photo of a dog"])
probabilities = model.classify(["photo.jpg"], ["dog", "cat"])
```"""


def write_card(directory: Path, run_dir: Path | None = None) -> None:
    """Writes README.md into an exported model, over one that is there.

    Args:
        directory: Of the model, as `navit_clip.export.pretrained.save_pretrained` wrote it.
        run_dir: Of the training run. What it holds of ``config.yaml``, ``metrics.jsonl``,
            ``eval/zeroshot.json``, ``eval/retrieval.json`` and ``eval/*.png`` is told; pictures
            are copied beside the card. Web addresses lose passwords and queries, commands are not
            repeated.

    Raises:
        UserError: If the model's files cannot be read, or the card cannot be written.
    """
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
        parameters = _count_parameters(directory / WEIGHTS_FILE)
        model = _model_table(config["model"], config["preprocess"], parameters)
        name = "NaViT CLIP" if run_dir is None else run_dir.resolve().name
        parts = [
            _front_matter(),
            f"# {name}",
            "An image tower and a text tower with one embedding space (CLIP). Images keep their "
            "aspect ratio and, up to the token budget, their size; they are packed without "
            "padding (NaViT).",
            "## Use",
            _USE,
            "## Model",
            model,
        ]
        if run_dir is not None:
            parts += _training(run_dir)
            parts += _evaluation(run_dir / "eval", directory)
        atomic_write(directory / CARD_FILE, "\n\n".join(parts) + "\n")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"cannot write the model card of {directory}: {error}") from error


def _front_matter() -> str:
    values = {"library_name": LIBRARY, "pipeline_tag": TASK, "tags": list(TAGS)}
    note = (
        "# license: choose one before you publish, see https://hf.co/docs/hub/repositories-licenses"
    )
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}{note}\n---"


def _count_parameters(path: Path) -> int:
    with safe_open(path, framework="pt") as weights:
        return sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _model_table(model: Mapping[str, Any], preprocess: Mapping[str, Any], parameters: int) -> str:
    def tower(name: str) -> str:
        encoder, pooling = model[name]["encoder"], model[name]["pooling"]
        return (
            f"width {encoder['width']}, depth {encoder['depth']}, heads {encoder['heads']}, "
            f"{pooling} pooling"
        )

    image, text = model["image"], model["text"]
    shape = "squashed to a square" if preprocess["square"] else "at their aspect ratio"
    rows = [
        ["parameters", f"{parameters / 1e6:.1f}M"],
        ["embedding", f"{model['embed_dim']} numbers"],
        [
            "image tower",
            f"{tower('image')}, patches of {image['patch_size']}×{image['patch_size']}",
        ],
        ["text tower", tower("text")],
        ["images", f"at most {preprocess['max_tokens']} patches each, {shape}"],
        ["texts", f"at most {text['context_length']} of {text['vocab_size']:,} tokens"],
    ]
    return _table(["", ""], rows)


def _training(run_dir: Path) -> list[str]:
    """What config.yaml and metrics.jsonl of a run say."""
    config = _read_yaml(run_dir / "config.yaml")
    metrics = _read_lines(run_dir / "metrics.jsonl")
    data, optim = _group(config, "data"), _group(config, "optim")
    init, task = _group(config, "init"), _group(config, "task")
    rows: list[list[object]] = []

    def add(name: str, value: object) -> None:
        if value not in (None, "", {}, []):
            rows.append([name, value])

    add("began with", _settings(init, ("model", "weights")))
    add("data", ", ".join(_sources(data)))
    captions = task.get("captions")
    add("captions", ", ".join(captions) if isinstance(captions, dict) else captions)
    resolution, drop = _group(data, "resolution"), _group(data, "drop")
    sides = ("min_side", "max_side") if resolution.get("mode") == "sampled" else ()
    add("resolution", _settings(resolution, ("mode", *sides, "max_tokens")))
    rates = {
        "fixed": ("rate",),
        "beta": ("rate", "max_rate"),
        "resolution": ("low_rate", "high_rate"),
    }
    add("token drop", _settings(drop, ("kind", *rates.get(drop.get("kind", ""), ()))))
    if metrics:
        add("steps", f"{metrics[-1].get('step', 0):,}")
        pairs = sum(line.get("examples") or 0 for line in metrics)
        add("examples seen", f"{pairs:,.0f}" if pairs else None)
    add("optimiser", _settings(optim, ("kind", "lr", "weight_decay")))
    add("schedule", _settings(_group(optim, "schedule"), ("kind", "warmup_steps")))
    add("loss", _group(task, "loss").get("kind"))
    add("precision", config.get("precision"))
    add("seed", config.get("seed"))
    for name in _METRICS:
        value = metrics[-1].get(name) if metrics else None
        if isinstance(value, int | float):
            add(f"last {name}", f"{value:.4g}")
    return ["## Training", _table(["", ""], rows)] if rows else []


def _sources(data: Mapping[str, Any]) -> list[str]:
    """The shards as the configuration names them, without what may be secret."""
    mix = data.get("mix")
    if isinstance(mix, dict) and mix:
        named = [(f"{name}: ", source.get("shards")) for name, source in mix.items()]
    else:
        named = [("", data.get("train"))]
    return [
        f"{prefix}{_public(str(spec))}"
        for prefix, specs in named
        for spec in (specs if isinstance(specs, list) else [specs])
        if spec
    ]


def _public(spec: str) -> str:
    if spec.startswith("pipe:"):
        return "the output of a command"
    if "://" not in spec:
        return f"`{spec}`"
    parts = urlsplit(spec)
    return f"`{urlunsplit((parts.scheme, parts.netloc.rpartition('@')[2], parts.path, '', ''))}`"


def _settings(values: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names if values.get(name) is not None)


def _evaluation(folder: Path, directory: Path) -> list[str]:
    """Results of the harnesses at the model's own budget, and their pictures."""
    parts: list[str] = []
    zeroshot, retrieval = (_read_json(folder / f"{n}.json") for n in ("zeroshot", "retrieval"))
    if "top1" in zeroshot:
        accuracy = [[f"top-{k}", f"{zeroshot[f'top{k}']:.1%}"] for k in (1, 5)]
        parts += [
            f"Zero-shot classification: {zeroshot.get('images', 0):,} images, "
            f"{zeroshot.get('classes', 0):,} classes, at most {zeroshot.get('max_tokens')} patches "
            "per image.",
            _table(["", "accuracy"], accuracy),
        ]
    if "image_to_text" in retrieval:
        ways = {"image to text": "image_to_text", "text to image": "text_to_image"}
        ks = [k for k in retrieval["image_to_text"] if k.startswith("R@")]
        parts += [
            f"Retrieval: {retrieval.get('images', 0):,} images, {retrieval.get('captions', 0):,} "
            f"captions, at most {retrieval.get('max_tokens')} patches per image.",
            _table(
                ["", *ks],
                [[way, *(f"{retrieval[key][k]:.1%}" for k in ks)] for way, key in ways.items()],
            ),
        ]
    for picture in sorted(folder.glob("*.png")):
        shutil.copyfile(picture, directory / picture.name)
        parts.append(f"![{picture.stem}]({picture.name})")
    return ["## Evaluation", *parts] if parts else []


def _group(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    group = values.get(name)
    return group if isinstance(group, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; what a kill cut short is left out."""
    try:
        text = path.read_text()
    except (OSError, ValueError):
        return []
    found = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            found.append(values)
    return found
