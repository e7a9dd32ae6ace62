"""Data sets in a store: what `--root s3://bucket/photos` means.

A data set's layout is a matter of names, and of a few lists. So the names in the store are made
here as empty files in a folder of their own, the lists with what they hold, and the data set is
read from there as any other: `folder`, `imagenet`, `voc2007`, `csv` and the rest are the same
wherever they lie.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from vggfeat.datasets.items import Items
from vggfeat.errors import NoData, VggfeatError, reason
from vggfeat.place import Place, of_disk, place_of

_LISTS = (".txt", ".csv", ".tsv", ".xml", ".mat")
"""Endings, in lower case, of files that are no images and whose content counts."""
_MOST_BYTES = 1 << 28  # of a list
_THREADS = 32  # that fetch lists


def load_remote(url: str, read: Callable[[Path], Items], *, lists: bool = True) -> Items:
    """The items of a data set at a URL: of a folder, or of a CSV file. read: as of a folder here.
    lists: whether it reads texts or tables.

    Raises VggfeatError where nothing is there, the layout is none, or a name leads out of the
    folder; StorageError.
    """
    url = url.rstrip("/")
    above, _, name = url.rpartition("/")
    left_out: tuple[str, ...] = ()
    with _skeleton() as folder:
        if name.lower().endswith((".csv", ".tsv")):
            root, base = folder / name, above
            _put(folder, name, place_of(above).read(name), above)
        else:
            root, base = folder, url
            left_out = _made(place_of(url), folder, _LISTS if lists else ())
        try:
            items = read(root)
        except VggfeatError as error:
            told = str(error).replace(str(folder.resolve()), base).replace(str(folder), base)
            raise type(error)(told) from error
    if items.url is not None:  # a list of URLs
        refuse_own_disk(url, items.files or items.names)
        return replace(items, lists=[])
    for each in items.files or items.names:
        if not _inside(each):
            raise VggfeatError(f"{url} has {each!r}, which leads out of {base}: leave it out")
    remarks = (*left_out, *(remark.replace(str(folder), base) for remark in items.remarks))
    return replace(items, root=Path(), url=base, lists=[], remarks=remarks)


@contextmanager
def _skeleton() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vggfeat-names-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _made(place: Place, folder: Path, endings: tuple[str, ...]) -> tuple[str, ...]:
    """Make every file's name, and what those of these endings hold; what is to be said of keys that
    are left out.
    """
    keys = place.below()
    names = {name: size for name, size in keys.items() if _spelt_as_a_file(name)}
    # nor is what marks an empty folder; s3fs gives it without its slash
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    names = {name: size for name, size in names.items() if size or name not in folders}
    odd = sorted(keys.keys() - names.keys() - {name for name in keys if not keys[name]})
    if not names:
        raise NoData(f"there is nothing at {place.name}: no such bucket or folder, or it is empty")
    lists = [name for name in names if name.lower().endswith(endings)]
    if large := next((name for name in lists if names[name] > _MOST_BYTES), None):
        raise VggfeatError(
            f"{place.name}/{large} has {names[large]:,} bytes, more than a list may have: move it"
            " elsewhere"
        )
    for name in names.keys() - set(lists):
        _put(folder, name, b"", place.name)
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, content in zip(lists, pool.map(place.read, lists), strict=True):
            _put(folder, name, content, place.name)
    if not odd:
        return ()
    return (
        f"left out: {len(odd):,} of the keys, such as {odd[0]!r}, spelt as no file's name is; a CSV"
        " file of URLs can list them",
    )


def _spelt_as_a_file(name: str) -> bool:
    """An object store's key may be any text: such as a//b, a/./b, a/../b, /a or a/."""
    return _inside(name) and name == str(PurePosixPath(name))


def _put(folder: Path, name: str, content: bytes, where: str) -> None:
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise VggfeatError(
            f"{where} has {name!r}, which can't be a file's name here ({reason(error)}): leave it"
            " out, or list the images in a CSV file of URLs"
        ) from error


def refuse_own_disk(url: str, addresses: Sequence[str]) -> None:
    """Raise VggfeatError where a list in a store names files of this machine."""
    if out := next((each for each in addresses if of_disk(each)), None):
        raise VggfeatError(f"{url} has {out!r}, a file of this machine: leave it out")


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
