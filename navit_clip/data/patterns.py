"""What a user may write for shards, resolved to a list of them, each with a short name.

The first step of the data pipeline, before anything is read: paths, folders, globs, brace ranges,
addresses, list files and commands.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from navit_clip.data.annotations.folders import holds_images
from navit_clip.data.annotations.image_files import FilesConfig
from navit_clip.data.annotations.tables import ARROW
from navit_clip.data.hub import HUB, repository, web_file
from navit_clip.data.known_files import KnownFiles
from navit_clip.data.pieces import split_files
from navit_clip.errors import OutageError, UserError
from navit_clip.files import storable
from navit_clip.retries import LISTING_TIMEOUT_S, GaveUpError, RemoteError
from navit_clip.stores import ask, open_store

TABLES = (".csv", ".tsv", ".json", ".jsonl", *ARROW)  # and JSONs, of image files
COMMAND = "pipe:"  # what a shard begins with that a shell command writes

_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_TAR_IN_COMMAND = re.compile(r"""[^\s'"|<>;&()]+\.tar(?![\w-])""")
_LISTS = (".txt", ".list")
_FILES = FilesConfig()
_MAGIC = re.compile(r"[*?\[]")
_BRACES = re.compile(r"[{}\\]")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:(?://([^/?#]*))?([^?#]*)", re.IGNORECASE)
_NO_FILE = ("", ".", "..")
_NONE_GIVEN = "no shards given: name at least one .tar file, folder or pattern"


def is_url(shard: str) -> bool:
    """Whether a shard comes from a web server, such as the Hugging Face Hub's."""
    return shard.lower().startswith(("http:", "https:", HUB))


def is_stored(shard: str) -> bool:
    """Whether a shard lies in an object store, or in what else fsspec reads."""
    return bool(_SCHEME.match(shard)) and not shard.startswith(COMMAND) and not is_url(shard)


def lists_remote(pattern: str) -> bool:
    """Whether it is a local file that lists nothing but web files and objects of stores."""
    if not pattern.endswith(_LISTS):
        return False
    with suppress(OSError, UnicodeDecodeError):
        lines = _lines_of(pattern).values()
        return bool(lines) and all(is_url(line) or is_stored(line) for line in lines)
    return False


class Listed(str):
    """A pattern with the shards that were found for it, which are taken as they are.

    Args:
        pattern: As the user wrote it.
        shards: The names of shards.
    """

    shards: list[str]

    def __new__(cls, pattern: str, shards: Sequence[str] = ()) -> Listed:
        """The text is the pattern's."""
        self = super().__new__(cls, pattern)
        self.shards = list(shards)
        return self


def expand_shards(
    patterns: Sequence[str], *, allow_commands: bool = False, files: FilesConfig = _FILES
) -> list[str]:
    """Resolves what a user may write to a list of shards, in that order, each once.

    Args:
        patterns: Paths, folders (their ``*.tar``, sorted), globs and brace ranges, such as
            ``data/{00000..00009}.tar``; the same in an object store, such as ``s3://bucket/*.tar``;
            tables, JSONs and folders of image files, as pieces (`navit_clip.data.pieces`); URLs
            with brace ranges; ``pipe:COMMAND``; list files, ``.txt`` or ``.list``, with one
            of these per line, relative to the list, blank lines and lines with ``#`` skipped.
            Whether a URL or an object that is named in full exists shows when it is read.
        allow_commands: Accept ``pipe:``, whose commands run in a shell with the user's rights.
        files: How image files are read.

    Raises:
        OutageError: If a store does not answer.
        UserError: If a pattern matches no shard, or cannot be read from.
    """
    lookup = _Lookup(allow_commands, files)
    shards = [shard for pattern in patterns for shard in lookup.expand(pattern)]
    if not shards:
        raise UserError(_NONE_GIVEN)
    unique: dict[str, str] = {}
    folders = cache(_absolute_folder)  # of which few differ
    for shard in shards:
        # The same file under two spellings, such as a list's ``../a/0.tar``, would be read twice.
        unique.setdefault(shard if _SCHEME.match(shard) else _absolute(shard, folders), shard)
    return list(unique.values())


def first_shard(
    patterns: Sequence[str], *, allow_commands: bool = False, files: FilesConfig = _FILES
) -> str:
    """The first of `expand_shards`, without a look at what the later patterns stand for.

    Raises:
        OutageError: If a store does not answer.
        UserError: If there is none.
    """
    lookup = _Lookup(allow_commands, files)
    for pattern in patterns:
        for shard in lookup.expand(pattern):
            return shard
    raise UserError(_NONE_GIVEN)


def _absolute(path: str, folders: Callable[[str], str]) -> str:
    folder, slash, name = path.rpartition("/")
    return os.path.abspath(path) if name in _NO_FILE else folders(folder + slash) + name


def _absolute_folder(path: str) -> str:
    return os.path.join(os.path.abspath(path), "")


class _Lookup:
    """What patterns stand for, and what need not be looked up again for the next one.

    Args:
        allow_commands: As of `expand_shards`.
        files: As of `expand_shards`.
    """

    def __init__(self, allow_commands: bool, files: FilesConfig) -> None:
        self._allow_commands, self._files = allow_commands, files
        self._known = KnownFiles()
        self._is_here = cache(_is_here)
        self._checked: set[str] = set()  # stores, and repositories of the Hub

    def expand(self, pattern: str, folder: str | None = None) -> Iterator[str]:
        """Yields the shards of a pattern, relative to the folder of the list that it stands in."""
        if isinstance(pattern, Listed):
            yield from pattern.shards
            return
        scheme = _SCHEME.match(pattern)
        if scheme and self._is_here(pattern.partition("/")[0], folder):
            # A folder with a colon in its name; written so, nothing behind takes it for a scheme.
            pattern, scheme = f"./{pattern}", None
        kind = scheme[1].lower() if scheme else ""
        if kind == "pipe" and not self._allow_commands:
            raise UserError(f"{pattern}: commands are not run unless --data.allow_commands true")
        for name in _braces(pattern, kind):
            if kind == "pipe":
                yield name
            elif kind in ("http", "https"):
                _check_url(name)
                yield name
            elif kind:
                yield from self._find_stored(name)
            else:
                for shard in self._find(name, folder or ""):
                    if not shard.endswith(_LISTS):
                        yield shard
                    elif folder is not None:
                        raise UserError(f"{shard}: a list file cannot name another list file")
                    else:
                        yield from self._read_list(shard)

    def _find(self, name: str, folder: str) -> list[str]:
        path = os.path.join(folder, name) if folder else name
        if self._known.has(path):
            return self._open(path, is_file=True)
        # The folder is no part of the pattern: it may hold a bracket of its own.
        names = [name] if os.path.exists(path) else _glob(name, folder)
        if not names:
            raise UserError(f"no shard found at {path}: check the path")
        paths = (os.path.join(folder, one) for one in names)
        return [shard for one in paths for shard in self._open(one, self._known.has(one))]

    def _open(self, path: str, is_file: bool) -> list[str]:
        if is_file or not os.path.isdir(path):
            return split_files(path, self._files) if path.lower().endswith(TABLES) else [path]
        return _open_folder(path, self._files)

    def _find_stored(self, name: str) -> list[str]:
        _, path = _host_and_path(name)
        if "://" not in name:
            raise UserError(f"{name}: no path and no address, expected such as s3://bucket/0.tar")
        if not name.endswith(".tar") or _MAGIC.search(name) or "::" in name:
            return _list_stored(name)
        # That something reads from such addresses is found out once for each bucket.
        front = repository(name) if name.startswith(HUB) else name.removesuffix(path)
        if front not in self._checked:
            open_store(name)
            web_file(name)
            self._checked.add(front)
        return [name]

    def _read_list(self, path: str) -> Iterator[str]:
        try:
            patterns = _lines_of(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as a list of shards: {error}") from error
        if not patterns:
            raise UserError(f"{path}: the list is empty, expected one shard or pattern per line")
        folder = os.path.dirname(path)
        for number, pattern in patterns.items():
            try:
                yield from self.expand(pattern, folder)
            except UserError as error:
                raise type(error)(f"{path}, line {number}: {error}") from error


def _lines_of(path: str) -> dict[int, str]:
    """Patterns of a list by the number of their line."""
    with open(path, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file]
    return {n: p for n, p in enumerate(lines, 1) if p and not p.startswith("#")}


def _is_here(name: str, folder: str | None) -> bool:
    return os.path.exists(os.path.join(folder or "", name))


def _braces(pattern: str, kind: str) -> list[str]:
    if not _BRACES.search(pattern):
        return [pattern]
    try:
        # A shell's own backslashes must survive; in a path they keep a brace literal.
        return list(braceexpand(pattern, escape=kind != "pipe"))
    except ValueError as error:
        raise UserError(f"{pattern}: unbalanced braces, expected such as {{0..9}}") from error


def _host_and_path(address: str) -> tuple[str, str]:
    """As `urlsplit` has them, in a tenth of its time."""
    match = _ADDRESS.match(address)
    assert match is not None
    if match[2].lower().endswith(TABLES):
        raise UserError(f"{address}: a table must be a local file, download it first")
    return match[1] or "", match[2]


def _check_url(url: str) -> None:
    host, path = _host_and_path(url)
    if not _names_host(host):
        raise UserError(f"{url}: a URL without a host, expected such as https://host/0.tar")
    if "*" in path:
        raise UserError(f"{url}: a web server lists no files, use a brace range such as {{0..9}}")
    if path.endswith(_LISTS):
        raise UserError(f"{url}: a list of shards must be a local file, download it first")


@lru_cache
def _names_host(netloc: str) -> bool:
    with suppress(ValueError):  # half a bracket
        return bool(urlsplit(f"//{netloc}").hostname)
    return False


def _glob(pattern: str, folder: str) -> list[str]:
    return sorted(glob.glob(pattern, root_dir=folder or None, recursive=True))


def _open_folder(path: str, files: FilesConfig) -> list[str]:
    if tars := _inside(path, "*.tar"):
        return tars
    # img2dataset writes a table beside each folder of images.
    if (tables := _tables_in(path)) and not holds_images(Path(path)):
        return [piece for table in tables for piece in split_files(table, files)]
    try:
        return split_files(path, files)
    except UserError as error:
        for folder in _inside(path, "*/"):
            if _inside(folder, "*.tar") or _tables_in(folder):
                raise UserError(f"{error}, but data in {folder}: name that folder") from error
        raise


def _tables_in(folder: str) -> list[str]:
    arrow = _inside(folder, "*.arrow")
    # What `datasets` computed once and keeps beside the data.
    data = [path for path in arrow if not os.path.basename(path).startswith("cache-")]
    return data or _inside(folder, "*.parquet")


def _inside(folder: str, pattern: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))


def _list_stored(name: str) -> list[str]:
    store, path = open_store(name)
    if name.endswith(_LISTS):
        raise UserError(f"{name}: a list of shards must be a local file, download it first")
    if not _MAGIC.search(path):
        if path.endswith(".tar"):
            web_file(name)
            return [name]
        path = f"{path.rstrip('/')}/*.tar"
    try:
        found = sorted(ask(name, partial(store.glob, path), LISTING_TIMEOUT_S))
    except GaveUpError as error:
        raise OutageError(f"{name}: {error}") from error
    except RemoteError as error:
        raise UserError(f"{name}: {error}") from error
    if not found:
        raise UserError(f"no shard found at {name}: check the address (expected .tar files)")
    return [store.unstrip_protocol(shard) for shard in found]


def shard_names(shards: Sequence[str]) -> list[str]:
    """Short unique names, the first part of sample ids.

    The file's name without ``.tar`` where no other shard has it, else as many folders before it as
    it takes: ``coco-train/00000`` against ``flickr8k-train/00000``. Neither the machine nor what
    is in a URL's query shows, unless nothing else distinguishes two shards.

    Args:
        shards: All shards of a run, as from `expand_shards`.
    """
    folders = cache(_folder_parts)  # of which few differ
    parts = [_name_parts(shard, folders) for shard in shards]
    names: dict[int, str] = {}
    for depth in range(1, max(map(len, parts), default=0) + 1):
        suffixes = {i: "/".join(part[-depth:]) for i, part in enumerate(parts) if i not in names}
        count = Counter(suffixes.values())
        names |= {i: suffix for i, suffix in suffixes.items() if count[suffix] == 1}
    for i, shard in enumerate(shards):
        if i not in names:
            names[i] = f"{parts[i][-1]}~{hashlib.sha256(shard.encode()).hexdigest()[:8]}"
    return [names[i] for i in range(len(shards))]


def _name_parts(shard: str, folders: Callable[[str | None, str], list[str]]) -> list[str]:
    """Host, folders and file name of a shard, the last one without ``.tar``."""
    if shard.startswith(COMMAND):
        found = _TAR_IN_COMMAND.search(shard, len(COMMAND))
        if found is None:
            return [f"command~{hashlib.sha256(shard.encode()).hexdigest()[:8]}"]
        shard = found[0]
    host, path = None, shard
    if address := _ADDRESS.match(shard):
        host, path = address[1] or "", address[2]
    folder, slash, file = path.rpartition("/")
    if file in _NO_FILE or (host is not None and "%" in file):
        parts = folders(host, path) or ["shard"]
    else:
        parts = [*folders(host, folder + slash), file if host is not None else storable(file)]
    return [*parts[:-1], parts[-1].removesuffix(".tar")]


def _folder_parts(host: str | None, folder: str) -> list[str]:
    """Host and folders of a web server or store; all folders of a local one, whose host is None."""
    if host is None:
        path = storable(os.path.abspath(folder))
    else:
        path = f"{host.rpartition('@')[2]}/{unquote(folder)}"
    return [part for part in path.split("/") if part]
