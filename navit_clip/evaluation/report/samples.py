"""Sample images and captions for a report, with what the model finds nearest to them.

The result of a harness has figures only. What a person wants to look at is chosen here, on the
first rank and always the same for the same embeddings: hits and misses, sure mistakes, the worst
classes. Only the images shown are read again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from navit_clip.evaluation.calibration import BINS
from navit_clip.evaluation.datasets import EvalDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.report.pictures import Picture, read_pictures
from navit_clip.evaluation.results import read_result
from navit_clip.evaluation.retrieval import pair_ranks

_BLOCK = 1024  # images compared at a time
_QUERIES = 12  # per direction, half of them hits where there are enough
_NEAREST = 5  # captions or images shown for a query
_SAMPLES, _MISTAKES = 8, 12  # classified images: evenly spaced, and the surest mistakes
_CLASSES, _EXAMPLES = 10, 4  # worst classes, and mistaken images of each
_GUESSES = 3  # classes shown for an image


@dataclass(frozen=True)
class Match:
    """One caption, class or image among the nearest.

    Attributes:
        score: Cosine similarity, or probability of a class.
        own: Whether it belongs to the query.
        place: 1 for the nearest.
        text: The caption or class, empty for an image.
        picture: The image, None for a text.
    """

    score: float
    own: bool
    place: int
    text: str = ""
    picture: Picture | None = None


@dataclass(frozen=True)
class Query:
    """An image or a caption, and what is nearest to it.

    Attributes:
        hit: Whether the nearest one is its own.
        matches: The nearest, and its own best where that is not among them.
        text: The caption, or the true class of an image.
        picture: The image, None for a caption.
    """

    hit: bool
    matches: tuple[Match, ...]
    text: str = ""
    picture: Picture | None = None


@dataclass(frozen=True)
class Bin:
    """Images whose best class has about the same probability.

    Attributes:
        images: How many.
        confidence: Mean probability of the best class.
        accuracy: Share of them whose best class is right.
    """

    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Shown:
    """What a report shows beside the figures, at the model's own setting.

    Attributes:
        images: Image queries: a sample of classified images, or hits and misses of retrieval.
        captions: Caption queries.
        mistakes: Images surely taken for another class, surest first.
        classes: Mistaken images of the worst classes, by class.
        calibration: Bins of confidence that are not empty.
    """

    images: tuple[Query, ...] = ()
    captions: tuple[Query, ...] = ()
    mistakes: tuple[Query, ...] = ()
    classes: dict[str, tuple[Query, ...]] | None = None
    calibration: tuple[Bin, ...] = ()


def show_zeroshot(
    result: dict[str, Any],
    data: Embedded,
    images_ED: Tensor,
    classes_CD: Tensor,
    names: Sequence[str],
    scale: float,
    dataset: EvalDataset,
    *,
    right: Mapping[int, Sequence[int]] | None = None,
    only: Sequence[int] | None = None,
) -> Shown:
    """Chooses classified images to show, and measures confidence.

    Args:
        result: Of `navit_clip.evaluation.zeroshot.judge`; says which classes are the worst.
        data: The embedded dataset, with labels.
        images_ED: Its embeddings at the model's own setting.
        classes_CD: One vector per class.
        names: Class names by label.
        scale: The model's factor on similarities, for probabilities.
        dataset: Read again for the pixels of the images shown.
        right: All right classes of labels that have several.
        only: Classes that compete; None lets all.

    Raises:
        UserError: If the dataset can no longer be read.
    """
    answers = {label: (right or {}).get(label, (label,)) for label in set(data.labels)}
    used = {index for found in answers.values() for index in found}
    chosen = list(range(len(names))) if only is None else sorted({*only, *used})
    place = {index: i for i, index in enumerate(chosen)}
    own = {label: {place[index] for index in found} for label, found in answers.items()}
    count = Counter(names)  # as in the result, where a name may stand for two classes
    told = [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    titles = {label: " / ".join(told[i] for i in found) for label, found in answers.items()}
    competitors = [told[index] for index in chosen]
    classes_CD = classes_CD[chosen].double()

    confidence_E, best_E = _best_classes(images_ED, classes_CD, scale)
    right_E = torch.tensor(
        [best in own[label] for best, label in zip(best_E.tolist(), data.labels, strict=True)]
    )
    # Surest first; a stable order makes ties the same everywhere.
    order_E = confidence_E.argsort(descending=True, stable=True)
    wrong = order_E[~right_E[order_E]].tolist()
    samples = _evenly(list(range(len(data.names))), _SAMPLES)
    classes: dict[str, list[int]] = {}
    for confusion in read_result(result).own.confusions[:_CLASSES]:
        mistaken = [i for i in wrong if titles[data.labels[i]] == confusion.name]
        classes[confusion.name] = mistaken[:_EXAMPLES]
    shown = {*samples, *wrong[:_MISTAKES], *(i for indices in classes.values() for i in indices)}
    pictures = read_pictures(dataset, data, sorted(shown))

    def query(index: int) -> Query:
        label = data.labels[index]
        scores_C = (scale * (classes_CD @ images_ED[index].double())).softmax(0)
        nearest = _with_texts(_nearest(scores_C, own[label], _GUESSES), competitors)
        return Query(nearest[0].own, nearest, titles[label], pictures[index])

    return Shown(
        images=tuple(query(i) for i in samples),
        mistakes=tuple(query(i) for i in wrong[:_MISTAKES]),
        classes={name: tuple(query(i) for i in indices) for name, indices in classes.items()},
        calibration=_calibration(confidence_E, right_E),
    )


def show_retrieval(
    data: Embedded, images_ED: Tensor, texts_TD: Tensor, owner_T: Tensor, dataset: EvalDataset
) -> Shown:
    """Chooses hits and misses to show, both ways.

    Args:
        data: The embedded dataset, with captions.
        images_ED: Its embeddings at the model's own setting.
        texts_TD: Caption embeddings, image by image.
        owner_T: Index of each caption's image.
        dataset: Read again for the pixels of the images shown.

    Raises:
        UserError: If the dataset can no longer be read.
    """
    texts = [caption for captions in data.captions for caption in captions]
    own_texts: dict[int, set[int]] = {}
    for caption, image in enumerate(owner_T.tolist()):
        own_texts.setdefault(image, set()).add(caption)

    ranks_E, ranks_T = pair_ranks(images_ED, texts_TD, owner_T)
    images, captions = _hits_and_misses(ranks_E), _hits_and_misses(ranks_T)
    near_texts = {i: _nearest(texts_TD @ images_ED[i], own_texts[i], _NEAREST) for i in images}
    near_images = {
        c: _nearest(images_ED @ texts_TD[c], {int(owner_T[c])}, _NEAREST) for c in captions
    }
    wanted = {i for near in near_images.values() for i, _ in near}
    pictures = read_pictures(dataset, data, sorted(wanted.union(images)))
    return Shown(
        images=tuple(
            Query(hit, _with_texts(near_texts[i], texts), picture=pictures[i])
            for i, hit in images.items()
        ),
        captions=tuple(
            Query(
                hit,
                tuple(replace(match, picture=pictures[i]) for i, match in near_images[c]),
                texts[c],
            )
            for c, hit in captions.items()
        ),
    )


def _evenly(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices, evenly spaced from the first to the last."""
    if len(indices) <= count:
        return list(indices)
    return [indices[round(i * (len(indices) - 1) / (count - 1))] for i in range(count)]


def _hits_and_misses(ranks: Tensor) -> dict[int, bool]:
    """Queries to show and whether each is a hit: as many of both as there are, clear misses first.

    Args:
        ranks: How many strangers are at least as near as each query's own; 0 is a hit.
    """
    hits = (ranks == 0).nonzero()[:, 0].tolist()
    clear = (ranks >= _NEAREST).nonzero()[:, 0].tolist()
    misses = clear or (ranks > 0).nonzero()[:, 0].tolist()
    half = _QUERIES // 2
    misses = _evenly(misses, max(half, _QUERIES - len(hits)))
    hits = _evenly(hits, _QUERIES - len(misses))
    return dict.fromkeys(hits, True) | dict.fromkeys(misses, False)


def _nearest(scores: Tensor, own: set[int], count: int) -> list[tuple[int, Match]]:
    """The nearest by index, best first, and the best of its own where that is not among them."""
    order = scores.argsort(descending=True, stable=True).tolist()
    places = [(place, index) for place, index in enumerate(order[:count], 1)]
    if not any(index in own for _, index in places):
        places += [(p, index) for p, index in enumerate(order, 1) if index in own][:1]
    return [(index, Match(float(scores[index]), index in own, place)) for place, index in places]


def _with_texts(nearest: list[tuple[int, Match]], texts: Sequence[str]) -> tuple[Match, ...]:
    return tuple(replace(match, text=texts[index]) for index, match in nearest)


def _best_classes(images_ED: Tensor, classes_CD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Each image's most probable class: float64 [E] probabilities, int64 [E] indices."""
    parts = [
        (scale * images.double() @ classes_CD.T).softmax(1).max(1)
        for images in images_ED.split(_BLOCK)
    ]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def _calibration(confidence_E: Tensor, right_E: Tensor) -> tuple[Bin, ...]:
    """Accuracy by confidence, in the bins of the expected calibration error."""
    edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
    number_E = torch.bucketize(confidence_E, edges)
    bins = []
    for number in number_E.unique().tolist():
        inside = number_E == number
        confidence = float(confidence_E[inside].mean())
        bins.append(Bin(int(inside.sum()), confidence, float(right_E[inside].double().mean())))
    return tuple(bins)
