"""All evaluators by name. To add one: a module with its class, and a line here.

The command line makes a subcommand of each, the trainer's configuration names them as ``kind``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from navit_clip.errors import UserError
from navit_clip.evaluation.cascade import Cascade
from navit_clip.evaluation.classification import Classify
from navit_clip.evaluation.evaluator import Evaluator
from navit_clip.evaluation.fewshot import FewShot
from navit_clip.evaluation.linear import Linear
from navit_clip.evaluation.reconstruct import Reconstruct
from navit_clip.evaluation.rerank import Rerank
from navit_clip.evaluation.results import EvalResult, read_rows
from navit_clip.evaluation.retrieval import Retrieval
from navit_clip.evaluation.zeroshot import ZeroShot

EVALUATORS: dict[str, type[Evaluator[Any]]] = {
    evaluator.kind: evaluator
    for evaluator in (ZeroShot, Retrieval, Classify, FewShot, Linear, Cascade, Rerank, Reconstruct)
}


def read_result(content: Any) -> EvalResult:
    """Reads a result from JSON, whichever evaluator wrote it.

    Raises:
        UserError: If it is damaged or something else; names the key.
    """
    if not isinstance(content, Mapping):
        raise UserError("no result of an evaluation: it is no JSON object")
    # Earlier versions did not write the kind.
    kinds = reversed(EVALUATORS.items())  # of two with the same metrics the first is the older
    firsts = {next(iter(e.METRICS)).split("/")[0]: kind for kind, e in kinds}
    kind = content.get("kind") or next((firsts[key] for key in firsts if key in content), None)
    if kind not in EVALUATORS:
        raise UserError(f"no result of an evaluation: neither {' nor '.join(firsts)} is in it")
    evaluator = EVALUATORS[kind]
    try:
        return EvalResult(
            rows=read_rows(content, evaluator.METRICS),
            precision=str(content.get("precision", "fp32")),  # earlier versions knew no other
            kind=kind,
            title=evaluator.title,
            metrics=evaluator.METRICS,
            data=str(content.get("data") or ""),
            counts={name: int(content[name]) for name in ("images", evaluator.counted)},
            skipped={str(reason): int(n) for reason, n in dict(content["skipped"]).items()},
        )
    except KeyError as error:
        raise UserError(f"damaged result: {error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"damaged result: {error}") from error
