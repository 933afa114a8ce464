"""Configuration of a run: one dataclass tree, read from YAML and the command line.

Parsed by jsonargparse, so every field is a flag of its own name (``--optim.lr 1e-3``), typed and
documented by its docstring; `navit_clip.training.__main__` is the only reader of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser

from navit_clip.configs import check_choices
from navit_clip.data.config import DataConfig
from navit_clip.errors import UserError
from navit_clip.files import write_output
from navit_clip.models.clip import CLIPConfig
from navit_clip.recipes import with_recipe_paths
from navit_clip.tokenizers.load import TokenizerConfig
from navit_clip.training.ema import EMAConfig
from navit_clip.training.evaluation import EvalConfig
from navit_clip.training.freeze import TOWERS, LockConfig
from navit_clip.training.optim import OptimConfig
from navit_clip.training.parallel import ParallelConfig
from navit_clip.training.starting_weights import InitConfig, check_shape, known_shape


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss.

    Attributes:
        kind: ``softmax`` (CLIP), or ``sigmoid`` (SigLIP), which needs model.init_bias.
        chunk_size: Side of the largest block of logits that ever exists; null takes what suits
            the device.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"loss.chunk_size must be at least 1, got {self.chunk_size}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run's state is saved.

    Attributes:
        every_steps: Steps between checkpoints; one is also written at the end and on SIGTERM or
            SIGINT.
        keep: How many of the latest are kept.
        keep_every: Beside those, checkpoints whose step is a multiple of this are kept for ever;
            0 keeps none.
        asynchronous: Write while the training goes on, from a copy of the state in the host's
            memory; false writes from where the state is and lets the training wait.
    """

    every_steps: int = 1000
    keep: int = 2
    keep_every: int = 0
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.keep_every < 0 or self.keep_every % max(1, self.every_steps):
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} must be 0 or a multiple of "
                f"checkpoint.every_steps={self.every_steps}"
            )
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class LogConfig:
    """What the run reports.

    Attributes:
        every_steps: Steps between lines of metrics.jsonl and points on the dashboard.
        wandb: ``online``, ``offline`` (files for `wandb sync`), or ``disabled``.
        wandb_project: Project on the dashboard.
        wandb_name: Name of the run there; null takes the run directory's.
        pairs: Also write the ids of every step's pairs, to pairs-RANK.jsonl.
    """

    every_steps: int = 10
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    wandb_project: str = "navit-clip"
    wandb_name: str | None = None
    pairs: bool = False

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"log.every_steps must be at least 1, got {self.every_steps}")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
        run_dir: Where config, metrics, checkpoints and the exported model go; the same directory
            again continues the run.
        steps: Optimiser steps of the whole run.
        tokenizer: How captions become token ids; null takes that of `init`.
        init: The model whose weights the run starts from.
        lock: Which towers keep them.
        model: Shape of both towers; that of `init` if it is given.
        data: What is read and how it is packed.
        optim: Optimiser and learning rate.
        loss: The contrastive loss.
        parallel: How ranks share the model, and what is traded for memory and speed.
        ema: The moving average of the weights.
        checkpoint: When the state is saved.
        log: What is reported.
        eval: What is evaluated during the training.
        accumulate: Micro-batches of each rank per step. Their pairs form one batch of the loss, as
            if they had fitted into memory together, for one more forward pass (GradCache); with
            1 there is none.
        on_nonfinite: When the loss or the gradient is not a number: ``stop`` the run, or ``skip``
            the step and leave the weights as they are.
        max_skipped_in_row: With ``skip``: a run that has skipped so many steps in a row stops.
        stall_timeout_s: A rank that makes no progress for so many seconds writes the stacks of its
            threads to stalls/ and standard error, and ends after as many again; checkpoints and
            the first step are given three times as much. 0 waits for ever.
        seed: Of initialisation and of everything random about the data.
        precision: ``bf16`` runs matrix products under autocast; parameters stay float32.
        device: ``auto`` takes CUDA if there is one.
    """

    run_dir: str
    steps: int
    tokenizer: TokenizerConfig | None = None
    model: CLIPConfig = field(default_factory=CLIPConfig)
    init: InitConfig = field(default_factory=InitConfig)
    lock: LockConfig = field(default_factory=LockConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    accumulate: int = 1
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_in_row: int = 10
    stall_timeout_s: float = 600.0
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "accumulate", "max_skipped_in_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stall_timeout_s < 0:
            raise ValueError(f"stall_timeout_s must not be negative, got {self.stall_timeout_s}")
        if self.tokenizer is None and self.init.model is None:
            raise ValueError(
                "tokenizer is missing: give tokenizer.path, or init.model with its own"
            )
        for tower in TOWERS:
            depth = getattr(self.model, tower).encoder.depth
            if self.lock.unlocked_blocks(tower) > depth:
                raise ValueError(
                    f"lock.{tower}_unlocked_blocks={self.lock.unlocked_blocks(tower)} exceeds the "
                    f"{depth} blocks of model.{tower}.encoder"
                )
        schedule = self.optim.schedule
        if schedule.warmup_steps + schedule.cooldown_steps > self.steps:
            raise ValueError(
                f"steps={self.steps} cannot hold {schedule.warmup_steps} warm-up and "
                f"{schedule.cooldown_steps} cool-down steps: lower optim.schedule's or raise steps"
            )
        if (self.loss.kind == "sigmoid") != (self.model.init_bias is not None):
            raise ValueError(
                "loss.kind sigmoid and model.init_bias go together (SigLIP uses -10); got "
                f"loss.kind={self.loss.kind} model.init_bias={self.model.init_bias}"
            )
        resolution = self.data.resolution
        self.data.budget.check(
            {
                "image": (resolution.max_tokens, "data.resolution.max_tokens"),
                "text": (self.model.text.context_length, "model.text.context_length"),
            }
        )
        square = max(1, resolution.max_side // self.model.image.patch_size)
        if resolution.mode == "square" and (
            square**2 > resolution.max_tokens or square > self.model.image.position.max_grid_side
        ):
            raise ValueError(
                f"data.resolution.max_side={resolution.max_side} makes {square}×{square} patches, "
                f"past data.resolution.max_tokens={resolution.max_tokens} or "
                f"model.image.position.table_side={self.model.image.position.table_side}"
            )


def parse_config(argv: Sequence[str], prog: str = "navit-clip train") -> tuple[TrainConfig, str]:
    """Reads ``--config FILE`` and flags.

    Args:
        argv: Words after ``navit-clip train``.
        prog: Those before them, for the usage line.

    Returns:
        The configuration, and its resolved form as YAML.

    Raises:
        UserError: For an unknown key, a bad value or a missing file; names it.
        SystemExit: After ``--help`` and ``--print_config``.
    """
    parser = ArgumentParser(
        prog=prog, description="Train a packed NaViT CLIP.", exit_on_error=False
    )
    parser.add_argument(
        "--config", action="config", help="a recipe's name or a YAML file; later flags override it"
    )
    parser.add_class_arguments(TrainConfig)
    argv = with_recipe_paths(argv)
    try:
        namespace = parser.parse_args(argv)
        init = InitConfig(**namespace["init"].as_dict())
        shape = known_shape(init, Path(namespace["run_dir"]))
        if shape is not None:  # what the configuration leaves out of `model` is the source's
            parser.set_defaults({"model": asdict(shape)})
            namespace = parser.parse_args(argv)
        values = parser.instantiate(namespace)
        config = TrainConfig(**{f.name: values[f.name] for f in fields(TrainConfig)})
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_plain(str(error))) from error
    if shape is not None:
        check_shape(config.model, shape, config.init)
    return config, parser.dump(namespace)


def write_config(run_dir: Path, resolved: str) -> None:
    """Writes config.yaml, the run's configuration with every default spelt out."""
    write_output(run_dir / "config.yaml", resolved, f"run_dir {run_dir}")


def _plain(message: str) -> str:
    return message.replace("Parser key ", "").replace("<class '", "").replace("'>", "")
