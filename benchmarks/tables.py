"""Writes RESULTS.md: ``python -m benchmarks.tables``, after the measurements of ``make bench``.

One section a benchmark: its command, tables, and what made them. Sections of benchmarks whose JSON
file is there are written anew, others stay as they are, so that one benchmark can be run alone.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, read_results
from navit_clip.errors import UserError, one_line_errors
from navit_clip.files import atomic_write

PAGE = Path(__file__).with_name("RESULTS.md")
Result = dict[str, Any]

_WAYS = {
    "navit_clip": "navit-clip",
    "navit_clip_compiled": "navit-clip, compiled",
    "navit_clip_drop50": "navit-clip, half of the patches dropped",
    "navit_clip_bf16": "navit-clip, bfloat16",
    "open_clip": "open_clip",
    "timm_naflex": "timm NaFlexViT",
    "vit_pytorch": "vit-pytorch NaViT",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, figures to the right of a first column of names."""
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, align, *rows))


def _entries(result: Result, part: str, ratios: dict[str, str]) -> str:
    """Ways of training side by side; `ratios` names the field of each peer's ratio."""
    rows = []
    for way, name in _WAYS.items():
        suffix = way.partition("_compiled")
        entry = result.get(f"{suffix[0]}{part}{suffix[1]}")
        if entry is None:
            continue
        field = ratios.get(way)
        rows.append(
            [
                name,
                f"{entry['pairs_per_s']:.2f}",
                f"{result[field]:.2f}×" if field else "",
                f"{entry['real_tokens_per_s']:,.0f}",
                f"{entry['flops_per_pair'] / 1e9:.1f}",
                f"{entry['peak_share']:.2f}",
                f"{entry['peak_mb']:,.0f}",
                f"{entry['kb_per_token']:,.0f}",
            ]
        )
    head = ["", "pairs/s", "ours is", "real tokens/s", "GFLOP/pair", "of peak", "MB", "kB/token"]
    return table(head, rows)


def _course(result: Result) -> str:
    ours = result.get("navit_clip") or result["navit_clip_image"]
    return (
        f"{result['size']}, {result['precision']}, {result['pairs']} pairs a step, "
        f"{ours['image_tokens_per_pair']:.0f} patches and {ours['text_tokens_per_pair']:.1f} "
        f"caption tokens a pair before drop, {result['rounds']} rounds."
    )


def _step(result: Result) -> str:
    ratios = {"open_clip": "ratio_open_clip"}
    ratios |= {peer: f"ratio_step_{peer}" for peer in ("timm_naflex", "vit_pytorch")}
    towers = {peer: f"ratio_{peer}" for peer in ("timm_naflex", "vit_pytorch")}
    parts = [_course(result)]
    if "navit_clip" in result:
        parts.append("A whole step: both towers, loss, backward pass, AdamW.")
        parts.append(_entries(result, "", ratios))
    if "navit_clip_image" in result:
        parts.append("The image tower alone, forward and backward, on equal patches.")
        parts.append(_entries(result, "_image", towers))
    facts = [f"share of the peak {result['peak_share']:.3f}"]
    if "ratio_open_clip_drop50" in result:
        facts.append(
            f"with half of the patches dropped {result['ratio_open_clip_drop50']:.2f}× open_clip"
        )
    if "ratio_bf16" in result:
        facts.append(f"bfloat16 {result['ratio_bf16']:.2f}× float32")
    parts.append("navit-clip: " + "; ".join(facts) + ".")
    return "\n\n".join(parts)


def _towers(result: Result) -> str:
    parts = [_course(result)]
    for part in ("image", "text"):
        ratios = {way: field for way in _WAYS if (field := f"ratio_{way}_{part}") in result}
        parts += [f"The {part} tower:", _entries(result, f"_{part}", ratios)]
    if "ratio_compile_image" in result:
        parts.append(
            f"Compiled block by block: {result['ratio_compile_image']:.2f}× the speed of the same "
            f"image tower uncompiled, {result['ratio_compile_text']:.2f}× of the text tower's."
        )
    return "\n\n".join(parts)


