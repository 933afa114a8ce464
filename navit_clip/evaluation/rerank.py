"""Re-ranking: images found at few tokens, the nearest of every caption ranked again at more.

What it is for is a collection that is embedded once and has few queries: its vectors are made at
few tokens, and a query pays for the images that are embedded again for it. Rows of a result are the
token limits alone, and every two of them with every number of nearest images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from navit_clip.errors import UserError
from navit_clip.evaluation.cascade import check_two_limits, limits_of
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.evaluator import make_row
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.ranking import pair_ranks, recall, rerank
from navit_clip.evaluation.results import Metric, Row
from navit_clip.evaluation.retrieval import T2I, Retrieval, RetrievalSpec
from navit_clip.evaluation.settings import EvalSetting


@dataclass(frozen=True)
class RerankSpec(RetrievalSpec):
    """Re-ranking between the model's own token limit and those of max_tokens.

    Attributes:
        top: How many of the nearest images are ranked again, such as 5,10,50.
    """

    top: tuple[int, ...] = (5, 10, 20, 50)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(count < 2 for count in self.top):
            raise ValueError(f"top must hold numbers of at least 2, got {self.top}")


class Rerank(Retrieval):
    """Finds images by captions, at two token limits."""

    kind = "rerank"
    title = "Re-ranking"
    description = "text-image retrieval at few tokens, the nearest images again at more"
    gallery = ""
    Spec = RerankSpec
    METRICS: ClassVar = {
        "query_gflops": Metric("GFLOPs", "a query", lower_is_better=True, is_fraction=False),
        "again": Metric("images again", lower_is_better=True),
        **{key: metric for key, metric in Retrieval.METRICS.items() if key.startswith(T2I)},
    }
    spec: RerankSpec

    def check_model(self, model: Model) -> None:
        """There must be a second limit."""
        super().check_model(model)
        check_two_limits("re-ranking", model, self.spec.settings)

    def score(self, model: Model, data: Embedded, texts_TD: Tensor) -> Iterator[Row]:
        """The settings alone, then re-ranked ones."""
        tops = sorted({top for top in self.spec.top if top < len(data.names)})
        if not tops:
            raise UserError(
                f"there are {len(data.names)} images: give --top numbers below that, not "
                + ",".join(map(str, self.spec.top))
            )
        image_T, alone, ranks = data.image_of_texts, dict[EvalSetting, Row](), {}
        for setting, images_ED in data.embeddings.items():
            _, ranks[setting] = pair_ranks(images_ED, texts_TD, image_T)
            measure = partial(_recalls, ranks[setting], image_T)
            alone[setting] = make_row(model, data, setting, measure)
        yield from alone.values()
        for few, many in combinations(limits_of(alone), 2):
            cost = {tokens: model.image_flops(tokens) for tokens in set(data.lengths[many])}
            flops_E = torch.tensor([cost[tokens] for tokens in data.lengths[many]]).double()
            vectors = (data.embeddings[few], data.embeddings[many], texts_TD)
            reranked = rerank(*vectors, image_T, ranks[few], tops, flops_E)
            for top, found in zip(tops, reranked, strict=True):
                yield replace(
                    alone[few],
                    setting=EvalSetting("rerank", few.size, many.size, top=top),
                    is_own=False,
                    breakdowns={},
                    metrics={
                        "query_gflops": found.cost / 1e9,
                        "again": found.again,
                        **_recalls(found.rank_T, image_T, torch.arange(len(data.names))),
                    },
                )


def _recalls(rank_T: Tensor, image_T: Tensor, index: Tensor) -> dict[str, float]:
    found = recall(rank_T[torch.isin(image_T, index)])
    return {f"{T2I}/{key}": value for key, value in found.items()}
