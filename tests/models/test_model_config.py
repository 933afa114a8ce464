"""A wrong value in the model's configuration is refused by the name of its field."""

import math
from functools import partial

import pytest

from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(EncoderConfig, width=0), "width must be at least 1, got 0"),
        (partial(EncoderConfig, depth=0), "depth must be at least 1, got 0"),
        (partial(EncoderConfig, heads=-2), "heads must be at least 1, got -2"),
        (partial(EncoderConfig, width=10, heads=4), "heads must divide width, got heads=4 width=1"),
        (partial(EncoderConfig, mlp_ratio=0.0), "mlp_ratio=0.0 width=768"),
        (partial(EncoderConfig, mlp_ratio=math.nan), "mlp_ratio=nan"),
        (partial(EncoderConfig, mlp_ratio=math.inf), "mlp_ratio=inf"),
        (partial(EncoderConfig, width=8, heads=2, mlp_ratio=0.1), "mlp_ratio=0.1 width=8"),
        (
            partial(EncoderConfig, activation="relu"),
            "activation must be one of gelu, gelu_tanh, quick_gelu, got 'relu'",
        ),
        (
            partial(PositionConfig, kind="2d"),
            "kind must be one of factorised, learned_2d, learned_",
        ),
        (partial(PositionConfig, coordinates="relative"), "coordinates must be one of absolute, f"),
        (partial(PositionConfig, embedding="rotary"), "embedding must be one of learned, sinusoid"),
        (partial(PositionConfig, combine=None), "combine must be one of .* got None"),
        (partial(ImageTowerConfig, pooling="max"), "pooling must be one of map, mean, cls, last"),
        (partial(TextTowerConfig, pooling="eot"), "pooling must be one of map, mean, cls, last"),
        (partial(PositionConfig, table_side=1), "table_side must be at least 2 patches, got 1"),
        (partial(ImageTowerConfig, patch_size=0), "patch_size must be at least 1, got 0"),
        (partial(ImageTowerConfig, pixel_std=(1, 0, 1)), r"pixel_std must be positive, got \(1, 0"),
        (
            partial(ImageTowerConfig, encoder=EncoderConfig(causal=True)),
            "encoder.causal must be false for images",
        ),
        (partial(TextTowerConfig, vocab_size=0), "vocab_size must be at least 1, got 0"),
        (partial(TextTowerConfig, context_length=0), "context_length must be at least 1, got 0"),
        (partial(CLIPConfig, embed_dim=0), "embed_dim must be at least 1, got 0"),
        (partial(CLIPConfig, init_scale=0.0), "init_scale must be positive and at most max_scale"),
        (partial(CLIPConfig, init_scale=101.0), "init_scale=101.0 max_scale=100.0"),
        (partial(CLIPConfig, init_scale=math.nan), "init_scale=nan"),
        (partial(Preprocess, max_tokens=0), "max_tokens must be at least 1, got 0"),
    ],
)
def test_the_field_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_defaults_are_valid_and_the_papers():
    config = CLIPConfig()
    for encoder in (config.image.encoder, config.text.encoder):
        assert encoder.qk_norm
        assert not encoder.qkv_bias
        assert not encoder.norm_bias
    assert config.image.pooling == config.text.pooling == "map"
    assert config.image.position == PositionConfig("factorised", "absolute", "learned", "sum")
    assert config.text.context_length == 24


@pytest.mark.parametrize(
    ("ratio", "width", "expected"), [(4.0, 768, 3072), (4304 / 1152, 1152, 4304)]
)
def test_mlp_width(ratio, width, expected):
    assert EncoderConfig(width=width, heads=12, mlp_ratio=ratio).mlp_width == expected
