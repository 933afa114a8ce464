"""Where dashboards show a metric: one table for wandb, TensorBoard, workspaces and run reports.

Keys are those of metrics.jsonl, which stay plain; a dashboard puts the section before them, as in
``speed/step_s``, unless they have one of their own, as ``eval/…``.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

# What curves can be drawn over. They have no section.
AXES = ("step", "samples_seen", "tokens_seen", "flops_seen")
FRACTIONS = ("mfu", "data_wait", "padding", "token_drop", "share/*")
_OWN = ("eval/", "validation/")
NEAREST = "nearest-"  # before an evaluator's name: its images and what is nearest to them
# Histograms, pictures and examples of the training, and the section that shows them.
SHOWN = {
    "first_batch": "data",
    "tokens_per_image": "data",
    "aspect_ratio": "data",
    "logit_margin": "learning",
    "confusions": "learning",
}


class Section(NamedTuple):
    """Metrics that answer one question.

    Attributes:
        name: Before its metrics on a dashboard.
        title: The question.
        keys: Patterns of keys, in the order in which they are shown.
    """

    name: str
    title: str
    keys: tuple[str, ...]


LEARNING = "learning"
SECTIONS = (
    Section(
        "health",
        "Is it healthy?",
        ("grad_norm", "update_norm", "param_norm", "logit_*", "skipped_steps", "memory_gb"),
    ),
    # And whatever else a task reports.
    Section(LEARNING, "Is it learning?", ("loss", "validation/loss", "lr")),
    Section(
        "speed",
        "Is it fast?",
        ("examples_per_s", "*tokens_per_s", "step_s", "mfu", "model_flops_per_s", "data_wait"),
    ),
    Section(
        "data",
        "Data",
        ("examples", "flops", "padding", "token_drop", "skipped", "skipped/*", "share/*"),
    ),
    Section("eval", "Evaluation", ("eval/*",)),
)


def is_fraction(key: str) -> bool:
    """Whether a metric is shown as a percentage."""
    return any(fnmatchcase(key, pattern) for pattern in FRACTIONS)


def section_of(key: str) -> Section:
    """The section that shows a metric."""
    (learning,) = (section for section in SECTIONS if section.name == LEARNING)
    found = (s for s in SECTIONS if any(fnmatchcase(key, pattern) for pattern in s.keys))
    return next(found, learning)


def dashboard_key(key: str) -> str:
    """What a metric of metrics.jsonl is called on a dashboard."""
    if key in AXES or key.startswith(_OWN):
        return key
    return f"{section_of(key).name}/{key}"


def media_key(name: str) -> str:
    """What a histogram, a picture or examples are called on a dashboard."""
    return f"media/{name}"


def metric_prefixes() -> list[str]:
    """What all metrics on a dashboard begin with, other than axes and examples."""
    return [*(f"{section.name}/" for section in SECTIONS if section.name != "eval"), *_OWN]
