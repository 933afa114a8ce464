"""Parcels from data workers: the same content, large tensors in shared memory, small ones not."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset

from navit_clip.data.parcel import SHARED_BYTES, Parcel


def content() -> dict[str, object]:
    small = torch.arange(12, dtype=torch.int32).view(3, 4)
    return {
        "small": small,
        "the same": small,
        "columns": small.t(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(True),
        "just below": torch.full((SHARED_BYTES - 1,), 7, dtype=torch.uint8),
        "large": [torch.arange(SHARED_BYTES // 4, dtype=torch.float32).view(2, -1)],
        "larger": torch.ones(SHARED_BYTES, 2, dtype=torch.int64),
        "rest": ("a", 1.5, None),
    }


class Parcels(IterableDataset[Parcel]):
    def __iter__(self) -> Iterator[Parcel]:
        yield Parcel(content())
        yield Parcel(content())


def test_content_arrives_without_its_wrapping():
    received = list(DataLoader(Parcels(), batch_size=None, num_workers=1))
    assert len(received) == 2
    for found in received:
        expected = content()
        assert found.keys() == expected.keys()
        (found["large"],), (expected["large"],) = found["large"], expected["large"]
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert found[name].dtype == value.dtype
                assert torch.equal(found[name], value), name
                assert found[name].is_shared() == name.startswith("large")
            else:
                assert found[name] == value
        found["small"][0, 0] = 5  # its owner may write to it
        assert found["the same"] is found["small"]
