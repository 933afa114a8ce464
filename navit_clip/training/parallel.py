"""How the ranks share one model: DDP, FSDP2 or HSDP, recomputed and compiled blocks, global norms.

Stands between the model and `navit_clip.training.step`, which runs forward and backward passes
through `ParallelModel` and never asks which of the two it is. Alone, one process holds everything
and neither applies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from navit_clip.configs import check_choices
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.models.transformer import Block, Encoder
from navit_clip.packed.batch import Inputs


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share the model, and what is traded for memory and speed.

    Attributes:
        kind: ``ddp``: every rank holds the whole model. ``fsdp``: FSDP2; parameters, gradients
            and optimiser state are cut into one shard per rank, and each block is gathered when
            it is needed. One process alone runs without either.
        shard_ranks: With ``fsdp``: over how many neighbouring ranks the shards are cut, such as the
            8 of one host; the world size is a multiple of it. Gradients of the same shard are then
            reduced among the groups (HSDP), and blocks are gathered within one. null cuts over all
            ranks.
        reshard_after_forward: With ``fsdp``: free a block's gathered parameters after its forward
            and gather them again in the backward pass; false keeps them between the two, which
            takes more memory and less communication.
        activation_checkpointing: Keep only each block's input in the forward pass and compute the
            block again in the backward pass: less memory, about a third more arithmetic.
        compile: Run each block of the encoders as one graph of `torch.compile`; by default on
            CUDA alone. Worth most with data.pad_to_budget, which keeps shapes fixed.
        attention: Which kernels attend on CUDA. ``varlen``: FlashAttention, for segments of any
            length. ``short``: our own for those of up to 256 tokens, FlashAttention for longer
            ones. ``auto``: ``short``, the faster one in all that was measured (H100).
        bf16_residual: With precision bf16: also hand the stream of tokens from block to block in
            bfloat16, which spares a GPU about half of the traffic that is not products or
            attention, and costs precision.

    Raises:
        ValueError: If a choice is unknown, or `shard_ranks` out of range or without ``fsdp``.
    """

    kind: Literal["ddp", "fsdp"] = "ddp"
    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    compile: bool | None = None
    attention: Literal["auto", "varlen", "short"] = "auto"
    shard_ranks: int | None = None
    bf16_residual: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if self.shard_ranks is not None:
            if self.shard_ranks < 1:
                raise ValueError(f"shard_ranks must be at least 1, got {self.shard_ranks}")
            if self.kind != "fsdp":
                raise ValueError(f"shard_ranks needs kind fsdp, got kind={self.kind}")


