"""Cascades of token limits: accuracy against cost, where only uncertain images get many tokens.

Rows of a result are the limits alone and, of all cascades of two of them, the Pareto front: those
that no limit and no other cascade is at once cheaper and better than. See
`navit_clip.inference.cascade` for the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from navit_clip.errors import UserError
from navit_clip.evaluation.classes import ClassEvaluator, top_accuracy
from navit_clip.evaluation.classification import Classify, ClassifySpec
from navit_clip.evaluation.datasets import EvalDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.evaluator import make_row, mean_flops
from navit_clip.evaluation.models import Model, PackedClassifier
from navit_clip.evaluation.ranking import Readout, classify
from navit_clip.evaluation.results import Metric, Row
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.evaluation.zeroshot import ZeroShot, ZeroShotSpec
from navit_clip.inference.cascade import least_sure


@dataclass(frozen=True)
class CascadeSpec(ZeroShotSpec, ClassifySpec):
    """Cascades over the model's own token limit and those of max_tokens.

    Attributes:
        percents: Percentages of images that are evaluated again, such as 10,30,50.
    """

    percents: tuple[int, ...] = (2, 5, 10, 15, 20, 30, 40, 50, 60, 80)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < percent < 100 for percent in self.percents):
            raise ValueError(f"percents must lie between 0 and 100, got {self.percents}")


class Cascade(ClassEvaluator[CascadeSpec]):
    """Classification, zero-shot or by a classifier's head, at two token limits."""

    kind = "cascade"
    title = "Cascade"
    description = "classification at few tokens, of uncertain images again at more"
    Spec = CascadeSpec
    METRICS: ClassVar = {
        **ClassEvaluator.METRICS,
        "top5": replace(ClassEvaluator.METRICS["top5"], is_headline=False),
        "gain": Metric("over limits"),
    }

    _inner: ZeroShot | Classify | None = None

    def accept(self, model: Model) -> None:
        """Models that zero-shot classification takes, or classifiers."""
        if self._inner is None:
            kind = Classify if isinstance(model, PackedClassifier) else ZeroShot
            if kind is ZeroShot and self.spec.field != CascadeSpec.field:
                raise UserError("--field goes with classifiers: zero-shot labels are .cls members")
            self._inner = kind(self.spec)
        self._inner.accept(model)

    def check_model(self, model: Model) -> None:
        """There must be a second limit."""
        super().check_model(model)
        check_two_limits("a cascade", model, self.spec.settings)

    def open(self) -> EvalDataset:
        """As the evaluator of this kind of model does."""
        assert self._inner is not None
        dataset = self._inner.open()
        self.labelled, self.names = self._inner.labelled, self._inner.names
        return dataset

    def texts(self, data: Embedded) -> list[str]:
        """Prompts, if the model reads such."""
        assert self._inner is not None
        return self._inner.texts(data)

    def readout(
        self, model: Model, data: Embedded, texts_TD: Tensor, setting: EvalSetting
    ) -> Readout:
        """Likewise."""
        assert self._inner is not None
        return self._inner.readout(model, data, texts_TD, setting)

    def score(self, model: Model, data: Embedded, texts_TD: Tensor) -> Iterator[Row]:
        """The settings alone, then the front."""
        classes = self._classes(data)
        found = {
            setting: classify(
                self._readout(model, data, texts_TD, setting, classes),
                classes.right_LC,
                classes.group_E,
            )
            for setting in data.embeddings
        }
        alone = {s: make_row(model, data, s, partial(top_accuracy, found[s].rank_E)) for s in found}
        yield from alone.values()
        limits = limits_of(found)
        cascades = []
        for (few, many), percent in product(combinations(limits, 2), self.spec.percents):
            again = least_sure(found[few].confidence_E, percent / 100)
            rank_E = found[few].rank_E.clone()
            rank_E[again] = found[many].rank_E[again]
            lengths = [data.lengths[many][i] for i in again.tolist()]
            part = len(lengths) / len(rank_E)
            cascades.append(
                replace(
                    alone[few],
                    setting=EvalSetting("cascade", few.size, many.size, percent),
                    is_own=False,
                    mean_tokens=alone[few].mean_tokens + sum(lengths) / len(rank_E),
                    padding=None,
                    flops_per_image=_cost(alone[few]) + part * mean_flops(model, lengths),
                    metrics=top_accuracy(rank_E, torch.arange(len(rank_E))),
                    breakdowns={},
                )
            )
        if cascades:  # a model of squares has none
            yield from front([alone[limit] for limit in limits], cascades)


def check_two_limits(what: str, model: Model, settings: Iterable[EvalSetting]) -> None:
    """Refuses settings of which fewer than two are token limits, the model's own one included.

    Raises:
        UserError: Names what needs them.
    """
    if len(limits_of([model.own_setting, *settings])) < 2:
        raise UserError(
            f"{what} needs two token limits, and that of {model.name} is "
            f"{model.own_setting.label}: give another with --max-tokens"
        )


def limits_of(settings: Iterable[EvalSetting]) -> list[EvalSetting]:
    """Those that are token limits, in order."""
    return sorted({s for s in settings if s.kind == "capped"}, key=lambda one: one.size or 0)


def _cost(row: Row) -> float:
    return row.flops_per_image or 0.0


def front(limits: Sequence[Row], cascades: Sequence[Row]) -> list[Row]:
    """The cascades that neither a limit nor another cascade is cheaper and better than.

    Args:
        limits: Rows of token limits alone.
        cascades: Rows of cascades of them.

    Returns:
        Those on the front in order of cost, with `gain`: how far their top-1 is above the line that
        joins the limits, at the same FLOPs; a limit counts as no worse than a cheaper one, which
        could be taken instead.
    """
    curve = sorted((_cost(row), row.metrics["top1"]) for row in limits)
    costs, values = zip(*curve, strict=True)
    kept, best = [], -1.0
    for row in sorted([*limits, *cascades], key=lambda row: (_cost(row), -row.metrics["top1"])):
        if (top1 := row.metrics["top1"]) <= best:
            continue
        best = top1
        if row.setting.kind == "cascade":
            gain = {}
            if _cost(row) <= costs[-1]:
                single = np.interp(_cost(row), costs, np.maximum.accumulate(values))
                gain["gain"] = top1 - float(single)
            kept.append(replace(row, metrics=row.metrics | gain))
    return kept
