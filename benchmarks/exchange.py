"""The loss's ring beside its rounds of gathering: 2 to 16 gloo ranks, few to many pairs on each.

Forward and backward pass of `softmax_contrastive_loss`, width 512, float32, on ranks that share
this machine's cores. All cases of one number of ranks run in one group of processes, both ways in
turn; the slowest rank counts, and the median of the rounds. Times of so many processes on so few
cores say which way is cheaper and from where on, not how fast either is on a network.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.command import command
from benchmarks.measure import in_processes, in_turn
from navit_clip.commands import number
from navit_clip.losses.contrastive import Exchange, softmax_contrastive_loss

WIDTH = 512
WAYS = ("ring", "gather")


def one_pass(pairs: int, ranks: int, way: str) -> float:
    """Seconds of a forward and backward pass on the slowest rank."""
    image, text = (F.normalize(torch.randn(pairs, WIDTH)).requires_grad_() for _ in range(2))
    scale = torch.tensor(100.0, requires_grad=True)
    dist.barrier()
    begin = time.perf_counter()
    exchange, counts = cast(Exchange, way), [pairs] * ranks
    softmax_contrastive_loss(image, text, scale, exchange=exchange, counts=counts).backward()
    seconds = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def run_rank(
    rank: int, ranks: int, pairs: list[int], rounds: int, directory: str
) -> dict[str, dict[str, float]]:
    """Milliseconds by pairs of a rank and by way."""
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    found = {}
    for each in pairs:
        passes = {way: partial(one_pass, each, ranks, way) for way in WAYS}
        seconds = in_turn(passes, rounds, warm_up=True)
        found[str(each)] = {way: 1e3 * statistics.median(seconds[way]) for way in WAYS}
    dist.barrier()  # gloo cannot tell a rank that is done from one that died
    dist.destroy_process_group()
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of ranks."""
    found = {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory(prefix="benchmark-exchange-") as directory:
            arguments = [(r, ranks, args.each, args.rounds, directory) for r in range(ranks)]
            found[str(ranks)] = in_processes(context, run_rank, arguments, f"{ranks} ranks")[0]
    return {"width": WIDTH, "milliseconds": found}


main = command(
    __doc__,
    measure,
    "rounds",
    rounds={"default": 7},
    ranks={"type": number(2), "nargs": "+", "default": [2, 4, 8, 16]},
    each={"type": number(1), "nargs": "+", "default": [16, 64, 256], "help": "pairs of a rank"},
)

if __name__ == "__main__":
    main()
