"""What a file decodes to, and how it can be bad."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import random
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, features

from vggfeat import decode
from vggfeat.decode import expected_frame, expected_shape, read_rgb, upright_shape
from vggfeat.errors import UnreadableImage, VggfeatError

from .test_images import PICTURE


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def can_read(data: bytes) -> bool:
    """Whether this Pillow decodes what it wrote: libtiff, WebP and others are parts of some builds
    only.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except OSError:
        return False
    return True


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            header,
            *extra,
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def tiff(values: np.ndarray, photometric: int, bits: int = 16) -> bytes:
    """One uncompressed strip of grey, little-endian, written by hand: Pillow can't write all of
    these.
    """
    height, width = values.shape
    data = values.astype("<u2").tobytes()
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8 + 2 + 9 * 12 + 4),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, len(data)),
    ]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + b"\0\0\0\0" + data


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP", "PPM", "TGA"])
def test_lossless_rgb_is_bit_exact_from_path_bytes_image_and_array(
    file_format: str, tmp_path: Path
) -> None:
    data = encoded(Image.fromarray(PICTURE), file_format)
    path = tmp_path / f"picture.{file_format.lower()}"
    path.write_bytes(data)
    for source in (path, str(path), data, Image.open(path), PICTURE):
        rgb = read_rgb(source)
        assert rgb.dtype == np.uint8 and rgb.flags.c_contiguous and rgb.flags.writeable
        np.testing.assert_array_equal(rgb, PICTURE)


# What a viewer shows for the stored rows [[1, 2, 3], [4, 5, 6]], by EXIF 2.32's table of row 0 and
# column 0.
ORIENTED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_exif_orientation(orientation: int, file_format: str) -> None:
    if file_format == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    # blocks of 16 pixels, 40 grey levels apart: lossy formats keep them apart
    stored = np.kron(np.array(ORIENTED[1], np.uint8) * 40, np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb = read_rgb(encoded(Image.fromarray(stored).convert("RGB"), file_format, exif=exif))
    levels = np.rint(rgb[8::16, 8::16, 1] / 40).astype(int)
    assert levels.tolist() == ORIENTED[orientation]
    assert rgb.flags.c_contiguous


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense"]
)
def test_broken_exif_does_not_cost_the_image(exif: bytes) -> None:
    assert read_rgb(encoded(Image.fromarray(PICTURE), "JPEG", exif=exif)).shape == PICTURE.shape


def test_orientation_out_of_range_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    rgb = read_rgb(encoded(Image.fromarray(PICTURE), "PNG", exif=exif))
    np.testing.assert_array_equal(rgb, PICTURE)


DEEP = np.array([[0, 128, 129, 257, 32768, 65278, 65406, 65407, 65535]], np.uint16)


SHALLOW = [0, 0, 1, 1, 128, 254, 254, 255, 255]  # DEEP / 257, rounded: 128 / 257 < 1/2 < 129 / 257


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(encoded(Image.fromarray(DEEP), "PNG"), id="png"),
        pytest.param(encoded(Image.fromarray(DEEP), "TIFF"), id="tiff"),
        pytest.param(encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"), id="big-endian tiff"),
        pytest.param(encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), id="tiff, mode I"),
        pytest.param(b"P5 9 1 65535\n" + DEEP.astype(">u2").tobytes(), id="pgm"),
        pytest.param(tiff(65535 - DEEP, photometric=0), id="tiff, 0 is white"),
        pytest.param(Image.fromarray(DEEP), id="image"),
        pytest.param(DEEP, id="array"),
        pytest.param(DEEP.astype(">u2"), id="big-endian array"),
    ],
)
def test_16_bit_grey_is_scaled_not_clipped(source: Any) -> None:
    rgb = read_rgb(source)
    assert rgb.shape == (1, 9, 3)
    for c in range(3):
        assert rgb[0, :, c].tolist() == SHALLOW


def test_16_bit_colour_is_the_high_byte() -> None:
    row = b"\0" + np.array([0x0000, 0x80FF, 0xFFFF], ">u2").tobytes()
    assert read_rgb(png(1, 1, 16, 2, row)).tolist() == [[[0x00, 0x80, 0xFF]]]


