"""A task of the tests' own: one stream, ragged targets, per-token targets, two buckets.

An image carries any number of marks, numbers in its JSON. The model predicts one number per image,
to be near all of its marks, and the brightness of each patch. Run as a script this is
``python -m train`` with the task known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from navit_clip.data.builders.base import Origin
from navit_clip.data.config import DataConfig
from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.data.drop import DropConfig, keep_patches, sample_rate
from navit_clip.data.patches import cut_patches
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.seeding import generator, sample_generator
from navit_clip.data.sizing import ResolutionConfig, sample_grid
from navit_clip.models.pooling import MeanPooling
from navit_clip.models.transformer import Encoder, EncoderConfig
from navit_clip.packed.batch import Inputs
from navit_clip.packed.images import ImagePatches, PackedImages, pack_images
from navit_clip.packed.ragged import Ragged
from navit_clip.tasks.base import Loss, Task, TaskConfig
from navit_clip.tasks.registry import register
from navit_clip.training.__main__ import main

PATCH = 8
MOST_SIDE = 16
FULL_BLACK = 255.0


@dataclass(frozen=True)
class Marked:
    """One image with its marks; patches carry their brightness."""

    id: str
    origin: Origin
    image: ImagePatches
    marks: np.ndarray
    seed: int

    @property
    def lengths(self) -> tuple[int]:
        return (len(self.image.patches),)

    @property
    def full_lengths(self) -> tuple[int]:
        return (self.image.tokens_before_drop,)

    @property
    def bucket(self) -> str:
        rows, columns = self.image.grid
        return "tall" if rows > columns else "wide"

    def trimmed(self, tokens: int) -> Marked:
        rng = generator(self.seed, self.origin.epoch, "trim", self.id)
        keep = np.sort(rng.permutation(len(self.image.patches))[:tokens])
        return replace(self, image=self.image.kept(keep))


@dataclass(frozen=True)
class MarkInputs(Inputs):
    """Packed images, and the marks of each in the order in which the images came."""

    images: PackedImages
    marks: Ragged


@dataclass(frozen=True)
class MarkBuilder:
    """Builds examples of shards with ``json.marks``."""

    resolution: ResolutionConfig
    drop: DropConfig
    seed: int
    streams: tuple[str, ...] = ("patches",)

    def __call__(
        self, raw: RawSample, origin: Origin, fields: Mapping[str, float] | None = None
    ) -> Marked:
        rng = sample_generator(self.seed, origin.epoch, raw.id)
        image = EncodedImage(find_image(raw.members))
        rows, columns = sample_grid(
            self.resolution, image.height, image.width, PATCH, MOST_SIDE, rng, origin.images_seen
        )
        rate = sample_rate(self.drop, rows * columns, origin.images_seen, rng)
        keep = keep_patches(rows * columns, rate, rng)
        patches = cut_patches(image.pixels(rows * PATCH, columns * PATCH), PATCH, keep)
        brightness = (patches.patches.mean(1) / FULL_BLACK).astype(np.float32)
        marks = np.array(json.loads(raw.members["json"])["marks"], dtype=np.float32)
        return Marked(raw.id, origin, replace(patches, targets=brightness), marks, self.seed)

    def collate(self, samples: Sequence[Marked], pad_to: tuple[int, ...] | None) -> MarkInputs:
        return MarkInputs(
            pack_images([s.image for s in samples], budget=pad_to[0] if pad_to else None),
            Ragged.from_arrays([s.marks for s in samples]),
        )


class MarkOutputs(NamedTuple):
    """Predicted mark of each image, brightness of each token, and a learned scalar."""

    mark_E: Tensor
    brightness: Ragged
    offset: Tensor


class MarkModel(nn.Module):
    """An encoder with two heads."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH**2, config.width)
        self.encoder = Encoder(config)
        self.pool = MeanPooling()
        self.mark = nn.Linear(config.width, 1)
        self.brightness = nn.Linear(config.width, 1)
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: MarkInputs) -> MarkOutputs:
        images = inputs.images
        pixels_TK = images.patches.to(self.embed.weight.dtype) / FULL_BLACK
        x_TC = self.encoder(self.embed(pixels_TK), images.segments)
        mark_E = self.mark(self.pool(x_TC, images.segments))[images.order, 0]
        real = images.segments.num_real_tokens
        brightness = Ragged(
            self.brightness(x_TC[:real])[:, 0],
            images.segments.ids[:real],
            images.segments.lengths[: images.segments.num_examples],
        )
        return MarkOutputs(mark_E, brightness, self.offset)


@dataclass(frozen=True)
class MarksConfig(TaskConfig):
    """The task of marks.

    Attributes:
        kind: ``marks``.
        encoder: Of the model.
        most: The offset never exceeds this.
    """

    kind: Literal["marks"] = "marks"
    encoder: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(width=16, depth=2, heads=2)
    )
    most: float = 0.25

    def check(self, data: DataConfig) -> None:
        data.budget.ordered(("patches",))

    def build(self, data: DataConfig) -> MarksTask:
        return MarksTask(self, data)


class MarksTask(Task):
    """Squared errors, a mean over all marks and patches."""

    def __init__(self, config: MarksConfig, data: DataConfig) -> None:
        self.config, self.data = config, data

    def build_model(self) -> MarkModel:
        return MarkModel(self.config.encoder)

    def build_samples(self, tokenizer: Any, seed: int) -> MarkBuilder:
        assert tokenizer is None
        return MarkBuilder(self.data.resolution, self.data.drop, seed)

    def count(self, inputs: MarkInputs) -> float:
        return sum(inputs.marks.lengths) + inputs.images.segments.num_real_tokens

    def loss(
        self, outputs: MarkOutputs, inputs: Sequence[MarkInputs], counts: Sequence[float]
    ) -> Loss:
        (part,), count = inputs, sum(counts)
        predicted_N = outputs.mark_E[part.marks.ids] + outputs.offset
        of_marks = (predicted_N - part.marks.values).square().sum()
        real = part.images.segments.num_real_tokens
        assert part.images.targets is not None
        error_T = outputs.brightness.values - part.images.targets[:real]
        total = (of_marks + error_T.square().sum()) / count
        return Loss(total, {"mark_loss": of_marks / count})

    def after_step(self, model: nn.Module, found_inf: Tensor) -> None:
        assert isinstance(model, MarkModel)
        with torch.no_grad():
            model.offset.clamp_(max=self.config.most)

    def layers_above(self, name: str) -> int:
        return int(name.startswith(("embed", "encoder")))

    def flops(self, inputs: MarkInputs) -> float:
        return 1000.0 * inputs.images.segments.num_real_tokens

    def describe(self, folder: Path) -> None:
        (folder / "model.json").write_text(json.dumps({"kind": self.config.kind}))

    def export(self, weights: Mapping[str, Tensor] | None, tokenizer: Any) -> ExportedMarks:
        assert weights is not None
        return ExportedMarks(weights)


@dataclass(frozen=True)
class ExportedMarks:
    """Weights alone."""

    weights: Mapping[str, Tensor]

    def save_pretrained(self, save_directory: str | Path) -> None:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.weights), folder / "model.safetensors")


if __name__ == "__main__":
    import marks_task  # noqa: F401  by its own name, under which its classes are found again

    main()
else:
    register("marks", MarksConfig)
