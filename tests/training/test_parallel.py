"""Whatever way the ranks share a model, they train it like one process with all pairs."""

import json
import os
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from step_cases import ALONE, measurements, new_stepper, rotary, tiny_config
from tiny_run import tiny_flags, write_tiny_data
from torch._dynamo.utils import counters

from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.model import NaViTCLIP
from navit_clip.models.hierarchical_tower import HierarchicalEncoder, HierarchyConfig
from navit_clip.models.transformer import Encoder, EncoderConfig
from navit_clip.training.config import parse_config
from navit_clip.training.ema import EMAConfig
from navit_clip.training.parallel import ParallelConfig, _kernels, _mesh
from navit_clip.training.trainer import train

FSDP = ParallelConfig("fsdp")
HSDP = ParallelConfig("fsdp", shard_ranks=2)
KEPT = ParallelConfig("fsdp", reshard_after_forward=False, activation_checkpointing=True)
AVERAGED = EMAConfig(0.9)
FLOAT, DOUBLE = torch.float32, torch.float64
# Configuration, precision and number of steps. In float64 what is equal shows as equal.
CASES = {
    2: {
        "ddp": (tiny_config(ema=AVERAGED), FLOAT, 12),
        "ddp, 3 micro-batches": (tiny_config(accumulate=3), FLOAT, 12),
        "fsdp": (tiny_config(parallel=FSDP, ema=AVERAGED), FLOAT, 12),
        "fsdp, 3 micro-batches, rotary": (
            rotary(tiny_config(kind="sigmoid", parallel=KEPT, accumulate=3)),
            DOUBLE,
            6,
        ),
        "ddp in bf16": (tiny_config(precision="bf16"), FLOAT, 3),
        "fsdp, compiled": (
            tiny_config(parallel=ParallelConfig("fsdp", compile=True), accumulate=2),
            FLOAT,
            3,
        ),
        "fsdp in bf16": (tiny_config(precision="bf16", parallel=FSDP, accumulate=2), FLOAT, 3),
    },
    3: {
        "ddp": (tiny_config(), FLOAT, 12),
        # 3 does not divide the parameters' rows: shards are uneven, some of them empty.
        "fsdp": (tiny_config(parallel=FSDP, accumulate=2, ema=AVERAGED), DOUBLE, 4),
    },
    4: {"hsdp": (tiny_config(parallel=HSDP, accumulate=2, ema=AVERAGED), DOUBLE, 4)},
}
TOLERANCE = {FLOAT: 2e-5, DOUBLE: 1e-11}

# All runs of a world are made for its first test.
pytestmark = pytest.mark.timeout(700)


def run_case(config, dtype, steps, ranks):
    # The process may have compiled for tests of other files before.
    graphs = counters["stats"]["unique_graphs"]
    stepper = new_stepper(config, ranks, dtype)
    towers = (stepper.model.image, stepper.model.text)
    # Blocks that are gathered for each call read a stream in one piece.
    assert all(t.encoder.chunked == (config.parallel.kind == "ddp") for t in towers)
    found = measurements(stepper, range(steps), config.accumulate)
    # Each tower with and without a graph, for its first length and for any other.
    assert counters["stats"]["unique_graphs"] - graphs <= 8, "compiled for each batch"
    exported = stepper.host_weights()
    return found, exported and {name: weight.numpy() for name, weight in exported.items()}


def run_cases(directory, runs):
    """Every case, and the trainer's `runs` by number of ranks, in one set of processes.

    Starting one costs more than all its cases, so the others wait while the first two are alone.
    """
    rank, results = int(os.environ["RANK"]), {}
    for world_size in CASES:
        if rank >= world_size:
            continue
        store = f"file://{directory}/store-{world_size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        ranks = Ranks(rank, world_size, torch.device("cpu"))
        cases = CASES[world_size].items()
        with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
            results[world_size] = {name: run_case(*case, ranks) for name, case in cases}
        for flags in runs.get(world_size, ()):
            train(*parse_config(flags), ranks)
        ranks.barrier()
        dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory):
    """Runs without a break and in parts: under FSDP, then DDP; under HSDP, then FSDP, then DDP."""
    root = tmp_path_factory.mktemp("runs")
    write_tiny_data(root)
    names = ("whole", "parts", "whole of 4", "parts of 4")
    directories = [root / name for name in names]
    for directory in directories:
        directory.mkdir()
    return root, *directories


