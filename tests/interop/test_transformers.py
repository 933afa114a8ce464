"""CLIP, SigLIP and SigLIP 2 as transformers saves them: its vectors, its files, both ways.

Small models of transformers' own classes with random weights, and tokenizers made here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_examples import random_image, randomise
from safetensors.torch import load_file, save_file
from shard_factory import CAPTIONS
from siglip_files import write_spiece
from torch import Tensor

from navit_clip.architectures import architecture
from navit_clip.errors import UserError
from navit_clip.export.card import add_evaluation
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.tasks.source import InitConfig
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer
from navit_clip.tokenizers.siglip import SiglipTokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra siglip) is not installed")
transformers = pytest.importorskip("transformers", reason="transformers (dev) is not installed")

PATCH = 4
MEAN, STD = (0.1, 0.4, 0.7), (0.2, 0.3, 0.4)
GRIDS = [(3, 3), (2, 5), (5, 4), (7, 1), (1, 1), (3, 3)]
TEXTS = [
    "",
    "A photo of a Dog, isn't it?",
    "many words " * 40,
    "naïve café ☃ 東京",
    "  two\n words ",
    *CAPTIONS,
]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {**SIZES, "hidden_size": 32, "intermediate_size": 73, "patch_size": PATCH}
TEXT = {**SIZES, "hidden_size": 24, "intermediate_size": 50, "max_position_embeddings": 9}


def clip(image: dict[str, Any], text: dict[str, Any]) -> Any:
    config = transformers.CLIPConfig(
        vision_config={**IMAGE, "image_size": 3 * PATCH, **image},
        text_config={**TEXT, "vocab_size": 49408, **text},
        projection_dim=12,
    )
    return transformers.CLIPModel(config)


def siglip(image: dict[str, Any], text: dict[str, Any]) -> Any:
    config = transformers.SiglipConfig(
        vision_config={**IMAGE, "image_size": 3 * PATCH, **image},
        text_config={**TEXT, "vocab_size": 110, "projection_size": 32, **text},
    )
    return transformers.SiglipModel(config)


def siglip2(image: dict[str, Any], text: dict[str, Any]) -> Any:
    config = transformers.Siglip2Config(
        vision_config={**IMAGE, "num_patches": 9, **image},
        text_config={**TEXT, "vocab_size": 110, "projection_size": 32, **text},
    )
    return transformers.Siglip2Model(config)


CASES = {
    "clip": lambda: clip({}, {}),
    "clip-gelu": lambda: clip(
        {"hidden_act": "gelu", "layer_norm_eps": 1e-2}, {"hidden_act": "gelu_pytorch_tanh"}
    ),
    "clip-old": lambda: clip({}, {"eos_token_id": 2, "layer_norm_eps": 1e-2}),
    "siglip": lambda: siglip({}, {}),
    "siglip-gelu": lambda: siglip({"hidden_act": "gelu"}, {"layer_norm_eps": 1e-2}),
    "naflex": lambda: siglip2({}, {}),
    "naflex-epsilon": lambda: siglip2({"layer_norm_eps": 1e-2}, {"hidden_act": "gelu"}),
}
every_case = pytest.mark.parametrize("name", CASES)


def clip_tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    vocabulary = dict(theirs.encoder)
    vocabulary["<|startoftext|>"] = vocabulary.pop("<start_of_text>")
    vocabulary["<|endoftext|>"] = vocabulary.pop("<end_of_text>")
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks))


def siglip_tokenizer(folder: Path) -> Any:
    return transformers.SiglipTokenizer(str(write_spiece(folder)))


def siglip2_tokenizer() -> Any:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trained.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=100, special_tokens=specials, show_progress=False
    )
    trained.train_from_iterator([text.lower() for text in CAPTIONS * 5], trainer)
    values = json.loads(trained.to_str())["model"]
    tokenizer = transformers.Siglip2Tokenizer(
        vocab=values["vocab"],
        merges=[tuple(merge) for merge in values["merges"]],
        padding_side="right",
    )
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case as transformers saves it."""
    parent = tmp_path_factory.mktemp("transformers")
    made = {
        "clip": clip_tokenizer(),
        "siglip": siglip_tokenizer(parent),
        "naflex": siglip2_tokenizer(),
    }
    images: dict[str, Any] = {
        "clip": transformers.CLIPImageProcessor,
        "siglip": transformers.SiglipImageProcessor,
        "naflex": transformers.Siglip2ImageProcessor,
    }
    result = {}
    for name, build in CASES.items():
        family = name.split("-")[0]
        torch.manual_seed(0)
        model = build()
        randomise(model, seed=1, std=0.1)
        result[name] = parent / name
        model.save_pretrained(parent / name)
        if name not in made:  # a variant's tokenizer is its family's
            for path in (parent / family).iterdir():
                if path.name not in ("config.json", "model.safetensors"):
                    shutil.copy(path, parent / name)
            continue
        made[family].save_pretrained(parent / name)
        size = {"patch_size": PATCH, "max_num_patches": 30} if family == "naflex" else {}
        images[family](image_mean=MEAN, image_std=STD, **size).save_pretrained(parent / name)
    return result


