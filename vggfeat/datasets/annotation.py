"""The XML of an annotated image, as PASCAL VOC and ILSVRC's localisation data have it.

    <annotation>
      <size> <width>500</width> <height>375</height> </size>
      <object> <name>dog</name> <difficult>0</difficult>
        <bndbox> <xmin>1</xmin> <ymin>49</ymin> <xmax>341</xmax> <ymax>375</ymax> </bndbox>
      </object>
    </annotation>

Its numbers count pixels from 1, and both ends belong to the box: its edges are xmin - 1 and xmax.
Parts of an object (a person's head) are left out, as is all else. The files are others': they are
short, have no document type and no entities, or are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from vggfeat.checked import number_of, read_text, shown
from vggfeat.errors import VggfeatError

_MOST_BYTES = 1 << 20  # of a file: VOC's longest have some 20 KB
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_OBJECT = ("annotation", "object")
# Where the texts stand that are read, each with what it is called here.
_TEXTS: dict[tuple[str, ...], str] = {
    ("annotation", "size", "width"): "width",
    ("annotation", "size", "height"): "height",
    (*_OBJECT, "name"): "name",
    (*_OBJECT, "difficult"): "difficult",
    **{(*_OBJECT, "bndbox", side): side for side in _SIDES},
}


@dataclass(frozen=True)
class Object:
    """One object. corners: x1, y1, x2, y2, edges in pixels. line: where the file tells of it."""

    name: str
    difficult: bool
    corners: tuple[float, float, float, float]
    line: int


@dataclass(frozen=True)
class Annotation:
    """size: (H, W) in pixels; None where the file doesn't tell. objects: in the file's order."""

    size: tuple[float, float] | None
    objects: list[Object]


def read_annotation(path: Path) -> Annotation:
    """The file's objects. Raises VggfeatError with the line where it is no such XML, or a number is
    none.
    """
    text = read_text(path.absolute(), "annotation in XML", most=_MOST_BYTES)
    reader = _Reader(path.absolute())
    try:
        reader.parser.Parse(text, True)
    except expat.ExpatError as error:
        raise VggfeatError(
            f"{path.absolute()}, line {error.lineno}: no XML: {expat.ErrorString(error.code)}"
        ) from None
    return Annotation(reader.size(), reader.objects)


class _Reader:
    """What has been read so far. place: the elements that are open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place: list[str] = []
        self._text: list[str] = []
        self._size: dict[str, float] = {}
        self._fields: dict[str, str] = {}
        self._began = 0  # the line of the object that is open
        self.objects: list[Object] = []
        self.parser = expat.ParserCreate()
        self.parser.StartDoctypeDeclHandler = self._refuse_doctype
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text.append

    def size(self) -> tuple[float, float] | None:
        """Zero, as some programs write it, tells nothing."""
        height, width = (self._size.get(side, 0.0) for side in ("height", "width"))
        return (height, width) if height > 0 and width > 0 else None

    def _refuse(self, line: int, what: str) -> NoReturn:
        raise VggfeatError(f"{self._path}, line {line}: {what}")

    def _refuse_doctype(self, *_: object) -> None:
        self._refuse(self.parser.CurrentLineNumber, "a document type (DOCTYPE), which none needs")

    def _start(self, name: str, _: dict[str, str]) -> None:
        if not self._place and name != "annotation":
            line = self.parser.CurrentLineNumber
            self._refuse(line, f"the XML of an annotation begins with it, not with {shown(name)}")
        self._place.append(name)
        self._text.clear()
        if tuple(self._place) == _OBJECT:
            self._fields, self._began = {}, self.parser.CurrentLineNumber

    def _end(self, _: str) -> None:
        place, line = tuple(self._place), self.parser.CurrentLineNumber
        self._place.pop()
        if what := _TEXTS.get(place):
            text = "".join(self._text).strip()
            if what in ("width", "height"):
                self._size[what] = self._number(what, text, line)
            else:
                self._fields[what] = text
            if what in _SIDES:
                self._number(what, text, line)
        elif place == _OBJECT:
            self.objects.append(self._object())

    def _object(self) -> Object:
        for what in ("name", *_SIDES):
            if not self._fields.get(what):
                self._refuse(self._began, f"an object without {what}")
        x1, y1, x2, y2 = (number_of(self._fields[side], float) for side in _SIDES)
        difficult = self._fields.get("difficult", "0")
        if difficult not in ("0", "1", ""):
            self._refuse(self._began, f"difficult must be 0 or 1, not {shown(difficult)}")
        corners = (x1 - 1, y1 - 1, x2, y2)
        return Object(self._fields["name"], difficult == "1", corners, self._began)

    def _number(self, what: str, text: str, line: int) -> float:
        try:
            return number_of(text, float)
        except ValueError:
            self._refuse(line, f"{what} must be a number, not {shown(text)}")
