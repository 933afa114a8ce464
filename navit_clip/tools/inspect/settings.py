"""What a training configuration, or the defaults, make of samples and batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from navit_clip.data.annotations.image_files import FilesConfig
from navit_clip.data.builders.base import SampleBuilder
from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.config import DataConfig
from navit_clip.errors import UserError
from navit_clip.packed.batch import Inputs
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.tokenizers.load import build_tokenizer
from navit_clip.training.config import parse_config


class WordCounter(Tokenizer):
    """Stands in where no tokenizer is given: one token per word."""

    kind = "words"

    @property
    def vocab_size(self) -> int:
        """All ids are 0."""
        return 1

    def encode(self, text: str, context_length: int) -> list[int]:
        """An id per word, and one for the end."""
        return [0] * min(len(text.split()) + 1, context_length)


class Settings(NamedTuple):
    """What training would do.

    Attributes:
        data: What is read and how it is packed.
        build: Makes samples.
        seed: Of the order.
        context_length: Most text tokens, at which captions are cut; None if the task reads none, or
            they are counted in words.
    """

    data: DataConfig
    build: SampleBuilder[Any, Inputs]
    seed: int
    context_length: int | None


def read_settings(
    config: Path | None,
    shards: Sequence[str],
    captions: Sequence[str] | None,
    tokenizer: str | None,
    files: FilesConfig,
) -> Settings:
    """The settings of a configuration, with those of the command line instead of its own.

    Args:
        config: A YAML file as ``navit-clip train --config`` takes it, or a run's ``config.yaml``;
            None takes the defaults, with `WordCounter` if no tokenizer is given.
        shards: Patterns; none keeps the configuration's.
        captions: Caption fields of equal weight; None keeps the configuration's.
        tokenizer: A SentencePiece model's path, or ``open_clip``.
        files: How tables are read; the default keeps the configuration's.

    Raises:
        UserError: If training would refuse the configuration, or a tokenizer cannot be read.
    """
    # What training requires and an inspection does not; the configuration's own comes next.
    words = ["--run_dir=.", "--steps=1"]
    if config is not None:
        words.append(f"--config={config}")
    if shards:
        words += ["--data.mix={}", f"--data.train={json.dumps(list(shards))}"]
    if files != FilesConfig():
        words.append(f"--data.files={json.dumps(asdict(files))}")
    if captions is not None:
        words.append(f"--task.captions={json.dumps(dict.fromkeys(captions, 1.0))}")
    count_words = config is None and tokenizer is None
    if count_words or tokenizer is not None:
        kind = "open_clip" if tokenizer in (None, "open_clip") else "sentencepiece"
        choice = {"kind": kind, "path": tokenizer, "pad_id": None}
        words.append(f"--tokenizer={json.dumps(choice)}")
    try:
        found, _ = parse_config(words)
    except UserError as error:
        raise UserError(f"--config {config}: {error}" if config else str(error)) from error
    # With few ids, since a tokenizer of more than the model has embeddings for will do here.
    build = found.task.build(found.data).build_samples(WordCounter(), found.seed)
    if not isinstance(build, PairBuilder):
        return Settings(found.data, build, found.seed, None)
    if found.tokenizer is None:
        raise UserError(f"--config {config} names no tokenizer: give --tokenizer")
    if count_words:
        return Settings(found.data, build, found.seed, None)
    build = replace(build, tokenizer=build_tokenizer(found.tokenizer))
    return Settings(found.data, build, found.seed, build.context_length)
