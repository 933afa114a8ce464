"""The benchmarks of training run from their command lines and report what their pages say.

What they measure is no test's business: sizes are tiny and only the accounting is checked.
"""

from __future__ import annotations

import importlib
import json
import math
import statistics
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shard_factory import make_shards, sample, write_shard

from benchmarks import comparison, end_to_end, needs, step, sweep, tables, windows
from benchmarks.command import read_results
from benchmarks.comparison import Variant, compare
from benchmarks.pairs import draw_batches, read_samples
from benchmarks.peers import PROJECTS
from benchmarks.plot import draw
from benchmarks.sizes import WIDTHS
from navit_clip.errors import UserError
from navit_clip.packed.windows import Units

TINY = ["--size", "XS/16", "--pairs", "3", "--rounds", "1"]
CPU = torch.device("cpu")
MADE = {"versions": {}, "command": "", "commit": "", "machine": "", "threads": 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("shards")
    make_shards(root, [6, 6])
    return str(root)


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(monkeypatch, tmp_path: Path, name: str, *flags: str) -> dict[str, Any]:
    """``python -m benchmarks.NAME`` in this process; what it wrote."""
    output = tmp_path / f"{name}.json"
    monkeypatch.setattr(sys, "argv", [name, *flags, "--output", str(output)])
    importlib.import_module(f"benchmarks.{name}").main()
    return json.loads(output.read_text())


def _here(context: Any, work: Any, arguments: Any, *_: Any) -> list[Any]:
    """Instead of new processes, which take seconds to start; one test starts real ones."""
    return [work(*values) for values in arguments]


@pytest.mark.slow
def test_towers_in_turn_and_their_picture(shards, monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "in_processes", _here)
    monkeypatch.setattr(comparison, "matmul_peak", lambda device, precision: 1e11)
    flags = [*TINY, "--shards", shards, "--peers", "timm_naflex", "open_clip"]
    found = run(monkeypatch, tmp_path, "towers", *flags)
    assert {name for name in found if name.startswith("ratio")} == {
        "ratio_open_clip_image",
        "ratio_timm_naflex_image",
        "ratio_open_clip_text",
    }
    ours, squares = found["navit_clip_image"], found["open_clip_image"]
    ratios = [b / a for a, b in zip(ours["rounds"], squares["rounds"], strict=True)]
    assert found["ratio_open_clip_image"] == pytest.approx(statistics.median(ratios))
    # A tower alone is paid for its own tokens; 3 pairs in each of the batches.
    for part in ("image", "text"):
        tower = found[f"navit_clip_{part}"]
        assert tower["real_tokens_per_s"] * tower["seconds"] == pytest.approx(
            3 * tower[f"{part}_tokens_per_pair"]
        )
        assert 0 < tower["flops_per_pair"] < found[f"open_clip_{part}"]["flops_per_pair"]
    step = {"navit_clip": ours, "open_clip": squares, "ratio_open_clip": 2.0}
    step |= {"peak_share": ours["peak_share"], **_facts(found)}
    draw({"step": step, "towers": found}, tmp_path / "deep/picture.png")
    assert Image.open(tmp_path / "deep/picture.png").width > 1000
    page = tables.section("towers", found)
    assert all(f"{found[f'ratio_open_clip_{part}']:.2f}×" in page for part in ("image", "text"))
    assert "2.00×" in tables.section("step", step)
    step |= {"open_clip_main": squares, "open_clip_main_version": "4"}
    step |= {"navit_clip_bf16": ours, "open_clip_main_bf16": squares}
    step |= {"ratio_open_clip_main_fp32": 1.25, "ratio_open_clip_main_bf16": 1.5}
    assert all(f"| {ratio}× |" in tables.section("step", step) for ratio in ("1.25", "1.50"))


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k == "made" or not isinstance(v, dict)}


def test_serving_in_three_ways(shards, monkeypatch, tmp_path):
    for package in ("starlette", "prometheus_client"):
        pytest.importorskip(package, reason=f"{package} (extra serve) is not installed")
    serving = importlib.import_module("benchmarks.serving")
    monkeypatch.setattr(serving, "CLIENTS", (2,))
    flags = ["--size", "XS/16", "--rounds", "1", "--requests", "6", "--shards", shards]
    found = run(monkeypatch, tmp_path, "serving", *flags)
    ways = found["clients"]["2"]
    assert list(ways) == ["packed", "padded", "one by one"]
    for way in ("padded", "one by one"):
        ratio = found[f"ratio_{way.replace(' ', '_')}"]
        assert ratio == ways["packed"]["requests_per_s"] / ways[way]["requests_per_s"]
        assert f"| {ratio:.2f}× |" in tables.section("serving", found)


