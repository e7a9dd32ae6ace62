"""Images inside of larger files: WebDataset's tars, and Parquet or Arrow files as Hugging Face
writes them. And Parquet files that list images.

    webdataset    '/data/train-{0000..0127}.tar'    0001.jpg and 0001.cls, 0002.jpg and 0002.cls …
    parquet       'hf://datasets/OWNER/NAME/data/*.parquet'    a column of images, one of labels
    parquet       list.parquet    path (or uri, url, file), and label and split, where there are

How many images such a file holds isn't known before it is read: each is a shard of a set, and is
read once (`shards.inside`). What a column is called: see `columns_of`.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vggfeat.checked import shown
from vggfeat.datasets.items import Items, remarks_on_classes
from vggfeat.datasets.protocol import PROTOCOLS
from vggfeat.datasets.remote import refuse_own_disk
from vggfeat.datasets.splits import part_named
from vggfeat.errors import NoData, VggfeatError
from vggfeat.parquet import Table, schema_of
from vggfeat.place import is_url, place_of

ENDINGS = {"webdataset": (".tar", ".tar.gz", ".tgz"), "parquet": (".parquet", ".arrow")}
MOST_FILES = 10**6
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_PATH = ("path", "uri", "url", "file", "file_name", "filename", "image_path")
_IMAGE = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes", "content")
_LABEL = ("label", "class", "category", "target", "fine_label", "labels")
_NAME = ("path", "name", "file_name", "filename", "key", "__key__", "id")


# --- which files ----------------------------------------------------------------------------------


def expanded(pattern: str, kind: str) -> list[str]:
    """The files that a pattern means: braces ({000..099}, {a,b}), then * and ?; all of an ending in
    a folder. Paths or URLs.

    Raises NoData where there is none, VggfeatError for more than MOST_FILES.
    """
    many = list(itertools.islice(_braces(pattern), MOST_FILES + 1))
    if len(many) > MOST_FILES:
        raise VggfeatError(f"{pattern} is more than {MOST_FILES:,} files: describe it in parts")
    found = [name for each in many for name in _there(each, kind)]
    if not found:
        raise NoData(f"there is no file {' or '.join(ENDINGS[kind])} at {pattern}")
    return list(dict.fromkeys(found))


def _braces(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    before, inside, after = pattern[: found.start()], found[1], pattern[found.end() :]
    if span := _RANGE.fullmatch(inside):
        first, last = map(int, span.groups())
        words: Iterator[str] = (f"{i:0{len(span[1])}d}" for i in range(first, last + 1))
    else:
        words = iter(inside.split(","))
    for word in words:
        yield from _braces(before + word + after)


def _there(each: str, kind: str) -> list[str]:
    """Of one pattern without braces: itself, where it has no star; what a folder has."""
    above, _, name = each.rpartition("/")
    if any(sign in name for sign in "*?["):
        names = fnmatch.filter(place_of(above or ".").names(""), name)
        return sorted(f"{above}/{one}" if above else one for one in names)
    if name.lower().endswith(ENDINGS[kind]):
        return [each]
    inside = place_of(each).names("")
    return sorted(
        f"{each.rstrip('/')}/{one}" for one in inside if one.lower().endswith(ENDINGS[kind])
    )


def _below_one(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all files lie in, and their names in it."""
    heads = {path.rpartition("/")[0] for path in paths}
    common = heads.pop().split("/")
    for head in heads:
        pairs = zip(common, head.split("/"), strict=False)
        common = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    folder = "/".join(common)
    return folder, [path[len(folder) :].lstrip("/") for path in paths]


def _of_files(kind: str, paths: Sequence[str]) -> Items:
    """One item a file; see `Items.containers`."""
    local = [path if is_url(path) else os.path.abspath(path) for path in paths]
    folder, names = _below_one(local)
    url = folder if is_url(local[0]) else None
    if any(is_url(path) != is_url(local[0]) for path in local):
        raise VggfeatError("either all files are at URLs, or none is")
    root = Path() if url else Path(folder)
    return Items(kind, "unlabelled", root, names, None, [], url=url, containers=True)


def load_tars(root: Path | str | None) -> Items:
    """WebDataset's tars. Raises VggfeatError."""
    return _of_files("webdataset", expanded(_given(root, "tar files"), "webdataset"))


def load_parquet(root: Path | str | None) -> Items:
    """Parquet (or Arrow) files: of images, or a list of them. Raises VggfeatError."""
    paths = expanded(_given(root, "Parquet files"), "parquet")
    columns = columns_of(paths[0])
    if columns.image:
        return _of_files("parquet", paths)
    return _listed(paths)


def _given(root: Path | str | None, what: str) -> str:
    if root is None:
        raise VggfeatError(f"`root` is needed: {what}, as a pattern, 'a/{{000..099}}' or 'a/*'")
    return os.fspath(root)


