"""Both towers against slow arithmetic, one example at a time, see `encoder_cases`."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from encoder_cases import (
    SMALL,
    affine,
    double,
    encode,
    every_pooling,
    norm,
    pool,
)
from packed_examples import random_caption, random_image
from torch import Tensor

from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.rope import RotaryConfig
from navit_clip.models.text_tower import TextTower, TextTowerConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.packed.segments import Segments
from navit_clip.packed.texts import pack_texts


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def image_tokens(tower: ImageTower, image: ImagePatches) -> Tensor:
    """What the encoder reads of one image: class token, registers and patches."""
    config = tower.config
    tokens = []
    for patch, (row, column) in zip(image.patches, image.coords, strict=True):
        pixels = [
            (int(value) / 255 - config.pixel_mean[i % 3]) / config.pixel_std[i % 3]
            for i, value in enumerate(patch)
        ]
        token = affine(torch.tensor(pixels, dtype=torch.float64), tower.embed)
        if tower.position is not None:
            place = torch.tensor([[row, column]]), torch.tensor([image.grid])
            token = token + tower.position(*place)[0]
        tokens.append(token)
    prefix = []
    if tower.class_token is not None:
        own_place = 0 if tower.class_position is None else tower.class_position
        prefix.append(tower.class_token + own_place)
    registers = [] if tower.registers is None else list(tower.registers)
    return torch.stack([*prefix, *registers, *tokens])


def image_angles(tower: ImageTower, image: ImagePatches) -> Tensor | None:
    """What turns one image's queries and keys, [blocks, H, n, D / 2], angle by angle."""
    rotary, encoder = tower.config.rotary, tower.config.encoder
    if tower.rotary is None:
        return None
    before = int(tower.class_token is not None) + tower.config.registers
    pairs = encoder.head_width // 2
    shape = (encoder.depth, encoder.heads, before + len(image.coords), pairs)
    angles = torch.zeros(shape, dtype=torch.float64)
    for block, head, n, pair in itertools.product(*map(range, shape)):
        if n < before:
            continue
        row, column = image.coords[n - before].tolist()
        if rotary.coordinates == "normalised":
            rows, columns = [max(image.grid)] * 2 if rotary.keep_aspect else image.grid
            row = 2 * math.pi * ((2 * row + 1) / rows - 1)
            column = 2 * math.pi * ((2 * column + 1) / columns - 1)
        if rotary.kind == "mixed":
            learned = tower.rotary.learned.view(encoder.depth, 2, encoder.heads, pairs)
            by_row, by_column = learned[block, :, head, pair]
            angles[block, head, n, pair] = row * by_row + column * by_column
        else:
            place, i = (row, pair) if pair < pairs // 2 else (column, pair - pairs // 2)
            angles[block, head, n, pair] = place * rotary.theta ** (-i / (pairs // 2))
    return angles


def image_reference(tower: ImageTower, image: ImagePatches) -> Tensor:
    config = tower.config
    x = encode(image_tokens(tower, image), tower.encoder, image_angles(tower, image))
    patches = len(image.patches)
    classes = x[: int(tower.class_token is not None)]
    pooled = pool(torch.cat([classes, x[-patches:]]), tower.pool, config.pooling, config.encoder)
    return norm(pooled, tower.norm, config.encoder)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"patch_bias": False},
        {"class_position": True},
        {"registers": 3},
        {"registers": 1, "class_position": True, "pooled_norm": True},
    ],
    ids=lambda switches: ",".join(switches) or "navit",
)
@every_pooling
def test_image_tower(pooling, switches):
    if pooling != "cls":
        switches = {**switches, "class_position": False}
    config = ImageTowerConfig(
        patch_size=2,
        encoder=EncoderConfig(**SMALL),
        position=PositionConfig(table_side=8),
        pooling=pooling,
        pixel_mean=(0.1, 0.5, 0.7),
        pixel_std=(0.2, 0.5, 0.9),
        **switches,
    )
    tower = double(ImageTower(config))
    images = [random_image(0, (3, 4)), random_image(1, (1, 1)), random_image(2, (5, 5), keep=4)]
    expected = torch.stack([image_reference(tower, image) for image in images])
    # The pixel constants were rounded to float32 before the tower became float64.
    torch.testing.assert_close(tower(pack_images(images)), expected, rtol=1e-6, atol=1e-6)


ROTARY = [
    RotaryConfig("axial"),
    RotaryConfig("mixed", theta=10.0),
    RotaryConfig("axial", "normalised"),
    RotaryConfig("mixed", "normalised", keep_aspect=True),
]


