"""Results as the evaluators write them, made up."""

from __future__ import annotations

import random

import pytest

SETTINGS = [("capped", 64), ("capped", 256), ("native", None), ("square", 224), ("square", 336)]


def make_entry(kind, setting, size, rng, own=False):
    label = {"capped": str(size), "native": "native", "square": f"{size}²"}[setting]
    tokens = {"capped": size, "native": 700, "square": (size or 0) ** 2 // 256}[setting]

    def metrics():
        top = rng.random()
        if kind == "zeroshot":
            return {"top1": top, "top5": min(1.0, 1.5 * top)}
        shares = {f"R@{k}": min(1.0, top * k) for k in (1, 5, 10)}
        return {"image_to_text": dict(shares), "text_to_image": dict(shares)}

    entry = {
        "view": setting,
        "label": label,
        "max_tokens": size if setting == "capped" else None,
        "side": size if setting == "square" else None,
        "own": own,
        "mean_tokens": tokens * 0.97,
        "padding": 0.01,
        "flops_per_image": tokens * 9e7,
        **metrics(),
        "by_aspect": [{"label": x, "images": 7, **metrics()} for x in ("1-1.1", ">2")],
        "by_size": [{"label": x, "images": 9, **metrics()} for x in ("<128", ">=640")],
    }
    if kind == "zeroshot":
        taken = [{"class": "lake", "share": 0.25}]
        entry |= {
            "mean_per_class": rng.random(),
            "ece": rng.random(),
            "per_class": {"dog": 0.5, "lake": 1.0},
            "confusions": [{"class": "dog", "images": 4, "top1": 0.5, "taken_for": taken}],
        }
    else:
        for way in ("image_to_text", "text_to_image"):
            entry[way]["median_rank"] = 3.5
    return entry


def make_result(kind, *, settings=tuple(SETTINGS), baselines=2, seed=0):
    rng = random.Random(seed)
    entries = [make_entry(kind, *setting, rng, own=i == 0) for i, setting in enumerate(settings)]
    headline = (
        ("top1", "top5", "mean_per_class", "ece")
        if kind == "zeroshot"
        else ("image_to_text", "text_to_image")
    )
    return {
        "model": "runs/a/model",
        "data": "data/val",
        "images": 1200,
        "classes" if kind == "zeroshot" else "captions": 30,
        "skipped": {"unreadable_image": 3},
        "max_tokens": entries[0]["max_tokens"],
        **{key: entries[0][key] for key in headline},
        "views": entries,
        "baselines": [
            {
                "model": f"open_clip:ViT-B-{16 * (i + 1)}/a_rather_long_name_of_weights",
                "views": [make_entry(kind, "square", 224, rng, own=True)],
            }
            for i in range(baselines)
        ],
    }


KINDS = pytest.mark.parametrize("kind", ["zeroshot", "retrieval"])


def metrics_of(entry, kind):
    if kind == "zeroshot":
        return [entry[key] for key in ("top1", "top5", "mean_per_class", "ece")]
    ways = ("image_to_text", "text_to_image")
    return [entry[way][key] for way in ways for key in ("R@1", "R@5", "R@10")]
