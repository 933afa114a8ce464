"""The evaluators on 1, 2 and 3 ranks, equal to the last bit, with fewer blocks than ranks too."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from eval_cases import ALONE, SETTINGS, embed, open_dataset, run, small_blocks, write_all
from shard_factory import sample, write_shard

from navit_clip import distributed
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.evaluation import __main__ as command
from navit_clip.evaluation import datasets
from navit_clip.evaluation import embed as embedding
from navit_clip.evaluation.datasets import ShardDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.models import PackedModel
from navit_clip.evaluation.retrieval import Retrieval, RetrievalSpec
from navit_clip.evaluation.zeroshot import ZeroShot, ZeroShotSpec
from navit_clip.model import NaViTCLIP

DATASETS = ("classes", "coco", "mixed", "single", "bad", "cut")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("eval"))


@pytest.fixture
def blocks(monkeypatch):
    """Puts the sizes of blocks back."""
    monkeypatch.setattr(datasets, "BLOCK", datasets.BLOCK)
    monkeypatch.setattr(embedding, "TEXT_BLOCK", embedding.TEXT_BLOCK)


def evaluators(root: Path) -> list[ZeroShot | Retrieval]:
    settings = {"max_tokens": (6,), "native": True, "square": (32,)}
    templates = str(root / "templates.txt")
    images, captions = str(root / "coco/images"), str(root / "coco/captions.json")
    return [
        ZeroShot(ZeroShotSpec(str(root / "classes"), templates=templates, **settings)),
        # The label without a name is found by rank 0 alone.
        ZeroShot(ZeroShotSpec(str(root / "classes"), classnames=templates, templates="plain")),
        Retrieval(RetrievalSpec(images=images, captions=captions, **settings)),
        Retrieval(RetrievalSpec(str(root / "single"), **settings)),
    ]


def everything(model_dir: Path, root: Path, ranks: Ranks, cases):
    """What embedding gives by (dataset, workers), or the line it fails with, and all results."""
    small_blocks()
    model = PackedModel(NaViTCLIP.from_directory(model_dir), "tiny")
    embedded: dict[tuple[str, int], Embedded | str] = {}
    for name, workers in cases:
        try:
            embedded[name, workers] = embed(model, open_dataset(root, name), ranks, workers)
        except UserError as error:
            embedded[name, workers] = str(error)
    results = []
    for evaluator in evaluators(root):
        try:
            result = evaluator.run(model, ranks, 0)
            results.append(json.dumps(result and result.to_json()))
        except UserError as error:
            results.append(str(error))
    return embedded, results


def on_rank(model_dir: Path, root: Path, store: Path, cases):
    """`everything` among three ranks, and then among the first two of them."""
    cpu = torch.device("cpu")
    results = [everything(model_dir, root, Ranks(dist.get_rank(), 3, cpu), cases)]
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank < 2:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        results.append(everything(model_dir, root, Ranks(rank, 2, cpu), cases))
    return results


def without_vectors(one: Embedded) -> Embedded:
    """What ranks other than the first have."""
    return replace(one, embeddings={key: v[:0] for key, v in one.embeddings.items()})


def assert_equal(one: Embedded, other: Embedded) -> None:
    for field in fields(Embedded):
        if field.name != "embeddings":
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    assert list(one.embeddings) == list(other.embeddings) == SETTINGS
    for setting in SETTINGS:
        assert torch.equal(one.embeddings[setting], other.embeddings[setting]), setting


@pytest.mark.usefixtures("blocks", "one_thread")
def test_everything_is_equal_on_any_number_of_ranks_and_workers(model_dir, data, tmp_path):
    others = multiprocessing.active_children()  # of other tests, such as Triton's interpreter
    alone, results = everything(model_dir, data, ALONE, [(name, 0) for name in DATASETS])
    with_workers, _ = everything(model_dir, data, ALONE, [("classes", 1), ("mixed", 2)])
    assert multiprocessing.active_children() == others
    cases = [*((name, 0) for name in DATASETS), ("mixed", 2)]
    ranks = run_ranks(on_rank, 3, model_dir, data, tmp_path / "store", cases)
    three, two = [result[0] for result in ranks], [result[1] for result in ranks[:2]]
    of_ranks = (enumerate(result[0] for result in world) for world in (three, two))
    for rank, embedded in ((0, with_workers), *chain(*of_ranks)):
        for (name, _), one in embedded.items():
            expected = alone[name, 0]
            # Every rank learns of a failure that only one of them met.
            if isinstance(one, str):
                assert one == expected
            else:
                assert_equal(one, expected if rank == 0 else without_vectors(expected))
    assert "no image could be read: 1 skipped (unreadable_image 1), the first" in alone["bad", 0]
    assert "fetch the shard again" in alone["cut", 0]
    assert alone["mixed", 0].names == ["0/0", "0/2", "0/3", "1/0"]

    assert [len(json.loads(results[i])["views"]) for i in (0, 2)] == [4, 4]
    assert "2 class names for 4" in results[1]
    assert "one image alone is found by every query" in results[3]
    for world in (three, two):
        assert world[0][1] == results
        for _, others in world[1:]:
            assert others == ["null", results[1], "null", results[3]]


def test_an_unexpected_error_on_one_rank_ends_it_at_once(monkeypatch, capsys):
    # Where the others wait for it, neither its threads nor the process group may be waited for.
    def fail(*_):
        raise OSError("the reason")

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(command, "join_ranks", lambda _: nullcontext(Ranks(1, 2, ALONE.device)))
    monkeypatch.setattr(command, "_run", fail)
    monkeypatch.setattr(distributed, "end_process", end)
    assert run("zeroshot", "--model", "m", "--data", "d") == 1
    assert "OSError: the reason" in capsys.readouterr().err


def test_blocks_are_whole_wherever_they_are_read(data, blocks):
    small_blocks()
    for name in ("classes", "coco", "mixed"):
        dataset = open_dataset(data, name)
        whole = [item.key for item in dataset.read(0, 1)]
        assert whole == sorted(whole)
        for parts in (2, 3, 5):
            read = [[item.key for item in dataset.read(part, parts)] for part in range(parts)]
            assert sorted(key for part in read for key in part) == whole
            owners: dict[int, set[int]] = {}
            for part, keys in enumerate(read):
                assert keys == sorted(keys)
                for key in keys:
                    owners.setdefault(datasets.block_of(key), set()).add(part)
            assert all(len(parts_of_block) == 1 for parts_of_block in owners.values())
            assert len(set().union(*owners.values())) > 1


@pytest.mark.usefixtures("blocks")
def test_embeddings_do_not_depend_on_where_shards_end(model_dir, tmp_path):
    model, found = PackedModel(NaViTCLIP.from_directory(model_dir), "tiny"), []
    for number, counts in enumerate(([8], [3, 5], [1, 1, 4, 2])):
        small_blocks()
        samples, shards = iter(range(8)), []
        for shard, count in enumerate(counts):
            content = {str(i): sample(i) for i in islice(samples, count)}
            shards.append(str(write_shard(tmp_path / f"{number}/{shard}.tar", content)))
        dataset = ShardDataset(shards, ["txt"])
        for parts in (1, 3):
            whole = sorted(
                (item for part in range(parts) for item in dataset.read(part, parts)),
                key=lambda item: item.key,
            )
            assert [item.key for item in whole] == list(range(8))
        found.append(embed(model, dataset))
    for one in found[1:]:
        assert_equal(replace(one, names=found[0].names), found[0])
