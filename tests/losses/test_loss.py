"""The contrastive losses in one process against a full float64 matrix."""

import math
import shutil
from functools import cache

import pytest
import torch
import torch._dynamo.utils
import torch.nn.functional as F
from contrastive_reference import KINDS, assert_agree, chunked, random_features, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.losses import _tiles as tiles
from navit_clip.losses.contrastive import sigmoid_contrastive_loss, softmax_contrastive_loss

pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 6, 11, 12, 13, 1024])
def test_float64_equals_full_matrix_for_any_chunk(kind, chunk_size):
    image, text = random_features(12, 7, seed=0)
    expected = reference(kind, image, text, 20.0, -10.0)
    assert_agree(chunked(kind, image, text, 20.0, -10.0, chunk_size=chunk_size), expected, 1e-9)


@pytest.mark.parametrize("scale", [0.0, 1.0, 14.3, 100.0])
def test_float32_equals_full_matrix(kind, scale):
    image, text = random_features(150, 32, seed=1, dtype=torch.float32)
    expected = reference(kind, image, text, scale, -10.0)
    actual = chunked(kind, image, text, scale, -10.0, chunk_size=64)
    assert actual.loss.dtype == actual.image.dtype == torch.float32
    assert_agree(actual, expected, 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 17),
    width=st.integers(1, 9),
    chunk_size=st.integers(1, 20),
    scale=st.floats(-5, 100),
    bias=st.floats(-20, 20),
    seed=st.integers(0, 2**31),
    normalise=st.booleans(),
)
def test_any_shape_and_scale(kind, n, width, chunk_size, scale, bias, seed, normalise):
    image, text = random_features(n, width, seed, normalise=normalise)
    expected = reference(kind, image, text, scale, bias)
    actual = chunked(kind, image, text, scale, bias, chunk_size=chunk_size)
    assert_agree(actual, expected, 1e-6)


def test_one_pair(kind):
    image, text = random_features(1, 5, seed=2)
    actual = chunked(kind, image, text, 100.0, -10.0)
    assert_agree(actual, reference(kind, image, text, 100.0, -10.0), 1e-9)
    if kind == "softmax":
        assert actual.loss == 0
        assert not actual.image.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_large_logits_stay_finite(kind, dtype):
    image, text = random_features(40, 64, seed=3, dtype=dtype, normalise=False)
    expected = reference(kind, image, text, 100.0, -10.0)  # logits of thousands
    actual = chunked(kind, image, text, 100.0, -10.0, chunk_size=16)
    assert_agree(actual, expected, 1e-2 if dtype.itemsize == 2 else 1e-4)


def test_row_maxima_far_apart(kind):
    """Rows whose largest logit is hundreds below the tile's underflow under a shared shift."""
    image, text = random_features(8, 4, seed=4, dtype=torch.float32)
    image[::2] *= 1e-3
    expected = reference(kind, image, text, 2000.0, 0.0)
    assert_agree(chunked(kind, image, text, 2000.0, 0.0, chunk_size=8), expected, 1e-4)


