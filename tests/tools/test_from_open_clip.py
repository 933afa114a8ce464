"""open_clip's commands become ours: the table knows every flag, and what it makes parses."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from open_clip_train import params

from navit_clip.__main__ import main
from navit_clip.data.annotations.image_files import FilesConfig, open_images
from navit_clip.errors import UserError
from navit_clip.evaluation.arguments import parse_arguments
from navit_clip.tools.from_open_clip.__main__ import translate
from navit_clip.tools.from_open_clip.flags import FLAGS, page
from navit_clip.training.config import TrainConfig, parse_config

PAGE = Path(__file__).parents[2] / "docs/from_open_clip.md"
TRAIN = "python -m open_clip_train.main --train-data {0..9}.tar --model ViT-B-32"
# The commands in open_clip's README (4.2.0.dev0).
CC12M = r"""
    --train-data '/data/cc12m/cc12m-train-{0000..2175}.tar' \
    --train-num-samples 10968539 \
    --dataset-type webdataset \
    --batch-size 320 \
    --precision amp \
    --workers 4 \
    --imagenet-val /data/imagenet/validation/
"""
README = {
    "csv": r"""python -m open_clip_train.main \
    --save-frequency 1 \
    --zeroshot-frequency 1 \
    --report-to tensorboard \
    --train-data="/path/to/train_data.csv"  \
    --val-data="/path/to/validation_data.csv"  \
    --csv-img-key filepath \
    --csv-caption-key title \
    --imagenet-val=/path/to/imagenet/root/val/ \
    --warmup 10000 \
    --batch-size=128 \
    --lr=1e-3 \
    --wd=0.1 \
    --epochs=30 \
    --workers=8 \
    --model RN50""",
    "node": rf"""torchrun --nproc_per_node 4 -m open_clip_train.main \{CC12M}""",
    "nodes": rf"""torchrun --nproc_per_node=4 \
    --rdzv_endpoint=$HOSTE_NODE_ADDR \
    -m open_clip_train.main \{CC12M}""",
    "slurm": r"""srun --cpu_bind=v --accel-bind=gn python -u src/open_clip_train/main.py \
    --save-frequency 1 \
    --report-to tensorboard \
    --train-data="/data/LAION-400M/{00000..41455}.tar" \
    --warmup 2000 \
    --batch-size=256 \
    --epochs=32 \
    --workers=8 \
    --model ViT-B-32 \
    --name "ViT-B-32-Vanilla" \
    --seed 0 \
    --local-loss \
    --gather-with-grad""",
    "resume": r"""python -m open_clip_train.main \
    --train-data="/path/to/train_data.csv" \
    --val-data="/path/to/validation_data.csv"  \
    --resume /path/to/checkpoints/epoch_K.pt""",
    "coca": r"""python -m open_clip_train.main \
    --dataset-type "csv" \
    --train-data "path/to/data/dir/train2014.csv" \
    --warmup 1000 \
    --batch-size 128 \
    --lr 1e-5 \
    --wd 0.1 \
    --epochs 1 \
    --workers 3 \
    --model "coca_ViT-L-14" \
    --report-to "wandb" \
    --coca-contrastive-loss-weight 0 \
    --coca-caption-loss-weight 1 \
    --log-every-n-steps 100""",
    "roberta": r"""python -m open_clip_train.main \
         --train-data="pipe:aws s3 cp s3://s-mas/cc3m/{00000..00329}.tar -" \
         --train-num-samples 3000000 \
         --val-data="pipe:aws s3 cp s3://s-mas/cc3m/{00330..00331}.tar -" \
         --val-num-samples 10000 \
         --dataset-type webdataset \
         --batch-size 256 \
         --warmup 2000 \
         --epochs 10 \
         --lr 5e-4 \
         --precision amp \
         --workers 6 \
         --model "roberta-ViT-B-32" \
         --lock-text \
         --lock-text-unlocked-layers 10 \
         --name "10_unfrozen" \
         --report-to "tensorboard" \
