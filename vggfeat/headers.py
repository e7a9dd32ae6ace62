"""What decoding a file would take, by arithmetic on its header: no pixel is decoded for it, nothing
is allocated.

A few hundred bytes can ask for terabytes or for hours. The bound, for each thread that decodes:

- memory: 16 bytes for each of `max_pixels` (2.9 GB for the default), or 512 MiB where that is more.
  It holds the file, what the decoder keeps, Pillow's image and the array that is returned.
- time: 24 steps for each of `max_pixels`, or 2^28. A step is one pass of a compiled decoder over
  one pixel, some 5 to 10 ns, so that this is less than a minute. A progressive JPEG takes a pass
  for each scan, of which libjpeg writes up to 18; a decoder that is written in Python takes 100
  steps for a pixel. What parses headers in Python reads at most a million times.

`before_opening` is for formats that take much where they are opened, or for reasons that only their
headers tell; `of_pixels` for all, once Pillow knows the size. What isn't in `FORMATS` has no such
bound; see `decode`.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image

from vggfeat.errors import UnreadableImage

# What a decoder takes for each pixel beside Pillow's image: bytes. JPEG: coefficients, 2 bytes for
# each of up to 4 components. WEBP: two canvases, the decoder's pixels, a copy. TIFF: the upright
# image; strips and tiles are counted below. ICO: two pictures and a mask. The others fill Pillow's
# image row by row (1); Python's decoders among them, marked by Pillow, collect all of it first.
FORMATS: dict[str, int] = {
    "JPEG": 8,
    "PNG": 1,
    "GIF": 4,
    "BMP": 1,
    "DIB": 1,
    "TIFF": 4,
    "WEBP": 16,
    "PPM": 1,
    "ICO": 16,
    "CUR": 1,
    "TGA": 1,
    "PCX": 1,
    "DCX": 1,
    "SGI": 4,
    "SUN": 1,
    "QOI": 1,
    "DDS": 4,
    "FTEX": 4,
    "PSD": 1,
    "FLI": 1,
    "GBR": 8,
    "IM": 4,
    "IMT": 1,
    "MCIDAS": 1,
    "MSP": 1,
    "PCD": 4,
    "PIXAR": 1,
    "SPIDER": 1,
    "XBM": 1,
    "XPM": 8,
    "XVTHUMB": 1,
}
_PYTHON_BYTES, _PYTHON_STEPS = 12, 100
_RETURNED = 3  # bytes a pixel of the array that is returned
_ENCODED_ROWS = 16  # bytes a column: a decoder's last two rows, of up to four times 16 bits
_CALLS = 1_000_000
_TOO_MANY_PARTS = "its header has too many parts, or parts that overlap"
_PER_STRIP = 1000  # steps to begin a strip or tile: a decoder is set up


class Need(NamedTuple):
    """What decoding takes at most."""

    n_bytes: int
    steps: int
    calls: int = 0
    """Of Python, to parse it, where the format is parsed without `Metered`."""


def bytes_limit(max_pixels: int) -> int:
    return max(16 * max_pixels, 1 << 29)


def refuse_above_bound(need: Need, max_pixels: int) -> None:
    """Raises UnreadableImage if that is more than a thread may take; see the top of this file."""
    for value, limit, unit in (
        (need.n_bytes, bytes_limit(max_pixels), "MB of memory"),
        (need.steps, max(24 * max_pixels, 1 << 28), "million steps"),
    ):
        if value > limit:
            raise UnreadableImage(
                f"decoding would take {value / 1e6:.0f} {unit}; the limit is {limit / 1e6:.0f}"
            )
    if need.calls > _CALLS:
        raise UnreadableImage(_TOO_MANY_PARTS)


def in_memory(name: str, data: bytes) -> io.BytesIO:
    """The file for the plug-in `name`. A JPEG's calls are counted by `before_opening`: most images
    are JPEGs.
    """
    return io.BytesIO(data) if name == "JPEG" else Metered(data)


class Metered(io.BytesIO):
    """A file in memory that refuses to be read in too many pieces, or over and over.

    Pillow's parsers are loops of Python over chunks, tags, lines or single bytes, each a call or
    more, and keep less than 500 bytes of what one call reads beside the bytes themselves.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._calls = _CALLS
        self._bytes = 8 * len(data) + (1 << 24)

    def allow_pixels(self, image: Image.Image) -> None:
        """Decoders that are written in Python read their pixels one by one."""
        if _in_python(image):
            self._calls += 4 * image.width * image.height

    def read(self, size: int | None = -1, /) -> bytes:
        return self._count(_read(self, size))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._count(_readline(self, size))

    def _count(self, data: bytes) -> bytes:
        self._calls -= 1
        self._bytes -= len(data)
        if self._calls < 0 or self._bytes < 0:
            raise UnreadableImage(_TOO_MANY_PARTS)
        return data


