"""Counted FLOPs against those that PyTorch counts while the tower runs."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from packed_examples import random_caption, random_image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.clip import CLIPConfig, NaViTCLIP
from navit_clip.flops import encoder_flops, image_flops, mean_image_flops, text_flops
from navit_clip.image_tower import ImageTowerConfig
from navit_clip.packing import Segments, pack_images, pack_texts
from navit_clip.text_tower import TextTowerConfig
from navit_clip.transformer import Encoder, EncoderConfig

ENCODER = EncoderConfig(width=24, depth=3, heads=2, mlp_ratio=2.5)
EMBED_DIM = 10


@torch.no_grad()
def counted(run: Callable[[], object]) -> int:
    # Attention as plain products, which every version of the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(params=["map", "mean", "cls", "last"])
def model(request: pytest.FixtureRequest) -> NaViTCLIP:
    return NaViTCLIP(
        CLIPConfig(
            EMBED_DIM,
            ImageTowerConfig(4, ENCODER, pooling=request.param),
            TextTowerConfig(11, 24, ENCODER, request.param),
        )
    )


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_encoder(tokens):
    encoder, segments = Encoder(ENCODER), Segments.from_lengths([tokens])
    actual = counted(lambda: encoder(torch.zeros(tokens, ENCODER.width), segments))
    assert encoder_flops(ENCODER, tokens) == pytest.approx(actual, rel=0.01)


def test_towers(model):
    config = model.config
    for rows, columns in ((1, 1), (4, 5), (2, 30)):
        images = pack_images([random_image(0, (rows, columns), patch_size=4)])
        actual = counted(lambda images=images: model.embed_images(images))
        expected = image_flops(config.image, EMBED_DIM, rows * columns)
        assert expected == pytest.approx(actual, rel=0.01)
    for length in (1, 7, 24):
        texts = pack_texts([random_caption(0, length)])
        actual = counted(lambda texts=texts: model.embed_texts(texts))
        assert text_flops(config.text, EMBED_DIM, length) == pytest.approx(actual, rel=0.01)


def test_a_packed_batch_costs_the_sum_of_its_images(model):
    grids = [(3, 3), (1, 9), (5, 4), (1, 1), (6, 6)]
    images = [random_image(i, grid, patch_size=4) for i, grid in enumerate(grids)]
    actual = counted(lambda: model.embed_images(pack_images(images)))
    lengths = [int(np.prod(grid)) for grid in grids]
    mean = mean_image_flops(model.config.image, EMBED_DIM, lengths)
    assert mean * len(images) == pytest.approx(
        sum(image_flops(model.config.image, EMBED_DIM, n) for n in lengths)
    )
    # The pooling probe is projected once for all images, so a batch costs a little less.
    assert mean * len(images) == pytest.approx(actual, rel=0.01)


def test_the_known_size_of_a_vit_b16():
    # 17.5 GMACs at 224 px (196 patches) is the figure usually given for ViT-B/16.
    config = ImageTowerConfig(patch_size=16, encoder=EncoderConfig(), pooling="cls")
    assert image_flops(config, 512, 196) / 2e9 == pytest.approx(17.5, rel=0.02)
