"""The validation loss: its value, whoever reads what, in the log, and without trace in training.

That ranks which share a model find the same is in `test_train_evaluation`, and a task that does not
couple its examples in `test_task_seam`.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from shard_factory import write_shard
from tiny_run import run, tiny_flags, write_tiny_data
from torch.nn import functional as F

from navit_clip.data import held_out, mixture
from navit_clip.data.builders.base import Origin
from navit_clip.data.decode import find_image
from navit_clip.data.mixture import Mixture
from navit_clip.data.shards import read_shard
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.model import NaViTCLIP
from navit_clip.tokenizers.load import build_tokenizer
from navit_clip.training.config import parse_config
from navit_clip.training.validation import open_validation

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny_data(root, train=84)
    return root


def flags_of(data, run_dir, steps=4, **changes):
    """The last two shards are held out: 24 and 12 pairs, of which 10 make a batch."""
    options = {
        "data__train": data / "shapes/train/{00000..00001}.tar",
        "data__validation": data / "shapes/train/{00002..00003}.tar",
        "data__drop__kind": "beta",
        "eval__validation__every_steps": 2,
        "eval__validation__batch": 10,
        "eval__workers": 0,
        "checkpoint__every_steps": 2,
        "ema__decay": 0.5,
    }
    return tiny_flags(data, run_dir, steps, **options | changes)


def validation_of(flags):
    config, _ = parse_config(flags)
    tokenizer = build_tokenizer(config.tokenizer)
    train = Mixture.find(config.data)
    parts = config.eval.validation, config.task, config.data, train, tokenizer
    return open_validation(*parts, ALONE)


def loss_of(flags, workers=0):
    """The loss of random weights, the same ones each time."""
    validation = validation_of(flags)
    torch.manual_seed(3)
    weights = validation.task.build_model().state_dict()
    return validation.run(weights, "fp32", workers, lambda: None)


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def logged(run_dir):
    """The validation loss by step."""
    return {v["step"]: v["validation/loss"] for v in metrics(run_dir) if "validation/loss" in v}


def trained(run_dir):
    """What a run leaves of its training: metrics, states of data and generators."""
    names = ("step", "loss", "grad_norm", "lr")
    states = sorted((run_dir / "checkpoints").glob("*/rank-0.json"))
    lines = [tuple(v[name] for name in names) for v in metrics(run_dir) if "loss" in v]
    return lines, [path.read_text() for path in states]


def test_it_is_the_mean_over_all_held_out_pairs_of_their_batches_losses(data, tmp_path):
    validation = validation_of(flags_of(data, tmp_path))
    torch.manual_seed(3)
    model = validation.task.build_model()
    build, total = validation.held_out.build, 0.0
    paths = [str(data / f"shapes/train/0000{number}.tar") for number in (2, 3)]
    pairs = [
        build(raw, Origin(0, 0, raw.index, 0), None) for path in paths for raw in read_shard(path)
    ]
    assert len(pairs) == 36
    for first in range(0, 36, 10):
        batch = pairs[first : first + 10]
        with torch.no_grad():  # one by one: no packing, no budget
            outputs = [model(build.collate([pair], None)) for pair in batch]
        images, texts = (torch.cat(rows) for rows in list(zip(*outputs, strict=True))[:2])
        logits, own = outputs[0].logit_scale * images @ texts.T, torch.arange(len(batch))
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        total += len(batch) * float(loss)
    found, skipped = validation.run(model.state_dict(), "fp32", 0, lambda: None)
    assert found == pytest.approx(total / 36, rel=1e-5)
    assert not skipped
    assert all(pair.lengths == pair.full_lengths for pair in pairs)  # whole
    sides = [pair.image.grid[0] * pair.image.grid[1] for pair in pairs]
    assert max(sides) == 16  # the largest of training


def test_workers_seeds_and_budgets_of_the_run_change_nothing(data, tmp_path):
    alone = loss_of(flags_of(data, tmp_path))
    assert loss_of(flags_of(data, tmp_path), workers=2) == alone
    assert loss_of(flags_of(data, tmp_path, seed=9)) == alone
    assert loss_of(flags_of(data, tmp_path, data__augment__min_area=0.2)) == alone
    wide, _ = loss_of(flags_of(data, tmp_path, data__budget__tokens__image=960))
    assert wide == pytest.approx(alone[0], rel=1e-5)
    assert loss_of(flags_of(data, tmp_path, eval__validation__batch=5)) < alone


def test_images_that_begin_small_in_training_have_their_last_size_in_it(data, tmp_path):
    flags = {"data__resolution__mode": "sampled", "data__resolution__max_side": 48}
    start = {
        "data__resolution__curriculum__images": 1000,
        "data__resolution__curriculum__start_side": 24,
        "data__resolution__min_side": 16,
    }
    expected = loss_of(flags_of(data, tmp_path, **flags, data__resolution__min_side=48))
    assert loss_of(flags_of(data, tmp_path, **flags, **start)) == expected


def test_held_out_files_give_the_loss_of_their_shards(data, tmp_path):
    rows = []
    for number in (2, 3):
        for sample in read_shard(str(data / f"shapes/train/0000{number}.tar")):
            name = sample.id.replace("/", "-")
            (tmp_path / name).write_bytes(find_image(sample.members))
            rows.append({"file": name, "caption": sample.members["txt"].decode()})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {
        "data__validation": tmp_path / "t.jsonl",
        "data__validation_files": '{"image_column": "file", "shuffle_seed": null}',
    }
    first = {"task__captions": '{"txt": 1.0}'}  # of several, which one depends on the sample's id
    losses = [loss_of(flags_of(data, tmp_path, **first, **changes)) for changes in ({}, files)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("parts", [2, 3, 4, 7])
def test_any_number_of_readers_share_the_same_batches(data, tmp_path, parts):
    whole = validation_of(flags_of(data, tmp_path)).held_out
    alone = list(whole.load(0))
    shared = [list(replace(whole, part=part, parts=parts).load(0)) for part in range(parts)]
    assert [batch.number for batch in alone] == [0, 1, 2, 3]
    for part, batches in enumerate(shared):
        assert [batch.number for batch in batches] == list(range(part, 4, parts))
        for batch in batches:
            for found, expected in zip(batch.pieces, alone[batch.number].pieces, strict=True):
                assert torch.equal(found.images.patches, expected.images.patches)
                assert torch.equal(found.texts.token_ids, expected.texts.token_ids)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_batch_of_a_ranks_own_are_not_read_again(
    data, tmp_path, monkeypatch, workers
):
    read: list[str] = []
    found = validation_of(flags_of(data, tmp_path)).held_out
    alone = [batch.number for batch in found.load(0)]
    # Batches of 10 of 24 and 12 samples: the last two lie in the second shard alone, or partly.
    for part, expected in enumerate([["00002"], ["00002"], ["00002", "00003"], ["00003"], [], []]):
        own = replace(found, part=part, parts=6, counts=[])
        first = [batch.number for batch in own.load(workers)]
        assert own.counts == [24, 12]
        read.clear()
        monkeypatch.setattr(
            held_out, "read_shard", lambda *args: read.append(args[2]) or read_shard(*args)
        )
        assert [batch.number for batch in own.load(0)] == first == alone[part : part + 1]
        monkeypatch.undo()
        assert read == expected


def test_what_a_manifest_says_of_shards_is_known_at_once_and_checked(data, tmp_path):
    records = []
    for number, samples in ((2, 24), (3, 12)):
        path = tmp_path / f"0000{number}.tar"
        shutil.copy(data / f"shapes/train/{path.name}", path)
        size = path.stat().st_size
        records.append({"shard": path.name, "bytes": size, "samples": samples})
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    whole = validation_of(flags_of(data, tmp_path, data__validation=tmp_path)).held_out
    assert whole.counts == [24, 12]
    wrong = replace(whole, counts=[24, 13])
    with pytest.raises(UserError, match=r"^data.validation: 00003 has 12 samples and had 13, or"):
        list(wrong.load(0))


def test_what_cannot_be_used_is_counted_and_leaves_its_batch_smaller(data, tmp_path):
    shard = tmp_path / "0.tar"
    content = bytearray((data / "shapes/train/00002.tar").read_bytes())
    at = content.find(b"\xff\xd8\xff")
    content[at : at + 400] = bytes(400)
    shard.write_bytes(content)
    flags = flags_of(data, tmp_path, data__validation=shard)
    batches = list(validation_of(flags).held_out.load(0))
    assert [sum(p.images.segments.num_examples for p in b.pieces) for b in batches] == [9, 10, 4]
    assert [batch.skipped for batch in batches] == [1, 0, 0]
    assert loss_of(flags, workers=2)[1] == 1


def test_a_damaged_shard_is_refused(data, tmp_path):
    shard = tmp_path / "0.tar"
    shard.write_bytes((data / "shapes/train/00002.tar").read_bytes()[:-20_000])
    with pytest.raises(UserError, match=r"data\.validation: .*0\.tar.*; fetch the shard again"):
        loss_of(flags_of(data, tmp_path, data__validation=shard))


def test_a_run_logs_it_and_trains_as_without_also_when_continued(
    data, tmp_path, monkeypatch, capsys
):
    plain, run_dir = tmp_path / "plain", tmp_path / "run"
    assert run(monkeypatch, flags_of(data, plain, 3, data__validation="[]")) == 0
    flags = flags_of(data, run_dir, 3, eval__best="validation/loss")
    assert run(monkeypatch, flags) == 0
    assert trained(run_dir) == trained(plain)
    found = logged(run_dir)
    best = json.loads((run_dir / "best/best.json").read_text())
    assert best["step"] == min(found, key=found.get)
    assert best["value"] == found[best["step"]]
    kept = NaViTCLIP.from_directory(run_dir / "best").state_dict()
    assert validation_of(flags).run(dict(kept), "fp32", 0, lambda: None)[0] == best["value"]
    assert list(found) == [2, 3]
    assert all("samples_seen" in line for line in metrics(run_dir))
    assert (
        f"step 2, validation loss {found[2]:.4f}, 0 skipped, the best so far ("
        in capsys.readouterr().out
    )
    assert "validation/loss" in (run_dir / "model/README.md").read_text()
    # Of the weights that are exported, here an average.
    weights = NaViTCLIP.from_directory(run_dir / "model").state_dict()
    assert validation_of(flags).run(dict(weights), "fp32", 0, lambda: None)[0] == found[3]
    # Killed between a checkpoint and its validation.
    shutil.rmtree(run_dir / "checkpoints/step-00000003")
    lines = [line for line in metrics(run_dir) if "validation/loss" not in line]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(monkeypatch, flags) == 0
    assert logged(run_dir) == found
    assert trained(run_dir) == trained(plain)


def test_a_run_looks_its_training_shards_up_once(data, tmp_path, monkeypatch):
    looked, expand = [], mixture.expand_shards

    def look(patterns, **options):
        looked.append(patterns)
        return expand(patterns, **options)

    monkeypatch.setattr(mixture, "expand_shards", look)
    flags = flags_of(data, tmp_path / "run", 3)
    assert run(monkeypatch, flags) == 0
    config, _ = parse_config(flags)
    assert looked == [[config.data.train], [config.data.validation]]


MISTAKES = [
    ({"data__validation": "nowhere"}, "data.validation: "),
    ({"data__validation": "LINK"}, "00001.tar is a training shard too"),
    ({"data__validation": "EMPTY"}, "data.validation: there is no usable sample"),
    ({"data__validation": "NO TAR"}, "data.validation: "),
    ({"eval__validation__batch": 0}, "validation.batch must be at least 1"),
]


@pytest.mark.parametrize(("change", "named"), MISTAKES)
def test_a_mistake_gets_one_line(data, tmp_path, monkeypatch, capsys, change, named):
    path = tmp_path / "00001.tar"
    if change.get("data__validation") == "LINK":
        path.symlink_to(data / "shapes/train/00001.tar")
    elif change.get("data__validation") == "EMPTY":
        write_shard(path, {"a": {"json": b"{}"}})
    elif change.get("data__validation") == "NO TAR":
        path.write_bytes(b"no tar")
    if path.exists():
        change = {"data__validation": path}
    assert run(monkeypatch, flags_of(data, tmp_path / "run", **change)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
    assert not (tmp_path / "run").exists()
