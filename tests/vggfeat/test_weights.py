"""A name or a path -> a network with its own preprocessing, or a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

import vggfeat
from pretrain.posteriors import how_trained
from pretrain.tables import RELEASED
from vggfeat import backbones, sources, weights
from vggfeat.describe import describe
from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.images import CAFFE_MEAN_BGR, Preprocessing
from vggfeat.table1 import NETS
from vggfeat.tensors import metadata_of
from vggfeat.vgg import VGG

from ..conftest import Nets, assert_same_descriptors, photograph, vgg_of

Tensors = dict[str, torch.Tensor]
# a weights file, and the net that is in it
Ours = tuple[Path, VGG]


@pytest.fixture
def ours(tmp_path: Path, he: Nets, plain: Preprocessing) -> Ours:
    path = tmp_path / "a.safetensors"
    module = he("A", num_classes=3, width=0.125, crop=32)
    weights.save_weights(
        path, module, plain, classes=["x", "y", "z"], train_scale="36", source="test", recipe="{}"
    )
    return path, module


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


def test_a_name_that_is_not_the_files_net_is_refused(ours: Ours) -> None:
    with pytest.raises(VggfeatError, match="hold net A, not D"):
        vggfeat.load("D", weights=ours[0])


def test_fingerprint_changes_with_one_bit_and_not_with_order() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    same = weights.fingerprint(dict(reversed(tensors.items())))
    assert weights.fingerprint(tensors) == same
    tensors["b"][1] = 1e-45
    assert weights.fingerprint(tensors) != same
    assert weights.fingerprint({"a": torch.zeros(2, 3)}) != weights.fingerprint(
        {"a": torch.zeros(3, 2)}
    )


def release_is(monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[str, str]:
    """A stand-in for net D's released file, and its address and name from now on."""
    with open(path, "rb") as file:
        name = f"vgg16-{hashlib.file_digest(file, 'sha256').hexdigest()[:8]}.pth"
    url = f"https://example.org/models/{name}"
    monkeypatch.setitem(sources.OXFORD, "D", url)
    return url, name


