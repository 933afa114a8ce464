"""The interface between a task and everything that trains it.

A task is a model, what it makes of a sample, and a loss. It knows nothing of ranks, precision,
wrappers, EMA or checkpoints; the trainer knows nothing of towers. To add one, subclass `TaskConfig`
and `Task` and name the configuration in `navit_clip.tasks.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from navit_clip.architectures import architecture
from navit_clip.data.builders.base import SampleBuilder
from navit_clip.data.config import DataConfig
from navit_clip.data.mixture import Mixture
from navit_clip.errors import UserError
from navit_clip.evaluation.models import Around, Model
from navit_clip.models.weights import build_with
from navit_clip.packed.batch import Batch, Inputs
from navit_clip.precision import Precision
from navit_clip.tasks.media import Drawing, Media
from navit_clip.tasks.source import InitConfig
from navit_clip.tokenizers.base import Tokenizer


class Loss(NamedTuple):
    """What `Task.loss` returns.

    Attributes:
        total: Scalar. The parameters' gradient of the whole step is the SUM over ranks and
            micro-batches of what backward passes from it compute. Of a task that couples examples
            it is the loss itself, the same on every rank; of any other this micro-batch's share,
            and the loss is the sum of all shares.
        metrics: Scalars for the log by name. Shared out over micro-batches and ranks as `total` is.
    """

    total: Tensor
    metrics: dict[str, Tensor]


class ExportedModel(Protocol):
    """A trained model as its users load it."""

    def save_pretrained(self, save_directory: str | Path) -> object:
        """Writes the model's directory."""


