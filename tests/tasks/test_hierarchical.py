"""A hierarchical image tower in the tasks that have an image tower: trained, stopped, exported."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from classify_cases import classify_flags, write_labelled
from hierarchical_cases import tower_config
from packed_examples import random_image
from shard_factory import photo
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip import NaViTClassifier, NaViTCLIP
from navit_clip.architectures import architecture
from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.labelled import LabelledImage
from navit_clip.data.config import DataConfig
from navit_clip.models.classifier import ClassifierConfig
from navit_clip.packed.masked import pack_masked
from navit_clip.tasks.classify import ClassifyConfig, ClassifyTask
from navit_clip.training.config import parse_config
from navit_clip.training.optim import OptimConfig, build_optimizer

TOWER = {
    "task__model__image__patch_size": 8,
    "task__model__image__pooling": "mean",
    "task__model__image__position__kind": "none",
    "task__model__image__encoder__width": 16,
    "task__model__image__encoder__depth": 4,
    "task__model__image__encoder__heads": 2,
    "task__model__image__hierarchy__depths": "[2, 2]",
    "task__model__image__hierarchy__window": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled"))


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_stopped_classifier_goes_on_bit_for_bit_and_is_exported(data, tmp_path, monkeypatch):
    options = TOWER | {
        "accumulate": 2,
        "ema__decay": 0.5,
        "optim__layer_decay": 0.8,
        "data__resolution__patch_sizes": "{4: 1, 8: 1, 16: 1}",
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(monkeypatch, classify_flags(data, whole, 3, **options)) == 0
    for steps in (1, 3):
        assert run(monkeypatch, classify_flags(data, parts, steps, **options)) == 0
    curves = [
        [(v["step"], v["loss"], v["grad_norm"]) for v in metrics(one)] for one in (whole, parts)
    ]
    assert curves[0] == curves[1]
    models = [NaViTClassifier.from_pretrained(one / "model") for one in (whole, parts)]
    for name, weight in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], weight), name
    images = [photo(i, 20 + i, 30) for i in range(5)]
    found = models[0].classify(images)
    torch.testing.assert_close(models[0].classify(images[3:]), found[3:])
    card = (whole / "model/README.md").read_text()
    assert "patches of 8×8 in 2 stages, windows of 3" in card


def test_a_clip_with_a_partly_locked_tower(tmp_path, monkeypatch):
    write_tiny_data(tmp_path)
    assert run(monkeypatch, tiny_flags(tmp_path, tmp_path / "start", 2, **TOWER)) == 0
    options = TOWER | {
        "init__model": tmp_path / "start/model",
        "task__lock__image": True,
        "task__lock__image_unlocked_blocks": 1,
        "data__drop__kind": "fixed",
    }
    assert run(monkeypatch, tiny_flags(tmp_path, tmp_path / "run", 2, **options)) == 0
    model = NaViTCLIP.from_pretrained(tmp_path / "run/model")
    torch.manual_seed(0)
    assert model.encode_image([photo(0, 30, 50)]).shape == (1, 16)
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))


def test_merging_learns_with_the_block_it_leads_to(data):
    config = ClassifierConfig(tower_config((1, 2)))
    task = ClassifyTask(ClassifyConfig(model=config), DataConfig(train=str(data)))
    above = {name: task.layers_above(name) for name, _ in task.build_model().named_parameters()}
    assert above["image.embed.weight"] == above["image.encoder.pre_norm.weight"] == 4
    assert above["image.encoder.blocks.1.merge.linear.weight"] == 2
    assert above["image.encoder.blocks.1.attention.bias"] == 2
    assert above["image.encoder.norm.weight"] == above["head.weight"] == 0


@pytest.mark.parametrize("windows", ["single", "grouped"])
def test_batches_bring_the_tower_its_windows(data, windows):
    model = ClassifierConfig(tower_config((1, 2), patch=1))
    config = ClassifyConfig(model=model, windows=windows)
    build = ClassifyTask(config, DataConfig(train=str(data))).build_samples(None, 0)
    image, labels = random_image(0, (3, 4)), np.array([0])
    sample = LabelledImage("a", Origin(0, 0, 0, 0), image, labels, 0)
    images = pickle.loads(pickle.dumps(build)).collate([sample], None).images
    assert [one.ids is not None for one in images.plan.windows] == [windows == "grouped"] * 4
    masked = pack_masked([image], [np.arange(5)], planner=build.planner)
    assert masked.whole.plan is None
    assert len(masked.images.plan.windows[-1].cells) >= 5
    assert pack_masked([image], [np.arange(5)], full=True, planner=build.planner).whole.plan


def test_tables_of_biases_do_not_decay(data):
    config = ClassifierConfig(tower_config((1, 2)))
    task = ClassifyTask(ClassifyConfig(model=config), DataConfig(train=str(data)))
    model = task.build_model()
    optimizer, _ = build_optimizer(model, OptimConfig(weight_decay=0.1), task)
    decayed = [group["params"] for group in optimizer.param_groups if group["weight_decay"]]
    ids = {id(parameter) for group in decayed for parameter in group}
    attention = model.image.encoder.blocks[1].attention
    assert id(attention.bias) not in ids
    assert id(attention.qkv.weight) in ids


def test_a_run_has_a_swin_by_its_name(data, tmp_path):
    flags = ["--config", "swin_small", "--data.train", str(data), "--run_dir", str(tmp_path)]
    for name, more in (("swin_p", []), ("swin_t", ["--task.model.name", "swin_t"])):
        config, _ = parse_config([*flags, *more])
        assert config.task.model.image == architecture(name).image
