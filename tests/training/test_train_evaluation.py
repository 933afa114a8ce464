"""Evaluators during training: what they report, what they keep, and that training never notices."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from fsspec.implementations.local import LocalFileSystem
from shard_factory import sample, write_shard
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip.averages import local_tensor
from navit_clip.data.mixture import Mixture
from navit_clip.distributed import Ranks, join_ranks
from navit_clip.errors import StopAskedError, UserError
from navit_clip.evaluation.models import PackedModel
from navit_clip.evaluation.retrieval import Retrieval, RetrievalSpec
from navit_clip.evaluation.zeroshot import ZeroShot, ZeroShotSpec
from navit_clip.model import NaViTCLIP
from navit_clip.tokenizers.load import build_tokenizer
from navit_clip.training.config import parse_config
from navit_clip.training.evaluation import VALIDATION, EvalConfig, Evaluations
from navit_clip.training.trainer import build_stepper
from navit_clip.training.validation import open_validation

ALONE = Ranks(0, 1, torch.device("cpu"))
I2T, T2I = "image_to_text", "text_to_image"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root)
    return root


def retrieval(data, **more):
    held_out = data / "shapes/retrieval"
    files = {"images": f"{held_out}/images", "captions": f"{held_out}/captions.json"}
    return {"kind": "retrieval", **files, **more}


def zeroshot(data, **more):
    files = {"data": f"{data}/shapes/zeroshot", "templates": f"{data}/shapes/templates.txt"}
    return {"kind": "zeroshot", **files, **more}


def flags_of(data, run_dir, steps, evaluators, **overrides):
    options = {"eval__evaluators": json.dumps(evaluators), "eval__workers": 0}
    options["optim__schedule__kind"] = "constant"
    return tiny_flags(data, run_dir, steps, **{**options, **overrides})


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def evaluated(run_dir, name):
    """Logged metrics of an evaluator by step, without the time they took."""
    found = {}
    for line in lines(run_dir):
        metrics = {key: value for key, value in line.items() if key.startswith(f"eval/{name}/")}
        if metrics:
            assert line["step"] not in found, "logged twice"
            metrics.pop(f"eval/{name}/seconds")
            found[line["step"]] = metrics
    return found


def trained(run_dir):
    """All that a run leaves of its training, but times."""
    logged = [(v["step"], v["loss"], v["grad_norm"]) for v in lines(run_dir) if "loss" in v]
    rank_files = sorted((run_dir / "checkpoints").glob("*/rank-0.json"))
    weights = NaViTCLIP.from_directory(run_dir / "model").state_dict()
    return logged, [path.read_text() for path in rank_files], weights


def same(one, other):
    assert one[:2] == other[:2]
    assert all(torch.equal(one[2][name], other[2][name]) for name in other[2])


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run without evaluation."""
    run_dir = tmp_path_factory.mktemp("runs") / "plain"
    with pytest.MonkeyPatch.context() as patch:
        options = {"checkpoint__every_steps": 2, "checkpoint__keep": 9}
        assert run(patch, flags_of(data, run_dir, 5, {}, **options)) == 0
    return run_dir


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
    """The same run with two evaluators."""
    run_dir = tmp_path_factory.mktemp("runs") / "watched"
    evaluators = {
        "held-out": retrieval(data, every_steps=2, max_tokens=[4], square=[32]),
        "shapes": zeroshot(data, every_steps=3),
    }
    with pytest.MonkeyPatch.context() as patch:
        options = {"checkpoint__every_steps": 2, "checkpoint__keep": 9}
        options["eval__best"] = f"held-out/4/{T2I}/R@5"
        options["eval__workers"] = 1
        assert run(patch, flags_of(data, run_dir, 5, evaluators, **options)) == 0
    return run_dir


def test_training_is_the_same_with_evaluation_and_without(plain, watched):
    same(trained(watched), trained(plain))


def test_each_evaluator_at_its_own_steps_and_at_the_last(watched):
    assert list(evaluated(watched, "held-out")) == [2, 4, 5]
    assert list(evaluated(watched, "shapes")) == [3, 5]
    files = sorted(path.name for path in (watched / "eval").iterdir())
    assert files == [f"held-out-step-{s:08d}.json" for s in (2, 4, 5)] + [
        f"shapes-step-{s:08d}.json" for s in (3, 5)
    ]


