"""The packed attention operator against norms and dense attention, with stand-ins for kernels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import run_kernels
from packed_attention_cases import check_tower
from test_attention import dense_attention
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.models import packed_attention_op
from navit_clip.models.packed_attention_op import attend_packed
from navit_clip.models.pooling import MapPooling
from navit_clip.models.rope import Rotary
from navit_clip.models.transformer import Encoder, EncoderConfig
from navit_clip.packed.segments import Segments

HEADS, WIDTH, EPS = 2, 24, 1e-3
CLASSES = (1, 2, 4, 6, 8)  # as many as there are


def reference(qkv, q_weight, k_weight, lengths, causal, eps=EPS):
    """On the examples' tokens alone."""
    q, k, v = qkv.unbind(1)
    if q_weight is not None:
        q = F.layer_norm(q, q.shape[-1:], q_weight, None, eps)
        k = F.layer_norm(k, k.shape[-1:], k_weight, None, eps)
    return dense_attention(q, k, v, lengths, lengths, causal)


def stand_in_forward(qkv, offsets, bounds, q_weight, k_weight, eps, causal, out):
    """What the kernels must do: classes one by one, these segments' rows and no others."""
    for length, (first, last) in zip(CLASSES, pairwise(bounds), strict=True):
        lengths = offsets.diff()[first:last].tolist()
        assert max(lengths, default=0) <= length
        rows = slice(int(offsets[first]), int(offsets[last]))
        if lengths:
            out[rows] = reference(qkv[rows], q_weight, k_weight, lengths, causal, eps)


def stand_in_backward(grad, qkv, offsets, bounds, q_weight, k_weight, eps, causal, dqkv):
    # Operators run below autograd; a thread of its own does not.
    lengths = offsets.diff()[: bounds[-1]].tolist()
    rows = slice(0, sum(lengths))
    leaves = [x.detach().requires_grad_() for x in (qkv[rows], q_weight, k_weight) if x is not None]

    def differentiate():
        with torch.enable_grad():
            out = reference(leaves[0], *(leaves[1:] or (None, None)), lengths, causal, eps)
            return torch.autograd.grad(out, leaves, grad[rows])

    with ThreadPoolExecutor(1) as pool:
        dqkv[rows], *weights = pool.submit(differentiate).result()
    return tuple(weights) or None


@pytest.fixture(params=["kernels", "no kernels"])
def kernels(request, monkeypatch):
    if request.param == "kernels":
        put_kernels(monkeypatch)


def put_kernels(monkeypatch):
    module = packed_attention_op.short_attention
    monkeypatch.setattr(packed_attention_op, "takes_kernels", lambda qkv: True)
    monkeypatch.setattr("navit_clip.packed.segments.LENGTH_CLASSES", CLASSES)
    monkeypatch.setattr(module, "short_attention_forward", stand_in_forward)
    monkeypatch.setattr(module, "short_attention_backward", stand_in_backward)


def arguments(lengths, *, padding=0, norm=True, causal=False, dtype=torch.float64):
    segments = Segments.from_lengths(lengths, padding=padding)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    qkv = leaf(segments.num_tokens, 3, HEADS, WIDTH)
    weights = (leaf(WIDTH), leaf(WIDTH)) if norm else (None, None)
    return qkv, *weights, EPS, segments.offsets, segments.layout, causal


def check(lengths, tolerance=1e-10, **options):
    args = arguments(lengths, **options)
    leaves = [x for x in args[:3] if x is not None]
    real, causal = sum(lengths), args[-1]
    out = attend_packed(*args)[0]
    expected = reference(args[0][:real], *args[1:3], lengths, causal)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * weight[:real]).sum(), leaves)
    torch.testing.assert_close(out[:real], expected, rtol=tolerance, atol=tolerance)
    assert not out[real:].any()
    torch.testing.assert_close(grads, expected_grads, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 9])
