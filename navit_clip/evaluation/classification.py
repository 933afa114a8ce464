"""Classification by a trained head: each image the classes whose logits are the largest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from navit_clip.errors import UserError
from navit_clip.evaluation.classes import ClassEvaluator, LabelledSpec, map_of
from navit_clip.evaluation.datasets import EvalDataset, ShardDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.labelled import open_labelled
from navit_clip.evaluation.models import Model, PackedClassifier
from navit_clip.evaluation.ranking import Readout
from navit_clip.evaluation.settings import EvalSetting


@dataclass(frozen=True)
class ClassifySpec(LabelledSpec):
    """Classification of labelled images.

    Attributes:
        field: Where samples of shards have their labels: ``cls``, or ``json.FIELD``.
    """

    field: str = "cls"


class Classify(ClassEvaluator[ClassifySpec]):
    """Scores images with the head of a classifier.

    Without a class map, the data's classes are found among the model's by their names.
    """

    kind = "classify"
    title = "Classification"
    description = "classification of labelled images by a classifier's head"
    Spec = ClassifySpec

    names: tuple[str, ...] = ()

    def accept(self, model: Model) -> None:
        """Classifiers of the same classes; those of the first are the evaluator's."""
        super().accept(model)
        if not isinstance(model, PackedClassifier):
            raise UserError(
                f"{model.name} has no classes of its own: evaluate it with zeroshot, or a probe "
                "(fewshot, linear)"
            )
        self.names = self.names or model.model.classes
        if model.model.classes != self.names:
            raise UserError(f"{model.name} has other classes than the model beside it")

    def open(self) -> EvalDataset:
        """Opens the labelled images."""
        spec = self.spec
        self.labelled = open_labelled(
            spec.data,
            spec.labels,
            spec.class_map or map_of(self.names),
            field=spec.field,
            names=self.names,
        )
        self.labelled.check_names(self.names)
        return self.labelled.dataset

    def readout(
        self, model: Model, data: Embedded, texts_TD: Tensor, setting: EvalSetting
    ) -> Readout:
        """The head."""
        assert isinstance(model, PackedClassifier)
        head, sigmoid = model.model.head, model.model.config.output == "sigmoid"
        weight_CD, bias_C = head.weight.detach().cpu(), head.bias.detach().cpu()
        with torch.no_grad():
            vectors = model.model.before_head(data.embeddings[setting].to(model.model.device)).cpu()
        return Readout(vectors, weight_CD, bias_C, sigmoid=sigmoid)

    def is_multi_label(self, model: Model, data: Embedded) -> bool:
        """Where images have other than one label each; of a class map, any of several is right."""
        assert isinstance(model, PackedClassifier)
        # A folder or a name stands for several only where classes are called alike.
        lists = self.spec.class_map is None and isinstance(self.dataset, ShardDataset)
        several = lists and any(len(found) != 1 for found in data.classes)
        return several and model.model.config.output == "sigmoid"
