"""A model out of a training run's checkpoint, exported or not.

Reads what `navit_clip.checkpoints.checkpoint` wrote in one process, whatever number of ranks wrote
it. The exported model/ of a finished run is read by `navit_clip.export.pretrained` instead.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from navit_clip.checkpoints.manifest import DamagedError, Manifest
from navit_clip.errors import UserError
from navit_clip.files import reading
from navit_clip.model import NaViTCLIP
from navit_clip.tokenizers.load import build_tokenizer, load_tokenizer
from navit_clip.training.config import TrainConfig, parse_config
from navit_clip.training.starting_weights import TOKENIZER_DIR
from navit_clip.training.trainer import preprocess_for

_NAME = re.compile(r"^step-(\d{8})$")


def load_run(
    run_dir: Path, step: int | None, device: torch.device | str = "cpu"
) -> tuple[NaViTCLIP, int]:
    """The model as it was at a checkpoint; the average of its weights if the run keeps one.

    Args:
        run_dir: Of the run.
        step: Of the checkpoint; None takes the newest that is as it was written.
        device: Where the model goes.

    Returns:
        The model, and the step.

    Raises:
        UserError: If there is no such checkpoint, or it is damaged.
    """
    config = _config(run_dir)
    found = _checkpoints(run_dir)
    if step is None:
        step = next((s for s in sorted(found, reverse=True) if _damage(found[s]) is None), None)
        if step is None:
            raise UserError(
                f"all checkpoints in {run_dir / 'checkpoints'} are damaged: copy the run again, "
                f"or judge --model {run_dir / 'model'}"
            )
    elif step not in found:
        steps = ", ".join(map(str, sorted(found)))
        raise UserError(f"no checkpoint of step {step} in {run_dir}: there are {steps}")
    elif damage := _damage(found[step]):
        raise UserError(f"checkpoint {found[step]} is damaged ({damage}): choose another --step")
    model = NaViTCLIP(config.model, preprocess=preprocess_for(config))
    _load(found[step], model, averaged=config.ema.decay > 0)
    if config.tokenizer is not None:
        model.tokenizer = build_tokenizer(config.tokenizer)
    else:
        model.tokenizer = load_tokenizer(run_dir / TOKENIZER_DIR)
    return model.to(device).eval(), step


def _config(run_dir: Path) -> TrainConfig:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"no training run at {run_dir}: expected config.yaml in it")
    try:
        config, _ = parse_config(["--config", str(path)])
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return config


def _checkpoints(run_dir: Path) -> dict[int, Path]:
    folder = run_dir / "checkpoints"
    matches = [_NAME.match(path.name) for path in folder.glob("step-*")]
    found = {int(match[1]): folder / match[0] for match in matches if match}
    if not found:
        raise UserError(f"no checkpoint in {folder}: the run has written none yet")
    return found


def _damage(path: Path) -> str | None:
    try:
        manifest = Manifest.read(path)
        manifest.check(path, sorted(manifest.files))
    except DamagedError as error:
        return str(error)
    return None


def _load(path: Path, model: NaViTCLIP, *, averaged: bool) -> None:
    state: dict[str, Any] = {"model": model.state_dict()}
    if averaged:
        state["ema"] = {
            name: torch.empty_like(parameter) for name, parameter in model.named_parameters()
        }
    damage = (ValueError, KeyError, RuntimeError, dcp.CheckpointException)
    with reading(f"checkpoint {path}", *damage):
        difference = Manifest.read(path).difference(state["model"])
        if difference is not None:
            raise UserError(f"{path} is of another model than config.yaml says: {difference}")
        with warnings.catch_warnings():
            # Read by one process on purpose.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, checkpoint_id=str(path), no_dist=True)
    model.load_state_dict(state["model"])
    if averaged:
        model.load_state_dict(state["ema"], strict=False)
