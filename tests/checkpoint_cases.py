"""Small checkpoints to write, read and damage; each value is in all of their parts."""

import torch

from navit_clip.checkpoints.checkpoint import CheckpointConfig, Checkpoints
from navit_clip.data.state import DataState, ReaderState
from navit_clip.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def state(value, width=300):
    return {
        "model": {"w": torch.full((width, 10), float(value)), "b": torch.full((), float(value))},
        "optimizer": {"state": {"w": {"step": torch.tensor(float(value))}}, "lr": value / 10},
        "guard": {"skipped_steps": value},
    }


def value_of(loaded):
    values = {float(loaded["model"]["w"].mean()), float(loaded["model"]["b"])}
    values |= {float(loaded["optimizer"]["state"]["w"]["step"]), loaded["guard"]["skipped_steps"]}
    assert len(values) == 1
    return values.pop()


def data_state(value):
    return DataState("s", batches=value, readers={0: ReaderState([], [], drawn=value)})


def open_checkpoints(path, ranks=ALONE, **config):
    return Checkpoints(path, CheckpointConfig(**config), ranks)


def write(path, steps, **config):
    checkpoints = open_checkpoints(path, **config)
    for step in steps:
        checkpoints.save(step, state(step), data_state(step))
    checkpoints.wait()
    return checkpoints


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def read(path):
    """The newest whole checkpoint: its step, its contents' value, and what was reported."""
    lines, checkpoints, loaded = [], open_checkpoints(path), state(-1)
    step = checkpoints.newest()
    assert step is not None
    states = checkpoints.load(step, loaded)
    checkpoints.tidy(lines.append)
    assert [data.batches for data in states] == [step]
    return step, value_of(loaded), lines


def truncate(folder):
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
