"""A damaged model's directory: one clear line for every damage, and no pickle is ever run."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pretrained_cases import Bomb, change_config, change_weights, embed, export_small

from navit_clip.errors import UserError
from navit_clip.model import NaViTCLIP


@pytest.fixture
def directory(tmp_path: Path, tokenizer_path: Path) -> Path:
    return export_small(tmp_path, tokenizer_path)


def replace_file(name: str, content: bytes) -> Callable[[Path], str]:
    def damage(directory: Path) -> str:
        (directory / name).write_bytes(content)
        return name

    return damage


def truncate(name: str, share: float) -> Callable[[Path], str]:
    def damage(directory: Path) -> str:
        content = (directory / name).read_bytes()
        return replace_file(name, content[: int(share * len(content))])(directory)

    return damage


def remove(name: str) -> Callable[[Path], str]:
    def damage(directory: Path) -> str:
        (directory / name).unlink()
        return name

    return damage


def corrupt_header(directory: Path) -> str:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff{]["
    return replace_file(path.name, bytes(content))(directory)


def a_folder_instead(directory: Path) -> str:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()
    return "model.safetensors"


ENCODER_PATH = ("model", "image", "encoder")
DAMAGES: dict[str, tuple[Callable[[Path], str], str]] = {
    "no weights": (remove("model.safetensors"), "No such file"),
    "weights cut in the header": (truncate("model.safetensors", 0.01), ""),
    "weights cut in the data": (truncate("model.safetensors", 0.7), ""),
    "weights cut by a byte": (truncate("model.safetensors", 0.9999), ""),
    "empty weights": (replace_file("model.safetensors", b""), ""),
    "weights are a folder": (a_folder_instead, ""),
    "header of the weights overwritten": (corrupt_header, ""),
    "a tensor is missing": (change_weights(lambda w: w.pop("log_scale")), "log_scale"),
    "a tensor too many": (change_weights(lambda w: w.update(x=torch.ones(1))), "x"),
    "a tensor of another shape": (
        change_weights(lambda w: w.update({"text.token": torch.ones(3, 16)})),
        "text.token",
    ),
    "no configuration": (remove("config.json"), ""),
    "configuration cut": (truncate("config.json", 0.5), ""),
    "configuration empty": (replace_file("config.json", b""), ""),
    "configuration not text": (replace_file("config.json", b"\xff\xfe\x00"), ""),
    "configuration a list": (replace_file("config.json", b"[1, 2]"), ""),
    "unknown format": (change_config(lambda c: c.update(format=99)), "format 99"),
    "no format": (change_config(lambda c: c.pop("format")), "'format' is missing"),
    "another kind": (change_config(lambda c: c.update(kind="detector")), "describes a detector"),
    "no kind": (change_config(lambda c: c.pop("kind")), "'kind' is missing"),
    "no model": (change_config(lambda c: c.pop("model")), "'model' is missing"),
    "unknown key": (
        change_config(lambda c: c["model"].update(colour=1)),
        "unknown key model.colour",
    ),
    "unknown key, deep": (
        change_config(lambda c: c["model"]["image"]["encoder"].update(depht=3)),
        "unknown key model.image.encoder.depht",
    ),
    "unknown key of preprocessing": (
        change_config(lambda c: c["preprocess"].update(a=1)),
        "preprocess.a",
    ),
    "refused value": (
        change_config(lambda c: c["model"]["image"]["encoder"].update(heads=3)),
        "model.image.encoder.heads must divide width",
    ),
    "refused choice": (
        change_config(lambda c: c["model"]["image"].update(pooling="max")),
        "model.image.pooling must be one of map, mean, cls, last, got 'max'",
    ),
    "refused choice, deep": (
        change_config(lambda c: c["model"]["text"]["encoder"].update(activation="relu")),
        "model.text.encoder.activation must be one of gelu, gelu_tanh, quick_gelu, got 'relu'",
    ),
    "a number where a group belongs": (
        change_config(lambda c: c["model"].update(image=3)),
        "model.image needs keys and values, got 3",
    ),
    "a list where a group belongs": (
        change_config(lambda c: c.update(model=[])),
        "model needs keys",
    ),
    "text where a number belongs": (
        change_config(lambda c: c["model"]["text"].update(vocab_size="many")),
        "model.text.vocab_size must be int, got 'many'",
    ),
    "a fraction where a count belongs": (
        change_config(lambda c: c["model"]["image"]["encoder"].update(depth=1.5)),
        "model.image.encoder.depth must be int, got 1.5",
    ),
    "a width that positions cannot have": (
        change_config(
            lambda c: c["model"]["image"].update(
                encoder={"width": 7, "heads": 1, "depth": 1},
                position={"embedding": "fourier"},
            )
        ),
        "model.image.encoder.width must be a multiple of 2",
    ),
    "configuration of another model": (
        change_config(lambda c: c["model"].update(embed_dim=7)),
        "image_projection.weight",
    ),
    "no tokenizer": (remove("tokenizer.json"), ""),
    "no tokenizer model": (remove("tokenizer.model"), ""),
    "tokenizer cut": (truncate("tokenizer.json", 0.5), ""),
    "tokenizer model cut": (truncate("tokenizer.model", 0.5), ""),
    "unknown tokenizer": (replace_file("tokenizer.json", b'{"kind": "words"}'), "'words'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_the_file(directory, damage):
    break_it, reason = DAMAGES[damage]
    name = break_it(directory)
    if damage == "configuration of another model":
        name = "model.safetensors"  # which of the two is wrong, nobody can know
    with pytest.raises(UserError) as caught:
        NaViTCLIP.from_directory(directory)
    message = str(caught.value)
    assert name in message
    assert str(directory) in message
    assert reason in message
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 300 + len(str(directory / name)) + 30
    # Not just a bare file name: there is a reason behind it.
    assert len(message) > len(str(directory / name)) + 10


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no model at .*nowhere: expected config\.json"):
        NaViTCLIP.from_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"]
)
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_in_place_of_a_file_is_refused_not_run(directory, tmp_path, name, writer):
    trace = tmp_path / "exploded"
    with (directory / name).open("wb") as file:
        (pickle.dump if writer == "pickle" else torch.save)(Bomb(trace), file)
    with pytest.raises(UserError, match=name):
        NaViTCLIP.from_directory(directory)
    assert not trace.exists()


def test_loading_never_unpickles(directory, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("loading a model unpickled something")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    embed(NaViTCLIP.from_directory(directory))


# The checksum


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999999])
def test_a_flipped_bit_of_the_weights_is_noticed(directory, place):
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(place * (len(content) - header))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged.*SHA-256") as caught:
        NaViTCLIP.from_directory(directory)
    assert "\n" not in str(caught.value)


def test_an_export_of_before_the_checksum_loads(directory):
    expected = embed(NaViTCLIP.from_directory(directory))
    change_config(lambda c: c.pop("weights_sha256"))(directory)
    actual = embed(NaViTCLIP.from_directory(directory))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_weights_of_another_training_step_are_noticed(directory):
    change_weights(lambda w: w["log_scale"].add_(1e-3))(directory)
    with pytest.raises(UserError, match="belongs to another config"):
        NaViTCLIP.from_directory(directory)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["model"]["image"]["encoder"].update(depth=10**9),
        lambda v: v["model"]["image"]["encoder"].update(width=2**20),
        lambda v: v["model"]["text"].update(vocab_size=10**12),
        lambda v: v["model"]["text"].update(context_length=10**15),
        lambda v: v["model"]["image"]["position"].update(table_side=10**9),
        lambda v: v["model"]["image"].update(patch_size=10**6),
    ],
)
def test_huge_sizes_take_no_memory(change, model_dir, tmp_path):
    directory = Path(shutil.copytree(model_dir, tmp_path / "model"))
    change_config(change)(directory)
    with pytest.raises(UserError, match=r"config\.json"):
        NaViTCLIP.from_pretrained(directory)
