"""Encoded bytes to pixels: every kind of image that the web holds, and what only looks like one."""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile
from shard_factory import HTML, encode, photo, png_of_size

from navit_clip.data import decode
from navit_clip.data.decode import EncodedImage, SkipSampleError, find_image, patchify

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}}


def pixels_of(data: bytes) -> np.ndarray:
    """Upright pixels at the native size."""
    image = EncodedImage(data)
    return image.pixels(image.height, image.width)


def reason_of(data: bytes) -> str:
    """Why the bytes are refused, at the header or at the pixels."""
    with pytest.raises(SkipSampleError) as caught:
        pixels_of(data)
    return caught.value.reason


# Formats


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_the_pixels_that_went_in(kind):
    image = photo(0, 21, 34)
    data = encode(image, kind, **LOSSLESS[kind])
    encoded = EncodedImage(data)
    assert (encoded.height, encoded.width) == (21, 34)
    np.testing.assert_array_equal(pixels_of(data), np.asarray(image))


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}), ("GIF", {})]
)
def test_lossy_formats_come_close(kind, options):
    image = photo(0, 64, 48)
    difference = np.abs(pixels_of(encode(image, kind, **options)).astype(int) - np.asarray(image))
    assert difference.mean() < (12 if kind == "GIF" else 3)


def test_the_content_counts_and_not_the_name():
    image = photo(0, 8, 8)
    np.testing.assert_array_equal(
        pixels_of(find_image({"jpg": encode(image, "PNG")})), np.asarray(image)
    )


def test_pixels_are_uint8_rgb_of_the_size_asked_for():
    pixels = EncodedImage(encode(photo(0, 90, 60), "JPEG")).pixels(48, 32)
    assert pixels.shape == (48, 32, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True})])
def test_animations_give_their_first_frame(kind, options):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue", "lime")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    np.testing.assert_array_equal(pixels_of(data), np.asarray(frames[0]))


# Colour modes


def test_cmyk_jpeg():
    colours = {"red": (255, 0, 0), "white": (255, 255, 255), "black": (0, 0, 0)}
    for name, rgb in colours.items():
        data = encode(Image.new("RGB", (16, 16), name).convert("CMYK"), "JPEG", quality=95)
        assert Image.open(io.BytesIO(data)).mode == "CMYK"
        assert np.abs(pixels_of(data).astype(int) - rgb).max() <= 6


def test_grey_and_bilevel():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(pixels_of(encode(Image.fromarray(grey))), expected)
    bilevel = Image.fromarray(grey).point(lambda value: 255 * (value > 127), "1")
    np.testing.assert_array_equal(
        pixels_of(encode(bilevel)), np.where(expected > 127, 255, 0).astype(np.uint8)
    )


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    grey = np.array([[0, 257, 25_700, 65_535], [128, 129, 40_000, 1_000]], dtype=np.uint16)
    pixels = pixels_of(encode(Image.fromarray(grey)))
    expected = np.round(grey / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=-1))


def test_a_palette():
    image = photo(0, 20, 20).quantize(16)
    np.testing.assert_array_equal(pixels_of(encode(image)), np.asarray(image.convert("RGB")))


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_laid_on_white(kind):
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (9, 11, 4), dtype=np.uint8)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = pixels_of(encode(Image.fromarray(rgba), kind, **options))
    assert np.abs(pixels - on_white(rgba[..., :3], rgba[..., 3])).max() <= 1
    assert (pixels[0] == 255).all()
    np.testing.assert_array_equal(pixels[1], rgba[1, :, :3])


def test_grey_with_alpha_is_laid_on_white():
    grey = np.random.default_rng(0).integers(0, 256, (9, 11, 2), dtype=np.uint8)
    image = Image.merge("LA", [Image.fromarray(grey[..., i]) for i in (0, 1)])
    pixels = pixels_of(encode(image))
    assert np.abs(pixels - on_white(np.repeat(grey[..., :1], 3, -1), grey[..., 1])).max() <= 1


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x80"])
def test_a_palette_with_transparency_is_laid_on_white(transparency):
    index = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    palette = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    image = Image.fromarray(index)
    image.putpalette(palette.tobytes())
    pixels = pixels_of(encode(image, transparency=transparency))
    alpha = np.array([255, 0, 255 if transparency == 1 else 128], dtype=np.uint8)
    assert np.abs(pixels - on_white(palette[index], alpha[index])).max() <= 1


def test_a_transparent_colour_is_laid_on_white():
    rgb = np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8)
    pixels = pixels_of(encode(Image.fromarray(rgb), transparency=(255, 0, 0)))
    assert pixels.tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_a_transparent_gif_is_laid_on_white():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 50])
    pixels = pixels_of(encode(image, "GIF", transparency=0))
    assert pixels.tolist() == [[[255, 255, 255], [200, 100, 50]]]


# Orientation: what a camera stores so that turning it as EXIF says gives the upright image.

STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


