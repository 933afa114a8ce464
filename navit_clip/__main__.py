"""The command ``navit-clip``: finds what was asked for, and imports no more than that."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from navit_clip import __version__, before_torch  # noqa: F401

_HELP = """\
usage: {prog} COMMAND …

  train                 train a model, alone or under torchrun
  eval                  zero-shot classification, retrieval, tables of results
  report                one page of a run, or of several side by side
  dashboard             a workspace on wandb for a project's runs
  embed                 images or texts to a file of vectors
  serve                 a model's vectors and classes over HTTP
  data make_shards      make webdataset shards of image files, or verify them
  data inspect          look at shards: what training would skip, how full batches would be
  data train_tokenizer  train a SentencePiece model on the captions of shards
  data shapes           write a data set of pictures of shapes, to try things with
  completion            a script that completes commands in bash and zsh
  doctor                what this machine has for a run, and what to fix
  from_open_clip        translate a training command of open_clip

{prog} COMMAND --help explains one. {prog} --version prints the version."""

COMMANDS = {
    "train": "navit_clip.training.__main__",
    "eval": "navit_clip.evaluation.__main__",
    "report": "navit_clip.training.report.__main__",
    "dashboard": "navit_clip.training.dashboard",
    "embed": "navit_clip.evaluation.embed_files",
    "serve": "navit_clip.serving.__main__",
    "data make_shards": "navit_clip.tools.make_shards.__main__",
    "data inspect": "navit_clip.tools.inspect.__main__",
    "data train_tokenizer": "navit_clip.tools.train_tokenizer",
    "data shapes": "navit_clip.tools.shapes.__main__",
    "completion": "navit_clip.tools.completion",
    "doctor": "navit_clip.tools.doctor",
    "from_open_clip": "navit_clip.tools.from_open_clip.__main__",
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs a command.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        The exit status of the command; None is 0. A mistake of the user's exits with 2.
    """
    # What a user types again must work: `python -m navit_clip` may not be on the path as a script.
    script = Path(sys.argv[0]).name != "__main__.py"
    prog = "navit-clip" if script else "python -m navit_clip"
    words = list(sys.argv[1:] if argv is None else argv)
    count = 2 if words[:1] == ["data"] else 1
    typed, rest = words[:count], words[count:]
    command = " ".join(typed).replace("-", "_")
    if command in COMMANDS:
        run = importlib.import_module(COMMANDS[command]).main
        status: int | None = run(rest, f"{prog} {' '.join(typed)}")
        return status
    if typed[-1:] in (["-h"], ["--help"]):
        print(_HELP.format(prog=prog))
        return 0
    if typed == ["--version"]:
        print(f"navit-clip {__version__}")
        return 0
    if command in ("", "data"):
        print(_HELP.format(prog=prog), file=sys.stderr)
    else:
        print(f"{prog}: error: no command {' '.join(typed)!r}: {_advice(command)}", file=sys.stderr)
    return 2


def _advice(command: str) -> str:
    from difflib import get_close_matches

    # Also without the `data` before it.
    names = {name: name for name in COMMANDS} | {name.split()[-1]: name for name in COMMANDS}
    close = get_close_matches(command, names, n=1)
    return f"did you mean {names[close[0]]}?" if close else f"there are {', '.join(COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