@pytest.mark.parametrize(
    "lengths", [(1,), (20,), (1, 2, 2, 3, 5, 8), (2, 3, 9, 9, 30), (30, 1, 2), (3, 1, 9, 2)]
)
def test_values_and_gradients(lengths, padding, norm, causal, kernels):
    check(lengths, padding=padding, norm=norm, causal=causal)
    check(lengths, padding=padding, norm=norm, causal=causal, dtype=torch.float32, tolerance=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 5), st.booleans())
def test_any_segments(lengths, padding, causal):
    with pytest.MonkeyPatch.context() as monkeypatch:
        put_kernels(monkeypatch)
        check(lengths, padding=padding, causal=causal)


def test_no_example_at_all_gives_zeros(kernels):
    args = arguments((), padding=3)
    out = attend_packed(*args)[0]
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), args[:3]))


@pytest.mark.parametrize("norm", [False, True])
def test_the_operator_keeps_the_rules_of_operators(norm):
    torch.library.opcheck(attend_packed, arguments((1, 3, 3, 5, 9), padding=2, norm=norm))
    half = arguments((3, 2, 10), dtype=torch.bfloat16, norm=norm)
    half = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in half)
    torch.library.opcheck(attend_packed, half, test_utils=["test_schema", "test_faketensor"])


def test_floating_point_operations_are_counted(kernels):
    with FlopCounterMode(display=False) as counter:
        attend_packed(*arguments((3, 3, 5, 9), padding=4))[0].sum().backward()
    pairs = 3 * 3 + 3 * 3 + 5 * 5 + 9 * 9
    assert counter.get_total_flops() == (4 + 10) * HEADS * WIDTH * pairs


CONFIGS = {
    "norm inside": {},
    "no norm": {"qk_norm": False},
    "norm with biases": {"norm_bias": True},
    "rotary": {},
    "causal": {"causal": True},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CONFIGS)
def test_an_encoder_computes_the_same(case, autocast, kernels):
    torch.manual_seed(0)
    config = EncoderConfig(width=16, depth=2, heads=2, **CONFIGS[case])
    packed, plain = Encoder(config), Encoder(config)
    for parameter in packed.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.5)
    plain.load_state_dict(packed.state_dict())
    packed.pack_attention()
    segments = Segments.from_lengths([1, 2, 5, 9], padding=3)
    rotary = [Rotary(torch.randn(20, 2), torch.randn(2, 1, 4))] * 2 if case == "rotary" else ()
    x_TC = torch.randn(20, 16)
    results = []
    for encoder in (packed, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y_TC = encoder(x_TC, segments, rotary)[:17]
        grads = torch.autograd.grad(y_TC.float().sin().sum(), list(encoder.parameters()))
        results.append([y_TC.float(), *grads])
    tolerance = 0.1 if autocast else 1e-5
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= tolerance * max(1.0, expected.norm())


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"norm_bias": True}, {"qk_norm": False}], ids=str
)
def test_a_tower_by_its_kernels(options):
    pytest.importorskip("triton", reason="Triton is not installed")
    run_kernels(check_tower, **options)


@pytest.fixture
def half_precision():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("padding", [0, 7])
def test_a_tower_on_cuda_never_reads_from_the_device(padding, half_precision):
    with FakeTensorMode(), torch.device("cuda"):
        segments = Segments.from_lengths([3, 3, 140], padding=padding, device="cuda")
        tower = nn.ModuleList([Encoder(config := EncoderConfig(128, 2, 2)), MapPooling(config)])
        encoder, pool = tower
        encoder.pack_attention()
        pool.pack_attention()
        with FlopCounterMode(display=False) as counter:
            y_EC = pool(encoder(torch.randn(146 + padding, 128), segments), segments)
    assert y_EC.shape == (3, 128)
    assert y_EC.is_cuda
    flops = counter.get_flop_counts()["Global"]
    assert flops[torch.ops.navit_clip.attend_packed]
    assert flops[torch.ops.navit_clip.attend_pool] == 2 * 146 * 2 * 128