class ParallelModel:
    """A model as all ranks hold it together.

    After a backward pass inside `reducing(last=True)` and `finish_gradients`, each parameter's
    gradient is the SUM over the ranks of what their backward passes computed from
    `loss * gradient_factor`, divided by `gradient_factor`; this is what `Task.loss` promises.

    Args:
        model: On the ranks' device; sharded in place under FSDP.
        config: How it is shared.
        ranks: This process among all of them.
        bf16_blocks: Gather the blocks' parameters as bfloat16 under FSDP. Only the blocks': they
            run under autocast, which would round their matrices anyway, while embeddings in
            bfloat16 would make the residual stream bfloat16, unlike under DDP. Gradients are
            reduced in float32.

    Attributes:
        model: The model itself.
        gradient_factor: What the loss must be multiplied by before `backward`.
        kernels: What the encoders run on, in words.

    Raises:
        UserError: If the ranks cannot be cut into groups of `config.shard_ranks`.
    """

    def __init__(
        self, model: nn.Module, config: ParallelConfig, ranks: Ranks, *, bf16_blocks: bool
    ) -> None:
        self.model = model
        self.gradient_factor = 1
        self._forward: nn.Module = model
        self._replicated: list[nn.Parameter] = []
        cuda = ranks.device.type == "cuda"
        compiled = cuda if config.compile is None else config.compile
        short = cuda and config.attention != "varlen"
        encoders = [m for m in model.modules() if isinstance(m, Encoder)]
        self.kernels = _kernels(encoders, cuda, compiled, short, half=bf16_blocks)
        for module in model.modules():
            if isinstance(module, Encoder):
                module.activation_checkpointing = config.activation_checkpointing
                module.bf16_residual = config.bf16_residual
                if compiled:
                    module.compile_blocks()
            # Encoders and attention pooling have such kernels.
            pack = getattr(module, "pack_attention", None)
            if pack and short:
                pack()
        if ranks.world_size == 1:
            return
        if config.kind == "ddp":
            self._forward = DistributedDataParallel(
                model,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # constants; else sent before every forward pass
                # Large ones reach a network's bandwidth; the first is small in any case.
                bucket_cap_mb=100 if cuda else None,
            )
            self.gradient_factor = ranks.world_size  # DDP averages over ranks
        else:
            self._shard(config, ranks, bf16_blocks)

    def __call__(self, inputs: Inputs) -> Any:
        """The model's forward pass; a collective call under FSDP."""
        return self._forward(inputs)

    @contextmanager
    def reducing(self, *, last: bool) -> Iterator[None]:
        """Around one micro-batch's forward and backward pass.

        Args:
            last: Reduce the gradients over the ranks; before the last micro-batch of a step they
                only add up locally.
        """
        if isinstance(self._forward, DistributedDataParallel) and not last:
            with self._forward.no_sync():
                yield
            return
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        yield

    def finish_gradients(self) -> None:
        """Reduces what no wrapper reduces; after the last backward pass of a step."""
        for parameter in self._replicated:
            assert parameter.grad is not None  # an output of every forward pass
            dist.all_reduce(parameter.grad)

    def _shard(self, config: ParallelConfig, ranks: Ranks, bf16_blocks: bool) -> None:
        mesh = _mesh(config, ranks)
        # FSDP cannot cut a scalar: scale and bias stay whole on every rank.
        self._replicated = [p for p in self.model.parameters() if p.ndim == 0]
        half = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for encoder in [m for m in self.model.modules() if isinstance(m, Encoder)]:
            encoder.chunked = False  # else each block would be gathered once per chunk
        for block in [m for m in self.model.modules() if isinstance(m, Block)]:
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=config.reshard_after_forward,
                mp_policy=half if bf16_blocks else MixedPrecisionPolicy(),
            )
        # The root's own parameters are needed again as soon as the backward pass begins.
        fully_shard(
            self.model,
            mesh=mesh,
            reshard_after_forward=False,
            ignored_params=set(self._replicated),
        )
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                # A factor alone asks for a multiplying reduction, which only NCCL has.
                module.set_force_sum_reduction_for_comms(True)


def _kernels(
    encoders: Iterable[Encoder], cuda: bool, compiled: bool, short: bool, *, half: bool
) -> str:
    attention = (_attention(encoder, cuda, compiled, short, half=half) for encoder in encoders)
    blocks = "compiled blocks" if compiled else "eager blocks"
    return ", ".join(dict.fromkeys([blocks, *attention]))


def _attention(encoder: Encoder, cuda: bool, compiled: bool, short: bool, *, half: bool) -> str:
    if encoder.in_windows:
        return "attention in windows multiplied out"
    if cuda and half and not encoder.suits_flash:
        return "attention multiplied out, slowly, since heads are too wide for its kernels"
    if short and half:
        return "attention of short segments in kernels of our own"
    if cuda and half:
        return "attention by FlashAttention-2"
    if cuda and compiled:
        return "attention multiplied out"
    return "attention by length"


def _mesh(config: ParallelConfig, ranks: Ranks) -> DeviceMesh:
    """The ranks in one row, or a row for each group that holds all shards between them."""
    shards = config.shard_ranks or ranks.world_size
    groups, rest = divmod(ranks.world_size, shards)
    if rest:
        raise UserError(
            f"parallel.shard_ranks={shards} does not divide the {ranks.world_size} ranks"
        )
    if groups == 1:
        return init_device_mesh(ranks.device.type, (shards,))
    names = ("replicate", "shard")  # fully_shard takes the first for copies, the last for shards
    return init_device_mesh(ranks.device.type, (groups, shards), mesh_dim_names=names)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank may hold a shard; a collective call for a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of many tensors as one vector, the same on every rank.

    A collective call if any of them is sharded.
    """
    norms = [full_tensor(nn.utils.get_total_norm(group)) for group in _by_kind(tensors)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to a global norm, as `nn.utils.clip_grad_norm_`, shards included.

    A `max_norm` of 0 leaves them alone. Returns the norm before.
    """
    parameters = list(parameters)
    norm = global_norm(p.grad for p in parameters if p.grad is not None)
    if max_norm:
        for group in _by_kind(parameters):
            nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Sharded tensors and others apart, since no operator takes both in one list."""
    sharded: list[Tensor] = []
    others: list[Tensor] = []
    for tensor in tensors:
        (sharded if isinstance(tensor, DTensor) else others).append(tensor)
    return [group for group in (sharded, others) if group]