def test_12_bit_tiff_has_white_at_4095() -> None:
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])  # 000 800 FFF 000
    data = tiff(np.frombuffer(packed, "<u2").reshape(1, 3), photometric=1, bits=12)
    data = data.replace(struct.pack("<HHII", 256, 4, 1, 3), struct.pack("<HHII", 256, 4, 1, 4))
    assert read_rgb(data)[0, :, 0].tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_integers_without_a_known_white_are_refused(values: list[int]) -> None:
    with pytest.raises(UnreadableImage, match=r"integers span"):
        read_rgb(encoded(Image.fromarray(np.array([values], np.int32)), "TIFF"))


def test_float_tiff_in_0_to_1_is_scaled_by_255() -> None:
    values = np.array([[0, 0.25, 0.5, 1]], np.float32)
    rgb = read_rgb(encoded(Image.fromarray(values), "TIFF"))
    assert rgb[0].tolist() == [[0] * 3, [64] * 3, [128] * 3, [255] * 3]
    np.testing.assert_array_equal(read_rgb(values.astype(np.float64)), rgb)
    np.testing.assert_array_equal(read_rgb(values.astype(np.float16)), rgb)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.nan, "NaN"),
        (np.inf, "infinity"),
        (-0.1, r"-0.1..1; floats must"),
        (255, r"0..255; floats must"),
    ],
)
def test_other_floats_are_refused(bad: float, reason: str) -> None:
    values = np.array([[0, bad, 1]], np.float32)
    for source in (values, encoded(Image.fromarray(values), "TIFF")):
        with pytest.raises(UnreadableImage, match=reason):
            read_rgb(source)


def test_1_bit_and_grey() -> None:
    bits = np.array([[True, False, False, True]])
    assert read_rgb(encoded(Image.fromarray(bits), "PNG"))[0, :, 2].tolist() == [255, 0, 0, 255]
    grey = PICTURE[:, :, 0]
    for source in (grey, grey[:, :, None], encoded(Image.fromarray(grey), "PNG")):
        np.testing.assert_array_equal(read_rgb(source), np.stack([grey] * 3, axis=-1))


def test_alpha_goes_over_white() -> None:
    # opaque stays; a fully transparent black is white; half: (10*128 + 255*127) / 255 = 132.02
    rgba = np.array([[[10, 20, 30, 255], [0, 0, 0, 0], [10, 10, 10, 128]]], np.uint8)
    expected = [[[10, 20, 30], [255] * 3, [132] * 3]]
    assert read_rgb(rgba).tolist() == expected
    assert read_rgb(encoded(Image.fromarray(rgba), "PNG")).tolist() == expected
    assert read_rgb(rgba.astype(np.uint16) * 257).tolist() == expected
    assert read_rgb(rgba / 255).tolist() == expected
    la = Image.fromarray(rgba[:, :, [0, 3]], "LA")
    assert read_rgb(encoded(la, "PNG")).tolist() == [[[10] * 3, [255] * 3, [132] * 3]]
    premultiplied = Image.fromarray(rgba).convert("RGBa")
    assert np.abs(read_rgb(premultiplied).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0, 128])])
def test_palette_with_and_without_transparency(transparency: int | bytes | None) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 10, 10, 10])
    options = {} if transparency is None else {"transparency": transparency}
    rgb = read_rgb(encoded(image, "PNG", **options)).tolist()
    assert rgb == [
        [
            [10, 20, 30],
            [40, 50, 60] if transparency is None else [255] * 3,
            [132] * 3 if isinstance(transparency, bytes) else [10] * 3,
        ]
    ]


def test_one_transparent_colour_of_a_png() -> None:
    grey8 = png(3, 1, 8, 0, b"\0\1\2\3", chunk(b"tRNS", struct.pack(">H", 2)))
    assert read_rgb(grey8)[0, :, 0].tolist() == [1, 255, 3]
    rgb8 = png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", chunk(b"tRNS", struct.pack(">HHH", 4, 5, 6)))
    assert read_rgb(rgb8).tolist() == [[[1, 2, 3], [255] * 3]]
    grey16 = png(
        2, 1, 16, 0, b"\0" + struct.pack(">HH", 257, 514), chunk(b"tRNS", struct.pack(">H", 514))
    )
    assert read_rgb(grey16)[0, :, 0].tolist() == [1, 255]


