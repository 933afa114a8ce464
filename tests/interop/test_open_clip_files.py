"""open_clip's checkpoints from disk: every form it writes, and one line for every damage."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from open_clip_cases import SMALL, both, captions, our_embeddings, own_images, small_models
from safetensors.torch import save_file
from torch import Tensor

from navit_clip.errors import UserError
from navit_clip.export.pretrained import save_pretrained
from navit_clip.interop.open_clip import supported_models
from navit_clip.interop.open_clip.assets import read_checkpoint
from navit_clip.model import NaViTCLIP

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small():
    with small_models(STRANGERS):
        yield


def variant(name: str, part: str, **changes: object) -> dict[str, object]:
    return {**SMALL[name], part: {**SMALL[name][part], **changes}}


STRANGERS = {
    "tiny-scaled": variant("tiny-clip", "vision_cfg", ls_init_value=1e-4),
    "tiny-first": variant("tiny-siglip", "text_cfg", pool_type="first"),
    "tiny-uncleaned": variant("tiny-siglip", "text_cfg", tokenizer_kwargs={}),
    "tiny-other-vit": variant(
        "tiny-siglip", "vision_cfg", timm_model_name="vit_tiny_case_scaled_24"
    ),
}


def same_model(actual: NaViTCLIP, expected: NaViTCLIP) -> None:
    assert actual.config == expected.config
    for key, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[key], tensor), key


def refusal(name: str, pretrained: object = None) -> str:
    with pytest.raises(UserError) as error:
        NaViTCLIP.from_open_clip(name, pretrained)
    assert "\n" not in str(error.value)
    return str(error.value)


# What open_clip's trainer, its exports and its older versions leave.
FORMS: dict[str, Callable[[State], object]] = {
    "weights.safetensors": lambda state: state,
    "weights.bin": lambda state: state,
    "epoch_3.pt": lambda state: {"epoch": 3, "name": "run", "state_dict": state},
    "ddp.pt": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "vector_scale.pt": lambda state: {**state, "logit_scale": state["logit_scale"][None]},
}


def save(path: Path, content: object) -> Path:
    if path.suffix == ".safetensors":
        assert isinstance(content, dict)
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip"])
def test_every_form_of_a_checkpoint_is_read(tmp_path, name, form):
    theirs, ours = both(name, size=0.2)
    path = save(tmp_path / form, FORMS[form](theirs.state_dict()))
    same_model(NaViTCLIP.from_open_clip(name, path), ours)
    same_model(NaViTCLIP.from_open_clip(name, str(path)), ours)


def test_half_precision_becomes_single(tmp_path):
    theirs, ours = both("tiny-clip", size=0.2)
    state = {key: tensor.half() for key, tensor in theirs.state_dict().items()}
    actual = NaViTCLIP.from_open_clip("tiny-clip", save(tmp_path / "half.pt", state))
    for key, tensor in ours.state_dict().items():
        assert torch.equal(actual.state_dict()[key], tensor.half().float()), key


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-clip-quick"])
def test_an_export_of_ours_keeps_the_switches(tmp_path, name):
    _, ours = both(name, size=0.2)
    loaded = NaViTCLIP.from_open_clip(name)
    save_pretrained(tmp_path, ours, loaded.tokenizer, loaded.preprocess)
    actual = NaViTCLIP.from_pretrained(tmp_path)
    same_model(actual, ours)
    assert actual.preprocess == loaded.preprocess
    images, texts = own_images(ours.config, 2), captions(ours.config, [4])
    for a, b in zip(
        our_embeddings(actual, images, texts),
        our_embeddings(ours, images, texts),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_weights_of_another_model_are_refused(tmp_path):
    state = both("tiny-clip", size=0.2)[0].state_dict()

    def message(change: dict[str, Tensor | None]) -> str:
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        return refusal("tiny-clip", save(tmp_path / "w.safetensors", changed))

    key = "visual.conv1.weight"
    assert "w.safetensors do not fit tiny-clip: they lack " + key in message({key: None})
    assert f"{key} and 1 more" in message({key: None, "visual.proj": None})
    assert "which has no a.stranger" in message({"a.stranger": torch.zeros(1)})
    assert f"{key} is [32, 3, 4, 4] in the file, [32, 3, 8, 8] in the model" in message(
        {key: torch.zeros(32, 3, 4, 4)}
    )
    # open_clip would stretch these to fit, quietly; they are another model's.
    for table in ("visual.positional_embedding", "positional_embedding"):
        assert f"{table} is [17, " in message({table: torch.zeros(17, state[table].shape[1])})
    siglip = both("tiny-siglip", size=0.2)[0].state_dict()
    path = save(tmp_path / "siglip.pt", siglip)
    assert "do not fit tiny-clip: they lack" in refusal("tiny-clip", path)
    assert "do not fit tiny-siglip-unprojected, which has no" in refusal(
        "tiny-siglip-unprojected",
        save(tmp_path / "x.pt", both("tiny-siglip-unprojected", 0.1)[0].state_dict() | siglip),
    )


def test_parameters_that_have_no_counterpart_are_not_dropped():
    message = refusal("tiny-other-vit")
    assert "tiny-other-vit, which has no visual.trunk.blocks.0.ls1.gamma and 3 more" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_files_are_one_line(tmp_path, suffix):
    state = both("tiny-siglip", size=0.2)[0].state_dict()
    path = save(tmp_path / f"weights{suffix}", state)
    whole = path.read_bytes()
    for length in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert str(path) in refusal("tiny-siglip", path)
    for content in (b"\0" * 999, b"not weights", b"[1, 2]", random.Random(0).randbytes(4096)):
        path.write_bytes(content)
        assert str(path) in refusal("tiny-siglip", path)
    path.write_bytes(b"\xff" * 8 + whole[8:])  # a header of 2^64 bytes
    assert str(path) in refusal("tiny-siglip", path)


class Trap:
    """Leaves a file behind if a checkpoint is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("writer", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
def test_nothing_is_run_from_a_file(tmp_path, writer):
    trap, path = tmp_path / "sprung", tmp_path / "weights.pt"
    writer({"state_dict": {"logit_scale": Trap(trap)}}, path)
    assert "cannot read weights from" in refusal("tiny-clip", path)
    assert not trap.exists()
    # The trap works.
    try:
        torch.load(path, weights_only=False)
    except Exception:
        pickle.loads(path.read_bytes())
    assert trap.exists()


@pytest.mark.parametrize("content", [{}, [1], {"state_dict": {"logit_scale": 3}}, torch.zeros(3)])
def test_a_file_without_a_state_is_one_line(tmp_path, content):
    path = save(tmp_path / "weights.pt", content)
    assert "cannot read weights from" in refusal("tiny-clip", path)


def test_weights_that_are_nowhere_are_refused(tmp_path):
    message = refusal("ViT-B-32", tmp_path / "none.pt")
    assert "none.pt for ViT-B-32: neither a file nor an open_clip tag (" in message
    assert "laion2b_s34b_b79k" in message
    assert "(none)" in refusal("tiny-clip", "laion2b")
    assert "neither a file" in refusal("tiny-clip", tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RN50", "its image tower is a ResNet"),
        ("coca_ViT-B-32", "CoCa has a decoder of captions"),
        ("convnext_base", "its image tower is convnext_base of timm"),
        ("EVA02-B-16", "its image tower is eva02_base_patch16_clip_224 of timm"),
        ("roberta-ViT-B-32", "its text tower is roberta-base of Hugging Face"),
        ("nllb-clip-base-siglip", "its text tower is facebook/nllb-200-distilled-600M"),
        ("ViT-H-14-CLIPA", "its captions go through the tokenizer bert-base-uncased"),
        ("MobileCLIP-B", "its image tower is vit_base_mci_224 of timm"),
        ("ViTamin-S", "its image tower is vitamin_small_224 of timm"),
        ("tiny-scaled", "the packed towers have no counterpart of ls_init_value=0.0001"),
        ("tiny-first", "its text tower is not SigLIP's"),
        ("tiny-uncleaned", "its tokenizer is not SigLIP's"),
        ("ViT-B-23", "open_clip has no such model"),
        ("hf-hub:someone/model", "open_clip has no such model"),
        ("local-dir:/tmp", "open_clip has no such model"),
    ],
)
def test_models_of_other_kinds_are_refused_with_the_reason_and_what_is_supported(name, reason):
    message = refusal(name)
    assert message.startswith(f"cannot load {name}: {reason}")
    listed = message.split("supported are ")[1].split(", ")
    assert listed == supported_models()
    assert {"ViT-B-32", "ViT-L-14-336", "ViT-B-16-SigLIP2"} <= set(listed)
    assert name not in listed


