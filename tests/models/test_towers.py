"""Packed equals unpacked: an example's embedding depends on nothing that it is packed with.

For both towers, every pooling and every kind of position; in value and in gradient; with padding,
with dropped patches, and whatever the neighbours are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from packed_examples import (
    POOLINGS,
    POSITIONS,
    position_name,
    random_caption,
    random_image,
    randomise,
)
from torch import Tensor

from navit_clip.data.builders.pairs import PairInputs
from navit_clip.models.clip import CLIP, CLIPConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.packed.texts import pack_texts

VOCAB, CONTEXT = 11, 7


every_pooling = pytest.mark.parametrize("pooling", POOLINGS)
# Positions are added before, poolings read after the blocks: each of either, and not all pairs.
PAIRS = [*zip(itertools.cycle(POOLINGS), POSITIONS), *((p, POSITIONS[0]) for p in POOLINGS[1:])]
of_each = pytest.mark.parametrize(
    ("pooling", "position"), PAIRS, ids=[f"{p}-{position_name(q)}" for p, q in PAIRS]
)


def build(
    pooling: str = "map",
    position: PositionConfig = POSITIONS[0],
    *,
    causal: bool = False,
    init_bias: float | None = None,
    **image_switches: Any,
) -> CLIP:
    """A tiny model, every parameter of which matters to what it embeds."""
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
    encoder, text_encoder = EncoderConfig(**sizes), EncoderConfig(**sizes, causal=causal)
    torch.manual_seed(0)
    model = CLIP(
        CLIPConfig(
            6,
            ImageTowerConfig(2, encoder, position, pooling, **image_switches),
            TextTowerConfig(VOCAB, CONTEXT, text_encoder, pooling),
            init_bias=init_bias,
        )
    )
    randomise(model, seed=1, std=0.1)
    return model


def images() -> list[ImagePatches]:
    """Unsorted, some of equal length, single patches, and grids that lost patches."""
    return [
        random_image(0, (3, 4)),
        random_image(1, (1, 1)),
        random_image(2, (5, 7), keep=12),
        random_image(3, (4, 3)),
        random_image(4, (1, 8)),
        random_image(5, (9, 2), keep=1),
        random_image(6, (6, 6)),
    ]


def captions() -> list[list[int]]:
    return [random_caption(seed, length) for seed, length in enumerate((5, 1, 7, 5, 2, 1, 7))]


Embed = Callable[[Sequence[int], int], Tensor]


def embedders(model: CLIP) -> dict[str, Embed]:
    """For each tower: examples by number, and unused tokens, to unit vectors."""
    pictures, texts = images(), captions()

    def embed_images(picks: Sequence[int], padding: int) -> Tensor:
        some = [pictures[i] for i in picks]
        total = sum(len(image.patches) for image in some)
        return model.embed_images(pack_images(some, budget=total + padding))

    def embed_texts(picks: Sequence[int], padding: int) -> Tensor:
        some = [texts[i] for i in picks]
        return model.embed_texts(pack_texts(some, budget=sum(map(len, some)) + padding))

    return {"image": embed_images, "text": embed_texts}


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


COUNT = len(images())
PACKS = [  # by number, in any order and company
    tuple(range(COUNT)),
    (6, 0, 5, 1, 4, 2, 3),
    (3, 0),
    (5, 1),
    (2, 2, 2, 0, 3),
]


@torch.no_grad()
def check_packed_equals_unpacked(embed: Embed) -> None:
    alone = torch.cat([embed([i], 0) for i in range(COUNT)])
    # Else a constant embedding would pass.
    assert torch.pdist(alone).min() > 1e-3
    for picks in PACKS:
        for padding in (0, 1, 20):
            assert_same(embed(picks, padding), alone[list(picks)])
    for i in range(COUNT):
        assert_same(embed([i], 9), alone[i : i + 1])


@of_each
def test_packed_images_equal_each_image_alone(pooling, position):
    check_packed_equals_unpacked(embedders(build(pooling, position))["image"])


@every_pooling
def test_packed_images_with_registers_equal_each_image_alone(pooling):
    model = build(pooling, registers=3, class_position=pooling == "cls")
    check_packed_equals_unpacked(embedders(model)["image"])
    check_gradients(model.double(), "image")


@every_pooling
@pytest.mark.parametrize("causal", [False, True])
def test_packed_captions_equal_each_caption_alone(pooling, causal):
    # One token that sees itself alone knows nothing of the rest of the caption.
    model = build(pooling, causal=causal)
    embed = embedders(model)["text"]
    if pooling == "cls" and causal:
        with torch.no_grad():
            assert_same(embed([0, 1, 2], 3), torch.cat([embed([i], 0) for i in range(3)]))
    else:
        check_packed_equals_unpacked(embed)


@every_pooling
@pytest.mark.parametrize("tower", ["image", "text"])
@torch.no_grad()
def test_other_neighbours_change_nothing(pooling, tower):
    embed = embedders(build(pooling))[tower]
    for subject in range(COUNT):
        others = [i for i in range(COUNT) if i != subject]
        companies = [others, others[::-1], others[:2], others[3:], [subject, *others[:1]]]
        seen = [embed([subject, *company], spare)[0] for spare, company in enumerate(companies)]
        seen += [embed([*company, subject], spare)[-1] for spare, company in enumerate(companies)]
        for embedding in seen[1:]:
            assert_same(embedding, seen[0])


def gradients(model: CLIP, tower: str, embedding: Tensor) -> dict[str, Tensor]:
    """Of a fixed function of one embedding, by parameter of its tower."""
    weight = torch.linspace(-1, 2, embedding.shape[-1], dtype=embedding.dtype)
    named = {n: p for n, p in model.named_parameters() if n.startswith(tower)}
    grads = torch.autograd.grad((embedding * weight).sum(), named.values(), allow_unused=True)
    assert all(grad is not None for grad in grads)
    return dict(zip(named, grads, strict=True))


def check_gradients(model: CLIP, tower: str) -> None:
    embed = embedders(model)[tower]
    for subject in (0, 1, 5):
        alone = gradients(model, tower, embed([subject], 0)[0])
        company = [i for i in range(COUNT) if i != subject]
        for padding in (0, 8):
            packed = gradients(model, tower, embed([subject, *company], padding)[0])
            for name, grad in packed.items():
                assert torch.isfinite(grad).all(), name
                torch.testing.assert_close(grad, alone[name], rtol=1e-8, atol=1e-10, msg=name)


@of_each
def test_gradients_of_an_image_ignore_padding_and_neighbours(pooling, position):
    check_gradients(build(pooling, position).double(), "image")


@every_pooling
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_a_caption_ignore_padding_and_neighbours(pooling, causal):
    check_gradients(build(pooling, causal=causal).double(), "text")


@every_pooling
def test_gradient_of_a_batch_is_the_sum_over_its_examples(pooling):
    model = build(pooling).double()
    for tower, embed in embedders(model).items():
        picks = PACKS[1]
        packed = gradients(model, tower, embed(picks, 5).sum(0))
        each = [gradients(model, tower, embed([i], 0)[0]) for i in picks]
        for name, grad in packed.items():
            torch.testing.assert_close(grad, sum(g[name] for g in each), msg=name)


@every_pooling
def test_what_fills_the_padding_is_never_read(pooling):
    model = build(pooling)
    pictures = pack_images(images(), budget=120)
    texts = pack_texts(captions(), budget=60)
    before = model.embed_images(pictures), model.embed_texts(texts)
    pictures.patches[pictures.segments.num_real_tokens :] = 255
    pictures.coords[pictures.segments.num_real_tokens :] = 3
    texts.token_ids[texts.segments.num_real_tokens :] = VOCAB - 1
    assert torch.equal(model.embed_images(pictures), before[0])
    assert torch.equal(model.embed_texts(texts), before[1])


@of_each
def test_far_more_padding_than_tokens_gives_no_nan(pooling, position):
    model = build(pooling, position)
    embeddings = [embed([1, 0], 300) for embed in embedders(model).values()]
    sum(e.sum() for e in embeddings).backward()
    assert all(torch.isfinite(e).all() for e in embeddings)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_pooling
def test_dropping_patches_keeps_the_places_of_the_others(pooling):
    """A kept patch is embedded at its place in the whole grid, not among those that are left."""
    model = build(pooling)
    whole = random_image(0, (4, 5))
    some = ImagePatches(whole.patches[::3], whole.coords[::3], whole.grid)
    moved = ImagePatches(whole.patches[::3], whole.coords[: len(some.coords)], whole.grid)
    a, b = model.embed_images(pack_images([some, moved], budget=20)).detach()
    assert (a - b).abs().max() > 1e-3


def inputs_of(count: int) -> PairInputs:
    return PairInputs(
        pack_images(images()[:count], budget=150), pack_texts(captions()[:count], budget=50)
    )


@pytest.mark.parametrize("init_bias", [None, -10.0])
def test_a_batch_becomes_unit_vectors_in_its_own_order(init_bias):
    model = build(init_bias=init_bias)
    output = model(inputs_of(5))
    assert output.image_ED.shape == output.text_ED.shape == (5, 6)
    for tower, embeddings in (("image", output.image_ED), ("text", output.text_ED)):
        assert_same(embeddings.norm(dim=1), torch.ones(5))
        embed = embedders(model)[tower]
        assert_same(embeddings, torch.cat([embed([i], 0) for i in range(5)]))
    assert output.logit_scale == model.log_scale.exp()
    assert output.logit_bias is model.logit_bias
    assert (model.logit_bias is None) == (init_bias is None)
    model.zero_grad()
    sum(x.sum() for x in output if x is not None).backward()
    # DDP waits for the gradient of every parameter.
    assert all(p.grad is not None for p in model.parameters())


def test_the_scale_starts_where_it_should_and_never_exceeds_its_maximum():
    model = CLIP(
        CLIPConfig(
            4,
            ImageTowerConfig(2, EncoderConfig(8, 1, 2)),
            TextTowerConfig(5, 5, EncoderConfig(8, 1, 2)),
            init_scale=10.0,
            max_scale=50.0,
        )
    )
    assert model.log_scale.exp().item() == pytest.approx(10.0)
    for value, expected in ((20.0, 20.0), (49.9, 49.9), (51.0, 50.0), (1e6, 50.0), (0.5, 0.5)):
        with torch.no_grad():
            model.log_scale.fill_(math.log(value))
        model.clamp_scale()
        assert model.log_scale.exp().item() == pytest.approx(expected, rel=1e-6)
    assert model.log_scale.requires_grad


@every_pooling
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="needs a CUDA device's attention kernel"
            ),
        ),
    ],
)
def test_autocast_stays_close_to_float32_and_to_each_example_alone(pooling, device):
    model = build(pooling)
    expected = model(inputs_of(5))
    model.to(device)

    def embed(inputs: PairInputs) -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16):
            output = model(inputs.to(device))
        assert output.image_ED.dtype == output.text_ED.dtype == torch.float32
        sum((x * torch.arange(6, device=device)).sum() for x in output[:2]).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        return [output.image_ED.detach().cpu(), output.text_ED.detach().cpu()]

    packed, alone = embed(inputs_of(5)), embed(inputs_of(1))
    for side, reference in enumerate((expected.image_ED, expected.text_ED)):
        assert_same(packed[side], reference.detach(), 0.06)
        assert_same(packed[side][:1], alone[side], 0.03)
        assert_same(packed[side].norm(dim=1), torch.ones(5))


@of_each
@torch.no_grad()
def test_a_model_in_bfloat16_stays_close_to_float32(pooling, position):
    model = build(pooling, position)
    model.to(torch.bfloat16)
    actual = model(inputs_of(5))
    model.float()  # at the same, rounded parameters
    expected = model(inputs_of(5))
    for name in ("image_ED", "text_ED"):
        assert_same(getattr(actual, name), getattr(expected, name), 0.1)
