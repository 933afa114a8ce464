"""Whole runs of a classifier: stopped and resumed, mistakes, and towers that they start from."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from classify_cases import (
    ALONE,
    NAMES,
    TOWER,
    classify_flags,
    write_labelled,
)
from shard_factory import encode, photo, write_shard
from tiny_run import run

from navit_clip import NaViTClassifier, NaViTCLIP
from navit_clip.data.annotations.image_files import FilesConfig
from navit_clip.data.augment import AugmentConfig
from navit_clip.data.config import DataConfig
from navit_clip.data.mixture import Mixture
from navit_clip.errors import UserError
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.classifier import ClassifierConfig
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.rope import RotaryConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.tasks.classify import ClassifyConfig, ClassifyTask
from navit_clip.tasks.contrastive import ContrastiveConfig
from navit_clip.tasks.source import InitConfig
from navit_clip.training.config import parse_config
from navit_clip.training.validation import open_validation


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled"))


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("output", "labels"), [("softmax", "cls"), ("sigmoid", "json.tags")], ids=["one", "many"]
)
def test_a_stopped_run_goes_on_bit_for_bit_and_is_exported(
    data, tmp_path, monkeypatch, output, labels
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {
        "task__model__output": output,
        "task__labels": labels,
        "accumulate": 2,
        "ema__decay": 0.5,
        "optim__head_weight_decay": 1.0,
        "data__resolution__patch_sizes": "{4: 1, 8: 1, 16: 1}",
        "data__augment": json.dumps({"min_area": 0.5, "flip": 0.5, "mixup": 0.4, "cutmix": 1}),
        "task__model__image__position__coordinates": "interpolated",
    }
    assert run(monkeypatch, classify_flags(data, whole, 5, **options)) == 0
    for steps in (2, 5):  # all of 45 images, and again
        assert run(monkeypatch, classify_flags(data, parts, steps, **options)) == 0
    curves = [
        [(v["step"], v["loss"], v["grad_norm"], v["accuracy"]) for v in metrics(one)]
        for one in (whole, parts)
    ]
    assert curves[0] == curves[1]
    assert {"image_tokens_per_s", "token_drop", "model_flops_per_s"} <= metrics(whole)[-1].keys()
    models = [NaViTClassifier.from_pretrained(one / "model") for one in (whole, parts)]
    for name, weight in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], weight), name
    model = models[0]
    assert model.classes == NAMES
    images = [photo(i, 20 + i, 30) for i in range(5)]
    found = model.classify(images)
    assert found.shape == (5, 3)
    assert torch.allclose(found.sum(1), torch.ones(5)) == (output == "softmax")
    torch.testing.assert_close(model.classify(images[3:], max_tokens=24), found[3:])
    assert not torch.allclose(model.classify(images, patch_size=4), found)
    card = (whole / "model/README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "red, green, blue" in card


def test_rotary_positions_may_be_added_to_the_tower_it_starts_from(data, tmp_path):
    image = ImageTowerConfig(patch_size=8, encoder=EncoderConfig(width=16, depth=2, heads=2))
    source = NaViTClassifier(ClassifierConfig(image), NAMES, Preprocess(24))
    source.save_pretrained(tmp_path / "source")
    added = ClassifierConfig(replace(image, rotary=RotaryConfig("mixed")))
    task = ClassifyTask(ClassifyConfig(model=added), DataConfig(train=str(data)))
    model, _ = task.start_from(InitConfig(str(tmp_path / "source")))
    assert model.image.state_dict().keys() - source.image.state_dict().keys() == {"rotary.learned"}
    for name, weight in source.image.state_dict().items():
        assert torch.equal(model.image.state_dict()[name], weight), name


def test_the_first_loss_is_that_of_guessing(data, tmp_path, monkeypatch):
    for output, labels, expected in (
        ("softmax", "cls", math.log(3)),
        ("sigmoid", "cls", -math.log(1 / 4) - 2 * math.log(3 / 4)),  # σ(−ln 3) is 1/4
    ):
        flags = classify_flags(
            data, tmp_path / output, 1, task__model__output=output, task__labels=labels
        )
        assert run(monkeypatch, flags) == 0
        assert metrics(tmp_path / output)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_held_out_images_have_the_same_classes(data, tmp_path):
    shard = shutil.copy(data / "00002.tar", tmp_path / "held.tar")
    names = tmp_path / "classnames.txt"
    train = data / "{00000..00001}.tar"
    options = {"data__validation": shard, "eval__validation__batch": 4}
    flags = classify_flags(data, tmp_path / "run", data__train=train, **options)
    config, _ = parse_config(flags)
    mixture = Mixture.find(config.data)
    parts = config.eval.validation, config.task, config.data, mixture, None, ALONE
    names.write_text("red\nblue\ngreen\n")
    with pytest.raises(
        UserError, match=r"beside the shards of data\.validation has .* another order"
    ):
        open_validation(*parts)
    names.write_text("\n".join(NAMES))
    validation = open_validation(*parts)
    weights = validation.task.build_model().state_dict()
    loss, skipped = validation.run(weights, "fp32", 0, lambda: None)
    assert loss == pytest.approx(math.log(3), rel=1e-5)
    assert skipped == 0


def test_unusable_labels_are_counted_and_named(tmp_path, monkeypatch, capsys):
    picture = encode(photo(0, 20, 20))
    samples = {str(i): {"png": picture, "cls": str(i % 3).encode()} for i in range(9)}
    samples |= {
        "past": {"png": picture, "cls": b"3"},
        "none": {"png": picture},
        "two": {"png": picture, "cls": b"0\n1"},
    }
    write_shard(tmp_path / "data/00000.tar", samples)
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    flags = classify_flags(
        tmp_path / "data", tmp_path / "run", 3, task__classes=tmp_path / "names.txt"
    )
    assert run(monkeypatch, flags) == 0
    said = capsys.readouterr().out
    for reason in ("bad_label", "no_label", "two_labels"):
        assert f"{reason} " in said
    assert "00000/past: bad_label: cls is 3, none of the 3 classes" in said


MISTAKES = [
    ({"task__classes": "nowhere.txt"}, "task.classes nowhere.txt"),
    ({"task__labels": "json"}, "labels must be cls or json.FIELD"),
    ({"task__model__output": "relu"}, "task.model.output"),
    ({"data__budget__tokens": '{"image": 60, "text": 60}'}, "data.budget.tokens must name"),
    ({"optim__head_weight_decay": -1}, "head_weight_decay must not be negative"),
    ({"task__labels": "json.nothing", "data__max_bad_samples": 20}, "20 unusable samples in a row"),
    ({"data__resolution__max_tokens": 61}, "cannot hold one example"),
    ({"init__model": "nowhere"}, "no model at init.model=nowhere"),
]


@pytest.mark.parametrize(("change", "named"), MISTAKES)
def test_a_mistake_is_one_line(data, tmp_path, monkeypatch, capsys, change, named):
    assert run(monkeypatch, classify_flags(data, tmp_path / "run", **change)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
    assert not (tmp_path / "run/config.yaml").exists()


def config_of(data, **changes):
    return ClassifyConfig(**changes), DataConfig(train=str(data))


def test_class_names_must_be_known_and_of_one_order(data, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(data, bare)
    (bare / "classnames.txt").unlink()
    config, read = config_of(bare)
    with pytest.raises(UserError, match=r"task\.classes is missing"):
        config.build(read)
    (bare / "classnames.txt").write_text("red\n")
    with pytest.raises(UserError, match="one class alone"):
        config.build(read)
    (tmp_path / "other.txt").write_text("green\nred\nblue\n")
    config, read = config_of(data, classes=str(tmp_path / "other.txt"))
    with pytest.raises(UserError, match="another order"):
        config.build(read)
    (tmp_path / "words.txt").write_text("Red\nGreen\nBlue\n")
    config, read = config_of(data, classes=str(tmp_path / "words.txt"))
    assert config.build(read).names == ("Red", "Green", "Blue")


def test_a_table_names_its_classes_unless_its_labels_are_indices(tmp_path):
    (tmp_path / "0.png").write_bytes(encode(photo(0, 8, 8)))
    table, names = tmp_path / "t.csv", tmp_path / "names.txt"
    table.write_text("path,class\n0.png,red\n1.png,blue\n")
    files = FilesConfig(label_column="class", caption_columns=())
    data = DataConfig(train=str(table), files=files)
    assert ClassifyConfig().build(data).names == ("blue", "red")
    table.write_text("path,class\n0.png,0\n1.png,1\n2.png,0\n")
    with pytest.raises(UserError, match=r"task\.classes is missing"):
        ClassifyConfig().build(data)
    names.write_text("red\nblue\n")
    assert ClassifyConfig(classes=str(names)).build(data).names == ("red", "blue")


def test_a_run_goes_on_with_its_own_classes_only(data, tmp_path, monkeypatch, capsys):
    shards = tmp_path / "shards"
    shutil.copytree(data, shards)
    assert run(monkeypatch, classify_flags(shards, tmp_path / "run", 2)) == 0
    (shards / "classnames.txt").write_text("red\nblue\ngreen\n")
    capsys.readouterr()
    assert run(monkeypatch, classify_flags(shards, tmp_path / "run", 4)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "class 1 is 'blue', was 'green'" in line


def towerless(flags):
    """Flags that leave the image tower to the model that the run starts from."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for pair in pairs if not pair[0].startswith("--task.model.image") for word in pair]