def test_cmyk_tiff_and_adobe_jpeg() -> None:
    inks = np.zeros((16, 64, 4), np.uint8)  # white, cyan, half black, black
    inks[:, 16:32, 0] = 255
    inks[:, 32:48, 3] = 128
    inks[:, 48:, 3] = 255
    expected = [[255, 255, 255], [0, 255, 255], [127, 127, 127], [0, 0, 0]]
    image = Image.fromarray(inks, "CMYK")
    assert read_rgb(encoded(image, "TIFF"))[8, 8::16].tolist() == expected
    jpeg = encoded(image, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in jpeg  # stored inverted, as Photoshop does
    assert np.abs(read_rgb(jpeg)[8, 8::16].astype(int) - expected).max() <= 2


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "HSV", "RGBX"])
def test_other_colour_spaces(mode: str) -> None:
    flat = Image.new("RGB", (8, 8), (200, 100, 50))
    image = flat.convert(mode)
    sources: list[Image.Image | bytes] = [image]
    if mode not in ("HSV", "RGBX") and can_read(data := encoded(image, "TIFF")):
        sources.append(data)
    for source in sources:
        assert np.abs(read_rgb(source).astype(int) - (200, 100, 50)).max() <= 3


def test_first_frame_of_animations_and_pages() -> None:
    frames = [
        Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    ]
    formats = ["GIF", "PNG", "TIFF"] + (["WEBP"] if features.check("webp") else [])
    for file_format in formats:
        options = {"lossless": True} if file_format == "WEBP" else {}
        data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        rgb = read_rgb(data)
        assert rgb.shape == (6, 8, 3)
        assert (rgb == (255, 0, 0)).all(), file_format


