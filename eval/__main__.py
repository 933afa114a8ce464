"""``python -m eval zeroshot | retrieval | summary``, alone or under torchrun."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import retrieval, zeroshot
from eval.encode import Embedded, embed_source
from eval.gallery import draw_gallery
from eval.sources import Source, open_captioned, open_labelled
from eval.summary import retrieval_table, summarise, zeroshot_table
from navit_clip.errors import UserError, one_line_errors
from navit_clip.files import write_whole
from navit_clip.interop.pretrained import Pretrained, load_pretrained
from navit_clip.ranks import Ranks, join_ranks


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", type=Path, required=True, help="exported model, RUN_DIR/model")
    common.add_argument(
        "--max-tokens",
        type=_budgets,
        default=(),
        help="token budgets per image, such as 64,128,256; the model's own is always included",
    )
    common.add_argument("--output", type=Path, required=True, help="JSON file to write")
    common.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    common.add_argument("--workers", type=int, default=1, help="decoding processes per rank")

    zero = commands.add_parser(
        "zeroshot", parents=[common], help="zero-shot classification of labelled images"
    )
    zero.add_argument("--data", required=True, help="class folders, or shards with .cls members")
    zero.add_argument(
        "--classnames", help="text file, one name per line, or imagenet; default: folder names"
    )
    zero.add_argument(
        "--templates",
        default="openai",
        help="openai (80), simple (7), plain (1), or a text file with {} in each line",
    )

    retrieve = commands.add_parser(
        "retrieval", parents=[common], help="image-text retrieval, R@1/5/10 both ways"
    )
    retrieve.add_argument("--data", help="captioned shards")
    retrieve.add_argument("--images", help="folder of images")
    retrieve.add_argument("--captions", help="captions_*.json (COCO) or dataset_*.json (Karpathy)")
    retrieve.add_argument(
        "--fields", nargs="+", default=["txt"], help="caption sources in shards: txt json.FIELD"
    )
    retrieve.add_argument("--split", help="split of a Karpathy file (default: test if it has one)")
    retrieve.add_argument(
        "--gallery", type=Path, help="PNG of sample images with their best captions"
    )

    summary = commands.add_parser("summary", help="tables of the results in a directory")
    summary.add_argument("directory", type=Path)
    return parser.parse_args(argv)


def _budgets(text: str) -> tuple[int, ...]:
    try:
        budgets = tuple(int(word) for word in text.split(","))
    except ValueError:
        budgets = ()
    if not budgets or min(budgets) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers such as 64,128,256, got {text!r}")
    return budgets


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _arguments(argv)
    with one_line_errors("eval"):
        if args.command == "summary":
            print(summarise(args.directory))
            return
        if args.workers < 0:
            raise UserError(f"--workers must not be negative, got {args.workers}")
        with join_ranks(args.device) as ranks:
            run = _zeroshot if args.command == "zeroshot" else _retrieval
            run(args, ranks)


def _load(args: argparse.Namespace, ranks: Ranks) -> tuple[Pretrained, list[int]]:
    pretrained = load_pretrained(args.model, ranks.device)
    return pretrained, sorted({*args.max_tokens, pretrained.preprocess.max_tokens}, reverse=True)


def _embed(
    args: argparse.Namespace,
    pretrained: Pretrained,
    source: Source,
    budgets: Sequence[int],
    ranks: Ranks,
) -> Embedded:
    return embed_source(pretrained, source, budgets, ranks, workers=args.workers)


def _zeroshot(args: argparse.Namespace, ranks: Ranks) -> None:
    pretrained, budgets = _load(args, ranks)
    source, folders = open_labelled(args.data)
    names = zeroshot.load_classnames(args.classnames, folders)
    templates = zeroshot.load_templates(args.templates)
    data = _embed(args, pretrained, source, budgets, ranks)
    if ranks.is_first:
        result = zeroshot.judge(pretrained, data, names, templates)
        _write(args.output, {"model": str(args.model), "data": args.data, **result})
        print(zeroshot_table(result))


def _retrieval(args: argparse.Namespace, ranks: Ranks) -> None:
    pretrained, budgets = _load(args, ranks)
    source = open_captioned(args.data, args.images, args.captions, args.fields, args.split)
    data = _embed(args, pretrained, source, budgets, ranks)
    if ranks.is_first:
        texts_TD, owner_T = retrieval.embed_captions(pretrained, data)
        result = retrieval.judge(pretrained, data, texts_TD, owner_T)
        where = args.data or args.captions
        _write(args.output, {"model": str(args.model), "data": where, **result})
        print(retrieval_table(result))
        if args.gallery is not None:
            images_ED = data.embeddings[pretrained.preprocess.max_tokens]
            draw_gallery(data, images_ED, texts_TD, owner_T, source, args.gallery)
            print(f"Picture: {args.gallery}")


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    main()