def test_another_file_in_the_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lay there under the released file's name was the authors' net."""
    place = tmp_path / "checkpoints" / "vgg16-00b39a1b.pth"
    place.parent.mkdir()
    released(tmp_path, {"classifier.1": 0.0}).rename(place)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        VggfeatError, match=r"00b39a1b\.pth is not the released file.* give oxford:D@FILE"
    ):
        vggfeat.load("oxford:D")


def test_the_oxford_convention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """classifier.1|4|6, BGR 0-255 minus the mean, ceil pooling; from a file, by keys alone, and
    downloaded.
    """
    torch.manual_seed(0)
    state = VGG("D").state_dict()
    names = {"classifier.0": "classifier.1", "classifier.3": "classifier.4"}
    theirs = {
        f"{names.get(k.rpartition('.')[0], k.rpartition('.')[0])}.{k.rpartition('.')[2]}": v
        for k, v in state.items()
    }
    assert "classifier.4.weight" in theirs and "classifier.3.weight" not in theirs
    path = tmp_path / "vgg16.pth"
    torch.save(theirs, path)
    asked = []

    def download(url: str, to: str, hash_prefix: str) -> None:
        asked.append((url.rpartition("/")[2], hash_prefix))
        shutil.copy(path, to)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path / "hub")
    other = [vggfeat.load(spec) for spec in (f"oxford:D@{path}", str(path))]
    url, name = release_is(monkeypatch, path)
    networks = [vggfeat.load(spec) for spec in (f"oxford:D@{path}", str(path), "oxford:D", "D")]
    assert asked == [(name, name[6:14])]  # and kept
    assert len({n.fingerprint for n in [*networks, *other]}) == 1
    assert [n.spec for n in networks] == [f"oxford:D@{path}", str(path), "oxford:D", "oxford:D"]
    for n in networks:  # the released file, byte for byte
        assert (n.metadata["source"], n.metadata["train_scale"]) == (url, "256-512")
        assert how_trained(n.metadata)["changes"] == RELEASED
    for n in other:  # any net whose file has these names was the authors', trained at 256 to 512
        assert n.metadata["source"] == f"{path}, which is not the released vgg16-00b39a1b.pth"
        assert n.metadata["train_scale"] == "" and set(how_trained(n.metadata).values()) == {""}
        assert n.preprocessing == networks[0].preprocessing and n.metadata["pool"] == "ceil"
        assert n.classes == networks[0].classes
    network = networks[0]
    assert (
        network.name == "D"
        and network.default_layer == "fc7"
        and network.metadata["pool"] == "ceil"
    )
    assert (
        network.classes is not None
        and network.classes[:2] == ["tench", "goldfish"]
        and len(network.classes) == 1000
    )
    assert torch.equal(
        vgg_of(network).get_parameter("classifier.3.weight"), state["classifier.3.weight"]
    )
    image = torch.from_numpy(photograph(0, 20, 30)[None])
    x = network.preprocessing(image)
    assert x.shape == (1, 3, 20, 30)
    for c, (channel, mean) in enumerate(zip((2, 1, 0), CAFFE_MEAN_BGR, strict=True)):
        torch.testing.assert_close(x[0, c], image[0, ..., channel].float() - mean)


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


def test_torchvisions_enums(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.vgg11()
    path = tmp_path / "v.pth"
    torch.save(theirs.state_dict(), path)
    network = vggfeat.load(f"torchvision:vgg11@{path}")
    assert (
        network.name == "A" and network.metadata["pool"] == "floor" and network.layers[-1] == "fc8"
    )
    assert network.metadata["source"] == f"{path}, which is not the released vgg11-8a719046.pth"
    image = torch.from_numpy(photograph(1, 224, 224)[None])
    transform = torchvision.models.VGG11_Weights.IMAGENET1K_V1.transforms()
    expected = torchvision.transforms.functional.normalize(
        image.permute(0, 3, 1, 2).float() / 255, transform.mean, transform.std
    )
    torch.testing.assert_close(network.preprocessing(image), expected)
    with torch.inference_mode():
        ours = describe(network, image, "fc8", mirror=False)
        assert_same_descriptors(ours.numpy(), theirs.eval()(expected).numpy())


def test_torchvisions_features_enum_has_no_usable_fc_layers(tmp_path: Path) -> None:
    state = VGG("D").state_dict()
    for key in state:
        if key.startswith("classifier"):
            state[key] = torch.full_like(state[key], torch.nan)
    torch.save(state, tmp_path / "f.pth")
    network = vggfeat.load(f"torchvision:vgg16.IMAGENET1K_FEATURES@{tmp_path / 'f.pth'}")
    assert network.layers[-1] == "pool5" and network.metadata["pool"] == "ceil"
    assert network.preprocessing.std == pytest.approx((1 / 255,) * 3)
    with pytest.raises(VggfeatError, match="no layer 'fc7'"):
        network.require("fc7")


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


def test_preprocessing_that_was_asked_for_is_told(tmp_path: Path) -> None:
    """Of convolutions alone no name tells whose they are."""
    path = tmp_path / "f.pth"
    torch.save(VGG("D", until="pool5").state_dict(), path)
    for source in ("oxford:D", "torchvision:vgg16"):
        told = vggfeat.load(f"{source}@{path}").metadata["source"]
        assert told.endswith(f"; preprocessing as of {source}, as asked")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_timm_backbones_are_pooled_over_their_dense_map(tmp_path: Path, name: str) -> None:
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model(name, pretrained=False).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    network = vggfeat.load(f"timm:{name}@{tmp_path / 'w.safetensors'}")
    assert network.preprocessing.mean == pytest.approx(model.pretrained_cfg["mean"])
    image = torch.from_numpy(photograph(2, 96, 160)[None])
    with torch.inference_mode():
        expected = model.forward_features(network.preprocessing(image)).mean((2, 3))
    assert_same_descriptors(
        describe(network, image, "features", mirror=False).numpy(), expected.numpy()
    )
    assert network.dim("features") == expected.shape[1]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_a_timm_model_of_one_size_says_so(tmp_path: Path, name: str) -> None:
    import timm

    safetensors.torch.save_file(timm.create_model(name).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(VggfeatError, match=f"timm:{name} takes only 224x224 images"):
        vggfeat.load(f"timm:{name}@{tmp_path / 'w.safetensors'}")


def test_random_nets_come_from_their_seed() -> None:
    a, b = (
        vggfeat.load("random:A,width=0.125,crop=32"),
        vggfeat.load("random:A,width=0.125,crop=32,seed=1"),
    )
    assert (
        a.fingerprint
        == vggfeat.load("random:A,width=0.125,crop=32,seed=0").fingerprint
        != b.fingerprint
    )
    weight = vgg_of(vggfeat.load("random:D,crop=32")).get_parameter("features.28.weight")
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)


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


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, ours: Ours, he: Nets) -> None:
    path, _ = ours
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(VGG("A", 3, 0.125, 32).state_dict(), tmp_path / "plain.pth")
    torch.save(he("A", width=0.125, crop=32, num_classes=3).state_dict(), tmp_path / "narrow.pth")
    cases = {
        "nothing": "'nothing' are not known",
        "B": "no weights were released for net B",
        "oxford:A": "no weights were released for net 'A'",
        str(tmp_path / "missing.safetensors"): "no weights file at",
        str(tmp_path / "cut.safetensors"): "can't be read as weights",
        str(tmp_path / "empty.pth"): "is empty",
        f"oxford:D@{tmp_path / 'list.pth'}": "holds no plain state dict",
        str(tmp_path / "plain.pth"): "doesn't say which preprocessing",
        f"torchvision:vgg11@{tmp_path / 'narrow.pth'}": (
            r"features.0.weight has shape \(8, 3, 3, 3\), the net's is"
        ),
        f"torchvision:vgg16@{tmp_path / 'narrow.pth'}": "doesn't fit net D",
        "torchvision:resnet50": "not a net of Table 1",
        "torchvision:vgg16.V9": "has no weights 'V9'; there are IMAGENET1K_V1",
        "timm:nonesuch": "timm has no model",
        "random:A,depth=3": "has a setting 'depth=3'",
        "random:Z": "no net 'Z'",
    }
    for spec, message in cases.items():
        with pytest.raises(VggfeatError, match=message) as caught:
            vggfeat.load(spec)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rest", ["", ":", ":@w.pth"])
@pytest.mark.parametrize("name", sources.SOURCES)
def test_a_source_alone_says_which_nets_it_has(name: str, rest: str) -> None:
    if name + rest == "mini":
        return  # which is net D of it
    forms = " or ".join(form for form, _ in sources.SOURCES[name].forms)
    says = f"weights '{name}{rest}' don't say which of {name}'s are meant: give {forms}"
    with pytest.raises(WrongUsage, match=f"^{re.escape(says)}$"):
        vggfeat.load(name + rest)


def test_what_no_source_has() -> None:
    for spec, says in {
        "mirror:": "'mirror:' are not known: there is no such file, and no such source; give",
        "mirror:D": "'mirror:D' are not known: there is no such file, and no such source; give",
        "mini:E": "there are no mini weights 'E': give mini:A or mini:D$",
        "mini:A@w.pth": "mini weights come with the package: give mini:A, or .*w.pth$",
        "random:A@w.pth": "random: weights come from a seed, not from a file",
    }.items():
        with pytest.raises(WrongUsage, match=says):
            vggfeat.load(spec)


def test_a_source_has_the_name_of_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A further row of the table with a loader that there is; its name begins as another's does."""
    for name in ("oxford", "torchvision", "mini", "random"):
        row = replace(sources.SOURCES[name], name=f"{name}x")
        monkeypatch.setitem(sources.SOURCES, f"{name}x", row)
    assert vggfeat.load("minix:A").spec == "minix:A"
    assert vggfeat.load("randomx:A,width=0.125,crop=32").spec == "randomx:A,width=0.125,crop=32"
    theirs = released(tmp_path, {"classifier.0": 0.0})
    for spec, says in {
        "oxfordx:A": "there are oxfordx:D and oxfordx:E",
        f"oxfordx:D@{theirs}": "has torchvision's names .*give torchvision:vgg16@",
        f"torchvisionx:vgg16.IMAGENET1K_FEATURES@{theirs}": "give torchvisionx:vgg16@",
    }.items():
        with pytest.raises(VggfeatError, match=says):
            vggfeat.load(spec)
    row = replace(sources.SOURCES["oxford"], name="torchvisionx")
    monkeypatch.setitem(sources.SOURCES, "torchvisionx", row)
    with pytest.raises(VggfeatError, match="not those of the conversion of the authors' nets"):
        vggfeat.load(f"torchvisionx:D@{theirs}")


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t * float("nan"), "has values of conv1.weight that are not finite"),
        (lambda t: t.to(torch.int32), "conv1.weight is int32, not float32"),
        (lambda t: t[:1], r"conv1.weight has shape \(1, 3, 7, 7\), the net's is"),
    ],
)
def test_a_timm_file_is_checked_before_it_is_loaded(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    import timm

    state = timm.create_model("resnet18", num_classes=0).state_dict()
    state["conv1.weight"] = change(state["conv1.weight"]).contiguous()
    safetensors.torch.save_file(state, tmp_path / "t.safetensors")
    with pytest.raises(VggfeatError, match=says):
        vggfeat.load(f"timm:resnet18@{tmp_path / 't.safetensors'}")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("random:A,width=30", "has 116,002 million parameters; at most 700 million are built"),
        ("random:A,width=nan", "must be positive and finite"),
        ("random:A,width=1e308", "million parameters"),
        ("random:A,crop=100000000000000000000000000000032", "million parameters"),
        ("random:A,width=0.1,crop=32,classes=100000000000", "million parameters"),
        ("random:A,width=0.1,crop=32,seed=-1", "has a setting 'seed=-1'"),
        (f"random:A,width=0.1,crop=32,seed={2**64}", "has a setting 'seed="),
        ("timm:vit_giant_patch14_clip_224", "million parameters; at most 700 million are loaded"),
        ("timm:hf-hub:somebody/something", "timm has no model 'hf-hub:somebody/something'"),
        ("timm:local-dir:/tmp", "timm has no model"),
        ("oxford:D@a\0b", "no name has a zero byte"),
        ("x" * 5000 + ".pth", "File name too long"),
        ("/dev/zero.pth", "no weights file at"),
    ],
)
def test_specs_from_strangers(spec: str, says: str) -> None:
    """A feature file or a model names one; nothing is allocated for what can't be."""
    with pytest.raises(VggfeatError, match=says):
        vggfeat.load(spec)