def test_every_other_model_of_open_clip_is_refused_with_a_reason():
    supported = set(supported_models())
    for name in open_clip.list_models():
        if name not in supported:
            assert refusal(name).startswith(f"cannot load {name}: ")


class Downloads:
    """Stands for open_clip's download: gives a file, or fails as without a network."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __call__(self, values: dict[str, object]) -> str:
        if self.path is None:
            raise ConnectionError("no route\nto host")
        return str(self.path)


def test_a_tag_is_downloaded_with_its_own_pixel_statistics(tmp_path, monkeypatch):
    theirs, ours = both("tiny-clip", size=0.2)
    path = save(tmp_path / "w.safetensors", theirs.state_dict())
    tag = {"url": "https://nowhere", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"mine": tag})
    monkeypatch.setattr(open_clip, "download_pretrained", Downloads(path))
    actual = NaViTCLIP.from_open_clip("tiny-clip", "mine")
    assert actual.config.image.pixel_mean == (0.1, 0.2, 0.3)
    assert actual.config.image.pixel_std == (0.4, 0.5, 0.6)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(actual.state_dict()[key], tensor), key
    monkeypatch.setattr(open_clip, "download_pretrained", Downloads(None))
    message = refusal("tiny-clip", "mine")
    assert "cannot download the weights mine of tiny-clip: no route to host" in message


def test_weights_of_the_other_activation_are_refused(monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", Downloads(None))
    assert "load them as ViT-B-32-quickgelu" in refusal("ViT-B-32", "openai")
    assert "cannot download" in refusal("ViT-B-32-quickgelu", "openai")


def write_tokenizer(directory: Path, size: int = 40) -> None:
    """The two files of a released SigLIP's tokenizer; id 1 ends a caption and fills it up."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = ["<pad>", "</s>", "<unk>", "a", "red", *(f"word{i}" for i in range(size - 5))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"pad_token": "</s>"}')


