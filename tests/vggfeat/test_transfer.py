"""Tables 11 and 12: which results stand in the paper's own, and which are a stand-in."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vggfeat import cli
from vggfeat.errors import VggfeatError
from vggfeat.results import results_from
from vggfeat.transfer import (
    CELLS,
    PAPER,
    TABLES,
    THEIRS,
    Cell,
    cell_of,
    check_page,
    read_cells,
    section_markdown,
    sections,
    table_markdown,
    with_new,
    write_cell,
)

from ..conftest import Command, photograph
from .datasets.made import DATA, needs_data

SPLIT = {"n_train": 3060, "n_test": 2995, "n_classes": 102}


def caltech(*nets: str, **more: Any) -> Cell:
    """A cell of all of Caltech-101: three splits with a mean of 91.5 %. None: there is no such key
    in the results.
    """
    features = [
        {
            "net": net,
            "weights": f"oxford:{net}",
            "fingerprint": net,
            "layer": "fc7",
            "mirror": True,
            "scales": [256, 384, 512],
            "rows": "ab12cd34ef",
        }
        for net in nets or ("D",)
    ]
    record = {
        "dataset": "caltech101",
        "protocol": "caltech101",
        "solver": "newton, tol 1e-05, squared_hinge",
        "compared_by": "mean_class_recall",
        "selected_by": "mean_class_recall",
        "C": 1.0,
        "splits": "stored",
        "features": features,
        "pool": "stack",
        "mean_class_recall": 0.915,
        "mean_class_recall_std": 0.0064,
        "per_split": [{"name": f"split{i}", **SPLIT} for i in range(3)],
        "n_train": 3060,
        "n_test": 2995,
        "command": "vggfeat svm --features d.h5",
        **more,
    }
    there = {key: value for key, value in record.items() if value is not None}
    return cell_of(results_from(there, ""))


def test_a_cell_of_all_images_stands_in_the_papers_table() -> None:
    cell = caltech()
    assert cell.other == [] and (cell.splits, cell.classes, cell.images) == (3, 102, 2995)
    assert (cell.mean, cell.std, cell.percent) == (0.915, 0.0064, "91.5 +- 0.6")
    (heading, part), *_ = sections([cell]).items()
    assert heading == THEIRS and part == [cell]
    text = section_markdown(heading, part)
    theirs = "| D | the paper | 89.3 | 89.0 | 91.8 +- 1.0 | 85.0 +- 0.2 | - | - |"
    how = "D, fc7, stack of Q 256,384,512"
    assert theirs in text
    assert f"| {how} | ours | - | - | 91.5 +- 0.6 | - | oxford:D | {cell.when} |" in text
    assert "| He et al. | others | 82.4 | - | 93.4 +- 0.5 | - | - | - |" in text
    assert "Not run: D on VOC-2007; D on VOC-2012; D on Caltech-256; E on VOC-2007;" in text
    assert "```\nvggfeat svm --features d.h5\n```" in text
    both = replace(caltech("D", "E"), mean=0.927)
    assert (both.method, both.weights) == ("D & E", "oxford:D & oxford:E")
    assert "| D & E, fc7, stack of Q 256,384,512 | ours | - | - | 92.7" in section_markdown(
        THEIRS, [cell, both]
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"other_images": ["the first 60 of 90 images"]}, "the first 60 of 90 images"),
        ({"other_images": ["20 classes instead of 102"]}, "20 classes instead of 102"),
        ({"n_unreadable": 2}, "2 images can't be read"),
        ({"selected_by": None}, "C was given, and not chosen on validation images"),
        ({"per_split": [{"name": "split0", **SPLIT}]}, "1 random splits instead of 3"),
        (
            {
                "net_trained_on": 9,
                "per_split": [{"name": f"split{i}", "n_test_seen": 1, **SPLIT} for i in range(3)],
            },
            "the net was trained on 9 images of these, among them",
        ),
    ],
)
def test_a_part_is_a_stand_in_and_never_in_the_papers_table(
    change: dict[str, Any], why: str
) -> None:
    cell = caltech(**change)
    assert [each.startswith(why) for each in cell.other] == [True]
    (theirs, none), (heading, part) = sections([cell]).items()
    assert (theirs, none, part) == (THEIRS, [], [cell])
    classes = f"2,995 images of {cell.classes} classes scored (ab12cd34)"
    assert heading == f"Table 11, stand-in: caltech101, {classes}"
    text = section_markdown(heading, part)
    assert why in " ".join(text.split()) and "91.5 +- 0.6" in text
    assert text.count("| 91.8 +- 1.0 |") == 1  # beside it, and said to be of all images
    assert "91.5" not in section_markdown(theirs, none)
    pool5 = replace(cell, nets=[replace(cell.nets[0], layer="pool5")])
    assert "91.8" not in section_markdown(heading, [pool5])


def voc(**more: Any) -> Cell:
    record = {
        "dataset": "voc2012",
        "protocol": "voc2012",
        "compared_by": "map_allpoint",
        "selected_by": "map_allpoint",
        "pool": "average",
        "map_allpoint": 0.88,
        "map_allpoint_std": None,
        "per_split": [],
        "mean_class_recall": None,
        "mean_class_recall_std": None,
        "n_classes": 20,
        **more,
    }
    return caltech(**record)


def test_voc_2012_is_the_papers_where_its_test_part_was_scored() -> None:
    assert voc().other == [] and voc().percent == "88.0"
    assert voc(test_split="val").other == ["scored on val, and not on the test part"]
    validation = {"n": 100, "map_allpoint": 0.7, "n_classes": 20}
    blind = voc(test_labels="none", validation=validation, C_chosen_on="val", n_train=300)
    assert (blind.mean, blind.images, blind.trained) == (0.7, 100, 200)
    assert blind.other == ["scored on val, and not on the test part"]
    with pytest.raises(VggfeatError, match="no labelled image was scored"):
        voc(map_allpoint=None)
    with pytest.raises(VggfeatError, match="and these features of flowers: leave out `ledger`"):
        voc(dataset="flowers")


def test_table_12_tells_image_from_image_and_box() -> None:
    action = replace(voc(), dataset="voc2012action")
    both = replace(action, regions="image,box", mean=0.84)
    text = "\n".join(table_markdown(12, [action, both]))
    assert "| D & E | image + box | the paper | 84.0 | - | - |" in text
    assert "| D, fc7, average of Q 256,384,512 | image | ours | 88.0 |" in text
    assert "| D, fc7, average of Q 256,384,512 | image + box | ours | 84.0 |" in text
    assert "Not run: D & E on VOC-2012 action (image); D & E on VOC-2012 action (image +" in text
    assert "88.0" not in "\n".join(table_markdown(11, [action]))


def test_the_papers_rows_are_the_papers() -> None:
    """Its own, counted; others' methods with their names."""
    own = [row for row in PAPER if row.whose == "the paper"]
    assert sum(len(row.figures) for row in own) == 3 * len(TABLES[11]) + 2
    assert {row.table for row in PAPER} == set(TABLES)
    others = [row.method.partition(",")[0] for row in PAPER if row.whose == "others"]
    assert others == [
        *("Zeiler & Fergus", "Chatfield et al.", "He et al.", "Wei et al.", "Wei et al."),
        *("Oquab et al.", "Gkioxari et al.", "Hoai"),
    ]


