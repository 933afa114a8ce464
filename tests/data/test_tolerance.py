"""What the web puts into shards, through the real pipeline: right pixels, or one counted skip.

Each case is a sample in front of good ones. `cases` is the table of what is expected of each: the
upright colours that must arrive, or the reason under which the sample is counted.
"""

from __future__ import annotations

import resource
import sys
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from image_cases import (
    STORED,
    cmyk_and_ycck,
    jpeg_of_size,
    on_white,
    png_16_bit,
    sideways_file,
    textured,
)
from loader_cases import ONE_BY_ONE, PATCH, take
from PIL import Image
from shard_factory import HTML, encode, photo, png_of_size, write_shard, write_tar

from navit_clip.data.captions import choose_caption
from navit_clip.data.decode import find_image
from navit_clip.data.drop import DropConfig
from navit_clip.data.shards import read_shard
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.errors import SkipSampleError
from navit_clip.packed.batch import Batch

CONTEXT = 24  # of `loader_cases.pair_pipeline`
SIZE = (24, 40)  # rows and columns of pixels; 3 × 5 patches, so nothing is resized
JPEG = {"quality": 95, "subsampling": 0}
LOSSLESS = {"lossless": True, "exact": True}

GOOD = {"png": encode(photo(9, *SIZE)), "txt": b"one old green bicycle"}


@dataclass(frozen=True)
class Case:
    """One sample and what must become of it.

    Attributes:
        members: Content by extension; `GOOD` has what is left out, None takes a member away.
        expected: Reason of the skip, or upright RGB of the native size.
        tolerance: Largest difference of one value that the format excuses.
    """

    members: dict[str, bytes | None]
    expected: str | np.ndarray = field(default_factory=lambda: np.asarray(photo(9, *SIZE)))
    tolerance: int = 0


def image_case(
    extension: str, data: bytes, expected: str | np.ndarray | Image.Image, tolerance: int = 0
) -> Case:
    if isinstance(expected, Image.Image):
        expected = np.asarray(expected.convert("RGB"))
    return Case({"png": None, extension: data}, expected, tolerance)


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def cases() -> dict[str, Case]:
    rgb = photo(0, *SIZE)
    grey = rgb.convert("L")
    palette = rgb.quantize(16)
    deep = np.random.default_rng(0).integers(0, 65536, (*SIZE, 3), dtype=np.uint16)
    rgba = np.random.default_rng(1).integers(0, 256, (*SIZE, 4), dtype=np.uint8)
    grey_alpha = Image.merge("LA", [Image.fromarray(rgba[..., i]) for i in (0, 3)])
    colours, opacity = rgba[..., :3], rgba[..., 3]
    cmyk, ycck, paper = cmyk_and_ycck()
    noisy = textured(*SIZE)
    frames = {"save_all": True, "append_images": [photo(1, *SIZE), photo(2, *SIZE)]}
    wide, tall = photo(4, 1, 4000), photo(5, 4000, 1)
    found = {
        # Damaged
        "truncated JPEG": image_case("jpg", cut(encode(noisy, "JPEG")), "unreadable_image"),
        "truncated JPEG, closed": image_case(
            "jpg", cut(encode(noisy, "JPEG")) + b"\xff\xd9", "unreadable_image"
        ),
        "truncated PNG": image_case("png", cut(encode(noisy)), "unreadable_image"),
        "truncated WebP": image_case("webp", cut(encode(noisy, "WEBP")), "unreadable_image"),
        "zero bytes": image_case("jpg", b"", "unreadable_image"),
        "HTML as .jpg": image_case("jpg", HTML, "unreadable_image"),
        "no image": Case({"png": None}, "no_image"),
        # Sizes
        "30,000 × 30,000 PNG": image_case("png", png_of_size(30_000, 30_000), "too_large"),
        "30,000 × 30,000 JPEG": image_case("jpg", jpeg_of_size(30_000, 30_000), "too_large"),
        "1 × 4000 PNG": image_case("png", encode(wide), wide, 1),
        "4000 × 1 PNG": image_case("png", encode(tall), tall, 1),
        "1 × 4000 JPEG": image_case("jpg", encode(wide, "JPEG", **JPEG), wide, 8),
        "4000 × 1 JPEG": image_case("jpg", encode(tall, "JPEG", **JPEG), tall, 8),
        # Colours
        "JPEG": image_case("jpg", encode(rgb, "JPEG", **JPEG), rgb, 8),
        "PNG as .jpg": image_case("jpg", encode(rgb), rgb),
        "grey JPEG": image_case("jpg", encode(grey, "JPEG", **JPEG), grey, 8),
        "grey PNG": image_case("png", encode(grey), grey),
        "bilevel PNG": image_case("png", encode(rgb.convert("1")), rgb.convert("1")),
        "CMYK JPEG": image_case("jpg", cmyk, paper, 8),
        "YCCK JPEG": image_case("jpg", ycck, paper, 8),
        "palette PNG": image_case("png", encode(palette), palette),
        "16-bit grey PNG": image_case(
            "png", encode(Image.fromarray(deep[..., 0])), np.repeat(deep[..., :1] / 257, 3, -1), 1
        ),
        "16-bit RGB PNG": image_case("png", png_16_bit(deep), deep / 257, 1),
        "alpha PNG": image_case(
            "png", encode(Image.fromarray(rgba)), on_white(colours, opacity), 1
        ),
        "alpha WebP": image_case(
            "webp",
            encode(Image.fromarray(rgba), "WEBP", **LOSSLESS),
            on_white(colours, opacity),
            1,
        ),
        "grey with alpha PNG": image_case(
            "png",
            encode(grey_alpha),
            on_white(np.repeat(rgba[..., :1], 3, -1), opacity),
            1,
        ),
        "animated GIF": image_case("gif", encode(palette, "GIF", **frames), palette),
        "animated WebP": image_case("webp", encode(rgb, "WEBP", **LOSSLESS, **frames), rgb),
        # Captions
        "missing caption": Case({"txt": None}, "no_caption"),
        "empty caption": Case({"txt": b""}, "no_caption"),
        "blank caption": Case({"txt": b" \n\t "}, "no_caption"),
        "non-UTF-8 caption": Case({"txt": b"caf\xe9"}, "bad_caption"),
        "100 kB caption": Case({"txt": b"two blue birds " * 6_700}),
        "100 kB caption without a space": Case({"txt": b"bird" * 25_000}),
    }
    for orientation in STORED:
        for extension, kind, options, tolerance in (
            ("jpg", "JPEG", JPEG, 8),
            ("png", "PNG", {}, 0),
            ("webp", "WEBP", LOSSLESS, 0),
        ):
            data = sideways_file(np.asarray(rgb), orientation, kind, **options)
            case = image_case(extension, data, rgb, tolerance)
            found[f"EXIF orientation {orientation}, {kind}"] = case
    return found


