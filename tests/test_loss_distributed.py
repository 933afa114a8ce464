"""The contrastive losses over real gloo ranks against a full float64 matrix of all pairs."""

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from contrastive_reference import (
    KINDS,
    Result,
    assert_agree,
    chunked,
    random_features,
    reference,
)
from distributed import RankError, run_ranks

from navit_clip.loss import softmax_contrastive_loss

WIDTH, SCALE, BIAS = 6, 15.0, -8.0


class Case(NamedTuple):
    kind: str
    counts: tuple[int, ...]
    chunk_size: int
    dtype: torch.dtype
    normalise: bool = True

    def features(self):
        return random_features(
            sum(self.counts), WIDTH, seed=0, dtype=self.dtype, normalise=self.normalise
        )

    def local(self, rank):
        return [x.split(self.counts)[rank] for x in self.features()]


def cases(*counts):
    made = [
        Case(kind, c, chunk_size, torch.float64)
        for kind, c, chunk_size in itertools.product(KINDS, counts, (1, 2, 1024))
    ]
    for kind, dtype in itertools.product(KINDS, (torch.float32, torch.bfloat16)):
        made.append(Case(kind, counts[0], 3, dtype))
    made.append(Case("softmax", counts[0], 3, torch.float32, normalise=False))
    return made


def check(made, per_rank):
    """per_rank[rank][case]: gradients of features are local, of scale and bias a share."""
    for i, case in enumerate(made):
        parts: list[Result] = [results[i] for results in per_rank]
        assert all(torch.equal(part.loss, parts[0].loss) for part in parts), case
        for part in parts:
            assert part.image.dtype == part.text.dtype == case.dtype
        whole = Result(
            parts[0].loss,
            torch.cat([part.image for part in parts]),
            torch.cat([part.text for part in parts]),
            torch.stack([part.scale for part in parts]).sum(0),
            torch.stack([part.bias for part in parts]).sum(0),
        )
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[case.dtype]
        try:
            assert_agree(whole, reference(case.kind, *case.features(), SCALE, BIAS), tolerance)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def run_cases(made, group=None):
    rank = dist.get_rank(group)
    return [
        chunked(c.kind, *c.local(rank), SCALE, BIAS, chunk_size=c.chunk_size, group=group)
        for c in made
    ]


def raised(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def loss_of_zeros(*shape, dtype=torch.float32, group=None):
    features = torch.zeros(shape, dtype=dtype)
    return softmax_contrastive_loss(features, features, torch.tensor(1.0), group=group)


def scenario_of_two(made):
    rank = dist.get_rank()
    errors = (
        raised(lambda: loss_of_zeros(0, 4)),
        raised(lambda: loss_of_zeros(2, 4 + rank)),
        raised(lambda: loss_of_zeros(2, 4, dtype=(torch.float32, torch.bfloat16)[rank])),
    )
    return run_cases(made), errors, train_under_ddp(rank)


def tower():
    torch.manual_seed(0)
    return torch.nn.Linear(WIDTH, 4, dtype=torch.float64)


def train_under_ddp(rank):
    """DDP averages gradients; the documented factor makes the average the full gradient."""
    image, text = Case("softmax", (3, 5), 2, torch.float64).local(rank)
    model = torch.nn.parallel.DistributedDataParallel(tower())
    out = model(torch.cat([image, text]))
    loss = softmax_contrastive_loss(*out.chunk(2), torch.tensor(SCALE), chunk_size=2)
    (loss * dist.get_world_size()).backward()
    return model.module.weight.grad


def scenario_of_three(made, made_for_two):
    rank = dist.get_rank()
    pair = dist.new_group([0, 2])
    if rank == 1:
        sub = raised(lambda: loss_of_zeros(2, 4, group=pair))
    else:
        sub = run_cases(made_for_two, pair)
    alone = [dist.new_group([r]) for r in range(3)][rank]
    single = Case("sigmoid", (4,), 3, torch.float64)
    single_result = chunked("sigmoid", *single.local(0), SCALE, BIAS, group=alone)
    return run_cases(made), sub, single_result


def test_one_rank():
    made = cases((5,), (1,))
    check(made, run_ranks(run_cases, 1, made))


def test_two_ranks():
    made = cases((4, 4), (7, 2), (0, 5), (1, 0))
    results, errors, gradients = zip(*run_ranks(scenario_of_two, 2, made), strict=True)
    check(made, results)
    for rank_errors in errors:
        assert "at least one pair" in rank_errors[0]
        assert "float32 [2, 4], torch.float32 [2, 5]" in rank_errors[1]
        assert "float32 [2, 4], torch.bfloat16 [2, 4]" in rank_errors[2]

    image, text = Case("softmax", (8,), 2, torch.float64).local(0)
    model = tower()
    logits = SCALE * model(image) @ model(text).T
    target = torch.arange(8)
    cross_entropy = torch.nn.functional.cross_entropy
    (cross_entropy(logits, target) / 2 + cross_entropy(logits.T, target) / 2).backward()
    for gradient in gradients:
        torch.testing.assert_close(gradient, model.weight.grad)


def test_three_ranks_and_subgroups():
    made = cases((3, 0, 5), (2, 2, 2), (0, 0, 4), (6, 1, 3))
    made_for_two = cases((3, 5), (0, 2))
    returned = run_ranks(scenario_of_three, 3, made, made_for_two)
    results, subs, singles = zip(*returned, strict=True)
    check(made, results)
    check(made_for_two, [subs[0], subs[2]])
    assert "not a member" in subs[1]
    single = Case("sigmoid", (4,), 3, torch.float64)
    for result in singles:
        assert_agree(result, reference("sigmoid", *single.features(), SCALE, BIAS), 1e-9)


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise RuntimeError("deliberate")
    dist.barrier()


def test_helper_reports_a_failing_rank():
    with pytest.raises(RankError, match="deliberate"):
        run_ranks(fail_on_rank_one, 2, timeout=60)
