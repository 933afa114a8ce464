"""The task of masked image pretraining: steps against the obvious way, whole runs, bad input."""

import json
import os
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from classify_cases import ALONE, classify_flags, write_labelled
from distributed import run_ranks
from eval_cases import write_classes
from masked_cases import TOWERS, build, one_by_one
from masked_cases import masked_flags as flags
from packed_examples import random_image
from shard_factory import encode, photo, write_shard
from test_hierarchical import TOWER
from tiny_run import run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from waits import Calls, Operators

from navit_clip import NaViTClassifier, NaViTMaskedImage
from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.masked import MaskedBuilder
from navit_clip.data.config import DataConfig
from navit_clip.data.drop import DropConfig
from navit_clip.data.mixture import Mixture
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.distributed import Ranks
from navit_clip.models.transformer import compiled_block
from navit_clip.packed.batch import Batch, BatchCounts
from navit_clip.packed.masked import pack_masked
from navit_clip.tasks.masked_image import MaskedImageTask, MaskedImageTaskConfig
from navit_clip.training.config import parse_config
from navit_clip.training.ema import EMAConfig
from navit_clip.training.length import RunLength
from navit_clip.training.nonfinite import NonFiniteGuard
from navit_clip.training.optim import OptimConfig
from navit_clip.training.parallel import ParallelConfig
from navit_clip.training.schedule import ScheduleConfig
from navit_clip.training.step import Stepper
from navit_clip.training.validation import open_validation

# Of towers whether there is a decoder: MAE, SimMIM; GreenMIM, and SimMIM with Swin.
MODELS = list(product(("mean", "hierarchical"), (True, False)))
each_model = pytest.mark.parametrize("model", MODELS, ids=str)


def new_task(model=("mean", True)):
    config = MaskedImageTaskConfig(model=build(*model).config)
    return MaskedImageTask(config, DataConfig())


def new_stepper(of=("mean", True), ranks=ALONE, parallel=None, precision="fp32"):
    model = build(*of)
    return Stepper(
        new_task(of),
        model if precision == "fp32" else model.float(),
        ranks,
        length=RunLength(20),
        optim=OptimConfig(lr=1e-2, eps=1e-6, schedule=ScheduleConfig(warmup_steps=1)),
        parallel=parallel or ParallelConfig(),
        ema=EMAConfig(0.5),
        guard=NonFiniteGuard("stop", 3),
        precision=precision,
    )


def examples(step):
    """(image, visible patches) of all ranks and micro-batches at one step."""
    rng = np.random.default_rng(step)
    found = []
    for index in range(int(rng.integers(9, 14))):
        grid = int(rng.integers(1, 5)), int(rng.integers(2, 5))
        image = random_image(100 * step + index, grid)
        count = int(rng.integers(1, len(image.patches)))
        found.append((image, np.sort(rng.permutation(len(image.patches))[:count])))
    return found


def pack(part):
    inputs = pack_masked(*zip(*part, strict=True))
    return Batch(inputs, tuple(map(str, range(len(part)))), BatchCounts(len(part)))


def micro_batches(part, ranks, accumulate):
    mine = part[ranks.rank :: ranks.world_size]
    return [pack(mine[number::accumulate]) for number in range(accumulate)]


@each_model
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_step_has_the_loss_and_gradient_of_the_obvious_way(accumulate, model):
    stepper, plain = new_stepper(model), build(*model)
    part = examples(0)
    inputs = [batch.inputs for batch in micro_batches(part, ALONE, accumulate)]
    loss, _ = stepper._backward(inputs, stepper.announce(inputs))
    expected = one_by_one(plain, *zip(*part, strict=True)) / len(part)
    expected.backward()
    # Targets are float32.
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, found), other in zip(
        stepper.model.named_parameters(), plain.parameters(), strict=True
    ):
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(found.grad, other.grad, rtol=0, atol=1e-5 * scale, msg=name)


def train_steps(model, ranks, parallel, accumulate, steps=3):
    stepper = new_stepper(model, ranks, parallel)
    rows = []
    for step in range(steps):
        result = stepper.step(micro_batches(examples(step), ranks, accumulate), step)
        rows.append((result.loss, result.grad_norm))
    weights = stepper.host_weights()
    return np.array(rows), weights and {n: w.numpy() for n, w in weights.items()}


CASES = {"ddp": ParallelConfig(), "fsdp": ParallelConfig("fsdp")}


