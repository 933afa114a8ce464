"""Probes: how well image features of a frozen model serve a linear classifier fitted to them.

What `fewshot` and `linear` share: labelled images to learn from beside those to evaluate, embedded
at the same settings. Features are what a classifier's head reads, and the embeddings of a model
that compares images with texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from navit_clip.data.annotations.class_names import spaced
from navit_clip.data.annotations.labels import ClassMap
from navit_clip.errors import UserError
from navit_clip.evaluation.classes import ClassEvaluator, LabelledSpec, map_of
from navit_clip.evaluation.datasets import EvalDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.labelled import Labelled, open_labelled
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.settings import EvalSetting


@dataclass(frozen=True, kw_only=True)
class ProbeSpec(LabelledSpec):
    """Labelled images to learn from, and others to evaluate.

    Attributes:
        train: Labelled images to learn from, in the forms that `data` has.
        train_labels: The label file of `train`, as `labels` is that of `data`.
        field: Where samples of shards have their labels: ``cls``, or ``json.FIELD``.
    """

    SHARDS: ClassVar[tuple[str, ...]] = ("data", "train")

    train: str
    train_labels: str | None = None
    field: str = "cls"


S = TypeVar("S", bound=ProbeSpec)


class Probe(ClassEvaluator[S]):
    """An evaluator that fits a linear classifier to features of `spec.train`.

    Attributes:
        train: The images to learn from; set by `open`.
    """

    train: Labelled

    def open(self) -> EvalDataset:
        """Opens both sets of images; the classes are those of the first, found by their names."""
        spec = self.spec
        self.train = open_labelled(spec.train, spec.train_labels, spec.class_map, field=spec.field)
        names = self.train.names or self.train.folders
        self.names = [spaced(name) for name in names or ()]
        known: str | ClassMap | None = spec.class_map
        if known is None:
            known = map_of(names) if names else ClassMap("index")
        self.labelled = open_labelled(spec.data, spec.labels, known, field=spec.field, names=names)
        return self.labelled.dataset

    def prepare(
        self, models: Sequence[Model], embed: Callable[[EvalDataset], list[Embedded]]
    ) -> None:
        """Embeds the images to learn from."""
        trained = embed(self.train.dataset)
        for name, found in zip(trained[0].names, trained[0].classes, strict=True):
            if len(found) != 1:
                raise UserError(f"a probe learns from one class for each image: {name} has {found}")
        self._trained = dict(zip(map(id, models), trained, strict=True))
        last = max(index for (index,) in trained[0].classes)
        self.names = self.names or [str(index) for index in range(last + 1)]
        self.labelled.check_names(self.names)

    def features(
        self, model: Model, data: Embedded, setting: EvalSetting
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features to learn from, their classes, and features to evaluate, on the ranks' device."""
        trained = self._trained[id(model)]
        label_N = torch.tensor([index for (index,) in trained.classes])
        both = (one.embeddings[setting] for one in (trained, data))
        train_ND, test_ED = (features.to(self.device) for features in both)
        return train_ND, label_N.to(self.device), test_ED
