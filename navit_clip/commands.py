"""What command lines share: flags are checked, and a mistake or Ctrl-C ends in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from navit_clip.errors import UserError, one_line_errors


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; ``--help`` shows how it is meant."""

    def error(self, message: str) -> NoReturn:
        """Called for flags that cannot be parsed."""
        raise UserError(message)


def number(least: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number, `least` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a number from {least}, got {text!r}")
        return value

    return parse


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
    interrupted: str = "interrupted",
) -> int:
    """Runs a command.

    Args:
        parser: Of its flags; its `prog` begins the messages.
        run: Takes the flags and returns the exit status.
        argv: Arguments without the program's name; None takes those of the process.
        interrupted: What is printed after Ctrl-C.

    Returns:
        The exit status: that of `run`, or 130 after Ctrl-C. A mistake of the user's exits with 2.
    """
    with one_line_errors(parser.prog):
        try:
            return run(parser.parse_args(argv))
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return 130
