"""Figures of a logged step: counts, rates, cost over the machine's peak, memory."""

import json
import mmap
import warnings
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from packed_examples import random_caption, random_image
from step_cases import ALONE, tiny_config
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip.data.builders.pairs import PairInputs
from navit_clip.data.config import DataConfig
from navit_clip.data.loader import load_batches
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.packed.batch import Batch, BatchCounts, StreamCounts
from navit_clip.packed.images import pack_images
from navit_clip.packed.texts import pack_texts
from navit_clip.tasks.locking import LockConfig
from navit_clip.tokenizers.load import build_tokenizer
from navit_clip.training import mfu
from navit_clip.training.config import parse_config
from navit_clip.training.length import RunLength
from navit_clip.training.metrics import Interval, Progress, SkipReport, StepLog
from navit_clip.training.mfu import FlopsMeter, cpu_peak, gpu_peak, memory_bytes

TASK = tiny_config().task.build(DataConfig())


def random_batch(rng: np.random.Generator, padding: int) -> Batch[PairInputs]:
    pairs = int(rng.integers(1, 9))
    grids = rng.integers(1, 5, (pairs, 2)).tolist()
    texts = rng.integers(1, 9, pairs).tolist()
    tokens = sum(rows * columns for rows, columns in grids)
    images = [random_image(i, (rows, columns)) for i, (rows, columns) in enumerate(grids)]
    captions = [random_caption(i, length) for i, length in enumerate(texts)]
    sources = Counter(rng.choice(["a", "b"], pairs).tolist())
    full = tokens + int(rng.integers(0, 20))
    image_budget, text_budget = tokens + padding, sum(texts) + padding
    streams = {
        "image": StreamCounts(tokens, full, image_budget, image_budget),
        "text": StreamCounts(sum(texts), sum(texts), text_budget, text_budget),
    }
    return Batch(
        PairInputs(
            pack_images(images, budget=image_budget), pack_texts(captions, budget=text_budget)
        ),
        tuple(map(str, range(pairs))),
        BatchCounts(pairs, streams, sources, Counter(odd=2)),
    )


@pytest.mark.parametrize("padding", [0, 7])
def test_an_interval_of_several_batches(monkeypatch, padding):
    rng = np.random.default_rng(padding)
    batches = [random_batch(rng, padding) for _ in range(6)]
    interval = Interval(["image", "text"], ["a", "b"])
    interval.since = 100.0
    for number, batch in enumerate(batches):
        interval.add(batch, wait=0.25, flops=1000.0 * number)
        interval.steps += number % 2  # two micro-batches a step
    monkeypatch.setattr("navit_clip.training.metrics.time.perf_counter", lambda: 104.0)
    counts = [batch.counts for batch in batches]
    pairs = sum(c.examples for c in counts)
    images, texts = (sum(c.streams[name].tokens for c in counts) for name in ("image", "text"))
    before = sum(c.streams["image"].tokens_before_drop for c in counts) + texts
    assert interval.rates(ALONE) == pytest.approx(
        {
            "examples": pairs,
            "examples_per_s": pairs / 4,
            "tokens_per_s": (images + texts) / 4,
            "image_tokens_per_s": images / 4,
            "text_tokens_per_s": texts / 4,
            "step_s": 4 / 3,
            "flops": 15_000,
            "model_flops_per_s": 15_000 / 4,
            "padding": 12 * padding / (images + texts + 12 * padding),
            "token_drop": 1 - (images + texts) / before,
            "data_wait": 1.5 / 4,
            "skipped": 12,
            "share/a": sum(c.datasets["a"] for c in counts) / pairs,
            "share/b": sum(c.datasets["b"] for c in counts) / pairs,
        }
    )


def skipping(log: list[str], **reasons: int) -> Batch[PairInputs]:
    batch = random_batch(np.random.default_rng(0), 0)
    return replace(
        batch, counts=replace(batch.counts, skipped=Counter(reasons), skip_log=tuple(log))
    )


