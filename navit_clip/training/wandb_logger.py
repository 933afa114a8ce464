"""Weights & Biases as a `navit_clip.training.loggers.Logger`."""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wandb
from markupsafe import Markup
from PIL import Image

from navit_clip.errors import UserError
from navit_clip.files import reading, write_output
from navit_clip.tasks.media import Drawing, Examples, Histogram, Media, data_uri
from navit_clip.training.sections import AXES, dashboard_key, media_key, metric_prefixes

if TYPE_CHECKING:  # a circle: it opens this
    from navit_clip.training.loggers import LogConfig

_FINISH_S = 300.0  # an upload that takes longer is left to `wandb sync`
_STYLE = "<style>body{font:14px sans-serif}th,td{text-align:left;padding:4px 8px}</style>"
_ALERT_S = 1800.0  # between two alerts of one title


class Wandb:
    """One run on the dashboard.

    Args:
        run_dir: Of the run; keeps the dashboard's id of it, so that a restart continues its curves.
        config: Names and mode.
        resolved: The run's configuration.
        facts: See `navit_clip.training.loggers.Loggers`.

    Raises:
        UserError: If there is no login, no network at the start, or a name is none to wandb.
    """

    def __init__(
        self, run_dir: Path, config: LogConfig, resolved: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        id_file = run_dir / "wandb_id"
        with reading(id_file, ValueError):
            run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:12]
        write_output(id_file, run_id + "\n")
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                entity=config.wandb_entity,
                name=config.wandb_name or run_dir.name,
                group=config.wandb_group,
                job_type=config.wandb_job_type,
                tags=config.wandb_tags,
                notes=config.wandb_notes,
                id=run_id,
                resume="allow",
                mode=config.wandb,
                dir=str(run_dir),
                config={**resolved, "facts": facts},
                settings=wandb.Settings(
                    silent=True, finish_timeout=_FINISH_S, finish_timeout_raises=True
                ),
            )
        except (wandb.Error, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"wandb: {reason}; log in, or use --log.wandb offline") from error
        for axis in AXES:
            self._run.define_metric(axis)
        for prefix in metric_prefixes():
            self._run.define_metric(f"{prefix}*", step_metric=AXES[0], summary="min,max,last")

    def log(self, values: Mapping[str, float]) -> None:
        """A point of each metric."""
        self._log({dashboard_key(key): value for key, value in values.items()}, values["step"])

    def show(self, name: str, shown: Media, step: int) -> None:
        """A histogram, a picture or a table.

        Not `wandb.Table`, for which `log` would ask the server and the training wait for it.
        """
        media: Any
        if isinstance(shown, Histogram):
            media = wandb.Histogram(shown.values.tolist())
        elif isinstance(shown, Drawing):
            media = _image(shown.picture)
        else:
            media = wandb.Html(_table(shown), inject=False)
        self._log({media_key(name): media}, step)

    def _log(self, values: dict[str, Any], step: float) -> None:
        self._run.log(values, step=int(step))

    def alert(self, title: str, text: str) -> None:
        """A mail or a message, as the user has set."""
        self._run.alert(title, text, wait_duration=_ALERT_S)

    def save_model(self, directory: Path) -> None:
        """The exported model as an artifact."""
        artifact = wandb.Artifact(f"model-{self._run.id}", type="model")
        artifact.add_dir(str(directory))
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        """Waits for the upload, but not without limit."""
        self._run.finish()


def _table(shown: Examples) -> str:
    heads = Markup("").join(Markup("<th>{}</th>").format(label) for label in shown.rows[0].texts)
    rows = (
        [Markup('<img src="{}">').format(data_uri(row.picture)), *row.texts.values()]
        for row in shown.rows
    )
    cells = (Markup("").join(map(Markup("<td>{}</td>").format, row)) for row in rows)
    body = Markup("").join(map(Markup("<tr>{}</tr>").format, cells))
    return f"{_STYLE}<table><tr><th></th>{heads}</tr>{body}</table>"


def _image(webp: bytes) -> wandb.Image:
    return wandb.Image(Image.open(io.BytesIO(webp)).convert("RGB"))
