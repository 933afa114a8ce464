"""Sample images and captions for a report, with what the model finds nearest to them.

Chosen on rank 0, the same for the same embeddings: hits and misses, confident mistakes, the worst
classes. Only the chosen images are read again.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from navit_clip.evaluation.calibration import Bin, calibration_bins
from navit_clip.evaluation.datasets import EvalDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.ranking import ClassTable, Readout, classify, pair_ranks
from navit_clip.evaluation.report.pictures import Picture, read_pictures

_QUERIES = 12  # per direction, half of them hits where there are enough
_NEAREST = 5  # captions or images of a query
_SAMPLES, _MISTAKES = 8, 12  # classified images: evenly spaced, and the most confident mistakes
_EXAMPLES = 4  # mistaken images of each of the worst classes
_GUESSES = 3  # classes of an image


@dataclass(frozen=True)
class Match:
    """One caption, class or image among the nearest.

    Attributes:
        score: Cosine similarity, or probability of a class.
        is_right: Whether it belongs to the query.
        place: 1 for the nearest.
        index: Of the caption, class or image.
        text: The caption or class, empty for an image.
        picture: The image, None for a text.
    """

    score: float
    is_right: bool
    place: int
    index: int
    text: str = ""
    picture: Picture | None = None


@dataclass(frozen=True)
class Query:
    """An image or a caption, and what is nearest to it.

    Attributes:
        hit: Whether the nearest one is right.
        matches: The nearest, and the best right one where none is among them.
        text: The caption, or the true class of an image.
        picture: The image, None for a caption.
    """

    hit: bool
    matches: tuple[Match, ...]
    text: str = ""
    picture: Picture | None = None


@dataclass(frozen=True)
class ReportSamples:
    """What a report shows beside the metrics, at the model's own setting.

    Attributes:
        images: Image queries: hits and misses of retrieval.
        captions: Caption queries.
        classified: A sample of classified images.
        mistakes: Misclassified images, the most confident first.
        classes: Mistaken images of the worst classes, by class.
        calibration: Bins of confidence.
        drawing: A PNG; empty without one.
    """

    images: tuple[Query, ...] = ()
    captions: tuple[Query, ...] = ()
    classified: tuple[Query, ...] = ()
    mistakes: tuple[Query, ...] = ()
    classes: dict[str, tuple[Query, ...]] = field(default_factory=dict)
    calibration: tuple[Bin, ...] = ()
    drawing: bytes = b""

    @property
    def drawing_uri(self) -> str:
        """The drawing as a ``data:`` address."""
        return "data:image/png;base64," + b64encode(self.drawing).decode()


def classification_samples(
    dataset: EvalDataset,
    data: Embedded,
    readout: Readout,
    classes: ClassTable,
    worst: Sequence[str],
) -> ReportSamples:
    """Chooses images classified at the model's own setting, and measures confidence.

    Raises:
        UserError: If the dataset can no longer be read.
    """
    groups, group_E = classes.groups, classes.group_E
    found = classify(readout, classes.right_LC, group_E)
    right_E = found.rank_E < 1
    # The most confident first; a stable order makes ties the same everywhere.
    order_E = found.confidence_E.argsort(descending=True, stable=True)
    wrong = order_E[~right_E[order_E]].tolist()
    samples = _evenly(list(range(len(data.names))), _SAMPLES)
    mistaken = {
        name: [i for i in wrong if groups[int(group_E[i])] == name][:_EXAMPLES] for name in worst
    }
    chosen = {*samples, *wrong[:_MISTAKES], *(i for indices in mistaken.values() for i in indices)}
    pictures = read_pictures(dataset, data, chosen)

    def query(index: int) -> Query:
        group = int(group_E[index])
        scores_C = readout.probabilities(readout.only(slice(index, index + 1)).scores())[0]
        right = set(classes.right_LC[group].nonzero()[:, 0].tolist())
        nearest = _nearest(scores_C, right, _GUESSES, classes.titles)
        return Query(bool(right_E[index]), nearest, groups[group], pictures[index])

    return ReportSamples(
        classified=tuple(map(query, samples)),
        mistakes=tuple(map(query, wrong[:_MISTAKES])),
        classes={name: tuple(map(query, indices)) for name, indices in mistaken.items()},
        calibration=calibration_bins(found.confidence_E, right_E),
    )


def retrieval_samples(
    dataset: EvalDataset, data: Embedded, images_ED: Tensor, texts_TD: Tensor
) -> ReportSamples:
    """Chooses hits and misses, both ways, of embeddings at the model's own setting.

    Raises:
        UserError: If the dataset can no longer be read.
    """
    texts, image_T = data.texts, data.image_of_texts
    ranks_E, ranks_T = pair_ranks(images_ED, texts_TD, image_T)
    images, captions = _hits_and_misses(ranks_E), _hits_and_misses(ranks_T)
    near_images = {
        c: _nearest(images_ED @ texts_TD[c], {int(image_T[c])}, _NEAREST) for c in captions
    }
    found = {match.index for near in near_images.values() for match in near}
    pictures = read_pictures(dataset, data, found.union(images))

    def image_query(index: int, hit: bool) -> Query:
        own = set((image_T == index).nonzero()[:, 0].tolist())
        nearest = _nearest(texts_TD @ images_ED[index], own, _NEAREST, texts)
        return Query(hit, nearest, picture=pictures[index])

    def caption_query(index: int, hit: bool) -> Query:
        nearest = (replace(m, picture=pictures[m.index]) for m in near_images[index])
        return Query(hit, tuple(nearest), texts[index])

    return ReportSamples(
        images=tuple(image_query(*query) for query in images.items()),
        captions=tuple(caption_query(*query) for query in captions.items()),
    )


def _evenly(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices, evenly spaced from the first to the last."""
    if len(indices) <= count:
        return list(indices)
    return [indices[round(i * (len(indices) - 1) / (count - 1))] for i in range(count)]


def _hits_and_misses(ranks: Tensor) -> dict[int, bool]:
    """Queries and whether each is a hit: as many of both as there are, clear misses first.

    `ranks` are those of `pair_ranks`: 0 is a hit.
    """
    hits = (ranks == 0).nonzero()[:, 0].tolist()
    clear = (ranks >= _NEAREST).nonzero()[:, 0].tolist()
    misses = clear or (ranks > 0).nonzero()[:, 0].tolist()
    half = _QUERIES // 2
    misses = _evenly(misses, max(half, _QUERIES - len(hits)))
    hits = _evenly(hits, _QUERIES - len(misses))
    return dict.fromkeys(hits, True) | dict.fromkeys(misses, False)


def _nearest(
    scores: Tensor, right: set[int], count: int, texts: Sequence[str] | None = None
) -> tuple[Match, ...]:
    """The nearest, best first, and the best right one where none is among them."""
    order = scores.argsort(descending=True, stable=True).tolist()
    places = list(enumerate(order, 1))
    nearest = places[:count]
    if not any(index in right for _, index in nearest):
        nearest += [(place, index) for place, index in places if index in right][:1]
    return tuple(
        Match(float(scores[i]), i in right, place, i, texts[i] if texts else "")
        for place, i in nearest
    )
