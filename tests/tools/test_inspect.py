"""Inspecting shards: statistics against a slow count, skips as in training, the picture."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from loader_cases import CONFIG, ONE_BY_ONE, take
from PIL import Image
from shard_factory import (
    CAPTIONS,
    HTML,
    SIZES,
    encode,
    make_shards,
    photo,
    png_of_size,
    sample,
    write_shard,
    write_tar,
)

from navit_clip.data.drop import DropConfig
from navit_clip.data.loader import load_batches
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.packed.images import ImagePatches
from navit_clip.tasks.draw_batch import draw_batch, draw_on_grid, pairs_of
from navit_clip.tools.inspect.__main__ import main
from navit_clip.tools.inspect.describe import packing_to_json
from navit_clip.tools.inspect.packing_efficiency import measure_packing
from navit_clip.tools.inspect.statistics import collect_statistics

BAD = {
    "page": {"jpg": HTML, "txt": b"a page"},
    "cut": {"jpg": encode(photo(1, 300, 300), "JPEG")[:2000], "txt": b"cut"},
    "huge": {"png": png_of_size(30_000, 30_000), "txt": b"huge"},
    "mute": {"png": encode(photo(2, 20, 20))},
    "blank": {"png": encode(photo(2, 20, 20)), "txt": b" \n"},
    "latin": {"png": encode(photo(2, 20, 20)), "txt": b"caf\xe9"},
    "words": {"txt": b"no image"},
}

MAX_PIXELS = CONFIG.resolution.max_pixels

YAML = """
steps: 10
optim: {{lr: 1.0e-3}}
tokenizer: {{path: {tokenizer}}}
task:
  kind: contrastive
  model:
    image: {{patch_size: 8, position: {{table_side: 64}}}}
    text: {{vocab_size: 64, context_length: 12}}
data:
  train: {train}
  resolution: {{min_side: 16, max_side: 48, max_tokens: 24}}
  drop: {{kind: beta, rate: 0.3}}
  budget: {{tokens: {{image: 128, text: 96}}, max_examples: 6}}
  shuffle_buffer: 7
  workers: 3
