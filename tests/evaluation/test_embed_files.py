"""``navit-clip embed``: the same vectors from folders, tables and shards, after kills, on ranks."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from eval_cases import small_blocks
from shard_factory import CAPTIONS, encode, photo, sample, write_shard

from navit_clip.distributed import Ranks
from navit_clip.evaluation import datasets, embed_files
from navit_clip.evaluation import embed as embedding
from navit_clip.evaluation.embed_files import main
from navit_clip.evaluation.models import PackedModel
from navit_clip.model import NaViTCLIP

COUNT = 8
NAMES = [f"{'deeper/' * (i % 2)}{i}.png" for i in range(COUNT)]


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Small blocks, put back at the end."""
    monkeypatch.setattr(datasets, "BLOCK", 3)
    monkeypatch.setattr(embedding, "TEXT_BLOCK", 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "photos/deeper").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (root / "photos" / name).write_bytes(sample(number)["png"])
    (root / "photos/bad.png").write_bytes(b"none")
    (root / "photos/notes.md").write_text("none")
    (root / "table.csv").write_text("path\n" + "".join(f"photos/{name}\n" for name in NAMES))
    write_shard(root / "shards/0.tar", {str(i): sample(i) for i in range(COUNT)})
    (root / "texts.txt").write_text("\n".join(CAPTIONS) + "\n\n")
    return root


def run(*words):
    try:
        main([str(word) for word in words], "embed")
    except SystemExit as stop:
        return stop.code
    return 0


def read(path):
    return json.loads(path.with_suffix(".ids.json").read_text()), np.load(path)


def test_folders_tables_and_shards_give_the_same_vectors(data, tmp_path, model_dir, capsys):
    expected = NaViTCLIP.from_directory(model_dir).encode_image(
        [data / "photos" / name for name in NAMES]
    )
    for words, prefix, ids in (
        (["--images", data / "photos"], "", NAMES),
        (["--table", data / "table.csv"], "photos/", NAMES),
        (["--shards", data / "shards"], "0/", [str(i) for i in range(COUNT)]),
    ):
        output = tmp_path / "out/x.npy"
        capsys.readouterr()
        assert run("--model", model_dir, *words, "--output", output, "--workers", 0) == 0
        names, vectors = read(output)
        assert sorted(names) == sorted(prefix + name for name in ids)
        order = [ids.index(name.removeprefix(prefix)) for name in names]
        np.testing.assert_allclose(vectors, expected[order], atol=1e-5)
        out = capsys.readouterr().out
        assert f"8 vectors of 8 numbers: {output}" in out
        skipped = "2 skipped (no_image_file 1, unreadable_image 1)"
        assert (skipped in out) == (words[0] == "--images")
        assert sorted(path.name for path in output.parent.iterdir()) == ["x.ids.json", "x.npy"]


def test_texts_have_vectors_too(data, tmp_path, model_dir, capsys):
    assert (
        run("--model", model_dir, "--texts", data / "texts.txt", "--output", tmp_path / "t.npy")
        == 0
    )
    ids, vectors = read(tmp_path / "t.npy")
    assert ids == list(CAPTIONS)
    assert "1 skipped (empty_caption 1)" in capsys.readouterr().out
    expected = NaViTCLIP.from_directory(model_dir).encode_text(CAPTIONS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_killed_command_continues_and_takes_nothing_of_other_settings(
    data, tmp_path, model_dir, monkeypatch
):
    calls = []
    real = PackedModel.embed_images

    def counted(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise MemoryError
        return real(self, images)

    def words(name, *more):
        flags = ["--shards", data / "shards", "--workers", 0, "--output", tmp_path / name]
        return ["--model", model_dir, *flags, *more]

    assert run(*words("whole.npy")) == run(*words("small.npy", "--max-tokens", 4)) == 0
    monkeypatch.setattr(PackedModel, "embed_images", counted)
    with pytest.raises(MemoryError):
        run(*words("parts.npy"))
    assert not (tmp_path / "parts.npy").exists()
    shutil.copytree(tmp_path / "parts.npy.parts", tmp_path / "again.npy.parts")
    assert run(*words("parts.npy")) == 0
    assert calls == [3, 3, 2, 2]
    assert run(*words("again.npy", "--max-tokens", 4)) == 0
    assert calls[4:] == [3, 3, 2]
    for name, other in (("parts", "whole"), ("again", "small")):
        found, expected = (tmp_path / f"{each}.npy" for each in (name, other))
        assert found.read_bytes() == expected.read_bytes()
        assert read(found)[0] == read(expected)[0]


def on_ranks(words):
    small_blocks(3, 3)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    for one in words:
        args = embed_files._parser("embed").parse_args([str(word) for word in one])
        embed_files._run(args, ranks)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_write_what_one_does(data, tmp_path, model_dir):
    commands = [
        ["--model", model_dir, "--workers", 0, *words]
        for words in (["--images", data / "photos"], ["--texts", data / "texts.txt"])
    ]
    outputs = ["images.npy", "texts.npy"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    both = zip(commands, outputs, strict=True)
    run_ranks(on_ranks, 2, [[*words, "--output", tmp_path / "two" / name] for words, name in both])
    for words, name in zip(commands, outputs, strict=True):
        assert run(*words, "--output", tmp_path / "one" / name) == 0
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_parquet_holds_ids_and_vectors(data, tmp_path, model_dir, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(embed_files, "_ROW_GROUP", 4)
    words = ["--model", model_dir, "--shards", data / "shards", "--workers", 0, "--output"]
    assert run(*words, tmp_path / "x.parquet") == run(*words, tmp_path / "x.npy") == 0
    table = parquet.read_table(tmp_path / "x.parquet")
    ids, vectors = read(tmp_path / "x.npy")
    assert table["id"].to_pylist() == ids
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), "f4"), vectors)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "nowhere"], "cannot read nowhere"),
        (["--images", "."], "no image below ."),
        (["--texts", "empty.txt"], "nothing was embedded"),
        (["--images", "photos", "--max-pixels", 999999999], "max_pixels must be between"),
        (["--images", "photos", "--max-pixels", 4], "nothing was embedded"),
        (["--images", "photos", "--output", "x.csv"], "ends in .npy or .parquet"),
        (["--images", "photos", "--texts", "empty.txt"], "not allowed with argument"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, model_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    if "photos" in words:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos/a.png").write_bytes(encode(photo(0, 8, 8)))
    assert run("--model", model_dir, "--output", "x.npy", *words) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


def test_parquet_without_pyarrow_names_the_fix(tmp_path, model_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    output = tmp_path / "x.parquet"
    assert run("--model", model_dir, "--images", tmp_path, "--output", output) == 2
    assert "pip install 'navit-clip[parquet]'" in capsys.readouterr().err
