"""Evaluators that say which of several classes an image shows: metrics, confusions, samples.

A subclass opens labelled images and says by which vectors classes are scored (`Readout`): the mean
of prompts' embeddings, or a head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from navit_clip.data.annotations.class_names import spaced, unique_names
from navit_clip.data.annotations.labels import ClassMap
from navit_clip.errors import UserError
from navit_clip.evaluation.calibration import expected_calibration_error
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.evaluator import EmbeddingEvaluator, EvalSpec, make_row
from navit_clip.evaluation.labelled import Labelled
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.ranking import (
    ClassTable,
    Predictions,
    Readout,
    average_precision,
    classify,
    fraction,
)
from navit_clip.evaluation.report.samples import ReportSamples, classification_samples
from navit_clip.evaluation.results import Confusion, Metric, Row
from navit_clip.evaluation.settings import EvalSetting

_WORST, _TAKEN_FOR = 10, 3  # classes among the confusions, and what each is taken for


@dataclass(frozen=True)
class LabelledSpec(EvalSpec):
    """Labelled images.

    Attributes:
        data: Class folders, a flat folder with `labels`, or shards with ``.cls`` members.
        labels: For a flat folder: a file with lines of image and label, or a CSV or TSV.
        class_map: From class folder or label to class index: a file, ``imagenet``, or ``index`` for
            plain numbers.
        only_present: Only classes that occur in the data compete.
    """

    data: str
    labels: str | None = None
    class_map: str | None = None
    only_present: bool = False

    @property
    def data_name(self) -> str:
        """The data."""
        return self.data


S = TypeVar("S", bound=LabelledSpec)


class ClassEvaluator(EmbeddingEvaluator[S]):
    """Scores every image with every class.

    Attributes:
        labelled: The images and what is known of their classes; set by `open`.
        names: Class names by index; set by `open`.
    """

    METRICS: ClassVar = {
        **{
            f"top{k}": Metric(
                f"top-{k}", is_headline=True, queries="images", guesses=k, among="classes"
            )
            for k in (1, 5)
        },
        "mean_per_class": Metric("mean per class", guesses=1, among="classes"),
        "map": Metric("mAP"),
        "ece": Metric("ECE", lower_is_better=True),
    }
    counted = "classes"

    labelled: Labelled
    names: Sequence[str]

    @abstractmethod
    def readout(
        self, model: Model, data: Embedded, texts_TD: Tensor, setting: EvalSetting
    ) -> Readout:
        """By what the images of a setting are scored; a vector for each of `names`."""

    def is_multi_label(self, model: Model, data: Embedded) -> bool:
        """Whether all labels of an image count, not any of them."""
        return False

    def count(self, data: Embedded) -> int:
        """Classes that compete."""
        return len(self._classes(data).competitors)

    def score(self, model: Model, data: Embedded, texts_TD: Tensor) -> Iterator[Row]:
        """Accuracy, confusions and calibration at every setting."""
        classes = self._classes(data)
        for setting in data.embeddings:
            readout = self._readout(model, data, texts_TD, setting, classes)
            found = classify(readout, classes.right_LC, classes.group_E)
            if self.is_multi_label(model, data):
                yield self._multi_label_row(model, data, setting, classes, readout, found)
                continue
            images_L = classes.group_E.bincount(minlength=len(classes.groups))
            top1_E = found.rank_E < 1
            hits_L = classes.group_E[top1_E].bincount(minlength=len(classes.groups))
            accuracy_L = hits_L / images_L.double()
            row = make_row(model, data, setting, partial(top_accuracy, found.rank_E))
            ece = expected_calibration_error(found.confidence_E, top1_E)
            yield replace(
                row,
                metrics={**row.metrics, "mean_per_class": accuracy_L.mean().item(), "ece": ece},
                per_class=dict(zip(classes.groups, accuracy_L.tolist(), strict=True)),
                confusions=_confusions(classes, found, accuracy_L, images_L),
            )

    def _multi_label_row(
        self,
        model: Model,
        data: Embedded,
        setting: EvalSetting,
        classes: ClassTable,
        readout: Readout,
        found: Predictions,
    ) -> Row:
        """Any label of an image makes a hit of top-k; an image without one is none's."""
        right_EC = classes.right_LC[classes.group_E]
        labelled_E = right_EC.any(1)

        def measure(index: Tensor) -> dict[str, float]:
            precision_C = average_precision(readout.only(index), right_EC[index])
            return {
                **top_accuracy(found.rank_E, index[labelled_E[index]]),
                "map": precision_C.nanmean().item(),
            }

        row = make_row(model, data, setting, measure)
        ece = expected_calibration_error(found.confidence_E, found.rank_E < 1)
        precision_C = average_precision(readout, right_EC)
        per_class = zip(classes.titles, precision_C.tolist(), strict=True)
        return replace(
            row,
            metrics={**row.metrics, "ece": ece},
            per_class={name: value for name, value in per_class if value == value},
        )

    def samples(self) -> ReportSamples:
        """Sample images, the most confident mistakes, the worst classes, and calibration."""
        classes, setting = self._classes(self.data), self.model.own_setting
        return classification_samples(
            self.dataset,
            self.data,
            self._readout(self.model, self.data, self.texts_TD, setting, classes),
            classes,
            [confusion.name for confusion in self.result.own.confusions],
        )

    def _readout(
        self,
        model: Model,
        data: Embedded,
        texts_TD: Tensor,
        setting: EvalSetting,
        classes: ClassTable,
    ) -> Readout:
        """Of the classes that compete."""
        readout = self.readout(model, data, texts_TD, setting)
        return readout.of(classes.competitors)

    def _classes(self, data: Embedded) -> ClassTable:
        """What the labels of the images mean; a `UserError` if one has no name."""
        self.labelled.check_names(self.names, data.classes)
        present, every = self.labelled.present(data.classes), list(range(len(self.names)))
        competitors = present if self.spec.only_present else every
        check_competitors(len(competitors))
        answers = {found: row for row, found in enumerate(sorted(set(data.classes)))}
        column = {index: i for i, index in enumerate(competitors)}
        right_LC = torch.zeros(len(answers), len(column), dtype=torch.bool)
        for found, row in answers.items():
            right_LC[row, [column[index] for index in found]] = True
        unique = unique_names(self.names)
        return ClassTable(
            competitors=competitors,
            titles=[unique[index] for index in competitors],
            groups=[" / ".join(unique[index] for index in found) or "none" for found in answers],
            right_LC=right_LC,
            group_E=torch.tensor([answers[found] for found in data.classes]),
        )


class _KnownClasses(ClassMap):
    """Underscores of a folder's name may be spaces."""

    def find(self, name: str) -> tuple[int, ...] | None:
        return super().find(name) or super().find(spaced(name))


def map_of(names: Sequence[str]) -> ClassMap:
    """Classes by their names, also as folders are called; one written just so goes first."""
    indices: dict[str, tuple[int, ...]] = {}
    for called in ([*map(spaced, names)], names):
        same: dict[str, tuple[int, ...]] = {}
        for index, name in enumerate(called):
            same[name] = (*same.get(name, ()), index)
        indices |= same
    return _KnownClasses("of the known classes", indices)


def check_competitors(count: int) -> None:
    """Raises a `UserError` unless there are at least two classes."""
    if count < 2:
        raise UserError(
            "one class alone competes, so that every image would be right: give data or class "
            "names of at least two"
        )


def top_accuracy(rank_E: Tensor, index: Tensor) -> dict[str, float]:
    """Fractions of the images of `index` with a right class among the first 1 and 5."""
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
