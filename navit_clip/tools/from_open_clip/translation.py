"""A command of open_clip's trainer on its way to ours: what is set so far, and what is lost."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from navit_clip.models.clip import CLIPConfig


@dataclass
class Translation:
    """A command of open_clip's on its way.

    Attributes:
        args: Its flags, by open_clip's own parser.
        ranks: Processes of the run; None if the launcher does not say.
        model: Configuration of the model, of a stand-in where ours cannot be it; set by `model`.
        is_stand_in: Whether it is one.
        config: Our configuration so far, nested.
        lost: What has no counterpart, a line each.
        unpaced: Fields in steps that open_clip has in epochs, of which it is unknown how long they
            are.
    """

    args: argparse.Namespace
    ranks: int | None
    model: CLIPConfig = field(init=False)
    is_stand_in: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    unpaced: list[str] = field(default_factory=list)

    def set(self, path: str, value: Any) -> None:
        """Sets a field."""
        *groups, last = path.split(".")
        place = self.config
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value

    def lose(self, flag: str, why: str) -> None:
        """Notes that a flag has no counterpart, or none that means quite the same."""
        self.lost.append(f"{flag}: {why}")

    @property
    def starts_from(self) -> str:
        """Weights that the run starts from: a tag or a file."""
        resumed = self.args.resume or ""
        return str(self.args.pretrained or ("" if resumed == "latest" else resumed))

    def steps(self, epochs: float) -> int | None:
        """Optimiser steps of so many epochs, None where that is unknown or there are none."""
        args = self.args
        if not (epochs and args.train_num_samples and self.ranks):
            return None
        samples = args.train_num_samples / (args.batch_size * args.accum_freq * self.ranks)
        return max(1, round(epochs * samples))

    def every(self, path: str, epochs: float) -> None:
        """Sets a cadence in steps, which open_clip has in epochs."""
        if (steps := self.steps(epochs)) is not None:
            self.set(path, steps)
        elif epochs:
            self.unpaced.append(path)

    def is_table(self, source: str) -> bool:
        """Whether a dataset is a table of image files, by its name unless its type is given."""
        kind = self.args.dataset_type
        return (Path(source).suffix[1:] if kind == "auto" else kind) in ("csv", "tsv")

    def shards(self, source: str) -> str:
        """A dataset as it is; of a table also how it is read."""
        args = self.args
        if self.is_table(source):
            # Paths begin where the command runs.
            columns = {"image_column": args.csv_img_key, "caption_columns": [args.csv_caption_key]}
            self.set("data.files", {"images": ".", **columns})
            if args.csv_separator not in ("\t", ","):
                self.lose("--csv-separator", f"{source} must have tabs or commas")
        elif source.startswith("pipe:"):
            self.set("data.allow_commands", True)
        return source
