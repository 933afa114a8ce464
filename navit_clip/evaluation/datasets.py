"""Where evaluation data comes from: files and webdataset shards, with labels or captions.

`labelled` and `captioned` open them. Every dataset can be read in parts, so that ranks and workers
share it; the key of an item is its place in the dataset, by which the results of all parts are
sorted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from navit_clip.data.annotations.labels import ClassMap
from navit_clip.data.captions import find_captions
from navit_clip.data.decode import find_image
from navit_clip.data.shards import RawSample, ShardError, read_shard
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.files import storable

Key = tuple[int, int]

# Items that are embedded together, wherever that is: neighbours in a batch change the last digits
# of an embedding, and metrics must not depend on the number of ranks.
BLOCK = 64


def block_of(key: Key) -> Key:
    """The block of neighbouring items that the item at `key` belongs to."""
    return key[0], key[1] // BLOCK


@dataclass(frozen=True)
class _Part:
    """Indices, within one file of a dataset, that a part reads: every `parts`-th block.

    `number` is the file's, so that the first block of every small one is not the same part's.
    """

    part: int
    parts: int
    number: int = 0

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        return (self.number + index // BLOCK) % self.parts == self.part


@dataclass(frozen=True)
class Item:
    """One image of a dataset.

    Attributes:
        key: File and index in it.
        name: File or sample, for messages and pictures.
        data: The encoded image, or why there is none.
        classes: Indices of the classes that are right, none for captioned data.
        captions: Its captions, none for labelled data.
    """

    key: Key
    name: str
    data: bytes | SkipSampleError
    classes: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()


class EvalDataset(ABC):
    """Evaluation data that can be read in parts.

    Attributes:
        skipped: Captions that were dropped, by reason, before any image was read.
        count: Images in the dataset, None if it would have to be read.
    """

    skipped: Mapping[str, int] = MappingProxyType({})
    count: int | None = None

    @abstractmethod
    def read(self, part: int, parts: int) -> Iterator[Item]:
        """One part's items in order: whole blocks of neighbours (`block_of`), every so many."""


class FileDataset(EvalDataset):
    """Images in files, each with classes or captions.

    Args:
        paths: One file each.
        classes: Indices of the classes that are right for each, or none.
        captions: Captions of each, or none; an image with an empty tuple is skipped.
        skipped: Captions dropped by reason.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        classes: Sequence[tuple[int, ...]] | None = None,
        captions: Sequence[tuple[str, ...]] | None = None,
        skipped: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.paths, self.classes = paths, classes or [()] * len(paths)
        self.captions = captions
        self.count, self.skipped = len(paths), skipped

    def read(self, part: int, parts: int) -> Iterator[Item]:
        """Reads blocks `part`, `part` + `parts`, … of files."""
        wanted = _Part(part, parts)
        for index, path in enumerate(self.paths):
            if index not in wanted:
                continue
            captions = self.captions[index] if self.captions is not None else ()
            data: bytes | SkipSampleError
            try:
                data = path.read_bytes()
            except OSError as error:
                data = SkipSampleError("missing_image", error.strerror or str(error))
            if self.captions is not None and not captions:
                data = SkipSampleError("no_caption", "it has no caption")
            yield Item((0, index), storable(path), data, self.classes[index], captions)


class ShardDataset(EvalDataset):
    """Images in webdataset shards, labelled (``.cls``) or captioned.

    Args:
        shards: Tar files.
        captions: Caption fields as in training; without any, labels are read.
        class_map: What the labels mean; class indices if not given.
    """

    def __init__(
        self,
        shards: Sequence[str],
        captions: Sequence[str] = (),
        class_map: ClassMap | None = None,
    ) -> None:
        self.shards, self.captions = shards, captions
        self.class_map = class_map or ClassMap("index")

    def read(self, part: int, parts: int) -> Iterator[Item]:
        """Reads every `parts`-th block of samples of each shard."""
        for number, path in enumerate(self.shards):
            wanted = _Part(part, parts, number)
            try:
                for sample in read_shard(path, wanted):
                    if sample.index in wanted:
                        yield self._item((number, sample.index), sample)
            except ShardError as error:
                raise UserError(f"{error}; fetch the shard again") from error

    def _item(self, key: Key, sample: RawSample) -> Item:
        try:
            sample.check()
            data = find_image(sample.members)
            if not self.captions:
                return Item(key, sample.id, data, self._classes(sample))
            found = [c for field in self.captions for c in find_captions(sample.members, field)]
            if not found:
                fields = ", ".join(self.captions)
                raise SkipSampleError("no_caption", f"none of the fields {fields}")
            return Item(key, sample.id, data, captions=tuple(dict.fromkeys(found)))
        except SkipSampleError as error:
            return Item(key, sample.id, error)

    def _classes(self, sample: RawSample) -> tuple[int, ...]:
        written = sample.members.get("cls")
        if written is None:
            raise UserError(
                f"{sample.id} has no .cls member with its class: labelled shards need one"
            )
        classes = self.class_map.find(written.decode(errors="replace").strip())
        if not classes:
            reason = "bad_label" if classes is None else "class_left_out"
            raise SkipSampleError(reason, f"{written[:20]!r}")
        return classes
