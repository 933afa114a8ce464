"""Only rank 0 asks a store what it holds; all ranks find the same shards."""

from __future__ import annotations

import pickle
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from navit_clip.data.config import DataConfig, DatasetConfig
from navit_clip.data.listings import list_once, list_stored
from navit_clip.data.mixture import Mixture, first_shards
from navit_clip.data.patterns import expand_shards
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def memory():
    """A store that each process has for itself."""
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()


def fill(*names: str) -> None:
    for name in names:
        fsspec.filesystem("memory").pipe_file(name, b"")


def look(folder: str) -> tuple[DataConfig, Mixture, str]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    if ranks.is_first:
        fill(*(f"/b/{folder}/{n}.tar" for folder in "ac" for n in range(3)), "/b/held/0.tar")
    mix = {
        "one": DatasetConfig(["memory://b/a/*.tar", f"{folder}/local"]),
        "two": DatasetConfig(f"{folder}/list.txt", weight=3.0),
    }
    config = DataConfig(mix=mix, validation="memory://b/held")
    error = ""
    try:
        list_once(DataConfig(train="memory://b/none/*.tar"), ranks)
    except UserError as caught:
        error = str(caught)
    found = list_once(config, ranks)
    return found, Mixture.find(found), error


def test_rank_0_alone_asks_a_store(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/0.tar").touch()
    (tmp_path / "list.txt").write_text("memory://b/c\nhttps://h/{0..1}.tar\n")
    a, c = ([f"memory:///b/{folder}/{n}.tar" for n in range(3)] for folder in "ac")
    local = f"{tmp_path}/local/0.tar"
    for config, mixture, error in run_ranks(look, 3, str(tmp_path)):
        assert error.startswith("no shard found at memory://b/none/*.tar")
        assert mixture.shards == (*a, local, *c, "https://h/0.tar", "https://h/1.tar")
        assert [one.weight for one in mixture.datasets] == [0.25, 0.75]
        assert config.validation == ["memory://b/held"]
        assert expand_shards(config.validation) == ["memory:///b/held/0.tar"]


def test_it_is_asked_once():
    # Whatever their names, which could be patterns too.
    fill("/b/a[0].tar", "/b/a{1,2}.tar")
    config = list_once(DataConfig(train="memory://b/*.tar"), ALONE)
    fill("/b/2.tar")  # arrives while the run begins
    shards = ("memory:///b/a[0].tar", "memory:///b/a{1,2}.tar")
    assert Mixture.find(config).shards == shards
    assert first_shards(config) == {"train": shards[0]}
    assert Mixture.find(pickle.loads(pickle.dumps(config))).shards == shards


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["/b/0.tar"], "local/*.tar"),
        (["/b/0.tar"], "local/list.txt"),
        (["/b/0.tar"], "scheme:local/*.tar"),
        (["/b/0.tar"], "pipe:cat x.tar"),
    ],
)
def test_what_stays_as_it_is(names, pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(*names)
    for folder in ("local", "scheme:local"):
        Path(folder).mkdir()
        Path(folder, "0.tar").touch()
    Path("local/list.txt").write_text("0.tar\nmemory://b/*.tar\n")
    config = DataConfig(train=pattern, allow_commands=True)
    found = list_once(config, ALONE)
    assert found == config
    assert Mixture.find(found) == Mixture.find(config)


def test_mistakes_name_what_they_are_in(tmp_path):
    (tmp_path / "list.txt").write_text("memory://b/x/*.tar\n")
    with pytest.raises(UserError, match=r"^no shard found at memory://b/x/\*.tar"):
        list_once(DataConfig(train=["memory://b/x/*.tar"]), ALONE)
    with pytest.raises(UserError, match=r"list.txt, line 1: no shard found"):
        list_once(DataConfig(train=f"{tmp_path}/list.txt"), ALONE)
    with pytest.raises(UserError, match=r"^data.validation: no shard found"):
        list_once(DataConfig(train=str(tmp_path / "no"), validation="memory://b/y"), ALONE)


def test_what_is_not_given_stays_so():
    fill("/b/0.tar")
    mix = {"one": DatasetConfig("memory://b/*.tar")}
    found = list_once(DataConfig(train="", mix=mix, validation=""), ALONE)
    assert not found.train
    assert not found.validation
    assert len(Mixture.find(found).shards) == 1


def test_a_list_of_tables_is_for_who_knows_their_columns(tmp_path):
    (tmp_path / "a.csv").write_text("img,text\nx.jpg,a\n")
    (tmp_path / "list.txt").write_text("a.csv\n")
    assert list_stored([f"{tmp_path}/list.txt"]) == {}
