"""Files that appear whole: until a file is complete, what was there before stays.

Only feature files (`writer`) and checkpoints grow or are replaced in their own way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from vggfeat.errors import VggfeatError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside this one to write to; it takes this one's place at the end, and is gone after an error.

    The ending stays, as some writers tell the format by it.
    """
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path | None, overwrite: bool = True) -> None:
    """Refuse an output file that can't be written, before the work and not after it."""
    if path is None:
        return
    if path.is_dir():
        raise VggfeatError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise VggfeatError(f"there is no folder {path.parent} to write {path.name} in")
    if path.exists() and not overwrite:
        raise VggfeatError(f"{path} exists; give --overwrite, or another --out")


def write_json(path: Path | None, value: Any) -> None:
    """Write value as JSON to path, if there is one; what JSON doesn't know is written as text."""
    if path is not None:
        write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text to a file, or to the one behind a link; VggfeatError where the disk refuses."""
    target = Path(os.path.realpath(path))
    stream = target.exists() and not target.is_file()  # a pipe, /dev/stdout: nothing is put in its place
    try:
        with nullcontext(target) if stream else whole(target) as file:
            file.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise VggfeatError(f"can't write {path}: {error}") from error
