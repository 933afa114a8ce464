"""Answers of the server are the model's, and whatever a client sends gets an answer of one form."""

from __future__ import annotations

import base64
import json
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageFile
from shard_factory import encode, photo

from navit_clip.classifier import NaViTClassifier
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.models.classifier import ClassifierConfig
from navit_clip.serving import __main__ as command
from navit_clip.serving.config import BatchConfig, Limits

pytest.importorskip("starlette", reason="starlette (extra serve) is not installed")
pytest.importorskip("uvicorn", reason="uvicorn (extra serve) is not installed")
pytest.importorskip("prometheus_client", reason="prometheus_client (extra serve) is not installed")

from starlette.testclient import TestClient

from navit_clip.serving.app import Service

LIMITS = Limits(
    max_inputs=20,
    max_request_tokens=150,
    max_bytes=2_000_000,
    max_characters=1000,
    max_pixels=60_000,
)
PICTURES = [encode(photo(i, *size), form) for i, (size, form) in enumerate(
    [((40, 60), "JPEG"), ((16, 16), "PNG"), ((9, 200), "PNG"), ((100, 30), "JPEG")]
)]  # fmt: skip
TEXTS = ["a red square", "", "two green stripes " * 30]


@pytest.fixture(scope="module")
def model(model_dir: Path) -> NaViTCLIP:
    return NaViTCLIP.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def client(model: NaViTCLIP) -> Iterator[TestClient]:
    # A lone client waits for no other, however long it might.
    app = Service(model, "tiny", BatchConfig(wait_ms=59_999), LIMITS).app()
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def in_base64(image: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(image).decode()}


def vectors(response: Any) -> torch.Tensor:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return torch.tensor([one["embedding"] for one in data])


def refused(response: Any, status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code"}
    assert "\n" not in error["message"]
    return str(error["message"])


def test_texts_and_images_of_one_request_get_the_models_vectors(client, model):
    inputs = [TEXTS[0], in_base64(PICTURES[0]), {"text": TEXTS[1]}, *map(in_base64, PICTURES[1:])]
    response = client.post("/v1/embeddings", json={"model": "x", "input": [*inputs, TEXTS[2]]})
    found = vectors(response)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(found[[0, 2, 6]], model.encode_text(TEXTS), **close)
    torch.testing.assert_close(found[[1, 3, 4, 5]], model.encode_image(PICTURES), **close)
    answer = response.json()
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 30


def test_one_text_a_data_address_a_file_and_vectors_in_base64(client, model):
    text = vectors(client.post("/v1/embeddings", json={"input": TEXTS[0]}))
    torch.testing.assert_close(text, model.encode_text(TEXTS[:1]), rtol=0, atol=1e-5)
    address = f"data:image/png;base64,{in_base64(PICTURES[1])['image']}"
    request = {"input": {"image": address}, "encoding_format": "base64"}
    (one,) = client.post("/v1/embeddings", json=request).json()["data"]
    vector = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
    upload = client.post(
        "/v1/embeddings", content=PICTURES[1], headers={"Content-Type": "image/png"}
    )
    assert vectors(upload)[0].tolist() == vector.tolist()


def test_classification_is_the_models(client, model):
    labels, templates = ["dog", "cat", "a bird"], ["a photo of {}", "{} drawn"]
    for extra in ({}, {"templates": templates}):
        request = {"input": [*map(in_base64, PICTURES[:2])], "labels": labels, **extra}
        response = client.post("/v1/classify", json=request)
        assert response.status_code == 200, response.text
        expected = model.classify(PICTURES[:2], labels, **extra)
        for one, row in zip(response.json()["data"], expected, strict=True):
            assert list(one["scores"]) == labels
            torch.testing.assert_close(torch.tensor([*one["scores"].values()]), row)
            assert one["label"] == labels[row.argmax()]
    upload = client.post(
        "/v1/classify?label=dog&label=cat",
        content=PICTURES[0],
        headers={"Content-Type": "image/jpeg"},
    )
    assert set(upload.json()["data"][0]["scores"]) == {"dog", "cat"}


def test_a_classifier_answers_with_its_own_classes(model):
    torch.manual_seed(0)
    classifier = NaViTClassifier(
        ClassifierConfig(image=model.config.image), ["red", "blue"], Preprocess(12)
    ).eval()
    app = Service(classifier, "classifier", BatchConfig(), LIMITS).app()
    with TestClient(app) as client:
        request = {"input": in_base64(PICTURES[0])}
        (one,) = client.post("/v1/classify", json=request).json()["data"]
        expected = classifier.classify(PICTURES[:1])[0]
        torch.testing.assert_close(torch.tensor([*one["scores"].values()]), expected)
        found = vectors(client.post("/v1/embeddings", json=request))
        torch.testing.assert_close(found, classifier.features(PICTURES[:1]))
        labels = client.post("/v1/classify", json={**request, "labels": ["a"]})
        assert "has its own" in refused(labels)
        text = client.post("/v1/embeddings", json={"input": "red"})
        assert "input[0]: this model reads images alone" in refused(text)


def test_classes_of_one_name_keep_their_scores(model):
    torch.manual_seed(0)
    names = ["missile", "dog", "missile"]
    config = ClassifierConfig(image=model.config.image)
    classifier = NaViTClassifier(config, names, Preprocess(12)).eval()
    with TestClient(Service(classifier, "c", BatchConfig(), LIMITS).app()) as client:
        (one,) = client.post("/v1/classify", json={"input": in_base64(PICTURES[0])}).json()["data"]
    assert [*one["scores"]] == ["missile (0)", "dog", "missile (2)"]
    assert one["label"] == max(one["scores"], key=one["scores"].get)
    torch.testing.assert_close(
        torch.tensor([*one["scores"].values()]), classifier.classify(PICTURES[:1])[0]
    )


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_pixels_are_counted_before_any_is_decoded(client, monkeypatch, form):
    def load(*args: Any) -> None:
        raise AssertionError("decoded")

    images = [in_base64(encode(photo(i, 150, 150), form)) for i in range(3)]
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr("simplejpeg.decode_jpeg", load)
    answer = client.post("/v1/embeddings", json={"input": images})
    assert "67,500 pixels, at most 60,000" in refused(answer)


def gif_bomb() -> bytes:
    """A few bytes that say they are 9,000 × 9,000 pixels."""
    side = 9000
    screen = struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x00;"


def png_bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(side * (3 * side + 1)), 9))
    return b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")


