"""Zero-shot classification: each class a mean of prompt embeddings, each image its nearest class.

Prompts are ensembled as CLIP and open_clip do: normalise each, average, normalise again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from navit_clip.data.annotations.labels import is_index, read_text, unnamed_label
from navit_clip.errors import UserError
from navit_clip.evaluation.breakdown import by_aspect, by_size
from navit_clip.evaluation.calibration import expected_calibration_error
from navit_clip.evaluation.cost import describe_setting
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.retrieval import TIE
from navit_clip.evaluation.settings import EvalSetting

Template = Callable[[str], str]

_MARKS = ("{}", "{c}")
_SCORES = 1 << 22  # compared at a time, 32 MiB of them
_WORST, _TAKEN_FOR = 10, 3  # classes shown among the confusions, and what they are taken for


def _read_lines(path: str, what: str, names: str) -> list[str]:
    lines = [line.strip() for line in read_text(path, what, names).splitlines()]
    return [line for line in lines if line]


def load_templates(name: str) -> list[Template]:
    """Prompt templates by name or from a file.

    Args:
        name: ``openai`` (the 80 for ImageNet), ``simple`` (the 7 best of them), ``plain``
            ("a photo of a {}."), or a text file with one template per line, whose ``{}`` or
            ``{c}`` the class name replaces.

    Raises:
        UserError: If the file cannot be read or a line has no ``{}``.
    """
    if name in ("openai", "simple"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        return list(OPENAI_IMAGENET_TEMPLATES if name == "openai" else SIMPLE_IMAGENET_TEMPLATES)
    if name == "plain":
        return [_template("a photo of a {}.")]
    lines = _read_lines(name, "templates", "openai, simple, plain")
    for line in lines:
        if not any(mark in line for mark in _MARKS):
            raise UserError(
                f"template without {{}} in {name}: {line!r}; put {{}} where the class name goes"
            )
    return [_template(line) for line in lines]


def _template(line: str) -> Template:
    mark = next(mark for mark in _MARKS if mark in line)
    return lambda name: line.replace(mark, name)


def load_classnames(name: str | None, folders: Sequence[str] | None) -> list[str]:
    """Class names by label.

    Args:
        name: ``imagenet``, a text file with one name per line, or None to read the folders'.
        folders: The data's own names of its classes in label order, None if labels are indices.

    Raises:
        UserError: If there are none, or they cannot be those of the folders.
    """
    if name is None:
        if folders is None:
            raise UserError("labels carry no class names: give --classnames FILE or imagenet")
        return [folder.replace("_", " ") for folder in folders]
    if name == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        names = list(IMAGENET_CLASSNAMES)
    else:
        names = _read_lines(name, "class names", "imagenet")
    if folders is not None and len(names) != len(folders):
        raise UserError(
            f"{len(names)} class names for {len(folders)} class folders: give one name per folder, "
            "in the folders' sorted order, or --class-map"
        )
    if (
        folders is not None
        and all(map(is_index, folders))
        and [*map(int, folders)] != sorted(map(int, folders))
    ):
        raise UserError(
            f"class folders are numbers that sort as {', '.join(folders[:3])}, …: say which class "
            "each is with --class-map index, or imagenet"
        )
    return names


def class_vectors(model: Model, names: Sequence[str], templates: Sequence[Template]) -> Tensor:
    """One unit vector per class, float32 [classes, D]."""
    prompts = [template(name) for name in names for template in templates]
    vectors = model.embed_texts(prompts).unflatten(0, (len(names), len(templates)))
    return F.normalize(vectors.mean(1), dim=-1)


@dataclass(frozen=True)
class Verdicts:
    """What a model makes of each image.

    Attributes:
        rank_E: Wrong classes at least as near as the nearest right one, int64; 0 is the best.
        rival_E: The nearest wrong class, int64; -1 if every class is right.
        confidence_E: Probability of the nearest class, float64.
    """

    rank_E: Tensor
    rival_E: Tensor
    confidence_E: Tensor


def classify(
    embeddings_ED: Tensor, classes_CD: Tensor, right_LC: Tensor, group_E: Tensor, scale: float
) -> Verdicts:
    """Compares every image with every class, a block of images at a time.

    Ties go against the model: a class as near as the right one counts as nearer, and so does one
    whose score is not a number.

    Args:
        embeddings_ED: Unit vectors of the images.
        classes_CD: Unit vectors of the classes.
        right_LC: Which classes are right, bool, a row per group of images; at least one in each.
        group_E: Row of each image.
        scale: The factor on cosine similarities that makes logits.
    """
    classes_CD = classes_CD.double()
    parts = []
    block = max(1, _SCORES // len(classes_CD))
    for images, group in zip(embeddings_ED.split(block), group_E.split(block), strict=True):
        scores = images.double() @ classes_CD.T
        right = right_LC[group]
        wrong = scores.masked_fill(right, -torch.inf)
        # Several may be right: the nearest counts, and none of them stands in another's way.
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        rank = (~(scores < best - TIE) & ~right).sum(1)
        rival = torch.where(right.all(1), -1, wrong.argmax(1))
        parts.append((rank, rival, (scale * scores).softmax(1).amax(1)))
    rank_E, rival_E, confidence_E = (torch.cat(part) for part in zip(*parts, strict=True))
    return Verdicts(rank_E, rival_E, confidence_E)


@dataclass(frozen=True)
class _Groups:
    """Images by what is right for them.

    Attributes:
        names: Of each group.
        right_LC: Classes that are right for each, bool.
        group_E: Group of each image, int64.
        competitors: Names of the classes that compete.
    """

    names: list[str]
    right_LC: Tensor
    group_E: Tensor
    competitors: list[str]


def judge(
    model: Model,
    data: Embedded,
    names: Sequence[str],
    templates: Sequence[Template],
    *,
    right: Mapping[int, tuple[int, ...]] | None = None,
    only: Sequence[int] | None = None,
    classes_CD: Tensor | None = None,
) -> dict[str, Any]:
    """Accuracy, confusions and calibration at every setting.

    Args:
        model: The model, for the prompts, its own setting, its scale and its costs.
        data: Embedded images with labels.
        names: Class names by label.
        templates: Prompt templates.
        right: All classes that are right by label, for labels that have several.
        only: Classes that compete; None for all that have a name.
        classes_CD: `class_vectors` of all names, if there are any already.

    Returns:
        Plain values for JSON: the figures at the model's own setting, and ``views``.

    Raises:
        UserError: If a label has no name.
    """
    right = right or {}
    answers = {label: right.get(label, (label,)) for label in sorted(set(data.labels))}
    used = {index for found in answers.values() for index in found}
    if unnamed := {*used, *(only or ())} - set(range(len(names))):
        raise unnamed_label(max(unnamed), len(names))
    chosen = list(range(len(names))) if only is None else sorted({*only, *used})
    groups = _group(data.labels, answers, names, chosen)
    if classes_CD is None:
        classes_CD = class_vectors(model, [names[index] for index in chosen], templates)
    else:
        classes_CD = classes_CD[chosen]
    settings = [_entry(model, data, setting, groups, classes_CD) for setting in data.embeddings]
    own = next(entry for entry in settings if entry["own"])
    headline = ("top1", "top5", "mean_per_class", "ece", "max_tokens")
    return {
        **{name: own[name] for name in headline},
        "images": len(data.labels),
        "classes": len(chosen),
        "skipped": dict(data.skipped),
        "views": settings,
    }


def _group(
    labels: Sequence[int],
    answers: Mapping[int, tuple[int, ...]],
    names: Sequence[str],
    chosen: Sequence[int],
) -> _Groups:
    row = {label: i for i, label in enumerate(answers)}
    column = {index: i for i, index in enumerate(chosen)}
    right_LC = torch.zeros(len(row), len(chosen), dtype=torch.bool)
    for label, found in answers.items():
        right_LC[row[label], [column[index] for index in found]] = True
    # ImageNet has two missiles and two pairs of sunglasses.
    count = Counter(names)
    shown = [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    group_E = torch.tensor([row[label] for label in labels])
    titles = [" / ".join(shown[index] for index in found) for found in answers.values()]
    return _Groups(titles, right_LC, group_E, [shown[index] for index in chosen])


def _entry(
    model: Model, data: Embedded, setting: EvalSetting, groups: _Groups, classes_CD: Tensor
) -> dict[str, Any]:
    verdicts = classify(
        data.embeddings[setting], classes_CD, groups.right_LC, groups.group_E, model.scale
    )
    top1_E, top5_E = verdicts.rank_E < 1, verdicts.rank_E < 5
    images_L = groups.group_E.bincount(minlength=len(groups.names))
    accuracy_L = groups.group_E[top1_E].bincount(minlength=len(groups.names)) / images_L.double()

    def figures(index: Tensor) -> dict[str, Any]:
        return {"images": len(index), "top1": _share(top1_E[index]), "top5": _share(top5_E[index])}

    return {
        **describe_setting(model, data, setting),
        "top1": _share(top1_E),
        "top5": _share(top5_E),
        "mean_per_class": accuracy_L.mean().item(),
        "ece": expected_calibration_error(verdicts.confidence_E, top1_E),
        "per_class": dict(zip(groups.names, accuracy_L.tolist(), strict=True)),
        "confusions": _confusions(groups, images_L, accuracy_L, verdicts),
        "by_aspect": [{"label": label, **figures(i)} for label, i in by_aspect(data.sizes)],
        "by_size": [{"label": label, **figures(i)} for label, i in by_size(data.sizes)],
    }


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def _confusions(
    groups: _Groups, images_L: Tensor, accuracy_L: Tensor, verdicts: Verdicts
) -> list[dict[str, Any]]:
    """The worst classes, and what their images are taken for; of equals the larger one first."""
    worst = sorted(
        (i for i, accuracy in enumerate(accuracy_L.tolist()) if accuracy < 1),
        key=lambda i: (accuracy_L[i].item(), -int(images_L[i]), i),
    )[:_WORST]
    found = []
    for i in worst:
        missed = (groups.group_E == i) & (verdicts.rank_E >= 1)
        rivals = Counter(verdicts.rival_E[missed].tolist()).most_common(_TAKEN_FOR)
        images = int(images_L[i])
        found.append(
            {
                "class": groups.names[i],
                "images": images,
                "top1": accuracy_L[i].item(),
                "taken_for": [
                    {"class": groups.competitors[rival], "share": n / images} for rival, n in rivals
                ],
            }
        )
    return found
