"""A stranger's weights file -> its tensors by name, and what it says of itself; what is no such
file is named.

Told by its first bytes, not by its ending: safetensors, PyTorch's pickles (`.pth`, `.pt`, `.tar`,
`.ckpt`, `.bin`), Caffe's `.caffemodel`. No code of a file is ever run: a pickle may name plain
tensors and values only. A training's checkpoint holds more than the net: its state dict is taken
out, and metadata tell so ("unwrapped").
"""

from __future__ import annotations

import codecs
import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from torch import Tensor

from vggfeat.caffe import read_caffemodel
from vggfeat.checked import fitted, parse_json, regular, shown
from vggfeat.errors import VggfeatError
from vggfeat.table1 import MOST_PARAMETERS

MOST_HEADER = 16 << 20  # bytes of the names, shapes and metadata in a file
MOST_STEPS = 1_000_000  # of the pickle in a .pth file; a state dict takes about twenty a tensor
ENDINGS = (
    ".safetensors",
    ".pth",
    ".pt",
    ".tar",
    ".ckpt",
    ".bin",
    ".caffemodel",
    ".h5",
    ".hdf5",
    ".mat",
    ".pkl",
)
# What the pickle of a state dict, and of plain values beside it, names, and nothing else:
# weights_only allows much that takes memory or isn't dense.
_PLAIN = {
    "collections OrderedDict",
    "collections Counter",
    "torch Size",
    "torch device",
    *(f"torch {name}" for name in ("float16", "bfloat16", "float32", "float64", "int64")),
    *(
        f"torch._utils {name}"
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    ),
    *(
        f"torch {name}Storage"
        for name in ("Half", "BFloat16", "Float", "Double", "Byte", "Int", "Long", "Bool")
    ),
}
# what trainings call the net's part of a checkpoint
_NETS_OWN = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
)
# What the pickle of a quantised tensor names
_QUANTISED = re.compile(
    r"torch\.((Char|QInt8|QUInt8|QInt32)Storage|_utils\._rebuild_qtensor|per_\w+_affine|u?int8|q(u?int8|int32))"
)
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # the first pickle of PyTorch's old format
_CONVERT = "docs/weights.md has the lines of Python that make a .safetensors file of it"
# First bytes -> what a file is that is often taken for weights, and what to do.
_OTHERS = (
    (b"vggfeat", "is a feature file or a model of this program, not weights"),
    (b"MATLAB 5.0 MAT-file", f"is a MATLAB file, as of MatConvNet: {_CONVERT}"),
    (
        b"MATLAB 7.3 MAT-file",
        f"is a MATLAB file of version 7.3: save it with -v7 in MATLAB; {_CONVERT}",
    ),
    (b"\x89HDF\r\n\x1a\n", f"is an HDF5 file, as of Keras: {_CONVERT}"),
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the weights: run `git lfs pull` where it comes from",
    ),
    *(
        (start, "is a git-annex pointer, not the weights: run `git annex get` where it comes from")
        for start in (b"/annex/objects/", b".git/annex/objects/", b"../.git/annex/objects/")
    ),
    (b"\x1f\x8b", "is a gzip archive: unpack it, and give the file in it"),
    (b"BZh", "is a bzip2 archive: unpack it, and give the file in it"),
    (b"\xfd7zXZ", "is an xz archive: unpack it, and give the file in it"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it, and give the file in it"),
    (b"Rar!", "is a RAR archive: unpack it, and give the file in it"),
    (b"\x28\xb5\x2f\xfd", "is a zstd archive: unpack it, and give the file in it"),
    (b"\x93NUMPY", "is a NumPy array, not weights by their names"),
)
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", re.I)
_PROTOTXT = re.compile(r"^\s*layers?\s*\{", re.M)
_NEW_DOWNLOAD = "the download needs another address, or a login; fetch the file itself"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a weights file; of most files the values are only mapped, not yet
    read.

    Raises VggfeatError: no such file; no weights, and what it is instead; a header that is damaged
    or unsound; anything but dense tensors by name.
    """
    size = regular(path, "weights file")
    with _unreadable(path):
        with open(path, "rb") as file:
            head = file.read(1024)
            kind = _kind(path, head, size)
            if kind == "caffemodel":
                return read_caffemodel(file, size)
            if kind == "pickle":
                return _read_pickle(path, file, size)
        with opened(path) as tensors:
            found = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
            return found, _metadata(tensors, path)


def _kind(path: Path, head: bytes, size: int) -> str:
    """safetensors, pickle or caffemodel. Raises VggfeatError for anything else."""
    if not size:
        raise VggfeatError(f"{path} is empty: the download has failed, or hasn't ended")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "safetensors"
    for start, what in _OTHERS:
        if head.startswith(start):
            raise VggfeatError(f"{path} {what}")
    if _WEB_PAGE.match(head):
        raise VggfeatError(f"{path} is a web page, not weights: {_NEW_DOWNLOAD}")
    if head[257:262] == b"ustar":
        raise VggfeatError(f"{path} is a tar archive: unpack it, and give the file in it")
    if head.startswith(b"PK\x03\x04"):
        return "pickle"
    if text := _text(head):
        if path.suffix == ".prototxt" or _PROTOTXT.search(text):
            raise VggfeatError(
                f"{path} is text for Caffe, which describes a net or its training: give the"
                " .caffemodel beside it"
            )
        raise VggfeatError(
            f"{path} is text, not weights: it begins with {shown(text)}; if it was fetched,"
            f" {_NEW_DOWNLOAD}"
        )
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and b"pytorch" in head):
        raise VggfeatError(
            f"{path} is an ONNX graph: give the state dict that it was exported from"
        )
    if path.suffix == ".safetensors":  # a damaged one, of which the library knows more
        return "safetensors"
    if head[:1] == b"\x80":
        return "pickle"
    if path.suffix == ".caffemodel" or head[:1] in (b"\n", b"\x12", b"\xa2"):
        return "caffemodel"
    raise VggfeatError(
        f"{path} is no weights file that is known (safetensors, PyTorch, Caffe), or is damaged: "
        f"it begins with {shown(head[:8])}"
    )


def _text(head: bytes) -> str:
    """The first bytes of a file as text; empty where they aren't."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last letter may be cut
    except UnicodeDecodeError:
        return ""
    return text if all(letter.isprintable() or letter in "\r\n\t" for letter in text) else ""


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except VggfeatError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's advice for it has a page, and would run the file's code
        raise VggfeatError(f"{path} can't be read as weights: its pickle is damaged") from error
    except Exception as error:  # the readers raise whatever a broken file makes them raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VggfeatError(f"{path} can't be read as weights: {reason}") from error