@pytest.mark.parametrize("chunk_tokens", [6, 2048])
@pytest.mark.parametrize("kind", ["none", "factorised"])
@pytest.mark.parametrize("rotary", ROTARY, ids=lambda c: f"{c.kind}-{c.coordinates}")
def test_image_tower_with_rotary_positions(rotary, kind, chunk_tokens, monkeypatch):
    monkeypatch.setattr("navit_clip.packed.segments.CHUNK_TOKENS", chunk_tokens)
    monkeypatch.setattr("navit_clip.models.transformer._UNCHUNKED_ELEMENTS", 0)
    config = ImageTowerConfig(
        patch_size=2,
        encoder=EncoderConfig(width=16, depth=2, heads=2, mlp_ratio=1.5),
        position=PositionConfig(kind, table_side=8),
        pooling="cls",
        registers=1,
        rotary=rotary,
    )
    tower = double(ImageTower(config))
    images = [random_image(0, (3, 4)), random_image(1, (1, 1)), random_image(2, (5, 5), keep=4)]
    results = []
    for actual in (
        tower(pack_images(images, budget=20)),
        torch.stack([image_reference(tower, image) for image in images]),
    ):
        grads = torch.autograd.grad(actual.sin().sum(), list(tower.parameters()))
        results.append([actual, *grads])
    for found, expected in zip(*results, strict=True):
        # As above.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["map", "cls"])
@pytest.mark.parametrize("registers", [0, 2])
def test_tokens_of_an_image_are_its_patches_encoded(pooling, registers):
    config = ImageTowerConfig(
        patch_size=2, encoder=EncoderConfig(**SMALL), pooling=pooling, registers=registers
    )
    tower = double(ImageTower(config))
    images = [random_image(0, (3, 4)), random_image(1, (1, 1)), random_image(2, (5, 5), keep=4)]
    packed = pack_images(images, budget=20)
    x, segments, coords = tower.tokens(packed)
    assert segments is packed.segments
    tokens, places = (y.split(list(segments.lengths)) for y in (x, coords))
    for image, i in zip(images, packed.order.tolist(), strict=True):
        expected = encode(image_tokens(tower, image), tower.encoder)[-len(image.patches) :]
        torch.testing.assert_close(tokens[i], expected, rtol=1e-5, atol=1e-5)
        assert np.array_equal(places[i], image.coords)
    if pooling == "map":
        pooled = tower.norm(tower.pool(x, segments))[packed.order]
        assert torch.equal(pooled, tower(packed))


@every_pooling
@pytest.mark.parametrize("causal", [False, True])
def test_text_tower(pooling, causal):
    encoder = EncoderConfig(**SMALL, causal=causal)
    tower = double(
        TextTower(TextTowerConfig(11, context_length=6, encoder=encoder, pooling=pooling))
    )
    captions = [random_caption(seed, length) for seed, length in enumerate((4, 1, 6, 4))]
    expected = []
    for ids in captions:
        x = torch.stack([tower.token[token] + tower.position[i] for i, token in enumerate(ids)])
        expected.append(pool(encode(x, tower.encoder), tower.pool, pooling, encoder))
    torch.testing.assert_close(tower(pack_texts(captions)), torch.stack(expected))


@pytest.mark.parametrize("position", ["learned", "none"])
def test_text_tower_with_rotary_positions(position):
    encoder = EncoderConfig(**SMALL, causal=True)
    rotary = RotaryConfig("axial", theta=50.0)
    config = TextTowerConfig(11, 6, encoder, "last", position=position, rotary=rotary)
    tower = double(TextTower(config))
    captions = [random_caption(seed, length) for seed, length in enumerate((4, 1, 6, 4))]
    expected = []
    for ids in captions:
        x = tower.token[torch.tensor(ids)]
        if tower.position is not None:
            x = x + tower.position[: len(ids)]
        angles = torch.arange(len(ids))[:, None] * torch.tensor([1.0, 50**-0.5]).double()
        x = encode(x, tower.encoder, angles.expand(2, 2, -1, -1))
        expected.append(pool(x, tower.pool, "last", encoder))
    torch.testing.assert_close(tower(pack_texts(captions)), torch.stack(expected))


@pytest.mark.parametrize(
    ("pooling", "causal", "moves_with"),
    [
        ("last", True, [0, 1, 2, 3]),  # the end-of-text token sees the whole caption
        ("cls", True, [0]),  # the first token sees itself alone
        ("cls", False, [0, 1, 2, 3]),
        ("map", True, [0, 1, 2, 3]),
    ],
)
def test_what_a_pooled_caption_depends_on(pooling, causal, moves_with):
    encoder = EncoderConfig(**SMALL, causal=causal)
    tower = double(
        TextTower(TextTowerConfig(11, context_length=6, encoder=encoder, pooling=pooling))
    )
    caption, neighbour = [3, 1, 4, 1], [2, 7]
    before = tower(pack_texts([caption, neighbour]))
    moved = []
    for token in range(len(caption)):
        changed = [*caption]
        changed[token] = 9
        after = tower(pack_texts([changed, neighbour]))
        assert torch.equal(after[1], before[1])
        if not torch.equal(after[0], before[0]):
            moved.append(token)
    assert moved == moves_with


def test_a_causal_prefix_with_last_pooling_is_the_caption_cut_there():
    encoder = EncoderConfig(**SMALL, causal=True)
    tower = double(TextTower(TextTowerConfig(11, 6, encoder, pooling="last")))
    caption = random_caption(0, 6)
    segments = Segments.from_lengths([6])
    x = tower.token[torch.tensor(caption)] + tower.position
    tokens = tower.encoder(x, segments)
    prefixes = tower(pack_texts([caption[: end + 1] for end in range(6)]))
    torch.testing.assert_close(tokens, prefixes)