@pytest.fixture(scope="module")
def sources(model_dir, tmp_path_factory):
    """A contrastive model, a classifier of other classes, and open_clip's, with their towers."""
    import open_clip

    root = tmp_path_factory.mktemp("sources")
    torch.manual_seed(1)
    classifier = NaViTClassifier(ClassifierConfig(TOWER), ("a", "b"), Preprocess(16))
    classifier.save_pretrained(root / "classifier")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (root / "tiny-classify-source.json").write_text(json.dumps(config))
    open_clip.add_model_config(root / "tiny-classify-source.json")
    theirs = open_clip.create_model("tiny-classify-source", load_weights=False)
    torch.save(theirs.state_dict(), root / "weights.pt")
    ours = NaViTCLIP.from_open_clip("tiny-classify-source", root / "weights.pt")
    return {
        "contrastive": ({"init__model": model_dir}, NaViTCLIP.from_directory(model_dir).image),
        "classifier": ({"init__model": root / "classifier"}, classifier.image),
        "open_clip": (
            {"init__model": "open_clip:tiny-classify-source", "init__weights": root / "weights.pt"},
            ours.image,
        ),
    }


@pytest.mark.parametrize("source", ["contrastive", "classifier", "open_clip"])
def test_a_run_starts_from_a_tower_under_a_new_head(data, tmp_path, monkeypatch, sources, source):
    given, tower = sources[source]
    still = {"optim__lr": 1e-30, "optim__weight_decay": 0.0}
    flags = towerless(classify_flags(data, tmp_path / "run", 1, **given, **still))
    assert run(monkeypatch, flags) == 0
    found = NaViTClassifier.from_pretrained(tmp_path / "run/model")
    assert found.config.image == tower.config
    assert found.classes == NAMES
    for name, weight in tower.state_dict().items():
        torch.testing.assert_close(found.image.state_dict()[name], weight, rtol=0, atol=1e-29)
    assert found.head.weight.abs().max() < 1e-29
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(3), rel=1e-5)


