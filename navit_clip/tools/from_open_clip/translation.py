"""A command of open_clip's trainer on its way to ours: what is set so far, and what is lost."""

from __future__ import annotations

import argparse
import shlex
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
        before: Commands that make shards of tables.
        lost: What has no counterpart, a line each.
        unpaced: Fields in steps that open_clip has in epochs, of which it is unknown how long they
            are.
    """

    args: argparse.Namespace
    ranks: int | None
    model: CLIPConfig = field(init=False)
    is_stand_in: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)
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

    def shards(self, source: str, folder: str) -> str:
        """Shards of a dataset: those named, or those that are first made of a table."""
        args = self.args
        kind = Path(source).suffix if args.dataset_type == "auto" else f".{args.dataset_type}"
        if kind not in (".csv", ".tsv"):
            if source.startswith("pipe:"):
                self.set("data.allow_commands", True)
            return source
        columns = ["--image-column", args.csv_img_key, "--caption-column", args.csv_caption_key]
        words = ["--table", source, "--images", ".", *columns, "--output", folder]
        self.before.append(f"navit-clip data make_shards {shlex.join(words)}")
        if args.csv_separator != (separator := "\t" if source.endswith(".tsv") else ","):
            found = f"{args.csv_separator!r} separates the columns of {source}"
            self.lose("--csv-separator", f"{found}, make_shards expects {separator!r} by its name")
        return folder
