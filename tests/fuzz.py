"""Damage to bytes and JSON for fuzz tests, drawn from a generator."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

TOKENS = [
    *(b"", b"\0", b"\n", b"\n\n", b"\r", b"\t", b",", b'"', b'""', b";", b"\xff", b"\xed\xa0\x80"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", "\u2028".encode(), "²٣".encode(), b"\\ud800", b"\\u0000"),
    *(b"9" * 5000, b"-1", b"1e999", b"NaN", b"null", b"true", b"{}", b"[]", b"{", b"]", b'"a":'),
    *(b"[" * 20_000, b" " * 5000, b"a" * 300, b"/", b"..", b"/etc/passwd", b"{}{c}", b"0.png"),
]
VALUES: list[Any] = [
    *(None, True, -1, 0, 1.5, 1e300, 10**400, "", "\ud800", "a\0b", "x" * 300, "..", "/"),
    *([], {}, [None], [[]], {"id": 1}, {"raw": None}, float("nan"), float("inf")),
]


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """Bytes with some of them taken away, doubled or replaced."""
    for _ in range(rng.randint(1, 4)):
        at, to = sorted(rng.randint(0, len(seed)) for _ in range(2))
        to = min(to, at + rng.choice([0, 1, 3, 20]))
        new = rng.choice([*TOKENS, seed[at:to] * 2, bytes([rng.randrange(256)])])
        seed = seed[:at] + new + seed[to:]
    return seed


def mutated_json(content: Any, rng: random.Random) -> Any:
    """JSON with a value somewhere in it replaced, taken away or moved."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randint(1, 3)):
        at = content
        while isinstance(at, (dict, list)) and at:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], (dict, list)) or rng.random() < 0.3:
                if rng.random() < 0.2:
                    del at[key]
                elif isinstance(at, dict) and rng.random() < 0.2:
                    at[str(rng.choice(VALUES))] = at.pop(key)
                else:
                    at[key] = copy.deepcopy(rng.choice(VALUES))  # else changed by a later round
                break
            at = at[key]
    return content
