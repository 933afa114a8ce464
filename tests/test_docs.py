"""Files that the guides name are there, and YAML in them is a run's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from navit_clip.export.pretrained import AUTO_FILES
from navit_clip.training.config import parse_config

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")]
FOLDERS = [ROOT, *(path for path in ROOT.glob("navit_clip/**/") if path.name != "__pycache__")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_modules_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [link for link in links if ":" not in link and not (page.parent / link).exists()]
    modules = {name for name in re.findall(r"(?<![\w/.])[\w/]+\.py\b", text) if "NAME" not in name}
    modules -= AUTO_FILES.keys()  # of exports
    missing += [name for name in modules if not any((folder / name).exists() for folder in FOLDERS)]
    assert not missing


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```yaml" in page.read_text()], ids=lambda page: page.stem
)
def test_yaml_blocks_are_parts_of_a_configuration(page, tmp_path):
    start = ["--run_dir", "x", "--steps", "100000", "--tokenizer.path", "t.model"]
    if page.stem == "classification":
        start = ["--config", "classify_small"]
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
        assert isinstance(yaml.safe_load(block), dict)
        if page.stem == "configuration":  # defaults, `tests/training/test_reference.py`
            continue
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        parse_config([*start, "--config", str(path)])
