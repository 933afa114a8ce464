"""Images, captions and webdataset shards made on the spot, for tests of the pipeline and of eval.

Plain `tarfile` and Pillow, nothing of the library's own, so that what is read was not written by
the code that reads it.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAPTIONS = (
    "a red dog sleeps on the grass",
    "two blue birds fly over a lake",
    "one old green bicycle",
    "a small boat in the harbour at night",
    "people walk along a street",
    "yellow",
    "the white cat looks out of a window and waits for its dinner",
)
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
SIZES = ((24, 40), (40, 24), (32, 32), (16, 64), (57, 33), (10, 13), (48, 48))  # rows, columns


def photo(seed: int, height: int, width: int) -> Image.Image:
    """A smooth random RGB image, which JPEG hardly changes."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image as a file of the given format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header announces so many pixels and whose body holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Writes members in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(number: int) -> dict[str, bytes]:
    """Image and caption number so-and-so, of changing size and length."""
    image = photo(number, *SIZES[number % len(SIZES)])
    return {"png": encode(image), "txt": CAPTIONS[number % len(CAPTIONS)].encode()}


def write_shard(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    """Writes samples by key, each of members by extension."""
    return write_tar(
        path,
        (
            (f"{key}.{extension}", content)
            for key, members in samples.items()
            for extension, content in members.items()
        ),
    )


def make_shards(root: Path, counts: Sequence[int]) -> list[Path]:
    """Shards 00000.tar, 00001.tar … of so many good samples each, all of them different.

    Sample i of shard s has the id ``0000s/i`` and was made from number 100·s + i.
    """
    return [
        write_shard(
            root / f"{shard:05d}.tar", {str(i): sample(100 * shard + i) for i in range(count)}
        )
        for shard, count in enumerate(counts)
    ]


def ids_of(counts: Sequence[int]) -> list[str]:
    """The ids of all samples of `make_shards`, in order."""
    return [f"{shard:05d}/{i}" for shard, count in enumerate(counts) for i in range(count)]


def as_json(**fields: object) -> bytes:
    return json.dumps(fields).encode()
