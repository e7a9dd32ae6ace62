"""One image, from whatever it comes as, to (H, W, 3) uint8 RGB, where 0 is black and 255 is white;
upright.

What the paper leaves open, and what is done here:
- Transparent pixels are composited over white. Dropping alpha (Pillow's `convert("RGB")`) would
  show the colours hidden under it, which are whatever the drawing program left there; white is what
  a page shows.
- Sixteen-bit grey is divided by 257, which takes 65535 to 255; clipping at 255, as Pillow's
  `convert` does with integer modes, turns nearly every such image white. Sixteen-bit colour is
  decoded by Pillow, which keeps the high byte (at most one level away from dividing by 257).
- ICC profiles are ignored: the nets were trained on pixel values as stored. A broken profile does
no harm.
- Of an animation or a file of several pages, the first frame.
- EPS and WMF are not read: Pillow hands them to other programs, and a drawing has no pixels of its
  own. Nor is what isn't listed here and in `headers`: a format that another package adds to Pillow.

Pillow decodes, and says what is refused and why. Where PyTorch is loaded, torchvision decodes plain
JPEGs (`headers.plain_jpeg`), which nearly all images are: libjpeg-turbo as well, and the same
values, which is tried before it is first used. But of some 2 ms for a photograph Pillow holds
Python's lock for 0.5, and this for 0.1, so that sixteen threads aren't too many. What isn't plain,
and whatever torchvision refuses, is left to Pillow.

Memory and time of a file are bounded, by arithmetic, before a pixel is decoded: see `headers`.
Where a header doesn't tell them, since the decoder believes what lies deeper in the file (AVIF,
JPEG 2000, and those that hold pictures of other formats: BLP, FITS, ICNS), a process of its own
decodes, about 0.3 s an image, within the same limits of memory and 30 s of processor time. A file
is read whole first, so that it can't change, nor a map of it vanish, under a decoder.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from vggfeat import headers
from vggfeat.checked import shown
from vggfeat.errors import UnreachableImage, UnreadableImage, VggfeatError, reason

# half a GiB of RGB: where Pillow, too, takes a file for a decompression bomb
MAX_PIXELS = 178_956_970

# What `read_rgb` takes, and how a message says it.
IMAGE_TYPES = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)
IMAGES = "a path, the bytes of a file, a PIL image, or a NumPy array (H, W, 3)"

_IN_CHILD = ("AVIF", "JPEG2000", "BLP", "FITS", "ICNS")
_CHILD_SECONDS = 30  # of processor time
_CHILD_WAIT = 120  # seconds until it is killed, on a machine that is busy
_CHILD_OWN_BYTES = 1 << 29  # of addresses, for Python and its libraries
_EXIF_ORIENTATION = 0x0112
_MAX_EXIF_BYTES = 64_000_000  # as Pillow unpacks it; a camera's takes less than one
_HEAD_BYTES = 1 << 16  # of a file: nearly always all of a JPEG's header
_HINT_BYTES = 1 << 24  # of a file that is read for no more than its shape
_SMALL = 1 << 24  # bytes of a file, or pixels, that are far within every bound, see `headers`
_RGB = 3  # `torchvision.io.ImageReadMode.RGB`
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 256, 257, 258, 262
# one of these stands in every PNG that may be turned
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
# in themselves, or by a transparent colour
_WITH_ALPHA = {"1", "L", "P", "RGB", "LA", "La", "PA", "RGBA", "RGBa"}
_EMPTY = "empty file (0 bytes)"
_BLOCK = 1 << 22  # pixels that are converted at a time: more than most photographs have

# From an upright array to its view as an image is stored with EXIF orientation k (EXIF 2.32, tag
# 274).
_AS_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}

# All decoders are registered here, once, so that threads never meet a half-filled registry.
Image.init()
# The most frequent is asked first; those that can't tell by a file's first bytes, and parse for it,
# last.
_FORMATS = sorted(
    filter(headers.FORMATS.__contains__, Image.ID),
    key=lambda name: (name != "JPEG", Image.OPEN[name][1] is None),
)
# Pillow warns of odd metadata; here an image's outcome is an array or UnreadableImage, and nothing
# else. `warnings.catch_warnings` is not thread-safe, so the filter is the process's; it goes last
# in the list, and any filter that the user sets comes before it. Pillow also logs; with no handler,
# Python would print that. Two things can't be silenced from here: what libtiff itself prints of a
# damaged compressed TIFF, and the one line ("Corrupt JPEG data: ...") that torchvision's libjpeg
# prints of a JPEG whose header, markers and end are sound, but not the codes between, as after a
# flipped bit. Files that are cut off, or odd in any other way, are Pillow's, which is silent.
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)
logging.getLogger("PIL").addHandler(logging.NullHandler())


def read_rgb(
    source: str | os.PathLike[str] | bytes | Image.Image | np.ndarray,
    *,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """One image as (H, W, 3) uint8 RGB, C-contiguous, writeable, upright.

    source: a path; the bytes of a file; a PIL image (its current frame; it is not closed); or an
    array, (H, W) or (H, W, 1) grey, (H, W, 3) RGB or (H, W, 4) RGBA, of uint8, uint16 (0..65535) or
    floats (0..1). A uint8 RGB array is not copied if it already is what is returned.
    max_pixels: H x W above this is refused from the header, before any pixel is decoded; so is a
    file whose decoding would take more than 16 bytes or 24 steps for each of them, see `headers`.
    It stands in place of `PIL.Image.MAX_IMAGE_PIXELS`, which is left alone. Arrays are not limited:
    they are in memory already. Of a PIL image only the size is checked, as its file has been opened
    by another.

    EXIF orientation is honoured. Alpha, 16 bits, profiles, animations: see the top of this file.
    Float images must lie in 0..1; 32-bit integer ones are taken as 16 bits wide and must lie in
    0..65535.
    Safe to call from many threads. Only regular files are opened, so that a pipe or device can't
    hang it.

    Raises UnreadableImage for whatever is wrong with the image; its message is the reason, without
    the path.
    """
    if not isinstance(source, IMAGE_TYPES):
        raise VggfeatError(f"the image is {kind_of(source)}: give {IMAGES}")
    if isinstance(source, np.ndarray):
        return _rgb_of_array(source)
    if isinstance(source, Image.Image):
        return _decode(lambda: source, max_pixels)
    data = (
        _read_file(source, max_pixels) if isinstance(source, str | os.PathLike) else bytes(source)
    )
    if not data:
        raise UnreadableImage(_EMPTY)
    if next(_accepting(_IN_CHILD, data), None):
        return _decode_in_child(data, max_pixels)
    plain = headers.plain_jpeg(data)
    if plain and (decode := _lock_free.get(plain.progressive)):
        return _decode_plain(decode, plain, data, max_pixels)
    return _decode(lambda: _open(data, max_pixels), max_pixels)


class Frame(NamedTuple):
    """Height and width in pixels of an image as it is stored, and its EXIF orientation, 1 to 8."""

    height: int
    width: int
    orientation: int = 1

    @property
    def upright(self) -> tuple[int, int]:
        """(H, W) of the picture as it is read, and seen."""
        turned = 5 <= self.orientation <= 8
        return (self.width, self.height) if turned else (self.height, self.width)

    def turned(
        self, x1: float, y1: float, x2: float, y2: float
    ) -> tuple[float, float, float, float]:
        """Edges of a box of the image as it is stored, in the upright one (EXIF 2.32, tag 274)."""
        if self.orientation in (2, 3, 7, 8):
            x1, x2 = self.width - x2, self.width - x1
        if self.orientation in (3, 4, 6, 7):
            y1, y2 = self.height - y2, self.height - y1
        return (y1, x1, y2, x2) if 5 <= self.orientation <= 8 else (x1, y1, x2, y2)


def upright_shape(
    source: str | os.PathLike[str] | bytes | np.ndarray,
) -> tuple[int, int] | None:
    """(H, W) in pixels of the upright image, by its header: no pixel is decoded. None where a
    header doesn't tell.

    source: a path, the bytes of a file, or an array. Raises UnreadableImage where `read_rgb` would
    before it decodes.
    """
    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    frame = _frame_of_file(source if isinstance(source, bytes) else _read_file(source, MAX_PIXELS))
    return None if frame is None else frame.upright


def expected_shape(
    source: str | os.PathLike[str] | bytes | Image.Image | np.ndarray,
) -> tuple[int, int] | None:
    """(H, W) that `read_rgb(source)` will most likely have; see `expected_frame`."""
    frame = expected_frame(source)
    return None if frame is None else frame.upright


def expected_frame(
    source: str | os.PathLike[str] | bytes | Image.Image | np.ndarray,
) -> Frame | None:
    """The frame that `read_rgb(source)` will most likely meet, in some 40 us for a JPEG: a hint, by
    which images can be put in order before they are read. None where that takes more than a look
    at the header, or anything is wrong.

    source: what `read_rgb` takes. Raises nothing; safe to call from many threads.
    """
    if not isinstance(source, IMAGE_TYPES):
        return None
    try:
        if isinstance(source, np.ndarray):
            return Frame(source.shape[0], source.shape[1]) if source.ndim in (2, 3) else None
        if isinstance(source, Image.Image):
            return _frame(source.height, source.width, _only(source.info))
        for at_most in (_HEAD_BYTES, _HINT_BYTES):
            data = (
                _read_file(source, MAX_PIXELS, at_most)
                if isinstance(source, str | os.PathLike)
                else bytes(source)
            )
            if plain := headers.plain_jpeg(data):
                return _frame(plain.height, plain.width, _only(plain.info))
            with suppress(UnreadableImage):  # by the part of it; else by more
                return _frame_of_file(data)
            if len(data) < at_most:  # that is all of it
                return None
    except Exception:  # `read_rgb` will say what it is
        pass
    return None


def _frame_of_file(data: bytes) -> Frame | None:
    if not data:
        raise UnreadableImage(_EMPTY)
    if next(_accepting(_IN_CHILD, data), None):
        return None
    with _unreadable():
        image = _open(data, MAX_PIXELS)
        height, width = image.height, image.width
        if tags := getattr(image, "tag_v2", None):  # some versions of Pillow turn `size` already
            height, width = tags[_TIFF_HEIGHT], tags[_TIFF_WIDTH]
        # EXIF of a PNG may lie behind its pixels: asked for it, Pillow decodes them
        if image.format == "PNG" and not any(word in data for word in _PNG_EXIF):
            return Frame(height, width)
        return _frame(height, width, image)


def _frame(height: int, width: int, image: Image.Image) -> Frame:
    orientation = _orientation(image)
    return Frame(height, width, orientation if orientation in _AS_STORED else 1)


def _only(info: Mapping[Any, Any]) -> Image.Image:
    """An image with nothing but this: asked for EXIF, it reads nothing, and keeps nothing."""
    image = Image.Image()
    image.info = dict(info)
    return image


def kind_of(value: Any) -> str:
    """What a value is that was given for an image, or for a list of them, in a few words."""
    kind = type(value)
    if kind.__module__.partition(".")[0] == "torch" and hasattr(value, "permute"):
        shape = tuple(value.shape)
        return (
            f"a PyTorch tensor {shape} (tensor.permute(1, 2, 0).cpu().numpy() makes an array of one"
            " (3, H, W))"
        )
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, Image.Image):
        return "a PIL image"
    return (
        shown(value)
        if value is None or isinstance(value, str | int | float)
        else f"of type {kind.__name__}"
    )


def _read_file(path: str | os.PathLike[str], max_pixels: int, at_most: int | None = None) -> bytes:
    try:
        _check_regular(os.stat(path))
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            _check_regular(status)  # again, as another file may have got the name
            headers.refuse_above_bound(headers.Need(status.st_size, 0), max_pixels)
            size = status.st_size if at_most is None else min(status.st_size, at_most)
            data = file.read(size)
    except FileNotFoundError:
        raise UnreachableImage("no such file") from None
    except MemoryError as error:
        raise UnreadableImage("not enough memory to read it") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        why = reason(error)
        kind = UnreachableImage if isinstance(error, OSError) else UnreadableImage
        raise kind(_one_line(why[:1].lower() + why[1:])) from error
    if len(data) < size:
        raise UnreadableImage(
            f"truncated: it shrank from {status.st_size} bytes to {len(data)} as it was read"
        )
    return data


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImage(
            "is a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        )


def _without_waiting(path: str, flags: int) -> int:
    # a pipe waits for its other end to be opened
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _accepting(
    names: Iterable[str], data: bytes
) -> Iterator[tuple[str, Callable[..., Image.Image]]]:
    prefix = data[:16]
    for name in names:
        if name in Image.OPEN:
            factory, accept = Image.OPEN[name]
            try:
                accepted = accept(prefix) if accept else True
            except (IndexError, struct.error):  # a file shorter than what tells this format
                continue
            if accepted is True:  # a string says why this Pillow can't
                yield name, factory


def _open(data: bytes, max_pixels: int) -> Image.Image:
    # Image.open is this loop and a check for bombs, which either warns or raises without saying the
    # width and height, comes after formats that decode as they are opened, and whose limit is one
    # global for all threads.
    for name, factory in _accepting(_FORMATS, data):
        headers.refuse_above_bound(headers.before_opening(name, data), max_pixels)
        file = headers.in_memory(name, data)
        try:
            image = factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # not of this format after all
            continue
        _check_size(image, max_pixels)
        headers.refuse_above_bound(headers.of_pixels(image, name, len(data)), max_pixels)
        if isinstance(file, headers.Metered):
            file.allow_pixels(image)
        return image
    raise UnidentifiedImageError


class _LockFree:
    """torchvision's decoder, which leaves Python's lock alone; loaded once, when it is first asked
    for.

    The image extension is loaded by itself, in 10 ms: `import torchvision` takes two seconds and
    160 MB. Where PyTorch isn't loaded, it isn't for this: that would be 600 MB for each of the
    processes that read images for training.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known = False
        self._decoders: dict[bool, Callable[[bytes], np.ndarray]] = {}

    def get(self, progressive: bool = False) -> Callable[[bytes], np.ndarray] | None:
        """From a JPEG to (H, W, 3) uint8 RGB, as stored, or any exception; None: Pillow decodes."""
        if not self._known and "torch" in sys.modules:
            with self._lock:
                if not self._known:
                    self._decoders = self._load()
                    self._known = True
        return self._decoders.get(progressive)

    @staticmethod
    def _load() -> dict[bool, Callable[[bytes], np.ndarray]]:
        # Whatever goes wrong here is not worth a word: Pillow gives the same values, only later.
        # Torchvision has announced that its decoders will go to a package of their own.
        # Another libjpeg (not all are turbo, nor of one age) may round otherwise, and then values
        # would depend on what else a process has loaded. Of one age they differ in what is seldom
        # seen (a progressive file whose last scans are missing, in torchvision 0.26's and Pillow
        # 12.3's), which leaves the others as they are.
        try:
            import torch  # waits, where another thread is importing it

            package = importlib.util.find_spec("torchvision")
            assert package and package.origin
            library = min(Path(package.origin).parent.glob("image*.so"))
            torch.ops.load_library(str(library))
            operator = torch.ops.image.decode_jpeg

            def decode(data: bytes) -> np.ndarray:
                # a copy, as PyTorch warns of memory that can't be written
                stored = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
                array: np.ndarray = operator(stored, _RGB, False).permute(1, 2, 0).numpy()
                return array

            return {
                progressive: decode
                for progressive in (False, True)
                if all(map(_as_pillow(decode), _samples(progressive)))
            }
        except Exception:
            return {}


