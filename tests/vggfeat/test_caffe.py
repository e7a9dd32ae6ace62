"""A .caffemodel: the authors' nets by what is in the file, or a sentence."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import vggfeat
from vggfeat import caffe, sources
from vggfeat.errors import VggfeatError
from vggfeat.images import CAFFE
from vggfeat.table1 import layer_keys
from vggfeat.vgg import VGG

from ..conftest import Nets, vgg_of
from .test_tensors import arrays_of, same_network


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    """A protobuf field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def blob(values: np.ndarray, old: bool) -> bytes:
    data = field(5, values.astype("<f4").tobytes())
    if not old:
        return field(7, field(1, b"".join(map(varint, values.shape)))) + data
    shape = (1,) * (4 - values.ndim) + values.shape
    return b"".join(field(i, n) for i, n in enumerate(shape, 1)) + data


def caffemodel(arrays: dict[str, np.ndarray], old: bool = False) -> bytes:
    """A NetParameter as Caffe writes it. old: of 2014, with `layers` and shapes of four numbers."""
    number, name_field, type_field, blobs_field = (2, 4, 5, 6) if old else (100, 1, 2, 7)
    parts = [
        field(1, b"VGG_ILSVRC_16_layers"),
        field(3, b"data"),
        *(field(4, n) for n in (10, 3, 224, 224)),
    ]
    names = list(dict.fromkeys(key.partition(".")[0] for key in arrays))
    for name in names:
        kind: int | bytes = (
            (4 if old else b"Convolution") if "conv" in name else (14 if old else b"InnerProduct")
        )
        layer = (
            field(2, b"bottom")
            + field(3, b"top")
            + field(name_field, name.encode())
            + field(type_field, kind)
        )
        layer += b"".join(
            field(blobs_field, blob(arrays[f"{name}.{kind}"], old)) for kind in ("weight", "bias")
        )
        relu = field(name_field, b"relu") + field(type_field, 18 if old else b"ReLU")
        parts += [field(number, layer), field(number, relu)]
    return b"".join(parts)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("net", ["D", "E", "C"])
def test_a_caffemodel_gives_the_same_scores(tmp_path: Path, he: Nets, net: str, old: bool) -> None:
    module = he(net, width=0.125, crop=64, num_classes=3)
    path = tmp_path / "VGG.caffemodel"
    path.write_bytes(caffemodel(arrays_of(module), old))
    network = same_network(str(path), module, CAFFE, "ceil")
    loaded = vgg_of(network)
    assert (network.name, loaded.width, loaded.crop) == (net, 0.125, 64)
    assert network.metadata["source"] == str(path)


