"""The best model of a run is replaced by better ones alone, and whole whenever a kill comes."""

import pytest

from navit_clip.training.best import BestModel


def save_as(text):
    def save(folder):
        folder.mkdir()
        (folder / "model").write_text(text)

    return save


@pytest.mark.parametrize("lower", [False, True])
def test_only_better_values_replace_the_best(tmp_path, lower):
    sign = -1 if lower else 1
    offers = [1.0, 1.0, 0.5, float("nan"), 2.0, float("inf"), 1.5]
    kept = []
    for step, value in enumerate(offers):
        best = BestModel(tmp_path, "a/top1", lower=lower)  # anew each time: it survives a restart
        kept.append(best.offer(sign * value, step, save_as(str(step))))
        assert (best.value, best.step) == ((sign * 1.0, 0) if step < 4 else (sign * 2.0, 4))
    assert kept == [True, False, False, False, True, False, False]
    assert (tmp_path / "best/model").read_text() == "4"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    other = BestModel(tmp_path, "a/top5", lower=lower)
    assert other.value is None


def test_a_kill_while_the_best_is_written_leaves_a_whole_one(tmp_path):
    best = BestModel(tmp_path, "a/top1", lower=False)
    best.offer(1.0, 1, save_as("first"))

    def killed(folder):
        save_as("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        best.offer(2.0, 2, killed)
    again = BestModel(tmp_path, "a/top1", lower=False)
    assert again.value == 1.0
    assert (tmp_path / "best/model").read_text() == "first"
    assert again.offer(3.0, 3, save_as("third"))
    # Between the two renames: the new one is whole under its other name.
    (tmp_path / "best").rename(tmp_path / "best.partial")
    assert BestModel(tmp_path, "a/top1", lower=False).step == 3
    assert (tmp_path / "best/model").read_text() == "third"
