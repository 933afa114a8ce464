"""One step on one process: micro-batches, recomputed blocks, the average, norms, bad numbers."""

import json
import sys
from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from step_cases import (
    ALONE,
    global_batch,
    measurements,
    micro_batches,
    new_stepper,
    pack,
    tiny_config,
    with_task,
)
from tiny_run import tiny_flags, write_tiny_data
from torch import nn

from navit_clip.models.clip import CLIPOutput
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.transformer import Block, EncoderConfig
from navit_clip.tasks.locking import LockConfig
from navit_clip.training.__main__ import main
from navit_clip.training.config import TrainConfig
from navit_clip.training.ema import EMAConfig
from navit_clip.training.nonfinite import NonFiniteError
from navit_clip.training.optim import OptimConfig, build_optimizer
from navit_clip.training.parallel import ParallelConfig
from navit_clip.training.schedule import ScheduleConfig, lr_multiplier

RECOMPUTED = ParallelConfig(activation_checkpointing=True)


def weights(stepper):
    return {name: p.detach().clone() for name, p in stepper.model.named_parameters()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) or found[name].isnan().any(), name


def same(found, expected):
    return np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches_equal_one_batch(kind, accumulate):
    parts = new_stepper(tiny_config(kind=kind, accumulate=accumulate), dtype=torch.float64)
    whole = new_stepper(tiny_config(kind=kind), dtype=torch.float64)
    found = measurements(parts, range(5), accumulate)
    np.testing.assert_allclose(found, measurements(whole, range(5)), rtol=1e-12)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], weight, rtol=1e-11, atol=1e-13)


def test_micro_batches_replay_what_is_random():
    config = tiny_config(accumulate=3, parallel=RECOMPUTED)
    inputs = [batch.inputs for batch in micro_batches(0, ALONE, 3)]
    gradients, ends = [], []
    for held in (False, True):
        stepper = new_stepper(config, dtype=torch.float64)
        for block in stepper.model.image.encoder.blocks:
            block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.5))
        torch.manual_seed(5)
        if held:  # the obvious way: the graphs of all micro-batches at once
            outputs = [stepper.model(part) for part in inputs]
            images, texts = (torch.cat([o[side] for o in outputs]) for side in (0, 1))
            output = CLIPOutput(images, texts, outputs[0].logit_scale, None)
            stepper.task.loss(output).total.backward()
        else:
            stepper._backward(inputs, stepper.announce(inputs))
        gradients.append({n: p.grad for n, p in stepper.model.named_parameters()})
        ends.append(torch.rand(3))
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-10, atol=1e-12)
    assert torch.equal(*ends), "and leave the generator where one pass would"


def test_recomputed_blocks_change_no_bit():
    plain, recomputed = new_stepper(tiny_config()), new_stepper(tiny_config(parallel=RECOMPUTED))
    assert same(measurements(plain, range(4)), measurements(recomputed, range(4)))
    assert_same_bits(weights(recomputed), weights(plain))