def _as_pillow(decode: Callable[[bytes], np.ndarray]) -> Callable[[bytes], bool]:
    def same(data: bytes) -> bool:
        try:
            made = decode(data)
        except Exception:  # of whatever kind it has
            return False
        return np.array_equal(made, _decode(lambda: _open(data, _SMALL), _SMALL))

    return same


def _samples(progressive: bool) -> Iterator[bytes]:
    """JPEGs of each kind that is plain, of odd sides: colours that are clipped and edges, where
    decoders differ.
    """
    y, x = np.mgrid[:37, :51]
    bands = [(x * y * k) % 511 // 2 ^ (x // 7 * k + y // 5) % 2 * 255 for k in (1, 3, 7)]
    image = Image.fromarray(np.stack(bands, -1).astype(np.uint8))
    for picture in (image, image.convert("L")):
        for subsampling in (0, 1, 2):  # 4:4:4, 4:2:2, 4:2:0
            file = io.BytesIO()
            options = {"progressive": progressive, "subsampling": subsampling}
            picture.save(file, "JPEG", quality=70, **options)
            data = file.getvalue()
            yield data
            if progressive:  # the first scans alone, which libjpeg smooths
                yield data[: data.rindex(b"\xff\xda")] + b"\xff\xd9"


_lock_free = _LockFree()


def _decode_plain(
    decode: Callable[[bytes], np.ndarray],
    plain: headers.PlainJpeg,
    data: bytes,
    max_pixels: int,
) -> np.ndarray:
    """As `_decode` has it, by another decoder where that is sure to be the same."""
    pixels = plain.height * plain.width
    image = None
    # Pillow need not parse the header of what it would certainly open, and no bound forbids
    if not plain.bare or plain.progressive or max(pixels, len(data)) > min(_SMALL, max_pixels):
        with _unreadable():
            image = _open(data, max_pixels)
    # The file is there twice, but not Pillow's fourth byte of a pixel
    fits = len(data) <= max(pixels, _SMALL)
    if fits and plain.whole(data) and (image is None or _stored_upright(image)):
        try:
            rgb = decode(data)
            if rgb.shape == (plain.height, plain.width, 3):
                return rgb
        except Exception:  # Pillow says what is wrong, if it finds it so
            pass
    return _decode(lambda: image or _open(data, max_pixels), max_pixels)


def _stored_upright(image: Image.Image) -> bool:
    return image.format == "JPEG" and _orientation(image) == 1


def _decode(open_image: Callable[[], Image.Image], max_pixels: int) -> np.ndarray:
    with _unreadable():
        image = open_image()
        _check_size(image, max_pixels)
        image.load()
        _check_size(image, max_pixels)  # an icon's header can disagree with the picture inside
        return _rgb_of_pixels(image, _orientation(image))


@contextmanager
def _unreadable() -> Iterator[None]:
    """Inside, whatever goes wrong with an image is an UnreadableImage."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(_one_line(f"a picture inside is too large: {error}")) from error
    except MemoryError as error:
        raise UnreadableImage("not enough memory to decode it") from error
    except Exception as error:
        # Decoders of damaged files raise SyntaxError, struct.error, zlib.error, IndexError, and
        # others too many to list: one bad image must not stop a run over a million.
        text = str(error) or type(error).__name__
        cut = isinstance(error, EOFError) or re.search(
            "truncated|unexpected end|eof", text, re.IGNORECASE
        )
        raise UnreadableImage(_one_line(f"{'truncated' if cut else 'damaged'}: {text}")) from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnreadableImage(f"{width}x{height} pixels: there is nothing in it")
    if width * height > max_pixels:
        raise UnreadableImage(f"{width}x{height} pixels is over the limit of {max_pixels} pixels")


def _orientation(image: Image.Image) -> int:
    # Asked after load(): a PNG may keep EXIF behind its pixels, and Pillow turns a TIFF upright as
    # it loads.
    try:
        blob = image.info.get("exif") or bytes.fromhex(
            "".join(image.info.get("Raw profile type exif", "").split("\n")[3:])
        )
        if headers.exif_bytes(blob) > _MAX_EXIF_BYTES:
            return 1
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken metadata; the pixels are good
        return 1


def _rgb_of_pixels(image: Image.Image, orientation: int) -> np.ndarray:
    # Block by block into the array that is returned: what is computed on the way, up to 30 bytes
    # for a pixel, never exists for all of a large image.
    to_rgb = _converter(image)
    sides = (image.width, image.height) if 5 <= orientation <= 8 else (image.height, image.width)
    upright = np.empty((*sides, 3), np.uint8)
    stored = _AS_STORED[orientation](upright) if orientation in _AS_STORED else upright
    for box, block in _blocks(image):
        left, top, right, bottom = box
        stored[top:bottom, left:right] = to_rgb(block)
    return upright


def _blocks(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    width, height = image.size
    across = min(width, _BLOCK)
    down = min(height, _BLOCK // across)
    for top in range(0, height, down):
        for left in range(0, width, across):
            box = (left, top, min(left + across, width), min(top + down, height))
            yield box, image if box == (0, 0, width, height) else image.crop(box)


def _arrays(image: Image.Image) -> Iterator[np.ndarray]:
    return (np.asarray(block) for _, block in _blocks(image))


def _converter(image: Image.Image) -> Callable[[Image.Image], np.ndarray]:
    """From a block of the image to (h, w, 3) uint8."""
    mode = image.mode
    if mode == "F":
        _check_floats(_arrays(image))
        return lambda block: _grey(_of_floats(np.asarray(block)))
    if mode == "I" or mode.startswith("I;16"):
        return _deep_grey_converter(image)
    if mode in _WITH_ALPHA and image.has_transparency_data:
        return lambda block: _over_white(np.asarray(block.convert("RGBA")))
    if mode == "RGB":
        return np.asarray
    return lambda block: np.asarray(block.convert("RGB"))


def _deep_grey_converter(image: Image.Image) -> Callable[[Image.Image], np.ndarray]:
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})  # TIFF only
    # Pillow unpacks 12-bit TIFF as 0..4095, and leaves "0 is white" uninverted, in 16-bit modes
    # only
    white = 4095 if image.mode != "I" and tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0] == 12 else 65535
    inverted = image.mode != "I" and tags.get(_TIFF_PHOTOMETRIC) == 0
    transparent = image.info.get("transparency")
    spans = [(int(stored.min()), int(stored.max())) for stored in _arrays(image)]
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    if low < 0 or high > white:
        raise UnreadableImage(f"integers span {low}..{high}; white is known only for 0..{white}")

    def to_rgb(block: Image.Image) -> np.ndarray:
        values = np.asarray(block).astype(np.int32)  # 511 * 65535 below still fits
        if inverted:
            values = white - values
        if isinstance(transparent, int):  # PNG's tRNS: the one grey that is transparent
            values[values == transparent] = white
        grey = ((2 * 255 * values + white) // (2 * white)).astype(np.uint8)  # rounded
        return _grey(grey)

    return to_rgb


def _grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=-1)


def _rgb_of_array(array: np.ndarray) -> np.ndarray:
    described = kind_of(array)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        turned = "; of (3, H, W), array.transpose(1, 2, 0)" if array.shape[:1] == (3,) else ""
        raise UnreadableImage(
            f"{described}: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4){turned}"
        )
    if array.size == 0:
        raise UnreadableImage(f"{described}: there is nothing in it")
    if array.dtype.newbyteorder("=") == np.uint16:
        # 65535 = 255 x 257; rounded
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        _check_floats([array])
        array = _of_floats(array)
    elif array.dtype != np.uint8:
        raise UnreadableImage(f"{described}: expected uint8, uint16 or floats in 0..1")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    elif array.shape[2] == 4:
        array = _over_white(array)
    return np.require(array, np.uint8, ["C", "W"])


def _check_floats(arrays: Iterable[np.ndarray]) -> None:
    spans = []
    for array in arrays:
        if not np.isfinite(array).all():
            raise UnreadableImage("float values that are not finite (NaN or infinity)")
        spans.append((float(array.min()), float(array.max())))
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    if low < 0 or high > 1:
        raise UnreadableImage(f"float values span {low:g}..{high:g}; floats must lie in 0..1")


def _of_floats(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.float64) * 255 + 0.5).astype(np.uint8)


def _over_white(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    # at most 65152: fits 16 bits
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _one_line(text: str) -> str:
    # Reasons quote what stands in files: no escape sequence, and nothing that turns the text round,
    # may pass.
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def _decode_in_child(data: bytes, max_pixels: int) -> np.ndarray:
    limits = (max_pixels, headers.bytes_limit(max_pixels) + _CHILD_OWN_BYTES, _CHILD_SECONDS)
    command = [sys.executable, "-m", "vggfeat.decode", *map(str, limits)]
    # one thread, whose memory is one arena: else the limit on addresses would depend on the number
    # of processors
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, **alone, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        # a session of its own: a signal to this process's group ends the run, which waits for this
        # image
        ran = subprocess.run(
            command,
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_CHILD_WAIT,
            env=environment,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnreadableImage(f"decoding took more than {_CHILD_WAIT} s") from None
    except OSError as error:
        raise UnreadableImage(
            _one_line(f"can't start a process to decode it: {reason(error)}")
        ) from error
    kind, _, rest = ran.stdout.partition(b" ")
    if kind == b"unreadable":
        raise UnreadableImage(_one_line(rest.decode(errors="replace")))
    shape, _, pixels = rest.partition(b"\n")
    if ran.returncode != 0 or kind != b"rgb":
        raise UnreadableImage(
            f"its decoder crashed, or took more than {_CHILD_SECONDS} s of processor time (status"
            f" {ran.returncode})"
        )
    height, width = map(int, shape.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3).copy()


def _child(max_pixels: int, n_bytes: int, seconds: int) -> None:
    """Decode standard input to standard output: "rgb", height, width, pixels; or "unreadable", the
    reason.
    """
    import resource  # not everywhere; without it nothing is decoded

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
    if "AVIF" in Image.OPEN:
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    data = sys.stdin.buffer.read()

    def open_image() -> Image.Image:
        for _, factory in _accepting(_IN_CHILD, data):
            try:
                return factory(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
        raise UnidentifiedImageError

    try:
        rgb = _decode(open_image, max_pixels)
    except UnreadableImage as error:
        sys.stdout.buffer.write(f"unreadable {error}".encode())
    else:
        sys.stdout.buffer.write(b"rgb %d %d\n" % rgb.shape[:2])
        sys.stdout.buffer.write(rgb.data)


if __name__ == "__main__":
    _child(*map(int, sys.argv[1:]))
