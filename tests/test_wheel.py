"""The wheel by itself: whatever users run works in a process that has nothing else of ours."""

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

ALONE = """
import importlib.util, sys
from pathlib import Path

unpacked = Path(sys.argv[1])
others = [path for path in sys.path if not (Path(path) / "navit_clip/__init__.py").is_file()]
sys.path[:] = [str(unpacked), *others]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]

import navit_clip
assert Path(navit_clip.__file__).is_relative_to(unpacked), navit_clip.__file__
for ours in ("train", "eval", "benchmarks"):
    assert importlib.util.find_spec(ours) is None, ours
"""

EMBED = """
import pickle, socket

def refuse(*args, **kwargs):
    raise SystemExit("the network was asked, or something was unpickled")

socket.socket.connect = socket.getaddrinfo = pickle.load = pickle.loads = refuse
import torch
torch.load = refuse

from navit_clip import NaViTCLIP
from safetensors.torch import save_file
model, image, output = map(Path, sys.argv[2:])
loaded = NaViTCLIP.from_pretrained(model)
save_file({
    "image": loaded.encode_image([image]),
    "text": loaded.encode_text(["a red square", "blue"]),
    "classes": loaded.classify([image], ["dog", "cat"]),
}, output)
"""

COMMAND = """
from navit_clip.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
"""


def run_alone(unpacked: Path, code: str, folder: Path, *words: object) -> str:
    """Runs code in a process that has the unpacked wheel and no checkout; returns its output."""
    script = folder / "alone.py"
    script.write_text(ALONE + code)
    done = subprocess.run(
        # -I: neither this directory nor PYTHONPATH.
        [sys.executable, "-I", str(script), *map(str, (unpacked, *words))],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pip wheel` builds it, by the same backend."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    """The wheel as pip would install it."""
    zipfile.ZipFile(wheel).extractall(wheel.parent / "site")
    return wheel.parent / "site"


def test_the_wheel_holds_the_package_and_the_recipes(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"navit_clip"}
    shipped = {name for name in names if name.startswith("navit_clip/") and name.endswith(".py")}
    assert shipped == {
        str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "navit_clip").rglob("*.py")
    }
    recipes = {name for name in names if name.startswith("navit_clip/recipes/")}
    configs = [path.relative_to(CHECKOUT) for path in (CHECKOUT / "configs").rglob("*.yaml")]
    assert recipes == {str(path).replace("configs", "navit_clip/recipes", 1) for path in configs}


def test_the_wheel_names_its_command(unpacked):
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "navit-clip = navit_clip.__main__:main" in entry_points.read_text()


def test_an_exported_model_needs_nothing_but_the_wheel(unpacked, model_dir, tmp_path):
    image, output = tmp_path / "image.jpg", tmp_path / "out.safetensors"
    image.write_bytes(encode(photo(0, 50, 70), "JPEG"))
    run_alone(unpacked, EMBED, tmp_path, model_dir, image, output)
    model = NaViTCLIP.from_pretrained(model_dir)
    expected = {
        "image": model.encode_image([image]),
        "text": model.encode_text(["a red square", "blue"]),
        "classes": model.classify([image], ["dog", "cat"]),
    }
    for name, tensor in load_file(output).items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


@pytest.mark.slow
def test_the_wheel_alone_makes_data_trains_and_evaluates(unpacked, tmp_path):
    """The demo in small, its recipe by name; data workers have nothing but the wheel too.

    Pictures are drawn in one process: a fork server would begin with the checkout on its path.
    """

    def navit_clip(words: str) -> str:
        return run_alone(unpacked, COMMAND, tmp_path, *words.split())

    navit_clip(
        "data shapes --output data/shapes --train 64 --shard-size 32 --zeroshot-per-class 1 "
        "--retrieval 8 --workers 1"
    )
    navit_clip(
        "data train-tokenizer --shards data/shapes/train --captions json.captions "
        "--vocab-size 128 --model-type bpe --output runs/demo/tokenizer.model"
    )
    navit_clip(
        "train --config demo --steps 2 --optim.schedule.warmup_steps 1 --device cpu "
        "--optim.schedule.cooldown_steps 0 --data.workers 1 --log.every_steps 1 "
        "--eval.evaluators {} --task.model.text.vocab_size 128 --data.budget.max_examples 16"
    )
    assert len((tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()) == 2
    table = navit_clip(
        "eval retrieval --model runs/demo/model --images data/shapes/retrieval/images "
        "--captions data/shapes/retrieval/captions.json --output r.json --report r.html"
    )
    assert "R@1" in table
    assert "navit-clip eval retrieval" in (tmp_path / "r.html").read_text()
    shown = navit_clip("data inspect --config demo --max-samples 16 --workers 1")
    assert "padding" in shown