@pytest.mark.slow
def test_sweep(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "SIDES", (32, 64))
    monkeypatch.setattr(sweep, "STREAMS", (128, 512))
    monkeypatch.setattr(sweep, "PAIRS", (16, 32))
    monkeypatch.setattr(sweep, "CAPTIONS", (8, 77))
    found = run(monkeypatch, tmp_path, "sweep", "--rounds", "1", "--share", "0.05")
    for name in ("image_side", "stream", "pairs", "caption"):
        points = found[name]["points"]
        cost = [p["ms_per_gflop"] for p in points]
        assert found[f"max_over_min_{name}"] == pytest.approx(max(cost) / min(cost))
        for point in points:
            assert point["ms_per_gflop"] * point["gflop"] == pytest.approx(1e3 * point["seconds"])
    draw({"sweep": found}, tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").height > 400
    assert f"| {found['max_over_min_pairs']:.2f} |" in tables.section("sweep", found)


def test_the_sweeps_points_are_what_they_say():
    curves = sweep.curves(1.0)
    tokens = {
        name: [sum(rows * columns for rows, columns in point.grids) for point in points]
        for name, points in curves.items()
    }
    assert tokens["image_side"] == [4096] * 4
    assert tokens["stream"] == list(sweep.STREAMS)
    assert tokens["pairs"] == [8192] * 5
    assert [point.caption * len(point.grids) for point in curves["pairs"]] == [1024] * 5
    assert [len(point.grids) for point in curves["pairs"]] == list(sweep.PAIRS)
    assert {len(point.grids) for point in curves["caption"]} == {128}


def test_a_sweeps_operations_are_those_of_theory():
    """Three products for each of forward's, and the square of the pairs in the loss alone."""
    widths = WIDTHS["XS/16"]
    steps = sweep.Steps(widths, "fp32", "cpu")
    batches = [sweep.Point(0, ((2, 2),) * pairs, 4).batch() for pairs in (64, 128, 192)]
    one, two, three = (steps.count_flops(batch) for batch in batches)
    blocks = widths.image_depth * 12 * widths.image**2 * (4 + 4) * 6
    assert 64 * blocks < one < 1.4 * 64 * blocks
    # What grows with the square: products of 64·64·D, at least one forward and two backward.
    products = (three - 2 * two + one) / (2 * 64**2 * 2 * widths.embed)
    assert 3 <= products <= 6


@pytest.mark.parametrize("name", [name for name in PROJECTS if name != "open_clip_main"])
def test_both_embeddings_of_a_pair_are_in_one_row(name, shards):
    if name == "vit_pytorch" and find_spec("vit_pytorch") is None:
        pytest.skip("vit-pytorch is not installed")
    torch.manual_seed(0)
    towers = PROJECTS[name](WIDTHS["XS/16"]).eval()
    (pairs,) = draw_batches(read_samples([shards]), 5, 1)
    with torch.no_grad():
        image_ED, text_ED = towers(towers.prepare(pairs, CPU))
        alone = [towers(towers.prepare([pair], CPU)) for pair in pairs]
    torch.testing.assert_close(image_ED.norm(dim=1), torch.ones(5))
    wanted = torch.cat([torch.cat(one, 1) for one in alone])
    found = torch.cat([image_ED, text_ED], 1)
    # Some sort their images; each row must still be that of one pair, and each pair be there.
    nearest = torch.cdist(found, wanted)
    assert sorted(nearest.argmin(1).tolist()) == list(range(5))
    assert nearest.min(1).values.max() < 1e-4


@pytest.mark.parametrize(
    ("name", "flags", "wrong"),
    [("packing", [], "cut"), ("packing", [], "texts"), ("step", ["--only", "bf16"], "cut")],
)
def test_shards_that_cannot_be_measured_are_one_line(
    name, flags, wrong, tmp_path, monkeypatch, capfd
):
    shard = tmp_path / "0.tar"
    write_shard(shard, {"a": sample(0) if wrong == "cut" else {"txt": b"a dog"}})
    if wrong == "cut":
        shard.write_bytes(shard.read_bytes()[:-11_000])
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path, name, *flags, "--shards", str(shard))
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.{name}: error: ")
    reasons = {"cut": f"cannot read a shard: {shard}", "texts": "photos with captions"}
    assert reasons[wrong] in line


def test_samples_that_the_loader_skips_are_in_no_batch(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"a": sample(0), "b": {"txt": b"b"}, "c": sample(1)})
    (pairs,) = draw_batches(read_samples([str(shard)]), 2, 1)
    assert sorted(pair.sample.id for pair in pairs) == ["0/a", "0/c"]
    with pytest.raises(UserError, match="2 photos with captions cannot make 1 × 3 pairs"):
        list(draw_batches(read_samples([str(shard)]), 3, 1))