# --- what is in them ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are what; "" where there is none. classes: the names that a file
    tells its labels by, as Hugging Face's do.
    """

    path: str = ""
    image: str = ""
    label: str = ""
    split: str = ""
    name: str = ""
    classes: tuple[str, ...] = ()


def columns_of(path: str) -> Columns:
    """Of a Parquet or Arrow file, by its schema. Raises VggfeatError where it has no images and
    lists none.
    """
    schema = schema_of(path)
    image = next(
        (
            name
            for name, kind in schema.kinds.items()
            if kind == "image" or (kind == "binary" and name.lower() in _IMAGE)
        ),
        "",
    )

    def among(words: Sequence[str], *kinds: str) -> str:
        named = {name.lower(): name for name, kind in schema.kinds.items() if kind in kinds}
        return next((named[word] for word in words if word in named), "")

    label = next(iter(schema.class_names), "") or among(_LABEL, "text", "integer")
    found = Columns(
        among(_PATH, "text"),
        image,
        label,
        among(("split", "subset"), "text"),
        among(_NAME, "text", "integer"),
        schema.class_names.get(label, ()),
    )
    if not found.image and not found.path:
        raise VggfeatError(
            f"{path} has no column of images (bytes), and none of {', '.join(_PATH)}: it has"
            f" {', '.join(schema.kinds)}"
        )
    return found


def label_texts(values: Sequence[Any], classes: Sequence[str], where: str) -> list[str]:
    """Labels as text, "" where unknown. Raises VggfeatError for a number that isn't among the
    classes.
    """
    texts = []
    for value in values:
        if value is None or value == "" or (isinstance(value, int) and value < 0):
            texts.append("")
        elif classes and isinstance(value, int):
            if value >= len(classes):
                raise VggfeatError(
                    f"{where} has the label {value}, and only {len(classes):,} classes"
                )
            texts.append(classes[value])
        else:
            texts.append(str(value))
    return texts


def in_order(classes: set[str]) -> list[str]:
    """Classes that no file has an order of: numbers by their value, else words as they sort."""
    if all(name.isdecimal() for name in classes):
        return sorted(classes, key=lambda name: (int(name), name))
    return sorted(classes)


def _listed(paths: Sequence[str]) -> Items:
    """The images that Parquet files list, in their order."""
    names: list[str] = []
    texts: list[str] = []
    told: list[str] = []
    order: tuple[str, ...] = ()
    for path in paths:
        columns = columns_of(path)
        above, _, name = path.rpartition("/")
        with place_of(above or ".").open(name) as file:
            table = Table(file, path)
            values = table.texts(columns.path)
            if not all(values):
                raise VggfeatError(
                    f"{path}, row {values.index(next(v for v in values if not v))}: no path in the"
                    f" column {columns.path}"
                )
            names += values
            labels = table.texts(columns.label) if columns.label else [None] * table.rows
            told += table.texts(columns.split) if columns.split else [""] * table.rows
        texts += label_texts(labels, columns.classes, path)
        if path != paths[0] and columns.classes != order:
            raise VggfeatError(
                f"{path} tells other classes than {paths[0]}: describe them into sets of their own"
            )
        order = columns.classes
    folder = paths[0].rpartition("/")[0]
    root, url, lists = _base(names, folder, paths)
    if not any(texts):
        return Items("parquet", "unlabelled", root, names, None, [], url=url, lists=lists)
    classes = list(order) or in_order(set(filter(None, texts)))
    number = {name: i for i, name in enumerate(classes)}
    label_N = np.array([number.get(text, -1) for text in texts], np.int32)
    splits = _splits(told, label_N, paths[0])
    return Items(
        "parquet",
        "single-label",
        root,
        names,
        label_N,
        classes,
        splits,
        url=url,
        lists=lists,
        remarks=remarks_on_classes(label_N, classes, splits),
    )


def _base(
    names: Sequence[str], folder: str, paths: Sequence[str]
) -> tuple[Path, str | None, list[str]]:
    """Where listed images are: root, url, lists as of `Items`. Raises VggfeatError."""
    at_urls = [is_url(name) for name in names]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise VggfeatError(f"{shown(twice)} is listed twice in {', '.join(paths[:3])}")
    if any(at_urls):
        if not all(at_urls):
            one = names[at_urls.index(False)]
            raise VggfeatError(f"{paths[0]}: {shown(one)}: either all paths are URLs, or none is")
        if is_url(paths[0]):
            refuse_own_disk(paths[0], names)
        return Path(), "", []
    if is_url(paths[0]):
        if out := next((n for n in names if n.startswith("/") or ".." in n.split("/")), None):
            raise VggfeatError(f"{paths[0]}: {shown(out)} leads out of {folder}")
        return Path(), folder, []
    return Path(folder or "."), None, [os.path.abspath(path) for path in paths]


def _splits(told: Sequence[str], label_N: np.ndarray, where: str) -> dict[str, np.ndarray]:
    if not any(told):
        return PROTOCOLS["single-label"].splits(label_N)
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for row, word in enumerate(told):
        if not word:
            continue
        part = part_named(word)
        if part is None or part[0] not in splits:
            raise VggfeatError(
                f"{where}, row {row}: the split {shown(word)} is none of train, val, test"
            )
        if label_N[row] >= 0:
            splits[part[0]].append(row)
    return {name: np.array(rows, np.int64) for name, rows in splits.items() if rows}
