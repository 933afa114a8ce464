"""Where evaluation data comes from: files and webdataset shards, with labels or captions.

`labelled` and `captioned` open them, `open_images` those without either. Every dataset can be read
in parts, so that ranks and workers share it; the key of an item is its place in the dataset, by
which the results of all parts are sorted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from navit_clip.data.annotations.folders import find_images
from navit_clip.data.annotations.labels import ClassMap
from navit_clip.data.captions import find_captions
from navit_clip.data.decode import describe_members, find_image
from navit_clip.data.labels import find_labels
from navit_clip.data.patterns import expand_shards
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.errors import SkipSampleError
from navit_clip.files import storable

LEFT_OUT = "class_left_out"  # by a class map, on purpose: it is counted, and no error if `strict`

# Items that are embedded together, wherever that is: neighbours in a batch change the last digits
# of an embedding, and metrics must not depend on the number of ranks.
BLOCK = 64


def block_of(key: int) -> int:
    """The block of neighbouring items that the item at `key` belongs to."""
    return key // BLOCK


class _Part:
    """Indices within one file after another that a part of a dataset reads: every so many blocks.

    Blocks go on over the ends of files, so that they are the same however data is split into
    shards.

    Attributes:
        first: Index in the dataset of the present file's first item.
    """

    def __init__(self, part: int, parts: int) -> None:
        self.first, self._part, self._parts = 0, part, parts
        self._asked = 0

    def __contains__(self, index: object) -> bool:
        """Whether this part reads an item of the present file; asked for each in order."""
        assert isinstance(index, int)
        self._asked = index + 1
        return block_of(self.first + index) % self._parts == self._part

    def end_file(self) -> None:
        """All of the present file was asked for; the next one begins."""
        self.first, self._asked = self.first + self._asked, 0


@dataclass(frozen=True)
class Item:
    """One image of a dataset.

    Attributes:
        key: Its place in the dataset.
        name: File or sample, for messages and pictures.
        data: The encoded image, or why there is none.
        classes: Indices of the classes that are right, none for captioned data.
        captions: Its captions, none for labelled data.
    """

    key: int
    name: str
    data: bytes | SkipSampleError
    classes: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()


class EvalDataset(ABC):
    """Evaluation data that can be read in parts.

    Attributes:
        skipped: Files and captions that were dropped, by reason, before any image was read.
        skips: The first few of these, described.
        count: Images in the dataset, None if it would have to be read.
    """

    skipped: Mapping[str, int] = MappingProxyType({})
    skips: Sequence[str] = ()
    count: int | None = None

    def skip(self, skipped: Mapping[str, int], skips: Sequence[str] = ()) -> None:
        """Counts what is skipped before any image is read."""
        self.skipped = Counter(self.skipped) + Counter(skipped)
        self.skips = [*self.skips, *skips]

    @abstractmethod
    def read(self, part: int, parts: int) -> Iterator[Item]:
        """One part's items in order: whole blocks of neighbours (`block_of`), every so many."""


class FileDataset(EvalDataset):
    """Images in files, each with classes or captions.

    Args:
        paths: One file each; None for an image that its list gives no name.
        classes: Indices of the classes that are right for each, or none.
        captions: Captions of each, or none; an image with an empty tuple is skipped.
    """

    def __init__(
        self,
        paths: Sequence[Path | None],
        classes: Sequence[tuple[int, ...]] | None = None,
        captions: Sequence[tuple[str, ...]] | None = None,
    ) -> None:
        self.paths, self.classes = paths, classes or [()] * len(paths)
        self.captions = captions
        self.count = len(paths)

    def read(self, part: int, parts: int) -> Iterator[Item]:
        """Reads blocks `part`, `part` + `parts`, … of files."""
        wanted = _Part(part, parts)
        for index, path in enumerate(self.paths):
            if index not in wanted:
                continue
            captions = self.captions[index] if self.captions is not None else ()
            data: bytes | SkipSampleError
            if path is None:
                data = SkipSampleError("no_path", "names no image")
            elif self.captions is not None and not captions:
                data = SkipSampleError("no_caption", "every caption is empty or missing")
            else:
                data = _read(path)
            name = "a row" if path is None else storable(path)
            yield Item(index, name, data, self.classes[index], captions)


