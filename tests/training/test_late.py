"""A step whose results are read late: the same run, and nothing in it waits for the device."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hierarchical_cases import tower_config
from packed_examples import random_image
from step_cases import (
    ALONE,
    global_batch,
    micro_batches,
    new_stepper,
    pack,
    tiny_config,
    with_task,
)
from tiny_run import run, tiny_flags, write_tiny_data
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import Calls, Copies, Operators

from navit_clip.model import NaViTCLIP
from navit_clip.models.clip import CLIP
from navit_clip.models.image_tower import ImageTower, ImageTowerConfig
from navit_clip.models.masked_features import MaskedFeaturesConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.rope import RotaryConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.images import pack_images
from navit_clip.tasks.contrastive import ContrastiveTask
from navit_clip.training import trainer
from navit_clip.training.ema import EMAConfig
from navit_clip.training.late import Uploads
from navit_clip.training.nonfinite import NonFiniteError
from navit_clip.training.optim import OptimConfig


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("kind", "windows"),
    [("softmax", None), ("sigmoid", None), ("softmax", "single"), ("softmax", "grouped")],
)
def test_a_step_waits_for_the_device_nowhere(kind, windows, accumulate):
    config = tiny_config(kind=kind, accumulate=accumulate, ema=EMAConfig(0.9))
    config = with_task(config, masked=MaskedFeaturesConfig(0.25, start_step=1))
    if windows:
        model = replace(config.task.model, image=tower_config((2, 2), patch=1))
        config = with_task(config, model=model, drop_path=0.2)
    stepper = new_stepper(config)
    planner = config.task.model.image.planner(grouped=windows == "grouped")
    batches = micro_batches(0, ALONE, accumulate, planner, hide=True)
    counts = stepper.announce([batch.inputs for batch in batches]).wait()
    announced = SimpleNamespace(wait=lambda: counts)  # they never were on the device
    with Calls() as calls, Operators() as operators:
        # Optimiser state is made at the first step.
        for step in range(2):
            pending = stepper.begin(batches, step, announced, measure=True)
        assert calls.found == operators.found == []
        stepper.finish(pending)
        assert calls.found, "and the stub sees what reads"
    with Calls() as calls, Operators() as operators:
        bool(torch.ones(()) > 0)
        torch.ones(3)[torch.ones(3) > 0]
        assert calls.found
        assert operators.found


ODD = replace(
    tiny_config().task.model,
    image=ImageTowerConfig(
        patch_size=2,
        encoder=EncoderConfig(width=16, depth=2, heads=2),
        position=PositionConfig(kind="learned_1d", table_side=3),
        pooling="cls",
        class_position=True,
        registers=2,
    ),
)


WINDOWS = replace(ODD, image=tower_config((2, 2), patch=1))
TURNED = replace(ODD, image=tower_config((2, 2), patch=1, rotary=RotaryConfig("mixed")))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("config", [tiny_config().task.model, ODD, WINDOWS, TURNED])
def test_a_forward_pass_on_a_gpu_copies_nothing_that_is_waited_for(config, grouped):
    host = pack(global_batch(0), config.image.planner(grouped=grouped)).inputs
    model = CLIP(config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cuda")
        inputs = host.to("cuda", non_blocking=True)
        with Copies() as copies:
            output = model(inputs)
        assert output.image_ED.is_cuda
        assert copies.found == []
        with Copies() as copies:
            torch.zeros(3).to("cuda")
            torch.tensor([1, 2], device="cuda")
            output.image_ED.cpu()
        assert len(copies.found) == 3


def test_a_stem_on_a_gpu_copies_nothing_that_is_waited_for():
    config = ImageTowerConfig(16, EncoderConfig(32, 1, 2), stem="resnet50")
    images = [random_image(i, grid, patch_size=16) for i, grid in enumerate([(2, 3), (1, 1)])]
    host = pack_images(images, budget=9, planner=config.planner())
    tower = ImageTower(config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tower.to_empty(device="cuda")
        inputs = host.to("cuda", non_blocking=True)
        with Copies() as copies:
            assert tower(inputs).is_cuda
    assert copies.found == []


def test_batches_are_copied_beside_the_steps(monkeypatch):
    done = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            done.append((self.name, "waits for", other.name))

    @contextmanager
    def stream(side):
        done.append(("enter", side.name))
        yield
        done.append(("leave", side.name))

    class Part:
        def to(self, device, non_blocking):
            done.append(("copy", device.type, non_blocking))
            return self

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("steps"))
    parts = [Part(), Part()]
    assert Uploads(torch.device("cuda", 0)).copy(parts) == parts
    copies = [("copy", "cuda", True)] * 2
    assert done == [("enter", "side"), *copies, ("leave", "side"), ("steps", "waits for", "side")]


def test_what_a_step_reads_is_kept_until_it_is_finished():
    stepper = new_stepper(tiny_config())
    batches = micro_batches(0, ALONE, 1)
    pending = stepper.begin(batches, 0, stepper.announce([batches[0].inputs]))
    assert pending.batches is batches


def poisoned(monkeypatch, steps):
    """Makes the loss NaN at these steps, counted from 1 over all that follows."""
    loss, taken = ContrastiveTask.loss, [0]

    def bad(self, *args):
        taken[0] += 1
        found = loss(self, *args)
        total = found.total * (math.nan if taken[0] in steps else 1)
        return found._replace(total=total)

    monkeypatch.setattr(ContrastiveTask, "loss", bad)


TIMES = {"examples_per_s", "tokens_per_s", "image_tokens_per_s", "text_tokens_per_s", "step_s"}
TIMES |= {"model_flops_per_s", "data_wait", "mfu", "memory_gb"}


def logged(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root)
    return root


def trained(data, run_dir, monkeypatch, capsys, *, late, ends, bad=(), **options):
    """Runs to each of `ends` in turn; what is logged, printed, recorded and trained."""
    codes = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "reads_late", lambda device: late)
        poisoned(patch, bad)
        options = {"optim__schedule__kind": "constant", "ema__decay": 0.5, **options}
        for end in ends:
            codes.append(run(patch, tiny_flags(data, run_dir, end, **options)))
    out, err = (text.replace(str(run_dir), "RUN") for text in capsys.readouterr())
    lines = [line for line in out.splitlines() if line.startswith(("skipped", "stopped"))]
    record = run_dir / "nonfinite.jsonl"
    model = run_dir / "model"
    weights = NaViTCLIP.from_directory(model).state_dict() if model.exists() else {}
    return codes, logged(run_dir), lines, err, record.exists() and record.read_text(), weights


CASES = {
    "micro-batches": {"ends": [5], "accumulate": 2, "log__every_steps": 2},
    "a checkpoint and a resume between": {"ends": [3, 6], "checkpoint__every_steps": 2},
    "skips at a checkpoint and after the resume": {
        "ends": [3, 6],
        "bad": (3, 4),
        "on_nonfinite": "skip",
        "checkpoint__every_steps": 3,
    },
    "stops at a checkpoint": {"ends": [7], "bad": (4,), "checkpoint__every_steps": 4},
    "stops at the last step": {"ends": [4], "bad": (4,)},
    "stops after three in a row": {
        "ends": [9],
        "bad": (2, 4, 5, 6),
        "on_nonfinite": "skip",
        "max_skipped_in_row": 3,
    },
}
SLOW_CASES = {
    "every step finite": {"ends": [7], "log__every_steps": 2},
    "skips": {"ends": [7], "bad": (2, 3, 6), "on_nonfinite": "skip"},
    "stops": {"ends": [7], "bad": (4,), "checkpoint__every_steps": 2},
}


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)]
)
def test_a_run_that_reads_late_is_the_same_run(case, data, tmp_path, monkeypatch, capsys):
    options = (CASES | SLOW_CASES)[case]
    found, expected = (
        trained(data, tmp_path / name, monkeypatch, capsys, late=name == "late", **options)
        for name in ("late", "at_once")
    )
    assert found[:5] == expected[:5]
    assert bool(found[4]) == ("bad" in options)
    assert found[5].keys() == expected[5].keys()
    assert all(torch.equal(weight, expected[5][name]) for name, weight in found[5].items())


def test_what_was_begun_before_a_stop_is_known_changes_nothing(monkeypatch):
    stepper = new_stepper(tiny_config(ema=EMAConfig(0.9), optim=OptimConfig(lr=0.1)))
    poisoned(monkeypatch, {3})
    for step in range(2):
        stepper.step(micro_batches(step, ALONE, 1), step)
    before = {
        name: value.clone()
        for part in (stepper.model.state_dict(), stepper.ema.weights)
        for name, value in part.items()
    }
    begun = []
    for step in (2, 3):
        batches = micro_batches(step, ALONE, 1)
        begun.append(stepper.begin(batches, step, stepper.announce([batches[0].inputs])))
    with pytest.raises(NonFiniteError, match=r"loss nan, .* at step 3, examples 2/0"):
        stepper.finish(begun[0])
    after = stepper.model.state_dict() | stepper.ema.weights
    assert all(torch.equal(after[name], before[name]) for name in after)
    steps = {state["step"].item() for state in stepper.optimizer.state.values()}
    assert steps == {2}
