"""Rows of a matrix that needn't lie in memory: which are copied when, and in which blocks."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vggfeat import matrix
from vggfeat.matrix import Matrix, Selected, one_run, row_blocks

X = np.random.default_rng(0).random((12, 3), dtype=np.float32)


def test_blocks_are_all_rows_once_and_of_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "BLOCK_BYTES", 5 * 3 * 8)
    assert list(row_blocks(12, 3)) == [slice(0, 5), slice(5, 10), slice(10, 12)]
    assert list(row_blocks(2, 1000)) == [slice(0, 1), slice(1, 2)]
    assert list(row_blocks(0, 3)) == []


@settings(max_examples=50)
@given(st.lists(st.integers(0, 11), max_size=6))
def test_a_run_is_a_slice_and_nothing_else_is(rows: list[int]) -> None:
    run = one_run(np.array(rows, np.int64))
    is_run = bool(rows) and rows == list(range(rows[0], rows[0] + len(rows)))
    assert (run is not None) == is_run
    if run is not None:
        assert list(range(12))[run] == rows


@given(st.lists(st.integers(0, 11), max_size=20), st.slices(20))
def test_selected_rows_are_those_of_the_array(rows: list[int], part: slice) -> None:
    chosen = np.array(rows, np.int64)
    some = Selected(X, chosen)
    assert (some.shape, len(some), some.dtype) == ((len(rows), 3), len(rows), X.dtype)
    np.testing.assert_array_equal(some[part], X[chosen][part])
    np.testing.assert_array_equal(some[np.arange(len(rows))[part]], X[chosen][part])


@pytest.mark.parametrize("kind", ["memory map", "HDF5"])
def test_rows_of_files_are_selected_too(kind: str, tmp_path: Path) -> None:
    rows = np.array([1, 2, 3, 7, 9])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        there: Matrix = file.create_dataset("X", data=X)
        if kind == "memory map":
            X.tofile(tmp_path / "x")
            there = np.memmap(tmp_path / "x", np.float32, "r", shape=X.shape)
        some = Selected(there, rows)
        for part in (slice(None), slice(0, 3), slice(2, 5)):
            np.testing.assert_array_equal(some[part], X[rows][part])


def test_a_run_of_an_array_is_not_copied() -> None:
    some = Selected(X, np.array([2, 3, 4, 5, 9, 10]))
    assert np.shares_memory(some[:4], X) and np.shares_memory(some[1:3], X)
    assert np.shares_memory(some[4:], X) and not np.shares_memory(some[:], X)
