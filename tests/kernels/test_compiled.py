"""The kernels of attention compiled for an H100, on a machine that needs none."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from navit_clip.kernels.short_attention import BACKWARD, CLASSES, FORWARD

triton = pytest.importorskip("triton", reason="Triton is not installed")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = [
    pytest.mark.skipif(
        not (TOOLS / "cuobjdump").exists(), reason="Triton comes without NVIDIA's tools"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile for the device"),
]
SHARED_MEMORY = 227 * 1024  # that one program may have on an H100


def compile_for_h100(kernel: Any, constants: dict[str, Any], warps: int, stages: int) -> Any:
    """Of bfloat16 tensors; other pointers by name, and numbers as they are passed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"offsets_ptr": "*i32", "first_segment": "i32", "eps": "fp32", "scale": "fp32"}
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*fp32" if "weight" in name else "*bf16")
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def bytes_of_spills(compiled: Any, folder: Path) -> int:
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [TOOLS / "cuobjdump", "-res-usage", binary]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", usage)
    assert found, usage
    return int(found[1])


# The longest class has the most in registers and in shared memory; the others are compiled in the
# tests on a device.
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_short_attention_fits_an_h100(direction, width, tmp_path, monkeypatch):
    from navit_clip.kernels import _short_attention

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    kernel = getattr(_short_attention, f"{direction}_kernel")
    keys, warps, stages = (FORWARD if direction == "forward" else BACKWARD)[width][-1]
    constants = {"H": 12, "D": width, "WIDTH": width, "LENGTH": CLASSES[-1], "BLOCK_N": keys}
    constants |= {"CAUSAL": False, "NORM": True, "DOT": triton.language.bfloat16}
    compiled = compile_for_h100(kernel, constants, warps, stages)
    assert compiled.metadata.shared <= SHARED_MEMORY
    if width == 64:
        assert bytes_of_spills(compiled, tmp_path) == 0
