"""Which pairs the readers of a finished run handed out, beside those that it logged.

A run that was killed must have seen each pair once in an epoch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from navit_clip.checkpoints.rank_state import SavedDataStates
from navit_clip.data.mixture import Mixture
from navit_clip.data.shards import read_shard
from navit_clip.data.state import DataState
from navit_clip.training.config import parse_config


def pairs_taken(
    data: DataState,
    mixture: Mixture,
    seed: int,
    reader: int,
    ids: Sequence[Sequence[str]],
) -> Counter[tuple[int, str]]:
    """The epoch and id of each pair that a reader has handed out, by its own account.

    Args:
        data: Of its rank.
        mixture: Of the run, a single dataset.
        seed: Of the run.
        reader: Its number.
        ids: Of all samples of each shard.
    """
    (order,), state = data.of_reader(mixture, seed, reader)
    (cursor,) = state.cursors
    ahead = {(o.epoch, o.shard, o.sample) for o in (*state.buffer, *state.pending)}
    return Counter(
        (epoch, name)
        for epoch in range(cursor.epoch + 1)
        for number, own in enumerate(order.slices(epoch))
        for index, name in enumerate(ids[own.shard])
        if index in own
        and (epoch, number, index) < cursor
        and (epoch, own.shard, index) not in ahead
    )


def count_pairs(flags: Sequence[str], run_dir: Path, ranks: int) -> dict[str, int]:
    """Compares the logged pairs with what each reader says it handed out.

    Args:
        flags: Of the run, but for its directory.
        run_dir: Of the run, with ``log.samples``.
        ranks: Of the run.

    Returns:
        ``pairs``, logged in all; ``pairs_in_epoch``; ``pairs_missing``: never handed out in the
        first epoch, or handed out and not logged; ``pairs_repeated``: handed out twice in one
        epoch, or logged more often than handed out.
    """
    config, _ = parse_config([*flags, "--run_dir", str(run_dir)])
    mixture = Mixture.find(config.data)
    ids = [
        [sample.id for sample in read_shard(shard, None, name)]
        for shard, name in zip(mixture.shards, mixture.names, strict=True)
    ]
    logged: Counter[tuple[int, str]] = Counter()
    for path in run_dir.glob("samples-*.jsonl"):
        for line in path.read_text().splitlines():
            batch = json.loads(line)
            logged.update((batch["reader"], name) for name in batch["ids"])
    saved = SavedDataStates(run_dir / f"checkpoints/step-{config.steps:08d}", ranks)
    handed_out: Counter[tuple[int, str]] = Counter()
    by_epoch: Counter[tuple[int, str]] = Counter()
    for reader in range(ranks * config.data.workers):
        data = saved[reader // config.data.workers]
        taken = pairs_taken(data, mixture, config.seed, reader, ids)
        by_epoch += taken
        for (_, name), count in taken.items():
            handed_out[reader, name] += count
    never = {(0, name) for of_shard in ids for name in of_shard} - by_epoch.keys()
    return {
        "pairs": sum(logged.values()),
        "pairs_in_epoch": sum(map(len, ids)),
        "pairs_missing": len(never) + sum((handed_out - logged).values()),
        "pairs_repeated": sum(count - 1 for count in by_epoch.values())
        + sum((logged - handed_out).values()),
    }
