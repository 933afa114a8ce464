"""Writes the page of a study, its tables and plot, from the results of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from navit_clip.errors import UserError
from navit_clip.evaluation.report.drawing import COLOURS, save_figure
from navit_clip.evaluation.results import BREAKDOWNS
from navit_clip.files import write_output
from studies.compare import DRAWS, Curves, Estimate, Result, by_group, hits, last
from studies.runs import best_lr, read_result, validated
from studies.study import Run, Study, trials

_COLUMNS = 3  # of panels
_LINES = ("o-", "s--", "^:")  # of arms, each in all colours

_Results = Mapping[str, Sequence[Result]]
_Curves = Mapping[tuple[str, str], Curves]


def write_report(study: Study, name: str, out: Path, docs: Path) -> Path:
    """Writes ``NAME.md``, which is returned, and ``NAME.png``.

    Raises:
        UserError: If the baseline or all other arms have not been run with any seed.
    """
    results, missing = _finished(study, out)
    some = results[study.baseline][0]
    tests = [(test, way) for test in study.tests for way in last(some, test)["image_of"]]
    curves = {pair: Curves(results, *pair, study.right_within) for pair in tests}
    lines = [f"# {study.title}", "", *_findings(study, results, curves), study.question, ""]
    if missing:
        lines += [f"Not done yet: {', '.join(missing)}.", ""]
    lines += [*_arms(study, results, curves), f"![Accuracy over training compute]({name}.png)", ""]
    lines += [
        *_breakdowns(study, results, curves),
        *_rates(study, results, out),
        *_made(study, name, results),
    ]
    _draw(curves, docs / f"{name}.png")
    page = docs / f"{name}.md"
    write_output(page, "\n".join(lines))
    return page


def _finished(study: Study, out: Path) -> tuple[_Results, list[str]]:
    """Results of the arms whose learning rate is chosen, and the runs that are missing."""
    missing = [run for run in trials(study) if read_result(study, run, out) is None]
    results = {}
    for arm in study.arms:
        if arm not in {run.arm for run in missing}:
            runs = [Run(arm, best_lr(study, arm, out), seed) for seed in study.seeds]
            found = [read_result(study, run, out) for run in runs]
            results[arm] = [result for result in found if result is not None]
            missing += [run for run, one in zip(runs, found, strict=True) if one is None]
    names = [run.name for run in missing]
    if study.baseline not in results or len(results) < 2:
        raise UserError(f"too few runs are done to compare: {', '.join(names)} are missing")
    return results, names


def _findings(study: Study, results: _Results, curves: _Curves) -> Iterator[str]:
    base = study.baseline
    for (test, way), one in curves.items():
        needed = {a: one.compute_to_reach(a, base) for a in results if a != base}
        arm = min(needed, key=lambda name: needed[name].value)
        images = _mean(results[arm], "images") / _mean(results[base], "images")
        yield (
            f"On {test} ({way}) `{arm}` needs {_times(needed[arm])} of the compute that `{base}` "
            f"takes to its best, and sees {images:.2f} times as many images with the whole budget."
        )
    yield ""


def _arms(study: Study, results: _Results, curves: _Curves) -> Iterator[str]:
    base = study.baseline
    yield "## At equal compute\n"
    yield (
        "Mean of the seeds, each arm at the setting it was trained for, with 95% intervals over "
        "seeds and test images (of one seed, over images alone) but not over the choice of the "
        f"learning rate; right is within {study.right_within}. Differences are of the seeds that "
        "both arms have, and how much they vary with the seed is estimated over all arms. "
        f"Compute is relative to that with which `{base}` reached its best, with "
        f"intervals of {DRAWS:,} draws of seeds and images; a dash says that an arm did not get "
        f"there. Less compute than at the first of {study.points} points cannot be shown; points "
        "before the end have a learning rate that has not fallen yet, which overstates it, if "
        "anything.\n"
    )
    heads = ["arm", "lr", "seeds", "images seen", "training FLOPs", "minutes"]
    rows = [
        [arm, f"{runs[0]['lr']:g}", str(len(runs)), f"{_mean(runs, 'images'):,.0f}",
         f"{_mean(runs, 'flops'):.3g}", f"{_mean(runs, 'seconds') / 60:.1f}"]
        for arm, runs in results.items()
    ]  # fmt: skip
    yield from _table(heads, rows)
    for (test, way), one in curves.items():
        rows = [
            [
                arm,
                _percent(one.accuracy(arm)[-1]),
                "–" if arm == base else _points(one.gain(arm, base)),
                "1" if arm == base else _times(one.compute_to_reach(arm, base)),
            ]
            for arm in results
        ]
        yield from _table([f"{test}, {way}", "right", "difference", "compute"], rows)


def _breakdowns(study: Study, results: _Results, curves: _Curves) -> Iterator[str]:
    yield "## By setting, aspect ratio and size\n"
    yield (
        "A number is a token limit at native aspect ratio, 96px a square; in brackets the "
        f"difference to `{study.baseline}` in points, with its 95% interval.\n"
    )
    base = study.baseline
    for (test, way), one in curves.items():
        known = last(results[base][0], test)["ranks"]
        settings = {
            arm: {
                setting: f"{one.at(arm, setting).value:.1%}"
                + (f" ({_points(one.at(arm, setting, base))})" if arm != base else "")
                for setting in last(runs[0], test)["ranks"]
                if setting in known
            }
            for arm, runs in results.items()
        }
        yield from _compared(f"{test}, {way}", settings)
        for key, what in BREAKDOWNS.items():
            asked = test, way, study.right_within, key
            groups = {
                arm: {group: f"{value:.1%}" for group, value in by_group(runs, *asked).items()}
                for arm, runs in results.items()
            }
            yield from _compared(f"{test}, {way}, by {what}", groups)


def _rates(study: Study, results: _Results, out: Path) -> Iterator[str]:
    yield (
        f"## Learning rates\n\nSeed {study.seeds[0]} alone. Each arm has the rate that was best in "
        "the validation, the lowest of equal ones; at another one it may do better or worse on a "
        "test.\n"
    )
    shown: dict[str, dict[str, dict[str, str]]] = {}
    for run in trials(study):
        if (result := read_result(study, run, out)) is None:
            continue
        validations = study.validations if len(study.validations) > 1 else {}
        right = {"validation": validated(study, run, out)} | {
            f"{test}, {way}": hits(found, way, study.right_within).mean()
            for test in (*validations, *study.tests)
            for found in [last(result, test)]
            for way in found["image_of"]
        }
        for what, value in right.items():
            rates = shown.setdefault(what, {}).setdefault(run.arm, {})
            rates[f"{run.lr:g}"] = f"{value:.1%}"
    for what, rows in shown.items():
        yield from _compared(what, rows)
    edges = {f"{lr:g}" for lr in (min(study.lrs), max(study.lrs))}
    at_edge = [f"`{arm}`" for arm, runs in results.items() if f"{runs[0]['lr']:g}" in edges]
    if at_edge and len(study.lrs) > 1:
        yield f"The lowest or highest was best for {', '.join(at_edge)}: try others too.\n"


def _made(study: Study, name: str, results: _Results) -> Iterator[str]:
    made = [run["made"] for runs in results.values() for run in runs]
    facts = {
        "commits": {one["commit"] for one in made},
        "machines": {f"{one['machine']}, threads: {one['threads']}" for one in made},
        "torch": {one["versions"]["torch"] for one in made},
    }
    others = {run.get("study", name) for runs in results.values() for run in runs} - {name}
    yield "## How it was made\n"
    yield (
        f"`python -m studies run {name}`, then `report`; arms and recipe are in "
        f"[{name}.yaml](../../studies/{name}.yaml), {study.flops:.3g} training FLOPs a run, seeds "
        f"{', '.join(map(str, study.seeds))}. "
        + "; ".join(f"{what} {', '.join(sorted(values))}" for what, values in facts.items())
        + (f"; some runs are those of {', '.join(sorted(others))}" if others else "")
        + ".\n"
    )


def _draw(curves: _Curves, path: Path) -> None:
    columns = min(len(curves), _COLUMNS)
    rows = -(-len(curves) // columns)
    figure = Figure((4.2 * columns, 3.4 * rows), layout="constrained", dpi=120)
    styles = list(product(_LINES, COLOURS))
    panels = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for ((test, way), one), axes in zip(curves.items(), panels, strict=False):
        for (arm, xs), (line, colour) in zip(one.flops.items(), styles, strict=False):
            values, lows, highs = zip(*one.accuracy(arm), strict=True)
            axes.plot(xs, values, line, ms=3, color=colour, label=arm)
            axes.fill_between(xs, lows, highs, alpha=0.12, color=colour, lw=0)
        axes.set(xscale="log", title=f"{test}, {way}", xlabel="training FLOPs", ylabel="right")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0e}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    for unused in panels:
        unused.set_axis_off()
    lines, arms = axes.get_legend_handles_labels()
    figure.legend(lines, arms, fontsize=8, loc="outside lower center", ncols=2 * columns)
    save_figure(figure, path)


def _compared(head: str, found: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """A row for each arm of what is by setting, group or rate."""
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    rows = [[arm, *(values.get(name, "–") for name in names)] for arm, values in found.items()]
    yield from _table([head, *names], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + " --- |" + " ---: |" * (len(heads) - 1)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _mean(runs: Sequence[Result], what: str) -> float:
    return float(np.mean([run["points"][-1][what] for run in runs]))


def _percent(one: Estimate) -> str:
    return f"{one.value:.1%} ({one.low:.1%} to {one.high:.1%})"


def _points(one: Estimate) -> str:
    return f"{100 * one.value:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"


def _times(one: Estimate) -> str:
    value, low, high = (f"{x:.2f}" if np.isfinite(x) else "–" for x in one)
    return f"{value} ({low} to {high})"
