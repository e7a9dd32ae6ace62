"""XML files of annotated images: real ones, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vggfeat.datasets.made import DATA, needs_data
from vggfeat.datasets.annotation import Object, read_annotation
from vggfeat.datasets.voc import CLASSES
from vggfeat.errors import VggfeatError

BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30.5</xmax><ymax>40</ymax></bndbox>"
PERSON = f"""<annotation>
<size><width>60</width><height>50</height><depth>3</depth></size>
<object><name>person</name><difficult>1</difficult>
{BOX}
<part><name>head</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>6</xmax><ymax>6</ymax></bndbox>
</part><actions><jumping>1</jumping></actions></object>
<object><bndbox><ymax>9</ymax><xmax>8</xmax><ymin>7</ymin><xmin>6</xmin></bndbox>
<name> dog </name></object>
</annotation>"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.xml"
    path.write_text(text)
    return path


def test_objects_in_order_with_edges_in_pixels(tmp_path: Path) -> None:
    annotation = read_annotation(write(tmp_path, PERSON))
    assert annotation.size == (50, 60)
    assert annotation.objects == [
        Object("person", True, (0, 1, 30.5, 40), 3),
        Object("dog", False, (5, 6, 8, 9), 7),
    ]
    none = PERSON.replace("<width>60", "<width>0")
    assert read_annotation(write(tmp_path, none)).size is None
    assert read_annotation(write(tmp_path, "<annotation/>")).objects == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<annotation>\n<object>", "line 2: no XML"),
        ("path,class\n", "line 1: no XML"),
        ("<html></html>", "line 1: the XML of an annotation begins with it, not with 'html'"),
        ('<!DOCTYPE x [<!ENTITY a "b">]>\n<annotation/>', "line 1: a document type"),
        (PERSON.replace(">2<", ">two<"), "line 4: ymin must be a number, not 'two'"),
        (PERSON.replace(">2<", ">1_2<"), "line 4: ymin must be a number, not '1_2'"),
        (PERSON.replace(">50<", ">tall<"), "line 2: height must be a number, not 'tall'"),
        (PERSON.replace("<ymin>7</ymin>", ""), "line 7: an object without ymin"),
        (PERSON.replace("<name> dog </name>", ""), "line 7: an object without name"),
        (PERSON.replace("t>1</d", "t>maybe</d"), "line 3: difficult must be 0 or 1, not 'maybe'"),
        (f"<annotation>{' ' * (1 << 20)}</annotation>", "longer than the 1,024 KiB"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(VggfeatError) as caught:
        read_annotation(path)
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_an_entity_is_never_expanded(tmp_path: Path) -> None:
    """The nine of "billion laughs", and one that names a file."""
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha"}">' for i in range(10))
    for inside in (laughs, '<!ENTITY l9 SYSTEM "file:///etc/hostname">'):
        path = write(tmp_path, f"<!DOCTYPE a [{inside}]><annotation>&l9;</annotation>")
        with pytest.raises(VggfeatError, match="document type"):
            read_annotation(path)


@needs_data
def test_vocs_own() -> None:
    folder = DATA / "voc2012_100" / "VOCdevkit" / "VOC2012" / "Annotations"
    read = {path.stem: read_annotation(path) for path in folder.glob("*.xml")}
    objects = [(each, annotation) for annotation in read.values() for each in annotation.objects]
    assert len(read) == 100 and {each.name for each, _ in objects} == set(CLASSES)
    for each, annotation in objects:
        assert annotation.size is not None
        (height, width), (x1, y1, x2, y2) = annotation.size, each.corners
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
