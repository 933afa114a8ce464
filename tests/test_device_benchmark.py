"""The checks of one GPU, taken through their code on a CPU, and the section that they make."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tables
from benchmarks.device.checks import CHECKS, Check
from benchmarks.device.run import run_check
from benchmarks.device.setting import Setting

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_check_ends_ok_or_needs_cuda(tmp_path):
    flags = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--commit", "abc"]
    command = [sys.executable, "-m", "benchmarks.device", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "device.json").read_text())
    checks = result["checks"]
    assert set(checks) == {*(check.name for check in CHECKS), "ratios"}
    wrong = {name: found for name, found in checks.items() if found["status"] != "ok"}
    assert all(found["status"] == "needs CUDA" for found in wrong.values()), wrong
    assert {"tests"} <= set(wrong) <= {"tests", "kernel_tests", "short_attention"}
    # What was found before a check needed more than a CPU, and a line for each.
    lines = done.stdout.splitlines()
    names = [line.split(" | ")[0].split(":")[0] for line in lines]
    assert names == [*(check.name for check in CHECKS), "ratios"]
    assert checks["trainer"]["exits"] == [0, 0]
    assert checks["trainer"]["exported"]
    page = tables.section("device", result)
    assert "| B/16, 16,384 + 4,288 |" in page
    assert "- group: ok" in page
    assert "`python -m benchmarks.device --tiny --device cpu` at abc;" in page


def _stuck(setting: Setting) -> Iterator[dict[str, Any]]:
    yield {"first": 1, "details": {"a": 2}}
    time.sleep(60)


def test_a_check_that_takes_too_long_keeps_what_it_found(tmp_path):
    setting = Setting(torch.device("cpu"), True, (), tmp_path)
    context = multiprocessing.get_context("fork")  # at once
    begin = time.monotonic()
    found = run_check(Check("stuck", 60, _stuck), setting, context, 3)
    assert time.monotonic() - begin < 30
    assert found["status"] == "failed"
    assert found["error"] == "took more than 3 s"
    assert (found["first"], found["details"]) == (1, {"a": 2})
