"""Classification: an image tower and a head, trained by a sigmoid or a softmax over classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from navit_clip.checkpoints.folder import RUN_MODEL
from navit_clip.data.annotations.class_names import CLASSNAMES, names_beside, read_places
from navit_clip.data.builders.labelled import LabelledBuilder, LabelledInputs
from navit_clip.data.config import DataConfig
from navit_clip.data.labels import LabelReader
from navit_clip.data.mixture import Mixture, first_shards
from navit_clip.data.pieces import Piece
from navit_clip.errors import UserError
from navit_clip.export.description import Description
from navit_clip.losses.classification import count_hits, sigmoid_loss, softmax_loss
from navit_clip.models.classifier import Classifier, ClassifierConfig, ClassifierOutput
from navit_clip.models.flops import LengthSums, backward_flops, tower_flops
from navit_clip.packed.batch import Inputs
from navit_clip.tasks.base import Loss
from navit_clip.tasks.images import ImageTask, ImageTaskConfig, check_sizes, refuse_captions
from navit_clip.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class ClassifyConfig(ImageTaskConfig):
    """Classification of images.

    Attributes:
        kind: ``classify``.
        model: Architecture; that of `init` for the image tower if it is given.
        classes: Text file with a class name in each line, by index; null takes the names of class
            folders, those in a table's data.files.label_column, or the classnames.txt that
            make_shards writes beside shards. A table of indices needs it.
        labels: Where a sample has its labels: a text member such as ``cls``, or ``json.FIELD``. A
            number is a class index, a text a name; several for an image are lines of the member, or
            a list in the JSON.
    """

    kind: Literal["classify"] = "classify"
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    classes: str | None = None
    labels: str = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels in ("", "json", "json."):
            raise ValueError(
                f"labels must be cls or json.FIELD, such as json.label, got {self.labels!r}"
            )

    def check(self, data: DataConfig) -> None:
        """Compares budget and sizes with what the tower takes."""
        limit = data.resolution.max_tokens, "data.resolution.max_tokens"
        data.budget.check({"image": limit})
        check_sizes(data, self.model.image)
        refuse_captions(data, self.kind)

    def build(self, data: DataConfig) -> ClassifyTask:
        """The task on this data, whose class names are read here."""
        return ClassifyTask(self, data)


class ClassifyTask(ImageTask):
    """An image tower with a head, labelled images, and a loss that is a mean over the images.

    Attributes:
        names: Class names by index.

    Raises:
        UserError: If there is no list of class names, or it does not fit the shards.
    """

    def __init__(self, config: ClassifyConfig, data: DataConfig) -> None:
        super().__init__(config, data)
        self.names = tuple(_read_names(config.classes, data))

    @property
    def description(self) -> Description:
        """Of the model."""
        return Description(self.config.model, self.preprocess, classes=self.names)

    def build_model(self) -> Classifier:
        """A new model with random weights and a head of zeros, on the host."""
        return Classifier(self.config.model, len(self.names))

    def build_samples(self, tokenizer: Tokenizer | None, seed: int) -> LabelledBuilder:
        """What makes labelled images of samples."""
        image = self.config.model.image
        single = self.config.model.output == "softmax"
        return LabelledBuilder(
            self.data.resolution,
            self.data.drop,
            image.patch_size,
            image.position.max_grid_side,
            seed,
            LabelReader(self.config.labels, self.names, single),
            augment=self.data.augment,
            planner=self.planner,
        )

    def report(self, mixture: Mixture, tokenizer: Tokenizer | None) -> Iterator[str]:
        """Which classes there are."""
        more = ", …" if len(self.names) > 3 else ""
        yield (
            f"{len(self.names):,} classes ({', '.join(self.names[:3])}{more}), "
            f"labels read from {self.config.labels}"
        )

    def count(self, inputs: Inputs) -> float:
        """Images."""
        assert isinstance(inputs, LabelledInputs)
        return len(inputs.labels)

    def loss(
        self, outputs: ClassifierOutput, inputs: Sequence[Inputs], counts: Sequence[float]
    ) -> Loss:
        """The mean over the images of all ranks; this micro-batch's part of it."""
        (part,), images = inputs, sum(counts)
        assert isinstance(part, LabelledInputs)
        loss = softmax_loss if self.config.model.output == "softmax" else sigmoid_loss
        scored = outputs.logits_EL, part.labels, part.weights
        return Loss(loss(*scored) / images, {"accuracy": count_hits(*scored) / images})

    def is_head(self, name: str) -> bool:
        """The linear layer over the classes, and the hidden one before it."""
        return name.startswith(("head.", "hidden."))

    def flops(self, inputs: Inputs) -> float:
        """FLOPs of one forward and one backward pass, head included."""
        assert isinstance(inputs, LabelledInputs)
        segments = inputs.images.segments
        sums = LengthSums.of(segments.lengths[: segments.num_examples])
        image = self.config.model.image.with_patch_size(inputs.images.patch_size)
        hidden = self.config.model.hidden
        forward = tower_flops(image, len(self.names) + hidden, sums)
        return sum(forward) + backward_flops(forward)

    def check_checkpoint(self, folder: Path) -> None:
        """Refuses other class names than the run was begun with: labels would mean others."""
        before = Description.read(folder / RUN_MODEL).classes
        for index, (old, new) in enumerate(zip_longest(before, self.names)):
            if old != new:
                raise UserError(
                    f"cannot resume from {folder}: class {index} is {new!r}, was {old!r}: put the "
                    "list of classes back, or use another run_dir"
                )


def _read_names(path: str | None, data: DataConfig) -> list[str]:
    """Class names of the list, or of those beside the shards."""
    found = [] if path is None else read_places(path, "task.classes")
    for name, first in first_shards(data).items():
        # None of a table whose labels are indices.
        beside = first.classnames if isinstance(first, Piece) else names_beside(first)
        if not found:
            found = list(beside or ())
        # A list of one's own may have other words for them.
        elif beside and found != list(beside) and (path is None or set(found) == set(beside)):
            raise UserError(
                f"{CLASSNAMES} beside the shards of {name} has other classes, or another "
                "order, than the list before it: class indices would mean others; use one list"
            )
    if not found:
        raise UserError(
            "task.classes is missing: give a text file with a class name in each line; or class "
            "folders, a table with a column of names (data.files.label_column), or shards with "
            f"{CLASSNAMES} beside them, as make_shards writes it"
        )
    if len(found) < 2:
        raise UserError(f"one class alone ({found[0]}) can only be right: give at least two")
    return found
