"""Moving what is packed between host and device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class Movable:
    """A dataclass of tensors, of others like it, of tuples of these, and of values on the host."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, move: Callable[[Any], Any]) -> Self:
        values: Any = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        for name, value in values.items():
            if isinstance(value, Tensor | Movable):
                values[name] = move(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], Movable):
                values[name] = tuple(map(move, value))
        return replace(self, **values)  # type: ignore[type-var]
