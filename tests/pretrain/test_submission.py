"""What the devkit scores, in its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain.kept import KeptPosteriors
from pretrain.submission import write_submission
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
