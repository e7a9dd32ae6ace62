"""Kept posteriors: nothing in them is trusted; which of them are fused."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.kept import KeptPosteriors
from tests.conftest import Command, photograph
from tests.pretrain.conftest import FAST, evaluating
from tests.vggfeat.test_hdf5 import crafted, posteriors_at, refused


@pytest.fixture
def command(run_main: Command) -> Command:
    return evaluating(run_main)


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


def test_both_is_of_two_modes_whatever_else_is_kept(tmp_path: Path) -> None:
    kept = KeptPosteriors.read(posteriors_at(tmp_path / "p.h5"))
    (net,) = kept.nets
    net.modes |= {"crops": net.modes["dense"] / 2, "centre": net.modes["dense"] / 4}
    kept.save(tmp_path / "q.h5")
    again = KeptPosteriors.read(tmp_path / "q.h5")
    assert list(again.nets[0].modes) == ["dense", "crops", "centre"]
    assert again.fused("both")[0].tolist() == [0.375, 0.375]
    assert again.fused("centre")[0].tolist() == [0.125, 0.125]


def test_what_is_of_other_images_is_not_fused(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """The same names in other classes were fused, and one file's labels taken for both."""
    words = ["--weights", weights["A-36"], *FAST, "--data"]
    assert command(*words, images, "--posteriors", tmp_path / "a.h5").status == 0
    kept = KeptPosteriors.read(tmp_path / "a.h5")
    for change, says in (
        ({"labels": kept.labels[::-1]}, "has the same images in other classes"),
        (
            {"names": kept.names[::-1]},
            "is of other images (42 of imagenet val, not 42 of imagenet val)",
        ),
        ({"split": "train"}, "is of other images (42 of imagenet train, not"),
    ):
        replace(kept, **change).save(tmp_path / "b.h5")
        ran = command("--from", tmp_path / "a.h5", "--from", tmp_path / "b.h5")
        assert ran.status == 1 and says in ran.err
    moved = replace(kept, data="moved")
    moved.nets[0].facts["fingerprint"] = "of another net"
    moved.save(tmp_path / "b.h5")
    joined = KeptPosteriors.joined(
        [(name, KeptPosteriors.read(tmp_path / name)) for name in ("a.h5", "b.h5")]
    )
    assert joined.data == "images and moved"


def test_other_pictures_under_the_same_names_are_not_fused(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """Two folders with the same names, classes and split gave one figure, and one table of the
    ledger.
    """
    words = ["--data", images, *FAST, "--scales", "36", "--posteriors"]
    assert command("--weights", weights["A-36"], *words, tmp_path / "a.h5").status == 0
    picture = images / "val" / "n03" / "2.png"
    Image.fromarray(photograph(900, 44, 60)).save(picture)
    assert command("--weights", weights["D-36"], *words, tmp_path / "d.h5").status == 0
    a, d = (KeptPosteriors.read(tmp_path / f"{net}.h5") for net in "ad")
    assert d.crc32[3 * 6 + 2] == zlib.crc32(picture.read_bytes()) and d.image_set != a.image_set
    ran = command("--from", tmp_path / "a.h5", "--from", tmp_path / "d.h5")
    assert (ran.status, ran.out, len(ran.err_lines)) == (1, "", 1)
    assert (
        "d.h5 is of other pictures under the same names (1 of 42, such as val/n03/2.png)" in ran.err
    )
    # an older file doesn't tell: it is fused, and so doesn't the whole
    older = replace(d, crc32=d.crc32[:0])
    older.save(tmp_path / "old.h5")
    older = KeptPosteriors.read(tmp_path / "old.h5")
    ran = command(
        "--from",
        tmp_path / "a.h5",
        "--from",
        tmp_path / "old.h5",
        "--posteriors",
        tmp_path / "j.h5",
    )
    assert ran.status == 0, ran.err
    assert len(older.crc32) == len(KeptPosteriors.read(tmp_path / "j.h5").crc32) == 0
    assert KeptPosteriors.read(tmp_path / "j.h5").image_set == older.image_set != d.image_set
    # nor does it stand between two that tell
    ran = command(
        "--from", tmp_path / "a.h5", "--from", tmp_path / "old.h5", "--from", tmp_path / "d.h5"
    )
    assert ran.status == 1 and "is of other pictures" in ran.err


def test_a_net_and_a_scale_are_averaged_once(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """Twice the same net was a fusion of two; of --scales 36,36,50 the first weighed twice."""

    def says(*words: object, status: int = 1) -> str:
        ran = command(*words)
        assert (ran.status, ran.out, len(ran.err_lines)) == (status, "", 1)
        return ran.err

    a, d, kept = weights["A-36"], weights["D-36"], tmp_path / "a.h5"
    words = ["--data", images, *FAST]
    assert command("--weights", a, *words, "--scales", "36,50", "--posteriors", kept).status == 0
    copy, again = tmp_path / "copy.safetensors", tmp_path / "again.h5"
    copy.write_bytes(a.read_bytes())
    again.write_bytes(kept.read_bytes())
    out = tmp_path / "no.h5"
    for twice in (["--from", kept, "--from", again], ["--weights", a, "--weights", copy, *words]):
        told = says(*twice, "--posteriors", out)
        assert "net A (" in told and "is there twice" in told and not out.exists()
    assert "'--scales': '36,36,50' has a number twice" in says(
        "--from", kept, "--scales", "36,36,50", status=2
    )
    assert "has a number twice" in says("--weights", a, *words, "--scales", "36,50,36", status=2)
    # what is wrong with the second net is told before the first one is evaluated
    assert "smaller than the crop of 32" in says(
        "--weights", a, "--weights", d, *words, "--scales", "31"
    )


def test_older_posteriors_are_read_and_kept_out_of_tables(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--weights", weights["A-36"], "--data", images, *FAST]
    assert command(*words, "--posteriors", tmp_path / "a.h5").status == 0
    kept = KeptPosteriors.read(tmp_path / "a.h5")
    older = (
        "net",
        "train_scale",
        "crop",
        "learn",
        "recipe",
        "seed",
        "weights",
        "fingerprint",
        "precision",
    )
    kept.nets[0].facts = {fact: kept.nets[0].facts[fact] for fact in older}
    kept.save(tmp_path / "old.h5")
    assert command("--from", tmp_path / "old.h5").status == 0
    ran = command(
        "--from", tmp_path / "old.h5", "--table", "3", "--ledger", tmp_path / "results.md"
    )
    assert ran.status == 1 and len(ran.err_lines) == 1
    assert "where an older version kept its posteriors, evaluate it again" in ran.err
