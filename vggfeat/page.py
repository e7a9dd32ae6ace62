"""One HTML page with charts and pictures inside it: opens without a network, on a phone, light and
dark.

Charts are SVG whose colours are the page's own; names from data sets and files are escaped by
Jinja. All can be read without JavaScript; with it, `assets/page.js` answers to pointer and
keyboard. The page's policy allows that script alone, by its hash, and no request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment
from markupsafe import Markup, escape
from PIL import Image, ImageOps

from vggfeat.files import plain
from vggfeat.versions import __version__

WIDTH, HEIGHT = 560, 320  # of a chart, in its own units: the style sheet sets its text by its width
SMALL = 220, 200  # of a small one
LEFT, RIGHT, TOP, BOTTOM = 72, 18, 10, 46
COLOURS = 8  # of the style sheet
LARGEST = 1e300  # of a chart's values, so that no range overflows
LEGEND = 30  # groups at most; of more, the names show under a pointer only
CELLS = 400  # rows of a matrix that is drawn as a picture: each can be seen
LONG = 16  # characters of a word, beyond which it may be broken
MOST_BYTES = 2_000_000  # of a page with pictures: it is sent by mail, and opened on a phone

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Section:
    """A part of a page. key: its anchor. about: how to read it. body: HTML. half: on a wide screen
    it stands beside the next one that is. data: what the script asks of it, as JSON.
    """

    key: str
    title: str
    body: Markup
    about: str = ""
    half: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)


def page(title: str, lead: Any, sections: Sequence[Section]) -> str:
    """The whole page. Nothing in it is loaded from elsewhere, and its policy forbids that. lead: a
    sentence, or HTML, at its top. A section without a title has no heading, and isn't in the list
    of them.
    """
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["coded"] = coded
    template = environment.from_string((ASSETS / "page.html").read_text())
    style, script = ((ASSETS / name).read_text() for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = template.render(
        title=title,
        lead=lead,
        sections=sections,
        style=Markup(style),
        script=Markup(script),
        digest=digest,
        data=as_data({section.key: section.data for section in sections if section.data}),
        version=__version__,
        when=when,
    )
    # file names that are no valid Unicode
    return text.encode("utf-8", "backslashreplace").decode()


def as_data(value: Any) -> Markup:
    """JSON that stands in a script element: nothing in it, as a stranger's file name, can end
    that.
    """
    text = json.dumps(plain(value), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def coded(text: Any) -> Markup:
    """Text in which what stands in backticks is code."""
    return Markup(re.sub(r"`([^`<>]+)`", r"<code>\1</code>", str(escape(text))))


def wrapping(text: Any) -> Markup:
    """Text whose long words, as names of files, may be broken behind / _ - . and nowhere else."""
    if isinstance(text, Markup):
        return text
    return Markup(_LONG_WORD.sub(lambda word: _JOINT.sub(r"\g<0><wbr>", word[0]), escape(text)))


_LONG_WORD = re.compile(rf"\S{{{LONG + 1},}}")
_JOINT = re.compile(r"-{16}|[/_.-]+(?=[^/_.-])")


def html(template: str, **values: Any) -> Markup:
    """A piece of HTML: {} or {name} of the template are replaced, escaped unless they are HTML
    already.
    """
    return Markup(template).format(**values)


def join(pieces: Sequence[Markup] | Any) -> Markup:
    """Pieces of HTML, one after the other."""
    return Markup("\n").join(pieces)


def table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = (1,)
) -> Markup:
    """A table. numbers: columns that hold numbers."""

    def line(cell: str, values: Sequence[Any]) -> Markup:
        classes = [Markup(' class="number"') if i in numbers else "" for i in range(len(values))]
        cells = [
            html("<{cell}{kind}>{x}</{cell}>", cell=cell, kind=kind, x=wrapping(x))
            for kind, x in zip(classes, values, strict=True)
        ]
        return html("<tr>{cells}</tr>", cells=join(cells))

    top = html("<thead>{head}</thead>", head=line("th", head)) if any(head) else ""
    return html(
        '<div class="scroll"><table{kind}>{top}<tbody>{rows}</tbody></table></div>',
        kind=Markup(' class="wide"') if len(numbers) > 2 else "",
        top=top,
        rows=join(line("td", row) for row in rows),
    )


def bars(rows: Sequence[tuple[str, float, str]]) -> Markup:
    """Horizontal bars: (name, fraction of 1, what to print beside it)."""
    cells = [
        html(
            '<span>{name}</span><div><i style="width: {width:.2f}%"></i></div><b>{text}</b>',
            name=wrapping(name),
            width=100 * min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0,
            text=text,
        )
        for name, value, text in rows
    ]
    return html('<div class="bars">{cells}</div>', cells=join(cells))


def legend(names: Sequence[str], series: Sequence[Series] = ()) -> Markup:
    """The colours of groups 0, 1, …, or of series with these names."""
    keys = series or [Series(name, np.zeros(0), np.zeros(0)) for name in names]
    colours = _colours(keys)
    items = [
        html(
            '<span {colour}><i class="{style}"></i>{name}</span>',
            colour=_colour(i if key.colour is None else key.colour, colours),
            style=key.style,
            name=wrapping(name),
        )
        for i, (name, key) in enumerate(zip(names, keys, strict=True))
    ]
    return html('<p class="soft legend">{items}</p>', items=join(items))


def button(key: str, text: str) -> Markup:
    """A button that the script knows by its key; not there without the script."""
    return html('<button type="button" hidden data-do="{key}">{text}</button>', key=key, text=text)


# --- charts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A curve: x and y of its points; with dots on them or not. style: of the style sheet, "dashed"
    or "rings", which are points without a curve. colour: its number; None: its place.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    dots: bool = False
    style: str = ""
    colour: int | None = None


def chart(
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    caption: Any = "",
    small: bool = False,
    named: bool = True,
) -> Markup:
    """Curves in one figure. Points that are not finite, or beyond 1e300, are left out.

    Long curves are thinned to what can be seen; the script tells the values of each point that is
    left. A curve of one point is a dot. named: with a legend, where there are several.
    """
    series = [_finite(s) for s in series]
    xs, ys = (np.concatenate([getattr(s, axis) for s in series] or [np.zeros(0)]) for axis in "xy")
    low_x, high_x = x_range or _range(xs, log_x)
    low_y, high_y = y_range or _range(ys, log_y)
    width, height = size
    across = _scale(low_x, high_x, LEFT, width - RIGHT, log_x)
    up = _scale(low_y, high_y, height - BOTTOM, TOP, log_y)
    parts = []
    for value in _ticks(low_x, high_x, log_x, 3 if small else 5):
        x = across(value)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/><text'
            f' x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{_short(value)}</text>'
        )
    for value in _ticks(low_y, high_y, log_y, 3 if small else 5):
        y = up(value)
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    colours = _colours(series)
    for i, s in enumerate(series):
        seen = _thinned(s, across)
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in seen)
        values = " ".join(f"{x:.6g},{y:.6g}" for x, y in seen)
        colour = _colour(i if s.colour is None else s.colour, colours)
        parts.append(
            f'<g {colour} data-name="{escape(s.name)}" data-values="{values}">'
            f'<polyline class="curve {s.style}" points="{points}"/>'
        )
        if s.dots or s.style == "rings" or len(s.x) == 1:
            kind, radius = ("ring", 7) if s.style == "rings" else ("dot", 3.5)
            parts += [
                f'<circle class="{kind}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="{radius}">'
                f"<title>{x:g}: {y:g}</title></circle>"
                for x, y in zip(s.x, s.y, strict=True)
            ]
        parts.append("</g>")
    middle = (LEFT + width - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_name)}</text>'
    )
    parts.append(
        f'<text x="14" y="{(TOP + height - BOTTOM) / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(TOP + height - BOTTOM) / 2:.0f})">{escape(y_name)}</text>'
    )
    return _figure(
        parts,
        size,
        f"{y_name} by {x_name}",
        "small" if small else "chart",
        join([html("<figcaption>{x}</figcaption>", x=wrapping(caption))] if caption else [])
        + (legend([s.name for s in series], series) if len(series) > 1 and named else Markup("")),
        {"x": x_name, "y": y_name},
    )


def scatter(
    xy_N2: np.ndarray,
    group_N: np.ndarray,
    titles: Sequence[str],
    names: Sequence[str],
    caption: str,
) -> Markup:
    """Points in the plane, coloured by group; the titles show under a pointer. The script knows a
    point by its place among them, as in `tiles`.
    """
    size = (WIDTH, WIDTH)
    low, high = xy_N2.min(0), xy_N2.max(0)
    at = (xy_N2 - low) / np.where(high > low, high - low, 1) * (WIDTH - 16) + 8
    parts = [
        f'<g {_colour(int(g), len(names))}><circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
        f"<title>{escape(title)}</title></circle></g>"
        for (x, y), g, title in zip(at, group_N, titles, strict=True)
    ]
    body = html("<figcaption>{x}</figcaption>", x=caption)
    if 1 < len(names) <= LEGEND:
        body += legend(names)
    return _figure(parts, size, "map: a dot an image", "chart map", body)


def _colour(i: int, count: int) -> Markup:
    """Of the style sheet's colours, or of more groups hues around the circle, each far from the one
    before it.
    """
    if count <= COLOURS:
        return html('class="s{i}"', i=i)
    return html('style="--c: hsl({hue:.0f} 65% 52%)"', hue=i * 137.508 % 360)


def _colours(series: Sequence[Series]) -> int:
    """How many colours there must be for them."""
    return max([len(series), *(1 + (s.colour or 0) for s in series)])


def _figure(
    parts: Sequence[str],
    size: tuple[int, int],
    what: str,
    kind: str,
    below: Markup,
    axes: Mapping[str, str] | None = None,
) -> Markup:
    svg = Markup("".join(parts))
    named = (html(' data-{k}="{v}"', k=k, v=v) for k, v in (axes or {}).items())
    return html(
        '<figure class="{kind}"><svg viewBox="0 0 {w} {h}" role="img"'
        ' aria-label="{what}"{axes}>{svg}</svg>{below}</figure>',
        kind=kind,
        w=size[0],
        h=size[1],
        what=what,
        axes=Markup("").join(named),
        svg=svg,
        below=below,
    )


def _finite(s: Series) -> Series:
    x, y = np.asarray(s.x, float), np.asarray(s.y, float)
    kept = (np.abs(x) <= LARGEST) & (np.abs(y) <= LARGEST)
    return replace(s, x=x[kept], y=y[kept])


def _thinned(s: Series, across: Callable[[float], float]) -> list[tuple[float, float]]:
    """What can be seen of a curve: of its points in one column of pixels the first, lowest, highest
    and last.
    """
    columns: dict[int, list[int]] = {}
    for i, x in enumerate(s.x):
        columns.setdefault(round(across(x)), []).append(i)
    kept: set[int] = set()
    for part in columns.values():
        y = s.y[part]
        kept |= {part[0], part[int(y.argmin())], part[int(y.argmax())], part[-1]}
    return [(s.x[i], s.y[i]) for i in sorted(kept)]


def _range(values: np.ndarray, log: bool) -> tuple[float, float]:
    values = values[values >= 1 / LARGEST] if log else values
    if not len(values):
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if low == high:
        around = max(0.5, abs(low) / 100)
        return (low / 2, high * 2) if log else (low - around, high + around)
    margin = 0.0 if log else 0.03 * (high - low)
    return low - margin, high + margin


def _scale(
    low: float, high: float, start: float, end: float, log: bool
) -> Callable[[float], float]:
    if log:
        a, b = math.log(low), math.log(high)
        return lambda v: start + (math.log(max(v, 1e-300)) - a) / (b - a) * (end - start)
    return lambda v: start + (v - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, log: bool, about: int) -> list[float]:
    """Round numbers in a range: of a logarithmic axis powers of ten, or their double and fivefold
    too.
    """
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for factors in ((1,), (1, 2, 5)):
            values = [m * 10.0**k for k in range(first, last + 1) for m in factors]
            values = [value for value in values if low * 0.999 <= value <= high * 1.001]
            if len(values) > 1:
                return values[:: -(-len(values) // (about + 1))]
        return [low, high]
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    """A tick's number in few characters."""
    if value and (abs(value) >= 1e4 or abs(value) < 1e-3):
        mantissa, _, power = f"{value:.0e}".partition("e")
        return (
            f"{mantissa}e{int(power)}"
            if abs(value) < 1e-3 or abs(value) >= 1e6
            else f"{value / 1e3:g}k"
        )
    return f"{value:.4g}"


