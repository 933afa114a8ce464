"""This project's step beside open_clip's, of equal widths, on the same photos and captions.

Ours are packed at native resolution, sides ~ U(64, 256), never enlarged, with and without half of
the patches dropped; open_clip's are 224×224 squares and 77 slots. Equal pairs in a step; with half
dropped also twice as many, which fill the tokens that the same pairs fill without drop.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch

from benchmarks.device.setting import Setting
from benchmarks.device.steps import COMPILED, COMPILED_BF16, build_stepper, time_steps
from benchmarks.pairs import RealPair, draw_batches, pair_builder, read_samples
from benchmarks.peers import OpenClip
from benchmarks.sizes import WIDTHS
from navit_clip.data.config import DataConfig
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.training.parallel import ParallelConfig

_PAIRS, _BATCHES, _STEPS = 768, 2, 20
_WARM_UPS = 4
_ROUND = 256  # tokens: streams of all batches are as long as the longest, rounded up
HALF = 0.5
# Name, drop, and how many times the pairs.
KINDS = (("all", 0.0, 1), ("filled", HALF, 2), ("half", HALF, 1))


def _batches(setting: Setting, drop: float, times: int = 1) -> list[list[RealPair]]:
    """Always of the same photos; with `times` the pairs, in as many batches less."""
    with tempfile.TemporaryDirectory() as folder:
        samples = read_samples(setting.photos(Path(folder)))
    pairs = times * (4 if setting.tiny else _PAIRS)
    return list(draw_batches(samples, pairs, _BATCHES // times, drop))


def check_ours(setting: Setting, parallel: ParallelConfig = COMPILED) -> Iterator[dict[str, Any]]:
    """Pairs per second of this project's steps, compiled, without drop and with half dropped.

    ``half`` has as many pairs as ``all``, ``filled`` about as many tokens.
    """
    setting.warm_up()
    widths = WIDTHS["XS/16" if setting.tiny else "B/16"]
    stepper = build_stepper(widths.config(), setting.device, parallel)
    build = pair_builder(DataConfig())
    for name, drop, times in KINDS:
        drawn = _batches(setting, drop, times)
        longest = [
            max(sum(real.pair.lengths[stream] for real in pairs) for pairs in drawn)
            for stream in range(2)
        ]
        budgets = tuple(-(-tokens // _ROUND) * _ROUND for tokens in longest)
        batches = [
            Batch(
                build.collate([real.pair for real in pairs], budgets),
                tuple(real.pair.id for real in pairs),
                BatchCounts(len(pairs)),
            )
            for pairs in drawn
        ]
        timed, _ = time_steps(setting, stepper, batches, 1 if setting.tiny else _STEPS)
        pairs = len(drawn[0])
        yield {
            f"{name}_pairs": pairs,
            f"{name}_pairs_per_s": timed["pairs_per_s"],
            f"{name}_ms": timed["ms"],
            f"{name}_peak_gb": timed["peak_gb"],
            f"{name}_tokens_per_pair": [tokens / pairs for tokens in longest],
        }


def _check_peer(setting: Setting, compiled: bool) -> Iterator[dict[str, Any]]:
    """Pairs per second of open_clip's model and loss, amp_bf16 and fused AdamW."""
    setting.warm_up()
    if not setting.cuda:
        torch.compiler.set_stance("force_eager")
    torch.manual_seed(0)
    towers = OpenClip(WIDTHS["XS/16" if setting.tiny else "B/16"]).to(setting.device)
    batches = [towers.prepare(pairs, setting.device) for pairs in _batches(setting, 0.0)]
    model: Callable[..., Any] = torch.compile(towers.clip) if compiled else towers.clip
    optimizer = torch.optim.AdamW(towers.clip.parameters(), lr=1e-4, fused=True)
    loss = open_clip.ClipLoss()

    def take(number: int) -> None:
        with torch.autocast(setting.device.type, torch.bfloat16):
            image, text, scale, *_ = model(*batches[number % len(batches)])
            value = loss(image, text, scale)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    begin = time.perf_counter()
    for number in range(1 if setting.tiny else _WARM_UPS):
        take(number)
    setting.synchronize()
    warm_up_s = time.perf_counter() - begin
    steps = 1 if setting.tiny else _STEPS
    begin = time.perf_counter()
    for number in range(steps):
        take(number)
    setting.synchronize()
    step_s = (time.perf_counter() - begin) / steps
    pairs = len(batches[0][1])
    yield {
        "pairs": pairs,
        "pairs_per_s": pairs / step_s,
        "ms": 1e3 * step_s,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if setting.cuda else 0.0,
        "warm_up_s": warm_up_s,
    }


check_ours_bf16 = partial(check_ours, parallel=COMPILED_BF16)
check_peer_eager = partial(_check_peer, compiled=False)
check_peer_compiled = partial(_check_peer, compiled=True)


def ratios(checks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as fast ours is, of those checks that have run."""
    return {
        f"{ours}_times_{peer}_{kind}": checks[ours][f"{kind}_pairs_per_s"]
        / checks[peer]["pairs_per_s"]
        for ours in ("ours", "ours_bf16")
        for peer in ("peer_eager", "peer_compiled")
        for kind, *_ in KINDS
        if f"{kind}_pairs_per_s" in checks.get(ours, {}) and "pairs_per_s" in checks.get(peer, {})
    }