def test_pipes_devices_and_loops_are_no_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    for name, says in (
        ("pipe.safetensors", "no regular file"),
        ("zero.pth", "no regular file"),
        ("loop.pth", "can't read"),
    ):
        for spec in (str(tmp_path / name), f"oxford:D@{tmp_path / name}"):
            with pytest.raises(VggfeatError, match=says):
                vggfeat.load(spec)


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


# --- what a file says of itself -------------------------------------------------------------------


def zeros(path: Path, shapes: Tensors, metadata: dict[str, str]) -> None:
    """A .safetensors file of zeros, which takes no room on the disk. shapes: name -> a tensor of
    that shape.
    """
    at, header = 0, dict[str, Any](__metadata__=metadata)
    for key, like in shapes.items():
        n = 4 * like.numel()
        header[key] = {"dtype": "F32", "shape": list(like.shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)


def convolutions(net: str) -> Tensors:
    with torch.device("meta"):
        return VGG(net, until="pool5").state_dict()


RGB = {"mean": "123.68,116.779,103.939", "channel_order": "RGB", "input_range": "0..255"}
TORCHVISIONS = {
    "mean": "0.485,0.456,0.406",
    "std": "0.229,0.224,0.225",
    "channel_order": "RGB",
    "input_range": "0..1",
}
AUTHORS = {"mean_bgr": "103.939,116.779,123.68"}


@pytest.mark.parametrize(
    ("source", "metadata", "says"),
    [
        (
            "torchvision:vgg11",
            {"net": "A", **AUTHORS},
            "channel_order 'BGR', .* has 'RGB': give .* alone",
        ),
        (
            "torchvision:vgg11",
            {"channel_order": "BGR"},
            "channel_order 'BGR', .* has 'RGB': name the source",
        ),
        ("torchvision:vgg11", {"net": "A", **RGB}, r"input_range '0\.\.255', .* has '0\.\.1'"),
        ("torchvision:vgg11", {"std": "1,1,1"}, "std '1,1,1', .* has '0.229"),
        ("torchvision:vgg11", {"mean": "0.5,0.5,0.5"}, "mean '0.5,0.5,0.5', .* has '0.485"),
        ("torchvision:vgg11", {"net": "A-LRN", **TORCHVISIONS}, "net 'A-LRN', .* has 'A'"),
        ("torchvision:vgg11", {"pool": "ceil"}, "pool 'ceil', .* has 'floor'"),
        ("torchvision:vgg11", {"crop": "192"}, "crop '192', .* has '224'"),
        ("torchvision:vgg11", {"width": "0.5"}, "width '0.5', .* has '1'"),
        ("torchvision:vgg11", {"classes": json.dumps([str(i) for i in range(1000)])}, "classes "),
        ("torchvision:vgg11", {"width": "wide"}, "unusable metadata"),
        ("torchvision:vgg11", {"num_classes": "many"}, "unusable metadata"),
        (
            "oxford:D",
            {"net": "D", **TORCHVISIONS},
            "channel_order 'RGB', .* has 'BGR': give .* alone",
        ),
        ("oxford:D", {"net": "D", **AUTHORS, "pool": "floor"}, "pool 'floor', .* has 'ceil'"),
        ("oxford:D", {"train_scale": "256"}, "train_scale '256', .* has '256-512'"),
        ("oxford:D", {"net": "C", **AUTHORS}, "net 'C', .* has 'D'"),
        ("timm:vgg11", {"net": "A", **AUTHORS}, "channel_order 'BGR', and timm:vgg11 has 'RGB'"),
        ("timm:vgg11", {"pool": "ceil"}, "pool 'ceil', and timm:vgg11 has 'floor'"),
        ("timm:vgg11", {"net": "E"}, "net 'E', and timm:vgg11 has 'vgg11'"),
    ],
)
def test_a_source_that_contradicts_its_file_is_refused(
    tmp_path: Path, source: str, metadata: dict[str, str], says: str
) -> None:
    shapes = convolutions("D" if source == "oxford:D" else "A")
    if source.startswith("timm"):  # which wants the whole net
        import timm

        with torch.device("meta"):
            shapes = timm.create_model("vgg11", num_classes=0).state_dict()
    zeros(tmp_path / "w.safetensors", shapes, metadata)
    with pytest.raises(VggfeatError, match=rf"w\.safetensors (says of itself|has) {says}"):
        vggfeat.load(f"{source}@{tmp_path / 'w.safetensors'}")


def test_a_source_that_agrees_with_its_file_is_taken(tmp_path: Path) -> None:
    """Also in other units, and with what the source doesn't say."""
    path = tmp_path / "w.safetensors"
    in_255 = {**RGB, "mean": "123.675,116.28,103.53", "std": "58.395,57.12,57.375"}
    for metadata in (TORCHVISIONS, in_255, {"net": "A", "train_scale": "300"}, {"format": "pt"}):
        zeros(path, convolutions("A"), metadata)
        network = vggfeat.load(f"torchvision:vgg11@{path}")
        assert network.preprocessing.same(Preprocessing.from_metadata(TORCHVISIONS))
        assert network.metadata.get("train_scale") == metadata.get("train_scale")
    names = [f"class {i}" for i in range(7)]
    zeros(path, convolutions("A"), {"classes": json.dumps(names), "num_classes": "7"})
    assert vggfeat.load(f"torchvision:vgg11@{path}").classes == names
    zeros(path, convolutions("A"), {"num_classes": "7"})
    assert vggfeat.load(f"torchvision:vgg11@{path}").classes is None


def test_the_real_convolutions_are_refused_as_torchvisions(data: Path) -> None:
    path = data / "vgg16_conv_caffe.safetensors"
    for source in ("torchvision:vgg16", "torchvision:vgg16.IMAGENET1K_FEATURES"):
        with pytest.raises(
            VggfeatError, match=r"says of itself channel_order 'BGR'.* give .* alone"
        ):
            vggfeat.load(f"{source}@{path}")
    assert vggfeat.load(f"oxford:D@{path}").fingerprint == vggfeat.load(path).fingerprint


def released(tmp_path: Path, head: dict[str, float]) -> Path:
    """A .pth file of D's shapes whose FC layers have these names and values."""
    with torch.device("meta"):
        shapes = VGG("D").state_dict()
    state = {
        k: torch.zeros(1).expand(v.shape) for k, v in shapes.items() if k.startswith("features")
    }
    for layer, value in head.items():
        like = {"classifier.1": "classifier.0", "classifier.4": "classifier.3"}.get(layer, layer)
        for kind in ("weight", "bias"):
            state[f"{layer}.{kind}"] = torch.full((1,), value).expand(
                shapes[f"{like}.{kind}"].shape
            )
    torch.save(state, tmp_path / "w.pth")
    return tmp_path / "w.pth"


@pytest.mark.parametrize(
    ("source", "head", "says"),
    [
        ("oxford:D", {"classifier.0": 0.0}, "torchvision's names.* give torchvision:vgg16@"),
        (
            "torchvision:vgg16",
            {"classifier.1": 0.0},
            "the conversion of the authors' nets.*: give .* alone",
        ),
        ("timm:vgg16", {"classifier.1": 0.0}, "the conversion of the authors' nets"),
        (
            "torchvision:vgg16",
            {"classifier.0": float("nan")},
            "NaN for its FC layers.*IMAGENET1K_FEATURES@",
        ),
        ("torchvision:vgg16.IMAGENET1K_V1", {"classifier.0": float("nan")}, "IMAGENET1K_FEATURES@"),
        ("torchvision:vgg16.IMAGENET1K_FEATURES", {"classifier.0": 0.0}, "has FC layers, unlike"),
    ],
)
def test_names_that_tell_another_release(
    tmp_path: Path, source: str, head: dict[str, float], says: str
) -> None:
    with pytest.raises(VggfeatError, match=says):
        vggfeat.load(f"{source}@{released(tmp_path, head)}")


def test_batch_normalisation_is_timms(tmp_path: Path) -> None:
    """torchvision's file under timm's names: the FC layers are convolutions there."""
    import timm

    with torch.device("meta"):
        state = torchvision.models.vgg11_bn().state_dict()
        wanted = timm.create_model("vgg11_bn", num_classes=0).state_dict()
    path = tmp_path / "bn.safetensors"
    zeros(path, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, {})
    for spec in (f"torchvision:vgg11@{path}", str(path)):
        with pytest.raises(VggfeatError, match=r"has batch normalisation .* give timm:vgg11_bn@"):
            vggfeat.load(spec)
    found, _ = backbones._read_for_timm("vgg11_bn", path, wanted)
    assert wanted.keys() <= found.keys()
    assert found["pre_logits.fc1.weight"].shape == (4096, 512, 7, 7)


# --- without a network ----------------------------------------------------------------------------


def refused(*_: object, **__: object) -> NoReturn:
    raise URLError("no network")


@pytest.mark.parametrize(
    "spec", ["oxford:D", "torchvision:vgg19", "torchvision:vgg16.IMAGENET1K_FEATURES"]
)
def test_a_download_that_fails_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(VggfeatError) as failed:
        vggfeat.load(spec)
    said = str(failed.value)
    digits = {"oxford:D": "00b39a1b", "torchvision:vgg19": "dcbb9e9d"}.get(spec, "88682ab5")
    for words in (
        f"its sha256 begins with {digits}",
        f"give {spec}@FILE",
        f"into {tmp_path}/hub/checkpoints",
    ):
        assert words in said
    assert (
        "`weights` mini" in said
        and "`layer` pool5" in said
        and "@FILE@" not in said
        and "--" not in said
    )


def test_a_page_in_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/vgg16-00b39a1b.pth").write_text("<html>404</html>")
    with pytest.raises(VggfeatError, match=r"vgg16-00b39a1b\.pth is a web page"):
        vggfeat.load("oxford:D")


def test_timm_without_a_hub_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look, as long as the hub's own patience; then the hub's offline mode, which fails at
    once.
    """
    import huggingface_hub
    import timm
    from huggingface_hub import constants

    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> NoReturn:
            asked.append((url, timeout, constants.HF_HUB_OFFLINE))
            raise OSError("Name or service not known")

    def create(name: str, pretrained: bool, **settings: Any) -> torch.nn.Module:
        if pretrained:
            assert constants.HF_HUB_OFFLINE
            raise OSError("not in the cache")
        return make(name, pretrained=False, **settings)

    make = timm.create_model
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(VggfeatError) as failed:
        vggfeat.load("timm:resnet18")
    said = str(failed.value)
    assert asked == [(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT, False)]
    assert constants.HF_HUB_OFFLINE is False
    assert (
        "timm/resnet18" in said
        and "model.safetensors by hand and give timm:resnet18@FILE; " in said
    )
    assert "`weights` mini" in said


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