def count_saved(config):
    """Numbers that one step keeps for its backward pass."""
    stepper, kept = new_stepper(config), 0

    def pack_hook(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        stepper._forward(pack(global_batch(0)).inputs)
    return kept


def test_recomputed_blocks_keep_less():
    assert count_saved(tiny_config(parallel=RECOMPUTED)) < 0.6 * count_saved(tiny_config())


def test_compiled_blocks_compute_the_same_and_compile_a_few_times_only(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        "navit_clip.models.transformer.compiled_block",
        cache(lambda: torch.compile(Block._run, fullgraph=True, dynamic=False, backend=backend)),
    )
    torch._dynamo.reset()
    compiled = new_stepper(tiny_config(parallel=ParallelConfig(compile=True)))
    plain = new_stepper(tiny_config())
    np.testing.assert_allclose(
        measurements(compiled, range(3)), measurements(plain, range(3)), rtol=1e-5
    )
    # Once for the first batch's number of tokens, once for any, whatever lengths its images have.
    once = len(graphs)
    measurements(compiled, range(3, 8))
    assert 0 < len(graphs) == once
    assert compiled.host_weights().keys() == plain.host_weights().keys()


def test_average_of_weights():
    stepper = new_stepper(tiny_config(ema=EMAConfig(0.9)))
    expected = weights(stepper)
    for step in range(4):
        measurements(stepper, range(step, step + 1))
        current = weights(stepper)
        expected = {n: 0.9 * old + 0.1 * current[n] for n, old in expected.items()}
    exported = stepper.host_weights()
    for name, value in expected.items():
        torch.testing.assert_close(stepper.ema.weights[name], value, rtol=1e-5, atol=1e-7)
        assert torch.equal(exported[name], stepper.ema.weights[name])
        torch.testing.assert_close(weights(stepper)[name], current[name], rtol=0, atol=0)


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


def norm(tensors):
    return torch.cat([t.double().flatten() for t in tensors]).norm().item()


def test_norms_of_weights_and_of_the_update():
    stepper = new_stepper(tiny_config())
    for step in range(3):
        before = weights(stepper)
        result = stepper.step(micro_batches(step, ALONE, 1), step, measure=step != 1)
        if step == 1:
            assert not result.measured
            continue
        after = weights(stepper)
        update = norm([after[n] - before[n] for n in after])
        assert result.measured["param_norm"] == pytest.approx(norm(after.values()), rel=1e-5)
        assert result.measured["update_norm"] == pytest.approx(update, rel=1e-5)


def test_state_restores_everything():
    config = tiny_config(ema=EMAConfig(0.5), on_nonfinite="skip")
    first, second = new_stepper(config), new_stepper(replace(config, seed=1))
    measurements(first, range(3))
    first.guard.skipped_steps, first.guard.in_row = 3, 2
    second.load_state(deepcopy(first.state()))
    assert second.guard.state() == {"skipped_steps": 3, "in_row": 2}
    assert same(measurements(second, range(3, 6)), measurements(first, range(3, 6)))
    exported = second.host_weights()
    assert_same_bits({name: exported[name] for name in first.ema.weights}, first.ema.weights)


TOKEN = 7


def with_bad_token(config, value=torch.nan):
    """A stepper whose features are not finite wherever a caption holds one token."""
    stepper = new_stepper(config)
    with torch.no_grad():
        stepper.model.text.token[TOKEN] = value
    return stepper


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_non_finite_step_stops_and_names_its_pairs(accumulate):
    stepper = with_bad_token(tiny_config(accumulate=accumulate))
    before = weights(stepper)
    with pytest.raises(NonFiniteError, match=r"at step 5, examples 4/.* non-finite out") as e:
        stepper.step(micro_batches(4, ALONE, accumulate), 4)
    assert "\n" not in str(e.value)
    assert set(e.value.found.examples) == {name for name, _, _ in global_batch(4)}
    assert set(e.value.found.suspects) == {n for n, _, ids in global_batch(4) if TOKEN in ids}
    assert_same_bits(weights(stepper), before)


def test_skipped_steps_leave_the_weights_and_stop_after_so_many_in_a_row():
    config = tiny_config(on_nonfinite="skip", max_skipped_in_row=3, ema=EMAConfig(0.9))
    stepper, twin = with_bad_token(config), with_bad_token(config)
    for step in range(2):
        before, averages = weights(stepper), dict(stepper.ema.weights)
        result = stepper.step(micro_batches(step, ALONE, 1), step, measure=True)
        assert result.nonfinite.step == step + 1
        assert_same_bits(weights(stepper), before)
        assert_same_bits(stepper.ema.weights, averages)
    assert stepper.guard.skipped_steps == 2
    for each in (stepper, twin):
        with torch.no_grad():
            each.model.text.token[TOKEN] = 0
            each.ema.weights["text.token"][TOKEN] = 0
    # The optimiser has seen nothing of them either.
    assert same(measurements(stepper, range(2, 5)), measurements(twin, range(2, 5)))
    with torch.no_grad():
        stepper.model.text.token[TOKEN] = torch.nan
    for step in (5, 6):
        stepper.step(micro_batches(step, ALONE, 1), step)
    with pytest.raises(NonFiniteError, match=r"at step 8, .*; 3 steps in a row skipped"):
        stepper.step(micro_batches(7, ALONE, 1), 7)
    assert stepper.guard.skipped_steps == 5


def test_an_overflowing_gradient_names_the_batch():
    stepper = new_stepper(tiny_config())
    stepper.model.image_projection.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteError, match=r"at step 1, examples 0/0, .* and \d+ more \(all"):
        stepper.step(micro_batches(0, ALONE, 1), 0)


def test_a_run_that_skips_says_so_and_stops_at_last(tmp_path, monkeypatch, capsys):
    write_tiny_data(tmp_path)
    run_dir = tmp_path / "run"
    options = {"optim__clip_norm": 0, "optim__weight_decay": 0, "accumulate": 2}
    options |= {"optim__lr": 1e12, "on_nonfinite": "skip", "max_skipped_in_row": 3}
    monkeypatch.setattr(sys, "argv", ["train", *tiny_flags(tmp_path, run_dir, 30, **options)])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    assert out.count("skipped a step: loss") == 2
    assert "3 steps in a row skipped" in err
    assert err.count("\n") == 1
    lines = [json.loads(line) for line in (run_dir / "nonfinite.jsonl").open()]
    assert len(lines) == 3
    assert all(len(line["examples"]) > 1 for line in lines)
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert logged[-1]["skipped_steps"] == 2
    assert {"grad_norm", "param_norm", "update_norm"} <= set(logged[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EMAConfig(1.0), "decay must be at least 0 and below 1, got 1.0"),
        (lambda: ParallelConfig("tp"), "kind must be one of ddp, fsdp, got 'tp'"),
        (lambda: OptimConfig(layer_decay=0.0), r"layer_decay must lie in \(0, 1\], got 0.0"),
        (lambda: OptimConfig(layer_decay=1.1), "layer_decay must lie in"),
        (
            lambda: LockConfig(text_unlocked_blocks=1),
            "text_unlocked_blocks=1 needs text: true",
        ),
        (lambda: LockConfig(True, image_unlocked_blocks=-1), "image_unlocked_blocks must not be n"),
        (
            lambda: tiny_config(lock=LockConfig(True, image_unlocked_blocks=3)),
            "lock.image_unlocked_blocks=3 exceeds the 2 blocks",
        ),
        (lambda: tiny_config(accumulate=0), "accumulate must be at least 1, got 0"),
        (lambda: tiny_config(max_skipped_in_row=0), "max_skipped_in_row must be at least 1"),
        (lambda: tiny_config(on_nonfinite="ignore"), "on_nonfinite must be one of stop, skip"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_by_default_nothing_is_on():
    defaults = TrainConfig.__dataclass_fields__
    assert defaults["accumulate"].default == 1
    assert defaults["on_nonfinite"].default == "stop"
    assert ParallelConfig() == ParallelConfig("ddp", True, False, None)
