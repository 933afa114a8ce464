"""The packed towers with open_clip's weights give open_clip's embeddings.

Small models of each structure, where every switch shows, and real ones; all supported names are
compared by the shapes of their parameters, without memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from open_clip_cases import (
    SMALL,
    both,
    captions,
    our_embeddings,
    own_images,
    padded,
    perturb,
    pixels,
    small_models,
    their_embeddings,
)
from packed_examples import random_image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from navit_clip.errors import UserError
from navit_clip.interop.open_clip import config_of, supported_models
from navit_clip.interop.open_clip.names import model_pairs
from navit_clip.interop.weights import to_ours
from navit_clip.model import NaViTCLIP
from navit_clip.models.clip import CLIP, CLIPConfig
from navit_clip.packed.texts import pack_texts

TOLERANCE = 1e-5
LENGTHS = [7, 2, 5]  # of captions; open_clip's shortest has a start and an end

every_structure = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def _small():
    with small_models():
        yield


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def check_embeddings(theirs: Any, ours: CLIP, images: int) -> None:
    config = ours.config
    pictures, texts = own_images(config, images), captions(config, LENGTHS)
    expected = their_embeddings(theirs, pixels(pictures, config), padded(texts, config))
    actual = our_embeddings(ours, pictures, texts)
    for mine, reference in zip(actual, expected, strict=True):
        # Else constant embeddings would pass.
        assert len(reference) == 1 or torch.pdist(reference).min() > 1e-3
        assert_same(mine, reference)


@every_structure
def test_embeddings_and_logits_are_open_clips(name):
    theirs, ours = both(name, size=0.2)
    check_embeddings(theirs, ours, images=4)
    config = ours.config
    pictures, texts = own_images(config, 4), captions(config, LENGTHS)
    with torch.no_grad():
        expected, _ = theirs.get_logits(pixels(pictures, config), padded(texts, config))
        image_ED, text_ED = our_embeddings(ours, pictures, texts)
        logits = ours.log_scale.exp() * image_ED @ text_ED.T
    assert (ours.logit_bias is None) == ("clip" in name.split("-"))
    if ours.logit_bias is not None:
        logits = logits + ours.logit_bias
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE * 20)


@pytest.mark.parametrize(
    "name",
    [
        "ViT-B-32",
        pytest.param("ViT-B-16-quickgelu", marks=pytest.mark.slow),
        pytest.param("ViT-B-16-SigLIP", marks=pytest.mark.slow),
    ],
)
def test_embeddings_of_real_sizes_are_open_clips(name):
    theirs, ours = both(name, size=0.02)
    check_embeddings(theirs, ours, images=1)


@every_structure
@pytest.mark.parametrize("side", [2, 5])
def test_another_square_size_is_what_open_clip_makes_of_it(name, side):
    theirs, ours = both(name, size=0.2)
    patch = ours.config.image.patch_size
    picture = random_image(0, (side, side), patch_size=patch)
    with torch.no_grad():
        actual, _ = our_embeddings(ours, [picture], captions(ours.config, [3]))
    resized = open_clip.create_model(name, load_weights=False, force_image_size=side * patch)
    state = theirs.state_dict()
    if "visual.positional_embedding" in state:
        open_clip.model.resize_pos_embed(state, resized)
        resized.load_state_dict(state)
        theirs = resized.eval()
    else:
        theirs.visual.set_input_size(side * patch)
    pixels_at = pixels([picture], at_side(ours.config, side))
    with torch.no_grad():
        assert_same(actual, theirs.encode_image(pixels_at, normalize=True))


def at_side(config: CLIPConfig, side: int) -> CLIPConfig:
    """The configuration with another own size, for the helpers."""
    position = replace(config.image.position, table_side=side)
    return replace(config, image=replace(config.image, position=position))


@every_structure
def test_company_of_other_sizes_changes_nothing(name):
    _, ours = both(name, size=0.2)
    patch = ours.config.image.patch_size
    others = [
        random_image(seed, grid, patch_size=patch)
        for seed, grid in enumerate([(1, 1), (2, 5), (4, 4), (7, 1), (3, 3)], 9)
    ]
    own = own_images(ours.config, 2)
    mixed = [others[0], own[0], *others[1:4], own[1], others[4]]
    texts = captions(ours.config, [*LENGTHS, 3, 6])
    image_ED, text_ED = our_embeddings(ours, mixed, texts)
    for i, image in enumerate(mixed):
        assert_same(image_ED[i], our_embeddings(ours, [image], texts[:1])[0][0])
    for i, text in enumerate(texts):
        assert_same(text_ED[i], our_embeddings(ours, own[:1], [text])[1][0])


def _other_switches(config: Any) -> list[Any]:
    """The configuration with one switch wrong that no parameter's shape shows."""
    image, text = config.image, config.text
    activations = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "quick_gelu": "gelu"}
    wrong = []
    for tower in ("image", "text"):
        part = getattr(config, tower)
        encoder = part.encoder
        for change in (
            {"activation": activations[encoder.activation]},
            {"norm_eps": 1e-6 if encoder.norm_eps == 1e-5 else 1e-5},
            {"heads": 1},
        ):
            part_wrong = replace(part, encoder=replace(encoder, **change))
            wrong.append(replace(config, **{tower: part_wrong}))
    causal = replace(text, encoder=replace(text.encoder, causal=not text.encoder.causal))
    wrong.append(replace(config, text=causal))
    wrong.append(replace(config, text=replace(text, pooling="cls")))
    wrong.append(replace(config, image=replace(image, pixel_mean=(0.49, 0.5, 0.5))))
    wrong.append(replace(config, image=replace(image, pixel_std=(0.26, 0.5, 0.5))))
    return wrong