def test_broken_colour_profile_is_ignored() -> None:
    data = encoded(Image.fromarray(PICTURE), "PNG", icc_profile=b"not a profile")
    np.testing.assert_array_equal(read_rgb(data), PICTURE)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\) and dtype uint8: expected \(H, W\)"),
        (np.zeros((8, 8, 2), np.uint8), r"shape \(8, 8, 2\)"),
        (np.zeros(8, np.uint8), r"shape \(8,\)"),
        (np.zeros((0, 8, 3), np.uint8), "nothing in it"),
        (np.zeros((8, 8, 3), np.int64), "dtype int64: expected uint8, uint16 or floats"),
        (np.zeros((8, 8), bool), "dtype bool"),
        (np.zeros((8, 8), object), "dtype object"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        read_rgb(array)


def test_what_is_no_source_at_all() -> None:
    with pytest.raises(VggfeatError, match="the image is 3: give a path, the bytes of a file"):
        read_rgb(3)  # type: ignore[arg-type]


def test_a_read_only_array_comes_back_writeable() -> None:
    array = PICTURE.copy()
    array.flags.writeable = False
    assert read_rgb(array).flags.writeable


def test_paths_that_hold_no_image(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is not a picture\n")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "figure.eps").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    os.mkfifo(tmp_path / "pipe.jpg")
    reasons = {
        "missing.jpg": "no such file",
        "dangling.jpg": "no such file",
        "empty.jpg": r"empty file \(0 bytes\)",
        "text.jpg": "not an image that Pillow can read",
        "figure.eps": "not an image that Pillow can read",
        "loop.jpg": os.strerror(errno.ELOOP)[1:],
        "pipe.jpg": "not a regular file",
        ".": "is a directory",
        "text.jpg/x.jpg": os.strerror(errno.ENOTDIR)[1:],
        "n" * 300: os.strerror(errno.ENAMETOOLONG)[1:],
        "zero\0byte": "null",
    }
    for name, reason in reasons.items():
        with pytest.raises(UnreadableImage, match=reason) as caught:
            read_rgb(tmp_path / name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 200
    with pytest.raises(UnreadableImage, match="not a regular file"):
        read_rgb("/dev/zero")
    with pytest.raises(UnreadableImage, match="empty file"):
        read_rgb(b"")


@pytest.mark.parametrize(
    "content", [b"hi\n", b"1234567890123456", bytes(16), b"II*\0", b"\xff\xd8\xff", b"GIF8"]
)
def test_a_file_too_short_to_tell_its_format_is_no_image(content: bytes) -> None:
    for length in range(1, len(content) + 1):
        with pytest.raises(UnreadableImage, match=r"^not an image that Pillow can read$"):
            read_rgb(content[:length])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(Image.fromarray(PICTURE), "PNG"))
    path.chmod(0)
    with pytest.raises(UnreadableImage, match="permission denied"):
        read_rgb(path)


def test_permission_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UnreadableImage, match=r"^permission denied$"):
        read_rgb("secret.png")


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (12000, 90000, "12000x90000 pixels is over the limit of 178956970 pixels"),
        (100000, 100000, "100000x100000 pixels is over the limit of 178956970 pixels"),
    ],
)
def test_a_bomb_is_refused_by_its_header(width: int, height: int, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        read_rgb(png(width, height, 8, 2, b"\0"))


def test_the_limit_is_the_callers() -> None:
    data = encoded(Image.fromarray(PICTURE), "PNG")
    assert read_rgb(data, max_pixels=24 * 40).shape == PICTURE.shape
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(UnreadableImage, match="40x24 pixels is over the limit of 959 pixels"):
            read_rgb(source, max_pixels=959)


def test_a_reason_is_one_printable_line() -> None:
    """A file's own words stand in reasons, and the terminal and files that take them obey escape
    sequences.
    """
    with pytest.raises(UnreadableImage, match=r"^damaged: ") as caught:
        read_rgb(b"P6 2\x1b]0;t\x07 2 255 " + bytes(12))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "reason",
    ["a\x1b[31mb", "a\nunreadable: b", "a\rb", "a\x9bb", "a\u202eb", "a\udcffb", "a\0b", "a\x7fb"],
)
def test_reasons_are_cleaned(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise ValueError(reason)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(UnreadableImage) as caught:
        read_rgb(FILES["PNG"])
    assert str(caught.value).isprintable() and str(caught.value).startswith("damaged: a ")


def test_a_file_that_shrinks_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(FILES["PNG"])
    stat_of_open = os.fstat

    def cut(descriptor: int) -> os.stat_result:
        status = stat_of_open(descriptor)
        os.truncate(path, 100)
        return status

    monkeypatch.setattr(os, "fstat", cut)
    with pytest.raises(
        UnreadableImage, match=rf"^truncated: .* from {len(FILES['PNG'])} bytes to 100 "
    ):
        read_rgb(path)


def test_a_file_that_grows_is_read_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(FILES["PNG"])
    stat_of_open = os.fstat

    def grow(descriptor: int) -> os.stat_result:
        status = stat_of_open(descriptor)
        os.truncate(path, 1 << 30)
        return status

    monkeypatch.setattr(os, "fstat", grow)
    np.testing.assert_array_equal(read_rgb(path), np.asarray(SMOOTH))


def test_a_pipe_that_takes_a_files_name_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "picture.png").write_bytes(FILES["PNG"])
    was = os.stat(tmp_path / "picture.png")
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(os, "stat", lambda path: was)
    with pytest.raises(UnreadableImage, match=r"^not a regular file$"):
        read_rgb(tmp_path / "pipe.png")


def test_a_closed_image_is_unreadable(tmp_path: Path) -> None:
    image = Image.fromarray(PICTURE)
    image.close()
    with pytest.raises(UnreadableImage, match="closed"):
        read_rgb(image)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OverflowError("x"), RecursionError("deep"), struct.error("s"), EOFError()],
)
def test_whatever_a_decoder_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(UnreadableImage, match=r"memory|truncated|damaged"):
        read_rgb(FILES["PNG"])


SMOOTH = Image.fromarray(PICTURE).resize((120, 90), Image.Resampling.BICUBIC)


_WRITTEN: dict[str, tuple[str, dict[str, object]]] = {
    "baseline": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "PNG": ("PNG", {}),
    "GIF": ("GIF", {}),
    "BMP": ("BMP", {}),
    "TIFF": ("TIFF", {}),
    "TIFF, compressed": (
        ("TIFF", {"compression": "tiff_lzw"}) if features.check("libtiff") else ("TIFF", {})
    ),
    "WEBP": ("WEBP", {}) if features.check("webp") else ("PNG", {}),
    "PPM": ("PPM", {}),
    "ICO": ("ICO", {}),
    "TGA": ("TGA", {"compression": "tga_rle"}),
    "PCX": ("PCX", {}),
}


