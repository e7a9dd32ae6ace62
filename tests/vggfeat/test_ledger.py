"""The ledger's page and the files of its cells, whatever the cells are."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import pytest

from vggfeat import ledger
from vggfeat.errors import VggfeatError


@dataclass(frozen=True)
class Cell:
    figure: float
    command: str
    more: str = ""


class Cells(TypedDict):
    version: int
    cells: list[Cell]


TWO = [Cell(1.5, "b", "x"), Cell(2.0, "a")]


def test_cells_are_read_as_they_were_written_and_a_default_is_not(tmp_path: Path) -> None:
    """So a file without the cells of a later version is one of the earlier."""
    path = tmp_path / "cells.json"
    assert ledger.read(path, Cells) == []
    path.write_text(json.dumps(ledger.content(TWO)))
    assert json.loads(path.read_text())["cells"][1] == {"figure": 2.0, "command": "a"}
    assert ledger.read(path, Cells) == TWO
    with pytest.raises(VggfeatError, match=r"is damaged: 2 are too many: bring it back from"):
        ledger.read(path, Cells, lambda cells: f"{len(cells)} are too many")


def test_a_section_stands_in_the_place_of_the_one_before() -> None:
    body = ledger.section("One", ["first", "", *ledger.commands(TWO)])
    assert body.splitlines() == [
        *("<!-- ledger: One -->", "## One", "", "first", "", "```", "a", "b", "```", ""),
        "<!-- end of ledger: One -->",
    ]
    page = ledger.with_section("# Results\n", "One", body)
    assert page == f"# Results\n\n{body}\n"
    page = ledger.with_section(page, "Two", ledger.section("Two", [""])) + "\nAfter.\n"
    again = ledger.with_section(page, "One", ledger.section("One", ["second"]))
    assert "first" not in again and "second" in again
    assert again.index("second") < again.index("## Two") < again.index("After.")


def test_a_page_with_tables_needs_their_cells(tmp_path: Path) -> None:
    page, cells = tmp_path / "page.md", tmp_path / "cells.json"

    def cells_of(heading: str) -> Path | None:
        return cells if heading == "One" else None

    ledger.check(page, cells_of)  # there is none yet
    empty = ledger.section("One", ["Not run."])
    other = ledger.section("Two", ledger.commands(TWO))  # somebody else's
    page.write_text(f"{empty}\n\n{other}\n\n```\nof one's own\n```\n")
    ledger.check(page, cells_of)
    page.write_text(f"{ledger.section('One', ledger.commands(TWO))}\n")
    with pytest.raises(VggfeatError, match=r"cells are missing, .*cells\.json: bring that file"):
        ledger.check(page, cells_of)
    cells.touch()
    ledger.check(page, cells_of)
    picture = tmp_path / "page.svg"
    picture.write_text("<svg/>")
    with pytest.raises(VggfeatError, match=r"`ledger` .*page\.svg is no Markdown file"):
        ledger.check(picture, cells_of)


def test_means_and_spreads_by_hand() -> None:
    assert ledger.spread([20.0]) == "20.0"
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 over two
    assert ledger.spread([1.0, 2.0, 6.0]) == f"3.0 +- {math.sqrt(7):.1f}" == "3.0 +- 2.6"
    assert ledger.spread([1.0, None]) == "-"
    assert ledger.plain_word("a b/../c") == "a-b-..-c" and ledger.plain_word("/") == "unnamed"


def test_a_section_without_an_end_takes_nothing_that_is_behind_it(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    text = ledger.with_section("# Mine\n", "A", ledger.section("A", ["a"])) + "\nnotes\n"
    again = ledger.with_section(text, "A", ledger.section("A", ["b"]))
    assert again.startswith("# Mine\n") and again.endswith("\nnotes\n") and "\na\n" not in again
    page.write_text(text := text.replace("<!-- end of ledger: A -->\n", ""))
    more = text + ledger.section("A", ["later"])  # the next one's end is not its own
    for broken in (text, more):
        with pytest.raises(VggfeatError, match=r"have no end: put <!-- end of ledger: A --> on a"):
            ledger.with_section(broken, "A", ledger.section("A", ["b"]))
    with pytest.raises(VggfeatError, match="have no end"):
        ledger.check(page, lambda heading: page if heading == "A" else None)
    ledger.check(page, lambda heading: None)  # somebody else's


def test_names_end_no_cell_no_block_and_no_section() -> None:
    odd = "a|b\nc <!-- end of ledger: A -->"
    _, _, line = ledger.table(["x"], [[odd]])
    assert line == r"| a\|b c <!- - end of ledger: A --> |"
    fence, line, *_ = ledger.commands([Cell(1.0, f"run {odd}\n```\n# no heading")])
    assert fence == "```" and line == "run a|b c <!- - end of ledger: A --> ''' # no heading"
