"""Embeddings kept between evaluations: found by content, never stale, whole after a SIGKILL."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_cases import ALONE, OWN, SETTINGS, SMALL, open_dataset, run, write_all
from launch import launch
from shard_factory import encode, photo

from navit_clip.evaluation import datasets
from navit_clip.evaluation.cache import Cache, ImageBlock, tensors_digest
from navit_clip.evaluation.embed import embed_dataset, embed_texts
from navit_clip.evaluation.models import PackedModel
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.export.pretrained import save_pretrained
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP


class Counting(PackedModel):
    """Counts what is really embedded, and may stop working."""

    images = texts = 0

    def embed_images(self, images):
        self.images += len(images)
        return super().embed_images(images)

    def embed_texts(self, texts):
        self.texts += len(texts)
        return super().embed_texts(texts)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("eval"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(datasets, "BLOCK", 3)


def embed(model_dir, dataset, directory, settings=SETTINGS, workers=0, said=None):
    """Embeddings, and how many images the model had to look at."""
    model = Counting(NaViTCLIP.from_directory(model_dir), "tiny")
    cache = Cache(directory, [].append if said is None else said.append) if directory else None
    (embedded,) = embed_dataset([(model, settings)], dataset, ALONE, workers=workers, cache=cache)
    return embedded, model.images


def assert_same(one, other):
    for setting in one.embeddings:
        assert torch.equal(one.embeddings[setting], other.embeddings[setting])
    unkept = {"embeddings": {}}
    assert replace(one, **unkept) == replace(other, **unkept)


@pytest.mark.parametrize("name", ["classes", "coco", "mixed"])
def test_a_second_evaluation_embeds_nothing_and_finds_the_same(name, model_dir, data, tmp_path):
    dataset = open_dataset(data, name)
    fresh, all_images = embed(model_dir, dataset, None)
    first, looked = embed(model_dir, dataset, tmp_path)
    assert looked == all_images == len(fresh.names) * len(SETTINGS)
    second, looked = embed(model_dir, dataset, tmp_path)
    assert looked == 0
    for one in (first, second):
        assert_same(fresh, one)
    if name == "mixed":  # read by worker processes too
        again, looked = embed(model_dir, dataset, tmp_path, workers=2)
        assert looked == 0
        assert_same(fresh, again)


def test_only_what_is_new_is_embedded(model_dir, data, tmp_path):
    root = shutil.copytree(data / "classes", tmp_path / "classes")
    names = sorted(path for path in root.glob("*/*.png"))

    def again(settings=SETTINGS, model=model_dir):
        return embed(model, open_dataset(tmp_path, "classes"), tmp_path / "cache", settings)

    assert again([OWN])[1] == 11
    assert again([OWN, SMALL])[1] == 11
    # Another file of the same name: its block, of itself and its neighbours, is embedded again.
    names[0].write_bytes(encode(photo(99, 40, 40)))
    changed, looked = again([OWN, SMALL])
    assert looked == 2 * 3
    assert_same(changed, embed(model_dir, open_dataset(tmp_path, "classes"), None, [OWN, SMALL])[0])
    # The same files under other names.
    root.rename(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", root)
    assert again([OWN, SMALL])[1] == 0

    model = NaViTCLIP.from_directory(model_dir)
    save_pretrained(tmp_path / "square", model, model.tokenizer, Preprocess(12, square=True))
    assert again([OWN], tmp_path / "square")[1] == 11
    with torch.no_grad():
        model.image.embed.bias[0] += 1e-3
    save_pretrained(tmp_path / "other", model, model.tokenizer, Preprocess(12))
    assert again([OWN], tmp_path / "other")[1] == 11
    assert again([OWN, SMALL])[1] == 0


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def others(path: Path) -> list[bytes]:
    """Contents of the blocks beside one, under whose name they do not belong."""
    found = [other for other in files(path.parents[1]) if other != path]
    return [other.read_bytes() for other in found]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"{}" * 100),
        lambda path: flip(path, -5),
        lambda path: flip(path, 0),
        lambda path: flip(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(others(path)[0]),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"padding": 0', b'"padding": 1')),
    ],
)
def test_a_damaged_file_is_named_and_made_again(damage, model_dir, data, tmp_path):
    dataset = open_dataset(data, "classes")
    fresh, _ = embed(model_dir, dataset, tmp_path)
    contents = {path: path.read_bytes() for path in files(tmp_path)}
    damaged = files(tmp_path)[2]
    damage(damaged)
    said: list[str] = []
    fixed, looked = embed(model_dir, dataset, tmp_path, said=said)
    assert_same(fresh, fixed)
    assert 0 < looked <= 3
    (line,) = said
    assert str(damaged) in line
    assert "damaged" in line
    assert "\n" not in line
    assert {path: path.read_bytes() for path in files(tmp_path)} == contents


def test_texts_are_kept_too(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("navit_clip.evaluation.embed.TEXT_BLOCK", 2)
    model = Counting(NaViTCLIP.from_directory(model_dir), "tiny")
    words = ["a dog", "two birds", "a bicycle", "a dog", "a boat"]
    cache = Cache(tmp_path)
    first = embed_texts(model, words, ALONE, cache)
    assert model.texts == 5
    assert torch.equal(embed_texts(model, words, ALONE, cache), first)
    assert model.texts == 5
    embed_texts(model, ["two birds", "a bicycle", "a boat", "two birds"], ALONE, cache)
    assert model.texts == 9  # a block is found as a whole
    alone = torch.cat([model.embed_texts([word]) for word in words])
    torch.testing.assert_close(first, alone, atol=1e-5, rtol=0)
    assert torch.equal(first[0], first[3])  # equal texts, though in different blocks
    assert embed_texts(model, [], ALONE, cache).shape == (0, 8)


def test_blocks_come_back_as_they_were(tmp_path):
    cache = Cache(tmp_path)
    some = ImageBlock(torch.randn(2, 4), [0, 2], [5, 7], [(3, 4), (8, 9)], 11, {1: ("bad", "why")})
    none = ImageBlock(torch.zeros(0, 4), [], [], [], 0, {0: ("bad", "why"), 1: ("worse", "é\n")})
    for number, block in enumerate((some, none)):
        key = f"{number:032x}"
        assert cache.read(key, ImageBlock.from_file) is None
        cache.write(key, *block.to_file())
        back = cache.read(key, ImageBlock.from_file)
        assert torch.equal(back.embeddings, block.embeddings)
        assert replace(back, embeddings=None) == replace(block, embeddings=None)


def test_keys_tell_everything_apart(tmp_path):
    cache = Cache(tmp_path)
    a, b = b"a" * 16, b"b" * 16
    keys = [
        cache.image_key(*words)
        for words in [
            ("m", OWN, [a, b]), ("n", OWN, [a, b]), ("m", SMALL, [a, b]), ("m", OWN, [b, a]),
            ("m", OWN, [a]), ("m", OWN, [a, b, b""]), ("m", EvalSetting("square", 12), [a, b]),
        ]
    ]  # fmt: skip
    keys += [
        cache.text_key("m", words) for words in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])
    ]
    assert len(set(keys)) == len(keys)
    one, two = torch.zeros(2, 3), torch.zeros(3, 2)
    digests = [
        tensors_digest(*words)
        for words in [({"a": one},), ({"a": two},), ({"b": one},), ({"a": one}, "x"),
                      ({"a": one.int()},), ({"a": one + 1},), ({"a": one, "b": one},)]
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)
    assert tensors_digest({"a": one, "b": two}) == tensors_digest({"b": two, "a": one})


_SLOW = """
import sys, time
from navit_clip.evaluation import datasets
from navit_clip.evaluation.__main__ import main
from navit_clip.evaluation.models import PackedModel
datasets.BLOCK = 3
embed = PackedModel.embed_images
def slow(self, images):
    done = embed(self, images)
    time.sleep(1.0)
    return done