# --- pictures -------------------------------------------------------------------------------------


def thumbnail(pixels_HWC: np.ndarray, side: int = 104) -> str:
    """An image as a data URI: JPEG, at most side pixels a side."""
    return as_uri(within(Image.fromarray(pixels_HWC), side))


def within(image: Image.Image, side: int) -> Image.Image:
    """A picture of at most side pixels a side: the image itself, or a smaller one."""
    if max(image.size) <= side:
        return image
    smaller = image.copy()
    smaller.thumbnail((side, side))
    return smaller


def as_uri(image: Image.Image) -> str:
    """A small picture as a data URI."""
    # a tiny image would be mostly JPEG's noise, and is smaller as PNG
    return _data_uri(image, "PNG") if max(image.size) < 32 else _data_uri(image, "JPEG", quality=72)


def tiles(pictures: Sequence[Image.Image | None], side: int) -> tuple[str, int]:
    """Small pictures cut to squares of side pixels, in one JPEG: its data URI, and how many stand
    in a row of it. The place of one that isn't there is grey.
    """
    across = max(1, math.isqrt(len(pictures)))
    sheet = Image.new("RGB", (across * side, -(-len(pictures) // across) * side), (127, 127, 127))
    for i, each in enumerate(pictures):
        if each is not None:
            sheet.paste(ImageOps.fit(each, (side, side)), (i % across * side, i // across * side))
    return _data_uri(sheet, "JPEG", quality=60), across


def picture(uri: str | None, title: str, caption: Any, key: str = "") -> Markup:
    """A thumbnail with its caption; without one its place stays, with the title. key: by which the
    script knows the image.
    """
    shown = (
        html('<img src="{uri}" alt="{title}" title="{title}">', uri=uri, title=title)
        if uri
        else html('<div class="none">{name}</div>', name=wrapping(title))
    )
    return _captioned(shown, caption, key)


def overlaid(uri: str, overlay_uri: str, title: str, caption: Any, key: str = "") -> Markup:
    """`picture` with a transparent image over it, which is stretched to the photograph's shape: a
    tap on the picture, or Space on it, switches it off and on, and `overlay_switch` does on the
    whole page; without a script.
    """
    width, height = _size(uri)
    shown = html(
        '<label class="stack"><input type="checkbox" aria-label="{title}: without what lies over'
        ' it"><span style="width: {share:.1f}%; aspect-ratio: {w} / {h}">'
        '<img src="{uri}" alt="{title}" title="{title}"><img class="overlay" src="{overlay}"'
        ' alt=""></span></label>',
        title=title,
        share=100 * min(1.0, width / height),
        w=width,
        h=height,
        uri=uri,
        overlay=overlay_uri,
    )
    return _captioned(shown, caption, key)


def overlay_switch(text: str) -> Markup:
    """A checkbox that switches all overlays of the page off and on."""
    return html(
        '<label class="switch"><input type="checkbox" class="overlays" checked> {text}</label>',
        text=text,
    )


def transparent(rgba_HWC: np.ndarray) -> str:
    """A picture with transparency, (H, W, 4) uint8, as a data URI: PNG."""
    return _data_uri(Image.fromarray(rgba_HWC), "PNG", optimize=True)


def _captioned(shown: Markup, caption: Any, key: str) -> Markup:
    return html(
        "<figure{key}>{shown}<figcaption>{caption}</figcaption></figure>",
        key=html(' data-image="{key}"', key=key) if key else "",
        shown=shown,
        caption=wrapping(caption),
    )


def _size(uri: str) -> tuple[int, int]:
    """Width and height of a picture in a data URI."""
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return image.size


class Outlined(NamedTuple):
    """A box on a picture. corners: left, top, right, bottom in the image's pixels. kind: of the
    style sheet, "true" or "said". title: shows under a pointer.
    """

    corners: np.ndarray
    kind: str
    title: str


def outlined(
    uri: str | None, size: tuple[int, ...], boxes: Sequence[Outlined], title: str, caption: str
) -> Markup:
    """`picture` with boxes drawn on it. size: height and width of the image as it is stored."""
    if uri is None:
        return picture(None, title, caption)
    height, width = size
    drawn = [
        html(
            '<rect class="box {kind}" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}">'
            "<title>{title}</title></rect>",
            kind=box.kind,
            x=box.corners[0],
            y=box.corners[1],
            w=box.corners[2] - box.corners[0],
            h=box.corners[3] - box.corners[1],
            title=box.title,
        )
        for box in boxes
    ]
    return html(
        '<figure><svg viewBox="0 0 {w} {h}" role="img" aria-label="{title}">'
        '<title>{title}</title><image href="{uri}" width="{w}" height="{h}"/>{drawn}</svg>'
        "<figcaption>{caption}</figcaption></figure>",
        w=width,
        h=height,
        title=title,
        uri=uri,
        drawn=join(drawn),
        caption=wrapping(caption),
    )


def matrix_picture(share_KK: np.ndarray, what: str) -> Markup:
    """A matrix of fractions of 1 as a picture; its colour fits light and dark pages. Of more than
    `CELLS` rows the largest of several cells stands for them.
    """
    step, side = -(-len(share_KK) // CELLS), len(share_KK)
    if step > 1:
        padded = np.pad(share_KK, (0, -side % step))
        side = len(padded)
        share_KK = padded.reshape(len(padded) // step, step, -1, step).max((1, 3))
    K = len(share_KK)
    cell = max(1, 512 // K)
    # the square root shows rare ones
    alpha = np.round(255 * np.clip(share_KK, 0, 1) ** 0.5).astype(np.uint8)
    rgba = np.empty((K, K, 4), np.uint8)
    rgba[..., :3] = (59, 130, 246)
    rgba[..., 3] = alpha
    image = Image.fromarray(rgba).resize((K * cell, K * cell), Image.Resampling.NEAREST)
    return html(
        '<div class="matrix" data-side="{side}"><img src="{uri}" alt="{what}"></div>',
        side=side,
        uri=_data_uri(image, "PNG", optimize=True),
        what=what,
    )


def _data_uri(image: Image.Image, kind: str, **settings: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
