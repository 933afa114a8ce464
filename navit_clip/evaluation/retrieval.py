"""Image–text retrieval: recall at 1, 5 and 10 and the median rank, both ways.

The usual convention for COCO and Flickr30k: every caption is a query for its image; an image finds
a hit if any of its captions is among the nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from navit_clip.errors import UserError
from navit_clip.evaluation.captioned import open_captioned
from navit_clip.evaluation.datasets import EvalDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.evaluator import EmbeddingEvaluator, EvalSpec, make_row
from navit_clip.evaluation.gallery import draw_gallery
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.ranking import RECALL_AT, pair_ranks, recall
from navit_clip.evaluation.report.samples import ReportSamples, retrieval_samples
from navit_clip.evaluation.results import Metric, Row

I2T, T2I = "image_to_text", "text_to_image"


@dataclass(frozen=True)
class RetrievalSpec(EvalSpec):
    """Image–text retrieval on captioned images: shards, or a folder with a JSON of captions.

    Attributes:
        data: Captioned shards, or a table or folder of images, as training reads them.
        images: Folder of images; by default that of a table of captions.
        captions: ``captions_*.json`` (COCO), ``dataset_*.json`` (Karpathy), or a table: CSV, TSV,
            JSON lines or Parquet.
        image_column: Of a table: the image's path.
        caption_columns: Of a table: captions.
        fields: Caption fields in shards, ``all``, ``txt`` or ``json.FIELD``: all their captions are
            queries; one that is in several fields counts once.
        split: Of a Karpathy file; by default ``test`` if it has one.

    Raises:
        ValueError: If neither `data` nor `captions` is given, or a field is empty or out of range;
            the message names it.
    """

    data: str | None = None
    images: str | None = None
    captions: str | None = None
    image_column: str = "path"
    caption_columns: tuple[str, ...] = field(
        default=("caption",), metadata={"flag": "--caption-column"}
    )
    fields: tuple[str, ...] = ("all",)
    split: str | None = None

    def __post_init__(self) -> None:
        if self.data is None and self.captions is None:
            raise ValueError("data must name shards, or images and captions a folder and its file")
        super().__post_init__()

    @property
    def data_name(self) -> str:
        """The shards, or the file of captions."""
        return self.data or self.captions or ""


def _metrics(key: str, group: str, abbreviation: str, queries: str) -> dict[str, Metric]:
    # An image has as many captions as there are for each image, and as many chances to be guessed.
    metrics = {
        f"{key}/R@{k}": Metric(
            f"R@{k}", group, abbreviation, k == 1, queries=queries, guesses=k, among="images"
        )
        for k in RECALL_AT
    }
    median = Metric("median", group, abbreviation, lower_is_better=True, is_fraction=False)
    return {**metrics, f"{key}/median_rank": median}


class Retrieval(EmbeddingEvaluator[RetrievalSpec]):
    """Finds captions by images and images by captions."""

    kind = "retrieval"
    title = "Retrieval"
    description = "image-text retrieval, R@1/5/10 both ways"
    gallery = "sample images with their best captions"
    Spec = RetrievalSpec
    METRICS: ClassVar = {
        **_metrics(I2T, "image → text", "I→T", "images"),
        **_metrics(T2I, "text → image", "T→I", "captions"),
    }
    reads_texts = True
    counted = "captions"

    def open(self) -> EvalDataset:
        """Opens the captioned images."""
        spec = self.spec
        return open_captioned(
            spec.data,
            spec.images,
            spec.captions,
            spec.fields,
            spec.split,
            spec.image_column,
            spec.caption_columns,
        )

    def texts(self, data: Embedded) -> list[str]:
        """All captions, image by image."""
        return data.texts

    def count(self, data: Embedded) -> int:
        """Captions."""
        return len(data.texts)

    def score(self, model: Model, data: Embedded, texts_TD: Tensor) -> Iterator[Row]:
        """Recall at every setting; queries of a group search among all images and captions."""
        if len(data.names) < 2:
            raise UserError("one image alone is found by every query: give at least two")
        image_T = data.image_of_texts
        for setting, images_ED in data.embeddings.items():
            measure = partial(_recalls, *pair_ranks(images_ED, texts_TD, image_T), image_T)
            yield make_row(model, data, setting, measure)

    def samples(self) -> ReportSamples:
        """Hits and misses, both ways."""
        images_ED = self.data.embeddings[self.model.own_setting]
        return retrieval_samples(self.dataset, self.data, images_ED, self.texts_TD)

    def draw_gallery(self, path: Path) -> None:
        """Draws images with their best captions."""
        images_ED = self.data.embeddings[self.model.own_setting]
        draw_gallery(self.dataset, self.data, images_ED, self.texts_TD, path)


def _recalls(
    to_text_E: Tensor, to_image_T: Tensor, image_T: Tensor, index: Tensor
) -> dict[str, float]:
    found = {I2T: recall(to_text_E[index]), T2I: recall(to_image_T[torch.isin(image_T, index)])}
    return {f"{way}/{key}": value for way, by_k in found.items() for key, value in by_k.items()}
