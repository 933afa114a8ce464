"""``navit-clip dashboard --project P``: a workspace on wandb with a project's runs.

Its sections are those of `sections`; panels follow the axis that is chosen for the workspace. Saved
again it replaces itself, so that a later version of it brings its new panels.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from navit_clip.commands import Parser, run_command
from navit_clip.errors import UserError
from navit_clip.files import one_line
from navit_clip.training.sections import (
    AXES,
    NEAREST,
    SECTIONS,
    SHOWN,
    Section,
    dashboard_key,
    media_key,
)

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

_VIEW, _NAME = "navitclip", "navit-clip"  # in its address, and as it is called


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m navit_clip.training.dashboard"
) -> int:
    """Writes a workspace, see `run_command`."""
    parser = Parser(
        prog=prog,
        description="Writes a workspace with a panel for each metric to a project on wandb, in "
        "place of the one that an earlier call has written.",
    )
    parser.add_argument("--project", required=True, help="that runs log to (log.wandb_project)")
    parser.add_argument("--entity", help="user or team of the project; your own by default")
    parser.add_argument(
        "--evaluators", nargs="*", default=[], metavar="NAME",
        help="of eval.evaluators, of which to show examples",
    )  # fmt: skip
    return run_command(parser, _save, argv)


def workspace(entity: str, project: str, evaluators: Sequence[str] = ()) -> Workspace:
    """What is shown of a project's runs; needs no network.

    Raises:
        UserError: If wandb's library for workspaces is not installed.
    """
    try:
        from wandb_workspaces import workspaces
    except ImportError as error:
        raise UserError(
            "a dashboard needs the package wandb-workspaces: pip install 'navit-clip[dashboard]'"
        ) from error
    examples = SHOWN | {f"{NEAREST}{name}": "eval" for name in evaluators}
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=_NAME,
        sections=[
            workspaces.Section(
                name=section.title,
                panels=_panels(section, [n for n, of in examples.items() if of == section.name]),
                is_open=True,
            )
            for section in SECTIONS
        ],
        settings=workspaces.WorkspaceSettings(x_axis=AXES[0]),
    )


def _panels(section: Section, examples: Sequence[str]) -> list[Any]:
    from wandb_workspaces.reports import v2 as reports

    panels: list[Any] = []
    for key in section.keys:
        shown = dashboard_key(key)
        if "*" in key:  # one chart of all of them
            pattern = f"^{re.escape(shown).replace(re.escape('*'), '.*')}$"
            panels.append(reports.LinePlot(title=key, x=None, metric_regex=pattern))
        else:
            panels.append(reports.LinePlot(title=key, x=None, y=[shown]))
    return panels + [reports.MediaBrowser(title=n, media_keys=[media_key(n)]) for n in examples]


def _save(args: argparse.Namespace) -> int:
    import wandb

    entity = args.entity
    if entity is None:
        with one_line("wandb", hint="; run `wandb login`, or name the --entity"):
            entity = wandb.Api().default_entity
    found = workspace(entity, args.project, args.evaluators)
    with one_line(f"wandb, project {entity}/{args.project}"):
        url = f"https://wandb.ai/{entity}/{args.project}?nw={_VIEW}"
        try:
            found._internal_id = type(found).from_url(url)._internal_id
        except ValueError as error:
            if "not found in project" not in str(error):  # but the project itself
                raise
        found._internal_name = f"nw-{_VIEW}-v"
        found.save()
    print(f"Dashboard: {found.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
