"""Results of an evaluation as typed values; JSON is written from them and read back into them.

An evaluator makes an `EvalResult` with one row per model and setting; tables (`summary`), curves
and reports show it. What the metrics are called and how they are compared is in the table of
`Metric` that each evaluator has, so that nothing here or there knows an evaluator by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from typing import Any

from navit_clip.evaluation.settings import EvalSetting

BREAKDOWNS = {
    "by_aspect": "aspect ratio (long side : short side)",
    "by_size": "size (side in pixels of a square of the same area)",
}


@dataclass(frozen=True)
class Metric:
    """How a metric is compared and displayed.

    Attributes:
        label: Heading of its column, such as ``top-1``.
        group: Heading over the columns of several metrics, such as ``image → text``.
        abbreviation: Of the group, for where there is no such heading.
        is_headline: Whether it is in curves, breakdowns and log lines; every result must have it.
        lower_is_better: Whether a smaller value is the better one.
        is_fraction: Whether it is displayed as a percentage.
        queries: Which count of a result it is a fraction of, such as ``images``; empty if it is
            none of single ones.
        guesses: How many answers of a query count, and
        among: which count of a result they are drawn from: together, what guessing gives.
    """

    label: str
    group: str = ""
    abbreviation: str = ""
    is_headline: bool = False
    lower_is_better: bool = False
    is_fraction: bool = True
    queries: str = ""
    guesses: int = 0
    among: str = ""

    @property
    def name(self) -> str:
        """``top-1``, ``I→T R@1``."""
        return f"{self.abbreviation} {self.label}".strip()

    def format(self, value: float | None) -> str:
        """``41.3%`` for a fraction, ``3`` for another number, a dash for None and NaN."""
        if self.is_fraction or value is None or math.isnan(value):
            return percent(value)
        return f"{value:g}"


def wilson_interval(value: float, queries: int) -> tuple[float, float]:
    """The 95% interval of a fraction of independent queries (Wilson, 1927, no correction)."""
    z2 = 1.959964**2
    middle = (value + z2 / (2 * queries)) / (1 + z2 / queries)
    root = math.sqrt(value * (1 - value) / queries + z2 / (4 * queries**2))
    half = math.sqrt(z2) * root / (1 + z2 / queries)
    return max(0.0, middle - half), min(1.0, middle + half)


def percent(value: float | None) -> str:
    """``41.3%``; a dash for None and NaN."""
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


def shorten(text: str, most: int) -> str:
    """Keeps the end, by which paths differ."""
    return text if len(text) <= most else "…" + text[1 - most :]


@dataclass(frozen=True)
class Group:
    """Images of one shape or size.

    Attributes:
        label: What they have in common.
        images: How many.
        metrics: Over these images.
    """

    label: str
    images: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Confusion:
    """A class that is often mistaken.

    Attributes:
        name: The class.
        images: How many it has.
        top1: Fraction of them that are recognised.
        taken_for: Other classes, and the fraction of the images taken for each.
    """

    name: str
    images: int
    top1: float
    taken_for: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Row:
    """One model at one setting.

    Attributes:
        model: Its name.
        series: 0 for the model under evaluation, 1 and on for baselines.
        setting: How images were prepared.
        is_own: Whether the setting is the model's own.
        mean_tokens: Tokens of an image.
        padding: Fraction of the computed tokens that is padding, if known.
        flops_per_image: Forward FLOPs of an image, if known.
        metrics: By key, in the order of tables.
        breakdowns: Groups by aspect ratio and by native size, see `BREAKDOWNS`.
        per_class: Accuracy by class, if measured.
        confusions: The worst classes, if measured.
    """

    model: str
    series: int
    setting: EvalSetting
    is_own: bool
    mean_tokens: float
    padding: float | None
    flops_per_image: float | None
    metrics: dict[str, float]
    breakdowns: dict[str, tuple[Group, ...]] = field(default_factory=dict)
    per_class: dict[str, float] = field(default_factory=dict)
    confusions: tuple[Confusion, ...] = ()

    @property
    def gflops(self) -> float | None:
        """Forward cost of an image in 1e9 FLOPs, if known."""
        return self.flops_per_image / 1e9 if self.flops_per_image else None


@dataclass(frozen=True)
class EvalResult:
    """What one evaluation measured.

    Attributes:
        kind: The evaluator's name.
        title: What it does.
        metrics: All its metrics by key. Slashes in a key are levels of the JSON.
        data: Name or path of the data.
        counts: How many images there were, and how many of what they were compared with.
        skipped: Unusable images and captions by reason.
        rows: The model's settings in order, then each baseline's.
        precision: Of the forward passes, ``fp32`` or ``bf16``.
        skip_examples: The first few unusable ones, described; not written.
    """

    kind: str
    title: str
    metrics: Mapping[str, Metric]
    data: str
    counts: dict[str, int]
    skipped: dict[str, int]
    rows: tuple[Row, ...]
    precision: str = "fp32"
    skip_examples: tuple[str, ...] = field(default=(), compare=False)

    @property
    def model(self) -> str:
        """Name or path of the model under evaluation."""
        return self.rows[0].model

    @property
    def own(self) -> Row:
        """The model at its own setting; the first row where none is marked."""
        return next((row for row in self.rows if row.is_own and not row.series), self.rows[0])

    @property
    def has_baselines(self) -> bool:
        """Whether there are other models to compare with."""
        return any(row.series for row in self.rows)

    @property
    def models(self) -> dict[int, str]:
        """Names by series."""
        return {row.series: row.model for row in self.rows}

    @property
    def measured(self) -> dict[str, Metric]:
        """The metrics that any row has, in the order of tables."""
        return {
            key: metric
            for key, metric in self.metrics.items()
            if any(key in row.metrics for row in self.rows)
        }

    @property
    def headline(self) -> dict[str, Metric]:
        """The metrics of curves and log lines."""
        return {key: metric for key, metric in self.metrics.items() if metric.is_headline}

    def chance(self, key: str) -> float | None:
        """What guessing gives of a metric, if it is known."""
        metric = self.metrics[key]
        count = self.counts.get(metric.among, 0)
        return min(1.0, metric.guesses / count) if count > 0 else None

    def margin(self, key: str) -> float | None:
        """How far the 95% interval of a metric reaches from it, at most among all rows."""
        count, margins = self.counts.get(self.metrics[key].queries, 0), []
        for value in (row.metrics.get(key, math.nan) for row in self.rows):
            if count > 0 and 0 <= value <= 1:
                low, high = wilson_interval(value, count)
                margins.append(max(value - low, high - value))
        return max(margins, default=None)

    @property
    def heading(self) -> str:
        """One line on what was evaluated."""
        counts = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        return f"{self.title}: {counts}, {self.precision}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; the metrics of the model's own setting are also at the top level."""
        own, *baselines = (
            {"model": model, "views": [_row_to_json(row) for row in self.rows if row.series == i]}
            for i, model in self.models.items()
        )
        return {
            "kind": self.kind,
            "model": self.model,
            "data": self.data,
            "precision": self.precision,
            **_nest(self.own.metrics),
            "max_tokens": self.own.setting.max_tokens,
            **self.counts,
            "skipped": self.skipped,
            "views": own["views"],
            "baselines": baselines,
        }