def pictures() -> list[ImagePatches]:
    return [random_image(seed, grid, patch_size=PATCH) for seed, grid in enumerate(GRIDS)]


def normalised(image: ImagePatches) -> Tensor:
    values = torch.from_numpy(image.patches).unflatten(1, (-1, 3)) / 255
    return (values - torch.tensor(MEAN)) / torch.tensor(STD)


def unit(output: Any) -> Tensor:
    return torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)


@torch.no_grad()
def their_images(model: Any, images: list[ImagePatches]) -> Tensor:
    """Unit vectors of images by transformers; NaFlex padded in one batch, others one by one."""
    if model.config.model_type == "siglip2":
        counts = [len(image.patches) for image in images]
        pixels = torch.zeros(len(images), max(counts), 3 * PATCH**2)
        mask = torch.zeros(len(images), max(counts), dtype=torch.int32)
        for row, image in enumerate(images):
            pixels[row, : counts[row]] = normalised(image).flatten(1)
            mask[row, : counts[row]] = 1
        shapes = torch.tensor([image.grid for image in images])
        return unit(model.get_image_features(pixels, mask, shapes))
    vectors = []
    for image in images:
        rows, columns = image.grid
        square = normalised(image).view(rows, columns, PATCH, PATCH, 3)
        pixels = torch.einsum("rcyxk->krycx", square).reshape(1, 3, rows * PATCH, columns * PATCH)
        vectors.append(unit(model.get_image_features(pixels, interpolate_pos_encoding=True)))
    return torch.cat(vectors)


