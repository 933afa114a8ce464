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
from navit_clip.errors import SkipSampleError, UserError, printable
from navit_clip.files import write_output
from navit_clip.tools.files_flags import add_files_flags, files_of

_MEASURED = 100_000  # captions, evenly spread, that unknown pieces are counted in
_MOST_BYTES = 1 << 16  # of a caption; SentencePiece leaves longer ones out, and says nothing


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
            tqdm.write(printable(f"warning: {error}; kept what was readable"))


def train_tokenizer(
    shards: Sequence[str],
    fields: Sequence[str],
    vocab_size: int,
    output: Path,
    model_type: Literal["unigram", "bpe"] = "unigram",
    *,
    coverage: float = 0.9995,
    byte_fallback: bool = False,
) -> tuple[int, float]:
    """Trains a model and writes it.

    Args:
        shards: Tar files.
        fields: Caption fields, see `find_captions`.
        vocab_size: Most pieces; fewer if the captions hold fewer.
        output: The file to write.
        model_type: ``unigram``, the paper's; ``bpe`` keeps whole words of a small vocabulary, where
            unigram falls apart into letters.
        coverage: Fraction of all characters that get a piece; the rarest do not, and are unknown.
        byte_fallback: Spell characters without a piece as bytes, for which 256 pieces are kept:
            nothing is unknown.

    Returns:
        How many pieces the model has, and the fraction of the captions' pieces that are unknown.

    Raises:
        UserError: If there is no caption, SentencePiece refuses the size, or the file cannot be
            written.
    """
    import sentencepiece

    captions = list(iterate_captions(shards, fields))
    if not captions:
        raise UserError(f"no caption found in {len(shards)} shards under {', '.join(fields)}")
    if too_long := sum(len(caption.encode()) > _MOST_BYTES for caption in captions):
        tqdm.write(f"warning: {too_long:,} captions of more than {_MOST_BYTES:,} bytes left out")
    if too_long == len(captions):
        raise UserError(f"all {too_long:,} captions are longer than {_MOST_BYTES:,} bytes")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=coverage,
            byte_fallback=byte_fallback,
            # Few distinct words, as in generated captions, allow fewer pieces than asked for.
            hard_vocab_limit=False,
            # More sentences teach a 32k vocabulary nothing, and cost memory.
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            max_sentence_length=_MOST_BYTES,
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
    ids = processor.encode(captions[:: max(1, len(captions) // _MEASURED)])
    total = sum(map(len, ids))
    return processor.vocab_size(), sum(row.count(processor.unk_id()) for row in ids) / max(1, total)


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.tools.train_tokenizer"
) -> int:
    """Trains a tokenizer, see `run_command`."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("--shards", nargs="+", required=True, help="tars, folders, tables")
    add_files_flags(parser)
    parser.add_argument(
        "--captions", nargs="+", default=["all"], help="caption fields, such as txt json.title; all"
    )
    parser.add_argument("--vocab-size", type=number(8), default=32000)
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument(
        "--coverage",
        type=_fraction,
        default=0.9995,
        help="fraction of all characters that get a piece, others are unknown; 1 for every script",
    )
    parser.add_argument(
        "--byte-fallback",
        action="store_true",
        help="spell characters without a piece as bytes (256 pieces): no text is unknown",
    )
    parser.add_argument("--output", type=Path, required=True, help="the model file to write")
    return run_command(parser, _train, argv)


def _train(args: argparse.Namespace) -> int:
    shards = expand_shards(args.shards, files=files_of(args))
    pieces, unknown = train_tokenizer(
        shards,
        args.captions,
        args.vocab_size,
        args.output,
        args.model_type,
        coverage=args.coverage,
        byte_fallback=args.byte_fallback,
    )
    print(f"wrote {args.output}: {pieces} pieces, {unknown:.2%} of those of the captions unknown")
    if unknown:
        print("captions that differ in unknown pieces alone get the same ids: --byte-fallback")
    return 0


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction above 0, at most 1, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