def test_fine_tuning_with_sgd_goes_on_without_its_source(data, tmp_path, monkeypatch, capsys):
    source = tmp_path / "source"
    torch.manual_seed(1)
    image = replace(TOWER, patch_size=8)
    NaViTClassifier(ClassifierConfig(image), ("a", "b"), Preprocess(16)).save_pretrained(source)
    options = {
        "init__model": source,
        "optim__name": "torch.SGD",
        "optim__args": '{"momentum": 0.9}',
        "optim__lr": 0.01,
        "optim__layer_decay": 0.8,
        "task__drop_path": 0.5,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(monkeypatch, towerless(classify_flags(data, whole, 4, **options))) == 0
    assert run(monkeypatch, towerless(classify_flags(data, parts, 2, **options))) == 0
    shutil.rmtree(source)
    assert run(monkeypatch, towerless(classify_flags(data, parts, 4, **options))) == 0
    curves = [[(v["loss"], v["grad_norm"]) for v in metrics(one)] for one in (whole, parts)]
    assert curves[0] == curves[1]


def test_a_tower_given_beside_its_source_must_agree(data, tmp_path, monkeypatch, capsys, sources):
    given, _ = sources["classifier"]
    assert run(monkeypatch, classify_flags(data, tmp_path / "run", **given)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "task.model.image.patch_size=8 disagrees with init.model=" in line


def test_a_contrastive_run_starts_from_the_tower_of_a_classifier(
    data, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(1)
    source = NaViTClassifier(ClassifierConfig(TOWER), ("a", "b"), Preprocess(16))
    source.save_pretrained(tmp_path / "source")
    text = TextTowerConfig(50, encoder=EncoderConfig(16, 1, 2))
    task = ContrastiveConfig(model=CLIPConfig(8, TOWER, text)).build(DataConfig())
    model, tokenizer = task.start_from(InitConfig(str(tmp_path / "source")))
    assert tokenizer is None
    for name, weight in source.image.state_dict().items():
        assert torch.equal(model.image.state_dict()[name], weight), name
    # Which gives no tokenizer.
    flags = ["--run_dir", str(tmp_path / "run"), "--steps", "1", "--data.train", str(data)]
    assert run(monkeypatch, [*flags, "--init.model", str(tmp_path / "source")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "give `tokenizer`" in line


def test_the_recipes_parse(data, tmp_path):
    for recipe in ("classify_small", "navit_b16_classify", "vit_b16", "vit_l16"):
        config, _ = parse_config(["--config", recipe, "--data.train", "shards"])
        assert isinstance(config.task, ClassifyConfig)
    assert config.task.model.hidden == config.task.model.image.encoder.width == 1024
    NaViTClassifier(ClassifierConfig(TOWER), ("a", "b"), Preprocess(16)).save_pretrained(tmp_path)
    config, _ = parse_config(["--config", "finetune_classify", "--init.model", str(tmp_path)])
    assert config.task.model.image == TOWER
    assert config.optim.name == "torch.SGD"
    config, _ = parse_config(["--config", "finetune_masked_image", "--init.model", str(tmp_path)])
    assert (config.task.drop_path, config.optim.layer_decay) == (0.1, 0.65)
    plain = ImageTowerConfig(
        16, TOWER.encoder, PositionConfig("learned_1d", table_side=14), "cls", class_position=True
    )
    source = NaViTClassifier(ClassifierConfig(plain, hidden=8), ("a", "b"), Preprocess(196))
    source.save_pretrained(tmp_path / "vit")
    flags = ["--config", "vit_finetune_384", "--data.train", str(data)]
    config, _ = parse_config([*flags, "--init.model", str(tmp_path / "vit")])
    assert config.data.augment == AugmentConfig(0.05, flip=0.5)
    model, _ = config.task.build(config.data).start_from(config.init)
    assert model.hidden is None  # left behind
    assert torch.equal(model.image.class_position, source.image.class_position)
