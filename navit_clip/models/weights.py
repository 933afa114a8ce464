"""A model of weights that are there, without random ones first.

Those cost seconds: `torch.nn.init` draws 300 million numbers of a ViT-L/16 on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Constants(nn.Module):
    """A module with buffers that its configuration gives, and no state dict holds."""

    def constants(self) -> dict[str, Tensor]:
        """Their values by name, on the default device."""
        raise NotImplementedError

    def make_constants(self) -> None:
        """Registers them, or makes them again."""
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)


def build_with(build: Callable[[], Model], weights: Mapping[str, Tensor]) -> Model:
    """A model of these weights, which it takes over without a copy.

    Args:
        build: Makes one with random weights, on the default device.
        weights: Of all parameters, on the device that the model will be on.
    """
    model = _without_weights(build)
    if model is None:
        # A model of one's own may make what it holds as it likes. What it draws beside must not
        # cost the caller's generator anything.
        with torch.random.fork_rng(devices=[]):
            model = build()
    model.load_state_dict(dict(weights), assign=True)
    for device in {weight.device for weight in weights.values()}:
        _move_buffers(model, device)
    return model


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Moves what no state dict holds, which was made on the default device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _without_weights(build: Callable[[], Model]) -> Model | None:
    """A model that lacks its weights alone; None if it cannot be had so."""
    try:
        with torch.device("meta"):
            model = build()
    except (NotImplementedError, RuntimeError):  # one that asks for the value of a tensor
        return None
    for module in model.modules():
        if isinstance(module, Constants):
            module.make_constants()
    persistent = model.state_dict().keys()
    buffers = (buffer for name, buffer in model.named_buffers() if name not in persistent)
    others = (value for module in model.modules() for value in vars(module).values())
    rest = (value for value in (*buffers, *others) if isinstance(value, Tensor))
    return None if any(value.is_meta for value in rest) else model