def sideways_file(upright: np.ndarray, orientation: int, kind: str, **options) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    return encode(stored, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_orientation_is_undone(orientation, kind):
    upright = np.asarray(photo(0, 14, 22))
    data = sideways_file(upright, orientation, kind, **LOSSLESS[kind])
    encoded = EncodedImage(data)
    assert (encoded.height, encoded.width) == (14, 22)
    np.testing.assert_array_equal(encoded.pixels(14, 22), upright)


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone_in_a_reduced_jpeg(orientation):
    upright = photo(0, 160, 320)
    data = sideways_file(np.asarray(upright), orientation, "JPEG", quality=95)
    encoded = EncodedImage(data)
    assert (encoded.height, encoded.width) == (160, 320)
    small = np.asarray(upright.resize((40, 20), Image.Resampling.BOX)).astype(int)
    assert np.abs(encoded.pixels(20, 40) - small).mean() < 4


def test_an_orientation_that_does_not_exist_is_ignored():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 99
    image = photo(0, 10, 20)
    np.testing.assert_array_equal(pixels_of(encode(image, exif=exif)), np.asarray(image))


# Reduced decoding


def textured(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(photo(1, height, width)) + noise).clip(0, 255).astype("u1"))


@pytest.mark.parametrize("size", [(64, 96), (63, 95), (100, 150), (250, 380), (16, 16), (500, 48)])
def test_a_reduced_decode_is_close_to_a_full_one(size):
    data = encode(textured(512, 768), "JPEG", quality=90)
    reduced = EncodedImage(data).pixels(*size).astype(int)
    full = EncodedImage(data).pixels(*size, reduced=False)
    assert np.abs(reduced - full).mean() < 2.5
    assert abs((reduced - full).mean()) < 0.5


def test_a_reduced_decode_never_falls_below_the_size_asked_for(monkeypatch):
    sizes = []
    load = ImageFile.ImageFile.load

    def spy(self):
        sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", spy)
    upright = np.asarray(photo(0, 512, 768))
    for (height, width), decoded in {
        (64, 96): (64, 96),
        (65, 96): (128, 192),
        (300, 20): (512, 768),
        (20, 384): (256, 384),
        (512, 768): (512, 768),
    }.items():
        for orientation in (1, 6):
            sizes.clear()
            EncodedImage(sideways_file(upright, orientation, "JPEG")).pixels(height, width)
            assert sizes[-1] == (decoded if orientation == 6 else decoded[::-1])  # columns first


def test_one_full_decode_serves_many_sizes_in_any_order():
    data = encode(textured(256, 256), "JPEG")
    image = EncodedImage(data)
    for size in ((32, 32), (128, 160), (16, 16), (256, 256)):
        np.testing.assert_array_equal(
            image.pixels(*size, reduced=False), EncodedImage(data).pixels(*size, reduced=False)
        )


def test_shrinking_averages_instead_of_picking():
    checks = np.indices((128, 128)).sum(0) % 2 * 255
    data = encode(Image.fromarray(np.repeat(checks[..., None], 3, -1).astype(np.uint8)))
    assert np.abs(EncodedImage(data).pixels(16, 16).astype(int) - 127).max() <= 2


# What is refused


@pytest.mark.parametrize("data", [b"", b"\xff", HTML, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_unreadable(data):
    assert reason_of(data) == "unreadable_image"


def test_formats_that_start_other_programs_are_not_opened():
    postscript = encode(photo(0, 8, 8), "EPS")
    assert postscript.startswith(b"%!PS")
    assert reason_of(postscript) == "unreadable_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files_are_unreadable(kind, share):
    data = encode(textured(64, 64), kind)
    assert reason_of(data[: int(share * len(data))]) == "unreadable_image"


FILES = [
    encode(photo(2, 24, 24), kind, **options)
    for kind, options in (("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}))
]


@settings(max_examples=150)
@given(
    file=st.sampled_from(FILES),
    cut=st.floats(0, 1),
    damage=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4),
)
def test_damaged_files_give_pixels_or_a_reason(file, cut, damage):
    data = bytearray(file[: int(cut * len(file))])
    for place, value in damage:
        if data:
            data[int(place * len(data))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's of corrupt EXIF
        with contextlib.suppress(SkipSampleError):
            assert EncodedImage(bytes(data)).pixels(16, 8).shape == (16, 8, 3)


@pytest.mark.parametrize("side", [30_000, 12_000])
def test_too_many_pixels_are_refused_from_the_header(side, monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SkipSampleError) as caught:
            EncodedImage(png_of_size(side, side))
    assert caught.value.reason == "too_large"


def test_the_caps_are_inclusive(monkeypatch):
    data = encode(photo(0, 10, 10))
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    assert pixels_of(data).shape == (10, 10, 3)
    assert reason_of(encode(photo(0, 10, 11))) == "too_large"
    monkeypatch.setattr(decode, "MAX_BYTES", len(data))
    assert pixels_of(data).shape == (10, 10, 3)
    assert reason_of(data + b"\0") == "too_large"


def test_a_reason_survives_the_way_out_of_a_worker_process():
    error = pickle.loads(pickle.dumps(SkipSampleError("too_large", "a/b.jpg: 9 pixels")))
    assert error.reason == "too_large"
    assert str(error) == "too_large: a/b.jpg: 9 pixels"


def test_a_sample_without_an_image():
    with pytest.raises(SkipSampleError) as caught:
        find_image({"txt": b"words", "json": b"{}"})
    assert caught.value.reason == "no_image"
    assert "txt, json" in str(caught.value)
    with pytest.raises(SkipSampleError):
        find_image({})


# Patches


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_patches_are_those_of_a_loop(rows, columns, patch, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (rows * patch, columns * patch, 3), dtype=np.uint8)
    expected = [
        [int(pixels[r * patch + y, c * patch + x, k])
         for y in range(patch) for x in range(patch) for k in range(3)]
        for r in range(rows) for c in range(columns)
    ]  # fmt: skip
    assert patchify(pixels, patch).tolist() == expected
