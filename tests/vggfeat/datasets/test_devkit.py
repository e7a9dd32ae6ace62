"""ILSVRC's lists beside the images are a stranger's files: what they may hold, and what reading
them may take.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from vggfeat.datasets import devkit
from vggfeat.datasets.devkit import GROUND_TRUTH, SOLUTION, devkit_numbers, validation_classes
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


def test_a_long_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devkit, "subprocess", None)
    with open(tmp_path / "meta.mat", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(VggfeatError, match="longer than 16,777,216 bytes"):
        devkit_numbers(tmp_path / "meta.mat")


def refused(path: Path) -> str:
    with pytest.raises(VggfeatError) as caught:
        validation_classes(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_ground_truth_is_by_the_images_number(tmp_path: Path) -> None:
    path = tmp_path / GROUND_TRUTH
    path.write_text("2\n1\r\n2\n")
    assert refused(path) == f"no meta.mat of the ILSVRC-2012 devkit at {tmp_path / 'meta.mat'}"
    write_meta(tmp_path / "meta.mat", [("n2", 2, 0), ("n1", 1, 0), ("n3", 3, 7)])
    assert validation_classes(path) == {
        "ILSVRC2012_val_00000001": "n2",
        "ILSVRC2012_val_00000002": "n1",
        "ILSVRC2012_val_00000003": "n2",
    }
    for wrong in ("3", "0", "x", "", "1 2", "n1"):
        path.write_text(f"1\n{wrong}\n2\n")
        assert f"{path}, line 2: {wrong!r} is no class of its meta.mat" in refused(path)


def test_kaggles_list_has_a_class_and_its_boxes(tmp_path: Path) -> None:
    path = tmp_path / SOLUTION
    head = "ImageId,PredictionString\n"
    path.write_text(head + "b,n2 1 2 30 40 n2 5 6 70 80 \na,n1 1 2 3 4\nb,n2 1 2 30 40\n")
    assert validation_classes(path) == {"a": "n1", "b": "n2"}
    for line, told in (
        ("a,", "line 2: expected an image and its one class"),
        ("a", "line 2: expected"),
        ("a,n1 1 2 3", "line 2: expected"),
        ("a,n1 1 2 3 4 n2 1 2 3 4", "line 2: expected"),
        ("a,n1 1 2 3 4\na,n2 1 2 3 4", "line 3: 'a' had another class before"),
    ):
        path.write_text(head + line + "\n")
        assert told in refused(path)
    for text in ("", "a,n1 1 2 3 4\n"):
        path.write_text(text)
        assert "line 1: expected ImageId,PredictionString" in refused(path)
