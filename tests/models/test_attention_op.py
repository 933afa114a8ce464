"""The attention operator against the dense, masked reference, and as the compiler sees it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import dense_attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.models import attention_op
from navit_clip.models.attention_op import attend
from navit_clip.models.transformer import Encoder, EncoderConfig
from navit_clip.packed.segments import LAYOUT_HEAD, Segments

HEADS = 3


def arguments(lengths_q, lengths_k=None, *, padding=0, width=8, dtype=torch.float64, causal=False):
    """Leaves q, k and v, then the rest of the operator's arguments."""
    segments_q = Segments.from_lengths(lengths_q, padding=padding)
    segments_k = segments_q
    if lengths_k is not None:
        segments_k = Segments.from_lengths(lengths_k, padding=padding)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(s.num_tokens, HEADS, width, generator=generator, dtype=dtype).requires_grad_()
        for s in (segments_q, segments_k, segments_k)
    ]
    sides = (segments_q, segments_k)
    return [*leaves, *(s.offsets for s in sides), *(s.layout for s in sides), causal]


def check(*args, tolerance=1e-10, **options):
    q, k, v, *rest = arguments(*args, **options)
    layout_q, layout_k, causal = rest[2:]
    end_q, end_k = int(layout_q[1]), int(layout_k[1])
    out = attend(q, k, v, *rest)[0]
    weight = torch.randn_like(out)
    expected = dense_attention(
        q[:end_q],
        k[:end_k],
        v[:end_k],
        layout_q[LAYOUT_HEAD:].tolist(),
        layout_k[LAYOUT_HEAD:].tolist(),
        causal,
    )
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weight[:end_q]).sum(), (q, k, v))
    torch.testing.assert_close(out[:end_q], expected, rtol=tolerance, atol=tolerance)
    assert not out[end_q:].any()
    torch.testing.assert_close(grads, expected_grads, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["fused", "multiplied out", "multiplied out in pieces"])
def kernels(request, monkeypatch):
    if request.param != "fused":
        monkeypatch.setattr(attention_op, "_fused", None)
        monkeypatch.setattr(attention_op, "_fused_backward", None)
    if "pieces" in request.param:
        monkeypatch.setattr(attention_op, "_SCORES", 100)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 9])
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (4, 4, 4, 4, 4, 9), (5, 2, 5, 1, 30)])
def test_self_attention(lengths, padding, causal, kernels):
    check(lengths, padding=padding, causal=causal)
    check(lengths, padding=padding, causal=causal, width=24, dtype=torch.float32, tolerance=1e-4)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [((1, 1, 1), (3, 3, 8)), ((2, 2, 2, 5), (3, 4, 4, 4))]
)
def test_cross_attention(lengths_q, lengths_k, padding, kernels):
    check(lengths_q, lengths_k, padding=padding)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 5), st.booleans())
def test_any_segments(lengths, padding, causal):
    check(lengths, padding=padding, causal=causal)


def test_no_example_at_all_gives_zeros():
    q, k, v, *rest = arguments((), padding=3)
    out = attend(q, k, v, *rest)[0]
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), q)[0].any()


@pytest.mark.parametrize("padding", [0, 2])
def test_the_operator_keeps_the_rules_of_operators(padding):
    torch.library.opcheck(attend, tuple(arguments((3, 3, 5, 1), padding=padding, causal=True)))
    q, k, v, *rest = arguments((3, 2), dtype=torch.float32, padding=padding)
    mixed = (q.detach(), k.detach(), v.detach().bfloat16(), *rest)
    torch.library.opcheck(attend, mixed, test_utils=["test_schema", "test_faketensor"])


def test_floating_point_operations_are_counted():
    with FlopCounterMode(display=False) as counter:
        attend(*arguments((3, 3, 5), padding=4))[0].sum().backward()
    pairs = 3 * 3 + 3 * 3 + 5 * 5
    assert counter.get_total_flops() == (4 + 10) * HEADS * 8 * pairs


@pytest.fixture
def half_precision():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("width", [40, 128])
def test_the_encoder_on_cuda_never_reads_from_the_device(width, padding, half_precision):
    # Tensors without content: whoever reads from one on the device raises.
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        segments = Segments.from_lengths([3, 3, 140], padding=padding, device="cuda")
        encoder = Encoder(EncoderConfig(width=width, depth=2, heads=2))
        x_TC = torch.randn(146 + padding, width)
        with FlopCounterMode(display=False) as counter:
            y_TC = encoder(x_TC, segments)
    assert y_TC.shape == x_TC.shape
    assert y_TC.is_cuda
    assert counter.get_flop_counts()["Global"][torch.ops.navit_clip.attend]