FILES = {
    name: encoded(SMOOTH, file_format, **options)
    for name, (file_format, options) in _WRITTEN.items()
}
FILES["grey 16"] = encoded(Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50)), "PNG")


def outcome(data: bytes) -> str:
    try:
        rgb = read_rgb(data, max_pixels=1_000_000)
    except UnreadableImage as error:
        assert str(error).isprintable() and 0 < len(str(error)) <= 200
        return str(error)
    assert rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.dtype == np.uint8 and rgb.flags.c_contiguous
    return "read"


@pytest.mark.parametrize("name", FILES)
def test_truncated_anywhere(name: str) -> None:
    data = FILES[name]
    assert outcome(data) == "read"
    for end in range(0, len(data), max(1, len(data) // 100)):
        outcome(data[:end])
    if name in ("baseline", "progressive", "PNG", "PPM", "BMP"):
        assert outcome(data[: len(data) // 2]).startswith("truncated: ")


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
)
def test_damaged_anywhere(name: str, damage: list[tuple[float, int]]) -> None:
    data = bytearray(FILES[name])
    for place, value in damage:
        # a fifth of the damage falls into the first 1%, where the headers are
        data[int(min(place**3, 1 - 1e-9) * len(data))] = value
    outcome(bytes(data))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_noise(data: bytes) -> None:
    outcome(data)


def test_many_threads_read_the_same() -> None:
    names = sorted(FILES) * 8
    alone = {name: read_rgb(data) for name, data in FILES.items()}
    with ThreadPoolExecutor(8) as pool:
        for name, rgb in zip(
            names, pool.map(lambda name: read_rgb(FILES[name]), names), strict=True
        ):
            np.testing.assert_array_equal(rgb, alone[name])


def test_files_are_closed_and_nothing_is_printed(tmp_path: Path) -> None:
    """In a process of its own: pytest keeps warnings to itself."""
    (tmp_path / "bomb.png").write_bytes(png(12000, 12000, 8, 2, b"\0"))
    (tmp_path / "odd.jpg").write_bytes(
        encoded(SMOOTH, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    )
    (tmp_path / "cut.png").write_bytes(FILES["PNG"][:200])
    (tmp_path / "cut.tiff").write_bytes(FILES["TIFF"][:-20])
    (tmp_path / "cut.lzw.tiff").write_bytes(FILES["TIFF, compressed"][:-400])
    (tmp_path / "good.png").write_bytes(FILES["PNG"])
    program = (
        "import os, sys; from vggfeat.decode import read_rgb; from vggfeat.errors import"
        " UnreadableImage\nbefore = len(os.listdir('/proc/self/fd')) if"
        " os.path.isdir('/proc/self/fd') else 0\nfor path in sys.argv[1:]:\n    try:"
        " read_rgb(path)\n    except UnreadableImage: pass\nassert not before or"
        " len(os.listdir('/proc/self/fd')) == before\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# Plain JPEGs are decoded by torchvision, where it is sure to give Pillow's values.


@contextmanager
def decoded_by(decoder: Callable[[bytes], np.ndarray] | None) -> Iterator[None]:
    """Inside, plain JPEGs are decoded so; None: by Pillow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode._lock_free, "get", lambda progressive: decoder)
        yield


class Counted:
    """torchvision's decoder, and how many files it has decoded."""

    def __init__(self) -> None:
        self.decoder = decode._lock_free.get()
        if self.decoder is None:
            pytest.skip(
                "torchvision's libjpeg is missing here, or gives other values than Pillow's"
            )
        self.calls = 0

    def __call__(self, data: bytes) -> np.ndarray:
        assert self.decoder
        self.calls += 1
        return self.decoder(data)


def rgb_or_reason(data: bytes) -> np.ndarray | str:
    try:
        return read_rgb(data, max_pixels=1_000_000)
    except UnreadableImage as error:
        return str(error)


def assert_the_same_both_ways(data: bytes, counted: Counted) -> bool:
    """Whether torchvision was asked."""
    before = counted.calls
    with decoded_by(counted):
        ours = rgb_or_reason(data)
    with decoded_by(None):
        pillows = rgb_or_reason(data)
    assert type(ours) is type(pillows)
    np.testing.assert_array_equal(ours, pillows)
    return counted.calls > before


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# name -> (is it plain, how it is written)
JPEGS: dict[str, tuple[bool, dict[str, Any]]] = {
    "4:2:0": (True, {}),
    "4:2:2": (True, {"subsampling": 1}),
    "4:4:4, tables of its own": (True, {"subsampling": 0, "quality": 98, "optimize": True}),
    "progressive": (True, {"progressive": True}),
    "progressive, 4:4:4": (True, {"progressive": True, "subsampling": 0}),
    "restarts": (True, {"restart_marker_blocks": 3}),
    "progressive, restarts": (True, {"progressive": True, "restart_marker_rows": 1}),
    "comment, profile": (True, {"comment": b"hello", "icc_profile": bytes(70000)}),
    "upright by its EXIF": (True, {"exif": turned(1)}),
    "turned": (False, {"exif": turned(6)}),
    "mirrored": (False, {"exif": turned(2)}),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", JPEGS)
def test_plain_jpegs_have_pillows_values(name: str, mode: str) -> None:
    plain, options = JPEGS[name]
    counted = Counted()
    for size in ((120, 90), (37, 51), (1, 1), (8, 16)):
        data = encoded(SMOOTH.resize(size).convert(mode), "JPEG", **options)
        assert assert_the_same_both_ways(data, counted) == plain


def relabelled(data: bytes, kind: int, new: int) -> bytes:
    return data.replace(bytes([0xFF, kind]), bytes([0xFF, new]), 1)


FRAME = FILES["baseline"][FILES["baseline"].index(b"\xff\xc0") :][:19]
ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
ODD: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: encoded(SMOOTH.convert("CMYK"), "JPEG"),
    "an unknown Adobe transform": (
        lambda: FILES["baseline"][:2] + ADOBE + b"\2" + FILES["baseline"][2:]
    ),
    "JFIF 2": lambda: FILES["baseline"].replace(b"JFIF\0\1", b"JFIF\0\2"),
    "12 bits": lambda: FILES["baseline"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "lossless": lambda: relabelled(FILES["baseline"], 0xC0, 0xC3),
    "arithmetic codes": lambda: relabelled(FILES["baseline"], 0xC0, 0xC9),
    "4:1:1": lambda: FILES["baseline"].replace(b"\1\x22\0\2\x11", b"\1\x41\0\2\x11"),
    "components of other names": (
        lambda: FILES["baseline"].replace(b"\1\x22\0\2\x11\1\3\x11", b"R\x22\0G\x11\1B\x11")
    ),
    "two frames": lambda: FILES["baseline"].replace(FRAME, FRAME * 2),
    "no end": lambda: FILES["baseline"][:-2],
    "cut off": lambda: FILES["baseline"][:-100],
    "cut off, with an end": lambda: FILES["progressive"][:700] + b"\xff\xd9\0",
    "more behind its end": lambda: FILES["baseline"] + b"\0\0",
    "two of them": lambda: FILES["baseline"] * 2,
    "a marker among its codes": lambda: FILES["baseline"][:-40] + b"\xff\xc4" + bytes(38),
    "padding between segments": (
        lambda: FILES["baseline"][:20] + b"\xff\xff" + FILES["baseline"][20:]
    ),
    "several pictures": (
        lambda: encoded(SMOOTH, "MPO", save_all=True, append_images=[SMOOTH.rotate(180)])
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_left_to_pillow(name: str) -> None:
    assert not assert_the_same_both_ways(ODD[name](), Counted())


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, parts lost, doubled, moved or put in, an end where there is none."""
    file = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(rng.choice((len(file), min(len(file), 700))))
        to = min(at + rng.randrange(1, 20), len(file))
        moved = rng.randrange(len(file))
        marker = bytes([0xFF, rng.randrange(0xC0, 0x100)])
        match rng.randrange(7):
            case 0 | 1:
                file[at] ^= 1 << rng.randrange(8)
            case 2:
                file[at:] = rng.choice((b"", b"\xff\xd9"))
            case 3:
                del file[at:to]
            case 4:
                file[at:at] = file[moved : moved + to - at]
            case 5:
                file[at:at] = rng.choice((marker, bytes(3), b"\xff\xd9", b"\xff\xfe\0\4ab"))
            case 6:
                file[at : at + 2] = marker
        file = file if len(file) > 4 else bytearray(data)
    return bytes(file)


def test_damage_has_pillows_values_or_reasons(capfd: pytest.CaptureFixture[str]) -> None:
    """And what libjpeg prints of it, as Pillow's doesn't, is of damaged codes alone."""
    counted, rng, asked = Counted(), random.Random(0), 0
    files = [
        encoded(SMOOTH.resize((75, 50)).convert(mode), "JPEG", **options)
        for mode in ("RGB", "L")
        for _, options in JPEGS.values()
        if "icc_profile" not in options
    ]
    files.append(encoded(SMOOTH.convert("CMYK"), "JPEG"))
    for _ in range(int(os.environ.get("FUZZ", "3000"))):
        asked += assert_the_same_both_ways(damaged(rng.choice(files), rng), counted)
    assert asked > 100
    printed = set(capfd.readouterr().err.splitlines())
    assert {line[:19] for line in printed} <= {"Corrupt JPEG data: ", "Inconsistent progre"}


@pytest.mark.parametrize("wrong", ["raises", "another size"])
def test_pillow_decides_where_torchvision_is_wrong(wrong: str) -> None:
    asked = []

    def decoder(data: bytes) -> np.ndarray:
        asked.append(data)
        if wrong == "raises":
            raise RuntimeError("Image is incomplete or truncated")
        return np.zeros((3, 90, 120), np.uint8)

    with decoded_by(None):
        expected = read_rgb(FILES["baseline"])
    with decoded_by(decoder):
        np.testing.assert_array_equal(read_rgb(FILES["baseline"]), expected)
    assert asked == [FILES["baseline"]]


@pytest.mark.parametrize("missing", ["torchvision", "its library", "the same values", "PyTorch"])
def test_without_the_same_values_pillow_decodes(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    if missing == "torchvision":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif missing == "its library":
        spec = find("json")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    elif missing == "the same values":
        monkeypatch.setattr(decode, "_RGB", 1)  # grey
    else:
        monkeypatch.delitem(sys.modules, "torch")
    lock_free = decode._LockFree()
    assert lock_free.get() is None
    monkeypatch.undo()
    if missing == "PyTorch":  # it may come later
        assert (lock_free.get() is None) == (decode._lock_free.get() is None)
    else:
        assert lock_free.get() is None


def test_where_only_progressive_files_differ_the_others_are_decoded_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As two libjpegs of one family do, of a file whose last scans are missing."""
    if decode._lock_free.get() is None:
        pytest.skip("torchvision's libjpeg is missing here, or gives other values than Pillow's")
    whole = decode._as_pillow
    monkeypatch.setattr(
        decode,
        "_as_pillow",
        lambda decoder: lambda data: whole(decoder)(data) and b"\xff\xc2" not in data,
    )
    lock_free = decode._LockFree()
    assert lock_free.get(False) is not None and lock_free.get(True) is None


def test_it_is_loaded_once_and_seen_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def load() -> dict[bool, Callable[[bytes], np.ndarray]]:
        loads.append(threading.get_ident())
        return {False: lambda data: np.zeros((1, 1, 3), np.uint8)}

    monkeypatch.setattr(decode._LockFree, "_load", staticmethod(load))
    lock_free, barrier = decode._LockFree(), threading.Barrier(8)

    def get(_: int) -> object:
        barrier.wait()
        return lock_free.get()

    with ThreadPoolExecutor(8) as pool:
        decoders = set(pool.map(get, range(8)))
    assert len(loads) == 1 and len(decoders) == 1 and None not in decoders


def test_neither_pytorch_nor_torchvision_is_imported_for_it(tmp_path: Path) -> None:
    (tmp_path / "picture.jpg").write_bytes(FILES["baseline"])
    program = (
        "import sys; from vggfeat.decode import read_rgb; read_rgb(sys.argv[1]); assert 'torch' not"
        " in sys.modules; import torch; read_rgb(sys.argv[1]); assert 'torchvision' not in"
        " sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "picture.jpg")], check=True)


# The shape, by a look at the header.


def png_turned(behind: bool) -> bytes:
    """EXIF before or behind the pixels; 3 rows of 2 are 2 of 3."""
    exif = chunk(b"eXIf", turned(6).tobytes()[6:])
    data = png(2, 3, 8, 0, b"\0\1\2" * 3)
    at = -12 if behind else 33
    return data[:at] + exif + data[at:]


def shaped_files() -> dict[str, bytes]:
    files = dict(FILES)
    for orientation in range(1, 9):
        for name in ("JPEG", "TIFF", "PNG", "WEBP"):
            if name != "WEBP" or features.check("webp"):
                data = encoded(SMOOTH, name, exif=turned(orientation))
                files[f"{name}, orientation {orientation}"] = data
    xmp = b'<x tiff:Orientation="6"/>'
    return files | {
        "PNG, EXIF before its pixels": png_turned(False),
        "PNG, EXIF behind its pixels": png_turned(True),
        "JPEG, XMP": encoded(SMOOTH, "JPEG", xmp=xmp),
        "JPEG, broken EXIF": encoded(SMOOTH, "JPEG", exif=b"Exif\0\0nonsense"),
        "JPEG, a long header": encoded(SMOOTH, "JPEG", icc_profile=bytes(200_000)),
        "JPEG, a long header, turned": encoded(
            SMOOTH, "JPEG", icc_profile=bytes(200_000), exif=turned(8)
        ),
        "CMYK": encoded(SMOOTH.convert("CMYK"), "JPEG"),
        "TIFF, its tags last": encoded(SMOOTH.resize((400, 300)), "TIFF", exif=turned(5)),
        "MPO": ODD["several pictures"](),
        "sixteen bits": encoded(Image.fromarray(DEEP), "PNG"),
    }


@pytest.mark.parametrize("name", shaped_files())
def test_the_expected_shape_is_that_which_is_read(name: str, tmp_path: Path) -> None:
    data = shaped_files()[name]
    path = tmp_path / "image"
    path.write_bytes(data)
    shape = read_rgb(data).shape[:2]
    assert expected_shape(path) == expected_shape(str(path)) == expected_shape(data) == shape
    assert upright_shape(path) == shape


def test_the_expected_shape_of_what_is_in_memory() -> None:
    assert expected_shape(PICTURE) == expected_shape(PICTURE[:, :, 0]) == PICTURE.shape[:2]
    assert expected_shape(Image.fromarray(PICTURE)) == PICTURE.shape[:2]
    turned_image = Image.open(io.BytesIO(encoded(SMOOTH, "JPEG", exif=turned(6))))
    assert expected_shape(turned_image) == read_rgb(turned_image).shape[:2] == (120, 90)


def test_no_shape_is_expected_of_what_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty.jpg").touch()
    for name in ("pipe.jpg", "empty.jpg", "missing.jpg", ".", "zero\0byte", "n" * 300):
        assert expected_shape(tmp_path / name) is None
    for source in ("/dev/zero", "", b"", b"hi", bytes(70000), FILES["baseline"][:100], np.zeros(3)):
        assert expected_shape(source) is None
    for no_source in (None, 3, 10**15, [b"hi"]):
        assert expected_shape(no_source) is None  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.floats(0, 1), st.integers(0, 255))
def test_an_expected_shape_is_none_or_that_of_the_header(
    name: str, place: float, value: int
) -> None:
    data = bytearray(FILES[name])
    data[int(min(place**3, 1 - 1e-9) * len(data))] = value
    shape = expected_shape(bytes(data))
    assert shape is None or (len(shape) == 2 and all(isinstance(side, int) for side in shape))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_is_turned_as_its_image_is(orientation: int, tmp_path: Path) -> None:
    stored = np.zeros((40, 60, 3), np.uint8)
    x1, y1, x2, y2 = 5, 8, 25, 20
    stored[y1:y2, x1:x2] = 255
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "x.png"
    Image.fromarray(stored).save(path, exif=exif)
    frame = expected_frame(path)
    assert frame == (40, 60, orientation)
    seen = read_rgb(path)
    assert seen.shape[:2] == frame.upright
    left, top, right, bottom = (int(side) for side in frame.turned(x1, y1, x2, y2))
    assert (seen[top:bottom, left:right] == 255).all()
    assert seen.sum() == 255 * 3 * (right - left) * (bottom - top)
