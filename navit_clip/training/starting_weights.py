"""What a run starts from: an existing model in place of random weights.

`navit_clip.training.config` asks here for the model's shape, so that the run's resolved
configuration holds it, and `navit_clip.training.trainer` for the first weights and the tokenizer.
Once the run has a checkpoint of its own, the source is never read again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from navit_clip.configs import config_from_dict
from navit_clip.errors import UserError
from navit_clip.export.card import CONFIG_FILE
from navit_clip.export.description import Description
from navit_clip.files import writing
from navit_clip.model import NaViTCLIP
from navit_clip.models.clip import CLIP, CLIPConfig
from navit_clip.tokenizers.base import Tokenizer
from navit_clip.tokenizers.load import build_tokenizer, load_tokenizer

if TYPE_CHECKING:  # the run's configuration contains this one
    from navit_clip.distributed import Ranks
    from navit_clip.training.config import TrainConfig

OPEN_CLIP = "open_clip:"
TOKENIZER_DIR = "tokenizer"
# Tokenizers of as many ids that cut this alike have the same vocabulary, in practice.
_PROBE = "Two dogs & a child's red kite, photographed at 10:45 on the north-eastern coast."


@dataclass(frozen=True)
class InitConfig:
    """The model that a run starts from; its shape is the run's `model`, which need not be given.

    Attributes:
        model: The directory of an exported model (RUN_DIR/model), or ``open_clip:NAME``; null
            starts from random weights.
        weights: Of ``open_clip:NAME``: a local checkpoint, or a tag of open_clip's to download.

    Raises:
        ValueError: If `weights` is given for a model that is not open_clip's.
    """

    model: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.open_clip_name is None:
            raise ValueError(
                f"init.weights belongs to init.model: open_clip:NAME, got init.model={self.model}"
            )

    @property
    def open_clip_name(self) -> str | None:
        """NAME of ``open_clip:NAME``, None of any other model."""
        if self.model is None or not self.model.startswith(OPEN_CLIP):
            return None
        return self.model.removeprefix(OPEN_CLIP)

    def read_config(self) -> CLIPConfig | None:
        """Shape of the model, None without one.

        Raises:
            UserError: If there is no such model.
        """
        if self.model is None:
            return None
        if self.open_clip_name is not None:
            from navit_clip.interop.open_clip import config_of

            return config_of(self.open_clip_name, self.weights)
        path = Path(self.model) / CONFIG_FILE
        if not path.exists():
            raise UserError(
                f"no model at init.model={self.model}: expected {CONFIG_FILE} in it "
                f"(RUN_DIR/model), or {OPEN_CLIP}NAME"
            )
        return Description.read(path).model

    def read_model(self) -> NaViTCLIP:
        """The model with its weights, on the host.

        Raises:
            UserError: If it cannot be read, or open_clip's has no weights.
        """
        assert self.model is not None
        if self.open_clip_name is None:
            return NaViTCLIP.from_directory(Path(self.model))
        if self.weights is None:
            raise UserError(
                f"init.weights is missing for init.model={self.model}: give a checkpoint's path, "
                "or a tag of open_clip's"
            )
        return NaViTCLIP.from_open_clip(self.open_clip_name, self.weights)


def known_shape(init: InitConfig, run_dir: Path) -> CLIPConfig | None:
    """The model's shape as far as it is not for the configuration to choose.

    Args:
        init: What the run starts from.
        run_dir: Of the run; if it holds a checkpoint, its config.yaml has the shape, whatever has
            become of the source.

    Returns:
        None without a source.

    Raises:
        UserError: If there is no such model.
    """
    if init.model is not None and any((run_dir / "checkpoints").glob("step-*")):
        try:
            saved = yaml.safe_load((run_dir / "config.yaml").read_text())
            return config_from_dict(CLIPConfig, saved["model"])
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            pass  # the source has it too, and a checkpoint of another shape is refused
    return init.read_config()


def check_shape(given: CLIPConfig, known: CLIPConfig, init: InitConfig) -> None:
    """Refuses a `model` section that is not the source's.

    Raises:
        UserError: Naming the first field that differs.
    """
    difference = _first_difference(given, known, "model")
    if difference is not None:
        name, own, other = difference
        raise UserError(
            f"{name}={own} disagrees with init.model={init.model}, which has {other}: leave "
            "`model` out, init.model gives all of it"
        )


def starting_point(config: TrainConfig, ranks: Ranks, *, begun: bool) -> tuple[CLIP, Tokenizer]:
    """The first weights of a run, on the host, and its tokenizer.

    Args:
        config: Of the run.
        ranks: This process among all of them; the first one keeps the source's tokenizer in the
            run's directory.
        begun: The run has a checkpoint, whose weights will replace these: the source is not read.

    Raises:
        UserError: If the source or a tokenizer cannot be read, or the configured tokenizer has
            another vocabulary than the source's.
    """
    kept = Path(config.run_dir) / TOKENIZER_DIR
    given = build_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    if config.init.model is None or begun:
        return CLIP(config.model), given or load_tokenizer(kept)
    model = config.init.read_model()
    check_shape(config.model, model.config, config.init)
    own = model.tokenizer
    tokenizer = given or own
    if tokenizer is None:
        raise UserError(f"init.model={config.init.model} brings no tokenizer: give `tokenizer`")
    if given is not None and own is not None:
        _check_vocabulary(given, own, config.init)
    if own is not None and ranks.is_first:
        with writing(kept):
            kept.mkdir(parents=True, exist_ok=True)
            own.save(kept)
    return model.train(), tokenizer


def _check_vocabulary(given: Tokenizer, own: Tokenizer, init: InitConfig) -> None:
    if given.vocab_size != own.vocab_size:
        what = f"{given.vocab_size} ids, that of init.model={init.model} {own.vocab_size}"
    elif given.encode(_PROBE, 256) != own.encode(_PROBE, 256):
        what = f"other ids than that of init.model={init.model}"
    else:
        return
    raise UserError(f"the tokenizer has {what}: leave `tokenizer` out to take the model's")


def _first_difference(given: Any, known: Any, name: str) -> tuple[str, Any, Any] | None:
    if is_dataclass(given):
        found = (
            _first_difference(getattr(given, f.name), getattr(known, f.name), f"{name}.{f.name}")
            for f in fields(given)
        )
        return next((difference for difference in found if difference is not None), None)
    return None if given == known else (name, given, known)
