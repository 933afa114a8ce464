"""The trainer with a task it has never heard of: one stream, ragged and per-token targets, buckets.

The task is `marks_task`: an uncoupled loss over all marks and patches of all ranks.
"""

import json
import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from launch import launch, run_to_end
from marks_task import PATCH, MarkInputs, MarksConfig
from safetensors.torch import load_file
from shard_factory import SIZES, encode, photo, write_shard

from navit_clip.data.loader import load_batches
from navit_clip.distributed import Ranks
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.packed.ragged import Ragged
from navit_clip.training.__main__ import main
from navit_clip.training.config import parse_config
from navit_clip.training.ema import EMAConfig
from navit_clip.training.length import RunLength
from navit_clip.training.nonfinite import NonFiniteError, NonFiniteGuard
from navit_clip.training.optim import OptimConfig
from navit_clip.training.parallel import ParallelConfig
from navit_clip.training.schedule import ScheduleConfig
from navit_clip.training.step import Stepper
from navit_clip.training.validation import Validation, ValidationConfig

SCRIPT = Path(__file__).parents[1] / "marks_task.py"
ALONE = Ranks(0, 1, torch.device("cpu"))
STEPS = 60


def write_marked(root):
    """Shards of 60 images of many shapes, every third without a mark."""
    for shard in range(3):
        samples = {}
        for number in range(20):
            index = 20 * shard + number
            image = photo(index, *SIZES[index % len(SIZES)])
            marks = [round(0.1 * (index % 7) + 0.01 * i, 3) for i in range(index % 3)]
            members = {"png": encode(image), "json": json.dumps({"marks": marks}).encode()}
            samples[str(index)] = members
        write_shard(root / f"{shard:05d}.tar", samples)


def flags(root, run_dir, **overrides):
    """Flags of a run of the task; a double underscore stands for the dot."""
    options = {
        "run_dir": run_dir,
        "steps": STEPS,
        "task.kind": "marks",
        "data.train": root,
        "data.workers": 1,
        "data.shuffle_buffer": 8,
        "data.look_ahead": 3,
        "data.resolution.min_side": 16,
        "data.resolution.max_side": 48,
        "data.resolution.max_tokens": 24,
        "data.drop.kind": "beta",
        "data.drop.rate": 0.3,
        "data.budget.tokens": json.dumps({"patches": 60}),
        "data.budget.max_examples": 8,
        "optim.schedule.warmup_steps": 2,
        "optim.layer_decay": 0.8,
        "checkpoint.every_steps": 4,
        "log.every_steps": 1,
        "log.samples": "true",
        "accumulate": 2,
        "ema.decay": 0.5,
        "device": "cpu",
    }
    options.update({name.replace("__", "."): value for name, value in overrides.items()})
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("marked")
    write_marked(root)
    return root


# One step on global batches


def examples(step):
    """(id, image with brightness, marks) of all ranks and micro-batches at one step."""
    rng = np.random.default_rng(step)
    found = []
    for index in range(int(rng.integers(7, 12))):
        rows, columns = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        patches = rng.integers(0, 256, (rows * columns, 3 * PATCH**2), dtype=np.uint8)
        coords = np.stack(np.divmod(np.arange(rows * columns), columns), 1).astype(np.int32)
        targets = (patches.mean(1) / 255).astype(np.float32)
        image = ImagePatches(patches, coords, (rows, columns), targets)
        found.append((f"{step}/{index}", image, rng.random(index % 3).astype(np.float32)))
    return found


def pack(part):
    inputs = MarkInputs(
        pack_images([image for _, image, _ in part]), Ragged.from_arrays([m for _, _, m in part])
    )
    return Batch(inputs, tuple(name for name, _, _ in part), BatchCounts(len(part)))


def micro_batches(step, ranks, accumulate):
    mine = examples(step)[ranks.rank :: ranks.world_size]
    return [pack(mine[number::accumulate]) for number in range(accumulate)]


def new_stepper(ranks=ALONE, parallel=None, policy="stop"):
    torch.manual_seed(0)
    config, _ = parse_config(flags("unused", "unused"))
    task = MarksConfig().build(config.data)
    return Stepper(
        task,
        task.build_model().double(),
        ranks,
        length=RunLength(20),
        optim=OptimConfig(
            lr=1e-2, eps=1e-6, layer_decay=0.8, schedule=ScheduleConfig(warmup_steps=1)
        ),
        parallel=parallel or ParallelConfig(),
        ema=EMAConfig(0.5),
        guard=NonFiniteGuard(policy, 3),
        precision="fp32",
    )


def loss_slowly(model, step):
    """One example at a time: errors of all marks and patches over their number."""
    errors, count = [], 0
    for _, image, marks in examples(step):
        outputs = model(pack([("", image, marks)]).inputs)
        for mark in marks:
            errors.append((outputs.mark_E[0] + outputs.offset - float(mark)) ** 2)
        for value, target in zip(outputs.brightness.values, image.targets, strict=True):
            errors.append((value - float(target)) ** 2)
        count += len(marks) + len(image.targets)
    return torch.stack(errors).sum() / count


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_step_has_the_loss_and_gradient_of_the_obvious_way(accumulate):
    stepper, plain = new_stepper(), new_stepper().model
    inputs = [batch.inputs for batch in micro_batches(0, ALONE, accumulate)]
    loss, _ = stepper._backward(inputs, stepper.announce(inputs))
    expected = loss_slowly(plain, 0)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    for (name, found), other in zip(
        stepper.model.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, other.grad, rtol=1e-10, atol=1e-13, msg=name)


