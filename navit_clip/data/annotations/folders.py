"""Reads folders of images: classes of class folders, captions and labels in files beside images."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from navit_clip.data.annotations.rows import ImageList, Row
from navit_clip.data.decode import IMAGE_EXTENSIONS
from navit_clip.errors import UserError
from navit_clip.files import reading, storable

_DESCRIBED = 5  # of what is skipped; the rest is only counted
_SIDECARS = ("txt", "text", "caption", "json", "cls")
# Of operating systems, network drives and notebooks; those that begin with a dot are known by it.
_SYSTEM = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "thumbnails",
    "thumbs.db",
    "desktop.ini",
}


@dataclass
class ClassFolders:
    """A folder of class folders.

    Attributes:
        names: The class folders, sorted by bytes; their places are the classes' indices.
        images: Each image as ``CLASS/FILE`` and its class, in the classes' order, then by name.
        skipped: Files that are no image of a class: ``hidden`` (of a system, in a hidden folder),
            ``outside_classes`` (images beside the class folders), ``deeper_folder`` (images in
            folders of a class folder), ``no_image_file`` (all else).
        skips: The first few of these, described.
    """

    names: list[str] = field(default_factory=list)
    images: list[tuple[str, int]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    skips: list[str] = field(default_factory=list)

    @property
    def captions(self) -> list[str]:
        """The classes' names as one would write them, by index."""
        return [name.replace("_", " ") for name in self.names]


def is_image(path: Path) -> bool:
    """Whether a file has the name of an image and is not hidden."""
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and not _is_hidden(path.name)


def read_class_folders(root: Path) -> ClassFolders:
    """Sorts everything in a folder into classes, their images, and the rest, which is counted.

    An empty folder is a class; one that holds files but no image anywhere is none.

    Raises:
        UserError: If a folder cannot be read, has a name that no list of names could hold, or no
            class folder holds an image.
    """
    found = ClassFolders()
    with reading(root):
        for entry in sorted(root.iterdir()):
            if not entry.is_dir() or _is_hidden(entry.name):
                for path in _files_of(entry):
                    _skip_file(found, path, _is_hidden(entry.name), "outside_classes")
            else:
                _read_class(found, entry)
    if not found.images:
        if found.skipped["deeper_folder"]:
            raise UserError(
                f"no image in class folders under {root}, but in folders of these: name the folder "
                f"whose folders are the classes, such as {root / found.names[0]}"
            )
        if found.skipped["outside_classes"]:
            raise UserError(
                f"{root} holds images but no class folders: give --labels FILE to evaluate them, "
                f"or move them to {root}/CLASS/"
            )
        raise UserError(f"no image in class folders under {root}: expected {root}/CLASS/*.jpg")
    return found


def find_images(root: Path) -> tuple[list[str], Counter[str]]:
    """All images below a folder as paths relative to it, in order of their bytes.

    Returns:
        Them, and how many files are none, by reason, as in `ClassFolders`.

    Raises:
        UserError: If the folder cannot be read or holds no image.
    """
    images, skipped = [], Counter[str]()
    with reading(root):
        for entry in sorted(root.iterdir()):
            for path in _files_of(entry):
                relative = path.relative_to(root)
                if any(map(_is_hidden, relative.parts)):
                    skipped["hidden"] += 1
                elif is_image(path):
                    images.append(str(relative))
                else:
                    skipped["no_image_file"] += 1
    if not images:
        raise UserError(f"no image below {root}")
    return images, skipped


def holds_images(root: Path) -> bool:
    """Whether there is an image anywhere below a folder."""
    return any(is_image(Path(name)) for name in _walk(root))


def read_folder(root: Path) -> ImageList:
    """All images below a folder, with what is known of them.

    ``a.txt``, ``a.json`` or ``a.title.txt`` belong to ``a.jpg`` beside them, as in a tar of the
    folder. Where no image has such a file, class folders give labels, and class names as captions;
    images elsewhere have neither.

    Raises:
        UserError: If the folder cannot be read or holds no image.
    """
    files = _walk(root)
    images = [name for name in files if is_image(Path(name))]
    if not images:
        raise UserError(f"no .tar file in {root}, and no image below it")
    stems = {os.path.splitext(name)[0] for name in images}
    beside: defaultdict[str, list[str]] = defaultdict(list)
    for name in files:
        folder, base = os.path.split(name)
        words = base.split(".")
        for count in range(len(words) - 1, 0, -1) if words[-1].lower() in _SIDECARS else ():
            if (stem := os.path.join(folder, ".".join(words[:count]))) in stems:
                beside[stem].append(".".join(words[count:]))
                break
    if beside:
        found = (tuple(beside[os.path.splitext(name)[0]]) for name in images)
        rows = [Row(name, (), sidecars=own) for name, own in zip(images, found, strict=True)]
        return ImageList(root, rows)
    classes = ClassFolders()
    with suppress(UserError):  # there are none
        classes = read_class_folders(root)
    names, labels = classes.captions, dict(classes.images)
    return ImageList(
        root,
        [Row(image, (names[labels[image]],), labels[image]) if image in labels else Row(image, ())
         for image in images],
        names,
    )  # fmt: skip


def _walk(root: Path) -> list[str]:
    """All files below a folder that are not hidden, relative to it; folder by folder, sorted."""

    def fail(error: OSError) -> None:
        raise error

    files: list[str] = []
    with reading(root):
        for folder, folders, names in os.walk(root, onerror=fail):
            folders[:] = sorted(name for name in folders if not _is_hidden(name))
            place = os.path.relpath(folder, root)
            own = sorted(name for name in names if not _is_hidden(name))
            files += own if place == "." else [f"{place}/{name}" for name in own]
    return files


def _read_class(found: ClassFolders, folder: Path) -> None:
    images: list[Path] = []
    others: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if is_image(entry) and not entry.is_dir():
            images.append(entry)
        else:
            others += _files_of(entry)
    hidden = {path for path in others if any(map(_is_hidden, path.relative_to(folder).parts))}
    if images or not others or any(is_image(path) for path in others if path not in hidden):
        if storable(folder.name) != folder.name or len(folder.name.splitlines()) != 1:
            raise UserError(f"class folder {folder.name!r}: its name is no line of text: rename it")
        found.images += [(f"{folder.name}/{path.name}", len(found.names)) for path in images]
        found.names.append(folder.name)
    for path in others:
        _skip_file(found, path, path in hidden, "deeper_folder")


def _skip_file(found: ClassFolders, path: Path, is_hidden: bool, reason: str) -> None:
    reason = "hidden" if is_hidden else reason if is_image(path) else "no_image_file"
    found.skipped[reason] += 1
    if len(found.skips) < _DESCRIBED:
        found.skips.append(f"{reason}: {storable(path)}: no image of a class")


def _files_of(path: Path) -> Iterator[Path]:
    """A file itself, or all files below a folder; links to folders are not followed."""
    if path.is_symlink() or not path.is_dir():
        yield path
    else:
        for entry in sorted(path.iterdir()):
            yield from _files_of(entry)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM
