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
    """A dataclass of tensors, of others like it, and of values that stay on the host."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, move: Callable[[Any], Any]) -> Self:
        values: Any = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        moved = {n: move(v) for n, v in values.items() if isinstance(v, Tensor | Movable)}
        return replace(self, **moved)  # type: ignore[type-var]
