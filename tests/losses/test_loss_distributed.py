"""The contrastive losses over real gloo ranks against a full float64 matrix of all pairs.

Processes are slow to start, so eight ranks run everything once, in process groups of one to eight
of them, and the tests look at what came back.
"""

import itertools
import traceback
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from contrastive_reference import KINDS, Result, assert_agree, chunked, random_features, reference
from distributed import RankError, run_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from navit_clip.losses import _gather, _members
from navit_clip.losses._gather import Gather, choose_exchange
from navit_clip.losses._members import Members
from navit_clip.losses._ring import Ring
from navit_clip.losses.contrastive import softmax_contrastive_loss

WORLD = tuple(range(8))
FOUR = (0, 1, 2, 3)
GROUPS = ((2,), (0, 1), (1, 3), (0, 1, 2), (0, 2, 6), FOUR, (4, 5, 6, 7), WORLD)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """A batch over the ranks of a group."""

    kind: str
    members: tuple[int, ...]
    counts: tuple[int, ...]
    chunk_size: int
    dtype: torch.dtype
    normalise: bool = True
    width: int = 6
    scale: float = 15.0
    bias: float = -8.0
    seed: int = 0
    known: bool = False  # whether the ranks know each other's counts
    exchange: str = "ring"
    round_rows: int = 65536

    def features(self):
        return random_features(
            sum(self.counts),
            self.width,
            self.seed,
            dtype=self.dtype,
            normalise=self.normalise,
        )

    def local(self):
        place = self.members.index(dist.get_rank())
        return [x.split(self.counts)[place] for x in self.features()]

    def run(self, groups):
        """This rank's result; None outside the group."""
        if dist.get_rank() not in self.members:
            return None
        group = groups[self.members]
        options = {"chunk_size": self.chunk_size, "group": group, "exchange": self.exchange}
        if self.known:
            options["counts"] = self.counts
        with mock.patch.object(_gather, "ROUND_ROWS", self.round_rows):
            return chunked(self.kind, *self.local(), self.scale, self.bias, **options)

    def check(self, results):
        """Results by rank: gradients of features are local, of scale and bias a share."""
        parts: list[Result] = [results[rank] for rank in self.members]
        assert all(torch.equal(part.loss, parts[0].loss) for part in parts), self
        for part in parts:
            assert part.image.dtype == part.text.dtype == self.dtype
        whole = Result(
            parts[0].loss,
            torch.cat([part.image for part in parts]),
            torch.cat([part.text for part in parts]),
            torch.stack([part.scale for part in parts]).sum(0),
            torch.stack([part.bias for part in parts]).sum(0),
        )
        expected = reference(self.kind, *self.features(), self.scale, self.bias)
        try:
            assert_agree(whole, expected, TOLERANCES[self.dtype])
        except AssertionError as error:
            raise AssertionError(f"{self}: {error}") from error


def fixed_cases():
    made = []
    for members, counts in (
        ((2,), (5,)),
        ((2,), (1,)),
        ((0, 1), (4, 4)),
        ((0, 1), (7, 2)),
        ((1, 3), (0, 5)),
        ((1, 3), (1, 0)),
        ((0, 1, 2), (3, 0, 5)),
        ((0, 1, 2), (2, 2, 2)),
        ((0, 2, 6), (0, 0, 4)),
        (FOUR, (6, 1, 3, 0)),
        (WORLD, (2, 0, 5, 1, 1, 3, 0, 4)),
    ):
        for kind, chunk_size in itertools.product(KINDS, (1, 2, 1024)):
            known = chunk_size == 2
            made.append(Case(kind, members, counts, chunk_size, torch.float64, known=known))
        for kind, round_rows in itertools.product(KINDS, (1, 2 * len(members), 65536)):
            gather = {"exchange": "gather", "round_rows": round_rows}
            made.append(Case(kind, members, counts, 3, torch.float64, **gather))
        for kind, dtype in itertools.product(KINDS, (torch.float32, torch.bfloat16)):
            for exchange in ("ring", "gather"):
                made.append(Case(kind, members, counts, 3, dtype, exchange=exchange))
        made.append(Case("softmax", members, counts, 3, torch.float32, normalise=False))
    return made


@st.composite
def drawn_cases(draw, dtype):
    members = draw(st.sampled_from(GROUPS))
    exact = dtype == torch.float64
    return Case(
        kind=draw(st.sampled_from(KINDS)),
        members=members,
        counts=draw(st.tuples(*[st.integers(0, 9)] * len(members)).filter(any)),
        chunk_size=draw(st.integers(1, 12)),
        dtype=dtype,
        normalise=draw(st.booleans()) if exact else True,
        width=draw(st.integers(1, 9)),
        scale=draw(st.floats(-5, 100) if exact else st.floats(0, 30)),
        bias=draw(st.floats(-20, 20)),
        seed=draw(st.integers(0, 2**31)),
        known=draw(st.booleans()),
        exchange=draw(st.sampled_from(("ring", "gather"))),
        round_rows=draw(st.integers(1, 40)),
    )


