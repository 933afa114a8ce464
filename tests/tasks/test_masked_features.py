"""Masked prediction beside the contrastive loss, against the obvious way; whole runs with it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed import run_ranks
from hierarchical_cases import tower_config
from masked_cases import computed_whole
from packed_examples import random_image, randomise
from step_cases import (
    ALONE,
    global_batch,
    micro_batches,
    new_stepper,
    pack,
    tiny_config,
    visible,
    with_task,
)
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip import NaViTCLIP
from navit_clip.checkpoints.load_run import load_run
from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.pairs import Pair, PairBuilder
from navit_clip.data.drop import DropConfig
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.distributed import Ranks
from navit_clip.models.flops import LengthSums, backward_flops, forward_flops
from navit_clip.models.masked_features import MaskedFeaturesConfig
from navit_clip.models.transformer import compiled_block
from navit_clip.packed.images import pack_images
from navit_clip.tasks.locking import LockConfig
from navit_clip.training.ema import EMAConfig
from navit_clip.training.parallel import ParallelConfig, full_tensor

TOWERS = ("plain", "hierarchical")
each_tower = pytest.mark.parametrize("tower", TOWERS)


def config_of(tower="plain", *, weight=0.25, start_step=0, **changes):
    config = tiny_config(**changes)
    model = config.task.model
    if tower == "hierarchical":
        model = replace(model, image=tower_config((2, 2), patch=1))
    masked = MaskedFeaturesConfig(weight, start_step=start_step, decay=0.9)
    return with_task(config, model=model, masked=masked)


def stepper_of(*args, dtype=torch.float64, **changes):
    """Its teacher is another than its tower, as it is after some steps."""
    stepper = new_stepper(config_of(*args, **changes), dtype=dtype)
    randomise(stepper.model, 1)
    return stepper


def slowly(stepper, pairs):
    """The loss of all pairs, and that of hidden patches, these one at a time."""
    model, errors = stepper.model, []
    for pair in pairs:
        image, kept = pair[1], visible(pair)
        if len(kept) == len(image.patches):
            errors.append(torch.zeros((), dtype=torch.float64))
            continue
        whole = pack_images([image])
        seen = SimpleNamespace(image=model.image, mask_token=model.masked.token)
        predicted = model.masked.head(computed_whole(seen, image, kept, whole))
        with torch.no_grad():
            targets = model.masked.teacher.tokens(whole).x_TC
        found = []
        for index in set(range(len(image.patches))) - set(kept.tolist()):
            target = targets[index] - targets[index].mean()
            target = target / (target.square().mean() + 1e-5).sqrt()
            found.append((predicted[index] - target).square().mean())
        errors.append(sum(found) / len(found))
    masked = sum(errors) / len(errors)
    outputs = model(pack(pairs, hide=True).inputs)._replace(masked_E=None)
    return stepper.task.loss(outputs, counts=[len(pairs)]).total + 0.25 * masked, masked


@each_tower
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_step_has_the_loss_and_gradient_of_the_obvious_way(accumulate, kind, tower):
    stepper = stepper_of(tower, kind=kind)
    model = stepper.model
    stepper.task.before_step(model, 0)
    expected, masked = slowly(stepper, global_batch(0))
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    inputs = [batch.inputs for batch in micro_batches(0, ALONE, accumulate, hide=True)]
    loss, _ = stepper._backward(inputs, stepper.announce(inputs))
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)  # weights are float32
    assert loss.metrics["masked_loss"].item() == pytest.approx(masked.item(), rel=1e-6)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-6 * scale, msg=name)
    assert all(p.grad is None for p in model.masked.teacher.parameters())


def train_steps(tower, ranks, parallel, accumulate):
    config = config_of(tower, start_step=1, parallel=parallel, ema=EMAConfig(0.5))
    stepper, rows = new_stepper(config, ranks, torch.float64), []
    for step in range(3):
        result = stepper.step(micro_batches(step, ranks, accumulate, hide=True), step)
        rows.append((result.loss, result.grad_norm, result.metrics["masked_loss"]))
    state = stepper.state()
    weights = state["model"] | state["added"] | {f"ema.{n}": w for n, w in state["ema"].items()}
    return np.array(rows), {name: full_tensor(w).numpy() for name, w in weights.items()}


CASES = [("plain", ParallelConfig("fsdp")), ("hierarchical", ParallelConfig())]


def train_cases():
    ranks = Ranks(int(os.environ["RANK"]), 2, torch.device("cpu"))
    return [train_steps(tower, ranks, parallel, 2) for tower, parallel in CASES]


@pytest.mark.slow
def test_two_ranks_with_micro_batches_train_like_one_process():
    alone = {tower: train_steps(tower, ALONE, ParallelConfig(), 1) for tower in TOWERS}
    assert [masked > 0 for *_, masked in alone["plain"][0]] == [False, True, True]
    for results in run_ranks(train_cases, 2):
        for (tower, _), (found, weights) in zip(CASES, results, strict=True):
            expected, expected_weights = alone[tower]
            np.testing.assert_allclose(found, expected, rtol=1e-8)
            assert weights.keys() == expected_weights.keys()
            for name, weight in weights.items():
                np.testing.assert_allclose(
                    weight, expected_weights[name], rtol=1e-6, atol=1e-9, err_msg=name
                )


def test_until_it_begins_the_rest_is_as_without():
    waiting, without = (
        new_stepper(config_of(weight=weight, start_step=9), dtype=torch.float64)
        for weight in (0.25, 0.0)
    )
    assert without.model.masked is None
    for step in range(3):
        batches = micro_batches(step, ALONE, 1, hide=True)
        found, expected = (stepper.step(batches, step) for stepper in (waiting, without))
        assert found.loss == pytest.approx(expected.loss, rel=1e-12)
        inputs = batches[0].inputs
        assert waiting.task.flops(inputs) == without.task.flops(inputs)
    weights, expected = waiting.full_weights(), without.full_weights()
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-12, atol=1e-12)


def test_the_teacher_is_an_average_that_no_skipped_step_changes():
    stepper = stepper_of()
    model, teacher = stepper.model, stepper.model.masked.teacher
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    assert not any(name.startswith("pool") for name in before)
    stepper.task.after_step(model, torch.ones(()))
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    stepper.task.after_step(model, torch.zeros(()))
    for name, average in teacher.named_parameters():
        expected = 0.9 * before[name] + 0.1 * model.image.get_parameter(name)
        torch.testing.assert_close(average, expected)


@each_tower
def test_bfloat16_is_near_float64(tower):
    batch = [pack(global_batch(1), hide=True)]
    exact = stepper_of(tower).step(batch, 0)
    found = stepper_of(tower, dtype=torch.float32, precision="bf16").step(batch, 0)
    assert found.loss == pytest.approx(exact.loss, rel=0.03)
    assert found.metrics["masked_loss"] == pytest.approx(exact.metrics["masked_loss"], rel=0.03)


def test_compiled_blocks_give_the_same(monkeypatch):
    batch = [pack(global_batch(2), hide=True)]
    expected = stepper_of().step(batch, 0)
    monkeypatch.setattr(
        "navit_clip.models.transformer.torch.compile", partial(torch.compile, backend="aot_eager")
    )
    compiled_block.cache_clear()
    found = stepper_of(parallel=ParallelConfig(compile=True)).step(batch, 0)
    compiled_block.cache_clear()
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-9)


def test_flops_are_those_of_three_more_passes():
    stepper, inputs = stepper_of(), pack(global_batch(0), hide=True).inputs
    without = stepper.task.flops(inputs)
    stepper.task.before_step(stepper.model, 0)
    images = LengthSums.of(inputs.images.segments.lengths)
    tower = forward_flops(stepper.task.config.model, images, images)["image"]
    tower = tower._replace(pool=0, projection=0)
    head = 3 * 2 * 16 * 16 * images.tokens
    assert stepper.task.flops(inputs) == without + 2 * sum(tower) + backward_flops(tower) + head


def test_a_stopped_run_goes_on_bit_for_bit_and_exports_no_teacher(tmp_path, monkeypatch):
    write_tiny_data(tmp_path)
    options = {
        "task__masked__weight": 0.25,
        "task__masked__start_step": 1,
        "accumulate": 2,
        "ema__decay": 0.5,
        "data__drop__kind": "fixed",
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(monkeypatch, tiny_flags(tmp_path, whole, 4, **options)) == 0
    for steps in (2, 4):
        assert run(monkeypatch, tiny_flags(tmp_path, parts, steps, **options)) == 0
    curves = []
    for one in (whole, parts):
        lines = map(json.loads, (one / "metrics.jsonl").read_text().splitlines())
        curves.append([(v["loss"], v["grad_norm"], v["masked_loss"]) for v in lines])
    assert curves[0] == curves[1]
    assert curves[0][0][2] == 0 < curves[0][1][2]
    models = [NaViTCLIP.from_pretrained(one / "model").state_dict() for one in (whole, parts)]
    models.append(load_run(whole, None)[0].state_dict())
    for name, weight in models[0].items():
        assert not name.startswith("masked.")
        assert all(torch.equal(model[name], weight) for model in models)


def test_what_is_hidden_follows_from_seed_epoch_and_id():
    def hidden(seed=0, epoch=0, name="a"):
        build = PairBuilder(ResolutionConfig(), DropConfig(), 2, 9, seed, {}, None, 8, hide=0.25)
        images = {name: random_image(0, (4, 5)), "single": random_image(1, (1, 1))}
        origin = Origin(epoch, 0, 0, 0)
        pairs = [Pair(one, origin, image, [1, 2], seed) for one, image in images.items()]
        return build.collate(pairs, (30, 9)).hidden

    weights = hidden()
    assert weights[0] == 0  # the shortest image comes first; its one patch is not hidden
    assert sorted(weights[1:21].tolist()) == [0] * 15 + [pytest.approx(1 / 5)] * 5
    assert not weights[21:].any()
    assert torch.equal(hidden(), weights)
    assert not any(torch.equal(hidden(**{key: 1}), weights) for key in ("seed", "epoch"))
    assert not torch.equal(hidden(name="b"), weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"weight": -0.1}, "weight must not"), ({"rate": 1.0}, "rate must"), ({"decay": 1}, "decay")],
)
def test_limits(changes, message):
    with pytest.raises(ValueError, match=message):
        MaskedFeaturesConfig(**changes)


def test_a_locked_tower_cannot_learn_it():
    with pytest.raises(ValueError, match=r"masked.weight=0.25 .* lock.image must be false"):
        config_of(lock=LockConfig(image=True))
