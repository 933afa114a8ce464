"""Which model a directory holds: its kind, architecture and preprocessing, as one small JSON file.

``config.json`` of an exported model, read before its weights; enough to build the model without
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from navit_clip.configs import config_from_dict
from navit_clip.errors import UserError
from navit_clip.files import atomic_write, reading
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.classifier import Classifier, ClassifierConfig
from navit_clip.models.clip import CLIP, CLIPConfig
from navit_clip.models.masked_image import MaskedImage, MaskedImageConfig

CONFIG_FILE = "config.json"  # of an exported model
FORMAT = 2
_OWN = {"format", "kind"}  # which no configuration of transformers has

ModelConfig = CLIPConfig | ClassifierConfig | MaskedImageConfig
BareModel = CLIP | Classifier | MaskedImage
_KINDS: dict[str, type[ModelConfig]] = {
    "clip": CLIPConfig,
    "classifier": ClassifierConfig,
    "masked_image": MaskedImageConfig,
}


@dataclass(frozen=True)
class Description:
    """A model without its weights.

    Attributes:
        model: The architecture.
        preprocess: How the model wants its images.
        weights_sha256: Checksum of the weights' file beside the description; None without one.
        classes: Names of a classifier's classes, by index.

    Raises:
        ValueError: If a classifier has fewer than two classes.
    """

    model: ModelConfig
    preprocess: Preprocess
    weights_sha256: str | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.model, ClassifierConfig) and len(self.classes) < 2:
            raise ValueError(f"a classifier has at least 2 classes, got {len(self.classes)}")

    @property
    def kind(self) -> str:
        """``clip``, ``classifier`` or ``masked_image``."""
        return next(kind for kind, config in _KINDS.items() if isinstance(self.model, config))

    def build(self) -> BareModel:
        """The bare model, with random weights."""
        if isinstance(self.model, CLIPConfig):
            return CLIP(self.model)
        if isinstance(self.model, MaskedImageConfig):
            return MaskedImage(self.model)
        return Classifier(self.model, len(self.classes))

    def write(self, path: Path, more: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Writes the file atomically.

        Args:
            path: Of the file.
            more: Values for other programs, which `read` passes over.

        Raises:
            OSError: If the disk does not take it.
        """
        values = {"format": FORMAT, "kind": self.kind, **more, **asdict(self)}
        if self.weights_sha256 is None:
            del values["weights_sha256"]
        if not self.classes:
            del values["classes"]
        atomic_write(path, json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Description:
        """Reads the file.

        Raises:
            UserError: If it is missing, damaged, or describes what this version does not know.
        """
        with reading(path, KeyError, ValueError, TypeError):
            values = json.loads(path.read_text())
            if values["format"] not in (1, FORMAT):
                raise UserError(
                    f"{path} has format {values['format']}, this version reads {FORMAT}"
                )
            if values["format"] == 1:
                values = _from_format_1(values)
            if values["kind"] not in _KINDS:
                known = ", ".join(_KINDS)
                raise UserError(f"{path} describes a {values['kind']}, this version reads {known}")
            return cls(
                config_from_dict(_KINDS[values["kind"]], values["model"], "model"),
                config_from_dict(Preprocess, values["preprocess"], "preprocess"),
                values.get("weights_sha256"),
                tuple(map(str, values.get("classes", ()))),
            )


def is_transformers(path: Path) -> bool:
    """Whether a ``config.json`` is one of transformers', which names a model type."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # whoever reads it says what is wrong
    return isinstance(values, dict) and "model_type" in values and not _OWN & values.keys()


def _from_format_1(values: dict[str, Any]) -> dict[str, Any]:
    """The same in the present format."""
    position = values["model"]["image"].get("position", {})
    if "max_side" in position:
        position["table_side"] = position.pop("max_side")
    return {**values, "kind": "clip"}
