"""results.json: what is written and read again, what is refused, and what is said in words."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from vggfeat.checked import MOST_BYTES, Inline, Sparse, _kinds
from vggfeat.errors import VggfeatError
from vggfeat.results import (
    ClassFigures,
    Part,
    Results,
    ScoredPart,
    Split,
    choice_columns,
    read_results,
    results_from,
    summary,
)

from .test_report import results_of, summary_of


def keys(record: Any) -> list[str]:
    """The keys of a record in a file."""
    names: list[str] = []
    for name, kind in _kinds(record).items():
        inline = any(isinstance(mark, Inline) for mark in get_args(kind)[1:])
        names += keys(get_args(kind)[0]) if inline else [name]
    return names


def test_every_key_is_documented_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    table = text.partition("## results.json")[2].partition("\n## ")[0]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| `")]
    named = [re.findall(r"`([^`]+)`", row[0]) for row in rows]
    documented = {name for names in named for name in names}
    figures = {name for name in keys(Results) if name.endswith("_std")}
    assert documented == {*keys(Results)} - figures | {"..._std"}
    told = {
        names[-1]: {*re.findall(r"`([^`]+)`", row[-1])}
        for names, row in zip(named, rows, strict=True)
    }
    assert {*keys(Part)} <= told["features"]
    assert told["per_class"] == {*keys(ClassFigures)}
    assert {"n"} == {*keys(ScoredPart)} - {*keys(Results)} and "n" in told["validation"]
    means = {*keys(Results)} - figures - {"n_classes"}
    assert told["per_split"] | means | figures >= {*keys(Split)} >= told["per_split"]


def test_what_is_written_is_read_as_it_was() -> None:
    """Of one label and several, NaN and what is absent; a key of another version is left alone."""
    per_class = {"ant": {"ap_11point": None, "ap_allpoint": 0.5, "n_positive": 0}}
    record = results_of(
        map_11point=None,
        map_allpoint=0.5,
        n_classes=1,
        per_class=per_class,
        per_split=[{"name": "split0", "C": 1.0, "n_train": 3, "n_test": 2, "accuracy": 1.0}],
        test_split="test",
        model_trained_on="train",
    )
    results = results_from(record, "here")
    record = {**record, "head": "svm"}  # a file without it is of SVMs
    assert results.to_json() == record
    assert results.figures.map_allpoint == 0.5 and results.figures.accuracy is None
    assert results_from({**record, "more": 1}, "here").to_json() == record
    own: Sparse = results.per_split[0]
    assert own.to_json() == record["per_split"][0]
    assert [*results.to_json()] == [key for key in keys(Results) if key in record]


def test_classes_that_the_figures_lack_are_named() -> None:
    per_class = {"ant": {"recall": None}, **{f"c{i}": {"recall": 1.0} for i in range(3)}}
    many = [f"d{i}" for i in range(25)]
    rows = dict(
        summary_of(
            results_of(per_class=per_class, degenerate_classes=many, not_converged=["C=128"])
        )
    )
    assert rows["classes without score"] == "ant" and rows["not converged"] == "C=128"
    assert rows["classes not learned"].endswith("d18, d19 and 5 more")
    assert "unreadable images" not in rows
    assert dict(summary_of(results_of(n_unreadable=2)))["unreadable images"] == "2, left out"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"dataset": None}, "dataset must be text, not None"),
        ({"per_class": 3}, "per_class must be a record of names, not 3"),
        ({"per_class": {"ant": []}}, "per_class.ant must be a record, not a list of 0"),
        (
            {"per_class": {"ant": {"recall": 1.5}}},
            r"per_class.ant.recall must lie in 0..1, not 1.5",
        ),
        ({"per_split": ["a"]}, r"per_split\[0\] must be a record, not 'a'"),
        ({"per_split": [{"C": -1.0}]}, r"per_split\[0\].C must lie in 1e-300..1e\+300, not -1.0"),
        ({"C_curve": "x", "C_grid": None}, "C_grid must be a list, not None"),
        ({"C_grid": [1.0], "C_curve": []}, "C_grid and C_curve have different lengths"),
        ({"C": float("nan")}, "C must be a finite number, not nan"),
        ({"C": True}, "C must be a finite number, not True"),
        ({"n_test": 10**400}, r"n_test must be less than 2\^63, not a huge number"),
        ({"features": 7}, "features must be a list, not 7"),
        ({"features": ["a"]}, r"features\[0\] must be a record, not 'a'"),
        ({"features": [{"net": "A", "layer": "fc7"}]}, r"features\[0\].scales is missing"),
        ({"rules": 4}, "rules must be a list, not 4"),
        (
            {"validation": {"per_class": {"ant": None}}},
            "validation.per_class.ant must be a record, not None",
        ),
    ],
)
def test_results_that_are_none(damage: dict[str, Any], says: str) -> None:
    with pytest.raises(VggfeatError, match=f"^these results: {says}$"):
        results_from({**results_of(), **damage}, "these results")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[" * 100_000, "is not JSON"),
        (b'{"dataset": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"dataset": "\xff"}', "is not UTF-8 text"),
        (b"[1]", "must be a record, not a list of 1"),
        (b" " * (MOST_BYTES + 1), "is longer than the 16,384 KiB that results may have"),
    ],
)
def test_a_file_that_holds_no_results(tmp_path: Path, text: bytes, says: str) -> None:
    (tmp_path / "r.json").write_bytes(text)
    with pytest.raises(VggfeatError, match=says) as refused:
        read_results(tmp_path / "r.json")
    assert str(refused.value).startswith(str(tmp_path / "r.json")) and len(str(refused.value)) < 300


def test_results_are_a_regular_file(tmp_path: Path) -> None:
    """A pipe without a writer would be waited for, /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(VggfeatError, match="is no regular file"):
            read_results(path)
    with pytest.raises(VggfeatError, match="is a folder"):
        read_results(tmp_path)
    with pytest.raises(
        VggfeatError, match=r"no results at .*: write them with `vggfeat svm --json`"
    ):
        read_results(tmp_path / "none.json")


