"""What is about to be described, by the headers, and what would take less."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import vggfeat
from vggfeat import datasets
from vggfeat.decode import read_rgb
from vggfeat.describe import description_of
from vggfeat.look import Cheaper, look
from vggfeat.weights import Network

from ..conftest import Command, photograph
from .conftest import SMALL

SCALES = (40, 64)


@pytest.fixture(scope="module")
def network() -> Network:
    return vggfeat.load("random:B,width=0.125,crop=32,classes=4")


def test_what_is_cheaper_is_the_smallest_scale_alone(network: Network) -> None:
    paper = Cheaper.than(description_of(network, None, (384, 256, 512), True))
    assert paper.options == "`scales` 256 `no_mirror`"
    assert paper.share == pytest.approx(256**2 / (256**2 + 384**2 + 512**2) / 2)
    assert paper.worth_saying(668, 46) and not paper.worth_saying(100, 10)
    alone = Cheaper.than(description_of(network, None, (256,), False))
    assert alone.share == 1 and not alone.worth_saying(668, 668)


def test_a_look_at_headers_tells_what_reading_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upright sizes, of some images evenly over all; what can't be read; a format whose header
    doesn't tell.
    """
    for i in range(9):
        exif = Image.Exif()
        exif[0x0112] = i  # orientation; 5 to 8 stand on their side
        Image.fromarray(photograph(i, 40, 50 + i)).save(tmp_path / f"{i}.jpg", exif=exif)
    (tmp_path / "z.jpg").write_text("no image")
    items = datasets.load("folder", tmp_path)
    seen = look(items)
    assert seen.shapes == {i: read_rgb(items.source(i)).shape[:2] for i in range(9)}
    assert seen.unreadable == {"z.jpg": "not an image that Pillow can read"}
    assert (seen.looked, seen.smallest_sides, seen.enlarged(40), seen.enlarged(41)) == (
        10,
        (40, 40, 40),
        0,
        9,
    )
    few = look(items, 4)
    assert few.looked == 4 and list(few.shapes) == [0, 3, 6]
    for name in ("x.bmp", "y.bmp"):  # what a file is, its content tells
        Image.fromarray(photograph(3, 30, 41)).save(tmp_path / name, format="JPEG2000")
    items = replace(items, names=["x.bmp", "y.bmp"])
    monkeypatch.setattr("vggfeat.look.DECODED", 1)  # it takes a process each
    assert list(look(items).shapes.values()) == [(30, 41)]


def test_a_long_extraction_says_what_would_take_less(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the plan, and once it has gone on for some time; not where nothing is cheaper, or all is
    quick.
    """
    line = ("extract", "--dataset", "folder", "--root", folder, *SMALL)
    assert "cheaper" not in command(*line, "--dry-run").out
    ran = command(*line, "--out", tmp_path / "a.h5")
    assert ran.status == 0 and "would take" not in ran.err
    monkeypatch.setattr("vggfeat.look.LONG", 0.0)
    monkeypatch.setattr("vggfeat.look.WORTH", 1e-9)
    monkeypatch.setattr("vggfeat.extract.ADVICE_SECONDS", 0.0)
    ran = command(*line, "--dry-run", "--json", tmp_path / "plan.json")
    assert "--scales 32 --no-mirror: about " in ran.out
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["cheaper"] == "--scales 32 --no-mirror" and told["cheaper_seconds"] > 0
    ran = command(*line, "--out", tmp_path / "b.h5")
    [advice] = [row for row in ran.err_lines if "would take" in row]
    assert advice.startswith("this will take about ")
    assert " more; with --scales 32 --no-mirror all images would take about " in advice
