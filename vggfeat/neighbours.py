"""The images of a feature file that are nearest to a query: exact cosine of the aggregated
descriptors.

N images, Q scales, D descriptor length. The file is read block by block: memory doesn't grow with
it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vggfeat.aggregate import aggregate
from vggfeat.datasets import Items
from vggfeat.decode import read_rgb
from vggfeat.describe import describe_all, network_of
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.files import whole
from vggfeat.regions import cut
from vggfeat.store import Description, Features

BLOCK_BYTES = 1 << 27
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
    features: Features,
    query_D: np.ndarray,
    *,
    pool: str = "average",
    scales: tuple[int, ...] | None = None,
    top: int = 10,
    without: int | None = None,
) -> list[Neighbour]:
    """The `top` images with the highest cosine, best first; of equals the one that comes first in
    the file.

    query_D: aggregated and L2-normalised in the same way (`query_of`). without: a row that is left
    out. Every readable row is compared. Raises VggfeatError for a query of another length.
    """
    description = (
        features.description if scales is None else replace(features.description, scales=scales)
    )
    readable = features.readable.copy()
    if without is not None:
        readable[without] = False
    count, Q, D = features.shape
    step = max(1, BLOCK_BYTES // (4 * Q * D))
    rows, cosines = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for start in range(0, count, step):
        rows_NQD = features.read(description.scales, slice(start, start + step))
        block = aggregate(rows_NQD, pool, len(description.regions))
        if block.shape[1] != len(query_D):
            raise VggfeatError(
                f"the query's descriptor has length {len(query_D)}, those of {features.path}"
                f" {block.shape[1]}"
            )
        here = np.flatnonzero(readable[start : start + step])
        rows = np.concatenate([rows, start + here])
        cosines = np.concatenate([cosines, block[here] @ query_D])
        best = np.argsort(-cosines, kind="stable")[:top]  # rows rise, so the first of equals wins
        rows, cosines = rows[best], cosines[best]
        order = np.argsort(rows, kind="stable")
        rows, cosines = rows[order], cosines[order]
    best = np.argsort(-cosines, kind="stable")
    return [
        Neighbour(
            int(rows[i]),
            features.names[rows[i]],
            float(cosines[i]),
            labels_of(features, int(rows[i])),
        )
        for i in best
    ]


def labels_of(features: Features, row: int) -> list[str]:
    """Names of the classes that an image belongs to; none where that is not known."""
    if features.labels is None:
        return []
    own = features.labels[row]
    if own.ndim:
        return [features.classes[k] for k in np.flatnonzero(own == 1)]
    return [features.classes[own]] if own >= 0 else []


def query_of(
    features: Features,
    query: str,
    *,
    pool: str = "average",
    scales: tuple[int, ...] | None = None,
    spec: str | None = None,
    device: str = "auto",
) -> tuple[np.ndarray, int | None]:
    """The aggregated descriptor (D,) of an image file, described as the file's images were, or of a
    name in the file.

    Returns also the row, for a name. spec: where the weights lie, if they moved.
    Raises VggfeatError: neither a file nor a name; weights that are missing or others; an image
    that can't be read.
    """
    description = (
        features.description if scales is None else replace(features.description, scales=scales)
    )
    if os.path.isfile(query):  # a name in the file may be none that a file can have
        if description.of_boxes:
            raise VggfeatError(
                f"{features.path} is of boxes in images, and nothing tells where that of {query}"
                " is: give a name in the file"
            )
        raw_QD = _described(description, Path(query), spec, device)
        return aggregate(raw_QD[None], pool)[0], None
    if query not in features.names:
        raise VggfeatError(
            f"there is no image {query}: neither a file nor a name in {features.path}"
        )
    row = features.names.index(query)
    if not features.readable[row]:
        raise VggfeatError(
            f"{query} was unreadable when {features.path} was made: {features.errors.get(row)}"
        )
    raw_1QD = features.read(description.scales, slice(row, row + 1))
    return aggregate(raw_1QD, pool, len(description.regions))[0], row


def _described(description: Description, path: Path, spec: str | None, device: str) -> np.ndarray:
    network = network_of(description, spec, device)
    ((_, result),) = describe_all(network, [path], description)
    if isinstance(result, UnreadableImage):
        raise VggfeatError(f"{path}: {result}")
    return result


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
        return pixels(lambda: cut(read_rgb(items.source(i)), items, i))

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
