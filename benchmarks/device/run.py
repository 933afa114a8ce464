"""Runs the checks, each in a process of its own, prints their lines and writes what they found."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import torch

from benchmarks.command import describe_run
from benchmarks.device.checks import CHECKS, PREDICTED, Check, compare
from benchmarks.device.peer import ratios
from benchmarks.device.setting import NeedsCudaError, Setting
from benchmarks.tables import compact
from navit_clip.files import atomic_write

_LINE = 1300  # characters; the rest is in the file
_PRELOADED = ["torch", "torch._dynamo", "benchmarks.device.checks"]


def _serve(check: Check, setting: Setting, pipe: Connection) -> None:
    """Runs a check in a process of its own, which leads a group with all that it starts."""
    os.setsid()
    try:
        if setting.cuda:
            torch.cuda.init()
        for part in check.run(setting):
            pipe.send(part)
        status: dict[str, Any] = {"status": "ok"}
    except NeedsCudaError:
        status = {"status": "needs CUDA"}
    except BaseException as error:  # whatever it is, it is this check's result
        text = traceback.format_exc()
        message = f"{type(error).__name__}: {error}"[:400]
        status = {"status": "failed", "error": message, "details": {"traceback": text}}
    pipe.send(status)


def run_check(
    check: Check, setting: Setting, context: BaseContext, left_s: float
) -> dict[str, Any]:
    """What a check found before it ended or was killed, and its ``status``."""
    begin = time.monotonic()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(  # type: ignore[attr-defined]
        target=_serve, args=(check, setting, theirs)
    )
    process.start()
    theirs.close()
    limit_s = min(check.limit_s, left_s)
    found: dict[str, Any] = {}
    details: dict[str, Any] = {}
    try:
        while "status" not in found:
            if not ours.poll(max(0, begin + limit_s - time.monotonic())):
                found |= {"status": "failed", "error": f"took more than {limit_s:.0f} s"}
                break
            part = ours.recv()
            details |= part.pop("details", {})
            found |= part
    except EOFError:
        found |= {"status": "failed", "error": "its process ended"}
    process.join(1)
    # Its whole group: what it has started must not disturb the next check.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join(5)
    return {**found, "took_s": time.monotonic() - begin, "details": details}


def run_checks(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs the chosen checks, prints their lines and writes the file after each."""
    begin = time.monotonic()
    setting = Setting(torch.device(args.device), args.tiny, tuple(args.shards), args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    # A library that asks for GPUs while it is imported must not start CUDA in the server, of which
    # the checks' processes are forks.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context: BaseContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    made: dict[str, Any] = {}
    checks: dict[str, dict[str, Any]] = {}
    found: dict[str, Any]
    for check in CHECKS:
        if (args.only and check.name not in args.only) or check.name in args.skip:
            continue
        left_s = args.deadline - (time.monotonic() - begin)
        if left_s < check.limit_s / 3:
            found = {"status": f"skipped, {left_s:.0f} s left"}
        else:
            found = run_check(check, setting, context, left_s)
            if not checks and setting.cuda and found["status"] == "failed":
                # The server has started CUDA after all, perhaps: no forks any more.
                _show(check.name, found)
                context = multiprocessing.get_context("spawn")
                found = run_check(check, setting, context, left_s)
        made.update(found.pop("made", {}))
        checks[check.name] = found
        _show(check.name, found)
        if times := ratios(checks):
            checks["ratios"] = {"status": "ok", **times}
        _write(args, made, checks)
    if "ratios" in checks:
        _show("ratios", checks["ratios"])
    for path, (predicted, measured, quotient) in compare(checks).items():
        if not args.tiny and not 0.8 <= quotient <= 1.25:
            print(f"predicted {path} {predicted:g}, measured {measured:.4g} (×{quotient:.2f})")
    _write(args, made or describe_run("device"), checks)
    return checks


def _show(name: str, found: dict[str, Any]) -> None:
    """Prints one line, and one more for each of the longest kernels."""
    hidden = ("status", "details", "top")
    fields = (f"{key} {compact(value)}" for key, value in found.items() if key not in hidden)
    status = found["status"]
    line = " | ".join([name if status == "ok" else f"{name}: {status}", *fields])
    print(line[:_LINE], flush=True)
    for milliseconds, count, kernel in found.get("top", ()):
        print(f"  {milliseconds:.3f} ms ×{count:g} {kernel}", flush=True)


def _write(
    args: argparse.Namespace, made: dict[str, Any], checks: dict[str, dict[str, Any]]
) -> None:
    if args.commit:
        made = {**made, "commit": args.commit}
    result = {
        "made": made,
        "predicted": PREDICTED,
        "compared": compare(checks),
        "checks": checks,
    }
    atomic_write(args.out / "device.json", json.dumps(result, indent=1))