@torch.no_grad()
def test_the_tokenizer_beside_a_siglip_is_its_own(tmp_path):
    theirs, _ = both("tiny-siglip", size=0.2)
    path = save(tmp_path / "open_clip_model.safetensors", theirs.state_dict())
    write_tokenizer(tmp_path)
    ours = NaViTCLIP.from_open_clip("tiny-siglip", path)
    texts = ["A red, word3!", "", "word1 " * 20]
    ids = torch.tensor([[3, 4, 8, 1, 1, 1, 1], [1] * 7, [6] * 6 + [1]])
    torch.testing.assert_close(
        ours.encode_text(texts), theirs.encode_text(ids, normalize=True), rtol=0, atol=1e-5
    )
    ours.save_pretrained(tmp_path / "export")
    again = NaViTCLIP.from_pretrained(tmp_path / "export")
    assert torch.equal(again.encode_text(texts), ours.encode_text(texts))
    write_tokenizer(tmp_path, size=91)
    assert "tokenizer.json has 91 ids, the model embeds 90" in refusal("tiny-siglip", path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in refusal("tiny-siglip", path)


class Hub:
    """Stands for Hugging Face's hub: a directory of files, or no network."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.asked: list[tuple[str, bool]] = []

    def __call__(self, repository: str, name: str, *, local_files_only: bool) -> str:
        self.asked.append((repository, local_files_only))
        if self.directory is None:
            raise LocalEntryNotFoundError("not in the cache,\nand no network")
        return str(self.directory / name)


def test_a_siglip_without_its_tokenizer_still_embeds_images(tmp_path, monkeypatch):
    hub = Hub(None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    theirs, _ = both("tiny-siglip", size=0.2)
    path = save(tmp_path / "weights.pt", theirs.state_dict())
    for pretrained in (None, path):
        ours = NaViTCLIP.from_open_clip("tiny-siglip", pretrained)
        assert ours.tokenizer is None
        assert ours.encode_image([torch.zeros(3, 24, 24)]).shape == (1, 32)
        with pytest.raises(UserError, match="no tokenizer"):
            ours.encode_text(["a"])
    # Without a tag nobody asked for the network.
    assert hub.asked == [("nobody/tiny", True)] * 2


def test_a_tag_of_a_siglip_brings_the_tokenizer(tmp_path, monkeypatch):
    theirs, _ = both("tiny-siglip", size=0.2)
    path = save(tmp_path / "w.safetensors", theirs.state_dict())
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-siglip", {"mine": {"url": "x"}})
    monkeypatch.setattr(open_clip, "download_pretrained", Downloads(path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Hub(None))
    message = refusal("tiny-siglip", "mine")
    assert "cannot download the tokenizer nobody/tiny: not in the cache, and no" in message
    directory = tmp_path / "hub"
    directory.mkdir()
    write_tokenizer(directory)
    hub = Hub(directory)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    ours = NaViTCLIP.from_open_clip("tiny-siglip", "mine")
    assert ours.tokenizer.encode("red", 4) == [4, 1, 1, 1]
    assert {local_only for _, local_only in hub.asked} == {False}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_compiled_and_wrapped_models_are_read(prefix, tmp_path):
    torch.save({f"{prefix}visual.proj": torch.ones(2)}, tmp_path / "w.pt")
    assert list(read_checkpoint(tmp_path / "w.pt")) == ["visual.proj"]


def test_names_of_transformers_are_named_as_such(tmp_path):
    torch.save({"vision_model.embeddings.class_embedding": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt has transformers' names: give open_clip's file"):
        read_checkpoint(tmp_path / "w.pt")
