"""Batches from data workers: the same content, in one block of shared memory."""

from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler

import torch
from torch.utils.data import DataLoader, IterableDataset

from navit_clip.data.shared_batch import SharedBatch


def content(number: int = 0) -> dict[str, object]:
    ids = torch.arange(12, dtype=torch.int32).view(3, 4) + number
    return {
        "ids": ids,
        "the same": ids,
        "columns": ids.t(),
        "every other": ids[:, ::2],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(True),
        "bytes": torch.full((100_001,), 7, dtype=torch.uint8),
        "patches": torch.arange(1 << 20, dtype=torch.float32).view(2, -1),
        "order": torch.ones(1000, 2, dtype=torch.int64),
        "rest": ("a", 1.5, None, [number] * 100_000),
    }


class Batches(IterableDataset[SharedBatch]):
    def __iter__(self) -> Iterator[SharedBatch]:
        for number in range(20):
            yield SharedBatch(content(number))


def test_content_arrives_as_it_was():
    received = list(DataLoader(Batches(), batch_size=None, num_workers=1))
    assert len(received) == 20
    for number, found in enumerate(received):
        expected = content(number)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert found[name].dtype == value.dtype
                assert torch.equal(found[name], value), name
                # Blocks would be compiled again for tensors that begin elsewhere.
                assert found[name].storage_offset() == 0
            else:
                assert found[name] == value
        for name in ("ids", "bytes", "patches", "order"):
            assert found[name].data_ptr() % 64 == 0  # as of any tensor of PyTorch's own
        found["ids"][0, 0] = -5  # its owner may write to it, and to no other
        assert found["the same"] is found["ids"]
        assert torch.equal(found["columns"], expected["columns"])


def test_the_message_is_short_however_much_is_in_it():
    # A pipe holds 64 kB: longer ones would wait for the training process to read them.
    assert len(ForkingPickler.dumps(SharedBatch(content()))) < 1000
    assert len(ForkingPickler.dumps(SharedBatch(None))) < 1000
