"""``navit-clip doctor``: one screen, and what is wrong with its fix."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import urllib3

from navit_clip.__main__ import main
from navit_clip.tools import doctor


def lines(capsys, *words: str) -> tuple[int, list[str]]:
    status = main(["doctor", *words])
    return status, capsys.readouterr().out.splitlines()


def test_it_is_one_screen_and_asks_no_network(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(urllib3, "request", lambda *_, **__: pytest.fail("asked"))
    status, found = lines(capsys, "--run-dir", str(tmp_path / "runs" / "new"))
    assert status in (0, 1)
    assert len(found) <= 24
    assert all(len(line) <= 80 for line in found)
    for topic in ("navit-clip", "machine", "torch", "GPU", "disk", "packages", "network"):
        assert sum(line.startswith(topic) for line in found) >= 1, topic
    assert f"freein{tmp_path}" in "".join(found).replace(" ", "")  # the path may be long


def test_what_is_wrong_has_its_fix(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    monkeypatch.setattr(os, "access", lambda path, mode: "shm" in str(path))
    status, found = lines(capsys)
    text = "\n".join(found)
    assert status == 1
    assert "this torch is built for CPUs" in text
    assert "--shm-size" in text
    assert "nothing can be written there" in text
    assert found[-1] == "3 to fix, marked !"


def test_gpus_are_listed_and_old_ones_marked(capsys, monkeypatch):
    gpus = [
        SimpleNamespace(name="H100", total_memory=80 << 30, major=9, minor=0),
        SimpleNamespace(name="T4", total_memory=15 << 30, major=7, minor=5),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    status, found = lines(capsys)
    assert "GPU 0          H100, 80.0 GB, compute 9.0" in found
    assert any("no bfloat16 before 8.0" in line for line in found)
    assert status == 1


def test_the_network_is_asked_for_on_request(capsys, monkeypatch):
    def request(method, host, **options):
        if "wandb" in host:
            raise urllib3.exceptions.HTTPError("no route to host")
        return SimpleNamespace(status=200)

    monkeypatch.setattr(urllib3, "request", request)
    status, found = lines(capsys, "--network")
    text = "\n".join(found)
    assert status == 1
    assert f"{doctor._HOSTS[0]} answers (200)" in text
    assert "no route to host" in text
