"""Trains a SentencePiece model on the captions of shards.

Runs once before training: ``navit-clip data train_tokenizer --shards data/train --vocab-size 32000
--output tokenizer.model``.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from navit_clip.commands import Parser, number, run_command
from navit_clip.data.captions import find_captions
from navit_clip.data.patterns import expand_shards
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.files import write_output


def iterate_captions(shards: Sequence[str], fields: Sequence[str]) -> Iterator[str]:
    """Every readable caption of every field, shard by shard, with a progress bar."""
    for path in tqdm(shards, desc="reading captions", unit="shard"):
        try:
            for sample in read_shard(path):
                for field in fields:
                    try:
                        sample.check()
                        yield from find_captions(sample.members, field)
                    except SkipSampleError:
                        continue
        except ShardError as error:
            tqdm.write(f"warning: {error}; kept what was readable")


def train_tokenizer(
    shards: Sequence[str],
    fields: Sequence[str],
    vocab_size: int,
    output: Path,
    model_type: Literal["unigram", "bpe"] = "unigram",
) -> int:
    """Trains a model and writes it.

    Args:
        shards: Tar files.
        fields: Caption fields, see `find_captions`.
        vocab_size: Most pieces; fewer if the captions hold fewer.
        output: The file to write.
        model_type: ``unigram``, the paper's; ``bpe`` keeps whole words of a small vocabulary, where
            unigram falls apart into letters.

    Returns:
        How many pieces the model has.

    Raises:
        UserError: If there is no caption, SentencePiece refuses the size, or the file cannot be
            written.
    """
    import sentencepiece

    captions = list(iterate_captions(shards, fields))
    if not captions:
        raise UserError(f"no caption found in {len(shards)} shards under {', '.join(fields)}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            # Few distinct words, as in generated captions, allow fewer pieces than asked for.
            hard_vocab_limit=False,
            # More sentences teach a 32k vocabulary nothing, and cost memory.
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,  # more threads would change the pieces from run to run
            minloglevel=1,
        )
    except RuntimeError as error:
        raise UserError(f"SentencePiece cannot train {vocab_size} pieces: {error}") from error
    write_output(output, model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return processor.vocab_size()


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.tools.train_tokenizer"
) -> int:
    """Trains a tokenizer, see `run_command`."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("--shards", nargs="+", required=True, help="tars, folders or patterns")
    parser.add_argument(
        "--captions", nargs="+", default=["txt"], help="caption fields, such as txt json.captions"
    )
    parser.add_argument("--vocab-size", type=number(8), default=32000)
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument("--output", type=Path, required=True, help="the model file to write")
    return run_command(parser, _train, argv)


def _train(args: argparse.Namespace) -> int:
    shards = expand_shards(args.shards)
    pieces = train_tokenizer(shards, args.captions, args.vocab_size, args.output, args.model_type)
    print(f"wrote {args.output}: {pieces} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