@pytest.mark.slow
def test_a_variant_that_cannot_run_is_one_line(shards):
    workload = Namespace(size="XS/16", pairs=2, rounds=1, precision="fp32", shards=[shards])
    with pytest.raises(UserError, match="OpenClip offers no compilation") as error:
        compare(Variant("open_clip", compiled=True), {}, workload)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["step", "towers", "needs"])
def test_a_missing_peer_is_one_line_before_anything_is_measured(name, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    monkeypatch.setattr(comparison, "in_turn", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path, name)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.{name}: error: vit-pytorch is not installed")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--open-clip-main", "nowhere"], "nowhere is not the src of open_clip's main branch"),
        (["--only", "open_clip_main"], "needs --open-clip-main SRC"),
    ],
)
def test_what_is_not_open_clips_main_branch_is_one_line(
    flags, reason, monkeypatch, tmp_path, capfd
):
    monkeypatch.setattr(step, "in_processes", _here)
    monkeypatch.setattr(step, "compare", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path, "step", *flags)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert reason in line


def test_open_clips_main_branch_fills_one_length(shards):
    pytest.importorskip("open_clip_train.naflex_data", reason="open_clip's main is not on the path")
    torch.manual_seed(0)
    towers = PROJECTS["open_clip_main"](WIDTHS["XS/16"]).eval()
    (pairs,) = draw_batches(read_samples([shards]), 5, 1)
    batch = towers.prepare(pairs, CPU)
    length = round(statistics.mean(real.pair.lengths[0] for real in pairs))
    longest = max(real.pair.lengths[1] for real in pairs)
    assert batch["image"]["patch_valid"].shape == (5, length)
    assert batch["text"].shape == (5, longest)
    with torch.no_grad():
        image_ED, text_ED = towers(batch)
        short = min(pairs, key=lambda real: real.pair.lengths[1])
        alone = towers(towers.prepare([short], CPU))[1]
    torch.testing.assert_close(image_ED.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(text_ED[pairs.index(short)], alone[0])


def test_windows():
    curve = windows.cost_curve(7)
    assert 49 <= min(curve, key=curve.__getitem__) < 60  # near the area of a window
    assert min(curve.values()) == 1
    units = Units.of(windows.some_images(2, windows.VISIBLE))
    found = windows.measure_stage(units, 2, 7, shifted=True, rounds=1)
    assert found["windows"]["pairs"] < found["groups"]["pairs"]
    assert found["windows"]["padding"] == 0 <= found["groups"]["padding"]
    stages = {"stage 3, shifted": found}
    result = {"best_size": 56, "whole": stages, "hidden": stages, "made": MADE}
    assert tables.section("windows", result).count("| stage 3, shifted |") == 2


def test_the_table_of_masked_images_has_the_variants_that_were_measured():
    trial = {"images_per_s": 2.0, "gflops_per_image": 14.0, "peak_mb": 900.0}
    ratios = {"speed_greenmim": 2.994, "memory_greenmim": 0.29}
    facts = {"images": 8, "size": "S/16", "precision": "fp32", "made": MADE}
    result = {"greenmim": trial, "simmim": trial, **ratios, **facts}
    section = tables.section("masked_image", result)
    assert "| GreenMIM | 2.00 | 2.99× | 900 | 0.29 | 14.0 |" in section
    assert "| Swin on all patches (SimMIM) | 2.00 |  | 900 |  | 14.0 |" in section
    assert "MAE" not in section


def test_attention(monkeypatch, tmp_path):
    flags = ["--segments", "3", "--rounds", "1", "--precision=fp32"]
    found = run(monkeypatch, tmp_path, "attention", *flags)
    # What made the figures, without a path of this machine.
    assert found["made"]["command"] == f"python -m benchmarks.attention {' '.join(flags)}"
    assert found["made"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    for peer in ("padded", "dense_mask"):
        ratio = found["seconds"][peer] / found["seconds"]["packed"]
        assert found[f"ratio_{peer}"] == pytest.approx(ratio)


@pytest.mark.slow  # ranks that compile, and peers of theirs
def test_loss(monkeypatch, tmp_path):
    """Real ranks, and the table: a peer that was not tried differs from one that cannot."""
    found = run(monkeypatch, tmp_path, "loss", "--sizes", "1024", "--rounds", "1")
    sizes = found["1024"]
    two = sizes["two_ranks"]
    for field, ratio in (("seconds", "time_ratio"), ("extra_mb", "memory_ratio")):
        best = min(peer[field] for peer in two["peers"].values())
        assert two[ratio] == pytest.approx(two[field] / best)
    assert sizes["four_ranks"]["extra_mb"] > 0
    too_large = {**sizes["four_ranks"], "peer_not_run": "each of its matrices takes 17.2 GB"}
    page = tables.section("loss", {**found, "65536": too_large})
    cells = [
        [c.strip() for c in row.split("|")[1:-1]] for row in page.splitlines() if row[:1] == "|"
    ]
    assert [row[:2] for row in cells[2:]] == [["1,024", r] for r in "124"] + [["65,536", "1"]]
    assert cells[3][6] == f"{two['peers']['local']['extra_mb']:,.0f}"
    assert [row[3] for row in cells[4:]] == [row[6] for row in cells[4:]] == ["–", "cannot"]


@pytest.mark.slow
def test_exchange(monkeypatch, tmp_path):
    flags = ("--ranks", "2", "--each", "3", "5", "--rounds", "1")
    found = run(monkeypatch, tmp_path, "exchange", *flags)
    times = found["milliseconds"]["2"]
    assert times.keys() == {"3", "5"}
    assert all(time > 0 for case in times.values() for time in case.values())
    assert tables.section("exchange", found).count("| 2 |") == 2


def test_a_loss_too_small_to_measure_is_refused(monkeypatch, tmp_path, capsys):
    for sizes in ("512", "1026"):
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path, "loss", "--sizes", sizes)
        assert "1024 or more, divisible by 4" in capsys.readouterr().err


def test_the_page_of_results_keeps_what_was_not_measured_anew(monkeypatch, tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\nIntroduction.\n\n## Loss\n\nas it was\n\n## Packing\n\nold\n")
    run(monkeypatch, tmp_path, "attention", "--segments", "3", "--rounds", "1")
    packed = run(monkeypatch, tmp_path, "packing", "--pairs", "4000")
    flags = ["--results", str(tmp_path), "--output", str(page)]
    monkeypatch.setattr(sys, "argv", ["tables", *flags])
    tables.main()
    first = page.read_text()
    titles = ["# Results", "## Attention", "## Loss", "## Packing"]
    assert [line for line in first.splitlines() if line.startswith("#")] == titles
    assert "Introduction." in first
    assert "as it was" in first
    assert "old" not in first
    padding = packed["no_drop"]["fill"]["image_padding"]
    assert f"| fill | {padding:.2%} /" in first
    assert "`python -m benchmarks.packing --pairs 4000`" in first
    tables.main()
    assert page.read_text() == first


def test_a_result_that_cannot_be_drawn_is_one_line(tmp_path):
    for text in ("{", '{"seconds": {}}'):
        (tmp_path / "attention.json").write_text(text)
        with pytest.raises(UserError, match=r"attention") as error:
            tables.rewrite("", read_results(tmp_path, ["attention"]))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="make bench"):
        read_results(tmp_path, ["loss"])


@pytest.mark.slow
def test_our_trainer_end_to_end(shards):
    tars = sorted(str(path) for path in Path(shards).glob("*.tar"))
    args = Namespace(size="XS/16", pairs=3, steps=3, precision="fp32")
    found = end_to_end.train_ours(args, tars, end_to_end.find_budget(tars, 3))
    assert found["seconds"] > 0
    assert found["pairs"] == 6  # of the second and third step
    assert found["padding"] == 0
    assert found["pairs_per_s"] > 0
    assert 0 <= found["data_wait"] < 1


def test_the_peers_log_is_read_from_the_second_step_on():
    log = (
        "now | INFO | Start epoch 0\n"
        "now | INFO | Train Epoch: 0 [ 8/24 (33%)] Data (t): 9.000 Batch (t): 10.000, 0.8/s\n"
        "now | INFO | Train Epoch: 0 [16/24 (67%)] Data (t): 0.500 Batch (t): 2.000, 4/s\n"
        "now | INFO | Train Epoch: 0 [24/24 (100%)] Data (t): 0.100 Batch (t): 1.000, 8/s\n"
    )
    found = end_to_end.read_peer(log, 8)
    assert found["pairs"] == 16
    assert math.isclose(found["pairs_per_s"], 16 / 3)
    assert math.isclose(found["data_wait"], 0.2)


def test_a_failing_trainer_is_one_line(tmp_path):
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no such shards')"]
    with pytest.raises(UserError, match=r"failed with status 1: no such shards$"):
        end_to_end.run_trainer(command, tmp_path / "weights")
    with pytest.raises(UserError, match="--peer-python /nowhere/python does not run"):
        needs.need_peer("/nowhere/python")
