"""Zero-shot classification: each class a mean of prompt embeddings, each image its nearest class.

Prompts are ensembled as CLIP and open_clip do: normalise each, average, normalise again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from navit_clip.data.annotations.class_names import CLASSNAMES, read_class_names, read_text
from navit_clip.data.annotations.labels import load_class_map
from navit_clip.errors import UserError
from navit_clip.evaluation.classes import ClassEvaluator, LabelledSpec, check_competitors
from navit_clip.evaluation.datasets import EvalDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.labelled import open_labelled
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.ranking import Readout
from navit_clip.evaluation.settings import EvalSetting

Template = Callable[[str], str]

_MARKS = ("{}", "{c}")


@dataclass(frozen=True)
class ZeroShotSpec(LabelledSpec):
    """Zero-shot classification of labelled images.

    Attributes:
        classnames: Text file with one name per line, or ``imagenet``; by default the folders'.
        templates: ``openai`` (80, the default), ``simple`` (7), ``plain`` (1), or a text file with
            {} in each line.
    """

    classnames: str | None = None
    templates: str = "openai"


class ZeroShot(ClassEvaluator[ZeroShotSpec]):
    """Compares images with class names.

    Attributes:
        templates: Prompt templates; set by `open`.
    """

    kind = "zeroshot"
    title = "Zero-shot"
    description = "zero-shot classification of labelled images"
    Spec = ZeroShotSpec
    reads_texts = True

    templates: list[Template]

    def open(self) -> EvalDataset:
        """Opens the labelled images and reads class names and templates."""
        spec = self.spec
        self.labelled = open_labelled(spec.data, spec.labels, spec.class_map)
        names, folders = self.labelled.names, self.labelled.folders
        if spec.classnames is None and names is not None:
            self.names = names
        else:
            self.names = load_classnames(spec.classnames, folders)
            if names is not None and len(names) != len(self.names):
                raise UserError(
                    f"{len(self.names)} class names, and {CLASSNAMES} beside the shards has "
                    f"{len(names)}: leave out --classnames, or give one for each of these"
                )
        self.labelled.check_names(self.names)
        known = self.labelled.classes if spec.only_present else None
        check_competitors(len(known or self.names))
        self.templates = load_templates(spec.templates)
        return self.labelled.dataset

    def texts(self, data: Embedded) -> list[str]:
        """The prompts of all classes, class by class."""
        return class_prompts(self.names, self.templates)

    def readout(
        self, model: Model, data: Embedded, texts_TD: Tensor, setting: EvalSetting
    ) -> Readout:
        """The mean vector of each class's prompts."""
        vectors_CD = class_vectors(texts_TD, len(self.names))
        return Readout(data.embeddings[setting], vectors_CD, scale=model.scale)


def class_prompts(names: Sequence[str], templates: Sequence[Template]) -> list[str]:
    """Every template filled with every name, class by class."""
    return [template(name) for name in names for template in templates]


def class_vectors(texts_TD: Tensor, classes: int) -> Tensor:
    """One unit vector per class, float32 [C, D], of the embeddings of `class_prompts`."""
    return F.normalize(texts_TD.unflatten(0, (classes, -1)).mean(1), dim=-1)


def load_templates(name: str) -> list[Template]:
    """Prompt templates by name or from a file.

    Args:
        name: ``openai`` (the 80 for ImageNet), ``simple`` (the 7 best of them), ``plain``
            ("a photo of a {}."), or a text file with one template per line, whose ``{}`` or
            ``{c}`` the class name replaces.

    Raises:
        UserError: If the file cannot be read or a line has no ``{}``.
    """
    if name in ("openai", "simple"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        return list(OPENAI_IMAGENET_TEMPLATES if name == "openai" else SIMPLE_IMAGENET_TEMPLATES)
    if name == "plain":
        lines = ["a photo of a {}."]
    else:
        lines = _read_lines(name, "templates", "openai, simple, plain")
    for line in lines:
        if not any(mark in line for mark in _MARKS):
            raise UserError(
                f"template without {{}} in {name}: {line!r}; put {{}} where the class name goes"
            )
    return [partial(line.replace, next(mark for mark in _MARKS if mark in line)) for line in lines]


def load_classnames(name: str | None, folders: Sequence[str] | None) -> list[str]:
    """Class names by index.

    Args:
        name: ``imagenet``, a text file with one name per line, or None to read the folders'.
        folders: The data's own names of its classes in index order, None if labels are indices.

    Raises:
        UserError: If there are none, or they cannot be those of the folders.
    """
    if name is None:
        if folders is None:
            raise UserError("labels carry no class names: give --classnames FILE or imagenet")
        return [folder.replace("_", " ") for folder in folders]
    if name != "imagenet":
        return read_class_names(name, folders, "imagenet")
    from open_clip import IMAGENET_CLASSNAMES

    if folders is not None:
        known = load_class_map("imagenet")
        indices = [known.find(folder) for folder in folders]
        if indices != [(index,) for index in range(len(IMAGENET_CLASSNAMES))]:
            raise UserError(
                f"{len(IMAGENET_CLASSNAMES)} class names for {len(folders)} class folders, which "
                "are not ImageNet's synsets in order: define the classes with --class-map imagenet"
            )
    return list(IMAGENET_CLASSNAMES)


def _read_lines(path: str, what: str, names: str) -> list[str]:
    lines = [line.strip() for line in read_text(path, what, names).split("\n")]
    return [line for line in lines if line]
