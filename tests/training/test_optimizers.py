"""Optimisers by name train in the same groups, skip, resume and share a model as AdamW does."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from step_cases import ALONE, measurements, micro_batches, new_stepper, tiny_config
from tiny_run import run, tiny_flags, write_tiny_data
from torch import nn

from navit_clip.averages import local_tensor
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.tasks.images import layers_above
from navit_clip.training.config import parse_config
from navit_clip.training.optim import OptimConfig
from navit_clip.training.optimizers import _try_out
from navit_clip.training.parallel import ParallelConfig
from navit_clip.training.schedule import ScheduleConfig, lr_multiplier

FSDP, HSDP = ParallelConfig("fsdp"), ParallelConfig("fsdp", shard_ranks=1)
# By name: arguments, and the largest relative difference that more ranks may make.
NAMES = {
    "sgd": ({"momentum": 0.8}, 1e-12),
    "torch.SGD": ({}, 1e-12),
    "lion": ({"betas": [0.95, 0.98]}, 1e-3),  # takes the sign of a bias's rounding error
    "lamb": ({}, 1e-12),
    "muon": ({}, 1e-2),  # multiplies in bfloat16
    "adamw": ({"fused": False, "foreach": True}, 1e-12),
}
CASES = [("muon", HSDP), *((name, kind) for name in NAMES for kind in (ParallelConfig(), FSDP))]


def config(name, lr=1e-3, **changes):
    args, _ = NAMES.get(name, ({}, 0))
    return tiny_config(optim=OptimConfig(name, lr, args=args, weight_decay=0.2), **changes)


def weights(stepper):
    return {name: p.detach().clone() for name, p in stepper.model.named_parameters()}


def assert_same(stepper, other):
    expected = weights(other)
    for name, weight in weights(stepper).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_it_stops_and_goes_on_bit_for_bit_and_skips_what_is_not_finite(name):
    run = config(name, on_nonfinite="skip")
    whole, resumed = new_stepper(run), new_stepper(replace(run, seed=1))
    measurements(whole, range(2))
    resumed.load_state(deepcopy(whole.state()))
    assert_same(resumed, whole)
    before, moments = weights(whole), deepcopy(whole.optimizer.state_dict())
    handle = whole.model.image_projection.weight.register_hook(lambda grad: grad * torch.nan)
    assert whole.step(micro_batches(2, ALONE, 1), 2).nonfinite
    handle.remove()
    assert all(torch.equal(weight, before[key]) for key, weight in weights(whole).items())
    after = whole.optimizer.state_dict()
    for key, values in moments["state"].items():
        for part, value in values.items():
            assert np.array_equal(value, after["state"][key][part]), (key, part)
    for stepper in (whole, resumed):
        measurements(stepper, range(3, 5))
    assert_same(resumed, whole)


class LocalNorm(torch.optim.SGD):
    """Scales the gradient by the norm of what this rank holds of it."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad /= local_tensor(p.grad).norm()
        super().step()


class Forgetful(torch.optim.SGD):
    """Counts its steps where no checkpoint looks."""

    def step(self):
        self.steps = getattr(self, "steps", 0) + 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.steps
        super().step()


def run_cases():
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    results = {}
    for name, kind in CASES:
        stepper = new_stepper(config(name, parallel=kind), ranks, torch.float64)
        results[name, kind] = measurements(stepper, range(2))
    with pytest.raises(ValueError, match=r"takes other steps on FSDP's shards, use parallel"):
        _try_out(LocalNorm, stepper.optimizer.param_groups)
    return results


@pytest.fixture(scope="module")
def shared():
    return run_ranks(run_cases, 2, timeout=280)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_ranks_train_like_one_process(shared, name, kind):
    expected = measurements(new_stepper(config(name), dtype=torch.float64), range(2))
    for result in shared:
        np.testing.assert_allclose(result[name, kind], expected, rtol=NAMES[name][1])


def test_an_optimiser_that_a_checkpoint_does_not_hold_is_refused():
    groups = [{"params": [torch.ones(3, 2)], "weight_decay": 0.0}]
    _try_out(torch.optim.SGD, groups)
    with pytest.raises(ValueError, match="goes on from a checkpoint otherwise than without"):
        _try_out(Forgetful, groups)


def test_the_last_norm_has_nothing_above_it_wherever_it_stands():
    names = ("encoder.norm.weight", "norm.weight", "pool.query")
    assert {layers_above(name, 12) for name in names} == {0}
    above = [layers_above(f"{n}.weight", 12) for n in ("encoder.blocks.11.norm1", "embed")]
    assert above == [1, 13]


