"""Lists in CSV: what is read, as it was meant, and what is refused by its line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.vggfeat.datasets.made import fails, sizes, touch, write
from vggfeat.datasets import load


def test_csv_single_label_with_splits(tmp_path: Path) -> None:
    rows = ['"a, b.jpg", dog ,train', "./x/1.jpg,cat,Val", "", "/abs.jpg,,test", "z.jpg,cat,"]
    text = "\r\n".join(["\ufeffPath, Label,split", *rows])
    items = load("csv", write(tmp_path, text))
    assert items.names == ["a, b.jpg", "x/1.jpg", "/abs.jpg", "z.jpg"]
    assert items.labels is not None and items.labels.tolist() == [1, 0, -1, 0]
    assert items.labels.dtype == np.int32 and items.classes == ["cat", "dog"]
    # Row 2 has no label and row 3 no split.
    assert {k: v.tolist() for k, v in items.splits.items()} == {"train": [0], "val": [1]}
    assert items.source(1) == tmp_path / "x/1.jpg" and items.source(2) == Path("/abs.jpg")


def test_csv_several_labels(tmp_path: Path) -> None:
    text = "path,labels\na.jpg,dog; person\nb.jpg,?dog\nc.jpg,\nd.jpg,;\ne.jpg,dog;?dog;?cat\n"
    items = load("csv", write(tmp_path, text))
    assert items.protocol == "multi-label" and items.classes == ["cat", "dog", "person"]
    assert items.labels is not None and items.labels.dtype == np.int8
    assert items.labels.tolist() == [[-1, 1, 1], [-1, 0, -1], [0, 0, 0], [-1, -1, -1], [0, 1, -1]]
    assert sizes(items) == {
        f"split{k}/{p}": n for k in range(3) for p, n in (("train", 2), ("val", 1), ("test", 1))
    }


def test_csv_without_splits_is_split_class_by_class(tmp_path: Path) -> None:
    rows = "".join(f"{c}{i}.jpg,{c},\n" for c in "ab" for i in range(50))
    items = load("csv", write(tmp_path, "path,label,split\n" + rows))
    assert items.labels is not None and items.protocol == "single-label"
    for part, n in (("train", 32), ("val", 8), ("test", 10)):
        assert np.bincount(items.labels[items.splits[f"split0/{part}"]]).tolist() == [n, n]


def test_csv_without_labels_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    items = load("csv", write(tmp_path, b"path,label\ncaf\xe9.jpg,\n a.jpg ,\n"))
    assert (items.labels, items.protocol, items.splits) == (None, "unlabelled", {})
    assert items.names == ["caf\udce9.jpg", " a.jpg "]  # spaces belong to a file's name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["line 1", "empty"]),
        ("path,label\n", ["line 2", "no images"]),
        ("a.jpg,cat\n", ["line 1", "header", "a.jpg,cat"]),
        ("file;label\na;b\n", ["line 1", "header"]),
        ("path,label,width\na.jpg,cat,3\n", ["line 1", "header"]),
        ("path,label\na.jpg,cat,train\n", ["line 2", "3 columns"]),
        ("path,label\na.jpg,cat\nb.jpg\n", ["line 3", "1 columns"]),
        ("path,label\na.jpg,cat\n./a.jpg,dog\n", ["line 3", "a.jpg", "twice", "line 2"]),
        ("path,label,split\na.jpg,cat,fold1\n", ["line 2", "train, val, test", "fold1"]),
        ("path,label,split\na.jpg,cat,eval\n", ["line 2", "train, val, test", "eval"]),
        ("path,label\nC:\\a.jpg,cat\n", ["line 2", "on a Windows disk"]),
        ("path,label\na.jpg,cat\nhttps://x.org/a.jpg,cat\n", ["line 3", "either all paths are"]),
        (
            "path,label\nd/../a.jpg,cat\na.jpg,dog\n",
            ["line 3", "twice", "'cat;dog' in a column labels"],
        ),
        (
            "path,label,split\na.jpg,cat,train\na.jpg,cat,test\n",
            ["line 3", "in train there, in test here"],
        ),
        ("path,labels,split\na.jpg,cat;dog,\na.jpg,cat,\n", ["line 3", "twice", "other labels"]),
        ("path,label\na.jpg,cat|dog\n", ["line 2", "'cat|dog'", "write a labels column"]),
        (
            "path,label\na.jpg,cat\nb.jpg,cat;dog\n",
            ["line 3", "'cat;dog'", "write a labels column"],
        ),
        (
            'path,label\na.jpg,cat\nb.jpg,dog\nc.jpg,"cat,dog"\n',
            ["line 4", "not 'cat,dog'", "a labels column", "as 'cat;dog'", "rename it"],
        ),
        (
            "path,label\na.jpg,cat/dog\nb.jpg,dog\nc.jpg,cat\n",
            ["line 2", "not 'cat/dog'", "as 'cat;dog'"],
        ),
        (
            'path,label\na.jpg,"a,b"\nb.jpg,"b,c"\nc.jpg,"a,c"\n',
            ["line 2", "not 'a,b'", "as 'a;b'"],
        ),
        (
            "path,label\na.jpg,cat\nb.jpg,NaN\n",
            ["line 3", "'NaN' would be a class", "an empty cell"],
        ),
        ("path,label\na.jpg,None\n", ["line 2", "'None' would be a class", "an empty cell"]),
        (
            "path,labels\na.jpg,cat;dog\nb.jpg,NULL\n",
            ["line 3", "'NULL' would be a class", "an empty cell"],
        ),
        ("path,label\na.jpg,N/A\n", ["line 2", "'N/A' would be a class", "an empty cell"]),
        (
            "path,labels\na.jpg,cat\nb.jpg,cat|dog\n",
            ["line 3", "'cat|dog' is one label", "cat;dog", "'cat|dog;'"],
        ),
        ('path,labels\na.jpg,"cat, dog"\nb.jpg,dog\n', ["line 2", "'cat, dog' is one label"]),
        (
            "path,labels\na.jpg,cat dog\nb.jpg,dog\nc.jpg,cat\n",
            ["line 2", "'cat dog' is one label"],
        ),
        ("path,labels\na.jpg,\"['cat', 'owl']\"\n", ["line 2", "would be one label"]),
        (
            "path,cat,dog\na.jpg,1,0\nb.jpg,2,1\n",
            ["line 3", "'cat' is none of path, label", "0 or 1, not '2'"],
        ),
        (
            "path,cat,dog\na.jpg,1,-1\n",
            ["line 2", "not '-1': 1 (or True) where the class is present, 0 (or False)"],
        ),
        ("path,cat,dog\na.jpg,yes,1\n", ["line 2", "0 or 1, not 'yes'"]),
        ("path,cat,dog\na.jpg,1,\n", ["line 2", "'dog'", "0 or 1, not ''"]),
        ("path,label\n,cat\n", ["line 2", "path"]),
        ("path,labels\na.jpg,cat;?\n", ["lone ?"]),
        ("path,labels\na.jpg,;\n", ["no row has a label"]),
        ('path,label\n"' + "x" * 200_000 + '",cat\n', ["line 2", "field", "a quote"]),
        (
            'path,label\na.jpg,"cat\nb.jpg,dog\nc.jpg,owl\n',
            ["line 2", "a quote is opened here and not closed"],
        ),
        ('path,label\na.jpg,cat\n"b.jpg,dog\n\nc.jpg,"owl"\n', ["line 3", "a quote is opened"]),
        ('path,"label\na.jpg,cat\n', ["line 1", "a quote is opened"]),
        ('path,label\r\n\r\na.jpg,"cat\r\n"\r\n', ["line 3", "a cell has a line end"]),
    ],
)
def test_csv_faults_name_the_file_and_the_line(tmp_path: Path, text: str, said: list[str]) -> None:
    path = write(tmp_path, text)
    fails("csv", path, str(path), *said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("path,label\na.jpg,cat\n".encode("utf-16-le"), "UTF-16 without its mark"),
        (b"PK\3\4 and so on", "a spreadsheet or an archive: save it as CSV"),
        ("path,label\na.jpg,c\xe4t\n".encode("cp1252"), "line 2: the label"),
        ("path,label\na.jpg,cat\n".encode("utf-16") + b"\0", "is not utf-16"),
    ],
)
def test_csv_that_is_not_utf8_says_so(tmp_path: Path, content: bytes, said: str) -> None:
    fails("csv", write(tmp_path, content), str(tmp_path / "data.csv"), said, "UTF-8")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_as_spreadsheets_save_it(tmp_path: Path, separator: str, encoding: str) -> None:
    rows = [
        ["Split", "Path", "Label", ""],
        ["Training", "\xe4.jpg", "c\xe4t", ""],
        ["TEST", "b.jpg", "dog", ""],
    ]
    text = "\r\n".join(separator.join(row) for row in rows)
    items = load("csv", write(tmp_path, text.encode(encoding)))
    assert items.names == ["\xe4.jpg", "b.jpg"] and items.classes == ["c\xe4t", "dog"]
    assert {k: v.tolist() for k, v in items.splits.items()} == {"train": [0], "test": [1]}
    assert len(items.remarks) == 1 and items.remarks[0].startswith("no training image of 'dog'")


def test_csv_words_for_splits(tmp_path: Path) -> None:
    words = ["training", "Train_Set", "validate", "dev", "testing", "TST", ""]
    text = "path,label,split\n" + "".join(f"{i}.jpg,cat,{word}\n" for i, word in enumerate(words))
    splits = load("csv", write(tmp_path, text)).splits
    assert {k: v.tolist() for k, v in splits.items()} == {
        "train": [0, 1],
        "val": [2, 3],
        "test": [4, 5],
    }


def test_csv_names_of_one_label_are_not_questioned(tmp_path: Path) -> None:
    labels = ["tench, Tinca tinca", "traffic light", "great white shark"]
    text = "path,labels\n" + "".join(f'{i}.jpg,"{label}"\n' for i, label in enumerate(labels))
    assert load("csv", write(tmp_path, text)).classes == sorted(labels)
    several = (  # the ; says that it is known
        'path,labels\na.jpg,"crane, bird;"\nb.jpg,"crane, machine"\n'
    )
    assert load("csv", write(tmp_path, several)).classes == ["crane, bird", "crane, machine"]
    one = (  # all ImageNet's
        'path,label\na.jpg,"maillot, tank suit"\nb.jpg,maillot\nc.jpg,ski pole\nd.jpg,ski\n'
    )
    assert load("csv", write(tmp_path, one)).classes == [
        "maillot",
        "maillot, tank suit",
        "ski",
        "ski pole",
    ]


def test_csv_with_a_column_a_class(tmp_path: Path) -> None:
    text = "path,dog,Cat,split\na.jpg,1,0,train\nb.jpg,1.0,1,train\nc.jpg,0,0,test\nd.jpg,,,test\n"
    items = load("csv", write(tmp_path, text))
    assert items.protocol == "multi-label" and items.classes == ["dog", "Cat"]
    assert items.remarks == ("columns taken for classes: dog, Cat",)
    assert items.labels is not None and items.labels.dtype == np.int8
    assert items.labels.tolist() == [[1, -1], [1, 1], [-1, -1], [0, 0]]
    assert {k: v.tolist() for k, v in items.splits.items()} == {"train": [0, 1], "test": [2]}
    items = load("csv", write(tmp_path, "path,dog,cat\na.jpg,0,1\nb.jpg,1,0\nc.jpg,,\n"))
    assert items.protocol == "single-label" and items.labels is not None
    assert items.labels.tolist() == [1, 0, -1] and items.labels.dtype == np.int32
    assert items.remarks[1:] == ("each row of data.csv has one 1: read as one label an image",)
    many = ",".join(f"c{i}" for i in range(22))
    items = load("csv", write(tmp_path, f"path,{many}\na.jpg{',1' * 22}\n"))
    assert items.remarks[0].endswith("c18, c19 and 2 more")
    # as VOC's
    assert load("csv", write(tmp_path, "path,cat,train\na.jpg,1,1\n")).classes == [
        "cat",
        "train",
    ]
    assert load("csv", write(tmp_path, "path,class1,class2\na.jpg,1,1\n")).classes == [
        "class1",
        "class2",
    ]


def test_csv_line_that_names_the_separator_is_no_header(tmp_path: Path) -> None:
    for mark in ("sep=;", '"sep=;"', "\ufeffSEP=;"):
        items = load("csv", write(tmp_path, f"{mark}\r\npath;label\r\na.jpg;cat\r\n"))
        assert (items.names, items.classes) == (["a.jpg"], ["cat"])


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (",path,label", "leave out the column 1, which has no name (index=False in pandas)"),
        ("Unnamed: 0,path,label", "leave out the column 'Unnamed: 0' (index=False in pandas)"),
        ("filename,label", "rename 'filename' to path"),
        ("Image;label", "rename 'Image' to path"),
        ("img_path,class", "rename 'img_path' to path"),
        ("path,class", "rename 'class' to label"),
        ("path,category,split", "rename 'category' to label"),
        ("path,tags", "rename 'tags' to labels"),
        ("path,label,subset", "rename 'subset' to split"),
        (
            "path,label,width,height",
            "the column 'width' is none of path, label, labels and split: leave it out",
        ),
        ("path,label,class", "the column 'class' is none of"),
        ("path,label,label", "two columns 'label'"),
        ("path,label,labels", "both label and labels"),
        ("path,split", "add a column label"),
        ("a,b", "there is no column path"),
        ("path,is_valid,daisy,roses", "'is_valid' would be a class: write a column split"),
        ("path,train,test,daisy", "'train' would be a class: write a column split"),
        ("path,isTest,daisy,roses", "'isTest' would be a class"),
        ("path,fold,daisy,roses", "'fold' would be a class: leave it out"),
        ("path,id,daisy,roses", "'id' would be a class: leave it out"),
        ("path,daisy,roses,width", "'width' would be a class: leave it out"),
        ("path,target,daisy,roses", "rename 'target' to label"),
        ("path,target", "rename 'target' to label"),
        (
            "path,daisy",
            "rename 'daisy' to label, with the name of a class in each cell instead of 0 and 1",
        ),
    ],
)
def test_csv_header_says_which_column_is_wrong(tmp_path: Path, header: str, said: str) -> None:
    separator = ";" if ";" in header else ","
    row = separator.join(["a.jpg"] + ["1"] * header.count(separator))
    fails("csv", write(tmp_path, f"{header}\n{row}\n"), "line 1: ", said, "header")


def test_csv_with_a_column_a_class_of_booleans(tmp_path: Path) -> None:
    """As pandas' get_dummies writes them, and spreadsheets."""
    items = load(
        "csv",
        write(tmp_path, "path,dog,cat\na.jpg,True,False\nb.jpg,TRUE,true\nc.jpg,false,FALSE\n"),
    )
    assert items.labels is not None and items.labels.tolist() == [[1, -1], [1, 1], [-1, -1]]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["flower white", "flower red", ""], ("'flower red'",)),
        (["traffic light", "flower red", "flower red"], ()),
        (["flower white", "flower red", "dog"], ()),
        (["flower white;", "flower red"], ()),
    ],
)
def test_csv_labels_that_may_be_two_are_told(
    tmp_path: Path, labels: list[str], told: tuple[str, ...]
) -> None:
    text = "path,labels\n" + "".join(f"{i}.jpg,{label}\n" for i, label in enumerate(labels))
    says = "labels with spaces are single classes: {}; ';' stands between two"
    remarks = load("csv", write(tmp_path, text)).remarks
    assert [line for line in remarks if "spaces" in line] == [says.format(label) for label in told]
    one = load("csv", write(tmp_path, text.replace("labels", "label").replace(";", "")))
    assert not any("spaces" in line for line in one.remarks)


