"""Randomness as a function of what it decides, not of a generator's state.

Everything random about a sample (caption, side, drop rate, kept patches) comes from
`sample_generator`, so a sample is the same whichever worker reads it, before or after a resume.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*parts: int | str) -> np.random.Generator:
    """A random generator determined by `parts` alone, the same on every machine and run.

    Args:
        parts: Whatever names the decision, for example (seed, epoch, "shards").
    """
    text = "\0".join(map(str, parts)).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def sample_generator(seed: int, epoch: int, sample_id: str) -> np.random.Generator:
    """The generator for all random choices about one sample in one epoch."""
    return generator(seed, epoch, "sample", sample_id)
