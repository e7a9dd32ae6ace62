"""The images that are nearest to queries, by the cosine of their descriptors: who is asked for, how
they are described, and what is told and drawn of those that `index` finds.

M queries, Q scales, D descriptor length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vggfeat.aggregate import aggregate
from vggfeat.datasets import Items
from vggfeat.datasets.items import class_names
from vggfeat.decode import read_rgb
from vggfeat.describe import gathered, network_of
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.features import open_features
from vggfeat.files import whole
from vggfeat.index import BATCH, TOP, Index
from vggfeat.machine import CORES
from vggfeat.place import is_url
from vggfeat.predict import reader_of
from vggfeat.regions import picture_of
from vggfeat.store import Features
from vggfeat.weights import Network

TILE, GAP, LINES = 180, 10, 3  # of a picture, in pixels; lines of a caption
TILES = 500  # of a picture: 70 MB of pixels


@dataclass(frozen=True)
class Neighbour:
    """An image of the file, and the cosine of its descriptor and the query's."""

    row: int
    name: str
    cosine: float
    labels: list[str]


def nearest(
    index: Index,
    queries_MD: np.ndarray,
    *,
    top: int = TOP,
    without: np.ndarray | None = None,
    exact: bool = False,
    probes: int | None = None,
    candidates: int | None = None,
) -> list[list[Neighbour]]:
    """The `top` images with the highest cosine for each query, best first; of equals the one that
    comes first. All is as of `Index.search`.
    """
    rows_MK, cosines_MK = index.search(
        queries_MD, top, without=without, exact=exact, probes=probes, candidates=candidates
    )
    return [
        [
            Neighbour(row, index.names[row], cosine, class_names(index.labels, index.classes, row))
            for row, cosine in zip(rows, cosines, strict=True)
            if row >= 0
        ]
        for rows, cosines in zip(rows_MK.tolist(), cosines_MK.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Queries:
    """Some of the queries, described. names (M,); x_MD, aggregated, a row of NaN where errors has
    the reason; rows (M,): which row of the index each one is, -1 none.
    """

    names: list[str]
    x_MD: np.ndarray
    rows: np.ndarray
    errors: dict[int, str]

    @property
    def readable(self) -> np.ndarray:
        """(n,) those that were described."""
        return np.array([m for m in range(len(self.names)) if m not in self.errors], np.int64)


@dataclass(frozen=True)
class Part:
    """Queries of one kind: paths of images; or names in the index, with their rows; or the rows of
    features.
    """

    names: Sequence[str]
    rows: list[int] | None = None
    features: Features | None = None


@dataclass(frozen=True)
class Asked:
    """What is searched for, before it is described, in the order that it was given in. remarks:
    sentences, of what was left out.
    """

    parts: list[Part]
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(len(part.names) for part in self.parts)

    def paths(self) -> list[str]:
        """The images' files."""
        return [
            name
            for part in self.parts
            if part.rows is None and part.features is None
            for name in part.names
        ]


def asked_of(index: Index, given: Sequence[str]) -> Asked:
    """What is given as queries, one thing or several: all that `predict.reader_of` reads, images,
    folders, lists, feature files and sets; and names of images in the index.

    Raises VggfeatError for what is none of them; for a name whose image was unreadable; for images
    where the index is of boxes; for features that were described otherwise.
    """
    parts: list[Part] = []
    remarks: tuple[str, ...] = ()
    for text in given:
        if not (text == "-" or is_url(text) or os.path.exists(text)):
            part = _named(index, text)
        elif read := reader_of(text):
            index.refuse_images(text)
            names, _, told = read(text, {})
            part, remarks = Part(names), remarks + told
        else:
            features = open_features(text, index.description.layer)
            index.like(features)
            part = Part(features.names, features=features)
        last = parts[-1] if parts and parts[-1].features is None else None
        if last and part.features is None and (last.rows is None) == (part.rows is None):
            rows = None if part.rows is None else [*(last.rows or []), *part.rows]
            parts[-1] = Part([*last.names, *part.names], rows)  # one pass over the index for both
        else:
            parts.append(part)
    return Asked(parts, remarks)


def _named(index: Index, name: str) -> Part:
    if name not in index.names:
        raise VggfeatError(f"there is no image {name}: neither a file nor a name in {index.path}")
    row = index.names.index(name)
    if not index.readable[row]:
        raise VggfeatError(
            f"{name} was unreadable when {index.path} was made: {index.errors.get(row)}"
        )
    return Part([name], [row])


def described(
    index: Index,
    asked: Asked,
    *,
    spec: str | None = None,
    device: str = "auto",
    progress: Callable[[float, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Queries]:
    """The queries, at most BATCH at a time, described as the rows were. spec: where the weights
    lie, if they moved. progress: called with (queries done, in all).

    Raises VggfeatError for weights that are missing or others.
    """
    total, done = len(asked), 0.0

    @cache
    def network() -> Network:
        return network_of(index.description, spec, device)

    def advance(more: float) -> None:
        nonlocal done
        done += more
        progress(min(done, total), total)

    progress(0, total)
    for part in asked.parts:
        for low in range(0, len(part.names), BATCH):
            rows = slice(low, min(low + BATCH, len(part.names)))
            names = list(part.names[rows])
            if part.features is not None:
                yield _of_features(index, part.features, rows)
            elif part.rows is not None:
                its = np.array(part.rows[rows])
                rising, back = np.unique(its, return_inverse=True)
                yield Queries(names, index.rows[rising][back], its, {})
            else:
                raw_MQD, errors = gathered(
                    network(),
                    names,
                    index.description,
                    batch_size=None,
                    workers=CORES,
                    keep_going=True,
                    advance=advance,
                    say=say,
                )
                x_MD = aggregate(raw_MQD, index.pool)
                yield Queries(names, x_MD, np.full(len(names), -1), errors)
                continue
            advance(len(names))


def _of_features(index: Index, features: Features, rows: slice) -> Queries:
    """Rows of features; of those that the index was made of, each is left out of its own answer."""
    x_MD, own = index.like(features)[rows], np.arange(rows.start, rows.stop)
    errors = {
        int(m): features.errors.get(rows.start + int(m), "unreadable")
        for m in np.flatnonzero(~features.readable[rows])
    }
    if features.rows_digest != index.rows_digest:
        own = np.full(len(own), -1)
    return Queries(list(features.names[rows]), x_MD, own, errors)


@dataclass(frozen=True)
class Answer:
    """A query, and its neighbours; row: of the index, -1 none; or why it can't be read."""

    query: str
    neighbours: list[Neighbour]
    row: int = -1
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        told = {"query": self.query, "neighbours": [each.__dict__ for each in self.neighbours]}
        return told if self.error is None else {"query": self.query, "error": self.error}


def answers(index: Index, batches: Iterable[Queries], **settings: Any) -> Iterator[Answer]:
    """The neighbours of each query, in their order; settings: of `nearest`."""
    for queries in batches:
        m_of = queries.readable
        found = nearest(index, queries.x_MD[m_of], without=queries.rows[m_of], **settings)
        by_query = dict(zip(m_of.tolist(), found, strict=True))
        for m, name in enumerate(queries.names):
            if m in by_query:
                yield Answer(name, by_query[m], int(queries.rows[m]))
            else:
                yield Answer(name, [], error=queries.errors[m])


def draw(
    path: Path,
    query: str,
    row: int | None,
    found: Sequence[Neighbour],
    items: Items | None,
    why_not: str = "",
) -> str:
    """Write the picture of a query and its neighbours; what had to be left out of it and why, or
    "".

    items: where the feature file's images are, or None and why not.
    """
    place = {} if items is None else {name: i for i, name in enumerate(items.names)}
    missing = 0

    def pixels(read: Callable[[], np.ndarray]) -> np.ndarray | None:
        nonlocal missing
        try:
            return read()
        except UnreadableImage:
            missing += 1
            return None

    def pixels_of(name: str) -> np.ndarray | None:
        if items is None or name not in place:
            return None
        i = place[name]
        return pixels(lambda: picture_of(items, i))

    asked = pixels(lambda: read_rgb(Path(query))) if row is None else pixels_of(query)
    shown = found[:TILES]
    sheet = contact_sheet(asked, query, shown, lambda neighbour: pixels_of(neighbour.name))
    with whole(path) as partial:
        sheet.save(partial)
    if items is None:
        return f"the pictures: {why_not}"
    if len(found) > len(shown):
        return f"the pictures of the neighbours after the first {TILES}"
    return f"{missing} pictures: the images can't be read any more" if missing else ""


def contact_sheet(
    query: np.ndarray | None,
    title: str,
    found: Sequence[Neighbour],
    pixels: Callable[[Neighbour], np.ndarray | None],
    columns: int = 5,
) -> Image.Image:
    """A picture: the query, then its neighbours in rows, each with rank, cosine, labels and name.

    query: (H, W, 3) uint8. pixels: likewise of a neighbour; None leaves its tile empty.
    """
    font = ImageFont.load_default(13)
    line = 17
    tile_height = TILE + LINES * line + GAP
    rows = -(-len(found) // columns)
    width = GAP + columns * (TILE + GAP)
    sheet = Image.new("RGB", (width, (rows + 1) * tile_height + GAP), "white")
    draw = ImageDraw.Draw(sheet)

    def put(x: int, y: int, image: np.ndarray | None, captions: Sequence[str], edge: str) -> None:
        draw.rectangle((x, y, x + TILE, y + TILE), fill="#f3f4f6", outline=edge, width=2)
        if image is not None:
            small = ImageOps.contain(Image.fromarray(image), (TILE - 6, TILE - 6))
            sheet.paste(small, (x + (TILE - small.width) // 2, y + (TILE - small.height) // 2))
        for i, caption in enumerate(captions[:LINES]):
            draw.text(
                (x, y + TILE + 3 + i * line),
                _fitted(caption, font, TILE),
                fill="#1c1e21",
                font=font,
            )

    put(GAP, GAP, query, ["query", title], "#2563c9")
    for i, neighbour in enumerate(found):
        x, y = GAP + i % columns * (TILE + GAP), GAP + (1 + i // columns) * tile_height
        captions = [
            f"{i + 1}.  cosine {neighbour.cosine:.4f}",
            ", ".join(neighbour.labels),
            neighbour.name,
        ]
        put(x, y, pixels(neighbour), [caption for caption in captions if caption], "#d9dce1")
    return sheet


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """text in one line of a width, its middle left out where it is longer."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = text[: kept // 3] + "…" + text[len(text) - (kept - kept // 3) :]
        if font.getlength(short) <= width:
            return short
    return "…"
