"""The command ``navit-clip`` and its recipes: the right word, or one line that says which."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from navit_clip import __version__, recipes
from navit_clip.__main__ import main
from navit_clip.errors import UserError
from navit_clip.recipes import find_recipe, recipe_names, with_recipe_paths
from navit_clip.training.config import parse_config

CONFIGS = Path(__file__).parents[1] / "configs"


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """The command's exit status, output and errors."""
    try:
        status = main(words) or 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


@pytest.fixture(autouse=True)
def as_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/navit-clip"])


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["data", "--help"]])
def test_help_lists_the_commands(capsys, words):
    status, output, errors = called(capsys, *words)
    assert (status, errors) == (0, "")
    assert output.startswith("usage: navit-clip COMMAND")
    assert all(f"\n  {word} " in output for word in ("train", "eval", "data make_shards"))


@pytest.mark.parametrize("words", [[], ["data"]])
def test_no_command_is_a_mistake(capsys, words):
    status, output, errors = called(capsys, *words)
    assert (status, output) == (2, "")
    assert errors.startswith("usage: ")


def test_version(capsys):
    assert called(capsys, "--version") == (0, f"navit-clip {__version__}\n", "")
    assert metadata.version("navit-clip") == __version__


@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("tarin", "did you mean train?"),
        ("make-shards", "did you mean data make_shards?"),
        ("data inspct", "did you mean data inspect?"),
        ("xyz", "there are train, eval, report, dashboard, embed"),
    ],
)
def test_an_unknown_command_is_one_line(capsys, typed, advice):
    status, output, errors = called(capsys, *typed.split())
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("navit-clip: error: no command ")
    assert advice in errors


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["eval"],
        ["data", "make_shards"],
        ["data", "make-shards"],
        ["data", "inspect"],
        ["data", "train_tokenizer"],
        ["data", "train-tokenizer"],
        ["data", "shapes"],
        ["from-open-clip"],
        ["completion"],
        ["doctor"],
    ],
)
@pytest.mark.parametrize("prog", ["navit-clip", "python -m navit_clip"])
def test_usage_and_errors_name_what_was_typed(capsys, monkeypatch, words, prog):
    if prog != "navit-clip":
        monkeypatch.setattr(sys, "argv", ["/somewhere/navit_clip/__main__.py"])
    typed = " ".join((prog, *words))
    status, output, _ = called(capsys, *words, "--help")
    assert status == 0
    assert output.startswith(f"usage: {typed} ")
    status, _, errors = called(capsys, *words, "--no-such-flag")
    assert status == 2
    assert errors.splitlines()[-1].startswith(f"{typed}: error: ")


@pytest.mark.parametrize("folder", ["train", "eval"])
def test_the_entry_points_of_a_checkout_name_themselves(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m", "--no-such-flag"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(folder, run_name="__main__", alter_sys=True)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"python -m {folder}: error: ")


def test_help_imports_nothing_heavy():
    code = """
import sys
from navit_clip.__main__ import main
assert main(["--help"]) == 0
assert main(["data", "nothing"]) == 2
sys.exit(bool({"torch", "numpy", "PIL", "yaml", "jsonargparse"} & sys.modules.keys()))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", ["navit_clip.model", "navit_clip.evaluation.__main__"])
def test_using_a_model_needs_nothing_of_sharded_training(module):
    code = f"import sys, {module}; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "nosuch"], "neither a file nor one of the recipes"),
        (["data", "make_shards", "--nosuch"], "required"),
        (["data", "shapes", "--nosuch"], "required"),
        (["from-open-clip", "python -m open_clip_train.main --nosuch"], "has no --nosuch"),
    ],
)
def test_mistakes_that_need_no_torch_are_seen_without_it(words, message):
    code = """
import sys
from navit_clip.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    sys.exit(99 if "torch" in sys.modules else stop.code)
"""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_recipes_are_found_by_name_and_paths_win(tmp_path, monkeypatch):
    names = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")}
    assert set(recipe_names()) == names
    for name in names:
        assert find_recipe(name) == find_recipe(f"{name}.yaml") == CONFIGS / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder is no configuration
    assert find_recipe("demo") == CONFIGS / "demo.yaml"
    (tmp_path / "demo.yaml").write_text("steps: 3\n")
    assert find_recipe("demo.yaml") == Path("demo.yaml")
    assert find_recipe(str(tmp_path / "demo.yaml")) == tmp_path / "demo.yaml"


@pytest.mark.parametrize("name", ["demos", "../pyproject", "", "/nowhere/demo.yaml"])
def test_an_unknown_recipe_is_one_line(name):
    with pytest.raises(UserError) as caught:
        with_recipe_paths(["--config", name])
    message = str(caught.value)
    assert message.startswith(f"--config {name}: ")
    assert ", ".join(recipe_names()) in message
    assert "paths of your own are accepted" in message


def test_a_wheels_recipes_come_first(tmp_path, monkeypatch):
    shipped = tmp_path / "recipes"
    shipped.mkdir()
    (shipped / "demo.yaml").write_text("steps: 3\n")
    monkeypatch.setattr(recipes, "_SHIPPED", shipped)
    assert recipe_names() == ["demo"]
    assert find_recipe("demo") == shipped / "demo.yaml"


def test_training_takes_recipes():
    flags = ["--run_dir", "x", "--steps", "7000"]
    by_name, resolved = parse_config(["--config", "small_photos", *flags])
    by_path, same = parse_config([f"--config={CONFIGS / 'small_photos.yaml'}", *flags])
    assert by_name == by_path
    assert resolved == same
    assert by_name.steps == 7000


# A flag that does not exist ends a command that never gets to torch.
WAITING = """
import os, runpy, sys

class AtTorch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, AtTorch())
sys.argv[1:] = {words}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("train", []),
        ("navit_clip", ["train"]),
        ("navit_clip.training", []),
        ("eval", ["zeroshot"]),
        ("navit_clip", ["eval", "zeroshot"]),
    ],
)
def test_threads_wait_passively_unless_the_user_chose_otherwise(module, words):
    for given, wanted in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        plain = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        command = [sys.executable, "-c", WAITING.format(module=module, words=[*words, "--nosuch"])]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=plain | given
        )
        assert done.stdout.split() == [wanted], done.stderr


@pytest.mark.parametrize(("options", "shown"), [([], False), (["-W", "default"], True)])
def test_what_torch_will_change_is_no_warning_to_a_user(options, shown):
    code = "import warnings, navit_clip.before_torch; warnings.warn('changes', FutureWarning)"
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ("changes" in done.stderr) == shown
