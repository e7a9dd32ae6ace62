"""Pooling over scales, the norm and fusion: numbers by hand, then what must hold for any
descriptor.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vggfeat.aggregate import POOLINGS, aggregate, fuse, l2_normalise

# One image, two scales, two dimensions.
TWO_SCALES = np.array([[[3.0, 4.0], [0.0, 2.0]]], dtype=np.float32)


def test_average_max_and_stack_by_hand() -> None:
    # mean (1.5, 3), length sqrt(11.25); max (3, 4), length 5.
    np.testing.assert_allclose(
        aggregate(TWO_SCALES, "average"), [[1.5 / 11.25**0.5, 3 / 11.25**0.5]], rtol=1e-6
    )
    np.testing.assert_allclose(aggregate(TWO_SCALES, "max"), [[0.6, 0.8]], rtol=1e-6)
    # Each scale to length 1, (0.6, 0.8) and (0, 1), stacked, and the whole to length 1: each half
    # weighs the same.
    np.testing.assert_allclose(
        aggregate(TWO_SCALES, "stack"), np.array([[0.6, 0.8, 0, 1]]) / 2**0.5, rtol=1e-6
    )


def test_average_is_of_raw_descriptors_not_of_unit_ones() -> None:
    # A scale with ten times the activations has ten times the say.
    descriptors = np.array([[[10.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_allclose(
        aggregate(descriptors)[0, 0] / aggregate(descriptors)[0, 1], 10, rtol=1e-6
    )


def test_fuse_by_hand() -> None:
    fused = fuse([np.array([[3.0, 4.0]]), np.array([[0.0, 100.0, 0.0]])])
    np.testing.assert_allclose(fused, np.array([[0.6, 0.8, 0, 1, 0]]) / 2**0.5, rtol=1e-6)
    assert fused.dtype == np.float32


def test_fusing_one_network_changes_nothing() -> None:
    part = np.array([[3.0, 4.0]], dtype=np.float32)
    assert fuse([part]) is part


def test_stacking_scales_equals_fusing_them() -> None:
    descriptors = np.random.default_rng(0).random((5, 3, 7), dtype=np.float32)
    np.testing.assert_allclose(
        aggregate(descriptors, "stack"), fuse([descriptors[:, q] for q in range(3)]), rtol=1e-6
    )


@pytest.mark.parametrize("how", POOLINGS)
def test_unreadable_and_zero_rows_stay_in_their_place(how: str) -> None:
    descriptors = np.random.default_rng(0).random((4, 2, 3), dtype=np.float32)
    expected = aggregate(descriptors, how)
    descriptors[1] = np.nan
    descriptors[2] = 0
    rows = aggregate(descriptors, how)
    assert np.isnan(rows[1]).all()
    assert (rows[2] == 0).all()
    np.testing.assert_array_equal(rows[[0, 3]], expected[[0, 3]])


def test_nan_in_one_network_is_nan_in_the_fusion() -> None:
    fused = fuse([np.array([[1.0], [np.nan]]), np.array([[1.0, 2.0], [1.0, 2.0]])])
    assert np.isfinite(fused[0]).all()
    assert np.isnan(fused[1]).all()


def test_l2_normalise_zero_and_nan() -> None:
    rows = l2_normalise(np.array([[3.0, 4.0], [0, 0], [np.nan, 1]]))
    np.testing.assert_allclose(rows[0], [0.6, 0.8], rtol=1e-6)
    assert (rows[1] == 0).all()
    assert np.isnan(rows[2]).all()


@given(
    arrays(np.float32, (3, 2, 4), elements=st.floats(0, 2.0**100, width=32, allow_subnormal=True)),
    st.sampled_from(POOLINGS),
)
def test_rows_have_length_1_or_0(descriptors: np.ndarray, how: str) -> None:
    rows = aggregate(descriptors, how)
    length = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1))
    np.testing.assert_allclose(length, (descriptors.max(axis=(1, 2)) > 0).astype(float), rtol=1e-5)
    # The scale of the activations is gone.
    halved = descriptors.astype(np.float64) / 2
    np.testing.assert_allclose(aggregate(halved, how), rows, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("factor", [1e-200, 1e200])
def test_squares_neither_vanish_nor_overflow(factor: float) -> None:
    np.testing.assert_allclose(
        l2_normalise(np.array([[3.0, 4.0]]) * factor), [[0.6, 0.8]], rtol=1e-6
    )


def test_float16_sums_are_exact() -> None:
    # 60000 + 60000 overflows float16, and 4096 squares of 0.1 lose all precision in it.
    np.testing.assert_allclose(
        aggregate(np.full((1, 2, 4), 60000, dtype=np.float16)), [[0.5] * 4], rtol=1e-6
    )
    row = aggregate(np.full((1, 1, 4096), 0.1, dtype=np.float16))[0]
    np.testing.assert_allclose(row, 1 / 64, rtol=1e-6)


@pytest.mark.parametrize("how", POOLINGS)
def test_blocks_and_hdf5_change_nothing(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    descriptors = np.random.default_rng(0).random((11, 2, 8)).astype(np.float16)
    whole = aggregate(descriptors, how)
    # three rows a block, the last one shorter
    monkeypatch.setattr("vggfeat.matrix.BLOCK_BYTES", 3 * 2 * 8 * 8)
    np.testing.assert_array_equal(aggregate(descriptors, how), whole)
    with h5py.File(tmp_path / "features.h5", "w") as file:
        dataset = file.create_dataset("descriptors", data=descriptors)
        np.testing.assert_array_equal(aggregate(dataset, how), whole)


def test_infinity_is_refused_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptors = np.ones((9, 2, 4), dtype=np.float16)
    descriptors[7, 1, 2] = np.inf
    monkeypatch.setattr("vggfeat.matrix.BLOCK_BYTES", 4 * 2 * 4 * 8)
    for how in POOLINGS:
        with pytest.raises(ValueError, match="row 7 holds an infinite value"):
            aggregate(descriptors, how)


def test_no_images_is_no_rows() -> None:
    assert aggregate(np.empty((0, 2, 3)), "stack").shape == (0, 6)
    assert fuse([np.empty((0, 2)), np.empty((0, 3))]).shape == (0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: aggregate(TWO_SCALES, "nonsense"),
            f"one of {', '.join(POOLINGS)}, not 'nonsense'",
        ),
        (lambda: aggregate(TWO_SCALES[0]), r"\(N, Q, D\)"),
        (lambda: aggregate(np.empty((2, 0, 3))), "Q > 0"),
        (lambda: fuse([]), "no descriptors"),
        (lambda: fuse([np.ones((2, 3)), np.ones((3, 3))]), "same N"),
        (lambda: l2_normalise(np.ones(3)), r"\(N, D\)"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