def test_metrics_are_those_of_the_evaluator_on_the_exported_model(data, watched):
    model = PackedModel(NaViTCLIP.from_directory(watched / "model"), "")
    spec = {k: v for k, v in retrieval(data).items() if k != "kind"}
    result = (
        Retrieval(RetrievalSpec(**spec, max_tokens=(4,), square=(32,)))
        .run(model, ALONE, 0)
        .to_json()
    )
    metrics = evaluated(watched, "held-out")[5]
    for entry, prefix in zip(result["views"], ("4/", "", "32px/"), strict=True):
        for way in (I2T, T2I):
            for metric, value in entry[way].items():
                assert metrics.pop(f"eval/held-out/{prefix}{way}/{metric}") == value
    assert metrics == {}
    spec = {k: v for k, v in zeroshot(data).items() if k != "kind"}
    result = ZeroShot(ZeroShotSpec(**spec)).run(model, ALONE, 0).to_json()
    metrics = evaluated(watched, "shapes")[5]
    assert metrics["eval/shapes/top1"] == result["top1"]
    written = json.loads((watched / "eval/shapes-step-00000005.json").read_text())
    assert written.pop("step") == 5
    assert {**written, "model": ""} == result


def test_the_best_model_is_kept(watched):
    metric = f"held-out/4/{T2I}/R@5"
    by_step = {s: v[f"eval/{metric}"] for s, v in evaluated(watched, "held-out").items()}
    best = json.loads((watched / "best/best.json").read_text())
    step = max(by_step, key=lambda s: (by_step[s], -s))
    assert best == {"metric": metric, "value": by_step[step], "step": step}
    files = {path.name for path in (watched / "best").iterdir()}
    assert files == {path.name for path in (watched / "model").iterdir()} | {"best.json"}
    NaViTCLIP.from_directory(watched / "best")
    assert "## Training" in (watched / "best/README.md").read_text()
    assert not (watched / "best.partial").exists()
    assert not (watched / "best.removed").exists()


def test_a_resumed_run_evaluates_what_was_not_logged_and_nothing_else(
    data, plain, watched, tmp_path, monkeypatch
):
    """As after a kill between the last checkpoint and one of its two evaluations."""
    run_dir = tmp_path / "resumed"
    shutil.copytree(watched, run_dir)
    kept = [v for v in lines(run_dir) if "eval/held-out/seconds" not in v or v["step"] < 5]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in kept))
    for path in (run_dir / "eval").iterdir():
        path.unlink()
    evaluators = {
        "held-out": retrieval(data, every_steps=2, max_tokens=[4], square=[32]),
        "shapes": zeroshot(data, every_steps=3),
    }
    options = {"eval__best": f"held-out/4/{T2I}/R@5", "checkpoint__every_steps": 2}
    flags = flags_of(data, run_dir, 5, evaluators, checkpoint__keep=9, **options)
    before = (run_dir / "best/best.json").read_text()
    assert run(monkeypatch, flags) == 0
    assert [path.name for path in (run_dir / "eval").iterdir()] == ["held-out-step-00000005.json"]
    for name in ("held-out", "shapes"):
        assert evaluated(run_dir, name) == evaluated(watched, name)
    assert (run_dir / "best/best.json").read_text() == before
    same(trained(run_dir), trained(plain))
    size = (run_dir / "metrics.jsonl").stat().st_size
    assert run(monkeypatch, flags) == 0
    assert (run_dir / "metrics.jsonl").stat().st_size == size


