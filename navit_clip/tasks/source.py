"""The model that a run starts from, in place of random weights.

`navit_clip.training.config` asks a task here for the architecture, so that the run's resolved
configuration holds it, and `navit_clip.training.starting_weights` for the first weights. Once the
run has a checkpoint of its own, the model it started from is never read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from navit_clip.architectures import OPEN_CLIP
from navit_clip.checkpoints.folder import RUN_MODEL, find_damage, saved_steps, step_folder
from navit_clip.errors import UserError
from navit_clip.export.description import CONFIG_FILE, Description, ModelConfig
from navit_clip.export.pretrained import read_description
from navit_clip.load import AnyModel, load_model
from navit_clip.model import NaViTCLIP


@dataclass(frozen=True)
class InitConfig:
    """The model that a run starts from; its architecture is the run's and need not be given.

    Attributes:
        model: The directory of an exported model (RUN_DIR/model) or of a CLIP, SigLIP or SigLIP 2
            as transformers saves them, or ``open_clip:NAME``; null starts from random weights.
        weights: Of ``open_clip:NAME``: a local checkpoint, or a tag of open_clip to download.

    Raises:
        ValueError: If `weights` is given for a model that is not from open_clip.
    """

    model: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.open_clip_name is None:
            raise ValueError(f"weights belongs to model: open_clip:NAME, got model={self.model}")

    @property
    def open_clip_name(self) -> str | None:
        """NAME of ``open_clip:NAME``, None of any other model."""
        if self.model is None or not self.model.startswith(OPEN_CLIP):
            return None
        return self.model.removeprefix(OPEN_CLIP)

    def read_config(self, run_dir: Path) -> ModelConfig | None:
        """Architecture of the model, None without one.

        Args:
            run_dir: Of the run; if it has begun, it holds the architecture itself, whatever has
                become of the model it started from.

        Raises:
            UserError: If there is no such model.
        """
        if self.model is None:
            return None
        for step in reversed(saved_steps(run_dir / "checkpoints")):
            folder = step_folder(run_dir / "checkpoints", step)
            if find_damage(folder, only=[RUN_MODEL]) is None:
                return Description.read(folder / RUN_MODEL).model
        if self.open_clip_name is not None:
            from navit_clip.interop.open_clip import config_of

            return config_of(self.open_clip_name, self.weights)
        path = Path(self.model) / CONFIG_FILE
        if not path.is_file():
            raise UserError(
                f"no model at init.model={self.model}: expected {CONFIG_FILE} in it "
                f"(RUN_DIR/model), or {OPEN_CLIP}NAME"
            )
        return read_description(path.parent).model

    def read_model(self) -> AnyModel:
        """The model with its weights, on the host.

        Raises:
            UserError: If it cannot be read, or open_clip's has no weights.
        """
        assert self.model is not None
        if self.open_clip_name is None:
            return load_model(Path(self.model))
        if self.weights is None:
            raise UserError(
                f"init.weights is missing for init.model={self.model}: give a checkpoint's path, "
                "or a tag of open_clip"
            )
        return NaViTCLIP.from_open_clip(self.open_clip_name, self.weights)

    def check(self, name: str, given: Any, known: Any) -> None:
        """Refuses a part of the configuration, such as ``task.model``, that is not as in the model.

        Both have the form that `asdict` gives them. Rotary positions may be added to towers that
        have none, which leaves all of the model's weights as they are; but not where they take the
        place of windows' biases.

        Raises:
            UserError: Naming the first field that differs.
        """
        for field, ours, theirs in _differences(name, given, known):
            raise UserError(
                f"{field}={ours} disagrees with init.model={self.model}, which has {theirs}: leave "
                f"`{name}` out, init.model gives all of it"
            )


def _differences(name: str, given: Any, known: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(given, dict):
        for key, value in given.items():
            windows = known.get("hierarchy", {}).get("depths")
            if key == "rotary" and known[key]["kind"] == "none" and not windows:
                continue
            yield from _differences(f"{name}.{key}", value, known[key])
    elif given != known:
        yield name, given, known
