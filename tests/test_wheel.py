"""The wheel by itself: an exported model works in a process that has nothing else of ours."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shard_factory import encode, photo

from navit_clip import NaViTCLIP

CHECKOUT = Path(__file__).parents[1]
pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")

CHILD = """
import importlib.util, pickle, socket, sys
from pathlib import Path

unpacked, checkout, model, image, output = map(Path, sys.argv[1:])
sys.path[:] = [str(unpacked), *(p for p in sys.path if Path(p).resolve() != checkout)]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]

def refuse(*args, **kwargs):
    raise SystemExit("the network was asked, or something was unpickled")

socket.socket.connect = socket.getaddrinfo = pickle.load = pickle.loads = refuse
import torch
torch.load = refuse

import navit_clip
assert Path(navit_clip.__file__).is_relative_to(unpacked), navit_clip.__file__
for ours in ("train", "eval", "benchmarks"):
    assert importlib.util.find_spec(ours) is None, ours

from navit_clip import NaViTCLIP
from safetensors.torch import save_file
loaded = NaViTCLIP.from_pretrained(model)
save_file({
    "image": loaded.encode_image([image]),
    "text": loaded.encode_text(["a red square", "blue"]),
    "classes": loaded.classify([image], ["dog", "cat"]),
}, output)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pip wheel` builds it, by the same backend."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_library_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"navit_clip"}
    shipped = {name for name in names if name.startswith("navit_clip/") and name.endswith(".py")}
    assert shipped == {
        str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "navit_clip").rglob("*.py")
    }


def test_an_exported_model_needs_nothing_but_the_wheel(wheel, model_dir, tmp_path):
    unpacked, output = tmp_path / "site", tmp_path / "out.safetensors"
    zipfile.ZipFile(wheel).extractall(unpacked)
    image = tmp_path / "image.jpg"
    image.write_bytes(encode(photo(0, 50, 70), "JPEG"))
    arguments = (unpacked, CHECKOUT, model_dir, image, output)
    done = subprocess.run(
        # -I: neither this directory nor PYTHONPATH.
        [sys.executable, "-I", "-c", CHILD, *map(str, arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = NaViTCLIP.from_pretrained(model_dir)
    expected = {
        "image": model.encode_image([image]),
        "text": model.encode_text(["a red square", "blue"]),
        "classes": model.classify([image], ["dog", "cat"]),
    }
    for name, tensor in load_file(output).items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
