"""Optimisers by name: AdamW, fused, or any other of timm's registry and of `torch.optim`.

`optim` decides which parameters share a learning rate and a decay, and asks here for an optimiser
of these groups; `step` asks here for an update.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from navit_clip.errors import UserError
from navit_clip.training.parallel import full_tensor

ADAMW = "adamw"
_TORCH = "torch."
_FIELDS = ("params", "lr", "weight_decay")  # set by `optim`
Groups = Sequence[dict[str, Any]]


def check_optimizer(name: str, args: Mapping[str, Any]) -> None:
    """Checks that there is such an optimiser and that it has such arguments.

    Args:
        name: ``adamw``, another one of timm's, or ``torch.`` and a class of `torch.optim`.
        args: Its arguments by name.

    Raises:
        ValueError: Naming the first thing that is unknown, and what is like it.
    """
    known = list(inspect.signature(_find(name)).parameters)
    for argument in args:
        if argument in _FIELDS or (name == ADAMW and argument in ("betas", "eps")):
            raise ValueError(f"args.{argument}: write it as optim.{argument}")
        if argument not in known:
            raise ValueError(
                f"args.{argument} is none of {name}{_hint(argument, known)}; it has "
                + ", ".join(word for word in known if word not in _FIELDS)
            )


def make_optimizer(name: str, groups: Groups, lr: float, args: Mapping[str, Any]) -> Optimizer:
    """An optimiser, tried out on small tensors first.

    Args:
        name: As for `check_optimizer`.
        groups: Parameters, possibly sharded, and what is particular to them.
        lr: Learning rate.
        args: Of the optimiser, by name.

    Raises:
        UserError: If it cannot be used so, or not with sharded parameters, or could not go on from
            a checkpoint as if nothing had happened.
    """
    kind, args = _find(name), dict(args)
    if "max_grad_norm" in inspect.signature(kind).parameters:
        args.setdefault("max_grad_norm", None)  # LAMB would clip again what optim.clip_norm has

    def make(groups: Groups, lr: float) -> Optimizer:
        if name == ADAMW or name.startswith(_TORCH):
            return kind(groups, lr=lr, **args)  # type: ignore[call-arg]
        from timm.optim import create_optimizer_v2

        made: Optimizer = create_optimizer_v2(groups, name, lr=lr, **args)
        return made

    try:
        _try_out(make, groups)
    # Any of dozens of classes, each with checks of its own.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"optim.name={name} cannot be used here: {reason}") from error
    return make(groups, lr)


def update(optimizer: Optimizer, found_inf: Tensor) -> None:
    """Takes a step, or leaves everything as it is.

    Args:
        optimizer: Of parameters with gradients.
        found_inf: Scalar on their device, 1 if nothing may change, else 0.
    """
    if isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]:
        # Not in the constructor of the fused AdamW, which looks for it in each step.
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not found_inf.item():  # no other is sure to look, so the host waits to know
        optimizer.step()


def _find(name: str) -> type[Optimizer]:
    if name == ADAMW:
        return torch.optim.AdamW
    from timm.optim import get_optimizer_class, list_optimizers  # a second; most runs need none

    ours = {
        f"{_TORCH}{key}": kind
        for key, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    }
    if name in ours:
        return ours[name]
    names = [*map(str, list_optimizers()), *ours]
    if name not in names:
        raise ValueError(
            f"name={name} is unknown{_hint(name, names)}; there are {', '.join(names)}"
        )
    try:
        found: Any = get_optimizer_class(name, bind_defaults=False)
    except (ImportError, AssertionError) as error:
        raise ValueError(f"name={name}: {error}") from error
    return cast("type[Optimizer]", found)


def _hint(word: str, known: Sequence[str]) -> str:
    lower = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), lower, 1)
    return f"; did you mean {lower[close[0]]}?" if close else ""


def _try_out(make: Callable[..., Optimizer], groups: Groups) -> None:
    """Takes a few steps with small tensors: without a break, after restarts, sharded.

    Raises:
        ValueError: If decay has no effect or any of these ends elsewhere. The optimiser may raise
            anything.
    """
    defaults = make(_stand_ins(groups, shard=False), 0.1).defaults
    if any(group["weight_decay"] for group in groups) and "weight_decay" not in defaults:
        raise ValueError("it has no weight decay, set optim.weight_decay to 0")
    expected = _trial(make, groups)
    for own, other in zip(_trial(make, groups, restarts=True), expected, strict=True):
        if not torch.equal(own, other):
            raise ValueError("it goes on from a checkpoint otherwise than without a break")
    if not any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        return
    try:
        sharded = _trial(make, groups, shard=True)
    # From deep within DTensor, which has no rule for some operator, in many words.
    except Exception as error:
        raise ValueError("it does not work on FSDP's shards, use parallel.kind ddp") from error
    for own, other in zip(sharded, expected, strict=True):
        # A part of how far they went: Muon multiplies in bfloat16, in another order.
        if not torch.dist(own, other) <= 0.05 * torch.dist(other, torch.ones_like(other)):
            raise ValueError("it takes other steps on FSDP's shards, use parallel.kind ddp")


def _trial(
    make: Callable[..., Optimizer], groups: Groups, *, restarts: bool = False, shard: bool = False
) -> list[Tensor]:
    tried = _stand_ins(groups, shard=shard)
    parameters = [parameter for group in tried for parameter in group["params"]]
    optimizer = make([dict(group) for group in tried], 0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        if restarts and step:
            state = deepcopy(optimizer.state_dict())
            optimizer = make([dict(group) for group in tried], 0.1)
            optimizer.load_state_dict(state)
        for p in parameters:
            gradient = torch.randn(p.shape, generator=generator)
            if p.ndim:  # rows of different size: what is measured on one shard alone shows
                gradient *= torch.linspace(1, 3, len(gradient)).view(-1, *[1] * (p.ndim - 1))
            p.grad = _sharded_like(gradient.to(p), p)
        optimizer.step()
    return [full_tensor(parameter.detach()) for parameter in parameters]


def _stand_ins(groups: Groups, *, shard: bool) -> list[dict[str, Any]]:
    """Of each group a small parameter of each number of dimensions, all ones."""
    found = []
    for group in groups:
        parameters = []
        for like in {p.ndim: p for p in group["params"]}.values():
            # A number of rows that ranks do not divide: shards are uneven.
            rows = 2 * like.device_mesh.size() + 1 if isinstance(like, DTensor) else 9
            ones = torch.ones(((rows, 6) + (1,) * like.ndim)[: like.ndim], dtype=like.dtype)
            ones = ones.to(like.device)
            parameters.append(torch.nn.Parameter(_sharded_like(ones, like) if shard else ones))
        found.append(group | {"params": parameters})
    return found


def _sharded_like(value: Tensor, other: Tensor) -> Tensor:
    if isinstance(other, DTensor):
        return distribute_tensor(value, other.device_mesh, other.placements)
    return value