def test_duplicate_features(kind):
    image = torch.ones(10, 4, dtype=torch.float64) / 2
    actual = chunked(kind, image, image, 100.0, -10.0, chunk_size=3)
    assert_agree(actual, reference(kind, image, image, 100.0, -10.0), 1e-9)
    if kind == "softmax":
        assert actual.loss.item() == pytest.approx(math.log(10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_accumulated_in_float32(kind, dtype):
    image, text = random_features(130, 48, seed=5, dtype=dtype)
    expected = reference(kind, image, text, 30.0, -10.0)
    actual = chunked(kind, image, text, 30.0, -10.0, chunk_size=50)
    assert actual.loss.dtype == torch.float32
    assert actual.image.dtype == actual.text.dtype == dtype
    assert_agree(actual._replace(image=expected.image, text=expected.text), expected, 1e-5)
    # What is left is the rounding of the gradients themselves to the features' dtype.
    assert_agree(actual, expected, torch.finfo(dtype).eps)


def errors(actual, expected):
    """Relative to the largest entry of each tensor; the loss's first."""
    return [
        ((a.double() - e).abs().max() / e.abs().max()).item()
        for a, e in zip(actual, expected, strict=True)
        if e.any()  # the softmax loss has no bias
    ]


def test_float32_sums_are_more_exact_than_bfloat16_ones(kind, monkeypatch):
    image, text = random_features(300, 64, seed=10, dtype=torch.bfloat16)
    arguments = (kind, image, text, 30.0, -10.0)
    expected = reference(*arguments)
    in_float32 = errors(chunked(*arguments, chunk_size=64), expected)
    monkeypatch.setattr(tiles, "logit_dtype", lambda features: features.dtype)
    in_bfloat16 = errors(chunked(*arguments, chunk_size=64), expected)
    assert max(in_float32) < 1e-2
    for float32, bfloat16 in zip(in_float32, in_bfloat16, strict=True):
        assert bfloat16 > 3 * float32


def multiply_bfloat16(monkeypatch):
    """Products as CUDA computes them from bfloat16 operands: exact, summed up in float32."""
    monkeypatch.setattr(tiles, "operand_dtype", lambda features: torch.bfloat16)
    monkeypatch.setattr(tiles, "multiply", lambda a, b, out: out.copy_(a.float() @ b.float()))
    monkeypatch.setattr(tiles, "accumulate", lambda total, a, b: total.add_(a.float() @ b.float()))


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_bfloat16_operands(kind, scale, monkeypatch):
    image, text = random_features(200, 64, seed=11, dtype=torch.bfloat16)
    multiply_bfloat16(monkeypatch)
    actual = chunked(kind, image, text, scale, -10.0, chunk_size=64)
    assert_agree(actual, reference(kind, image, text, scale, -10.0), 1e-2)


def compile_with(monkeypatch, backend):
    """Compiles the steps on this device; without a graph break, which fullgraph makes an error."""

    @cache
    def compiled(step):
        return torch.compile(step, fullgraph=True, dynamic=False, backend=backend)

    torch.compiler.reset()
    monkeypatch.setattr(tiles, "is_fused", lambda device: True)
    monkeypatch.setattr(tiles, "_compiled", compiled)


def check_compiled(kind, n, chunk_size, scale=20.0, dtype=torch.float32, tolerance=1e-5):
    image, text = random_features(n, 7, seed=12, dtype=dtype)
    actual = chunked(kind, image, text, scale, -10.0, chunk_size=chunk_size)
    assert_agree(actual, reference(kind, image, text, scale, -10.0), tolerance)


def test_compiled_tiles_equal_the_full_matrix(kind, monkeypatch):
    compile_with(monkeypatch, "aot_eager")
    for n, chunk_size in ((1, 8), (5, 16), (12, 4), (13, 8)):
        for scale in (20.0, 0.0, -3.0):
            check_compiled(kind, n, chunk_size, scale)


def test_other_numbers_of_pairs_compile_nothing_new(kind, monkeypatch):
    compile_with(monkeypatch, "aot_eager")
    compiled = []
    for n in (12, 13, 16, 9, 25, 40):
        check_compiled(kind, n, chunk_size=8)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(compiled)) == 1


def test_compiled_bfloat16_operands(kind, monkeypatch):
    compile_with(monkeypatch, "aot_eager")
    multiply_bfloat16(monkeypatch)
    check_compiled(kind, 13, 8, dtype=torch.bfloat16, tolerance=1e-2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor(kind, monkeypatch):
    compile_with(monkeypatch, "inductor")
    check_compiled(kind, 13, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 700, 2500])
def test_every_path_of_cuda_equals_the_full_matrix(kind, dtype, n, monkeypatch):
    image, text = random_features(n, 128, seed=13, dtype=dtype)
    expected = reference(kind, image, text, 30.0, -10.0)
    for fused, kernels in ((True, True), (True, False), (False, False)):
        if kernels and dtype != torch.bfloat16:
            continue
        monkeypatch.setattr(tiles, "is_fused", lambda device, fused=fused: fused)
        monkeypatch.setattr(tiles, "has_kernels", lambda features, kernels=kernels: kernels)
        on_device = chunked(kind, image.cuda(), text.cuda(), 30.0, -10.0, chunk_size=1024)
        actual = type(on_device)(*(x.cpu() for x in on_device))
        assert_agree(actual, expected, 1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_four_products_per_pair_of_pairs(kind):
    """docs/scaling.md: logits, logits again, and the gradients of images and texts."""
    n, width = 40, 8
    image, text = random_features(n, width, seed=14, dtype=torch.float32)

    def in_place_addmm(total, a, b, out_shape):
        return 2 * a[0] * a[1] * b[1]

    # The counter knows addmm, but not its in-place form.
    custom = {torch.ops.aten.addmm_: in_place_addmm}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        chunked(kind, image, text, 10.0, -10.0, chunk_size=16)
    assert counter.get_total_flops() == 4 * 2 * n * n * width


def test_autocast_changes_nothing(kind):
    image, text = random_features(60, 32, seed=6, dtype=torch.float32)
    expected = chunked(kind, image, text, 50.0, -10.0, chunk_size=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = chunked(kind, image, text, 50.0, -10.0, chunk_size=32)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


class RecordProducts(TorchDispatchMode):
    """Dtypes of (first operand, result) of each matrix product."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes.add((args[-2 if "dtype" in func._overloadname else -1].dtype, result.dtype))
        return result


@pytest.mark.parametrize(
    ("dtype", "autocast", "multiplied"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
        (torch.bfloat16, None, torch.bfloat16),
    ],
)
def test_cuda_multiplies_bfloat16_under_autocast(kind, dtype, autocast, multiplied, monkeypatch):
    monkeypatch.setattr(tiles, "is_fused", lambda device: False)
    monkeypatch.setattr(tiles, "has_kernels", lambda features: False)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    loss = softmax_contrastive_loss if kind == "softmax" else sigmoid_contrastive_loss
    with FakeTensorMode(), RecordProducts() as products:
        image, text = torch.empty(2, 10, 4, dtype=dtype, device="cuda")
        scalars = torch.empty(1 if kind == "softmax" else 2, device="cuda")
        torch.set_autocast_enabled("cuda", autocast is not None)
        torch.set_autocast_dtype("cuda", autocast or before[1])
        try:
            result = loss(image, text, *scalars.unbind())
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
    wide = torch.promote_types(dtype, torch.float32)
    assert products.dtypes == {(multiplied, wide)}
    assert result.dtype == wide


def test_gradients_scale_with_the_loss(kind):
    image, text = random_features(9, 5, seed=7)
    expected = reference(kind, image, text, 10.0, -5.0)
    expected = expected._replace(**{k: 3 * v for k, v in expected._asdict().items() if k != "loss"})
    assert_agree(chunked(kind, image, text, 10.0, -5.0, factor=3.0), expected, 1e-9)


def test_gradients_reach_through_normalisation_and_exp(kind):
    """Leaves as a model has them: raw features, log scale of shape [1], strided text."""
    raw_image = torch.randn(2, 6, 5, dtype=torch.float64)[:, :, :4].requires_grad_()
    log_scale = torch.tensor([math.log(10.0)], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)

    def loss(raw_image_2ED, log_scale, bias):
        image, text = F.normalize(raw_image_2ED, dim=-1)
        if kind == "softmax":
            return softmax_contrastive_loss(image, text, log_scale.exp(), chunk_size=4)
        return sigmoid_contrastive_loss(image, text, log_scale.exp(), bias, chunk_size=4)

    assert torch.autograd.gradcheck(loss, (raw_image, log_scale, bias))


def test_features_that_need_no_gradient(kind):
    image, text = random_features(6, 4, seed=8)
    text.requires_grad_()
    scale, bias = torch.tensor(10.0), torch.tensor(0.0)
    if kind == "softmax":
        softmax_contrastive_loss(image, text, scale).backward()
    else:
        sigmoid_contrastive_loss(image, text, scale, bias).backward()
    assert_agree(
        reference(kind, image, text, 10.0, 0.0)._replace(text=text.grad),
        reference(kind, image, text, 10.0, 0.0),
        1e-6,
    )


def test_never_holds_more_than_a_tile_of_logits(kind):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    n, width, chunk_size = 128, 4, 16
    image, text = random_features(n, width, seed=9)
    with Watch():
        chunked(kind, image, text, 10.0, 0.0, chunk_size=chunk_size)
    # float64; both buffers are one allocation.
    assert largest <= 8 * max(2 * chunk_size**2, 2 * n * width)
    assert largest < 8 * n * n // 8


def test_default_tiles_take_no_more_memory_than_many_features(kind):
    sides = [tiles.default_chunk_size(torch.empty(n, 512)) for n in (10, 8192, 16384, 65536, 10**6)]
    assert sides == [1024, 1024, 2048, 4096, 4096]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(4, 5)}, "must both be"),
        ({"image": torch.zeros(3)}, "must both be"),
        ({"image": torch.zeros(3, 5, dtype=torch.int64)}, "floating point"),
        ({"image": torch.zeros(3, 5, device="meta")}, "one device"),
        ({"image": torch.zeros(0, 5), "text": torch.zeros(0, 5)}, "at least one pair"),
        ({"scale": torch.ones(2)}, "logit_scale"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"counts": (3, 3)}, "counts must be the pairs of 1 ranks"),
        ({"counts": (2,)}, "3 of them on rank 0"),
    ],
)
def test_mistakes_are_named(kind, change, message):
    arguments = {"image": torch.zeros(3, 5), "text": torch.zeros(3, 5), "scale": torch.tensor(1.0)}
    arguments |= {"chunk_size": 8, "counts": None} | change
    tensors = [arguments[k] for k in ("image", "text", "scale")]
    if kind == "sigmoid":
        tensors.append(torch.tensor(0.0))
    loss = softmax_contrastive_loss if kind == "softmax" else sigmoid_contrastive_loss
    with pytest.raises(ValueError, match=message):
        loss(*tensors, chunk_size=arguments["chunk_size"], counts=arguments["counts"])
