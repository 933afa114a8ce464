"""Tensors of other libraries under our names, and back: tables of pairs, and whether weights fit.

Tables are used in both directions, so that what comes in goes out bit for bit. A tensor is only
ever reordered, cut or joined, never computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from navit_clip.errors import UserError


class Layout(NamedTuple):
    """How one tensor lies on either side.

    Attributes:
        ours: Their tensor to ours, or to the rows of it that are theirs.
        theirs: Our tensor to theirs, or to the rows of it that are ours.
    """

    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor]


def _patches_to_kernel(weight_CK: Tensor) -> Tensor:
    side = round((weight_CK.shape[1] // 3) ** 0.5)
    return weight_CK.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)


SAME = Layout(lambda x: x, lambda x: x)
TRANSPOSED = Layout(lambda x: x.T, lambda x: x.T)
# A convolution over [3, P, P], and a product with a patch's pixels in rows of three channels.
KERNEL = Layout(lambda x: x.permute(0, 2, 3, 1).flatten(1), _patches_to_kernel)
FIRST = Layout(lambda x: x[0], lambda x: x[None])
OTHER_ROWS = Layout(lambda x: x[1:], lambda x: x)
ONE_TOKEN = Layout(lambda x: x[0, 0], lambda x: x[None, None])


class Pair(NamedTuple):
    """One of our parameters and theirs; several of one side may be rows of one of the other's."""

    ours: str
    theirs: str
    layout: Layout = SAME


def layers(names: Mapping[str, str]) -> tuple[Pair, ...]:
    """Pairs of weights and biases of layers, by our names and theirs."""
    return tuple(
        Pair(f"{ours}.{part}", f"{theirs}.{part}")
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    )


def tower_pairs(
    ours: str,
    theirs: str,
    tower: tuple[Pair, ...],
    blocks: tuple[str, tuple[Pair, ...]],
    depth: int,
) -> list[Pair]:
    """A tower's pairs below a prefix of each side, with those of each of its blocks."""
    folder, block = blocks
    in_blocks = [
        Pair(f"encoder.blocks.{i}.{pair.ours}", f"{folder}.{i}.{pair.theirs}", pair.layout)
        for i in range(depth)
        for pair in block
    ]
    return [
        Pair(ours + pair.ours, theirs + pair.theirs, pair.layout) for pair in (*tower, *in_blocks)
    ]


def to_ours(pairs: Iterable[Pair], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names; views where the layout allows."""
    return _joined((pair.ours, pair.layout.ours(theirs[pair.theirs])) for pair in pairs)


def to_theirs(pairs: Iterable[Pair], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names, contiguous."""
    joined = _joined((pair.theirs, pair.layout.theirs(ours[pair.ours])) for pair in pairs)
    return {name: tensor.contiguous() for name, tensor in joined.items()}


def _joined(parts: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name; those of one name are rows of one tensor, in order."""
    rows: dict[str, list[Tensor]] = {}
    for name, part in parts:
        rows.setdefault(name, []).append(part)
    return {name: some[0] if len(some) == 1 else torch.cat(some) for name, some in rows.items()}


def fit_checkpoint(
    source: str, name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Checks that weights have the names and shapes of the model's, down to the last one.

    Returns:
        `state`, with every tensor shaped as the model has it.

    Raises:
        UserError: If a tensor is missing, has another shape, or is unknown to the model.
    """
    for key in state.keys() & expected.keys():
        # Scalars are vectors of one number in some versions.
        if state[key].numel() == expected[key].numel() == 1:
            state = {**state, key: state[key].reshape(expected[key].shape)}
    misfit = f"the weights of {source} do not fit {name}"
    if missing := sorted(expected.keys() - state.keys()):
        raise UserError(f"{misfit}: they lack {_first(missing)}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise UserError(f"{misfit}, which has no {_first(unknown)}")
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise UserError(
                f"{misfit}: {key} is {list(state[key].shape)} in the file, "
                f"{list(tensor.shape)} in the model"
            )
    return dict(state)


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
