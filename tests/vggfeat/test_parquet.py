"""Columns of Parquet files, ours and others'."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vggfeat.errors import VggfeatError
from vggfeat.parquet import Table, columns_of_file, schema_of, to_bytes

ROWS = 3000


def test_columns_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((ROWS, 5)).astype(np.float16)
    columns: dict[str, Any] = {
        "x": values,
        "n": np.arange(ROWS, dtype=np.int64),
        "name": [b"\xff%d" % i for i in range(ROWS)],
        "word": [str(i) for i in range(ROWS)],
    }
    columns["y.z"] = values
    content = to_bytes(columns, {"a": [1, "b"]})
    group = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0)
    packed = {group.column(i).path_in_schema.split(".list")[0]: group.column(i) for i in range(5)}
    assert {name for name, each in packed.items() if "BYTE_STREAM_SPLIT" in each.encodings} == {
        "x",
        "y.z",
    }
    table = Table(content, "here")
    assert (table.rows, table.names, table.facts) == (ROWS, list(columns), {"a": [1, "b"]})
    assert table.array("x", 5).tobytes() == values.tobytes() and table.array("n")[7] == 7
    assert table.texts("name") == columns["name"] and table.texts("word") == columns["word"]
    blocks = np.concatenate([block["x"] for block in table.blocks({"x": 5})])
    assert blocks.tobytes() == values.tobytes()
    assert table.block(2, {"x": 5})["x"].tobytes() == values[2048:].tobytes()


def test_no_rows_at_all() -> None:
    content = to_bytes({"x": np.zeros((0, 4), np.float32), "name": []}, {})
    table = Table(content, "here")
    assert table.rows == 0 and table.array("x", 4).shape == (0, 4) and table.texts("name") == []
    assert sum(len(block["x"]) for block in table.blocks({"x": 4})) == 0


@pytest.mark.parametrize("spoil", ["cut", "flip", "other"])
def test_damage_is_named(spoil: str) -> None:
    content = bytearray(to_bytes({"x": np.random.default_rng(0).random((1000, 4))}, {}))
    if spoil == "cut":
        content = content[: len(content) // 2]
    elif spoil == "flip":
        content[2000] ^= 1
    else:
        content[:] = b"no"
    with pytest.raises(VggfeatError, match=r"^here is damaged, or no Parquet file \("):
        Table(bytes(content), "here").array("x", 4)


def test_schemas_of_others(tmp_path: Path) -> None:
    told = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
            ("word", pa.dictionary(pa.int32(), pa.string())),
            ("raw", pa.large_binary()),
            ("score", pa.float64()),
        ],
        metadata={b"huggingface": json.dumps(told).encode()},
    )
    rows = [{"image": {"bytes": b"x"}, "label": 1, "word": "w", "raw": b"r", "score": 0.5}]
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as made:
        made.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        found = schema_of(f"{tmp_path}/{name}")
        assert found.kinds == {
            "image": "image",
            "label": "integer",
            "word": "text",
            "raw": "binary",
            "score": "other",
        }
        assert found.class_names == {"label": ("cat", "dog")}
        read = list(columns_of_file(f"{tmp_path}/{name}", ["label", "raw"]))
        assert read == [{"label": [1], "raw": [b"r"]}]
    bad = schema.with_metadata({b"huggingface": b"{no"})
    pq.write_table(table.cast(bad), tmp_path / "c.parquet")
    with pytest.raises(VggfeatError, match="what it tells Hugging Face of itself is damaged"):
        schema_of(f"{tmp_path}/c.parquet")


def test_values_that_are_not_those_that_were_put(tmp_path: Path) -> None:
    """As a bit of the footer makes of them, which has no checksum: of another type, or another
    column's.
    """
    numbers = np.arange(24)
    content = to_bytes({"n": numbers, "m": numbers + 1, "name": [b"%d" % i for i in numbers]}, {})
    table = pq.read_table(io.BytesIO(content))
    told = table.schema.metadata
    for bad, words in (
        (table.set_column(0, "n", table["n"].cast(pa.float64())), "the values of n aren't"),
        (table.rename_columns(["m", "n", "name"]), "the values of n aren't"),
        (table.set_column(2, "name", table["name"].take(numbers[::-1])), "of name aren't"),
        (table.drop_columns(["name"]), "no Parquet file"),
    ):
        path = tmp_path / "bad.parquet"
        pq.write_table(bad.replace_schema_metadata(told), path)
        with pytest.raises(VggfeatError, match=f"here is damaged.*{words}"):
            its = Table(path, "here")
            its.array("n")
            its.texts("name")
        if words != "no Parquet file":
            with pytest.raises(VggfeatError, match="aren't what was put"):
                Table(path, "here").verify()


def test_a_stream_that_was_cut_between_its_batches_is_damaged(tmp_path: Path) -> None:
    table = pa.table({"image": [b"a", b"b", b"c"]})
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as made:
        made.write_table(table, max_chunksize=1)
    assert len(list(columns_of_file(str(path), ["image"]))) == 3
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(VggfeatError, match=r"damaged, .*the stream has no end"):
        list(columns_of_file(str(path), ["image"]))
