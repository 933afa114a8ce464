"""The training loop: batches in, steps, reports, checkpoints, an exported model at the end.

Ties the parts together and holds nothing of its own: the task from `navit_clip.tasks`, data from
`navit_clip.data.loader`, the step from `step`, state on disk through `navit_clip.checkpoints`,
metrics through `metrics`, and evaluations from `evaluation`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from navit_clip.checkpoints.checkpoint import Checkpoints
from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Mixture
from navit_clip.data.state import DataState, open_state
from navit_clip.data.workers import explain_killed_workers
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.files import writing
from navit_clip.packed.batch import Batch
from navit_clip.tasks.base import Task
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.training.config import TrainConfig, write_config
from navit_clip.training.evaluation import Evaluations
from navit_clip.training.metrics import Interval, MetricsLog, Progress, SkipReport
from navit_clip.training.mfu import FlopsMeter
from navit_clip.training.nonfinite import NonFiniteError, NonFiniteGuard
from navit_clip.training.sample_log import SampleLog
from navit_clip.training.signals import StopSignal
from navit_clip.training.starting_weights import keep_tokenizer, starting_point
from navit_clip.training.step import Stepper, StepResult
from navit_clip.training.watchdog import Watchdog

_KILLED_WORKERS = (
    "lower data.workers, data.prefetch or data.shuffle_buffer; the same command continues from the "
    "last checkpoint"
)


def train(config: TrainConfig, resolved: str, ranks: Ranks) -> None:
    """Runs or continues a run to its end.

    Args:
        config: The run.
        resolved: Its configuration as YAML, with every default spelt out.
        ranks: This process among all of them.

    Raises:
        UserError: For anything the user can fix; nothing already written is lost.
    """
    run_dir = Path(config.run_dir)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint, ranks)
    start = checkpoints.newest(report=partial(print, flush=True)) or 0
    torch.manual_seed(config.seed)
    task = config.task.build(config.data)
    model, tokenizer = starting_point(task, config.init, config.tokenizer, run_dir, begun=start > 0)
    build = task.build_samples(tokenizer, config.seed)
    evaluations = Evaluations(
        config.eval,
        run_dir,
        config.steps,
        config.precision,
        task,
        tokenizer,
        ranks,
    )
    stepper = build_stepper(config, task, model, ranks)
    saved: Sequence[DataState] = []
    if start:
        state = stepper.state()
        saved = checkpoints.load(start, state)
        stepper.load_state(state)
    mixture = Mixture.find(config.data)
    data_state = open_state(
        saved,
        mixture,
        config.seed,
        workers=config.data.workers,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    # Only now: a command that was refused leaves the directory as it was.
    _begin(run_dir, resolved, task, tokenizer, ranks)
    reports = _Reports.open(config, resolved, ranks, start)
    try:
        parameters = sum(p.numel() for p in model.parameters())
        reports.progress.log(
            f"{parameters / 1e6:.1f}M parameters, {ranks.world_size} rank(s) on {ranks.device}, "
            f"{config.precision}, {reports.meter.describe()}, "
            + (f"continuing from step {start}" if start else "from step 0")
        )
        with explain_killed_workers(_KILLED_WORKERS), reports.watchdog.watching():
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
                    state=data_state,
                    pin_memory=ranks.device.type == "cuda",
                )
                interval = Interval(build.streams, [dataset.name for dataset in mixture.datasets])
                _loop(
                    config,
                    stepper,
                    batches,
                    checkpoints,
                    evaluations,
                    data_state,
                    start,
                    interval,
                    reports,
                )
            reports.watchdog.heartbeat("the export of the model", slow=True)
            weights = stepper.host_weights()
        if weights is not None:
            task.export(weights, tokenizer).save_pretrained(run_dir / "model")
            task.write_card(run_dir / "model", run_dir)
            reports.progress.log(f"model written to {run_dir / 'model'}")
    finally:
        checkpoints.close()
        reports.close()


def build_stepper(config: TrainConfig, task: Task, model: torch.nn.Module, ranks: Ranks) -> Stepper:
    """The stepper of a run, its model moved to the ranks' device."""
    return Stepper(
        task,
        model.to(ranks.device),
        ranks,
        steps=config.steps,
        optim=config.optim,
        parallel=config.parallel,
        ema=config.ema,
        guard=NonFiniteGuard(config.on_nonfinite, config.max_skipped_in_row),
        precision=config.precision,
    )


def _begin(
    run_dir: Path, resolved: str, task: Task, tokenizer: Tokenizer | None, ranks: Ranks
) -> None:
    """Writes into the run directory what its checkpoints need to be read."""
    keep_tokenizer(tokenizer, run_dir, ranks)
    if ranks.is_first:
        write_config(run_dir, resolved)
        with writing(run_dir):
            task.describe(run_dir)
    ranks.barrier()