def one_optimiser_per_parameter(model, optim, layers_above):
    """What the groups stand for, slowly: an SGD of each parameter's own."""
    return {
        name: torch.optim.SGD(
            [p],
            momentum=0.9,
            nesterov=True,
            lr=optim.lr * optim.layer_decay ** layers_above(name),
            weight_decay=optim.weight_decay if p.ndim >= 2 else 0.0,
        )
        for name, p in model.named_parameters()
    }


def test_groups_train_as_one_optimiser_per_parameter():
    schedule = ScheduleConfig("cosine", warmup_steps=2)
    optim = OptimConfig("sgd", 1e-2, layer_decay=0.6, clip_norm=0, schedule=schedule)
    run = tiny_config(optim=optim, steps=6)
    stepper, slow = (new_stepper(run, dtype=torch.float64) for _ in range(2))
    optimisers = one_optimiser_per_parameter(slow.model, optim, slow.task.layers_above)
    peaks = {name: o.param_groups[0]["lr"] for name, o in optimisers.items()}
    for step in range(4):
        batches = micro_batches(step, ALONE, 1)
        stepper.step(batches, step)
        slow.task.loss(slow.model(batches[0].inputs)).total.backward()
        for name, optimiser in optimisers.items():
            optimiser.param_groups[0]["lr"] = peaks[name] * lr_multiplier(schedule, step, 6)
            optimiser.step()
            optimiser.zero_grad()
    expected = weights(slow)
    for name, weight in weights(stepper).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-12)


def test_muon_is_for_the_matrices_of_linear_layers():
    stepper = new_stepper(config("muon"))
    measurements(stepper, range(1))
    states = stepper.optimizer.state
    muon = {n for n, p in stepper.model.named_parameters() if "momentum_buffer" in states[p]}
    adamw = {n for n, p in stepper.model.named_parameters() if "exp_avg_sq" in states[p]}
    matrices = {
        f"{name}.weight" for name, m in stepper.model.named_modules() if isinstance(m, nn.Linear)
    }
    assert muon == matrices
    assert adamw == {n for n, _ in stepper.model.named_parameters()} - matrices
    assert "text.token" in adamw


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.name", "AdamWW"], "optim.name=AdamWW is unknown; did you mean adamw?; there "),
        (["--optim.name", "torch.sgd"], "is unknown; did you mean torch.SGD?"),
        (["--optim.name", "sgd", "--optim.args", "{momentun: 1}"], "did you mean momentum?"),
        (["--optim.name", "sgd", "--optim.args", "{lr: 1}"], "args.lr: write it as optim.lr"),
        (["--optim.args", "{eps: 1}"], "optim.args.eps: write it as optim.eps"),
        (["--optim.name", "sgd", "--optim.args", "{momentum: .nan}"], "momentum must be a finite"),
    ],
)
def test_what_there_is_not_is_one_line(flags, message):
    with pytest.raises(UserError) as caught:
        parse_config(["--run_dir", "x", "--steps", "9", "--tokenizer.path", "t", *flags])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("torch.LBFGS", {}, "cannot be used here: LBFGS doesn't support per-parameter options"),
        ("torch.Rprop", {}, "it has no weight decay, set optim.weight_decay to 0"),
        ("sgd", {"momentum": -1}, "momentum"),
        ("lion", {"betas": 3}, "optim.name=lion cannot be used here: "),
    ],
)
def test_what_cannot_train_is_one_line(name, args, message):
    with pytest.raises(UserError) as caught:
        new_stepper(tiny_config(optim=OptimConfig(name, args=args)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_with_its_optimiser_and_no_other(tmp_path, monkeypatch, capsys):
    write_tiny_data(tmp_path, train=48)
    options = {"optim__name": "muon", "ema__decay": 0.5, "optim__schedule__warmup_steps": 0}
    for name, ends in (("whole", [4]), ("parts", [1, 4])):
        for steps in ends:
            assert run(monkeypatch, tiny_flags(tmp_path, tmp_path / name, steps, **options)) == 0
    models = [(tmp_path / n / "model/model.safetensors").read_bytes() for n in ("whole", "parts")]
    assert models[0] == models[1]
    capsys.readouterr()
    options["optim__name"] = "lion"
    assert run(monkeypatch, tiny_flags(tmp_path, tmp_path / "parts", 5, **options)) == 2
    assert (
        "optim.name is lion, was muon: keep it, or use another run_dir" in capsys.readouterr().err
    )


def test_decay_and_momentum_are_as_the_configuration_says_now():
    first, second = new_stepper(config("sgd")), new_stepper(config("sgd"))
    second.optimizer.param_groups[0]["momentum"] = 0.5
    first.load_state(deepcopy(second.state()))
    assert first.optimizer.param_groups[0]["momentum"] == 0.8
