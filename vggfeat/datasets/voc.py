"""PASCAL VOC 2007 and 2012 classification: the devkit's image sets and its per-class labels.

    VOCdevkit/VOC2007/ImageSets/Main/train.txt              000012
    VOCdevkit/VOC2007/ImageSets/Main/aeroplane_train.txt    000012 -1
    VOCdevkit/VOC2007/JPEGImages/000012.jpg

Labels stay as the lists have them: 1 present, -1 absent, 0 when every object of the class in the
image is marked difficult. The 2012 test lists have no labels (they are on the server): those rows
are zeros.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from vggfeat.checked import read_text, shown
from vggfeat.datasets.download import downloading, need_root
from vggfeat.datasets.items import Items
from vggfeat.datasets.protocol import protocol_of, remarks_on
from vggfeat.errors import NoData, VggfeatError
from vggfeat.files import refuse_filled, whole_folder

# Alphabetical, as in the devkit's VOCinit.m.
CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *(
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
]


def load(root: Path | None, *, year: int) -> Items:
    """VOC `year`, all its images sorted by id, with splits "train", "val" and, where listed,
    "test".

    root: the folder that holds VOCdevkit, or VOCdevkit, or the VOC2007 (VOC2012) folder in it.
    labels: (N, 20) int8. Test rows are zeros when there is no CLASS_test.txt at all.
    Raises VggfeatError naming the list, and the line, that is missing, malformed or contradicts
    another.
    """
    root = need_root(f"voc{year}", root, "the folder that holds VOCdevkit")
    return _read(devkit(root, year), year)


_MAIN = Path("ImageSets", "Main")


def devkit(root: Path, year: int, lists: Path = _MAIN) -> Path:
    """The VOC<year> folder at or under root. lists: a folder that it must hold."""
    candidates = [root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}"]
    # A folder of another year would load without complaint, and be scored by the wrong year's
    # rules.
    if root.absolute().name == f"VOC{year}" or not re.fullmatch(r"VOC\d{4}", root.absolute().name):
        candidates.append(root)
    for folder in candidates:
        if (folder / lists).is_dir():
            return folder
    looked = " or ".join(str(folder.absolute() / lists) for folder in candidates)
    raise NoData(
        f"no folder {looked}: give `root` the folder that holds VOCdevkit, or add `download`"
    )


def _read(folder: Path, year: int) -> Items:
    lists = folder / "ImageSets" / "Main"
    ids_of = {split: _read_ids(lists / f"{split}.txt") for split in ("train", "val")}
    if (lists / "test.txt").exists():
        ids_of["test"] = _read_ids(lists / "test.txt")
    ids = sorted(set().union(*ids_of.values()))
    if len(ids) != sum(map(len, ids_of.values())):
        raise VggfeatError(
            f"{lists}: an image is in two of {', '.join(f'{s}.txt' for s in ids_of)}; they must"
            " differ"
        )

    row_of = {image: row for row, image in enumerate(ids)}
    labels = np.zeros((len(ids), len(CLASSES)), np.int8)
    for split, split_ids in ids_of.items():
        if split == "test" and not any((lists / f"{name}_test.txt").exists() for name in CLASSES):
            continue
        for column, name in enumerate(CLASSES):
            value_of = _read_labels(lists / f"{name}_{split}.txt", split_ids)
            for image, value in value_of.items():
                labels[row_of[image], column] = value

    splits = {s: np.array(sorted(row_of[i] for i in part), np.int64) for s, part in ids_of.items()}
    unlisted = [] if "test" in ids_of else [path.name for path in sorted(lists.glob("*_test.txt"))]
    return Items(
        dataset=f"voc{year}",
        protocol=f"voc{year}",
        root=folder,
        names=[f"JPEGImages/{image}.jpg" for image in ids],
        labels=labels,
        classes=list(CLASSES),
        splits=splits,
        lists=[str(path.relative_to(folder)) for path in sorted(lists.glob("*.txt"))],
        remarks=(
            *(
                f"left out: the test images, of which {name} tells, as there is no test.txt"
                for name in unlisted[:1]
            ),
            *remarks_on(f"voc{year}", len(CLASSES), splits),
        ),
    )


def lines(path: Path) -> list[tuple[int, list[str]]]:
    """Of a list: line number and words of each line that isn't blank."""
    hint = "the copy is incomplete; unpack the archive again, or add `download`"
    text = read_text(path.absolute(), "file", hint, errors="surrogateescape")
    return [(n, words) for n, line in enumerate(text.split("\n"), 1) if (words := line.split())]


def _read_ids(path: Path) -> set[str]:
    ids: set[str] = set()
    for n, words in lines(path):
        if len(words) != 1 or "/" in words[0] or "\0" in words[0]:
            raise VggfeatError(
                f"{path}, line {n}: expected one image id, found {shown(' '.join(words))}"
            )
        if words[0] in ids:
            raise VggfeatError(f"{path}, line {n}: image {shown(words[0])} is listed twice")
        ids.add(words[0])
    return ids


def _read_labels(path: Path, ids: set[str]) -> dict[str, int]:
    """Image id -> 1, 0 or -1, for exactly the ids of the split's own list."""
    value_of: dict[str, int] = {}
    for n, words in lines(path):
        if len(words) != 2 or words[1] not in ("1", "0", "-1"):
            found = shown(" ".join(words))
            raise VggfeatError(
                f"{path}, line {n}: expected an image id and 1, 0 or -1, found {found}"
            )
        image = words[0]
        if image in value_of or image not in ids:
            wrong = (
                "is listed twice"
                if image in value_of
                else f"is not in {path.name.rsplit('_', 1)[1]}"
            )
            raise VggfeatError(f"{path}, line {n}: image {shown(image)} {wrong}")
        value_of[image] = int(words[1])
    if len(value_of) < len(ids):
        raise VggfeatError(
            f"{path}: no label for {len(ids) - len(value_of)} images, first"
            f" {min(ids - value_of.keys())}"
        )
    return value_of


