"""Zero-shot classification: each class a mean of prompt embeddings, each image its nearest class.

Prompts are ensembled as CLIP and open_clip do: normalise each, average, normalise again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from navit_clip.data.annotations.class_names import CLASSNAMES, read_class_names, read_text
from navit_clip.data.annotations.labels import load_class_map
from navit_clip.errors import UserError
from navit_clip.evaluation.calibration import expected_calibration_error
from navit_clip.evaluation.datasets import EvalDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.evaluator import EmbeddingEvaluator, EvalSpec, make_row
from navit_clip.evaluation.labelled import Labelled, open_labelled
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.ranking import ClassTable, Predictions, classify, fraction
from navit_clip.evaluation.report.samples import ReportSamples, classification_samples
from navit_clip.evaluation.results import Confusion, Metric, Row

Template = Callable[[str], str]

_MARKS = ("{}", "{c}")
_WORST, _TAKEN_FOR = 10, 3  # classes among the confusions, and what each is taken for


@dataclass(frozen=True)
class ZeroShotSpec(EvalSpec):
    """Zero-shot classification of labelled images.

    Attributes:
        data: Class folders, a flat folder with `labels`, or shards with ``.cls`` members.
        labels: For a flat folder: a file with lines of image and label, or a CSV or TSV.
        class_map: From class folder or label to class index: a file, ``imagenet``, or ``index`` for
            plain numbers.
        only_present: Only classes that occur in the data compete.
        classnames: Text file with one name per line, or ``imagenet``; by default the folders'.
        templates: ``openai`` (80, the default), ``simple`` (7), ``plain`` (1), or a text file with
            {} in each line.

    Raises:
        ValueError: If a field is empty or out of range; the message names it.
    """

    data: str
    labels: str | None = None
    class_map: str | None = None
    only_present: bool = False
    classnames: str | None = None
    templates: str = "openai"

    @property
    def data_name(self) -> str:
        """The data."""
        return self.data


class ZeroShot(EmbeddingEvaluator[ZeroShotSpec]):
    """Compares images with class names.

    Attributes:
        labelled: The images and what is known of their classes; set by `open`.
        names: Class names by index; set by `open`.
        templates: Prompt templates; set by `open`.
    """

    kind = "zeroshot"
    title = "Zero-shot"
    description = "zero-shot classification of labelled images"
    Spec = ZeroShotSpec
    METRICS: ClassVar = {
        **{
            f"top{k}": Metric(
                f"top-{k}", is_headline=True, queries="images", guesses=k, among="classes"
            )
            for k in (1, 5)
        },
        "mean_per_class": Metric("mean per class", guesses=1, among="classes"),
        "ece": Metric("ECE", lower_is_better=True),
    }
    reads_texts = True
    counted = "classes"

    labelled: Labelled
    names: list[str]
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
        _check_competitors(len(known or self.names))
        self.templates = load_templates(spec.templates)
        return self.labelled.dataset

    def texts(self, data: Embedded) -> list[str]:
        """The prompts of all classes, class by class."""
        return class_prompts(self.names, self.templates)

    def count(self, data: Embedded) -> int:
        """Classes that compete."""
        return len(self._classes(data).competitors)

    def score(self, model: Model, data: Embedded, texts_TD: Tensor) -> Iterator[Row]:
        """Accuracy, confusions and calibration at every setting."""
        classes = self._classes(data)
        classes_CD = self._class_vectors(texts_TD, classes)
        images_L = classes.group_E.bincount(minlength=len(classes.groups))
        for setting, images_ED in data.embeddings.items():
            found = classify(images_ED, classes_CD, classes.right_LC, classes.group_E, model.scale)
            top1_E = found.rank_E < 1
            hits_L = classes.group_E[top1_E].bincount(minlength=len(classes.groups))
            accuracy_L = hits_L / images_L.double()
            row = make_row(model, data, setting, partial(_accuracy, found.rank_E))
            ece = expected_calibration_error(found.confidence_E, top1_E)
            yield replace(
                row,
                metrics={**row.metrics, "mean_per_class": accuracy_L.mean().item(), "ece": ece},
                per_class=dict(zip(classes.groups, accuracy_L.tolist(), strict=True)),
                confusions=_confusions(classes, found, accuracy_L, images_L),
            )

    def samples(self) -> ReportSamples:
        """Sample images, the most confident mistakes, the worst classes, and calibration."""
        classes = self._classes(self.data)
        return classification_samples(
            self.dataset,
            self.data,
            self.data.embeddings[self.model.own_setting],
            self._class_vectors(self.texts_TD, classes),
            classes,
            self.model.scale,
            [confusion.name for confusion in self.result.own.confusions],
        )

    def _classes(self, data: Embedded) -> ClassTable:
        """What the labels of the images mean; a `UserError` if one has no name."""
        self.labelled.check_names(self.names, data.classes)
        present, every = self.labelled.present(data.classes), list(range(len(self.names)))
        competitors = present if self.spec.only_present else every
        _check_competitors(len(competitors))
        answers = {found: row for row, found in enumerate(sorted(set(data.classes)))}
        column = {index: i for i, index in enumerate(competitors)}
        right_LC = torch.zeros(len(answers), len(column), dtype=torch.bool)
        for found, row in answers.items():
            right_LC[row, [column[index] for index in found]] = True
        # ImageNet has two missiles and two pairs of sunglasses.
        count = Counter(self.names)
        unique = [n if count[n] == 1 else f"{n} ({i})" for i, n in enumerate(self.names)]
        return ClassTable(
            competitors=competitors,
            titles=[unique[index] for index in competitors],
            groups=[" / ".join(unique[index] for index in found) for found in answers],
            right_LC=right_LC,
            group_E=torch.tensor([answers[found] for found in data.classes]),
        )

    def _class_vectors(self, texts_TD: Tensor, classes: ClassTable) -> Tensor:
        return class_vectors(texts_TD, len(self.names))[classes.competitors]


def _check_competitors(count: int) -> None:
    if count < 2:
        raise UserError(
            "one class alone competes, so that every image would be right: give data or class "
            "names of at least two"
        )


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


def _accuracy(rank_E: Tensor, index: Tensor) -> dict[str, float]:
    return {f"top{k}": fraction(rank_E[index] < k) for k in (1, 5)}


def _confusions(
    classes: ClassTable, found: Predictions, accuracy_L: Tensor, images_L: Tensor
) -> tuple[Confusion, ...]:
    """The worst groups, of equals the larger one first, and what their images are taken for."""
    groups = enumerate(zip(accuracy_L.tolist(), images_L.tolist(), strict=True))
    wrong = sorted((accuracy, -images, i) for i, (accuracy, images) in groups if accuracy < 1)
    confusions = []
    for accuracy, _, group in wrong[:_WORST]:
        images = int(images_L[group])
        mistaken_E = (classes.group_E == group) & (found.rank_E >= 1)
        taken = Counter(found.wrong_E[mistaken_E].tolist()).most_common(_TAKEN_FOR)
        taken_for = tuple((classes.titles[index], n / images) for index, n in taken)
        confusions.append(Confusion(classes.groups[group], images, accuracy, taken_for))
    return tuple(confusions)
