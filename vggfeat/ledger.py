"""A ledger: cells of the paper's tables, kept as JSON beside a page of results, and the sections of
that page that are made of them.

A section stands between two marks that name it by its heading. One that has cells has the commands,
too, that made them, as a block of code; one that has none tells what nobody ran. What a cell is,
and which section it stands in, `transfer` knows of Tables 11 and 12, and `pretrain` of the others.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from vggfeat.checked import fitted, parse_json, read_text
from vggfeat.errors import VggfeatError
from vggfeat.files import write_json, write_text

VERSION = 2
MARK = "<!-- ledger: "
_END = "<!-- end of ledger: "
_CODE = "```"
_WAY_OUT = (
    "bring it back from version control or a copy, or give another `ledger`; the page beside it is"
    " as it was"
)


def read(path: Path, kind: Any, refuse: Callable[[Any], str] = lambda cells: "") -> list[Any]:
    """The cells kept in a JSON file; none if there is no file. Raises VggfeatError for another.

    kind: a TypedDict with `cells`, a list of a dataclass. refuse: what is wrong with the cells
    beside each other, in words; "" for nothing.
    """
    if not path.exists():
        return []
    try:
        record = parse_json(read_text(path, "ledger of cells"), path)
    except VggfeatError as error:
        raise VggfeatError(f"{error}: {_WAY_OUT}") from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise VggfeatError(
            f"{path} is no ledger of cells of version {VERSION} (older ones don't tell a cell's"
            " images and recipe): move it away, take its tables out of the page, and make them"
            " again"
        )
    try:
        cells: list[Any] = fitted(record, kind, path)["cells"]
    except VggfeatError as error:
        raise VggfeatError(f"{error}: {_WAY_OUT}") from error
    if wrong := refuse(cells):
        raise VggfeatError(f"{path} is damaged: {wrong}: {_WAY_OUT}")
    return cells


def content(cells: Iterable[Any]) -> dict[str, object]:
    """What `read` reads. A key that was added to a kind of cell is there where it isn't as in the
    cells from before.
    """
    return {"version": VERSION, "cells": [_written(cell) for cell in cells]}


def _written(cell: Any) -> dict[str, object]:
    record = dataclasses.asdict(cell)
    for field in dataclasses.fields(cell):
        if field.default is not dataclasses.MISSING and record[field.name] == field.default:
            del record[field.name]
    return record


def section(heading: str, lines: Sequence[str]) -> str:
    """A heading and what stands below it, between marks."""
    return "\n".join([f"{MARK}{heading} -->", f"## {heading}", "", *lines, _end(heading)])


def commands(cells: Iterable[Any]) -> list[str]:
    """Lines: the commands that made some cells, each in one line that ends neither the block nor
    the section.
    """
    told = {" ".join(cell.command.splitlines()).replace("`", "'") for cell in cells}
    return [_CODE, *sorted(line.replace("<!--", "<!- -") for line in told), _CODE, ""]


def _end(heading: str) -> str:
    return f"{_END}{heading} -->"


def with_section(text: str, heading: str, body: str) -> str:
    """A Markdown text with a `section` in place of the one of the same heading, or at its end.

    Raises VggfeatError where that one has no end of its own: what stands behind it is nobody's to
    take.
    """
    begin, end = f"{MARK}{heading} -->", _end(heading)
    if begin not in text:
        return text.rstrip("\n") + ("\n\n" if text else "") + body + "\n"
    before, _, rest = text.partition(begin)
    if end not in rest.partition(MARK)[0]:
        raise VggfeatError(
            f"the tables below {begin!r} have no end: put {end} on a line behind them in the page,"
            " or take them out"
        )
    return before + body + rest.partition(end)[2]


@contextmanager
def alone(page: Path) -> Iterator[None]:
    """Inside, no other process of ours changes a ledger in the page's folder: what is read stays
    so until it is written. It waits for one that does.
    """
    try:
        folder = os.open(page.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # who writes there says what is wrong
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def check(page: Path, cells_of: Callable[[str], Path | None]) -> None:
    """Refuse what is no page, or has tables whose cells are missing, before work that would be put
    into it.

    cells_of: heading -> the file of its cells; None for a section that somebody else makes.
    """
    text = read_text(page, "ledger") if page.exists() else ""
    if text and MARK not in text and page.suffix != ".md":
        raise VggfeatError(f"`ledger` {page} is no Markdown file: give the name of one, or of none")
    for part in text.split(MARK)[1:]:
        heading, _, body = part.partition(" -->")
        if cells_of(heading) is not None:
            with_section(f"{MARK}{part}", heading, "")  # has it an end?
        path = cells_of(heading)
        # made anew, the tables would lose these rows
        if path and f"\n{_CODE}" in body.partition(_END)[0] and not path.exists():
            raise VggfeatError(
                f"{page} has tables whose cells are missing, {path}: bring that file back from"
                " version control or a copy, or give another `ledger`, or take those tables out of"
                " the page to begin them anew"
            )


def write(page: Path, text: str, cells: Mapping[Path, Sequence[Any]]) -> None:
    """The cells first: the page is made of them, so the same command mends what a full disk has
    left undone.
    """
    for path, some in cells.items():
        write_json(path, content(some))
    write_text(page, text)


def spread(values: Sequence[float | None]) -> str:
    """A mean; with several values their standard deviation, too; "-" where one of them is None."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return "-"
    mean = f"{np.mean(there):.1f}"
    return mean if len(there) == 1 else f"{mean} +- {np.std(there, ddof=1):.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines. What a name of somebody else's holds ends no cell, and no line."""
    lines = ["|" + len(head) * "---|", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]
    return [f"| {' | '.join(map(_cell, head))} |", *lines]


def _cell(text: str) -> str:
    one_line = " ".join(text.splitlines()) if "\n" in text else text
    return re.sub(r"(?<!\\)\|", r"\|", one_line).replace("<!--", "<!- -")


def plain_word(text: str) -> str:
    """A name of somebody else's as it may stand in a heading or a file's name."""
    return re.sub(r"[^\w.+-]+", "-", text)[:60].strip("-.") or "unnamed"