# --- safetensors ----------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A .safetensors file whose header is of a sane length; the library compares it with the file's
    own length.

    Raises OSError for a file that can't be opened, which the library would call missing;
    ValueError, SafetensorError.
    """
    with open(path, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        if length > MOST_HEADER:
            raise ValueError(f"its header claims {length:,} bytes")
        start, there = raw.read(length), os.fstat(raw.fileno()).st_size
        if len(start) < length or 8 + length + _end_of_values(start) > there:
            raise ValueError("it is cut off: fetch or save it again")
        with safetensors.safe_open(_unicode_name(path, raw), framework="pt") as file:
            yield file


def _end_of_values(header: bytes) -> int:
    """Behind the header, in bytes; 0 where it isn't one, which the library tells."""
    with suppress(VggfeatError, UnicodeDecodeError):
        named = fitted(parse_json(header.decode(), "header"), dict[str, dict[str, Any]], "header")
        offsets = [
            tensor.get("data_offsets") for name, tensor in named.items() if name != "__metadata__"
        ]
        return max(
            (pair[1] for pair in fitted(offsets, list[list[int]], "offsets") if len(pair) == 2),
            default=0,
        )
    return 0


def _unicode_name(path: Path, file: IO[bytes]) -> str:
    """A name of an open file that libraries take, which want Unicode."""
    try:
        return os.fspath(path) if os.fspath(path).encode() else ""
    except UnicodeEncodeError:
        return f"/dev/fd/{file.fileno()}"


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file. Raises VggfeatError: no such file, a damaged one,
    metadata that can't be.
    """
    regular(path, "weights file")
    with _unreadable(path), opened(path) as file:
        return _metadata(file, path)


def _metadata(file: Any, path: Path) -> dict[str, str]:
    """The strings of an open file, those that are kept for the record checked; a net's own are by
    who builds it.
    """
    metadata = dict(file.metadata() or {})
    for key in ("recipe", "errors"):
        where = f"{path}: the metadata's {key}"
        record = fitted(parse_json(metadata.get(key) or "{}", where), dict[str, Any], where)
        fitted(record.get("seed", 0), int, f"{where}'s seed")
    scale = metadata.get("train_scale", "")
    if not re.fullmatch(r"([0-9]{1,5}(-[0-9]{1,5})?)?", scale):
        raise VggfeatError(
            f"{path}: the metadata's train_scale must be as 256 or 256-512, not {scale!r:.60}"
        )
    return metadata


# --- PyTorch's pickles ----------------------------------------------------------------------------


def _read_pickle(
    path: Path, file: IO[bytes], size: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    mapped = _check_pickle(file, path, size)
    file.seek(0)
    place = _unicode_name(path, file) if mapped else file
    with warnings.catch_warnings(action="ignore"):  # of what a damaged file says of itself
        try:
            content = torch.load(place, map_location="cpu", weights_only=True, mmap=mapped)
        except (RuntimeError, EOFError) as error:
            if mapped:
                raise
            raise VggfeatError(f"{path} is damaged or cut off: fetch or save it again") from error
    found = _state_dicts(content)
    if not found:
        raise VggfeatError(
            f"{path} holds no plain state dict: no filters of convolutions by their names"
        )
    if len(found) > 1:
        value = "x" + "".join(f"[{shown(key)}]" for key in next(iter(found)))
        raise VggfeatError(
            f"{path} holds several state dicts, {_some(map('.'.join, found))}: make a plain file of"
            " one of them in Python, for example: import torch; x ="
            f" torch.load({os.fspath(path)!r}, 'cpu'); torch.save({value}, 'plain.pth')"
        )
    ((keys, state),) = found.items()
    tensors = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    return tensors, {"unwrapped": ".".join(keys)[:100]} if keys else {}


def _state_dicts(content: Any) -> dict[tuple[str, ...], dict[str, Any]]:
    """Keys -> the state dicts nearest to the top: records of tensors by name, filters of
    convolutions among them.

    Of several on one level, the one under a name that trainings give the net's own is alone, unless
    others there or further down are of a net with the same filters, such as the average of a
    training's (EMA).
    """
    level: dict[tuple[str, ...], Any] = {(): content}
    chosen: dict[tuple[str, ...], dict[str, Any]] = {}
    seen = set()
    for _ in range(3):
        level = {keys: value for keys, value in level.items() if isinstance(value, dict)}
        found = {keys: value for keys, value in level.items() if _filters(value)}
        if not chosen:
            own = [[keys for keys in found if keys[-1:] == (name,)] for name in _NETS_OWN]
            chosen = next(({keys[0]: found[keys[0]]} for keys in own if len(keys) == 1), found)
        for first in list(chosen.values())[:1]:
            shapes = _filters(first)
            others = {keys: other for keys, other in found.items() if other is not first}
            chosen |= {keys: other for keys, other in others.items() if _filters(other) == shapes}
        inner: dict[tuple[str, ...], Any] = {}
        for keys, value in level.items():
            # a small pickle can hold one record a million times
            if keys not in found and id(value) not in seen:
                seen.add(id(value))
                inner |= {(*keys, key): item for key, item in value.items() if isinstance(key, str)}
        level = inner
    return chosen


def _filters(record: Mapping[Any, Any]) -> list[torch.Size]:
    """The shapes of the filters of convolutions in a record of tensors by name; empty where it is
    no state dict.
    """
    return sorted(
        value.shape
        for key, value in record.items()
        if isinstance(key, str) and isinstance(value, Tensor) and value.ndim == 4
    )


def _check_pickle(file: IO[bytes], path: Path, size: int) -> bool:
    """Refuse a .pth file that is more than tensors by name, before it is loaded; whether its values
    can be mapped.
    """
    if zipfile.is_zipfile(file):
        archive = zipfile.ZipFile(file)
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise VggfeatError(
                f"{path} is a TorchScript program; if you trust it, make a plain file of it in"
                f" Python: import torch; torch.save(torch.jit.load({os.fspath(path)!r},"
                " 'cpu').state_dict(), 'plain.pth')"
            )
        entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(entries) != 1:
            raise VggfeatError(f"{path} {_what_zip(archive.namelist())}")
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise VggfeatError(
                    f"{path} is compressed, as PyTorch's files never are: save it again"
                )
        (pickled,) = entries
        if pickled.file_size > MOST_HEADER:
            raise VggfeatError(
                f"{path} can't be read as weights: its pickle has {pickled.file_size:,} bytes"
            )
        _check_names(io.BytesIO(archive.read(pickled)), 1, path)
        return True
    file.seek(0)
    if file.read(2) == b"PK":
        raise VggfeatError(f"{path} is damaged or cut off: fetch or save it again")
    if size > 4 * MOST_PARAMETERS:
        raise VggfeatError(
            f"{path} has {size / 1e9:.1f} GB in PyTorch's old format, which is read whole: save it"
            " again"
        )
    file.seek(0)
    numbers = [argument for step, argument, _ in _steps(file) if step.name == "LONG1"]
    file.seek(0)
    if numbers[:1] != [_MAGIC_NUMBER]:
        _check_names(file, 1, path, plain=True)
        raise VggfeatError(
            f"{path} is a plain pickle, and not one that PyTorch has written: use torch.save"
        )
    _check_names(file, 4, path)  # a magic number, a version, facts about the machine, the tensors
    return False


def _what_zip(names: list[str]) -> str:
    """What an archive is that PyTorch hasn't written, and what to do."""
    if "model.weights.h5" in names:
        return f"is a Keras 3 file: save it in Keras as .h5; {_CONVERT}"
    if names and all(name.endswith(".npy") for name in names):
        return (
            "is NumPy's .npz, arrays without what a net's file says of itself: docs/formats.md has"
            " the names"
        )
    return f"is a zip archive of {_some(names)}, not of PyTorch: unpack it, and give the file in it"


