"""NaViTCLIP's own way to its directory, and to the Hub and back, without a network."""

from __future__ import annotations

import copy
import pickle
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import hub_mixin
from pretrained_cases import Bomb, embed, export_small

from navit_clip.errors import UserError
from navit_clip.export import pretrained as pretrained_module
from navit_clip.export.pretrained import AUTO_FILES, MODEL_FILES
from navit_clip.inference.preprocess import Preprocess
from navit_clip.interop import transformers
from navit_clip.model import NaViTCLIP


@pytest.fixture
def directory(tmp_path: Path, tokenizer_path: Path) -> Path:
    return export_small(tmp_path, tokenizer_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", [str, Path])
def test_a_model_has_what_it_needs_with_it(directory, kind):
    expected = NaViTCLIP.from_directory(directory)
    model = NaViTCLIP.from_pretrained(kind(directory))
    assert type(model) is NaViTCLIP
    assert not model.training
    assert model.preprocess == Preprocess(77)
    assert model.tokenizer is not None
    assert model.tokenizer.encode("two red", 8) == expected.tokenizer.encode("two red", 8)
    actual, wanted = embed(model), embed(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.usefixtures("no_network")
def test_saving_by_the_model_writes_the_same_files(directory, tmp_path):
    NaViTCLIP.from_pretrained(directory).save_pretrained(tmp_path / "again")
    for name in (*MODEL_FILES, *AUTO_FILES):
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
    # No pickle comes along.
    assert set(asked["allow_patterns"]) == {*MODEL_FILES, *transformers.FILES}
    assert model.preprocess == Preprocess(77)


@pytest.mark.usefixtures("no_network")
def test_pushing_uploads_our_own_directory(directory, tmp_path, monkeypatch):
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
    assert pushed["files"] == {path.name: path.read_bytes() for path in directory.iterdir()}
    written = tmp_path / "mine"
    assert model.save_pretrained(written, push_to_hub=True, token="u") == "https://hub/commit"
    assert (pushed["repository"], pushed["token"]) == ("mine", "u")
    assert {path.name for path in written.iterdir()} == {*pushed["files"]}
    with pytest.raises(TypeError, match="without push_to_hub=True there is no token"):
        model.save_pretrained(written, token="t")


def test_without_the_hub_pushing_is_one_line(directory, monkeypatch):
    def create_repo(self, **options: Any) -> Any:
        raise ConnectionError("max retries exceeded\nwith url: /api/repos/create")

    monkeypatch.setattr(hub_mixin.HfApi, "create_repo", create_repo)
    with pytest.raises(UserError, match=r"^cannot push someone/model: max retries") as caught:
        NaViTCLIP.from_pretrained(directory).push_to_hub("someone/model")
    assert "\n" not in str(caught.value)


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