"""


@pytest.fixture
def config(tmp_path: Path, tokenizer_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML.format(tokenizer=tokenizer_path, train="nowhere"))
    return path


def inspect(*words: object) -> int:
    return main([*map(str, words), "--workers", "1"], "inspect")


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        inspect(*words)
    assert stop.value.code == 2
    return next(
        line for line in capsys.readouterr().err.splitlines() if line.startswith("inspect: error: ")
    )


# Statistics


def test_a_table_of_files_is_inspected_as_its_shards_would_be(tmp_path, capsys):
    lines = ["file,title"]
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(sample(number)["png"])
        lines.append(f"{number}.png,{CAPTIONS[number]}")
    (tmp_path / "t.csv").write_text("\n".join([*lines, "gone.png,of nothing"]))
    assert "no column 'path' in" in refused(capsys, tmp_path / "t.csv")
    columns = ("--image-column", "file", "--caption-column", "title")
    assert inspect(tmp_path / "t.csv", *columns, "--output", tmp_path / "o.json") == 0
    found = json.loads((tmp_path / "o.json").read_text())
    assert (found["samples"], found["usable"]) == (6, 5)
    assert found["skipped"] == {"missing_image": 1}
    assert "missing_image: gone.png: No such file" in found["skip_log"][0]


def test_statistics_without_a_config(tmp_path, capsys):
    make_shards(tmp_path / "shards", [5, 3])
    numbers = [0, 1, 2, 3, 4, 100, 101, 102]
    assert inspect(tmp_path / "shards", "--output", tmp_path / "a/b.json") == 0
    found = json.loads((tmp_path / "a/b.json").read_text())
    assert (found["shards"], found["samples"], found["usable"]) == (2, 8, 8)
    assert found["formats"] == {"png": 8}
    assert found["skipped"] == {}
    heights, widths = np.array([SIZES[n % len(SIZES)] for n in numbers]).T
    captions = [CAPTIONS[n % len(CAPTIONS)] for n in numbers]
    expected = {
        "width": widths,
        "height": heights,
        "side": np.sqrt(widths * heights),
        "aspect": widths / heights,
        "image_kb": np.array([len(sample(n)["png"]) for n in numbers]) / 1000,
        "captions": np.ones(8),
        "characters": np.array([len(c) for c in captions]),
        "words": np.array([len(c.split()) for c in captions]),
    }
    assert found["distributions"].keys() == expected.keys()
    for name, values in expected.items():
        assert found["distributions"][name] == pytest.approx(
            {
                "min": values.min(),
                "p5": np.quantile(values, 0.05),
                "median": np.median(values),
                "p95": np.quantile(values, 0.95),
                "max": values.max(),
                "mean": values.mean(),
            }
        )
    table = capsys.readouterr().out
    assert re.search(r"^usable +8  100.0%  \(png 8\)$", table, re.MULTILINE)
    header, *rows = [line for line in table.splitlines() if line.startswith(("IMAGES", "width"))]
    assert len(header) == len(rows[0])  # columns are aligned


def test_several_captions_and_a_tokenizer(tmp_path, tokenizer, tokenizer_path):
    texts = [CAPTIONS[0], CAPTIONS[6]]
    members = {**sample(0), "json": json.dumps({"captions": texts}).encode()}
    shard = write_shard(tmp_path / "0.tar", {"a": members})
    inspect(shard, "--captions", "json.captions", "--tokenizer", tokenizer_path, "--output",
            tmp_path / "out.json")  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    lengths = [len(tokenizer.encode(text, 1000)) for text in texts]
    assert found["distributions"]["captions"]["mean"] == 2
    assert found["distributions"]["text_tokens"]["max"] == max(lengths)
    assert found["distributions"]["text_tokens"]["mean"] == np.mean(lengths)
    assert found["captions_cut"] == np.mean([n > found["context_length"] for n in lengths])


def test_skips_are_counted_as_training_counts_them(tmp_path, pipeline):
    # Each shard ends with a good sample, so a batch per good one has met all that is bad.
    shards = [
        write_shard(tmp_path / "0.tar", {"a": sample(0), **BAD, "b": sample(1)}),
        write_shard(tmp_path / "1.tar", {**BAD, "c": sample(2)}),
    ]
    data = pipeline(shards, **ONE_BY_ONE)
    training = sum((batch.counts.skipped for batch in take(data, 3)), Counter())
    statistics = collect_statistics(data.mixture, data.build, MAX_PIXELS)
    assert statistics.skipped == training
    assert statistics.skipped.total() == 2 * len(BAD)
    assert (statistics.samples, statistics.usable) == (2 * len(BAD) + 3, 3)
    assert any("0/page: unreadable_image" in line for line in statistics.skip_log)


def test_a_shard_that_ends_early_counts_and_keeps_what_was_readable(tmp_path, pipeline):
    (whole,) = make_shards(tmp_path, [6])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    data = pipeline([whole, cut])
    statistics = collect_statistics(data.mixture, data.build, MAX_PIXELS)
    assert statistics.skipped == {"bad_shard": 1}
    assert 6 < statistics.usable < 12


def test_statistics_do_not_depend_on_workers(tmp_path, pipeline):
    data = pipeline(make_shards(tmp_path, [4, 1, 6]))
    alone, together = (
        collect_statistics(data.mixture, data.build, MAX_PIXELS, workers=n) for n in (1, 2)
    )
    assert alone.columns.keys() == together.columns.keys()
    for name, column in alone.columns.items():
        np.testing.assert_array_equal(column, together.columns[name])


def test_max_samples_takes_from_every_shard(tmp_path, pipeline):
    data = pipeline(make_shards(tmp_path, [9, 9, 9]))
    statistics = collect_statistics(data.mixture, data.build, MAX_PIXELS, max_samples=8)
    expected = [
        SIZES[(100 * s + i) % len(SIZES)][1] for s, n in enumerate((3, 3, 2)) for i in range(n)
    ]
    assert statistics.columns["width"].tolist() == expected


# Packing


def test_packing_is_what_training_packs(tmp_path, pipeline):
    data = pipeline(make_shards(tmp_path, [12, 9]))
    packing = measure_packing(data.mixture, data.build, data.config, data.build.seed, 21)
    expected = take(data, len(packing.batches))
    assert [b.examples for b in packing.batches] == [b.counts.examples for b in expected]
    before = sum(b.counts.examples for b in expected[:-1])
    assert before < 21 <= before + expected[-1].counts.examples
    tokens = sum(sum(b.inputs.images.segments.lengths[: len(b.ids)]) for b in expected)
    budget = CONFIG.budget.tokens["image"] * len(expected)
    found = packing_to_json(packing.batches)
    assert found["image_padding"] == pytest.approx(1 - tokens / budget)
    pairs = np.array([len(b.ids) for b in expected])
    assert found["examples_cv"] == pytest.approx(pairs.std() / pairs.mean())

    first = expected[0]
    images, texts = first.inputs.images, first.inputs.texts
    order = images.order.tolist()
    assert [pair.id for pair in packing.samples] == [
        first.ids[order.index(place)] for place in range(len(first.ids))
    ]
    captions = {
        f"{s:05d}/{i}": CAPTIONS[(100 * s + i) % len(CAPTIONS)] for s in (0, 1) for i in range(12)
    }
    assert [pair.text for pair in packing.samples] == [
        captions[pair.id] for pair in packing.samples
    ]
    for pair in packing.samples:
        assert len(pair.image.patches) == pair.tokens["image"]
        assert pair.tokens["image"] == images.segments.lengths[pair.segments["image"]]
        assert pair.tokens["text"] == texts.segments.lengths[pair.segments["text"]]


def test_captions_of_drawn_pairs_are_those_that_were_tokenised(tmp_path, pipeline):
    captions = json.dumps({"captions": CAPTIONS}).encode()
    samples = {str(i): {**sample(i), "json": captions} for i in range(9)}
    data = pipeline([write_shard(tmp_path / "0.tar", samples)])
    build = replace(data.build, captions={"txt": 1.0, "json.captions": 2.0})
    packing = measure_packing(data.mixture, build, data.config, build.seed, 9)
    texts = next(load_batches(build, data.config, build.seed)).inputs.texts
    ids = [part.tolist() for part in texts.token_ids.split(texts.segments.lengths)]
    for pair in packing.samples:
        encoded = build.tokenizer.encode(pair.text, build.context_length)
        assert encoded == ids[pair.segments["text"]]
    assert len({pair.text for pair in packing.samples}) > 2
    # A packed batch alone tells the same, the captions as the tokenizer spells them.
    batch = next(load_batches(build, data.config, build.seed))
    again = pairs_of(batch, build.tokenizer.decode)
    for known, found in zip(packing.samples, again, strict=True):
        assert np.array_equal(found.image.patches, known.image.patches)
        assert np.array_equal(found.image.coords, known.image.coords)
        assert found.image.grid == known.image.grid
        assert known.text.startswith(found.text)
        assert found[3:] == known[3:]


def test_packing_of_a_config(tmp_path, config, capsys):
    make_shards(tmp_path / "shards", [20, 20])
    words = (tmp_path / "shards", "--config", config, "--output", tmp_path / "out.json")
    inspect(*words)
    found = json.loads((tmp_path / "out.json").read_text())
    packing = found["packing"]
    assert packing["image_budget"] == 128
    assert packing["image_tokens"] == pytest.approx(128 * (1 - packing["image_padding"]))
    assert packing["text_tokens"] == pytest.approx(96 * (1 - packing["text_padding"]))
    assert packing["examples"]["max"] <= 6
    assert packing["image_tokens"] < packing["image_tokens_before_drop"]
    assert found["distributions"]["tokens"]["max"] <= 24
    assert found["context_length"] == 12
    assert "examples per batch" in capsys.readouterr().out


IMAGES = """
task: {{kind: {kind}, model: {{image: {{patch_size: 8}}}}{more}}}
data:
  resolution: {{min_side: 16, max_side: 48, max_tokens: 36}}
  drop: {{kind: beta}}
  budget: {budget}
