"""CLIP, SigLIP and SigLIP 2 as transformers saves them: its vectors, its files, both ways."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_examples import random_image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers_cases import GRIDS, MEAN, PATCH, STD, TEXTS, every_case, transformers

from navit_clip.architectures import architecture
from navit_clip.export.card import add_evaluation
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.tasks.source import InitConfig
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer
from navit_clip.tokenizers.siglip import SiglipTokenizer


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


def test_older_folders_and_those_in_parts_are_read(folders, tmp_path):
    folder = shutil.copytree(folders["siglip"], tmp_path / "model")
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
    folder = shutil.copytree(folders["siglip"], tmp_path / "model")
    start = InitConfig(str(folder))
    assert start.read_config(tmp_path / "run") == start.read_model().config
    (folder / "README.md").write_text("theirs")
    add_evaluation(folder, "zeroshot", "data", "3 images", "0.5")
    assert (folder / "README.md").read_text() == "theirs"