@torch.no_grad()
def their_texts(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    kind = True if model.config.model_type == "clip" else "max_length"
    ids = tokenizer(texts, padding=kind, truncation=True, max_length=9, return_tensors="pt")
    return unit(model.get_text_features(ids["input_ids"]))


@cache
def tokenizer_in(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def check(folder: Path, ours: NaViTCLIP, tokenizer: Any) -> None:
    """Vectors of images of all sizes and of texts, packed, are those of transformers."""
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        images = ours.embed_images(pack_images(pictures()))
    texts = ours.encode_text(TEXTS)
    expected = their_images(theirs, pictures())
    assert torch.pdist(expected).min() > 1e-3  # else a constant would pass
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    expected = their_texts(theirs, tokenizer, TEXTS)
    torch.testing.assert_close(texts, expected, rtol=0, atol=1e-5)
    scale, bias = theirs.logit_scale.exp(), getattr(theirs, "logit_bias", None)
    torch.testing.assert_close(ours.log_scale.exp(), scale.reshape(()), rtol=1e-6, atol=0)
    assert (bias is None) == (ours.logit_bias is None)
    assert bias is None or bias.reshape(()) == ours.logit_bias


@every_case
def test_vectors_are_those_of_transformers(folders, name):
    family = folders[name.split("-")[0]]
    check(folders[name], NaViTCLIP.from_pretrained(folders[name]), tokenizer_in(family))


@every_case
def test_what_came_in_goes_out_bit_for_bit(folders, name, tmp_path):
    ours = NaViTCLIP.from_pretrained(folders[name])
    ours.save_transformers(tmp_path / "out")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (folders[name], tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # Reading CLIP's takes seconds; that of one in each family is enough.
    family, _, variant = name.partition("-")
    check(tmp_path / "out", ours, tokenizer_in(folders[family] if variant else tmp_path / "out"))
    again = NaViTCLIP.from_pretrained(tmp_path / "out")
    assert again.config == ours.config
    assert again.preprocess == ours.preprocess
    assert torch.equal(again.encode_text(TEXTS), ours.encode_text(TEXTS))


@pytest.mark.parametrize("name", ["clip", "siglip", "naflex"])
def test_the_image_processor_comes_along(folders, name, tmp_path):
    ours = NaViTCLIP.from_pretrained(folders[name])
    assert ours.config.image.pixel_mean == MEAN
    assert ours.config.image.pixel_std == STD
    assert ours.preprocess == Preprocess(30 if name == "naflex" else 9)
    ours.save_transformers(tmp_path)
    names = set(tokenizer_in(tmp_path)("a red dog"))
    assert names == ({"input_ids", "attention_mask"} if name == "clip" else {"input_ids"})
    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(picture, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    if name == "naflex":
        assert pixels["spatial_shapes"].prod() > 9  # enlarged, which ours are not
        return
    with torch.no_grad():
        expected = unit(model.get_image_features(**pixels))
    torch.testing.assert_close(ours.encode_image([picture]), expected, rtol=0, atol=1e-5)


def test_a_model_of_ours_is_loaded_by_transformers(tmp_path):
    config = architecture("open_clip:ViT-B-32")
    image, text = (
        replace(part, encoder=replace(part.encoder, width=16, depth=1, heads=2))
        for part in (config.image, config.text)
    )
    small = replace(config, embed_dim=8, image=image, text=text)
    model = NaViTCLIP(small, OpenClipTokenizer(), Preprocess(49)).eval()
    model.save_transformers(tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    ids = tokenizer_in(tmp_path)(TEXTS, padding=True, truncation=True, return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        expected = unit(theirs.get_text_features(ids))
    torch.testing.assert_close(model.encode_text(TEXTS), expected, rtol=0, atol=1e-5)


def test_captions_without_punctuation_are_cleaned_by_the_written_file(folders, tmp_path):
    ours = NaViTCLIP.from_pretrained(folders["siglip"])
    ours.tokenizer = SiglipTokenizer(folders["naflex"] / "tokenizer.json", "<pad>")
    ours.save_transformers(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "snake_case, & 'more'"):
        expected = theirs(text, padding="max_length", truncation=True, max_length=9)["input_ids"]
        assert ours.tokenizer.encode(text, 9) == expected


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def config(part: str | None, **values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        change = lambda found: (found[part] if part else found).update(values)  # noqa: E731
        changed(folder / "config.json", change)

    return damage


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return damage


def without(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def settings(**values: Any) -> Callable[[Path], None]:
    return lambda folder: changed(
        folder / "tokenizer_config.json", lambda found: found.update(values)
    )


BIAS = "vision_model.head.mlp.fc1.bias"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another": (config(None, model_type="blip"), "transformers' blip, the packed towers can be"),
    "activation": (config("text_config", hidden_act="relu"), "have no activation relu"),
    "head": (config("vision_config", vision_use_head=False), "has no pooling head"),
    "patches": (config("vision_config", patch_size=[4, 2]), "patch_size is not square"),
    "channels": (config("vision_config", num_channels=1), "images have 1 channels"),
    "heads": (config("vision_config", num_attention_heads=5), "heads must divide width"),
    "zero": (config("vision_config", hidden_size=0), "cannot read"),
    "word": (config("text_config", hidden_size="a"), "cannot read"),
    "depth": (config("text_config", num_hidden_layers=10**9), "smaller model than"),
    "width": (config("vision_config", intermediate_size=10**9), "do not fit its config.json"),
    "config": (lambda folder: config(None, text_config=[1])(folder), "cannot read"),
    "missing": (weights(lambda state: state.pop(BIAS)), f"they lack {BIAS}"),
    "unknown": (weights(lambda state: state.update(a=torch.ones(1))), "which has no a"),
    "no weights": (without("model.safetensors"), "no model.safetensors in"),
    "no tokenizer": (without("spiece.model"), "no tokenizer at"),
    "no settings": (without("tokenizer_config.json"), "names the padding token"),
    "left": (settings(padding_side="left"), "pads on the left"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_another_or_damaged_model_is_named_in_one_line(folders, tmp_path, damage, message):
    folder = copy(folders["siglip"], tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError) as error:
        NaViTCLIP.from_pretrained(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_clip_needs_its_own_end_and_vocabulary(folders, tmp_path):
    folder = copy(folders["clip"], tmp_path / "end")
    config("text_config", eos_token_id=5)(folder)
    with pytest.raises(UserError, match="texts end with the id 5, CLIP's with 49407"):
        NaViTCLIP.from_pretrained(folder)
    folder = copy(folders["clip"], tmp_path / "vocabulary")
    (folder / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(UserError, match=r"vocab\.json is not CLIP's vocabulary"):
        NaViTCLIP.from_pretrained(folder)


def test_older_folders_and_those_in_parts_are_read(folders, tmp_path):
    folder = copy(folders["siglip"], tmp_path / "model")
    expected = NaViTCLIP.from_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(9)[None]
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, some in parts.items():
        save_file({name: state[name] for name in some}, folder / part)
    index = {"weight_map": {name: part for part, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    # Where newer versions keep them.
    images = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": images}))
    values = json.loads((folder / "config.json").read_text())
    # The first versions wrote it so.
    values["text_config_dict"] = values["text_config"]
    values["text_config"] = {"hidden_size": 5}
    (folder / "config.json").write_text(json.dumps(values))
    ours = NaViTCLIP.from_pretrained(folder)
    assert ours.config == expected.config
    assert all(
        torch.equal(ours.state_dict()[key], tensor) for key, tensor in expected.state_dict().items()
    )


def test_a_run_may_start_from_it_and_an_evaluation_leaves_its_card_alone(folders, tmp_path):
    folder = copy(folders["siglip"], tmp_path / "model")
    start = InitConfig(str(folder))
    assert start.read_config(tmp_path / "run") == start.read_model().config
    (folder / "README.md").write_text("theirs")
    add_evaluation(folder, "zeroshot", "data", "3 images", "0.5")
    assert (folder / "README.md").read_text() == "theirs"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "image.position.kind"),
        ({"text_projection": "linear"}, "no model with this text_projection"),
        ({"init_bias": None}, "no model with this init_bias"),
    ],
)
def test_a_model_without_counterpart_is_refused_by_the_switch(folders, tmp_path, change, message):
    ours = NaViTCLIP.from_pretrained(folders["siglip"])
    base = replace(ours.config, **change) if change else architecture("navit_b16")
    with torch.device("meta"):
        model = NaViTCLIP(base, ours.tokenizer, ours.preprocess)
    with pytest.raises(UserError, match=message):
        model.save_transformers(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_counterpart_is_refused(folders, tmp_path, tokenizer):
    ours = NaViTCLIP.from_pretrained(folders["naflex"])
    ours.tokenizer = tokenizer
    with pytest.raises(UserError, match="SigLIP has no tokenizer of the kind sentencepiece"):
        ours.save_transformers(tmp_path / "out")
    ours.tokenizer = SiglipTokenizer(folders["naflex"] / "tokenizer.json", "<pad>")
    with pytest.raises(UserError, match="SigLIP 2 keeps punctuation"):
        ours.save_transformers(tmp_path / "out")
    ours.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer to save"):
        ours.save_transformers(tmp_path / "out")
