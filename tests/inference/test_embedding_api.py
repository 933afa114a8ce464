"""The Python API: any image in any form, the same vectors as one image at a time by hand."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from embedding_cases import (
    ARRAYS,
    BUDGET,
    GOOD,
    PATCH,
    TEXTS,
    by_hand,
)
from image_cases import cmyk_and_ycck, sideways_file
from PIL import Image
from shard_factory import encode, photo

from navit_clip import NaViTCLIP
from navit_clip.data.decode import EncodedImage
from navit_clip.inference.embed import image_vectors, size_image, text_vectors
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.patch_embed import resize_kernel
from navit_clip.models.position import PositionConfig
from navit_clip.models.rope import RotaryConfig


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.usefixtures("small_streams")
def test_images_are_embedded_as_each_alone_and_in_their_order(model, normalize):
    expected = torch.stack([by_hand(model, pixels) for pixels in ARRAYS])
    if normalize:
        expected = F.normalize(expected, dim=-1)
    actual = model.encode_image(ARRAYS, normalize=normalize)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert actual.dtype == torch.float32
    reverse = model.encode_image(ARRAYS[::-1], normalize=normalize)
    torch.testing.assert_close(reverse.flip(0), expected, rtol=1e-4, atol=1e-5)


def test_the_default_streams_give_the_same(model):
    expected = F.normalize(torch.stack([by_hand(model, pixels) for pixels in ARRAYS]), dim=-1)
    torch.testing.assert_close(model.encode_image(ARRAYS), expected, rtol=1e-4, atol=1e-5)


def test_every_form_of_an_image_gives_the_same_vector(model, tmp_path):
    pixels = ARRAYS[-1]
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [
        pixels,
        pixels[:, ::-1][:, ::-1],  # not contiguous
        Image.fromarray(pixels),
        Image.open(path),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        pixels / 255,
        (pixels / 255).astype(np.float32),
        path,
        str(path),
        channels_first,
        channels_first / 255,
        (channels_first / 255).double().requires_grad_(),
        (channels_first / 255).half(),
    ]
    vectors = model.encode_image(forms)
    for index, vector in enumerate(vectors):
        torch.testing.assert_close(vector, vectors[0], rtol=1e-5, atol=1e-6, msg=f"form {index}")
    reference = F.normalize(by_hand(model, pixels), dim=-1)
    torch.testing.assert_close(vectors[0], reference, rtol=1e-4, atol=1e-5)


def test_grey_and_opacity_in_arrays_and_tensors(model):
    grey = ARRAYS[-1][..., 0]
    opaque = np.dstack([ARRAYS[-1], np.full_like(grey, 255)])
    invisible = np.dstack([ARRAYS[-1], np.zeros_like(grey)])
    expected = model.encode_image(
        [np.dstack([grey] * 3), ARRAYS[-1], np.full_like(ARRAYS[-1], 255)]
    )
    for forms in (
        [grey, opaque, invisible],
        [grey[..., None], opaque, invisible],
        [torch.from_numpy(np.atleast_3d(a)).permute(2, 0, 1) for a in (grey, opaque, invisible)],
        [torch.from_numpy(grey), opaque, invisible],
    ):
        torch.testing.assert_close(model.encode_image(forms), expected, rtol=1e-5, atol=1e-6)


def odd_files() -> dict[str, bytes]:
    base = photo(5, 40, 56)
    rng = np.random.default_rng(0)
    alpha = Image.fromarray(rng.integers(0, 256, (40, 56), dtype=np.uint8))
    palette = base.quantize(16)
    deep = Image.fromarray(rng.integers(0, 65536, (40, 56), dtype=np.uint16))
    cmyk, ycck, _ = cmyk_and_ycck()
    files = {
        "grey": encode(base.convert("L"), "PNG"),
        "one bit": encode(base.convert("1"), "PNG"),
        "16-bit": encode(deep, "PNG"),
        "palette": encode(palette, "PNG"),
        "transparent palette": encode(palette, "PNG", transparency=3),
        "grey with opacity": encode(Image.merge("LA", (base.convert("L"), alpha)), "PNG"),
        "opacity": encode(Image.merge("RGBA", (*base.split(), alpha)), "PNG"),
        "cmyk": cmyk,
        "ycck": ycck,
    }
    upright = np.asarray(base)
    for orientation in range(1, 9):
        files[f"exif {orientation}"] = sideways_file(upright, orientation, "PNG")
    return files


def test_pillow_images_of_every_mode_are_read_as_their_files_are(model):
    files = odd_files()
    opened = model.encode_image([Image.open(io.BytesIO(data)) for data in files.values()])
    encoded = model.encode_image(files.values())
    for name, actual, expected in zip(files, opened, encoded, strict=True):
        assert torch.allclose(actual, expected, atol=1e-6), name
    turned = [i for i, name in enumerate(files) if name.startswith("exif")]
    assert torch.allclose(encoded[turned], encoded[turned[:1]], atol=1e-6)


def test_files_are_seen_as_the_evaluators_see_them(model):
    files = [encode(photo(i, 30 + i, 90 - i), "JPEG") for i in range(4)]
    sized = [size_image(EncodedImage(data), model.config.image, BUDGET) for data in files]
    assert torch.equal(model.encode_image(files), image_vectors(model, sized))
    assert torch.equal(model.encode_text(TEXTS), text_vectors(model, model.tokenizer, TEXTS))


@pytest.mark.parametrize("max_tokens", [1, 4, 30])
def test_a_token_limit_of_the_callers(model, max_tokens):
    expected = torch.stack([by_hand(model, pixels, max_tokens) for pixels in ARRAYS])
    actual = model.encode_image(ARRAYS, max_tokens=max_tokens, normalize=False)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_squares_squashes(model):
    squares = copy.copy(model)
    squares.preprocess = Preprocess(9, square=True)
    expected = torch.stack([by_hand(model, pixels, 9, square=True) for pixels in ARRAYS])
    actual = squares.encode_image(ARRAYS, normalize=False)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", [4, 12])
def test_patches_of_another_size_are_embedded_by_a_resized_kernel(model, patch_size):
    def with_image(**changes: object) -> NaViTCLIP:
        changed = replace(model.config.image, **changes)
        return NaViTCLIP(replace(model.config, image=changed), preprocess=Preprocess(BUDGET))

    positions = {
        "position": PositionConfig("learned_1d", table_side=4),
        "rotary": RotaryConfig("axial", "normalised"),
    }
    flexible, fixed = with_image(**positions), with_image(patch_size=patch_size, **positions)
    weights = flexible.state_dict()
    weights["image.embed.weight"] = resize_kernel(weights["image.embed.weight"], PATCH, patch_size)
    fixed.load_state_dict(weights)
    same_area = round(BUDGET * PATCH**2 / patch_size**2)
    found = flexible.encode_image(ARRAYS, patch_size=patch_size)
    torch.testing.assert_close(found, fixed.encode_image(ARRAYS, same_area))
    assert not torch.allclose(found, flexible.encode_image(ARRAYS), atol=1e-2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        flexible.encode_image(ARRAYS, patch_size=0)


def test_positions_that_count_patches_have_one_size_of_them(model):
    assert torch.equal(model.encode_image(ARRAYS, patch_size=PATCH), model.encode_image(ARRAYS))
    with pytest.raises(ValueError, match=r"^patches of 4 pixels need positions .* of 8: image.pos"):
        model.encode_image(ARRAYS, patch_size=4)


@pytest.mark.usefixtures("small_streams")
def test_an_iterator_is_not_held_as_a_whole(model, monkeypatch):
    pulled, seen = 0, []

    def images():
        nonlocal pulled
        for pixels in ARRAYS:
            pulled += 1
            yield pixels

    embed = model.embed_images
    monkeypatch.setattr(
        model, "embed_images", lambda packed: (seen.append(pulled), embed(packed))[1]
    )
    expected = F.normalize(torch.stack([by_hand(model, pixels) for pixels in ARRAYS]), dim=-1)
    torch.testing.assert_close(model.encode_image(images()), expected, rtol=1e-4, atol=1e-5)
    # At 12 tokens an image, a stream of 25 is left over at most from the window before.
    assert seen[0] <= 2 * 5
    assert len(seen) > 4


def test_nothing_in_nothing_out(model):
    assert model.encode_image([]).shape == (0, 8)
    assert model.encode_text([]).shape == (0, 8)
    assert model.similarity([], []).shape == (0, 0)
    assert model.similarity(ARRAYS[:2], []).shape == (2, 0)
    assert model.classify([], ["a", "b"]).shape == (0, 2)


PNG = encode(Image.fromarray(GOOD), "PNG")
BAD_IMAGES = {
    "a number": (3, "int is no image: give a PIL image"),
    "nothing": (None, "NoneType is no image"),
    "float array": (GOOD * 1.0, r"a float array with values from 0 to 255: give \[0, 1\]"),
    "not numbers in an array": (GOOD * math.nan, "values from nan to nan"),
    "a web address": ("https://host/a.jpg", "a web address: download it"),
    "a caption for a path": ("a dog " * 2000, "cannot read it: File name too long"),
    "a zero byte in a path": ("a\0b", "null"),
    "a file of text": (io.StringIO("x"), "opened as text: open it with mode 'rb'"),
    "integers": (GOOD.astype(np.int64), "array of int64: give uint8"),
    "channels first": (GOOD.transpose(2, 0, 1)[:, :7, :9], r"array of shape \(3, 7, 9\): give \[H"),
    "two channels": (GOOD[..., :2], "give \\[H, W, 3\\]"),
    "a line": (GOOD[0, :, 0], "give \\[H, W, 3\\]"),
    "four axes": (GOOD[None], "give \\[H, W, 3\\]"),
    "an empty array": (GOOD[:0], "no pixels"),
    "channels last": (torch.from_numpy(GOOD), r"tensor of shape .* give \[3, H, W\]"),
    "an empty tensor": (torch.zeros(3, 0, 4), "no pixels"),
    "normalised": (torch.linspace(-2, 2, 48).view(3, 4, 4), "values from -2 to 2: give \\[0, 1\\]"),
    "0 to 255 as floats": (torch.full((3, 4, 4), 255.0), "values from 255 to 255"),
    "not numbers": (torch.full((3, 4, 4), math.nan), "values from nan to nan"),
    "long integers": (torch.zeros(3, 4, 4, dtype=torch.int64), "tensor of int64"),
    "floating mode": (Image.new("F", (4, 4)), "mode F has no range"),
    "integers of any range": (Image.fromarray(GOOD[..., 0].astype(np.int32)), "mode I has no"),
    "no path": ("/nowhere/at.jpg", "No such file or directory: '/nowhere/at.jpg'"),
    "no file": (Path("/"), "cannot read it: .*directory"),
    "not an image": (b"<html>", "no known format"),
    "empty bytes": (b"", "no known format"),
    "cut bytes": (PNG[: len(PNG) // 2], "truncated"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_what_is_no_image_is_named_by_its_index(model, case):
    bad, reason = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=rf"images\[2\]: .*{reason}") as caught:
        model.encode_image([GOOD, PNG, bad, GOOD])
    assert "\n" not in str(caught.value)


def test_a_pillow_image_of_a_damaged_file_is_named(model):
    with pytest.raises(ValueError, match=r"images\[0\]: .*truncated"):
        model.encode_image([Image.open(io.BytesIO(PNG[: len(PNG) // 2]))])


@pytest.mark.parametrize("one", [GOOD, "photo.jpg", PNG, Path("x"), Image.fromarray(GOOD)])
def test_one_image_is_no_list_of_images(model, one):
    with pytest.raises(ValueError, match="images must be a list"):
        model.encode_image(one)


def test_a_batch_of_images_in_one_tensor_is_a_list(model):
    batch = torch.from_numpy(np.stack([GOOD, GOOD[::-1]])).permute(0, 3, 1, 2)
    assert torch.equal(model.encode_image(batch), model.encode_image([GOOD, GOOD[::-1]]))


def test_a_token_limit_of_nothing(model):
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        model.encode_image([GOOD], max_tokens=0)
