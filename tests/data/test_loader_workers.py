"""Processes that read for a loader: none is left behind, a killed one keeps nobody waiting."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import fields, replace
from multiprocessing.util import get_temp_dir
from pathlib import Path

import pytest
import torch
from loader_cases import take
from shard_factory import make_shards

from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.pairs import Pair, PairBuilder
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.reader import Reader
from navit_clip.data.workers import explain_killed_workers
from navit_clip.errors import UserError


def test_no_process_is_left_behind(pipeline, tmp_path):
    data = pipeline(make_shards(tmp_path, [4, 4]), workers=2)
    others = {*multiprocessing.active_children()}  # of other tests
    batches = data.load()
    assert torch.is_tensor(next(batches).inputs.images.patches)
    assert len({*multiprocessing.active_children()} - others) == 2
    batches.close()
    assert others >= {*multiprocessing.active_children()}


def _take_one_and_wait(data, connection):
    with closing(data.load()) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        connection.send(worker.pid)
        time.sleep(600)


def test_a_worker_with_more_to_say_than_a_pipe_holds_ends_with_its_killed_parent(
    pipeline, tmp_path, monkeypatch
):
    def batches(reader, state):
        yield from itertools.islice(take_batches(reader, state), 1)
        raise UserError("no reader takes this from the pipe " * 30_000)

    take_batches = Reader.batches
    monkeypatch.setattr(Reader, "batches", batches)
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    alive, held = os.pipe()  # its end is held by the parent and, through it, by the worker
    data = pipeline(make_shards(tmp_path, [4, 4]), workers=1)
    sockets = Path(get_temp_dir())  # of this process, and of the parent that is forked from it
    parent = fork.Process(target=_take_one_and_wait, args=(data, theirs))
    parent.start()
    os.close(held)
    assert ours.poll(60)
    worker = ours.recv()
    parent.kill()
    parent.join()
    try:
        assert select.select([alive], [], [], 30)[0], "the worker is still there"
    finally:
        os.close(alive)
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    assert sockets.is_dir()


class Mark:
    """Ends with the process that made it, and leaves a file if another one ends it."""

    def __init__(self, path):
        self.path, self.maker, self.cycle = path, os.getpid(), self

    def __del__(self):
        if os.getpid() != self.maker:
            self.path.touch()


def test_a_worker_leaves_the_garbage_of_its_parent_alone(pipeline, tmp_path, monkeypatch):
    # On a GPU events of CUDA were among it, which end a forked process that frees them.
    def batches(reader, state):
        gc.collect()
        yield from take_batches(reader, state)

    take_batches = Reader.batches
    monkeypatch.setattr(Reader, "batches", batches)
    data = pipeline(make_shards(tmp_path, [4, 4]), workers=1)
    gc.collect()
    gc.disable()  # so that it is still there when the worker is started
    try:
        Mark(tmp_path / "freed")
        with closing(data.load()) as loaded:
            next(loaded)
    finally:
        gc.enable()
    assert not (tmp_path / "freed").exists()
    assert not gc.get_freeze_count()


class DiesWithALock(PairBuilder):
    """Kills its worker while it holds the lock by which torch would end it."""

    def __call__(
        self, raw: RawSample, origin: Origin, fields: Mapping[str, float] | None = None
    ) -> Pair:
        frame = sys._getframe()
        while frame.f_code.co_name != "_worker_loop":
            frame = frame.f_back
        frame.f_locals["done_event"]._cond.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed")


@pytest.mark.timeout(60)
def test_a_worker_killed_with_a_lock_keeps_nobody_waiting(tmp_path, pipeline):
    good = pipeline(make_shards(tmp_path, [20]), workers=2)
    values = {f.name: getattr(good.build, f.name) for f in fields(good.build)}
    deadly = replace(good, build=DiesWithALock(**values))
    others = {*multiprocessing.active_children()}
    with (
        pytest.raises(UserError, match=r"DataLoader worker .* lack of memory: the fix"),
        explain_killed_workers("the fix"),
    ):
        take(deadly, 1)
    for worker in {*multiprocessing.active_children()} - others:
        worker.join(20)  # told to end
    assert others >= {*multiprocessing.active_children()}