def _whole(read: Callable[[], Items], year: int) -> bool:
    """Whether nothing is left to download: all that is read is there, and every image a file."""
    try:
        items = read()
    except VggfeatError:
        return False
    has_lists = year != 2007 or "test" in items.splits
    # The 2012 archive lists no test images; a copy that does may hold them or not.
    rows = (
        range(len(items))
        if year == 2007
        else np.concatenate([items.splits[s] for s in ("train", "val")])
    )
    return has_lists and all(os.path.isfile(str(items.source(int(row)))) for row in rows)


def fetch(root: Path, *, year: int, read: Callable[[Path], Items] | None = None) -> None:
    """Leave ROOT/VOCdevkit/VOC<year>, unless it is there whole, and the archives beside VOCdevkit
    (an interrupted run reuses them). read: what of it is wanted; default: `load`.
    """
    if _whole(partial(read, root) if read else partial(load, root, year=year), year):
        return
    base = root.absolute()
    if base.name == f"VOC{year}" and base.parent.name == "VOCdevkit":
        base = base.parent
    if base.name == "VOCdevkit":
        base = base.parent
    with downloading(f"voc{year}", base):
        from torchvision.datasets import VOCDetection

        for image_set in ("trainval", "test") if year == 2007 else ("trainval",):
            VOCDetection(base, year=str(year), image_set=image_set, download=True)


@dataclass(frozen=True)
class _Form:
    """Of the devkit's result files. action: an item is an object in an image; else an image."""

    competition: str
    action: bool = False


# comp2 and comp10 are the competitions for methods trained on any data, as every network trained on
# ILSVRC is.
_FORMS = {"voc2012action": _Form("comp10_action_test", True)}
_CLASSIFICATION = _Form("comp2_cls_test")


def check_submission(
    directory: Path,
    rows: Sequence[int] | np.ndarray,
    classes: Sequence[str],
    names: Sequence[str],
    protocol: str = "voc2012",
) -> None:
    """Raise VggfeatError unless a submission can be written there: a free folder, names that the
    format can hold.

    Arguments as of `write_submission`.
    """
    refuse_filled(directory)
    form = _FORMS.get(protocol, _CLASSIFICATION)
    for name in classes:
        if "/" in name or "\0" in name or len(_file(form, name)) > 255:
            raise VggfeatError(
                f"a submission has a file of each class, and {shown(name)} can't be a file's name"
            )
    identifiers = [_identifier(form, names[row]) for row in rows]
    if len(set(identifiers)) != len(identifiers):
        raise VggfeatError("two test images have the same name without folder and suffix")
    for identifier in identifiers:
        if len(identifier.split()) != 1 + form.action:
            raise VggfeatError(
                f"a line of a submission is a name and a score: the image {shown(identifier)} has a"
                " space in it"
            )


def _file(form: _Form, name: str) -> bytes:
    """The name of a class's file."""
    return os.fsencode(f"{form.competition}_{name}.txt")


def _identifier(form: _Form, name: str) -> str:
    """How a line begins: the image's name without folder and suffix; of a person with the object's
    number.
    """
    if form.action:
        image, _, number = name.rpartition("#")
        return f"{PurePosixPath(image).stem} {number}"
    return PurePosixPath(name).stem


def write_submission(
    directory: str | Path,
    rows: Sequence[int] | np.ndarray,
    scores_NK: np.ndarray,
    classes: Sequence[str],
    names: Sequence[str],
    protocol: str = "voc2012",
) -> list[Path]:
    """Write the devkit's result files into `directory`, one for each class: comp2_cls_test_<class>
    .txt, or, of protocol voc2012action, comp10_action_test_<class>.txt.

    The evaluation server wants them under results/VOC2012/Main/ (Action/) of an archive. Each line
    is an image's identifier (its name without folder and suffix), of an action the number of the
    object, and its score with six decimals. A class that the protocol's figures leave out has no
    file, as the devkit writes and scores none for "other".

    directory: must not exist or be empty; it appears only when all files are complete.
    rows, scores_NK: n rows of the dataset and their (n, K) scores. names: of all the dataset's
    images. Returns the files. Raises VggfeatError: see `check_submission`; wrong shapes, NaN, a
    disk that refuses.
    """
    target, scores = Path(directory).resolve(), np.asarray(scores_NK)
    if scores.shape != (len(rows), len(classes)):
        raise VggfeatError(
            f"scores {scores.shape} don't match {len(rows)} images and {len(classes)} classes"
        )
    if not np.isfinite(scores).all():
        raise VggfeatError("scores hold NaN or infinity, which the evaluation server can't read")
    check_submission(target, rows, classes, names, protocol)
    form, left_out = _FORMS.get(protocol, _CLASSIFICATION), protocol_of(protocol).left_out
    identifiers = [_identifier(form, names[row]) for row in rows]
    file_of = {
        k: Path(os.fsdecode(_file(form, name)))
        for k, name in enumerate(classes)
        if name not in left_out
    }
    with whole_folder(target) as complete:
        for k, file in file_of.items():
            lines_of_class = [
                f"{identifier} {score:.6f}\n"
                for identifier, score in zip(identifiers, scores[:, k], strict=True)
            ]
            (complete / file).write_bytes(os.fsencode("".join(lines_of_class)))
    return [target / file for file in file_of.values()]
