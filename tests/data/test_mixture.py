"""What a run is told of how its shards divide among readers, against the order itself."""

from __future__ import annotations

import pytest

from navit_clip.data.mixture import Dataset, Mixture, _unread
from navit_clip.data.order import ShardOrder


def mixture(count: int, address: str = "") -> Mixture:
    names = tuple(f"{n:05d}" for n in range(count))
    shards = tuple(f"{address}{name}.tar" for name in names)
    return Mixture(shards, names, (Dataset("web", 1.0, None, range(count)),))


@pytest.mark.parametrize("readers", [1, 2, 7, 12, 30])
@pytest.mark.parametrize("count", [1, 2, 5, 7, 12, 31, 100])
def test_what_is_left_unread_is_what_the_order_leaves(count, readers):
    (dataset,) = mixture(count).datasets
    unread = 0.0
    for reader in range(readers):
        slices = ShardOrder(dataset, 0, reader, readers).slices(0)
        unread += max(0.0, sum(1 / one.stride for one in slices) - count / readers)
    assert _unread(count, readers) == pytest.approx(unread / count)


@pytest.mark.parametrize(
    ("count", "readers", "address", "said"),
    [
        (10_000, 7168, "", ["17% of them are not"]),
        (100_000, 7168, "s3://b/", []),
        (7168, 7168, "s3://b/", []),
        (64, 7168, "s3://b/", ["64 shards for 7,168 readers: each is downloaded by 112 of them"]),
        (64, 7168, "", []),
        (5000, 7168, "https://h/", ["downloaded by 2 of them", "17% of them are not"]),
        (8, 1, "https://h/", []),
    ],
)
def test_remarks(count, readers, address, said):
    lines = list(mixture(count, address).remarks(readers))
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert line.startswith("dataset web has ")
        assert part in line
