"""A step of a classifier: loss, gradients and counts beside slow arithmetic, on one rank or two."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from classify_cases import (
    ALONE,
    NAMES,
    TOWER,
    examples,
    micro_batches,
    pack,
)
from distributed import run_ranks
from hierarchical_cases import tower_config
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.data.config import DataConfig
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.models.classifier import ClassifierConfig
from navit_clip.tasks.classify import ClassifyConfig, ClassifyTask
from navit_clip.training.ema import EMAConfig
from navit_clip.training.length import RunLength
from navit_clip.training.nonfinite import NonFiniteGuard
from navit_clip.training.optim import OptimConfig, build_optimizer
from navit_clip.training.parallel import ParallelConfig
from navit_clip.training.schedule import ScheduleConfig
from navit_clip.training.step import Stepper


class Task(ClassifyTask):
    """Without shards, whose class names it would read."""

    def __init__(self, output, image):
        self.config, self.data = ClassifyConfig(model=ClassifierConfig(image, output)), DataConfig()
        self.names = NAMES


def new_stepper(
    output="sigmoid", ranks=ALONE, parallel=None, precision="fp32", image=TOWER, **optim
):
    torch.manual_seed(0)
    task = Task(output, image)
    model = task.build_model()
    with torch.no_grad():  # at zero, the head passes nothing down
        model.head.weight.normal_(std=0.5)
    return Stepper(
        task,
        model.double() if precision == "fp32" else model,
        ranks,
        length=RunLength(20),
        optim=OptimConfig(
            **{"lr": 1e-2, "eps": 1e-6, "schedule": ScheduleConfig(warmup_steps=1)} | optim
        ),
        parallel=parallel or ParallelConfig(),
        ema=EMAConfig(0.5),
        guard=NonFiniteGuard("stop", 3),
        precision=precision,
    )


def loss_slowly(model, output, part):
    """One image at a time, with one-hot targets."""
    losses, hits = [], 0
    for example in part:
        (logits,) = model(pack([example]).inputs).logits_EL
        labels = torch.from_numpy(example[2])
        target = torch.zeros_like(logits)
        target[labels] = 1
        if output == "sigmoid":
            losses.append(F.binary_cross_entropy_with_logits(logits, target, reduction="sum"))
        else:
            losses.append(-logits.log_softmax(0)[labels[0]])
        hits += int(logits.argmax() in labels)
    return torch.stack(losses).mean(), hits / len(part)


@pytest.mark.parametrize("output", ["sigmoid", "softmax"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_step_has_the_loss_and_gradient_of_the_obvious_way(output, accumulate):
    stepper, plain = new_stepper(output), new_stepper(output).model
    part = examples(0, single=output == "softmax")
    inputs = [batch.inputs for batch in micro_batches(part, ALONE, accumulate)]
    loss, _ = stepper._backward(inputs, stepper.announce(inputs))
    expected, accuracy = loss_slowly(plain, output, part)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.metrics["accuracy"].item() == pytest.approx(accuracy)
    for (name, found), other in zip(
        stepper.model.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, other.grad, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_labels_of_mixed_images_are_soft_targets_however_often_the_step_accumulates(accumulate):
    stepper, plain = new_stepper(), new_stepper().model
    part, inputs, expected = examples(0), [], []
    drawn = {name: np.random.default_rng(i).random(9) for i, (name, _, _) in enumerate(part)}
    for batch in micro_batches(part, ALONE, accumulate):
        rows = zip(batch.ids, batch.inputs.labels.lengths, strict=True)
        weights = np.concatenate([drawn[name][:count] for name, count in rows])
        inputs.append(replace(batch.inputs, weights=torch.from_numpy(weights)))
    loss, _ = stepper._backward(inputs, stepper.announce(inputs))
    for example in part:
        (logits,) = plain(pack([example]).inputs).logits_EL
        target = torch.zeros_like(logits)
        target[torch.from_numpy(example[2])] = torch.from_numpy(
            drawn[example[0]][: len(example[2])]
        )
        expected.append(F.binary_cross_entropy_with_logits(logits, target, reduction="sum"))
    (mean := torch.stack(expected).mean()).backward()
    assert loss.total.item() == pytest.approx(mean.item(), rel=1e-12)
    for found, other in zip(stepper.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, other.grad, rtol=1e-10, atol=1e-13)


def train_steps(ranks, image, parallel, accumulate, planner=None, steps=3):
    stepper = new_stepper(ranks=ranks, image=image, parallel=parallel)
    rows = []
    for step in range(steps):
        result = stepper.step(micro_batches(examples(step), ranks, accumulate, planner), step)
        rows.append((result.loss, result.grad_norm, result.metrics["accuracy"]))
    weights = stepper.host_weights()
    return np.array(rows), weights and {n: w.numpy() for n, w in weights.items()}


HIERARCHICAL = tower_config((1, 2), 2, patch=1)
GROUPED = HIERARCHICAL.planner(grouped=True)
CASES = [
    (TOWER, ParallelConfig(), None),
    (TOWER, ParallelConfig("fsdp"), None),
    (HIERARCHICAL, ParallelConfig(), None),
    (HIERARCHICAL, ParallelConfig("fsdp", activation_checkpointing=True), GROUPED),
]


def train_cases():
    ranks = Ranks(int(os.environ["RANK"]), 2, torch.device("cpu"))
    return [train_steps(ranks, image, parallel, 2, planner) for image, parallel, planner in CASES]


@pytest.mark.slow
def test_two_ranks_with_micro_batches_train_like_one_process():
    alone = {image: train_steps(ALONE, image, ParallelConfig(), 1) for image, *_ in CASES}
    for rank, results in enumerate(run_ranks(train_cases, 2)):
        for (image, *_), (found, weights) in zip(CASES, results, strict=True):
            expected, expected_weights = alone[image]
            np.testing.assert_allclose(found, expected, rtol=1e-6)  # accuracy is float32
            np.testing.assert_allclose(found[:, :2], expected[:, :2], rtol=1e-11)
            assert (weights is not None) == (rank == 0)
            for name, weight in (weights or {}).items():
                np.testing.assert_allclose(weight, expected_weights[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("output", ["sigmoid", "softmax"])
def test_bfloat16_is_near_float64(output):
    part = examples(1, single=output == "softmax")
    exact, found = (
        new_stepper(output, precision=precision).step([pack(part)], 0)
        for precision in ("fp32", "bf16")
    )
    assert found.loss == pytest.approx(exact.loss, rel=0.02)
    assert found.grad_norm == pytest.approx(exact.grad_norm, rel=0.05)


def test_the_head_has_a_decay_of_its_own():
    config = OptimConfig(weight_decay=0.03, head_weight_decay=3.0, layer_decay=0.5)
    task = Task("sigmoid", TOWER)
    model = task.build_model()
    optimizer, factors = build_optimizer(model, config, task)
    found = {
        id(parameter): (group["weight_decay"], factor)
        for group, factor in zip(optimizer.param_groups, factors, strict=True)
        for parameter in group["params"]
    }
    decays = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    assert decays["head.weight"] == (3.0, 1.0)
    assert decays["head.bias"] == (0.0, 1.0)
    assert decays["image.pool.kv.weight"] == (0.03, 1.0)
    assert decays["image.encoder.blocks.0.mlp.up.weight"] == (0.03, 0.25)
    assert decays["image.embed.weight"][1] == 0.125


def test_muon_leaves_the_head_to_adamw():
    task = Task("sigmoid", TOWER)
    model = task.build_model()
    optimizer, _ = build_optimizer(model, OptimConfig("muon"), task)
    fallback = {
        id(parameter): group.get("use_fallback", False)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    by_adamw = {name for name, parameter in model.named_parameters() if fallback[id(parameter)]}
    assert "head.weight" in by_adamw
    assert "image.encoder.blocks.0.mlp.up.weight" not in by_adamw


def test_flops_are_those_of_tower_and_head():
    task, batch = Task("sigmoid", TOWER), pack(examples(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.build_model()(batch.inputs).logits_EL.sum().backward()
    assert task.flops(batch.inputs) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_contrastive_run_has_no_head_to_decay():
    from step_cases import new_stepper as contrastive_stepper
    from step_cases import tiny_config

    with pytest.raises(UserError, match="the model has no head"):
        contrastive_stepper(tiny_config(optim=OptimConfig(head_weight_decay=1.0)))
