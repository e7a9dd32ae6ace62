"""The localising command: figures, submissions, pages, two processes; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pretrain.boxes import iou
from tests import prepared
from tests.conftest import HANG, Command, Nets
from tests.pretrain.conftest import CLASSES, FAST, environment, evaluating, localising
from tests.vggfeat.datasets.made import annotation
from vggfeat.images import Preprocessing
from vggfeat.weights import save_weights


@pytest.fixture
def command(run_main: Command) -> Command:
    return localising(run_main)


@pytest.fixture
def given(images: Path, boxes_csv: Path) -> list[object]:
    return ["--data", images, "--annotations", boxes_csv, *FAST]


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def test_protocol_1(
    command: Command, given: list[object], localisers: dict[str, Path], tmp_path: Path
) -> None:
    words = [f"--weights={path}" for path in localisers.values()]
    ran = command(*words, *given, "--json", tmp_path / "r.json", "--page", tmp_path / "p.html")
    assert ran.status == 0, ran.err
    assert "imagenet val, protocol 1: 35 of 42 images" in ran.out
    assert "no error is of 7 of 42 images, which have no true box of their class" in ran.err
    scr, pcr, image = rows_of(tmp_path / "r.json")
    assert [row["images"] for row in (scr, pcr, image)] == [35] * 3
    assert [net["boxes"] for row in (scr, pcr) for net in row["nets"]] == ["scr", "pcr"]
    assert scr["scales"] == ["36"] and image["constant"] == "the whole image"
    # the whole image by hand: 60 wide, 40, 45 or 50 high; the box 30 wide, 28 to 30 high
    height = np.array([40, 45, 50, 40, 45])
    share = 30 * (28 + np.arange(5) % 3) / (60 * height)
    assert (share < 0.5).all() and image["error"] == 100
    errors = [row["per_class"]["n03"]["error"] for row in (scr, pcr)]
    assert all(0 <= error <= 100 for error in errors)
    page = (tmp_path / "p.html").read_text()
    assert page.count("<figure>") == 35 and "n03" in page
    one = command(*words[:1], *given, "--scales", "50", "--json", tmp_path / "one.json")
    assert one.status == 0 and rows_of(tmp_path / "one.json")[0]["scales"] == ["50"]


def test_protocol_2_of_a_classification_net_and_of_what_it_has_said(
    command: Command,
    run_main: Command,
    given: list[object],
    images: Path,
    weights: dict[str, Path],
    localisers: dict[str, Path],
    tmp_path: Path,
) -> None:
    words = [f"--weights={path}" for path in localisers.values()] + [
        "--scales=36",
        "--scales=36,50",
    ]
    net = weights["D-36"]
    ran = command(*words, *given, "--classifier", net, "--json", tmp_path / "net.json")
    assert ran.status == 0, ran.err
    rows = rows_of(tmp_path / "net.json")
    assert [row["scales"] for row in rows] == [["36"], ["36,50"], ["36", "36,50"], []]
    for row in rows:
        assert row["top1_error"] >= row["top5_error"] >= row["top5_class_error"]
        assert row["top1_error"] >= row["top1_class_error"]
    evaluate = evaluating(run_main)
    kept = tmp_path / "k.h5"
    ran = evaluate("--weights", net, "--data", images, *FAST, "--posteriors", kept)
    assert ran.status == 0, ran.err
    ran = command(*words, *given, "--posteriors", kept, "--json", tmp_path / "kept.json")
    assert ran.status == 0, ran.err
    for row, other in zip(rows, rows_of(tmp_path / "kept.json"), strict=True):
        for key in ("images", "nets", "top1_class_error", "top5_class_error"):
            assert row[key] == other[key]
    # what was kept tells the classes, the net rates the boxes: here as if it did both
    both = "--posteriors", kept, "--classifier", net, "--json", tmp_path / "both.json"
    ran = command(*words, *given, *both)
    assert ran.status == 0, ran.err
    for row, other in zip(rows, rows_of(tmp_path / "both.json"), strict=True):
        told = row.pop("classes_told_by"), other.pop("classes_told_by")
        assert row == other and (row["constant"] or "; rated by " in told[1])
    # what was kept has no "crops"
    ran = command(*words, *given, "--posteriors", kept, "--mode", "crops")
    assert ran.status == 1 and "are dense only, not crops" in ran.err


def test_a_class_that_has_no_box_is_refused_before_anything_is_classified(
    command: Command,
    given: list[object],
    localisers: dict[str, Path],
    he: Nets,
    plain: Preprocessing,
    tmp_path: Path,
) -> None:
    net = tmp_path / "more.safetensors"
    module = he("A", num_classes=len(CLASSES) + 1, width=0.05, crop=32)
    save_weights(net, module, plain, classes=[*CLASSES, "n77"], train_scale="36")
    ran = command("--weights", localisers["pcr"], *given, "--classifier", net)
    assert ran.status == 1 and "classify" not in ran.err
    assert (
        f"{net} may say 1 classes that {localisers['pcr']} has no box of, such as 'n77'" in ran.err
    )
    assert command("--weights", localisers["scr"], *given, "--classifier", net).status == 0


def test_what_is_read_is_not_written(
    command: Command, given: list[object], localisers: dict[str, Path], tmp_path: Path
) -> None:
    """A folder of annotations, file by file."""
    folder = tmp_path / "xml"
    folder.mkdir()
    (folder / "a.xml").write_text("<annotation/>")
    words = ["--weights", localisers["scr"], "--data", given[1], "--annotations", folder, *FAST]
    ran = command(*words, "--json", folder / "a.xml", "--overwrite")
    assert ran.status == 1 and f"lies in {folder}, which the command reads" in ran.err
    assert (folder / "a.xml").read_text() == "<annotation/>"


def test_constants_of_training_boxes(
    command: Command,
    images: Path,
    boxes_csv: Path,
    localisers: dict[str, Path],
    tmp_path: Path,
) -> None:
    lines = []
    for name in CLASSES:
        (images / "train" / name).mkdir(parents=True)
        (images / "train" / name / "t.png").write_bytes(
            (images / "val" / name / "0.png").read_bytes()  # 40 high
        )
        lines.append(f"train/{name}/t.png,{name},15,8,45,36")
    lines += [f"train/{CLASSES[0]}/t.png,{CLASSES[0]},900,900,950,950", "else/x.png,n01,1,1,2,2"]
    boxes_csv.write_text(boxes_csv.read_text() + "\n".join(lines))
    words = ["--weights", localisers["scr"], "--data", images, "--annotations", boxes_csv, *FAST]
    ran = command(*words, "--json", tmp_path / "r.json")
    assert ran.status == 0, ran.err
    # rows of the other part are no strangers, and what doesn't fit is told of both
    assert ran.err.count("left out: 1 row of none of these images") == 2  # else/x.png
    assert "training images: left out: 1 box outside of the image" in ran.err
    found = {row["constant"]: row for row in rows_of(tmp_path / "r.json")}
    mean, own = found["the mean box"], found["the class's mean box"]
    # as shares 1/4, 1/5, 3/4, 9/10: of 40, 45 and 50 rows
    heights, lows = np.array([40, 45, 50, 40, 45]), np.array([36, 37, 38, 36, 37])
    said = np.stack([heights * 0 + 15, heights / 5, heights * 0 + 45, heights * 0.9], 1)
    true = np.stack([heights * 0 + 15, heights * 0 + 8, heights * 0 + 45, lows], 1)
    share = np.array([iou(a[None], b[None])[0, 0] for a, b in zip(said, true, strict=True)])
    assert mean["error"] == own["error"] == pytest.approx(100 * (share <= 0.5).mean())
    assert mean["strict_error"] == pytest.approx(100 * (share <= 0.75).mean())


def test_training_boxes_that_cant_be_read_leave_the_figures_of_the_nets(
    command: Command, images: Path, localisers: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "xml"
    for path in sorted((images / "val").glob("*/*.png")):
        name = path.parent.name
        place = folder / "val" / name / f"{path.stem}.xml"
        place.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as picture:
            place.write_text(annotation((15, 8, 45, 36), size=picture.size, name=name))
    for name in CLASSES:
        (images / "train" / name).mkdir(parents=True)
        (images / "train" / name / "t.png").write_bytes(path.read_bytes())
    (folder / "t.xml").write_text("<annotation><object>")
    words = ["--weights", localisers["scr"], "--data", images, "--annotations", folder, *FAST]
    ran = command(*words, "--json", tmp_path / "r.json")
    assert ran.status == 0, ran.err
    assert "left out: the mean boxes of training images: " in ran.err and "t.xml" in ran.err
    constants = [row["constant"] for row in rows_of(tmp_path / "r.json")]
    assert constants == ["", "the whole image"]


def test_two_processes_give_the_same_figures(
    given: list[object], weights: dict[str, Path], localisers: dict[str, Path], tmp_path: Path
) -> None:
    words: list[object] = ["-m", "pretrain.localise", "--batch-size", "3", *given]
    words += [f"--weights={path}" for path in localisers.values()]
    for more in ((), ("--classifier", weights["D-36"], "--scales", "36,50")):
        tables = []
        for processes in (1, 2):
            path = tmp_path / f"{len(more)}-{processes}.json"
            line = [*words, *more, "--json", path]
            done = prepared.run(line, environment(), processes, timeout=HANG)
            assert done.returncode == 0, done.stderr[-3000:]
            tables.append(done.stdout)
        assert tables[0] == tables[1]
        one, two = (rows_of(tmp_path / f"{len(more)}-{n}.json") for n in (1, 2))
        assert one == two


def test_a_submission_has_five_classes_with_boxes(
    command: Command,
    images: Path,
    weights: dict[str, Path],
    localisers: dict[str, Path],
    tmp_path: Path,
) -> None:
    numbers = {name: 100 - i for i, name in enumerate(CLASSES)}
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")]
    record = np.array([(number, name, 0) for name, number in numbers.items()], dtype=kinds)
    (tmp_path / "devkit" / "data").mkdir(parents=True)
    savemat(tmp_path / "devkit" / "data" / "meta.mat", {"synsets": record})
    (images / "test" / "ILSVRC2012_test_00000001.png").write_bytes(b"nothing")
    ran = command(
        *("--weights", localisers["pcr"], "--classifier", weights["D-36"], "--data", images),
        *("--split", "test", "--submission", tmp_path / "s.txt", "--devkit", tmp_path / "devkit"),
        *FAST,
    )
    assert ran.status == 3 and "unreadable: ILSVRC2012_test_00000001.png" in ran.err, ran.err
    lines = (tmp_path / "s.txt").read_text().splitlines()
    rows = np.array([list(map(int, line.split())) for line in lines]).reshape(4, 5, 5)
    assert (rows[1] == 0).all()
    for row in rows[[0, 2, 3]]:
        assert len({*row[:, 0]}) == 5 and {*row[:, 0]} <= {*numbers.values()}
        x1, y1, x2, y2 = row[:, 1:].T
        assert (x1 >= 1).all() and (x1 <= x2).all() and (x2 <= 50).all()
        assert (y1 >= 1).all() and (y1 <= y2).all() and (y2 <= 44).all()


def test_unreadable_images_are_wrong_boxes(
    command: Command, given: list[object], images: Path, localisers: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--weights", localisers["pcr"], *given, "--json"]
    assert command(*words, tmp_path / "good.json").status == 0
    (images / "val" / "n02" / "1.png").write_bytes(b"nothing")
    ran = command(*words, tmp_path / "bad.json", "--page", tmp_path / "p.html")
    assert ran.status == 3 and "unreadable: val/n02/1.png" in ran.err
    good, bad = (rows_of(tmp_path / f"{n}.json")[0] for n in ("good", "bad"))
    assert bad["images"] == good["images"] == 35
    gained = bad["per_class"]["n02"]["error"] - good["per_class"]["n02"]["error"]
    assert gained in (0, pytest.approx(20)) and bad["per_class"]["n02"]["error"] >= 20
    assert bad["per_class"]["n03"] == good["per_class"]["n03"]
    assert list(json.loads((tmp_path / "bad.json").read_text())["unreadable"]) == ["val/n02/1.png"]


def test_what_cannot_be_localised(
    command: Command,
    run_main: Command,
    given: list[object],
    images: Path,
    boxes_csv: Path,
    weights: dict[str, Path],
    localisers: dict[str, Path],
    tmp_path: Path,
) -> None:
    def says(*words: object, status: int = 1) -> str:
        ran = command(*words, *given)
        assert ran.status == status, ran.err
        return ran.err_lines[-1]

    scr, pcr, net = localisers["scr"], localisers["pcr"], weights["A-36"]
    assert "says classes, not boxes" in says("--weights", net)
    assert "Q=31 is smaller than the crop" in says("--weights", scr, "--scales", "31")
    assert "says boxes, not classes" in says("--weights", scr, "--classifier", pcr)
    (tmp_path / "copy.safetensors").write_bytes(scr.read_bytes())
    twice = says("--weights", scr, "--weights", tmp_path / "copy.safetensors")
    assert "is there twice" in twice
    kept = tmp_path / "t.h5"
    ran = evaluating(run_main)(
        *("--weights", net, "--data", images, "--split", "test", "--posteriors", kept, *FAST)
    )
    assert ran.status == 0, ran.err
    other = says("--weights", scr, "--posteriors", kept)
    assert "no posteriors of 42 of the 42 images, such as val/n00/0.png" in other
    (images / "val" / "n00").rename(images / "val" / "n99")
    assert "doesn't know 1 of the data's 7 classes, such as 'n99'" in says("--weights", pcr)
    boxes_csv.write_text("path,class,x1,y1,x2,y2\nelsewhere.png,n00,1,2,3,4\n")
    assert "has no box for any of the 42 images" in says("--weights", scr)
