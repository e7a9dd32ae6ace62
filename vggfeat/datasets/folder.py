"""Any images: one folder a class, with or without train, val and test above; or one flat folder, no
labels.

    photos/cat/1.jpg          classes cat, dog …; three random splits, 80% train (a fifth of it val)
    photos/train/cat/1.jpg    classes cat, dog …; the splits are the folders (`splits.parts_among`)
    photos/1.jpg              unlabelled

What is an image is decided by its extension alone: a damaged file keeps its row, and extraction
reports it. Hidden files and folders are skipped, and all that is left out is counted. Folders
inside a class folder belong to the class, unless all class folders hold the same ones: then they
are refused, as parts of the data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vggfeat.checked import shown
from vggfeat.datasets.download import need_root
from vggfeat.datasets.items import Items, remarks_on_classes
from vggfeat.datasets.protocol import PROTOCOLS
from vggfeat.datasets.splits import part_named, parts_among
from vggfeat.errors import VggfeatError, reason

# Compared in lower case.
IMAGE_EXTENSIONS = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
        ".pgm",
    )
)
# Pictures that aren't taken by their extension: those that Pillow can't read, and those that it
# can.
_UNREADABLE = frozenset(
    (
        ".heic",
        ".heif",
        ".svg",
        ".raw",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".dng",
        ".orf",
        ".rw2",
        ".raf",
        ".jxl",
        ".pdf",
    )
)
_READABLE = frozenset(
    (
        ".avif",
        ".jp2",
        ".j2k",
        ".psd",
        ".tga",
        ".ico",
        ".pcx",
        ".pbm",
        ".pnm",
        ".mpo",
        ".apng",
    )
)
_MOST_ENDINGS, _MOST_NAMES = 4, 3  # that a sentence names


@dataclass
class LeftOut:
    """What lies among the images and isn't taken, so that it can be told in one sentence.

    kinds: what -> how many, and the first of them by name. endings: the same, of files that are no
    images by theirs. used: names that are taken in another way, and aren't counted.
    """

    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)
    endings: dict[str, tuple[int, str]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def add(self, kind: str, name: str) -> None:
        """One more of a kind; "{s}" stands in it where the plural has an s."""
        if name not in self.used:
            _count(self.kinds, kind, name)

    def add_file(self, name: str) -> None:
        """One more file without an image's ending."""
        if name not in self.used:
            _count(self.endings, os.path.splitext(name)[1].lower(), name)

    def remarks(self) -> tuple[str, ...]:
        """As `Items.remarks`: none or one sentence."""
        clauses = []
        if self.endings:
            by_number = sorted(self.endings.items(), key=lambda item: (-item[1][0], item[0]))
            named = [f"{_ending(ending)} {n:,}" for ending, (n, _) in by_number[:_MOST_ENDINGS]]
            if rest := sum(n for _, (n, _) in by_number[_MOST_ENDINGS:]):
                named.append(f"others {rest:,}")
            total = sum(n for n, _ in self.endings.values())
            what = (
                f"{total:,} file{'s' * (total > 1)} without an image's ending ({', '.join(named)})"
            )
            clauses.append(f"{what}, for example {short(by_number[0][1][1])}")
        for kind, (n, first) in self.kinds.items():
            clauses.append(
                f"{n:,} {kind.replace('{s}', 's' * (n > 1))}{', for example' if n > 1 else ':'}"
                f" {short(first)}"
            )
        if unread := sorted(_UNREADABLE & self.endings.keys()):
            clauses.append(
                f"to have pictures of {' '.join(unread)} described, save them as JPEG or PNG"
            )
        if (_READABLE | {""}) & self.endings.keys():
            clauses.append("a CSV file may list pictures of any ending")
        return ("left out: " + "; ".join(clauses),) if clauses else ()


def _count(counts: dict[str, tuple[int, str]], key: str, name: str) -> None:
    n, first = counts.get(key, (0, name))
    counts[key] = n + 1, min(first, name)


def _ending(ending: str) -> str:
    """As it may be shown: files have endings of any length, with spaces in them."""
    if not ending:
        return "no ending"
    return (
        ending
        if len(ending) <= 12 and ending.isprintable() and " " not in ending
        else shown(ending)
    )