def train_cases():
    ranks = Ranks(int(os.environ["RANK"]), 2, torch.device("cpu"))
    cases = product(MODELS, CASES.items())
    return [(model, train_steps(model, ranks, case, 2)) for model, (_, case) in cases]


@pytest.mark.slow
def test_two_ranks_with_micro_batches_train_like_one_process():
    alone = {model: train_steps(model, ALONE, ParallelConfig(), 1) for model in MODELS}
    for results in run_ranks(train_cases, 2):
        for model, (found, weights) in results:
            expected, expected_weights = alone[model]
            np.testing.assert_allclose(found, expected, rtol=1e-6)
            for name, weight in (weights or {}).items():
                np.testing.assert_allclose(weight, expected_weights[name], rtol=1e-5, atol=1e-7)


@each_model
def test_a_step_waits_for_the_device_nowhere(model):
    stepper = new_stepper(model)
    images, visible = zip(*examples(0), strict=True)
    planner = TOWERS[model[0]].planner()
    inputs = pack_masked(images, visible, full=not model[1], planner=planner)
    batch = Batch(inputs, tuple(map(str, range(len(images)))), BatchCounts(len(images)))
    counts = stepper.announce([inputs]).wait()
    announced = SimpleNamespace(wait=lambda: counts)  # they never were on the device
    with Calls() as calls, Operators() as operators:
        stepper.begin([batch], 0, announced)
    assert calls.found == operators.found == []


@each_model
def test_bfloat16_is_near_float64(model):
    part = examples(1)
    exact, found = (
        new_stepper(model, precision=precision).step([pack(part)], 0)
        for precision in ("fp32", "bf16")
    )
    assert found.loss == pytest.approx(exact.loss, rel=0.02)
    assert found.grad_norm == pytest.approx(exact.grad_norm, rel=0.05)


@pytest.mark.parametrize("tower", ["mean", "hierarchical"])
def test_compiled_blocks_of_tower_and_decoder_give_the_same(monkeypatch, tower):
    part = examples(2)
    expected = new_stepper((tower, True)).step([pack(part)], 0)
    monkeypatch.setattr(
        "navit_clip.models.transformer.torch.compile", partial(torch.compile, backend="aot_eager")
    )
    compiled_block.cache_clear()
    compiled = new_stepper((tower, True), parallel=ParallelConfig(compile=True))
    found = compiled.step([pack(part)], 0)
    compiled_block.cache_clear()
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-9)