def test_a_caffemodel_is_the_authors_or_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own facts hold: as oxford:D it has the classes' names too, as torchvision's it is
    refused.

    Only the authors' file, byte for byte, learned as theirs.
    """
    with torch.device("meta"):
        shapes = VGG("D", until="pool5").state_dict()
    zeros = {
        f"{layer}.{kind}": np.zeros(shapes[f"{key}.{kind}"].shape, np.float32)
        for layer, key in layer_keys("D").items()
        if key.startswith("features")
        for kind in ("weight", "bias")
    }
    path = tmp_path / "VGG.caffemodel"
    path.write_bytes(caffemodel(zeros))
    network = vggfeat.load(f"oxford:D@{path}")
    assert network.layers[-1] == "pool5" and network.classes and network.classes[0] == "tench"
    assert (
        network.metadata["train_scale"] == "" and "not the released" in network.metadata["source"]
    )
    monkeypatch.setitem(sources.CAFFEMODELS, "D", hashlib.sha1(path.read_bytes()).hexdigest())
    network = vggfeat.load(f"oxford:D@{path}")
    assert (network.metadata["train_scale"], network.metadata["source"]) == (
        "256-512",
        sources.OXFORD["D"],
    )
    with pytest.raises(
        VggfeatError, match=r"says of itself channel_order 'BGR', .* has 'RGB': give .* alone"
    ):
        vggfeat.load(f"torchvision:vgg16@{path}")


def test_layers_of_caffe_that_table_1_lacks(tmp_path: Path, he: Nets) -> None:
    module = he("D", width=0.125, crop=32, num_classes=3)
    arrays = arrays_of(module)
    path = tmp_path / "w.caffemodel"
    renamed = {key.replace("fc8", "fc8_flickr"): value for key, value in arrays.items()}
    path.write_bytes(caffemodel(renamed))
    network = vggfeat.load(path)
    assert network.layers[-1] == "fc7" and "fc8_flickr" in network.metadata["unwrapped"]
    # FC layers as convolutions
    full = {
        **arrays,
        "fc6.weight": arrays["fc6.weight"].reshape(512, 64, 1, 1),
    }
    path.write_bytes(caffemodel(full))
    loaded = vgg_of(vggfeat.load(path))
    assert torch.equal(
        loaded.get_parameter("classifier.0.weight"), module.get_parameter("classifier.0.weight")
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda a: caffemodel(
                {"conv1.weight": a["conv1_1.weight"], "conv1.bias": a["conv1_1.bias"]}
            ),
            "no net of Table 1 has its layers: conv1",
        ),
        (
            lambda a: caffemodel({k: v for k, v in a.items() if "conv3" not in k}),
            "no net of Table 1 has its layers",
        ),
        (
            lambda a: caffemodel(a) + field(100, field(1, b"norm1") + field(2, b"LRN")),
            "local response normalisation",
        ),
        (
            lambda a: caffemodel(a, old=True) + field(2, field(4, b"norm1") + field(5, 15)),
            "local response",
        ),
        (
            lambda a: caffemodel(a) + field(2, field(1, field(1, b"conv1"))),
            "upgrade_net_proto_binary",
        ),
        (lambda a: caffemodel(a) * 2, "two layers 'conv1_1'"),
        (lambda a: caffemodel(a)[:-7], "cut off"),
        (lambda a: caffemodel(a) + field(1, b"x") * 100_000, "more than 100,000 fields"),
        (lambda a: caffemodel(a) + b"\x0b", "no protobuf"),
        (lambda a: caffemodel(a) + b"\xff" * 11, "a number is too long"),
        (
            lambda a: (
                caffemodel(a)
                + field(100, field(1, b"conv1_9") + field(7, field(7, field(1, b"\x02"))))
            ),
            r"a blob of shape \(2,\) has 0 bytes",
        ),
        (
            lambda a: caffemodel(a) + field(100, field(1, b"c") + field(7, field(8, bytes(8)))),
            "not float32",
        ),
        (
            lambda a: caffemodel(a) + field(100, field(1, b"c" * 300)),
            "a layer's name has 300 bytes",
        ),
        (
            lambda a: caffemodel(a) + field(100, b"")[:-1] + varint(1 << 40),
            "ends beyond its message",
        ),
        (
            lambda a: caffemodel({**a, "fc7.weight": a["fc7.weight"][1:]}),
            r"classifier.3.weight has shape \(511, 512\)",
        ),
    ],
)
def test_caffemodels_that_cant_be(
    tmp_path: Path, he: Nets, change: Callable[[dict[str, np.ndarray]], bytes], says: str
) -> None:
    path = tmp_path / "w.caffemodel"
    path.write_bytes(change(arrays_of(he("D", width=0.125, crop=32, num_classes=3))))
    with pytest.raises(VggfeatError, match=says) as refused:
        vggfeat.load(path)
    assert str(refused.value).startswith(str(path))


def test_a_blob_cant_claim_what_isnt_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, he: Nets
) -> None:
    path = tmp_path / "w.caffemodel"
    path.write_bytes(caffemodel(arrays_of(he("D", width=0.125, crop=32, num_classes=3))))
    monkeypatch.setattr(caffe, "MOST_PARAMETERS", 100_000)
    with pytest.raises(VggfeatError, match="more than 0 million parameters"):
        vggfeat.load(path)
