"""Random crops, flips and colours: as Pillow has them, a function of seed, epoch and id alone."""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import STORED, sideways_file, textured
from PIL import Image, ImageOps
from shard_factory import encode, photo
from torchvision.transforms import RandomResizedCrop

from navit_clip.data.augment import AugmentConfig, sample_crop, vary
from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.labelled import LabelledBuilder
from navit_clip.data.builders.masked import MaskedBuilder
from navit_clip.data.builders.pairs import PairBuilder
from navit_clip.data.captions import choose_caption
from navit_clip.data.decode import CROP_STEP, Box, EncodedImage
from navit_clip.data.drop import DropConfig, keep_patches, sample_rate
from navit_clip.data.labels import LabelReader
from navit_clip.data.patches import join_patches
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.seeding import sample_generator
from navit_clip.data.sizing import ResolutionConfig, sample_grid, sample_patch_size

CROPS = AugmentConfig(min_area=0.05)
ALL = AugmentConfig(0.2, 1.5, 0.5, 0.4, 0.4, 0.4, 0.1)


def by_pillow(data: bytes, box: Box, height: int, width: int) -> np.ndarray:
    """Decoded in full, turned, cropped, and then resized."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
    part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    return 10 * math.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-6))


# Crops of encoded images

TEXTURE = np.asarray(textured(413, 530))
FILES = {orientation: sideways_file(TEXTURE, orientation, "JPEG") for orientation in STORED}


@given(
    st.sampled_from(sorted(FILES)),
    st.integers(0, 200), st.integers(0, 200), st.integers(16, 213), st.integers(16, 330),
    st.sampled_from([1, 2, 4, 8, 9]),
)  # fmt: skip
@settings(max_examples=60)
def test_a_crop_of_a_jpeg_is_that_of_all_its_pixels(orientation, top, left, height, width, shrink):
    box = Box(top, left, height, width)
    wanted = max(1, height // shrink), max(1, width // shrink)
    found = EncodedImage(FILES[orientation]).pixels(*wanted, crop=box)
    assert psnr(found, by_pillow(FILES[orientation], box, *wanted)) > 35


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_crop_of_another_format_is_pillows(kind):
    data, box = encode(photo(1, 50, 70), kind), Box(3, 11, 41, 39)
    for size in ((16, 24), (41, 39), (60, 60)):
        np.testing.assert_array_equal(
            EncodedImage(data).pixels(*size, crop=box), by_pillow(data, box, *size)
        )


def test_a_crop_is_decoded_no_larger_than_it_needs(monkeypatch):
    sizes = []
    decode_jpeg = simplejpeg.decode_jpeg

    def spy(*args, **options):
        sizes.append((pixels := decode_jpeg(*args, **options)).shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    image = EncodedImage(encode(photo(0, 512, 768), "JPEG"))
    for box, decoded in {
        Box(0, 0, 512, 768): (128, 192),
        Box(4, 8, 500, 700): (128, 192),
        Box(6, 8, 500, 700): (256, 384),  # begins within a pixel of a quarter
        Box(7, 8, 500, 700): (512, 768),
        Box(100, 100, 260, 300): (256, 384),
        Box(100, 100, 100, 300): (512, 768),
    }.items():
        image.pixels(56, 64, crop=box)
        assert sizes.pop() == decoded


def test_a_drawn_crop_is_decoded_at_a_quarter_however_it_is_stored(monkeypatch):
    sizes = []
    decode_jpeg = simplejpeg.decode_jpeg

    def spy(*args, **options):
        sizes.append(sorted((pixels := decode_jpeg(*args, **options)).shape[:2]))
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    upright, rng = np.asarray(photo(0, 512, 768)), np.random.default_rng(0)
    for orientation in STORED:
        image = EncodedImage(sideways_file(upright, orientation, "JPEG"))
        for _ in range(5):
            image.pixels(32, 32, crop=sample_crop(AugmentConfig(0.4), 512, 768, 1.5, rng))
            assert sizes.pop() == [128, 192]


# Crops as they are drawn


@given(st.integers(1, 600), st.integers(1, 600), st.floats(0.01, 0.99), st.floats(1, 3))
def test_a_crop_lies_within_the_image_and_has_nearly_its_ratio(height, width, area, stretch):
    rng = np.random.default_rng(height * width)
    box = sample_crop(AugmentConfig(area, stretch), height, width, width / height, rng)
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width
    half = (CROP_STEP / 2 if min(height, width) >= 256 else 0.5) + 1e-4  # sides are rounded
    lowest = (box.width - half) / (box.height + half) / (width / height)
    highest = (box.width + half) / max(box.height - half, 1e-9) / (width / height)
    assert lowest <= stretch
    assert highest >= 1 / stretch
    assert (box.height + half) * (box.width + half) >= area * height * width
    if min(height, width) >= 256 and box[2:] != (height, width):
        assert box.top % CROP_STEP == box.left % CROP_STEP == 0


def test_crops_of_squares_are_torchvisions():
    height, width, draws = 200, 250, 3000
    rng = np.random.default_rng(0)
    found = np.array([sample_crop(CROPS, height, width, 1.0, rng) for _ in range(draws)])
    image = Image.new("RGB", (width, height))
    expected = np.array(
        [RandomResizedCrop.get_params(image, [0.05, 1], [3 / 4, 4 / 3]) for _ in range(draws)]
    )
    for mine, theirs in zip(found.T, expected.T, strict=True):
        spread = math.sqrt((mine.var() + theirs.var()) / draws)
        assert abs(mine.mean() - theirs.mean()) < 4.5 * spread


def test_a_square_of_a_strip_is_its_middle():
    box = sample_crop(AugmentConfig(0.9), 30, 600, 1.0, np.random.default_rng(0))
    assert box == Box(0, 280, 30, 40)
    box = sample_crop(AugmentConfig(0.9), 600, 1, 1.0, np.random.default_rng(0))
    assert box == Box(299, 0, 1, 1)


# Flips and colours

COLOURS = np.asarray(photo(5, 24, 36))
GREY = np.array([0.299, 0.587, 0.114])


def changed(name: str, pixels: np.ndarray, change: float) -> np.ndarray:
    """What a change means, in floats."""
    pixels = pixels.astype(float)
    if name == "hue":
        hsv = [colorsys.rgb_to_hsv(*colour) for colour in pixels.reshape(-1, 3) / 255]
        turned = [colorsys.hsv_to_rgb((h + change) % 1, s, v) for h, s, v in hsv]
        return 255 * np.array(turned).reshape(pixels.shape)
    grey = (pixels @ GREY)[..., None]
    centre = {"brightness": 0.0, "contrast": grey.mean(), "saturation": grey}[name]
    return (centre + (1 + change) * (pixels - centre)).clip(0, 255)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colours_change_as_they_should(name):
    for seed in range(20):
        found = vary(COLOURS, AugmentConfig(**{name: 0.4}), np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        rng.permutation(1)
        error = np.abs(found - changed(name, COLOURS, 0.4 * rng.uniform(-1, 1)))
        assert error.max() <= (12 if name == "hue" else 1.5)  # Pillow's hues are whole numbers
        assert error.mean() < (3 if name == "hue" else 1)


def test_all_changes_are_drawn_and_in_any_order():
    found = set()
    for seed in range(40):
        pixels = vary(COLOURS, ALL, np.random.default_rng(seed))
        assert pixels.shape == COLOURS.shape
        assert pixels.dtype == np.uint8
        rng = np.random.default_rng(seed)
        expected = COLOURS[:, ::-1] if rng.random() < 0.5 else COLOURS
        for name in (order := rng.permutation(["brightness", "contrast", "saturation", "hue"])):
            strength = 0.1 if name == "hue" else 0.4
            expected = changed(name, expected, strength * rng.uniform(-1, 1)).round()
        assert np.abs(pixels - expected).mean() < 3
        found.add(tuple(order))
    assert len(found) > 10


def test_half_of_the_images_are_mirrored():
    rng = np.random.default_rng(0)
    mirrored = 0
    for _ in range(400):
        pixels = vary(COLOURS, AugmentConfig(flip=0.5), rng)
        mirrored += np.array_equal(pixels, COLOURS[:, ::-1])
        assert mirrored or np.array_equal(pixels, COLOURS)
    assert 150 < mirrored < 250


def test_by_default_nothing_is_drawn_or_changed():
    assert sample_crop(AugmentConfig(), 30, 40, 1.0, None) is None
    assert vary(COLOURS, AugmentConfig(), None) is COLOURS


# Samples of every task

RESOLUTION = ResolutionConfig(min_side=16, max_side=64, max_tokens=30)
DROP = DropConfig("beta", rate=0.3)


def builders(seed: int, augment: AugmentConfig, resolution: ResolutionConfig, tokenizer):
    """A builder of each task."""
    common = (resolution, DROP, 8, 32, seed)
    return {
        "pairs": PairBuilder(*common, {"txt": 1.0}, tokenizer, 16, augment=augment),
        "labelled": LabelledBuilder(*common, LabelReader("cls", ("a", "b"), True), augment=augment),
        "masked": MaskedBuilder(*common, augment=augment),
    }


def raw(index: int, kind: str = "PNG") -> RawSample:
    data = encode(photo(index, 60 + 9 * (index % 5), 110), kind)
    return RawSample(f"a/{index}", index, {kind.lower(): data, "txt": b"a dog", "cls": b"1"})


def image_slowly(task: str, sample: RawSample, seed: int, epoch: int, resolution):
    """The pixels, the grid and the kept patches as they are defined, by Pillow."""
    rng = sample_generator(seed, epoch, sample.id)
    if task == "pairs":
        choose_caption(sample.members, {"txt": 1.0}, rng)
    data = sample.members["png"]
    width, height = Image.open(io.BytesIO(data)).size
    aspect = 1.0 if resolution.mode == "square" else width / height
    box = sample_crop(ALL, height, width, aspect, rng)
    size = sample_patch_size(resolution, 8, rng)
    rows, columns = sample_grid(resolution, box.height, box.width, size, 32, rng, 0)
    pixels = vary(by_pillow(data, box, rows * size, columns * size), ALL, rng)
    kept = np.arange(rows * columns)
    if task != "masked":
        kept = keep_patches(rows * columns, sample_rate(DROP, rows * columns, 0, rng), rng)
    return pixels, (rows, columns), kept


@pytest.mark.parametrize("task", ["pairs", "labelled", "masked"])
@pytest.mark.parametrize("mode", ["sampled", "native", "square"])
def test_a_sample_is_cropped_resized_varied_and_cut(task, mode, tokenizer):
    resolution = ResolutionConfig(mode, 16, 32, max_tokens=30)
    build = builders(3, ALL, resolution, tokenizer)[task]
    plain = builders(3, AugmentConfig(), resolution, tokenizer)[task]
    for index in range(12):
        image = build(raw(index), Origin(2, 0, index, 0)).image
        pixels, grid, kept = image_slowly(task, raw(index), 3, 2, resolution)
        assert image.grid == grid
        np.testing.assert_array_equal(image.coords, np.stack(np.divmod(kept, grid[1]), 1))
        whole = np.zeros((grid[0] * grid[1], image.patches.shape[1]), np.uint8)
        whole[kept] = image.patches
        mask = np.zeros_like(whole)
        mask[kept] = 1
        assert np.array_equal(join_patches(whole, grid), pixels * join_patches(mask, grid))
        other = plain(raw(index), Origin(2, 0, index, 0)).image
        assert other.patches.shape != image.patches.shape or np.any(other.patches != image.patches)


def test_a_sample_depends_on_seed_epoch_and_id_alone(tokenizer):
    def patches(seed, epoch, index, task="labelled"):
        build = builders(seed, ALL, RESOLUTION, tokenizer)[task]
        return build(raw(index, "JPEG"), Origin(epoch, 0, index, 0)).image.patches.tobytes()

    first = patches(0, 0, 0)
    assert patches(0, 0, 0) == first
    assert len({first, patches(1, 0, 0), patches(0, 1, 0), patches(0, 0, 5)}) == 4


MISTAKES = {
    "min_area": 0.0, "max_stretch": 0.9, "flip": 1.1, "brightness": -0.1, "contrast": 1.5,
    "saturation": math.nan, "hue": 0.6,
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_value_out_of_range_is_named(name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        AugmentConfig(**{name: MISTAKES[name]})
