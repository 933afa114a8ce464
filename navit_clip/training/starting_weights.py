"""The first weights of a run and its tokenizer, from nothing or from an existing model.

`trainer` asks here. Every checkpoint holds the tokenizer that the run was begun with, which is read
from there on: what has become of the file it came from does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from navit_clip.errors import UserError
from navit_clip.tasks.base import Task
from navit_clip.tasks.source import InitConfig
from navit_clip.tokenizers.base import DESCRIPTION_FILE, Tokenizer
from navit_clip.tokenizers.load import TokenizerConfig, build_tokenizer, load_tokenizer


def starting_point(
    task: Task,
    init: InitConfig,
    tokenizer: TokenizerConfig | None,
    checkpoint: Path | None,
    kept: Sequence[str] = (),
) -> tuple[nn.Module, Tokenizer | None]:
    """The first weights of a run, on the host, and its tokenizer.

    Args:
        task: Whose model.
        init: What the run starts from.
        tokenizer: As configured; None takes that of `init`.
        checkpoint: Of the run, whose weights will replace these and whose tokenizer is the run's:
            `init` is not read, and `tokenizer` only if it is still there. None if there is none.
        kept: The task's fields by which parts of the model never learn.

    Raises:
        UserError: If what never learns would be random, the model or a tokenizer cannot be read,
            or the configured tokenizer is another one than that of the checkpoint, or has another
            vocabulary than that of `init`.
    """
    if checkpoint is not None:
        task.check_checkpoint(checkpoint)
        own = load_tokenizer(checkpoint) if (checkpoint / DESCRIPTION_FILE).is_file() else None
        if own is not None and tokenizer is not None:
            _check_same(tokenizer, own, checkpoint)
        model = task.build_model()
        task.adapt(model)
        return model, own
    given = build_tokenizer(tokenizer) if tokenizer is not None else None
    theirs: Tokenizer | None = None
    if init.model is None:
        if kept:
            fields = " and ".join(f"task.{name}" for name in kept)
            raise UserError(f"init.model is missing: {fields} would keep random weights")
        model = task.build_model()
    else:
        model, theirs = task.start_from(init)
    if given is not None and theirs is not None:
        _check_vocabulary(given, theirs, init)
    task.adapt(model)
    return model, given or theirs


def _check_same(config: TokenizerConfig, own: Tokenizer, checkpoint: Path) -> None:
    try:
        given = build_tokenizer(config)
    except UserError:
        return  # the run has its own copy
    if (given.kind, given.pad_id, given.model) != (own.kind, own.pad_id, own.model):
        raise UserError(
            f"the tokenizer {config.path or config.kind} is not the one that the run was begun "
            f"with, which {checkpoint} holds: put that one back, or use another run_dir"
        )


def _check_vocabulary(given: Tokenizer, theirs: Tokenizer, init: InitConfig) -> None:
    if what := given.difference(theirs, f"that of init.model={init.model}"):
        raise UserError(f"the tokenizer has {what}: leave `tokenizer` out to take the model's")
