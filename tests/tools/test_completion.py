"""``navit-clip completion``: what bash makes of its script."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from navit_clip.__main__ import COMMANDS, main
from navit_clip.recipes import recipe_names

TRY = """
try() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _navit_clip; echo "${COMPREPLY[*]}"
}
"""


@pytest.fixture(scope="module")
def script():
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text: printed.append(text))
        assert main(["completion"]) == 0
    return printed[-1]


def completed(script: str, *lines: str) -> list[list[str]]:
    """What each line may go on with; its last word is what is typed so far."""
    tries = "\n".join(f"try navit-clip {shlex.join(line.split(' '))}" for line in lines)
    words = ["bash", "--norc", "-c", f"{script}\n{TRY}\n{tries}"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line.split() for line in done.stdout.splitlines()]


def test_commands_flags_fields_and_recipes_are_completed(script):
    lines = {
        "tr": ["train"],
        "data make_s": ["make_shards"],
        "data make_shards --image-": ["--image-column"],
        "eval zeros": ["zeroshot"],
        "eval zeroshot --templ": ["--templates"],
        "train --optim.lr 1 --optim.schedule.k": ["--optim.schedule.kind"],
        "train --task.model.image.encoder.dep": ["--task.model.image.encoder.depth"],
        "train --task.lab": ["--task.labels"],  # of another task than the default
        "train --config dem": ["demo"],
        "doctor --net": ["--network"],
        "nothing --x": [],
    }
    assert dict(zip(lines, completed(script, *lines), strict=True)) == lines


def test_all_commands_and_recipes_are_there(script):
    commands, recipes = completed(script, "", "train --config ")
    assert set(commands) == {name.split()[0] for name in COMMANDS}
    assert recipes == recipe_names()