""",
}
EVALUATIONS = {
    "retrieval": r"""python -m open_clip_train.main \
    --val-data="/path/to/validation_data.csv"  \
    --model RN101 \
    --pretrained /path/to/checkpoints/epoch_K.pt""",
    "zeroshot": r"""python -m open_clip_train.main \
    --imagenet-val /path/to/imagenet/validation \
    --model ViT-B-32-quickgelu \
    --pretrained laion400m_e32""",
}
CLAP = r"""python -m open_clip_train.main \
    --model CLAP-HTSAT-tiny-Roberta-base-fused \
    --pretrained laion \
    --audio-zeroshot-dataset ashraq/esc50 \
    --audio-zeroshot-split train \
    --batch-size 64 \
    --workers 4 \
    --device cuda \
    --zeroshot-frequency 1"""


def parsed(text: str, folder: Path) -> TrainConfig:
    """What our own parser makes of a translation."""
    (folder / "run.yaml").write_text(text)
    return parse_config(["--config", str(folder / "run.yaml")])[0]


def commands(text: str) -> list[str]:
    lines = [line.removeprefix("#   ") for line in text.splitlines()]
    return lines[1 : lines.index("# Not translated:")]


def installed_flags(monkeypatch) -> set[str]:
    class Seen(Exception):  # noqa: N818
        pass

    def stop(parser, args=None, namespace=None):
        raise Seen(parser._option_string_actions)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Seen) as seen:
        params.parse_args([])
    monkeypatch.undo()
    return {flag for flag in seen.value.args[0] if flag not in ("-h", "--help")}


def test_the_table_has_every_flag_of_the_installed_open_clip(monkeypatch):
    assert installed_flags(monkeypatch) == {n for n, flag in FLAGS.items() if flag.only != "main"}


def test_the_guide_is_the_table():
    assert PAGE.read_text() == page(), "python -m navit_clip.tools.from_open_clip.flags writes it"


def test_fields_of_the_table_exist():
    flags = ["--run_dir", "x", "--steps", "1", "--tokenizer.kind", "open_clip"]
    values = asdict(parse_config(flags)[0])
    for name, flag in FLAGS.items():
        for path in set(flag.ours.split(", ")) - {"", "-", "task.model.name"}:
            place = values
            for part in path.split("."):
                if place:  # what is named by the user is empty
                    assert part in place, (name, path)
                    place = place[part]


@pytest.mark.parametrize("name", README)
def test_each_training_command_of_the_readme_becomes_a_run(name, tmp_path):
    text = translate(README[name])
    config = parsed(text, tmp_path)
    assert config.task.captions == {"txt": 1.0}
    assert commands(text)[-1].endswith("--config run.yaml")
    words = shlex.split(README[name].replace("=", " "))
    assert config.data.budget.max_examples == int(
        words[words.index("--batch-size") + 1] if "--batch-size" in words else 64
    )


def test_the_run_is_the_same_one(tmp_path):
    text = translate(README["nodes"])
    config = parsed(text, tmp_path)
    assert commands(text) == [
        "torchrun --nproc_per_node=4 --rdzv_endpoint=$HOSTE_NODE_ADDR "
        "-m navit_clip.training --config run.yaml"
    ]
    assert config.samples == 32 * 10968539
    assert config.checkpoint.every_steps == round(10968539 / (4 * 320))
    assert config.checkpoint.keep_every == config.checkpoint.every_steps
    assert config.optim.lr == 5e-4  # of open_clip
    assert config.optim.weight_decay == 0.2
    assert config.optim.clip_norm == 0.0
    assert config.optim.schedule.warmup_steps == 10000
    assert config.precision == "bf16"
    evaluator = config.eval.evaluators["imagenet"]
    assert evaluator["data"] == "/data/imagenet/validation/"
    assert evaluator["every_steps"] == round(2 * 10968539 / (4 * 320))
    assert "RN50: its image tower is a ResNet" in text


def test_a_table_is_read_as_it_is(tmp_path):
    text = translate(README["csv"])
    assert commands(text) == ["navit-clip train --config run.yaml"]
    data = parsed(text, tmp_path).data
    assert (data.train, data.validation) == (
        "/path/to/train_data.csv",
        "/path/to/validation_data.csv",
    )
    assert data.files == FilesConfig(".", "filepath", ("title",))
    (tmp_path / "t.csv").write_text("filepath\ttitle\na.jpg\ta dog, or two\n")  # open_clip's tabs
    (row,) = open_images(tmp_path / "t.csv", data.files).rows
    assert (row.name, row.captions) == ("a.jpg", ("a dog, or two",))
    other = translate(README["csv"] + " --csv-separator ';'")
    assert "--csv-separator: /path/to/train_data.csv must have tabs or commas" in other


@pytest.mark.parametrize("name", EVALUATIONS)
def test_without_training_data_it_is_an_evaluation(name):
    *_, command = commands(translate(EVALUATIONS[name]))
    _, kind, *_ = words = shlex.split(command)[1:]
    assert kind == name
    args = parse_arguments(words[1:], "navit-clip eval")
    assert args.command == name
    assert str(args.weights).startswith(("/path/to", "laion400m"))


def test_audio_is_listed_and_nothing_is_to_be_done():
    text = translate(CLAP)
    assert commands(text) == ["(none: neither training data nor images to evaluate)"]
    assert "--audio-zeroshot-dataset: no audio here" in text
    assert yaml.safe_load(text) is None


# Flags that go together in one command, and the fields they become.
FLAGS_TO_FIELDS = {
    "--siglip --lock-image --lock-image-unlocked-groups 3 --force-patch-dropout 0.5 "
    "--force-image-size 384 --force-context-length 32 --force-quick-gelu --image-mean 0 0 0 "
    "--text-key txt;caption --max-image-pixels 1000000 --train-num-samples 6400 --epochs 2 "
    "--delete-previous-checkpoint --report-to wandb,tensorboard --name mine --wandb-notes tried "
    "--aug-cfg scale=(0.5,1.0) --remote-sync s3://bucket/logs/": {
        "task.loss.kind": "sigmoid",
        "task.model.init_bias": -10.0,
        "task.lock.image_unlocked_blocks": 2,
        "task.model.image.position.table_side": 12,
        "task.model.text.context_length": 32,
        "task.model.text.encoder.activation": "quick_gelu",
        "task.model.image.pixel_mean": (0, 0, 0),
        "task.captions": {"txt": 1},
        "data.drop.rate": 0.5,
        "data.resolution.max_tokens": 144,
        "data.resolution.max_pixels": 1000000,
        "data.augment.min_area": 0.5,
        "data.budget.tokens": {"image": 64 * 72, "text": 64 * 32},
        "samples": 12800,
        "checkpoint.every_steps": 100,
        "checkpoint.keep_every": 0,
        "log.wandb_name": "mine",
        "log.wandb_notes": "tried",
        "log.tensorboard": True,
        "run_dir": "logs/mine",
        "checkpoint.mirror": "s3://bucket/logs/mine",
    },
    "--use-naflex --naflex-seq-lens 64 256 --opt timm/lion --beta1 0.9 --beta2 0.99 --lr 1e-4 "
    "--accum-freq 4 --grad-checkpointing --fsdp --pretrained laion2b_s34b_b79k --precision fp32 "
    "--json-text-key a;b --json-text-key-probs 1 3 --lr-scheduler const --grad-clip-norm 1 "
    "--text-layer-decay 0.7 --image-layer-decay 0.7": {
        "data.resolution.mode": "native",
        "data.resolution.max_tokens": 256,
        "data.augment.min_area": 1.0,
        "data.budget.tokens": {"image": 16384, "text": 256 * 77},
        "optim.name": "lion",
        "optim.args": {"betas": [0.9, 0.99]},
        "optim.schedule.kind": "constant",
        "optim.clip_norm": 1.0,
        "optim.layer_decay": 0.7,
        "accumulate": 4,
        "parallel.activation_checkpointing": True,
        "parallel.kind": "fsdp",
        "init.weights": "laion2b_s34b_b79k",
        "precision": "fp32",
        "task.captions": {"json.a": 1, "json.b": 3},
    },
    "--opt nadamw --lr-scheduler const-cooldown --epochs-cooldown 1 --train-num-samples 640000": {
        "optim.name": "torch.NAdam",
        "optim.schedule.cooldown_samples": 640000,
        "data.augment.min_area": 0.9,
        "samples": 32 * 640000,
        "epochs": None,
    },
}


@pytest.mark.parametrize("flags", FLAGS_TO_FIELDS)
def test_flags_become_fields(flags, tmp_path):
    config = parsed(translate(f"{TRAIN} {flags}"), tmp_path)
    for path, value in FLAGS_TO_FIELDS[flags].items():
        assert attrgetter(path)(config) == value, path


def test_opt_kwargs_of_the_main_branch_are_read_on_any_version():
    text = translate(f"{TRAIN} --opt timm/muon --opt-kwargs momentum=0.9")
    assert yaml.safe_load(text)["optim"]["args"] == {"momentum": 0.9}


def test_several_datasets_keep_their_sizes_or_are_mixed(tmp_path):
    command = TRAIN.replace("{0..9}.tar", "a.tar::b.tar")
    assert yaml.safe_load(translate(command))["data"]["train"] == ["a.tar", "b.tar"]
    text = translate(f"{command} --train-data-upsampling-factors 1::2")
    mix = parsed(text, tmp_path).data.mix
    assert [(d.shards, d.weight) for d in mix.values()] == [("a.tar", 1.0), ("b.tar", 2.0)]
    assert "multiply each data.mix.NAME.weight by the size" in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{TRAIN} --btach-size 3", "open_clip has no --btach-size; did you mean --batch-size?"),
        (f"{TRAIN} --lr fast", "argument --lr: invalid float value: 'fast'"),
        (f"{TRAIN} --name 'x", "the command's quotes do not match"),
        ("make demo", "no command of open_clip's trainer: 'make demo'"),
        (f"{TRAIN} --dataset-type synthetic", "navit-clip data shapes"),
        (f"{TRAIN} --force-image-size 224 336", "give one side"),
        (f"{TRAIN} --train-data-upsampling-factors 1::2", "give 1 numbers"),
        (f"{TRAIN} --aug-cfg scale", "a value of the command cannot be read"),
        (f"{TRAIN} --text-key 'a: b: c'", "a value of the command cannot be read"),
        (f"{TRAIN} --force-patch-dropout 1e999", "a value of the command cannot be read"),
        (f"{TRAIN} --siglip ''", "open_clip has no empty flag"),
    ],
)
def test_a_mistake_is_one_line(command, message, capsys):
    with pytest.raises(UserError, match=r".") as caught:
        translate(command)
    assert message in str(caught.value)
    with pytest.raises(SystemExit) as stop:
        main(["from-open-clip", command])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
