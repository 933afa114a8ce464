"""A model out of a training run's checkpoint, exported or not.

Reads what `checkpoint` wrote, in one process, whatever number of ranks wrote it. Each checkpoint
holds architecture, preprocessing and tokenizer itself, so that nothing that became of the run later
changes how an earlier one is read. The exported model/ of a finished run is read by
`navit_clip.export` instead.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from navit_clip.checkpoints.folder import (
    RUN_MODEL,
    Manifest,
    find_damage,
    saved_steps,
    step_folder,
)
from navit_clip.checkpoints.tensor_files import read_index, read_tensors
from navit_clip.errors import UserError
from navit_clip.export.description import Description
from navit_clip.files import reading
from navit_clip.load import AnyModel, build_model
from navit_clip.models.lora import merge_adapters, read_lora
from navit_clip.tokenizers.base import DESCRIPTION_FILE
from navit_clip.tokenizers.load import load_tokenizer


def load_run(
    run_dir: Path, step: int | None, device: torch.device | str = "cpu"
) -> tuple[AnyModel, int]:
    """The model as it was at a checkpoint; the EMA of its weights if the run keeps one.

    Args:
        run_dir: Of the run.
        step: Of the checkpoint; None takes the newest that is as it was written.
        device: Where the model goes.

    Returns:
        The model in evaluation mode with tokenizer and preprocessing, and the step.

    Raises:
        UserError: If there is no such checkpoint, or it is damaged.
    """
    directory = run_dir / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"no training run at {run_dir}: expected checkpoints/ in it")
    step = _choose(run_dir, step)
    folder = step_folder(directory, step)
    description = Description.read(folder / RUN_MODEL)
    tokenizer = load_tokenizer(folder) if (folder / DESCRIPTION_FILE).is_file() else None
    model = build_model(description, tokenizer)
    _load(folder, model)
    return model.to(device).eval(), step


def _choose(run_dir: Path, step: int | None) -> int:
    directory = run_dir / "checkpoints"
    steps = saved_steps(directory)
    if not steps:
        raise UserError(f"no checkpoint in {directory}: the run has written none yet")
    if step is None:
        for newest in reversed(steps):
            if find_damage(step_folder(directory, newest)) is None:
                return newest
        raise UserError(
            f"all checkpoints in {directory} are damaged: copy the run again, "
            f"or evaluate --model {run_dir / 'model'}"
        )
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"no checkpoint of step {step} in {run_dir}: there are {there}")
    folder = step_folder(directory, step)
    if damage := find_damage(folder):
        raise UserError(f"checkpoint {folder} is damaged ({damage}): choose another --step")
    return step


def _load(folder: Path, model: AnyModel) -> None:
    damage = (ValueError, KeyError, TypeError, RuntimeError, dcp.CheckpointException)
    with reading(f"checkpoint {folder}", *damage):
        manifest, lora = Manifest.read(folder), read_lora(folder)
        weights: dict[str, torch.Tensor] = model.state_dict()
        if lora is not None:  # what they are merged to is compared when the model takes it
            weights = {name: torch.empty(shape) for name, shape in manifest.weights.items()}
        elif (difference := manifest.difference(weights)) is not None:
            raise UserError(f"{folder} is of another model than {RUN_MODEL} says: {difference}")
        index = read_index(folder, manifest.files)
        averaged = {
            name: torch.empty_like(weight)
            for name, weight in weights.items()
            if f"ema.{name}" in index.state_dict_metadata
        }
        state: dict[str, Any] = {"model": weights}
        if averaged:
            state["ema"] = averaged
        with warnings.catch_warnings():
            # Read by one process on purpose.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            read_tensors(state, folder, manifest.files, alone=True)
        weights = state["model"] | averaged
        model.load_state_dict(weights if lora is None else merge_adapters(weights, lora.scale))
