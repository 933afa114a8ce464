"""Tasks by the name that a configuration chooses them by."""

from __future__ import annotations

import difflib

from navit_clip.errors import UserError
from navit_clip.tasks.base import TaskConfig
from navit_clip.tasks.classify import ClassifyConfig
from navit_clip.tasks.contrastive import ContrastiveConfig
from navit_clip.tasks.masked_image import MaskedImageTaskConfig

_TASKS: dict[str, type[TaskConfig]] = {
    "contrastive": ContrastiveConfig,
    "classify": ClassifyConfig,
    "masked_image": MaskedImageTaskConfig,
}

OWN_KINDS = tuple(_TASKS)  # without those that others register


def register(kind: str, config: type[TaskConfig]) -> None:
    """Adds a task of your own, before `navit_clip.training.__main__.main` is called.

    Args:
        kind: The name that ``task.kind`` chooses it by.
        config: A frozen dataclass; its fields are the task's part of the configuration.
    """
    _TASKS[kind] = config


def task_config(kind: str) -> type[TaskConfig]:
    """The configuration class of a kind.

    Raises:
        UserError: If there is no such task.
    """
    if kind not in _TASKS:
        near = difflib.get_close_matches(kind, _TASKS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"task.kind must be one of {', '.join(_TASKS)}, got {kind!r}{hint}")
    return _TASKS[kind]
