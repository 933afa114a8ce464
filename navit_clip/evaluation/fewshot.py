"""Few-shot classification by ridge regression on frozen features, as big_vision measures it.

Features of a few images of each class are whitened, a classifier is solved for in closed form, and
all other settings are fixed: nothing is tuned, so that numbers compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from navit_clip.data.seeding import generator
from navit_clip.errors import UserError
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.evaluator import make_row
from navit_clip.evaluation.linear_fit import fit_ridge, whiten
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.probes import Probe, ProbeSpec
from navit_clip.evaluation.ranking import Readout, classify
from navit_clip.evaluation.report.samples import ReportSamples
from navit_clip.evaluation.results import Metric, Row
from navit_clip.evaluation.settings import EvalSetting

_SHOTS = (1, 2, 4, 5, 8, 10, 16, 25, 50, 100)
_L2 = 2.0**10


@dataclass(frozen=True, kw_only=True)
class FewShotSpec(ProbeSpec):
    """Few-shot classification.

    Attributes:
        shots: Images of each class to learn from, such as 1,5,10,25.
        seeds: How many draws of these images are averaged.
    """

    shots: tuple[int, ...] = (1, 5, 10, 25)
    seeds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.shots) <= set(_SHOTS):
            raise ValueError(f"shots must be of {', '.join(map(str, _SHOTS))}, got {self.shots}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")


class FewShot(Probe[FewShotSpec]):
    """The mean accuracy over some draws of a few images of each class."""

    kind = "fewshot"
    title = "Few-shot"
    description = "few-shot classification by ridge regression on frozen features"
    Spec = FewShotSpec
    METRICS: ClassVar = {
        "top1": Metric("top-1, most shots", is_headline=True, guesses=1, among="classes"),
        "spread": Metric("± seeds"),
        **{f"shots/{n}": Metric(f"{n}-shot", guesses=1, among="classes") for n in _SHOTS},
    }

    def score(self, model: Model, data: Embedded, texts_TD: Tensor) -> Iterator[Row]:
        """Accuracy by shots at every setting."""
        classes, spec = self._classes(data), self.spec
        most = max(spec.shots)
        for setting in data.embeddings:
            hits_SE = {
                shots: torch.stack(
                    [
                        classify(
                            self._fit(model, data, setting, shots, seed).of(classes.competitors),
                            classes.right_LC,
                            classes.group_E,
                        ).rank_E
                        < 1
                        for seed in range(spec.seeds)
                    ]
                ).double()
                for shots in spec.shots
            }

            def measure(index: Tensor, hits_SE: dict[int, Tensor] = hits_SE) -> dict[str, float]:
                accuracy = {n: hits[:, index].mean().item() for n, hits in hits_SE.items()}
                return {"top1": accuracy[most]} | {f"shots/{n}": a for n, a in accuracy.items()}

            row = make_row(model, data, setting, measure)
            spread = hits_SE[most].mean(1).std(correction=0).item()
            yield replace(row, metrics={**row.metrics, "spread": spread})

    def readout(
        self, model: Model, data: Embedded, texts_TD: Tensor, setting: EvalSetting
    ) -> Readout:
        """Of the most shots, the first draw."""
        return self._fit(model, data, setting, max(self.spec.shots), 0)

    def samples(self) -> ReportSamples:
        """None: the regression has no probabilities to show."""
        return ReportSamples()

    def _fit(
        self, model: Model, data: Embedded, setting: EvalSetting, shots: int, seed: int
    ) -> Readout:
        train_ND, label_N, test_ED = self.features(model, data, setting)
        chosen = self._draw(label_N.cpu(), shots, seed)
        train_ND, test_ED = whiten(train_ND[chosen], test_ED)
        weight_LD, bias_L = fit_ridge(train_ND, label_N[chosen], len(self.names), _L2)
        return Readout(test_ED.cpu(), weight_LD.cpu(), bias_L.cpu())

    def _draw(self, label_N: Tensor, shots: int, seed: int) -> Tensor:
        """Indices of so many images of each class; those of fewer shots are among them."""
        chosen = []
        for index in label_N.unique().tolist():
            own = (label_N == index).nonzero()[:, 0]
            if len(own) < shots:
                raise UserError(
                    f"class {self.names[index]} has {len(own)} images in {self.spec.train}, fewer "
                    f"than {shots} shots: give --shots without it"
                )
            order = generator(seed, "fewshot", index).permutation(len(own))
            chosen.append(own[torch.from_numpy(order[:shots])])
        return torch.cat(chosen)
