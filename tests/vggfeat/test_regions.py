"""Boxes in images: an action devkit whose actions are told inside the boxes only, and what each
command does with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vggfeat
from tests.conftest import Command
from tests.vggfeat.conftest import NET, SMALL, unit
from tests.vggfeat.datasets.made import Persons, annotation, make_action
from vggfeat import datasets, extract, writer
from vggfeat.aggregate import aggregate
from vggfeat.datasets.voc_action import ACTIONS
from vggfeat.decode import read_rgb
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.regions import cut, cut_shape, regions_of, views_of

SIDES = (96, 64)  # width and height
BOXES = ((6, 8, 42, 56), (54, 8, 90, 56))


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two persons, each with the texture of an action on it and nothing around: nobody
    who sees all of an image can tell which of the two is asked for. 33 images in train, 22 in val,
    2 in test.
    """
    root = tmp_path_factory.mktemp("action")
    folder = root / "VOCdevkit" / "VOC2012"
    rng = np.random.default_rng(0)
    textures = rng.integers(0, 256, (len(ACTIONS), 6, 6, 3)).astype(np.uint8)
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    lists: dict[str, Persons] = {}
    for split, first, n in (("train", 0, 33), ("val", 500, 22), ("test", 900, 2)):
        lists[split] = {}
        for k in range(n):
            image_HWC = np.full((*SIDES[::-1], 3), 128)
            pair = k % 11, (k // 11 + 1 + k) % 11
            for number, (action, (left, top, right, bottom)) in enumerate(
                zip(pair, BOXES, strict=True), 1
            ):
                image_HWC[top:bottom, left:right] = np.tile(textures[action], (8, 6, 1))
                lists[split][f"2010_{first + k:06d}", number] = (ACTIONS[action],)
            noisy = np.clip(image_HWC + rng.integers(-30, 30, image_HWC.shape), 0, 255)
            name = f"2010_{first + k:06d}"
            Image.fromarray(noisy.astype(np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg")
            text = annotation(*BOXES, size=SIDES, name="person")
            (folder / "Annotations" / f"{name}.xml").write_text(text)
    make_action(folder, lists, ("train", "val"))
    return root


def described(command: Command, root: Path, out: Path, *more: object) -> vggfeat.Features:
    ran = command(
        "extract", "--dataset", "voc2012action", "--root", root, *SMALL, "--out", out, *more
    )
    assert ran.status == 0, ran.err
    return vggfeat.open_features(out)


def learned(command: Command, out: Path, *more: object) -> dict[str, Any]:
    path = out.with_suffix(".json")
    ran = command("svm", "--features", out, "--workers", 1, "--json", path, *more)
    assert ran.status == 0, ran.err
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def devkits_ap(scores: np.ndarray, truth: np.ndarray) -> float:
    """VOCevalaction.m and VOCap.m of the devkit, line by line."""
    order = np.argsort(-scores, kind="stable")
    tp, fp = np.cumsum(truth[order] > 0), np.cumsum(truth[order] < 0)
    rec, prec = tp / (truth > 0).sum(), tp / (fp + tp)
    mrec, mpre = [0.0, *rec, 1.0], [0.0, *prec, 0.0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    steps = [i for i in range(1, len(mrec)) if mrec[i] != mrec[i - 1]]
    return float(sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in steps))


def test_the_box_tells_what_the_image_cannot(
    command: Command, devkit: Path, tmp_path: Path
) -> None:
    """Table 12's two rows, by the devkit's arithmetic: the mean over ten actions, and over all."""
    mean = {}
    for regions in ("image", "image,box"):
        out = tmp_path / f"{regions}.h5"
        model, comp10 = tmp_path / f"{regions}-model.h5", tmp_path / f"{regions}-comp10"
        file = described(command, devkit, out, "--regions", regions)
        results = learned(command, out, "--out", model, "--submission", comp10)
        assert file.labels is not None
        scored = vggfeat.open_model(model).scored["validation"]
        truth = file.labels[scored.rows]
        aps = [devkits_ap(scored.scores[:, k], truth[:, k]) for k in range(len(ACTIONS))]
        part = results["validation"]
        assert results["compared_by"] == "map_allpoint" and part["n_classes"] == 10
        assert part["map_allpoint"] == pytest.approx(np.mean(aps[1:]))
        assert part["map_every_class"] == pytest.approx(np.mean(aps))
        each = [part["per_class"][name]["ap_allpoint"] for name in ACTIONS]
        assert each == pytest.approx(aps)
        assert any("mAP: without other" in rule for rule in results["rules"])
        mean[regions] = part["map_allpoint"]
        # the devkit reads "%s %d %f", and asks for no file of "other"
        assert {path.name for path in comp10.iterdir()} == {
            f"comp10_action_test_{name}.txt" for name in ACTIONS[1:]
        }
        lines = (comp10 / "comp10_action_test_walking.txt").read_text().splitlines()
        assert [line.split()[:2] for line in lines] == [
            [f"2010_{900 + k:06d}", str(number)] for k in range(2) for number in (1, 2)
        ]
    # two persons of an image have one descriptor: at best one of two is right
    assert mean["image"] < 0.75 and mean["image,box"] > 0.95


def test_a_row_is_what_the_image_and_the_cut_image_give(
    command: Command, devkit: Path, tmp_path: Path
) -> None:
    file = described(command, devkit, tmp_path / "f.h5")  # both, as no one says
    assert file.description.regions == ("image", "box") and file.shape[1:] == (4, 512)
    assert file.names[1].endswith("2010_000000.jpg#2") and file.boxes is not None
    assert file.boxes[:2].tolist() == [list(box) for box in BOXES]
    network = vggfeat.load(NET, device="cpu", precision="float32")
    rows = [0, 1, 2, 45]
    items = datasets.load("voc2012action", devkit)
    wholes = [read_rgb(items.source(i)) for i in rows]
    parts = [cut(image, items, i) for i, image in zip(rows, wholes, strict=True)]
    assert {part.shape for part in parts} == {(48, 36, 3)}
    raw_NQD = file.read(rows=np.array(rows))
    for q, scale in enumerate((32, 48)):
        for region, images in enumerate((wholes, parts)):
            ours = unit(raw_NQD[:, 2 * region + q])
            theirs = vggfeat.embed(network, images, (scale,))
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
    # the scales averaged, each region normalised, stacked, normalised again
    by_hand = unit(np.hstack([unit(raw_NQD[:, :2].mean(1)), unit(raw_NQD[:, 2:].mean(1))]))
    pooled = aggregate(raw_NQD, "average", 2)
    np.testing.assert_allclose(pooled, by_hand, atol=1e-6)
    stacked = aggregate(raw_NQD, "stack", 2)
    by_hand = np.hstack(
        [unit(unit(raw_NQD[:, at : at + 2]).reshape(len(rows), -1)) for at in (0, 2)]
    )
    np.testing.assert_allclose(stacked, unit(by_hand), atol=1e-6)
    one = file.read((48,), np.array(rows))
    np.testing.assert_array_equal(one, raw_NQD[:, [1, 3]])


def test_both_in_one_file_are_two_files_stacked(
    command: Command, devkit: Path, tmp_path: Path
) -> None:
    both = described(command, devkit, tmp_path / "both.h5", "--limit", 20)
    image = described(command, devkit, tmp_path / "image.h5", "--limit", 20, "--regions", "image")
    box = described(command, devkit, tmp_path / "box.h5", "--limit", 20, "--regions", "box")
    np.testing.assert_allclose(both.read()[:, :2], image.read(), atol=1e-4)
    np.testing.assert_allclose(both.read()[:, 2:], box.read(), atol=1e-4)
    assert both.names == image.names == box.names
    assert box.description.regions == ("box",) and "regions" not in image.description.to_dict()
    assert both.rows_digest == image.rows_digest == box.rows_digest


def test_views_are_each_described_once(devkit: Path) -> None:
    items = datasets.load("voc2012action", devkit).take(np.array([0, 1, 3]))
    views = views_of(items, ("image", "box"))
    assert [name.partition("_")[2] for name in views.items.names] == [
        *("000000.jpg", "000000.jpg#1", "000000.jpg#2", "000001.jpg", "000001.jpg#2")
    ]
    assert views.view_NR.tolist() == [[0, 1], [0, 2], [3, 4]]
    rows = views.rows()
    assert [rows(view) for view in range(5)] == [[0, 1], [0], [1], [2], [2]]
    described_N4 = np.zeros((3, 4), bool)
    described_N4[0] = described_N4[1, 0] = described_N4[2, 2:] = True
    assert views.done(described_N4).tolist() == [
        [True, False],
        [True, True],
        [False, False],
        [False, False],
        [True, True],
    ]
    alone = views_of(items, ("image",))
    assert alone.items.names == [
        f"JPEGImages/2010_{k:06d}.jpg" for k in (0, 1)
    ] and alone.view_NR.tolist() == [[0], [0], [1]]
    assert [*views_of(items, ("box",)).items.names] == items.names


def test_a_box_is_cut_where_the_image_has_it(devkit: Path) -> None:
    image_HWC = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    items = datasets.load("voc2012action", devkit).take(np.arange(4))
    assert items.boxes is not None
    items.boxes[:] = [[0, 0, 0, 0], [1, 2, 3, 5], [2, 3, 99, 99], [4, 0, 9, 9]]
    assert cut(image_HWC, items, 0) is image_HWC
    np.testing.assert_array_equal(cut(image_HWC, items, 1), image_HWC[2:5, 1:3])
    np.testing.assert_array_equal(cut(image_HWC, items, 2), image_HWC[3:, 2:])
    assert [cut_shape((5, 4), items, i) for i in range(3)] == [(5, 4), (3, 2), (2, 2)]
    with pytest.raises(UnreadableImage, match="its box 4,0,9,9 lies outside of the image of 4x5"):
        cut(image_HWC, items, 3)


class _Killed(Exception):  # noqa: N818
    pass


def test_a_run_goes_on_where_it_was_killed(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one file broken, and a box outside of its image: the rows of the one, the row of the
    other.
    """
    items = datasets.load("voc2012action", devkit).take(np.arange(30))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    assert items.files is not None and items.boxes is not None
    files = [str(broken) if name.endswith("000004.jpg") else name for name in items.files]
    object.__setattr__(items, "files", files)
    items.boxes[5] = [200, 200, 300, 300]
    network = vggfeat.load(NET, device="cpu", precision="float32")
    whole = extract.extract(items, network, tmp_path / "whole.h5", scales=(32, 48))
    left_out = {items.names[i] for i in (5, 8, 9)}
    assert set(whole.unreadable) == left_out
    assert "lies outside of the image of 96x64" in whole.unreadable[items.names[5]]

    out = tmp_path / "killed.h5"
    monkeypatch.setattr(writer, "FLUSH_ROWS", 0)  # each descriptor is in the file at once

    def killing(done: float, total: int) -> None:
        assert total == 45
        if done > 20:
            raise _Killed

    with pytest.raises(_Killed):
        extract.extract(
            items, network, out, scales=(32, 48), batch_size=1, progress=killing, workers=1
        )
    with pytest.raises(VggfeatError, match=r"regions image,box, not image; give"):
        extract.extract(items, network, out, scales=(32, 48), regions="image")
    told: list[float] = []
    report = extract.extract(
        items,
        network,
        out,
        scales=(32, 48),
        progress=lambda done, total: told.append(done),
    )
    assert told[0] > 10 and set(report.unreadable) == left_out
    one, other = vggfeat.open_features(tmp_path / "whole.h5"), vggfeat.open_features(out)
    np.testing.assert_allclose(one.read(), other.read(), atol=1e-4)
    assert (one.crc32 == other.crc32).all() and (one.crc32[[0, 1, 2, 3]] != 0).all()
    # the box comes back into the image: that is another job, and said to be
    items.boxes[5] = BOXES[1]
    with pytest.raises(VggfeatError, match="other boxes"):
        extract.extract(items, network, out, scales=(32, 48), retry=True)


def test_what_the_other_commands_say(command: Command, devkit: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "f.h5", tmp_path / "m.h5"
    plan = command(
        *("extract", "--dataset", "voc2012action", "--root", devkit, *SMALL, "--dry-run"),
        *("--json", tmp_path / "plan.json"),
    )
    assert plan.status == 0 and "114 of 11 classes" in plan.out, plan.out + plan.err
    assert "171 pictures of 57 images" in " ".join(plan.out.split())
    assert json.loads((tmp_path / "plan.json").read_text())["bytes"] == 114 * 4 * 512 * 4
    described(command, devkit, out)
    learned(command, out, "--out", model, "--C", 1)
    told = command("info", out).out
    assert "boxes" in told and "image and box" in told
    query = "JPEGImages/2010_000000.jpg#2"
    pictures = ("--picture", tmp_path / "n.png", "--json", tmp_path / "n.json")
    assert command("neighbours", "--features", out, "--query", query, *pictures).status == 0
    [answer] = json.loads((tmp_path / "n.json").read_text())
    # the other person of the image is near by the image, and farther by the box
    assert all("#" in neighbour["name"] for neighbour in answer["neighbours"])
    photo = devkit / "VOCdevkit" / "VOC2012" / "JPEGImages" / "2010_000000.jpg"
    ran = command("neighbours", "--features", out, "--query", photo)
    assert ran.status == 1 and "give a name in the file" in " ".join(ran.err.split())
    ran = command("predict", "--model", model, photo)
    assert ran.status == 1 and "learned from boxes in images" in " ".join(ran.err.split())
    for root in ((), ("--root", devkit)):
        page = tmp_path / f"page{len(root)}.html"
        ran = command("report", "--model", model, "--features", out, "--out", page, *root)
        assert ran.status == 0, ran.err
        told = "left out: the evidence for classes: the classifier was learned from boxes"
        assert ran.err.count("left out") == ran.err.count(told) == 1
        assert "data:image" in page.read_text()


def test_a_csv_file_of_boxes(command: Command, devkit: Path, tmp_path: Path) -> None:
    images = devkit / "VOCdevkit" / "VOC2012" / "JPEGImages"
    rows = [
        f"{images}/2010_{k:06d}.jpg,{'ab'[number]},{','.join(map(str, BOXES[number]))},96,64"
        for k in range(8)
        for number in range(2)
    ]
    path = tmp_path / "boxes.csv"
    path.write_text("\n".join(["path,label,x1,y1,x2,y2,width,height", *rows]))
    out = tmp_path / "f.h5"
    ran = command("extract", "--dataset", "csv", "--root", path, *SMALL, "--out", out)
    assert ran.status == 0 and "boxes lie in the image of another" in " ".join(ran.err.split())
    file = vggfeat.open_features(out)
    assert file.description.regions == ("image", "box") and file.classes == ["a", "b"]
    assert file.names[:3] == [
        f"{images}/2010_000000.jpg#1",
        f"{images}/2010_000000.jpg#2",
        f"{images}/2010_000001.jpg#1",
    ]
    assert file.boxes is not None and file.boxes[:2].tolist() == [list(box) for box in BOXES]


def test_regions_that_there_are_not(folder: Path, devkit: Path) -> None:
    items = datasets.load("folder", folder)
    assert regions_of(items, None) == regions_of(items, "image") == ("image",)
    with pytest.raises(VggfeatError, match="`regions` box needs a box of each item, and folder"):
        regions_of(items, "box")
    boxed = datasets.load("voc2012action", devkit)
    assert regions_of(boxed, "box,image") == regions_of(boxed, None) == ("image", "box")
    with pytest.raises(VggfeatError, match="`regions` must be image, box or image,box"):
        regions_of(boxed, "box,box")
