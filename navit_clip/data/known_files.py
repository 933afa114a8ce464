"""Which paths are files, told by one listing of a folder in place of a request for each.

For `patterns`, on every rank: a hundred thousand shards, asked for one by one by hundreds of ranks,
are more than the metadata server of a file system answers.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress

_FEW = 32  # files of a folder that are not worth a listing, which may be of millions


class KnownFiles:
    """What listings say of files; each folder is listed once, when many in it are asked for."""

    def __init__(self) -> None:
        self._asked = Counter[str]()
        self._files: dict[str, set[str]] = {}

    def has(self, path: str) -> bool:
        """Whether a listing has a regular file of this path.

        If not, it may still be one, or a link, a folder, or spelt otherwise: ask for it by itself.
        """
        folder, slash, name = path.rpartition("/")
        folder = folder + slash or "."
        files = self._files.get(folder)
        if files is None:
            self._asked[folder] += 1
            if self._asked[folder] <= _FEW:
                return False
            files = self._files[folder] = _files_in(folder)
        return name in files


def _files_in(folder: str) -> set[str]:
    # One that cannot be listed may still be entered.
    with suppress(OSError, ValueError), os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    return set()
