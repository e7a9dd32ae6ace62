"""Fetching an archive through torchvision, which checks its MD5, with one-line failures."""

from __future__ import annotations

import contextlib
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from vggfeat.errors import VggfeatError


@contextlib.contextmanager
def downloading(dataset: str, root: Path) -> Iterator[None]:
    """Run torchvision's downloader inside: `root` exists, stdout stays clean, failures are
    VggfeatError.

    Archives are unpacked with Python's data filter: nothing outside of `root`, no devices, no
    set-user bits.
    """
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # stdout belongs to results; torchvision has printed there in several versions.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    # URLError, RuntimeError (checksum), tarfile and zip errors, a full disk …
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise VggfeatError(
            f"could not download {dataset} into {root.absolute()}: {reason}; try again, "
            "or fetch its official archive yourself and give `root` the folder it is unpacked in"
        ) from error
    finally:
        tarfile.TarFile.extraction_filter = before


def need_root(dataset: str, root: Path | None, what: str) -> Path:
    """`root`, or a VggfeatError that says what to give."""
    if root is None:
        raise VggfeatError(f"{dataset} needs `root`: {what}")
    return root
