"""Models under evaluation: settings, patches, baselines of open_clip, flags."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from eval_cases import ALONE, run, write_all
from PIL import Image, ImageFile
from shard_factory import CAPTIONS, encode, photo

from navit_clip.data.decode import EncodedImage
from navit_clip.errors import UserError
from navit_clip.evaluation.baselines import OpenClipModel
from navit_clip.evaluation.datasets import FileDataset
from navit_clip.evaluation.embed import embed_dataset
from navit_clip.evaluation.evaluator import EvalSpec
from navit_clip.evaluation.models import PackedModel
from navit_clip.evaluation.settings import EvalSetting, order_settings
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.models.position import PositionConfig

CPU = torch.device("cpu")


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


SIDES = ((50, 90), (90, 50), (32, 32), (20, 24), (200, 36))


def test_views_are_named_ordered_and_unique():
    settings = EvalSpec(max_tokens=(64, 16, 64), native=True, square=(336, 224)).settings
    assert [setting.label for setting in settings] == ["16", "64", "native", "224²", "336²"]
    assert order_settings(reversed(settings)) == settings
    assert [setting.max_tokens for setting in settings] == [16, 64, None, None, None]
    assert [setting.side for setting in settings] == [None, None, None, 224, 336]
    assert EvalSpec().settings == []


@pytest.mark.parametrize(
    "words", [("capped",), ("capped", 0), ("square", -1), ("native", 3), ("round", 3)]
)
def test_impossible_views(words):
    with pytest.raises(ValueError, match=r"size|kind"):
        EvalSetting(*words)


@pytest.mark.parametrize("square", [False, True])
def test_a_packed_model_sees_what_a_view_says(square, model_dir):
    ours = NaViTCLIP.from_directory(model_dir)
    ours.preprocess = Preprocess(12, square)
    model = PackedModel(ours, "tiny")
    assert model.own_setting == EvalSetting("capped", 12)
    sizer = pickle.loads(pickle.dumps(model.sizer))
    for height, width in ((24, 40), (7, 5), (300, 20), (130, 200)):
        image = EncodedImage(encode(photo(0, height, width)))
        for setting in EvalSpec(max_tokens=(1, 5, 12), native=True, square=(8, 32, 128)).settings:
            sized = sizer(image, setting)
            rows, columns = sized.grid
            assert model.length(sized) == rows * columns
            if setting.kind == "square":
                assert rows == columns == setting.size // 8
                with Image.fromarray(image.pixels(height, width, reduced=False)) as whole:
                    squashed = whole.resize((setting.size, setting.size), Image.Resampling.BICUBIC)
                first = np.asarray(squashed.crop((0, 0, 8, 8)))
                assert np.array_equal(sized.patches[0], first.flatten())
            elif setting.kind == "capped":
                assert rows * columns <= setting.size
                assert not square or rows == columns == int(setting.size**0.5)
            else:
                native = max(1, height / 8), max(1, width / 8)
                shrink = max(1, *(side / 16 for side in native))
                for side, exact in zip(sized.grid, native, strict=True):
                    assert side <= exact
                    assert abs(side - exact / shrink) <= 1 or side == 1
    for side in (8, 128):
        model.check(EvalSetting("square", side))
    for side, why in ((9, "patches of 8 pixels.* use 8"), (136, "128 pixels"), (1, "use 8")):
        with pytest.raises(UserError, match=why):
            model.check(EvalSetting("square", side))


def test_a_packed_model_in_patches_of_another_size(model_dir):
    ours = NaViTCLIP.from_directory(model_dir)
    ours.preprocess = Preprocess(12)
    position = PositionConfig("learned_1d", table_side=4)
    ours.config = replace(ours.config, image=replace(ours.config.image, position=position))
    model, before = PackedModel(ours, "tiny"), PackedModel(ours, "tiny")
    model.set_patch_size(4)
    assert model.own_setting == EvalSetting("capped", 48)
    assert model.name == "tiny in patches of 4 px"
    assert model.fingerprint != before.fingerprint
    image = EncodedImage(encode(photo(0, 32, 24)))
    fine, coarse = (one.sizer(image, one.own_setting) for one in (model, before))
    assert fine.grid == (2 * coarse.grid[0], 2 * coarse.grid[1])
    assert fine.patch_size == 4
    assert model.image_flops(12) < before.image_flops(12)
    model.check(EvalSetting("square", 20))
    with pytest.raises(UserError, match="patches of 8 pixels"):
        before.check(EvalSetting("square", 20))


def test_each_image_is_decoded_once(model_dir, tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(photo(0, 100, 140), "JPEG"))
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (
        decoded.append(self) if self.tile else None, load(self))[1])  # fmt: skip
    model = PackedModel(NaViTCLIP.from_directory(model_dir), "tiny")
    settings = EvalSpec(max_tokens=(4, 12, 50), native=True, square=(64,)).settings
    (embedded,) = embed_dataset([(model, settings)], FileDataset([path], [(0,)]), ALONE, workers=0)
    assert len(set(embedded.lengths)) == 5
    assert len(decoded) == 1


def test_a_killed_worker_is_one_line(model_dir):
    class Killed(FileDataset):
        def read(self, part, parts):
            os.kill(os.getpid(), signal.SIGKILL)
            yield from super().read(part, parts)

    model = PackedModel(NaViTCLIP.from_directory(model_dir), "tiny")
    with pytest.raises(UserError, match=r"^DataLoader worker .*give fewer --workers$"):
        embed_dataset([(model, [EvalSetting("capped", 4)])], Killed([], []), ALONE, workers=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """open_clip's configuration and checkpoint of a tiny model."""
    root = tmp_path_factory.mktemp("open_clip")
    (root / "tiny-test.json").write_text(json.dumps(TINY))
    squash = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "patch_size": 16}}
    (root / "other-test.json").write_text(json.dumps(squash))
    open_clip.add_model_config(root)
    torch.manual_seed(1)
    torch.save(open_clip.create_model("tiny-test").state_dict(), root / "tiny.pt")
    return root / "tiny.pt"


