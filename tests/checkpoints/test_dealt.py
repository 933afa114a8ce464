"""Of what several ranks have, each writes a part, and together they write all of it once."""

from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_cases import data_state, open_checkpoints, state
from distributed import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from navit_clip.checkpoints import checkpoint
from navit_clip.checkpoints.tensor_files import dealt
from navit_clip.distributed import Ranks


def count(part):
    return sum(count(value) if isinstance(value, dict) else 1 for value in part.values())


def plan_of(part, coordinator=False):
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(part, is_coordinator=coordinator)
    return planner, planner.create_local_plan()


@pytest.mark.parametrize("world_size", [1, 2, 5, 40])
def test_what_all_ranks_have_is_dealt_to_them(world_size):
    saved = state(1)
    saved["model"] |= {f"m{i}": torch.zeros(i + 1) for i in range(20)}
    saved["optimizer"] |= {"groups": [{"lr": 1.0, "names": ["w"]}, {"lr": torch.ones(())}]}
    saved["none"] = {"here": {}}
    parts = [dealt(saved, rank, world_size) for rank in range(world_size)]
    planner, _ = plan_of(parts[0], coordinator=True)
    plans = [plan_of(part)[1] for part in parts]
    _, whole = plan_of(saved, coordinator=True)
    found = [item.index for plan in plans for item in plan.items]
    assert len(found) == len(set(found))
    assert set(found) == {item.index for item in whole.items}
    counts = [count(part) for part in parts]
    assert max(counts) - min(counts) <= 1
    _, metadata = planner.create_global_plan(plans)
    assert metadata.planner_data == whole.planner_data
    assert metadata.state_dict_metadata.keys() == whole.planner_data.keys()


# 5 rows leave two ranks uneven shards and six ranks some empty ones, a single row nearly all.
SHAPES = {"even": (12, 3), "uneven": (5, 4), "one row": (1, 7), "vector": (11,)}
LAYOUTS = {
    "groups": ((3, 2), [Replicate(), Shard(0)]),
    "all": ((6,), [Shard(0)]),
    "copies": ((6,), [Replicate()]),
}


def layered(cut):
    """A state of every shape, as plain tensors or cut in every way, that no two parts share."""
    values, saved = iter(range(10**6)), state(3)
    weights = {
        f"{layout}.{name}.{i}": torch.tensor([next(values) for _ in range(count)]).view(shape)
        for layout in LAYOUTS
        for name, shape in SHAPES.items()
        for i in range(4)
        for count in [torch.Size(shape).numel()]
    }
    if cut:
        meshes = {name: init_device_mesh("cpu", mesh) for name, (mesh, _) in LAYOUTS.items()}
        for name, weight in weights.items():
            layout = name.split(".")[0]
            weights[name] = distribute_tensor(weight, meshes[layout], LAYOUTS[layout][1])
    saved["model"] |= weights
    return saved


def save_cut(path):
    """Writes a checkpoint; returns what this rank copied for it: name, offsets and size."""
    ranks, copied = Ranks(dist.get_rank(), 6, torch.device("cpu")), []
    saved, checkpoints = layered(cut=True), open_checkpoints(path, ranks)

    def async_save(part, **options):
        copied.extend(plan_of(part)[1].items)
        return dcp.async_save(part, **options)

    with patch.object(
        checkpoint, "dcp", SimpleNamespace(**{**vars(dcp), "async_save": async_save})
    ):
        checkpoints.save(3, saved, data_state(3))
    checkpoints.close()
    again = layered(cut=True)
    for weight in again["model"].values():
        weight.zero_()
    open_checkpoints(path, ranks).load(3, again)
    for name, weight in saved["model"].items():
        parts = (getattr(w, "to_local", lambda w=w: w)() for w in (weight, again["model"][name]))
        assert torch.equal(*parts), name
    return [
        (item.index.fqn, tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))
        for item in copied
        if item.tensor_data is not None
    ]


def test_what_groups_of_ranks_have_is_dealt_to_them_and_read_by_one(tmp_path):
    """Six ranks, as three groups that have all shards between two, and as one group."""
    copied = run_ranks(save_cut, 6, tmp_path)
    times = Counter(item for items in copied for item in items if 0 not in item[2])
    assert set(times.values()) == {1}
    expected, loaded = layered(cut=False), layered(cut=False)
    whole = {f"model.{name}": weight for name, weight in expected["model"].items()}
    numbers = Counter[str]()
    for name, _, sizes in times:
        numbers[name] += torch.Size(sizes).numel()
    assert {name: numbers[name] for name in whole} == {n: w.numel() for n, w in whole.items()}
    # Large and small ones take turns in a state, and no rank may get all of the large ones.
    of_groups = [sum(name.startswith("model.groups.even") for name, *_ in p) for p in copied]
    assert max(of_groups) - min(of_groups) <= 1
    for weight in loaded["model"].values():
        weight.zero_()
    checkpoints = open_checkpoints(tmp_path)
    assert checkpoints.newest() == 3
    checkpoints.load(3, loaded)
    for name, weight in expected["model"].items():
        assert torch.equal(loaded["model"][name], weight), name
