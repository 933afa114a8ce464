"""Several ranks train like one process that is fed the same global batches."""

import json
import os
import resource
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from distributed import run_ranks
from launch import run_to_end, torchrun
from tiny_run import tiny_flags, write_tiny_data

from navit_clip import distributed
from navit_clip.data.builders.pairs import PairInputs
from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Mixture
from navit_clip.distributed import Ranks, _allow_open_files, join_ranks
from navit_clip.errors import OutageError, UserError
from navit_clip.evaluation.embed import fail_together
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.packed.texts import pack_texts
from navit_clip.tokenizers.load import build_tokenizer
from navit_clip.training.config import parse_config
from navit_clip.training.trainer import build_stepper, train

STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root)
    return root


def batches_of(config, rank, world_size):
    task = config.task.build(config.data)
    build = task.build_samples(build_tokenizer(config.tokenizer), config.seed)
    loader = load_batches(build, config.data, config.seed, rank=rank, world_size=world_size)
    return [next(loader) for _ in range(STEPS)]


def unpack(batch):
    """The images and captions of a batch, in the order in which they were packed."""
    images, texts = batch.inputs.images, batch.inputs.texts
    patches = images.patches.split(images.segments.lengths)
    coords = images.coords.split(images.segments.lengths)
    captions = texts.token_ids.split(texts.segments.lengths)
    return [
        (
            ImagePatches(patches[i].numpy(), coords[i].numpy(), tuple(images.grids[i].tolist())),
            captions[t].tolist(),
        )
        for i, t in zip(images.order.tolist(), texts.order.tolist(), strict=True)
    ]


def merge(batches):
    """One batch of all ranks' pairs."""
    pairs = [pair for batch in batches for pair in unpack(batch)]
    return Batch(
        PairInputs(
            pack_images([image for image, _ in pairs]), pack_texts([ids for _, ids in pairs])
        ),
        ids=tuple(name for batch in batches for name in batch.ids),
        counts=BatchCounts(len(pairs)),
    )


def train_steps(config, ranks, batches):
    torch.manual_seed(config.seed)
    task = config.task.build(config.data)
    stepper = build_stepper(config, task, task.build_model(), ranks)
    return [stepper.step([batch], step) for step, batch in enumerate(batches)]


def row_of(result):
    return result.loss, result.grad_norm, result.metrics["logit_scale"]


def train_rank(flags):
    config, _ = parse_config(flags)
    with join_ranks("cpu") as ranks:
        batches = batches_of(config, ranks.rank, ranks.world_size)
        return [
            (r.loss, r.grad_norm, r.metrics["logit_scale"])
            for r in train_steps(config, ranks, batches)
        ], [batch.counts.examples for batch in batches]


def test_losses_of_two_ranks_equal_those_of_one_process(data, tmp_path):
    """Through the real loader; `test_parallel` compares more ranks and ways to share the model."""
    flags = tiny_flags(data, tmp_path / "run", STEPS, optim__lr=1e-3)
    results = run_ranks(train_rank, 2, flags, initialise=False)
    config, _ = parse_config(flags)
    per_rank = [batches_of(config, rank, 2) for rank in range(2)]
    together = [merge(batches) for batches in zip(*per_rank, strict=True)]
    alone = train_steps(config, Ranks(0, 1, torch.device("cpu")), together)
    counts = [pairs for _, pairs in results]
    assert any(len(set(step)) > 1 for step in zip(*counts, strict=True)), "uneven on purpose"
    expected = np.array([row_of(result) for result in alone])
    for figures, _ in results:
        np.testing.assert_allclose(np.array(figures), expected, rtol=5e-4)


def start_rank(flags):
    """What a rank is told that finds one shard less than the others."""
    if os.environ["RANK"] == "1":
        find = Mixture.find
        Mixture.find = lambda config: find(replace(config, train=config.train[:1]))
    config, resolved = parse_config(flags)
    with join_ranks("cpu") as ranks:
        try:
            train(config, resolved, ranks)
        except UserError as error:
            return str(error)
    return None


