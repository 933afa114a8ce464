"""Evaluates the models of a run, query by query, so that a report can resample queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from navit_clip.checkpoints.load_run import load_run
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.evaluator import EmbeddingEvaluator
from navit_clip.evaluation.models import PackedModel
from navit_clip.evaluation.ranking import Readout, classify, pair_ranks
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.evaluation.zeroshot import ZeroShot, class_vectors
from navit_clip.model import NaViTCLIP
from navit_clip.training.evaluation import Plan


def load_for_scores(
    run_dir: Path, step: int, device: torch.device
) -> tuple[NaViTCLIP, EvalSetting]:
    """The model of a checkpoint, and the setting that it was trained for.

    That is a token limit or, for a model of squares, a square. All models take token limits at
    native aspect ratio then, however they were trained.

    Raises:
        UserError: If it is no model of images and texts.
    """
    model, _ = load_run(run_dir, step, device)
    if not isinstance(model, NaViTCLIP):
        raise UserError("recipe.task.kind must be contrastive: other models have no texts")
    assert model.preprocess is not None
    own = EvalSetting("capped", model.preprocess.max_tokens)
    if model.preprocess.square:
        side = math.isqrt(model.preprocess.max_tokens) * model.config.image.patch_size
        own = EvalSetting("square", side)
    model.preprocess = replace(model.preprocess, square=False)
    return model, own


def score(
    plan: Plan, model: NaViTCLIP, own: EvalSetting, ranks: Ranks, workers: int, *, only_own: bool
) -> dict[str, Any]:
    """Ranks of the right answers of all queries.

    Args:
        plan: The evaluator.
        model: From `load_for_scores`, as is
        own: its setting.
        ranks: This process alone.
        workers: Decoding processes.
        only_own: Only that setting, not those of the evaluator too.

    Returns:
        ``own``, the setting; ``sizes``, height and width of each image; ``image_of``, by way the
        image of each query; ``ranks``, by setting and way the wrong answers at least as near as
        the right one, of each query.

    Raises:
        UserError: If the data cannot be read.
    """
    side = (own.side,) if own.side else ()
    limits, squares = ((), ()) if only_own else (plan.spec.max_tokens, plan.spec.square)
    spec = replace(plan.spec, max_tokens=limits, square=(*side, *squares))
    evaluator = plan.kind(spec)
    if not isinstance(evaluator, EmbeddingEvaluator):
        raise UserError(f"kind {plan.kind.kind} has no ranks of single queries")
    evaluator.run(PackedModel(model, "model"), ranks, workers)
    data = evaluator.data
    settings = [s for s in data.embeddings if not only_own or s == own]
    found = {s.key: _ranks(evaluator, data, s) for s in settings}
    ways = found[own.key]
    image_of = {
        way: data.image_of_texts.tolist() if way == "T→I" else list(range(len(data.names)))
        for way in ways
    }
    return {"own": own.key, "sizes": data.sizes, "image_of": image_of, "ranks": found}


def _ranks(
    evaluator: EmbeddingEvaluator[Any], data: Embedded, setting: EvalSetting
) -> dict[str, list[int]]:
    images_ED, texts_TD = data.embeddings[setting], evaluator.texts_TD
    if isinstance(evaluator, ZeroShot):
        classes_CD = class_vectors(texts_TD, len(evaluator.names))
        right_EC = _right(data.classes, len(classes_CD))
        each_E = torch.arange(len(images_ED))
        found = classify(Readout(images_ED, classes_CD), right_EC, each_E)
        return {"top-1": found.rank_E.tolist()}
    to_text_E, to_image_T = pair_ranks(images_ED, texts_TD, data.image_of_texts)
    return {"I→T": to_text_E.tolist(), "T→I": to_image_T.tolist()}


def _right(classes: Sequence[tuple[int, ...]], count: int) -> torch.Tensor:
    """Which classes are right for each image, bool [E, C]."""
    return torch.stack([F.one_hot(torch.tensor(found), count).sum(0).bool() for found in classes])
