"""The training loop: batches in, steps, reports, checkpoints, an exported model at the end.

Ties the parts together and holds nothing of its own: data from `navit_clip.data.loader`, the step
from `navit_clip.training.step`, state on disk through `navit_clip.checkpoints.checkpoint`, figures
through `navit_clip.training.metrics`, and results from `navit_clip.training.evaluation`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from navit_clip.checkpoints.checkpoint import Checkpoints
from navit_clip.data.builders.pairs import PairBuilder, PairInputs
from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Mixture
from navit_clip.data.sizing import default_max_tokens
from navit_clip.data.state import LoaderPosition, open_position
from navit_clip.data.workers import telling_of_killed_workers
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.export.card import write_card
from navit_clip.export.pretrained import save_pretrained
from navit_clip.inference.preprocess import Preprocess
from navit_clip.packed.batch import Batch
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.training.config import TrainConfig
from navit_clip.training.evaluation import Evaluations
from navit_clip.training.metrics import MetricsLog, Progress, SkipReport, Window
from navit_clip.training.mfu import Accounting
from navit_clip.training.nonfinite import NonFiniteError
from navit_clip.training.sample_log import PairLog
from navit_clip.training.starting_weights import starting_point
from navit_clip.training.step import Stepper, StepResult
from navit_clip.training.watchdog import StallWatch


def build_pair_builder(config: TrainConfig, tokenizer: Tokenizer) -> PairBuilder:
    """What makes training pairs of samples, for a run's configuration.

    Raises:
        UserError: If the tokenizer has more ids than the model embeds.
    """
    text = config.model.text
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but model.text.vocab_size="
            f"{text.vocab_size}: raise it"
        )
    return PairBuilder(
        config.data.captions,
        config.data.resolution,
        config.data.drop,
        tokenizer,
        text.context_length,
        config.model.image.patch_size,
        config.model.image.position.max_grid_side,
        config.seed,
    )


def train(config: TrainConfig, resolved: dict[str, Any], ranks: Ranks) -> None:
    """Runs or continues a run to its end.

    Args:
        config: The run.
        resolved: Its configuration as plain values, for the dashboard.
        ranks: This process among all of them.

    Raises:
        UserError: For anything the user can mend; nothing already written is lost.
    """
    run_dir = Path(config.run_dir)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint, ranks)
    start = checkpoints.newest(report=partial(print, flush=True)) or 0
    torch.manual_seed(config.seed)
    model, tokenizer = starting_point(config, ranks, begun=start > 0)
    build = build_pair_builder(config, tokenizer)
    evaluations = Evaluations(config, tokenizer, preprocess_for(config), ranks)
    stepper = Stepper(model.to(ranks.device), config, ranks)
    saved: Sequence[LoaderPosition] = []
    if start:
        state = stepper.state()
        saved = checkpoints.load(start, state)
        stepper.load_state(state)
    mixture = Mixture.find(config.data)
    position = open_position(
        saved,
        mixture,
        config.seed,
        workers=config.data.workers,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    reports = _Reports.open(config, resolved, ranks, start)
    try:
        parameters = sum(p.numel() for p in model.parameters())
        reports.progress.say(
            f"{parameters / 1e6:.1f}M parameters, {ranks.world_size} rank(s) on {ranks.device}, "
            f"{config.precision}, {reports.account.describe()}, "
            + (f"continuing from step {start}" if start else "from step 0")
        )
        with reports.watch.watching():
            # A run killed between a checkpoint and its evaluation makes up for that here.
            logged = reports.log.resumed if reports.log is not None else set()
            due = evaluations.due(start, ranks.broadcast(logged)) if start else []
            _evaluate(evaluations, due, start, stepper, reports)
            if start < config.steps:
                batches = load_batches(
                    build,
                    config.data,
                    config.seed,
                    mixture=mixture,
                    rank=ranks.rank,
                    world_size=ranks.world_size,
                    position=position,
                    pin_memory=ranks.device.type == "cuda",
                )
                window = Window(build.streams, [dataset.name for dataset in mixture.datasets])
                with telling_of_killed_workers(
                    "lower data.workers, data.prefetch or data.shuffle_buffer; the same command "
                    "continues from the last checkpoint"
                ):
                    _loop(
                        stepper, batches, checkpoints, evaluations, position, start, window, reports
                    )
            reports.watch.begin("the export of the model", slow=True)
            exported = stepper.export()
        if exported is not None:
            save_pretrained(run_dir / "model", exported, tokenizer, preprocess_for(config))
            write_card(run_dir / "model", run_dir)
            reports.progress.say(f"model written to {run_dir / 'model'}")
    finally:
        checkpoints.close()
        reports.close()


def preprocess_for(config: TrainConfig) -> Preprocess:
    """How the trained model wants its images: as large as the largest of training."""
    resolution = config.data.resolution
    return Preprocess(
        default_max_tokens(resolution, config.model.image.patch_size),
        square=resolution.mode == "square",
    )


@dataclass(frozen=True)
class _Reports:
    """Where a run says how it is going; the log on the first rank only."""

    progress: Progress
    log: MetricsLog | None
    pairs: PairLog | None
    watch: StallWatch
    account: Accounting

    @classmethod
    def open(
        cls, config: TrainConfig, resolved: dict[str, Any], ranks: Ranks, start: int
    ) -> _Reports:
        run_dir = Path(config.run_dir)
        return cls(
            Progress(config.steps, start, visible=ranks.is_first),
            MetricsLog(run_dir, config.log, resolved, start) if ranks.is_first else None,
            PairLog(run_dir, ranks.rank, start) if config.log.pairs else None,
            StallWatch(run_dir, ranks.rank, config.stall_timeout_s),
            Accounting(config.model, config.lock, config.precision, ranks),
        )

    def close(self) -> None:
        self.progress.close()
        for file in (self.log, self.pairs):
            if file is not None:
                file.close()


def _loop(
    stepper: Stepper,
    batches: Iterator[Batch[PairInputs]],
    checkpoints: Checkpoints,
    evaluations: Evaluations,
    position: LoaderPosition,
    start: int,
    window: Window,
    reports: _Reports,
) -> None:
    config, ranks = stepper.config, stepper.ranks
    progress, watch = reports.progress, reports.watch
    skips, stop = SkipReport(), StopSignal()
    with stop.listening():
        for step in range(start, config.steps):
            # The first one compiles, and waits for the readers to start.
            watch.begin(f"step {step + 1}", slow=step == start)
            taken: list[Batch[PairInputs]] = []
            for _ in range(config.accumulate):
                asked = time.perf_counter()
                taken.append(next(batches))
                waited = time.perf_counter() - asked
                window.add(taken[-1], waited, reports.account.flops(taken[-1]))
            window.steps += 1
            done = step + 1
            logged = done % config.log.every_steps == 0 or done == config.steps
            result = _step(stepper, taken, step, checkpoints, measure=logged)
            if result.nonfinite is not None:
                progress.say(f"skipped a step: {result.nonfinite}")
                if ranks.is_first:
                    result.nonfinite.record(Path(config.run_dir))
            for batch in taken:
                position.advance(batch)
                for line in skips.lines(batch):
                    progress.say(line)
            progress.advance()
            if reports.pairs is not None:
                reports.pairs.write(done, taken)
            if logged:
                rates = window.rates(ranks)
                values: dict[str, float] = {
                    "step": done,
                    "loss": result.loss,
                    "lr": result.lr,
                    "logit_scale": result.logit_scale,
                    "grad_norm": result.grad_norm,
                    **result.measured,
                    "skipped_steps": stepper.guard.skipped_steps,
                    **rates,
                    **reports.account.figures(rates["model_flops_per_s"]),
                }
                window = Window(window.streams, window.sources)
                if reports.log is not None:
                    reports.log.write(values)
                progress.show(values)
            # A checkpoint that failed stops the run now, not at the next one: saving says why.
            stopping = ranks.any(stop.received or checkpoints.failed)
            if done % config.checkpoint.every_steps == 0 or done == config.steps or stopping:
                watch.begin(f"the checkpoint of step {done}", slow=True)
                checkpoints.save(done, stepper.state(), position)
            if stopping and done < config.steps:
                checkpoints.wait()
                progress.say(f"stopped at step {done}; the same command continues from there")
                raise SystemExit(0)
            # After the checkpoint, which is written meanwhile and is there if anything goes wrong.
            with window.paused():
                _evaluate(evaluations, evaluations.due(done), done, stepper, reports)
        checkpoints.wait()


def _evaluate(
    evaluations: Evaluations, names: list[str], step: int, stepper: Stepper, reports: _Reports
) -> None:
    for finding in evaluations.run(names, step, stepper, reports.watch):
        if reports.log is not None:
            reports.log.write(finding.values)
        reports.progress.say(finding.line)


def _step(
    stepper: Stepper,
    batches: Sequence[Batch[PairInputs]],
    step: int,
    checkpoints: Checkpoints,
    *,
    measure: bool,
) -> StepResult:
    """One step on batches still on the host; a number that is none ends the run in one line."""
    ranks = stepper.ranks
    try:
        return stepper.step(
            [batch.to(ranks.device, non_blocking=True) for batch in batches], step, measure=measure
        )
    except NonFiniteError as error:
        if ranks.is_first:
            error.found.record(Path(stepper.config.run_dir))
        checkpoints.wait()  # else the last good one may not be visible yet
        raise UserError(
            f"{error}; last good checkpoint: {checkpoints.latest() or 'none'}; lower "
            "optim.lr or look at these pairs"
        ) from error


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that the loop can save before it ends."""

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches both signals inside; a second SIGINT interrupts at once."""
        previous = {sig: signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGINT)}

        def remember(number: int, frame: FrameType | None) -> None:
            self.received = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        for sig in previous:
            signal.signal(sig, remember)
        try:
            yield
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)
