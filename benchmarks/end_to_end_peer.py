"""open_clip's own trainer with a model of given widths, for `benchmarks.end_to_end`.

Runs in an environment of its own and imports nothing of this project. Its first argument is the
folder of a model configuration in open_clip's format; the others are its trainer's.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The subprocess."""
    import open_clip
    from open_clip_train.main import main as train

    open_clip.add_model_config(sys.argv[1])
    train(sys.argv[2:])


if __name__ == "__main__":
    main()
