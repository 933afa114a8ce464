"""Linear probe: logistic regression on frozen features, its penalty chosen on a validation part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from navit_clip.data.seeding import generator
from navit_clip.errors import UserError
from navit_clip.evaluation.classes import ClassEvaluator
from navit_clip.evaluation.datasets import EvalDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.linear_fit import fit_logistic, in_parts, whiten
from navit_clip.evaluation.models import Around, Model
from navit_clip.evaluation.probes import Probe, ProbeSpec
from navit_clip.evaluation.ranking import Readout
from navit_clip.evaluation.results import Metric, Row
from navit_clip.evaluation.settings import EvalSetting

# Penalties that are tried, the strongest first: each begins where the one before it ended.
_L2 = tuple(10.0**power for power in range(1, -7, -1))
_VALIDATION = 0.2  # fraction of the images to learn from


@dataclass(frozen=True, kw_only=True)
class LinearSpec(ProbeSpec):
    """Linear probe: logistic regression on frozen features."""


class Linear(Probe[LinearSpec]):
    """Fits on all images to learn from, with the penalty that is best on a fifth of them."""

    kind = "linear"
    title = "Linear probe"
    description = "logistic regression on frozen features"
    Spec = LinearSpec
    METRICS: ClassVar = {
        **{name: metric for name, metric in ClassEvaluator.METRICS.items() if name != "map"},
        "l2": Metric("λ", is_fraction=False),
    }

    def prepare(
        self, models: Sequence[Model], embed: Callable[[EvalDataset], list[Embedded]]
    ) -> None:
        """Embeds the images to learn from; nothing is fitted yet."""
        super().prepare(models, embed)
        self._fitted: dict[tuple[int, EvalSetting], tuple[Readout, float]] = {}

    def score(self, model: Model, data: Embedded, texts_TD: Tensor) -> Iterator[Row]:
        """As of any classifier, and the penalty."""
        for row in super().score(model, data, texts_TD):
            _, l2 = self._fit(model, data, row.setting)
            yield replace(row, metrics={**row.metrics, "l2": l2})

    def readout(
        self, model: Model, data: Embedded, texts_TD: Tensor, setting: EvalSetting
    ) -> Readout:
        """The fitted classifier."""
        return self._fit(model, data, setting)[0]

    def _fit(self, model: Model, data: Embedded, setting: EvalSetting) -> tuple[Readout, float]:
        key = id(model), setting
        if key not in self._fitted:
            train_ND, label_N, test_ED = self.features(model, data, setting)
            train_ND, test_ED = whiten(train_ND, test_ED)
            classes = len(self.names)
            weight_LD, bias_L, l2 = fit_validated(train_ND, label_N, classes, model.around)
            self._fitted[key] = Readout(test_ED.cpu(), weight_LD.cpu(), bias_L.cpu()), l2
        return self._fitted[key]


def fit_validated(
    x_ND: Tensor, label_N: Tensor, classes: int, around: Around = nullcontext
) -> tuple[Tensor, Tensor, float]:
    """`fit_logistic` with the penalty of the best accuracy on a fifth of the images.

    Of equal ones the strongest is taken. `around` is entered for each step.

    Returns:
        Weights [L, D] and biases [L], fitted to all images, and the penalty.

    Raises:
        UserError: If there are fewer than two images.
    """
    count = len(label_N)
    if count < 2:
        raise UserError("a linear probe needs at least two images to learn from")
    order = torch.from_numpy(generator(0, "linear").permutation(count)).to(label_N.device)
    held = max(1, round(_VALIDATION * count))
    best, start = None, None
    for l2 in _L2:
        start = fit_logistic(x_ND[order[held:]], label_N[order[held:]], classes, l2, start, around)
        hits = sum(
            int(((x @ start[0].T + start[1]).argmax(1) == labels).sum())
            for x, labels in in_parts(classes, x_ND[order[:held]], label_N[order[:held]])
        )
        if best is None or hits > best[0]:
            best = hits, l2, start
    assert best is not None
    _, l2, start = best
    return *fit_logistic(x_ND, label_N, classes, l2, start, around), l2