_read, _readline = io.BytesIO.read, io.BytesIO.readline


def of_pixels(image: Image.Image, name: str, n_bytes: int) -> Need:
    """For an opened file of `n_bytes` bytes, that the plug-in `name` has opened: by its size, mode
    and decoder.
    """
    pixels = image.width * image.height
    python = _in_python(image)
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    extra = max(FORMATS[name], _PYTHON_BYTES if python else 0, _RETURNED)
    n_bytes += pixels * (stored + extra) + image.width * _ENCODED_ROWS
    return Need(n_bytes, pixels * (_PYTHON_STEPS if python else 1))


def _in_python(image: Image.Image) -> bool:
    return any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))


def before_opening(name: str, data: bytes) -> Need:
    """For a file that the plug-in `name` accepts. What can't be parsed here is Pillow's to
    refuse.
    """
    parse = _PARSERS.get(name)
    try:
        need = parse(data) if parse else Need(0, 0)
    except (IndexError, struct.error):  # the header ends too soon, for Pillow's parser as well
        need = Need(0, 0)
    return Need(len(data) + need.n_bytes, need.steps, need.calls)


# ---- JPEG


# without padding, and those that have no segment
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_SOI, _EOI, _SOS, _DQT, _DHT, _DRI, _COM = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
_APP0, _APP1, _APP14, _APP15 = 0xE0, 0xE1, 0xEE, 0xEF
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def _jpeg(data: bytes) -> Need:
    # Markers are looked for as libjpeg does: in entropy-coded data 0xFF is followed by 0 or by a
    # restart marker. A baseline file whose first scan has all components is finished by it, and
    # what follows isn't looked at.
    pixels = layers = scans = calls = 0
    progressive = False
    exif = []
    at = 0
    while (found := _MARKER.search(data, at)) and calls <= _CALLS:
        if not scans:
            calls += 5 + found.start() - at  # Pillow reads what lies between segments byte by byte
        at = found.end()
        kind = data[at - 1]
        if kind in (_SOI, _EOI):
            if kind == _EOI and scans:
                break
            continue
        if at + 10 > len(data):  # no scan begins so near the end
            break
        length = data[at] << 8 | data[at + 1]
        if kind in _SOF:
            height, width, layers = struct.unpack_from(">HHB", data, at + 3)
            pixels = max(pixels, (width + 32) * (height + 32))  # in whole blocks
            progressive = progressive or kind in _PROGRESSIVE
        elif kind == _SOS:
            scans += 1
            if not progressive and scans == 1 and data[at + 2] == layers:
                break
        elif kind == _APP1 and not scans and data[at + 2 : at + 8] == b"Exif\0\0":
            exif.append(data[at + 8 : at + length])
        at += length
    n_bytes = pixels * (4 + FORMATS["JPEG"] // 4 * min(layers, 4)) + exif_bytes(b"".join(exif))
    return Need(n_bytes, pixels * max(scans, 1), calls)


# Luma's horizontal and vertical factors, where chroma's are 1: 4:4:4, 4:2:2, 4:2:0
_SAMPLINGS = {0x11, 0x21, 0x22}
_PLAIN_SEGMENTS = 1000  # a profile takes up to 255
# what ends entropy-coded data, or would, were it damaged
_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_XMP = b"http://ns.adobe.com/xap/1.0/\0"


@dataclass
class PlainJpeg:
    """What the header says of a JPEG with nothing odd about it: baseline or progressive, Huffman
    codes, 8 bits, grey or one of the usual three components, one segment right behind the other.
    """

    height: int = 0
    width: int = 0
    layers: int = 0
    progressive: bool = False
    bare: bool = True
    """There is nothing in it but what the decoder needs, and comments."""
    scan: int = 0
    """Where the entropy-coded data of the first scan begin."""
    info: dict[str, bytes] = field(default_factory=dict)
    """EXIF and XMP, by the names that Pillow gives them."""

    def whole(self, data: bytes) -> bool:
        """Whether what follows is plain as well: scans, of which a baseline file has one, with
        nothing between them but their codes, and the end of the picture is that of the file.
        """
        at, in_scan = self.scan, True
        while found := _IN_SCAN.search(data, at):
            kind = found[0][1]
            if not in_scan and found.start() != at:
                return False
            if kind == _EOI:
                return in_scan and found.end() == len(data)
            if (
                not self.progressive
                or kind not in (_DHT, _DRI, _SOS)
                or found.end() + 2 > len(data)
            ):
                return False
            in_scan = kind == _SOS
            at = found.end() + (data[found.end()] << 8 | data[found.end() + 1])
        return False


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """What a JPEG's header says; None where it isn't a plain one, or not all of it is in `data`,
    the first part of a file. What Pillow refuses to open isn't plain.
    """
    plain, at = PlainJpeg(), 2
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        for _ in range(_PLAIN_SEGMENTS):
            mark, kind, length = struct.unpack_from(">BBH", data, at)
            start, at = at + 4, at + 2 + length
            if mark != 0xFF or length < 2 or at > len(data):
                return None
            if kind == _SOS:
                plain.scan = at
                n, spectrum = data[start], data[at - 3 : at]
                one_scan = n == plain.layers and spectrum == b"\0\x3f\0"
                usual = plain.layers and (plain.progressive or one_scan) and length == 6 + 2 * n
                return plain if usual else None
            if not _plain_segment(plain, kind, data[start:at]):
                return None
    except (IndexError, struct.error):  # the header ends too soon
        pass
    return None


def _plain_segment(plain: PlainJpeg, kind: int, data: bytes) -> bool:
    """Notes what a segment says; whether it is one of a plain JPEG's."""
    if kind in (_DHT, _COM):
        return True
    if kind == _DQT:
        at = 0
        while at < len(data):
            at += 65 if data[at] < 16 else 129
        return at == len(data)
    if kind == _DRI:
        return len(data) == 2
    if kind in (0xC0, 0xC1, 0xC2):
        return _plain_frame(plain, kind, data)
    if kind == _APP0:
        return data[:4] != b"JFIF" or (len(data) >= 14 and data[4:6] == b"\0\1")
    if kind == _APP14:
        return data[:5] != b"Adobe" or (len(data) >= 12 and data[11] <= 1)
    plain.bare = False
    if kind == _APP1 and data.startswith(b"Exif\0\0"):
        if "exif" in plain.info:  # in several parts: more than a camera writes
            return False
        plain.info["exif"] = data
    elif kind == _APP1 and data.startswith(_XMP):
        plain.info["xmp"] = data[len(_XMP) :]
    return _APP1 <= kind <= _APP15


def _plain_frame(plain: PlainJpeg, kind: int, data: bytes) -> bool:
    again = plain.layers
    bits, plain.height, plain.width, plain.layers = struct.unpack_from(">BHHB", data)
    plain.progressive = kind in _PROGRESSIVE
    if again or bits != 8 or not plain.height * plain.width or len(data) != 6 + 3 * plain.layers:
        return False
    luma, *chroma = [data[at : at + 2] for at in range(6, len(data), 3)]
    names_are_usual = not chroma or (luma[0] == 1 and chroma == [b"\2\x11", b"\3\x11"])
    return luma[1] in _SAMPLINGS and names_are_usual


# ---- TIFF, and the EXIF of others, which is one without pixels


_UNITS = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
# as Python's objects; others: 40; strings stay bytes
_BYTES_OF_VALUE = {
    1: 0,
    2: 0,
    6: 0,
    7: 0,
    5: 400,
    10: 400,
}
_BYTES_OF_STRIP = 500
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _STRIPS, _SAMPLES, _ROWS = 256, 257, 258, 259, 273, 277, 278
_PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILES = 284, 322, 323, 324
# EXIF, GPS, interoperability: those that Pillow reads with the pixels
_SUBDIRECTORIES = (
    34665,
    34853,
    40965,
)
# compressions that are decoded straight into the strip
_STREAMS = {
    1,
    2,
    3,
    4,
    5,
    8,
    32773,
    32946,
    50000,
}


class _Entry(NamedTuple):
    tag: int
    n_values: int
    n_bytes: int
    """What its values take in memory."""
    values: tuple[int, ...]
    """The first few, if they are integers."""


def _directory(data: bytes, order: str, big: bool, place: int) -> Iterator[_Entry]:
    head, entry, inline = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    if place + struct.calcsize(order + head) > len(data):
        return
    (n,) = struct.unpack_from(order + head, data, place)
    if n > 0xFFFF:  # BigTIFF has room for 2^64; no image has use for so many
        raise UnreadableImage(_TOO_MANY_PARTS)
    first = place + struct.calcsize(order + head)
    step = struct.calcsize(order + entry) + inline
    for at in range(first, min(first + n * step, len(data) - step + 1), step):
        tag, kind, count = struct.unpack_from(order + entry, data, at)
        if kind not in _UNITS:
            continue
        unit, place = _UNITS[kind], at + step - inline
        if count * unit > inline:
            (place,) = struct.unpack_from(order + head.replace("H", "I"), data, place)
        count = count if place + count * unit <= len(data) else 0  # what isn't there is not read
        values: tuple[int, ...] = ()
        if kind in _INTEGERS and count:
            values = struct.unpack_from(f"{order}{min(count, 16)}{_INTEGERS[kind]}", data, place)
        yield _Entry(tag, count, count * (unit + _BYTES_OF_VALUE.get(kind, 40)), values)


def _open_directory(data: bytes, big: bool) -> tuple[str, int]:
    order = "<" if data[:2] == b"II" else ">"
    return order, struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]


