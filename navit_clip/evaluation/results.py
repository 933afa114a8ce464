"""A harness's JSON as typed rows: one per model and setting, baselines among them.

Tables, curves and reports all read results through here, so that a damaged one is refused in one
place and figures have one name and one form everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from navit_clip.errors import UserError

_WAYS = {"image_to_text": "I→T", "text_to_image": "T→I"}
_ZEROSHOT = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class", "ece": "ECE"}
_NEEDED = ("top1", "top5")
DIRECTIONS = {"I→T": "image → text", "T→I": "text → image"}
# What the curve and the groups show, by kind of result.
MAIN = {"zeroshot": ("top-1", "top-5"), "retrieval": ("I→T R@1", "T→I R@1")}


@dataclass(frozen=True)
class Group:
    """Images of one shape or size.

    Attributes:
        label: What they have in common.
        images: How many.
        figures: By name, shares of one.
    """

    label: str
    images: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Confusion:
    """A class that is often mistaken.

    Attributes:
        name: The class.
        images: How many it has.
        top1: Share of them that are recognised.
        taken_for: Other classes, and the share of the images taken for each.
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
        series: 0 for the model that was judged, 1 and on for baselines.
        kind: ``capped``, ``native`` or ``square``.
        label: The setting, as in ``256``, ``native``, ``224²``.
        own: Whether the setting is the model's own.
        tokens: Mean tokens per image.
        padding: Share of tokens that are padding, if known.
        gflops: Forward cost of an image, if known.
        figures: By name, in the order of tables: shares of one, and median ranks.
        aspect: Groups by aspect ratio, if any.
        size: Groups by native size, if any.
        confusions: The worst classes, if any.
        per_class: Accuracy by class, if known.
    """

    model: str
    series: int
    kind: str
    label: str
    own: bool
    tokens: float
    padding: float | None
    gflops: float | None
    figures: dict[str, float]
    aspect: tuple[Group, ...]
    size: tuple[Group, ...]
    confusions: tuple[Confusion, ...]
    per_class: dict[str, float]


@dataclass(frozen=True)
class Result:
    """What one evaluation found.

    Attributes:
        kind: ``zeroshot`` or ``retrieval``.
        model: Name or path of the model.
        data: Name or path of the data.
        images: Images judged.
        others: Classes or captions.
        skipped: Unusable images by reason.
        rows: The model's settings, then each baseline's.
    """

    kind: Literal["zeroshot", "retrieval"]
    model: str
    data: str
    images: int
    others: int
    skipped: dict[str, int]
    rows: tuple[Row, ...]

    @property
    def own(self) -> Row:
        """The model at its own setting; the first one where none is marked."""
        return next((row for row in self.rows if row.own and row.series == 0), self.rows[0])

    @property
    def has_baselines(self) -> bool:
        """Whether there are other models to compare with."""
        return any(row.series for row in self.rows)

    @property
    def title(self) -> str:
        """One line on what was judged."""
        if self.kind == "zeroshot":
            return f"Zero-shot: {self.images:,} images, {self.others:,} classes"
        return f"Retrieval: {self.images:,} images, {self.others:,} captions"


def read_result(result: Any) -> Result:
    """Reads what ``zeroshot`` or ``retrieval`` wrote.

    Args:
        result: The JSON's content.

    Raises:
        UserError: If it is damaged or something else; names the key.
    """
    if not isinstance(result, Mapping) or not ({"top1", "image_to_text"} & result.keys()):
        raise UserError("no result of an evaluation: neither top1 nor image_to_text is in it")
    kind: Literal["zeroshot", "retrieval"] = "zeroshot" if "top1" in result else "retrieval"
    try:
        name = str(result.get("model", "model"))
        models = [(name, result["views"])]
        models += [(str(b["model"]), b["views"]) for b in result.get("baselines", ())]
        rows = [
            _row(entry, kind, model, series)
            for series, (model, entries) in enumerate(models)
            for entry in entries
        ]
        if not models[0][1]:
            raise ValueError("no views")
        return Result(
            kind=kind,
            model=name,
            data=str(result.get("data") or ""),
            images=int(result["images"]),
            others=int(result["classes" if kind == "zeroshot" else "captions"]),
            skipped={str(reason): int(n) for reason, n in dict(result["skipped"]).items()},
            rows=tuple(rows),
        )
    except KeyError as error:
        raise UserError(f"damaged result: {error} is missing; evaluate again") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"damaged result: {error}; evaluate again") from error


def format_figure(name: str, value: float | None) -> str:
    """``41.3%`` for a share, ``3`` for a median rank, a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:g}" if name.endswith("median") else f"{value:.1%}"


def _row(entry: Mapping[str, Any], kind: str, model: str, series: int) -> Row:
    flops = entry.get("flops_per_image")
    return Row(
        model=model,
        series=series,
        kind=str(entry["view"]),
        label=str(entry["label"]),
        own=bool(entry["own"]),
        tokens=float(entry["mean_tokens"]),
        padding=_optional(entry.get("padding")),
        gflops=float(flops) / 1e9 if flops else None,
        figures=_figures(entry, kind),
        aspect=_groups(entry.get("by_aspect"), kind),
        size=_groups(entry.get("by_size"), kind),
        confusions=tuple(
            Confusion(
                name=str(c["class"]),
                images=int(c["images"]),
                top1=float(c["top1"]),
                taken_for=tuple((str(t["class"]), float(t["share"])) for t in c["taken_for"]),
            )
            for c in entry.get("confusions") or ()
        ),
        per_class={str(k): float(v) for k, v in (entry.get("per_class") or {}).items()},
    )


def _groups(groups: Any, kind: str) -> tuple[Group, ...]:
    return tuple(Group(str(g["label"]), int(g["images"]), _figures(g, kind)) for g in groups or ())


def _figures(entry: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Figures by their names in tables; results of older days lack some."""
    if kind == "zeroshot":
        keys = [key for key in _ZEROSHOT if key in entry or key in _NEEDED]
        return {_ZEROSHOT[key]: _number(entry[key]) for key in keys}
    return {
        f"{short} {'median' if key == 'median_rank' else key}": _number(value)
        for way, short in _WAYS.items()
        for key, value in entry[way].items()
    }


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)
