"""The packed pre-norm encoder that both towers share.

Reads one stream of tokens [T, C] with its `Segments` and returns a stream of the same shape. With
NaViT's switches (query-key norm, no bias in QKV projections and norms) it is the
paper's encoder; with others it is a plain ViT, or either tower of CLIP or SigLIP.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import repeat
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from navit_clip.configs import check_choices
from navit_clip.models.attention import attend_segments
from navit_clip.models.attention_op import FLASH_WIDTH
from navit_clip.models.drop_path import add_scaled, draw_drop_path
from navit_clip.models.linear import Linear
from navit_clip.models.packed_attention_op import attend_packed
from navit_clip.models.rope import Rotary
from navit_clip.packed.segments import Segments

# A CPU's caches hold what a short stream needs between two operators, and its allocator keeps
# small blocks: a stream of more elements takes up to 25% longer in one piece than in chunks. A
# smaller one takes 3% longer in chunks, whose weight gradients are added (benchmarks/LOG.md).
_UNCHUNKED_ELEMENTS = 2_500_000


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture of the encoder.

    Attributes:
        width: C, width of the token stream.
        depth: Number of blocks.
        heads: H, attention heads; must divide `width`.
        mlp_ratio: Hidden width of the MLP over `width`.
        qk_norm: Normalise queries and keys per head before attention.
        qkv_bias: Biases in the QKV projection.
        norm_bias: Biases in the LayerNorms.
        mlp_bias: Biases in the MLP and the attention's output projection.
        activation: Non-linearity of the MLP; ``quick_gelu`` is x·sigmoid(1.702x), ``gelu_tanh``
            the approximation with a hyperbolic tangent.
        causal: A token attends to itself and those before it in its segment.
        pre_norm: Normalise the stream before the first block too (CLIP's ``ln_pre``).
        final_norm: Normalise the stream after the last block.
        norm_eps: Added to the variance in the LayerNorms; big_vision and timm have 1e-6,
            open_clip 1e-5.

    Raises:
        ValueError: If a size is below 1, `heads` does not divide `width`, `norm_eps` is not
            positive, or a choice is unknown.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    qkv_bias: bool = False
    norm_bias: bool = False
    mlp_bias: bool = True
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    causal: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got heads={self.heads} width={self.width}")
        if not 1 <= self.width * self.mlp_ratio < math.inf:
            raise ValueError(
                "mlp_ratio must give the MLP a width of at least 1, got "
                f"mlp_ratio={self.mlp_ratio} width={self.width}"
            )
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")

    @property
    def head_width(self) -> int:
        """D, width of a head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that the first CLIP models were trained with."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class LayerNorm(nn.LayerNorm):
    """A LayerNorm whose parameters may have a lower precision than its input.

    So it is when FSDP gathers them in bfloat16 beside a residual stream in float32. Autocast on
    CUDA raises them itself; the CPU's kernel refuses the mixture.
    """

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__(width, eps=config.norm_eps, bias=config.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        dtype = torch.promote_types(self.weight.dtype, x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(dtype), bias, self.eps)


class SegmentAttention(nn.Module):
    """Multi-head self-attention within each segment, with optional query-key norm.

    Attributes:
        packed: Attend by the operator that reads queries, keys and values where their projection
            wrote them, and has kernels of its own for short segments; see `packed_attention_op`.
        bare_norm: There is a query-key norm, and it has no biases.
        norm_eps: Of that norm.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.causal = config.causal
        self.packed = False
        self.bare_norm = config.qk_norm and not config.norm_bias
        self.norm_eps = config.norm_eps
        self.qkv = Linear(config.width, 3 * config.width, bias=config.qkv_bias, stacked=3)
        self.out = Linear(config.width, config.width, bias=config.mlp_bias)
        norm: Callable[[], nn.Module] = (
            partial(LayerNorm, config.head_width, config) if config.qk_norm else nn.Identity
        )
        self.q_norm = norm()
        self.k_norm = norm()

    def forward(self, x_TC: Tensor, segments: Segments, rotary: Rotary | None = None) -> Tensor:
        """Attends within segments; [T, C] to [T, C]."""
        qkv_T3HD = self.qkv(x_TC).unflatten(-1, (3, self.heads, -1))
        attend = self._attend_packed if self.packed else self._attend
        return self.out(attend(qkv_T3HD, segments, rotary).flatten(-2))

    def _attend(self, qkv_T3HD: Tensor, segments: Segments, rotary: Rotary | None) -> Tensor:
        q_THD, k_THD, v_THD = self._normalised(qkv_T3HD, rotary)
        return attend_segments(q_THD, k_THD, v_THD, segments, segments, self.causal)

    def _attend_packed(self, qkv_T3HD: Tensor, segments: Segments, rotary: Rotary | None) -> Tensor:
        q_norm, k_norm = self.q_norm, self.k_norm
        weights: tuple[Tensor | None, Tensor | None] = (None, None)
        # Biases and rotations are not known to the operator.
        if self.bare_norm and rotary is None:
            assert isinstance(q_norm, LayerNorm)
            assert isinstance(k_norm, LayerNorm)
            weights = (q_norm.weight, k_norm.weight)
        else:
            qkv_T3HD = torch.stack(self._normalised(qkv_T3HD, rotary), 1)
        out_THD: Tensor = attend_packed(
            qkv_T3HD, *weights, self.norm_eps, segments.offsets, segments.layout, self.causal
        )[0]
        return out_THD

    def _normalised(self, qkv_T3HD: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        q_THD, k_THD, v_THD = qkv_T3HD.unbind(-3)
        q_THD, k_THD = self.q_norm(q_THD), self.k_norm(k_THD)
        if rotary is not None:
            q_THD, k_THD = rotary.rotate(q_THD, k_THD)
        if v_THD.device.type != "cpu" or self.packed:
            # Under autocast a LayerNorm returns float32, which kernels would not accept beside
            # half-precision values. A CPU attends in float32 anyway.
            q_THD, k_THD = q_THD.to(v_THD.dtype), k_THD.to(v_THD.dtype)
        return q_THD, k_THD, v_THD


class Mlp(nn.Module):
    """Two linear layers around a non-linearity, token by token."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = Linear(config.mlp_width, config.width, bias=config.mlp_bias)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x_TC: Tensor) -> Tensor:
        """[T, C] to [T, C]."""
        return self.down(self.activation(self.up(x_TC)))


class Block(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: Of the encoder.
        attention: Another than that within segments.

    Attributes:
        compiled: Run as one compiled graph, which all blocks of one shape share.
    """

    def __init__(self, config: EncoderConfig, attention: SegmentAttention | None = None) -> None:
        super().__init__()
        self.compiled = False
        self._first_tokens = 0
        self.attention_norm = LayerNorm(config.width, config)
        self.attention = attention or SegmentAttention(config)
        self.mlp_norm = LayerNorm(config.width, config)
        self.mlp = Mlp(config)

    def forward(
        self,
        x_TC: Tensor,
        segments: Segments,
        rotary: Rotary | None = None,
        scale_T2: Tensor | None = None,
    ) -> Tensor:
        """[T, C] to [T, C]; `scale_T2` multiplies what attention and MLP add."""
        if self.compiled:
            self._mark_dynamic(x_TC, segments, rotary, scale_T2)
            try:
                return compiled_block()(self, x_TC, segments, rotary, scale_T2)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                warnings.warn(
                    "blocks run uncompiled from now on, and slower: the limit of compilations "
                    f"({torch._dynamo.config.recompile_limit}) is reached; TORCH_LOGS=recompiles "
                    "tells what differs from call to call",
                    stacklevel=2,
                )
                self.compiled = False
        return self._run(x_TC, segments, rotary, scale_T2)

    def _run(
        self, x_TC: Tensor, segments: Segments, rotary: Rotary | None, scale_T2: Tensor | None
    ) -> Tensor:
        scales = (None, None) if scale_T2 is None else scale_T2.unbind(1)
        attended_TC = self.attention(self.attention_norm(x_TC), segments, rotary)
        x_TC = add_scaled(x_TC, attended_TC, scales[0])
        return add_scaled(x_TC, self.mlp(self.mlp_norm(x_TC)), scales[1])

    def _mark_dynamic(
        self, x_TC: Tensor, segments: Segments, rotary: Rotary | None, scale_T2: Tensor | None
    ) -> None:
        """Tells the compiler which sizes differ from batch to batch, to compile once for all.

        At each call, since FSDP hands a block other tensors than the encoder has.
        """
        varying = [segments.offsets, segments.layout]
        self._first_tokens = self._first_tokens or len(x_TC)
        if len(x_TC) != self._first_tokens:
            varying += [x_TC, *([] if rotary is None else [rotary.positions_TA])]
            varying += [] if scale_T2 is None else [scale_T2]
        for tensor in varying:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


@cache
def compiled_block() -> Callable[..., Tensor]:
    """`Block._run` as one graph, for all encoders: the compiler is set up at the first call.

    A call of the module instead would trace what wrappers hook to it.
    """
    # Streams of one length, which they are if padded to a budget, are worth code of their own.
    return torch.compile(Block._run, fullgraph=True, dynamic=False)


class Encoder(nn.Module):
    """A stack of blocks and a final norm over one packed stream.

    Args:
        config: Of all blocks.
        blocks: Others than `config.depth` plain ones.

    Attributes:
        activation_checkpointing: Keep only the blocks' inputs for the backward pass, which
            computes each block again; changes memory and time, not results.
        bf16_residual: Under autocast in bfloat16, hand the stream from block to block in bfloat16
            too: half the traffic of norms and sums, at one more rounding after each of them.
        chunked: On a CPU, run all blocks on one chunk of a long stream, then on the next, which is
            faster than block by block. To be switched off where a block is gathered or compiled
            for each call.
        drop_path: In training, with what probability an example passes the last block's attention
            or MLP by, earlier ones with less; see `draw_drop_path`.
        in_windows: Attends within windows, for which there are no kernels.
    """

    in_windows: ClassVar[bool] = False

    def __init__(self, config: EncoderConfig, blocks: Iterable[Block] | None = None) -> None:
        super().__init__()
        self.config = config
        self.drop_path = 0.0
        self.activation_checkpointing = False
        self.chunked = True
        self.bf16_residual = False
        self.pre_norm = LayerNorm(config.width, config) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(blocks or (Block(config) for _ in range(config.depth)))
        self.norm = LayerNorm(config.width, config) if config.final_norm else nn.Identity()

    def forward(self, x_TC: Tensor, segments: Segments, rotary: Sequence[Rotary] = ()) -> Tensor:
        """Encodes a packed stream.

        Args:
            x_TC: [T, C] embedded tokens.
            segments: Segments of the T tokens.
            rotary: For each block the rotations of the T tokens' queries and keys; empty if there
                are none.

        Returns:
            [T, C] outputs, normalised by default.
        """
        x_TC, scales_NT2 = self._enter(x_TC), self._draw_scales(segments)
        if (
            x_TC.device.type != "cpu"
            or x_TC.numel() <= _UNCHUNKED_ELEMENTS
            or not self.chunked
            or torch.compiler.is_compiling()
        ):
            return self.norm(self._run_blocks(x_TC, segments, rotary, scales_NT2))
        sizes = [chunk.num_tokens for chunk in segments.chunks]
        rotaries = zip(*(r.split(sizes) for r in rotary), strict=True) if rotary else repeat(())
        scales = repeat(None) if scales_NT2 is None else scales_NT2.split(sizes, 1)
        outputs = map(self._run_blocks, x_TC.split(sizes), segments.chunks, rotaries, scales)
        return self.norm(torch.cat(list(outputs)))

    def _enter(self, x_TC: Tensor) -> Tensor:
        """The stream as the first block takes it."""
        x_TC = self.pre_norm(x_TC)
        if self.bf16_residual and torch.is_autocast_enabled(x_TC.device.type):
            x_TC = x_TC.to(torch.get_autocast_dtype(x_TC.device.type))
        return x_TC

    def _draw_scales(self, segments: Segments) -> Tensor | None:
        if not (self.training and self.drop_path):
            return None
        return draw_drop_path(segments, self.config.depth, self.drop_path)

    def _run_blocks(
        self,
        x_TC: Tensor,
        segments: Segments,
        rotary: Sequence[Rotary],
        scales: Iterable[Tensor] | None,
    ) -> Tensor:
        each: Iterable[Tensor | None] = repeat(None) if scales is None else scales
        for block, rotation, scale in zip(self.blocks, rotary or repeat(None), each):  # noqa: B905
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_TC = checkpoint(block, x_TC, segments, rotation, scale, use_reentrant=False)
            else:
                x_TC = block(x_TC, segments, rotation, scale)
        return x_TC

    @property
    def suits_flash(self) -> bool:
        """Whether heads are as narrow as the kernels of FlashAttention want them."""
        return self.config.head_width <= FLASH_WIDTH

    def pack_attention(self) -> None:
        """Sets all blocks' `SegmentAttention.packed`."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.packed = True

    def compile_blocks(self) -> None:
        """Compiles the blocks at their next call, all blocks of one shape at once."""
        # Each tower, with and without a graph, with and without autocast, is compiled apart.
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        # It would split a block where DDP's buckets end, though its own graph is as small.
        torch._dynamo.config.optimize_ddp = False
        self.chunked = False
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiled = True
