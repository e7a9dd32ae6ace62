"""Indexes: the rows that exact search finds, by lists as often as is told; files that are damaged
or crafted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vggfeat
from tests.conftest import Command
from vggfeat import cli, index
from vggfeat.errors import VggfeatError
from vggfeat.hdf5 import Damaged, open_file, write_file
from vggfeat.index import Index, build_index, index_of, open_index

from .test_report import write_features

N, D = 1500, 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """1,500 rows around 60 centres, two of them unreadable, with lists."""
    folder = tmp_path_factory.mktemp("index")
    rng = np.random.default_rng(0)
    x = rng.random((60, D))[rng.integers(0, 60, N)] + rng.normal(0, 0.2, (N, D))
    names = [f"{i:04d}.jpg" for i in range(N)]
    x_N1D = np.repeat(np.abs(x).astype(np.float32)[:, None], 2, axis=1)
    labels = (np.arange(N) % 2).astype(np.int32)
    features = write_features(folder / "f.h5", x_N1D, labels, ["ant", "bee"], names)
    features.status[[7, 1200]] = 2
    features.errors.update({7: "no image", 1200: "gone"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "LISTED_FROM", 1000)
        patch.setattr(index, "CANDIDATES", (20, 100))
        patch.setattr(index, "PROBES", 1)
        patch.setattr(index, "TRIED", 200)
        told: list[tuple[float, int]] = []
        built = build_index(
            folder / "f.index",
            index_of(features),
            recall=0.9,
            progress=lambda done, total: told.append((done, total)),
        )
    assert told[-1] == (N + 2 * (N - 2),) * 2 and sorted(told) == told
    return built


def by_hand(x_ND: np.ndarray, query_D: np.ndarray, left_out: list[int]) -> np.ndarray:
    cosines = x_ND.astype(np.float64) @ query_D.astype(np.float64)
    cosines[left_out] = -2
    return np.argsort(-cosines, kind="stable")


def test_an_index_finds_what_all_rows_say_and_by_lists_as_often_as_told(made: Index) -> None:
    assert made.tuning is not None and made.lists is not None
    x = made.rows[:]
    own = np.arange(0, N, 30)
    rows, cosines = made.search(x[own], without=own, exact=True)
    for m, row in enumerate(own.tolist()):
        assert np.array_equal(rows[m], by_hand(x, x[row], [7, 1200, row])[:10])
        np.testing.assert_allclose(cosines[m], x[rows[m]] @ x[row], atol=1e-6)
    near, its = made.search(x[own], without=own)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(rows, near, strict=True)])
    assert recall > 0.9 and made.tuning["recall"] > 0.87 and made.tuning["asked"] == 0.9
    assert (near != own[:, None]).all() and (np.diff(its) <= 0).all()
    np.testing.assert_allclose(its[0], x[near[0]] @ x[0], atol=1e-6)
    # all lists and all rows as candidates: exact, too
    every, _ = made.search(x[own], without=own, probes=10**6, candidates=N)
    assert np.array_equal(every, rows)
    # lists that hold fewer rows than are asked for: all are compared, and no row is there twice
    [found], [cosine] = made.search(x[:1], N, probes=1, candidates=1)
    assert sorted(found[:-2].tolist()) == [i for i in range(N) if i not in (7, 1200)]
    assert found[-2:].tolist() == [-1, -1] and np.isnan(cosine[-2:]).all()


def test_it_knows_what_it_is_of(made: Index) -> None:
    features = vggfeat.open_features(Path(made.path).with_suffix(".h5"))
    assert (made.rows_digest, made.names) == (features.rows_digest, features.names)
    assert (made.description, made.pool) == (features.description, "average")
    assert made.errors == {7: "no image", 1200: "gone"}
    assert made.labels is not None and made.labels[:3].tolist() == [0, 1, 0]
    assert np.array_equal(np.flatnonzero(~made.readable), [7, 1200])
    assert not made.rows[np.array([7, 1200])].any()
    np.testing.assert_allclose(np.linalg.norm(made.rows[:7], axis=1), 1, atol=1e-3)
    made.verify()


def test_a_recall_that_lists_do_not_reach_is_not_promised(
    made: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "LISTED_FROM", 1000)
    monkeypatch.setattr(index, "CANDIDATES", (10,))
    told: list[str] = []
    other = build_index(tmp_path / "o.index", made, recall=1, say=told.append)
    assert other.tuning is None and other.lists is None
    assert told[0].startswith("lists reach a recall of 0.") and "all rows are compared" in told[0]
    x = made.rows[:5]
    assert np.array_equal(other.search(x)[0], made.search(x, exact=True)[0])
    with pytest.raises(VggfeatError, match=r"`recall` must lie in 0\.\.1, not 2"):
        build_index(tmp_path / "o.index", made, recall=2)
    # without faiss nothing is begun, and what needs none goes on
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(VggfeatError, match=r"pip install 'vggfeat\[search\]'.*`exact`"):
        build_index(tmp_path / "n.index", made)
    with pytest.raises(VggfeatError, match=r"pip install 'vggfeat\[search\]'"):
        open_index(made.path).search(x)
    assert build_index(tmp_path / "n.index", made, exact=True).search(x)[0].shape == (5, 10)
    assert sorted(os.listdir(tmp_path)) == ["n.index", "o.index"]


def rewritten(made: Index, path: Path, **changed: Any) -> Path:
    """A whole and sealed file like the index's, with arrays of one's own."""
    with open_file(Path(made.path), index.FORMAT, index.FORMAT_VERSION) as file:
        arrays = {name: place.read(file.descriptor) for name, place in file.arrays.items()}
    for name, value in changed.items():
        arrays[name.replace("__", "/")] = value
    path.unlink(missing_ok=True)
    write_file(path, index.FORMAT, index.FORMAT_VERSION, arrays, {"descriptors": "crc32"})
    return path


def test_lists_that_can_not_be_are_refused_before_faiss_sees_them(
    made: Index, tmp_path: Path
) -> None:
    path, lists = tmp_path / "bad.index", made.lists
    assert lists is not None
    assert open_index(rewritten(made, path)).search(made.rows[:2])[0].shape == (2, 10)
    far, twice, back = lists.rows.copy(), lists.rows.copy(), lists.ends.copy()
    far[0], twice[0], back[0] = 10**9, twice[1], back[-1]
    nan = np.full_like(lists.centroids, np.nan)
    for changed in (
        {"lists__rows": far},
        {"lists__rows": twice},
        {"lists__ends": back},
        {"lists__ends": lists.ends[:-1]},
        {"lists__codes": lists.codes[:, :-1]},
        {"lists__codes": lists.codes.astype(np.int64)},
        {"lists__codebooks": lists.codebooks[:, :9]},
        {"lists__axes": lists.axes[:, :-4]},
        {"lists__centroids": nan},
        {"lists__centroids": lists.centroids[:0], "lists__ends": lists.ends[:0]},
        {"status": np.ones(N, np.uint8)},
        {"unreadable__rows": np.array([7, 2**40])},
        {"facts": np.frombuffer(b"{}", np.uint8)},
    ):
        with pytest.raises(Damaged, match=r"bad\.index is damaged: "):
            open_index(rewritten(made, path, **changed))


def test_a_row_that_a_disk_has_changed_is_not_compared(made: Index, tmp_path: Path) -> None:
    path = tmp_path / "spoilt.index"
    path.write_bytes(Path(made.path).read_bytes())
    with open_file(path, index.FORMAT, index.FORMAT_VERSION) as file:
        place = file.arrays["descriptors"]
    with open(path, "r+b") as raw:
        raw.seek(place.at + 30 * place.row_bytes)
        raw.write(b"\x01")
    spoilt = open_index(path)
    assert spoilt.rows[:30].shape == (30, D)
    for look in (spoilt.verify, lambda: spoilt.search(made.rows[:1], exact=True)):
        with pytest.raises(Damaged, match="row 30 is other than written: index again"):
            look()


def test_the_index_command(
    made: Index, run_main: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LISTED_FROM", 1000), ("TRIED", 40), ("CANDIDATES", (50,))):
        monkeypatch.setattr(index, name, value)
    f, out, told = Path(made.path).with_suffix(".h5"), tmp_path / "c.index", tmp_path / "c.json"
    rng = np.random.default_rng(1)
    x_NQD = np.repeat(rng.random((50, 1, D), np.float32), 2, axis=1)
    write_features(tmp_path / "q.h5", x_NQD, None, [], [f"q{i}.jpg" for i in range(50)])
    words = ("index", "--features", f, "--out", out, "--json", told, "--recall", 0.5)
    ran = run_main(cli.main, *words, "--queries", f)
    assert ran.status == 1 and "leave out --queries" in ran.err and not out.exists()
    ran = run_main(cli.main, *words, "--queries", tmp_path / "q.h5")
    assert ran.status == 0 and "recall" in ran.out, ran.err
    record = json.loads(told.read_text())
    assert record["tuning"]["queries"] == 20 and record["dim"] == D and record["layer"] == "fc7"
    ran = run_main(cli.main, "info", out, "--verify")
    assert ran.status == 0 and "every byte" in ran.out and "of the ten nearest" in ran.out
    many = ("--query", "0005.jpg", "--query", tmp_path / "q.h5", "--top", 2)
    ran = run_main(cli.main, "neighbours", "--features", out, *many, "--probes", 3)
    assert ran.status == 0 and "and 31 more queries" in ran.out, ran.err
    ran = run_main(cli.main, "svm", "--features", out)
    assert ran.status == 1 and "is not a feature file (its format is 'vggfeat-index')" in ran.err
