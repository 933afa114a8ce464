"""The training loop: batches in, steps, reports, checkpoints, an exported model at the end.

Ties the parts together and holds nothing of its own: the task from `navit_clip.tasks`, data from
`navit_clip.data.loader`, the step from `step`, state on disk through `navit_clip.checkpoints`,
metrics through `metrics`, and evaluations from `evaluation`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from navit_clip.checkpoints.checkpoint import Checkpoints
from navit_clip.checkpoints.folder import RUN_CONFIG, RUN_SHARDS, check_room
from navit_clip.checkpoints.lock import RunLock
from navit_clip.checkpoints.rank_state import SavedDataStates
from navit_clip.data.fingerprint import Fingerprint, look_at_shards
from navit_clip.data.listings import list_once
from navit_clip.data.loader import load_batches
from navit_clip.data.mixture import Mixture
from navit_clip.data.state import DataState, open_states
from navit_clip.data.waiting import WaitBoard
from navit_clip.data.workers import explain_killed_workers
from navit_clip.distributed import Ranks
from navit_clip.errors import StopAskedError, UserError
from navit_clip.packed.batch import Batch
from navit_clip.precision import choose_precision, slow_precision
from navit_clip.tasks.base import Task
from navit_clip.training.config import TrainConfig, count_epochs, name_precision
from navit_clip.training.evaluation import Evaluations
from navit_clip.training.history import check_changes, keep_config
from navit_clip.training.late import Uploads, reads_late
from navit_clip.training.metrics import Interval, Progress, SkipReport, StepLog
from navit_clip.training.mfu import FlopsMeter
from navit_clip.training.nonfinite import NonFiniteError, NonFiniteGuard
from navit_clip.training.reporter import Reporter
from navit_clip.training.signals import stop_signals
from navit_clip.training.starting_weights import starting_point
from navit_clip.training.step import PendingStep, Stepper
from navit_clip.training.validation import open_validation
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
    with (
        RunLock(run_dir, ranks) as lock,
        closing(Checkpoints(run_dir / "checkpoints", config.checkpoint, ranks)) as checkpoints,
    ):
        if checkpoints.mirror is not None:
            checkpoints.mirror.fetch()
        config, resolved = name_precision(config, resolved, ranks)
        config = replace(config, data=list_once(config.data, ranks))
        run = _Run(count_epochs(config, ranks), resolved, lock, checkpoints)
        try:
            with explain_killed_workers(_KILLED_WORKERS), run.watchdog.watching():
                run.begin()
                # Only now: a command that was refused leaves the directory as it was.
                run.open()
                run.catch_up()
                if not run.over:
                    run.loop()
                run.watchdog.heartbeat("the export of the model", slow=True)
                weights = run.stepper.host_weights()
            if weights is not None:
                model_dir = run.directory / "model"
                run.task.export(weights, run.tokenizer).save_pretrained(model_dir)
                run.task.write_card(model_dir, run.directory)
                run.reporter.exported(model_dir)
        finally:
            run.close()
        if checkpoints.mirror is not None:
            checkpoints.mirror.finish()


def build_stepper(config: TrainConfig, task: Task, model: torch.nn.Module, ranks: Ranks) -> Stepper:
    """The stepper of a run, its model moved to the ranks' device."""
    return Stepper(
        task,
        model.to(ranks.device),
        ranks,
        length=config.length,
        optim=config.optim,
        parallel=config.parallel,
        ema=config.ema,
        guard=NonFiniteGuard(config.on_nonfinite, config.max_skipped_in_row),
        precision=choose_precision(config.precision, ranks.device),
    )


