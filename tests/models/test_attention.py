"""Attention within segments against one dense, masked attention over the whole stream."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit_clip.models.attention import segment_attention
from navit_clip.packed.segments import Segments

HEADS, WIDTH = 2, 4


def dense_attention(
    q_THD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    causal: bool,
) -> Tensor:
    """Examples only, no padding: softmax over all pairs of tokens with the forbidden at -inf."""
    allowed = torch.block_diag(
        *(torch.ones(q, k) for q, k in zip(lengths_q, lengths_k, strict=True))
    )
    if causal:
        allowed = allowed.tril()  # segments are the same on both sides
    scores_HTS = torch.einsum("thd,shd->hts", q_THD, k_SHD) / q_THD.shape[-1] ** 0.5
    scores_HTS = scores_HTS.masked_fill(allowed.to(q_THD.device) == 0, -torch.inf)
    return torch.einsum("hts,shd->thd", scores_HTS.softmax(-1), v_SHD)


def check(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int] | None = None,
    *,
    padding_q: int = 0,
    padding_k: int = 0,
    causal: bool = False,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-10,
    device: str = "cpu",
    seed: int = 0,
    width: int = WIDTH,
) -> None:
    """Compares values and the gradients of q, k and v; `lengths_k` None is self-attention."""
    segments_q = Segments.from_lengths(lengths_q, padding=padding_q, device=device)
    segments_k = segments_q
    if lengths_k is not None:
        segments_k = Segments.from_lengths(lengths_k, padding=padding_k, device=device)
    generator = torch.Generator().manual_seed(seed)

    def leaf(tokens: int) -> Tensor:
        x = torch.randn(tokens, HEADS, width, generator=generator, dtype=torch.float64)
        return x.to(device, dtype).requires_grad_()

    q, k, v = (leaf(s.num_tokens) for s in (segments_q, segments_k, segments_k))
    real_q, real_k = segments_q.num_real_tokens, segments_k.num_real_tokens
    precise = torch.float64 if device == "cpu" else torch.float32
    weight = torch.randn(real_q, HEADS, width, generator=generator).to(device, precise)

    out = segment_attention(q, k, v, segments_q, segments_k, causal=causal)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    actual_grads = torch.autograd.grad((out[:real_q].to(precise) * weight).sum(), (q, k, v))

    leaves = [
        x.detach()[:end].to(precise).requires_grad_()
        for x, end in ((q, real_q), (k, real_k), (v, real_k))
    ]
    expected = dense_attention(
        *leaves, lengths_q, lengths_q if lengths_k is None else lengths_k, causal
    )
    expected_grads = torch.autograd.grad((expected * weight).sum(), leaves)

    names = ("out", "q.grad", "k.grad", "v.grad")
    ends = (real_q, real_q, real_k, real_k)
    for name, end, a, e in zip(
        names, ends, (out, *actual_grads), (expected, *expected_grads), strict=True
    ):
        error = (a[:end].to(precise) - e).abs().max().item()
        limit = tolerance * max(1.0, e.abs().max().item())
        assert error <= limit, f"{name}: error {error:.3g} exceeds {limit:.3g}"
        if name != "out":
            assert not a[end:].any(), f"{name} reaches padding"


SELF_LENGTHS = [
    (1,),
    (7,),
    (1, 1, 1),  # with a padding as long as an example, and yet of no group
    (3, 3, 3, 3),  # one group
    (5, 2, 5, 1, 9),  # no two alike
    (2, 2, 6, 6, 6, 2, 1, 1),  # groups, unsorted
    tuple(range(1, 9)),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 6])
@pytest.mark.parametrize("lengths", SELF_LENGTHS)
def test_self_attention(lengths, padding, causal):
    check(lengths, padding_q=padding, causal=causal)
    check(lengths, padding_q=padding, causal=causal, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("padding", [(0, 0), (3, 5), (1, 4)])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ((1, 1, 1, 1), (4, 4, 4, 4)),
        ((1, 1, 1, 1, 1), (3, 3, 9, 1, 1)),  # pooling: one query over segments of any length
        ((2, 2, 2, 5), (3, 4, 4, 4)),  # groups that begin and end apart
        ((6, 1), (1, 6)),
        ((1,), (1,)),
    ],
)
def test_cross_attention(lengths_q, lengths_k, padding):
    options = {"padding_q": padding[0], "padding_k": padding[1]}
    check(lengths_q, lengths_k, **options)
    check(lengths_q, lengths_k, **options, dtype=torch.float32, tolerance=1e-5)


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 5), st.booleans(), st.integers(0, 2**31))
def test_any_segments(lengths, padding, causal, seed):
    check(lengths, padding_q=padding, causal=causal, seed=seed)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8),
    st.sampled_from([(0, 0), (1, 1), (2, 3)]),
    st.integers(0, 2**31),
)
def test_any_cross_segments(lengths, padding, seed):
    lengths_q, lengths_k = zip(*lengths, strict=True)
    check(lengths_q, lengths_k, padding_q=padding[0], padding_k=padding[1], seed=seed)


@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_in_float32_beside_half_precision_values(causal):
    segments = Segments.from_lengths([3, 3, 5, 1], padding=2)
    q, k, v = (torch.randn(14, HEADS, WIDTH, requires_grad=True) for _ in range(3))
    half = v.detach().bfloat16().requires_grad_()
    out = segment_attention(q, k, half, segments, segments, causal=causal)
    assert out.dtype == torch.bfloat16
    rounded = half.detach().float().requires_grad_()
    expected = segment_attention(q, k, rounded, segments, segments, causal=causal)
    assert torch.equal(out, expected.bfloat16())
    weight = torch.randn_like(out)
    actual_grads = torch.autograd.grad((out * weight).sum(), (q, k, half))
    grads = torch.autograd.grad((expected * weight.float()).sum(), (q, k, rounded))
    for actual, grad, dtype in zip(
        actual_grads, grads, (torch.float32, torch.float32, torch.bfloat16), strict=True
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, grad.to(dtype))


def test_equal_segments_in_two_objects_are_the_same_segments():
    check((3, 3, 2), (3, 3, 2), padding_q=2, padding_k=2, causal=True)


def test_one_probe_may_be_shared_by_all_examples():
    lengths = (4, 4, 2)
    probe = torch.randn(1, HEADS, WIDTH, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, sum(lengths), HEADS, WIDTH, dtype=torch.float64)
    expanded = probe.expand(len(lengths), -1, -1)
    singles = Segments.singles(len(lengths), "cpu")
    out = segment_attention(expanded, k, v, singles, Segments.from_lengths(lengths))
    expected = dense_attention(expanded, k, v, (1, 1, 1), lengths, causal=False)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.sin().sum(), probe)
    (expected_grad,) = torch.autograd.grad(expected.sin().sum(), probe)
    torch.testing.assert_close(grad, expected_grad)


def test_neighbours_and_padding_do_not_change_a_single_bit():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 12, HEADS, WIDTH, generator=generator)
    segments = Segments.from_lengths([2, 5, 3], padding=2)
    before = segment_attention(q, k, v, segments, segments)[2:7]
    for x in (q, k, v):
        x[:2], x[7:] = 1e4, torch.nan
    assert torch.equal(segment_attention(q, k, v, segments, segments)[2:7], before)


def test_different_numbers_of_examples_are_refused():
    x = torch.zeros(4, HEADS, WIDTH)
    with pytest.raises(ValueError, match="2 query segments against 1 key ones"):
        segment_attention(x, x, x, Segments.from_lengths([2, 2]), Segments.from_lengths([4]))


@pytest.mark.parametrize("padding", [(1, 0), (0, 1)])
def test_padding_on_one_side_only_is_refused(padding):
    q, k = (torch.zeros(4 + spare, HEADS, WIDTH) for spare in padding)
    segments_q, segments_k = (Segments.from_lengths([4], padding=spare) for spare in padding)
    with pytest.raises(ValueError, match="padding on one side only"):
        segment_attention(q, k, k, segments_q, segments_k)


CUDA_OPTIONS = {"device": "cuda", "dtype": torch.bfloat16, "tolerance": 2e-2, "width": 64}


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the variable-length kernel needs a CUDA device"
)
class TestCuda:
    """bfloat16 on the variable-length kernel against the dense reference in float32."""

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("padding", [0, 1, 100])
    @pytest.mark.parametrize("lengths", [*SELF_LENGTHS, (196, 64, 64, 1, 129, 257)])
    def test_self_attention(self, lengths, padding, causal):
        check(lengths, padding_q=padding, causal=causal, **CUDA_OPTIONS)

    @pytest.mark.parametrize("padding", [0, 7])
    @pytest.mark.parametrize("lengths_k", [(4, 4, 4), (1, 130, 64, 64, 257), (1,)])
    def test_one_query_per_segment(self, lengths_k, padding):
        lengths_q = (1,) * len(lengths_k)
        check(lengths_q, lengths_k, padding_q=padding, padding_k=padding, **CUDA_OPTIONS)

    def test_float32_takes_the_other_backend(self):
        options = CUDA_OPTIONS | {"dtype": torch.float32, "tolerance": 1e-3}
        check((5, 5, 1, 40), padding_q=3, causal=True, **options)
