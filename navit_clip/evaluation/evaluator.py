"""One evaluation from data to figures, for the command line and for the trainer.

`ZeroShotSpec` and `RetrievalSpec` say what is judged and on what; `evaluate` has all ranks embed
their share of images and texts, and judges on the first. Nothing is printed or written here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.evaluation import retrieval, zeroshot
from navit_clip.evaluation.cache import Cache
from navit_clip.evaluation.captioned import open_captioned
from navit_clip.evaluation.datasets import EvalDataset
from navit_clip.evaluation.embed import Embedded, describe_skips, embed_dataset
from navit_clip.evaluation.labelled import Labelled, open_labelled
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.settings import EvalSetting, make_settings, order_settings
from navit_clip.evaluation.texts import EmbeddedTexts, share_texts


@dataclass(frozen=True)
class ZeroShotSpec:
    """Zero-shot classification of labelled images.

    Attributes:
        data: Class folders, a flat folder with `labels`, or shards with ``.cls`` members.
        labels: File that says which class each image of a flat folder has, or None.
        class_map: From class folder or label to class index: a file, ``imagenet`` or ``index``.
        only_present: Only classes that occur in the data compete.
        classnames: Text file with one name per line, or ``imagenet``; None takes the folders'.
        templates: ``openai`` (80), ``simple`` (7), ``plain`` (1), or a text file.
        max_tokens: Token budgets per image beside the model's own setting.
        native: Also judge images at their own size.
        square: Also judge squares of these sides in pixels.

    Raises:
        ValueError: If a field is empty or out of range; the message names it.
    """

    data: str
    labels: str | None = None
    class_map: str | None = None
    only_present: bool = False
    classnames: str | None = None
    templates: str = "openai"
    max_tokens: tuple[int, ...] = ()
    native: bool = False
    square: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_given(self, "data", "templates")
        _check_views(self)


@dataclass(frozen=True)
class RetrievalSpec:
    """Image–text retrieval on captioned images: shards, or a folder with a JSON of captions.

    Attributes:
        data: Captioned shards, which come before a folder, or None.
        images: Folder of images, or None for that of a table of captions.
        captions: COCO's ``captions_*.json``, Karpathy's ``dataset_*.json``, or a table (CSV, TSV,
            Parquet), or None.
        image_column: Of a table: the image's path.
        caption_columns: Of a table: the captions.
        fields: caption fields in shards.
        split: Split of a Karpathy file; None takes ``test`` if it has one.
        max_tokens: Token budgets per image beside the model's own setting.
        native: Also judge images at their own size.
        square: Also judge squares of these sides in pixels.

    Raises:
        ValueError: If neither `data` nor `captions` is given, or a field is empty or out of range;
            the message names it.
    """

    data: str | None = None
    images: str | None = None
    captions: str | None = None
    image_column: str = "path"
    caption_columns: tuple[str, ...] = ("caption",)
    fields: tuple[str, ...] = ("txt",)
    split: str | None = None
    max_tokens: tuple[int, ...] = ()
    native: bool = False
    square: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.data is None and self.captions is None:
            raise ValueError("data must name shards, or images and captions a folder and its file")
        _check_given(self, "image_column", "caption_columns", "fields")
        _check_views(self)


Spec = ZeroShotSpec | RetrievalSpec


def _check_given(spec: Spec, *names: str) -> None:
    for name in names:
        if not getattr(spec, name):
            raise ValueError(f"{name} must not be empty")


def _check_views(spec: Spec) -> None:
    for name in ("max_tokens", "square"):
        if any(size < 1 for size in getattr(spec, name)):
            raise ValueError(f"{name} must hold numbers of at least 1, got {getattr(spec, name)}")


@dataclass(frozen=True)
class Outcome:
    """An evaluation on the first rank: the figures, and what pictures are drawn from.

    Attributes:
        result: Plain values for JSON.
        model: The model, whose texts are embedded already.
        data: Its embedded images.
        dataset: Where they came from.
        names: Class names by label, of zero-shot.
        classes_CD: Unit vectors of the classes, of zero-shot.
        texts_TD: Unit vectors of the captions, of retrieval.
        owner_T: Index of each caption's image, of retrieval.
        right: All right classes of labels that have several, of zero-shot.
        only: Classes that compete, of zero-shot; None lets all.
    """

    result: dict[str, Any]
    model: Model
    data: Embedded
    dataset: EvalDataset
    names: list[str] | None = None
    classes_CD: Tensor | None = None
    texts_TD: Tensor | None = None
    owner_T: Tensor | None = None
    right: Mapping[int, Sequence[int]] | None = None
    only: Sequence[int] | None = None


def open_zeroshot(spec: ZeroShotSpec) -> tuple[Labelled, list[str], list[zeroshot.Template]]:
    """The labelled images, the class names and the templates.

    Raises:
        UserError: If one of them cannot be read, or a label has no name.
    """
    labelled = open_labelled(spec.data, spec.labels, spec.class_map)
    names = zeroshot.load_classnames(spec.classnames, labelled.folders)
    labelled.check_names(names)
    return labelled, names, zeroshot.load_templates(spec.templates)


def open_retrieval(spec: RetrievalSpec) -> EvalDataset:
    """The captioned images.

    Raises:
        UserError: If they cannot be read.
    """
    return open_captioned(
        spec.data,
        spec.images,
        spec.captions,
        spec.fields,
        spec.split,
        spec.image_column,
        spec.caption_columns,
    )


def evaluate(model: Model, spec: Spec, ranks: Ranks, workers: int) -> dict[str, Any] | None:
    """Judges a model; every rank calls it, each with the same weights.

    Args:
        model: What is judged, in evaluation mode.
        spec: On what.
        ranks: This process among all of them.
        workers: Decoding processes per rank; 0 decodes in this one.

    Returns:
        The result on the first rank, plain values for JSON; None on the others.

    Raises:
        UserError: If the data cannot be read, the same on all ranks.
    """
    outcome = judge(model, spec, ranks, workers)
    return outcome.result if outcome is not None else None


def judge(
    model: Model,
    spec: Spec,
    ranks: Ranks,
    workers: int,
    *,
    baselines: Sequence[Model] = (),
    cache: Cache | None = None,
    strict: bool = False,
) -> Outcome | None:
    """`evaluate` with all that the command line offers.

    Args:
        model: What is judged.
        spec: On what.
        ranks: This process among all of them.
        workers: Decoding processes per rank.
        baselines: Judged beside it on the same images, at their own setting and at those of the
            squares asked for that they can take.
        cache: Where embeddings are kept from one evaluation to the next.
        strict: An image or caption that cannot be used is an error.

    Raises:
        UserError: If the data cannot be read, a setting is impossible, or `strict` is violated; the
            same on all ranks.
    """
    asked = make_settings(spec.max_tokens, spec.native, spec.square)
    settings = [_settings(model, asked)]
    settings += [_settings(baseline, _possible(baseline, asked)) for baseline in baselines]
    looks = list(zip([model, *baselines], settings, strict=True))
    if isinstance(spec, ZeroShotSpec):
        return _zeroshot(looks, spec, ranks, workers, cache, strict)
    return _retrieval(looks, spec, ranks, workers, cache, strict)


def _settings(model: Model, asked: Sequence[EvalSetting]) -> list[EvalSetting]:
    for setting in asked:
        model.check(setting)
    return order_settings([*asked, model.own_setting])


def _possible(baseline: Model, asked: Sequence[EvalSetting]) -> list[EvalSetting]:
    """The squares that a baseline can take; budgets are the business of packed models."""
    possible = []
    for setting in asked:
        try:
            baseline.check(setting)
        except UserError:
            continue
        possible.append(setting)
    return possible


Looks = Sequence[tuple[Model, Sequence[EvalSetting]]]


def _zeroshot(
    looks: Looks,
    spec: ZeroShotSpec,
    ranks: Ranks,
    workers: int,
    cache: Cache | None,
    strict: bool,
) -> Outcome | None:
    labelled, names, templates = open_zeroshot(spec)
    embedded = embed_dataset(looks, labelled.dataset, ranks, workers=workers, cache=cache)
    if strict:
        _check_complete(embedded[0])
    prompts = [template(name) for name in names for template in templates]
    told = [share_texts(model, prompts, ranks, cache) for model, _ in looks]

    def figures() -> Outcome:
        only = labelled.present(embedded[0].labels) if spec.only_present else None
        vectors = [zeroshot.class_vectors(model, names, templates) for model in told]
        judged = [
            zeroshot.judge(
                model,
                data,
                names,
                templates,
                right=labelled.right,
                only=only,
                classes_CD=classes_CD,
            )
            for model, data, classes_CD in zip(told, embedded, vectors, strict=True)
        ]
        result = _result(told, spec.data, judged)
        return Outcome(
            result,
            told[0],
            embedded[0],
            labelled.dataset,
            names=names,
            classes_CD=vectors[0],
            right=labelled.right,
            only=only,
        )

    return _on_first(figures, ranks)


def _retrieval(
    looks: Looks,
    spec: RetrievalSpec,
    ranks: Ranks,
    workers: int,
    cache: Cache | None,
    strict: bool,
) -> Outcome | None:
    dataset = open_retrieval(spec)
    embedded = embed_dataset(looks, dataset, ranks, workers=workers, cache=cache)
    if strict:
        _check_complete(embedded[0])
    captions = [text for of_image in embedded[0].captions for text in of_image]
    told = [share_texts(model, captions, ranks, cache) for model, _ in looks]

    def figures() -> Outcome:
        texts = [
            retrieval.embed_captions(model, data)
            for model, data in zip(told, embedded, strict=True)
        ]
        judged = [
            retrieval.judge(model, data, texts_TD, owner_T)
            for model, data, (texts_TD, owner_T) in zip(told, embedded, texts, strict=True)
        ]
        result = _result(told, spec.data or spec.captions, judged)
        texts_TD, owner_T = texts[0]
        return Outcome(result, told[0], embedded[0], dataset, texts_TD=texts_TD, owner_T=owner_T)

    return _on_first(figures, ranks)


def _on_first(figures: Callable[[], Outcome], ranks: Ranks) -> Outcome | None:
    """Judges on the first rank; the others learn of a failure, which would leave them waiting."""
    outcome, problem = None, None
    if ranks.is_first:
        try:
            outcome = figures()
        except UserError as error:
            problem = str(error)
    problem = ranks.broadcast(problem)
    if problem is not None:
        raise UserError(problem)
    return outcome


def _result(
    models: Sequence[EmbeddedTexts], data: str | None, judged: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    baselines = [
        {"model": model.name, "views": result["views"]}
        for model, result in zip(models[1:], judged[1:], strict=True)
    ]
    return {"model": models[0].name, "data": data, **judged[0], "baselines": baselines}


def _check_complete(data: Embedded) -> None:
    if data.skipped:
        found = describe_skips(data.skipped, data.skips)
        raise UserError(f"--strict: {found}: mend the data or leave out --strict")
