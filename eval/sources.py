"""Where evaluation data comes from: class folders, labelled shards, captioned folders and shards.

Every source can be read in parts, so that ranks and workers share it; the key of an item says
where it stands in the whole, which puts the results of all parts in one order again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from navit_clip.data.caption_files import read_caption_file
from navit_clip.data.captions import find_captions
from navit_clip.data.decode import IMAGE_EXTENSIONS, SkipSampleError, find_image
from navit_clip.data.shards import RawSample, ShardError, expand_shards, read_shard
from navit_clip.errors import UserError

Key = tuple[int, int]


@dataclass(frozen=True)
class Item:
    """One image to be judged.

    Attributes:
        key: Place in the whole source.
        name: File or sample, for messages and pictures.
        data: The encoded image, or why there is none.
        label: Class index, -1 for captioned data.
        captions: Its captions, none for labelled data.
    """

    key: Key
    name: str
    data: bytes | SkipSampleError
    label: int = -1
    captions: tuple[str, ...] = ()


class Source(ABC):
    """Evaluation data that can be read in parts."""

    @abstractmethod
    def read(self, part: int, parts: int) -> Iterator[Item]:
        """Items `part`, `part` + `parts`, … of the source."""


class FileSource(Source):
    """Images in files, each with a label or captions.

    Args:
        paths: One file each.
        labels: Class index of each, or none.
        captions: Captions of each, or none.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int] | None = None,
        captions: Sequence[tuple[str, ...]] | None = None,
    ) -> None:
        self.paths, self.labels, self.captions = paths, labels, captions

    def read(self, part: int, parts: int) -> Iterator[Item]:
        """Reads every `parts`-th file."""
        for index in range(part, len(self.paths), parts):
            path = self.paths[index]
            data: bytes | SkipSampleError
            try:
                data = path.read_bytes()
            except OSError as error:
                data = SkipSampleError("missing_image", error.strerror or str(error))
            yield Item(
                (0, index),
                str(path),
                data,
                self.labels[index] if self.labels is not None else -1,
                self.captions[index] if self.captions is not None else (),
            )


class ShardSource(Source):
    """Images in webdataset shards, labelled (``.cls``) or captioned.

    Args:
        shards: Tar files.
        captions: Caption sources as in training; none reads labels.
    """

    def __init__(self, shards: Sequence[str], captions: Sequence[str] = ()) -> None:
        self.shards, self.captions = shards, captions

    def read(self, part: int, parts: int) -> Iterator[Item]:
        """Reads every `parts`-th sample of each shard."""
        for number, path in enumerate(self.shards):
            wanted = _EveryNth(part, parts)
            try:
                for sample in read_shard(path, wanted):
                    if sample.index in wanted:
                        yield self._item((number, sample.index), sample)
            except ShardError as error:
                raise UserError(f"{error}; fetch the shard again") from error

    def _item(self, key: Key, sample: RawSample) -> Item:
        try:
            data = find_image(sample.members)
            if self.captions:
                found = [c for s in self.captions for c in find_captions(sample.members, s)]
                if not found:
                    raise SkipSampleError("no_caption", f"none of {', '.join(self.captions)}")
                return Item(key, sample.id, data, captions=tuple(dict.fromkeys(found)))
            return Item(key, sample.id, data, label=_label(sample))
        except SkipSampleError as error:
            return Item(key, sample.id, error)


@dataclass(frozen=True)
class _EveryNth:
    part: int
    parts: int

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        return index % self.parts == self.part


def _label(sample: RawSample) -> int:
    try:
        return int(sample.members["cls"])
    except KeyError as error:
        raise UserError(
            f"{sample.id} has no .cls member with a class index: labelled shards need one"
        ) from error
    except ValueError as error:
        raise SkipSampleError("bad_label", f"{sample.members['cls'][:20]!r}") from error


def open_labelled(path: str) -> tuple[Source, list[str] | None]:
    """Opens class folders or labelled shards.

    Args:
        path: A folder with one folder per class, or shards with ``.cls`` members.

    Returns:
        The source, and the class folders' names in label order (None for shards).

    Raises:
        UserError: If there is nothing to read.
    """
    root = Path(path)
    if not root.is_dir() or any(root.glob("*.tar")):
        return ShardSource(expand_shards([path])), None
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
    paths, labels = [], []
    for label, folder in enumerate(folders):
        images = [p for p in sorted(folder.iterdir()) if _is_image(p)]
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise UserError(f"no image in class folders under {path}: expected {path}/CLASS/*.jpg")
    return FileSource(paths, labels), [folder.name for folder in folders]


def open_captioned(
    data: str | None,
    images: str | None,
    captions: str | None,
    fields: Sequence[str],
    split: str | None,
) -> Source:
    """Opens captioned shards, or a folder of images with a JSON of captions.

    Args:
        data: Shards, or None.
        images: Folder of images, or None.
        captions: COCO's ``captions_*.json`` or Karpathy's ``dataset_*.json``, or None.
        fields: Caption sources within shards.
        split: Split of a Karpathy file; None takes ``test`` if there is one, else all.

    Raises:
        UserError: If the files do not exist or hold no captioned image.
    """
    if data is not None:
        return ShardSource(expand_shards([data]), fields)
    if images is None or captions is None:
        raise UserError("give --data SHARDS, or both --images FOLDER and --captions FILE.json")
    if not Path(images).is_dir():
        raise UserError(f"no folder at {images}: check --images")
    listed = read_caption_file(Path(captions))
    splits = {image.split for image in listed}
    if split is None and "test" in splits:
        split = "test"
    if split is not None and split not in splits:
        raise UserError(f"no split {split!r}: the file has {', '.join(sorted(map(str, splits)))}")
    found = {
        image.name: image.captions
        for image in listed
        if image.captions and split in (None, image.split)
    }
    if not found:
        raise UserError(f"no captioned image in {captions}")
    return FileSource([Path(images) / name for name in found], captions=list(found.values()))


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