def test_the_validation_loss_is_that_of_all_pieces_of_a_batch():
    stepper = new_stepper()
    task, pieces = stepper.task, [batch.inputs for batch in micro_batches(0, ALONE, 3)]
    validation = Validation(ValidationConfig(), task, None, ALONE)
    found = validation._loss(stepper.model, pieces, sum(map(task.count, pieces)))
    assert found == pytest.approx(loss_slowly(stepper.model, 0).item(), rel=1e-12)


def train_steps(ranks, parallel, accumulate):
    stepper = new_stepper(ranks, parallel)
    rows = []
    for step in range(5):
        result = stepper.step(micro_batches(step, ranks, accumulate), step)
        rows.append((result.loss, result.grad_norm, result.metrics["mark_loss"]))
    weights = stepper.host_weights()
    return np.array(rows), weights and {n: w.numpy() for n, w in weights.items()}


CASES = {"ddp": ParallelConfig(), "fsdp": ParallelConfig("fsdp")}


def train_cases():
    ranks = Ranks(int(os.environ["RANK"]), 2, torch.device("cpu"))
    return {name: train_steps(ranks, case, 2) for name, case in CASES.items()}


def test_two_ranks_with_micro_batches_train_like_one_process():
    expected, expected_weights = train_steps(ALONE, ParallelConfig(), 1)
    for rank, results in enumerate(run_ranks(train_cases, 2)):
        for found, weights in results.values():
            np.testing.assert_allclose(found, expected, rtol=1e-11)
            assert (weights is not None) == (rank == 0)
            for name, weight in (weights or {}).items():
                np.testing.assert_allclose(weight, expected_weights[name], rtol=1e-9, atol=1e-12)


def test_what_the_task_does_after_a_step_and_by_layer():
    stepper = new_stepper()
    with torch.no_grad():
        stepper.model.offset.fill_(9.0)
    stepper.step(micro_batches(0, ALONE, 1), 0)
    assert stepper.model.offset.item() == 0.25
    factors = {
        group["lr"] / stepper.optimizer.param_groups[-1]["lr"]
        for group in stepper.optimizer.param_groups
    }
    assert len(factors) == 2


def test_a_non_finite_output_names_its_example():
    stepper = new_stepper()
    batches = micro_batches(0, ALONE, 2)
    hook = stepper.model.pool.register_forward_hook(
        lambda module, inputs, pooled: pooled.index_fill(0, torch.tensor([0]), torch.nan)
    )
    with pytest.raises(NonFiniteError) as error:
        stepper.step(batches, 0)
    hook.remove()
    # The first segment of each micro-batch, wherever its image came.
    expected = {batch.ids[batch.inputs.images.order.tolist().index(0)] for batch in batches}
    assert set(error.value.found.suspects) == expected
    assert set(error.value.found.examples) == {name for name, _, _ in examples(0)}


# Whole runs


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir):
    return [(v["step"], v["loss"], v["grad_norm"], v["mark_loss"]) for v in metrics(run_dir)]


def saved(run_dir):
    return any((run_dir / "checkpoints").glob("step-????????"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(data, tmp_path, ranks):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    alone, output = ranks == 1, tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *([] if alone else launcher), str(SCRIPT)]
    with launch([*command, *flags(data, parts)], output, forked=alone) as running:
        running.until(lambda: saved(parts), "a checkpoint")
        running.kill_all()  # ranks outlive their torchrun
    assert len(curve(parts)) < STEPS, "killed before its end"
    run_to_end([*command, *flags(data, parts)], output, forked=alone)
    assert "continuing from step" in output.read_text()
    if alone:
        main(flags(data, whole), "train")
    else:
        run_to_end([*command, *flags(data, whole)], output)
    assert curve(parts) == curve(whole)
    one, other = (load_file(d / "model/model.safetensors") for d in (parts, whole))
    assert all(torch.equal(one[name], weight) for name, weight in other.items())
    for rank in range(ranks):
        name = f"samples-{rank}.jsonl"
        assert (parts / name).read_text() == (whole / name).read_text()
    last = metrics(whole)[-1]
    assert {"examples", "examples_per_s", "patches_tokens_per_s", "token_drop"} <= last.keys()
    assert json.loads(max(whole.glob("checkpoints/step-*/model.json")).read_text()) == {
        "kind": "marks"
    }


def test_batches_hold_one_bucket_and_targets_follow_their_patches(data):
    config, _ = parse_config(
        flags(data, "unused", data__workers=0, data__packing="exact", data__pad_to_budget="true")
    )
    build = config.task.build(config.data).build_samples(None, 0)
    shapes = set()
    for batch in islice(load_batches(build, config.data, seed=0), 20):
        images = batch.inputs.images
        real = images.segments.num_examples
        shapes.add(tuple({bool(rows > columns) for rows, columns in images.grids[:real].tolist()}))
        mean_T = images.patches.float().mean(1) / 255
        torch.testing.assert_close(images.targets, mean_T)
        assert len(batch.inputs.marks) == real == batch.counts.examples
        assert batch.counts.streams["patches"].budget == 60
    assert shapes == {(True,), (False,)}


MISTAKES = [
    ({"task__kind": "markz"}, "marks, got 'markz'; did you mean marks?"),
    ({"data__budget__tokens": '{"image": 60}'}, "data.budget.tokens"),
    ({"task__encoder__heads": 3}, "heads"),
    ({"task__loss__kind": "softmax"}, "task.loss"),
]


@pytest.mark.parametrize(("change", "named"), MISTAKES)
def test_a_mistake_is_one_line(data, tmp_path, capsys, change, named):
    with pytest.raises(SystemExit) as stop:
        main(flags(data, tmp_path / "run", **change), "train")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: error: ")
    assert named in line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_task_without_text_needs_no_tokenizer(data):
    config, resolved = parse_config(flags(data, "unused"))
    assert config.tokenizer is None
    assert isinstance(config.task, MarksConfig)
    assert "kind: marks" in resolved