class Seen(NamedTuple):
    """What one rank brings back."""

    fixed: list[Result | None]
    drawn_failure: str
    errors: list[str]
    gradient: torch.Tensor
    visits: torch.Tensor
    sent_bytes: int
    gathers: list[int]
    gathered_bytes: int


def run_everything():
    groups: dict[Any, Any] = {members: dist.new_group(list(members)) for members in GROUPS}
    signals = dist.new_group()
    groups[WORLD] = None
    return Seen(
        fixed=[case.run(groups) for case in fixed_cases()],
        drawn_failure=failure_among_drawn_cases(groups),
        errors=mistakes(groups),
        gradient=gradient_under_ddp(),
        visits=visits_that_wait_for_each_other(signals),
        sent_bytes=count_sent_bytes(groups),
        gathers=[count_gathers(groups, known) for known in (False, True)],
        gathered_bytes=count_gathered_bytes(groups),
    )


def failure_among_drawn_cases(groups):
    """Rank 0 draws cases and checks them; so the ranks agree on the next one, also in shrinking."""

    def announce(case):
        message = [case]
        dist.broadcast_object_list(message)
        return message[0]

    def run(case):
        try:
            result = case.run(groups)
        except Exception as error:
            result = error
        results = [None] * dist.get_world_size()
        dist.gather_object(result, results if dist.get_rank() == 0 else None)
        return results

    if dist.get_rank() > 0:
        while (case := announce(None)) is not None:
            run(case)
        return ""

    def check(case):
        results = run(announce(case))
        for result in results:
            if isinstance(result, Exception):
                raise result
        case.check(results)

    try:
        for dtype, examples in ((torch.float64, 80), (torch.bfloat16, 15)):
            settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )(given(case=drawn_cases(dtype))(check))()
    except Exception:
        return traceback.format_exc()
    finally:
        announce(None)
    return ""


def mistakes(groups):
    rank = dist.get_rank()

    def raised(*shape, dtype=torch.float32, group=None):
        features = torch.zeros(shape, dtype=dtype)
        try:
            softmax_contrastive_loss(features, features, torch.tensor(1.0), group=group)
        except ValueError as error:
            return str(error)
        return "nothing"

    return [
        raised(0, 4),
        raised(2, 4 + (rank == 3)),
        raised(2, 4, dtype=(torch.float32, torch.bfloat16)[rank == 3]),
        "" if rank in (1, 3) else raised(2, 4, group=groups[1, 3]),
    ]


DDP_CASE = Case("softmax", WORLD, (3, 5, 1, 2, 1, 1, 2, 1), 2, torch.float64)


def tower():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 4, dtype=torch.float64)


def gradient_under_ddp():
    """DDP averages gradients; the documented factor makes the average the full gradient."""
    image, text = DDP_CASE.local()
    model = torch.nn.parallel.DistributedDataParallel(tower())
    out = model(torch.cat([image, text]))
    loss = softmax_contrastive_loss(*out.chunk(2), torch.tensor(DDP_CASE.scale), chunk_size=2)
    (loss * dist.get_world_size()).backward()
    return model.module.weight.grad


def visits_that_wait_for_each_other(signals):
    """A rank stays at its own block until the next rank has seen that block; else always."""
    rank, size = dist.get_rank(), dist.get_world_size()
    block = torch.full((2, 3), float(rank))

    def visit(own, blocks):
        previous = (rank - 1) % size
        if own and rank == 0:
            dist.recv(torch.empty(1), 1, group=signals)
        if rank == 1 and blocks[0][0, 0] == previous:
            dist.send(torch.ones(1), 0, group=signals)
        return blocks[0] + rank

    return Ring(Members.join(block)).circulate((block,), visit, merge="add")


EVEN_CASE = Case("softmax", FOUR, (5, 5, 5, 5), 2, torch.float32)


def count_sent_bytes(groups):
    sent = 0
    start = dist.batch_isend_irecv

    def count(operations):
        nonlocal sent
        sent += sum(o.tensor.nbytes for o in operations if o.op is dist.isend)
        return start(operations)

    dist.batch_isend_irecv = count
    try:
        EVEN_CASE.run(groups)
    finally:
        dist.batch_isend_irecv = start
    return sent


def count_gathers(groups, known):
    gathers = 0
    gather = _members.all_gather

    def count(*args, **kwargs):
        nonlocal gathers
        gathers += 1
        return gather(*args, **kwargs)

    _members.all_gather = count
    try:
        EVEN_CASE._replace(known=known).run(groups)
    finally:
        _members.all_gather = gather
    return gathers


