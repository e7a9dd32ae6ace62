"""Descriptors of feature files as one matrix: what is made when rows are asked for is what is made
of all at once, bit for bit; and how much is read and held for it.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggfeat import descriptors as module
from vggfeat import matrix, store
from vggfeat.aggregate import POOLINGS, aggregate, fuse
from vggfeat.descriptors import Descriptors
from vggfeat.errors import VggfeatError
from vggfeat.extract import extract
from vggfeat.features import open_features
from vggfeat.store import Features

from .conftest import feature_file
from .shards.made import SCALES, job, same

N, BAD = 40, (3, 17, 39)
ROWS: list[Any] = [
    *(slice(None), slice(5, 29), slice(7, 8), slice(3, 3), slice(None, None, 3), slice(30, 2, -5)),
    *(np.array([0, 5, 6, 7, 22, 38]), np.array([20, 3, 3, 39, 0]), np.array([], int)),
    *(np.arange(0, N, 2), np.arange(N) % 3 == 1),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Features]:
    """Of the same images: float32 at three scales, float16 at one."""
    folder = tmp_path_factory.mktemp("files")
    one = feature_file(folder / "a.h5", N, 12, scales=(32, 48, 64), bad=BAD)
    other = feature_file(folder / "b.h5", N, 7, bad=BAD[:2], dtype="float16", seed=1)
    return [open_features(path) for path in (one, other)]


def whole(files: list[Features], scales: list[tuple[int, ...]], pool: str) -> np.ndarray:
    """As it was made of all rows at once."""
    read = [file.read(each) for file, each in zip(files, scales, strict=True)]
    return fuse([aggregate(x, pool, len(files[0].description.regions)) for x in read])


def lazy(files: list[Features], scales: list[tuple[int, ...]], pool: str) -> Descriptors:
    parts = [replace(f.description, scales=q) for f, q in zip(files, scales, strict=True)]
    return Descriptors(files, parts, pool)


@pytest.mark.parametrize("pool", POOLINGS)
@pytest.mark.parametrize("scales", [[(32, 48, 64)], [(64, 32)], [(48,)], [(32, 64), (32,)]])
def test_rows_are_bit_for_bit_those_of_all_at_once(
    files: list[Features],
    scales: list[tuple[int, ...]],
    pool: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = files[: len(scales)]
    expected = whole(some, scales, pool)
    assert np.isnan(expected).any(1).nonzero()[0].tolist() == list(BAD)
    for block in (store.READ_BYTES, 1000, 1):
        monkeypatch.setattr(module, "READ_BYTES", block)
        X = lazy(some, scales, pool)
        assert (X.shape, len(X), X.dtype) == (expected.shape, N, expected.dtype)
        assert X.nbytes == expected.nbytes and same(X.held(), expected)
        for rows in ROWS:
            assert same(X[rows], expected[rows])


def test_a_set_of_shards_is_read_as_its_file(tmp_path: Path) -> None:
    its = job(tmp_path / "images", bad={3, 8})
    extract(its.items, its.network, tmp_path / "one.h5", scales=SCALES, workers=1)
    its.made(tmp_path / "set", 5)
    opened = open_features(tmp_path / "set")
    X = lazy([opened], [SCALES], "stack")
    expected = whole([opened], [SCALES], "stack")
    assert same(X.held(), expected)
    for rows in (slice(3, 9), np.array([11, 2, 2, 7]), np.array([0, 4, 5, 10])):
        assert same(X[rows], expected[rows])
    both = [opened, open_features(tmp_path / "one.h5")]
    assert same(lazy(both, [SCALES, (48,)], "max")[2:9], whole(both, [SCALES, (48,)], "max")[2:9])


def test_rows_are_read_in_long_runs(files: list[Features], monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks that begin at the same rows whatever is asked for, and half of the rows as all."""
    asked: list[Any] = []
    read = Features.read

    def noted(self: Features, scales: tuple[int, ...], rows: Any) -> np.ndarray:
        asked.append(rows)
        return read(self, scales, rows)

    monkeypatch.setattr(Features, "read", noted)
    monkeypatch.setattr(module, "READ_BYTES", 3 * 12 * 4 * 9)  # nine rows: blocks of eight
    X = lazy(files[:1], [(32, 48, 64)], "average")
    X[6:18]
    assert asked == [slice(6, 8), slice(8, 16), slice(16, 18)]
    asked.clear()
    X[np.array([8, 10, 12, 15, 24, 31])]
    assert asked[0] == slice(8, 16) and asked[1].tolist() == [24, 31] and len(asked) == 2


def test_all_are_held_once_and_little_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three scales, which are three times as large."""
    path = feature_file(tmp_path / "f.h5", 1200, 64, scales=(32, 48, 64))
    block = 20 * 3 * 64 * 4
    for where in (store, module):
        monkeypatch.setattr(where, "READ_BYTES", block)
    monkeypatch.setattr(matrix, "BLOCK_BYTES", block)
    X = lazy([open_features(path)], [(32, 48, 64)], "average")
    X[:10]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    held = X.held()
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    rows = 16 * len(held) + 1000 * 1200 / 16  # their numbers, and what is noted of each block
    assert held.nbytes < most < held.nbytes + module.READING * block + rows
    assert most < 2 * held.nbytes


def test_whether_they_fit_is_by_the_memory(
    files: list[Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    X = lazy(files[:1], [(32,)], "average")
    for there, fits in ((2 * X.nbytes, True), (2 * X.nbytes - 2, False)):
        monkeypatch.setattr(module, "memory", lambda there=there: there)
        assert X.fits is fits


def test_a_scale_that_is_not_there_is_refused_before_anything_is_read(
    files: list[Features],
) -> None:
    with pytest.raises(VggfeatError, match=r"a.h5 has no scale 50; it has 32, 48, 64"):
        lazy(files, [(32, 50), (32,)], "average")
