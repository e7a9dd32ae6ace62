"""Pieces of twelve photographs."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.vggfeat.datasets.made import fails
from vggfeat.datasets import Items, load
from vggfeat.datasets.photographs import BRIGHTNESS, PHOTOGRAPHS, SIDE, TINT, pieces

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def plain() -> Items:
    """In the photographs' own light."""
    pytest.importorskip("skimage")
    return pieces(0, 0)


def test_pieces_share_no_pixel(plain: Items) -> None:
    """Side by side, as their names say, they are one window of the photograph, without a seam."""
    from sklearn.datasets import load_sample_image

    assert plain.images is not None
    piece_of = dict(zip(plain.names, plain.images, strict=True))
    assert len(piece_of) == len(plain) == 269
    temple = load_sample_image("china.jpg")
    rows, columns = (side // SIDE for side in temple.shape[:2])
    window = np.block(
        [[[piece_of[f"temple/{i}-{j}"]] for j in range(columns)] for i in range(rows)]
    )
    top, left = ((side - side // SIDE * SIDE) // 2 for side in temple.shape[:2])
    assert np.array_equal(window, temple[top : top + rows * SIDE, left : left + columns * SIDE])
    assert sum(name.startswith("temple/") for name in plain.names) == rows * columns


def test_no_part_of_a_split_has_anothers_pieces(plain: Items) -> None:
    assert plain.labels is not None
    classes = set(range(len(PHOTOGRAPHS)))
    for split in range(3):
        parts = [plain.splits[f"split{split}/{part}"] for part in ("train", "val", "test")]
        assert sorted(np.concatenate(parts)) == [*range(len(plain))]
        assert all({*plain.labels[rows]} == classes for rows in parts)


def test_each_piece_has_a_light_of_its_own(plain: Items) -> None:
    items = load("photographs")
    assert items.names == plain.names and items.classes == [*PHOTOGRAPHS]
    assert items.images is not None and plain.images is not None
    before, after = (images.astype(float).sum((1, 2)) for images in (plain.images, items.images))
    light = after / before
    assert light.max() < (1 + BRIGHTNESS) * (1 + TINT)
    assert light.min() > 0.99 * (1 - BRIGHTNESS) * (1 - TINT)  # whole grey levels of dark pieces
    assert len(np.unique(light.round(6), axis=0)) == len(items)
    bricks = items.names.index("bricks/2-1")  # from a seed that is fixed
    assert light[bricks] == pytest.approx([1.16, 1.34, 1.03], abs=0.01)


def test_without_scikit_image_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    fails("photographs", None, "scikit-image", "pip install 'vggfeat[demo]'")


def test_a_photograph_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    gone = replace(PHOTOGRAPHS["astronaut"], file="data/gone.png")
    monkeypatch.setitem(PHOTOGRAPHS, "astronaut", gone)
    fails("photographs", None, "data/gone.png can't be read", "install the package")


def test_the_documents_name_each_photographs_licence() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|", (DOCS / "datasets.md").read_text(), re.M
    )
    told = {name: (file, licence, by) for name, file, licence, by in rows if name in PHOTOGRAPHS}
    assert told == {
        name: (f"{photograph.package}/{photograph.file}", photograph.licence, photograph.by)
        for name, photograph in PHOTOGRAPHS.items()
    }
