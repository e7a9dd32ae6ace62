"""Nearest images: the same as by comparing all rows at once, whatever the blocks; queries by file
and by name.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vggfeat
from vggfeat import cli, index, neighbours
from vggfeat.aggregate import POOLINGS, aggregate
from vggfeat.errors import VggfeatError
from vggfeat.neighbours import answers, asked_of, contact_sheet, described, nearest

from ..conftest import Command, photograph
from .test_report import features_of, write_features

CLASSES = ["ant", "bee", "cat"]


@pytest.mark.parametrize("pool", POOLINGS)
@pytest.mark.parametrize("scales", [None, (48,)])
@pytest.mark.parametrize("block", [1, 1000, 1 << 26])
def test_the_same_as_all_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pool: str,
    scales: tuple[int, ...] | None,
    block: int,
) -> None:
    monkeypatch.setattr(index, "MADE_BYTES", block)
    features = features_of(tmp_path / "f.h5", np.arange(40, dtype=np.int32) % 3, CLASSES)
    features.status[[4, 17]] = 2
    where = index.index_of(features, pool=pool, scales=scales)
    asked = asked_of(where, ["0009.jpg", "0003.jpg"])
    [queries] = described(where, asked)
    assert queries.rows.tolist() == [9, 3] and queries.names == ["0009.jpg", "0003.jpg"]
    x = aggregate(features.read(scales), pool)
    both = nearest(where, queries.x_MD, top=7, without=queries.rows)
    for own, found in zip((9, 3), both, strict=True):
        cosine = x.astype(np.float64) @ x[own].astype(np.float64)
        cosine[[4, own, 17]] = -2
        order = np.argsort(-cosine, kind="stable")[:7]
        assert [n.row for n in found] == list(order)
        np.testing.assert_allclose([n.cosine for n in found], cosine[order], atol=1e-6)
        assert [n.labels for n in found] == [[CLASSES[i % 3]] for i in order]


def test_of_equals_the_first_and_no_more_than_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MADE_BYTES", 300)
    names = [f"{i:04d}.jpg" for i in range(12)]
    features = write_features(tmp_path / "f.h5", np.ones((12, 2, 16), np.float32), None, [], names)
    where = index.index_of(features)
    query_1D = where.rows[np.array([3])]
    assert [n.row for n in nearest(where, query_1D, top=4)[0]] == [0, 1, 2, 3]
    [everything] = nearest(where, query_1D, top=100, without=np.array([3]))
    assert [n.row for n in everything] == [0, 1, 2, *range(4, 12)]
    assert everything[0].cosine == pytest.approx(1) and everything[0].labels == []


def test_several_labels(tmp_path: Path) -> None:
    labels = np.array([[1, 1, -1], [-1, 0, -1], [1, -1, 1]], np.int8)
    where = index.index_of(features_of(tmp_path / "f.h5", labels, CLASSES))
    [found] = nearest(where, where.rows[np.array([0])], without=np.array([0]))
    assert {n.row: n.labels for n in found} == {1: [], 2: ["ant", "cat"]}


def test_refusals(tmp_path: Path) -> None:
    features = features_of(tmp_path / "f.h5", np.arange(6, dtype=np.int32) % 3, CLASSES)
    features.status[2] = 2
    features.errors[2] = "not an image"
    where = index.index_of(features)
    with pytest.raises(VggfeatError, match=r"no image gone.jpg: neither a file nor a name"):
        asked_of(where, ["0001.jpg", "gone.jpg"])
    with pytest.raises(VggfeatError, match=r"0002.jpg was unreadable .*not an image"):
        asked_of(where, ["0002.jpg"])
    with pytest.raises(VggfeatError, match=r"have shape \(1, 5\): .* takes \(M, 16\)"):
        nearest(where, np.zeros((1, 5), np.float32))
    with pytest.raises(VggfeatError, match="has no lists: leave out `probes`"):
        where.search(np.zeros((1, 16)), probes=3)


def test_the_rows_of_features_are_queries_and_none_is_its_own_neighbour(tmp_path: Path) -> None:
    features = features_of(tmp_path / "f.h5", np.arange(9, dtype=np.int32) % 3, CLASSES)
    other = features_of(tmp_path / "g.h5", np.arange(5, dtype=np.int32) % 3, CLASSES)
    where = index.index_of(features)
    found = list(answers(where, described(where, asked_of(where, [str(features.path)])), top=2))
    assert [answer.query for answer in found] == features.names
    assert all(answer.row not in [n.row for n in answer.neighbours] for answer in found)
    # of others every row may be an answer; a part of another kind comes in its place
    asked = asked_of(where, ["0001.jpg", str(other.path), "0002.jpg", "0003.jpg"])
    assert [len(part.names) for part in asked.parts] == [1, 5, 2]
    assert [a.row for a in answers(where, described(where, asked))] == [1, *[-1] * 5, 2, 3]
    narrow = index.index_of(features, scales=(48,))
    assert narrow.like(other).shape == (5, 16)
    moved = replace(narrow, description=replace(narrow.description, layer="fc6", mirror=False))
    with pytest.raises(VggfeatError, match=r"than the rows of .*: layer fc7, not fc6, mirror"):
        moved.like(other)


def test_the_picture() -> None:
    pixels = {k: np.full((30, 60, 3), v, np.uint8) for k, v in (("a", 50), ("b", 200))}
    found = [neighbours.Neighbour(i, name, 0.5, ["x"]) for i, name in enumerate("abc")]
    sheet = np.asarray(
        contact_sheet(pixels["a"], "q" * 300, found, lambda n: pixels.get(n.name), columns=2)
    )
    side, gap = neighbours.TILE, neighbours.GAP
    tile = side + neighbours.LINES * 17 + gap
    middle = gap + side // 2
    assert (sheet[middle, middle] == 50).all()  # the query
    assert (sheet[middle + tile, middle] == 50).all()
    assert (sheet[middle + tile, middle + side + gap] == 200).all()
    assert (sheet[middle + 2 * tile, middle] == (0xF3, 0xF4, 0xF6)).all()  # c isn't there
    assert sheet.shape[1] == gap + 2 * (side + gap)


def test_the_command(run_main: Command, folder: Path, tmp_path: Path) -> None:
    command = functools.partial(run_main, cli.main)
    small = (
        "--weights",
        "random:A,width=0.125,crop=32",
        "--scales",
        "32,48",
        "--precision",
        "float32",
    )
    f, picture = tmp_path / "f.h5", tmp_path / "n.png"
    assert (
        command("extract", "--dataset", "folder", "--root", folder, *small, "--out", f).status == 0
    )
    by_file = ("neighbours", "--features", f, "--query", folder / "red" / "03.jpg", "--top", 3)
    ran = command(
        *by_file,
        "--root",
        folder,
        "--picture",
        picture,
        "--json",
        tmp_path / "n.json",
        "--device",
        "cpu",
    )
    assert (ran.status, ran.err) == (0, "pool: average (the default)\n")
    [answer] = json.loads((tmp_path / "n.json").read_text())
    assert answer["query"] == str(folder / "red" / "03.jpg")
    found = answer["neighbours"]
    assert found[0]["name"] == "red/03.jpg" and found[0]["cosine"] == pytest.approx(1, abs=1e-4)
    assert found[0]["name"] in ran.out and "1.0000" in ran.out and len(found) == 3
    assert Image.open(picture).size[0] > 900
    net = vggfeat.load("random:A,width=0.125,crop=32")
    images = [folder / "red" / "03.jpg", folder / found[1]["name"]]
    a, b = vggfeat.embed(net, images, scales=(32, 48))
    assert found[1]["cosine"] == pytest.approx(float(a @ b), abs=1e-4)
    # by its name in the file, the image isn't its own neighbour; the pictures are where they were
    # described
    by_name = ("neighbours", "--features", f, "--query", "red/03.jpg", "--top", 2, "--pool", "max")
    first = picture.read_bytes()
    ran = command(*by_name, "--picture", picture, "--overwrite")
    assert (
        (ran.status, ran.err) == (0, "")
        and "red/03.jpg" not in ran.out
        and picture.read_bytes() != first
    )
    folder.rename(tmp_path / "moved")
    ran = command(*by_name, "--picture", picture, "--overwrite")
    [line] = ran.err_lines
    assert ran.status == 0 and line.endswith(": --root says where they are)")
    assert line.startswith("left out: the pictures: the images are not at hand (none is left in '/")
    (tmp_path / "moved").rename(folder)
    ran = command(*by_file, "--weights", "random:A,width=0.125,crop=32,seed=1")
    assert ran.status == 1 and "not those that described the images" in ran.err
    assert command(*by_file, "--picture", tmp_path / "n.txt").status == 2
    Image.fromarray(photograph(0, 20, 20)).save(tmp_path / "small.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image at all")
    ran = command("neighbours", "--features", f, "--query", tmp_path / "broken.jpg")
    assert ran.status == 1 and "broken.jpg: not an image" in ran.err
    # an index answers as the file that it was made of, and many queries as each of them
    made = command("index", "--features", f, "--out", tmp_path / "f.index", "--pool", "average")
    assert made.status == 0 and "all images are compared" in made.out
    (tmp_path / "list.txt").write_text("small.png\nbroken.jpg\n")
    many = ("--query", "red/03.jpg", "--query", tmp_path / "list.txt", "--query", folder / "blue")
    told = {}
    for where in (f, tmp_path / "f.index"):
        n = tmp_path / f"{where.name}.json"
        ran = command("neighbours", "--features", where, *many, "--json", n, "--top", 3)
        assert ran.status == 3 and "unreadable: " in ran.err and "broken.jpg: not an im" in ran.err
        told[where] = json.loads(n.read_text())
    queries = [answer["query"] for answer in told[f]]
    assert queries[:2] == ["red/03.jpg", str(tmp_path / "small.png")] and len(queries) > 5
    for a, b in zip(*told.values(), strict=True):
        assert a["query"] == b["query"] and a.get("error") == b.get("error")
        for near, same in zip(a.get("neighbours", ()), b.get("neighbours", ()), strict=True):
            assert near["cosine"] == pytest.approx(same["cosine"], abs=1e-3)
    ran = command("neighbours", "--features", tmp_path / "f.index", *many, "--picture", picture)
    assert ran.status == 1 and "--overwrite" in ran.err
    ran = command("neighbours", "--features", tmp_path / "f.index", *many, "--pool", "max")
    assert ran.status == 1 and "has its own pool: leave out --pool" in ran.err
