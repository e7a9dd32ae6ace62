"""A data set at a URL is the one in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vggfeat import datasets
from vggfeat.datasets import Items
from vggfeat.errors import NoData, VggfeatError, WrongUsage
from vggfeat.place import place_of

LAYOUTS = {
    "folder": ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/notes.txt", ".hidden/x.jpg"],
    "imagenet": ["train/n01440764/a.JPEG", "train/n02102040/b.JPEG", "val/n01440764/c.JPEG"],
    "caltech101": [f"101_ObjectCategories/{c}/image_000{i}.jpg" for c in "ab" for i in (1, 2)],
}


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    files = MemoryFileSystem()
    files.store.clear()
    yield files
    files.store.clear()


def alike(far: Items, near: Items) -> None:
    for each in fields(Items):
        a, b = getattr(far, each.name), getattr(near, each.name)
        if each.name in ("root", "url", "lists"):
            continue
        if isinstance(b, np.ndarray):
            assert a.tolist() == b.tolist()
        elif each.name == "splits":
            assert {k: v.tolist() for k, v in a.items()} == {k: v.tolist() for k, v in b.items()}
        else:
            assert a == b, each.name


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(store: MemoryFileSystem, tmp_path: Path, name: str) -> None:
    for path in LAYOUTS[name]:
        store.pipe_file(f"/bucket/data/{path}", b"x")
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    far, near = datasets.load(name, "memory://bucket/data/"), datasets.load(name, tmp_path)
    alike(far, near)
    assert far.address(0) == f"memory://bucket/data/{near.names[0]}"
    assert list(far.paths()) == []
    with pytest.raises(VggfeatError, match="is in a store; such are described into a set"):
        far.source(0)
    datasets.refuse_absent(far)


def test_a_csv_file_at_a_url(store: MemoryFileSystem, tmp_path: Path) -> None:
    text = "path,label,split\na/1.jpg,cat,train\nb/2.jpg,dog,test\n"
    store.pipe_file("/bucket/list.csv", text.encode())
    (tmp_path / "list.csv").write_text(text)
    far = datasets.load("csv", "memory://bucket/list.csv")
    alike(far, datasets.load("csv", tmp_path / "list.csv"))
    assert far.address(1) == "memory://bucket/b/2.jpg"
    for name in ("../1.jpg", "/etc/1.jpg", "a/../../1.jpg"):
        store.pipe_file("/bucket/out.csv", f"path,label\na.jpg,cat\n{name},cat\n".encode())
        with pytest.raises(VggfeatError, match=r"which leads out of memory://bucket: leave"):
            datasets.load("csv", "memory://bucket/out.csv")


def test_a_csv_file_of_urls(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("path,label\ns3://b/1.jpg,cat\nhttps://x.org/2.jpg,dog\ns3://b/1.jpg,cat\n")
    items = datasets.load("csv", path)
    assert items.names == ["s3://b/1.jpg", "https://x.org/2.jpg"] and items.url == ""
    assert items.address(1) == "https://x.org/2.jpg"
    path.write_text("path,label\na.jpg,cat\ns3://b/1.jpg,cat\n")
    with pytest.raises(VggfeatError, match=r"line 3: .*either all paths are URLs, or none is"):
        datasets.load("csv", path)
    path.write_text("path,label\ns3://b/1.jpg,cat\na.jpg,cat\n")
    with pytest.raises(VggfeatError, match=r"line 3: .*either all paths are URLs, or none is"):
        datasets.load("csv", path)


def test_what_is_not_there_and_what_is_no_layout_is_named_by_its_url(
    store: MemoryFileSystem,
) -> None:
    with pytest.raises(NoData, match="nothing at memory://bucket/none: no such bucket or folder"):
        datasets.load("folder", "memory://bucket/none")
    store.pipe_file("/bucket/data/a/notes.txt", b"")
    with pytest.raises(VggfeatError, match=r"memory://bucket/data\S* .*|class folder memory://"):
        datasets.load("folder", "memory://bucket/data")
    with pytest.raises(VggfeatError, match=r"there is no memory://bucket/list\.csv"):
        datasets.load("csv", "memory://bucket/list.csv")
    with pytest.raises(WrongUsage, match="`download` is into a folder of this machine"):
        datasets.load("caltech101", "memory://bucket/data", download=True)
    with pytest.raises(VggfeatError, match=r"nowhere://b can't be reached here"):
        datasets.load("folder", "nowhere://b")


def test_keys_that_are_no_files_names(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Consoles of object stores put "a/" to show an empty folder; memory:// has no such keys."""
    store.pipe_file("/bucket/data/a/1.jpg", b"x")
    there = {"a/1.jpg": 1, "b/2.jpg": 1, "a/": 0, "b": 0}
    monkeypatch.setattr(type(place_of("memory://b")), "below", lambda self: there)
    items = datasets.load("folder", "memory://bucket/data")
    assert items.names == ["a/1.jpg", "b/2.jpg"]
    assert not [remark for remark in items.remarks if "left out" in remark]
    there |= dict.fromkeys(["a//3.jpg", "a/./4.jpg", "/5.jpg", "a/../6.jpg"], 1)
    odd = datasets.load("folder", "memory://bucket/data")
    assert odd.names == items.names
    assert "left out: 4 of the keys, such as '/5.jpg'" in odd.remarks[0]
    there["a/" + "x" * 300 + ".jpg"] = 1
    with pytest.raises(VggfeatError, match=r"can't be a file's name here \(File name too long\)"):
        datasets.load("folder", "memory://bucket/data")
    del there["a/" + "x" * 300 + ".jpg"]
    there["a/1.jpg/in.jpg"] = 1
    with pytest.raises(VggfeatError, match=r"memory://bucket/data has 'a/1.jpg.*list the images"):
        datasets.load("folder", "memory://bucket/data")
