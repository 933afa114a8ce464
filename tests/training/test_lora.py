"""Adapters (LoRA) in training: who learns, on one rank and on two, resumed, merged, refused."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from step_cases import ALONE, measurements, micro_batches, new_stepper, tiny_config, with_task
from test_finetune import finetune_flags, losses, save_source
from tiny_run import run, write_tiny_data

from navit_clip.checkpoints.load_run import load_run
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.model import NaViTCLIP
from navit_clip.models.flops import LengthSums, backward_flops, forward_flops
from navit_clip.models.lora import LoraConfig, add_adapters, merge_adapters
from navit_clip.models.transformer import compiled_block
from navit_clip.tasks.locking import LockConfig
from navit_clip.training.config import TrainConfig
from navit_clip.training.ema import EMAConfig
from navit_clip.training.optim import OptimConfig
from navit_clip.training.parallel import ParallelConfig
from navit_clip.training.step import Stepper

pytest.importorskip("peft", reason="peft (extra lora) is not installed")

ALL = ["qkv", "out", "up", "down"]
BOTH = LoraConfig(image=["qkv", "down"], text=ALL, rank=2, alpha=6.0)
IMAGE = LoraConfig(image=["qkv", "out"], rank=3)


def lora_config(lora: LoraConfig, **changes: Any) -> TrainConfig:
    lock = changes.pop("lock", LockConfig())
    return with_task(tiny_config(**changes), lora=lora, lock=lock)


def of_towers(name: str) -> bool:
    return name.startswith(("image.", "text."))


def test_only_adapters_projections_and_scale_learn():
    stepper = new_stepper(lora_config(BOTH))
    learning = {name for name, p in stepper.model.named_parameters() if p.requires_grad}
    assert {name for name in learning if not of_towers(name)} == {
        "image_projection.weight", "text_projection.weight", "log_scale"
    }  # fmt: skip
    adapters = {name for name in learning if of_towers(name)}
    # Three blocks, two of images with two layers each and one of texts with four; two matrices.
    assert len(adapters) == 2 * (2 * 2 + 4)
    assert all(".lora_" in name for name in adapters)
    before = {name: p.detach().clone() for name, p in stepper.model.named_parameters()}
    measurements(stepper, range(3))
    for name, parameter in stepper.model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in learning), name
    held = {p for group in stepper.optimizer.param_groups for p in group["params"]}
    assert len(held) == len(learning)


def test_layer_decay_knows_the_blocks_of_adapters():
    optim = OptimConfig(lr=1e-3, layer_decay=0.5)
    stepper = new_stepper(lora_config(IMAGE, optim=optim, lock=LockConfig(text=True)))
    measurements(stepper, range(1))
    rates = {
        id(p): group["lr"] for group in stepper.optimizer.param_groups for p in group["params"]
    }
    found = {n: rates[id(p)] for n, p in stepper.model.named_parameters() if p.requires_grad}
    top = found["image_projection.weight"]
    for name, rate in found.items():
        block = next((b for b in (0, 1) if f"image.encoder.blocks.{b}." in name), 2)
        assert rate == pytest.approx(top * 0.5 ** (2 - block)), name


def trained(config: TrainConfig, ranks: Ranks = ALONE, steps: int = 4) -> tuple[Stepper, Any]:
    stepper = new_stepper(config, ranks, torch.float64)
    return stepper, measurements(stepper, range(steps), config.accumulate)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_merged_weights_are_those_of_a_plain_model(ema):
    stepper, _ = trained(lora_config(BOTH, ema=EMAConfig(ema)))
    plain = stepper.task.build_model().double()
    merged = stepper.full_weights()
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    adapted = stepper.model
    adapted.load_state_dict(stepper.weights())
    batch = micro_batches(9, ALONE, 1)[0].inputs
    with torch.no_grad():
        for actual, expected in zip(plain(batch)[:2], adapted(batch)[:2], strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        start = new_stepper(lora_config(BOTH), dtype=torch.float64).model(batch)
        assert (start.image_ED - expected).abs().max() > 1e-3  # they have learned


def test_merging_is_what_peft_merges():
    from peft.tuners.lora import LoraLayer

    stepper, _ = trained(lora_config(BOTH))
    merged = stepper.full_weights()
    layers = {n: m for n, m in stepper.model.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == 8
    for name, layer in layers.items():
        layer.merge()
        torch.testing.assert_close(merged[f"{name}.weight"], layer.get_base_layer().weight)


CASES = {
    "ddp": lora_config(BOTH, ema=EMAConfig(0.9)),
    "fsdp, micro-batches": lora_config(
        BOTH, accumulate=2, parallel=ParallelConfig("fsdp"), ema=EMAConfig(0.9)
    ),
    "fsdp, text locked": lora_config(
        IMAGE, lock=LockConfig(text=True), parallel=ParallelConfig("fsdp")
    ),
}


def run_case(config: TrainConfig, ranks: Ranks) -> tuple[Any, Any]:
    stepper, found = trained(config, ranks)
    exported = stepper.host_weights()
    return found, exported and {name: weight.numpy() for name, weight in exported.items()}


def run_cases() -> dict[str, Any]:
    ranks = Ranks(dist.get_rank(), 2, torch.device("cpu"))
    return {name: run_case(config, ranks) for name, config in CASES.items()}


@pytest.mark.slow
def test_two_ranks_train_like_one_process():
    results = run_ranks(run_cases, 2)
    for name, config in CASES.items():
        alone = replace(config, parallel=ParallelConfig(), accumulate=1)
        expected, weights = run_case(alone, ALONE)
        for result in results:
            np.testing.assert_allclose(result[name][0], expected, rtol=1e-10, err_msg=name)
        for key, weight in weights.items():
            np.testing.assert_allclose(
                results[0][name][1][key], weight, rtol=1e-8, atol=1e-11, err_msg=f"{name} {key}"
            )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root)
    save_source(root, "square")
    return root


FLAGS = {
    "task__lora__image": "[qkv, up]",
    "task__lora__text": "[qkv]",
    "task__lora__rank": 4,
    "task__lora__dropout": 0.2,
    "ema__decay": 0.5,
    "accumulate": 2,
    "optim__lr": 0.01,
}


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A run of four steps, and one that was stopped after two."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
            assert run(patch, finetune_flags(data, root / name, steps, **FLAGS)) == 0
    return root / "whole", root / "parts"


def test_a_run_goes_on_bit_for_bit(runs):
    whole, parts = runs
    assert losses(parts) == losses(whole)
    ends = [NaViTCLIP.from_directory(d / "model").state_dict() for d in runs]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_export_is_a_plain_model_that_has_learned(runs, data):
    found = NaViTCLIP.from_directory(runs[0] / "model").state_dict()
    start = NaViTCLIP.from_directory(data / "square").state_dict()
    assert found.keys() == start.keys()
    learned = {name for name in start if not torch.equal(found[name], start[name])}
    layers = [f"blocks.{b}.{layer}.weight" for b in (0, 1) for layer in ("attention.qkv", "mlp.up")]
    assert {name for name in learned if name.startswith("image.")} == {
        f"image.encoder.{layer}" for layer in layers
    }


def test_a_checkpoint_is_read_as_the_plain_model(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # reading one does not take it
    model, step = load_run(runs[0], None)
    assert step == 4
    exported = NaViTCLIP.from_directory(runs[0] / "model").state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, exported[name], rtol=0, atol=1e-7)


def test_a_run_keeps_its_adapters(runs, data, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs[0], tmp_path / "run")
    for name, value in (("alpha", 2.0), ("rank", 2), ("text", "[]")):
        flags = finetune_flags(data, tmp_path / "run", 5, **FLAGS | {f"task__lora__{name}": value})
        assert run(monkeypatch, flags) == 2
        assert f"task.lora.{name} is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": ["embed"]}, "image may hold qkv, out, up, down, got 'embed'"),
        ({"text": ["qkv"], "rank": 0}, "rank must be at least 1"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_what_adapters_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**changes)


def test_a_tower_is_locked_or_adapted():
    with pytest.raises(ValueError, match=r"lora\.image keeps .* leave lock\.image out"):
        lora_config(IMAGE, lock=LockConfig(image=True))


def test_without_peft_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny_config().task.build(tiny_config().data).build_model()
    with pytest.raises(UserError, match=r"pip install 'navit-clip\[lora\]'"):
        add_adapters(model, IMAGE)
    add_adapters(model, LoraConfig())  # none, none needed
    weights = model.state_dict()
    assert merge_adapters(weights, 1.0).keys() == weights.keys()


def test_its_operations_are_fewer_than_those_of_full_training():
    config = tiny_config().task.model
    sums = LengthSums.of([9] * 4)
    for forward in forward_flops(config, sums, sums).values():
        adapted = backward_flops(forward, adapted=True)
        assert backward_flops(forward, trained_fraction=0) < adapted < backward_flops(forward)


@torch.no_grad()
def test_compiled_blocks_take_adapters(monkeypatch):
    # The graph is what matters here, and compiling kernels takes seconds.
    backend = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr("navit_clip.models.transformer.torch.compile", backend)
    compiled_block.cache_clear()
    model: Any = new_stepper(lora_config(IMAGE)).model
    images = micro_batches(0, ALONE, 1)[0].inputs.images
    expected = model.embed_images(images)
    model.image.encoder.compile_blocks()
    found = model.embed_images(images)
    compiled_block.cache_clear()
    torch.testing.assert_close(found, expected)