def count_gathered_bytes(groups):
    """Bytes that a rank sends to others in rounds; each collective sends the least there is."""
    sent, others = 0, len(EVEN_CASE.members) - 1
    gather, scatter, reduce = _gather.all_gather, _gather.reduce_scatter, dist.all_reduce

    def count_gather(output, block, **kwargs):
        nonlocal sent
        sent += others * block.nbytes
        return gather(output, block, **kwargs)

    def count_scatter(output, blocks, **kwargs):
        nonlocal sent
        sent += others * output.nbytes
        return scatter(output, blocks, **kwargs)

    def count_reduce(tensor, *args, **kwargs):
        nonlocal sent
        sent += 2 * others * tensor.nbytes // (others + 1)
        return reduce(tensor, *args, **kwargs)

    with (
        mock.patch.object(_gather, "all_gather", count_gather),
        mock.patch.object(_gather, "reduce_scatter", count_scatter),
        mock.patch.object(dist, "all_reduce", count_reduce),
    ):
        EVEN_CASE._replace(exchange="gather", known=True, round_rows=4).run(groups)
    return sent


@pytest.fixture(scope="module")
def ranks() -> list[Seen]:
    return run_ranks(run_everything, len(WORLD), timeout=240)


def test_groups_of_one_to_eight_ranks(ranks):
    for i, case in enumerate(fixed_cases()):
        case.check([seen.fixed[i] for seen in ranks])


def test_any_batch_in_any_group(ranks):
    assert not ranks[0].drawn_failure, ranks[0].drawn_failure


def test_mistakes_are_named_on_every_rank(ranks):
    for rank, (no_pair, width, dtype, outsider) in enumerate(seen.errors for seen in ranks):
        assert "at least one pair" in no_pair
        assert "float32 [2, 4], torch.float32 [2, 5]" in width
        assert "float32 [2, 4], torch.bfloat16 [2, 4]" in dtype
        if rank not in (1, 3):
            assert "not a member" in outsider


def test_ddp_with_the_documented_factor(ranks):
    image, text = DDP_CASE.features()
    model = tower()
    logits = DDP_CASE.scale * model(image) @ model(text).T
    target = torch.arange(len(logits))
    cross_entropy = torch.nn.functional.cross_entropy
    (cross_entropy(logits, target) / 2 + cross_entropy(logits.T, target) / 2).backward()
    for seen in ranks:
        torch.testing.assert_close(seen.gradient, model.weight.grad)


def test_blocks_travel_while_their_holder_works(ranks):
    for rank, seen in enumerate(ranks):
        expected = len(WORLD) * rank + sum(WORLD)
        assert torch.equal(seen.visits, torch.full((2, 3), float(expected)))


def test_sent_bytes_are_as_documented(ranks):
    """The formula of docs/scaling.md."""
    pairs, width, size = EVEN_CASE.counts[0], EVEN_CASE.width, 4
    members = len(EVEN_CASE.members)
    texts = 2 * (members - 1) * pairs * width * size
    text_gradients = members * pairs * width * 4
    log_sum_exps = (2 * members - 1) * pairs * 4
    for seen in ranks[:members]:
        assert seen.sent_bytes == texts + text_gradients + log_sum_exps


def test_gathered_bytes_are_as_documented(ranks):
    """The formula of docs/scaling.md, and the sum of the ranks' losses."""
    pairs, width, size = EVEN_CASE.counts[0], EVEN_CASE.width, 4
    members = len(EVEN_CASE.members)
    rows = (members - 1) * pairs * (2 * width * size + 4 * width + 4)
    log_sum_exps = 2 * (2 * (members - 1) * 4 * pairs)
    loss = 2 * (members - 1) * 4 // members
    for seen in ranks[:members]:
        assert seen.gathered_bytes == rows + log_sum_exps + loss


def test_ranks_that_know_the_counts_do_not_ask(ranks):
    assert all(seen.gathers == [1, 0] for seen in ranks[: len(FOUR)])


@pytest.mark.parametrize(
    ("counts", "exchange", "expected"),
    [
        ((5,), "auto", Ring),
        ((5,), "gather", Ring),
        ((5,) * 2, "gather", Gather),
        ((5,) * 16, "auto", Ring),
        ((5,) * 17, "auto", Gather),
        ((5,) * 17, "ring", Ring),
        ((4096,) * 17, "auto", Ring),
        ((0, 4095 * 17) + (1,) * 15, "auto", Gather),
    ],
)
def test_many_ranks_of_few_pairs_gather(counts, exchange, expected):
    assert isinstance(choose_exchange(exchange, Members(0, counts, None)), expected)


def test_rounds_bound_the_rows_that_a_rank_holds():
    assert Gather(Members(0, (256,) * 1024, None)).largest == _gather.ROUND_ROWS
    assert Gather(Members(0, (32,) * 1024, None)).largest == 32 * 1024
    assert Gather(Members(0, (3, 100_000), None)).largest == 100_000


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise RuntimeError("deliberate")
    dist.barrier()


def test_helper_reports_a_failing_rank():
    with pytest.raises(RankError, match="deliberate"):
        run_ranks(fail_on_rank_one, 2, timeout=60)
