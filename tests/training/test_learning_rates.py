"""Which parameters learn, and how fast: layer decay, groups of the optimiser, locked towers."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from step_cases import (
    ALONE,
    assert_same_bits,
    count_saved,
    global_batch,
    measurements,
    micro_batches,
    new_stepper,
    pack,
    same,
    tiny_config,
    weights,
    with_task,
)
from torch import nn

from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.tasks.locking import LockConfig
from navit_clip.training.ema import EMAConfig
from navit_clip.training.optim import OptimConfig, build_optimizer
from navit_clip.training.schedule import ScheduleConfig, lr_multiplier

ALL_KINDS = replace(
    tiny_config().task.model,
    image=ImageTowerConfig(
        patch_size=2,
        encoder=EncoderConfig(width=16, depth=3, heads=2, pre_norm=True, qkv_bias=True),
        position=PositionConfig(kind="learned_1d", table_side=3),
        pooling="cls",
        class_position=True,
    ),
)


def factors_by_module(model, decay):
    """Learning-rate factor of each parameter by name, from a walk over the modules."""
    by_id = {}
    for tower in (model.image, model.text):
        depth = len(tower.encoder.blocks)
        layers = [tower, *tower.encoder.blocks, nn.ModuleList([tower.encoder.norm, tower.pool])]
        for layer, module in enumerate(layers):
            by_id |= {id(p): decay ** (depth + 1 - layer) for p in module.parameters()}
    return {name: by_id.get(id(p), 1.0) for name, p in model.named_parameters()}


def one_optimiser_per_parameter(model, optim):
    """What the groups stand for, slowly: an AdamW of each parameter's own."""
    factors = factors_by_module(model, optim.layer_decay)
    options = {"betas": optim.betas, "eps": optim.eps, "foreach": False}
    return {
        name: torch.optim.AdamW(
            [p],
            lr=optim.lr * factors[name],
            weight_decay=optim.weight_decay if p.ndim >= 2 else 0.0,
            **options,
        )
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("decay", [1.0, 0.6])
@pytest.mark.parametrize("shape", [tiny_config().task.model, ALL_KINDS])
def test_groups_train_as_one_optimiser_per_parameter(shape, decay):
    optim = OptimConfig(
        lr=1e-2,
        eps=1e-6,
        layer_decay=decay,
        clip_norm=0,
        weight_decay=0.5,
        schedule=ScheduleConfig("cosine", warmup_steps=2),
    )
    config = with_task(tiny_config(optim=optim, steps=6), model=shape)
    stepper, model = new_stepper(config, dtype=torch.float64), new_stepper(config).model.double()
    optimisers = one_optimiser_per_parameter(model, optim)
    peaks = {name: o.param_groups[0]["lr"] for name, o in optimisers.items()}
    for step in range(4):
        result = stepper.step(micro_batches(step, ALONE, 1), step)
        share = lr_multiplier(optim.schedule, step, 6)
        assert result.lr == optim.lr * share
        stepper.task.loss(model(pack(global_batch(step)).inputs)).total.backward()
        for name, optimiser in optimisers.items():
            optimiser.param_groups[0]["lr"] = peaks[name] * share
            optimiser.step()
            optimiser.zero_grad()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weights(stepper)[name], weight.data, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [1.0, 0.6])
def test_there_are_as_few_groups_as_there_are_kinds(decay):
    stepper = new_stepper(with_task(tiny_config(), model=ALL_KINDS))
    model = stepper.model
    factors = factors_by_module(model, decay)
    kinds = {(factors[n], p.ndim >= 2, p.ndim == 0) for n, p in model.named_parameters()}
    optim = OptimConfig(layer_decay=decay)
    optimizer, found = build_optimizer(model, optim, stepper.task)
    assert len(found) == len(optimizer.param_groups) == len(kinds)
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())


def learns_by_module(model, lock):
    """Whether each parameter learns, by name, from a walk over the modules."""
    locked = set()
    for tower, count, module in (
        (lock.image, lock.image_unlocked_blocks, model.image),
        (lock.text, lock.text_unlocked_blocks, model.text),
    ):
        if tower:
            locked |= set(module.parameters())
            if count:
                top = [*list(module.encoder.blocks)[-count:], module.encoder.norm, module.pool]
                locked -= {p for part in top for p in part.parameters()}
    return {name: p not in locked for name, p in model.named_parameters()}


LOCKS = [
    LockConfig(image=True),
    LockConfig(text=True),
    LockConfig(image=True, image_unlocked_blocks=1),
    LockConfig(image=True, image_unlocked_blocks=2, text=True, text_unlocked_blocks=1),
    LockConfig(image=True, text=True),
]


@pytest.mark.parametrize(("lock", "accumulate"), [*((lock, 1) for lock in LOCKS), (LOCKS[3], 3)])
def test_locked_parameters_stay_and_the_others_get_their_gradient(lock, accumulate):
    config = tiny_config(lock=lock, accumulate=accumulate, ema=EMAConfig(0.9))
    stepper, free = (
        new_stepper(c, dtype=torch.float64) for c in (config, with_task(config, lock=LockConfig()))
    )
    learns = learns_by_module(stepper.model, lock)
    assert 0 < sum(learns.values()) < len(learns)
    gradients = []
    for each in (stepper, free):
        inputs = [batch.inputs for batch in micro_batches(0, ALONE, accumulate)]
        each._backward(inputs, each.announce(inputs))
        gradients.append({name: p.grad for name, p in each.model.named_parameters()})
        each.optimizer.zero_grad()
    for name, gradient in gradients[1].items():
        if learns[name]:
            torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-10, atol=1e-12)
        else:
            assert gradients[0][name] is None
    before = weights(stepper)
    assert np.isfinite(measurements(stepper, range(3), accumulate)[:, :3]).all()
    for name, weight in weights(stepper).items():
        assert torch.equal(weight, before[name]) != learns[name], name
        assert torch.equal(stepper.weights()[name], before[name]) != learns[name], name
    assert stepper.ema.weights.keys() == {name for name in learns if learns[name]}
    with_state = {id(p) for p in stepper.optimizer.state}
    expected = {id(p) for name, p in stepper.model.named_parameters() if learns[name]}
    assert with_state == expected
    resumed = new_stepper(replace(config, seed=1), dtype=torch.float64)
    resumed.load_state(deepcopy(stepper.state()))
    found = measurements(resumed, range(3, 6), accumulate)
    assert same(found, measurements(stepper, range(3, 6), accumulate))
    assert_same_bits(weights(resumed), weights(stepper))


def test_a_locked_tower_without_a_projection_still_lets_the_other_learn():
    shape = tiny_config(kind="sigmoid").task.model
    shape = replace(shape, embed_dim=16, image_projection="none")
    config = with_task(tiny_config(kind="sigmoid", lock=LockConfig(image=True)), model=shape)
    parts, whole = (new_stepper(config, dtype=torch.float64) for _ in range(2))
    found = measurements(parts, range(3), 3)
    np.testing.assert_allclose(found, measurements(whole, range(3)), rtol=1e-12)


def test_nothing_is_kept_for_a_backward_pass_below_what_is_locked():
    full, one, none = (
        count_saved(tiny_config(lock=lock))
        for lock in (
            LockConfig(),
            LockConfig(image=True, image_unlocked_blocks=1),
            LockConfig(image=True),
        )
    )
    text_alone = count_saved(tiny_config(lock=LockConfig(text=True)))
    assert none < one < full
    # All but what the projections and the unit vectors keep is of one tower or the other.
    assert none + text_alone < 1.1 * full
