"""Which files a pattern means, what is in them, and Parquet files that list images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vggfeat import datasets
from vggfeat.datasets import containers
from vggfeat.datasets.containers import columns_of, expanded, in_order, label_texts
from vggfeat.errors import NoData, VggfeatError


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expanded("s3://b/{08..11}.tar", "webdataset") == [
        f"s3://b/{word}.tar" for word in ("08", "09", "10", "11")
    ]
    assert expanded("a/{x,y}-{0..1}.tar", "webdataset") == [
        "a/x-0.tar",
        "a/x-1.tar",
        "a/y-0.tar",
        "a/y-1.tar",
    ]
    for name in ("b.tar", "a.tar", "c.tgz", "d.txt"):
        (tmp_path / name).touch()
    assert expanded(f"{tmp_path}/*.tar", "webdataset") == [
        f"{tmp_path}/a.tar",
        f"{tmp_path}/b.tar",
    ]
    assert [Path(p).name for p in expanded(f"{tmp_path}/", "webdataset")] == [
        "a.tar",
        "b.tar",
        "c.tgz",
    ]
    with pytest.raises(NoData, match=r"no file \.parquet or \.arrow at"):
        expanded(str(tmp_path), "parquet")
    monkeypatch.setattr(containers, "MOST_FILES", 5)
    with pytest.raises(VggfeatError, match="more than 5 files: describe it in parts"):
        expanded("{0..999999999999}.tar", "webdataset")


def test_tars_are_items_of_their_common_folder(tmp_path: Path) -> None:
    items = datasets.load("webdataset", "s3://b/x/{p/0,q/1}.tar")
    assert (items.url, items.names) == ("s3://b/x", ["p/0.tar", "q/1.tar"])
    assert items.address(1) == "s3://b/x/q/1.tar"
    items = datasets.load("webdataset", f"{tmp_path}/{{0..1}}.tar")
    assert items.url is None and items.address(1) == f"{tmp_path}/1.tar"
    with pytest.raises(VggfeatError, match=r"1\.tar holds many images; such are described into"):
        items.source(1)
    with pytest.raises(VggfeatError, match="either all files are at URLs, or none is"):
        datasets.load("webdataset", "{s3://b/0,1}.tar")
    with pytest.raises(VggfeatError, match="`root` is needed: tar files, as a pattern"):
        datasets.load("webdataset")


def listed(where: Path, **columns: Sequence[Any]) -> Path:
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), where)
    return where


def test_a_parquet_file_that_lists_images(tmp_path: Path) -> None:
    path = listed(
        tmp_path / "list.parquet",
        path=["a/1.jpg", "b/2.jpg", "3.jpg", "4.jpg"],
        label=["dog", "cat", None, "dog"],
        split=["train", "test", "train", "validation"],
    )
    items = datasets.load("parquet", path)
    assert items.names == ["a/1.jpg", "b/2.jpg", "3.jpg", "4.jpg"] and items.root == tmp_path
    assert items.classes == ["cat", "dog"] and items.labels is not None
    assert items.labels.tolist() == [1, 0, -1, 1]
    assert {name: rows.tolist() for name, rows in items.splits.items()} == {
        "train": [0],
        "val": [3],
        "test": [1],
    }
    assert next(iter(items.paths())) == path
    far = listed(tmp_path / "far.parquet", url=["s3://b/1.jpg", "s3://b/2.jpg"])
    items = datasets.load("parquet", far)
    assert (items.url, items.labels, items.address(0)) == ("", None, "s3://b/1.jpg")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"path": ["a.jpg", "a.jpg"]}, r"'a.jpg' is listed twice"),
        ({"path": ["a.jpg", None]}, r"row 1: no path in the column path"),
        ({"path": ["a.jpg", "s3://b/1.jpg"]}, r"'a.jpg': either all paths are URLs, or none is"),
        ({"path": ["a", "b"], "label": [1, 2], "split": ["train", "odd"]}, r"row 1: the split"),
        ({"number": [1, 2]}, r"no column of images \(bytes\), and none of path, uri.*has number"),
    ],
)
def test_bad_lists(tmp_path: Path, columns: dict[str, list[Any]], words: str) -> None:
    path = listed(tmp_path / "list.parquet", **columns)
    with pytest.raises(VggfeatError, match=words):
        datasets.load("parquet", path)


def test_columns_and_labels(tmp_path: Path) -> None:
    path = listed(tmp_path / "a.parquet", Image=[b"x"], Label=[1], key=["k"], other=[1.5])
    found = columns_of(str(path))
    assert (found.image, found.label, found.name, found.classes) == ("Image", "Label", "key", ())
    assert label_texts([3, None, -1, "x", ""], (), "f") == ["3", "", "", "x", ""]
    assert in_order({"10", "9", "1"}) == ["1", "9", "10"]
    assert in_order({"10", "b", "a"}) == ["10", "a", "b"]


def test_lists_of_other_classes_are_no_one_list(tmp_path: Path) -> None:
    for number, classes in enumerate((["cat", "dog"], ["dog", "cat"])):
        told = {"info": {"features": {"label": {"_type": "ClassLabel", "names": classes}}}}
        schema = pa.schema(
            [("path", pa.string()), ("label", pa.int64())],
            metadata={b"huggingface": json.dumps(told).encode()},
        )
        rows = pa.table({"path": [f"{number}.jpg"], "label": [0]}, schema=schema)
        pq.write_table(rows, tmp_path / f"{number}.parquet")
    with pytest.raises(VggfeatError, match=r"1\.parquet tells other classes than .*0\.parquet"):
        datasets.load("parquet", f"{tmp_path}/*.parquet")


@pytest.mark.parametrize(
    ("path", "words"),
    [("../1.jpg", "leads out of memory://lists"), ("file:///etc/1.jpg", "a file of this machine")],
)
def test_a_list_in_a_store_names_no_file_elsewhere(tmp_path: Path, path: str, words: str) -> None:
    content = listed(tmp_path / "l.parquet", path=[path]).read_bytes()
    fsspec.filesystem("memory").pipe_file("/lists/l.parquet", content)
    with pytest.raises(VggfeatError, match=words):
        datasets.load("parquet", "memory://lists/l.parquet")
