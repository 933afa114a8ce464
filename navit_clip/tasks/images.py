"""What tasks share whose model has an image tower: sizes, export, evaluation, first weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from navit_clip.checkpoints.folder import RUN_MODEL
from navit_clip.configs import check_choices
from navit_clip.data.config import DataConfig
from navit_clip.data.sizing import default_max_tokens
from navit_clip.evaluation.models import Around, Model, packed_model
from navit_clip.export.description import Description
from navit_clip.inference.preprocess import Preprocess
from navit_clip.load import AnyModel, build_model
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.weights import build_with
from navit_clip.packed.batch import Inputs
from navit_clip.packed.images import PackedImages, Planner
from navit_clip.precision import Precision
from navit_clip.tasks.base import ExportedModel, Task, TaskConfig
from navit_clip.tasks.media import Histogram, Media
from navit_clip.tasks.run_card import write_run_card
from navit_clip.tasks.source import InitConfig
from navit_clip.tokenizers.base import Tokenizer

_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


def check_sizes(data: DataConfig, image: ImageTowerConfig, most: float = math.inf) -> None:
    """Compares sizes of images and patches with what the tower takes.

    Args:
        data: How images are sized.
        image: The tower.
        most: Rows or columns of patches that another part of the model knows.

    Raises:
        ValueError: If it cannot read patches of a size, or squares have more of them than allowed
            or than positions know, or some of them would be dropped before a stem; names the
            fields.
    """
    resolution = data.resolution
    if image.stem != "none" and (data.drop.kind != "none" or data.packing != "fill"):
        raise ValueError(
            f"task.model.image.stem={image.stem} reads whole images: data.drop.kind must be none "
            f"and data.packing fill, got {data.drop.kind} and {data.packing}"
        )
    for size in resolution.patch_sizes or [image.patch_size]:
        try:
            image.check_patch_size(size)
        except ValueError as error:
            raise ValueError(f"data.resolution.patch_sizes: {error}") from error
        square = max(1, resolution.max_side // size)
        if resolution.mode == "square" and (
            square**2 > resolution.max_tokens or square > min(most, image.position.max_grid_side)
        ):
            raise ValueError(
                f"data.resolution.max_side={resolution.max_side} makes {square}×{square} patches, "
                f"past data.resolution.max_tokens={resolution.max_tokens} or "
                f"task.model.image.position.table_side={image.position.table_side}"
                + ("" if most == math.inf else f" or the {most:g} rows that the decoder knows")
            )


def refuse_captions(data: DataConfig, kind: str) -> None:
    """Raises a `ValueError` if a dataset names captions, of which a task reads none."""
    for name, dataset in data.mix.items():
        if dataset.captions is not None:
            raise ValueError(f"data.mix.{name}.captions: task.kind {kind} reads no captions")


def refuse_mixing(data: DataConfig, kind: str) -> None:
    """Raises a `ValueError` if images are to be mixed, which takes labels to mix too."""
    if data.augment.mixes:
        name = "mixup" if data.augment.mixup else "cutmix"
        raise ValueError(f"data.augment.{name}: task.kind {kind} has no labels to mix")


def take_weights(model: nn.Module, source: nn.Module) -> None:
    """Copies weights into a model that may have rotary positions beside; see `InitConfig.check`."""
    model.load_state_dict({**model.state_dict(), **source.state_dict()})


def layers_above(name: str, depth: int) -> int:
    """How many layers of its tower stand above a parameter.

    Final norm and pooling have none above them; embeddings lie one layer below the first block.
    """
    if name.startswith(("encoder.norm.", "norm.", "pool.")):
        return 0
    block = _BLOCK.match(name)
    return depth - int(block[1]) if block else depth + 1


@dataclass(frozen=True)
class ImageTaskConfig(TaskConfig):
    """Base of configurations whose ``model`` has an image tower, ``model.image``.

    Attributes:
        drop_path: Stochastic depth of the image tower in training: with this probability an image
            passes the last block's attention or MLP by, with less the earlier ones'. For
            fine-tuning; 0 is off.
        windows: How a hierarchical tower computes windows with different numbers of tokens:
            ``single``, each by itself, those of one length at once; or ``grouped``, put together in
            groups of one length, with some padding (GreenMIM): fewer but larger products.
    """

    drop_path: float = field(default=0.0, kw_only=True)
    windows: Literal["single", "grouped"] = field(default="single", kw_only=True)

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {self.drop_path}")

    @classmethod
    def defaults_from(cls, init: InitConfig, run_dir: Path) -> dict[str, Any]:
        """The image tower of the model that the run starts from."""
        model = init.read_config(run_dir)
        return {} if model is None else {"model.image": asdict(model.image)}


class ImageTask(Task):
    """A task whose model has an image tower, ``image``.

    Args:
        config: Of the task; its ``model`` is one of `navit_clip.export.description.ModelConfig`.
        data: What is read, and how images are sized and dropped.
    """

    config: Any

    def __init__(self, config: TaskConfig, data: DataConfig) -> None:
        self.config, self.data = config, data

    @property
    def preprocess(self) -> Preprocess:
        """How the trained model wants its images: as large as the largest of training."""
        resolution = self.data.resolution
        most = default_max_tokens(resolution, self.config.model.image.patch_size)
        return Preprocess(most, square=resolution.mode == "square")

    @property
    def planner(self) -> Planner | None:
        """What the image tower wants to know of images that are packed; None without such."""
        return self.config.model.image.planner(grouped=self.config.windows == "grouped")

    @property
    def description(self) -> Description:
        """Of the model."""
        return Description(self.config.model, self.preprocess)

    def prepare(self, model: nn.Module) -> None:
        """Sets the stochastic depth of the image tower."""
        cast(Any, model).image.encoder.drop_path = self.config.drop_path

    def layers_above(self, name: str) -> int:
        """Those of the image tower; all else has none above it."""
        part, _, rest = name.partition(".")
        return layers_above(rest, self.config.model.image.encoder.depth) if part == "image" else 0

    def describe(self, folder: Path) -> None:
        """Writes the description as model.json."""
        self.description.write(folder / RUN_MODEL)

    def export(self, weights: Mapping[str, Tensor] | None, tokenizer: Tokenizer | None) -> AnyModel:
        """The model with all that belongs to it, in evaluation mode."""
        build = partial(build_model, self.description, tokenizer)
        if weights is not None:
            return build_with(build, weights).eval()
        # What it draws for its first weights must not cost the caller's generator anything.
        with torch.random.fork_rng(devices=[]):
            return build().eval()

    def examples(
        self, inputs: Inputs, outputs: Sequence[Tensor], tokenizer: Tokenizer | None
    ) -> Mapping[str, Media]:
        """Tokens and aspect ratios (long side over short side, in patches) of the images."""
        images: PackedImages = cast(Any, inputs).images
        count = images.segments.num_examples
        grids = images.grids[:count].cpu().numpy()
        return {
            "tokens_per_image": Histogram(np.array(images.segments.lengths[:count])),
            "aspect_ratio": Histogram(grids.max(1) / grids.min(1)),
        }

    def write_card(self, directory: Path, run_dir: Path) -> None:
        """Writes the model card of an export."""
        write_run_card(directory, run_dir)

    def eval_model(
        self,
        model: ExportedModel,
        name: str,
        precision: Precision = "fp32",
        around: Around = nullcontext,
    ) -> Model:
        """Packed, as evaluation by itself sees it."""
        return packed_model(cast(AnyModel, model), name, precision, around)

    def start_from(self, init: InitConfig) -> tuple[nn.Module, Tokenizer | None]:
        """The image tower of the model that the run starts from; all else is new."""
        return self.with_tower(init, init.read_model()), None

    def with_tower(self, init: InitConfig, source: AnyModel) -> nn.Module:
        """A new model with the image tower of another.

        Raises:
            UserError: If it is of another architecture.
        """
        image = self.config.model.image
        init.check("task.model.image", asdict(image), asdict(source.config.image))
        model: Any = self.build_model()
        take_weights(model.image, source.image)
        return cast(nn.Module, model.train())