def _sweep(result: Result) -> str:
    rows = []
    for name in ("image_side", "stream", "pairs", "caption"):
        curve = result[name]
        points = [f"{point['x']:,}: {point['ms_per_gflop']:.2f}" for point in curve["points"]]
        rows.append([name, ", ".join(points), f"{curve['max_over_min']:.2f}"])
    head = ["what grows", "milliseconds per GFLOP at each size", "max/min"]
    return f"{result['size']}, {result['precision']}; 1.00 is exactly linear.\n\n" + table(
        head, rows
    )


def _end_to_end(result: Result) -> str:
    rows = [
        [
            _WAYS[way],
            f"{result[way]['pairs_per_s']:.2f}",
            f"{result[way]['data_wait']:.1%}",
            f"{result[way]['seconds']:.0f}",
        ]
        for way in ("navit_clip", "open_clip")
    ]
    return (
        f"{result['size']}, {result['precision']}, {result['steps']} steps of {result['pairs']} "
        f"pairs, one data worker, {result['rounds']} rounds.\n\n"
        + table(["trainer", "pairs/s", "waited for data", "whole command, s"], rows)
        + f"\n\n{result['ratio_open_clip']:.2f}× open_clip's pairs per second, "
        f"{result['ratio_whole_command']:.2f}× counting start and checkpoint; padding "
        f"{result['padding']:.1%}."
    )


def _attention(result: Result) -> str:
    seconds = result["seconds"]
    rows = [
        [name, f"{value * 1e3:.1f}", f"{value / seconds['packed']:.2f}×"]
        for name, value in seconds.items()
    ]
    return (
        f"{result['segments']} images, {result['tokens']:,} tokens, {result['precision']}, forward "
        "and backward.\n\n" + table(["", "ms", "times packed"], rows)
    )


def _loss(result: Result) -> str:
    rows = []
    for pairs, fields in result.items():
        if not pairs.isdigit():
            continue
        variants = {
            "1": fields,
            "2": fields.get("two_ranks"),
            "4": fields.get("four_ranks"),
            "1, bf16": fields.get("bfloat16"),
        }
        for ranks, found in variants.items():
            if found and "seconds" in found:
                rows.append([f"{int(pairs):,}", ranks, *_loss_row(found)])
    head = ["pairs", "ranks", "s", "`ClipLoss`, s", "time ratio", "extra MB", "`ClipLoss`, MB"]
    return (
        f"Forward and backward, D = {result['width']}. open_clip's `ClipLoss` with `local_loss`; "
        "extra memory is the peak above the features, the largest of the passes.\n\n"
        + table([*head, "memory ratio"], rows)
    )


def _loss_row(found: Result) -> list[str]:
    peer = found["peers"].get("local")
    beaten = isinstance(peer, dict)
    none = "cannot" if peer or "peer_not_run" in found else "–"
    return [
        f"{found['seconds']:.2f}",
        f"{peer['seconds']:.2f}" if beaten else none,
        f"{found['time_ratio']:.2f}" if beaten else "–",
        f"{found['extra_mb']:,.0f}",
        f"{peer['extra_mb']:,.0f}" if beaten else none,
        f"{found['memory_ratio']:.3f}" if beaten else "–",
    ]


def _evaluation(result: Result) -> str:
    prompts = result["prompts_seconds"]
    rows = [
        [
            f"{result['prompts']} prompts of {result['mean_prompt_tokens']:.1f} tokens on average",
            f"{prompts['packed']:.1f}",
            f"{prompts['open_clip']:.1f}",
            f"{result['ratio_prompts']:.2f}×",
        ]
    ]
    for budget, tokens in result.get("mean_image_tokens", {}).items():
        seconds = result["images_seconds"]
        rows.append(
            [
                f"{result['images']} images of at most {budget} tokens, {tokens:.0f} on average",
                f"{seconds[f'packed_{budget}']:.1f}",
                f"{seconds['open_clip']:.1f}",
                f"{result[f'ratio_images_{budget}']:.2f}×",
            ]
        )
    return (
        f"Towers of {result['towers']} widths with random weights, decoding included, beside "
        f"open_clip's own transform ({result['square']} px squares) and classifier (77 slots), "
        f"median of {result['rounds']}.\n\n"
        + table(["work", "packed, s", "open_clip, s", "ours is"], rows)
    )


