"""bfloat16 autocast on the processor trains like float32."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from step_cases import ALONE, micro_batches, new_stepper, tiny_config, with_task

from navit_clip.models.transformer import Block
from navit_clip.tasks import contrastive
from navit_clip.tasks.contrastive import ContrastiveLossConfig
from navit_clip.training.optim import OptimConfig
from navit_clip.training.parallel import ParallelConfig
from navit_clip.training.schedule import ScheduleConfig

STEPS = 40


def losses(precision: str, seed: int, parallel: ParallelConfig | None = None) -> np.ndarray:
    """[STEPS] losses of a run on five batches that return; `seed` is that of the weights."""
    optim = OptimConfig(lr=3e-3, eps=1e-6, schedule=ScheduleConfig(warmup_steps=2))
    config = tiny_config(steps=1000, precision=precision, seed=seed, optim=optim)
    stepper = new_stepper(replace(config, parallel=parallel or ParallelConfig()))
    batches = [micro_batches(number, ALONE, 1) for number in range(5)]
    return np.array([stepper.step(batches[step % 5], step).loss for step in range(STEPS)])


@pytest.fixture(scope="module")
def curves() -> dict[tuple[str, int], np.ndarray]:
    return {(p, seed): losses(p, seed) for p in ("fp32", "bf16") for seed in (0, 1)}


def test_the_curves_of_both_precisions_lie_close(curves):
    # Another draw of the first weights moves the curve far more than rounding does: a mean
    # distance of 0.2 here, against 0.02 and 0.07.
    between_seeds = np.abs(curves["fp32", 0] - curves["fp32", 1]).mean()
    for seed in (0, 1):
        distance = np.abs(curves["bf16", seed] - curves["fp32", seed])
        assert 0 < distance.mean() < between_seeds / 2
        # Before any update there is only the rounding of one pass, 8 bits wide.
        assert distance[0] < 0.02


def test_a_residual_stream_in_bfloat16_learns_as_well(curves, monkeypatch):
    seen = []
    run = Block.forward

    def watch(block, x_TC, *args):
        seen.append(x_TC.dtype)
        return run(block, x_TC, *args)

    monkeypatch.setattr(Block, "forward", watch)
    curve = losses("bf16", 0, ParallelConfig(bf16_residual=True))
    assert set(seen) == {torch.bfloat16}
    between_seeds = np.abs(curves["fp32", 0] - curves["fp32", 1]).mean()
    distance = np.abs(curve - curves["fp32", 0])
    assert 0 < distance.mean() < between_seeds / 2
    assert distance[0] < 0.04


def test_both_learn_as_much(curves):
    for (precision, seed), curve in curves.items():
        assert np.isfinite(curve).all()
        assert curve[-5:].mean() < 0.5 * curve[0], (precision, seed)
        learned = curves["fp32", seed][0] - curves["fp32", seed][-5:].mean()
        assert curve[0] - curve[-5:].mean() == pytest.approx(learned, rel=0.1)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_follows_autocast_unless_it_has_a_precision_of_its_own(
    precision, parts, monkeypatch
):
    seen = []
    loss = contrastive.softmax_contrastive_loss

    def watch(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss(*args, **kwargs)

    monkeypatch.setattr(contrastive, "softmax_contrastive_loss", watch)
    for own in ("auto", "fp32"):
        config = with_task(
            tiny_config(precision=precision), loss=ContrastiveLossConfig(precision=own)
        )
        new_stepper(config).step(micro_batches(0, ALONE, parts), 0)
    assert seen == [precision == "bf16", False]
