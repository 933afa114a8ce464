"""The training loop: batches in, steps, reports, checkpoints, an exported model at the end.

Ties the parts together and holds nothing of its own: data from `navit_clip.data.loader`, the step
from `train.step`, state on disk through `train.checkpoint`, figures through `train.metrics`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from navit_clip.clip import NaViTCLIP
from navit_clip.data.loader import LoaderPosition, load_batches
from navit_clip.data.sample import PairBuilder
from navit_clip.data.sizing import default_max_tokens
from navit_clip.data.tokenizer import Tokenizer, build_tokenizer
from navit_clip.errors import UserError
from navit_clip.interop.pretrained import Preprocess, save_pretrained
from navit_clip.packing import PackedBatch
from navit_clip.ranks import Ranks
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.metrics import MetricsLog, Progress, SkipReport, Window
from train.step import NonFiniteLossError, Stepper


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
        config.data,
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
    tokenizer = build_tokenizer(config.tokenizer)
    build = build_pair_builder(config, tokenizer)
    torch.manual_seed(config.seed)
    model = NaViTCLIP(config.model).to(ranks.device)
    stepper = Stepper(model, config, ranks)
    readers = ranks.world_size * max(1, config.data.workers)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint.keep, ranks, readers)
    start = checkpoints.latest() or 0
    position = LoaderPosition()
    if start:
        position = checkpoints.load(start, model, stepper.optimizer)
    progress = Progress(config.steps, start, visible=ranks.is_first)
    log = None
    try:
        if ranks.is_first:
            log = MetricsLog(run_dir, config.log, resolved, start)
        parameters = sum(p.numel() for p in model.parameters())
        progress.say(
            f"{parameters / 1e6:.1f}M parameters, {ranks.world_size} rank(s) on {ranks.device}, "
            f"{config.precision}, " + (f"continuing from step {start}" if start else "from step 0")
        )
        if start < config.steps:
            _loop(stepper, build, checkpoints, position, start, progress, log)
        if ranks.is_first:
            save_pretrained(run_dir / "model", model, tokenizer, preprocess_for(config))
            progress.say(f"model written to {run_dir / 'model'}")
    finally:
        progress.close()
        if log is not None:
            log.close()


def preprocess_for(config: TrainConfig) -> Preprocess:
    """How the trained model wants its images: as large as the largest of training."""
    resolution = config.data.resolution
    return Preprocess(
        default_max_tokens(resolution, config.model.image.patch_size),
        square=resolution.mode == "square",
    )


def _loop(
    stepper: Stepper,
    build: PairBuilder,
    checkpoints: Checkpoints,
    position: LoaderPosition,
    start: int,
    progress: Progress,
    log: MetricsLog | None,
) -> None:
    config, ranks = stepper.config, stepper.ranks
    cuda = ranks.device.type == "cuda"
    batches = load_batches(
        build,
        rank=ranks.rank,
        world_size=ranks.world_size,
        position=position,
        pin_memory=cuda,
    )
    window, skips, stop = Window(), SkipReport(), StopSignal()

    def save(step: int) -> Path:
        return checkpoints.save(step, stepper.model, stepper.optimizer, position)

    with stop.listening():
        for step in range(start, config.steps):
            asked = time.perf_counter()
            batch: PackedBatch = next(batches)
            waited = time.perf_counter() - asked
            try:
                result = stepper.step(batch.to(ranks.device, non_blocking=True), step)
            except NonFiniteLossError as error:
                raise UserError(
                    f"{error} at step {step + 1}, rank {ranks.rank}, pairs "
                    f"{', '.join(batch.ids[:4])}, …; last good checkpoint: "
                    f"{checkpoints.latest() or 'none'}; lower optim.lr or look at these pairs"
                ) from error
            position.advance(batch)
            window.add(batch, waited)
            progress.advance()
            for line in skips.lines(batch):
                progress.say(line)
            done = step + 1
            if done % config.log.every_steps == 0 or done == config.steps:
                values: dict[str, float] = {
                    "step": done,
                    "loss": result.loss,
                    "lr": result.lr,
                    "logit_scale": result.logit_scale,
                    "grad_norm": result.grad_norm,
                    **window.rates(ranks),
                }
                window = Window()
                if log is not None:
                    log.write(values)
                progress.show(values)
            stopping = ranks.any(stop.received)
            if done % config.checkpoint.every_steps == 0 or done == config.steps or stopping:
                save(done)
            if stopping and done < config.steps:
                progress.say(f"stopped at step {done}; the same command continues from there")
                raise SystemExit(0)


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
