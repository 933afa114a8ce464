"""A model's directory: an exact round trip, one clear line for every damage, and no pickle."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import sentencepiece
import torch
from huggingface_hub import hub_mixin
from packed_examples import random_caption, random_image, randomise
from safetensors.torch import load_file, save_file

from navit_clip.clip import CLIPConfig, NaViTCLIP
from navit_clip.data.tokenizer import OpenClipTokenizer, SentencePieceTokenizer
from navit_clip.errors import UserError
from navit_clip.image_tower import ImageTowerConfig
from navit_clip.interop import pretrained as pretrained_module
from navit_clip.interop.pretrained import (
    MODEL_FILES,
    Preprocess,
    config_from_dict,
    load_pretrained,
    save_pretrained,
)
from navit_clip.packing import pack_images, pack_texts
from navit_clip.position import PositionConfig
from navit_clip.text_tower import TextTowerConfig
from navit_clip.transformer import EncoderConfig

VOCAB = 49408  # open_clip's, the larger of the tokenizers used here
ENCODER = EncoderConfig(width=16, depth=1, heads=2)
CONFIGS = {
    "navit": CLIPConfig(6, ImageTowerConfig(2, ENCODER), TextTowerConfig(VOCAB, 8, ENCODER)),
    "other": CLIPConfig(
        6,
        ImageTowerConfig(
            2,
            EncoderConfig(width=8, depth=2, heads=1, qk_norm=False, qkv_bias=True, norm_bias=True),
            PositionConfig("factorised", "fractional", "sinusoidal", "stack", 5),
            "cls",
            pixel_mean=(0.48145466, 0.4578275, 0.40821073),
            pixel_std=(0.26862954, 0.26130258, 0.27577711),
        ),
        TextTowerConfig(
            VOCAB,
            8,
            EncoderConfig(width=12, depth=1, heads=3, activation="quick_gelu", causal=True),
            "last",
        ),
        init_scale=10.0,
        init_bias=-10.0,
    ),
}


def build(config: CLIPConfig) -> NaViTCLIP:
    torch.manual_seed(0)
    model = NaViTCLIP(config)
    randomise(model, seed=1)
    return model


@torch.no_grad()
def embed(model: NaViTCLIP) -> tuple[torch.Tensor, torch.Tensor]:
    images = [random_image(seed, grid) for seed, grid in enumerate([(2, 3), (1, 1), (5, 4)])]
    texts = [random_caption(seed, length, vocab_size=60) for seed, length in enumerate((8, 1, 3))]
    return model.embed_images(pack_images(images)), model.embed_texts(pack_texts(texts))


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red square and a blue dot", "two green stripes"] * 5),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def directory(tmp_path: Path, sentencepiece_model: bytes) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model)
    directory = tmp_path / "run" / "model"  # neither exists yet
    tokenizer = SentencePieceTokenizer(path)
    save_pretrained(directory, build(CONFIGS["navit"]), tokenizer, Preprocess(77))
    path.unlink()  # the directory must be all that is needed
    return directory


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_round_trip_is_exact(tmp_path, config):
    model = build(config)
    save_pretrained(tmp_path, model, OpenClipTokenizer(), Preprocess(99, square=True))
    loaded = load_pretrained(tmp_path)
    assert loaded.model.config == config
    assert loaded.preprocess == Preprocess(99, square=True)
    assert isinstance(loaded.tokenizer, OpenClipTokenizer)
    assert not loaded.model.training
    for actual, expected in zip(embed(loaded.model), embed(model), strict=True):
        assert torch.equal(actual, expected)
    expected_state = model.state_dict()
    assert loaded.model.state_dict().keys() == expected_state.keys()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, expected_state[name]), name


def test_a_tokenizer_that_the_model_cannot_embed_is_refused(tmp_path):
    config = CLIPConfig(6, ImageTowerConfig(2, ENCODER), TextTowerConfig(60, 8, ENCODER))
    save_pretrained(tmp_path, build(config), OpenClipTokenizer(), Preprocess())
    with pytest.raises(UserError, match=r"49408 ids, its model embeds 60"):
        load_pretrained(tmp_path)


def test_saving_again_writes_the_same_files(directory, tmp_path):
    loaded = load_pretrained(directory)
    again = tmp_path / "again"
    save_pretrained(again, loaded.model, loaded.tokenizer, loaded.preprocess)
    names = {path.name for path in directory.iterdir()}
    assert names == {path.name for path in again.iterdir()} == set(MODEL_FILES)
    for name in names:
        assert (again / name).read_bytes() == (directory / name).read_bytes(), name


def test_the_tokenizer_comes_back(directory, tmp_path, sentencepiece_model):
    path = tmp_path / "original.model"
    path.write_bytes(sentencepiece_model)
    loaded = load_pretrained(directory).tokenizer
    caption = "two red stripes and a dot"
    assert loaded.encode(caption, 8) == SentencePieceTokenizer(path).encode(caption, 8)


def change_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], str]:
    def damage(directory: Path) -> str:
        path = directory / "config.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        return "config.json"

    return damage


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


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], str]:
    def damage(directory: Path) -> str:
        path = directory / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
        return path.name

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
    "no model": (change_config(lambda c: c.pop("model")), "'model' is missing"),
    "unknown key": (change_config(lambda c: c["model"].update(colour=1)), "'colour'"),
    "unknown key, deep": (
        change_config(lambda c: c["model"]["image"]["encoder"].update(depht=3)),
        "'depht' for EncoderConfig",
    ),
    "unknown key of preprocessing": (change_config(lambda c: c["preprocess"].update(a=1)), "'a'"),
    "refused value": (
        change_config(lambda c: c["model"]["image"]["encoder"].update(heads=3)),
        "heads must divide width",
    ),
    "refused choice": (
        change_config(lambda c: c["model"]["image"].update(pooling="max")),
        "pooling must be one of map, mean, cls, last, got 'max'",
    ),
    "refused choice, deep": (
        change_config(lambda c: c["model"]["text"]["encoder"].update(activation="relu")),
        "activation must be one of gelu, gelu_tanh, quick_gelu, got 'relu'",
    ),
    "a number where a group belongs": (
        change_config(lambda c: c["model"].update(image=3)),
        "ImageTowerConfig needs keys and values, got 3",
    ),
    "a list where a group belongs": (change_config(lambda c: c.update(model=[])), "CLIPConfig"),
    "text where a number belongs": (
        change_config(lambda c: c["model"]["text"].update(vocab_size="many")),
        "vocab_size of TextTowerConfig must be int, got 'many'",
    ),
    "a fraction where a count belongs": (
        change_config(lambda c: c["model"]["image"]["encoder"].update(depth=1.5)),
        "depth of EncoderConfig must be int, got 1.5",
    ),
    "a width that positions cannot have": (
        change_config(
            lambda c: c["model"]["image"].update(
                encoder={"width": 7, "heads": 1, "depth": 1},
                position={"embedding": "fourier"},
            )
        ),
        "width must be even",
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
        load_pretrained(directory)
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
        load_pretrained(tmp_path / "nowhere")


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"]
)
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_in_place_of_a_file_is_refused_not_run(directory, tmp_path, name, writer):
    trace = tmp_path / "exploded"
    with (directory / name).open("wb") as file:
        (pickle.dump if writer == "pickle" else torch.save)(Bomb(trace), file)
    with pytest.raises(UserError, match=name):
        load_pretrained(directory)
    assert not trace.exists()


def test_loading_never_unpickles(directory, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("loading a model unpickled something")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    embed(load_pretrained(directory).model)


def test_a_write_that_fails_leaves_the_old_model_whole(directory, monkeypatch):
    before = embed(load_pretrained(directory).model)
    loaded = load_pretrained(directory)

    def full(weights: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained_module, "save_file", full)
    with pytest.raises(UserError, match=f"cannot write the model to {directory}.*No space left"):
        save_pretrained(directory, build(CONFIGS["other"]), loaded.tokenizer, Preprocess())
    after = embed(load_pretrained(directory).model)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "model"
    with pytest.raises(UserError, match=f"cannot write the model to {target}"):
        save_pretrained(target, build(CONFIGS["navit"]), OpenClipTokenizer(), Preprocess())


def test_a_moved_directory_still_loads(directory, tmp_path):
    expected = embed(load_pretrained(directory).model)
    shutil.move(directory, tmp_path / "elsewhere")
    actual = embed(load_pretrained(tmp_path / "elsewhere").model)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_what_is_left_out_of_a_configuration_has_its_default():
    assert config_from_dict(CLIPConfig, {}) == CLIPConfig()
    assert config_from_dict(CLIPConfig, {"init_scale": 1, "init_bias": -10}).init_bias == -10
    partly = config_from_dict(CLIPConfig, {"image": {"encoder": {"depth": 3}}})
    assert partly.image.encoder == EncoderConfig(depth=3)
    assert config_from_dict(ImageTowerConfig, {"pixel_std": [1, 2, 3]}).pixel_std == (1, 2, 3)


# The checksum


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999999])
def test_a_flipped_bit_of_the_weights_is_noticed(directory, place):
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(place * (len(content) - header))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged.*SHA-256") as caught:
        load_pretrained(directory)
    assert "\n" not in str(caught.value)


def test_an_export_of_before_the_checksum_loads(directory):
    expected = embed(load_pretrained(directory).model)
    change_config(lambda c: c.pop("weights_sha256"))(directory)
    actual = embed(load_pretrained(directory).model)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_weights_of_another_training_step_are_noticed(directory):
    change_weights(lambda w: w["log_scale"].add_(1e-3))(directory)
    with pytest.raises(UserError, match="belongs to another config"):
        load_pretrained(directory)


def test_a_model_that_fills_its_context_needs_a_tokenizer_that_pads(directory):
    change_config(lambda c: c["model"]["text"].update(fill_context=True))(directory)
    with pytest.raises(UserError, match="its tokenizer does not pad"):
        load_pretrained(directory)


# NaViTCLIP's own methods, and the Hub


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", [str, Path])
def test_a_model_has_what_it_needs_with_it(directory, kind):
    expected = load_pretrained(directory)
    model = NaViTCLIP.from_pretrained(kind(directory))
    assert type(model) is NaViTCLIP
    assert not model.training
    assert model.preprocess == Preprocess(77)
    assert model.tokenizer is not None
    assert model.tokenizer.encode("two red", 8) == expected.tokenizer.encode("two red", 8)
    actual, wanted = embed(model), embed(expected.model)
    assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.usefixtures("no_network")
def test_saving_by_the_model_writes_the_same_files(directory, tmp_path):
    NaViTCLIP.from_pretrained(directory).save_pretrained(tmp_path / "again")
    for name in MODEL_FILES:
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes(), name


@pytest.mark.parametrize("name", ["tokenizer", "preprocess"])
def test_a_model_without_its_surroundings_is_not_saved(directory, tmp_path, name):
    model = NaViTCLIP.from_pretrained(directory)
    setattr(model, name, None)
    with pytest.raises(UserError, match=f"no {name} to save: set model.{name}"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_on_a_full_disk_leaves_the_old_model(directory, monkeypatch):
    model = NaViTCLIP.from_pretrained(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def full(weights: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained_module, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        model.save_pretrained(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["nowhere", "./no/model", "/no/model", "a/b/c", ""])
def test_what_cannot_be_a_repository_is_not_looked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no model at .*: expected config\.json"):
        NaViTCLIP.from_pretrained(name)


def test_a_repository_without_the_network_is_one_line(tmp_path, monkeypatch):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(UserError) as caught:
        NaViTCLIP.from_pretrained("someone/model", cache_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith("no directory someone/model, and cannot download it from the Hub: ")
    assert "\n" not in message


def test_a_repository_is_downloaded_and_loaded(directory, tmp_path, monkeypatch):
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = NaViTCLIP.from_pretrained("someone/model", revision="v1", cache_dir=tmp_path)
    assert asked["repository"] == "someone/model"
    assert asked["revision"] == "v1"
    assert asked["cache_dir"] == tmp_path
    assert set(asked["allow_patterns"]) == set(MODEL_FILES)  # no pickle comes along
    assert model.preprocess == Preprocess(77)


@pytest.mark.usefixtures("no_network")
def test_pushing_uploads_our_own_directory(directory, monkeypatch):
    pushed: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            pushed["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
            pushed["repository"] = repo_id
            pushed["files"] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            return "https://hub/commit"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    model = NaViTCLIP.from_pretrained(directory)
    assert model.push_to_hub("someone/model", token="t") == "https://hub/commit"
    assert pushed["repository"] == "someone/model"
    assert pushed["token"] == "t"
    assert pushed["files"] == {name: (directory / name).read_bytes() for name in MODEL_FILES}


def test_a_card_that_is_there_is_never_read_and_stays(directory, tmp_path):
    trace = tmp_path / "exploded"
    (directory / "README.md").write_bytes(pickle.dumps(Bomb(trace)))
    before = (directory / "README.md").read_bytes()
    NaViTCLIP.from_pretrained(directory).save_pretrained(directory)
    assert (directory / "README.md").read_bytes() == before
    assert not trace.exists()


def test_a_model_is_copied_and_sent_to_other_processes_whole(directory):
    model = NaViTCLIP.from_pretrained(directory)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config == model.config
        assert torch.equal(other.encode_text(["two red"]), model.encode_text(["two red"]))
