"""Parquet files: the columns that shards and listings have, as NumPy arrays and lists; and what is
in the Parquet and Arrow files of others.

Pages of ours carry checksums, which are held against them when they are read. Names are bytes: a
file's name needn't be UTF-8. N rows, D values a row.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from vggfeat.errors import VggfeatError, not_read
from vggfeat.place import place_of

ROW_GROUP = 1024  # rows
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
BATCH = 256  # rows of a file of others that are read at once
KEY, SUMS = b"vggfeat", b"vggfeat.crc32"
"""Of the file's metadata, JSON: the facts; name of each column -> CRC-32 of its values, since pages
have checksums, and what says how they are to be read has none.
"""
Column = np.ndarray | Sequence[bytes] | Sequence[str]
Answer = TypeVar("Answer")


def pyarrow() -> Any:
    """The library. Raises VggfeatError where it isn't installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise VggfeatError(
            f"Parquet files, as sets of shards are, need pyarrow ({error}): pip install"
            " 'vggfeat[cloud]'"
        ) from error
    return pyarrow


def to_bytes(columns: Mapping[str, Column], facts: Mapping[str, Any]) -> bytes:
    """A file of columns: arrays (N,) or (N, D), lists of bytes or of text. facts: JSON-able."""
    pa = pyarrow()
    fields = {name: _arrow(pa, values) for name, values in columns.items()}
    sums = {name: _sum(values) for name, values in columns.items()}
    told = {KEY: json.dumps(facts, sort_keys=True), SUMS: json.dumps(sums)}
    table = pa.table(fields).replace_schema_metadata(told)
    # of a list of numbers, the column is its element
    floats = [
        name if np.ndim(values) == 1 else f"{name}.list.element"
        for name, values in columns.items()
        if isinstance(values, np.ndarray) and values.dtype.kind == "f"
    ]
    sink = io.BytesIO()
    pa.parquet.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        # floats pack well once their bytes stand apart; for others it is no encoding
        use_byte_stream_split=floats,
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue()


def write_records(
    path: Path, kinds: Mapping[str, str], blocks: Iterable[Sequence[Mapping[str, Any]]]
) -> None:
    """A file of records, a block at a time; a column that a record lacks is null there.

    kinds: name -> "text", "texts", "number" or "numbers" of each column; numbers are float64.
    """
    pa = pyarrow()
    types = {"text": pa.string(), "number": pa.float64()}
    types |= {"texts": pa.list_(types["text"]), "numbers": pa.list_(types["number"])}
    schema = pa.schema([(name, types[kind]) for name, kind in kinds.items()])
    with pa.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for block in blocks:
            writer.write_table(pa.Table.from_pylist(list(block), schema=schema))


def _sum(values: Column, before: int = 0) -> int:
    """CRC-32 of a column's values, or of more of them."""
    if isinstance(values, np.ndarray):
        return zlib.crc32(np.ascontiguousarray(values).data, before)
    texts = (each if isinstance(each, bytes) else each.encode() for each in values)
    return zlib.crc32(b"".join(text + b"\0" for text in texts), before)


def _arrow(pa: Any, values: Column) -> Any:
    if not isinstance(values, np.ndarray):
        kind = pa.binary() if values and isinstance(values[0], bytes) else pa.string()
        return pa.array(values, kind)
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