@pytest.mark.parametrize("decoder", [True, False])
def test_flops_are_those_of_tower_and_decoder(decoder):
    batch = pack(examples(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build("mean", decoder)(batch.inputs).pixels_TK.sum().backward()
    if not decoder:  # computes all patches, so needs no stream of visible ones
        batch = replace(batch, inputs=replace(batch.inputs, images=None, places=None))
    assert new_task(("mean", decoder)).flops(batch.inputs) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


# Whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("images"))


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_stopped_run_goes_on_bit_for_bit_and_what_it_exports_is_used(data, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(monkeypatch, flags(data, whole, 5, accumulate=2, ema__decay=0.5)) == 0
    for steps in (2, 5):
        assert run(monkeypatch, flags(data, parts, steps, accumulate=2, ema__decay=0.5)) == 0
    curves = [[(v["step"], v["loss"], v["grad_norm"]) for v in metrics(d)] for d in (whole, parts)]
    assert curves[0] == curves[1]
    last = metrics(whole)[-1]
    assert {"image_tokens_per_s", "decoder_tokens_per_s", "model_flops_per_s"} <= last.keys()
    models = [NaViTMaskedImage.from_pretrained(one / "model") for one in (whole, parts)]
    for name, weight in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], weight), name
    assert "masked-autoencoder" in (whole / "model/README.md").read_text()

    images = [photo(i, 30 + i, 40) for i in range(3)]
    assert models[0].features(images).shape == (3, 16)
    for one, again in zip(models[0].predict(images), models[1].predict(images), strict=True):
        assert one.image.shape == one.masked.shape == one.predicted.shape
        grey = (one.masked == 128).all(-1)
        assert 0.5 < grey.mean() < 0.8  # of whole patches of 8 pixels, three quarters
        assert np.array_equal(one.predicted[~grey], one.image[~grey])
        assert np.array_equal(one.predicted, again.predicted)
    with pytest.raises(ValueError, match=r"images\[0\] has a single patch"):
        models[0].predict([photo(0, 8, 8)])

    # From pretraining on.
    assert run(monkeypatch, tuned_flags(data, tmp_path / "tuned", whole / "model")) == 0
    classifier = NaViTClassifier.from_pretrained(tmp_path / "tuned/model")
    assert classifier.config.image == models[0].config.image


def tuned_flags(data, run_dir, model):
    """Of a classifier that starts from a model, whose architecture its own is."""
    given = classify_flags(data, run_dir, 1, init__model=model)
    pairs = zip(given[::2], given[1::2], strict=True)
    return [word for pair in pairs if ".model.image." not in pair[0] for word in pair]


def test_a_hierarchical_tower_goes_on_too_bit_for_bit(data, tmp_path, monkeypatch):
    options = TOWER | {"task__mask": "batch"}
    for name, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        assert run(monkeypatch, flags(data, tmp_path / name, steps, **options)) == 0
    whole, parts = (metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [v["loss"] for v in whole] == [v["loss"] for v in parts]
    model = NaViTMaskedImage.from_pretrained(tmp_path / "whole/model")
    assert model.features([photo(0, 40, 24)]).shape == (1, 16)


@pytest.mark.parametrize("tower", [{}, TOWER], ids=["plain", "hierarchical"])
def test_a_tower_that_computes_all_patches_has_one_stream(data, tmp_path, monkeypatch, tower):
    def simmim(run_dir, steps):
        words = flags(data, run_dir, steps, data__budget__tokens='{"image": 60}', **tower)
        pairs = zip(words[::2], words[1::2], strict=True)
        kept = [word for pair in pairs if "model.decoder" not in pair[0] for word in pair]
        return [*kept, "--task.model.decoder", "null"]

    for name, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        assert run(monkeypatch, simmim(tmp_path / name, steps)) == 0
    whole, parts = (metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [v["loss"] for v in whole] == [v["loss"] for v in parts]
    assert "decoder_tokens_per_s" not in whole[-1]
    model = NaViTMaskedImage.from_pretrained(tmp_path / "whole/model")
    assert model.config.decoder is None
    assert len(model.predict([photo(0, 40, 40)])) == 1
    config = MaskedImageTaskConfig(model=model.config)
    read = parse_config(simmim(tmp_path, 1))[0].data
    with pytest.raises(ValueError, match=r"data\.packing=exact drops patches"):
        config.check(replace(read, packing="exact"))


def test_probes_and_pictures_in_training_leave_it_as_it_is(data, tmp_path, monkeypatch):
    folders = str(write_classes(tmp_path / "classes"))
    probe = {"train": folders, "data": folders, "every_steps": 2}
    evaluators = {
        "few": {"kind": "fewshot", "shots": [1, 2], "seeds": 2, **probe},
        "linear": {"kind": "linear", **probe},
        "pixels": {"kind": "reconstruct", "rate": 0.5, "data": folders, "every_steps": 3},
    }
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    options = {"eval__evaluators": json.dumps(evaluators), "eval__best": "pixels/explained"}
    assert run(monkeypatch, flags(data, plain)) == 0
    assert run(monkeypatch, flags(data, probed, eval__workers=0, **options)) == 0
    curves = [[v["loss"] for v in metrics(d) if "loss" in v] for d in (plain, probed)]
    assert curves[0] == curves[1]
    logged = {v["step"]: v for v in metrics(probed) if "eval/few/top1" in v}
    assert list(logged) == [2, 4]
    found = {key: v["step"] for v in metrics(probed) for key in v if key.startswith("eval/")}
    assert {"eval/few/shots/1", "eval/linear/top1", "eval/pixels/loss"} <= found.keys()
    pictures = sorted(path.name for path in (probed / "eval").glob("*.png"))
    assert pictures == ["pixels-step-00000003.png", "pixels-step-00000004.png"]
    best = NaViTMaskedImage.from_pretrained(probed / "best")
    assert best.config == NaViTMaskedImage.from_pretrained(plain / "model").config


def test_held_out_images_hide_as_many_patches_as_training_does_in_the_end(data, tmp_path):
    options = {"data__train": data / "{00000..00001}.tar", "data__drop__ramp_images": 10**6}
    words = flags(data, tmp_path, data__validation=data / "00002.tar", **options)
    config, _ = parse_config(words)
    parts = config.eval.validation, config.task, config.data, Mixture.find(config.data), None
    validation = open_validation(*parts, ALONE)
    (batch,) = validation.held_out.load(0)
    visible, whole = (
        sum(sum(part.segments.lengths[: part.segments.num_examples]) for part in parts)
        for parts in zip(*((piece.images, piece.whole) for piece in batch.pieces), strict=True)
    )
    assert visible / whole == pytest.approx(1 - config.data.drop.rate, abs=0.05)


def test_images_of_one_patch_are_skipped_and_counted(tmp_path, monkeypatch, capsys):
    samples = {str(i): {"png": encode(photo(i, 24, 24))} for i in range(9)}
    samples["dot"] = {"png": encode(photo(0, 8, 8))}
    write_shard(tmp_path / "data/00000.tar", samples)
    assert run(monkeypatch, flags(tmp_path / "data", tmp_path / "run", 3)) == 0
    assert "00000/dot: one_patch: the image has a single patch" in capsys.readouterr().out


def test_images_of_one_grid_may_share_a_mask():
    resolution = ResolutionConfig(min_side=16, max_side=64, max_tokens=30)
    builder = MaskedBuilder(resolution, DropConfig("fixed", 0.5), 8, 32, 0, shared=True)
    samples = []
    for index in range(40):
        raw = RawSample(
            f"a/{index}", index, {"png": encode(photo(index, 24 + 8 * (index % 2), 24))}
        )
        samples.append(builder(raw, Origin(0, 0, index, 0)))
    for shared in (True, False):
        inputs = replace(builder, shared=shared).collate(samples, None)
        masks = {}
        for number, segment in enumerate(inputs.whole.order.tolist()):
            start, end = inputs.whole.segments.offsets[segment : segment + 2].tolist()
            mask = (inputs.weights[start:end] > 0).tolist()
            masks.setdefault(samples[number].image.grid, set()).add(tuple(mask))
        assert len(masks) > 2
        assert all(len(found) == 1 for found in masks.values()) == shared


MISTAKES = [
    (
        {"task__mask": "batch", "data__drop__kind": "beta", "data__drop__rate": 0.6},
        "task.mask=batch needs as many visible patches",
    ),
    (
        {"task__mask": "batch", "data__drop__ramp_images": 100},
        "task.mask=batch needs a rate that is the same for all images",
    ),
    (
        {"data__train": "[]", "data__mix": '{"a": {"shards": "x", "captions": {"txt": 1}}}'},
        "data.mix.a.captions: task.kind masked_image reads no captions",
    ),
    (
        {"data__augment__cutmix": "1"},
        "data.augment.cutmix: task.kind masked_image has no labels to mix",
    ),
    ({"data__drop__kind": "none"}, "data.drop.kind must not be none for task.kind masked_image"),
    ({"task__model__image__pooling": "map"}, "image.pooling must be mean or cls"),
    ({"task__model__position__kind": "none"}, "position.kind must not be none"),
    (
        {"data__budget__tokens": '{"image": 60}'},
        "must name the streams image, decoder",
    ),
    ({"data__budget__tokens": '{"image": 60, "decoder": 9}'}, "data.budget.tokens.decoder=9"),
    (
        {
            "data__resolution__mode": "square",
            "data__resolution__max_side": 72,
            "data__resolution__max_tokens": 81,
            "data__budget__tokens": '{"image": 81, "decoder": 81}',
            "task__model__position__table_side": 8,
        },
        "or the 8 rows that the decoder knows",
    ),
]


@pytest.mark.parametrize(("change", "named"), MISTAKES)
def test_a_mistake_is_one_line(data, tmp_path, monkeypatch, capsys, change, named):
    assert run(monkeypatch, flags(data, tmp_path / "run", **change)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
    assert not (tmp_path / "run/config.yaml").exists()


def test_few_hidden_patches_are_at_least_one():
    resolution = ResolutionConfig(min_side=16, max_side=64, max_tokens=30)
    builder = MaskedBuilder(resolution, DropConfig("fixed", 0.001), 8, 32, 0)
    for index in range(20):
        raw = RawSample(f"a/{index}", index, {"png": encode(photo(index, 24, 24 + index))})
        sample = builder(raw, Origin(0, 0, index, 0))
        assert len(sample.visible) == len(sample.image.patches) - 1
        fewer = sample.trimmed(3)
        assert fewer.lengths == (3, len(sample.image.patches))
        assert set(fewer.visible) < set(sample.visible)


def test_the_recipes_parse():
    depths = {"masked_image_small": 2, "masked_image_b16": 8, "greenmim_swin_b": 1}
    for recipe, depth in depths.items():
        config, _ = parse_config(["--config", recipe, "--data.train", "shards"])
        assert config.task.model.decoder.depth == depth
    assert config.task.model.image.hierarchy.depths == (2, 2, 18, 2)
    assert config.task.model.image.pixel_mean[0] == 0.485