@dataclass(frozen=True)
class _Reports:
    """Where a run reports to; the log on rank 0 only."""

    progress: Progress
    log: MetricsLog | None
    samples: SampleLog | None
    watchdog: Watchdog
    meter: FlopsMeter

    @classmethod
    def open(cls, config: TrainConfig, resolved: str, ranks: Ranks, start: int) -> _Reports:
        run_dir = Path(config.run_dir)
        values: dict[str, Any] = yaml.safe_load(resolved)
        return cls(
            Progress(config.steps, start, visible=ranks.is_first),
            MetricsLog(run_dir, config.log, values, start) if ranks.is_first else None,
            SampleLog(run_dir, ranks.rank, start) if config.log.samples else None,
            Watchdog(run_dir, ranks.rank, config.stall_timeout_s),
            FlopsMeter(config.precision, ranks),
        )

    def close(self) -> None:
        self.progress.close()
        for file in (self.log, self.samples):
            if file is not None:
                file.close()


def _loop(
    config: TrainConfig,
    stepper: Stepper,
    batches: Iterator[Batch[Any]],
    checkpoints: Checkpoints,
    evaluations: Evaluations,
    data_state: DataState,
    start: int,
    interval: Interval,
    reports: _Reports,
) -> None:
    run_dir, ranks = Path(config.run_dir), stepper.ranks
    progress, watchdog = reports.progress, reports.watchdog
    skips, stop = SkipReport(), StopSignal()
    with stop.listening():
        for step in range(start, config.steps):
            # The first one compiles, and waits for the readers to start.
            watchdog.heartbeat(f"step {step + 1}", slow=step == start)
            taken: list[Batch[Any]] = []
            for _ in range(config.accumulate):
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                taken.append(batch)
                interval.add(batch, waited, stepper.task.flops(batch.inputs))
            interval.steps += 1
            done = step + 1
            logged = done % config.log.every_steps == 0 or done == config.steps
            result = _step(stepper, taken, step, checkpoints, run_dir, measure=logged)
            if result.nonfinite is not None:
                progress.log(f"skipped a step: {result.nonfinite}")
                if ranks.is_first:
                    result.nonfinite.record(run_dir)
            for batch in taken:
                data_state.advance(batch)
                for line in skips.lines(batch):
                    progress.log(line)
            progress.advance()
            if reports.samples is not None:
                reports.samples.write(done, taken)
            if logged:
                rates = interval.rates(ranks)
                values: dict[str, float] = {
                    "step": done,
                    "loss": result.loss,
                    "lr": result.lr,
                    **result.metrics,
                    "grad_norm": result.grad_norm,
                    **result.measured,
                    "skipped_steps": stepper.guard.skipped_steps,
                    **rates,
                    **reports.meter.metrics(rates["model_flops_per_s"]),
                }
                interval = Interval(interval.streams, interval.datasets)
                if reports.log is not None:
                    reports.log.write(values)
                progress.show(values)
            # A checkpoint that failed stops the run now, not at the next one: saving says why.
            stopping = ranks.any(stop.received or checkpoints.failed)
            if done % config.checkpoint.every_steps == 0 or done == config.steps or stopping:
                watchdog.heartbeat(f"the checkpoint of step {done}", slow=True)
                checkpoints.save(done, stepper.state(), data_state)
            if stopping and done < config.steps:
                checkpoints.wait()
                progress.log(f"stopped at step {done}; the same command continues from there")
                raise SystemExit(0)
            # After the checkpoint, which is written meanwhile and is there if anything goes wrong.
            with interval.paused():
                _evaluate(evaluations, evaluations.due(done), done, stepper, reports)
        checkpoints.wait()


def _evaluate(
    evaluations: Evaluations, names: list[str], step: int, stepper: Stepper, reports: _Reports
) -> None:
    for result in evaluations.run(names, step, stepper, reports.watchdog):
        if reports.log is not None:
            reports.log.write(result.values)
        reports.progress.log(result.line)


def _step(
    stepper: Stepper,
    batches: Sequence[Batch[Any]],
    step: int,
    checkpoints: Checkpoints,
    run_dir: Path,
    *,
    measure: bool,
) -> StepResult:
    """One step on batches still on the host; a non-finite one may end the run in one line."""
    ranks = stepper.ranks
    try:
        return stepper.step(
            [batch.to(ranks.device, non_blocking=True) for batch in batches], step, measure=measure
        )
    except NonFiniteError as error:
        if ranks.is_first:
            error.found.record(run_dir)
        checkpoints.wait()  # else the last good one may not be visible yet
        raise UserError(
            f"{error}; last good checkpoint: {checkpoints.latest() or 'none'}; lower "
            "optim.lr or look at these examples"
        ) from error