def test_csv_class_of_two_words_that_are_classes_is_told(tmp_path: Path) -> None:
    items = load("csv", write(tmp_path, "path,label\n0.jpg,ski mask\n1.jpg,ski\n2.jpg,mask\n"))
    assert items.classes == ["mask", "ski", "ski mask"]
    assert (
        "'ski mask' is one class; for several an image write a labels column, as 'ski;mask'"
        in items.remarks
    )


def test_csv_rows_that_repeat_are_left_out_and_told(tmp_path: Path) -> None:
    text = f"path,label\na.jpg,cat\nb.jpg,dog\n./a.jpg,cat\n{tmp_path}/b.jpg,dog\n"
    items = load("csv", write(tmp_path, text))
    assert items.names == ["a.jpg", "b.jpg"]
    assert items.remarks == (
        "left out: 2 rows that repeat an earlier one, for example line 4 of data.csv",
    )


@pytest.mark.skipif(os.name == "nt", reason="there a backslash is what / is here")
def test_csv_paths_as_they_were_meant(tmp_path: Path) -> None:
    touch(tmp_path, "photos/cat/1.jpg", "a.jpg", "b.jpg ", "caf\xe9.jpg", "back\\slash.jpg")
    names = [
        "photos\\cat\\1.jpg",
        "gone\\1.jpg",
        " a.jpg ",
        "b.jpg ",
        "caf\xe9.jpg",
        "back\\slash.jpg",
    ]
    text = "path,label\n" + "".join(f"{name},cat\n" for name in names)
    items = load("csv", write(tmp_path, text.encode("cp1252")))
    assert items.names == [
        "photos/cat/1.jpg",
        "gone/1.jpg",
        "a.jpg",
        "b.jpg ",
        "caf\xe9.jpg",
        "back\\slash.jpg",
    ]


