"""Counted FLOPs against those that PyTorch counts while the towers run, forward and backward."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from packed_examples import random_caption, random_image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.architectures import architecture
from navit_clip.data.builders.pairs import PairInputs
from navit_clip.data.config import DataConfig
from navit_clip.models.clip import CLIP, CLIPConfig
from navit_clip.models.flops import (
    LengthSums,
    encoder_flops,
    image_flops,
    tower_flops,
)
from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import Encoder, EncoderConfig
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.packed.images import pack_images
from navit_clip.packed.segments import Segments
from navit_clip.packed.texts import pack_texts
from navit_clip.tasks.contrastive import ContrastiveConfig, ContrastiveTask
from navit_clip.tasks.locking import LockConfig, lock_towers

ENCODER = EncoderConfig(width=24, depth=3, heads=2, mlp_ratio=2.5)
EMBED_DIM = 10


def counted(run: Callable[[], object]) -> int:
    # Attention as plain products: fused kernels compute the scores again in the backward pass.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def tower_config(pooling: str) -> CLIPConfig:
    return CLIPConfig(
        EMBED_DIM,
        ImageTowerConfig(4, ENCODER, pooling=pooling, registers=2),
        TextTowerConfig(11, 24, ENCODER, pooling),
    )


@pytest.fixture(params=["map", "mean", "cls", "last"])
def config(request: pytest.FixtureRequest) -> CLIPConfig:
    return tower_config(request.param)


def random_sides(seed: int, padding: int = 0):
    """Random images and captions, one of a single token among them, each side packed."""
    rng = np.random.default_rng(seed)
    grids = [(1, 1), *((int(r), int(c)) for r, c in rng.integers(1, 9, (5, 2)))]
    texts = [1, *map(int, rng.integers(1, 25, 5))]
    images = [random_image(i, grid, patch_size=4) for i, grid in enumerate(grids)]
    captions = [random_caption(i, length) for i, length in enumerate(texts)]
    image_budget, text_budget = sum(r * c for r, c in grids) + padding, sum(texts) + padding
    return pack_images(images, budget=image_budget), pack_texts(captions, budget=text_budget)


def random_batch(seed: int, padding: int = 0) -> Batch[PairInputs]:
    images, texts = random_sides(seed, padding)
    return Batch(PairInputs(images, texts), (), BatchCounts(6))


def length_sums(packed) -> LengthSums:
    return LengthSums.of(packed.segments.lengths)


def test_sums_of_lengths():
    assert LengthSums.of([]) == (0, 0, 0)
    lengths = [3, 1, 70_000]
    assert LengthSums.of(lengths) == (3, 70_004, 9 + 1 + 70_000**2)
    assert LengthSums.of(lengths).longer(3) == LengthSums.of([n + 3 for n in lengths])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1], [5], [40], [1, 30, 30, 7]])
def test_encoder(lengths):
    encoder, segments = Encoder(ENCODER), Segments.from_lengths(lengths)
    actual = counted(lambda: encoder(torch.zeros(sum(lengths), ENCODER.width), segments))
    assert encoder_flops(ENCODER, LengthSums.of(lengths)) == actual


@torch.no_grad()
def test_towers_forward(config):
    model = CLIP(config)
    for seed in range(3):
        images, texts = random_sides(seed)
        expected = tower_flops(config.image, EMBED_DIM, length_sums(images))
        assert sum(expected) == counted(lambda images=images: model.embed_images(images))
        expected = tower_flops(config.text, EMBED_DIM, length_sums(texts))
        assert sum(expected) == counted(lambda texts=texts: model.embed_texts(texts))


def test_images_one_by_one_cost_about_what_they_cost_together(config):
    lengths = [9, 9, 20, 1, 36]
    each = [image_flops(config.image, EMBED_DIM, n) for n in lengths]
    # The pooling probe is projected once for all images, so a batch costs a little less.
    batch = sum(tower_flops(config.image, EMBED_DIM, LengthSums.of(lengths)))
    assert sum(each) == pytest.approx(batch, rel=0.01)


def test_the_known_size_of_a_vit_b16():
    # 17.5 GMACs at 224 px (196 patches) is the number usually given for ViT-B/16.
    config = ImageTowerConfig(patch_size=16, encoder=EncoderConfig(), pooling="cls")
    assert image_flops(config, 512, 196) / 2e9 == pytest.approx(17.5, rel=0.02)


def test_the_known_size_of_a_swin_t():
    # 4.5 GMACs at 224 px (Swin, Table 1), the head over 1,000 classes among them.
    config = architecture("swin_t").image
    assert image_flops(config, 1000, 49) / 2e9 == pytest.approx(4.5, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(7, 7), (3, 5)])
def test_a_hierarchical_tower_counts_windows_as_whole(grid):
    config = architecture("swin_p").image
    packed = pack_images([random_image(0, grid, patch_size=32)])
    tower = ImageTower(config)
    assert image_flops(config, 0, len(packed.patches)) == pytest.approx(
        counted(lambda: tower(packed)), rel=0.03
    )


def counted_training(config: CLIPConfig, lock: LockConfig, batch: Batch[PairInputs]) -> int:
    model = CLIP(config)
    lock_towers(model, lock)

    def train() -> None:
        output = model(batch.inputs)
        learning = [x.sum() for x in output[:2] if x.requires_grad]
        if learning:
            sum(learning).backward()

    return counted(train)


def training_flops(config: CLIPConfig, lock: LockConfig, batch: Batch[PairInputs]) -> float:
    task = ContrastiveTask(ContrastiveConfig(model=config, lock=lock), DataConfig())
    return task.flops(batch.inputs)


CLIP_LIKE = replace(
    tower_config("cls"),
    text=TextTowerConfig(11, 24, replace(ENCODER, width=16, causal=True), "last"),
    image_projection="affine",
)
NO_PROJECTION = replace(
    tower_config("map"),
    embed_dim=ENCODER.width,
    image_projection="none",
    text_projection="none",
)
PLAIN = replace(ENCODER, qk_norm=False, qkv_bias=True, pre_norm=True, final_norm=False)
TRAINED = {
    **{pooling: tower_config(pooling) for pooling in ("map", "mean", "cls", "last")},
    "clip": CLIP_LIKE,
    "no projection": NO_PROJECTION,
    "no qk norm": replace(tower_config("map"), image=ImageTowerConfig(4, PLAIN, pooling="mean")),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training(name):
    config = TRAINED[name]
    for batch in map(random_batch, range(3)):
        actual = counted_training(config, LockConfig(), batch)
        assert training_flops(config, LockConfig(), batch) == actual


@pytest.mark.parametrize("name", ["map", "clip", "no projection", "no qk norm"])
@pytest.mark.parametrize(
    "lock",
    [
        LockConfig(image=True),
        LockConfig(image=True, text=True),
        LockConfig(image=True, image_unlocked_blocks=1, text=True, text_unlocked_blocks=3),
    ],
    ids=["image", "both", "last blocks learn"],
)
def test_training_with_locked_towers(name, lock):
    config, batch = TRAINED[name], random_batch(0)
    actual = counted_training(config, lock, batch)
    assert training_flops(config, lock, batch) == pytest.approx(actual, rel=1e-9)


def test_padding_costs_no_counted_flops():
    padded, whole = (
        training_flops(tower_config("map"), LockConfig(), random_batch(0, padding))
        for padding in (50, 0)
    )
    assert padded == whole
