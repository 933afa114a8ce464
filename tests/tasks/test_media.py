"""What tasks show of their batches besides numbers, in runs of each kind of model."""

import json

import pytest
import torch
from classify_cases import classify_flags, write_labelled
from masked_cases import masked_flags
from test_hierarchical import TOWER
from tiny_run import run, tiny_flags, write_tiny_data

from navit_clip.tasks.confusions import margins

IMAGES = {"tokens_per_image", "aspect_ratio"}
PAIRS = IMAGES | {"first_batch", "logit_margin", "confusions"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    write_tiny_data(root / "pairs")
    write_labelled(root / "labelled")
    return root


@pytest.mark.parametrize(
    ("flags_of", "folder", "options", "expected"),
    [
        (classify_flags, "labelled", {"accumulate": 2}, IMAGES),
        (masked_flags, "labelled", {}, IMAGES),
        (masked_flags, "labelled", TOWER, IMAGES),
        (tiny_flags, "pairs", {"accumulate": 2}, PAIRS),
        # Alone, an image has no other caption.
        (tiny_flags, "pairs", {"data__budget__max_examples": 1}, IMAGES | {"first_batch"}),
    ],
)
def test_every_task_shows_its_batches(
    data, tmp_path, monkeypatch, flags_of, folder, options, expected
):
    options = {**options, "log__media_every_steps": 1}
    flags = flags_of(data / folder, tmp_path / "run", 2, **options)
    assert run(monkeypatch, flags) == 0
    found = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "run/media").iterdir()}
    assert found.keys() == expected
    *_, line = map(json.loads, (tmp_path / "run/metrics.jsonl").open())
    images = sum(found["tokens_per_image"]["counts"])  # of the first micro-batch
    assert 0 < images <= line["examples"]
    assert images == line["examples"] or "accumulate" in options
    assert found["aspect_ratio"]["edges"][-1] >= 1


def test_margins_of_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 9, generator=generator)
    codes = torch.tensor([0, 1, 2, 2, 3, 4, 5, 6, 7])
    found, other = margins(logits, codes[:, None] == codes)
    for i in range(9):
        others = [j for j in range(9) if codes[j] != codes[i]]
        best = max(others, key=lambda j: logits[i, j])
        assert other[i] == best
        assert found[i] == logits[i, i] - logits[i, best]
    alone, _ = margins(logits[:1, :1], torch.ones(1, 1, dtype=torch.bool))
    assert alone.isinf().all()
