"""How the library's objects show themselves: at a prompt in a line, in a notebook as a table.

Colours are the notebook's own, so that it is readable in light and dark themes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

IN_LINE = 3  # rows of a table that a prompt's line has
MOST_ROWS = 200  # of a folded table; a longer one is left out
LONGEST = 300  # characters of a name, whoever gave it

STYLE = """
.vggfeat { color: inherit }
.vggfeat table { border-collapse: collapse; margin: .4em 0 }
.vggfeat tr, .vggfeat tr:hover { background: none !important }
.vggfeat th, .vggfeat td {
  border: 0; border-top: 1px solid color-mix(in srgb, currentColor 20%, transparent);
  max-width: 46em; padding: .25em 1.2em .25em 0; text-align: left; vertical-align: top;
  white-space: normal;
}
.vggfeat .facts td:first-child { opacity: .7; white-space: nowrap }
.vggfeat .number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap }
.vggfeat summary { cursor: pointer }
"""


class Table(NamedTuple):
    """One that is folded up below the first. numbers: columns that hold numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int]


class Displayed:
    """Base of what shows itself by a title, and rows of (name, value), the weightiest first."""

    def _title(self) -> str:
        raise NotImplementedError

    def _rows(self) -> list[tuple[str, str]]:
        raise NotImplementedError

    def _folded(self) -> list[Table]:
        return []

    def __repr__(self) -> str:
        first = "; ".join(f"{name}: {value}" for name, value in self._rows()[:IN_LINE])
        return f"<{_plain(self._title())}; {_plain(first)}>"

    def _repr_html_(self) -> str:
        from vggfeat.page import html, join, table

        facts = [(_plain(name), _plain(value)) for name, value in self._rows()]
        folded = [
            html(
                "<details><summary>{title}</summary>{table}</details>",
                title=each.title,
                table=table(each.head, [[*map(_plain, row)] for row in each.rows], each.numbers),
            )
            for each in self._folded()
            if 0 < len(each.rows) <= MOST_ROWS
        ]
        shown = html(
            '<div class="vggfeat"><style>{style}</style><b>{title}</b>'
            '<div class="facts">{facts}</div>{folded}</div>',
            style=STYLE,
            title=_plain(self._title()),
            facts=table((), facts, numbers=()),
            folded=join(folded),
        )
        return str(shown)


def _plain(text: str) -> str:
    """In one line of bounded length, controls and the like as escapes."""
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
