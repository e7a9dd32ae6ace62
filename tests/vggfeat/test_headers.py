"""Files that ask for more memory or time than their size and picture warrant: refused before it is
spent.
"""

from __future__ import annotations

import io
import signal
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from vggfeat import decode, headers
from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage

from ..conftest import HANG, PEAK, needs_peak, python_that_runs
from .test_decode import FILES, SMOOTH, can_read, chunk, encoded, png

SMALL = Image.new("RGB", (8, 6), (200, 100, 50))
MEMORY, STEPS, PARTS = (
    "decoding would take .* MB of memory",
    "decoding would take .* million steps",
    "too many parts",
)


def tiff(entries: dict[int, tuple[int, int, int]], data: bytes, big: bool = False) -> bytes:
    """A TIFF of one directory, tag -> (type, count, value or place), and `data` at byte 8 (16)."""
    start = 16 if big else 8
    at = start + len(data)
    head = (
        struct.pack("<2sHHHQ", b"II", 43, 8, 0, at) if big else struct.pack("<2sHI", b"II", 42, at)
    )
    layout = "<HHQQ" if big else "<HHII"
    body = b"".join(struct.pack(layout, tag, *entry) for tag, entry in sorted(entries.items()))
    count = struct.pack("<Q" if big else "<H", len(entries))
    return head + data + count + body + bytes(8 if big else 4)


def tiled(side: int, tile: int, compression: int, data: bytes, big: bool = False) -> bytes:
    return tiff(
        {
            256: (4, 1, side),
            257: (4, 1, side),
            258: (3, 1, 8),
            259: (3, 1, compression),
            262: (3, 1, 1),
            277: (3, 1, 1),
            322: (4, 1, tile),
            323: (4, 1, tile),
            324: (4, 1, 16 if big else 8),
            325: (4, 1, len(data)),
        },
        data,
        big,
    )


def strip(width: int, height: int, bits: int, data: bytes, **more: tuple[int, int, int]) -> bytes:
    """Deflated grey in one strip."""
    return tiff(
        {
            256: (4, 1, width),
            257: (4, 1, height),
            258: (3, 1, bits),
            259: (3, 1, 8),
            262: (3, 1, 1),
            273: (4, 1, 8),
            277: (3, 1, 1),
            278: (4, 1, 0xFFFFFFFF),
            279: (4, 1, len(data)),
        }
        | {int(tag[1:]): entry for tag, entry in more.items()},
        data,
    )


def shared_tags(n: int, size: int) -> bytes:
    """A good picture, and n tags that each hold the same `size` bytes."""
    data = zlib.compress(bytes(48))
    tags = {f"t{36000 + i}": (7, size, 8) for i in range(n)}
    return strip(8, 6, 8, data.ljust(size, b"\0"), **tags)


def segment(kind: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, 2 + len(data)) + data


LATER = bytes([1, 1, 0, 1, 63, 0])  # of a progressive file: all frequencies of the first component


def jpeg(width: int, height: int, kind: int, scans: int, components: int = 3) -> bytes:
    """Scans that hold nothing: libjpeg goes over all blocks for each."""
    tables = segment(0xDB, b"\0" + bytes([1] * 64))
    tables += b"".join(segment(0xC4, bytes([where, 1, *[0] * 15, 0])) for where in (0x00, 0x10))
    frame = struct.pack(">BHHB", 8, height, width, components)
    frame += b"".join(bytes([i + 1, 0x11, 0]) for i in range(components))
    progressive = kind == 0xC2
    selectors = b"".join(bytes([i + 1, 0]) for i in range(components))
    first = bytes([components, *selectors, 0, 0 if progressive else 63, 0])
    later = LATER if progressive else bytes([1, 1, 0, 0, 63, 0])
    body = segment(0xDA, first if progressive else later) + segment(0xDA, later) * (scans - 1)
    return b"\xff\xd8" + tables + segment(kind, frame) + body + b"\xff\xd9"


def exif_bomb(n: int, size: int) -> bytes:
    blob = tiff({36000 + i: (7, size, 8) for i in range(n)}, b"\0" * size)
    parts = [blob[i : i + 65000] for i in range(0, len(blob), 65000)]
    segments = b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts)
    return FILES["baseline"][:2] + segments + FILES["baseline"][2:]


