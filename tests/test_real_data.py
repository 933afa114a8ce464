"""The same commands on real photos and captions; skipped where they are absent."""

import json
import sys
from pathlib import Path

import pytest

from navit_clip.data.patterns import expand_shards
from navit_clip.evaluation.__main__ import main as evaluate
from navit_clip.tools.train_tokenizer import train_tokenizer
from navit_clip.training.__main__ import main as train

DATA = Path(__file__).parents[2] / "shared" / "data"

pytestmark = pytest.mark.skipif(
    not (DATA / "coco-train").is_dir(), reason="no real data at ../shared/data beside the checkout"
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A few steps on COCO and Flickr8k photos."""
    root = tmp_path_factory.mktemp("real")
    shards = [str(DATA / "coco-train"), str(DATA / "flickr8k-train")]
    tokenizer = root / "tokenizer.model"
    train_tokenizer(expand_shards(shards), ["txt"], 1000, tokenizer, "bpe")
    flags = {
        "config": Path(__file__).parents[1] / "configs/small_photos.yaml",
        "run_dir": root / "run",
        "steps": 6,
        "tokenizer.path": tokenizer,
        "task.model.text.vocab_size": 1000,
        "data.train": json.dumps(shards),
        "task.captions": "{txt: 1.0, json.captions: 1.0}",
        "data.budget.tokens.image": 1024,
        "data.shuffle_buffer": 100,
        "optim.schedule.warmup_steps": 2,
        "log.every_steps": 1,
        "device": "cpu",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["train", *(w for k, v in flags.items() for w in (f"--{k}", str(v)))]
        )
        train()
    return root / "run"


def test_training_reads_every_sample(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert sum(line["skipped"] for line in lines) == 0


def test_retrieval_on_shards(run_dir):
    output = run_dir / "coco-test.json"
    arguments = ["--model", run_dir / "model", "--data", DATA / "coco-test", "--output", output]
    evaluate(["retrieval", *map(str, arguments), "--max-tokens", "16,64"])
    result = json.loads(output.read_text())
    assert result["images"] == 199
    assert result["captions"] == 199
    assert result["skipped"] == {}


def test_retrieval_on_karpathys_and_cocos_json(run_dir):
    for images, captions, count in (
        ("flickr8k-dev/images", "flickr8k-dev/dataset_flickr8k.json", 113),
        ("coco-val/val2017", "coco-val/captions_val2017.json", 79),
    ):
        output = run_dir / "retrieval.json"
        arguments = ["--model", run_dir / "model", "--images", DATA / images]
        arguments += ["--captions", DATA / captions, "--output", output]
        evaluate(["retrieval", *map(str, arguments)])
        result = json.loads(output.read_text())
        assert result["images"] == count
        assert result["captions"] >= 5 * count
        assert result["image_to_text"]["R@10"] <= 1


def test_zeroshot_on_class_folders(run_dir):
    output = run_dir / "caltech.json"
    arguments = ["--model", run_dir / "model", "--data", DATA / "caltech-sample"]
    arguments += ["--templates", "plain", "--max-tokens", "32", "--output", output]
    evaluate(["zeroshot", *map(str, arguments)])
    result = json.loads(output.read_text())
    assert (result["images"], result["classes"]) == (300, 20)
    assert result["skipped"] == {}
