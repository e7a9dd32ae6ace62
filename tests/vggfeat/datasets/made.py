"""Made-up trees and lists, and what a test says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vggfeat.datasets import Items, load
from vggfeat.datasets.voc import CLASSES
from vggfeat.errors import VggfeatError

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data")


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def fails(name: str, root: Path | None, *expected: str, download: bool = False) -> None:
    """Loading fails with one line that holds every expected piece."""
    with pytest.raises(VggfeatError) as caught:
        load(name, root, download=download)
    message = str(caught.value)
    assert "\n" not in message
    for piece in expected:
        assert piece in message, message


def sizes(items: Items) -> dict[str, int]:
    return {name: len(rows) for name, rows in items.splits.items()}


def make_voc(
    folder: Path, lists: dict[str, list[str]], labelled: tuple[str, ...] = ("train", "val")
) -> Path:
    """A small devkit: every image shows class number (its own number modulo 20). Gives
    ImageSets/Main.
    """
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True)
    for split, ids in lists.items():
        (main / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for c, name in enumerate(CLASSES):
            if split in labelled:
                lines = (f"{i} {' 1' if int(i[-6:]) % 20 == c else '-1'}\r\n" for i in ids)
                (main / f"{name}_{split}.txt").write_text("".join(lines))
    return main


CLASSES_IN = ("cat/1.jpg", "dog/2.jpg")


def tree(root: Path, *folders: str, names: tuple[str, ...] = CLASSES_IN) -> Path:
    touch(root, *(f"{folder}/{name}" for folder in folders for name in names))
    return root


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "data.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path
