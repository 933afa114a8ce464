"""What ``auto`` means, and who keeps to it: training, its restarts, evaluation, the API."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip.evaluation.__main__ import main as evaluate
from navit_clip.model import NaViTCLIP
from navit_clip.precision import autocast, choose_precision, slow_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("asked", "device", "capability", "expected"),
    [
        ("auto", CPU, None, "fp32"),
        ("bf16", CPU, None, "bf16"),
        ("auto", GPU, (9, 0), "bf16"),
        ("auto", GPU, (8, 0), "bf16"),
        ("auto", GPU, (7, 5), "fp32"),
        ("fp32", GPU, (9, 0), "fp32"),
        ("auto", torch.device("mps"), None, "fp32"),
    ],
)
def test_auto_is_bf16_where_the_device_has_it(asked, device, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision(asked, device) == expected


def test_float32_is_warned_about_on_cuda_alone():
    assert slow_precision("fp32", CPU) is slow_precision("bf16", GPU) is None
    warning = slow_precision("fp32", GPU)
    assert "fp32 on CUDA is several times slower" in warning
    assert "\n" not in warning


def test_autocast_is_what_its_name_says():
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(precision, CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root)
    return root


def zeroshot(data, run_dir, output, *flags):
    words = ["zeroshot", "--model", str(run_dir / "model"), "--output", str(output), "--device"]
    words += ["cpu", "--data", str(data / "shapes/zeroshot"), "--templates", "plain"]
    evaluate([*words, "--workers", "0", *flags])
    return json.loads(output.read_text())


def test_a_run_keeps_its_precision_and_is_evaluated_in_it(data, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    spec = {"kind": "zeroshot", "data": str(data / "shapes/zeroshot"), "every_steps": 2}
    spec["templates"] = "plain"
    evaluators = json.dumps({"shapes": spec})

    def train(steps, **options):
        flags = tiny_flags(data, run_dir, steps, eval__evaluators=evaluators, **options)
        assert run(monkeypatch, flags) == 0
        return yaml.safe_load((run_dir / "config.yaml").read_text())["precision"]

    assert train(2, precision="bf16") == "bf16"
    capsys.readouterr()
    assert train(4) == "bf16", "auto goes on with what there was"
    assert "attention by length, bf16, " in capsys.readouterr().out
    during = json.loads((run_dir / "eval/shapes-step-00000004.json").read_text())
    assert during["precision"] == "bf16"
    half = zeroshot(data, run_dir, tmp_path / "half.json", "--precision", "bf16")
    assert "images, " in (table := capsys.readouterr().out)
    assert ", bf16" in table.splitlines()[0]
    for key in ("top1", "top5", "views", "precision"):
        assert during.get(key) == half.get(key), key
    full = zeroshot(data, run_dir, tmp_path / "full.json")
    assert full["precision"] == "fp32"
    assert train(5, precision="fp32") == "fp32", "but another may be asked for"
    assert train(6) == "fp32"


def test_the_api_follows_its_attribute_or_the_callers_autocast(data, tmp_path, monkeypatch):
    assert run(monkeypatch, tiny_flags(data, tmp_path / "run", 2)) == 0
    model = NaViTCLIP.from_pretrained(tmp_path / "run/model")
    texts = ["a red circle", "two squares"]
    full = model.encode_text(texts)
    with autocast("bf16", CPU):
        half = model.encode_text(texts)
    assert not torch.equal(half, full)
    assert half.dtype == torch.float32
    model.precision = "bf16"
    assert torch.equal(model.encode_text(texts), half)
    model.precision = "fp32"
    with autocast("bf16", CPU):
        assert torch.equal(model.encode_text(texts), full)


def test_a_warning_stands_above_an_evaluation_in_float32_on_cuda(monkeypatch, capsys):
    from navit_clip.evaluation import __main__ as command

    model = SimpleNamespace(precision="fp32")
    monkeypatch.setattr(command, "read_evaluator", lambda args: None)
    monkeypatch.setattr(command, "_check_outputs", lambda args: None)
    monkeypatch.setattr(command, "load_models", lambda args, ranks: (model, []))
    ranks = SimpleNamespace(device=GPU, is_first=True)
    with pytest.raises(AttributeError):  # there is no evaluator to run
        command._run(SimpleNamespace(cache=None), "", ranks)
    assert capsys.readouterr().err.startswith("eval: fp32 on CUDA is several times slower")
