"""Every flag of open_clip's trainer, with its counterpart here or why there is none.

flags.yaml has them; what those with a counterpart set is in `convert`.
``python -m navit_clip.tools.from_open_clip.flags > docs/from_open_clip.md`` writes the guide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Flag:
    """A flag of open_clip's trainer, with the fields that flags.yaml describes."""

    ours: str = ""
    note: str = ""
    only: str = ""
    values: int | str | None = None


_TABLE: dict[str, dict[str, Flag]] = {
    title: {name: Flag(**fields) for name, fields in section.items()}
    for title, section in yaml.safe_load(Path(__file__).with_name("flags.yaml").read_text()).items()
}
FLAGS = {name: flag for section in _TABLE.values() for name, flag in section.items()}

_PAGE = """\
# From open_clip

`navit-clip from-open-clip 'COMMAND'` prints a training command of open_clip as ours: the YAML of
the run, with the commands that use it and what could not be translated as comments.

```sh
navit-clip from-open-clip 'torchrun --nproc_per_node 4 -m open_clip_train.main
  --train-data "/data/cc12m/cc12m-train-{0000..2175}.tar" --train-num-samples 10968539
  --batch-size 320 --model ViT-B-32' > run.yaml
```

It is meant to be the same run: squares of the model's size, as many pairs in every batch,
open_clip's defaults where they differ from ours. Then make it ours: `data.resolution.mode: native`
or `sampled` keeps each image's aspect ratio, `data.drop` leaves patches out, and a budget of text
tokens that matches the captions (`navit-clip data inspect` measures them) leaves little padding. A
command without training data becomes commands of `navit-clip eval`, for which weights are a file.

Below is every flag of open_clip 3.3 and of its main branch (June 2026), marked where just one of
them has it. "-" needs no counterpart, an empty field has none. This page is written by
`python -m navit_clip.tools.from_open_clip.flags`.
"""


def page() -> str:
    """docs/from_open_clip.md."""
    return "\n".join([_PAGE, *(line for title in _TABLE for line in _section(title))])


def _section(title: str) -> Iterator[str]:
    yield from (f"## {title}", "", "| open_clip | navit-clip | |", "|---|---|---|")
    flags_of = _TABLE[title]
    for (ours, note, only), names in groupby(
        flags_of, lambda name: (flags_of[name].ours, flags_of[name].note, flags_of[name].only)
    ):
        flags = ", ".join(f"`{name}`" for name in names)
        fields = ", ".join(f"`{part}`" for part in ours.split(", ") if part not in ("", "-"))
        mark = f" ({only})" if only else ""
        yield f"| {flags}{mark} | {fields or ours} | {note} |"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
