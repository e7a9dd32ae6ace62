"""Images inside of tars, Parquet and Arrow files: each a row, in its order; damage is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import photograph
from tests.vggfeat.shards.made import SPEC, Job, same
from vggfeat import datasets
from vggfeat.decode import read_rgb
from vggfeat.errors import VggfeatError
from vggfeat.features import open_features
from vggfeat.shards import inside
from vggfeat.shards.inside import read_inside
from vggfeat.shards.sharded import merge, open_set
from vggfeat.sources import load


def picture(i: int) -> bytes:
    made = io.BytesIO()
    Image.fromarray(photograph(i, 40, 50)).save(made, "PNG")
    return made.getvalue()


def tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as made:  # type: ignore[call-overload]
        for name, content in members:
            told = tarfile.TarInfo(name)
            told.size = len(content)
            made.addfile(told, io.BytesIO(content))
    return path


def test_a_tar_is_read_as_webdataset_writes_it(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "0.tar",
        [
            ("./a/1.png", picture(1)),
            ("./a/1.cls", b"2\n"),
            ("./a/1.json", b"{}"),
            ("a/2.cls", b"dog"),
            ("a/2.left.png", picture(2)),
            ("a/2.right.png", picture(3)),
            ("../../etc/3.JPG", b"no picture"),
            ("a/1.png", picture(4)),
        ],
    )
    with tarfile.open(path, "a") as made:  # what is no file is no image
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    read = read_inside("webdataset", "0.tar", str(path))
    assert read.items.names == [
        "0.tar/a/1.png",
        "0.tar/a/2.left.png",
        "0.tar/a/2.right.png",
        "0.tar/../../etc/3.JPG",
        "0.tar/a/1.png#2",
    ]
    assert read.labels == ["2", "dog", "dog", "", ""] and not read.reasons
    assert same(read_rgb(read.items.source(2)), photograph(3, 40, 50))
    packed = tar(tmp_path / "0.tgz", [("1.png", picture(1))], "w:gz")
    assert len(read_inside("webdataset", "0.tgz", str(packed)).items) == 1


@pytest.mark.parametrize("cut", [1, 700, 2000])
def test_a_tar_that_was_cut_off_is_named(tmp_path: Path, cut: int) -> None:
    path = tar(tmp_path / "0.tar", [(f"{i}.png", picture(i)) for i in range(3)])
    whole = path.read_bytes().rstrip(b"\0")
    path.write_bytes(whole[:-cut] if cut > 1 else b"no tar")
    with pytest.raises(VggfeatError, match=r"0\.tar is damaged, or no tar file"):
        read_inside("webdataset", "0.tar", str(path))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("flip", "bad checksum at byte"),
        ("cut before", "empty header at byte"),
        ("cut within", "truncated header at byte"),
        ("zeros", "more stands behind its end"),
    ],
)
def test_damage_between_a_tars_files_is_named(tmp_path: Path, damage: str, words: str) -> None:
    path = tar(tmp_path / "0.tar", [(f"{i}.png", picture(i)) for i in range(4)])
    with tarfile.open(path) as made:
        header = made.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[header] ^= 1
    elif damage == "zeros":
        content[header : header + 1024] = bytes(1024)
    else:
        del content[header + (0 if damage == "cut before" else 100) :]
    path.write_bytes(content)
    with pytest.raises(VggfeatError, match=rf"0\.tar is damaged, or no tar file .*{words}"):
        read_inside("webdataset", "0.tar", str(path))


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_some_rows_of_a_file(tmp_path: Path, kind: str) -> None:
    if kind == "webdataset":
        path = tar(tmp_path / "0.tar", [(f"{i}.png", picture(i)) for i in range(4)])
    else:
        path = tmp_path / "0.parquet"
        pq.write_table(table([*ROWS, ROWS[0]]), path)
    every = read_inside(kind, path.name, str(path))
    some = read_inside(kind, path.name, str(path), range(1, 3))
    assert some.items.names == every.items.names[1:3] and some.labels == every.labels[1:3]
    assert some.items.source(0) == every.items.source(1)
    assert some.reasons == {i - 1: why for i, why in every.reasons.items() if 1 <= i < 3}
    assert inside.count_inside(kind, path.name, str(path)) == len(every.items)
    assert len(read_inside(kind, path.name, str(path), range(0)).items) == 0


def test_files_that_name_classes_otherwise_are_no_one_set(tmp_path: Path) -> None:
    pq.write_table(table(ROWS[:1], ["cat", "dog"]), tmp_path / "0.parquet")
    pq.write_table(table(ROWS[:1]), tmp_path / "1.parquet")
    items = datasets.load("parquet", f"{tmp_path}/*.parquet")
    made = Job(items, load(SPEC, device="cpu", precision="float32"))
    with pytest.raises(VggfeatError, match="some files name the class '1', which isn't among"):
        made.made(tmp_path / "set", 8192)


def test_what_is_too_large_is_marked_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar(tmp_path / "0.tar", [("1.png", bytes(5000)), ("2.png", picture(2))])
    monkeypatch.setattr(inside, "MOST_BYTES", 4999)
    read = read_inside("webdataset", "0.tar", str(path))
    assert read.reasons == {0: "larger than 4,999 bytes"} and len(read.items) == 2
    monkeypatch.setattr(inside, "MOST_ALL", 100)
    with pytest.raises(VggfeatError, match="more than 100 bytes of images: divide it"):
        read_inside("webdataset", "0.tar", str(path))
    tar(tmp_path / "1.tar", [("1.cls", bytes(5000))])
    with pytest.raises(VggfeatError, match=r"1\.cls has 5,000 bytes, and is to be a label"):
        read_inside("webdataset", "1.tar", str(tmp_path / "1.tar"))


def table(rows: list[tuple[Any, Any]], classes: list[str] | None = None) -> pa.Table:
    features = {"label": {"_type": "ClassLabel", "names": classes}} if classes else {}
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ],
        metadata={b"huggingface": json.dumps({"info": {"features": features}}).encode()},
    )
    images = [image for image, _ in rows]
    return pa.table({"image": images, "label": [label for _, label in rows]}, schema=schema)


ROWS = [
    ({"bytes": picture(1), "path": "one.png"}, 1),
    ({"bytes": picture(2), "path": None}, None),
    ({"bytes": None, "path": "/elsewhere/3.png"}, 0),
    (None, -1),
]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_hugging_faces_files(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"0.{ending}"
    made = table(ROWS, ["cat", "dog"])
    if ending == "parquet":
        pq.write_table(made, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
            writer.write_table(made)
    read = read_inside("parquet", f"0.{ending}", str(path))
    names = ["one.png", "1", "/elsewhere/3.png", "3"]
    assert read.items.names == [f"0.{ending}/{name}" for name in names]
    assert read.labels == ["dog", "", "cat", ""] and read.classes == ("cat", "dog")
    assert set(read.reasons) == {2, 3}
    assert set(read.reasons.values()) == {"its bytes are not in the file"}
    assert same(read_rgb(read.items.source(0)), photograph(1, 40, 50))


def test_a_label_beyond_the_classes_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    pq.write_table(table([(ROWS[0][0], 2)], ["cat", "dog"]), tmp_path / "0.parquet")
    with pytest.raises(VggfeatError, match="has the label 2, and only 2 classes"):
        read_inside("parquet", "0.parquet", str(tmp_path / "0.parquet"))
    (tmp_path / "1.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(VggfeatError, match=r"1\.parquet is damaged, or no Parquet file"):
        read_inside("parquet", "1.parquet", str(tmp_path / "1.parquet"))
    of_text = pa.array([{"bytes": "no bytes", "path": "a"}])
    pq.write_table(pa.table({"image": of_text}), tmp_path / "3.parquet")
    with pytest.raises(
        VggfeatError, match=r"3\.parquet: the column image holds str, not the bytes"
    ):
        read_inside("parquet", "3.parquet", str(tmp_path / "3.parquet"))
    pq.write_table(pa.table({"path": ["a.png"]}), tmp_path / "2.parquet")
    with pytest.raises(VggfeatError, match="no column of images, as the first"):
        read_inside("parquet", "2.parquet", str(tmp_path / "2.parquet"))


def test_a_set_of_tars_knows_its_rows_when_it_is_sealed(tmp_path: Path) -> None:
    for part, name in enumerate(("train-0", "train-1", "test-0")):
        members = []
        for i in range(part + 1):
            members += [(f"{i}.png", picture(3 * part + i)), (f"{i}.cls", b"1" if i % 2 else b"10")]
        tar(tmp_path / f"{name}.tar", [*members, ("bad.png", b"no picture")])
    items = datasets.load("webdataset", f"{tmp_path}/{{train-0,train-1,test-0}}.tar")
    assert items.containers and len(items) == 3
    made = Job(items, load(SPEC, device="cpu", precision="float32"))
    _, plan = made.made(tmp_path / "set", 8192)
    assert (plan.rows, plan.shards) == (None, 3)
    opened = open_set(tmp_path / "set")
    assert opened.names[:3] == ["train-0.tar/0.png", "train-0.tar/bad.png", "train-1.tar/0.png"]
    assert opened.classes == ["1", "10"] and opened.labels is not None
    assert opened.labels.tolist() == [1, -1, 1, 0, -1, 1, 0, 1, -1]
    assert {name: rows.tolist() for name, rows in opened.splits.items()} == {
        "train": [0, 2, 3],
        "test": [5, 6, 7],
    }
    assert set(opened.errors) == {1, 4, 8}

    def end(done: float, _: int) -> None:
        if done == 5:
            raise RuntimeError("ended in the middle")

    with pytest.raises(RuntimeError, match="ended"):
        merge(tmp_path / "set", tmp_path / "one.h5", advance=end)
    assert (tmp_path / "one.h5.partial").exists()
    assert merge(tmp_path / "set", tmp_path / "one.h5")[0] == 9
    one = open_features(tmp_path / "one.h5")
    assert same(one.read(), opened.read()) and list(one.names) == list(opened.names)
    assert one.rows_digest == opened.rows_digest
    opened.verify()