@every_structure
def test_every_switch_would_be_noticed(name):
    _, ours = both(name, size=0.2)
    pictures, texts = own_images(ours.config, 4), captions(ours.config, LENGTHS)
    right = torch.cat([x.flatten() for x in our_embeddings(ours, pictures, texts)])
    for config in _other_switches(ours.config):
        model = NaViTCLIP(config)
        model.load_state_dict(ours.state_dict())
        wrong = torch.cat([x.flatten() for x in our_embeddings(model, pictures, texts)])
        assert (wrong - right).abs().max() > TOLERANCE, config


@pytest.fixture
def shapes_only(monkeypatch):
    """Models without memory; initialising what is not there takes most of their time."""
    monkeypatch.setattr(VisionTransformer, "init_weights", lambda self, **options: None)
    for name in ("normal_", "uniform_", "xavier_uniform_", "kaiming_uniform_", "zeros_", "ones_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **options: tensor)
    with torch.device("meta"):
        yield


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_only")
def test_every_supported_model_has_all_its_parameters_mapped():
    names = set(supported_models())
    assert names > {
        *("ViT-B-32", "ViT-B-16", "ViT-B-16-plus-240", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"),
        *("ViT-g-14", "ViT-bigG-14", "ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP-384"),
        *("ViT-B-32-SigLIP2-256", "ViT-gopt-16-SigLIP2-384", "ViT-SO400M-16-SigLIP-i18n-256"),
    }
    assert {name for name in open_clip.list_models() if "SigLIP" in name} < names
    for name in names:
        theirs = open_clip.create_model(name, load_weights=False, device="meta").state_dict()
        ours = NaViTCLIP(config_of(name))
        assert shapes(ours.to_open_clip()) == shapes(theirs), name
        assert shapes(to_ours(model_pairs(ours.config), theirs)) == shapes(ours.state_dict()), name
        open_side = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
        side, patch = ours.config.image.position.table_side, ours.config.image.patch_size
        assert side == open_side // patch, name


@every_structure
def test_a_round_trip_keeps_every_bit(name):
    torch.manual_seed(3)
    theirs = open_clip.create_model(name, load_weights=False)
    expected = theirs.state_dict()
    torch.manual_seed(3)
    ours = NaViTCLIP.from_open_clip(name)
    back = ours.to_open_clip()
    assert back.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(back[key], tensor), key
        assert back[key].is_contiguous(), key
        assert not back[key].requires_grad, key
    # Trained on here, and on there.
    perturb(ours, seed=5, size=0.2)
    theirs.load_state_dict(ours.to_open_clip(), strict=True)
    check_embeddings(theirs.eval(), ours, images=2)


@every_structure
def test_the_model_comes_ready_to_embed(name):
    ours = NaViTCLIP.from_open_clip(name)
    assert not ours.training
    assert ours.preprocess.max_tokens == 9
    assert not ours.preprocess.square
    assert all(p.requires_grad and p.dtype == torch.float32 for p in ours.parameters())
    assert all(torch.isfinite(p).all() for p in ours.parameters())


def test_captions_of_clip_go_through_open_clips_tokenizer():
    theirs, ours = both("tiny-clip", size=0.2)
    ours.tokenizer = NaViTCLIP.from_open_clip("tiny-clip").tokenizer
    texts = ["A photo of a Dog &amp; a cat", "", "many " * 50, "naïve ☃", "  two\n words "]
    tokens = open_clip.get_tokenizer("tiny-clip")(texts)
    assert tokens.shape == (5, 9)
    with torch.no_grad():
        assert_same(ours.encode_text(texts), theirs.encode_text(tokens, normalize=True))


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("ViT-B-32", 0.48145466),
        ("ViT-B-16-SigLIP", 0.5),
        ("ViT-SO400M-16-SigLIP2-256", 0.5),
        ("tiny-clip", 0.48145466),
    ],
)
def test_pixels_are_normalised_as_the_released_weights_want_them(name, mean):
    assert config_of(name).image.pixel_mean[0] == mean


