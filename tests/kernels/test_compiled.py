"""The kernels compiled for an H100, on a machine that needs none."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from navit_clip.kernels import contrastive, short_attention
from navit_clip.kernels.short_attention import BACKWARD, BACKWARD_KEYS, CLASSES, FORWARD

triton = pytest.importorskip("triton", reason="Triton is not installed")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = [
    pytest.mark.skipif(
        not (TOOLS / "cuobjdump").exists(), reason="Triton comes without NVIDIA's tools"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile for the device"),
]
SHARED_MEMORY = 227 * 1024  # that one program may have on an H100
SPILLS = 256  # bytes of a thread that may cost little
INTEGERS = ("first_segment", "rows", "columns", "stride", "count", "length")
FLOAT32 = ("q_weight_ptr", "k_weight_ptr", "dweight_ptr", "statistics_ptr", "scale_ptr")
FLOAT32 += ("row_parts_ptr", "column_parts_ptr", "matching_ptr", "row_lse_ptr", "column_lse_ptr")
FLOAT32 += ("total_ptr", "parts_ptr")


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is compiled in, and how it is compiled."""
    constants = {name: x for name, x in options.items() if name.isupper()}
    return constants, {
        name: options[name] for name in ("num_stages", "num_warps", "maxnreg") if name in options
    }


def compile_for_h100(kernel: Any, constants: dict[str, Any], options: dict[str, Any]) -> Any:
    """Of bfloat16 tensors, with what of the constants the kernel takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants | {"DOT": triton.language.bfloat16}
    constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(INTEGERS, "i32") | {"offsets_ptr": "*i32"}
    types |= dict.fromkeys(["eps", "scale"], "fp32") | dict.fromkeys(FLOAT32, "*fp32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*bf16") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name == "stride"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def bytes_of_spills(compiled: Any, folder: Path) -> int:
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [TOOLS / "cuobjdump", "-res-usage", binary]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", usage)
    assert found, usage
    return int(found[1])


# Those with the most in registers or in shared memory, and heads narrower than a product may be, as
# in a decoder of small towers; tests on a device compile all.
@pytest.mark.parametrize(
    ("name", "width", "length"),
    [
        ("forward", 8, 16),
        ("backward", 8, 16),
        ("forward", 64, 256),
        ("forward", 128, 256),
        ("backward", 64, 64),
        ("backward", 128, 64),
        ("backward_queries", 64, 128),
        ("backward_keys", 128, 256),
    ],
)
def test_short_attention_fits_an_h100(name, width, length, tmp_path, monkeypatch):
    from navit_clip.kernels import _short_attention

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    kernel = getattr(_short_attention, f"{name}_kernel")
    table = short_attention._table(width)
    tile = (FORWARD if name == "forward" else BACKWARD)[table][CLASSES.index(length)]
    if name == "backward_keys":
        tile = BACKWARD_KEYS[table]
    kind = short_attention._Kind(
        tile, length, 12, width, causal=False, norm=True, dtype=torch.bfloat16, compiled=True
    )
    options = short_attention._options(kind)
    compiled = compile_for_h100(kernel, *split(options))
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert bytes_of_spills(compiled, tmp_path) <= SPILLS


@pytest.mark.parametrize("width", [512, 72])
@pytest.mark.parametrize("name", ["statistics", "weights", "merge"])
def test_contrastive_softmax_fits_an_h100(name, width, tmp_path, monkeypatch):
    from navit_clip.kernels import _contrastive

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    features = torch.empty(1, width, device="meta")
    options = contrastive._options(features) | {"MATCHES": True, "PARTS": 32, "BLOCK": 128}
    compiled = compile_for_h100(getattr(_contrastive, f"{name}_kernel"), *split(options))
    # That two programs fit a processor, one's products behind the other's exponentials.
    assert compiled.metadata.shared <= SHARED_MEMORY // 2
    assert bytes_of_spills(compiled, tmp_path) == 0