PIXEL = in_base64(PICTURES[1])
MISTAKES: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "the request is no JSON"),
    "not UTF-8": (b'{"input": "\xff"}', "the request is no JSON"),
    "brackets": (b"[" * 100_000, "the request is no JSON"),
    "digits": (b'{"input": ' + b"1" * 5000 + b"}", "the request is no JSON"),
    "list": ([], "no JSON object"),
    "unknown key": ({"input": "a", "dimensions": 3}, "unknown key 'dimensions'"),
    "no input": ({}, "input is missing"),
    "nothing": ({"input": []}, "input has 0 entries, expected 1 to 20"),
    "number": ({"input": ["a", 1]}, "input[1] must be a string"),
    "nested": ({"input": [["a"]]}, "input[0] must be a string"),
    "two": ({"input": [{"text": "a", "image": "b"}]}, "input[0] must be a string"),
    "format": ({"input": "a", "encoding_format": "int8"}, "encoding_format must be float"),
    "many images": ({"input": [{"image": ""}] * 10_000}, "input has 10,000 entries"),
    "long text": ({"input": ["a", "b" * 1_000_000]}, "input[1] has 1,000,000 characters"),
    "half a character": (b'{"input": "\\ud800"}', "input[0] has half a character"),
    "tokens": ({"input": ["red square " * 20] * 12}, "more than 150 tokens together"),
    "no base64": ({"input": {"image": "?"}}, "input[0] is no base64"),
    "no image": ({"input": {"image": "YWJj"}}, "input[0]: "),
    "cut image": ({"input": in_base64(PICTURES[0][:-200])}, "input[0]: "),
    "plain data": ({"input": {"image": "data:image/png,abc"}}, "must be in base64"),
    "address": ({"input": {"image": "http://127.0.0.1/"}}, "fetches no addresses"),
    "GIF bomb": ({"input": in_base64(gif_bomb())}, "9000×9000 pixels exceed"),
    "PNG bomb": ({"input": in_base64(png_bomb(2000))}, "2000×2000 pixels exceed"),
    "pixels": ({"input": [in_base64(png_bomb(150))] * 3}, "67,500 pixels, at most 60,000"),
}
LABELS: dict[str, tuple[Any, str]] = {
    "no labels": ({"input": PIXEL}, "labels must be a list of strings"),
    "empty labels": ({"input": PIXEL, "labels": []}, "labels has 0 entries"),
    "twice": ({"input": PIXEL, "labels": ["a", "a"]}, "labels has a label twice"),
    "text": ({"input": {"text": "a"}, "labels": ["a"]}, "input[0] must be an image"),
    "template": ({"input": PIXEL, "labels": ["a"], "templates": ["b"]}, "templates must each have"),
    "long labels": (
        {"input": PIXEL, "labels": ["a" * 900], "templates": ["{}" * 400]},
        "the longest prompt has 360,000 characters, at most 1,000",
    ),
    "half a label": (
        b'{"input": ' + json.dumps(PIXEL).encode() + b', "labels": ["a", "\\ud800"]}',
        "a prompt of labels[1] has half a character",
    ),
    "prompts": (
        {"input": PIXEL, "labels": ["a", "b", "c", "d"], "templates": ["{}"] * 5},
        "more than 20 together",
    ),
}