def test_a_signal_ends_an_evaluation_and_the_same_command_makes_up_for_it(
    data, plain, tmp_path, monkeypatch, capsys
):
    evaluators = {"held-out": retrieval(data, every_steps=3)}
    flags = flags_of(data, tmp_path / "run", 5, evaluators, checkpoint__every_steps=100)
    embed = PackedModel.embed_images

    def embed_after_a_signal(self, images):
        os.kill(os.getpid(), signal.SIGTERM)
        return embed(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(PackedModel, "embed_images", embed_after_a_signal)
        assert run(patch, flags) == 0
    assert "stopped at step 3; the same command continues from there" in capsys.readouterr().out
    assert evaluated(tmp_path / "run", "held-out") == {}
    assert run(monkeypatch, flags) == 0
    assert list(evaluated(tmp_path / "run", "held-out")) == [3, 5]
    curve, states, weights = trained(tmp_path / "run")
    expected = trained(plain)
    same((curve, states[-1:], weights), (expected[0], expected[1][-1:], expected[2]))


def test_the_average_is_evaluated_where_it_is_exported(data, tmp_path, monkeypatch):
    options = {"ema__decay": 0.9, "eval__best": f"held-out/{T2I}/R@1"}
    flags = flags_of(data, tmp_path, 3, {"held-out": retrieval(data)}, **options)
    assert run(monkeypatch, flags) == 0
    best, model = (NaViTCLIP.from_directory(tmp_path / d).state_dict() for d in ("best", "model"))
    assert all(torch.equal(best[name], model[name]) for name in model)


class Heartbeats:
    """A watchdog that keeps what it is sent."""

    def __init__(self):
        self.sent = []

    def heartbeat(self, what, *, slow=False):
        self.sent.append((what, slow))


def open_run(flags, ranks):
    """A stepper with its first weights, the run's evaluations, and the task."""
    config, _ = parse_config(flags)
    torch.manual_seed(config.seed)
    task = config.task.build(config.data)
    stepper = build_stepper(config, task, task.build_model(), ranks)
    tokenizer = build_tokenizer(config.tokenizer)
    run_dir = Path(config.run_dir)
    mixture = Mixture.find(config.data)
    parts = config.eval.validation, config.task, config.data, mixture, tokenizer
    validation = open_validation(*parts, ranks)
    evaluations = Evaluations(config.eval, run_dir, task, tokenizer, ranks, validation)
    return stepper, evaluations, tokenizer


def test_half_precision_is_the_towers_and_the_watchdog_gets_heartbeats(data, tmp_path):
    evaluators = {"held-out": retrieval(data)}
    found = {}
    for precision in ("fp32", "bf16"):
        flags = flags_of(data, tmp_path, 3, evaluators, precision=precision)
        stepper, evaluations, tokenizer = open_run(flags, ALONE)
        watchdog = Heartbeats()
        ((values, line, _),) = evaluations.run(["held-out"], 3, stepper, watchdog)
        assert set(watchdog.sent) == {("the evaluation held-out of step 3", True)}
        assert len(watchdog.sent) >= 3  # before it, at images, at captions
        found[precision] = values
        assert "held-out: image_to_text R@1" in line
    model = stepper.task.export(stepper.full_weights(), tokenizer)
    spec = {k: v for k, v in retrieval(data).items() if k != "kind"}

    class Half(PackedModel):
        def embed_images(self, images):
            with torch.autocast("cpu", torch.bfloat16):
                return super().embed_images(images)

        def embed_texts(self, texts):
            with torch.autocast("cpu", torch.bfloat16):
                return super().embed_texts(texts)

    for precision, kind in (("fp32", PackedModel), ("bf16", Half)):
        evaluator = Retrieval(RetrievalSpec(**spec))
        result = evaluator.run(kind(model.eval(), ""), ALONE, 0).to_json()
        for way in (I2T, T2I):
            for metric, value in result[way].items():
                assert found[precision][f"eval/held-out/{way}/{metric}"] == value


def stop_one_rank(evaluations, name, stepper, ranks):
    """An evaluation that one rank is asked to leave ends on all of them."""
    asked = partial(bool, ranks.is_first)
    with pytest.raises(StopAskedError):
        list(evaluations.run([name], 3, stepper, Heartbeats(), asked))


def evaluate_rank(every_flags):
    """What ranks that share a model find, and whether anything of the training moved."""
    found = {}
    with join_ranks("cpu") as ranks:
        for kind, flags in every_flags.items():
            stepper, evaluations, _ = open_run(flags, ranks)
            generator = torch.get_rng_state()
            weights = [local_tensor(p.detach()).clone() for p in stepper.model.parameters()]
            results = list(evaluations.run(["held-out", VALIDATION], 3, stepper, Heartbeats()))
            for name in ("held-out", VALIDATION):
                stop_one_rank(evaluations, name, stepper, ranks)
            after = [local_tensor(p.detach()) for p in stepper.model.parameters()]
            still = torch.equal(generator, torch.get_rng_state()) and all(
                torch.equal(*pair) for pair in zip(weights, after, strict=True)
            )
            found[kind] = [values for values, *_ in results], still, stepper.full_weights()
    return found


@pytest.mark.usefixtures("one_thread")
def test_ranks_together_find_what_one_process_finds(data, tmp_path):
    evaluators = {"held-out": retrieval(data)}
    options = {
        "data__train": data / "shapes/train/{00000..00002}.tar",
        "data__validation": data / "shapes/train/00003.tar",
        "eval__validation__batch": 10,
        "ema__decay": 0.5,
    }
    every_flags = {
        kind: flags_of(data, tmp_path, 3, evaluators, parallel__kind=kind, **options)
        for kind in ("ddp", "fsdp")
    }
    first, second = run_ranks(evaluate_rank, 2, every_flags, timeout=240, initialise=False)
    stepper, evaluations, _ = open_run(every_flags["ddp"], ALONE)
    names = [VALIDATION, "held-out"]
    alone = [values for values, *_ in evaluations.run(names, 3, stepper, Heartbeats())]
    for kind in every_flags:
        together = first[kind][0]
        for found, expected in zip(together, alone, strict=True):
            assert {k: v for k, v in found.items() if not k.endswith("/seconds")} == {
                k: v for k, v in expected.items() if not k.endswith("/seconds")
            }
        assert second[kind][0] == []  # one rank reports
        for _, still, weights in (first[kind], second[kind]):
            assert still
            assert all(torch.equal(weights[n], w) for n, w in stepper.model.state_dict().items())


def evaluate_stored(flags, stored):
    """What each rank finds of shards in a store, and how often it asked that for a list."""
    asked, find = [], LocalFileSystem.glob

    def glob(self, path, **options):
        asked.append(path)
        return find(self, path, **options)

    LocalFileSystem.glob = glob
    with join_ranks("cpu") as ranks:
        stepper, evaluations, _ = open_run(flags, ranks)
        results = list(evaluations.run(["held-out", "probe"], 3, stepper, Heartbeats()))
        stop_one_rank(evaluations, "probe", stepper, ranks)
        wrong = {"a": {"kind": "retrieval", "data": f"{stored}/none/*.tar"}}
        try:
            Evaluations(EvalConfig(wrong), Path(), stepper.task, None, ranks)
        except UserError as error:
            return [values for values, *_ in results], asked, str(error)
    return None


@pytest.mark.usefixtures("one_thread")
def test_one_rank_alone_asks_a_store_once_what_it_holds_for_the_evaluators(data, tmp_path):
    folder = tmp_path / "labelled"
    folder.mkdir()
    for number in range(2):
        samples = {
            f"{n}": {"png": sample(n)["png"], "cls": b"%d" % (n % 2)} for n in range(number, 8)
        }
        write_shard(folder / f"{number}.tar", samples)
    shards = f"{data}/shapes/train/0000[01].tar"
    stored, local = [
        {
            "held-out": {"kind": "retrieval", "data": prefix + shards},
            "probe": {
                "kind": "linear",
                "data": f"{prefix}{folder}/*.tar",
                "train": f"{prefix}{folder}/0.tar",
            },
        }
        for prefix in ("file://", "")
    ]
    flags = flags_of(data, tmp_path / "run", 3, stored)
    first, second = run_ranks(evaluate_stored, 2, flags, f"file://{tmp_path}", initialise=False)
    asked = [path.removeprefix("file://") for path in first[1]]
    assert asked == [shards, f"{folder}/*.tar", f"{tmp_path}/none/*.tar"]
    assert second[1] == []
    for *_, error in (first, second):
        assert error.startswith("eval.evaluators.a: no shard found at file://")
    flags = flags_of(data, tmp_path / "run", 3, local)
    stepper, evaluations, _ = open_run(flags, ALONE)
    alone = evaluations.run(["held-out", "probe"], 3, stepper, Heartbeats())
    for found, (expected, *_) in zip(first[0], alone, strict=True):
        assert {k: v for k, v in found.items() if not k.endswith("/seconds")} == {
            k: v for k, v in expected.items() if not k.endswith("/seconds")
        }


MISTAKES = [
    ({"a": {"every_steps": 2}}, {}, "eval.evaluators.a.kind"),
    ({"a": {"kind": "zeroshoot"}}, {}, "'zeroshoot'"),
    ({"a": {"kind": "zeroshot"}}, {}, "eval.evaluators.a: "),
    ({"a/b": {"kind": "zeroshot", "data": "x"}}, {}, "'a/b'"),
    ({"a": {"kind": "zeroshot", "data": "nowhere", "image": "x"}}, {}, "image"),
    ({"a": {"kind": "zeroshot", "data": "nowhere", "max_tokens": ["x"]}}, {}, "max_tokens"),
    ({"a": {"kind": "zeroshot", "data": "nowhere", "every_steps": 0}}, {}, "every_steps"),
    ({"a": {"kind": "zeroshot", "data": "nowhere"}}, {}, "nowhere"),
    ({"a": {"kind": "retrieval"}}, {}, "data"),
    ({"a": {"kind": "retrieval", "images": "away", "captions": "c.json"}}, {}, "at away"),
    ("retrieval", {"eval__best": "held-out/R@1"}, "'held-out/R@1'"),
    ("retrieval", {"eval__best": f"held-out/64/{I2T}/R@1"}, f"held-out/{I2T}/R@1"),
    ("retrieval", {"eval__workers": -1}, "eval.workers"),
    ("square", {}, "eval.evaluators.held-out"),
    ("empty", {}, "eval.evaluators.held-out: "),
    ({}, {"eval__best": "a/top1"}, "eval.best"),
]


@pytest.mark.parametrize(("evaluators", "options", "named"), MISTAKES)
def test_a_mistake_is_one_line_before_any_step(
    data, tmp_path, monkeypatch, capsys, evaluators, options, named
):
    if evaluators == "empty":
        (tmp_path / "images").mkdir()
        evaluators = {"held-out": {**retrieval(data), "images": str(tmp_path / "images")}}
    elif isinstance(evaluators, str):
        more = {"square": [33]} if evaluators == "square" else {}
        evaluators = {"held-out": retrieval(data, **more)}
    run_dir = tmp_path / "run"
    assert run(monkeypatch, flags_of(data, run_dir, 2, evaluators, **options)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train: error: ")
    assert named in line
    assert len(line) < 600
    assert not (run_dir / "metrics.jsonl").exists()
