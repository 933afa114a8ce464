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
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from navit_clip.data.annotations.folders import holds_images
from navit_clip.data.annotations.image_files import FilesConfig
from navit_clip.data.annotations.tables import ARROW
from navit_clip.data.hub import HUB, web_file
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


def is_url(shard: str) -> bool:
    """Whether a shard comes from a web server, such as the Hugging Face Hub's."""
    return shard.lower().startswith(("http:", "https:", HUB))


def is_stored(shard: str) -> bool:
    """Whether a shard lies in an object store, or in what else fsspec reads."""
    return bool(_SCHEME.match(shard)) and not shard.startswith(COMMAND) and not is_url(shard)


def is_list(pattern: str) -> bool:
    """Whether it is a local file that lists shards."""
    return pattern.endswith(_LISTS) and os.path.isfile(pattern)


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
    shards = [s for pattern in patterns for s in _expand(pattern, allow_commands, files)]
    if not shards:
        raise UserError("no shards given: name at least one .tar file, folder or pattern")
    unique: dict[str, str] = {}
    for shard in shards:
        # The same file under two spellings, such as a list's ``../a/0.tar``, would be read twice.
        unique.setdefault(shard if _SCHEME.match(shard) else os.path.abspath(shard), shard)
    return list(unique.values())


def _expand(
    pattern: str, allow_commands: bool, files: FilesConfig, list_file: str = ""
) -> Iterator[str]:
    scheme = _SCHEME.match(pattern)
    if scheme and os.path.exists(os.path.join(os.path.dirname(list_file), pattern.split("/")[0])):
        # A folder with a colon in its name; written so, nothing behind takes it for a scheme.
        pattern, scheme = f"./{pattern}", None
    kind = scheme[1].lower() if scheme else ""
    if kind == "pipe" and not allow_commands:
        raise UserError(f"{pattern}: commands are not run unless --data.allow_commands true")
    try:
        # A shell's own backslashes must survive; in a path they keep a brace literal.
        names = list(braceexpand(pattern, escape=kind != "pipe"))
    except ValueError as error:
        raise UserError(f"{pattern}: unbalanced braces, expected such as {{0..9}}") from error
    for name in names:
        if kind not in ("", "pipe") and urlsplit(name).path.lower().endswith(TABLES):
            raise UserError(f"{name}: a table must be a local file, download it first")
        if kind in ("pipe", "http", "https"):
            found = [name]
        elif kind:
            found = _find_stored(name)
        else:
            found = _find(name, os.path.dirname(list_file), files)
        if kind.startswith("http"):
            _check_url(name)
        for shard in found:
            if kind or not shard.endswith(_LISTS):
                yield shard
            elif list_file:
                raise UserError(f"{shard}: a list file cannot name another list file")
            else:
                yield from _read_list(shard, allow_commands, files)


def _find(name: str, folder: str, files: FilesConfig) -> list[str]:
    path = os.path.join(folder, name)
    # The folder is no part of the pattern: it may hold a bracket of its own.
    names = [name] if os.path.exists(path) else _glob(name, folder)
    if not names:
        raise UserError(f"no shard found at {path}: check the path")
    return [shard for one in names for shard in _open(os.path.join(folder, one), files)]


def _glob(pattern: str, folder: str) -> list[str]:
    return sorted(glob.glob(pattern, root_dir=folder or None, recursive=True))


def _open(path: str, files: FilesConfig) -> list[str]:
    if not os.path.isdir(path):
        return split_files(path, files) if path.lower().endswith(TABLES) else [path]
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


def _find_stored(name: str) -> list[str]:
    if "://" not in name:
        raise UserError(f"{name}: no path and no address, expected such as s3://bucket/0.tar")
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


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if not parts.hostname:
        raise UserError(f"{url}: a URL without a host, expected such as https://host/0.tar")
    if "*" in parts.path:
        raise UserError(f"{url}: a web server lists no files, use a brace range such as {{0..9}}")
    if parts.path.endswith(_LISTS):
        raise UserError(f"{url}: a list of shards must be a local file, download it first")


def _read_list(path: str, allow_commands: bool, files: FilesConfig) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of shards: {error}") from error
    patterns = {n: p for n, p in enumerate(lines, 1) if p and not p.startswith("#")}
    if not patterns:
        raise UserError(f"{path}: the list is empty, expected one shard or pattern per line")
    for number, pattern in patterns.items():
        try:
            yield from _expand(pattern, allow_commands, files, path)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error


def shard_names(shards: Sequence[str]) -> list[str]:
    """Short unique names, the first part of sample ids.

    The file's name without ``.tar`` where no other shard has it, else as many folders before it as
    it takes: ``coco-train/00000`` against ``flickr8k-train/00000``. Neither the machine nor what
    is in a URL's query shows, unless nothing else distinguishes two shards.

    Args:
        shards: All shards of a run, as from `expand_shards`.
    """
    parts = [_name_parts(shard) for shard in shards]
    names: dict[int, str] = {}
    for depth in range(1, max(map(len, parts), default=0) + 1):
        suffixes = {i: "/".join(part[-depth:]) for i, part in enumerate(parts) if i not in names}
        count = Counter(suffixes.values())
        names |= {i: suffix for i, suffix in suffixes.items() if count[suffix] == 1}
    for i, shard in enumerate(shards):
        if i not in names:
            names[i] = f"{parts[i][-1]}~{hashlib.sha256(shard.encode()).hexdigest()[:8]}"
    return [names[i] for i in range(len(shards))]


def _name_parts(shard: str) -> list[str]:
    """Host, folders and file name of a shard, the last one without ``.tar``."""
    if shard.startswith(COMMAND):
        found = _TAR_IN_COMMAND.search(shard, len(COMMAND))
        if found is None:
            return [f"command~{hashlib.sha256(shard.encode()).hexdigest()[:8]}"]
        shard = found[0]
    scheme = _SCHEME.match(shard)
    if scheme:
        url = urlsplit(shard)
        path = f"{url.netloc.rpartition('@')[2]}/{unquote(url.path)}"
    else:
        path = storable(os.path.abspath(shard))
    parts = [part for part in path.split("/") if part] or ["shard"]
    return [*parts[:-1], parts[-1].removesuffix(".tar")]
