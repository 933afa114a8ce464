"""Re-ranking: ranks and costs against plain loops, as an evaluation, and what is refused."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from eval_cases import ALONE, run, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st

from navit_clip import NaViTCLIP
from navit_clip.errors import UserError
from navit_clip.evaluation import ranking
from navit_clip.evaluation.models import PackedModel
from navit_clip.evaluation.ranking import pair_ranks, rerank
from navit_clip.evaluation.registry import read_result
from navit_clip.evaluation.report.html import write_report
from navit_clip.evaluation.rerank import Rerank, RerankSpec
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.evaluation.summary import table

DRAWN = st.sampled_from(["normal", "few", "copies", "nan"])


def draw(rng, count, kind):
    """Vectors, some with many equal scores or one that is no number."""
    if kind == "copies":
        return rng.normal(size=(3, 4))[rng.integers(0, 3, count)]
    vectors = rng.normal(size=(count, 4)) if kind == "normal" else rng.integers(0, 3, (count, 4))
    vectors = vectors.astype(float)
    if kind == "nan":
        vectors[rng.random(count) < 0.2, 0] = math.nan
    return vectors


def score(one, other):
    return sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(2, 12),
    more=DRAWN,
    scores=st.integers(1, 60),
    data=st.data(),
)
def test_the_nearest_are_ranked_again_and_others_keep_their_rank(seed, count, more, scores, data):
    rng = np.random.default_rng(seed)
    tops = data.draw(st.lists(st.integers(1, count), min_size=1, max_size=4))
    owner = rng.integers(0, count, rng.integers(1, 15))
    few, texts, cost = (
        draw(rng, count, "normal"),
        draw(rng, len(owner), "normal"),
        rng.random(count),
    )
    many = draw(rng, count, more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_SCORES", scores)
        tensors = [torch.from_numpy(x) for x in (few, many, texts, owner)]
        before = pair_ranks(tensors[0], *tensors[2:])[1]
        found = rerank(*tensors, before, tops, torch.from_numpy(cost))
    for top, one in zip(tops, found, strict=True):
        ranks, spent, again = [], 0.0, set()
        for text, own in zip(texts, owner, strict=True):
            order = sorted(range(count), key=lambda i: -score(text, few[i]))
            first, place = order[:top], order.index(own)
            if own in first:
                right = score(text, many[own])
                others = [score(text, many[i]) for i in first if i != own]
                place = sum(not other < right - ranking.TIE for other in others)
            ranks.append(place)
            spent += sum(cost[i] for i in first)
            again |= set(first)
        assert one.rank_T.tolist() == ranks
        assert one.cost == pytest.approx(spent / len(owner))
        assert one.again == pytest.approx(len(again) / count)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), kind=DRAWN, top=st.integers(1, 9))
def test_what_is_not_certain_to_be_among_the_first_is_not(seed, count, kind, top):
    rng, top = np.random.default_rng(seed), min(top, count)
    owner = torch.from_numpy(rng.integers(0, count, 10))
    few, texts = (torch.from_numpy(draw(rng, n, kind)) for n in (count, 10))
    many = torch.from_numpy(draw(rng, count, "normal"))
    before = pair_ranks(few, texts, owner)[1]
    (found,) = rerank(few, many, texts, owner, before, [top], torch.zeros(count))
    kept = before >= top
    assert found.rank_T[kept].equal(before[kept])
    assert (found.rank_T[~kept] < top).all()
    (everyone,) = rerank(few, many, texts, owner, before, [count], torch.zeros(count))
    assert everyone.rank_T.equal(pair_ranks(many, texts, owner)[1])


@pytest.fixture(scope="module")
def model(model_dir):
    return PackedModel(NaViTCLIP.from_pretrained(model_dir), "tiny")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data"))


def evaluator_of(coco, **spec):
    paths = {"images": str(coco / "images"), "captions": str(coco / "captions.json")}
    return Rerank(RerankSpec(**paths, **spec))


def test_rows_are_the_limits_and_what_follows_from_their_vectors(model, coco, tmp_path):
    evaluator = evaluator_of(coco, max_tokens=(3, 6), top=(2, 5, 99))
    result = evaluator.run(model, ALONE, 0)
    labels = [row.setting.label for row in result.rows]
    pairs = ("3→6", "3→12", "6→12")
    assert labels == ["3", "6", "12", *(f"{p} top {k}" for p in pairs for k in (2, 5))]
    data, rows = evaluator.data, {row.setting: row for row in result.rows}
    few, many = EvalSetting("capped", 3), EvalSetting("capped", 12)
    row = rows[EvalSetting("rerank", 3, 12, top=5)]
    flops = torch.tensor([model.image_flops(n) for n in data.lengths[many]]).double()
    vectors = (data.embeddings[few], data.embeddings[many], evaluator.texts_TD)
    image_T = data.image_of_texts
    before = pair_ranks(data.embeddings[few], evaluator.texts_TD, image_T)[1]
    (expected,) = rerank(*vectors, image_T, before, [5], flops)
    hits = (expected.rank_T < 1).double().mean().item()
    assert row.metrics["text_to_image/R@1"] == pytest.approx(hits)
    assert row.metrics["query_gflops"] == expected.cost / 1e9
    assert row.metrics["again"] == expected.again
    assert (row.mean_tokens, row.flops_per_image) == (
        rows[few].mean_tokens,
        rows[few].flops_per_image,
    )
    assert not any(key.startswith("image_to_text") for key in row.metrics)
    write_report(tmp_path / "report.html", result, evaluator.samples(), command="eval rerank")
    assert "ranked again" in (tmp_path / "report.html").read_text()


def test_the_command_writes_what_is_read_again(coco, model_dir, tmp_path, capsys):
    path = tmp_path / "rerank.json"
    folder = shutil.copytree(model_dir, tmp_path / "model")  # its card gets a line
    flags = ["--images", coco / "images", "--captions", coco / "captions.json", "--top", "2,3"]
    words = ["rerank", "--model", folder, *flags, "--max-tokens", "4", "--output", path]
    assert run(*words, "--curve", tmp_path / "curve.png") == 0
    result = read_result(json.loads(path.read_text()))
    assert table(result) in capsys.readouterr().out
    assert result.rows[-1].setting == EvalSetting("rerank", 4, 12, top=3)
    assert EvalSetting.from_label("rerank", result.rows[-1].setting.label).key == "4-12-top3"
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_bad_input_is_one_line(model, coco):
    with pytest.raises(ValueError, match="top must hold numbers of at least 2, got"):
        evaluator_of(coco, top=(5, 1))
    for wrong in ({}, {"then": 8}, {"top": 3}, {"then": 8, "percent": 3}):
        with pytest.raises(ValueError, match="then and top to a rerank setting"):
            EvalSetting("rerank", 4, **wrong)
    with pytest.raises(UserError, match="re-ranking needs two token limits, and that of tiny is"):
        evaluator_of(coco).run(model, ALONE, 0)
    with pytest.raises(UserError, match=r"there are 8 images: give --top numbers below that, not"):
        evaluator_of(coco, max_tokens=(3,), top=(8, 50)).run(model, ALONE, 0)
