"""The evaluators from the outside: the command line, and embeddings however the work is shared."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from eval_cases import CLASSES, SETTINGS, embed, open_dataset, run, write_all
from PIL import Image
from shard_factory import CAPTIONS, encode, photo, sample, write_shard

from navit_clip.data.decode import EncodedImage
from navit_clip.evaluation.models import PackedModel
from navit_clip.evaluation.retrieval import Retrieval
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.inference import embed as embedding
from navit_clip.inference.embed import image_vectors, size_image
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.models.flops import image_flops


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("eval"))


# Embedding


def test_images_are_embedded_in_order_however_they_share_streams(model_dir, monkeypatch):
    model = NaViTCLIP.from_directory(model_dir)
    images = [size_image(EncodedImage(sample(i)["png"]), model.config.image, 12) for i in range(9)]
    alone = torch.cat([image_vectors(model, [image]) for image in images])
    texts = torch.cat([model.encode_text([text]) for text in CAPTIONS])
    for tokens in (16384, 30, 1):
        monkeypatch.setattr(embedding, "STREAM_TOKENS", tokens)
        torch.testing.assert_close(image_vectors(model, images), alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_text(CAPTIONS), texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(9))
    assert image_vectors(model, []).shape == model.encode_text([]).shape == (0, 8)
    # Else the comparisons above say nothing about order.
    assert torch.pdist(alone).min() > 1e-3
    assert torch.pdist(texts).min() > 1e-3


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("budget", [1, 5, 12, 300])
def test_images_are_sized_within_the_budget_with_all_their_patches(square, budget, model_dir):
    config = NaViTCLIP.from_directory(model_dir).config.image
    for height, width in ((24, 40), (300, 20), (7, 5), (1, 900)):
        encoded = EncodedImage(encode(photo(0, height, width)))
        sized = size_image(encoded, config, budget, square=square)
        rows, columns = sized.grid
        assert 1 <= rows * columns == len(sized.patches) <= budget
        assert max(rows, columns) <= config.position.max_grid_side
        assert sized.coords.tolist() == [[r, c] for r in range(rows) for c in range(columns)]
        if square:
            assert rows == columns == min(int(budget**0.5), config.position.max_grid_side)
        else:
            assert rows <= max(1, height // 8)
            assert columns <= max(1, width // 8)


def test_embeddings_are_those_of_each_image_alone(model_dir, data):
    model = NaViTCLIP.from_directory(model_dir)
    embedded = embed(PackedModel(model, "tiny"), open_dataset(data, "classes"))
    files = sorted((data / "classes").glob("*/*.png"))
    assert embedded.names == [str(path) for path in files]
    assert [sorted(CLASSES)[label] for (label,) in embedded.classes] == [
        p.parent.name for p in files
    ]
    assert embedded.skipped == {"unreadable_image": 1}
    assert len(embedded.skips) == 1
    assert "broken.jpg" in embedded.skips[0]
    assert list(embedded.embeddings) == SETTINGS
    for setting in SETTINGS:
        # Native: 16 positions a side are more than any of these images needs.
        tokens = {"native": 256, "square": 16}.get(setting.kind, setting.size)
        sized = [
            size_image(EncodedImage(path.read_bytes()), model.config.image, tokens,
                       square=setting.kind == "square")
            for path in files
        ]  # fmt: skip
        assert embedded.lengths[setting] == [len(image.patches) for image in sized]
        assert embedded.padding[setting] == 0
        alone = torch.cat([image_vectors(model, [image]) for image in sized])
        torch.testing.assert_close(embedded.embeddings[setting], alone, atol=1e-5, rtol=0)
    with Image.open(files[0]) as image:
        assert embedded.sizes[0] == (image.height, image.width)


# The command line


def place(scores: torch.Tensor, own: int) -> int:
    """How many others score at least as high."""
    return int((scores >= scores[own]).sum()) - 1


def common_metrics(result, model, lengths):
    config = model.config
    assert [
        EvalSetting(e["view"], e["max_tokens"] or e["side"]) for e in result["views"]
    ] == SETTINGS
    assert [e["label"] for e in result["views"]] == ["6", "12", "native", "32²"]
    assert [e["own"] for e in result["views"]] == [False, True, False, False]
    assert result["max_tokens"] == 12
    assert result["baselines"] == []
    for entry, setting in zip(result["views"], SETTINGS, strict=True):
        tokens = lengths[setting]
        assert entry["padding"] == 0
        assert entry["mean_tokens"] == pytest.approx(np.mean(tokens))
        flops = [image_flops(config.image, config.embed_dim, n) for n in tokens]
        assert entry["flops_per_image"] == pytest.approx(np.mean(flops))


def test_zeroshot(model_dir, data, tmp_path, capsys):
    output = tmp_path / "new" / "zeroshot.json"
    templates = data / "templates.txt"
    assert run(
        "zeroshot", "--model", model_dir, "--data", data / "classes", "--templates", templates,
        "--max-tokens", "6", "--native", "--square", 32, "--output", output, "--device", "cpu",
    ) == 0  # fmt: skip
    result = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert "Zero-shot: 11 images, 4 classes" in printed
    assert "12 *" in printed
    assert "skipped: unreadable_image 1" in printed
    assert "broken.jpg" in printed

    model = NaViTCLIP.from_directory(model_dir)
    embedded = embed(PackedModel(model, "tiny"), open_dataset(data, "classes"))
    vectors = []
    for name in sorted(CLASSES):
        lines = templates.read_text().replace("{}", name.replace("_", " ")).splitlines()
        vectors.append(torch.cat([model.encode_text([line]) for line in lines]))
    classes = torch.stack([v.double().mean(0) / v.double().mean(0).norm() for v in vectors])
    common_metrics(result, model, embedded.lengths)
    labels = [label for (label,) in embedded.classes]
    for entry, setting in zip(result["views"], SETTINGS, strict=True):
        scores = embedded.embeddings[setting].double() @ classes.T
        ranks = [place(row, own) for row, own in zip(scores, labels, strict=True)]
        assert entry["top1"] == pytest.approx(np.mean([rank < 1 for rank in ranks]))
        assert entry["top5"] == 1.0  # of four classes
        for label, name in enumerate(sorted(CLASSES)):
            own = [r < 1 for r, y in zip(ranks, labels, strict=True) if y == label]
            found = entry["per_class"].get(name.replace("_", " "))
            assert found == (pytest.approx(np.mean(own)) if own else None)
    assert {"top1": result["top1"], "top5": result["top5"]}.items() <= result["views"][1].items()
    assert (result["images"], result["classes"]) == (11, 4)
    assert result["skipped"] == {"unreadable_image": 1}


def test_zeroshot_on_labelled_shards(model_dir, data, tmp_path):
    root = tmp_path / "shards"
    for shard in range(2):
        samples = {str(i): {**sample(i), "cls": str(i % 2).encode()} for i in range(3)}
        write_shard(root / f"{shard}.tar", samples)
    names = tmp_path / "names.txt"
    names.write_text("dog\nbird\n")
    flags = ["zeroshot", "--model", model_dir, "--data", root, "--templates", "plain",
             "--output", tmp_path / "r.json", "--workers", "0"]  # fmt: skip
    assert run(*flags, "--classnames", names) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["images"], result["classes"]) == (6, 2)
    assert set(result["views"][0]["per_class"]) == {"dog", "bird"}
    assert run(*flags) == 2  # shards carry no names


def retrieval_flags(model_dir, data, output):
    return ["retrieval", "--model", model_dir, "--images", data / "coco/images",
            "--captions", data / "coco/captions.json", "--max-tokens", "6,12",
            "--native", "--square", 32, "--output", output, "--device", "cpu"]  # fmt: skip


def test_retrieval(model_dir, data, tmp_path, capsys):
    output, gallery = tmp_path / "retrieval.json", tmp_path / "pictures" / "gallery.png"
    assert run(*retrieval_flags(model_dir, data, output), "--gallery", gallery) == 0
    result = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert "Retrieval: 8 images, 16 captions" in printed
    assert "skipped: missing_image 1" in printed
    assert str(gallery) in printed

    model = NaViTCLIP.from_directory(model_dir)
    embedded = embed(PackedModel(model, "tiny"), open_dataset(data, "coco"))
    captions = [(i, text) for i, texts in enumerate(embedded.captions) for text in texts]
    texts = torch.cat([model.encode_text([text]) for _, text in captions]).double()
    common_metrics(result, model, embedded.lengths)
    for entry, setting in zip(result["views"], SETTINGS, strict=True):
        scores = embedded.embeddings[setting].double() @ texts.T
        to_image = [place(scores[:, j], own) for j, (own, _) in enumerate(captions)]
        to_text = []
        for i, row in enumerate(scores):
            own = torch.tensor([owner == i for owner, _ in captions])
            to_text.append(int((row[~own] >= row[own].max()).sum()))
        for way, ranks in (("text_to_image", to_image), ("image_to_text", to_text)):
            expected = {f"R@{k}": np.mean([rank < k for rank in ranks]) for k in (1, 5, 10)}
            expected["median_rank"] = np.median(ranks) + 1
            assert entry[way] == pytest.approx(expected)
    for way in ("image_to_text", "text_to_image"):
        assert result[way] == result["views"][1][way]
    with Image.open(gallery) as picture:
        assert picture.format == "PNG"
        assert len(picture.getcolors(1 << 24)) > 100  # photos and words, not an empty sheet


def test_retrieval_on_shards_and_a_summary_of_everything(model_dir, data, tmp_path, capsys):
    results = tmp_path / "results"
    flags = ["--model", model_dir, "--device", "cpu", "--workers", 0]
    assert run("zeroshot", *flags, "--data", data / "classes", "--templates", "plain",
               "--output", results / "zeroshot.json") == 0  # fmt: skip
    assert run("retrieval", *flags, "--data", data / "shards", "--fields", "txt", "json.none",
               "--output", results / "retrieval.json",
               "--gallery", results / "g.png") == 0  # fmt: skip
    capsys.readouterr()
    assert run("summary", results) == 0
    printed = capsys.readouterr().out
    assert "Zero-shot: 11 images" in printed
    assert "Retrieval: 7 images, 7 captions" in printed
    assert str(results / "g.png") in printed


def test_without_an_output_the_table_is_all(model_dir, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("zeroshot", "--model", model_dir, "--data", data / "classes", "--workers", 0,
               "--templates", "plain", "--max-tokens", 5) == 0  # fmt: skip
    assert "top-1" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_wants_squares_gets_them(model_dir, data, tmp_path):
    model = NaViTCLIP.from_directory(model_dir)
    model.preprocess = Preprocess(9, square=True)
    model.save_pretrained(tmp_path / "square")
    output = tmp_path / "r.json"
    assert run("zeroshot", "--model", tmp_path / "square", "--data", data / "classes",
               "--templates", "plain", "--max-tokens", 5, "--output", output) == 0  # fmt: skip
    entries = json.loads(output.read_text())["views"]
    assert [(e["max_tokens"], e["mean_tokens"]) for e in entries] == [(5, 4), (9, 9)]


@pytest.mark.parametrize(
    ("command", "change", "named"),
    [
        ("zeroshot", {"--model": "{tmp}/none"}, "no model at {tmp}/none"),
        ("zeroshot", {"--data": "{tmp}/none"}, "{tmp}/none"),
        ("zeroshot", {"--templates": "{tmp}/none.txt"}, "{tmp}/none.txt"),
        ("zeroshot", {"--templates": "{data}/coco/captions.json"}, "template without {{}}"),
        ("zeroshot", {"--classnames": "{tmp}/none.txt"}, "{tmp}/none.txt"),
        ("zeroshot", {"--classnames": "{data}/templates.txt"}, "2 class names for 4"),
        ("zeroshot", {"--data": "{data}/shards"}, "--classnames"),
        ("zeroshot", {"--output": "{data}/templates.txt/r.json"}, "cannot write"),
        ("zeroshot", {"--templates": "opnai"}, "expected openai, simple, plain or a text file"),
        ("zeroshot", {"--report": "{tmp}/r.json"}, "--output and --report are both {tmp}/r.json"),
        ("zeroshot", {"--workers": "-1"}, "--workers"),
        ("retrieval", {"--images": "{tmp}/none"}, "{tmp}/none"),
        ("retrieval", {"--captions": "{tmp}/none.json"}, "{tmp}/none.json"),
        ("retrieval", {"--captions": "{data}/templates.txt"}, "templates.txt"),
        ("retrieval", {"--images": "{data}/shards"}, "{data}/shards: check --images"),
        ("retrieval", {"--gallery": "{data}/templates.txt/g.png"}, "cannot write"),
        ("retrieval", {"--data": "{data}/shards/none.tar"}, "none.tar"),
        ("retrieval", {"--data": "{data}/bad"}, "no image could be read"),
        ("retrieval", {"--data": "{data}/shards", "--fields": "text"}, "none of the fields text"),
        ("retrieval", {"--data": "{data}/shards", "--split": "test"}, "--split"),
        ("retrieval", {"--output": "{data}"}, "{data} is a folder"),
    ],
)
def test_a_mistake_is_one_line(command, change, named, model_dir, data, tmp_path, capsys):
    flags = {"--model": model_dir, "--output": tmp_path / "r.json", "--workers": 0}
    if command == "zeroshot":
        flags.update({"--data": data / "classes", "--templates": "plain"})
    elif "--data" not in change:
        flags["--images"], flags["--captions"] = data / "coco/images", data / "coco/captions.json"
    paths = {"tmp": tmp_path, "data": data}
    flags.update({flag: value.format(**paths) for flag, value in change.items()})
    assert run(command, *(word for item in flags.items() for word in item)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval: error: ")
    assert named.format(**paths) in line


def test_no_work_is_done_for_a_file_that_cannot_be_written(
    model_dir, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Retrieval, "run", lambda *args, **options: pytest.fail("evaluated"))

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("navit_clip.evaluation.__main__.TemporaryFile", refuse)
    assert run(*retrieval_flags(model_dir, data, tmp_path / "r.json")) == 2
    assert f"cannot write {tmp_path / 'r.json'}: Permission denied" in capsys.readouterr().err


def test_labels_past_the_class_names_are_refused(model_dir, tmp_path, capsys):
    write_shard(
        tmp_path / "0.tar", {"a": {**sample(0), "cls": b"2"}, "b": {**sample(1), "cls": b"0"}}
    )
    (tmp_path / "names.txt").write_text("dog\nbird\n")
    assert run("zeroshot", "--model", model_dir, "--data", tmp_path / "0.tar", "--workers", 0,
               "--classnames", tmp_path / "names.txt", "--templates", "plain",
               "--output", tmp_path / "r.json") == 2  # fmt: skip
    assert "label 2 has no name: there are 2 class names" in capsys.readouterr().err


@pytest.mark.parametrize("budgets", ["0", "a", "64,,128", ""])
def test_impossible_budgets(budgets, model_dir, tmp_path, capsys):
    assert run("zeroshot", "--model", model_dir, "--data", tmp_path, "--output", tmp_path / "r",
               "--max-tokens", budgets) == 2  # fmt: skip
    assert "--max-tokens" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"views": [{}], "max_tokens": 1}'])
def test_a_summary_of_nothing_and_of_damaged_results(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "zeroshot.json").write_text(content)
    assert run("summary", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line
