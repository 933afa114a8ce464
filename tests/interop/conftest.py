"""Fixtures of the tests with models of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case as transformers saves it."""
    from transformers_cases import save_cases

    return save_cases(tmp_path_factory.mktemp("transformers"))
