"""What the devkit scores, in its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain.box_figures import Located
from pretrain.kept import KeptPosteriors
from pretrain.submission import write_localisation, write_submission
from tests.vggfeat.test_hdf5 import posteriors_at
from vggfeat.errors import VggfeatError


def test_the_likeliest_classes_by_their_numbers(tmp_path: Path) -> None:
    kept = KeptPosteriors.read(posteriors_at(tmp_path / "p.h5"))  # of a, b and c; b is unreadable
    kept.names = ["c", "b", "a"]
    kept.nets[0].modes["dense"][0, 2] = [0.25, 0.75]
    path = tmp_path / "s.txt"
    write_submission(kept, "dense", (), {"x": 7, "y": 900, "z": 1}, path)
    assert path.read_text() == "900 7\n0 0 0 0 0\n7 900\n"
    assert np.isnan(kept.fused("dense")[1]).all()
    with pytest.raises(VggfeatError, match="the devkit has no class 'y'"):
        write_submission(kept, "dense", (), {"x": 7}, path)


def test_boxes_are_whole_pixels_from_one(tmp_path: Path) -> None:
    """A line an image in the order of names; an edge to the nearest, halves up."""
    corners = np.array(
        [
            [[0, 0, 40, 30], [1.4, 2.5, 3.6, 4.4]],  # columns 2 to 4, rows 4 to 4
            [[9.6, 0, 10, 5], [39.9, 29.9, 40, 30]],  # a pixel at least, and inside
            [[np.nan] * 4, [np.nan] * 4],
        ]
    )
    found = Located(
        [], [], ["n1", "n2"], np.array([[0, 1], [1, 0], [0, 1]]), corners, np.ones((3, 2))
    )
    names, sizes = ["c.png", "a.png", "b.png"], np.array([[30, 40], [30, 40], [0, 0]])
    write_localisation(found, names, sizes, {"n1": 7, "n2": 9}, tmp_path / "s.txt")
    zeros = " 0" * 15
    assert (tmp_path / "s.txt").read_text().splitlines() == [
        f"9 11 1 11 5 7 40 30 40 30{zeros}",
        f"0{' 0' * 24}",
        f"7 1 1 40 30 9 2 4 4 4{zeros}",
    ]
    with pytest.raises(VggfeatError, match="the devkit has no class 'n2'"):
        write_localisation(found, names, sizes, {"n1": 7}, tmp_path / "s.txt")
