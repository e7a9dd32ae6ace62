"""Files that ask for more memory or time than their size and picture warrant: refused before it is spent."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vggfeat import headers
from vggfeat.decode import MAX_PIXELS, read_rgb
from vggfeat.errors import UnreadableImage

from .test_images import FILES, chunk, encoded, png

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
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, at) if big else struct.pack("<2sHI", b"II", 42, at)
    layout = "<HHQQ" if big else "<HHII"
    body = b"".join(struct.pack(layout, tag, *entry) for tag, entry in sorted(entries.items()))
    count = struct.pack("<Q" if big else "<H", len(entries))
    return head + data + count + body + bytes(8 if big else 4)


def tiled(side: int, tile: int, compression: int, data: bytes, big: bool = False) -> bytes:
    return tiff(
        {
            256: (4, 1, side), 257: (4, 1, side), 258: (3, 1, 8), 259: (3, 1, compression), 262: (3, 1, 1),
            277: (3, 1, 1), 322: (4, 1, tile), 323: (4, 1, tile), 324: (4, 1, 16 if big else 8), 325: (4, 1, len(data)),
        },
        data,
        big,
    )  # fmt: skip


def strip(width: int, height: int, bits: int, data: bytes, **more: tuple[int, int, int]) -> bytes:
    """Deflated grey in one strip."""
    return tiff(
        {
            256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, bits), 259: (3, 1, 8), 262: (3, 1, 1),
            273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, 0xFFFFFFFF), 279: (4, 1, len(data)),
        }
        | {int(tag[1:]): entry for tag, entry in more.items()},
        data,
    )  # fmt: skip


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
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + info + bytes(range(256)) * 4 + data


def webp(width: int, height: int) -> bytes:
    chunks = b"VP8X" + struct.pack("<I", 10) + bytes(4)
    chunks += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks += encoded(SMALL, "WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


# Name -> how it is made, and why it is refused. Each is at most 3 MB.
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "TIFF: a tile of 3.6 Gpixel": (lambda: tiled(64, 60000, 8, zlib.compress(bytes(4096))), MEMORY),
    "TIFF: a tile of 3.6 Gpixel, big": (lambda: tiled(64, 60000, 8, zlib.compress(bytes(4096)), True), MEMORY),
    "TIFF: tiles of one pixel": (lambda: tiled(12000, 1, 8, zlib.compress(b"\0")), STEPS),
    "TIFF: JPEG tiles, progressive": (
        lambda: tiled(12000, 12000, 7, jpeg(12000, 12000, 0xC2, 90, 1)), STEPS
    ),
    "TIFF: tags that share their data": (lambda: shared_tags(25000, 1_000_000), MEMORY),
    "TIFF: 2^40 tags": (
        lambda: b"II\x2b\0\x08\0\0\0" + struct.pack("<QQ", 16, 1 << 40) + bytes(1000), PARTS
    ),
    "TIFF: twice, the second one huge": (
        lambda: strip(64, 64, 8, zlib.compress(bytes(4096)), t322=(4, 1, 1 << 20), t323=(4, 1, 1 << 20)), MEMORY
    ),
    "JPEG: 10,000 progressive scans": (lambda: jpeg(13000, 13000, 0xC2, 10000), STEPS),
    "JPEG: 10,000 sequential scans": (lambda: jpeg(13000, 13000, 0xC0, 10000), STEPS),
    "JPEG: scans, and a marker cut off": (lambda: jpeg(13000, 13000, 0xC2, 100)[:-2] + b"\xff\xda", STEPS),
    "JPEG: scans behind an end in a comment": (
        lambda: jpeg(13000, 13000, 0xC2, 9)[:-2] + segment(0xFE, b"\xff\xd9") + segment(0xDA, LATER) * 90, STEPS
    ),
    "JPEG: EXIF tags that share their data": (lambda: exif_bomb(25000, 1_000_000), MEMORY),
    "JPEG: junk between segments": (lambda: FILES["baseline"][:20] + bytes(1_100_000) + FILES["baseline"][20:], PARTS),
    "JPEG: empty segments": (
        lambda: FILES["baseline"][:2] + segment(0xFE, b"") * 250_000 + FILES["baseline"][2:], PARTS
    ),
    "WEBP: a canvas of 179 Mpixel": (lambda: webp(16383, 10900), MEMORY),
    "ICO: a PNG of 900 Mpixel inside": (lambda: icon(png(30000, 30000, 1, 0, b"")), MEMORY),
    "ICO: a bitmap of 900 Mpixel inside": (lambda: icon(bmp(30000, 60000, 32, 0, b"")[14:]), MEMORY),
    "BMP: runs, decoded by Python": (lambda: bmp(13000, 13000, 8, 1, b"\xff\0" * 100), STEPS),
    "QOI: runs, decoded by Python": (
        lambda: b"qoif" + struct.pack(">IIBB", 13000, 13000, 3, 0) + b"\xfd" * 1000, STEPS
    ),
    "PPM: text, decoded by Python": (lambda: b"P2 13000 13000 255 " + b"1 " * 1000, STEPS),
    "PPM: white is 15, by Python": (lambda: b"P5 13000 13000 15 " + bytes(1000), STEPS),
    "PNG: 1 bit": (lambda: png(1 << 30, 1 << 30, 1, 0, b""), "pixels is over the limit"),
    "GIF: a large screen": (
        lambda: encoded(SMALL, "GIF").replace(struct.pack("<HH", 8, 6), b"\xff" * 4, 1), "pixels is over the limit"
    ),
}  # fmt: skip


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
