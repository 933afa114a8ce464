"""What an evaluator is: asked by the command line and by the trainer, which know none by name.

An `Evaluator` has a specification that says what is evaluated on which data, a table of its
metrics, and `run`, which every rank calls with the same model. `EmbeddingEvaluator` is the part
that those on embeddings of images and texts share. `navit_clip.evaluation.registry` lists all of
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from navit_clip.data.image_header import MAX_PIXELS, check_max_pixels
from navit_clip.distributed import Ranks
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.evaluation.breakdown import Measure, break_down
from navit_clip.evaluation.cache import Cache
from navit_clip.evaluation.datasets import LEFT_OUT, EvalDataset
from navit_clip.evaluation.embed import (
    Embedded,
    describe_skips,
    embed_dataset,
    embed_texts,
    fail_together,
)
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.report.samples import ReportSamples
from navit_clip.evaluation.results import EvalResult, Metric, Row
from navit_clip.evaluation.settings import EvalSetting, order_settings

_PROBED = 100  # images of which one must be readable for a training run to begin


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """The settings of an evaluation; the specification of an evaluator adds its data.

    Attributes:
        max_tokens: Token limits per image beside the model's own setting, such as 64,128,256.
        native: Also images at their own size, never enlarged.
        square: Also squares of these sides in pixels, such as 224.
        max_pixels: Images of more pixels are skipped, as their header tells.
    """

    SHARDS: ClassVar[tuple[str, ...]] = ("data",)  # fields that may name shards

    max_tokens: tuple[int, ...] = ()
    native: bool = False
    square: tuple[int, ...] = ()
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        check_max_pixels(self.max_pixels)
        empty = ("", ())
        for each in fields(self):
            if getattr(self, each.name) in empty and each.default not in empty:
                raise ValueError(f"{each.name} must not be empty")
        for name, sizes in (("max_tokens", self.max_tokens), ("square", self.square)):
            if any(size < 1 for size in sizes):
                raise ValueError(f"{name} must hold numbers of at least 1, got {sizes}")

    @property
    def settings(self) -> list[EvalSetting]:
        """What is asked for beside the model's own setting, see `order_settings`."""
        settings = [EvalSetting("capped", size) for size in self.max_tokens]
        settings += [EvalSetting("square", side) for side in self.square]
        return order_settings(settings + [EvalSetting("native")] * self.native)

    @property
    def data_name(self) -> str:
        """Name or path of the data, for results."""
        raise NotImplementedError


S = TypeVar("S", bound=EvalSpec)


