"""The first weights of a run and its tokenizer, from nothing or from an existing model.

`trainer` asks here. A run keeps the tokenizer it was begun with in its directory, so that its
checkpoints can be read wherever the tokenizer came from.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from navit_clip.checkpoints.folder import TOKENIZER_DIR
from navit_clip.errors import UserError
from navit_clip.files import writing
from navit_clip.tasks.base import Task
from navit_clip.tasks.source import InitConfig
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.tokenizers.load import TokenizerConfig, build_tokenizer, load_tokenizer

# Tokenizers of as many ids that cut this alike have the same vocabulary, in practice.
_PROBE = "Two dogs & a child's red kite, photographed at 10:45 on the north-eastern coast."


def starting_point(
    task: Task, init: InitConfig, tokenizer: TokenizerConfig | None, run_dir: Path, *, begun: bool
) -> tuple[nn.Module, Tokenizer | None]:
    """The first weights of a run, on the host, and its tokenizer.

    Args:
        task: Whose model.
        init: What the run starts from.
        tokenizer: As configured; None takes that of `init`.
        run_dir: Of the run.
        begun: The run has a checkpoint, whose weights will replace these: `init` is not read.

    Raises:
        UserError: If the model or a tokenizer cannot be read, or the configured tokenizer has
            another vocabulary than that of `init`.
    """
    given = build_tokenizer(tokenizer) if tokenizer is not None else None
    if init.model is None:
        return task.build_model(), given
    if begun:
        return task.build_model(), given or load_tokenizer(run_dir / TOKENIZER_DIR)
    model, theirs = task.start_from(init)
    if given is not None and theirs is not None:
        _check_vocabulary(given, theirs, init)
    return model, given or theirs


def keep_tokenizer(tokenizer: Tokenizer | None, run_dir: Path) -> None:
    """Saves the tokenizer in the directory of a run that has none yet.

    Raises:
        UserError: If the disk does not take it.
    """
    folder = run_dir / TOKENIZER_DIR
    if tokenizer is None or folder.is_dir():
        return
    partial = folder.with_name(folder.name + ".partial")
    with writing(folder):
        partial.mkdir(parents=True, exist_ok=True)
        tokenizer.save(partial)
        partial.rename(folder)


def _check_vocabulary(given: Tokenizer, theirs: Tokenizer, init: InitConfig) -> None:
    if given.vocab_size != theirs.vocab_size:
        what = f"{given.vocab_size} ids, that of init.model={init.model} {theirs.vocab_size}"
    elif given.encode(_PROBE, 256) != theirs.encode(_PROBE, 256):
        what = f"other ids than that of init.model={init.model}"
    else:
        return
    raise UserError(f"the tokenizer has {what}: leave `tokenizer` out to take the model's")
