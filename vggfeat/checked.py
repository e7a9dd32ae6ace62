"""What is read from somebody else's text: its length, its syntax and the type of each value, before
it is used.

    record = parse_json(read_text(path, "results"), path)
    # the record, or a VggfeatError: "r.json: per_class.cat.recall must be …"
    fitted(record, Results, path)

A type is written as in Python: `list[str]`, `float | None`, a TypedDict (more keys than it names
are left alone), a dataclass (more keys are refused, but by a `Sparse` one), and with `Annotated` a
`Range`, `OneOf` or `Several`. A float is finite; a whole number may stand for it; a bool is no
number.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import stat
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from vggfeat.errors import VggfeatError, reason

MOST_BYTES = 16 << 20  # of JSON: as Python's objects up to twenty times as much
# of a description: what a file may make another image be rescaled to
MAX_SCALES, MAX_Q = 64, 1 << 14
Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True)
class Range:
    """The least and the largest of a number; a float is infinite only where the largest is.

    null: the float that null stands for; None: it is refused.
    """

    low: float
    high: float
    null: float | None = None


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The words that a text may be."""

    words: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Several:
    """How many values a list may have, at least one; whether they differ."""

    most: int
    different: bool = False


@dataclasses.dataclass(frozen=True)
class Inline:
    """Of a `Sparse` record inside another: its keys stand among the other's."""


class Sparse:
    """Base of a dataclass that is written, too: what is None or empty has no key, NaN is null.

    Keys that it doesn't name are left out when it is read.
    """

    def to_json(self) -> dict[str, Any]:
        """What `fitted` reads as this, in JSON's types; keys in the order of the fields."""
        record: dict[str, Any] = {}
        own: Any = type(self)
        for name, kind in _kinds(own).items():
            value = _written(getattr(self, name))
            if _is_inline(kind):
                record |= value
            elif value not in (None, [], {}) or _is_nan(getattr(self, name)):
                record[name] = value
        return record


def _written(value: Any) -> Any:
    if isinstance(value, Sparse):
        return value.to_json()
    if isinstance(value, list):
        return [_written(part) for part in value]
    if isinstance(value, dict):
        return {name: _written(part) for name, part in value.items()}
    return None if _is_nan(value) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _is_inline(kind: Any) -> bool:
    return get_origin(kind) is Annotated and isinstance(get_args(kind)[1], Inline)


def path_of(value: Any, what: str) -> Path:
    """A path that a caller gave. Raises VggfeatError for anything else. what: what it should lead
    to.
    """
    if not isinstance(value, str | os.PathLike):
        raise VggfeatError(f"give the path of {what}, not {shown(value)}")
    return Path(value)


def sides(scales: Any) -> tuple[int, ...]:
    """Smallest sides Q that a caller gave. Raises VggfeatError unless they are whole numbers, one
    or several.
    """
    try:
        return tuple(map(operator.index, scales))
    except TypeError:
        raise VggfeatError(
            f"`scales` must be whole numbers of pixels, as (256, 384, 512), not {scales!r:.60}"
        ) from None


def regular(path: Path, what: str, hint: str = "") -> int:
    """Length in bytes of a regular file. Raises VggfeatError for anything else: a pipe or device
    would never end.

    what: what the file should be, and hint: how to come by it, for the message.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise VggfeatError(f"no {what} at {path}{hint and f': {hint}'}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise VggfeatError(f"can't read {path}: {reason(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise VggfeatError(f"{path} is {kind}; give a file: {what}")
    return status.st_size


def read_text(
    path: Path, what: str, hint: str = "", *, most: int = MOST_BYTES, errors: str = "strict"
) -> str:
    """The text of a regular file, UTF-8 with or without a byte-order mark. what, hint: see
    `regular`.

    errors: as of bytes.decode. Raises VggfeatError: no such file, more than `most` bytes, not
    UTF-8.
    """
    too_long = VggfeatError(f"{path} is longer than the {most >> 10:,} KiB that {what} may have")
    if regular(path, what, hint) > most:
        raise too_long
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)  # the file may have grown, and those of /proc have no length
    except OSError as error:
        raise VggfeatError(f"can't read {path}: {reason(error)}") from error
    if len(data) > most:
        raise too_long
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise VggfeatError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def number_of(text: str, kind: type[Number]) -> Number:
    """What a written number says; "nan" and "inf" are floats. Raises ValueError for another text,
    and for what only Python's own grammar takes (1_0, digits of other scripts).
    """
    if not text.isascii() or "_" in text:
        raise ValueError(text)
    return kind(text)


def parse_json(text: str | bytes, where: Any) -> Any:
    """The value of a JSON text. Raises VggfeatError, which begins with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VggfeatError(f"{where} is not JSON: {error}") from error