class Task(ABC):
    """A model, its samples and its loss.

    The model maps `Inputs` to a NamedTuple of tensors ``[E, …]``, a row per example, and scalars.
    Parameters that the loss uses are outputs too, not attributes read from outside: DDP only
    reduces gradients of parameters that its forward used. A task that does not couple examples may
    return anything else beside, such as `Ragged` values per token; with rows of tokens alone, no
    example is named where a step is not finite.

    Attributes:
        couples_examples: The loss of one example depends on others (contrastive). Then the loss
            sees the outputs of all micro-batches at once, embedded twice (GradCache). Without,
            the gradients of micro-batches add up.
    """

    couples_examples: bool = False

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model with random weights, on the host."""

    def model_of(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A model as of `build_model`, where these weights are, which it takes over uncopied."""
        return build_with(self.build_model, weights)

    @abstractmethod
    def build_samples(self, tokenizer: Tokenizer | None, seed: int) -> SampleBuilder:
        """What makes examples of raw samples.

        Args:
            tokenizer: Of the run; None if the task needs none.
            seed: Of everything random about a sample.

        Raises:
            UserError: If the tokenizer does not fit the model.
        """

    def report(self, mixture: Mixture, tokenizer: Tokenizer | None) -> Iterator[str]:
        """Lines for the start of a run: what it reads of its data, and what it leaves unread."""
        return iter(())

    @abstractmethod
    def loss(self, outputs: Any, inputs: Sequence[Inputs], counts: Sequence[float]) -> Loss:
        """The loss of one micro-batch, or of all together where examples are coupled.

        Called under the same autocast as the model's forward pass.

        Args:
            outputs: As the model returned them; of several micro-batches concatenated.
            inputs: Of those micro-batches, in order.
            counts: Sum of `count` over all micro-batches of the step, rank by rank; only this
                rank's for a loss of its own examples alone, in which no other takes part.
        """

    @abstractmethod
    def count(self, inputs: Inputs) -> float:
        """What the loss is a mean over, of one micro-batch: examples, boxes, masked tokens.

        The ranks tell each other before the forward pass, from inputs that are still on the host. A
        task that couples examples counts examples.
        """

    def drawing(self, batch: Batch[Any], tokenizer: Tokenizer | None) -> Drawing | None:
        """A picture of one batch on the host, None of a task that draws none."""
        return None

    def examples(
        self, inputs: Inputs, outputs: Sequence[Tensor], tokenizer: Tokenizer | None
    ) -> Mapping[str, Media]:
        """Histograms and examples of a batch after its step, by a name that says what is shown.

        Args:
            inputs: Of one micro-batch, on the device.
            outputs: The tensors that the model returned for it, and for others behind it.
            tokenizer: Of the run.
        """
        return {}

    def before_step(self, model: nn.Module, step: int) -> None:  # noqa: B027  most do the same
        """Called before each step, by its number from 0, for what follows a schedule."""

    def after_step(self, model: nn.Module, found_inf: Tensor) -> None:  # noqa: B027  most do nothing
        """Called after each step, to keep parameters within their limits, or averages of them.

        Args:
            model: After the step.
            found_inf: Scalar on the device, 1 if the step was skipped, of which the host does not
                know yet; else 0. Then nothing that is within its limits must change.
        """

    def adapt(self, model: nn.Module) -> None:  # noqa: B027  most tasks train it as it is
        """Adds what the model has in training alone, such as adapters, in place.

        Called once it has its first weights, or before it takes those of a checkpoint. What is
        drawn is the same on all ranks.
        """

    def plain_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a model as `build_model` makes it, out of those of one that was adapted."""
        return weights

    def prepare(self, model: nn.Module) -> None:  # noqa: B027  most tasks train all of it
        """Sets what only training needs, in place, before ranks share the model.

        Such as parameters that are not trained, layers that are left out at random, or modules that
        checkpoints keep and exports leave out.
        """

    def layers_above(self, name: str) -> int:
        """How many layers stand above a parameter, for layer-wise learning rates; 0 at the top."""
        return 0

    def is_head(self, name: str) -> bool:
        """Whether a parameter is of a head, which may have a weight decay of its own."""
        return False

    @abstractmethod
    def flops(self, inputs: Inputs) -> float:
        """FLOPs of one forward and one backward pass, padding and loss left out."""

    @abstractmethod
    def describe(self, folder: Path) -> None:
        """Writes into a checkpoint what must be known to read it without its configuration.

        Raises:
            OSError: If the disk does not take it.
        """

    def check_checkpoint(self, folder: Path) -> None:  # noqa: B027  weights alone fit most
        """Refuses a checkpoint of the run that does not mean what the task now would.

        Raises:
            UserError: If so.
        """

    @abstractmethod
    def export(
        self, weights: Mapping[str, Tensor] | None, tokenizer: Tokenizer | None
    ) -> ExportedModel:
        """The model as users load it.

        Args:
            weights: Of all parameters, taken over without a copy; None leaves them random.
            tokenizer: Of the run.
        """

    def write_card(self, directory: Path, run_dir: Path) -> None:  # noqa: B027  not all have one
        """Writes the model card of an export in `directory` from what the run's directory says.

        Raises:
            UserError: If the disk does not take it.
        """

    def eval_model(
        self,
        model: ExportedModel,
        name: str,
        precision: Precision = "fp32",
        around: Around = nullcontext,
    ) -> Model:
        """How evaluators see an exported model.

        Args:
            model: As `export` returned it.
            name: For results.
            precision: Of its forward passes.
            around: A context for each call of the model.

        Raises:
            UserError: If there are no evaluators for such a model.
        """
        raise UserError(f"there are no evaluators for models of {type(self).__name__}")

    def start_from(self, init: InitConfig) -> tuple[nn.Module, Tokenizer | None]:
        """The model that a run starts from, on the host, and the tokenizer it was trained with.

        Raises:
            UserError: If the model cannot be read, or is of another architecture.
        """
        raise UserError(f"init.model: {type(self).__name__} starts from random weights only")


class TaskConfig(ABC):
    """Base of the configurations under ``task:``; subclasses are frozen dataclasses.

    Attributes:
        kind: Name of the task, by which the configuration chooses it.
        needs_tokenizer: Samples have text.
        predicts_dropped: What data.drop leaves out is what the model predicts: the validation loss,
            which else is of whole images, needs it too.
    """

    kind: str
    # Without a type: jsonargparse looks up the types of a subclass, its bases' too, among the names
    # of the subclass's module.
    needs_tokenizer = False
    predicts_dropped = False

    @property
    def kept(self) -> tuple[str, ...]:
        """The fields by which parts of the model keep the weights that `init` gives them."""
        return ()

    @abstractmethod
    def check(self, data: DataConfig) -> None:
        """Raises a `ValueError` if the task does not fit what it reads; names full paths."""

    @abstractmethod
    def build(self, data: DataConfig) -> Task:
        """The task on this data."""

    @classmethod
    def defaults_from(cls, init: InitConfig, run_dir: Path) -> dict[str, Any]:
        """Values of fields that `init` gives, as `asdict` has them; others are refused.

        Names of fields within fields have dots, as in ``model.image``.

        The run of `run_dir` may have begun.

        Raises:
            UserError: If there is no such model.
        """
        return {}

    @classmethod
    def named_fields(cls, name: str) -> dict[str, Any]:
        """Values of fields that a named architecture gives where they are not given; likewise.

        Raises:
            UserError: If there is no such name.
        """
        return {"model.image": asdict(architecture(name).image)}
