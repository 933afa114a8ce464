"""``navit-clip serve``: a model's vectors and classes over HTTP.

``docs/serving.md`` has the requests. SIGTERM and Ctrl-C end it after the requests that are here.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from navit_clip import before_torch  # noqa: F401
from navit_clip.commands import Parser, number, run_command
from navit_clip.configs import descriptions
from navit_clip.distributed import join_ranks
from navit_clip.errors import UserError
from navit_clip.load import load_model
from navit_clip.serving.config import BatchConfig, Limits

_NEEDS = ("starlette", "uvicorn", "prometheus_client")
_SHUTDOWN_S = 30

T = TypeVar("T")


def main(argv: Sequence[str] | None = None, prog: str = "navit-clip serve") -> int:
    """Serves until it is told to end."""
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="an exported model, such as RUN_DIR/model")
    parser.add_argument("--name", help="of the model in answers; default: its folder's")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=number(0), default=8000)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument(
        "--fetch-addresses",
        action="store_true",
        help="fetch images at public web addresses that clients name",
    )
    _add_config(parser, Limits)
    _add_config(parser, BatchConfig)
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    for name in _NEEDS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"serving needs the package {name}: pip install 'navit-clip[serve]'"
            ) from error
    import uvicorn

    from navit_clip.serving.app import Service

    limits, batches = _config(Limits, args), _config(BatchConfig, args)
    with join_ranks(args.device) as ranks:
        model = load_model(Path(args.model), ranks.device)
    model.precision = args.precision
    name = args.name or Path(args.model).resolve().name
    service = Service(model, name, batches, limits, addresses=args.fetch_addresses)
    listening = _listen(args.host, args.port)
    # uvicorn ends by itself, then raises the signal again for whoever handled it before.
    signal.signal(signal.SIGTERM, lambda *_: None)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{name}: http://{host}:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        service.app(),
        lifespan="on",
        log_level="warning",
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen at --host {host} --port {port}: {reason}") from error


def _add_config(parser: Parser, kind: type[Any]) -> None:
    """A flag for each field of a configuration, whose docstring is the help."""
    described, hints = descriptions(kind), get_type_hints(kind)
    for field in fields(kind):
        text = described[field.name].rstrip(".")
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=hints[field.name],
            default=field.default,
            help=f"{text[:1].lower()}{text[1:]}; default: {field.default:,}",
        )


def _config(kind: type[T], args: argparse.Namespace) -> T:
    values = {field.name: getattr(args, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error


if __name__ == "__main__":
    sys.exit(main())
