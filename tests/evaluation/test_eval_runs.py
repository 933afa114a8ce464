"""Checkpoints of training runs under evaluation."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from eval_cases import run, write_all
from safetensors.torch import load_file
from tiny_run import run as run_trainer
from tiny_run import tiny_flags, write_tiny_data

from navit_clip.checkpoints.folder import Manifest
from navit_clip.checkpoints.load_run import load_run
from navit_clip.errors import UserError
from navit_clip.model import NaViTCLIP


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("eval"))


def flags(data, tmp_path):
    return ["zeroshot", "--data", data / "classes", "--templates", "plain", "--workers", 0,
            "--device", "cpu", "--output", tmp_path / "r.json"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run without and one with an average, of four steps with three checkpoints each."""
    root = tmp_path_factory.mktemp("runs")
    write_tiny_data(root)
    with pytest.MonkeyPatch.context() as patch:
        for name, decay in (("plain", 0), ("averaged", 0.5)):
            words = tiny_flags(
                root, root / name, 4, ema__decay=decay, checkpoint__every_steps=2,
                checkpoint__keep=3,
            )  # fmt: skip
            assert run_trainer(patch, words) == 0
    return root


@pytest.mark.parametrize("name", ["plain", "averaged"])
def test_the_newest_checkpoint_is_what_the_run_exported(name, runs):
    exported = load_file(runs / name / "model/model.safetensors")
    loaded, step = load_run(runs / name, None)
    assert step == 4
    weights = loaded.state_dict()
    assert weights.keys() == exported.keys()
    for key, weight in weights.items():
        assert torch.equal(weight, exported[key]), key
    assert not loaded.training
    other = NaViTCLIP.from_directory(runs / name / "model")
    assert (loaded.preprocess, loaded.config) == (other.preprocess, other.config)
    assert loaded.tokenizer.encode("a red dog", 9) == other.tokenizer.encode("a red dog", 9)
    earlier, step = load_run(runs / name, 2)
    assert step == 2
    assert not torch.equal(earlier.image.embed.weight, weights["image.embed.weight"])


def test_damaged_and_missing_checkpoints(runs, tmp_path, capsys):
    copy = Path(shutil.copytree(runs / "plain", tmp_path / "run"))
    file = next((copy / "checkpoints/step-00000004").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert load_run(copy, None)[1] == 2
    with pytest.raises(UserError, match=r"step-00000004 is damaged .*--step"):
        load_run(copy, 4)
    with pytest.raises(UserError, match=r"step 3 .* there are 2, 4"):
        load_run(copy, 3)
    for path in (copy / "checkpoints").glob("step-*/run.json"):
        path.write_text("{")
    with pytest.raises(UserError, match="all checkpoints"):
        load_run(copy, None)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match=r"no training run at .*: expected checkpoints/"):
        load_run(copy, None)


def test_a_checkpoint_is_read_by_what_it_was_taken_with(runs, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(runs / "plain", tmp_path / "run"))
    before, _ = load_run(copy, 4)
    words = tiny_flags(
        runs, copy, 6, data__resolution__max_tokens=9, checkpoint__keep=3, checkpoint__every_steps=2
    )
    assert run_trainer(monkeypatch, words) == 0
    assert load_run(copy, 4)[0].preprocess == before.preprocess
    assert load_run(copy, 6)[0].preprocess.max_tokens == 9
    (copy / "checkpoints/step-00000004/tokenizer.model").write_bytes(b"another")
    with pytest.raises(UserError, match=r"damaged \(tokenizer\.model has"):
        load_run(copy, 4)


@pytest.mark.parametrize("name", [".metadata", "run.json"])
def test_a_run_from_elsewhere_executes_nothing(name, runs, tmp_path, capsys):
    copy = Path(shutil.copytree(runs / "plain", tmp_path / "run"))
    folder = copy / "checkpoints/step-00000004"
    (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "evil")))
    manifest = json.loads((runs / "plain/checkpoints/step-00000004/run.json").read_text())
    if name != "run.json":
        content = (folder / name).read_bytes()
        manifest["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
        del manifest["checksum"]
        Manifest(**manifest).write(folder)
    with pytest.raises(UserError, match=r"Path\.touch does not belong|is damaged"):
        load_run(copy, 4)
    assert not (tmp_path / "evil").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_run_is_judged_by_its_name(runs, data, tmp_path, capsys):
    assert run(*flags(data, tmp_path), "--run", runs / "averaged", "--step", 2) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["model"] == f"{runs / 'averaged'} step 2"
