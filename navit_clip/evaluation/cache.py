"""Embeddings kept from one evaluation to the next, found again by content.

`navit_clip.evaluation.embed` embeds in blocks: each is one file, written atomically when it is
embedded, so that a killed evaluation resumes after the last of them. Its name is a hash of all that
the embeddings depend on: the model, the setting, and the bytes of all images of the block, since
neighbours in a batch change the last digits. Nothing else has to be remembered, and nothing goes
stale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from navit_clip.evaluation.settings import EvalSetting
from navit_clip.files import atomic_write, writing

# Raised whenever the same inputs would give other embeddings, or blocks are written otherwise.
FORMAT = 2
_HINT = "; check --cache"
_DAMAGE = (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class ImageBlock:
    """The images of one block at one setting.

    Attributes:
        embeddings: float32 [n, D] of the n images that could be used.
        rows: Place of each of these within the block.
        lengths: Tokens of each.
        sizes: Native height and width of each.
        padding: Tokens of padding that were computed.
        skipped: Reason and detail of the images that could not be used, by place.
    """

    embeddings: Tensor
    rows: list[int]
    lengths: list[int]
    sizes: list[tuple[int, int]]
    padding: int
    skipped: dict[int, tuple[str, str]]

    def only(self, rows: list[int]) -> ImageBlock:
        """The same block with the images of some places only."""
        if rows == self.rows:
            return self
        kept = [self.rows.index(row) for row in rows]
        lengths, sizes = [self.lengths[i] for i in kept], [self.sizes[i] for i in kept]
        return replace(
            self, embeddings=self.embeddings[kept], rows=rows, lengths=lengths, sizes=sizes
        )

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `Cache.write` takes."""
        heights, widths = [h for h, _ in self.sizes], [w for _, w in self.sizes]
        rows = torch.tensor([self.rows, self.lengths, heights, widths])
        plain = {"padding": self.padding, "skipped": list(self.skipped.items())}
        return {"embeddings": self.embeddings, "rows": rows}, plain

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> ImageBlock:
        """What `to_file` gave."""
        rows, lengths, *sizes = tensors["rows"].long().tolist()
        skipped = {int(row): (str(why), str(what)) for row, (why, what) in plain["skipped"]}
        places = list(zip(*sizes, strict=True))
        return cls(tensors["embeddings"], rows, lengths, places, int(plain["padding"]), skipped)


T = TypeVar("T")


class Cache:
    """A directory of embedded blocks; picklable, for worker processes.

    Args:
        directory: Made if need be.
        report: Gets a line for each damaged file; a module-level function.

    Raises:
        UserError: If the directory cannot be made.
    """

    def __init__(self, directory: Path, report: Callable[[str], None] = print) -> None:
        self.directory, self.report = directory, report
        with writing(directory, hint=_HINT):
            directory.mkdir(parents=True, exist_ok=True)

    def image_key(self, model: str, setting: EvalSetting, images: Iterable[bytes]) -> str:
        """Name of a block, of the model's fingerprint and what identifies each image, in order."""
        return _key(model, "images", setting.kind, str(setting.size), *images)

    def text_key(self, model: str, texts: Sequence[str]) -> str:
        """Name of a block of texts."""
        return _key(model, "texts", *texts)

    def read(
        self, key: str, parse: Callable[[Mapping[str, Tensor], Mapping[str, Any]], T]
    ) -> T | None:
        """A block, or None if it is not there; a damaged one is reported and counts as absent.

        Args:
            key: Its name.
            parse: Makes it of the tensors and plain values that `write` was given.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.report(f"cannot read cached {path}: {error.strerror}; embedding again")
            return None
        try:
            tensors = load(content)
            plain = json.loads(tensors.pop("plain").numpy().tobytes())
            if plain.pop("digest") != _digest(key, tensors, plain):
                raise ValueError("contents differ from what was written under this name")
            return parse(tensors, plain)
        except _DAMAGE as error:
            self.report(f"cached {path} is damaged ({error}); embedding again")
            return None

    def write(self, key: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Writes a block of tensors and what JSON may hold, atomically.

        Raises:
            UserError: If the disk does not take it.
        """
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        line = json.dumps({**plain, "digest": _digest(key, tensors, plain)}).encode()
        # safetensors' own metadata has no fixed order, and equal blocks should be equal files.
        tensors["plain"] = torch.frombuffer(bytearray(line), dtype=torch.uint8)
        path = self._path(key)
        with writing(path, hint=_HINT):
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, save(tensors))

    def _path(self, key: str) -> Path:
        # By first digits: some file systems are slow with a hundred thousand files in one place.
        return self.directory / key[:2] / f"{key}.safetensors"


def tensors_digest(tensors: Mapping[str, Tensor], *more: str) -> str:
    """Hash of tensors by name, type, shape and contents, and of more texts."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        _add(digest, f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        _add(digest, raw.numpy().data)
    for word in more:
        _add(digest, word.encode())
    return digest.hexdigest()


def _digest(key: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> str:
    """Of all that a block holds and of its name, under which another's file may come to lie."""
    return tensors_digest(tensors, key, json.dumps(plain, sort_keys=True))


def bytes_digest(data: bytes) -> bytes:
    """Hash of a file's contents."""
    return hashlib.blake2b(data, digest_size=16).digest()


def _key(*words: str | bytes) -> str:
    digest = hashlib.blake2b(str(FORMAT).encode(), digest_size=16)
    for word in words:
        _add(digest, word.encode() if isinstance(word, str) else word)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, data: bytes | memoryview) -> None:
    """With its length, so that other splits of the same bytes hash differently."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