@pytest.mark.parametrize("side", [32, 48])
def test_a_baseline_is_open_clips_own_pipeline(side, tiny, tmp_path):
    reference, _, transform = open_clip.create_model_and_transforms(
        "tiny-test", str(tiny), force_image_size=side
    )
    reference.eval()
    tokenizer = open_clip.get_tokenizer("tiny-test")
    files = []
    for seed, (height, width) in enumerate(SIDES):
        files.append(tmp_path / f"{seed}.jpg")
        files[-1].write_bytes(encode(photo(seed, height, width), "JPEG"))
    model = OpenClipModel("tiny-test", tiny, None, CPU, [48, 50])
    setting = EvalSetting("square", side)
    sizer = pickle.loads(pickle.dumps(model.sizer))
    sized = [sizer(EncodedImage(path.read_bytes()), setting) for path in files]
    pixels = torch.stack([transform(Image.open(path)) for path in files])
    assert torch.equal(torch.stack([torch.from_numpy(one) for one in sized]), pixels)
    long = [*CAPTIONS, "a very long caption " * 20]
    with torch.no_grad():
        expected = reference.encode_image(pixels, normalize=True)
        texts = reference.encode_text(tokenizer(long), normalize=True)
    torch.testing.assert_close(model.embed_images(sized), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.embed_texts(long), texts, atol=1e-6, rtol=0)
    assert model.scale == pytest.approx(reference.logit_scale.exp().item())
    assert model.own_setting == EvalSetting("square", 32)
    tokens = (side // 8) ** 2
    assert model.length(sized[0]) == tokens
    # Patches, two blocks over patches and the class token, and the projection; two per product.
    n, c = tokens + 1, 64
    blocks = 2 * (2 * n * 12 * c * c + 4 * n * n * c)
    assert model.image_flops(tokens) == 2 * tokens * 3 * 64 * c + blocks + 2 * c * 16
    assert model.embed_images([]).shape == model.embed_texts([]).shape == (0, 16)
    for impossible, why in (
        (EvalSetting("native"), "--native"), (EvalSetting("capped", 9), "--max-tokens 9"),
        (EvalSetting("square", 50), "patches of 8"), (EvalSetting("square", 64), "--square 64"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            model.check(impossible)


def test_fingerprints_differ_where_models_do(tiny, model_dir):
    def of(name, weights, seed):
        return OpenClipModel(name, weights, seed, CPU).fingerprint

    prints = [of("tiny-test", tiny, None), of("tiny-test", None, 0), of("tiny-test", None, 2)]
    prints.append(of("other-test", None, 0))
    prints.append(PackedModel(NaViTCLIP.from_directory(model_dir), "a").fingerprint)
    assert len(set(prints)) == len(prints)
    assert of("tiny-test", tiny, None) == prints[0]
    assert of("tiny-test", None, 2) == prints[2]
    assert PackedModel(NaViTCLIP.from_directory(model_dir), "b").fingerprint == prints[-1]


def test_random_weights_leave_the_generators_alone(tiny, monkeypatch):
    gpus = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", gpus.append)
    state = torch.get_rng_state()
    OpenClipModel("tiny-test", None, 2, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert gpus == []


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("eval"))


def flags(data, tmp_path):
    return ["zeroshot", "--data", data / "classes", "--templates", "plain", "--workers", 0,
            "--device", "cpu", "--output", tmp_path / "r.json"]  # fmt: skip


def test_baselines_beside_a_model_and_alone(tiny, model_dir, data, tmp_path, capsys):
    beside = tmp_path / "beside.json"
    assert run(
        *flags(data, tmp_path), "--model", model_dir, "--max-tokens", 6, "--native",
        "--square", "48,64", "--baseline", "open_clip:tiny-test", "--baseline-weights", tiny,
        "--baseline", model_dir, "--baseline", "open_clip:other-test", "--random-weights", 3,
        "--output", beside, "--cache", tmp_path / "cache",
    ) == 0  # fmt: skip
    result = json.loads(beside.read_text())
    assert result["model"] == str(model_dir)
    names = ["open_clip:tiny-test", str(model_dir), "open_clip:other-test (random weights, seed 3)"]
    assert [baseline["model"] for baseline in result["baselines"]] == names
    seen = [[entry["label"] for entry in one["views"]] for one in result["baselines"]]
    own = ["6", "12", "native", "48²", "64²"]
    assert seen == [["32²", "48²", "64²"], own, ["32²", "48²", "64²"]]
    assert result["baselines"][1]["views"] == result["views"]
    capsys.readouterr()

    assert run(*flags(data, tmp_path), "--model", "open_clip:tiny-test", "--weights", tiny,
               "--square", "48,64") == 0  # fmt: skip
    alone = json.loads((tmp_path / "r.json").read_text())
    assert alone["model"] == "open_clip:tiny-test"
    assert alone["views"] == result["baselines"][0]["views"]
    assert alone["top1"] == alone["views"][0]["top1"]
    assert alone["max_tokens"] is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "open_clip:tiny-test"], "--weights"),
        (["--model", "open_clip:tiny-tst", "--random-weights", 0], "did you mean tiny-test"),
        (["--model", "open_clip:", "--random-weights", 0], "no model ''"),
        (["--model", "open_clip:ViT-B-16-SigLIP", "--random-weights", 0], "Hugging Face"),
        (["--model", "open_clip:tiny-test", "--weights", "{tmp}/none.pt"], "{tmp}/none.pt"),
        (["--model", "open_clip:tiny-test", "--weights", "{data}/templates.txt"], "plain tensors"),
        (["--model", "open_clip:other-test", "--weights", "{tiny}"], "do not fit open_clip's"),
        (["--model", "open_clip:tiny-test", "--random-weights", 0, "--native"], "--native"),
        (["--model", "open_clip:tiny-test", "--random-weights", 0, "--square", 50], "--square 50"),
        (["--model", "open_clip:tiny-test", "--random-weights", "x"], "--random-weights"),
        (["--model", "open_clip:tiny-test", "--random-weights", -1], "--random-weights"),
        (["--model", "{model}", "--weights", "{tiny}"], "--weights belongs"),
        (["--model", "{model}", "--step", 3], "--step belongs"),
        (["--model", "{model}", "--step", "x"], "--step"),
        (["--model", "{model}", "--run", "{tmp}"], "--run"),
        (["--run", "{tmp}"], "no training run at {tmp}"),
        ([], "--model"),
        (["--model", "{model}", "--baseline", "open_clip:tiny-test"], "--baseline-weights"),
        (["--model", "{model}", "--baseline", "{tmp}/none"], "no model at {tmp}/none"),
        (["--model", "{model}", "--baseline-weights", "{tiny}"], "1 --baseline-weights for 0"),
        (["--model", "{model}", "--square", "20"], "use 16"),
        (["--model", "{model}", "--square", "160"], "128 pixels"),
        (["--model", "{model}", "--square", "0"], "--square"),
        (["--model", "{model}", "--square", "8.5"], "--square"),
        (["--model", "{model}", "--patch-size", "0"], "--patch-size"),
        (["--model", "{model}", "--patch-size", "4"], "--patch-size 4: patches of 4 pixels need"),
        (
            ["--model", "open_clip:tiny-test", "--random-weights", 0, "--patch-size", 4],
            "(random weights, seed 0) has one size of patches",
        ),
        (["--model", "{model}", "--cache", "{data}/templates.txt/c"], "--cache"),
        (["--model", "{model}", "--strict"], "1 skipped (unreadable_image 1)"),
        (["--model", "{model}", "--report", "{data}/templates.txt/r.html"], "cannot write"),
        (["--model", "{model}", "--curve", "{data}/templates.txt/r.png"], "cannot write"),
    ],
)
def test_a_mistake_is_one_line(words, named, tiny, model_dir, data, tmp_path, capsys):
    places = {"tmp": tmp_path, "data": data, "tiny": tiny, "model": model_dir}
    filled = [str(word).format(**places) for word in words]
    assert run(*flags(data, tmp_path), *filled) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval: error: ")
    assert named.format(**places) in line


def test_strict_writes_nothing_and_passes_on_whole_data(model_dir, data, tmp_path):
    words = [*flags(data, tmp_path), "--model", model_dir, "--strict"]
    assert run(*words) == 2
    assert not (tmp_path / "r.json").exists()
    whole = shutil.copytree(data / "classes", tmp_path / "whole")
    (whole / "lake" / "broken.jpg").unlink()
    assert run(*words, "--data", whole) == 0
    assert json.loads((tmp_path / "r.json").read_text())["skipped"] == {}