@pytest.fixture(scope="module")
def results(run_dirs):
    root, whole, parts, whole_4, parts_4 = run_dirs
    options = {"optim__schedule__kind": "constant", "optim__schedule__warmup_steps": 0}
    options |= {"ema__decay": 0.5, "accumulate": 2}
    fsdp = {"parallel__kind": "fsdp", **options}
    hsdp = {"parallel__shard_ranks": 2, **fsdp}
    # Ranks and micro-batches of one step differ in the size of their patches.
    sizes = {
        "data__resolution__patch_sizes": "{8: 1, 16: 1, 32: 1}",
        "task__model__image__position__coordinates": "interpolated",
    }
    runs = {}
    runs[2] = [
        tiny_flags(root, whole, 3, **fsdp, **sizes),
        tiny_flags(root, parts, 1, **fsdp, **sizes),
        tiny_flags(root, parts, 2, **fsdp, **sizes),
        tiny_flags(root, parts, 3, parallel__kind="ddp", **options, **sizes),
    ]
    runs[4] = [
        tiny_flags(root, whole_4, 4, **options),
        tiny_flags(root, parts_4, 2, **hsdp),
        tiny_flags(root, parts_4, 3, **fsdp),
        tiny_flags(root, parts_4, 4, **options),
    ]
    found = run_ranks(run_cases, 4, str(root), runs, timeout=600, initialise=False)
    return {n: [result[n] for result in found if n in result] for n in CASES}


EXACT = [(n, name) for n, cases in CASES.items() for name in cases if "bf16" not in name]


@pytest.mark.parametrize(("world_size", "name"), EXACT)
def test_ranks_train_like_one_process_with_all_pairs(results, world_size, name):
    config, dtype, steps = CASES[world_size][name]
    alone = replace(config, parallel=ParallelConfig(), accumulate=1)
    expected, expected_weights = run_case(alone, dtype, steps, ALONE)
    for rank, result in enumerate(results[world_size]):
        found, weights = result[name]
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE[dtype])
        assert (weights is not None) == (rank == 0)
    weights = results[world_size][0][name][1]
    assert weights.keys() == expected_weights.keys()
    for key, weight in weights.items():
        np.testing.assert_allclose(
            weight, expected_weights[key], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def test_fsdp_gathers_half_precision_blocks_and_still_agrees(results):
    ddp, fsdp = (results[2][0][f"{kind} in bf16"][0] for kind in ("ddp", "fsdp"))
    full = results[2][0]["ddp"][0][:3]
    assert not np.array_equal(ddp, full, equal_nan=True), "bf16 does something"
    np.testing.assert_allclose(fsdp, ddp, rtol=2e-2)


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").open()]


def test_a_sharded_run_continues_and_exports_whole_weights(results, run_dirs):
    _, whole, parts, *_ = run_dirs
    assert losses(parts)[:2] == losses(whole)[:2], "under the same sharding bit for bit"
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)
    ends = [NaViTCLIP.from_directory(d / "model").state_dict() for d in (whole, parts)]
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-4, atol=1e-5)


def test_a_run_in_groups_of_shards_continues_in_other_ways(results, run_dirs):
    *_, whole, parts = run_dirs
    assert len(losses(parts)) == 4
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)
    ends = [NaViTCLIP.from_directory(d / "model").state_dict() for d in (whole, parts)]
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cuda", "compiled", "short", "half", "expected"),
    [
        (False, False, False, True, "eager blocks, attention by length"),
        (False, True, False, False, "compiled blocks, attention by length"),
        (True, False, False, False, "eager blocks, attention by length"),
        (True, True, False, False, "compiled blocks, attention multiplied out"),
        (True, True, False, True, "compiled blocks, attention by FlashAttention-2"),
        (True, True, True, True, "compiled blocks, attention of short segments in kernels of our"),
    ],
)
def test_the_start_of_a_run_names_its_kernels(cuda, compiled, short, half, expected):
    encoder = Encoder(EncoderConfig(64, depth=1, heads=1))
    found = _kernels([encoder, encoder], cuda, compiled, short, half=half)
    assert found.startswith(expected)
    windows = HierarchicalEncoder(encoder.config, HierarchyConfig((1,)))
    expected = f"{found}, attention in windows multiplied out"
    assert _kernels([encoder, windows], cuda, compiled, short, half=half) == expected


def test_groups_of_shards_that_cannot_be():
    with pytest.raises(ValueError, match=r"shard_ranks must be at least 1, got 0"):
        ParallelConfig("fsdp", shard_ranks=0)
    with pytest.raises(ValueError, match="shard_ranks needs kind fsdp, got kind=ddp"):
        ParallelConfig(shard_ranks=2)
    with pytest.raises(UserError, match=r"parallel\.shard_ranks=4 does not divide the 6 ranks"):
        _mesh(ParallelConfig("fsdp", shard_ranks=4), Ranks(0, 6, torch.device("cpu")))


def test_the_start_of_a_run_says_that_heads_are_too_wide():
    assert Encoder(EncoderConfig(512, depth=1, heads=2)).suits_flash
    wide = Encoder(EncoderConfig(520, depth=1, heads=2))
    assert not wide.suits_flash
    words = _kernels([wide], True, True, False, half=True)
    assert words.endswith("heads are too wide for its kernels")
