"""Fixtures of the Python API's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from navit_clip import NaViTCLIP
from navit_clip import model as model_module
from navit_clip.inference import embed as embedding
from navit_clip.inference import images as images_module


@pytest.fixture(scope="module")
def model(model_dir: Path) -> NaViTCLIP:
    return NaViTCLIP.from_pretrained(model_dir)


@pytest.fixture
def small_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many forward passes, many windows, groups of labels that the templates do not divide."""
    monkeypatch.setattr(embedding, "STREAM_TOKENS", 25)
    monkeypatch.setattr(images_module, "_WINDOW", 5)
    monkeypatch.setattr(model_module, "_PROMPTS", 5)