def exif_bytes(blob: bytes) -> int:
    """What Pillow takes, at most, to read the EXIF `blob`, with or without "Exif" in front of
    it.
    """
    blob = re.sub(rb"^(Exif\0\0){1,2}", b"", blob)
    try:
        big = blob[2] == 43
        order, at = _open_directory(blob, big)
        return sum(entry.n_bytes for entry in _directory(blob, order, big, at))
    except (IndexError, struct.error):
        return 0


def _tiff(data: bytes) -> Need:
    if data[:4] != b"MM\0\x2b":
        return _tiff_of(data, *_open_directory(data, data[2] == 43), data[2] == 43)
    # Pillow takes BigTIFF with the high byte first for a TIFF, and gives libtiff, which doesn't,
    # the place found so
    (order, at), (_, big_at) = _open_directory(data, False), _open_directory(data, True)
    readings = [
        _tiff_of(data, order, *reading) for reading in ((at, False), (at, True), (big_at, True))
    ]
    return Need(max(need.n_bytes for need in readings), max(need.steps for need in readings))


def _tiff_of(data: bytes, order: str, at: int, big: bool) -> Need:
    # Of a tag that is there twice, one reader takes the first and another the last: the worst is
    # counted.
    worst: dict[int, int] = {}
    n_bytes = 0
    places = [at]
    for at in places:
        if len(places) > 10:
            raise UnreadableImage(_TOO_MANY_PARTS)
        for entry in _directory(data, order, big, at):
            n_bytes += entry.n_bytes
            if entry.tag in _SUBDIRECTORIES:
                places += [
                    place
                    for place in entry.values
                    if 0 < place < len(data) - 2 and place not in places
                ]
            if at == places[0]:
                worst[entry.tag] = max(worst.get(entry.tag, 0), *entry.values, 0)
                n_bytes += _BYTES_OF_STRIP * entry.n_values if entry.tag in (_STRIPS, _TILES) else 0
    width, height = worst.get(_WIDTH, 0), worst.get(_HEIGHT, 0)
    samples = max(worst.get(_SAMPLES, 1), 3 if worst.get(_COMPRESSION) in (6, 7) else 1)
    bits = max(samples * worst.get(_BITS, 1), 32)  # 32: YCbCr is turned to RGBA by libtiff
    if _TILE_WIDTH in worst or _TILE_HEIGHT in worst:
        across, down = max(worst.get(_TILE_WIDTH, 0), 1), max(worst.get(_TILE_HEIGHT, 0), 1)
    else:
        across, down = max(width, 1), max(min(worst.get(_ROWS, height), height), 1)
    n = math.ceil(width / across) * math.ceil(height / down)
    compression = worst.get(_COMPRESSION, 1)
    buffer = across * down * bits // 8 * (1 if compression in _STREAMS else 3)
    image = width * height * (1 if samples * worst.get(_BITS, 1) <= 8 else 4)
    n_bytes += image + (buffer if compression != 1 else 0)
    steps = n * across * down * _scans_of_each(data, compression)
    return Need(n_bytes, steps + _PER_STRIP * n * (samples if worst.get(_PLANAR) == 2 else 1))


