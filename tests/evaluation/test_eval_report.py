"""Reports and the gallery: what people see of images and captions."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from html_page import EVIL, Page
from PIL import Image
from report_cases import KINDS, SETTINGS, make_result, metrics_of
from shard_factory import encode, photo, write_shard

from navit_clip.errors import UserError
from navit_clip.evaluation.calibration import expected_calibration_error
from navit_clip.evaluation.datasets import FileDataset, ShardDataset
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.gallery import draw_gallery
from navit_clip.evaluation.labelled import Labelled
from navit_clip.evaluation.ranking import pair_ranks
from navit_clip.evaluation.registry import read_result
from navit_clip.evaluation.report.html import write_report
from navit_clip.evaluation.report.samples import ReportSamples, _evenly, retrieval_samples
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.evaluation.summary import table
from navit_clip.evaluation.zeroshot import ZeroShot, ZeroShotSpec

# Samples


def make_photos(root: Path, count: int) -> list[Path]:
    root.mkdir()
    paths = []
    for i in range(count):
        sizes = [(30, 40), (250, 100), (10, 300), (60, 60)]
        paths.append(root / f"{i:03}.png")
        paths[-1].write_bytes(encode(photo(i, *sizes[i % len(sizes)])))
    return paths


def embedded(names, *, classes=None, captions=None, sizes=None):
    count = len(names)
    return Embedded(
        names=[str(name) for name in names],
        classes=classes or [()] * count,
        captions=captions or [()] * count,
        sizes=sizes or [(30, 40)] * count,
        embeddings={},
        lengths={},
        padding={},
        skipped=Counter(),
    )


def random_units(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def captioned(paths, seed=0, noise=0.5):
    """Images with one to three captions, near to them."""
    rng = random.Random(seed)
    captions = [tuple(f"{i} {j}" for j in range(rng.randint(1, 3))) for i in range(len(paths))]
    image_T = torch.tensor([i for i, c in enumerate(captions) for _ in c])
    images_ED = random_units(len(paths), 16, seed=seed)
    texts_TD = images_ED[image_T] + noise * random_units(len(image_T), 16, seed=seed + 1)
    return captions, images_ED, F.normalize(texts_TD, dim=-1)


@pytest.mark.parametrize(
    ("count", "noise"), [(40, 1.0), (40, 0.01), (40, 30.0), (1, 1.0), (3, 9.0)]
)
def test_retrieval_shows_what_is_nearest(count, noise, tmp_path):
    paths = make_photos(tmp_path / "photos", count)
    captions, images_ED, texts_TD = captioned(paths, noise=noise)
    texts = [text for of_image in captions for text in of_image]
    data = embedded(paths, captions=captions)
    samples = retrieval_samples(FileDataset(paths), data, images_ED, texts_TD)

    scores_ET = (images_ED.double() @ texts_TD.double().T).numpy()
    owner = data.image_of_texts.numpy()
    name_of = {str(path): i for i, path in enumerate(paths)}
    for query in samples.images:
        image = name_of[query.picture.name]
        order = np.argsort(-scores_ET[image], kind="stable")
        assert query.hit == (owner[order[0]] == image)
        check_matches(query, order, owner == image, [texts.index(m.text) for m in query.matches])
    for query in samples.captions:
        caption = texts.index(query.text)
        order = np.argsort(-scores_ET[:, caption], kind="stable")
        assert query.hit == (order[0] == owner[caption])
        own = np.arange(count) == owner[caption]
        check_matches(query, order, own, [name_of[m.picture.name] for m in query.matches])

    ranks = pair_ranks(images_ED, texts_TD, data.image_of_texts)
    for queries, rank in zip((samples.images, samples.captions), ranks, strict=True):
        hits, misses = int((rank == 0).sum()), int((rank >= 5).sum() or (rank > 0).sum())
        found = sum(query.hit for query in queries)
        assert len(queries) == min(12, hits + misses)
        assert found == (min(6, hits) if misses >= 6 else min(hits, 12 - misses)) or hits < 6
        assert len({q.text or q.picture.name for q in queries}) == len(queries)
    again = retrieval_samples(FileDataset(paths), data, images_ED, texts_TD)
    assert again == samples


def zeroshot_samples(result, data, images_ED, classes_CD, names, scale, dataset, *, present=None):
    evaluator = ZeroShot(ZeroShotSpec("data", only_present=present is not None))
    evaluator.labelled = Labelled(dataset, classes=present and frozenset(present))
    evaluator.dataset, evaluator.names = dataset, names
    own = EvalSetting("capped", 64)
    evaluator.result, evaluator.data = (
        read_result(result),
        replace(data, embeddings={own: images_ED}),
    )
    evaluator.model = SimpleNamespace(own_setting=own, scale=scale)
    evaluator.texts_TD = classes_CD
    return evaluator.samples()


def check_matches(query, order, own, found):
    expected = list(order[:5])
    if not any(own[i] for i in expected):
        expected.append(next(i for i in order if own[i]))
    assert found == expected
    places = list(order)
    assert [m.place for m in query.matches] == [places.index(i) + 1 for i in found]
    assert [m.is_right for m in query.matches] == [bool(own[i]) for i in found]


def test_zeroshot_shows_mistakes_of_the_worst_classes_and_confidence(tmp_path):
    paths = make_photos(tmp_path / "photos", 60)
    names = ["crane", "dog", "lake", "crane", "boat", "unused"]
    labels = [i % 5 for i in range(60)]
    right = {4: (2, 4)}
    classes = [right.get(label, (label,)) for label in labels]
    classes_CD = random_units(6, 16, seed=3)
    noise = random_units(60, 16, seed=4)
    images_ED = F.normalize(classes_CD[labels] + 2.5 * noise, dim=-1)
    result = make_result("zeroshot")
    groups = ["crane (0)", "dog", "lake", "crane (3)", "lake / boat"]
    result["views"][0]["confusions"] = [
        {"class": name, "images": 12, "top1": 0.1, "taken_for": []} for name in (*groups, "gone")
    ]
    data = embedded(paths, classes=classes)
    samples = zeroshot_samples(
        result, data, images_ED, classes_CD, names, 7.0, FileDataset(paths), present=range(5)
    )

    logits = 7.0 * images_ED.double() @ classes_CD[:5].double().T
    chances = (logits.exp() / logits.exp().sum(1, keepdim=True)).numpy()
    good = [set(found) for found in classes]
    best = chances.argmax(1)
    wrong = [i for i in np.argsort(-chances.max(1), kind="stable") if best[i] not in good[i]]
    place = {str(path): i for i, path in enumerate(paths)}

    def indices(queries):
        return [place[query.picture.name] for query in queries]

    assert indices(samples.mistakes) == wrong[:12]
    assert len(wrong) > 12
    assert indices(samples.classified) == [round(i * 59 / 7) for i in range(8)]
    for label, name in enumerate(groups):
        assert indices(samples.classes[name]) == [i for i in wrong if labels[i] == label][:4]
    assert samples.classes["gone"] == ()
    competitors = ["crane (0)", "dog", "lake", "crane (3)", "boat"]
    for query in (*samples.classified, *samples.mistakes):
        i = place[query.picture.name]
        order = np.argsort(-chances[i], kind="stable")
        assert query.text == groups[labels[i]]
        for match, index in zip(query.matches[:3], order[:3], strict=True):
            assert match.text == competitors[index]
            assert match.score == pytest.approx(chances[i, index])
            assert match.is_right == (index in good[i])
        assert any(match.is_right for match in query.matches)
        assert query.hit == (i not in wrong)

    hits = torch.tensor([i not in wrong for i in range(60)])
    gaps = [b.images * abs(b.accuracy - b.confidence) for b in samples.calibration]
    ece = expected_calibration_error(torch.from_numpy(chances).amax(1), hits)
    assert sum(gaps) / 60 == pytest.approx(ece)
    assert sum(b.images for b in samples.calibration) == 60


def test_only_the_files_shown_are_read_and_missing_ones_do_not_matter(tmp_path, monkeypatch):
    paths = make_photos(tmp_path / "photos", 50)
    captions, images_ED, texts_TD = captioned(paths)
    read = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or whole(path))
    data = embedded(paths, captions=captions)
    samples = retrieval_samples(FileDataset(paths), data, images_ED, texts_TD)
    pictures = {q.picture.name: q.picture for q in samples.images}
    pictures |= {m.picture.name: m.picture for q in samples.captions for m in q.matches}
    assert sorted(map(str, read)) == sorted(pictures)
    for name, picture in pictures.items():
        with Image.open(name) as original, Image.open(uri_file(picture, tmp_path)) as small:
            assert small.format == "WEBP"
            assert small.size == picture.thumbnail_size
            assert small.width <= min(240, original.width)
            assert small.height <= min(180, original.height)
            assert abs(small.width / original.width - small.height / original.height) < 0.06
    for path in paths[::2]:
        path.unlink()
    paths[1].write_bytes(b"not an image")
    samples = retrieval_samples(FileDataset(paths), data, images_ED, texts_TD)
    write_report(tmp_path / "r.html", read_result(make_result("retrieval")), samples)
    page = (tmp_path / "r.html").read_text()
    assert "no picture" in page
    assert "data:image/webp" in page
    draw_gallery(FileDataset(paths), data, images_ED, texts_TD, tmp_path / "new" / "gallery.png")
    with Image.open(tmp_path / "new" / "gallery.png") as picture:
        assert len(picture.getcolors(1 << 24)) > 100


def uri_file(picture, folder):
    (folder / "thumbnail").write_bytes(picture.thumbnail)
    return folder / "thumbnail"


def test_pictures_come_out_of_shards(tmp_path):
    members = {
        str(i): {"png": encode(photo(i, 30, 40)), "txt": f"photo {i}".encode()} for i in range(9)
    }
    shard = write_shard(tmp_path / "0.tar", members)
    dataset = ShardDataset([str(shard)], ["txt"])
    items = list(dataset.read(0, 1))
    vectors = random_units(9, 16, seed=5)
    data = embedded([item.name for item in items], captions=[item.captions for item in items])
    samples = retrieval_samples(dataset, data, vectors, vectors)
    assert len(samples.images) == 9
    assert all(query.picture.thumbnail and query.hit for query in samples.images)


@pytest.mark.parametrize(("count", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (1000, 12)])
def test_samples_are_evenly_spaced(count, most):
    found = _evenly(list(range(count)), most)
    assert len(found) == min(count, most)
    assert found == sorted(set(found))
    if count > most:
        assert (found[0], found[-1]) == (0, count - 1)
        steps = [b - a for a, b in itertools.pairwise(found)]
        assert max(steps) - min(steps) <= 1


# The page


def evil_everywhere(value, name=""):
    """The same result with every text that data could have brought made hostile."""
    if isinstance(value, dict):
        mine = name in ("per_class", "skipped")
        # The name of a setting is read as what it stands for.
        kept = ("view", "label") if "view" in value else ()
        return {
            f"{EVIL}{k}" if mine else k: v if k in kept else evil_everywhere(v, k)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [evil_everywhere(v) for v in value]
    return f"{EVIL}{value}" if isinstance(value, str) else value


def evil_samples(kind, tmp_path):
    paths = make_photos(tmp_path / "photos<b>&", 30)
    if kind == "retrieval":
        captions, images_ED, texts_TD = captioned(paths, noise=1.0)
        captions = [tuple(f"{EVIL}{c}" for c in of_image) for of_image in captions]
        data = embedded(paths, captions=captions)
        return retrieval_samples(FileDataset(paths), data, images_ED, texts_TD)
    names = [f"{EVIL}{name}" for name in ("dog", "lake", "boat")]
    classes = [(i % 3,) for i in range(30)]
    data = embedded(paths, classes=classes)
    vectors = random_units(33, 16, seed=6)
    result = evil_everywhere(make_result("zeroshot"))
    return zeroshot_samples(result, data, vectors[3:], vectors[:3], names, 9.0, FileDataset(paths))


@KINDS
def test_hostile_text_stays_text(kind, tmp_path):
    result = evil_everywhere(make_result(kind))
    samples = evil_samples(kind, tmp_path)
    path = tmp_path / "new" / "report.html"
    write_report(path, read_result(result), samples, command=f"python -m eval {EVIL}")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert page.tags["script"] == 0
    assert "<script" not in text
    assert " 49 " not in text  # 7 × 7, had it been a template
    assert page.tags["style"] == 1
    assert "prefers-color-scheme: dark" in page.style
    assert not any(word in page.style for word in ("url(", "@import", "alert"))
    joined = " ".join(page.words)
    for what in ("runs/a/model", "data/val", "open_clip:ViT-B-16", "unreadable_image"):
        assert f"{EVIL}{what}" in joined
    if kind == "zeroshot":
        assert f"{EVIL}dog" in joined
        assert "images: confidence" in joined  # of a dot
    else:
        assert any(query.text in joined for query in samples.captions)
    assert page.tags["svg"] == (3 if kind == "zeroshot" else 2)
    assert f"{EVIL}runs/a/model at 64: " in joined
    # Colours are the scheme's, and nothing in a chart is named twice in the page.
    charts = text[text.index("<svg") : text.rindex("</svg>")]
    assert "var(--s0)" in charts
    assert not re.search(r"#[0-9a-f]{6}\b(?![0-9a-f])", re.sub(r"data:[^\"]*", "", charts))
    assert "<g id=" not in text
    assert page.tags["img"] == text.count("data:image/webp") > 20
    # A report of the same is the same.
    write_report(
        tmp_path / "again.html", read_result(result), samples, command=f"python -m eval {EVIL}"
    )
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


@KINDS
def test_a_report_shows_the_metrics(kind, tmp_path):
    result = make_result(kind)
    result["skipped"] = {}
    write_report(
        tmp_path / "r.html", read_result(result), ReportSamples(), command="python -m eval x"
    )
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    for entry in (*result["views"], *(e for b in result["baselines"] for e in b["views"])):
        for value in metrics_of(entry, kind):
            assert f"{value:.1%}" in page.words
        for group in (*entry["by_aspect"], *entry["by_size"]):
            first = group["top1"] if kind == "zeroshot" else group["text_to_image"]["R@1"]
            assert f"{first:.1%}" in page.words
    assert {"nothing", "python -m eval x", "1–1.1", "≥640", "64 *"} <= {*page.words, "64 *"}
    assert any(word.startswith("Python 3") and "torch" in word for word in page.words)
    assert page.tags["img"] == 0


OPTIONAL = ("padding", "flops_per_image", "by_aspect", "by_size", "confusions", "per_class",
            "mean_per_class", "ece", "max_tokens", "side")  # fmt: skip


@KINDS
def test_optional_parts_may_be_missing(kind, tmp_path):
    result = make_result(kind, settings=SETTINGS[:1], baselines=0)
    for key in ("model", "data", "baselines", "max_tokens"):
        del result[key]
    rng = random.Random(7)
    for _ in range(6):
        partial = copy.deepcopy(result)
        for key in rng.sample(OPTIONAL, rng.randint(1, len(OPTIONAL))):
            partial["views"][0].pop(key, None)
        write_report(tmp_path / "r.html", read_result(partial), ReportSamples())
        Page((tmp_path / "r.html").read_text(encoding="utf-8"))
        assert "None" not in table(read_result(partial))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report(tmp_path / "file" / "r.html", read_result(result), ReportSamples())


def test_a_report_of_many_classes_and_large_photos_is_small(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"class number {i} of a data set" for i in range(1000)]
    grainy = [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(8)]
    paths = []
    for i in range(60):
        photograph = Image.fromarray(grainy[i % 8]).resize((1200, 900), Image.Resampling.BILINEAR)
        paths.append(tmp_path / f"{i}.jpg")
        paths[-1].write_bytes(encode(photograph, "JPEG"))
    data = embedded([paths[i % 60] for i in range(1000)], classes=[(i,) for i in range(1000)])
    result = make_result("zeroshot")
    result["views"][0]["per_class"] = dict.fromkeys(names, 0.25)
    result["views"][0]["confusions"] = [
        {"class": name, "images": 1, "top1": 0.0, "taken_for": []} for name in names[:10]
    ]
    vectors = random_units(2000, 16, seed=8)
    samples = zeroshot_samples(
        result, data, vectors[1000:], vectors[:1000], names, 50.0, FileDataset(paths)
    )
    write_report(tmp_path / "r.html", read_result(result), samples)
    assert (tmp_path / "r.html").stat().st_size < 2_000_000
