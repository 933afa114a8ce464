"""Writing a file so that it is there whole or not at all, whenever the writer is killed."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes beside the file and renames; readers never see a part, old content stays till then.

    Args:
        path: The file.
        content: Text is written as UTF-8.

    Raises:
        OSError: If the disk does not take it; `path` is then as it was.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
