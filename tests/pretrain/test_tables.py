"""The paper's tables as data, and cells."""

from __future__ import annotations

import pytest

from pretrain.tables import paper_scales


@pytest.mark.parametrize(
    ("S", "crop", "one", "several"),
    [
        ((256, 256), 224, (256,), (224, 256, 288)),  # Table 4: S - 32, S, S + 32
        ((384, 384), 224, (384,), (352, 384, 416)),
        ((256, 512), 224, (384,), (256, 384, 512)),
        ((112, 112), 96, (112,), (98, 112, 126)),
        ((240, 240), 224, (240,), (224, 240, 272)),  # not below the crop
        # and none twice, which would count twice in the mean
        (
            (224, 224),
            224,
            (224,),
            (224, 256),
        ),
        ((256, 257), 224, (256,), (256, 257)),
    ],
)
def test_test_scales_follow_from_s(
    S: tuple[int, int], crop: int, one: tuple[int, ...], several: tuple[int, ...]
) -> None:
    assert paper_scales(S, crop, multi=False) == one
    assert paper_scales(S, crop, multi=True) == several
