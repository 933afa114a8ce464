"""The machine itself: what it is, its ceilings, the tests that wait for a GPU, its collectives."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.command import describe_run
from benchmarks.device.setting import Setting

_ROOT = Path(__file__).parents[2]
# Those of the loss are left out: each compiles, and `loss` compares with float64.
_TESTS = [f"tests/models/test_{name}.py" for name in ("attention", "encoder", "towers")]
# Of the many variants that would each be compiled, those of the recipe's heads in bfloat16.
_KERNEL_TESTS, _KERNEL_VARIANTS = "tests/kernels", "not values_and_gradients or dtype0-64"


def check_environment(setting: Setting) -> Iterator[dict[str, Any]]:
    """Card, driver, versions, and which kernel variable-length attention takes."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "torch": torch.__version__}
    if Path("/dev/shm").is_dir():
        found["shm_gb"] = shutil.disk_usage("/dev/shm").total / 1e9
    varlen = importlib.import_module("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)
    details: dict[str, Any] = {"varlen": str(signature)}
    if setting.cuda:
        query = "name,driver_version,clocks.sm,clocks.mem,power.limit,memory.total"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rule = getattr(varlen, "_should_use_cudnn", None)
        found |= {
            "gpu": done.stdout.strip(),
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "triton": importlib.import_module("triton").__version__,
            "varlen_by_cudnn": bool(rule and rule(0)),
        }
    yield {**found, "made": describe_run("device"), "details": details}


def check_tests(setting: Setting) -> Iterator[dict[str, Any]]:
    """The tests that need CUDA."""
    setting.need_cuda()
    yield _pytest(setting, "tests", *_TESTS, "-k", "cuda or Cuda")


def check_kernel_tests(setting: Setting) -> Iterator[dict[str, Any]]:
    """The tests of Triton kernels, compiled for this device."""
    if not (_ROOT / _KERNEL_TESTS).is_dir():
        yield {"tests": "none in this commit"}
        return
    setting.need_cuda()
    yield _pytest(setting, "kernel_tests", _KERNEL_TESTS, "-k", _KERNEL_VARIANTS)


def _pytest(setting: Setting, name: str, *words: str) -> dict[str, Any]:
    """Status, the last line and the tests that failed; the whole output goes to a file."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=12", "-p", "no:cacheprovider"]
    path = setting.out / f"{name}.txt"
    with path.open("w") as output:
        done = subprocess.run(
            [*command, *words], cwd=_ROOT, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    text = path.read_text()
    failed = re.findall(r"^(?:FAILED|ERROR) (.+)", text, re.MULTILINE)
    return {
        "exit": done.returncode,
        "last": (text.splitlines() or [""])[-1],
        "failed": [line[-160:] for line in failed[:6]],
    }


def check_ceilings(setting: Setting) -> Iterator[dict[str, Any]]:
    """TFLOP/s of matrix products, large ones and the model's, and rates of copies."""
    large, streams = (8192, (4288, 16384, 65536)) if setting.cuda else (64, (32,))
    setting.warm_up()
    bf16, fp32 = torch.bfloat16, torch.float32
    found = {
        "bf16": setting.product_rate(large, large, large, bf16),
        "fp32": setting.product_rate(large, large, large, fp32),
    }
    torch.backends.cuda.matmul.allow_tf32 = True
    found["tf32"] = setting.product_rate(large, large, large, fp32)
    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = {"qkv": (768, 2304), "out": (768, 768), "up": (768, 3072), "down": (3072, 768)}
    if setting.tiny:
        shapes = {"qkv": (16, 48)}
    for m in streams:
        for name, (k, n) in shapes.items():
            found[f"{name}_{m}"] = setting.product_rate(m, k, n, bf16)
            found[f"{name}_{m}_weights"] = setting.product_rate(k, m, n, bf16)
    size = 2**30 if setting.cuda else 2**10
    source, target = (torch.empty(size, dtype=torch.uint8, device=setting.device) for _ in range(2))
    found["copy_tb_per_s"] = 2 * size / setting.milliseconds(lambda: target.copy_(source)) / 1e9
    if setting.cuda:
        host = torch.empty(12_582_912, dtype=torch.uint8).pin_memory()  # a batch of 16k patches
        copied = setting.milliseconds(lambda: host.to(setting.device, non_blocking=True))
        found["to_device_gb_per_s"] = host.nbytes / copied / 1e6
    yield found


def check_group(setting: Setting) -> Iterator[dict[str, Any]]:
    """One rank with gloo, and NCCL beside it: tensors, objects, a tensor to itself."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if setting.cuda else "gloo",
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
        )
        for device in {"cpu", setting.device.type}:
            dist.all_reduce(torch.ones(4, device=device))
        items: list[Any] = [None]
        dist.all_gather_object(items, {"a": 1})
        dist.barrier()
        found: dict[str, Any] = {"objects": items}
        if setting.cuda:
            sent = torch.ones(8, device="cuda")
            received = torch.empty_like(sent)
            operations = [dist.P2POp(dist.isend, sent, 0), dist.P2POp(dist.irecv, received, 0)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            gathered, scattered = torch.empty_like(sent), torch.empty_like(sent)
            dist.all_gather_into_tensor(gathered, sent)
            dist.reduce_scatter_tensor(scattered, sent)
            torch.cuda.synchronize()
            found["same"] = [bool((sent == x).all()) for x in (received, gathered, scattered)]
        dist.destroy_process_group()
    yield found
