"""Encoded bytes to pixels: every kind of image that the web holds."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from image_cases import STORED, on_white, pixels_of, sideways_file, textured
from PIL import ExifTags, Image, ImageOps
from shard_factory import encode, photo

from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.data.patches import patchify
from navit_clip.data.patterns import expand_shards
from navit_clip.data.seeding import sample_generator
from navit_clip.data.shards import read_shard
from navit_clip.data.sizing import ResolutionConfig, sample_grid

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}}


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


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone_in_a_reduced_jpeg(orientation):
    upright = photo(0, 160, 320)
    data = sideways_file(np.asarray(upright), orientation, "JPEG", quality=95)
    encoded = EncodedImage(data)
    assert (encoded.height, encoded.width) == (160, 320)
    small = np.asarray(upright.resize((40, 20), Image.Resampling.BOX)).astype(int)
    assert np.abs(encoded.pixels(20, 40) - small).mean() < 4


@pytest.mark.parametrize(
    "before", [b"", b"\xff\xfe\x00\x06note", b"\xff\xe2\x00\x06\xff\xda\xff\xda"]
)
def test_the_orientation_is_found_behind_other_segments(before):
    data = sideways_file(np.asarray(photo(0, 16, 32)), 6, "JPEG")
    image = EncodedImage(data[:2] + before + data[2:])
    assert (image.height, image.width) == (16, 32)


def test_the_orientation_may_stand_in_xmp():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image = EncodedImage(encode(photo(0, 32, 16), "JPEG", xmp=xmp))
    assert (image.height, image.width) == (16, 32)


def test_an_orientation_that_does_not_exist_is_ignored():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 99
    image = photo(0, 10, 20)
    np.testing.assert_array_equal(pixels_of(encode(image, exif=exif)), np.asarray(image))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.square(a.astype(float) - b).mean()
    return 10 * math.log10(255**2 / max(error, 1e-6))


def quality(data: bytes, height: int, width: int) -> float:
    """PSNR of the quick path against full decode and Pillow's antialiased resize."""
    full = Image.open(io.BytesIO(data)).convert("RGB")
    full = ImageOps.exif_transpose(full).resize((width, height), Image.Resampling.BICUBIC)
    return psnr(EncodedImage(data).pixels(height, width), np.asarray(full))


# At a quarter and at an eighth of the size the decoder shrinks most for what is asked of it. The
# odd sizes end with partial blocks, and once stretched the picture by up to a block.
@pytest.mark.parametrize("size", [(512, 768), (509, 763), (505, 761)])
@pytest.mark.parametrize("fraction", [0.06, 1 / 8, 0.2, 1 / 4, 0.3, 0.7, 1, 1.5])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_reduced_decode_looks_like_a_full_one(size, fraction, mode):
    data = encode(textured(*size).convert(mode), "JPEG", quality=90)
    assert quality(data, round(size[0] * fraction), round(size[1] * fraction)) > 38


REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


needs_photos = pytest.mark.skipif(
    not (REAL_DATA / "coco-train").is_dir(),
    reason="no photos at ../shared/data beside the checkout",
)


def coco_photos() -> list[bytes]:
    """COCO photos, small and in full resolution."""
    shards = expand_shards([str(REAL_DATA / "coco-train")])
    small = itertools.islice((raw for shard in shards for raw in read_shard(shard)), 0, None, 9)
    large = sorted((REAL_DATA / "coco-val/val2017").glob("*.jpg"))
    return [raw.members["jpg"] for raw in small] + [path.read_bytes() for path in large]


@needs_photos
def test_real_photos_lose_nothing_visible():
    at_training, at_worst = [], []
    for number, data in enumerate(coco_photos()):
        image = EncodedImage(data)
        rng = sample_generator(0, 0, str(number))
        rows, columns = sample_grid(ResolutionConfig(), image.height, image.width, 16, 64, rng)
        at_training.append(quality(data, rows * 16, columns * 16))
        # The decoder shrinks by 2 or 4 once twice as many pixels as wanted remain.
        shrink = (4, 8)[number % 2]
        at_worst.append(quality(data, image.height // shrink, image.width // shrink))
    for name, found in (("drawn sizes", at_training), ("worst sizes", at_worst)):
        print(f"{name}: min {min(found):.1f} dB, median {np.median(found):.1f} dB")
        assert min(found) > 35


def test_a_reduced_decode_keeps_twice_the_pixels_asked_for(monkeypatch):
    sizes = []
    decode_jpeg = simplejpeg.decode_jpeg

    def spy(*args, **options):
        pixels = decode_jpeg(*args, **options)
        sizes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    upright = np.asarray(photo(0, 512, 768))
    for (height, width), decoded in {
        (64, 96): (128, 192),
        (65, 96): (256, 384),
        (128, 192): (256, 384),
        (129, 20): (512, 768),
        (20, 193): (512, 768),
        (512, 768): (512, 768),
    }.items():
        for orientation in (1, 6):
            EncodedImage(sideways_file(upright, orientation, "JPEG")).pixels(height, width)
            assert sizes.pop() == (decoded if orientation == 1 else decoded[::-1])


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"keep_rgb": True},
        {"optimize": True, "quality": 30},
    ],
)
def test_pixels_at_native_size_are_pillows(options):
    data = encode(textured(61, 83), "JPEG", **options)
    pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(pixels_of(data) - pillow.astype(int)).max() <= 1


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
    keep = np.flatnonzero(rng.random(rows * columns) < 0.5)
    assert patchify(pixels, patch, keep).tolist() == [expected[i] for i in keep]
    assert patchify(pixels[::-1, ::-1], patch)[-1].reshape(patch, patch, 3).tolist() == (
        pixels[:patch, :patch][::-1, ::-1].tolist()
    )
