"""Stochastic depth in packed streams: what is drawn, and what the encoder makes of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hierarchical_cases import tower_config
from packed_examples import random_image, randomise
from torch import Tensor

from navit_clip.models.drop_path import draw_drop_path
from navit_clip.models.image_tower import ImageTower
from navit_clip.models.transformer import Encoder, EncoderConfig, compiled_block
from navit_clip.packed.images import pack_images
from navit_clip.packed.segments import Segments

LENGTHS = [1, 2, 3, 3, 5, 7]
RATE = 0.6


def new_encoder() -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(width=8, depth=3, heads=2))
    randomise(encoder, 0, std=0.3)
    encoder.drop_path = RATE
    return encoder.double()


def stream(padding: int = 0) -> tuple[Tensor, Segments]:
    segments = Segments.from_lengths(LENGTHS, padding=padding)
    torch.manual_seed(1)
    return torch.randn(40, 8, dtype=torch.float64)[: segments.num_tokens], segments


def results(encoder: Encoder, x_TC: Tensor, segments: Segments) -> list[Tensor]:
    """Output, and gradients of input and weights."""
    torch.manual_seed(2)
    x_TC = x_TC.clone().requires_grad_()
    y_TC = encoder(x_TC, segments)[: segments.num_real_tokens]
    return [y_TC.detach(), *torch.autograd.grad(y_TC.sin().sum(), [x_TC, *encoder.parameters()])]


def one_by_one(encoder: Encoder, x_TC: Tensor, segments: Segments) -> list[Tensor]:
    """The same, each example alone, without the layers that it has lost."""
    torch.manual_seed(2)
    scales = draw_drop_path(segments, encoder.config.depth, RATE)
    x_TC, found, start = x_TC.clone().requires_grad_(), [], 0
    for length in LENGTHS:
        alone, x = Segments.from_lengths([length]), x_TC[start : start + length]
        for number, block in enumerate(encoder.blocks):
            attention, mlp = scales[number, start].tolist()
            kept = 1 / (1 - RATE * number / 2)
            if attention:
                x = x + kept * block.attention(block.attention_norm(x), alone)
            if mlp:
                x = x + kept * block.mlp(block.mlp_norm(x))
        found.append(encoder.norm(x))
        start += length
    y_TC = torch.cat(found)
    return [y_TC.detach(), *torch.autograd.grad(y_TC.sin().sum(), [x_TC, *encoder.parameters()])]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("padding", [0, 4])
def test_an_example_passes_by_what_it_has_lost(padding, chunked, monkeypatch):
    monkeypatch.setattr("navit_clip.packed.segments.CHUNK_TOKENS", 6)
    monkeypatch.setattr("navit_clip.models.transformer._UNCHUNKED_ELEMENTS", 0)
    encoder = new_encoder()
    encoder.chunked = chunked
    x_TC, segments = stream(padding)
    found, expected = (run(encoder, x_TC, segments) for run in (results, one_by_one))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # scales are float32


def test_compiled_and_checkpointed_blocks_lose_the_same(monkeypatch):
    monkeypatch.setattr(
        "navit_clip.models.transformer.torch.compile", partial(torch.compile, backend="aot_eager")
    )
    x_TC, segments = stream()
    expected = results(new_encoder(), x_TC, segments)
    checkpointed, compiled = new_encoder(), new_encoder()
    checkpointed.activation_checkpointing = True
    compiled_block.cache_clear()
    compiled.compile_blocks()
    for encoder in (checkpointed, compiled):
        for one, other in zip(results(encoder, x_TC, segments), expected, strict=True):
            torch.testing.assert_close(one, other)
    compiled_block.cache_clear()


def test_as_much_is_lost_as_the_rate_says_and_what_is_kept_makes_up_for_it():
    segments = Segments.from_lengths([2] * 4000, padding=3)
    scale_NT2 = draw_drop_path(segments, 3, RATE)
    assert scale_NT2.shape == (3, 8003, 2)
    scale_NE22 = scale_NT2[:, :8000].unflatten(1, (4000, 2))
    assert torch.equal(scale_NE22[:, :, 0], scale_NE22[:, :, 1])  # an example's tokens
    lost_N2 = (scale_NE22[:, :, 0] == 0).float().mean(1)
    torch.testing.assert_close(
        lost_N2, torch.tensor([[0.0], [0.3], [0.6]]).expand(3, 2), rtol=0, atol=0.03
    )
    torch.testing.assert_close(scale_NT2.mean(1), torch.ones(3, 2), rtol=0, atol=0.06)
    # Attention and MLP of one example apart.
    assert (scale_NT2[2, :, 0] == scale_NT2[2, :, 1]).float().mean() < 0.6


def test_all_cells_of_an_image_lose_the_same_layers_of_a_hierarchical_tower():
    torch.manual_seed(0)
    tower = ImageTower(tower_config((2, 1, 2)))
    randomise(tower, 0, std=0.3)
    tower.double().encoder.drop_path = RATE
    images = [
        random_image(i, grid, patch_size=8, keep=2)
        for i, grid in enumerate([(1, 2), (2, 2), (3, 2)])
    ]
    torch.manual_seed(2)
    packed = pack_images(images, budget=9)
    found = tower(packed)
    torch.manual_seed(2)
    scales = draw_drop_path(packed.segments, 5, RATE)
    assert (scales == 0).any()
    for image, one, start in zip(images, found, packed.segments.offsets[packed.order], strict=True):
        tower.encoder._draw_scales = lambda _, start=start: scales[:, start : start + 2]
        torch.testing.assert_close(tower(pack_images([image]))[0], one, rtol=1e-6, atol=1e-6)


def test_a_block_that_is_the_only_one_is_the_last():
    scale = draw_drop_path(Segments.from_lengths([3] * 4000), 1, 0.5)
    assert 0.4 < float((scale == 0).double().mean()) < 0.6
    assert set(scale.unique().tolist()) == {0.0, 2.0}


def test_padding_changes_nothing_that_is_drawn():
    plain, padded = (results(new_encoder(), *stream(padding))[0] for padding in (0, 5))
    torch.testing.assert_close(padded, plain)


@pytest.mark.parametrize("rate", [0.0, RATE])
def test_without_it_nothing_is_drawn(rate):
    encoder = new_encoder()
    encoder.drop_path = rate
    encoder.train(not rate)  # a model that is evaluated loses nothing
    x_TC, segments = stream()
    before = torch.get_rng_state()
    encoder(x_TC, segments)
    assert torch.equal(torch.get_rng_state(), before)