def _loader(result: Result) -> str:
    names = {
        "ours": "this pipeline, to packed patches",
        "open_clip": "open_clip's webdataset pipeline, 224 px",
        "pil": "this pipeline with Pillow's full decode and resize",
    }
    rows = []
    for name, text in names.items():
        ratio = result.get(f"ratio_{name}")
        rate = f"{result[f'{name}_images_per_s']:,.0f}"
        rows.append([text, rate, f"{ratio:.2f}×" if ratio else ""])
    return (
        f"{result['images']:,} photos, side ~ U{tuple(result['sides'])}, patches of "
        f"{result['patch']} px, one core, CPU time, median of {result['rounds']}.\n\n"
        + table(["loader", "images/s", "ours is"], rows)
    )


def _loader_memory(result: Result) -> str:
    return (
        f"Resident memory of a reader grew by {result['growth_mb']} MB from sample "
        f"{result['from_samples']:,} to {result['samples'][-1]:,}."
    )


def _packing(result: Result) -> str:
    without, dropped = result["no_drop"], result["beta_drop"]
    greedy = without["greedy"]
    fields = {
        "image padding": "image_padding",
        "text padding": "text_padding",
        "variation of pairs": "pairs_cv",
        "patches cut": "image_tokens_cut",
    }

    def cell(way: str, field: str) -> str:
        if field not in without[way]:
            return "–"
        return f"{without[way][field]:.2%} / {dropped[way][field]:.2%}"

    rows = [
        [way.replace("_", " "), *(cell(way, field) for field in fields.values())] for way in without
    ]
    return (
        f"{result['pairs']:,} pairs of real sizes and captions, {greedy['image_budget']:,} image "
        f"tokens and the text budget that matches, {greedy['look_ahead']} pairs ahead, "
        f"{result['us_per_pair']:.0f} µs a pair.\n\n"
        + table(["no drop / Beta drop 0.53", *fields], rows)
    )


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "step": ("One training step", _step),
    "towers": ("Towers alone", _towers),
    "end_to_end": ("From shards to weights", _end_to_end),
    "sweep": ("Cost as sizes grow", _sweep),
    "attention": ("Attention", _attention),
    "loss": ("Loss", _loss),
    "evaluation": ("Evaluation", _evaluation),
    "loader": ("Loader", _loader),
    "loader_memory": ("Memory of the loader", _loader_memory),
    "packing": ("Packing", _packing),
}


def section(name: str, result: Result) -> str:
    """One section, its heading included.

    Raises:
        UserError: If the result lacks what its benchmark writes.
    """
    title, render = SECTIONS[name]
    try:
        body, made = render(result), result["made"]
        versions = ", ".join(f"{lib} {version}" for lib, version in made["versions"].items())
        source = (
            f"`{made['command']}` at {made['commit']}; {made['machine']}, threads: "
            f"{made['threads']}; {versions}."
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}'s result lacks {error}: run the benchmark again") from error
    return f"## {title}\n\n{body}\n\n{source}\n"


def rewrite(page: str, results: dict[str, Result]) -> str:
    """The page with the sections of these results in place of those that it has.

    Args:
        page: Markdown; what stands before the first section stays.
        results: By benchmark.
    """
    head, *old = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    found = {text.partition("\n")[0].removeprefix("## "): text for text in old}
    new = {SECTIONS[name][0]: section(name, result) for name, result in results.items()}
    merged = {**found, **new}
    order = [title for title, _ in SECTIONS.values() if title in merged]
    order += [title for title in merged if title not in order]
    return "\n".join(text.strip("\n") + "\n" for text in (head, *(merged[t] for t in order)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--output", type=Path, default=PAGE, help="Markdown page to rewrite")
    args = parser.parse_args()
    with one_line_errors("benchmarks.tables"):
        results = read_results(args.results, tuple(SECTIONS))
        page = args.output.read_text() if args.output.is_file() else "# Results\n"
        atomic_write(args.output, rewrite(page, results))


if __name__ == "__main__":
    main()