def test_a_cell_takes_the_place_of_the_same_one_only(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n")
    for cell in (caltech(), voc(), caltech("E"), replace(caltech(), mean=0.9)):
        write_cell(cell, page)
    cells = read_cells(tmp_path / CELLS)
    assert [(c.dataset, c.method, c.mean) for c in cells] == [
        ("voc2012", "D", 0.88),
        ("caltech101", "D", 0.9),
        ("caltech101", "E", 0.915),
    ]
    other = replace(cells[1], svm="newton, tol 1e-05, hinge")
    assert len(with_new(cells, other)) == 4 and other.how.endswith(", hinge")
    text = page.read_text()
    assert text.startswith("# Results\n\n<!-- ledger: Tables 11") and text.count("<!-- ledger") == 1
    assert "90.0 +- 0.6" in text
    (tmp_path / CELLS).rename(tmp_path / "elsewhere.json")
    with pytest.raises(VggfeatError, match=f"cells are missing, .*{CELLS}: bring that file back"):
        check_page(page)
    (tmp_path / CELLS).write_text("{}")
    with pytest.raises(VggfeatError, match="is no ledger of cells of version 2"):
        check_page(page)


def test_svm_writes_its_cell(tmp_path: Path, run_main: Command) -> None:
    for c in ("ant", "bee"):
        (tmp_path / "101_ObjectCategories" / c).mkdir(parents=True)
        for i in range(8):
            pixels = photograph(20 * (c == "bee") + i, 40, 40)
            path = tmp_path / "101_ObjectCategories" / c / f"image_{i:04d}.jpg"
            Image.fromarray(pixels).save(path)
    features, page = tmp_path / "f.h5", tmp_path / "results.md"
    words = ["--weights", "random:D,width=0.015625,crop=32", "--scales", "32,40"]
    words += ["--device", "cpu", "--precision", "float32", "--no-mirror"]
    data = ["--dataset", "caltech101", "--root", tmp_path]
    assert run_main(cli.main, "extract", *data, *words, "--out", features).status == 0
    svm = ["svm", "--features", features, "--ledger", page, "--json", tmp_path / "r.json"]
    ran = run_main(cli.main, *svm)
    assert ran.status == 0, ran.err
    (cell,) = read_cells(tmp_path / CELLS)
    record = json.loads((tmp_path / "r.json").read_text())
    assert (cell.mean, cell.std) == (
        record["mean_class_recall"],
        record["mean_class_recall_std"],
    )
    assert cell.other[0] == "2 classes instead of 102" and not cell.nets[0].mirror
    assert cell.command == record["command"]
    heading = "Table 11, stand-in: caltech101, "
    assert heading in ran.out and f"## {heading}" in page.read_text()
    assert cell.percent not in page.read_text().partition("Table 11, stand-in")[0]
    # again: one cell; and what can't be is refused before the work
    assert run_main(cli.main, *svm, "--overwrite").status == 0
    assert len(read_cells(tmp_path / CELLS)) == 1
    for wrong, why in (
        (features, "is what the command reads"),
        (tmp_path / "no" / "page.md", "there is no folder"),
    ):
        ran = run_main(cli.main, "svm", "--features", features, "--ledger", wrong)
        assert ran.status in (1, 2) and why in ran.err, ran.err


def test_of_two_that_write_one_page_none_is_lost(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    names = [[f"{who}{i}" for i in range(8)] for who in "ab"]

    def write(those: list[str]) -> None:
        for name in those:
            write_cell(caltech(name), page)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, names))
    assert {cell.method for cell in read_cells(tmp_path / CELLS)} == {*names[0], *names[1]}
    assert all(f"| {name}, fc7" in page.read_text() for name in [*names[0], *names[1]])


