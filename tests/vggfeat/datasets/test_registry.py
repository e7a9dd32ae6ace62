"""The data sets by name, and what they say before anything is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.vggfeat.datasets.made import fails, make_voc, touch, tree, write
from vggfeat import cli, datasets
from vggfeat.datasets import at_hand, describe_datasets, load, refuse_absent
from vggfeat.errors import VggfeatError, WrongUsage


def test_lists_without_images_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    make_voc(tmp_path / "VOC2007", {"train": ["000001"], "val": ["000002"]})
    items = load("voc2007", tmp_path)
    with pytest.raises(
        VggfeatError, match=r"none of the 2 images of voc2007 is there.*000001.jpg.*`download`"
    ):
        refuse_absent(items)
    assert at_hand("voc2007", items.names, tmp_path, "")[0] is None
    touch(tmp_path / "VOC2007", "JPEGImages/000002.jpg")
    refuse_absent(items)  # some are: the others are told of one by one
    text = "path,label\n" + "".join(f"{i}.jpg,cat\n" for i in range(3))
    items = load("csv", write(tmp_path, text))
    with pytest.raises(
        VggfeatError, match=r"none of the 3 images.*0.jpg: paths are relative to the CSV file's"
    ):
        refuse_absent(items)
    tree(tmp_path / "links", "a")
    (tmp_path / "links" / "b").mkdir()
    (tmp_path / "links" / "b" / "1.jpg").symlink_to("nowhere")
    with pytest.raises(VggfeatError, match="links that lead nowhere"):
        refuse_absent(load("folder", tmp_path / "links" / "b"))


def test_extract_begins_nothing_without_images(tmp_path: Path, run_main: Command) -> None:
    make_voc(tmp_path / "VOC2007", {"train": ["000001"], "val": ["000002"]})
    words = (
        "--weights",
        "random:A,width=0.03125,crop=32",
        "--scales",
        "32",
        "--out",
        tmp_path / "f.h5",
    )
    ran = run_main(cli.main, "extract", "--dataset", "voc2007", "--root", tmp_path, *words)
    assert ran.status == 1 and "none of the 2 images of voc2007 is there" in ran.err
    assert len(ran.err_lines) == 1 and not list(tmp_path.glob("f.h5*"))


def test_the_other_kind_of_root_names_its_dataset(tmp_path: Path) -> None:
    fails("folder", write(tmp_path, "path,label\na.jpg,cat\n"), "is a file", "`dataset` csv")
    fails("csv", tmp_path, str(tmp_path), "is a folder", "`dataset` folder")


def test_an_unknown_name_lists_the_known_ones() -> None:
    names = [name for name, _, _ in describe_datasets()]
    assert len(set(names)) == len(names) > 1
    fails("voc2077", None, "'voc2077'", ", ".join(names))
    assert all(
        about and files and "\n" not in about + files for _, about, files in describe_datasets()
    )


def test_pixels_that_lie_in_memory_have_no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = replace(datasets._DATASETS["digits"], files="none: it is drawn")
    monkeypatch.setitem(datasets._DATASETS, "pixels", pixels)
    for name, dataset in datasets._DATASETS.items():
        assert dataset.files.startswith("none: ") == dataset.in_memory
        if not dataset.in_memory:
            datasets.refuse_idle_root(name)
    says = "^there is nothing to read for pixels, it is drawn: leave out `root`$"
    with pytest.raises(WrongUsage, match=says):
        datasets.refuse_idle_root("pixels")


def test_pixels_that_lie_in_memory_are_at_hand_without_a_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = load("digits")
    found, why = at_hand("digits", items.names[:2], None, "")
    assert found is not None and len(found) == len(items) and why == ""
    assert at_hand("pixels", items.names[:2], None, "")[0] is None
    monkeypatch.setitem(datasets._DATASETS, "pixels", datasets._DATASETS["digits"])
    found, why = at_hand("pixels", items.names[:2], None, "")
    assert found is not None and len(found) == len(items) and why == ""
    for name, dataset in datasets._DATASETS.items():  # the others need to be told where they lie
        if not dataset.in_memory:
            with pytest.raises(VggfeatError, match="`root`"):
                load(name)
