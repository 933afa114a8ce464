"""Opens labelled images: class folders, a flat folder with a label file, shards with ``.cls``.

From what the user names to a dataset of images, each with a class index, and what is known of the
classes. What the data calls its classes is settled by `labels`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from navit_clip.data.annotations.labels import (
    ClassMap,
    Labeller,
    is_index,
    load_class_map,
    read_label_file,
    unnamed_label,
)
from navit_clip.data.decode import IMAGE_EXTENSIONS
from navit_clip.data.shards import expand_shards
from navit_clip.errors import UserError
from navit_clip.evaluation.datasets import EvalDataset, FileDataset, ShardDataset


@dataclass(frozen=True)
class Labelled:
    """Labelled images and what is known of their classes.

    Attributes:
        dataset: The images; a label is the index of a class that is right.
        folders: The data's own names of its classes, in label order; None where labels are indices
            of classes that somebody else names.
        right: All right classes by label, of labels that have several.
        labels: Every label that occurs, None if only reading all samples tells.
    """

    dataset: EvalDataset
    folders: list[str] | None = None
    right: dict[int, tuple[int, ...]] = field(default_factory=dict)
    labels: frozenset[int] | None = None

    def present(self, seen: Iterable[int]) -> list[int]:
        """Classes that occur in the data, sorted.

        Args:
            seen: Labels of the images that could be read.
        """
        labels = set(seen) if self.labels is None else self.labels
        return sorted({index for label in labels for index in self.right.get(label, (label,))})

    def check_names(self, names: Sequence[str]) -> None:
        """Finds labels without a name before hours of embedding, where they are known.

        Raises:
            UserError: If there is one.
        """
        last = max(self.present(()), default=-1)
        if last >= len(names):
            raise unnamed_label(last, len(names))


def open_labelled(path: str, labels: str | None = None, class_map: str | None = None) -> Labelled:
    """Opens class folders, a flat folder with a label file, or labelled shards.

    Args:
        path: A folder with one folder per class; a folder of images, with `labels`; or shards with
            ``.cls`` members.
        labels: Label file of the images in `path`, see `labels.read_label_file`.
        class_map: What folders, labels and ``.cls`` mean, see `labels.load_class_map`. Without one
            class folders are numbered in sorted order, numbers are class indices, and a label
            file's names are numbered as folders would be.

    Raises:
        UserError: If there is nothing to read, or a class folder or label that the map lacks.
    """
    known = load_class_map(class_map) if class_map is not None else None
    root = Path(path)
    if labels is not None:
        if not root.is_dir():
            raise UserError(f"no folder at {path}: --labels goes with a folder of images")
        return _label_file(root, labels, known)
    if not root.is_dir() or any(root.glob("*.tar")):
        labeller = Labeller.of(known, known.indices.values()) if known else Labeller()
        return Labelled(
            ShardDataset(expand_shards([path]), labeller=labeller), right=labeller.right
        )
    return _class_folders(root, known)


def _class_folders(root: Path, class_map: ClassMap | None) -> Labelled:
    entries = sorted(root.iterdir())
    folders = [path for path in entries if path.is_dir()]
    images = [
        (path, folder.name) for folder in folders for path in _images(sorted(folder.iterdir()))
    ]
    if not images:
        if _images(entries):
            raise UserError(f"{root} holds images but no class folders: give --labels FILE as well")
        raise UserError(f"no image in class folders under {root}: expected {root}/CLASS/*.jpg")
    if class_map is None:
        # An empty class still has its name and its place.
        return _numbered(images, [folder.name for folder in folders])
    return _mapped(images, class_map, "class folder")


def _label_file(root: Path, file: str, class_map: ClassMap | None) -> Labelled:
    written = read_label_file(file)
    by_stem = {path.stem: path for path in _images(sorted(root.iterdir()))}
    first = next(iter(written))
    images = []
    for name, label in written.items():
        # Some label files name images without the extension, and some have a line of columns'
        # names; an image that is missing is skipped later, where skipped images are counted.
        path = root / name
        if not _is_image(path):
            if name not in by_stem and name == first:
                continue
            path = by_stem.get(name, path)
        images.append((path, label))
    if not any(path.is_file() for path, _ in images):
        raise UserError(f"no image that {file} names is in {root}: check --data and --labels")
    if class_map is not None:
        return _mapped(images, class_map, "label")
    if all(is_index(label) for _, label in images):
        labels = [int(label) for _, label in images]
        return Labelled(FileDataset([path for path, _ in images], labels), labels=frozenset(labels))
    return _numbered(images, sorted({label for _, label in images}))


def _numbered(images: Sequence[tuple[Path, str]], names: list[str]) -> Labelled:
    place = {name: index for index, name in enumerate(names)}
    labels = [place[name] for _, name in images]
    dataset = FileDataset([path for path, _ in images], labels)
    return Labelled(dataset, names, labels=frozenset(labels))


def _mapped(images: Sequence[tuple[Path, str]], class_map: ClassMap, what: str) -> Labelled:
    answers = {name: class_map.find(name) for name in dict.fromkeys(name for _, name in images)}
    known = {name: found for name, found in answers.items() if found is not None}
    if unknown := [name for name in answers if name not in known]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        fix = 'add it, or leave it out with "folder": [] in JSON'
        if class_map.is_built_in:
            fix = 'give a file that has it, such as JSON {"folder": 3}'
        raise UserError(f"{what} {unknown[0]!r}{more} is not in class map {class_map.name}: {fix}")
    labeller = Labeller.of(class_map, known.values())
    kept = [(path, label) for path, name in images if (label := labeller(name)) is not None]
    if not kept:
        raise UserError(f"class map {class_map.name} leaves out every {what}")
    labels = [label for _, label in kept]
    dataset = FileDataset([path for path, _ in kept], labels)
    return Labelled(dataset, right=labeller.right, labels=frozenset(labels))


def _images(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if _is_image(path)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