def test_another_layer_is_not_the_papers_row() -> None:
    cell = caltech("D")
    other = replace(cell, nets=[replace(net, layer="pool5") for net in cell.nets])
    for made, there in ((cell, False), (other, True)):
        assert ("D on Caltech-101;" in "\n".join(table_markdown(11, [made]))) == there


@needs_data
def test_the_papers_figures_are_those_of_the_paper() -> None:
    text = (DATA.parent / "paper.md").read_text()
    for row in PAPER:
        if row.table == 11 and row.whose == "the paper":
            figures = " | ".join(row.figures[name] for name in TABLES[11])
            assert f"| {row.method} | {figures} |" in text
    assert "image only 79.2, image + box 84.0" in text
    own = {row.regions: row.figures for row in PAPER if row.table == 12 and row.whose != "others"}
    assert own == {"image": {"voc2012action": "79.2"}, "image,box": {"voc2012action": "84.0"}}
    others = {row.method: row.figures for row in PAPER if row.whose == "others"}
    for number in (11, 12):
        (line,) = (line for line in text.splitlines() if line.startswith(f"Table {number}, others"))
        for part in re.split("; ", line.partition(": ")[2].rstrip(".")):
            name = re.match(r"[^\d-]+(?= [\d-])", part)
            assert name is not None
            if "(with" in part:  # a row of its own
                more = others[f"{name[0]}, pre-trained on 2,000 classes"]
                assert [more[each] for each in TABLES[11][:2]] == re.findall(r"\d\d\.\d", part)[2:]
                part = part.partition(" (")[0]
            told = re.findall(r"-(?= )|[\d.]+\+-[\d.]+|\d\d\.\d", part[name.end() :])
            ours = others[next(method for method in others if method.startswith(name[0]))]
            here = [ours.get(each, "-").replace(" ", "") for each in TABLES[number]]
            assert told[: len(here)] == here[: len(told)], part
