"""Reconstruction: errors against loops over single images, the picture, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from eval_cases import run
from masked_cases import build, one_by_one
from PIL import Image
from shard_factory import encode, photo, write_shard
from test_eval_classify import new_model as new_classifier

from navit_clip.data.decode import EncodedImage
from navit_clip.evaluation.models import PackedMaskedImage
from navit_clip.evaluation.reconstruct import _metrics, _Predictor
from navit_clip.inference.preprocess import Preprocess
from navit_clip.losses.masked_pixels import normalise_patches
from navit_clip.masked_image import NaViTMaskedImage

SIZES = [(14, 20), (16, 16), (9, 30), (4, 3), (40, 22)]


def new_model():
    source = build()
    model = NaViTMaskedImage(source.config, Preprocess(30)).double()
    model.load_state_dict(source.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("reconstruct")
    (root / "images/deep").mkdir(parents=True)
    for i, size in enumerate(SIZES):
        (root / "images/deep" / f"{i}.png").write_bytes(encode(photo(i, *size)))
    (root / "images/dot.png").write_bytes(encode(photo(9, 3, 3)))  # a single patch
    samples = {str(i): {"png": encode(photo(i, *size))} for i, size in enumerate(SIZES)}
    write_shard(root / "shards/0.tar", samples)
    new_model().float().save_pretrained(root / "model")
    new_classifier().save_pretrained(root / "classifier")
    return root


@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_errors_are_those_of_each_image_alone(root, rate):
    model = new_model()
    predictor = _Predictor(PackedMaskedImage(model, "m"), rate)
    files = sorted((root / "images/deep").iterdir())
    sized = [
        predictor.sizer(EncodedImage(file.read_bytes()), predictor.own_setting) for file in files
    ]
    visible = [predictor.visible(image) for image in sized]
    found = predictor.embed_images(sized).double().mean(0)
    greys = []
    for image, kept in zip(sized, visible, strict=True):
        assert 0 < len(kept) < len(image.patches)
        hidden = np.setdiff1d(np.arange(len(image.patches)), kept)
        targets = normalise_patches(torch.from_numpy(image.patches[hidden]))
        greys.append(targets.square().mean())
    expected = one_by_one(model, sized, visible) / len(sized), torch.stack(greys).mean()
    torch.testing.assert_close(
        found, torch.stack([e.double() for e in expected]), rtol=1e-5, atol=0
    )


def words(root, data="images", *more):
    return ["reconstruct", "--model", root / "model", "--data", root / data, "--workers", 0, *more]


def test_the_command_writes_metrics_a_picture_and_a_report(root, tmp_path, capsys):
    outputs = {name: tmp_path / f"r.{name}" for name in ("json", "png", "html")}
    flags = ["--output", outputs["json"], "--gallery", outputs["png"], "--report", outputs["html"]]
    assert run(*words(root, "images", "--rate", 0.5, "--max-tokens", 8, *flags)) == 0
    result = json.loads(outputs["json"].read_text())
    assert result["images"] == len(SIZES)
    assert result["skipped"] == {"one_patch": 1}
    assert result["explained"] < 0.5  # weights are random
    assert len(result["views"]) == 2
    assert "explained" in capsys.readouterr().out
    assert "data:image/png;base64," in outputs["html"].read_text()
    picture = Image.open(outputs["png"])
    assert picture.size == (2 * (3 * 208 + 8) + 8, 3 * 208 + 8)
    # The second image is square: what it shows whole is shown masked where it is not grey.
    left = 3 * 208 + 8 + 8
    masked, predicted, whole = (
        np.array(picture.crop((left + i * 208, 8, left + i * 208 + 200, 208))) for i in range(3)
    )
    grey = (masked == 128).all(-1)
    assert 0.3 < grey.mean() < 0.6  # the corners of the patches are smoothed
    assert (masked == whole).all(-1)[~grey].mean() > 0.9
    assert (predicted == whole).all(-1)[~grey].mean() > 0.9
    # Of shards the same images have the same patches hidden.
    again = tmp_path / "shards.json"
    assert run(*words(root, "shards", "--rate", 0.5, "--output", again)) == 0
    assert json.loads(again.read_text())["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_what_one_setting_leaves_out_the_cache_does_not_keep_from_another(root, tmp_path):
    small = [encode(photo(i, *size)) for i, size in enumerate([(40, 40), (40, 5), (9, 8)])]
    (tmp_path / "images").mkdir()
    for i, data in enumerate(small):
        (tmp_path / "images" / f"{i}.png").write_bytes(data)

    def images(name, *more):
        output = tmp_path / f"{name}.json"
        flags = ["--data", tmp_path / "images", "--output", output, *more]
        assert run(*words(root, "images", *flags)) == 0
        return json.loads(output.read_text())["images"]

    cache = ["--cache", tmp_path / "cache"]
    alone = images("alone")
    assert images("both", "--max-tokens", 2, *cache) < alone
    assert images("again", *cache) == alone


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--rate", "1"], r"--rate must lie in [0, 1), got 1.0"),
        (["--patch-size", "4"], "--patch-size"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(root, capsys, change, named):
    assert run(*words(root), *change) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line


def test_only_models_that_predict_pixels_can(root, capsys):
    assert run(*words(root), "--model", root / "classifier") == 2
    assert "predicts no pixels: give a masked image model" in capsys.readouterr().err


def test_images_of_one_colour_have_nothing_to_explain():
    found = _metrics(torch.tensor([[0.5, 0.0], [0.25, 1.0]]), torch.tensor([0]))
    assert found["loss"] == 0.5
    assert math.isnan(found["explained"])