def _steps(file: IO[bytes]) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    for count, step in enumerate(pickletools.genops(file)):
        if count >= MOST_STEPS:
            raise ValueError("its pickle is too long")
        yield step


def _check_names(file: IO[bytes], pickles: int, path: Path, plain: bool = False) -> None:
    """Raise VggfeatError where pickles name anything but plain tensors and values: what, and how to
    make a plain file.

    plain: by Python's own pickle, without PyTorch.
    """
    objects: list[str] = []
    words: list[str] = []  # that stand for the net in the dictionary of a training
    last: list[str] = ["", ""]
    for _ in range(pickles):
        for step, argument, _ in _steps(file):
            if isinstance(argument, str) and "UNICODE" in step.name:
                last = [last[1], argument]
                words += [argument] if argument in _NETS_OWN else []
            if "GLOBAL" in step.name and argument not in _PLAIN:
                # of protocol 4, whose names are values, which PyTorch doesn't read without running
                # them
                name = (argument or " ".join(last)).replace(" ", ".")
                if name not in objects and len(objects) < 3:
                    objects.append(name)
    if not objects:
        return
    what = f"{path} can't be read as weights: it holds Python objects ({_some(objects)})"
    if plain:
        raise VggfeatError(
            f"{what} in a plain pickle: if you trust it, load it in Python, and use torch.save"
        )
    if all(_QUANTISED.fullmatch(name) for name in objects):
        raise VggfeatError(
            f"{path} holds 8-bit (quantised) tensors, {_some(objects)}: save the net in float"
        )
    value = f"x[{words[0]!r}]" if words else "x"
    if any(name.startswith(("torch.nn.modules", "torchvision.models")) for name in objects):
        value += ".state_dict()"
    raise VggfeatError(
        f"{what}, which would run code; if you trust it, make a plain file of it in Python: import"
        f" torch; x = torch.load({os.fspath(path)!r}, 'cpu', weights_only=False);"
        f" torch.save({value}, 'plain.pth')"
    )


