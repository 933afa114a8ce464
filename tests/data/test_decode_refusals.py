"""What only looks like an image, is damaged, or would take too much to decode."""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import jpeg_of_size, pixels_of, textured
from PIL import Image, ImageFile
from shard_factory import HTML, encode, photo, png_of_size

from navit_clip.data import image_header
from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.data.image_header import read_header
from navit_clip.data.in_memory import open_image
from navit_clip.errors import SkipSampleError


def reason_of(data: bytes) -> str:
    """Why the bytes are refused, at the header or at the pixels."""
    with pytest.raises(SkipSampleError) as caught:
        pixels_of(data)
    return caught.value.reason


@pytest.mark.parametrize("data", [b"", b"\xff", HTML, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_unreadable(data):
    assert reason_of(data) == "unreadable_image"


def test_formats_that_start_other_programs_are_not_opened():
    postscript = encode(photo(0, 8, 8), "EPS")
    assert postscript.startswith(b"%!PS")
    assert reason_of(postscript) == "unreadable_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_truncated_files_are_unreadable(kind, fraction):
    data = encode(textured(64, 64), kind)
    assert reason_of(data[: int(fraction * len(data))]) == "unreadable_image"


@pytest.mark.parametrize("fraction", [0.4, 0.9])
def test_a_jpeg_that_ends_in_grey_is_unreadable(fraction):
    # Closed by its end marker, as some servers do; Pillow returns what there is and grey below.
    data = encode(textured(64, 64), "JPEG")
    assert reason_of(data[: int(fraction * len(data))] + b"\xff\xd9") == "unreadable_image"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_a_half_jpeg_is_unreadable_whoever_decodes_it(mode, progressive, reduced):
    whole = encode(textured(64, 64).convert(mode), "JPEG", progressive=progressive)
    assert EncodedImage(whole).pixels(32, 32, reduced=reduced).shape == (32, 32, 3)
    half = whole[: len(whole) // 2] + b"\xff\xd9"
    with pytest.raises(SkipSampleError, match="unreadable_image"):
        EncodedImage(half).pixels(32, 32, reduced=reduced)


def test_a_side_past_all_photos_is_refused_from_the_header():
    for size in ((1, 64_000_000), (64_000_000, 1)):
        with pytest.raises(SkipSampleError, match="too_large"):
            EncodedImage(png_of_size(*size))


def progressive_of_many_scans(side, many):
    data = encode(textured(side, side), "JPEG", progressive=True)
    start, end = data.index(b"\xff\xda"), data.index(b"\xff", data.index(b"\xff\xda") + 2)
    return data[:start] + data[start:end] * many + data[start:]


def sequential_of_many_scans(side, many):
    """A baseline JPEG whose three channels are scanned one by one, and again and again."""
    grey = encode(textured(side, side).convert("L"), "JPEG")
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    channels = b"".join(bytes((channel, 0x11, 0)) for channel in (1, 2, 3))
    header = b"\xff\xc0\0\x11" + grey[frame + 4 : frame + 9] + b"\x03" + channels
    tail = grey[frame + 13 : scan]
    pixels = grey[scan + 10 : -2]
    scans = [b"\xff\xda\0\x08\x01" + bytes((c, 0, 0, 63, 0)) + pixels for c in (1, 2, 3)]
    return grey[:frame] + header + tail + b"".join(scans * many) + b"\xff\xd9"


@pytest.mark.parametrize("make", [progressive_of_many_scans, sequential_of_many_scans])
@pytest.mark.parametrize("before", [b"", b"\xff\xff\xff"])
def test_a_jpeg_of_hundreds_of_scans_is_refused_by_what_they_would_cost(make, before, monkeypatch):
    frame = make(64, 1).index(b"\xff\xc0" if make is sequential_of_many_scans else b"\xff\xc2")

    def hide(data):  # bytes that decoders pass over
        return data[:frame] + before + data[frame:]

    monkeypatch.setattr(image_header, "_MAX_SCANNED", 64 * 64 * 100)
    assert pixels_of(hide(make(64, 1))).shape == (64, 64, 3)
    many = hide(make(64, 300))
    with pytest.raises(SkipSampleError, match=r"too_large: [39]\d\d scans of 64×64 pixels"):
        EncodedImage(many)
    with pytest.raises(ValueError, match=r"scans of 64×64 pixels"):  # nor does the API read it
        open_image(many)


def test_nearly_all_jpegs_are_of_one_scan():
    for mode in ("L", "RGB", "CMYK"):
        data = encode(textured(64, 64).convert(mode), "JPEG", xmp=b"\xff\xda" * 900)
        assert image_header._scans(data) == 1
    assert image_header._scans(encode(textured(64, 64), "JPEG", progressive=True)) == 10


def test_a_jpeg_whose_faults_pillow_overlooks_is_pillows():
    data = encode(textured(64, 64), "JPEG", restart_marker_blocks=1)
    data = data.replace(b"\xff\xd2", b"\xff\xd3", 1)
    with pytest.raises(ValueError, match="instead of RST2"):
        simplejpeg.decode_jpeg(data)
    pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(pixels_of(data), pillow)


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


@pytest.mark.parametrize("of_size", [png_of_size, jpeg_of_size])
@pytest.mark.parametrize("side", [30_000, 12_000])
def test_too_many_pixels_are_refused_from_the_header(of_size, side, monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SkipSampleError) as caught:
            EncodedImage(of_size(side, side))
    assert caught.value.reason == "too_large"


def tiff(side: int, tile: int) -> bytes:
    """A TIFF whose tiles are all the same piece of data."""
    count = math.ceil(side / tile) ** 2
    data = zlib.compress(bytes(tile * tile))
    numbers = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile}
    behind = 8 + 2 + 12 * (len(numbers) + 2) + 4
    pieces = [behind + 8 * count] * count, [len(data)] * count  # where, and how long
    entries = [(tag, 1, value) for tag, value in numbers.items()]
    for tag, values in zip((324, 325), pieces, strict=True):
        place = values[0] if count == 1 else behind + 4 * count * (tag - 324)
        entries.append((tag, count, place))
    head = struct.pack("<4sIH", b"II*\0", 8, len(entries))
    head += b"".join(struct.pack("<HHII", tag, 4, *entry) for tag, *entry in entries)
    return head + bytes(4) + struct.pack(f"<{2 * count}I", *pieces[0], *pieces[1]) + data


def test_tiles_count_that_are_larger_than_their_image():
    assert EncodedImage(tiff(64, 16)).pixels(8, 8).shape == (8, 8, 3)
    assert EncodedImage(tiff(16, 64), 64 * 64).pixels(8, 8).shape == (8, 8, 3)
    for side, tile in ((16, 64), (130, 64)):
        with pytest.raises(SkipSampleError, match="too_large: its tiles of 64×64 pixels exceed"):
            EncodedImage(tiff(side, tile), max(side**2, 64 * 64 - 1))


@pytest.mark.parametrize(
    "head",
    [
        b"P5 2001 1000 254\n",
        b"P6 2001 1000 65535\n",
        b"P3 2001 1000 255\n",
        b"qoif" + struct.pack(">II", 2001, 1000) + b"\3\0",
    ],
)
def test_what_is_decoded_in_python_has_a_cap_of_its_own(head):
    with pytest.raises(SkipSampleError, match="too_large: 2001×1000 pixels exceed 2,000,000 of"):
        EncodedImage(head + bytes(64))
    assert EncodedImage(b"P5 2001 1000 255\n" + bytes(2_001_000)).width == 2001


def test_what_takes_longer_costs_more_before_it_is_decoded():
    data = io.BytesIO()
    photo(0, 20, 10).save(data, "JPEG2000")
    assert read_header(data.getvalue()).cost == 4 * 20 * 10
    assert read_header(b"P3 20 10 255\n" + b"0 " * 600).cost == 32 * 20 * 10
    for form in ("JPEG", "PNG", "TIFF"):
        assert read_header(encode(photo(0, 20, 10), form)).cost == 20 * 10


def test_jpeg_2000_has_a_cap_of_its_own(monkeypatch):
    data = io.BytesIO()
    photo(0, 20, 10).save(data, "JPEG2000")
    assert EncodedImage(data.getvalue()).pixels(8, 8).shape == (8, 8, 3)
    monkeypatch.setitem(image_header._MAX_PIXELS_OF, "jpeg2k", 199)
    assert reason_of(data.getvalue()) == "too_large"


def test_the_caps_are_inclusive(monkeypatch):
    data = encode(photo(0, 10, 10))
    assert EncodedImage(data, 100).pixels(10, 10).shape == (10, 10, 3)
    with pytest.raises(SkipSampleError, match="too_large: 10×10 pixels exceed max_pixels=99"):
        EncodedImage(data, 99)
    monkeypatch.setattr(image_header, "MAX_BYTES", len(data))
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
