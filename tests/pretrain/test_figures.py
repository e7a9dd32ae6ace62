"""Errors of each net, mode and class: which image counts where, and what each row is called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain.figures import told_apart
from tests.conftest import Command, Nets
from tests.pretrain.conftest import CLASSES, FAST, evaluating
from vggfeat.images import Preprocessing
from vggfeat.weights import save_weights


@pytest.fixture
def command(run_main: Command) -> Command:
    return evaluating(run_main)


def test_an_image_that_one_net_could_not_read_is_that_nets_error(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """The other's row was told to count it; and of kept posteriors nothing was listed, with status
    0.
    """
    words = ["--data", images, *FAST, "--scales", "36", "--posteriors"]
    assert command("--weights", weights["A-36"], *words, tmp_path / "a.h5").status == 0
    (images / "val" / "n02" / "1.png").write_bytes(b"nothing")
    assert command("--weights", weights["D-36"], *words, tmp_path / "d.h5").status == 3
    ran = command(
        "--from", tmp_path / "a.h5", "--from", tmp_path / "d.h5", "--json", tmp_path / "r.json"
    )
    assert ran.status == 3
    (told,) = ran.err_lines
    assert told.startswith("unreadable: val/n02/1.png: ")
    rows = [line.split("│")[1:-1] for line in ran.out.splitlines() if "dense" in line]
    assert [(row[0].strip(), row[6].strip()) for row in rows] == [
        ("A", "0"),
        ("D", "1"),
        ("A + D", "1"),
    ]
    assert (
        "imagenet val: 42 images, 1 of them unreadable, an error in each row that counts it"
        in ran.out
    )
    record = json.loads((tmp_path / "r.json").read_text())
    assert [row["unreadable"] for row in record["rows"]] == [0, 1, 1] and len(
        record["unreadable"]
    ) == 1
    alone = command("--from", tmp_path / "a.h5")
    assert alone.status == 0 and "unreadable" not in alone.out + alone.err


def test_rows_of_nets_of_one_kind_are_told_apart() -> None:
    net = {
        "net": "D",
        "train_scale": "256",
        "pool": "floor",
        "seed": "0",
        "weights": "a",
        "fingerprint": "f1",
    }
    other = {**net, "fingerprint": "f2"}
    assert told_apart([net]) == ["D"]
    assert told_apart([net, {**other, "train_scale": "384"}]) == ["D", "D"]  # beside their S
    assert told_apart([net, {**other, "seed": "1", "weights": "b"}]) == ["D (seed 0)", "D (seed 1)"]
    assert told_apart([net, {**other, "seed": "", "weights": "b"}]) == ["D (a)", "D (b)"]
    assert told_apart([net, other, {**net, "net": "E"}]) == ["D (sha256 f1)", "D (sha256 f2)", "E"]


def test_a_top_5_error_among_five_classes_is_none(
    command: Command,
    images: Path,
    he: Nets,
    plain: Preprocessing,
    tmp_path: Path,
) -> None:
    """It was 0.00, a faultless net's."""
    for name in CLASSES[5:]:
        shutil.rmtree(images / "val" / name)
    path = tmp_path / "five.safetensors"
    five = he("A", num_classes=5, width=0.05, crop=32)
    save_weights(path, five, plain, classes=CLASSES[:5], train_scale="36")
    kept, record = tmp_path / "p.h5", tmp_path / "r.json"
    for words in (
        ["--weights", path, "--data", images, *FAST, "--posteriors", kept],
        ["--from", kept],
    ):
        ran = command(*words, "--json", record, "--overwrite")
        assert ran.status == 0, ran.err
        (row,) = (line.split("│")[1:-1] for line in ran.out.splitlines() if "dense" in line)
        assert float(row[4]) > 0 and row[5].strip() == "-"
        (figures,) = json.loads(record.read_text())["rows"]
        assert figures["top1_error"] > 0 and figures["top5_error"] is None
        assert {each["top5_error"] for each in figures["per_class"].values()} == {None}
