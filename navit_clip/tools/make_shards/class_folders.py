"""Reads a folder with one folder of images per class, as ImageNet is laid out."""

from __future__ import annotations

from pathlib import Path

from navit_clip.data.annotations.labels import read_text
from navit_clip.data.annotations.rows import ImageList, Row
from navit_clip.data.decode import IMAGE_EXTENSIONS
from navit_clip.errors import UserError


def open_classes(folder: Path, names: Path | None = None) -> ImageList:
    """Rows of class folders: the label is the folder's index in sorted order.

    Args:
        folder: Holds ``CLASS/*.jpg``.
        names: One class name per line in that order; by default the folders' names, with spaces
            for underscores.

    Raises:
        UserError: If there is no image, or not one name per folder.
    """
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}: check --classes")
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    classnames = [path.name.replace("_", " ") for path in folders]
    if names is not None:
        lines = read_text(str(names), "--classnames").splitlines()
        classnames = [line.strip() for line in lines if line.strip()]
        if len(classnames) != len(folders):
            raise UserError(
                f"{len(classnames)} names in {names} for {len(folders)} class folders: give one "
                "per folder, in the folders' sorted order"
            )
    rows = [
        Row(f"{path.name}/{image.name}", (name,), label)
        for label, (path, name) in enumerate(zip(folders, classnames, strict=True))
        for image in sorted(path.iterdir())
        if image.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
    ]
    if not rows:
        raise UserError(f"no image in class folders under {folder}: expected {folder}/CLASS/*.jpg")
    return ImageList(folder, rows, classnames)