def parse_toml(text: str, where: Any) -> dict[str, Any]:
    """The table of a TOML text. Raises VggfeatError, which begins with `where`."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise VggfeatError(f"{where} is not TOML: {error}") from error


def fitted(value: Any, kind: Any, where: Any) -> Any:
    """value, of JSON or TOML, as the type `kind`; a dataclass is built. See the top of this file.

    Raises VggfeatError, which begins with `where` and names the key.
    """
    with _told(where):
        return _fitted(value, kind, "")


def fitted_field(value: Any, record: type, key: str, where: Any) -> Any:
    """value as the type of the dataclass's field `key`. Raises VggfeatError, also where there is no
    such field.
    """
    with _told(where):
        if key not in _kinds(record):
            raise _Unfit("", _no_key(record, key))
        return _fitted(value, _kinds(record)[key], key)


@contextmanager
def _told(where: Any) -> Iterator[None]:
    try:
        yield
    except _Unfit as unfit:
        key, text = unfit.args
        raise VggfeatError(f"{where}: {key} {text}" if key else f"{where} {text}") from None


class _Unfit(Exception):  # noqa: N818 - never leaves this file
    """(key, what is wrong with its value)"""


# What a value must be, in words.
_WORDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    NoneType: "null",
}


def _fitted(value: Any, kind: Any, key: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _bounded(value, arguments[0], arguments[1], key)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (other,) = (part for part in arguments if part is not NoneType)
        return _fitted(value, other, key)
    if origin in (list, tuple):
        return _sequence(value, origin, arguments, key)
    if origin is dict:
        _refuse(not isinstance(value, dict), key, "a record of names", value)
        return {
            name: _fitted(item, arguments[1], _inside(key, name)) for name, item in value.items()
        }
    if is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return _record(value, kind, key)
    if kind is float:
        return _number(value, key)
    _refuse(type(value) is not kind, key, _WORDS[kind], value)
    _refuse(kind is int and abs(value) >= 2**63, key, "less than 2^63", value)
    return value


def _bounded(value: Any, kind: Any, bounds: Range | OneOf | Several, key: str) -> Any:
    if isinstance(bounds, Range) and value == math.inf == bounds.high:
        return value
    if isinstance(bounds, Range) and value is None is not bounds.null:
        return bounds.null
    fit = _fitted(value, kind, key)
    if isinstance(bounds, Range):
        if not bounds.low <= fit <= bounds.high:
            raise _Unfit(key, f"must lie in {bounds.low:g}..{bounds.high:g}, not {shown(value)}")
    elif isinstance(bounds, OneOf):
        _refuse(fit not in bounds.words, key, f"one of {', '.join(bounds.words)}", value)
    else:
        _refuse(not 0 < len(fit) <= bounds.most, key, f"a list of 1 to {bounds.most}", value)
        _refuse(bounds.different and len(set(fit)) < len(fit), key, "a list without repeats", value)
    return fit


def _sequence(value: Any, origin: Any, arguments: tuple[Any, ...], key: str) -> Any:
    _refuse(not isinstance(value, list | tuple), key, "a list", value)
    kinds = arguments
    if origin is list or arguments[1:] == (...,):
        kinds = arguments[:1] * len(value)
    _refuse(len(value) != len(kinds), key, f"a list of {len(kinds)}", value)
    return origin(
        _fitted(item, part, f"{key}[{i}]")
        for i, (item, part) in enumerate(zip(value, kinds, strict=True))
    )


def _record(value: Any, kind: Any, key: str) -> Any:
    _refuse(not isinstance(value, dict), key, "a record", value)
    kinds = _kinds(kind)
    if is_typeddict(kind):
        needed = kind.__required_keys__
    else:
        no_default = dataclasses.MISSING
        needed = {
            field.name
            for field in dataclasses.fields(kind)
            if field.default is no_default and field.default_factory is no_default
        }
        unknown = value.keys() - kinds.keys()
        if unknown and not issubclass(kind, Sparse):
            raise _Unfit(key, _no_key(kind, min(unknown)))
    for name in kinds:
        if name in needed and name not in value:
            raise _Unfit(_inside(key, name), "is missing")
    own = {
        name: _fitted(value[name], part, _inside(key, name))
        for name, part in kinds.items()
        if name in value and not _is_inline(part)
    }
    for name, part in kinds.items():
        if _is_inline(part):
            own[name] = _record(value, get_args(part)[0], key)
    return {**value, **own} if is_typeddict(kind) else kind(**own)


def _number(value: Any, key: str) -> float:
    _refuse(type(value) not in (int, float), key, _WORDS[float], value)
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    _refuse(not abs(number) < float("inf"), key, _WORDS[float], value)
    return number


@lru_cache
def _kinds(record: Any) -> dict[str, Any]:
    """The type of each key, where there is one."""
    kinds = get_type_hints(record, include_extras=True)
    if isinstance(record, type) and issubclass(record, Sparse):
        return {name: _present(kind) for name, kind in kinds.items()}
    return kinds


def _present(kind: Any) -> Any:
    """A type without None, which stands for a key that isn't there."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    return kind


def _no_key(record: Any, key: str) -> str:
    return f"can't have {shown(key)}: a {record.__name__} has {', '.join(_kinds(record))}"


def _inside(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _refuse(wrong: bool, key: str, what: str, value: Any) -> None:
    if wrong:
        raise _Unfit(key, f"must be {what}, not {shown(value)}")


def shown(value: Any) -> str:
    """A value of a file as a message may show it, in at most 60 characters."""
    if isinstance(value, list | tuple | dict):
        return f"a {'record' if isinstance(value, dict) else 'list'} of {len(value)}"
    # beyond 4,300 digits Python doesn't even print it
    if isinstance(value, int) and abs(value) > 10**60:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_few(
    names: Sequence[str], most: int = 10, spelt: Callable[[str], str] = lambda name: name
) -> str:
    """The first names, each as it is spelt, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(spelt, names[:most])) + more
