"""Caffe's .caffemodel, as the authors released their nets: blobs of layers -> tensors by the
paper's names.

A NetParameter in protobuf's wire format, read by hand: the layers' names, the blobs' shapes and
places, and only then the values of those layers that Table 1 has. Both of Caffe's forms: `layers`
of 2014 and `layer` since. Source: src/caffe/proto/caffe.proto of BVLC's Caffe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt, prod
from typing import IO

import torch
from torch import Tensor

from vggfeat.images import CAFFE
from vggfeat.table1 import MOST_PARAMETERS, NETS, STAGE_CHANNELS, TABLE_1, layer_names

MOST_FIELDS = 100_000  # that are looked at; the authors' files have about a thousand
NAME_BYTES = 200
# A layer's message in NetParameter -> its fields: name, type, blobs.
LAYERS = {2: (4, 5, 6), 100: (1, 2, 7)}
LRN = (15, b"LRN")  # a layer's type, in the old form and in the new


@dataclass(frozen=True)
class _Blob:
    """One array of a layer: its shape, and where its float32 values lie in the file."""

    shape: tuple[int, ...]
    at: int


def read_caffemodel(file: IO[bytes], size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors `conv1_1.weight` … `fc8.bias`, float32, and metadata: the net, and what all nets of
    Caffe have.

    size: of the open file. Raises ValueError, the end of a sentence about the file: what is wrong
    in it.
    """
    blobs = _blobs(_Wire(file.fileno()), size)
    ours = {name for net in NETS for name in layer_names(net) if re.match("conv|fc", name)}
    left_out = sorted(name for name in blobs if name not in ours)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in blobs.keys() & ours:
        for kind, blob in zip(("weight", "bias"), blobs[name], strict=False):
            shapes[f"{name}.{kind}"] = _shape(name, kind, blob.shape)
    if sum(map(prod, shapes.values())) > MOST_PARAMETERS:
        raise ValueError(f"it has more than {MOST_PARAMETERS // 10**6} million parameters")
    metadata = {**_net(shapes, left_out), **CAFFE.to_metadata(), "pool": "ceil"}
    if left_out:
        metadata["unwrapped"] = f"Caffe, without {', '.join(left_out)[:NAME_BYTES]}"
    tensors = {}
    for key, shape in shapes.items():
        name, _, kind = key.partition(".")
        tensors[key] = values = torch.empty(shape)
        file.seek(blobs[name][kind == "bias"].at)
        if file.readinto(values.numpy().data.cast("B")) != 4 * values.numel():  # type: ignore[attr-defined]
            raise ValueError("it is cut off")
    return tensors, metadata


