"""Runs that start from an existing model: weights, shape and tokenizer come with it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from sentencepiece import SentencePieceTrainer
from step_cases import ALONE, measurements, new_stepper, tiny_config
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.export.pretrained import save_pretrained
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.tasks.locking import LockConfig
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer
from navit_clip.tokenizers.load import load_tokenizer
from navit_clip.tokenizers.sentencepiece import SentencePieceTokenizer
from navit_clip.training.config import parse_config
from navit_clip.training.ema import EMAConfig
from navit_clip.training.optim import OptimConfig
from navit_clip.training.parallel import ParallelConfig
from navit_clip.training.starting_weights import starting_point
from navit_clip.training.trainer import train

ENCODER = EncoderConfig(
    width=32, depth=2, heads=2, qk_norm=False, qkv_bias=True, norm_bias=True, pre_norm=True
)
# A small CLIP of squares of 4×4 patches, as open_clip has them.
SQUARE = CLIPConfig(
    embed_dim=16,
    image=ImageTowerConfig(
        patch_size=16,
        encoder=ENCODER,
        position=PositionConfig(kind="learned_1d", table_side=4),
        pooling="cls",
        patch_bias=False,
        class_position=True,
    ),
    text=TextTowerConfig(
        vocab_size=128,
        context_length=32,
        encoder=replace(ENCODER, pre_norm=False, causal=True),
        pooling="last",
    ),
)


def save_source(root, name, config=SQUARE, seed=5):
    torch.manual_seed(seed)
    tokenizer = SentencePieceTokenizer(root / "tok.model")
    save_pretrained(root / name, NaViTCLIP(config), tokenizer, Preprocess(16, square=True))
    return root / name


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root)
    save_source(root, "square")
    return root


def finetune_flags(data, run_dir, steps, source="square", **overrides):
    """Flags of a run at native resolution that says nothing of the model and the tokenizer."""
    native = {
        "init__model": data / source,
        "data__resolution__mode": "native",
        "optim__schedule__kind": "constant",
        "optim__schedule__warmup_steps": 0,
    }
    words = tiny_flags(data, run_dir, steps, **native | overrides)
    pairs = zip(words[::2], words[1::2], strict=True)
    kept = [
        pair
        for pair in pairs
        if not pair[0].startswith(("--task.model.", "--tokenizer."))
        or pair[0].removeprefix("--").replace(".", "__") in overrides
    ]
    return [word for pair in kept for word in pair]


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def losses(run_dir):
    return [(line["loss"], line["grad_norm"]) for line in metrics(run_dir)]


def test_a_run_starts_from_the_weights_the_shape_and_the_tokenizer(data, tmp_path, monkeypatch):
    still = {"optim__lr": 1e-30, "optim__weight_decay": 0.0}  # which moves zeros alone
    flags = finetune_flags(data, tmp_path / "run", 1, **still)
    assert run(monkeypatch, flags) == 0
    source, found = (
        NaViTCLIP.from_directory(data / "square"),
        NaViTCLIP.from_directory(tmp_path / "run/model"),
    )
    assert found.config == source.config == SQUARE
    for name, weight in source.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=0, atol=1e-29)
    assert found.tokenizer.encode("a red circle", 32) == source.tokenizer.encode("a red circle", 32)
    assert source.preprocess.square
    assert not found.preprocess.square
    config, _ = parse_config(["--config", str(tmp_path / "run/config.yaml")])
    assert config.task.model == SQUARE


def test_rotary_positions_may_be_added_and_are_all_that_is_new(data, tmp_path, monkeypatch):
    still = {"optim__lr": 1e-30, "optim__weight_decay": 0.0}
    added = {
        "task__model__image__rotary__kind": "mixed",
        "task__model__text__rotary__kind": "axial",
    }
    run_dir = tmp_path / "run"
    assert run(monkeypatch, finetune_flags(data, run_dir, 1, **still, **added)) == 0
    source = NaViTCLIP.from_directory(data / "square")
    found = NaViTCLIP.from_directory(run_dir / "model")
    assert found.config.image.rotary.kind == "mixed"
    assert replace(found.config.image, rotary=SQUARE.image.rotary) == SQUARE.image
    assert found.state_dict().keys() - source.state_dict().keys() == {"image.rotary.learned"}
    for name, weight in source.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=0, atol=1e-29)
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    assert not torch.allclose(found.encode_image([image]), source.encode_image([image]))
    # The run knows its own shape from its checkpoint.
    assert run(monkeypatch, finetune_flags(data, run_dir, 2, **still)) == 0
    assert NaViTCLIP.from_directory(run_dir / "model").config == found.config
    with pytest.raises(
        UserError, match=r"have image.rotary.kind=\"none\", this model has \"mixed\""
    ):
        found.to_open_clip()


EVERYTHING = {
    "optim__layer_decay": 0.8,
    "task__lock__image": "true",
    "task__lock__image_unlocked_blocks": 1,
    "data__resolution__curriculum__images": 60,
    "data__resolution__curriculum__start_tokens": 4,
    "data__drop__kind": "beta",
    "data__drop__ramp_images": 90,
    "data__resolution__patch_sizes": "{8: 1, 16: 1}",
    "ema__decay": 0.5,
    "accumulate": 2,
}


def test_a_run_goes_on_bit_for_bit_without_the_model_it_started_from(data, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monkeypatch, finetune_flags(data, whole, 4, **EVERYTHING))
    shutil.copytree(data / "square", data / "moved")
    for steps in (2, 4):
        flags = finetune_flags(data, parts, steps, source="moved", **EVERYTHING)
        assert run(monkeypatch, flags) == 0
        shutil.rmtree(data / "moved", ignore_errors=True)
    assert losses(parts) == losses(whole)
    ends = [NaViTCLIP.from_directory(d / "model").state_dict() for d in (whole, parts)]
    start = NaViTCLIP.from_directory(data / "square").state_dict()
    for name, weight in ends[0].items():
        assert torch.equal(ends[1][name], weight), name
        locked = name.startswith("image.") and not name.startswith(
            ("image.encoder.blocks.1.", "image.encoder.norm.", "image.pool.")
        )
        assert torch.equal(weight, start[name]) == locked, name
    # Images grow past the first limit of 4 patches, while more of each is left out.
    lines = metrics(whole)
    assert lines[0]["token_drop"] < 0.1 < lines[-1]["token_drop"]
    load_tokenizer(parts / "checkpoints/step-00000004")


def test_another_run_needs_the_model_again(data, tmp_path, monkeypatch, capsys):
    save_source(data, "gone")
    run(monkeypatch, finetune_flags(data, tmp_path / "run", 1, source="gone"))
    shutil.rmtree(data / "gone")
    saved = ["--config", str(tmp_path / "run/config.yaml")]
    capsys.readouterr()
    assert run(monkeypatch, [*saved, "--run_dir", str(tmp_path / "new")]) == 2
    assert "no model at init.model=" in capsys.readouterr().err
    assert run(monkeypatch, [*saved, "--steps", "2"]) == 0


def test_a_model_given_beside_it_must_agree(data, tmp_path):
    same = {"task__model__embed_dim": 16, "task__model__image__position__kind": "learned_1d"}
    config, _ = parse_config(finetune_flags(data, tmp_path, 1, **same))
    assert config.task.model == SQUARE
    other = finetune_flags(data, tmp_path, 1, task__model__text__encoder__depth=3)
    with pytest.raises(
        UserError, match=r"task\.model\.text\.encoder\.depth=3 disagrees .* has 2: leave"
    ):
        parse_config(other)


def test_weights_of_another_shape_than_configured_are_refused(data, tmp_path):
    config, _ = parse_config(finetune_flags(data, tmp_path, 1))
    other = replace(config.task, model=replace(SQUARE, embed_dim=8)).build(config.data)
    with pytest.raises(UserError, match=r"task\.model\.embed_dim=8 disagrees"):
        starting_point(other, config.init, None, None)


def test_random_weights_are_not_kept(data, tmp_path, monkeypatch, capsys):
    write_tiny_data(tmp_path)
    kept = {"task__lock__image": "true", "task__lora__text": "[qkv]"}
    assert run(monkeypatch, tiny_flags(tmp_path, tmp_path / "run", 2, **kept)) == 2
    line = "init.model is missing: task.lock.image and task.lora.text would keep random weights"
    assert line in capsys.readouterr().err


MISTAKES = [
    ({"init__model": "nowhere"}, "init.model=nowhere"),
    ({"init__model": "open_clip:RN50"}, "RN50"),
    ({"init__weights": "w.pt"}, "init.weights belongs to model: open_clip:NAME"),
    ({"tokenizer__path": "missing.model"}, "missing.model"),
    ({"task__lock__image": "true", "task__lock__image_unlocked_blocks": 3}, "exceeds the 2 blocks"),
    ({"optim__layer_decay": 0}, "optim.layer_decay"),
    ({"data__resolution__curriculum__start_tokens": 4}, "curriculum.images"),
]


@pytest.mark.parametrize(("change", "named"), MISTAKES)
def test_a_mistake_gets_one_line(data, tmp_path, monkeypatch, capsys, change, named):
    assert run(monkeypatch, finetune_flags(data, tmp_path / "run", 2, **change)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line


def train_pieces(path, count):
    """A SentencePiece model of numbers, unlike that of any captions."""
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(map(str, range(10**5, 2 * 10**5, 7))),
            model_writer=file,
            vocab_size=count,
            model_type="bpe",
            minloglevel=2,
        )


@pytest.mark.parametrize(
    ("pieces", "named"), [(120, "120 ids, that of init.model="), (128, "other ids than that of")]
)
def test_a_tokenizer_of_another_vocabulary(data, tmp_path, monkeypatch, capsys, pieces, named):
    train_pieces(tmp_path / "other.model", pieces)
    flags = finetune_flags(data, tmp_path / "run", 2, tokenizer__path=tmp_path / "other.model")
    assert run(monkeypatch, flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
    assert "leave `tokenizer` out" in line


def test_the_same_tokenizer_may_be_given(data, tmp_path, monkeypatch):
    flags = finetune_flags(data, tmp_path / "run", 1, tokenizer__path=data / "tok.model")
    assert run(monkeypatch, flags) == 0


def test_without_either_the_tokenizer_is_missing(data, tmp_path, monkeypatch, capsys):
    flags = tiny_flags(data, tmp_path / "run", 1)
    place = flags.index("--tokenizer.path")
    assert run(monkeypatch, flags[:place] + flags[place + 2 :]) == 2
    assert "tokenizer is missing: give tokenizer.path, or tokenizer.kind" in capsys.readouterr().err


TINY_OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}


def test_open_clips_weights_train_as_the_same_model_exported(data, tmp_path, monkeypatch, capsys):
    import open_clip

    path = tmp_path / "tiny-open-clip.json"
    path.write_text(json.dumps(TINY_OPEN_CLIP))
    open_clip.add_model_config(path)
    torch.manual_seed(3)
    theirs = open_clip.create_model("tiny-open-clip", load_weights=False)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours = NaViTCLIP.from_open_clip("tiny-open-clip", tmp_path / "weights.pt")
    save_pretrained(tmp_path / "ours", ours, OpenClipTokenizer(), Preprocess(16, square=True))
    given = {"init__model": "open_clip:tiny-open-clip"}
    flags = finetune_flags(data, tmp_path / "none", 2, **given)
    assert run(monkeypatch, flags) == 2
    assert "init.weights is missing" in capsys.readouterr().err
    given["init__weights"] = tmp_path / "weights.pt"
    assert run(monkeypatch, finetune_flags(data, tmp_path / "a", 2, **given)) == 0
    exported = {"init__model": tmp_path / "ours"}
    assert run(monkeypatch, finetune_flags(data, tmp_path / "b", 2, **exported)) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    # The weights again, after training, in open_clip's own model.
    trained = NaViTCLIP.from_directory(tmp_path / "a/model").to_open_clip()
    theirs.load_state_dict(trained)
    (tmp_path / "weights.pt").unlink()
    assert run(monkeypatch, finetune_flags(data, tmp_path / "a", 3, **given)) == 0


def test_the_recipes_for_a_small_model_parse(tmp_path):
    recipes = Path(__file__).parents[2] / "configs/finetune_small"
    tokenizer = tmp_path / "tokenizer.model"
    config, _ = parse_config(["--config", str(recipes / "square.yaml")])
    train_pieces(tokenizer, 200)
    model, source = NaViTCLIP(config.task.model), tmp_path / "model"
    preprocess = config.task.build(config.data).preprocess
    save_pretrained(source, model, SentencePieceTokenizer(tokenizer), preprocess)
    native = ["--config", str(recipes / "native.yaml"), "--init.model", str(source)]
    assert parse_config(native)[0].task.model == config.task.model
    assert model.to_open_clip().keys()  # of a shape that open_clip has


SLOWER_BELOW = OptimConfig(lr=1e-3, eps=1e-6, layer_decay=0.7)
PARTLY = LockConfig(True, True, image_unlocked_blocks=1)
FSDP = ParallelConfig("fsdp")
CASES = {
    "ddp, image locked": tiny_config(lock=LockConfig(True), optim=SLOWER_BELOW),
    "ddp, both partly, micro-batches": tiny_config(
        kind="sigmoid", lock=PARTLY, accumulate=2, ema=EMAConfig(0.9)
    ),
    "fsdp, image locked": tiny_config(
        lock=LockConfig(True), parallel=replace(FSDP, reshard_after_forward=False)
    ),
    "fsdp, both partly, micro-batches": tiny_config(
        lock=PARTLY, accumulate=2, parallel=FSDP, optim=SLOWER_BELOW, ema=EMAConfig(0.9)
    ),
}


def run_case(config, ranks):
    stepper = new_stepper(config, ranks, torch.float64)
    found = measurements(stepper, range(4), config.accumulate)
    exported = stepper.host_weights()
    return found, exported and {n: w.numpy() for n, w in exported.items()}


def run_cases(runs):
    ranks = Ranks(dist.get_rank(), 2, torch.device("cpu"))
    found = {name: run_case(config, ranks) for name, config in CASES.items()}
    for flags in runs:
        train(*parse_config(flags), ranks)
    return found


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """Results of all cases on two ranks, and two runs, one of them with a break."""
    root = tmp_path_factory.mktemp("runs")
    whole, parts = root / "whole", root / "parts"
    for directory in (whole, parts):
        os.mkdir(directory)
    locked = {"task__lock__image": "true", "optim__layer_decay": 0.8}
    runs = [
        finetune_flags(data, whole, 3, **locked),
        finetune_flags(data, parts, 1, **locked),
        finetune_flags(data, parts, 3, **locked),
    ]
    return run_ranks(run_cases, 2, runs, timeout=240), whole, parts


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_with_locked_towers_train_like_one_process(two_ranks, name):
    alone = replace(CASES[name], parallel=ParallelConfig(), accumulate=1)
    expected, weights = run_case(alone, ALONE)
    for rank, result in enumerate(two_ranks[0]):
        found, exported = result[name]
        np.testing.assert_allclose(found, expected, rtol=1e-11)
        if rank == 0:
            for key, weight in weights.items():
                np.testing.assert_allclose(exported[key], weight, rtol=1e-9, atol=1e-12)


def test_a_run_on_two_ranks_goes_on_bit_for_bit(two_ranks):
    _, whole, parts = two_ranks
    assert losses(parts) == losses(whole)
    ends = [NaViTCLIP.from_directory(d / "model").state_dict() for d in (whole, parts)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