def short(name: str) -> str:
    """A name as a sentence may have it."""
    return name if len(name) <= 60 else "…" + name[-59:]


def load(root: Path | None) -> Items:
    """The images under `root`, in sorted order of class, then name.

    labels: (N,) int32, or None for a flat folder.
    Raises VggfeatError when the layout is none of the three above, or a class folder has no images.
    """
    root = need_root("folder", root, "the folder that holds one folder of images per class")
    if root.is_file():
        raise VggfeatError(
            f"{root.absolute()} is a file: give the folder that holds the images; a CSV file that"
            " lists them is read with `dataset` csv"
        )
    left = LeftOut()
    folders, images = children(root, left)
    if not folders:
        if not images:
            raise VggfeatError(
                _and_left(f"no images and no class folders in {root.absolute()}", left)
            )
        return Items("folder", "unlabelled", root, images, None, [], remarks=left.remarks())

    part_of = parts_among(folders)
    others = [name for name in folders if name not in part_of]
    if part_of and not others:
        for name in images:
            left.add(f"image{{s}} beside {_names(part_of)}", name)
        return read_splits("folder", root, one_folder_each(root, part_of), left)
    parts = set(part_of.values())
    # a class may be called so, as VOC's trains are; but then it holds images
    if ("train" in parts and len(parts) > 1) or any(
        _holds_folders(root / name) for name in part_of
    ):
        raise VggfeatError(
            f"{root.absolute()} holds {_names(part_of)}, as a split data set does, beside"
            f" {_names(others)}: move one or the other elsewhere, or rename what is a split train,"
            " val or test; if all are classes, list the images in a CSV file instead"
        )
    images_of = class_images(root, left=left)
    classes = sorted(images_of)
    labels = np.repeat(
        np.arange(len(classes), dtype=np.int32), [len(images_of[name]) for name in classes]
    )
    names = [name for label in classes for name in images_of[label]]
    splits = class_splits(labels)
    remarks = left.remarks() + remarks_on_classes(labels, classes, splits)
    if part_of:
        remarks += (
            (
                f"taken for classes: {_names(part_of)}, with images directly inside, beside"
                f" {_names(others)}; what is none belongs elsewhere than in {root.absolute()}"
            ),
        )
    return Items("folder", "single-label", root, names, labels, classes, splits, remarks=remarks)


def class_splits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """The splits of a folder of classes, by its labels (N,): `pretrain.train` learns from split0's
    train and val.
    """
    return PROTOCOLS["single-label"].splits(labels)


def one_folder_each(root: Path, part_of: Mapping[str, str]) -> dict[str, str]:
    """Part -> its folder under root, of folder -> part; in the order train, val, test.

    A folder that holds nothing but one of the same name, as archives unpack, stands for that one.
    Raises VggfeatError where a part has two folders, or isn't clear.
    """
    folder_of: dict[str, str] = {}
    for name, part in part_of.items():
        if part == "eval":
            raise VggfeatError(
                f"{(root / name).absolute()} may be for validation or for test: rename it val or"
                " test"
            )
        if (other := folder_of.setdefault(part, name)) != name:
            raise VggfeatError(
                f"{root.absolute()} holds both {other} and {name}, for {part}: keep one of them"
            )
        inner, images = children(root / name)
        if len(inner) == 1 and not images and part_named(inner[0]) == part_named(name):
            folder_of[part] = f"{name}/{inner[0]}"
    return {part: folder_of[part] for part in ("train", "val", "test") if part in folder_of}