def send(client: TestClient, path: str, request: Any) -> Any:
    content = request if isinstance(request, bytes) else json.dumps(request)
    return client.post(path, content=content)


@pytest.mark.parametrize(("request_", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_in_one_line(client, request_, message):
    assert message in refused(send(client, "/v1/embeddings", request_))


@pytest.mark.parametrize(("request_", "message"), LABELS.values(), ids=LABELS)
def test_a_mistake_about_labels_is_named_in_one_line(client, request_, message):
    assert message in refused(send(client, "/v1/classify", request_))


def test_other_paths_methods_and_sizes(client):
    refused(client.get("/v1/nothing"), 404)
    refused(client.get("/v1/embeddings"), 405)
    large = client.post("/v1/embeddings", content=b"a" * 2_000_001)
    assert "more than 2,000,000 bytes" in refused(large, 413)
    parts = client.post("/v1/embeddings", content=iter([b"a" * 1_500_000] * 2))
    assert "more than 2,000,000 bytes" in refused(parts, 413)


def test_the_server_says_how_it_is(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    client.post("/v1/embeddings", json={"input": "a"})
    text = client.get("/metrics").text
    assert 'navit_requests_total{path="/v1/embeddings",status="200"}' in text
    assert "navit_batch_tokens_bucket" in text
    assert "navit_waiting_tokens 0.0" in text


def test_a_failing_model_is_an_answer_and_the_next_request_is_served(model, monkeypatch):
    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    app = Service(model, "tiny", BatchConfig(wait_ms=0), LIMITS).app()
    with TestClient(app, raise_server_exceptions=False) as client:
        with monkeypatch.context() as patched:
            patched.setattr("navit_clip.serving.embed.ids_vectors", fail)
            answer = client.post("/v1/embeddings", json={"input": "a"})
        assert "memory" not in refused(answer, 500)
        assert 'status="500"' in client.get("/metrics").text
        assert len(vectors(client.post("/v1/embeddings", json={"input": "a"}))) == 1


@pytest.mark.parametrize("field", ["max_inputs", "max_pixels", "body_seconds"])
def test_limits_are_checked(field):
    with pytest.raises(ValueError, match=f"{field} must be"):
        replace(LIMITS, **{field: 0})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-inputs", "0"], "--max-inputs must be positive, got 0"),
        (["--wait-ms", "-1"], "--wait-ms must be from 0"),
        (["--port", "99999"], "cannot listen at --host 127.0.0.1 --port 99999"),
        (["--host", "203.0.113.7"], "cannot listen at --host 203.0.113.7"),
    ],
)
def test_flags_are_checked(flags, message, model_dir, capsys):
    with pytest.raises(SystemExit):
        command.main(["--model", str(model_dir), *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named(package, model_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        command.main(["--model", str(model_dir)])
    assert f"serving needs the package {package}: pip install 'navit-clip[serve]'" in (
        capsys.readouterr().err
    )
