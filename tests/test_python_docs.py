"""The code of docs/python.md runs as it stands there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_factory import photo
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip import NaViTCLIP

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_code_of_the_page_runs(model_dir, tmp_path, monkeypatch):
    shutil.copytree(model_dir, tmp_path / "runs/demo/model")
    photo(0, 60, 80).save(tmp_path / "photo.jpg")
    photo(1, 20, 150).save(tmp_path / "wide.png")
    write_tiny_data(tmp_path)
    assert run(monkeypatch, tiny_flags(tmp_path, tmp_path / "runs/b16", 2)) == 0
    shutil.rmtree(tmp_path / "runs/b16/model")  # as in a run that goes on
    monkeypatch.chdir(tmp_path)
    pushed: list[str] = []
    monkeypatch.setattr(NaViTCLIP, "push_to_hub", lambda self, name: pushed.append(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["images"].shape == (2, 8)
    assert names["same"].shape == (4, 8)
    # The JPEG decoded once: what was made of it is the same picture.
    torch.testing.assert_close(names["same"], names["same"][:1].expand(4, -1))
    torch.testing.assert_close(names["probabilities"].sum(1), torch.ones(1))
    torch.testing.assert_close(names["vectors"].norm(dim=1), torch.ones(2))
    assert pushed == ["my-name/my-model"]
    assert NaViTCLIP.from_pretrained(tmp_path / "copy").config == names["model"].config
    exported = NaViTCLIP.from_pretrained(tmp_path / "export")
    assert (names["step"], exported.config) == (2, names["unfinished"].config)


def test_every_block_is_python():
    # Another language would not be tested, so would need a look.
    assert set(re.findall(r"^```(\w+)$", PAGE.read_text(), re.MULTILINE)) == {"python"}


@pytest.mark.parametrize("word", ["encode_image", "encode_text", "similarity", "classify"])
def test_the_page_names_every_method(word):
    assert word in PAGE.read_text()