def test_ranks_that_find_different_shards_are_refused(data, tmp_path):
    shards = sorted(str(path) for path in data.rglob("*.tar"))
    flags = tiny_flags(data, tmp_path / "run", 2, data__train=json.dumps(shards))
    for said in run_ranks(start_rank, 2, flags, initialise=False):
        assert said.startswith("rank 1 finds other training shards (1 shards"), said
        assert f"than rank 0 ({len(shards)} shards" in said
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_shards_out_of_reach_at_the_start_may_be_tried_again(data, tmp_path):
    shards = [tmp_path / f"{i}.tar" for i in range(12)]
    for shard in shards:
        shard.write_bytes(b"<html>404</html>")
    flags = tiny_flags(data, tmp_path / "run", 2, data__train=json.dumps(list(map(str, shards))))
    config, resolved = parse_config(flags)
    with pytest.raises(OutageError, match="10 unreadable shards in a row"):
        train(config, resolved, Ranks(0, 1, torch.device("cpu")))


def test_more_ranks_than_gpus_are_refused_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="PyTorch finds 2 CUDA device"), join_ranks("auto"):
        pass


def raise_own(problems):
    with join_ranks("cpu") as ranks:
        try:
            ranks.raise_together(problems[ranks.rank])
        except UserError as error:
            return type(error).__name__, str(error)
    return None


def test_all_ranks_raise_what_one_does_and_what_is_final_first():
    problems = [OutageError("down"), None, UserError("wrong")]
    assert run_ranks(raise_own, 3, problems, initialise=False) == [("UserError", "wrong")] * 3
    alone = Ranks(0, 1, torch.device("cpu"))
    alone.raise_together(None)
    with pytest.raises(OutageError, match="down"):
        alone.raise_together(problems[0])


def work_alone(seconds):
    """Rank 0 takes longer than any collective call may; the third piece of work is a mistake."""
    waited, found, meet = [], [], distributed._clean_store

    def met(*numbers):  # ranks may start at different times on a busy machine
        store = meet(*numbers)
        distributed._TIMEOUT = timedelta(seconds=4)
        return store

    distributed._clean_store = met
    with join_ranks("cpu") as ranks:
        for answer in ("slow", "quick", None):

            def work(answer=answer):
                time.sleep(seconds if answer == "slow" else 0)
                if answer is None:
                    raise UserError("wrong")
                return answer

            before = len(waited)
            try:
                with fail_together(ranks):
                    found.append(ranks.first_alone(work, partial(waited.append, 0)))
            except UserError as error:
                found.append(str(error))
            if answer == "slow":
                beats = len(waited) - before
    return found, beats


def test_rank_0_may_work_alone_longer_than_a_collective_call_may_take():
    (first, none), (second, beats), _ = run_ranks(work_alone, 3, 9.0, initialise=False)
    assert first == ["slow", "quick", "wrong"]
    assert second == [None, None, None, "wrong"]
    assert none == 0
    assert beats > 5
    assert Ranks(0, 1, torch.device("cpu")).first_alone(lambda: 1, lambda: None) == 1


@pytest.mark.parametrize(
    ("limits", "ranks", "wanted"),
    [
        ((1024, 8192), 512, 4096),
        ((1024, 2000), 512, 2000),
        ((8192, -1), 8, None),
        ((64, -1), 8, 2080),
    ],
)
def test_ranks_allow_themselves_the_files_that_gloo_opens(limits, ranks, wanted, monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: asked.append(both))
    _allow_open_files(ranks)
    assert asked == ([] if wanted is None else [(wanted, limits[1])])
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3 * ranks, 3 * ranks))
    with pytest.raises(UserError, match=f"{ranks} ranks need {3 * ranks + 100} open files each"):
        _allow_open_files(ranks)


def read_losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def train_whole(flags):
    config, resolved = parse_config(flags)
    with join_ranks("cpu") as ranks:
        train(config, resolved, ranks)


def test_torchrun_trains_and_continues_what_other_processes_began(data, tmp_path):
    schedule = {"optim__schedule__kind": "constant", "data__workers": 1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run_dir, steps in ((whole, 8), (parts, 4)):
        flags = tiny_flags(data, run_dir, steps, **schedule)
        run_ranks(train_whole, 2, flags, initialise=False)
    output = tmp_path / "out"
    command = torchrun(tiny_flags(data, parts, 8, **schedule), "--standalone", "--nproc-per-node=2")
    run_to_end(command, output, forked=True)  # torchrun is, and starts its ranks as usual
    assert "continuing from step 4" in output.read_text()
    assert read_losses(parts) == read_losses(whole)
    assert (parts / "model/model.safetensors").is_file()
    newest = max((parts / "checkpoints").glob("step-*"))
    drawn = [json.loads((newest / f"rank-{r}.json").read_text())["generators"] for r in range(2)]
    assert drawn[0] != drawn[1]  # what is random in a model would be on all ranks alike
