"""The towers' linear layers against PyTorch's own, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.models import linear as module
from navit_clip.models.linear import Linear

LARGE = (768, 384)  # at least as many weights as make a difference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that reach oneDNN from now on."""
    seen: list[tuple[int, ...]] = []
    product = module._multiply

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(module, "_multiply", watched)
    return seen


def run(layer: nn.Linear, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, and gradients of input, weight and bias."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad.to(y.dtype))
    return [t.detach() for t in (y, x.grad, *(p.grad for p in layer.parameters())) if t is not None]


def reference(layer: Linear) -> nn.Linear:
    """PyTorch's layer with the same weights in float64."""
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin.load_state_dict(layer.state_dict())
    return twin.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [LARGE, LARGE[::-1], (512, 512), (3072, 768), (24, 8)])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_equals_pytorchs_layer(tokens, shape, bias):
    layer = Linear(*shape, bias=bias)
    x, grad = torch.randn(tokens, shape[0]), torch.randn(tokens, shape[1])
    wanted = run(reference(layer), x.double(), grad.double())
    plain = nn.Linear(*shape, bias=bias)
    plain.load_state_dict(layer.state_dict())
    for ours, theirs, exact in zip(run(layer, x, grad), run(plain, x, grad), wanted, strict=True):
        scale = exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6 * scale


def test_any_memory_layout(monkeypatch):
    seen = calls_of(monkeypatch)
    layer = Linear(*LARGE, bias=True)
    slices = torch.randn(40, 2 * LARGE[0])[::2, LARGE[0] :]
    transposed = torch.randn(LARGE[0], 20).t()
    for x in (slices, transposed):
        grad = torch.randn(20, 1).expand(20, LARGE[1])  # strides of zero, as a sum's gradient has
        wanted = run(reference(layer), x.double(), grad.double())
        for ours, exact in zip(run(layer, x, grad), wanted, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    assert len(seen) == 4  # two passes, forward and backward


def test_only_what_is_wanted_is_computed(monkeypatch):
    seen = calls_of(monkeypatch)
    layer = Linear(*LARGE, bias=True)
    layer.weight.requires_grad_(False)
    layer(torch.randn(9, LARGE[0])).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert seen == [(9, LARGE[0])]  # nothing backward: the input wants no gradient


@pytest.mark.parametrize(
    ("shape", "dtype", "autocast"),
    [
        ((0, LARGE[0]), torch.float32, False),
        ((2, 3, LARGE[0]), torch.float32, False),
        ((5, LARGE[0]), torch.float64, False),
        ((5, LARGE[0]), torch.bfloat16, False),
        ((5, LARGE[0]), torch.float32, True),
    ],
    ids=["empty", "three dimensions", "float64", "bfloat16", "autocast"],
)
def test_everything_else_is_pytorchs(monkeypatch, shape, dtype, autocast):
    seen = calls_of(monkeypatch)
    layer = Linear(*LARGE, bias=True).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not seen


def test_a_build_without_the_operator(monkeypatch):
    monkeypatch.setattr(module, "_product", None)
    layer = Linear(*LARGE, bias=True)
    x = torch.randn(5, LARGE[0])
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_pytorchs_counter_sees_the_operations(monkeypatch):
    seen = calls_of(monkeypatch)
    layer = Linear(*LARGE, bias=True)
    x = torch.randn(11, LARGE[0], requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert seen
    assert counter.get_total_flops() == 3 * 2 * 11 * LARGE[0] * LARGE[1]


def test_initialisation_of_a_stack():
    layer = Linear(64, 3 * 64, bias=True, stacked=3)
    limit = (6 / (64 + 64)) ** 0.5
    for part in layer.weight.chunk(3):
        assert 0.9 * limit < part.abs().max() <= limit
    assert not layer.bias.any()