class _Run:
    """The parts of a run, in the state of its newest checkpoint, and the loop that moves them."""

    def __init__(
        self, config: TrainConfig, resolved: str, lock: RunLock, checkpoints: Checkpoints
    ) -> None:
        self.config, self.resolved, self.directory = config, resolved, Path(config.run_dir)
        self.lock, self.checkpoints = lock, checkpoints
        ranks = self.ranks = lock.ranks
        self.start = self.checkpoints.newest() or 0
        checkpoint = self.checkpoints.path(self.start) if self.start else None
        self.changes, seen = list[str](), 0
        if checkpoint:
            seen = SavedDataStates(checkpoint, 1)[0].samples
            self.changes = check_changes(
                checkpoint / RUN_CONFIG, resolved, self.start, seen, config.length
            )
        self.over = config.length.is_over(self.start, seen)
        torch.manual_seed(config.seed)
        self.mixture = Mixture.find(config.data)
        self.task = config.task.build(config.data)
        model, self.tokenizer = starting_point(
            self.task, config.init, config.tokenizer, checkpoint, config.task.kept
        )
        torch.manual_seed(config.seed + ranks.rank)  # each draws its own in training
        self._pending: tuple[PendingStep, dict[str, float] | None] | None = None
        self.build = self.task.build_samples(self.tokenizer, config.seed)
        validation = open_validation(
            config.eval.validation,
            config.task,
            config.data,
            self.mixture,
            self.tokenizer,
            ranks,
        )
        shows = config.log.media_every_steps > 0
        self.evaluations = Evaluations(
            config.eval, self.directory, self.task, self.tokenizer, ranks, validation, shows=shows
        )
        self.stepper = build_stepper(config, self.task, model, ranks)
        saved: Sequence[DataState] = []
        if self.start:
            state = self.stepper.state()
            saved = self.checkpoints.load(self.start, state)
            self.stepper.load_state(state)
        self.data_state = open_states(
            saved, self.mixture, config.seed, workers=config.data.workers, ranks=ranks
        )
        self.shards: dict[str, Fingerprint] = {}
        self.checkpoints.describe = self._describe
        self.board = WaitBoard(max(1, config.data.workers))
        self.progress = Progress(config.length, self.start, seen, visible=ranks.is_first)
        self.reporter = Reporter(
            config.log, self.directory, self.task, self.tokenizer, self.progress, ranks
        )
        watched = self.board.lines, self.reporter.stalled
        self.watchdog = Watchdog(self.directory, ranks.rank, config.stall_timeout_s, *watched)
        self.samples: StepLog | None = None
        self.batches: Generator[Batch[Any], None, None] | None = None
        self.first: list[Batch[Any]] = []  # taken ahead of the first step

    def _describe(self, folder: Path) -> None:
        """Writes into a checkpoint what it takes to read it and to go on from it."""
        self.task.describe(folder)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        (folder / RUN_CONFIG).write_text(self.resolved)
        (folder / RUN_SHARDS).write_text(json.dumps(self.shards))

    def begin(self) -> None:
        """Reports, and waits for each rank's first batch: bad data refuses the command too."""
        config, ranks = self.config, self.ranks
        self.meter = FlopsMeter(self.stepper.precision, ranks)
        self.parameters = sum(p.numel() for p in self.stepper.model.parameters())
        self.progress.log(
            f"{self.parameters / 1e6:.1f}M parameters, {ranks.world_size} rank(s) on "
            f"{ranks.device}, {self.stepper.kernels}, {self.stepper.precision}, "
            f"{self.meter.describe()}, "
            + (f"continuing from step {self.start}" if self.start else "from step 0")
        )
        slow = slow_precision(self.stepper.precision, ranks.device)
        for remark in filter(None, (slow, config.data.drop.remark())):
            self.progress.log(remark)
        if self.changes:
            self.progress.log(f"changed since step {self.start}: {'; '.join(self.changes)}")
        if self.over:
            return
        self.watchdog.heartbeat("the first look at the shards", slow=True)
        before = self.checkpoints.path(self.start) / RUN_SHARDS if self.start else None
        self.shards = look_at_shards(self.mixture, before, ranks)
        self.watchdog.heartbeat("the first batch", slow=True)
        problem: UserError | None = None
        try:
            self.batches = load_batches(
                self.build,
                config.data,
                config.seed,
                mixture=self.mixture,
                rank=ranks.rank,
                world_size=ranks.world_size,
                state=self.data_state,
                pin_memory=ranks.device.type == "cuda",
                board=self.board,
            )
            shards = self.mixture.shards
            awaited = f"the first batch of {len(shards)} shard(s), such as {shards[0]}"
            with self.progress.waiting_for(awaited):
                self.first = [next(self.batches)]
        except UserError as error:
            problem = error
        ranks.raise_together(problem)
        if not self.start:
            ids = self.first[0].ids
            examples, different = map(int, ranks.sum([len(ids), len(set(ids))]))
            if different < examples:
                self.progress.log(
                    f"the first batch of {examples:,} samples has only {different:,} different "
                    "ones: the data is small for such batches; lower data.budget or data.workers"
                )
            per_step = examples * config.accumulate
            steps = config.length.expected_steps(1, per_step)
            if config.steps is None:
                self.progress.log(f"{config.length.total:,} samples are about {steps:,.0f} steps")
            if misfit := config.optim.schedule.misfit(steps, per_step):
                raise UserError(misfit)

    def open(self) -> None:
        """Writes what the run is read by, and opens all that it reports to."""
        config, ranks = self.config, self.ranks
        if ranks.is_first:
            self.checkpoints.tidy(self.progress.log)
            if self.start and not self.over:
                check_room(self.checkpoints.path(self.start))
            keep_config(self.directory, self.resolved, self.start)
        ranks.barrier()
        if config.log.samples:
            self.samples = StepLog(self.directory / f"samples-{ranks.rank}.jsonl", self.start)
        facts = {
            "parameters": self.parameters,
            "precision": self.stepper.precision,
            "data": self.mixture.digest,
        }
        self.reporter.open(yaml.safe_load(self.resolved), facts, self.start)
        if ranks.is_first:
            readers = ranks.world_size * max(1, config.data.workers)
            remarks = self.mixture.remarks(readers), self.task.report(self.mixture, self.tokenizer)
            for line in chain(*remarks):
                self.progress.log(line)
        if self.first and not self.start:
            self.reporter.begin(self.first[0])

    def close(self) -> None:
        if self.batches is not None:
            self.batches.close()  # ends the data workers
        self.reporter.close()
        if self.samples is not None:
            self.samples.close()

    def catch_up(self) -> None:
        """Makes up for evaluations of a run that was killed between a checkpoint and those."""
        if self.start:
            logged = self.reporter.resumed()
            due = self.evaluations.due(self.start, last=self.over, logged=logged)
            self._evaluate(due, self.start)

    def loop(self) -> None:
        """Trains to the last step, or until the run is asked to stop."""
        config, ranks, progress = self.config, self.ranks, self.progress
        datasets = [dataset.name for dataset in self.mixture.datasets]
        interval = Interval(self.build.streams, datasets)
        skips, uploads = SkipReport(), Uploads(ranks.device)
        with stop_signals() as signals:
            for step in count(self.start):
                # The first one compiles, and waits for the readers to start.
                self.watchdog.heartbeat(f"step {step + 1}", slow=step == self.start)
                taken, counts = self._take(interval)
                done = step + 1
                asked = bool(signals) or self.checkpoints.failed
                announced = self.stepper.announce(
                    [batch.inputs for batch in taken],
                    [*counts, asked, self.lock.lost],
                )
                logged = done % config.log.every_steps == 0 or done == config.steps
                seen = self.data_state.samples
                begun = self.stepper.begin(
                    uploads.copy(taken), step, announced, seen=seen, measure=logged
                )
                self._settle()  # the step before, while the device works on this one
                for batch in taken:
                    self.data_state.advance(batch)
                    skips.add(batch)
                    if self.samples is not None:
                        reader = next(iter(batch.state))
                        self.samples.write({"step": done, "reader": reader, "ids": batch.ids})
                _, *by_rank = zip(*announced.wait(), strict=True)
                samples, tokens, flops, asking, losing = map(sum, by_rank)
                self.data_state.count(samples, tokens, flops)
                progress.advance(int(samples))
                self.over = config.length.is_over(done, self.data_state.samples)
                logged = logged or self.over
                # A checkpoint that failed stops the run now, not at the next one: saving says why.
                if ranks.world_size == 1:  # needs no one's consent: also what came since
                    stopping, lost = bool(signals) or self.checkpoints.failed, self.lock.lost
                else:
                    stopping, lost = asking > 0, losing > 0
                if lost:
                    raise UserError(
                        f"another trainer has taken {self.directory} from this one, which had "
                        "stood still for long"
                    )
                due = self.evaluations.due(done, last=self.over)
                saving = done % config.checkpoint.every_steps == 0 or self.over
                self._pending = begun, None
                if logged:
                    rates = {**self.data_state.seen, **interval.rates(ranks)}
                    if rates["skipped"]:  # the same number on every rank
                        rates |= skips.report(ranks, progress)
                    self._pending = begun, rates
                    interval = Interval(self.build.streams, datasets)
                if saving or stopping or due or not reads_late(ranks.device):
                    self._settle()
                if saving or stopping:
                    self._save(done)
                if stopping and not self.over:
                    self._stop(done)
                try:
                    # After the checkpoint, which is written meanwhile and is there if this fails.
                    with interval.paused():
                        self._evaluate(due, done, stops=lambda: bool(signals))
                except StopAskedError:
                    if not saving:
                        self._save(done)
                    self._stop(done)
                if self.over:
                    break
            self.checkpoints.wait()

    def _save(self, step: int) -> None:
        self.watchdog.heartbeat(f"the checkpoint of step {step}", slow=True)
        self.checkpoints.save(step, self.stepper.state(), self.data_state)

    def _stop(self, step: int) -> NoReturn:
        self.checkpoints.wait()
        self.progress.log(f"stopped at step {step}; the same command continues from there")
        raise SystemExit(0)

    def _take(self, interval: Interval) -> tuple[list[Batch[Any]], list[float]]:
        """The micro-batches of the next step, still on the host; their samples, tokens, FLOPs."""
        taken, counts = [], [0.0, 0.0, 0.0]
        assert self.batches is not None
        for _ in range(self.config.accumulate):
            asked = time.perf_counter()
            batch = self.first.pop() if self.first else next(self.batches)
            waited = time.perf_counter() - asked
            taken.append(batch)
            flops = self.task.flops(batch.inputs)
            interval.add(batch, waited, flops)
            own = batch.counts.examples, batch.counts.tokens, flops
            counts = [before + more for before, more in zip(counts, own, strict=True)]
        interval.steps += 1
        return taken, counts

    def _settle(self) -> None:
        """Waits for the step that was begun last and reports it.

        A non-finite one is recorded, and may end the run in one line.
        """
        if self._pending is None:
            return
        (begun, rates), self._pending = self._pending, None
        try:
            result = self.stepper.finish(begun)
        except NonFiniteError as error:
            self.reporter.nonfinite(error.found)
            self.checkpoints.wait()  # else the last good one may not be visible yet
            raise UserError(
                f"{error}; last good checkpoint: {self.checkpoints.latest() or 'none'}; lower "
                "optim.lr or look at these examples"
            ) from error
        if result.nonfinite is not None:
            self.progress.log(f"skipped a step: {result.nonfinite}")
            self.reporter.nonfinite(result.nonfinite)
        else:
            self.reporter.examples(begun)
        if rates is not None:
            skipped = {"skipped_steps": self.stepper.guard.skipped_steps}
            metered = self.meter.metrics(rates["model_flops_per_s"])
            self.reporter.step(begun, result, {**skipped, **rates, **metered})

    def _evaluate(
        self, names: Sequence[str], step: int, stops: Callable[[], bool] = lambda: False
    ) -> None:
        found = self.evaluations.run(names, step, self.stepper, self.watchdog, stops)
        for values, line, shown in found:
            self.reporter.evaluation({**values, **self.data_state.seen}, line, shown)
