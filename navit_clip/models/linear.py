"""The towers' linear layers.

`nn.Linear` everywhere but on a CPU in float32: there PyTorch gives those products to MKL, and
oneDNN, which it gives its other precisions, is some 10% faster on large ones (benchmarks/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

# No public function reaches oneDNN in float32. torch.compile emits this operator, so it is kept;
# where a build lacks it, MKL remains.
_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# Elements. A product of a new shape is prepared first, for some 1 ms; below, that is more than it
# saves.
_MIN_WEIGHT = 1 << 18


class Linear(nn.Linear):
    """A linear layer [T, C] to [T, D]; results differ from `nn.Linear`'s by rounding alone.

    Its weights start Xavier-uniform and its bias at zero, as big_vision's ViT has them. Of matrices
    `stacked` on top of each other (3 for QKV) each is initialised alone, since the fan-out of the
    stack would make them too small.
    """

    def __init__(self, in_width: int, out_width: int, *, bias: bool, stacked: int = 1) -> None:
        super().__init__(in_width, out_width, bias=bias)
        with torch.no_grad():
            for weight in self.weight.chunk(stacked):
                nn.init.xavier_uniform_(weight)
            if bias:
                nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., D]."""
        if self._suits_onednn(x):
            y: Tensor = _OneDnnLinear.apply(x, self.weight, self.bias)
            return y
        return super().forward(x)

    def _suits_onednn(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and _product is not None
            and x.dim() == 2
            and len(x) > 0
            and x.dtype == self.weight.dtype == torch.float32
            and self.weight.numel() >= _MIN_WEIGHT
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and torch.backends.mkldnn.is_available()
        )


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, weight_DC: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TC, weight_DC)
        return _multiply(x_TC, weight_DC, bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TC, weight_DC = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_TD = grad_TD.contiguous()
        return (
            _multiply(grad_TD, weight_DC.t(), None) if needs_x else None,
            # Both sides transposed, MKL is the faster one.
            grad_TD.t() @ x_TC if needs_weight else None,
            grad_TD.sum(0) if needs_bias else None,
        )


def _multiply(x_TC: Tensor, weight_DC: Tensor, bias_D: Tensor | None) -> Tensor:
    assert _product is not None
    y_TD: Tensor = _product(x_TC.contiguous(), weight_DC, bias_D, "none", [], "")
    return y_TD


if _product is not None:

    @register_flop_formula(_product)
    def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
        """So that PyTorch's counter of operations sees them."""
        return 2 * x_shape[0] * x_shape[1] * weight_shape[0]
