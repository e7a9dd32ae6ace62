"""Kept posteriors: nothing in them is trusted; which of them are fused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.vggfeat.test_hdf5 import crafted, posteriors_at, refused


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.full((1, 3, 2), np.inf), "no probabilities"),
        (np.full((1, 3, 2), np.nan), "no probabilities"),
        (np.full((1, 3, 2), -0.5), "no probabilities"),
    ],
)
def test_what_kept_posteriors_hold_is_checked(
    tmp_path: Path, values: np.ndarray, told: str
) -> None:
    path = posteriors_at(tmp_path / "p.h5")
    crafted(path, nets__000__dense=values)
    assert told in refused("posteriors", path)
