"""``python -m train --config FILE [--a.b value …]``, alone or under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from navit_clip.distributed import join_ranks
from navit_clip.errors import one_line_errors
from navit_clip.training.config import parse_config, write_config
from navit_clip.training.trainer import train
from navit_clip.training.watchdog import failing_at_once


def main() -> None:
    """The command line."""
    with one_line_errors("train"):
        config, resolved = parse_config(sys.argv[1:])
        with join_ranks(config.device) as ranks, failing_at_once(ranks.world_size):
            if ranks.is_first:
                write_config(Path(config.run_dir), resolved)
            ranks.barrier()
            train(config, yaml.safe_load(resolved), ranks)


if __name__ == "__main__":
    main()
