"""The encoder and the pooling heads against slow arithmetic, see `encoder_cases`.

`test_towers.py` shows that packing changes nothing.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from encoder_cases import (
    SMALL,
    double,
    encode,
    every_pooling,
    every_switch,
    pool,
    rotate,
)
from packed_examples import randomise
from torch import Tensor

from navit_clip.models.pooling import build_pooling
from navit_clip.models.rope import Rotary
from navit_clip.models.transformer import Encoder, EncoderConfig, SegmentAttention
from navit_clip.packed.segments import Segments


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@every_switch
@pytest.mark.parametrize("padding", [0, 3])
def test_encoder(config, padding):
    encoder = double(Encoder(config))
    segments = Segments.from_lengths([3, 3, 1, 5], padding=padding)
    x = torch.randn(segments.num_tokens, config.width, dtype=torch.float64)
    actual = encoder(x, segments).split(list(segments.lengths))
    parts = x.split(list(segments.lengths))
    for example in range(segments.num_examples):
        torch.testing.assert_close(actual[example], encode(parts[example], encoder))


@every_switch
def test_gradients_stay_within_their_segment(config):
    encoder = double(Encoder(config))
    segments = Segments.from_lengths([3, 4, 2], padding=2)
    x = torch.randn(segments.num_tokens, config.width, dtype=torch.float64, requires_grad=True)
    alone = x.detach()[3:7].requires_grad_()
    weight = torch.randn(4, config.width, dtype=torch.float64)
    (encoder(x, segments)[3:7] * weight).sum().backward()
    (encode(alone, encoder) * weight).sum().backward()
    torch.testing.assert_close(x.grad[3:7], alone.grad)
    assert not x.grad[:3].any()
    assert not x.grad[7:].any()


@every_switch
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_stream_in_chunks_gives_what_it_gives_whole(config, padding, recompute, monkeypatch):
    encoder = double(Encoder(config))
    encoder.activation_checkpointing = recompute
    lengths = [3, 3, 1, 7, 5, 2]
    x = torch.randn(sum(lengths) + padding, config.width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sum(lengths), config.width, dtype=torch.float64)

    def run() -> tuple[Segments, list[Tensor]]:
        segments = Segments.from_lengths(lengths, padding=padding)
        y = encoder(x, segments)[: sum(lengths)]
        return segments, [y, *torch.autograd.grad((y * weight).sum(), [x, *encoder.parameters()])]

    whole, expected = run()
    monkeypatch.setattr("navit_clip.packed.segments.CHUNK_TOKENS", 6)
    monkeypatch.setattr("navit_clip.models.transformer._UNCHUNKED_ELEMENTS", 0)
    cut, actual = run()
    assert "chunks" not in vars(whole)
    assert [chunk.num_real_tokens for chunk in cut.chunks] == [6, 1, 7, 5, 2]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def block_by_block(encoder: Encoder, x: Tensor, segments: Segments) -> Tensor:
    """Each block over all chunks before the next block."""
    chunks = encoder.pre_norm(x).split([chunk.num_tokens for chunk in segments.chunks])
    for block in encoder.blocks:
        chunks = [block(chunk, s) for chunk, s in zip(chunks, segments.chunks, strict=True)]
    return encoder.norm(torch.cat(chunks))


@every_switch
@pytest.mark.parametrize("recompute", [False, True])
def test_the_order_of_blocks_and_chunks_changes_no_bit(config, recompute, monkeypatch):
    monkeypatch.setattr("navit_clip.packed.segments.CHUNK_TOKENS", 6)
    monkeypatch.setattr("navit_clip.models.transformer._UNCHUNKED_ELEMENTS", 0)
    encoder = Encoder(config)
    randomise(encoder, seed=0, std=0.3)
    encoder.activation_checkpointing = recompute
    segments = Segments.from_lengths([3, 3, 1, 7, 5, 2], padding=3)
    x = torch.randn(segments.num_tokens, config.width, requires_grad=True)
    weight = torch.randn(segments.num_real_tokens, config.width)

    def run(encode_stream) -> list[Tensor]:
        y = encode_stream(x, segments)[: segments.num_real_tokens]
        return [y, *torch.autograd.grad((y * weight).sum(), [x, *encoder.parameters()])]

    expected = run(lambda x, segments: block_by_block(encoder, x, segments))
    for a, e in zip(run(encoder), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("each_head", [False, True])
def test_rotary_turns_each_pair_of_dimensions(each_head):
    heads, width = 3, 6
    x = torch.randn(5, heads, width, dtype=torch.float64)
    positions = torch.randn(5, 2, dtype=torch.float64)
    speeds = torch.randn(2, heads if each_head else 1, width // 2, dtype=torch.float64)
    (actual,) = Rotary(positions, speeds).rotate(x)
    for head in range(heads):
        angles = positions @ speeds[:, head * each_head]
        torch.testing.assert_close(actual[:, head], rotate(x[:, head], angles))


@every_switch
@pytest.mark.parametrize("chunk_tokens", [6, 2048])
def test_rotary_makes_an_encoder_see_differences_of_positions(config, chunk_tokens, monkeypatch):
    monkeypatch.setattr("navit_clip.packed.segments.CHUNK_TOKENS", chunk_tokens)
    monkeypatch.setattr("navit_clip.models.transformer._UNCHUNKED_ELEMENTS", 0)
    encoder = double(Encoder(config))
    segments = Segments.from_lengths([3, 3, 1, 7], padding=2)
    x = torch.randn(segments.num_tokens, config.width, dtype=torch.float64)
    position = torch.randint(50, (segments.num_tokens, 1), dtype=torch.float64)
    speeds = torch.tensor([[[1.0, 0.1]]], dtype=torch.float64)

    def encode_at(position: Tensor) -> Tensor:
        rotary = [Rotary(position, speeds)] * config.depth
        return encoder(x, segments, rotary)[: segments.num_real_tokens]

    expected = encode_at(position)
    # Each segment moved as a whole, by a distance of its own.
    torch.testing.assert_close(encode_at(position + 10 * segments.ids[:, None]), expected)
    moved = encode_at(position + torch.arange(len(position))[:, None])
    assert (moved - expected).abs().max() > 1e-3
    torch.testing.assert_close(
        encode_at(torch.zeros_like(position)), encoder(x, segments)[: segments.num_real_tokens]
    )


def test_causal_tokens_see_only_what_stands_before_them():
    encoder = double(Encoder(EncoderConfig(**SMALL, causal=True)))
    segments = Segments.from_lengths([5, 4])
    x = torch.randn(9, 8, dtype=torch.float64)
    before = encoder(x, segments)
    for token in range(9):
        changed = x.clone()
        changed[token] += 1
        moved = (encoder(changed, segments) != before).any(-1).nonzero().flatten().tolist()
        assert moved == list(range(token, 5 if token < 5 else 9))


@every_pooling
@pytest.mark.parametrize("padding", [0, 3])
@every_switch
def test_pooling(pooling, padding, config):
    module = double(build_pooling(pooling, config))
    segments = Segments.from_lengths([1, 3, 3, 6, 1], padding=padding)
    x = torch.randn(segments.num_tokens, config.width, dtype=torch.float64)
    x[segments.num_real_tokens :] = torch.nan  # never read
    x.requires_grad_()
    actual = module(x, segments)
    parts = x.split(list(segments.lengths))[: segments.num_examples]
    expected = torch.stack([pool(part, module, pooling, config) for part in parts])
    torch.testing.assert_close(actual, expected)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad((actual * weight).sum(), x)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(grad, expected_grad)
    assert not grad[segments.num_real_tokens :].any()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="CUDA adds in half precision, CPUs do not"
            ),
        ),
    ],
)
def test_mean_of_a_long_segment_in_half_precision(device):
    # A running sum of ones in bfloat16 stops growing at 256.
    x = torch.ones(3000, 4, dtype=torch.bfloat16, device=device)
    module = build_pooling("mean", EncoderConfig(**SMALL))
    assert module(x, Segments.from_lengths([3000], device=device)).tolist() == [[1.0] * 4]


def test_parameters_of_the_paper_have_no_bias_in_qkv_and_norms():
    width, depth, heads, hidden = 12, 3, 2, 48
    config = EncoderConfig(width, depth, heads)
    shapes = {name: tuple(p.shape) for name, p in Encoder(config).named_parameters()}
    block = {
        "attention_norm.weight": (width,),
        "attention.qkv.weight": (3 * width, width),
        "attention.out.weight": (width, width),
        "attention.out.bias": (width,),
        "attention.q_norm.weight": (width // heads,),
        "attention.k_norm.weight": (width // heads,),
        "mlp_norm.weight": (width,),
        "mlp.up.weight": (hidden, width),
        "mlp.up.bias": (hidden,),
        "mlp.down.weight": (width, hidden),
        "mlp.down.bias": (width,),
    }
    expected = {f"blocks.{i}.{k}": v for i in range(depth) for k, v in block.items()}
    assert shapes == expected | {"norm.weight": (width,)}
    assert sum(p.numel() for p in Encoder(config).parameters()) == (
        depth * (4 * width**2 + 2 * width * hidden + 4 * width + hidden + 2 * width // heads)
        + width
    )


@pytest.mark.parametrize(
    ("qk_norm", "qkv_bias", "norm_bias", "mlp_bias"),
    list(itertools.product((False, True), repeat=4)),
)
def test_switches_add_exactly_their_parameters(qk_norm, qkv_bias, norm_bias, mlp_bias):
    config = EncoderConfig(
        8, 1, 2, qk_norm=qk_norm, qkv_bias=qkv_bias, norm_bias=norm_bias, mlp_bias=mlp_bias
    )
    names = {name for name, _ in Encoder(config).named_parameters()}
    assert ("blocks.0.attention.q_norm.weight" in names) == qk_norm
    assert ("blocks.0.attention.k_norm.weight" in names) == qk_norm
    assert ("blocks.0.attention.qkv.bias" in names) == qkv_bias
    biases = {name for name in names if name.endswith("norm.bias")}
    assert len(biases) == norm_bias * (3 + 2 * qk_norm)
    for layer in ("attention.out", "mlp.up", "mlp.down"):
        assert (f"blocks.0.{layer}.bias" in names) == mlp_bias


def test_matrices_of_a_stack_start_as_if_each_were_alone():
    attention_layer = SegmentAttention(EncoderConfig(width=64, heads=2))
    limit = math.sqrt(6 / (64 + 64))
    for matrix in attention_layer.qkv.weight.detach().chunk(3):
        assert matrix.abs().max() <= limit
        assert np.isclose(matrix.std().item(), limit / math.sqrt(3), rtol=0.05)
