"""Opens labelled images: class folders, a flat folder with a label file, shards with ``.cls``.

From what the user names to a dataset of images, each with a class index, and what is known of the
classes. What the data calls its classes is settled by `labels`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from navit_clip.data.annotations.class_names import index_of, names_beside, spaced
from navit_clip.data.annotations.folders import is_image, read_class_folders
from navit_clip.data.annotations.labels import ClassMap, load_class_map, read_label_file
from navit_clip.data.patterns import TABLES, expand_shards
from navit_clip.errors import UserError
from navit_clip.evaluation.datasets import LEFT_OUT, EvalDataset, FileDataset, ShardDataset
from navit_clip.files import reading, storable


@dataclass(frozen=True)
class Labelled:
    """Labelled images and what is known of their classes.

    Attributes:
        dataset: The images, each with the indices of the classes that are right.
        folders: The data's own names of its classes, by index; None where indices are those of
            classes that the data does not name.
        classes: Every class that occurs, None if all samples would have to be read.
        names: Class names that lie beside shards, by index, if there are any.
    """

    dataset: EvalDataset
    folders: list[str] | None = None
    classes: frozenset[int] | None = None
    names: list[str] | None = None

    def present(self, seen: Iterable[tuple[int, ...]]) -> list[int]:
        """Classes that occur in the data, sorted; `seen` are those of the images that were read."""
        return sorted(self.classes or {index for classes in seen for index in classes})

    def check_names(self, names: Sequence[str], seen: Iterable[tuple[int, ...]] = ()) -> None:
        """Finds a class without a name, before hours of embedding where the classes are known.

        Args:
            names: By class index.
            seen: As in `present`.

        Raises:
            UserError: If there is one.
        """
        last = max(self.present(seen), default=-1)
        if last >= len(names):
            raise UserError(
                f"label {last} has no name: there are {len(names)} class names; check "
                "--classnames and --class-map"
            )


def open_labelled(
    path: str,
    labels: str | None = None,
    class_map: str | ClassMap | None = None,
    *,
    field: str = "cls",
    names: Sequence[str] | None = None,
) -> Labelled:
    """Opens class folders, a flat folder with a label file, or labelled shards.

    Args:
        path: A folder with one folder per class; a folder of images, with `labels`; or shards with
            ``.cls`` members.
        labels: Label file of the images in `path`, see `labels.read_label_file`.
        class_map: What folders, labels and ``.cls`` mean, see `labels.load_class_map`. Without one
            class folders are numbered in sorted order, numbers are class indices, and a label
            file's names are numbered as folders would be.
        field: Where samples of shards have their labels, ``cls`` or ``json.FIELD``.
        names: What the map calls classes that are numbers in shards without names beside them.

    Raises:
        UserError: If there is nothing to read, or a class folder or label that the map lacks.
    """
    known = load_class_map(class_map) if isinstance(class_map, str) else class_map
    root = Path(path)
    is_shards = labels is None and (not root.is_dir() or any(root.glob("*.tar")))
    if field != "cls" and not is_shards:
        raise UserError(f"--field {field} goes with shards, and {path} is a folder of images")
    if labels is not None:
        if not root.is_dir():
            raise UserError(f"no folder at {path}: --labels goes with a folder of images")
        return _label_file(root, labels, known)
    if is_shards and path.lower().endswith(TABLES):
        raise UserError(
            f"{path}: a table of labels goes with the folder of its images, --data FOLDER --labels "
            "FILE, and has image and label in its first two columns; or make shards of it "
            "(make_shards --label-column)"
        )
    if is_shards:
        shards = expand_shards([path])
        beside = names_beside(shards[0])
        # A map knows the classes by their names, where the data has names for its numbers.
        called = (beside or names) if known is not None else None
        # A map in memory is one of `names`: where the data's are the same, its numbers are exact.
        by_index = isinstance(class_map, ClassMap) and _spaced(called) == _spaced(names)
        dataset = ShardDataset(
            shards, class_map=known, names=called, field=field, by_index=by_index
        )
        return Labelled(dataset, names=beside if known is None else None)
    return _class_folders(root, known)


def _spaced(names: Sequence[str] | None) -> list[str]:
    return [spaced(name) for name in names or ()]


def _class_folders(root: Path, class_map: ClassMap | None) -> Labelled:
    found = read_class_folders(root)
    images = [(root / name, found.names[index]) for name, index in found.images]
    # An empty class still has its name and its place.
    labelled = _labelled(images, class_map, "class folder", found.names)
    labelled.dataset.skip(found.skipped, found.skips)
    return labelled


def _label_file(root: Path, file: str, class_map: ClassMap | None) -> Labelled:
    written = read_label_file(file)
    by_stem: dict[str, list[Path]] = {}
    with reading(root):
        for path in filter(is_image, sorted(root.iterdir())):
            by_stem.setdefault(path.stem, []).append(path)
    first = next(iter(written))
    images = []
    for name, label in written.items():
        # Some label files name images without the extension, and some have a line of columns'
        # names; an image that is missing is skipped later, where skipped images are counted.
        path = root / name
        if not is_image(path):
            candidates = by_stem.get(name, [])
            if not candidates and name == first:
                continue
            if len(candidates) > 1:
                raise UserError(
                    f"{file} labels {name!r}, which is {candidates[0].name} as well as "
                    f"{candidates[1].name}: give its extension too"
                )
            path = candidates[0] if candidates else path
        images.append((path, label))
    if not any(os.path.isfile(path) for path, _ in images):
        raise UserError(f"no image that {file} names is in {root}: check --data and --labels")
    bad = {"": "no_label"}
    names = {label for _, label in images if label}
    if class_map is None and all(map(_is_number, names)):
        class_map = ClassMap("index")
        bad |= {label: "bad_label" for label in names if index_of(label) is None}
    skips = [(bad[label], path, label) for path, label in images if label in bad]
    images = [(path, label) for path, label in images if label not in bad]
    if not images:
        raise UserError(f"labels {file}: {skips[0][2]!r} is no class index, nor is any other label")
    labelled = _labelled(images, class_map, "label", sorted(names - set(bad)))
    described = [f"{why}: {storable(path)}: its label is {label!r}" for why, path, label in skips]
    labelled.dataset.skip(Counter(why for why, *_ in skips), described)
    return labelled


def _is_number(label: str) -> bool:
    """Whether all labels being so, one that is no class index is a mistake: -1, 0.5, nan."""
    try:
        float(label)
    except ValueError:
        return False
    return True


def _labelled(
    images: Sequence[tuple[Path, str]], class_map: ClassMap | None, what: str, names: list[str]
) -> Labelled:
    """Images with their classes: by the map, or without one by their place among the names."""
    folders = names if class_map is None else None
    if class_map is None:
        class_map = ClassMap(what, {name: (index,) for index, name in enumerate(names)})
    found = {name: class_map.find(name) for name in dict.fromkeys(name for _, name in images)}
    known = {name: classes for name, classes in found.items() if classes is not None}
    if unknown := [name for name in found if name not in known]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        fix = 'add it, or leave it out with "folder": [] in JSON'
        if class_map.is_built_in:
            fix = 'give a file that has it, such as JSON {"folder": 3}'
        raise UserError(f"{what} {unknown[0]!r}{more} is not in class map {class_map.name}: {fix}")
    if not any(known.values()):
        raise UserError(f"class map {class_map.name} leaves out every {what}")
    kept = [(path, known[name]) for path, name in images if known[name]]
    dataset = FileDataset([path for path, _ in kept], [classes for _, classes in kept])
    dataset.skip({LEFT_OUT: len(images) - len(kept)})
    return Labelled(dataset, folders, frozenset(i for _, classes in kept for i in classes))
