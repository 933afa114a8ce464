"""On CUDA every checkpoint is staged in the same page-locked memory; here, in ordinary memory."""

import json

import torch
from tiny_run import run, tiny_flags, write_tiny_data
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from navit_clip.checkpoints import checkpoint


def written(run_dir):
    """Sizes and checksums of tensors by step."""
    found = {}
    for folder in sorted((run_dir / "checkpoints").iterdir()):
        files = json.loads((folder / "run.json").read_text())["files"]
        found[folder.name] = {n: v for n, v in files.items() if n.endswith(".distcp")}
    return found


def test_the_memory_kept_for_staging_holds_each_checkpoint(tmp_path, monkeypatch):
    write_tiny_data(tmp_path)
    options = {"checkpoint__every_steps": 1, "checkpoint__keep": 9, "ema__decay": 0.5}
    options["optim__schedule__kind"] = "constant"
    assert run(monkeypatch, tiny_flags(tmp_path, tmp_path / "plain", 4, **options)) == 0
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(
        checkpoint,
        "pinned_stager",
        lambda device: BlockingAsyncStager(cache_staged_state_dict=True),
    )
    assert run(monkeypatch, tiny_flags(tmp_path, tmp_path / "kept", 2, **options)) == 0
    once = len(pinned)
    assert run(monkeypatch, tiny_flags(tmp_path, tmp_path / "kept", 4, **options)) == 0
    assert once > 0
    assert len(pinned) == 2 * once, "once in each process"
    assert written(tmp_path / "kept") == written(tmp_path / "plain")
    assert len(written(tmp_path / "kept")) == 4


def test_only_cuda_gets_page_locked_memory():
    assert checkpoint.pinned_stager(torch.device("cpu")) is None
    assert checkpoint.pinned_stager(torch.device("cuda", 0)) is not None
