"""What a saved classifier says of images, lists and feature files, a row each; and these rows in a
file.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vggfeat
from vggfeat import predict
from vggfeat.aggregate import aggregate
from vggfeat.errors import Interrupted, VggfeatError
from vggfeat.model import Model, open_model, save_model
from vggfeat.parquet import pyarrow
from vggfeat.predict import Tally, predict_all, source_of, write_predictions
from vggfeat.store import Description

from ..conftest import Command
from .conftest import NET, OTHER, Made, feature_file, read_predictions

DIM = 6
PART = Description(
    *("A", "random:A", "ab" * 32, "fc7", (32,), True, "floor", "bilinear", "float32", "Pillow")
)


def model_of(classes: Sequence[str], several: bool = False, dim: int = DIM) -> Model:
    """A classifier without a net: weights at random."""
    rng = np.random.default_rng(len(classes))
    coef = rng.standard_normal((len(classes), dim))
    return Model(
        [*classes], coef, rng.standard_normal(len(classes)) / 9, (PART,), "average", several, None
    )


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Images needn't exist: a descriptor is drawn from its name, and "bad" names are unreadable.
    Gives the names that were described, by chunks.
    """
    asked: list[list[str]] = []

    def gathered(
        network: Any, images: Sequence[str], part: Description, *, advance: Any, **how: Any
    ) -> tuple[np.ndarray, dict[int, str]]:
        asked.append([*images])
        raw = np.stack(
            [np.random.default_rng([*os.fsencode(name)]).random((1, DIM)) for name in images]
        )
        bad = {i: "no picture" for i, name in enumerate(images) if "bad" in name}
        raw[list(bad)] = np.nan
        advance(len(images))
        return raw.astype(np.float32), bad

    monkeypatch.setattr(predict, "gathered", gathered)
    monkeypatch.setattr(Model, "networks", [None])
    return asked


# --- what is given --------------------------------------------------------------------------------