def read_rows(content: Mapping[str, Any], metrics: Mapping[str, Metric]) -> tuple[Row, ...]:
    """The rows of a result's JSON.

    Raises:
        KeyError: If something is missing.
        TypeError: If it is something else.
        ValueError: If it is empty, or a value is impossible.
    """
    models = [(content.get("model", "model"), content["views"])]
    models += [(baseline["model"], baseline["views"]) for baseline in content.get("baselines", ())]
    if not models[0][1]:
        raise ValueError("no views")
    return tuple(
        _row_from_json(entry, metrics, str(model), series)
        for series, (model, entries) in enumerate(models)
        for entry in entries
    )


def _row_to_json(row: Row) -> dict[str, Any]:
    entry = {
        "view": row.setting.kind,
        "label": row.setting.label,
        "max_tokens": row.setting.max_tokens,
        "side": row.setting.side,
        "own": row.is_own,
        "mean_tokens": row.mean_tokens,
        "padding": row.padding,
        "flops_per_image": row.flops_per_image,
        **_nest(row.metrics),
    }
    if row.per_class:
        entry["per_class"] = row.per_class
        entry["confusions"] = [
            {
                "class": confusion.name,
                "images": confusion.images,
                "top1": confusion.top1,
                "taken_for": [{"class": n, "share": share} for n, share in confusion.taken_for],
            }
            for confusion in row.confusions
        ]
    for name, groups in row.breakdowns.items():
        entry[name] = [
            {"label": group.label, "images": group.images, **_nest(group.metrics)}
            for group in groups
        ]
    return entry


def _row_from_json(
    entry: Mapping[str, Any], metrics: Mapping[str, Metric], model: str, series: int
) -> Row:
    """Parts that results of earlier versions lack may be missing."""
    return Row(
        model=model,
        series=series,
        setting=EvalSetting.from_label(entry["view"], str(entry["label"])),
        is_own=bool(entry["own"]),
        mean_tokens=float(entry["mean_tokens"]),
        padding=_optional(entry.get("padding")),
        flops_per_image=_optional(entry.get("flops_per_image")),
        metrics=_read_metrics(entry, metrics),
        breakdowns={
            name: tuple(
                Group(str(g["label"]), int(g["images"]), _read_metrics(g, metrics))
                for g in entry.get(name) or ()
            )
            for name in BREAKDOWNS
        },
        per_class={str(k): float(v) for k, v in (entry.get("per_class") or {}).items()},
        confusions=tuple(
            Confusion(
                name=str(c["class"]),
                images=int(c["images"]),
                top1=float(c["top1"]),
                taken_for=tuple((str(t["class"]), float(t["share"])) for t in c["taken_for"]),
            )
            for c in entry.get("confusions") or ()
        ),
    )


def _read_metrics(entry: Mapping[str, Any], metrics: Mapping[str, Metric]) -> dict[str, float]:
    found = {}
    for key, metric in metrics.items():
        try:
            value: Any = reduce(getitem, key.split("/"), entry)
        except KeyError:
            if metric.is_headline:
                raise
            continue
        found[key] = math.nan if value is None else float(value)
    return found


def _nest(metrics: Mapping[str, float]) -> dict[str, Any]:
    """``{"a/b": 1}`` to ``{"a": {"b": 1}}``; null of what has no value, for JSON has no NaN."""
    nested: dict[str, Any] = {}
    for key, value in metrics.items():
        *above, last = key.split("/")
        place = nested
        for name in above:
            place = place.setdefault(name, {})
        place[last] = None if math.isnan(value) else value
    return nested


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)
