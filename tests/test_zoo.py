"""A zoo of odd and broken files through one extraction: each is described as its pixels are, or
marked.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

import vggfeat
from vggfeat import datasets
from vggfeat.datasets import Items
from vggfeat.decode import expected_shape, read_rgb
from vggfeat.describe import describe_all
from vggfeat.extract import extract

from .conftest import PEAK, all_read, assert_same_descriptors, needs_peak, photograph
from .vggfeat.test_decode import FILES, chunk, encoded, png, tiff

WEIGHTS = "random:A,width=0.03125,crop=32"
SCALES = (32, 48)
PHOTO = Image.fromarray(photograph(0, 48, 64))


def interlaced(image: np.ndarray) -> bytes:
    """An Adam7 PNG of (H, W, 3) uint8, which Pillow reads and can't write."""
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    rows = b""
    for top, left, down, across in passes:
        for row in image[top::down, left::across]:
            rows += b"\0" + row.tobytes() if row.size else b""
    height, width = image.shape[:2]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def oriented(k: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = k
    return encoded(PHOTO, "JPEG", exif=exif, quality=95)


def palette() -> Image.Image:
    image = PHOTO.convert("P")
    image.info["transparency"] = 3
    return image


def zoo() -> dict[str, tuple[bytes, str]]:
    """Name -> bytes, and "read", or how the reason begins; "" where either is right."""
    animals: dict[str, tuple[bytes, str]] = {}
    for name, data in FILES.items():
        animals[f"{name}.jpg"] = (data, "read")  # most have another extension than their content
        for share in (0.02, 0.3, 0.6, 0.97):
            animals[f"{name} cut at {share}.jpg"] = (data[: int(share * len(data))], "")
    animals |= {f"orientation {k}.jpg": (oriented(k), "read") for k in range(1, 9)}
    grey = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20
    floats = Image.fromarray(grey.astype(np.float32) / 65535)
    frames = [PHOTO.transpose(Image.Transpose.ROTATE_180).quantize() for _ in range(3)]
    bitmap = b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 50000, 50000, 1, 24, *[0] * 6
    )
    animals |= {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"<html>404</html>" * 20, "not an image"),
        "zeros.png": (bytes(4096), "not an image"),
        "magic only.png": (b"\x89PNG\r\n\x1a\n", ""),
        "cmyk.jpg": (encoded(PHOTO.convert("CMYK"), "JPEG"), "read"),
        "palette.png": (encoded(palette(), "PNG"), "read"),
        "palette.gif": (encoded(palette(), "GIF"), "read"),
        "alpha.png": (encoded(PHOTO.convert("RGBA"), "PNG"), "read"),
        "bits.png": (encoded(PHOTO.convert("1"), "PNG"), "read"),
        "grey 16.tif": (tiff(grey, 1), "read"),
        "white is zero.tif": (tiff(grey, 0), "read"),
        "float.tif": (encoded(floats, "TIFF"), "read"),
        "float beyond.tif": (
            encoded(Image.fromarray(grey.astype(np.float32)), "TIFF"),
            "float values span",
        ),
        "one pixel.png": (encoded(Image.new("RGB", (1, 1), (9, 200, 3)), "PNG"), "read"),
        "strip.png": (
            encoded(Image.new("RGB", (20000, 1)), "PNG"),
            "20000x1 pixels at Q=32 would be",
        ),
        "short strip.png": (encoded(Image.new("RGB", (1000, 1)), "PNG"), "read"),
        "column.png": (encoded(Image.new("L", (1, 900), 77), "PNG"), "read"),
        "long strip.png": (
            encoded(Image.new("L", (4_000_000, 1)), "PNG"),
            "4000000x1 pixels at Q=32",
        ),
        "bomb.png": (png(60000, 60000, 8, 2, b"\0" * 1000), "60000x60000 pixels is over"),
        "bomb.bmp": (bitmap, "50000x50000 pixels is over"),
        "animated.gif": (
            encoded(PHOTO.quantize(), "GIF", save_all=True, append_images=frames),
            "read",
        ),
        "animated.png": (
            encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(180)]),
            "read",
        ),
        "interlaced.png": (interlaced(np.asarray(PHOTO)), "read"),
        "profile.png": (encoded(PHOTO, "PNG", icc_profile=b"not a profile"), "read"),
        "profile.jpg": (encoded(PHOTO, "JPEG", icc_profile=bytes(70000)), "read"),
        "exif.jpg": (
            encoded(PHOTO, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"),
            "read",
        ),
        "wrong checksum.png": (encoded(PHOTO, "PNG")[:-16] + b"\1" * 16, ""),
        "postscript.jpg": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(a) show\n",
            "not an image",
        ),
        "with spaces  and\ttabs.jpg": (oriented(1), "read"),
        "with\na newline.jpg": (oriented(1), "read"),
        "ünïcödé 图 🦆.jpg": (oriented(1), "read"),
        os.fsdecode(b"not \xff\xfe unicode.jpg"): (oriented(1), "read"),
        "-- --help.jpg": (oriented(1), "read"),
        "[red]markup.jpg": (oriented(1), "read"),
        f"{'long' * 60}.jpg": (oriented(1), "read"),
    }
    if features.check("webp"):
        animals["animated.webp"] = (
            encoded(PHOTO, "WEBP", save_all=True, append_images=frames),
            "read",
        )
    return animals