def test_a_folder_is_read_whole_and_its_folders_tell_classes(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(made.folder, root / "new")
    (root / "new/red/deep").mkdir()
    shutil.copy(made.folder / "red/00.jpg", root / "new/red/deep/1.jpg")
    shutil.copy(made.folder / "red/00.jpg", root / "2.jpg")
    (root / "notes.doc").touch()
    model = open_model(made.model)
    source = source_of(root, model)
    assert len(source) == 26 and [*source.names] == sorted(source.names)
    assert source.names[0] == str(root / "2.jpg") and source.labels is not None
    assert source.labels.tolist() == [-1, *[0] * 12, *[1] * 13]
    assert "left out: 1 file" in source.remarks[0] or ".doc" in source.remarks[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(VggfeatError, match="no images in the folder"):
        source_of(tmp_path / "empty", model)


def test_lists_are_relative_to_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(["cat", "dog"])
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfa.jpg\r\n\n/b/ c.png\ncaf\xe9.jpg")
    (tmp_path / "list.csv").write_text("path,label\na.jpg,dog\nb.jpg,\nc.jpg,cow\n")
    (tmp_path / "bare.csv").write_text("path\nx/a.jpg\nb.jpg\n")
    source = source_of([tmp_path / f for f in ("names.txt", "list.csv", "bare.csv")], model)
    names = ["a.jpg", "/b/ c.png", "caf\udce9.jpg", "a.jpg", "b.jpg", "c.jpg", "x/a.jpg", "b.jpg"]
    assert [*source.names] == [str(tmp_path / name) for name in names]
    assert source.labels is not None and source.labels.tolist() == [*[-1] * 3, 1, *[-1] * 4]
    assert source_of(tmp_path / "bare.csv", model).labels is None
    # of a model of several classes an image, one label says too little
    assert source_of(tmp_path / "list.csv", model_of(["cat", "dog"], several=True)).labels is None

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"s.jpg\n/t.jpg\n")))
    given = ["z.jpg", "-", "names.txt"]
    assert [*source_of(given, model).names] == ["z.jpg", "s.jpg", "/t.jpg", *names[:3]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "give the paths of images, folders, lists or feature files"),
        ([3], "give the paths of images"),
        (["none.txt"], "no list of images at none.txt"),
        (["none.csv"], "no CSV file at"),
        (["none.h5"], "no feature file at none.h5"),
        (["empty.txt"], "no images are listed in empty.txt: give a name a line"),
        (["boxes.csv"], "boxes.csv lists boxes in images: describe them with `vggfeat extract`"),
        (["urls.csv"], "urls.csv lists URLs of images"),
        (["f.h5", "a.jpg"], "f.h5 has descriptors, and a.jpg is of images: give one kind"),
        (["f.h5", "f.h5"], "takes 1 feature file(s), of A, in this order; 2 given"),
        (["f.h5"], "f.h5 was described otherwise than what the classifier learned from: net A0"),
    ],
)
def test_what_can_not_be_scored(
    given: list[Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("boxes.csv").write_text("path,label,x1,y1,x2,y2\na.jpg,cat,1,2,3,4\n")
    Path("urls.csv").write_text("path,label\nhttps://x.org/a.jpg,cat\n")
    feature_file(Path("f.h5"), 4, DIM)
    with pytest.raises(VggfeatError) as raised:
        source_of(given, model_of(["cat", "dog"]))
    assert told in str(raised.value)


# --- feature files --------------------------------------------------------------------------------


def test_a_feature_file_scores_as_its_images_do(
    command: Command, made: Made, tmp_path: Path
) -> None:
    model = open_model(made.model)
    features = vggfeat.open_features(made.features)
    by_images = [*predict_all(model, made.folder)]
    by_features = [*predict_all(model, made.features)]
    assert [row.image for row in by_features] == [*features.names]
    assert [row.image for row in by_images] == [str(made.folder / name) for name in features.names]
    assert [row.classes for row in by_images] == [row.classes for row in by_features]
    for a, b in zip(by_images, by_features, strict=True):
        assert a.all_scores is not None and b.all_scores is not None
        np.testing.assert_allclose(a.all_scores, b.all_scores, rtol=0, atol=1e-6)
    images, table = command("predict", made.folder, "--model", made.model), tmp_path / "p.csv"
    file = command("predict", made.features, "--model", made.model, "--out", table)
    assert (images.status, file.status) == (0, 0)
    assert images.out.splitlines()[-1] == file.out.splitlines()[-1]
    assert "accuracy" in file.out and "of 24 labelled images)" in file.out


def test_two_nets_take_two_files_and_a_set_of_shards_is_one(
    command: Command, folder: Path, extracted: Path, tmp_path: Path
) -> None:
    second, model = tmp_path / "shards", tmp_path / "m.h5"
    other = ("--weights", OTHER, "--scales", 32, "--precision", "float32", "--device", "cpu")
    images = ("--dataset", "folder", "--root", folder)
    ran = command("extract", *images, *other, "--out", f"{second}/", "--shard-rows", 10)
    assert ran.status == 0, ran.err
    both = ("--features", extracted, "--features", second)
    assert command("svm", *both, "--C", 1, "--workers", 1, "--out", model).status == 0
    tables = [tmp_path / f"{i}.csv" for i in range(2)]
    words = ("--model", model, "--scores", "--out")
    assert command("predict", extracted, second, *words, tables[0]).status == 0
    assert command("predict", folder, *words, tables[1]).status == 0
    scores = [read_predictions(table)[3] for table in tables]
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-6)
    ran = command("predict", second, extracted, "--model", model)
    assert ran.status == 1 and "otherwise than what the classifier learned from" in ran.err
    ran = command("predict", extracted, "--model", model)
    assert (ran.status, len(ran.err_lines)) == (1, 1)
    assert "takes 2 feature file(s), of A, A, in this order; 1 given" in ran.err


def test_what_features_have_otherwise_is_told_in_one_line(
    command: Command, made: Made, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "f.h5"
    weights, scales = ("--weights", NET), ("--scales", "32,48")
    for words, told in {
        (*weights, "--scales", "32"): "scales 32, not 32,48",
        (*weights, *scales, "--no-mirror"): "mirror False, not True",
        ("--weights", OTHER, *scales): "other weights, sha256",
        (*weights, *scales, "--layer", "fc6"): "has no layer 'fc7'; it has fc6",
    }.items():
        rest = ("--dataset", "folder", "--root", folder, "--device", "cpu", "--out", file)
        assert command("extract", *words, *rest, "--overwrite").status == 0
        ran = command("predict", file, "--model", made.model)
        assert (ran.status, ran.out, len(ran.err_lines)) == (1, "", 1) and told in ran.err
    # more scales than the model's are as good
    assert command("extract", *weights, "--scales", "48,64,32", *rest, "--overwrite").status == 0
    assert command("predict", file, "--model", made.model).status == 0


def test_rows_of_a_feature_file_are_scored_and_unreadable_ones_keep_their_reason(
    tmp_path: Path,
) -> None:
    file = feature_file(tmp_path / "f.h5", 9, DIM, classes=3, bad=(2, 7))
    features = vggfeat.open_features(file)
    model = model_of(["c0", "c2", "x"])
    object.__setattr__(model, "parts", (features.description,))
    rows = [*predict_all(model, file)]
    assert [row.error for row in rows] == [
        None,
        None,
        "no picture",
        *[None] * 4,
        "no picture",
        None,
    ]
    expected = model.decision_function(aggregate(features.descriptors, "average"))
    for i, row in enumerate(rows):
        if row.error is None:
            assert row.all_scores is not None
            np.testing.assert_allclose(row.all_scores, expected[i], rtol=1e-12)
            best = np.sort(expected[i])[::-1]
            assert row.classes == (model.classes[expected[i].argmax()],)
            assert row.scores == (best[0],) and row.margin == best[0] - best[1]
    # of the labels, the model doesn't know c1
    source = source_of(file, model)
    assert source.labels is not None and features.labels is not None
    assert source.labels.tolist() == [[0, -1, 1][label] for label in features.labels]


# --- rows -----------------------------------------------------------------------------------------


def test_several_labels_have_a_threshold(stubbed: list[list[str]]) -> None:
    model = model_of("abcde", several=True)
    names = [f"{i}.jpg" for i in range(20)]
    scores = [row.all_scores for row in predict_all(model, names)]
    for threshold in (None, 0.25, -10):
        above = threshold or 0
        for row, scores_K in zip(
            predict_all(model, names, threshold=threshold), scores, strict=True
        ):
            assert scores_K is not None
            order = [k for k in np.argsort(-scores_K) if scores_K[k] > above]
            assert row.classes == tuple(model.classes[k] for k in order)
            assert row.scores == tuple(scores_K[order])
            best = np.sort(scores_K)[::-1]
            assert row.margin == best[0] - best[1]
    with pytest.raises(VggfeatError, match="`threshold` must be a finite number, not nan"):
        predict_all(model, names, threshold=float("nan"))
    with pytest.raises(VggfeatError, match="names one class an image: leave out `threshold`"):
        predict_all(model_of("ab"), names, threshold=0.5)
    with pytest.raises(VggfeatError, match="`workers` must be a whole number"):
        predict_all(model, names, workers=0)


def test_accuracy_is_of_labelled_rows_that_could_be_read() -> None:
    model = model_of("abc")
    source = predict.Source([*"123456"], np.array([0, 0, 0, 1, -1, 1]))
    tally = Tally(model, source)
    for name, said in zip("12345", "aabcb", strict=True):
        tally.add(name, [said], None)
    tally.add("6", (), "no picture")
    assert (tally.rows, tally.unreadable, tally.first_unreadable) == (6, 1, {"6": "no picture"})
    assert tally.accuracy == (
        "accuracy 50.00 % (2 of 4 labelled images), mean class recall 33.33 % (2 classes)"
    )
    assert Tally(model, predict.Source(["1"], None)).accuracy == ""


# --- in a file ------------------------------------------------------------------------------------


def test_every_kind_of_file_has_the_same_rows(
    stubbed: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "CHUNK", 4)
    names = ["a;b,c.jpg", "bad.jpg", *(f"{i}.jpg" for i in range(9)), "caf\udce9.jpg"]
    for several in (False, True):
        model = model_of(["x", "y;", "z"], several)
        expected = [*predict_all(model, names, threshold=0.1 if several else None)]
        files = {end: tmp_path / f"{several}{end}" for end in predict.ENDINGS}
        for file in files.values():
            how: dict[str, Any] = {"scores": True, "threshold": 0.1 if several else None}
            tally = write_predictions(model, source_of(names, model), file, **how)
            assert (tally.rows, tally.unreadable) == (12, 1)
        lines = [json.loads(line) for line in files[".jsonl"].read_text().splitlines()]
        table = pyarrow().parquet.read_table(files[".parquet"]).to_pylist()
        header, images, cells, _ = read_predictions(files[".csv"])
        assert header == ["image", "class", "score", "margin", "error", "x", "y;", "z"]
        assert images == [*names[:-1], "caf\\udce9.jpg"]
        for row, line, cell, stored in zip(expected, lines, cells, table, strict=True):
            assert line["image"] == row.image and stored["image"] == cell["image"]
            if row.error is not None:
                assert line == {"image": row.image, "error": "no picture"}
                assert cell["error"] == stored["error"] == "no picture"
                assert {cell[name] for name in header[1:] if name != "error"} == {""}
                continue
            assert row.all_scores is not None
            classes, scores = list(row.classes), list(row.scores)
            assert cell["class"] == ";".join(classes)
            assert cell["score"] == ";".join(map(repr, scores))
            assert float(cell["margin"]) == line["margin"] == stored["margin"] == row.margin
            told = (classes, scores) if several else (classes[0], scores[0])
            assert (line["class"], line["score"]) == (stored["class"], stored["score"]) == told
            every = dict(zip(model.classes, row.all_scores, strict=True))
            assert line["scores"] == every == {name: stored[name] for name in every}
            assert {name: float(cell[name]) for name in every} == every
    assert not [*tmp_path.glob("*.partial")]


def test_what_can_not_be_written(stubbed: list[list[str]], tmp_path: Path) -> None:
    model = model_of(["score", "y"])
    source = source_of(["1.jpg"], model)
    with pytest.raises(VggfeatError, match=r"p\.txt must end in \.csv, \.jsonl, \.parquet"):
        write_predictions(model, source, tmp_path / "p.txt")
    with pytest.raises(VggfeatError, match=r"the class 'score' and a column of .* have one name"):
        write_predictions(model, source, tmp_path / "p.csv", scores=True)
    write_predictions(model, source, tmp_path / "p.csv")
    (tmp_path / "q.csv.partial").write_text("mine\n")
    with pytest.raises(VggfeatError, match="is no half-written file of predictions: move it away"):
        write_predictions(model, source, tmp_path / "q.csv")
    assert (tmp_path / "q.csv.partial").read_text() == "mine\n"


@pytest.mark.parametrize("ending", predict.ENDINGS)
def test_rows_of_a_run_that_was_killed_are_gone_on_with(
    ending: str, stubbed: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "CHUNK", 4)
    names = [f"{i}{'bad' * (i % 5 == 3)}.jpg" for i in range(18)]
    model = model_of("abc")
    labels = np.arange(18) % 3
    source = predict.Source(names, labels)
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"out{ending}"
    undisturbed = write_predictions(model, source, whole, scores=True)
    partial, keep = tmp_path / f"out{ending}.partial", predict._keep

    def interrupted(file: Any, place: Path, records: Any) -> None:
        keep(file, place, records)
        if records[0]["image"] == names[8]:
            raise KeyboardInterrupt

    for cut in (0, 1, 50):  # of the end, as by a kill amidst a write
        with monkeypatch.context() as patch:
            patch.setattr(predict, "_keep", interrupted)
            with pytest.raises(
                Interrupted, match=r"8 rows are in .*, and the same command goes on"
            ):
                write_predictions(model, source, out, scores=True)
        assert not out.exists()
        data = partial.read_bytes()
        partial.write_bytes(data[: len(data) - cut])
        stubbed.clear()
        said: list[str] = []
        tally = write_predictions(model, source, out, scores=True, say=said.append)
        kept = 8 if cut else 12
        assert [name for chunk in stubbed for name in chunk] == names[kept:]
        assert said == [f"going on: {kept} rows are in {partial}; {18 - kept} are left"]
        assert out.read_bytes() == whole.read_bytes() and not partial.exists()
        assert vars(tally).keys() == vars(undisturbed).keys()
        assert tally.accuracy == undisturbed.accuracy
        assert tally.first_unreadable == undisturbed.first_unreadable
        out.unlink()

    for other in (  # another model, other images, other options
        (model_of("abd"), source, {"scores": True}),
        (model, predict.Source(names[:-1], labels), {"scores": True}),
        (model, source, {}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(predict, "_keep", interrupted)
            with pytest.raises(Interrupted):
                write_predictions(model, source, out, scores=True)
        stubbed.clear()
        said = []
        before = partial.read_bytes()
        again = functools.partial(write_predictions, *other[:2], out, **other[2])  # type: ignore[arg-type]
        with pytest.raises(VggfeatError, match="begun with, or `overwrite` to begin anew"):
            again()
        assert partial.read_bytes() == before
        again(overwrite=True, say=said.append)
        assert len(said) == 1 and said[0].endswith("or other options: begun anew")
        assert [name for chunk in stubbed for name in chunk] == [*other[1].names]
        out.unlink()


def test_nothing_is_left_of_a_run_that_kept_no_row(made: Made, tmp_path: Path) -> None:
    model = open_model(made.model, weights=OTHER)
    with pytest.raises(VggfeatError, match="are not those that described"):
        write_predictions(model, source_of(made.folder, model), tmp_path / "p.csv")
    assert not [*tmp_path.iterdir()]


def test_memory_is_that_of_the_names(
    stubbed: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "CHUNK", 256)
    model = model_of([f"class {k}" for k in range(50)])

    def peak(rows: int) -> float:
        source = predict.Source([f"{i:06d}.jpg" for i in range(rows)], None)
        tracemalloc.start()
        write_predictions(model, source, tmp_path / f"{rows}.csv", scores=True)
        stubbed.clear()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)  # what is made once
    few, many = peak(600), peak(3000)
    assert many - few < 2400 * 200, (few, many)  # the scores of these rows are 400 bytes each


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "CHUNK", 5)


def test_predict_lists_what_is_unreadable_and_keeps_the_order(
    command: Command, made: Made, folder: Path, tmp_path: Path, small_chunks: None
) -> None:
    (folder / "red/bad.jpg").write_bytes(b"")
    images = [folder / name for name in ("red/01.jpg", "red/bad.jpg", "blue/02.jpg", "gone.jpg")]
    (tmp_path / "list.txt").write_text("\n".join(map(str, images * 3)))
    table = tmp_path / "p.csv"
    words = ("predict", tmp_path / "list.txt", "--model", made.model, "--out", table)
    ran = command(*words)
    assert ran.status == 3 and ran.out.startswith(f"{table}: 12 rows, 6 of them unreadable\n")
    assert "(6 of 6 labelled images)" in ran.out  # by the folders that they lie in
    assert ran.err_lines[:1] == [f"unreadable: {images[1]}: empty file (0 bytes)"]
    _, names, rows, _ = read_predictions(table)
    assert names == [str(image) for image in images * 3]
    assert [row["class"] for row in rows] == ["red", "", "blue", ""] * 3
    assert [row["error"] for row in rows] == ["", "empty file (0 bytes)", "", "no such file"] * 3
    ran = command(*words)
    assert ran.status == 1 and "exists; give --overwrite, or another --out" in ran.err
    assert command(*words, "--overwrite").status == 3
    ran = command(*words[:-2], "--threshold", 1)
    assert (ran.status, ran.out, len(ran.err_lines)) == (1, "", 1)
    assert "names one class an image: leave out --threshold" in ran.err


def test_predict_prints_the_first_of_many(
    command: Command, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vggfeat.cli.TABLED", 20)
    ran = command("predict", made.folder, "--model", made.model, "--top", 1)
    assert ran.status == 0 and "and 4 more images; --out FILE writes them all" in ran.out
    assert ran.out.count(".jpg") == 20 and "(24 of 24 labelled images)" in ran.out


def test_a_model_knows_itself(made: Made, tmp_path: Path) -> None:
    model = open_model(made.model)
    save_model(tmp_path / "m.h5", model)
    again = open_model(tmp_path / "m.h5", weights=OTHER)
    assert again.fingerprint == model.fingerprint != model_of("ab").fingerprint
