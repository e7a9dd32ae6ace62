"""A weights file -> a network that reaches as far as its weights do, or a sentence."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import safetensors.torch
import torch

import vggfeat
from vggfeat import weights
from vggfeat.errors import VggfeatError
from vggfeat.images import CAFFE_MEAN_BGR, Preprocessing
from vggfeat.table1 import NETS
from vggfeat.tensors import metadata_of
from vggfeat.vgg import VGG

from ..conftest import Nets, photograph, vgg_of
from .conftest import Ours, Tensors


def test_our_file_comes_back_whole(ours: Ours, plain: Preprocessing) -> None:
    path, module = ours
    network = vggfeat.load("A", weights=path)
    assert network.preprocessing == plain
    assert network.classes == ["x", "y", "z"]
    assert network.metadata["train_scale"] == "36" and network.metadata["source"] == "test"
    for key, value in module.state_dict().items():
        assert torch.equal(network.module.state_dict()[key], value)
    loaded = vgg_of(network)
    assert (loaded.width, loaded.crop, network.layers[-1]) == (0.125, 32, "fc8")
    with safetensors.safe_open(path, framework="np") as file:  # readable without this project
        assert {
            "net",
            "num_classes",
            "width",
            "crop",
            "mean",
            "std",
            "channel_order",
            "input_range",
        } <= set(file.metadata())
        assert json.loads(file.metadata()["classes"]) == ["x", "y", "z"]


@pytest.mark.parametrize(("boxes", "outputs"), [("scr", 4), ("pcr", 12)])
def test_a_net_of_boxes_tells_so(
    tmp_path: Path, plain: Preprocessing, boxes: str, outputs: int
) -> None:
    net = VGG("A", outputs, 0.05, 32)
    path = tmp_path / "w.safetensors"
    weights.save_weights(path, net, plain, classes=["x", "y", "z"], boxes=boxes, box_unit=0.1)
    network = vggfeat.load(str(path), device="cpu")
    assert (network.boxes, network.metadata["box_unit"]) == (boxes, "0.1")
    assert network.classes == ["x", "y", "z"] and network.dim("fc8") == outputs
    resaved(path, None, boxes=None)
    with pytest.raises(VggfeatError, match=f"3 names for {outputs} classes"):
        vggfeat.load(str(path))


def test_fingerprint_changes_with_one_bit_and_not_with_order() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    same = weights.fingerprint(dict(reversed(tensors.items())))
    assert weights.fingerprint(tensors) == same
    tensors["b"][1] = 1e-45
    assert weights.fingerprint(tensors) != same
    assert weights.fingerprint({"a": torch.zeros(2, 3)}) != weights.fingerprint(
        {"a": torch.zeros(3, 2)}
    )


def test_the_real_convolutions_without_fc_layers(data: Path) -> None:
    network = vggfeat.load(str(data / "vgg16_conv_caffe.safetensors"))
    assert network.name == "D" and network.layers[-1] == "pool5" and network.dim("pool5") == 512
    assert network.metadata["pool"] == "ceil"
    assert (network.preprocessing.channel_order, network.preprocessing.input_range) == (
        "BGR",
        255.0,
    )
    assert network.preprocessing.mean == CAFFE_MEAN_BGR
    assert network.default_layer == "pool5"
    with pytest.raises(VggfeatError, match="no layer 'fc7': they reach pool5; give `layer`"):
        network.require("fc7")


@pytest.mark.parametrize(
    ("train_scale", "scales"),
    [
        ("256-512", (256, 384, 512)),
        ("112-160", (112, 136, 160)),
        ("256", (256,)),
        ("", (256, 384, 512)),
    ],
)
def test_scales_are_those_that_a_net_learned_at(train_scale: str, scales: tuple[int, ...]) -> None:
    network = vggfeat.load("random:A,width=0.125,crop=32")
    network.metadata["train_scale"] = train_scale
    assert network.default_scales == scales


def test_real_convolutions_see_the_world(data: Path) -> None:
    """The mean pool5 of two tench photographs is nearer than that of a tench and a church (real
    weights work).
    """
    network = vggfeat.load(str(data / "vgg16_conv_caffe.safetensors"))
    val = data / "imagenette144" / "val"
    fish = sorted((val / "n01440764").iterdir())[:4]
    church = sorted((val / "n03028079").iterdir())[:4]
    x = vggfeat.embed(network, [*fish, *church], scales=(144,), layer="pool5")
    similarity = x @ x.T
    within = (similarity[:4, :4].sum() - 4) / 12
    assert within > similarity[:4, 4:].mean() + 0.05


@pytest.mark.parametrize(
    ("gone", "spoilt", "says"),
    [
        (
            ["features.8.weight", "features.8.bias"],
            [],
            "features.8.weight of conv3_2 is missing, and it has",
        ),
        (
            ["features.8.bias"],
            [],
            "features.8.bias of conv3_2 is missing, and it has features.8.weight",
        ),
        (
            [],
            ["features.8.weight", "features.8.bias"],
            "features.8.weight of conv3_2 is not finite, and it has",
        ),
        (["classifier.0.weight", "classifier.0.bias"], [], "classifier.0.weight of fc6 is missing"),
        (["classifier.6.bias"], [], "classifier.6.bias of fc8 is missing"),
    ],
)
def test_a_hole_is_no_shallower_net(
    ours: Ours, gone: list[str], spoilt: list[str], says: str
) -> None:
    """Weights may end early; where a later layer is there, they are damaged."""
    path, module = ours
    facts = metadata_of(path)
    state = {key: value for key, value in module.state_dict().items() if key not in gone}
    state |= {key: torch.full_like(state[key], torch.nan) for key in spoilt}
    weights.write_tensors(path, state, facts)
    with pytest.raises(VggfeatError, match="is damaged: " + re.escape(says)):
        vggfeat.load(path)
    weights.write_tensors(
        path,
        {key: value for key, value in state.items() if not key.startswith("classifier")},
        facts,
    )
    if says.startswith("classifier"):
        assert vggfeat.load(path).layers[-1] == "pool5"


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (["classifier.6.0.weight", "classifier.6.0.bias"], "left out: classifier.6.0"),
        (["classifier.7.weight"], "left out: classifier.6, classifier.7"),
        (["fc.weight", "fc.bias"], "left out: classifier.6, fc"),
        (["head.1.weight"], "left out: classifier.6, head.1"),
    ],
)
def test_another_head_is_left_out_and_told(ours: Ours, names: list[str], left_out: str) -> None:
    path, module = ours
    facts = metadata_of(path)
    state = dict(module.state_dict())
    if names[0].startswith("classifier.6."):
        del state["classifier.6.weight"], state["classifier.6.bias"]
    weights.write_tensors(path, state | {name: torch.zeros(2, 2) for name in names}, facts)
    network = vggfeat.load(path)
    assert network.layers[-1] == "fc7" and network.metadata["unwrapped"] == left_out
    weights.write_tensors(path, state | {"classifier.2.weight": torch.zeros(2)}, facts)
    with pytest.raises(
        VggfeatError, match=r"it has 'classifier\.2\.weight', which the net doesn't"
    ):
        vggfeat.load(path)


def test_no_pickle_is_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"features.0.weight": Bomb()}))
    torch.save({"x": Bomb()}, tmp_path / "v.pth")
    for name in ("w.pth", "v.pth"):
        with pytest.raises(VggfeatError, match="can't be read as weights"):
            vggfeat.load(f"oxford:D@{tmp_path / name}")
    assert not (tmp_path / "ran").exists()


def resaved(path: Path, tensors: Tensors | None = None, **metadata: str | None) -> None:
    """The file again, some of its tensors or metadata replaced; None drops one."""
    with safetensors.safe_open(path, framework="pt") as file:
        kept = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
        strings = file.metadata()
    kept = {k: v for k, v in {**kept, **(tensors or {})}.items() if v is not None}
    strings = {k: v for k, v in {**strings, **metadata}.items() if v is not None}
    safetensors.torch.save_file(kept, path, metadata=strings)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("net", "Z", "there is no net 'Z'"),
        ("width", "wide", "unusable metadata: could not convert"),
        ("width", "nan", "can't be a net: width nan and num_classes 3 must be positive and finite"),
        ("width", "-1", "must be positive"),
        ("width", "1e300", "million parameters; at most 700 million are built"),
        ("crop", "33", "not a positive multiple of 32"),
        ("crop", "9" * 5000, "unusable metadata: Exceeds the limit"),
        ("crop", "32000000", "million parameters; at most 700 million are built"),
        ("num_classes", "4", "3 names for 4 classes"),
        ("classes", "[" * 100_000, "unusable metadata: classes is not JSON"),
        ("classes", '{"x": 1}', "classes must be a list, not a record of 1"),
        ("classes", '["x", 2, "z"]', r"classes: \[1\] must be text, not 2"),
        ("classes", '["x"]', "1 names for 3 classes"),
        ("pool", "x", "pool 'x' is neither 'floor' nor 'ceil'"),
        ("mean", "1,2", "unusable metadata: mean must be three numbers"),
        ("std", "0,1,1", "unusable metadata: std must be positive"),
        ("channel_order", None, "unusable metadata: .* lacks channel_order"),
        ("recipe", "[" * 100_000, "the metadata's recipe is not JSON"),
        ("recipe", '{"seed": "x"}', "the metadata's recipe's seed must be a whole number, not 'x'"),
        ("errors", "[]", "the metadata's errors must be a record of names, not a list of 0"),
        ("boxes", "pcr", "unusable metadata: could not convert"),
        ("boxes", "all", "unusable metadata: boxes .*all.* with box_unit"),
        ("train_scale", "36-x", "train_scale must be as 256 or 256-512, not '36-x'"),
        ("train_scale", "\u00b2", "train_scale must be as"),
    ],
)
def test_metadata_that_cant_be(ours: Ours, key: str, value: str | None, says: str) -> None:
    path, _ = ours
    resaved(path, None, **{key: value})
    with pytest.raises(VggfeatError, match=says) as refused:
        vggfeat.load(str(path))
    assert (
        str(refused.value).startswith(str(path)) and len(str(refused.value)) < len(str(path)) + 300
    )


@pytest.mark.parametrize("key", ["features.0.weight", "features.0.bias", "classifier.6.weight"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.to(torch.int64), "is int64, not float32"),
        (lambda t: t > 0, "is bool, not float32"),
        (lambda t: t.to(torch.float8_e4m3fn), "is float8_e4m3fn, not float32"),
        (lambda t: t.to(torch.complex64), "is complex64, not float32"),
        (lambda t: torch.tensor(1.0), r"has shape \(\), the net's is"),
        (lambda t: torch.zeros(0), r"has shape \(0,\), the net's is"),
        (lambda t: torch.cat([t, t]), "has shape .*, the net's is"),
    ],
)
def test_tensors_that_dont_fit(
    ours: Ours, key: str, change: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    path, module = ours
    resaved(path, {key: change(module.state_dict()[key])})
    with pytest.raises(VggfeatError, match=f"{key} {says}"):
        vggfeat.load(str(path))


def test_nothing_is_read_before_it_fits(tmp_path: Path, ours: Ours) -> None:
    """A header of a few hundred bytes claims 20 GB, and the (sparse) file has them."""
    with safetensors.safe_open(ours[0], framework="pt") as file:
        metadata = file.metadata()
    for name in ("unknown", "features.0.weight"):
        n = 20_000_000_000
        tensor = {"dtype": "F32", "shape": [n // 4], "data_offsets": [0, n]}
        header = json.dumps({"__metadata__": metadata, name: tensor}).encode()
        path = tmp_path / "large.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + n)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for spec in (str(path), f"torchvision:vgg11@{path}", f"timm:resnet18@{path}"):
            with pytest.raises(VggfeatError, match=r"doesn't fit|is missing|says of itself"):
                vggfeat.load(spec)
        # KiB; 20 GB are 2e7
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6


@pytest.mark.parametrize(
    ("length", "header"),
    [(2**63, b"{}"), (17 << 20, b" " * (17 << 20)), (100_000, b"[" * 100_000)],
    ids=["longer than the file", "blank", "nested"],
)
def test_headers_that_claim_too_much(tmp_path: Path, length: int, header: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header)
    with pytest.raises(VggfeatError, match="can't be read as weights"):
        vggfeat.load(str(path))


class Bytes:
    """What weights_only lets a pickle make, of any size."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (bytearray, (1 << 40,))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda state: {"a": Bytes()},
            r"it holds Python objects \('(__builtin__|builtins).bytearray'\)",
        ),
        (
            lambda state: {**state, "a": state["features.0.weight"].to_sparse()},
            r"it holds Python objects \('torch.*_",
        ),
        (
            lambda state: {**state, "a": torch.empty(10**6, 10**6, device="meta")},
            r"Python objects \('torch",
        ),
        (lambda state: {1: state["features.0.weight"]}, "holds no plain state dict"),
        (lambda state: [state["features.0.weight"]], "holds no plain state dict"),
        (
            lambda state: {**state, "features.0.weight": torch.zeros(1).expand(10**6, 10**6)},
            "has shape",
        ),
        (
            lambda state: {
                **state,
                "features.0.weight": torch.zeros(64, 3, 3, 3, dtype=torch.int32),
            },
            "is int32",
        ),
    ],
)
def test_a_pth_file_holds_dense_tensors_by_name(
    tmp_path: Path, zipped: bool, change: Callable[[Tensors], object], says: str
) -> None:
    with torch.device("meta"):
        shapes = VGG("A").state_dict()
    state = {k: torch.zeros(1).expand(v.shape) for k, v in shapes.items()}
    state["features.0.weight"] = torch.zeros(64, 3, 3, 3)
    path = tmp_path / "w.pth"
    torch.save(change(state), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(VggfeatError, match=says):
        vggfeat.load(f"torchvision:vgg11@{path}")


def test_a_compressed_pth_file_is_refused(tmp_path: Path, he: Nets) -> None:
    """PyTorch doesn't compress; what does could grow a thousandfold."""
    torch.save(he("A", width=0.125, crop=32).state_dict(), tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(VggfeatError, match=r"w\.pth is compressed"):
        vggfeat.load(f"oxford:D@{tmp_path / 'w.pth'}")


def test_a_pickle_of_another_protocol_is_read_without_a_word(
    tmp_path: Path, he: Nets, recwarn: pytest.WarningsRecorder
) -> None:
    state = he("D", width=0.125, crop=32).state_dict()
    torch.save(state, tmp_path / "w.pth", pickle_protocol=3)
    tensors, _ = weights.read_net(tmp_path / "w.pth")
    assert tensors.keys() == state.keys()
    assert not recwarn.list


def test_weights_in_a_folder_whose_name_is_not_unicode(
    tmp_path: Path, he: Nets, plain: Preprocessing
) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    folder.mkdir()
    module = he("A", width=0.125, crop=32)
    for name in ("a.safetensors", "b.safetensors"):
        weights.save_weights(folder / name, module, plain, source=str(folder))
    torch.save(module.state_dict(), folder / "c.pth")
    loaded = vggfeat.load(str(folder / "a.safetensors"))
    assert torch.equal(
        vgg_of(loaded).get_parameter("features.0.weight"), module.get_parameter("features.0.weight")
    )
    assert loaded.spec == str(folder / "a.safetensors")
    with pytest.raises(VggfeatError, match="doesn't say which preprocessing"):
        vggfeat.load(str(folder / "c.pth"))


def test_a_loaded_net_outlives_its_file(ours: Ours) -> None:
    """The file is only mapped while it is compared: one that shrinks afterwards would kill the
    process.
    """
    path, module = ours
    network = vggfeat.load(str(path))
    os.truncate(path, 0)
    assert torch.equal(
        vgg_of(network).get_parameter("classifier.6.weight"),
        module.get_parameter("classifier.6.weight"),
    )


def test_a_half_written_weights_file_is_never_left(
    tmp_path: Path, he: Nets, plain: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        weights.save_weights(tmp_path / "w.safetensors", he("A", width=0.125, crop=32), plain)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_stays_near_float32(data: Path) -> None:
    network = vggfeat.load(str(data / "vgg16_conv_caffe.safetensors"))
    photos = sorted((data / "photos").iterdir())[:3]
    exact = vggfeat.embed(network, photos, scales=(128,), layer="pool5")
    rough = vggfeat.embed(network.to("cpu", "bfloat16"), photos, scales=(128,), layer="pool5")
    assert not np.array_equal(exact, rough)
    assert (exact * rough).sum(1).min() > 0.9995


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("net", NETS)
def test_every_net_of_table_1_in_every_precision(net: str, precision: str) -> None:
    network = vggfeat.load(f"random:{net},width=0.125,crop=32").to("cpu", precision)
    x = vggfeat.embed(network, [photograph(0, 40, 50)], scales=(32,))
    assert x.shape == (1, 512) and x.dtype == np.float32
    assert abs(np.linalg.norm(x) - 1) < 1e-5
