"""Whatever an export, a run, an image or an argument holds: it is taken, or refused in one line."""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fuzz import TOKENS, VALUES, mutated, mutated_json
from PIL import Image
from pretrained_cases import export_small

from navit_clip.data.decode import EncodedImage
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.model import NaViTCLIP
from navit_clip.training.config import parse_config

ROOT = Path(__file__).parents[1]


def problem(
    expected: tuple[type[Exception], ...], call: Callable[..., object], *arguments: object
) -> list[Exception]:
    """What a call is refused with, if it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what it finds in a damaged TIFF
        try:
            call(*arguments)
        except expected as error:
            return [error]
    return []


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_any_json_of_an_export_loads_or_is_refused(name, tmp_path, tokenizer_path):
    directory = export_small(tmp_path, tokenizer_path)
    path, rng = directory / name, random.Random(0)
    whole = path.read_bytes()
    refused = []
    for number in range(400):
        damaged = json.dumps(mutated_json(json.loads(whole), rng)).encode()
        path.write_bytes(damaged if number % 2 else mutated(whole, rng))
        refused += problem((UserError,), NaViTCLIP.from_directory, directory)
    assert len(refused) > 100
    assert all(str(directory) in str(error) for error in refused)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["tokenizer.model", "model.safetensors"])
def test_any_bytes_of_an_export_load_or_are_refused(name, tmp_path, tokenizer_path):
    directory = export_small(tmp_path, tokenizer_path)
    path, rng = directory / name, random.Random(0)
    whole = path.read_bytes()
    for _ in range(100):
        path.write_bytes(mutated(whole[:2000], rng) + whole[2000:])
        for error in problem((UserError,), NaViTCLIP.from_directory, directory):
            assert str(directory) in str(error)


def decode(data: bytes) -> None:
    assert EncodedImage(data).pixels(8, 6).shape == (8, 6, 3)


@pytest.mark.timeout(180)
def test_any_configuration_is_read_or_refused(tmp_path):
    recipe, path, rng = ROOT / "configs/demo.yaml", tmp_path / "run.yaml", random.Random(0)
    whole = yaml.safe_load(parse_config(["--config", str(recipe)])[1])
    for number in range(24):
        damaged = json.dumps(mutated_json(whole, rng)).encode()
        path.write_bytes(damaged if number % 3 else mutated(recipe.read_bytes(), rng))
        for error in problem((UserError,), parse_config, ["--config", str(path)]):
            assert str(error)


FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("form", FORMATS)
def test_any_bytes_are_an_image_or_unreadable(form):
    rng, file = random.Random(0), io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    for _ in range(400):
        at = rng.choice([0, 0, rng.randrange(len(file.getvalue()))])
        whole = file.getvalue()
        data = whole[:at] + mutated(whole[at : at + 300], rng) + whole[at + 300 :]
        for error in problem((SkipSampleError,), decode, data):
            assert str(error).startswith(("unreadable_image: ", "too_large: "))


ARGUMENTS: list[Any] = [
    *VALUES, *TOKENS, object(), print, (), (1,), {"a": 1}, {1, 2}, b"", io.StringIO("a"),
    np.zeros(3), np.zeros((2, 2), dtype=object), np.full((2, 2, 3), np.nan), np.zeros((0, 4, 3)),
    np.zeros((2, 2, 3), dtype="U3"), np.zeros((2, 2, 2, 2)), np.ones((3, 3, 3), dtype=bool),
    torch.zeros(3), torch.zeros(2, 2, dtype=torch.complex64), torch.full((3, 2, 2), torch.inf),
    torch.zeros(3, 0, 2), Image.new("RGB", (0, 3)), Image.new("F", (2, 2)), Path(), Path("\0"),
    "https://host/a.jpg", "data:image/png;base64,AA", 10**30, 1j, float("nan"), ...,
]  # fmt: skip


@pytest.mark.timeout(180)
def test_any_argument_is_taken_or_refused(model_dir):
    model = NaViTCLIP.from_pretrained(model_dir)
    calls = {
        "encode_image": lambda x: model.encode_image([x]),
        "encode_text": lambda x: model.encode_text([x]),
        "max_tokens": lambda x: model.encode_image([Image.new("RGB", (9, 9))], max_tokens=x),
        "classify": lambda x: model.classify([Image.new("RGB", (9, 9))], [x, "b"]),
        "templates": lambda x: model.classify([Image.new("RGB", (9, 9))], ["a"], [x]),
        "from_directory": NaViTCLIP.from_directory,
    }
    for name, call in calls.items():
        # A directory that is no path at all is Python's to name.
        expected = (ValueError, UserError, *([TypeError] if name == "from_directory" else []))
        for argument in ARGUMENTS:
            for error in problem(expected, call, argument):
                assert str(error), name