def icon(picture: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


def bmp(width: int, height: int, bits: int, compression: int, data: bytes) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return (
        b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + info + bytes(range(256)) * 4 + data
    )


def webp(width: int, height: int) -> bytes:
    chunks = b"VP8X" + struct.pack("<I", 10) + bytes(4)
    chunks += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks += encoded(SMALL, "WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


# Name -> how it is made, and why it is refused. Each is at most 3 MB.
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "TIFF: a tile of 3.6 Gpixel": (lambda: tiled(64, 60000, 8, zlib.compress(bytes(4096))), MEMORY),
    "TIFF: a tile of 3.6 Gpixel, big": (
        lambda: tiled(64, 60000, 8, zlib.compress(bytes(4096)), True),
        MEMORY,
    ),
    "TIFF: tiles of one pixel": (lambda: tiled(12000, 1, 8, zlib.compress(b"\0")), STEPS),
    "TIFF: JPEG tiles, progressive": (
        lambda: tiled(12000, 12000, 7, jpeg(12000, 12000, 0xC2, 90, 1)),
        STEPS,
    ),
    "TIFF: tags that share their data": (lambda: shared_tags(25000, 1_000_000), MEMORY),
    "TIFF: a tile of 3.6 Gpixel, high byte first": (
        lambda: (
            b"MM\0\x2b\0\x08\0\0"
            + struct.pack(">QQ", 16, 5)
            + b"".join(
                struct.pack(">HHQQ", tag, 4, 1, value << 32)
                for tag, value in [(256, 64), (257, 64), (259, 8), (322, 60000), (323, 60000)]
            )
        ),
        MEMORY,
    ),
    "TIFF: 2^40 tags": (
        lambda: b"II\x2b\0\x08\0\0\0" + struct.pack("<QQ", 16, 1 << 40) + bytes(1000),
        PARTS,
    ),
    "TIFF: twice, the second one huge": (
        lambda: strip(
            64, 64, 8, zlib.compress(bytes(4096)), t322=(4, 1, 1 << 20), t323=(4, 1, 1 << 20)
        ),
        MEMORY,
    ),
    "JPEG: 10,000 progressive scans": (lambda: jpeg(13000, 13000, 0xC2, 10000), STEPS),
    "JPEG: 10,000 sequential scans": (lambda: jpeg(13000, 13000, 0xC0, 10000), STEPS),
    "JPEG: scans, and a marker cut off": (
        lambda: jpeg(13000, 13000, 0xC2, 100)[:-2] + b"\xff\xda",
        STEPS,
    ),
    "JPEG: scans behind an end in a comment": (
        lambda: (
            jpeg(13000, 13000, 0xC2, 9)[:-2]
            + segment(0xFE, b"\xff\xd9")
            + segment(0xDA, LATER) * 90
        ),
        STEPS,
    ),
    "JPEG: EXIF tags that share their data": (lambda: exif_bomb(25000, 1_000_000), MEMORY),
    "JPEG: junk between segments": (
        lambda: FILES["baseline"][:20] + bytes(1_100_000) + FILES["baseline"][20:],
        PARTS,
    ),
    "JPEG: empty segments": (
        lambda: FILES["baseline"][:2] + segment(0xFE, b"") * 250_000 + FILES["baseline"][2:],
        PARTS,
    ),
    "WEBP: a canvas of 179 Mpixel": (lambda: webp(16383, 10900), MEMORY),
    "ICO: a PNG of 900 Mpixel inside": (lambda: icon(png(30000, 30000, 1, 0, b"")), MEMORY),
    "ICO: a bitmap of 900 Mpixel inside": (
        lambda: icon(bmp(30000, 60000, 32, 0, b"")[14:]),
        MEMORY,
    ),
    "BMP: runs, decoded by Python": (lambda: bmp(13000, 13000, 8, 1, b"\xff\0" * 100), STEPS),
    "QOI: runs, decoded by Python": (
        lambda: b"qoif" + struct.pack(">IIBB", 13000, 13000, 3, 0) + b"\xfd" * 1000,
        STEPS,
    ),
    "PPM: text, decoded by Python": (lambda: b"P2 13000 13000 255 " + b"1 " * 1000, STEPS),
    "PPM: white is 15, by Python": (lambda: b"P5 13000 13000 15 " + bytes(1000), STEPS),
    "PNG: 1 bit": (lambda: png(1 << 30, 1 << 30, 1, 0, b""), "pixels is over the limit"),
    "PNG: one row of 16 bits and alpha": (lambda: png(170_000_000, 1, 16, 6, b"\0" * 1000), MEMORY),
    "GIF: a large screen": (
        lambda: encoded(SMALL, "GIF").replace(struct.pack("<HH", 8, 6), b"\xff" * 4, 1),
        "pixels is over the limit",
    ),
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bombs")
    for name, (make, _) in BOMBS.items():
        (folder / name).write_bytes(make())
    return folder


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header(name: str, bombs: Path) -> None:
    with pytest.raises(UnreadableImage, match=BOMBS[name][1]) as caught:
        read_rgb(bombs / name)
    assert str(caught.value).isprintable()


@needs_peak
def test_no_bomb_takes_memory(bombs: Path) -> None:
    """All of them in one process: 20 MB, where the second alone would take 3.6 GB."""
    assert peak_above_start(*bombs.iterdir()) < 100e6


def peak_above_start(*paths: Path, also: str = "os") -> int:
    """Bytes that the reading of the files, good or bad, takes at most, in a process that does
    nothing else. also: what it imports.
    """
    script = f"""
        import sys, {also}
        from vggfeat.decode import read_rgb
        from vggfeat.errors import UnreadableImage

        start = {PEAK}
        for path in sys.argv[1:]:
            try:
                read_rgb(path)
            except UnreadableImage:
                pass
        print({PEAK} - start)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, paths)],
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(ran.stdout)


@needs_peak
@pytest.mark.parametrize(
    "name", ["alpha.png", "palette.png", "float.tif", "deep.png", "turned.jpg", "progressive.jpg"]
)
def test_what_is_decoded_stays_within_the_bound(name: str, tmp_path: Path) -> None:
    """16 bytes a pixel of 9 Mpixel, and what is converted at a time; alpha took 29 for each of all
    pixels.
    """
    width, height = 3500, 2600
    exif = Image.Exif()
    exif[0x0112] = 6
    images: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "alpha.png": (Image.new("RGBA", (width, height), (1, 2, 3, 4)), {"compress_level": 1}),
        "palette.png": (
            Image.new("P", (width, height), 1),
            {"compress_level": 1, "transparency": 1},
        ),
        "float.tif": (Image.new("F", (width, height), 0.5), {}),
        "deep.png": (
            Image.fromarray(np.full((height, width), 777, np.uint16)),
            {"compress_level": 1},
        ),
        "turned.jpg": (Image.new("RGB", (width, height), (1, 2, 3)), {"exif": exif}),
        "progressive.jpg": (
            Image.new("RGB", (width, height), (1, 2, 3)),
            {"progressive": True, "subsampling": 0},
        ),
    }
    image, options = images[name]
    image.save(tmp_path / name, **options)
    slack = (
        38 * decode._BLOCK // 2
        if name in ("alpha.png", "float.tif", "deep.png", "palette.png")
        else 0
    )
    # two decoders; see `decode`
    for also in ("os", "torch") if name == "progressive.jpg" else ("os",):
        assert peak_above_start(tmp_path / name, also=also) < 16 * width * height + slack


# Small parts, many of them, for each kind of header that is a list: each was read to its end.
PARTS_OF_HEADERS = {
    "PNG": lambda n: FILES["PNG"][:33] + chunk(b"tEXt", b"a\0b") * n + FILES["PNG"][33:],
    "PNG, behind": lambda n: FILES["PNG"][:-12] + chunk(b"tEXt", b"a\0b") * n + FILES["PNG"][-12:],
    "GIF": (
        lambda n: (
            FILES["GIF"][:13]
            + bytes(768)[: 3 << (FILES["GIF"][10] & 7) + 1]
            + b"!\xfe"
            + b"\1a" * n
        )
    ),
    "PPM": lambda n: b"P6 #" + b"c" * n + b"\n2 2 255 " + bytes(12),
    "XPM": lambda n: b"/* XPM */\n" + b"\n" * n,
    "IM": lambda n: b"Image type: L\n" * n + b"\x1a",
    "JPEG": lambda n: FILES["baseline"][:2] + segment(0xFE, b"") * n + FILES["baseline"][2:],
    "PSD": (
        lambda n: (
            struct.pack(">4sH6sHIIHH", b"8BPS", 1, bytes(6), 3, 5, 6, 8, 3)
            + struct.pack(">II", 0, 12 * n)
            + b"8BIM\0\0\0\0\0\0\0\0" * n
            + bytes(200)
        )
    ),
}


@pytest.mark.parametrize("name", PARTS_OF_HEADERS)
def test_headers_of_many_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_CALLS", 2000)  # for a million, files of some MB each
    with pytest.raises(UnreadableImage, match=PARTS):
        read_rgb(PARTS_OF_HEADERS[name](3000))


def test_a_part_that_is_read_again_and_again() -> None:
    file = headers.Metered(bytes(1 << 20))
    with pytest.raises(UnreadableImage, match=PARTS):
        for _ in range(30):
            file.seek(0)
            file.read()


def test_numbers_of_a_tag_are_counted_as_pythons() -> None:
    """A strip's place takes 4 bytes in a file, and 500 as Pillow keeps it; a letter one; what isn't
    there, none.
    """
    data = zlib.compress(bytes(48)).ljust(400_000, b"\0")
    few = headers.before_opening("TIFF", strip(8, 6, 8, data)).n_bytes
    for tag, kind, count, at_least, at_most in [
        (273, 4, 100_000, 50e6, 60e6),
        (50000, 4, 100_000, 4e6, 5e6),
        (50000, 5, 50_000, 20e6, 21e6),
        (50000, 2, 400_000, 0.4e6, 0.5e6),
        (50000, 5, 60_000, 0, 1000),
    ]:
        more = headers.before_opening(
            "TIFF", strip(8, 6, 8, data, **{f"t{tag}": (kind, count, 8)})
        ).n_bytes
        assert at_least <= more - few <= at_most, tag


def test_exif_that_unpacks_to_gigabytes_is_left_alone() -> None:
    turned = {0x0112: (3, 1, 3)}
    bomb = tiff(turned | {36000 + i: (7, 60_000, 8) for i in range(5000)}, bytes(60_000))

    def picture(blob: bytes) -> bytes:
        return FILES["PNG"][:33] + chunk(b"eXIf", blob) + FILES["PNG"][33:]

    np.testing.assert_array_equal(
        read_rgb(picture(tiff(turned, b""))), np.asarray(SMOOTH)[::-1, ::-1]
    )
    np.testing.assert_array_equal(read_rgb(picture(bomb)), np.asarray(SMOOTH))


def test_steps_of_a_baseline_file_are_its_first_scan() -> None:
    """A thumbnail before it and another picture, or a film, behind it hold scans that are not
    decoded.
    """
    data = FILES["baseline"]
    more = segment(0xE2, FILES["progressive"][:60000]) * 3
    need = headers.before_opening("JPEG", data[:2] + more + data[2:] + FILES["progressive"] * 20)
    assert need.steps == headers.before_opening("JPEG", data).steps == (120 + 32) * (90 + 32)
    scans = FILES["progressive"].count(b"\xff\xda")
    assert headers.before_opening("JPEG", FILES["progressive"]).steps == scans * (120 + 32) * (
        90 + 32
    )


@pytest.mark.parametrize("name", ["baseline", "progressive"])
def test_a_plain_jpeg_is_told_by_all_of_its_header(name: str) -> None:
    data = FILES[name]
    scan = data.index(b"\xff\xda")
    plain = headers.plain_jpeg(data)
    assert plain and (plain.height, plain.width, plain.layers) == (90, 120, 3)
    assert plain.bare and plain.progressive == (name == "progressive")
    assert plain.scan == scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    assert headers.plain_jpeg(data[: plain.scan]) == plain
    assert not any(headers.plain_jpeg(data[:end]) for end in range(plain.scan))
    assert plain.whole(data)
    assert not any(plain.whole(data[:end]) for end in range(plain.scan, len(data)))


def test_a_plain_jpeg_has_no_thousand_segments() -> None:
    data = FILES["baseline"]
    assert headers.plain_jpeg(data[:2] + segment(0xFE, b"") * 900 + data[2:])
    assert not headers.plain_jpeg(data[:2] + segment(0xFE, b"") * 1000 + data[2:])


@pytest.mark.parametrize(
    "compression", [None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"]
)
@pytest.mark.parametrize("big", [False, True])
def test_a_tiffs_need_is_its_pixels_and_strips(compression: str | None, big: bool) -> None:
    if compression and not features.check("libtiff"):
        pytest.skip("this Pillow has no libtiff")
    data = encoded(SMOOTH, "TIFF", compression=compression, big_tiff=big)
    need = headers.before_opening("TIFF", data)
    assert 120 * 90 * 4 <= need.n_bytes - len(data) <= 120 * 90 * 20
    assert 120 * 90 <= need.steps <= 120 * 90 + 91 * 1000


@pytest.mark.parametrize("block", [64, 1000])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.asarray(SMOOTH.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    images = {
        mode: SMOOTH.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr")
    }
    images["RGBA"].putalpha(Image.fromarray(grey))
    files = [encoded(image, "TIFF") for image in images.values()]
    files += [encoded(deep, name) for name in ("PNG", "TIFF")]
    files += [encoded(Image.fromarray(grey / np.float32(255)), "TIFF")]
    files += [
        encoded(images["P"], "PNG", transparency=3),
        encoded(deep, "PNG", transparency=int(grey[5, 5]) * 257),
    ]
    for k in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = k
        files.append(encoded(SMOOTH, "PNG", exif=exif))
    readable = [data for data in files if can_read(data)]
    whole = [read_rgb(data) for data in readable]
    monkeypatch.setattr(decode, "_BLOCK", block)
    for data, expected in zip(readable, whole, strict=True):
        np.testing.assert_array_equal(read_rgb(data), expected)
    floats = encoded(Image.fromarray(grey.astype(np.float32)), "TIFF")
    with pytest.raises(UnreadableImage, match=rf"span {grey.min()}..{grey.max()}; floats"):
        read_rgb(floats)


@pytest.mark.parametrize(
    ("name", "feature"), [("AVIF", "avif"), ("JPEG2000", "jpg_2000"), ("ICNS", None), ("BLP", None)]
)
def test_formats_that_a_process_of_its_own_decodes(name: str, feature: str | None) -> None:
    if feature and feature not in features.get_supported():
        pytest.skip(f"this Pillow has no {name}")
    image = SMOOTH.quantize() if name == "BLP" else SMOOTH
    data = encoded(image, name)
    with Image.open(io.BytesIO(data)) as theirs:
        expected = np.asarray(theirs.convert("RGB"))
    np.testing.assert_array_equal(read_rgb(data), expected)
    with pytest.raises(UnreadableImage, match=r"pixels is over the limit of 99 pixels"):
        read_rgb(data, max_pixels=99)
    with pytest.raises(UnreadableImage):
        read_rgb(data[: len(data) // 2])


@pytest.mark.skipif(
    "jpg_2000" not in features.get_supported(), reason="this Pillow has no JPEG 2000"
)
def test_the_kernel_holds_the_limits_of_that_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """65,025 tiles, of which each takes 10 kB before it is decoded."""

    def sized(side: int, tile: int) -> bytes:
        data = bytearray(encoded(SMOOTH, "JPEG2000", no_jp2=True))
        at = data.index(b"\xff\x51") + 6
        data[at : at + 32] = struct.pack(">8I", side, side, 0, 0, tile, tile, 0, 0)
        return bytes(data)

    monkeypatch.setattr(headers, "bytes_limit", lambda max_pixels: 0)
    with pytest.raises(UnreadableImage, match=r"memory|damaged|crashed"):
        read_rgb(sized(2040, 8))
    monkeypatch.undo()
    assert read_rgb(sized(2040, 8)).shape == (2040, 2040, 3)


ENDLESS = """
from vggfeat import decode
def endless(*_):
    while True:
        pass
decode._decode = endless
decode._child(*map(int, sys.argv[-3:]))
"""


def test_a_decoder_that_never_ends_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", python_that_runs(tmp_path, ENDLESS))
    monkeypatch.setattr(decode, "_CHILD_SECONDS", 1)
    monkeypatch.setattr(decode, "_CHILD_WAIT", HANG)
    killed = "|".join(str(-number) for number in (signal.SIGKILL, signal.SIGXCPU))
    with pytest.raises(UnreadableImage, match=rf"1 s of processor time \(status ({killed})\)$"):
        read_rgb(b"SIMPLE  = " + bytes(200))


def test_that_process_may_die(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"SIMPLE  = " + bytes(200)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UnreadableImage, match=r"^can't start a process to decode it: "):
        read_rgb(data)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UnreadableImage, match=r"^its decoder crashed, or took more than 30 s"):
        read_rgb(data)