def _scans_of_each(data: bytes, compression: int) -> int:
    if compression not in (6, 7) or not any(bytes([0xFF, kind]) in data for kind in _PROGRESSIVE):
        return 1
    return max(part.count(bytes([0xFF, _SOS])) for part in data.split(bytes([0xFF, _SOI]))) or 1


# ---- others that decode, or allocate, where they are opened


def _webp(data: bytes) -> Need:
    kind = data[12:16]
    width = height = 0
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    # of a lossless file: Huffman codes for each 4x4 block
    tables = min(width * height // 16, 1 << 16) * 6000
    return Need(width * height * (4 + FORMATS["WEBP"]) + tables, width * height)


def _ico(data: bytes) -> Need:
    (n,) = struct.unpack_from("<H", data, 4)
    most = 0
    for at in range(6, min(6 + 16 * n, len(data) - 15), 16):
        (place,) = struct.unpack_from("<I", data, at + 12)
        try:
            if data[place : place + 8] == b"\x89PNG\r\n\x1a\n":
                width, height = struct.unpack_from(">II", data, place + 16)
            elif data[place : place + 4] == b"\x0c\0\0\0":
                width, height = struct.unpack_from("<HH", data, place + 4)
            else:
                width, height = struct.unpack_from("<Ii", data, place + 4)
        except struct.error:
            continue
        most = max(most, width * abs(height))
    return Need(most * (4 + FORMATS["ICO"]), most * _PYTHON_STEPS)


_PARSERS: dict[str, Callable[[bytes], Need]] = {
    "JPEG": _jpeg,
    "TIFF": _tiff,
    "WEBP": _webp,
    "ICO": _ico,
}
