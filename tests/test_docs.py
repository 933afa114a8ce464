"""Files that the guides name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")]
FOLDERS = [ROOT, *(path for path in ROOT.glob("navit_clip/**/") if path.name != "__pycache__")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_modules_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [link for link in links if ":" not in link and not (page.parent / link).exists()]
    modules = {name for name in re.findall(r"(?<![\w/.])[\w/]+\.py\b", text) if "NAME" not in name}
    missing += [name for name in modules if not any((folder / name).exists() for folder in FOLDERS)]
    assert not missing