def test_skipped_samples_are_named_ever_more_rarely_and_shards_at_once(capsys):
    skips = SkipReport()
    progress = Progress(RunLength(steps=9), 0, 0, visible=True)
    said = []
    for number in range(100):
        skips.add(skipping([f"a/{number}: torn"], torn=10))
        if number == 50:
            skips.add(skipping(["b.tar: gone"], bad_shard=1))
        lost = {"skipped/bad_shard": 1.0} if number == 50 else {}
        assert skips.report(ALONE, progress) == {"skipped/torn": 10.0, **lost}
        if out := capsys.readouterr().out:
            said.append(number)
        if number == 50:
            assert out.splitlines() == [
                "skipped b.tar: gone",
                "skipped a/50: torn",
                "skipped so far: torn 510, bad_shard 1",
            ]
    progress.close()
    assert said[:2] == [0, 1]
    assert 50 in said
    assert len(said) < 10


def what_a_rank_skipped() -> tuple[dict[str, float], str]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    skips, said = SkipReport(), list[str]()
    progress = Progress(RunLength(steps=9), 0, 0, visible=False)
    progress.log = said.append
    if ranks.rank:
        skips.add(skipping([f"{ranks.rank}/{n}" for n in range(20)], torn=20))
    if ranks.rank == 2:
        skips.add(skipping(["c.tar"], bad_shard=1))
    return skips.report(ranks, progress), "\n".join(said)


def test_what_any_rank_skips_is_counted_and_named():
    (counts, said), *others = run_ranks(what_a_rank_skipped, 3)
    assert counts == {"skipped/torn": 40.0, "skipped/bad_shard": 1.0}
    assert said.splitlines()[0] == "skipped c.tar"
    assert said.splitlines()[-1] == "skipped so far: torn 40, bad_shard 1"
    assert others == [({}, "")] * 2


def metrics_of_a_rank() -> tuple[float, dict[str, float], dict[str, float]]:
    rank = dist.get_rank()
    mfu.cpu_peak = lambda precision: 100.0 + rank
    mfu.memory_bytes = lambda device: 1e9 * (3 - rank)
    ranks = Ranks(rank, dist.get_world_size(), torch.device("cpu"))
    meter = FlopsMeter("fp32", ranks)
    interval = Interval(["image", "text"], ["a", "b"])
    batch = random_batch(np.random.default_rng(rank), 0)
    interval.add(batch, 0.0, TASK.flops(batch.inputs))
    interval.steps += 1
    rates = interval.rates(ranks)
    return meter.peak, rates, meter.metrics(1.0)


def test_metrics_of_several_ranks():
    ones = [random_batch(np.random.default_rng(rank), 0) for rank in range(2)]
    for peak, rates, metrics in run_ranks(metrics_of_a_rank, 2):
        assert peak == 100 + 101
        assert metrics == {"mfu": 1 / 201, "memory_gb": 3.0}
        flops = sum(TASK.flops(batch.inputs) for batch in ones)
        # The ranks' clocks differ, what they count does not.
        assert rates["model_flops_per_s"] * rates["step_s"] == pytest.approx(flops)
        assert rates["examples"] == sum(batch.counts.examples for batch in ones)


def test_no_mfu_without_a_peak(monkeypatch):
    monkeypatch.setattr(mfu, "cpu_peak", lambda precision: 0.0)
    monkeypatch.setattr(mfu, "memory_bytes", lambda device: 0.0)
    meter = FlopsMeter("fp32", ALONE)
    assert meter.metrics(5.0) == {}
    assert meter.describe() == "peak unknown"


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        ("Tesla V100-SXM2-16GB", 0, 15.7),
        ("Tesla V100-PCIE-32GB", 0, 14),
        # Others, and parts of one, are not guessed.
        ("NVIDIA L40", 0, 0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0, 0),
        ("NVIDIA GeForce RTX 4090 D", 0, 0),
        ("NVIDIA A10", 0, 0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0, 0),
    ],
)
def test_peaks_of_gpus(name, bf16, fp32):
    assert gpu_peak(name, "bf16") == pytest.approx(bf16 * 1e12)
    assert gpu_peak(name, "fp32") == pytest.approx(fp32 * 1e12)


def test_the_measured_peak_of_a_processor_costs_the_run_no_random_number():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for precision in ("fp32", "bf16"):
        assert 1e7 < cpu_peak(precision) < 1e15
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not memory_bytes(ALONE.device), reason="this system has no /proc")
def test_memory_of_a_process():
    before = memory_bytes(ALONE.device)
    size = 200_000_000
    # Not from the allocator, which may have as much left from other tests.
    with mmap.mmap(-1, size) as held:
        held.write(b"1" * size)
        assert memory_bytes(ALONE.device) - before == pytest.approx(size, rel=0.1)


