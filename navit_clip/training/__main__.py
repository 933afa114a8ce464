"""``navit-clip train --config FILE [--a.b value …]``, also ``torchrun -m navit_clip.training``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from navit_clip import before_torch  # noqa: F401
from navit_clip.errors import one_line_errors
from navit_clip.recipes import with_recipe_paths


def main(argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.training") -> None:
    """Trains."""
    with one_line_errors(prog):
        words = with_recipe_paths(sys.argv[1:] if argv is None else argv)
        # Here: a name that is wrong is answered at once, and what follows takes seconds to load.
        from navit_clip.distributed import failing_at_once, join_ranks
        from navit_clip.training.config import parse_config
        from navit_clip.training.reference import help_text
        from navit_clip.training.trainer import train

        if (text := help_text(words, prog)) is not None:
            print(text)
            return
        config, resolved = parse_config(words, prog)
        with join_ranks(config.device) as ranks, failing_at_once(ranks, prog):
            train(config, resolved, ranks)


if __name__ == "__main__":
    main()
