"""Errors of boxes, worked by hand; what constants say; the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.box_figures import (
    PICTURES,
    Located,
    Truth,
    constants,
    left_out,
    report,
    shares_of,
    write_page,
)
from tests.conftest import photograph
from vggfeat.datasets import Items
from vggfeat.datasets.boxes import Boxes

K = [f"k{i}" for i in range(7)]
FACTS = {
    **dict.fromkeys(("weights", "fingerprint", "pool", "seed"), ""),
    "net": "D",
    "train_scale": "384",
    "boxes": "pcr",
    "learn": "all",
}


def boxes_of(rows: list[tuple[int, int, list[float]]]) -> Boxes:
    """Of (image, class, corners)."""
    return Boxes(
        np.array([row for row, _, _ in rows], np.int64),
        np.array([label for _, label, _ in rows], np.int32),
        np.array([corners for _, _, corners in rows], np.float64).reshape(-1, 4),
        np.zeros(len(rows), bool),
    )


# 0 has two true boxes, 1 one of another class too, 2 none of its class, 3 one, 4 no label
TRUTH = Truth(
    np.array([0, 1, 2, 3, -1]),
    boxes_of(
        [
            (0, 0, [0, 0, 10, 10]),
            (0, 0, [50, 50, 60, 60]),
            (1, 0, [0, 0, 10, 10]),
            (1, 1, [20, 0, 40, 10]),
            (2, 5, [0, 0, 10, 10]),
            (3, 3, [0, 0, 8, 8]),
            (4, 3, [0, 0, 8, 8]),
        ]
    ),
)


def located(labels: list[list[int]], corners: list[list[list[float]]]) -> Located:
    return Located(
        [FACTS],
        [(384,)],
        K,
        np.array(labels),
        np.array(corners, float),
        np.full((5, len(labels[0])), 0.5),
    )


GUESSED = located(
    [[0, 1], [0, 1], [2, 0], [4, 3], [3, 0]],
    [
        [[50, 50, 60, 66], [0, 0, 1, 1]],  # 100 of 160 with the second box
        [[0, 0, 10, 10], [20, 0, 30, 10]],  # another class's; then 100 of 200, which is not above
        [[0, 0, 10, 10], [0, 0, 10, 10]],
        [[0, 0, 8, 8], [0, 0, 8, 10]],  # another class; then 64 of 80
        [[0, 0, 8, 8], [0, 0, 8, 8]],
    ],
)


def test_the_errors_by_hand() -> None:
    assert TRUTH.judged.tolist() == [True, True, False, True, False]
    overlap = TRUTH.overlap(GUESSED.labels_NC, GUESSED.corners_NC4)
    expected = [[0.625, 0], [1, 0.5], [0, 0], [0, 0.8], [1, 0]]
    assert overlap == pytest.approx(np.array(expected))
    assert GUESSED.wrong(TRUTH, 1).tolist() == [False, True, True, True, True]
    assert GUESSED.wrong(TRUTH, 5).tolist() == [False, True, True, False, True]
    assert GUESSED.wrong(TRUTH, 5, above=0.7).tolist() == [True, True, True, False, True]
    unread = GUESSED.corners_NC4.copy()
    unread[0] = np.nan
    assert replace(GUESSED, corners_NC4=unread).wrong(TRUTH, 5)[0]


def test_the_rows_of_both_protocols() -> None:
    [row], (head, line) = report(2, [GUESSED], [], TRUTH)
    assert row["images"] == 3 and row["scales"] == ["384"] and row["nets"] == [FACTS]
    assert row["top1_error"] == pytest.approx(200 / 3)
    assert row["top5_error"] == pytest.approx(100 / 3)
    assert (row["top1_class_error"], row["top5_class_error"]) == (pytest.approx(200 / 3), 0)
    assert row["per_class"]["k1"] == {"images": 1, "top1_error": 100, "top5_error": 100}
    assert row["per_class"]["k3"] == {"images": 1, "top1_error": 100, "top5_error": 0}
    assert line == ["D", "384", "pcr", "all", "384", "66.67", "33.33", "66.67", "0.00"]
    assert len(head) == len(line)

    # by protocol 1 each image's own class: 0, 1 and 3 have IoU 0.625, 0.5 and 0.8
    order = [[0], [1], [0], [1], [0]]
    own = Located(
        [FACTS],
        [(384,)],
        K,
        TRUTH.labels_N[:, None],
        np.take_along_axis(GUESSED.corners_NC4, np.array(order)[..., None], 1),
        np.ones((5, 1)),
    )
    [row], (_, line) = report(1, [own], [], TRUTH)
    assert row["error"] == pytest.approx(100 / 3) and row["strict_error"] == pytest.approx(200 / 3)
    assert line[-2:] == ["33.33", "66.67"] and "top1_class_error" not in row

    other = replace(own, nets=[{**FACTS, "learn": "fc"}])
    both = replace(own, nets=[*own.nets, *other.nets], scales=[(352, 384), (384,)])
    _, (_, *lines) = report(1, [own, other, both], [], TRUTH)
    assert [line[:5] for line in lines] == [
        ["D", "384", "pcr", "all", "384"],
        ["D", "384", "pcr", "fc", "384"],
        ["D + D", "384", "pcr", "all + fc", "352,384 + 384"],
    ]
    none = Truth(np.full(5, -1), TRUTH.boxes)
    assert report(1, [own], [], none)[1][1][-2:] == ["-", "-"]


def test_what_constants_say() -> None:
    sizes = np.array([[100, 200]] * 5)
    shares = {0: np.array([[0, 0, 0.5, 0.5], [0, 0, 0.3, 0.7]]), 3: np.array([[0.1, 0.1, 1, 1]])}
    unread = GUESSED.corners_NC4.copy()
    unread[4] = np.nan
    found = constants(replace(GUESSED, corners_NC4=unread), sizes, shares)
    image, mean, own = found
    assert [each.name for each in found] == [
        "the whole image",
        "the mean box",
        "the class's mean box",
    ]
    assert (image.corners_NC4[:4] == [0, 0, 200, 100]).all()
    every = np.array([0.1 / 3, 0.1 / 3, 0.6, 2.2 / 3]) * [200, 100, 200, 100]
    assert mean.corners_NC4[:4] == pytest.approx(np.tile(every, (4, 2, 1)))
    assert own.corners_NC4[0] == pytest.approx(np.stack([[0, 0, 80, 60], every]))  # k1 has none
    assert own.corners_NC4[3, 1] == pytest.approx([20, 10, 200, 100])
    assert all(np.isnan(each.corners_NC4[4]).all() and not each.nets for each in found)
    assert [each.name for each in constants(GUESSED, sizes, {})] == ["the whole image"]
    rows, (_, *lines) = report(2, [GUESSED], found, TRUTH)
    assert [row["constant"] for row in rows] == ["", *(each.name for each in found)]
    assert lines[1][:5] == ["the whole image", "-", "-", "-", "-"]


@pytest.fixture
def items(tmp_path: Path) -> Items:
    names = [f"val/{K[max(label, 0)]}/{i}.png" for i, label in enumerate(TRUTH.labels_N)]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(i, 80, 100 + i)).save(tmp_path / name)
    return Items("imagenet", "top1", tmp_path, names, TRUTH.labels_N, K)


def test_boxes_as_shares_of_their_images(items: Items) -> None:
    shares = shares_of(TRUTH.boxes, items)
    assert sorted(shares) == [0, 1, 3, 5]
    assert shares[0] == pytest.approx(
        np.array([[0, 0, 0.1, 0.125], [0.5, 0.625, 0.6, 0.75], [0, 0, 10 / 101, 0.125]])
    )


def test_what_no_error_is_of_is_named(items: Items) -> None:
    told = left_out(TRUTH, items, K)
    assert told == [
        ("no error is of 1 of 4 images, which have no true box of their class: val/k2/2.png"),
        "classes without any true box: k2",
    ]
    assert left_out(Truth(TRUTH.labels_N[:2], boxes_of([])), items, K)[0].startswith(
        "no error is o"
    )
    whole = Truth(np.array([0]), boxes_of([(0, 0, [0, 0, 1, 1])]))
    assert left_out(whole, items, K) == []


def test_classes_in_another_order() -> None:
    order = [6, 5, 4, 3, 2, 1, 0]
    turned = TRUTH.named_as(order)
    assert turned.labels_N.tolist() == [6, 5, 4, 3, -1]
    found = replace(GUESSED, labels_NC=6 - GUESSED.labels_NC, classes=K[::-1])
    assert (found.wrong(turned, 5) == GUESSED.wrong(TRUTH, 5)).all()


def test_the_page_draws_true_and_said_boxes_worst_first(items: Items) -> None:
    _, shown = report(2, [GUESSED], [], TRUTH)
    text = write_page(2, GUESSED, TRUTH, items, shown)
    worst, best = text.partition("<h2>Worst first</h2>")[2].split("<h2>Best first</h2>")
    # 1 (IoU 0.5) and 0 (0.625) are the worst, 3 (0.8) is the best; 2 and 4 aren't judged
    assert worst.index("k1: IoU 0.50, rated 0.50; likeliest is k0") < worst.index("k0: IoU 0.62, r")
    assert "k3: IoU 0.80, rated 0.50; likeliest is k4" in best and "k2:" not in text
    assert worst.count("<figure>") == 2 and best.count("<figure>") == 1
    assert worst.count('class="box true"') == 3 and worst.count('class="box said"') == 2
    assert 'x="50.0" y="50.0" width="10.0" height="16.0"' in worst
    assert '<svg viewBox="0 0 100 80"' in worst
    assert text.count("data:image/jpeg;base64") == 3 and "http" not in text.partition("<body>")[2]
    (items.root / items.names[3]).unlink()
    assert "k3: IoU 0.80" in write_page(2, GUESSED, TRUTH, items, shown)  # its place stays


def test_the_page_is_short_however_many_images(items: Items) -> None:
    n = 3 * PICTURES
    many = replace(items, names=[items.names[0]] * n)
    truth = Truth(np.zeros(n, int), boxes_of([(i, 0, [0, 0, 10, 10]) for i in range(n)]))
    found = replace(
        GUESSED,
        labels_NC=np.zeros((n, 1), int),
        corners_NC4=np.tile([0.0, 0, 10, 9], (n, 1, 1)),
        ratings_NC=np.ones((n, 1)),
    )
    text = write_page(1, found, truth, many, report(1, [found], [], truth)[1])
    assert text.count("<figure>") == 2 * PICTURES and f"{PICTURES} of {n} images" in text