def read_splits(
    dataset: str,
    root: Path,
    folder_of: dict[str, str],
    left: LeftOut,
    sorted_of: Mapping[str, dict[str, list[str]]] | None = None,
) -> Items:
    """Items of ROOT/SPLIT/CLASS/IMAGE: split after split, then by class and name.

    folder_of: split -> its folder's name under root. The classes are those of "train" if it is
    among them. left: takes what is left out there, beside what it has. sorted_of: of a split whose
    folder is flat, class -> its image names, relative to root.
    Raises VggfeatError when another split has a class that "train" lacks, or two splits are one
    folder.
    """
    refuse_links(root, list(folder_of.values()))
    images_of = {
        split: (sorted_of or {}).get(split) or class_images(root, folder, left)
        for split, folder in folder_of.items()
    }
    classes = sorted(
        images_of["train"] if "train" in images_of else set().union(*images_of.values())
    )
    label_of = {name: label for label, name in enumerate(classes)}
    names: list[str] = []
    labels: list[int] = []
    splits: dict[str, np.ndarray] = {}
    for split, images_of_class in images_of.items():
        start = len(names)
        for name in sorted(images_of_class):
            if name not in label_of:
                where = (root / folder_of[split] / name).absolute()
                raise VggfeatError(
                    f"{where} has no class of the same name in {folder_of['train']}: rename or"
                    " move it"
                )
            names += images_of_class[name]
            labels += [label_of[name]] * len(images_of_class[name])
        splits[split] = np.arange(start, len(names), dtype=np.int64)
    label_array = np.array(labels, np.int32)
    remarks = left.remarks() + remarks_on_classes(label_array, classes, splits)
    return Items(
        dataset, "single-label", root, names, label_array, classes, splits, remarks=remarks
    )


def class_images(root: Path, inside: str = "", left: LeftOut | None = None) -> dict[str, list[str]]:
    """Class -> its sorted image names, relative to `root`, from one folder a class in `root /
    inside`.

    left: takes what is left out; of `root` itself, its caller has told.
    Raises VggfeatError when there are no class folders, images lie beside them, one has no images
    or is a link to another, or when the folders seem to be parts of the data set.
    """
    where = root / inside
    left = LeftOut() if left is None else left
    folders, images = children(where, left if inside else None, inside)
    if not folders:
        raise VggfeatError(
            f"no class folders in {where.absolute()}: put its images in one folder per class"
            + (f", or move {inside} elsewhere to use the rest" if inside else "")
        )
    if images:
        raise VggfeatError(
            f"{where.absolute()} holds images ({images[0]}) beside folders ({folders[0]}): "
            "move the images into a class folder or elsewhere"
        )
    images_of: dict[str, list[str]] = {}
    inner_of: dict[str, set[str]] = {}
    refuse_links(where, folders)
    for name in folders:
        images_of[name], inner = _images_under(where / name, _joined(inside, name), left)
        if images_of[name]:
            inner_of[name] = inner
    _refuse_parts(where, inner_of, inside)
    for name in folders:
        if not images_of[name]:
            own = LeftOut()
            _images_under(where / name, _joined(inside, name), own)
            where = where.absolute() / name
            raise VggfeatError(
                _and_left(f"no images in the class folder {where}: add some or remove it", own)
            )
    return images_of


def _refuse_parts(where: Path, inner_of: Mapping[str, set[str]], inside: str) -> None:
    """Raise VggfeatError where the folders that were taken for classes hold the classes, or parts
    of them.

    inner_of: class folder with images -> the folders in it, none where images lie beside them.
    """
    if not inner_of or not all(inner_of.values()):
        return
    names, shared = sorted(inner_of), sorted(set.intersection(*inner_of.values()))
    if len(shared) < 2:
        return
    if len(names) == 1:
        what = (
            f"move them into {where.absolute()}"
            if inside
            else f"give `root` {where.absolute() / names[0]}"
        )
        raise VggfeatError(
            f"of the folders in {where.absolute()} only {names[0]} has images, in the folders"
            f" {_names(shared)}: if those are the classes, {what}"
        )
    held = f"{_names(names)} in {where.absolute()} hold the same folders, {_names(shared)}"
    if len(parts_among(shared)) == len(shared):
        raise VggfeatError(f"{held}: put those above the classes, as in {shared[0]}/{names[0]}")
    above = "" if inside else "give `root` one part, name the parts train, val and test, or "
    raise VggfeatError(
        f"{held}: if those are the classes, {above}move all images of a class into one folder; if"
        " not, list the images with their classes in a CSV file"
    )


def refuse_links(where: Path, folders: Sequence[str]) -> None:
    """Raise VggfeatError where one of the folders in `where` is a link to a folder that holds it,
    or to another.

    As a class or a split it would have the images of others.
    """
    above = Path(os.path.realpath(where))
    seen: dict[str, str] = {}
    for name in folders:
        real = os.path.realpath(where / name)
        if above.is_relative_to(real):
            raise VggfeatError(
                f"{(where / name).absolute()} is a link to a folder that holds it: remove it"
            )
        if (other := seen.setdefault(real, name)) != name:
            raise VggfeatError(
                f"{other} and {name} in {where.absolute()} are the same folder: remove one"
            )