def test_the_values_of_c_that_were_tried_are_a_table() -> None:
    """Of several splits the mean, where all have tried a value, and each; what the grid grew by."""
    curves = {"split0": [0.5, 0.75], "split1": [0.625, 1.0, 0.0]}
    splits = [
        {"name": name, "C": 4.0, "C_grid": [1.0, 4.0, 16.0][: len(curve)], "C_curve": curve}
        for name, curve in curves.items()
    ]
    chosen = {"C": 4.0, "C_grid": [1.0, 4.0], "C_curve": [0.5625, 0.875]}
    by = {"selected_by": "accuracy", "C_chosen_on": "val", "C_grid_extended_by": [16.0]}
    record = {"dataset": "x", "protocol": "single-label", **chosen, **by}
    results = results_from({**record, "per_split": splits}, "r.json")
    assert choice_columns(results) == (
        ["C", "accuracy on val", "split 0", "split 1", ""],
        [
            ("1", "56.25 %", "50.00 %", "62.50 %", ""),
            ("4", "87.50 %", "75.00 %", "100.00 %", "chosen"),
            ("16", "-", "-", "0.00 %", ""),
        ],
    )
    assert ("C", "4; the grid was extended by 16") in summary(results)
    assert choice_columns(results_from(record, "r.json"))[0] == ["C", "accuracy on val", ""]


@pytest.mark.parametrize(
    ("compared_by", "shown"),
    [(None, "0.00 %"), ("mean_class_recall", "0.00 %"), ("accuracy", "50.00 %")],
)
def test_a_splits_row_has_the_figure_that_is_compared(compared_by: str | None, shown: str) -> None:
    split = {"name": "split0", "C": 1.0, "accuracy": 0.5, "mean_class_recall": 0.0}
    record = {"dataset": "x", "protocol": "single-label", "C": 1.0, "per_split": [split]}
    if compared_by is not None:  # an older version's don't say it
        record["compared_by"] = compared_by
    assert ("split 0", f"{shown}, C 1") in summary(results_from(record, "r.json"))
