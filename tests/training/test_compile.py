"""Compiled blocks: the same results, and nothing compiled again when only the content changes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from packed_examples import random_caption, random_image
from step_cases import new_stepper, rotary, tiny_config, with_task
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._subclasses.fake_tensor import FakeTensorMode

from navit_clip.data.builders.pairs import PairInputs
from navit_clip.data.shared_batch import SharedBatch
from navit_clip.models.rope import Rotary
from navit_clip.models.transformer import Encoder, EncoderConfig, compiled_block
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.packed.images import pack_images
from navit_clip.packed.segments import CHUNK_TOKENS, Segments
from navit_clip.packed.texts import pack_texts
from navit_clip.tasks.locking import LockConfig
from navit_clip.training.parallel import ParallelConfig

COMPILED = ParallelConfig(compile=True)
WARM_UP, STEPS = 3, 24


def has_compiler() -> bool:
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    # Past the limit, blocks would silently run uncompiled.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        torch._dynamo.reset()
        counters.clear()
        yield
    torch._dynamo.reset()


@pytest.fixture
def without_kernels(monkeypatch):
    """Traces and guards as always, but generates no code, which takes most of the time."""
    backend = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr("navit_clip.models.transformer.torch.compile", backend)
    compiled_block.cache_clear()
    yield
    compiled_block.cache_clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def varied_batch(seed: int) -> Batch[PairInputs]:
    """1 to 15 pairs, padded to a budget; images of 1 to 25 patches, captions of 1 to 7 tokens.

    As it arrives from a data worker, since the compiler's guards also see how tensors lie.
    """
    rng = np.random.default_rng(seed)
    pairs = 1 if seed % 7 == 0 else int(rng.integers(1, 16))
    images = [
        random_image(100 * seed + i, (int(r), int(c)))
        for i, (r, c) in enumerate(rng.integers(1, 6, (pairs, 2)))
    ]
    captions = [
        random_caption(100 * seed + i, int(n)) for i, n in enumerate(rng.integers(1, 8, pairs))
    ]
    batch = Batch(
        PairInputs(pack_images(images, budget=400), pack_texts(captions, budget=120)),
        tuple(map(str, range(pairs))),
        BatchCounts(pairs),
    )
    received: Batch[PairInputs] = ForkingPickler.loads(ForkingPickler.dumps(SharedBatch(batch)))
    return received


def compiled_late(step: Callable[[int], object]) -> int:
    """Graphs compiled after the first steps."""
    for number in range(WARM_UP):
        step(number)
    early = graphs()
    assert early > 0, "nothing was compiled at all"
    for number in range(WARM_UP, STEPS):
        step(number)
    return graphs() - early


MODEL = tiny_config().task.model
UNLIKE = replace(
    MODEL,
    text=replace(MODEL.text, encoder=replace(MODEL.text.encoder, width=24, causal=True)),
    image=replace(MODEL.image, pooling="cls", registers=2),
)
CASES = {
    "padded": {},
    "unlike rotary towers, one locked in part, micro-batches": {
        "lock": LockConfig(image=True, image_unlocked_blocks=1),
        "accumulate": 2,
        "precision": "bf16",
    },
}


@pytest.mark.parametrize(
    "case", ["padded", *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != "padded")]
)
def test_nothing_is_compiled_after_the_third_step(case, without_kernels):
    config = tiny_config(steps=1000, parallel=COMPILED, **CASES[case])
    if "unlike" in case:
        config = rotary(with_task(config, model=UNLIKE))
    stepper = new_stepper(config)

    def step(number: int) -> None:
        seeds = range(number * config.accumulate, (number + 1) * config.accumulate)
        stepper.step([varied_batch(seed) for seed in seeds], number)

    assert compiled_late(step) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_all_blocks_of_a_tower_are_one_graph_for_any_content(packed, without_kernels):
    rng = np.random.default_rng(0)
    encoder = Encoder(EncoderConfig(width=16, depth=3, heads=2))
    encoder.compile_blocks()
    if packed:
        encoder.pack_attention()
    for _ in range(200):
        lengths = sorted(rng.integers(1, 20, rng.integers(1, 9)).tolist())
        segments = Segments.from_lengths(lengths, padding=160 - sum(lengths))
        x_TC = torch.randn(160, 16, requires_grad=True)
        encoder(x_TC, segments).sum().backward()
    assert graphs() == 1


def test_streams_of_any_length_are_one_graph_more(without_kernels):
    encoder = Encoder(EncoderConfig(width=16, depth=2, heads=2))
    encoder.compile_blocks()
    for tokens in (40, 39, 17, 40, 100, 63, 40):
        segments = Segments.from_lengths([3] * (tokens // 3), padding=tokens % 3)
        encoder(torch.randn(tokens, 16, requires_grad=True), segments).sum().backward()
    assert graphs() == 2


def test_a_run_past_the_limit_of_compilations_says_so_and_goes_on(without_kernels):
    plain, encoder = (Encoder(EncoderConfig(width=16, depth=1, heads=2)) for _ in range(2))
    encoder.load_state_dict(plain.state_dict())
    encoder.compile_blocks()
    segments, x_TC = Segments.from_lengths([3, 5]), torch.randn(8, 16)
    with torch._dynamo.config.patch(recompile_limit=1):
        encoder(x_TC, segments)
        with torch.no_grad(), pytest.warns(UserWarning, match="uncompiled from now on"):
            found = encoder(x_TC, segments)
    torch.testing.assert_close(found, plain(x_TC, segments))


@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler here")
@torch._inductor.config.patch(compile_threads=1)  # processes of its own would take seconds more
@torch.no_grad()  # those of the backward pass take as long again to build
@pytest.mark.parametrize(("packed", "turned"), [(False, True), (True, False)])
def test_compiled_kernels_agree_and_are_built_once(packed, turned):
    torch.manual_seed(0)
    config = EncoderConfig(width=16, depth=2, heads=2)
    compiled, plain = Encoder(config), Encoder(config)
    plain.load_state_dict(compiled.state_dict())
    compiled.compile_blocks()
    if packed:
        compiled.pack_attention()

    def step(number: int) -> None:
        segments = varied_batch(number).inputs.images.segments
        x_TC = torch.randn(segments.num_tokens, 16)
        real = segments.num_real_tokens
        rotation = Rotary(torch.randn(segments.num_tokens, 2), torch.randn(2, 2, 4))
        turns = [rotation] * config.depth if turned else ()
        found, expected = (encoder(x_TC, segments, turns)[:real] for encoder in (compiled, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    assert compiled_late(step) == 0


def test_compiled_blocks_read_the_stream_in_one_piece(without_kernels, monkeypatch):
    # Chunks, in which an uncompiled encoder reads it on a CPU, would be other shapes to them.
    monkeypatch.setattr("navit_clip.models.transformer._UNCHUNKED_ELEMENTS", 0)
    config = EncoderConfig(width=8, depth=1, heads=2)
    for compiled in (True, False):
        encoder = Encoder(config)
        if compiled:
            encoder.compile_blocks()
        segments = Segments.from_lengths([CHUNK_TOKENS // 2] * 5)
        encoder(torch.zeros(segments.num_tokens, 8), segments).sum().backward()
        assert ("chunks" in vars(segments)) is not compiled


# torch 2.11 calls methods of tensors without content by another way, which it cannot trace.
@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 12), reason="see above"
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_tower_on_cuda_is_one_graph_too(packed, without_kernels):
    encoder_config = EncoderConfig(width=128, depth=2, heads=2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
            encoder = Encoder(encoder_config)
            encoder.compile_blocks()
            if packed:
                encoder.pack_attention()
            for lengths in ([3, 3, 140], [3, 4, 5, 60], [200]):
                padding = 200 - sum(lengths)
                segments = Segments.from_lengths(lengths, padding=padding, device="cuda")
                assert encoder(torch.randn(200, 128), segments).is_cuda
    finally:
        torch.set_default_dtype(torch.float32)
    assert graphs() == 1
