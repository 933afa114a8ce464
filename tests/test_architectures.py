"""Architectures by name, from Python and in a run's configuration."""

import pytest
import torch
import yaml

from navit_clip import NaViTCLIP
from navit_clip.architectures import NAMES, architecture
from navit_clip.errors import UserError
from navit_clip.models.classifier import Classifier, ClassifierConfig
from navit_clip.training.config import parse_config

FLAGS = ["--run_dir", "x", "--steps", "9", "--tokenizer.path", "t"]


def model_of(*flags):
    config, resolved = parse_config([*FLAGS, *flags])
    return config.task.model, yaml.safe_load(resolved)["task"]["model"]


@pytest.mark.parametrize("size", ["b16", "l16"])
def test_the_recipes_models_have_their_names(size):
    assert architecture(f"navit_{size}") == model_of("--config", f"navit_{size}_webli")[0]


def test_every_name_stands_for_a_model_and_sizes_grow():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in NaViTCLIP.from_name(name).parameters()) for name in NAMES]
    navit, swin = counts[:15], counts[15:]
    assert navit[::3] == sorted(navit[::3])
    assert swin == sorted(swin)
    assert counts[NAMES.index("navit_b16")] == pytest.approx(203e6, rel=0.1)


@pytest.mark.parametrize(("size", "millions"), [("t", 28), ("s", 50), ("b", 88), ("l", 197)])
def test_swins_have_their_size(size, millions):
    with torch.device("meta"):  # with Swin's head over 1,000 classes (its Table 1)
        model = Classifier(ClassifierConfig(architecture(f"swin_{size}").image), 1000)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.02)


def test_open_clips_architecture_has_as_many_parameters_as_there():
    with torch.device("meta"):
        model = NaViTCLIP.from_name("open_clip:ViT-B-32")
    assert sum(p.numel() for p in model.parameters()) == 151_277_313


def test_a_run_has_what_the_name_stands_for_but_for_what_is_given(tmp_path):
    flags = ["--task.model.embed_dim", "99", "--task.model.image.encoder.depth", "3"]
    model, resolved = model_of("--task.model.name", "navit_s14", *flags)
    assert (model.embed_dim, model.image.patch_size, model.image.encoder.depth) == (99, 14, 3)
    assert model.text == architecture("navit_s14").text
    assert resolved["image"]["encoder"]["width"] == 384
    assert "name" not in resolved
    path = tmp_path / "run.yaml"
    path.write_text("task: {model: {name: navit_s14, embed_dim: 99, image: {encoder: {depth: 3}}}}")
    assert model_of("--config", str(path)) == (model, resolved)
    assert model_of("--task.model.name", "open_clip:ViT-B-32")[1]["text"]["vocab_size"] == 49408


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task.model.name", "navit_b17"], "no architecture is called navit_b17: did you mean"),
        (["--task.model.name", "open_clip:ViT-B-33"], "open_clip has no such model; supported are"),
        (
            ["--task.model.name", "navit_s16", "--init.model", "open_clip:ViT-B-32"],
            "task.model.name=navit_s16 and init.model=open_clip:ViT-B-32: leave one out",
        ),
    ],
)
def test_what_there_is_not_is_one_line(flags, message):
    with pytest.raises(UserError) as caught:
        parse_config([*FLAGS, *flags])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
