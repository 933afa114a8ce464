"""``navit-clip completion``: a script for bash and zsh that completes commands, flags, recipes."""

from __future__ import annotations

import io
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from typing import get_origin, get_type_hints

from navit_clip import before_torch  # noqa: F401
from navit_clip.__main__ import COMMANDS
from navit_clip.__main__ import main as navit_clip
from navit_clip.commands import Parser, run_command
from navit_clip.configs import configs_in
from navit_clip.recipes import recipe_names

_SCRIPT = """\
# In ~/.bashrc, or in ~/.zshrc below "autoload -U bashcompinit && bashcompinit":
#   source FILE_WITH_THIS
_navit_clip() {{
  local words typed="${{COMP_WORDS[*]:1:COMP_CWORD-1}}"
  case "$typed" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _navit_clip navit-clip"""


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.tools.completion"
) -> int:
    """Prints the script, see `run_command`."""
    parser = Parser(prog=prog, description="Prints a script that completes commands in a shell.")
    return run_command(parser, _run, argv)


def _run(args: Namespace) -> int:
    from navit_clip.evaluation.registry import EVALUATORS

    commands = [name for name in COMMANDS if name != "eval"]
    commands += [f"eval {kind}" for kind in (*EVALUATORS, "summary")]
    cases = {"*--config": recipe_names()}
    for command in commands:
        first, _, second = command.partition(" ")
        cases[f"{command}*"] = sorted(_flags(command))
        if second:
            cases.setdefault(first, []).append(second)
    cases[""] = sorted({command.split()[0] for command in commands})
    lines = (f'    {_pattern(typed)}) words="{" ".join(w)}" ;;' for typed, w in cases.items())
    print(_SCRIPT.format(cases="\n".join(lines)))
    return 0


def _pattern(typed: str) -> str:
    """A shell's pattern, quoted but for its stars."""
    return re.sub(r"[^*]+", lambda part: f'"{part[0]}"', typed) or '""'


def _flags(command: str) -> set[str]:
    """Flags of a command, of a training all fields."""
    if command == "train":
        return {"--config", "--help", "--help-all", "--print_config", *_fields()}
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        navit_clip([*command.split(), "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text.getvalue()))


def _fields() -> Iterator[str]:
    from navit_clip.tasks.registry import OWN_KINDS, task_config
    from navit_clip.training.config import TrainConfig

    yield from _paths(TrainConfig, "--")
    for kind in OWN_KINDS:
        yield from _paths(task_config(kind), "--task.")


def _paths(config: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(config)
    for name in (field.name for field in fields(config)):
        yield f"{prefix}{name}"
        inner = next(configs_in(hints[name]), None)
        if inner is not None and get_origin(hints[name]) is not dict:
            yield from _paths(inner, f"{prefix}{name}.")


if __name__ == "__main__":
    sys.exit(main())
