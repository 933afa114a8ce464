"""ViT-B-32 through the evaluators against open_clip's own functions, on real photos and captions.

Few photos, classes and captions, for time. The two sides embed in batches of different sizes, which
moves scores by about 1e-7: where others lie nearer than `NOISE` to the right one's, the rank may be
off by as many, and figures by as many images.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from eval_cases import ALONE
from PIL import Image
from timm.data import ImageNetInfo

from navit_clip.evaluation.arguments import load_models, parse_arguments, read_evaluator
from navit_clip.evaluation.ranking import Readout, classify, pair_ranks
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.evaluation.zeroshot import class_vectors

DATA = Path(__file__).parents[3] / "shared" / "data"
NOISE = 1e-6
PHOTOS = 8  # one of each class
TEMPLATES = ("a photo of a {}.", "art of the {}.")
CAPTIONED, CAPTIONS = 6, 3

pytestmark = pytest.mark.skipif(
    not (DATA / "imagenet-sample").is_dir(),
    reason="no real data at ../shared/data beside the checkout",
)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32")
    return SimpleNamespace(
        model=model.eval(), transform=transform, tokenizer=open_clip.get_tokenizer("ViT-B-32")
    )


@pytest.fixture(scope="module")
def ours(theirs):
    """Evaluates by the command line's words; returns the evaluator and its result as JSON."""
    models = []

    def run(root, *words):
        flags = ["--model", "open_clip:ViT-B-32", "--random-weights", 0, "--square", 224]
        flags += ["--output", root / "result.json", "--device", "cpu"]
        args = parse_arguments([str(word) for word in (*words, *flags)], "eval")
        if not models:
            models.append(load_models(args, ALONE)[0])
            weights = models[0]._own.state_dict()
            assert all(torch.equal(weights[k], v) for k, v in theirs.model.state_dict().items())
        evaluator = read_evaluator(args)
        return evaluator, evaluator.run(models[0], ALONE, workers=0).to_json()

    return run


@torch.no_grad()
def their_images(theirs, paths):
    parts = []
    for path in paths:
        with Image.open(path) as image:
            batch = theirs.transform(image)[None]
        parts.append(theirs.model.encode_image(batch, normalize=True))
    return torch.cat(parts)


def check_ranks(ranks, scores, own):
    """Each rank against a sorted row of scores, `own` the right columns of each row.

    Returns:
        Which rows no near tie could decide.
    """
    certain = []
    for rank, row, columns in zip(ranks.tolist(), scores, own, strict=True):
        best = row[columns].max()
        place = torch.argsort(row, descending=True).tolist()
        first = next(i for i, column in enumerate(place) if column in columns)
        wrong = torch.tensor([c for c in range(len(row)) if c not in columns])
        near = int(((row[wrong] - best).abs() < NOISE).sum())
        assert abs(rank - first) <= near
        certain.append(near == 0)
    assert sum(certain) >= 0.9 * len(certain)  # else the comparison says little
    return certain


def test_zeroshot_is_open_clips(theirs, ours, tmp_path):
    folders = sorted((DATA / "imagenet-sample/val").iterdir())[:PHOTOS]
    for folder in folders:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / folder.name).symlink_to(folder)
    synsets = ImageNetInfo().label_names()
    names = [open_clip.IMAGENET_CLASSNAMES[synsets.index(folder.name)] for folder in folders]
    (tmp_path / "names.txt").write_text("\n".join(names))
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    evaluator, result = ours(
        tmp_path, "zeroshot", "--data", tmp_path / "data",
        "--classnames", tmp_path / "names.txt", "--templates", tmp_path / "templates.txt",
    )  # fmt: skip

    images_ED = their_images(theirs, [next(folder.iterdir()) for folder in folders])
    classes_DC = open_clip.build_zero_shot_classifier(
        theirs.model, theirs.tokenizer, names, TEMPLATES
    )
    torch.testing.assert_close(
        evaluator.data.embeddings[EvalSetting("square", 224)], images_ED, atol=NOISE, rtol=0
    )
    classes_CD = class_vectors(evaluator.texts_TD, len(names))
    torch.testing.assert_close(classes_CD, classes_DC.T, atol=NOISE, rtol=0)
    scores = images_ED @ classes_DC
    target = torch.arange(len(folders))
    found = classify(
        Readout(evaluator.data.embeddings[EvalSetting("square", 224)], classes_CD, scale=100.0),
        torch.eye(len(folders), dtype=torch.bool),
        target,
    )
    certain = check_ranks(found.rank_E, scores, target[:, None].tolist())
    top = scores.topk(2, 1)
    apart = top.values[:, 0] - top.values[:, 1] > NOISE
    predicted = torch.where(found.rank_E < 1, target, found.wrong_E)
    assert predicted[apart].equal(top.indices[apart, 0])
    (entry,) = result["views"]
    assert (entry["label"], entry["own"]) == ("224²", True)
    for value, k in ((entry["top1"], 1), (entry["top5"], 5)):
        expected = (scores.topk(k, 1).indices == target[:, None]).sum().item()
        assert value * len(folders) == pytest.approx(expected, abs=len(folders) - sum(certain))


@pytest.mark.slow
def test_retrieval_is_that_of_open_clips_embeddings(theirs, ours, tmp_path):
    listed = json.loads((DATA / "flickr8k-dev/dataset_flickr8k.json").read_text())["images"]
    listed = [{**image, "sentences": image["sentences"][:CAPTIONS]} for image in listed[:CAPTIONED]]
    (tmp_path / "captions.json").write_text(json.dumps({"images": listed}))
    photos = DATA / "flickr8k-dev/images"
    evaluator, result = ours(
        tmp_path, "retrieval", "--images", photos, "--captions", tmp_path / "captions.json"
    )

    images_ED = their_images(theirs, [photos / image["filename"] for image in listed])
    texts = [sentence["raw"] for image in listed for sentence in image["sentences"]]
    owner = [i for i, image in enumerate(listed) for _ in image["sentences"]]
    with torch.no_grad():
        parts = theirs.tokenizer(texts).split(CAPTIONS)
        texts_TD = torch.cat([theirs.model.encode_text(ids, normalize=True) for ids in parts])
    torch.testing.assert_close(evaluator.texts_TD, texts_TD, atol=NOISE, rtol=0)
    scores = images_ED @ texts_TD.T
    to_text, to_image = pair_ranks(
        evaluator.data.embeddings[EvalSetting("square", 224)],
        evaluator.texts_TD,
        evaluator.data.image_of_texts,
    )
    own = [[t for t, o in enumerate(owner) if o == i] for i in range(len(listed))]
    check_ranks(to_text, scores, own)
    check_ranks(to_image, scores.T, [[image] for image in owner])
    assert evaluator.data.image_of_texts.tolist() == owner
    for way, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
        for k in (1, 5, 10):
            hits = sum(rank < k for rank in ranks.tolist())
            assert result[way][f"R@{k}"] * len(ranks) == pytest.approx(hits)
