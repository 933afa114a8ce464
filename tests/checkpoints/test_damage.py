"""Checkpoints that are damaged, malformed or hostile: named, skipped, and never executed."""

import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_cases import names, open_checkpoints, read, state, truncate, write
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from navit_clip.checkpoints import folder
from navit_clip.checkpoints.folder import FORMAT, find_damage
from navit_clip.errors import OutageError, UserError


def flip(folder):
    (file,) = folder.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = [
    (truncate, r"__0_0.distcp has \d+ bytes, not \d+"),
    (flip, "__0_0.distcp has other contents"),
    (lambda folder: (folder / "rank-0.json").unlink(), "rank-0.json cannot be read"),
    (lambda folder: (folder / ".metadata").write_bytes(b""), ".metadata has 0 bytes"),
    (lambda folder: (folder / "run.json").write_text("{"), "run.json cannot be read"),
    (lambda folder: (folder / "run.json").unlink(), "run.json cannot be read"),
    (lambda folder: (folder / "run.json").write_text('{"step": 9}'), "run.json cannot be read"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_taken(tmp_path, damage, named):
    write(tmp_path, [4, 8])
    damage(tmp_path / "step-00000008")
    step, value, lines = read(tmp_path)
    assert (step, value) == (4, 4.0)
    (line,) = lines
    assert "step-00000008 is damaged" in line
    assert re.search(named, line)
    assert names(tmp_path) == ["step-00000004", "step-00000008.damaged"]
    # It is in nobody's way: neither counted nor overwritten.
    write(tmp_path, [6, 8, 10], keep=2)
    assert names(tmp_path) == ["step-00000008", "step-00000008.damaged", "step-00000010"]


def test_damaged_ones_alone_do_not_begin_the_run_anew(tmp_path):
    write(tmp_path, [4, 8])
    for step in (4, 8):
        truncate(tmp_path / f"step-0000000{step}")
    for _ in range(2):
        with pytest.raises(UserError, match="step-00000008 is damaged"):
            open_checkpoints(tmp_path).newest()


def test_a_disk_that_is_out_of_reach_is_no_damage(tmp_path, monkeypatch):
    write(tmp_path, [4, 8])

    def gone(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    for name in ("sha256_of", "json"):
        with monkeypatch.context() as patch:
            patch.setattr(folder, name, SimpleNamespace(loads=gone) if name == "json" else gone)
            with pytest.raises(OutageError, match=r"step-00000008/.* cannot be read: .*Stale"):
                open_checkpoints(tmp_path).newest()
    assert read(tmp_path) == (8, 8.0, [])


def test_half_written_ones_are_named_and_removed(tmp_path):
    write(tmp_path, [4])
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000008.partial")
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000002.removed")
    step, _, lines = read(tmp_path)
    assert step == 4
    assert lines == ["checkpoint step-00000008 was not written to its end; removed"]
    assert names(tmp_path) == ["step-00000004"]
    assert open_checkpoints(tmp_path / "empty").newest() is None


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path):
    write(tmp_path, [4])
    path = tmp_path / "step-00000004/run.json"
    saved = json.loads(path.read_text())
    del saved["checksum"]
    path.write_text(json.dumps({**saved, "format": 2}))
    with pytest.raises(UserError, match=r"run\.json has format 2, this version reads 4: finish"):
        open_checkpoints(tmp_path).newest()


def test_any_flipped_bit_of_the_manifest_is_damage(tmp_path):
    write(tmp_path, [4])
    path = tmp_path / "step-00000004/run.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (0, 1, 3, 5, 7):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            # White space may change without changing what is said.
            same = not flipped[position : position + 1].strip() or whole[position] == ord(" ")
            assert same or find_damage(path.parent), (position, bit)


def sealed(values):
    """A manifest that another program has given a checksum."""
    checksum = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({**values, "checksum": checksum})


MALFORMED = [
    "[]",
    "null",
    "[" * 100_000,
    "\ud800",
    sealed({}),
    *(
        sealed({"step": 4, "world_size": 1, "weights": {}, "files": {"a": [1, "b"]}}
               | {"format": FORMAT} | change)
        for change in (
            {"step": "4"}, {"step": -1}, {"step": 10**30}, {"world_size": 0}, {"world_size": True},
            {"files": {}}, {"files": ["a"]}, {"files": {"a": 1}}, {"files": {"../a": [1, "b"]}},
            {"files": {"/dev/zero": [1, "b"]}}, {"weights": 1}, {"more": 1},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("content", MALFORMED)
def test_a_malformed_manifest_is_damage(tmp_path, content):
    write(tmp_path, [4, 8])
    path = tmp_path / "step-00000008/run.json"
    path.write_bytes(content.encode(errors="surrogatepass"))
    step, _, lines = read(tmp_path)
    assert step == 4
    assert "step-00000008 is damaged (run.json cannot be read" in lines[0]


def test_nothing_changes_before_the_run_is_accepted(tmp_path):
    write(tmp_path, [4, 8])
    truncate(tmp_path / "step-00000008")
    (tmp_path / "step-00000012.partial").mkdir()
    before = names(tmp_path)
    assert open_checkpoints(tmp_path).newest() == 4
    assert names(tmp_path) == before


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["EVIL"]),))


def resign(folder):
    """Makes the manifest fit files that were changed on purpose."""
    path = folder / "run.json"
    values = json.loads(path.read_text())
    del values["checksum"]
    for name in values["files"]:
        content = (folder / name).read_bytes()
        values["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    path.write_text(sealed(values))


def evil_index(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))


def evil_value(folder):
    """An index that declares a weight to be no tensor, and a file that unpickles to a command."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    content = io.BytesIO()
    torch.save(Evil(), content)
    (file,) = folder.glob("*.distcp")
    file.write_bytes(content.getvalue())
    (entry,) = (at for at in index.storage_data if at.fqn == "model.b")
    info = index.storage_data.pop(entry)
    index.storage_data[MetadataIndex("model.b")] = replace(
        info, offset=0, length=len(content.getvalue())
    )
    index.state_dict_metadata["model.b"] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def foreign_file(folder):
    """An index whose weights lie elsewhere."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    for at, info in index.storage_data.items():
        index.storage_data[at] = replace(info, relative_path="../../secret")
    (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("attack", [evil_index, evil_value, foreign_file])
def test_a_checkpoint_from_elsewhere_runs_nothing(tmp_path, monkeypatch, attack):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    write(tmp_path / "run", [4])
    attack(tmp_path / "run/step-00000004")
    resign(tmp_path / "run/step-00000004")
    checkpoints = open_checkpoints(tmp_path / "run")
    assert checkpoints.newest() == 4
    with pytest.raises(UserError, match="cannot resume from") as caught:
        checkpoints.load(4, state(0))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()
