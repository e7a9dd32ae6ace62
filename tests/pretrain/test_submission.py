"""The devkit's meta.mat is a stranger's file: what it may hold, and what reading it may take."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from pretrain import submission
from pretrain.box_figures import Located
from pretrain.submission import devkit_numbers, write_localisation
from vggfeat.errors import VggfeatError


def write_meta(path: Path, rows: list[tuple[object, object, object]]) -> None:
    names = ["WNID", "ILSVRC2012_ID", "num_children"]
    record = np.zeros(len(rows), dtype=[(name, object) for name in names])
    for i, row in enumerate(rows):
        record[i] = row
    scipy.io.savemat(path, {"synsets": record}, do_compression=True)


def test_the_leaves_have_numbers(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta.mat", [("n2", 2, 0), ("n1", 1, 0), ("n3", 3, 7)])
    assert devkit_numbers(tmp_path / "meta.mat") == {"n2": 2, "n1": 1}


def element(kind: int, data: bytes) -> bytes:
    """Of a MATLAB 5 file."""
    return struct.pack("<II", kind, len(data)) + data


CLAIMS = b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x100) + b"IM"
CLAIMS += element(
    14,
    element(6, struct.pack("<II", 1, 0))  # a cell array
    + element(5, struct.pack("<ii", 2_000_000_000, 1))  # of 16 GB of pointers
    + element(1, b"synsets\0"),
)


@pytest.mark.parametrize(
    "wrong",
    [
        b"x" * 1000,
        CLAIMS,
        [("n1", "x", 0), ("n2", 2, 0)],
        [("n1", 1e300, 0), ("n2", 2, 0)],
        [("n1", -1, 0), ("n2", 2, 0)],
        [("n1", 1, 0), ("n1", 2, 0)],
        [("n1", 1, 0), ("n2", 1, 0)],
    ],
)
def test_another_file_is_refused(
    tmp_path: Path, wrong: bytes | list[tuple[object, object, object]]
) -> None:
    path = tmp_path / "meta.mat"
    if isinstance(wrong, bytes):
        path.write_bytes(wrong)
    else:
        write_meta(path, wrong)
    with pytest.raises(
        VggfeatError, match=r"is not the ILSVRC-2012 devkit's meta.mat: ."
    ) as refused:
        devkit_numbers(path)
    assert "\n" not in str(refused.value)


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


def test_a_long_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "subprocess", None)
    with open(tmp_path / "meta.mat", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(VggfeatError, match="longer than 16,777,216 bytes"):
        devkit_numbers(tmp_path / "meta.mat")
