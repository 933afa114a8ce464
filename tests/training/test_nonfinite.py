"""Steps whose loss or gradient is not finite: stopped, named, or skipped."""

import json
import sys

import pytest
import torch
from step_cases import (
    ALONE,
    assert_same_bits,
    global_batch,
    measurements,
    micro_batches,
    new_stepper,
    same,
    tiny_config,
    weights,
)
from tiny_run import tiny_flags, write_tiny_data

from navit_clip.models.masked_image import PredictedPatches
from navit_clip.training.__main__ import main
from navit_clip.training.ema import EMAConfig
from navit_clip.training.nonfinite import NonFiniteError, find_examples

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


def test_rows_that_are_no_examples_accuse_none():
    outputs = [PredictedPatches(torch.full((7, 3), torch.nan))]
    assert find_examples(["a", "b"], outputs, ALONE) == ((), ("a", "b"))