def _read(path: Path) -> bytes | SkipSampleError:
    try:
        return path.read_bytes()
    # ValueError: a path that the file system cannot have.
    except (OSError, ValueError) as error:
        return SkipSampleError("missing_image", getattr(error, "strerror", None) or str(error))


class ShardDataset(EvalDataset):
    """Images in webdataset shards, labelled (``.cls``) or captioned.

    Args:
        shards: Tar files.
        captions: Caption fields as in training; without any, labels are read.
        class_map: What the labels mean; class indices if not given.
        names: What the map calls the classes that are numbers in the data; none if not given.
        field: Where labels are, ``cls`` or ``json.FIELD``.
        by_index: Numbers in the data are class indices, whatever the map says: two classes may
            have the same name.
    """

    def __init__(
        self,
        shards: Sequence[str],
        captions: Sequence[str] = (),
        class_map: ClassMap | None = None,
        names: Sequence[str] | None = None,
        field: str = "cls",
        *,
        by_index: bool = False,
    ) -> None:
        self.by_index = by_index
        self.shards, self.captions, self.field = shards, captions, field
        self.names = () if names is None or class_map == ClassMap("index") else names
        self.class_map = class_map or ClassMap("index")

    def read(self, part: int, parts: int) -> Iterator[Item]:
        """Reads blocks `part`, `part` + `parts`, … of samples; the others are skipped unread."""
        wanted = _Part(part, parts)
        for path in self.shards:
            try:
                for sample in read_shard(path, wanted):
                    yield self._item(wanted.first + sample.index, sample)
            except ShardError as error:
                raise error.refusal() from error
            wanted.end_file()

    def _item(self, key: int, sample: RawSample) -> Item:
        try:
            sample.check()
            data = find_image(sample.members)
            if not self.captions:
                return Item(key, sample.id, data, self._classes(sample))
            found: list[str] = []
            for field in self.captions:
                # A caption in two fields is one; one that a field has twice is two queries.
                rest = Counter(found)
                for caption in find_captions(sample.members, field):
                    if rest[caption]:
                        rest[caption] -= 1
                    else:
                        found.append(caption)
            if not found:
                fields, members = ", ".join(self.captions), describe_members(sample.members)
                raise SkipSampleError("no_caption", f"none of the fields {fields}; {members}")
            return Item(key, sample.id, data, captions=tuple(found))
        except SkipSampleError as error:
            return Item(key, sample.id, error)

    def _classes(self, sample: RawSample) -> tuple[int, ...]:
        found: list[int] = []
        for label in find_labels(sample.members, self.field):
            classes = self._class(label)
            if not classes:
                reason = "bad_label" if classes is None else LEFT_OUT
                raise SkipSampleError(reason, repr(label)[:60])
            found += classes
        return tuple(sorted(set(found)))

    def _class(self, label: int | str) -> tuple[int, ...] | None:
        if isinstance(label, int) and 0 <= label < len(self.names):
            return (label,) if self.by_index else self.class_map.find(self.names[label])
        return self.class_map.find(str(label))


class UnlabelledShards(ShardDataset):
    """Images in webdataset shards, whatever else is in a sample."""

    def _classes(self, sample: RawSample) -> tuple[int, ...]:
        return ()


def open_images(data: str) -> EvalDataset:
    """Images without labels or captions: all below a folder, or those of shards.

    Raises:
        UserError: If there are none.
    """
    root = Path(data)
    if not root.is_dir() or any(root.glob("*.tar")):
        return UnlabelledShards(expand_shards([data]))
    names, skipped = find_images(root)
    dataset = FileDataset([root / name for name in names])
    dataset.skip(skipped)
    return dataset