class Table:
    """A Parquet file, opened: `rows`, `facts`, `names` of its columns; each is read when asked for.

    Raises VggfeatError, which begins with `where`, for what is none, or is damaged.
    """

    def __init__(self, source: BinaryIO | bytes | Path, where: str) -> None:
        self.where = where
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        self._file = self._asked(
            lambda: pyarrow().parquet.ParquetFile(source, page_checksum_verification=True)
        )
        self.rows: int = self._file.metadata.num_rows
        self.names: list[str] = self._file.schema_arrow.names
        told = self._file.schema_arrow.metadata or {}
        try:
            self.facts = json.loads(told.get(KEY, b"null"))
            self._sums: dict[str, int] = dict(json.loads(told.get(SUMS, b"{}")))
        except (ValueError, TypeError):
            self.facts, self._sums = None, {}

    def _asked(self, ask: Callable[[], Answer]) -> Answer:
        return _asked(self.where, ask)

    def array(self, name: str, width: int | None = None) -> np.ndarray:
        """A column of numbers, (N,), or (N, width)."""
        table = self._asked(lambda: self._file.read(columns=[name]))
        values = self._array(table, name, width)
        self._check(name, _sum(values))
        return values

    def has_lists(self, name: str, kind: str, width: int) -> bool:
        """Whether a column is of lists of so many float16 or float32."""
        types, schema = pyarrow().types, self._file.schema_arrow
        its = schema.field(name).type if name in self.names else pyarrow().null()
        of = types.is_float16 if kind == "float16" else types.is_float32
        return bool(types.is_fixed_size_list(its) and its.list_size == width and of(its.value_type))

    def _check(self, name: str, there: int) -> None:
        if self._sums.get(name, there) != there:
            raise VggfeatError(f"{self.where} is damaged: the values of {name} aren't what was put")

    def blocks(self, widths: Mapping[str, int]) -> Iterator[dict[str, np.ndarray]]:
        """Columns (n, width) in blocks of n rows, in their order. widths: of each."""
        for number in range(self._file.num_row_groups):
            yield self.block(number, widths)

    def block(self, number: int, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
        """The number-th block of ROW_GROUP rows."""
        table = self._asked(lambda: self._file.read_row_group(number, columns=list(widths)))
        return {name: self._array(table, name, width) for name, width in widths.items()}

    def verify(self, but: Sequence[str] = ()) -> None:
        """Hold every page against its checksum, a block at a time. but: columns to leave out."""
        names = [name for name in self.names if name not in but]
        sums = dict.fromkeys(names, 0)
        for number in range(self._file.num_row_groups):
            table = self._asked(partial(self._file.read_row_group, number, columns=names))
            for name in names:
                sums[name] = _sum(self._values(table, name), sums[name])
        for name, there in sums.items():
            self._check(name, there)

    def _values(self, table: Any, name: str) -> Column:
        """A column, whatever it is of."""
        types = pyarrow().types
        its = self._asked(lambda: table.schema.field(name).type)
        if types.is_fixed_size_list(its):
            return self._array(table, name, its.list_size)
        if types.is_binary(its) or types.is_string(its):
            texts: list[Any] = self._asked(lambda: table[name].to_pylist())
            return texts
        return self._array(table, name, None)

    def _array(self, table: Any, name: str, width: int | None) -> np.ndarray:
        def ask() -> np.ndarray:
            column = table[name].combine_chunks()
            if width is None:
                values: np.ndarray = column.to_numpy(zero_copy_only=False)
                return values
            flat = column.flatten().to_numpy(zero_copy_only=False)
            shaped: np.ndarray = flat.reshape(-1, width)
            return shaped

        return self._asked(ask)

    def texts(self, name: str) -> list[Any]:
        """A column of bytes or text."""
        texts: list[Any] = self._asked(lambda: self._file.read(columns=[name])[name].to_pylist())
        if name in self._sums:
            self._check(name, self._asked(lambda: _sum(texts)))
        return texts


def _asked(where: str, ask: Callable[[], Answer]) -> Answer:
    pa = pyarrow()
    try:
        return ask()
    except (pa.ArrowException, OSError, EOFError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, VggfeatError):
            raise
        raise not_read(where, "Parquet", error) from error


# --- files of others ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schema:
    """A file's columns. kinds: name -> "text", "integer", "binary", "image" (bytes and path, as
    Hugging Face has them) or "other". class_names: of columns of labels, what their numbers mean,
    where the file tells.
    """

    kinds: dict[str, str]
    class_names: dict[str, tuple[str, ...]]


def schema_of(path: str) -> Schema:
    """Of a Parquet file, or an Arrow stream (.arrow), at a path or URL. Raises VggfeatError where
    it is none; AbsentError.
    """
    above, _, name = path.rpartition("/")
    with place_of(above or ".").open(name) as file:
        pa = pyarrow()
        if name.endswith(".arrow"):
            schema = _asked(path, lambda: _stream(pa, file).schema)
        else:
            schema = _asked(path, lambda: pa.parquet.ParquetFile(file).schema_arrow)
    kinds = {field.name: _kind(pa, field.type) for field in schema}
    names: dict[str, tuple[str, ...]] = {}
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        for column, feature in told.get("info", {}).get("features", {}).items():
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
                names[column] = tuple(map(str, feature["names"]))
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise VggfeatError(f"{path}: what it tells Hugging Face of itself is damaged") from error
    return Schema(kinds, {column: names[column] for column in names if column in kinds})


def _stream(pa: Any, file: BinaryIO) -> Any:
    try:
        stream = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_file(file)
    here = file.tell()
    file.seek(-len(_END_OF_STREAM), io.SEEK_END)
    if file.read() != _END_OF_STREAM:  # pyarrow takes whatever end for the end
        raise ValueError("the stream has no end: it was cut off")
    file.seek(here)
    return stream


def _kind(pa: Any, kind: Any) -> str:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        inside = {kind.field(i).name for i in range(kind.num_fields)}
        return "image" if "bytes" in inside else "other"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "binary"
    return "integer" if types.is_integer(kind) else "other"


def columns_of_file(path: str, names: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Some columns of such a file, as Python has their values, some rows at a time. Raises
    VggfeatError; AbsentError, StorageError.
    """
    above, _, name = path.rpartition("/")
    with place_of(above or ".").open(name) as file:
        pa = pyarrow()

        def begin() -> Iterator[Any]:
            if not name.endswith(".arrow"):
                file_ = pa.parquet.ParquetFile(file)
                return iter(file_.iter_batches(BATCH, columns=list(names)))
            stream = _stream(pa, file)
            if hasattr(stream, "num_record_batches"):
                return map(stream.get_batch, range(stream.num_record_batches))
            return iter(stream)

        batches = _asked(path, begin)
        while (batch := _asked(path, lambda: next(batches, None))) is not None:
            yield _asked(path, lambda: {n: batch.column(n).to_pylist() for n in names})
