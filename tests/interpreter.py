"""Triton kernels on whatever machine the tests run: on its GPU, or by Triton's interpreter.

Triton decides when it is imported whether kernels are compiled or interpreted, and many a test
imports it by way of `torch.compile`. So kernels are interpreted in a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


@cache
def _interpreter() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _interpret)


def end_interpreter() -> None:
    """Ends that process, if there is one: it would outlive one of xdist, which has no `atexit`."""
    if _interpreter.cache_info().currsize:
        _interpreter().shutdown()
        _interpreter.cache_clear()


def run_kernels(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Calls a function, which stands in a module, with a last argument `device`.

    What it raises is raised here.
    """
    import torch

    if torch.cuda.is_available():
        function(*args, **kwargs, device="cuda")
    else:
        _interpreter().submit(function, *args, **kwargs, device="cpu").result()
