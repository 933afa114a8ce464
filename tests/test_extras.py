"""Extras of the wheel: a missing one is named in one line, and nothing else needs its packages."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from navit_clip.data.annotations.tables import open_table
from navit_clip.errors import UserError
from navit_clip.models.clip import CLIP
from navit_clip.models.lora import LoraConfig, add_adapters
from navit_clip.serving.__main__ import main as serve
from navit_clip.stores import open_store
from navit_clip.tokenizers.siglip import SiglipTokenizer
from navit_clip.training.dashboard import workspace
from navit_clip.training.loggers import LogConfig

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = {path: path.read_text() for path in (ROOT / "navit_clip").rglob("*.py")}

# Modules that are imported only where somebody asked for what the package is for.
ON_DEMAND = {
    "interop/auto.py": {"transformers"},  # which imports it itself
    "kernels/": {"triton"},  # comes with PyTorch where it can be used
    "serving/": {"starlette", "prometheus_client", "uvicorn"},
    "tools/from_open_clip/": {"open_clip_train"},
}


def names_of(requirements: list[str]) -> set[str]:
    return {re.split("[>=[;]", one)[0].lower().replace("_", "-") for one in requirements}


def hide(package: str, patch: pytest.MonkeyPatch) -> None:
    """Has every import of a package fail, whether it was imported before or not."""
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        patch.delitem(sys.modules, name)
    patch.setitem(sys.modules, package, None)


def tokenizer_json(folder: Path) -> object:
    (folder / "tokenizer.json").write_text("{}")
    return SiglipTokenizer(folder / "tokenizer.json", "<pad>")


# Of each extra: a package, and what one does who needs it.
CASES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "parquet": ("pyarrow", lambda folder: open_table(folder / "a.parquet", folder, "image", ["a"])),
    # By names of them that no other test has had imported.
    "s3": ("s3fs", lambda folder: open_store("s3a://bucket/key")),
    "gs": ("gcsfs", lambda folder: open_store("gcs://bucket/key")),
    "siglip": ("tokenizers", tokenizer_json),
    "tensorboard": ("tensorboard", lambda folder: LogConfig(tensorboard=True)),
    "dashboard": ("wandb_workspaces", lambda folder: workspace("entity", "project")),
    "serve": ("starlette", lambda folder: serve(["--model", str(folder)])),
    "lora": ("peft", lambda folder: add_adapters(CLIP.__new__(CLIP), LoraConfig(image=["qkv"]))),
}


@pytest.mark.parametrize("extra", CASES)
def test_a_missing_package_is_named_with_its_extra(extra, tmp_path, monkeypatch, capsys):
    package, use = CASES[extra]
    hide(package, monkeypatch)
    with pytest.raises((UserError, ValueError, SystemExit)) as error:
        use(tmp_path)
    line = str(error.value) + capsys.readouterr().err
    assert f"pip install 'navit-clip[{extra}]'" in line
    assert "\n" not in line.removesuffix("\n").removeprefix("2")


def test_every_extra_is_tested():
    extras = PROJECT["optional-dependencies"]
    assert extras.keys() - {"dev", "bench"} == CASES.keys()
    for extra in CASES.keys() - {"gs"}:  # read as s3 is
        assert names_of(extras[extra]) <= names_of(extras["dev"]), extra


def test_the_package_itself_needs_nothing_of_an_extra():
    required = names_of(PROJECT["dependencies"]) | {"markupsafe"}  # jinja2's
    distributions = packages_distributions()
    for path, text in SOURCES.items():
        own = path.relative_to(ROOT / "navit_clip").as_posix()
        allowed = set().union(*(ON_DEMAND[part] for part in ON_DEMAND if own.startswith(part)))
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for package in {name.partition(".")[0] for name in names} - allowed:
                if package != "navit_clip" and package not in sys.stdlib_module_names:
                    assert names_of(distributions[package]) & required, f"{own} needs {package}"