def special(folder: Path) -> dict[str, str]:
    """What isn't a regular file; name -> how the reason begins."""
    (folder / "a folder.jpg").mkdir()
    (folder / "nowhere.jpg").symlink_to("missing")
    (folder / "loop a.jpg").symlink_to("loop b.jpg")
    (folder / "loop b.jpg").symlink_to("loop a.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link.jpg").symlink_to("orientation 1.jpg")
    (folder / "forbidden.jpg").write_bytes(oriented(1))
    (folder / "forbidden.jpg").chmod(0)
    loop = os.strerror(errno.ELOOP).lower()
    return {
        "a folder.jpg": "is a directory",
        "nowhere.jpg": "no such file",
        "loop a.jpg": loop,
        "loop b.jpg": loop,
        "pipe.jpg": "not a regular file",
        "link.jpg": "read",
        "forbidden.jpg": (
            "read" if os.access(folder / "forbidden.jpg", os.R_OK) else "permission denied"
        ),
        "gone.jpg": "no such file",
    }


@pytest.fixture(scope="module")
def cage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("zoo") / "images"
    folder.mkdir()
    expected = {}
    for name, (data, outcome) in zoo().items():
        (folder / name).write_bytes(data)
        expected[name] = outcome
    return folder, expected | special(folder)


def test_each_is_described_or_marked_in_its_own_row(
    cage: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, expected = cage
    names = sorted(expected)
    assert len(names) >= 60
    network = vggfeat.load(WEIGHTS)
    report = extract(
        Items("folder", "unlabelled", folder, names, None, []),
        network,
        tmp_path / "f.h5",
        scales=SCALES,
    )
    features = vggfeat.open_features(tmp_path / "f.h5")
    assert features.names == names
    x = features.descriptors
    for i, name in enumerate(names):
        outcome = expected[name]
        if not features.readable[i]:
            reason = features.errors[i]
            assert outcome != "read", f"{name}: {reason}"
            assert (
                reason == report.unreadable[name]
                and reason.startswith(outcome)
                and "\n" not in reason
            )
            assert np.isnan(x[i]).all()
            continue
        assert outcome in ("read", ""), name
        pixels = read_rgb(folder / name)
        assert expected_shape(folder / name) == pixels.shape[:2], name
        alone = all_read(describe_all(network, [pixels], features.description))[0]
        assert_same_descriptors(x[i], alone)
    photo = names.index("orientation 1.jpg")
    for name in ("link.jpg", "with\na newline.jpg", "ünïcödé 图 🦆.jpg"):
        assert_same_descriptors(x[names.index(name)], x[photo])
    assert not np.allclose(x[names.index("orientation 3.jpg")], x[photo], rtol=1e-2)
    print(
        f"{len(names)} files: {features.readable.sum()} described, {len(report.unreadable)} marked"
    )


@needs_peak
def test_the_command_ends_with_3_and_memory_stays_bounded(
    cage: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """A bomb that is opened would take 10 GB.

    The peak is /proc's: getrusage's of a new process begins with that of the process which started
    it.
    """
    folder, expected = cage
    script = f"""
        import sys
        from vggfeat import cli
        sys.argv = ["vggfeat", *sys.argv[1:]]
        try:
            cli.main()
        finally:
            print({PEAK}, file=sys.stderr)
    """
    small = ("--weights", WEIGHTS, "--scales", "32,48", "--workers", "2", "--device", "cpu")
    words = (
        "extract",
        "--dataset",
        "folder",
        "--root",
        folder.parent,
        *small,
        "--out",
        tmp_path / "f.h5",
    )
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, words)]
    ran = subprocess.run(command, capture_output=True)
    assert ran.returncode == 3, ran.stderr
    *lines, peak = ran.stderr.decode().splitlines()
    assert int(peak) < 3e9
    features = vggfeat.open_features(tmp_path / "f.h5")
    items = datasets.load("folder", folder.parent)
    assert features.names == items.names and len(items) > 60
    assert {Path(name).name for name in items.names} <= set(expected)
    bad = (~features.readable).sum()
    assert bad > 20 and len([line for line in lines if line.startswith("unreadable: ")]) == 21
    assert f"unreadable: and {bad - 20} more; " in ran.stderr.decode()