def test_a_run_logs_what_its_batches_cost(tmp_path, monkeypatch, capsys):
    write_tiny_data(tmp_path)
    monkeypatch.setattr(mfu, "cpu_peak", lambda precision: 5e9)
    assert run(monkeypatch, tiny_flags(tmp_path, tmp_path / "start", 2)) == 0
    flags = tiny_flags(tmp_path, tmp_path / "run", 6, accumulate=2, log__every_steps=3)
    flags += ["--task.lock.image=true", "--task.lock.image_unlocked_blocks=1"]
    flags += [f"--init.model={tmp_path / 'start/model'}"]
    assert run(monkeypatch, flags) == 0
    assert "fp32, matrix products at 5 GFLOP/s, from step 0" in capsys.readouterr().out
    config, _ = parse_config(flags)
    task = config.task.build(config.data)
    build = task.build_samples(build_tokenizer(config.tokenizer), config.seed)
    loader = load_batches(build, config.data, config.seed)
    batches = list(islice(loader, 12))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    for line, taken in zip(lines, (batches[:6], batches[6:]), strict=True):
        seconds = 3 * line["step_s"]
        flops = sum(task.flops(batch.inputs) for batch in taken)
        assert line["model_flops_per_s"] * seconds == pytest.approx(flops)
        assert line["mfu"] == pytest.approx(line["model_flops_per_s"] / 5e9)
        assert line["examples_per_s"] * seconds == pytest.approx(line["examples"])
        for side in ("image", "text"):
            tokens = sum(batch.counts.streams[side].tokens for batch in taken)
            assert line[f"{side}_tokens_per_s"] * seconds == pytest.approx(tokens)
        assert line["memory_gb"] > 0.05
    unlocked = replace(config.task, lock=LockConfig()).build(config.data)
    free = sum(unlocked.flops(batch.inputs) for batch in batches[:6])
    assert free > lines[0]["model_flops_per_s"] * 3 * lines[0]["step_s"]


def test_a_disk_that_does_not_take_a_line_is_one_line_and_the_next_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = StepLog(path, 0)
    log.write({"step": 1})
    log.close()
    lines = path.read_bytes()
    # A kill and a disk's damage may leave anything behind the last whole line.
    path.write_bytes(lines + b"\xff\xfe\n[1]\n" + b"[" * 100_000 + b'\n{"step": 2, "lo')
    log = StepLog(path, 1)
    assert (path.read_bytes(), log.resumed) == (lines, {"step"})
    log._file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(UserError, match=r"^cannot write .*/metrics.jsonl: No space left"):
        log.write({"step": 2})
    log.close()
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"^cannot read .*metrics.jsonl: Is a directory"):
        StepLog(path, 0)


def test_a_full_disk_ends_a_run_in_one_line(tmp_path, monkeypatch, capsys):
    write_tiny_data(tmp_path)
    before = StepLog.__init__

    def onto_a_full_disk(self, path, step):
        before(self, path, step)
        self._file = open("/dev/full", "ab")  # noqa: SIM115

    monkeypatch.setattr(StepLog, "__init__", onto_a_full_disk)
    for samples in (False, True):
        flags = tiny_flags(tmp_path, tmp_path / f"run-{samples}", 3, log__samples=samples)
        assert run(monkeypatch, flags) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "No space left on device" in line


@pytest.mark.parametrize("visible", [True, False])
def test_warnings_stand_above_the_bar(capsys, visible):
    shown = warnings.showwarning
    progress = Progress(RunLength(10), 0, 0, visible=visible)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("blocks run\n uncompiled", stacklevel=1)
    progress.close()
    said = capsys.readouterr()
    assert said.out == ("warning: blocks run uncompiled\n" if visible else "")
    assert said.err == ""
    assert warnings.showwarning == shown


def test_evaluation_takes_no_time_of_the_trainings(monkeypatch):
    clock = iter([10.0, 12.0, 17.0, 20.0])
    monkeypatch.setattr("navit_clip.training.metrics.time.perf_counter", lambda: next(clock))
    interval = Interval(["image"], [])
    counts = BatchCounts(10, {"image": StreamCounts(10, 10, 10, 10)})
    interval.add(Batch(None, (), counts), wait=0.0, flops=0.0)
    with interval.paused():
        pass
    assert interval.rates(ALONE)["examples_per_s"] == 2.0
