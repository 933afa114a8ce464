"""One step on one process: micro-batches, recomputed blocks, the average, norms, state."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from step_cases import (
    ALONE,
    assert_same_bits,
    count_saved,
    measurements,
    micro_batches,
    new_stepper,
    same,
    tiny_config,
    weights,
)
from torch import nn

from navit_clip.models.clip import CLIPOutput
from navit_clip.models.transformer import Block
from navit_clip.tasks.locking import LockConfig
from navit_clip.training.config import TrainConfig
from navit_clip.training.ema import EMAConfig
from navit_clip.training.optim import OptimConfig
from navit_clip.training.parallel import ParallelConfig

RECOMPUTED = ParallelConfig(activation_checkpointing=True)


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