def _shape(name: str, kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """As PyTorch has it: of FC layers (out, in), which old blobs give as (1, 1, out, in), FCN as
    (out, C, H, W).
    """
    if kind == "bias":
        return (prod(shape),)
    if name.startswith("fc"):
        shape = shape[2:] if len(shape) == 4 and shape[:2] == (1, 1) else shape
        return (shape[0], prod(shape[1:])) if shape else shape
    return shape


def _net(shapes: dict[str, tuple[int, ...]], left_out: list[str]) -> dict[str, str]:
    """Which net of Table 1 has such convolutions, how wide, for which crop. Raises ValueError where
    none has.
    """
    kernels = {
        key.removesuffix(".weight"): shape[2:]
        for key, shape in shapes.items()
        if re.match(r"conv.*weight", key)
    }
    for net in NETS:
        table = [kernel for stage in TABLE_1[net] for kernel in stage]
        names = [name for name in layer_names(net) if name.startswith("conv")]
        if "LRN" not in table and kernels == {n: (k, k) for n, k in zip(names, table, strict=True)}:
            break
    else:
        names = sorted(kernels) or left_out
        raise ValueError(
            "no net of Table 1 has its layers:"
            f" {', '.join(names)[:NAME_BYTES] or 'none with values'}"
        )
    width = shapes["conv1_1.weight"][0] / STAGE_CHANNELS[0]
    last = shapes[f"{names[-1]}.weight"][0]
    side = isqrt(shapes["fc6.weight"][1] // last) if "fc6.weight" in shapes and last else 7
    return {"net": net, "width": repr(width), "crop": str(32 * side)}


def _blobs(wire: _Wire, size: int) -> dict[str, list[_Blob]]:
    """The blobs of each layer that has some."""
    found: dict[str, list[_Blob]] = {}
    for number, place in wire.fields(0, size):
        if number not in LAYERS or not isinstance(place, range):
            continue
        name_field, type_field, blobs_field = LAYERS[number]
        name, blobs = "", []
        for field, value in wire.fields(place.start, place.stop):
            if field == name_field and isinstance(value, range):
                name = wire.text(value)
            elif (
                field == type_field
                and (wire.text(value).encode() if isinstance(value, range) else value) in LRN
            ):
                raise ValueError(
                    "it has a layer of local response normalisation, and Caffe's is not the paper's"
                )
            elif field == blobs_field and isinstance(value, range):
                blobs.append(_blob(wire, value))
            elif number == 2 and field == 1:
                raise ValueError(
                    "it is of Caffe's oldest form: Caffe's upgrade_net_proto_binary makes a"
                    " newer one"
                )
        if blobs:
            if name in found:
                raise ValueError(f"it has two layers {name!r}")
            found[name] = blobs
    return found


def _blob(wire: _Wire, place: range) -> _Blob:
    shape: list[int] = []
    old = {1: 0, 2: 0, 3: 0, 4: 0}  # num, channels, height, width
    data = None
    for field, value in wire.fields(place.start, place.stop):
        if field in old and isinstance(value, int):
            old[field] = value
        elif field == 7 and isinstance(value, range):
            shape = wire.numbers(value)
        elif field == 5 and isinstance(value, range) and data is None:
            data = value
        elif field in (5, 8):
            raise ValueError("a blob's values are not float32 in one piece")
    shape = shape or list(old.values())
    if data is None or len(shape) > 4 or min(shape) < 1 or 4 * prod(shape) != len(data):
        raise ValueError(f"a blob of shape {tuple(shape)} has {len(data or ()):,} bytes")
    return _Blob(tuple(shape), data.start)


class _Wire:
    """Protobuf's wire format in an open file, of which only what is asked for is read."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.count = descriptor, 0

    def fields(self, low: int, high: int) -> Iterator[tuple[int, int | range]]:
        """(number, value) of each field of the message in [low, high): a varint, or the place of
        its bytes.
        """
        while low < high:
            self.count += 1
            if self.count > MOST_FIELDS:
                raise ValueError(f"it has more than {MOST_FIELDS:,} fields")
            head = os.pread(self.descriptor, min(20, high - low), low)
            tag, used = _varint(head, 0)
            number, kind = tag >> 3, tag & 7
            value: int | range = 0
            if kind == 0:
                value, used = _varint(head, used)
            elif kind == 2:
                length, used = _varint(head, used)
                value = range(low + used, low + used + length)
                used += length
            elif kind in (1, 5):  # a number of 8 or 4 bytes, which no field that is read has
                used += 8 if kind == 1 else 4
            else:
                raise ValueError("it is damaged, or no protobuf")
            low += used
            if low > high:
                raise ValueError("it is damaged or cut off: a field ends beyond its message")
            yield number, value

    def text(self, place: range) -> str:
        if len(place) > NAME_BYTES:
            raise ValueError(f"a layer's name has {len(place):,} bytes")
        return os.pread(self.descriptor, len(place), place.start).decode("utf-8", "replace")

    def numbers(self, place: range) -> list[int]:
        """The dimensions of a BlobShape, packed or one by one."""
        found: list[int] = []
        for field, value in self.fields(place.start, place.stop):
            if field == 1 and isinstance(value, int):
                found.append(value)
            elif field == 1 and isinstance(value, range):
                raw, at = os.pread(self.descriptor, min(len(value), 100), value.start), 0
                while at < len(raw):
                    number, at = _varint(raw, at)
                    found.append(number)
        return found


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of at most 63 bits, and where it ends."""
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(raw):
            raise ValueError("it is damaged or cut off: a number has no end")
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("it is damaged, or no protobuf: a number is too long")