def _some(names: Iterable[str]) -> str:
    """At most three of a file's names, for a message."""
    return ", ".join(shown(name) for name, _ in zip(names, range(3), strict=False))


# --- names ----------------------------------------------------------------------------------------


def bare(
    tensors: dict[str, Tensor],
    metadata: Mapping[str, str],
    needed: Sequence[Sequence[str]],
    path: Path,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under the names that a net gives them, without what a training puts before or between
    them.

    `module.` of DataParallel and `_orig_mod.` of torch.compile go wherever they stand, and whatever
    else stands before the names that the net needs (`model.`, `net.`, `backbone.`); what has no
    such prefix is left out. Metadata tell. needed: names that the net has all, in one or another
    convention. Raises VggfeatError where several nets are there.
    """
    original, gone = list(tensors), list[str]()
    plain = any(all(name in tensors for name in names) for names in needed)
    for word in () if plain else ("module", "_orig_mod"):
        shorter = {
            ".".join(p for p in key.split(".") if p != word): value
            for key, value in tensors.items()
        }
        if len(shorter) == len(tensors) and shorter.keys() != tensors.keys():
            tensors, gone = shorter, [*gone, f"{word}."]
    for first, *others in needed:
        prefixes = {
            key.removesuffix(first) for key in tensors if key == first or key.endswith(f".{first}")
        }
        prefixes = {p for p in prefixes if all(p + name in tensors for name in others)}
        if len(prefixes) > 1:
            some = max(prefixes)  # not the empty one, with which all names begin
            key = dict(zip(tensors, original, strict=True))[some + first]
            parts, cut = [p for p in some.split(".") if p], 0
            while parts:  # as the file has them
                part, cut = key[cut:].partition(".")[0], key.index(".", cut) + 1
                parts = parts[part == parts[0] :]
            raise VggfeatError(
                f"{path} holds several nets, under {_some(sorted(prefixes))}: make a plain file of"
                " one of them in Python, for example: import pathlib, torch, vggfeat.tensors; x, _"
                f" = vggfeat.tensors.read(pathlib.Path({os.fspath(path)!r}));"
                f" torch.save({{k[{cut}:]: v for k, v in x.items() if"
                f" k.startswith({shown(key[:cut])})}}, 'plain.pth')"
            )
        if prefixes and "" not in prefixes:
            (prefix,) = prefixes
            kept = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            gone.append(
                prefix[:100] if len(kept) == len(tensors) else f"{prefix[:100]} without the rest"
            )
            tensors = kept
        if prefixes:
            break
    if not gone:
        return tensors, dict(metadata)
    unwrapped = [metadata["unwrapped"]] if "unwrapped" in metadata else []
    return tensors, {**metadata, "unwrapped": ", ".join([*unwrapped, *gone])}
