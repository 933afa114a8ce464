"""All evaluators by name. To add one: a module with its class, and a line here.

The command line makes a subcommand of each, the trainer's configuration names them as ``kind``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from navit_clip.errors import UserError
from navit_clip.evaluation.evaluator import Evaluator
from navit_clip.evaluation.results import EvalResult
from navit_clip.evaluation.retrieval import Retrieval
from navit_clip.evaluation.zeroshot import ZeroShot

EVALUATORS: dict[str, type[Evaluator[Any]]] = {
    evaluator.kind: evaluator for evaluator in (ZeroShot, Retrieval)
}


def read_result(content: Any) -> EvalResult:
    """Reads a result from JSON, whichever evaluator wrote it.

    Raises:
        UserError: If it is damaged or something else; names the key.
    """
    if not isinstance(content, Mapping):
        raise UserError("no result of an evaluation: it is no JSON object")
    if content.get("kind") in EVALUATORS:
        return EVALUATORS[content["kind"]].read(content)
    # Earlier versions did not write the kind.
    firsts = {next(iter(e.METRICS)).split("/")[0]: e for e in EVALUATORS.values()}
    for key, evaluator in firsts.items():
        if key in content:
            return evaluator.read(content)
    raise UserError(f"no result of an evaluation: neither {' nor '.join(firsts)} is in it")
