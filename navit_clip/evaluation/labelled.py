"""Opens labelled images: class folders, a flat folder with a label file, shards with ``.cls``.

From what the user names to a dataset of images, each with a class index, and what is known of the
classes. What the data calls its classes is settled by `labels`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from navit_clip.data.annotations.labels import ClassMap, is_index, load_class_map, read_label_file
from navit_clip.data.decode import IMAGE_EXTENSIONS
from navit_clip.data.patterns import expand_shards
from navit_clip.errors import UserError
from navit_clip.evaluation.datasets import EvalDataset, FileDataset, ShardDataset
from navit_clip.files import check_names


@dataclass(frozen=True)
class Labelled:
    """Labelled images and what is known of their classes.

    Attributes:
        dataset: The images, each with the indices of the classes that are right.
        folders: The data's own names of its classes, by index; None where indices are those of
            classes that the data does not name.
        classes: Every class that occurs, None if all samples would have to be read.
    """

    dataset: EvalDataset
    folders: list[str] | None = None
    classes: frozenset[int] | None = None

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
        return Labelled(ShardDataset(expand_shards([path]), class_map=known))
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
    # An empty class still has its name and its place.
    check_names("class folder", [folder.name for folder in folders])
    return _labelled(images, class_map, "class folder", [folder.name for folder in folders])


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
    if class_map is None and all(is_index(label) for _, label in images):
        class_map = ClassMap("index")
    return _labelled(images, class_map, "label", sorted({label for _, label in images}))


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
    return Labelled(dataset, folders, frozenset(i for _, classes in kept for i in classes))


def _images(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if _is_image(path)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