def test_a_caption_that_must_fill_the_context_is_refused_if_it_does_not():
    _, ours = both("tiny-siglip", size=0.2)
    with pytest.raises(ValueError, match=r"caption of 3 tokens does not fill context_length=7"):
        ours.embed_texts(pack_texts([[4] * 7, [4] * 3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image.encoder.qk_norm": True}, "image.encoder.qk_norm=false, this model has true"),
        ({"text.encoder.qk_norm": True}, "text.encoder.qk_norm=false"),
        ({"image.encoder.qkv_bias": False}, "image.encoder.qkv_bias=true"),
        ({"image.encoder.pre_norm": False}, "image.encoder.pre_norm=true"),
        ({"image.position.kind": "factorised"}, 'image.position.kind="learned_1d"'),
        ({"image.patch_bias": True}, "image.patch_bias=false"),
        ({"image.class_position": False}, "image.class_position=true"),
        ({"image.pooling": "mean", "image.class_position": False}, 'image.pooling="map"'),
        ({"text.pooling": "map"}, 'text.pooling="last"'),
        ({"text.encoder.causal": False}, "text.encoder.causal=true"),
        ({"text_projection": "affine"}, 'text_projection="linear"'),
    ],
)
def test_a_model_without_counterpart_is_refused_by_the_switch(change, message):
    config = config_of("tiny-clip")
    for path, value in change.items():
        config = _set(config, path.split("."), value)
    with pytest.raises(UserError, match="cannot be exported to open_clip") as error:
        NaViTCLIP(config).to_open_clip()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def _set(config: Any, path: list[str], value: Any) -> Any:
    """A copy with one nested field changed; an invalid step in between is never built."""
    if len(path) > 1:
        value = _set(getattr(config, path[0]), path[1:], value)
    if path[0] == "pooling" and len(path) == 1 and value != "cls" and hasattr(config, "patch_size"):
        return replace(config, pooling=value, class_position=False)
    return replace(config, **{path[0]: value})