"""


@pytest.mark.parametrize(
    ("kind", "more", "streams", "skipped"),
    [
        ("classify", ", classes: CLASSES", ["image"], Counter(no_label=1)),
        ("masked_image", "", ["image", "decoder"], Counter(one_patch=2)),
    ],
)
def test_every_task_is_inspected(tmp_path, capsys, kind, more, streams, skipped):
    samples = {str(i): {**sample(i), "cls": str(i % 2).encode()} for i in range(9)}
    samples["other"] = {"png": encode(photo(0, 4, 4), "PNG")}
    shard = write_shard(tmp_path / "0.tar", samples)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    config, output = tmp_path / "run.yaml", tmp_path / "out.json"
    more = more.replace("CLASSES", str(tmp_path / "names.txt"))
    budget = json.dumps({"tokens": dict.fromkeys(streams, 256), "max_examples": 4})
    config.write_text(IMAGES.format(kind=kind, more=more, budget=budget))
    inspect(shard, "--config", config, "--output", output, "--picture", tmp_path / "a.png")
    found = json.loads(output.read_text())
    assert (found["usable"], found["skipped"]) == (10 - skipped.total(), skipped)
    assert "words" not in found["distributions"]
    assert found["distributions"]["kept_tokens"]["mean"] < found["distributions"]["tokens"]["mean"]
    assert [key for key in found["packing"] if key.endswith("_budget")] == [
        f"{name}_budget" for name in streams
    ]
    assert "examples per batch" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.height > 300


def test_a_config_may_name_the_shards(tmp_path, tokenizer_path, capsys):
    make_shards(tmp_path / "shards", [3])
    path = tmp_path / "run.yaml"
    path.write_text(YAML.format(tokenizer=tokenizer_path, train=tmp_path / "shards"))
    inspect("--config", path, "--max-samples", 2)
    printed = capsys.readouterr().out
    assert re.search("^samples +2$", printed, re.MULTILINE)
    assert "some are in it several times" in printed


def test_the_model_that_a_run_starts_from_decides_its_sizes(tmp_path, capsys):
    (shard,) = make_shards(tmp_path, [3])
    config, output = tmp_path / "run.yaml", tmp_path / "out.json"
    config.write_text("init: {model: 'open_clip:ViT-B-32'}\ndata: {packing: fill}\n")
    words = (shard, "--config", config, "--output", output)
    assert "names no tokenizer: give --tokenizer" in refused(capsys, *words)
    inspect(*words, "--tokenizer", "open_clip")
    found = json.loads(output.read_text())
    assert found["context_length"] == 77
    assert found["distributions"]["tokens"]["max"] < 9 * 9  # patches of 32, not of 16


# The picture


def test_picture_of_a_batch(tmp_path, config):
    make_shards(tmp_path / "shards", [20, 20])
    inspect(tmp_path / "shards", "--config", config, "--picture", tmp_path / "a/b.png")
    with Image.open(tmp_path / "a/b.png") as picture:
        assert picture.format == "PNG"
        assert 1000 < picture.width < 2000
        assert 300 < picture.height < 3000
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500  # photos, not a blank page


@pytest.mark.parametrize(
    "fields",
    [
        ONE_BY_ONE,
        {"drop": DropConfig(kind="none")},
        {"resolution": ResolutionConfig(mode="native", max_tokens=64)},
    ],
)
def test_picture_of_every_kind_of_batch(tmp_path, pipeline, fields):
    long = {"png": encode(photo(3, 1, 4000)), "txt": ("x" * 100_000).encode()}
    shard = write_shard(tmp_path / "0.tar", {"long": long, "a": sample(0), "b": sample(1)})
    data = pipeline([shard], **fields)
    packing = measure_packing(data.mixture, data.build, data.config, data.build.seed, 3)
    assert draw_batch(packing.batches[0], packing.samples, "a test").height < 3000


def test_kept_patches_are_drawn_where_they_were():
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (3, 4 * 4 * 3), dtype=np.uint8)
    coords = np.array([[0, 0], [0, 2], [1, 1]], np.int32)
    pixels = np.asarray(draw_on_grid(ImagePatches(patches, coords, (2, 3)), blank=200))
    assert pixels.shape == (8, 12, 3)
    for row in range(2):
        for column in range(3):
            window = pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            kept = np.flatnonzero((coords == (row, column)).all(axis=1))
            expected = patches[kept[0]].reshape(4, 4, 3) if len(kept) else 200
            assert (window == expected).all()


# A user's mistakes


def test_wrong_paths_and_empty_shards(tmp_path, capsys):
    assert "no shard found at" in refused(capsys, tmp_path / "none.tar")
    assert "no shards given" in refused(capsys)
    empty = write_tar(tmp_path / "empty.tar", [])
    assert f"no sample in 1 shard(s), the first one {empty}" in refused(capsys, empty)
    (tmp_path / "page.tar").write_bytes(HTML)
    assert "page.tar: not a tar" in refused(capsys, tmp_path / "page.tar")
    (shard,) = make_shards(tmp_path, [1])
    assert "--max-samples: expected a number from 1, got '0'" in refused(
        capsys, shard, "--max-samples", 0
    )
    assert "no tokenizer at" in refused(capsys, shard, "--tokenizer", tmp_path / "none.model")
    (tmp_path / "file").write_text("")
    line = refused(capsys, shard, "--output", tmp_path / "file" / "out.json")
    assert "cannot write --output" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [1\n", "expected ',' or ']'"),
        ("steps: 3\n", "tokenizer is missing"),
        ("model: {embed_dim: 8}\ntokenizer: {kind: open_clip}\n", "'model.embed_dim' is not"),
        ("data: {workrs: 3}\ntokenizer: {kind: open_clip}\n", "workrs"),
        ("data: {look_ahead: 0}\ntokenizer: {kind: open_clip}\n", "look_ahead must be at least 1"),
        ("data: {look_ahead: many}\ntokenizer: {kind: open_clip}\n", "look_ahead"),
        ("data: {look_ahead: 3}\n", "tokenizer is missing"),
        (
            "data: {look_ahead: 3}\ntask: {kind: detection}\n",
            "task.kind must be one of contrastive",
        ),
        ("data: {look_ahead: 3}\ntokenizer: {kind: sentencepiece}\n", "path must name"),
    ],
)
def test_bad_configs(tmp_path, capsys, text, message):
    (shard,) = make_shards(tmp_path, [1])
    (tmp_path / "run.yaml").write_text(text)
    line = refused(capsys, shard, "--config", tmp_path / "run.yaml")
    assert "run.yaml" in line
    assert message in line


def test_budgets_that_no_pair_fits(tmp_path, config, capsys):
    (shard,) = make_shards(tmp_path, [3])
    config.write_text(config.read_text().replace("text: 96", "text: 2"))
    line = refused(capsys, shard, "--config", config)
    assert "data.budget.tokens.text=2 cannot hold one example" in line


def test_only_unusable_samples(tmp_path, config, capsys):
    shard = write_shard(tmp_path / "0.tar", BAD)
    assert inspect(shard, "--config", config) == 0
    assert re.search("^usable +0  0.0%$", capsys.readouterr().out, re.MULTILINE)
    assert "nothing to draw" in refused(capsys, shard, "--picture", tmp_path / "a.png")
