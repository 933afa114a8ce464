"""Zero-shot classification: each class a mean of prompt embeddings, each image its nearest class.

Prompts are ensembled as CLIP and open_clip do: normalise each, average, normalise again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.encode import Embedded
from navit_clip.embedding import embed_texts
from navit_clip.errors import UserError
from navit_clip.flops import mean_image_flops
from navit_clip.interop.pretrained import Pretrained

Template = Callable[[str], str]


def read_lines(path: str, what: str) -> list[str]:
    """Non-empty lines of a text file.

    Raises:
        UserError: If it cannot be read or has none.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{what} {path} is empty")
    return lines


def load_templates(name: str) -> list[Template]:
    """Prompt templates by name or from a file.

    Args:
        name: ``openai`` (the 80 for ImageNet), ``simple`` (the 7 best of them), ``plain``
            ("a photo of a {}."), or a text file with one template per line.

    Raises:
        UserError: If the file cannot be read or a line has no ``{}``.
    """
    if name in ("openai", "simple"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        return list(OPENAI_IMAGENET_TEMPLATES if name == "openai" else SIMPLE_IMAGENET_TEMPLATES)
    if name == "plain":
        return [_template("a photo of a {}.")]
    lines = read_lines(name, "templates")
    for line in lines:
        if "{}" not in line:
            raise UserError(f"template without {{}} in {name}: {line!r}")
    return [_template(line) for line in lines]


def _template(line: str) -> Template:
    return lambda name: line.replace("{}", name)


def load_classnames(name: str | None, folders: Sequence[str] | None) -> list[str]:
    """Class names by label.

    Args:
        name: ``imagenet``, a text file with one name per line, or None to read the folders'.
        folders: Names of the class folders in label order, None for shards.

    Raises:
        UserError: If there are none, or not as many as folders.
    """
    if name is None:
        if folders is None:
            raise UserError("shards carry no class names: give --classnames FILE or imagenet")
        return [folder.replace("_", " ") for folder in folders]
    if name == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        names = list(IMAGENET_CLASSNAMES)
    else:
        names = read_lines(name, "class names")
    if folders is not None and len(names) != len(folders):
        raise UserError(
            f"{len(names)} class names for {len(folders)} class folders: give one name per folder, "
            "in the folders' sorted order"
        )
    return names


def class_vectors(
    pretrained: Pretrained, names: Sequence[str], templates: Sequence[Template]
) -> Tensor:
    """One unit vector per class, float32 [classes, D]."""
    prompts = [template(name) for name in names for template in templates]
    vectors = embed_texts(pretrained, prompts).unflatten(0, (len(names), len(templates)))
    return F.normalize(vectors.mean(1), dim=-1)


def topk_hits(embeddings_ED: Tensor, classes_CD: Tensor, labels_E: Tensor, k: int) -> Tensor:
    """Whether each image's class is among its k nearest.

    Ties go against the model: a class as near as the right one counts as nearer, and so does one
    whose score is not a number.

    Returns:
        bool [E].
    """
    scores_EC = embeddings_ED @ classes_CD.T
    own_E1 = scores_EC.gather(1, labels_E[:, None])
    return (~(scores_EC < own_E1)).sum(1) <= k


def judge(
    pretrained: Pretrained, data: Embedded, names: Sequence[str], templates: Sequence[Template]
) -> dict[str, Any]:
    """Accuracy at every budget.

    Args:
        pretrained: The model, for the prompts.
        data: Embedded images with labels.
        names: Class names by label.
        templates: Prompt templates.

    Returns:
        Plain values for JSON: ``top1`` and ``top5`` at the model's own budget, and ``budgets``.

    Raises:
        UserError: If a label has no name.
    """
    if unnamed := set(data.labels) - set(range(len(names))):
        raise UserError(f"label {max(unnamed)} has no name: there are {len(names)} class names")
    classes_CD = class_vectors(pretrained, names, templates)
    labels_E = torch.tensor(data.labels)
    config, default = pretrained.model.config, pretrained.preprocess.max_tokens
    budgets = []
    for budget, embeddings_ED in sorted(data.embeddings.items()):
        top1_E = topk_hits(embeddings_ED, classes_CD, labels_E, 1)
        lengths = data.lengths[budget]
        budgets.append(
            {
                "max_tokens": budget,
                "mean_tokens": sum(lengths) / len(lengths),
                "flops_per_image": mean_image_flops(config.image, config.embed_dim, lengths),
                "top1": top1_E.double().mean().item(),
                "top5": topk_hits(embeddings_ED, classes_CD, labels_E, 5).double().mean().item(),
                "per_class": {
                    name: top1_E[labels_E == label].double().mean().item()
                    for label, name in enumerate(names)
                    if (labels_E == label).any()
                },
            }
        )
    own = next(entry for entry in budgets if entry["max_tokens"] == default)
    return {
        "top1": own["top1"],
        "top5": own["top5"],
        "max_tokens": default,
        "images": len(data.labels),
        "classes": len(names),
        "skipped": dict(data.skipped),
        "budgets": budgets,
    }