def children(
    folder: Path, left: LeftOut | None = None, prefix: str = ""
) -> tuple[list[str], list[str]]:
    """Names of the folders and of the images directly in `folder`, each sorted; links are followed.

    left: takes the rest, under names that begin with `prefix`.
    Raises VggfeatError when `folder` is not a folder or can't be listed.
    """
    left = LeftOut() if left is None else left
    folders, images = [], []
    for entry in _entries(folder, left, prefix):
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            folders.append(entry.name)
        elif _is_image(entry):
            images.append(entry.name)
        else:
            _leave(entry, left, prefix)
    return sorted(folders), sorted(images)


def images_under(root: Path) -> tuple[list[str], tuple[str, ...]]:
    """All images in a folder and the folders inside it, whatever their layout: sorted names,
    relative to it; and sentences of what was left out. Raises VggfeatError where there is none.
    """
    left = LeftOut()
    names, _ = _images_under(root, "", left)
    if not names:
        raise VggfeatError(_and_left(f"no images in the folder {root.absolute()}", left))
    return names, left.remarks()


def _images_under(folder: Path, prefix: str, left: LeftOut) -> tuple[list[str], set[str]]:
    """Sorted names, each `prefix`/… where there is one, of all images in `folder` and the folders
    inside it; and the folders in `folder`.

    Of the latter none, if images lie beside them. Linked folders inside are not entered: they could
    lead back up for ever.
    """
    names: list[str] = []
    inner: set[str] | None = None
    stack: list[tuple[str | Path, str]] = [(folder, prefix)]
    while stack:
        where, prefix = stack.pop()
        for entry in _entries(where, left, prefix):
            if entry.is_dir(follow_symlinks=False):
                stack.append((entry.path, _joined(prefix, entry.name)))
            elif _is_image(entry):
                names.append(_joined(prefix, entry.name))
            else:
                _leave(entry, left, prefix)
        if inner is None:
            inner = set() if names else {inside.rsplit("/", 1)[-1] for _, inside in stack}
    return sorted(names), inner or set()


def _entries(folder: str | Path, left: LeftOut, prefix: str) -> list[os.DirEntry[str]]:
    """What is in the folder and not hidden."""
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except FileNotFoundError:
        raise VggfeatError(f"no folder {os.path.abspath(folder)}: check `root`") from None
    except OSError as error:
        raise VggfeatError(
            f"can't list the folder {os.path.abspath(folder)}: {reason(error)}"
        ) from error
    for entry in entries:
        if entry.name.startswith("."):
            left.add("hidden file{s} or folder{s}", _joined(prefix, entry.name))
    return [entry for entry in entries if not entry.name.startswith(".")]


def _leave(entry: os.DirEntry[str], left: LeftOut, prefix: str) -> None:
    """Count what is neither an image nor a folder to enter."""
    name = _joined(prefix, entry.name)
    if os.path.splitext(entry.name)[1].lower() not in IMAGE_EXTENSIONS and entry.is_file():
        left.add_file(name)
    else:
        left.add("linked folder{s}" if os.path.isdir(entry.path) else "pipe{s} or device{s}", name)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _holds_folders(folder: Path) -> bool:
    """Whether there are folders in it and no images beside them."""
    folders, images = children(folder)
    return bool(folders) and not images


def _names(names: Iterable[str]) -> str:
    """Some names, as a sentence may have them."""
    listed = [short(name) for name in names]
    return ", ".join(listed[:_MOST_NAMES]) + (" …" if len(listed) > _MOST_NAMES else "")


def _and_left(message: str, left: LeftOut) -> str:
    """message, and what was left out where nothing else was found."""
    return "; ".join((message, *left.remarks()))


def _is_image(entry: os.DirEntry[str]) -> bool:
    """A file, or a link to one, with an image's extension.

    A dangling link counts, so that extraction reports it; a pipe or a device doesn't: reading it
    could hang.
    """
    if os.path.splitext(entry.name)[1].lower() not in IMAGE_EXTENSIONS:
        return False
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()