def test_csv_root_must_be_a_file(tmp_path: Path) -> None:
    fails("csv", tmp_path / "no.csv", str(tmp_path / "no.csv"))


def test_a_short_csv_file_doesnt_fill_the_memory(tmp_path: Path) -> None:
    """A class of its own for each image: 1.6 MB of text would be a table of 10 GB."""
    (tmp_path / "a.csv").write_text(
        "path,labels\n" + "".join(f"{i}.jpg,c{i}\n" for i in range(100_000))
    )
    fails("csv", tmp_path / "a.csv", "100,000 images of 100,000 classes are too many")


# --- boxes ----------------------------------------------------------------------------------------


def test_csv_with_a_row_a_box(tmp_path: Path) -> None:
    rows = ["a/1.jpg,cat,0.4,1,9.5,8,20,30", "b.jpg,dog,0,0,2,2,20,30", "a/1.jpg,dog,3,3,5,5,20,30"]
    path = write(tmp_path, "\n".join(["path,label,X1,Y1,X2,Y2,width,height", *rows, rows[0]]))
    items = load("csv", path)
    assert items.names == ["a/1.jpg#1", "b.jpg#1", "a/1.jpg#2"]
    assert items.files == ["a/1.jpg", "b.jpg", "a/1.jpg"] and items.classes == ["cat", "dog"]
    assert items.source(2) == tmp_path / "a/1.jpg"
    # whole pixels that cover the box
    assert items.boxes is not None
    assert items.boxes.tolist() == [[0, 1, 10, 8], [0, 0, 2, 2], [3, 3, 5, 5]]
    assert items.remarks[0] == "left out: a row that repeats an earlier one: line 5 of data.csv"
    assert items.remarks[1].startswith("1 of the boxes lie in the image of another")
    assert len([*items.paths()]) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label,x1,y1,x2\na.jpg,c,0,0,1", "there is a column x1 and none y2"),
        ("path,label,x1,y1,x2,y2\na.jpg,c,0,0,1,", "line 2: y2 must be a number, not ''"),
        ("path,label,x1,y1,x2,y2\na.jpg,c,0,0,0,1", "line 2: the box 0,0,0,1 has no area"),
        ("path,label,x1,y1,x2,y2\na.jpg,c,nan,0,2,1", "line 2: the box nan,0,2,1 has no area"),
        ("path,label,x1,y1,x2,y2\na.jpg,c,-2,0,0,1", "line 2: the box -2,0,0,1 lies outside"),
        ("path,label,x1,y1,x2,y2\na.jpg,c,0,0,1,1\na.jpg,d,0,0,1,1", "line 3: 'a.jpg' is listed"),
    ],
)
def test_csv_with_boxes_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    fails("csv", write(tmp_path, text), said)