class Evaluator(ABC, Generic[S]):
    """Measures models on data.

    Args:
        spec: What is evaluated.

    Attributes:
        kind: Its name on the command line and in the trainer's configuration.
        title: Of its results.
        description: One line of help.
        gallery: What the flag ``--gallery`` draws; empty without one.
        draws_in_training: Whether the trainer draws it too, at each evaluation.
        Spec: Its specification's class, a flag per field.
        METRICS: By key. Slashes in a key are levels of the JSON of results.
        counted: What a result counts beside images.
        reads_texts: Whether models have to read texts.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    description: ClassVar[str]
    gallery: ClassVar[str] = ""
    draws_in_training: ClassVar[bool] = False
    Spec: ClassVar[type[EvalSpec]]
    METRICS: ClassVar[Mapping[str, Metric]]
    counted: ClassVar[str]
    reads_texts: ClassVar[bool] = False

    def __init__(self, spec: S) -> None:
        self.spec = spec

    @abstractmethod
    def check(self, model: Model) -> None:
        """Finds out early whether `run` will have data, and settings that the model can take.

        Args:
            model: Its weights do not matter; they may be on the meta device.

        Raises:
            UserError: If not.
        """

    @abstractmethod
    def run(
        self,
        model: Model,
        ranks: Ranks,
        workers: int,
        *,
        baselines: Sequence[Model] = (),
        cache: Cache | None = None,
        strict: bool = False,
    ) -> EvalResult | None:
        """Evaluates a model; every rank calls it, each with the same weights.

        Args:
            model: In evaluation mode.
            ranks: This process among all of them.
            workers: Decoding processes per rank; 0 decodes in this one.
            baselines: Evaluated beside it on the same data, at their own setting and at those asked
                for that they can take.
            cache: Where embeddings are kept from one evaluation to the next.
            strict: An image or caption that cannot be used is an error.

        Returns:
            The result on rank 0, None on the others.

        Raises:
            UserError: If the data cannot be read, a setting is impossible, or `strict` is violated;
                the same on all ranks.
        """

    def samples(self) -> ReportSamples:
        """Images and texts for a report on what `run` gave on this rank.

        Raises:
            UserError: If the data can no longer be read.
        """
        return ReportSamples()

    def draw_gallery(self, path: Path) -> None:
        """Draws the `gallery` of the last `run`.

        Raises:
            UserError: If the file cannot be written.
        """
        raise NotImplementedError


class EmbeddingEvaluator(Evaluator[S]):
    """Scores embeddings of images and texts, which all ranks compute together, on rank 0.

    Attributes:
        dataset: The images; set by `open`, as are the attributes of a subclass.
        device: Of the ranks.
        result: Of the last `run`; set on rank 0, as are the following.
        model: The model under evaluation.
        data: Its embeddings of the images.
        texts_TD: Its embeddings of the texts.
    """

    dataset: EvalDataset
    device: torch.device
    result: EvalResult
    model: Model
    data: Embedded
    texts_TD: Tensor

    @abstractmethod
    def open(self) -> EvalDataset:
        """Opens the data.

        Raises:
            UserError: If it cannot be read or does not fit together.
        """

    def prepare(
        self, models: Sequence[Model], embed: Callable[[EvalDataset], list[Embedded]]
    ) -> None:
        """Embeds what else the models need, once the data is open; every rank calls it."""

    def texts(self, data: Embedded) -> list[str]:
        """All texts that `score` needs; by default none."""
        return []

    @abstractmethod
    def count(self, data: Embedded) -> int:
        """How many there are of what is `counted`."""

    @abstractmethod
    def score(self, model: Model, data: Embedded, texts_TD: Tensor) -> Iterable[Row]:
        """One row per setting of the data, made with `make_row`.

        Raises:
            UserError: If labels and names do not go together.
        """

    def accept(self, model: Model) -> None:
        """Refuses a model that cannot be evaluated so, whatever its settings.

        Raises:
            UserError: If it is one.
        """
        if self.reads_texts and not model.reads_texts:
            raise UserError(
                f"{self.kind} compares images with texts, which {model.name} cannot read"
            )

    def adapted(self, model: Model) -> Model:
        """What embeds in place of an accepted model."""
        return model

    def check_model(self, model: Model) -> None:
        """Refuses a model, or a setting that is impossible for it.

        Raises:
            UserError: If so.
        """
        self.accept(model)
        for setting in self.spec.settings:
            model.check(setting)

    def check(self, model: Model) -> None:
        """Opens the data and looks for an image that can be read."""
        self.check_model(model)
        first: SkipSampleError | None = None
        for item in islice(self.open().read(0, 1), _PROBED):
            if not isinstance(item.data, SkipSampleError):
                return
            first = first or item.data
        raise UserError(f"no image can be read: {first or 'there is none'}")

    def run(
        self,
        model: Model,
        ranks: Ranks,
        workers: int,
        *,
        baselines: Sequence[Model] = (),
        cache: Cache | None = None,
        strict: bool = False,
    ) -> EvalResult | None:
        """Embeds on all ranks and scores on rank 0."""
        asked = self.spec.settings
        self.check_model(model)
        for baseline in baselines:
            self.accept(baseline)
        models = [self.adapted(one) for one in (model, *baselines)]
        settings = []
        for one in models:
            taken = [one.own_setting]
            for setting in asked:
                with suppress(UserError):
                    one.check(setting)
                    taken.append(setting)
            settings.append((one, order_settings(taken)))
        self.dataset, self.device = self.open(), ranks.device

        def embed(dataset: EvalDataset) -> list[Embedded]:
            embedded = embed_dataset(
                settings,
                dataset,
                ranks,
                workers=workers,
                cache=cache,
                max_pixels=self.spec.max_pixels,
            )
            if strict:
                _check_skips(embedded[0])
            return embedded

        self.prepare(models, embed)
        embedded = embed(self.dataset)
        data = embedded[0]
        texts = self.texts(data)
        vectors = [embed_texts(one, texts, ranks, cache) for one in models]

        def score() -> EvalResult:
            self.model, self.data, self.texts_TD = models[0], data, vectors[0]
            self.result = self._result(zip(models, embedded, vectors, strict=True))
            return self.result

        def beat() -> None:
            with models[0].around():
                pass

        with fail_together(ranks):
            return ranks.first_alone(score, beat)

    def _result(self, embedded: Iterable[tuple[Model, Embedded, Tensor]]) -> EvalResult:
        models, rows = [], list[Row]()
        for series, (model, data, texts_TD) in enumerate(embedded):
            models.append(model)
            rows += [replace(row, series=series) for row in self.score(model, data, texts_TD)]
        return EvalResult(
            kind=self.kind,
            title=self.title,
            metrics=self.METRICS,
            data=self.spec.data_name,
            counts={"images": len(self.data.names), self.counted: self.count(self.data)},
            skipped=dict(self.data.skipped),
            rows=tuple(rows),
            precision=models[0].precision,
            skip_examples=tuple(self.data.skips),
        )


def _check_skips(data: Embedded) -> None:
    unwanted = Counter({why: n for why, n in data.skipped.items() if why != LEFT_OUT})
    if unwanted:
        skips = [line for line in data.skips if not line.startswith(LEFT_OUT)]
        found = describe_skips(unwanted, skips)
        raise UserError(f"--strict: {found}: fix the data or leave out --strict")


def make_row(model: Model, data: Embedded, setting: EvalSetting, measure: Measure) -> Row:
    """A row with the cost of its setting, metrics, and these by shape and size of the images."""
    lengths = data.lengths[setting]
    return Row(
        model=model.name,
        series=0,
        setting=setting,
        is_own=setting == model.own_setting,
        mean_tokens=sum(lengths) / len(lengths),
        padding=data.padding[setting],
        flops_per_image=mean_flops(model, lengths),
        metrics=measure(torch.arange(len(lengths))),
        breakdowns=break_down(data.sizes, measure),
    )


def mean_flops(model: Model, lengths: Sequence[int]) -> float:
    """Forward FLOPs per image, of images of so many tokens each; 0 of none."""
    flops = sum(n * model.image_flops(tokens) for tokens, n in Counter(lengths).items())
    return flops / max(1, len(lengths))