CASES = cases()


@pytest.fixture
def first_batches(tmp_path, pipeline):
    """Makes the first batches, of one pair each, of a shard that holds a case and good samples."""

    def first(case: Case) -> list[Batch]:
        members = {
            name: data for name, data in {**GOOD, **case.members}.items() if data is not None
        }
        # More good samples than batches, so that no packer's looking ahead comes round to the case.
        samples = {"case": members, **{f"good{number}": GOOD for number in range(9)}}
        data = pipeline(
            [write_shard(tmp_path / "00000.tar", samples)],
            resolution=ResolutionConfig(mode="native", max_tokens=24),
            drop=DropConfig(),
            **ONE_BY_ONE,
        )
        return take(data, 3)

    return first


def picture(batch: Batch) -> np.ndarray:
    """The only image of a batch, put together from its patches."""
    images = batch.inputs.images
    rows, columns = images.grids[0].tolist()
    image = np.zeros((rows * PATCH, columns * PATCH, 3), np.uint8)
    for number in range(images.segments.lengths[0]):
        row, column = (images.coords[number] * PATCH).tolist()
        patch = images.patches[number].reshape(PATCH, PATCH, 3)
        image[row : row + PATCH, column : column + PATCH] = patch
    return image


@pytest.mark.parametrize("name", CASES)
def test_a_sample_arrives_right_or_is_counted_once(name, first_batches):
    case = CASES[name]
    batches = first_batches(case)
    found = {batch.ids: batch for batch in batches}
    skipped = sum((batch.counts.skipped for batch in batches), Counter())
    if isinstance(case.expected, str):
        assert ("00000/case",) not in found
        assert skipped == {case.expected: 1}
        (line,) = (line for batch in batches for line in batch.counts.skip_log)
        assert line.startswith(f"00000/case: {case.expected}")
        return
    assert not skipped
    batch = found["00000/case",]
    assert 1 < batch.inputs.texts.segments.lengths[0] <= CONTEXT
    pixels = picture(batch)
    expected = case.expected
    if expected.shape != pixels.shape:
        image = Image.fromarray(expected)
        size = (pixels.shape[1], pixels.shape[0])
        expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    assert np.abs(pixels - expected.astype(float)).max() <= case.tolerance


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is Linux's")
@pytest.mark.parametrize("name", ["30,000 × 30,000 PNG", "30,000 × 30,000 JPEG"])
def test_an_image_too_large_takes_no_memory(name, first_batches):
    first_batches(Case({}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first_batches(CASES[name])
    # In kB; the pixels alone are 2.7 GB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_members_that_stand_apart_are_told_from_missing_ones(tmp_path):
    images, texts = ([(f"{i}.{e}", GOOD[e]) for i in range(2)] for e in ("png", "txt"))
    write_tar(tmp_path / "apart.tar", [*images, *texts])
    write_tar(tmp_path / "words.tar", [("0.png", GOOD["png"]), ("0.words.txt", b"a bird")])
    details = []
    for shard in ("apart", "words"):
        for sample in read_shard(str(tmp_path / f"{shard}.tar")):
            with pytest.raises(SkipSampleError) as caught:
                choose_caption(sample.members, {"json.alt": 1}, np.random.default_rng(0))
            details.append(caught.value.detail)
    hint = "; those of one sample must be neighbours in the tar: a.jpg, a.txt, b.jpg, b.txt"
    lacks = "none of json.alt has a caption; members: "
    assert details == [f"{lacks}{e}{hint}" for e in ("png", "png", "txt", "txt")] + [
        f"{lacks}png, words.txt"
    ]
    with pytest.raises(SkipSampleError, match=f"no_image: members: txt{hint}"):
        find_image({"txt": b""})
