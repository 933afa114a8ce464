"""Configurations that cannot be meant are refused in one line, before anything runs."""

from __future__ import annotations

import math

import pytest

from navit_clip.configs import check_finite, config_from_dict
from navit_clip.data.config import DataConfig, DatasetConfig
from navit_clip.errors import UserError
from navit_clip.models.clip import CLIPConfig
from navit_clip.training.config import parse_config

FLAGS = ["--run_dir", "x", "--steps", "10", "--tokenizer.path", "t"]


@pytest.mark.parametrize(
    ("number", "in_file"), [(".nan", False), (".inf", True), ("-.inf", False), ("1e999", True)]
)
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("optim.lr", "{}"),
        ("optim.betas", "[0.9, {}]"),
        ("ema.decay", "{}"),
        ("stall_timeout_s", "{}"),
        ("task.captions", "{{txt: {}}}"),
        ("data.drop.rate", "{}"),
        ("data.mix", "{{a: {{shards: x, weight: {}}}}}"),
    ],
)
def test_no_number_of_a_run_may_be_nan_or_infinite(flag, value, number, in_file, tmp_path):
    group, _, field = flag.rpartition(".")
    words = [f"--{flag}={value.format(number)}"]
    if in_file:
        inner = f"{field}: {value.format(number)}"
        (tmp_path / "run.yaml").write_text(f"{group}: {{{inner}}}" if group else inner)
        words = ["--config", str(tmp_path / "run.yaml")]
    with pytest.raises(UserError) as caught:
        parse_config([*FLAGS, *words])
    assert field in str(caught.value) or "weight" in str(caught.value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_nor_one_in_python_or_json(number):
    with pytest.raises(ValueError, match="weight must be a positive number"):
        DatasetConfig("x", weight=number)
    with pytest.raises(ValueError, match="positive weights"):
        DatasetConfig("x", captions={"txt": number})
    with pytest.raises(ValueError, match=r"^init_scale must be a finite number"):
        config_from_dict(CLIPConfig, {"init_scale": number})
    with pytest.raises(ValueError, match=r"^data.drop.rate must be a finite number"):
        check_finite({"data": {"drop": {"rate": number}}})
    check_finite(DataConfig(), "data")


BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB.encode(), "more than 100,000 values"),
        (b"optim: &a {schedule: *a}", "more than 100,000 values"),
        (b"[" * 10_000, "recursion"),
        (b"a: [b", "expected ',' or ']'"),
        (b"\xff\xfe: 1", "codec can't decode"),
        (b"a: \x00", "special characters"),
        (b"optim: 3", "optim must hold fields, got 3"),
        (b"task: [contrastive]", "task must hold fields, got ['contrastive']"),
        (b"data: {drop: 0.5}", "data.drop must hold fields, got 0.5"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(text, reason, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=rf"^cannot read --config {path}: ") as caught:
        parse_config([*FLAGS, "--config", str(path)])
    assert reason in str(caught.value)


def test_aliases_may_be_used(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {mix: {a: &a {shards: [x, y]}, b: *a}}")
    config, _ = parse_config([*FLAGS, "--config", str(path)])
    assert config.data.mix["a"] == config.data.mix["b"]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--optim.lrr", "1"], "did you mean optim.lr?"),
        (["--task.model.image.heads", "3"], "did you mean task.model.image.encoder.heads?"),
        (
            ["--task.captions", "{txt:1.0}"],
            "a space behind each colon, 'txt: 1.0' and not 'txt:1.0'",
        ),
        (["--task.captions={txt:1, a: 2}"], "a space behind each colon, 'txt: 1' and not 'txt:1'"),
        (
            ["--optim", "{lr:1}"],
            "--optim {lr:1}: write a space behind each colon, 'lr: 1' and not 'lr:1'",
        ),
        (["--data.mix", "{a:{shards: x}}"], "a space behind each colon, as in {name: value}"),
        (["--data.budget.tokens", "image:96"], "a space behind each colon, as in {name: value}"),
        (["--data.mix", "{a: 1}"], "Expected fields of DatasetConfig. Got value: 1"),
    ],
)
def test_a_mistake_in_a_name_or_a_dict_has_a_hint(words, hint):
    with pytest.raises(UserError) as caught:
        parse_config([*FLAGS, *words])
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("data: {budget: {tokens: {image:96}}}", "'image: 96' and not 'image:96'"),
        ("data:\n  mix: [{a: [{b:1}]}]", "'b: 1' and not 'b:1'"),
        ("steps:5", "a space behind each colon"),
    ],
)
def test_a_file_without_spaces_behind_colons_has_a_hint(tmp_path, text, hint):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"write .*{hint}"):
        parse_config([*FLAGS, "--config", str(path)])


@pytest.mark.parametrize("flag", ["run_dir", "data.train"])
def test_null_is_no_word(flag):
    with pytest.raises(UserError, match=f"{flag} cannot be null: leave it out"):
        parse_config([*FLAGS, f"--{flag}", "null"])
    config, _ = parse_config([*FLAGS, "--init.model", "null", "--log.wandb_name", "null"])
    assert config.init.model is config.log.wandb_name is None


def test_dashes_stand_for_underscores_but_not_in_names_of_datasets():
    words = ["--log.every-steps=7", "--data.mix.my-set.shards", "x"]
    config, _ = parse_config([*FLAGS, *words])
    assert config.log.every_steps == 7
    assert list(config.data.mix) == ["my-set"]


def test_sizes_of_patches_need_positions_that_do_not_count_them(tmp_path):
    recipe = ["--config", "flexivit_shapes"]
    config, resolved = parse_config(recipe)
    assert config.data.resolution.patch_sizes == {8: 1, 16: 1, 32: 2}
    (tmp_path / "config.yaml").write_text(resolved)
    assert parse_config(["--config", str(tmp_path / "config.yaml")])[0] == config
    one, _ = parse_config([*recipe, "--data.resolution.patch_sizes", "{}"])
    assert one.data.resolution.patch_sizes == {}
    with pytest.raises(UserError, match=r"patch_sizes: patches of 8 pixels need .* of 16: image"):
        parse_config([*recipe, "--task.model.image.position.kind", "learned_2d"])
    with pytest.raises(UserError, match="masked_image predicts pixels of patches of one"):
        parse_config(
            [
                *("--task.kind", "masked_image", "--run_dir", "x", "--steps", "9"),
                *("--data.drop.kind", "fixed", "--data.resolution.patch_sizes", "{16: 1, 32: 1}"),
                *("--task.model.image.position.kind", "learned_1d"),
                *("--data.budget.tokens", "{image: 2048, decoder: 2048}"),
            ]
        )
    with pytest.raises(UserError, match=r"max_side=192 makes 24×24 patches, past .*=500"):
        parse_config([*recipe, "--data.resolution.max_tokens", "500"])
