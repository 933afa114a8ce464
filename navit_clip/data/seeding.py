"""Randomness as a function of what it decides, not of a generator's state.

Everything random about a sample (caption, side, drop rate, kept patches) comes from
`sample_generator`, so a sample is the same whichever worker reads it, before or after a resume.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import DTypeLike


def generator(*parts: int | str) -> np.random.Generator:
    """A random generator determined by `parts` alone, the same on every machine and run.

    Args:
        parts: Whatever names the decision, for example (seed, epoch, "shards").
    """
    # numpy's stubs know only one of the seed sequences that it takes.
    return np.random.Generator(np.random.PCG64(_Digest(parts)))  # type: ignore[arg-type]


def draw_index(count: int, *parts: int | str) -> int:
    """One uniform index below `count`, far below 2⁵¹², at a tenth of the cost of a `generator`."""
    return int.from_bytes(_digest(parts), "little") % count


def sample_generator(seed: int, epoch: int, sample_id: str) -> np.random.Generator:
    """The generator for all random choices about one sample in one epoch."""
    return generator(seed, epoch, "sample", sample_id)


def draw_weighted(weights: Sequence[float], rng: np.random.Generator) -> int:
    """An index by weight; what `Generator.choice` would draw, at a twentieth of its cost.

    Args:
        weights: Not negative, one of them positive.
        rng: Gives one number.
    """
    total = sum(weights)
    sums = list(accumulate(weight / total for weight in weights))
    return bisect_right([one / sums[-1] for one in sums], rng.random())


class _Digest(ISeedSequence):
    """Seeds a bit generator with a hash as it is; numpy's own way hashes once more, slowly."""

    def __init__(self, parts: Sequence[int | str]) -> None:
        self._bytes = _digest(parts)

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> np.ndarray:
        """The first words of the hash, the same ones on every machine."""
        words = np.dtype(dtype)
        return np.frombuffer(self._bytes, words.newbyteorder("<"), n_words).astype(words)


def _digest(parts: Sequence[int | str]) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=64).digest()