PackedModel.embed_images = slow
main(sys.argv[1:])
"""


@pytest.mark.usefixtures("one_thread")
def test_a_killed_evaluation_goes_on_from_what_was_written(model_dir, data, tmp_path, monkeypatch):
    cache, output = tmp_path / "cache", tmp_path / "r.json"
    flags = ["zeroshot", "--model", model_dir, "--data", data / "classes", "--templates", "plain",
             "--workers", 0, "--device", "cpu", "--output", output, "--cache", cache]  # fmt: skip
    (tmp_path / "slow.py").write_text(_SLOW)
    command = [sys.executable, str(tmp_path / "slow.py"), *map(str, flags)]
    with launch(command, tmp_path / "out", forked=True) as running:
        running.until(lambda: list(cache.rglob("*.safetensors")), "a block of images")
        running.kill_all()
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert 1 <= len(kept) < 4
    assert not output.exists()

    looked = []
    embed_images = PackedModel.embed_images
    monkeypatch.setattr(
        PackedModel,
        "embed_images",
        lambda self, images: looked.append(len(images)) or embed_images(self, images),
    )
    assert run(*flags) == 0
    assert len(looked) == 4 - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    resumed = output.read_bytes()
    assert run(*flags[:-2]) == 0
    assert output.read_bytes() == resumed
