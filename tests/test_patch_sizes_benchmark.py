"""The comparison of sizes of patches: its images, its table and, with few steps, all its runs."""

from __future__ import annotations

import io
import json
from argparse import Namespace

import pytest
from PIL import Image

from benchmarks import patch_sizes, tables

MADE = {"versions": {}, "command": "", "commit": "", "machine": "", "threads": 2}


def test_an_image_is_a_function_of_seed_and_index():
    name, data, extension = patch_sizes.draw(7, seed=0)
    assert (name, data, extension) == patch_sizes.draw(7, seed=0)
    assert name == " ".join(patch_sizes.CLASSES[7])
    assert patch_sizes.draw(7 + len(patch_sizes.CLASSES), seed=0)[0] == name
    assert patch_sizes.draw(7, seed=1)[1] != data
    assert Image.open(io.BytesIO(data)).size == (patch_sizes.SIDE, patch_sizes.SIDE)


def cells(result: dict) -> list[list[str]]:
    """The table's rows below its head, without labels."""
    page = tables.section("patch_sizes", result)
    rows = [row for row in page.splitlines() if row.startswith("|")]
    assert [row.count("|") for row in rows] == 5 * [5]
    return [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows[2:]]


def test_the_table_has_each_model_where_it_was_trained():
    several = {"8": 0.99, "16": 0.98, "32": 0.97}
    resized = {"8": 0.6, "16": 0.95, "32": 0.3}
    top1 = {"32": {"32": 0.91}, "16": resized, "several": several, "8": {"8": 0.94}}
    assert cells({"steps": 5000, "images": 640, "top1": top1, "made": MADE}) == [
        ["99.0%", "98.0%", "97.0%"],
        ["60.0%", "95.0%", "30.0%"],
        ["94.0%", "95.0%", "91.0%"],
    ]


@pytest.mark.slow  # four runs and six evaluations
def test_all_models_are_trained_and_evaluated(monkeypatch, tmp_path):
    for name, value in (("IMAGES", 256), ("SHARD", 128), ("TEST", 1)):
        monkeypatch.setattr(patch_sizes, name, value)
    command = patch_sizes._run
    shorter = {"train": ("--optim.schedule.warmup_steps", 0)}
    monkeypatch.setattr(patch_sizes, "_run", lambda *w: command(*w, *shorter.get(w[0], ())))
    found = patch_sizes.measure(Namespace(runs=tmp_path, steps=2, seed=0))
    top1 = found["top1"]
    for size, points in found["gain"].items():
        assert points == pytest.approx(100 * (top1["several"][size] - top1["16"][size]))
    for size, points in found["behind"].items():
        assert points == pytest.approx(100 * (top1[str(size)][size] - top1["several"][size]))
    assert (found["gain"].keys(), found["behind"].keys()) == ({8, 32}, {8, 16, 32})
    written = json.loads(json.dumps({**found, "made": MADE}))
    assert cells(written)[0] == [f"{top1['several'][size]:.1%}" for size in patch_sizes.SIZES]
