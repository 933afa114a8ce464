"""The encoder, the pooling heads and both towers against slow arithmetic, one example at a time.

Every reference here is plain matrix algebra on the module's own weights, for one example without
neighbours; `test_towers.py` shows that packing changes nothing.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from packed_examples import POOLINGS, random_caption, random_image, randomise
from torch import Tensor, nn

from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.pooling import MapPooling, build_pooling
from navit_clip.models.position import PositionConfig
from navit_clip.models.rope import Rotary, RotaryConfig
from navit_clip.models.text_tower import TextTower, TextTowerConfig
from navit_clip.models.transformer import Block, Encoder, EncoderConfig, Mlp, SegmentAttention
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.packed.segments import Segments
from navit_clip.packed.texts import pack_texts

SMALL = {"width": 8, "depth": 2, "heads": 2, "mlp_ratio": 1.5}
SWITCHES = [
    EncoderConfig(**SMALL),
    EncoderConfig(**SMALL, qk_norm=False),
    EncoderConfig(**SMALL, qkv_bias=True),
    EncoderConfig(**SMALL, norm_bias=True),
    EncoderConfig(**SMALL, mlp_bias=False),
    EncoderConfig(**SMALL, activation="quick_gelu"),
    EncoderConfig(**SMALL, activation="gelu_tanh"),
    EncoderConfig(**SMALL, pre_norm=True),
    EncoderConfig(**SMALL, final_norm=False),
    EncoderConfig(**SMALL, norm_eps=0.1),
    EncoderConfig(**SMALL, causal=True),
    EncoderConfig(  # open_clip's text tower
        **SMALL,
        qk_norm=False,
        qkv_bias=True,
        norm_bias=True,
        activation="quick_gelu",
        causal=True,
    ),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def switch_names(config: EncoderConfig) -> str:
    default = EncoderConfig(**SMALL)
    changed = [f"{k}={v}" for k, v in vars(config).items() if v != getattr(default, k)]
    return ",".join(changed) or "navit"


every_switch = pytest.mark.parametrize("config", SWITCHES, ids=switch_names)
every_pooling = pytest.mark.parametrize("pooling", POOLINGS)


def norm(x: Tensor, layer: nn.Module, config: EncoderConfig) -> Tensor:
    if isinstance(layer, nn.Identity):
        return x
    assert isinstance(layer, nn.LayerNorm)
    centred = x - x.mean(-1, keepdim=True)
    x = centred / ((centred**2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * layer.weight
    return x if layer.bias is None else x + layer.bias


def affine(x: Tensor, layer: nn.Linear) -> Tensor:
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One head of one example: [n, D], [m, D], [m, D] to [n, D], row by row."""
    rows = []
    for i, query in enumerate(q):
        seen = i + 1 if causal else len(k)
        weights = torch.softmax(k[:seen] @ query / math.sqrt(len(query)), dim=0)
        rows.append(weights @ v[:seen])
    return torch.stack(rows)


def mlp(x: Tensor, layer: Mlp, activation: str) -> Tensor:
    hidden = affine(x, layer.up)
    if activation == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    elif activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        hidden = hidden * (1 + torch.tanh(inner)) / 2
    else:
        hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    return affine(hidden, layer.down)


def rotate(x: Tensor, angles: Tensor | None) -> Tensor:
    """One head of one example, [n, D]: each pair (i, i + D / 2) turned by its angle [n, D / 2]."""
    if angles is None:
        return x
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def attention(
    x: Tensor, layer: SegmentAttention, config: EncoderConfig, angles: Tensor | None = None
) -> Tensor:
    """With angles [H, n, D / 2] of queries and keys, if they are turned."""
    q, k, v = affine(x, layer.qkv).split(config.width, dim=-1)
    size = config.width // config.heads
    heads = []
    for head, begin in enumerate(range(0, config.width, size)):
        qh, kh, vh = (y[:, begin : begin + size] for y in (q, k, v))
        qh, kh = norm(qh, layer.q_norm, config), norm(kh, layer.k_norm, config)
        own = None if angles is None else angles[head]
        qh, kh = rotate(qh, own), rotate(kh, own)
        heads.append(attend(qh, kh, vh, config.causal))
    return affine(torch.cat(heads, dim=-1), layer.out)


def encode(x: Tensor, encoder: Encoder, angles: Tensor | None = None) -> Tensor:
    """One example's tokens [n, C] through the encoder, turned by [blocks, H, n, D / 2]."""
    config = encoder.config
    x = norm(x, encoder.pre_norm, config)
    for i, block in enumerate(encoder.blocks):
        assert isinstance(block, Block)
        own = None if angles is None else angles[i]
        x = x + attention(norm(x, block.attention_norm, config), block.attention, config, own)
        x = x + mlp(norm(x, block.mlp_norm, config), block.mlp, config.activation)
    return norm(x, encoder.norm, config)


def pool(x: Tensor, module: nn.Module, pooling: str, config: EncoderConfig) -> Tensor:
    """One example's tokens [n, C] to its vector [C]."""
    if pooling == "mean":
        return sum(x) / len(x)
    if pooling in ("cls", "last"):
        return x[0 if pooling == "cls" else -1]
    assert isinstance(module, MapPooling)
    q = affine(module.probe[None], module.q)
    k, v = affine(x, module.kv).split(config.width, dim=-1)
    size = config.width // config.heads
    heads = [
        attend(*(y[:, begin : begin + size] for y in (q, k, v)), causal=False)
        for begin in range(0, config.width, size)
    ]
    y = affine(torch.cat(heads, dim=-1), module.out)
    return (y + mlp(norm(y, module.norm, config), module.mlp, config.activation))[0]


def double(module: nn.Module, seed: int = 0) -> nn.Module:
    randomise(module, seed, std=0.3)
    return module.double()


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
