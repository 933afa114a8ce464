"""Distillation in the contrastive task: the loss of a teacher, runs with one, what it cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hierarchical_cases import tower_config
from open_clip.loss import DistillClipLoss
from packed_examples import random_image
from step_cases import ALONE, measurements, micro_batches, tiny_config, with_task
from tiny_run import run, tiny_flags, write_tiny_data
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.classifier import NaViTClassifier
from navit_clip.data.builders.pairs import PairInputs
from navit_clip.data.config import DataConfig
from navit_clip.data.drop import DropConfig
from navit_clip.errors import UserError
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.models.classifier import ClassifierConfig
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.position import PositionConfig
from navit_clip.packed.images import pack_images
from navit_clip.packed.texts import pack_texts
from navit_clip.tasks.contrastive import ContrastiveTask
from navit_clip.tasks.distillation import DistillConfig
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer
from navit_clip.tokenizers.sentencepiece import SentencePieceTokenizer
from navit_clip.training.config import parse_config
from navit_clip.training.trainer import build_stepper

# That of `step_cases`, whose captions may have any of the tokenizer's ids.
SMALL = tiny_config().task.model
SMALL = replace(SMALL, text=replace(SMALL.text, vocab_size=64))


def save_teacher(folder: Path, config: CLIPConfig, tokenizer: Any) -> Path:
    torch.manual_seed(3)
    model = NaViTCLIP(config, tokenizer, Preprocess(16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: SentencePieceTokenizer) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), SMALL, tokenizer)


def build(distill: DistillConfig, tokenizer: Any, model: CLIPConfig = SMALL) -> ContrastiveTask:
    config = replace(tiny_config().task, model=model, distill=distill)
    task = config.build(DataConfig())
    task.build_samples(tokenizer, 0)
    return task


@pytest.mark.parametrize("kind", ["logits", "embeddings"])
def test_the_loss_is_that_of_pairs_and_of_the_teacher(teacher, tokenizer, kind):
    task = build(DistillConfig(str(teacher), kind=kind, weight=0.7), tokenizer)
    model, inputs = task.build_model(), micro_batches(0, ALONE, 1)[0].inputs
    outputs = model(inputs)
    loss = task.loss(outputs, [inputs], [len(outputs.image_ED)])
    with torch.no_grad():
        source = NaViTCLIP.from_directory(teacher)
        theirs = source.embed_images(inputs.images), source.embed_texts(inputs.texts)
    scales = outputs.logit_scale, source.log_scale.detach().exp()
    pairs, taught = DistillClipLoss()(*outputs[:2], scales[0], *theirs, scales[1])
    if kind == "embeddings":
        both = zip(outputs[:2], theirs, strict=True)
        taught = sum(1 - (mine * other).sum(1).mean() for mine, other in both) / 2
    torch.testing.assert_close(loss.total, pairs + 0.7 * taught)
    torch.testing.assert_close(loss.metrics["distillation"], taught.detach())
    weights = list(model.parameters())
    found = torch.autograd.grad(loss.total, weights, retain_graph=True)
    expected = torch.autograd.grad(pairs + 0.7 * taught, weights)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_a_teacher_with_windows_of_its_own_ignores_those_of_the_model(tokenizer, tmp_path):
    student, other = (
        replace(SMALL, image=tower_config((1, 1), window, width=8, heads=2)) for window in (3, 2)
    )
    teacher = save_teacher(tmp_path / "teacher", other, tokenizer)
    task = build(DistillConfig(str(teacher)), tokenizer, student)
    images = [random_image(i, grid, patch_size=4) for i, grid in enumerate([(5, 4), (3, 7)])]
    texts = pack_texts([[1, 2], [3]])
    inputs = PairInputs(pack_images(images, planner=task.planner), texts)
    assert inputs.images.plan is not None
    found, _ = task.teacher.embed([inputs])
    with torch.no_grad():
        expected = NaViTCLIP.from_directory(teacher).embed_images(pack_images(images))
    torch.testing.assert_close(found, expected)


def test_the_teachers_forward_pass_counts_as_compute(tokenizer, tmp_path):
    larger = replace(SMALL.image, encoder=replace(SMALL.image.encoder, width=40, depth=3))
    teacher = save_teacher(tmp_path / "teacher", replace(SMALL, image=larger), tokenizer)
    with_one, without = (
        build(DistillConfig(str(teacher)), tokenizer),
        build(DistillConfig(), tokenizer),
    )
    inputs = micro_batches(0, ALONE, 1)[0].inputs
    # Attention as plain products, since the counter knows no formula of the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with_one.teacher.embed([inputs])
    added = with_one.flops(inputs) - without.flops(inputs)
    assert added == pytest.approx(counter.get_total_flops())


def test_micro_batches_are_one_batch_to_the_teacher_too(teacher, tokenizer):
    task = build(DistillConfig(str(teacher)), tokenizer)
    config = with_task(tiny_config(), model=SMALL)
    found = []
    for accumulate in (1, 3):
        torch.manual_seed(0)
        stepper = build_stepper(config, task, task.build_model(), ALONE)
        found.append(torch.from_numpy(measurements(stepper, range(3), accumulate)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0, equal_nan=True)
    # It is no part of what is saved.
    assert stepper.state()["model"].keys() == task.build_model().state_dict().keys()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root)
    return root


@pytest.fixture(scope="module")
def flags(data: Path) -> dict[str, Any]:
    """Of a run with a teacher of the architecture of `tiny_flags`."""
    config, _ = parse_config(tiny_flags(data, data / "unused", 3))
    source = save_teacher(
        data / "teacher", config.task.model, SentencePieceTokenizer(data / "tok.model")
    )
    return {
        "task__distill__teacher": source,
        "data__validation": data / "shapes/train/00003.tar",
        "data__train": data / "shapes/train/{00000..00002}.tar",
        "eval__validation__batch": 24,
        "optim__schedule__kind": "constant",
        "optim__schedule__warmup_steps": 0,
    }


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def test_a_run_logs_the_loss_and_goes_on_bit_for_bit(data, flags, tmp_path, monkeypatch):
    for name, steps in (("whole", 3), ("parts", 1), ("parts", 3)):
        assert run(monkeypatch, tiny_flags(data, tmp_path / name, steps, **flags)) == 0
    whole, parts = (lines_of(tmp_path / name) for name in ("whole", "parts"))
    losses = [line["distillation"] for line in whole if "distillation" in line]
    assert len(losses) == 3
    assert losses == [line["distillation"] for line in parts if "distillation" in line]
    ends = [
        NaViTCLIP.from_directory(tmp_path / n / "model").state_dict() for n in ("whole", "parts")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


POSITIONS = replace(SMALL.image, position=PositionConfig(table_side=3))
PATCHES = replace(SMALL.image, patch_size=4)
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "patches": ({"image": PATCHES}, "cannot read the run's patches: patches of 2 pixels"),
    "positions": ({"image": POSITIONS}, "has positions for 3 patches in a row, images may have 9"),
    "context": (
        {"text": replace(SMALL.text, context_length=7)},
        "reads captions of 7 tokens .* the run's have 8",
    ),
}


@pytest.mark.parametrize(("changes", "message"), MISFITS.values(), ids=MISFITS)
def test_a_teacher_that_cannot_read_the_run_is_refused(tokenizer, tmp_path, changes, message):
    teacher = save_teacher(tmp_path / "teacher", replace(SMALL, **changes), tokenizer)
    task = build(DistillConfig(str(teacher)), tokenizer)
    with pytest.raises(UserError, match=f"task.distill.teacher={teacher} {message}"):
        task.prepare(task.build_model())


def test_a_teacher_with_another_tokenizer_or_width_is_refused(tokenizer, tmp_path):
    model = replace(SMALL, embed_dim=5, text=replace(SMALL.text, vocab_size=49408))
    teacher = str(save_teacher(tmp_path / "other", model, OpenClipTokenizer()))
    task = build(DistillConfig(teacher), tokenizer)
    with pytest.raises(UserError, match="another tokenizer than the run, which has 51 ids, its"):
        task.prepare(task.build_model())
    model = replace(SMALL, text=model.text)
    task = build(DistillConfig(teacher, kind="embeddings"), OpenClipTokenizer(), model)
    with pytest.raises(UserError, match="has vectors of 5 numbers, the model of 8: take"):
        task.prepare(task.build_model())


def test_a_teacher_with_convolutions_needs_whole_images(tokenizer, tmp_path):
    image = replace(SMALL.image, patch_size=16, stem="resnet50")
    model = replace(SMALL, image=image)
    teacher = save_teacher(tmp_path / "teacher", model, tokenizer)
    config = replace(
        tiny_config().task,
        model=replace(model, image=replace(image, stem="none")),
        distill=DistillConfig(str(teacher)),
    )
    task = config.build(DataConfig(drop=DropConfig("beta", 0.5)))
    task.build_samples(tokenizer, 0)
    with pytest.raises(UserError, match="reads whole images alone"):
        task.prepare(task.build_model())


def test_what_is_no_clip_or_not_there_is_named(tokenizer, tmp_path):
    config = ClassifierConfig(SMALL.image)
    classifier: nn.Module = NaViTClassifier(config, ("a", "b"), Preprocess(16))
    classifier.save_pretrained(tmp_path / "classes")
    for name, message in (("classes", "holds a classifier, it must be a clip"), ("no", "no model")):
        task = build(DistillConfig(str(tmp_path / name)), tokenizer)
        with pytest.raises(UserError, match=f"task.distill.teacher.*{message}"):
            task.prepare(task.build_model())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 0.0}, "weight must be positive"),
        ({"kind": "both"}, "kind must be one of logits, embeddings"),
        ({"weights": "openai"}, "weights belongs to teacher: open_clip:NAME, got teacher=None"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**fields)
