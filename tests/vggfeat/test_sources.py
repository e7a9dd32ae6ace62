"""A name, or one with a file -> a network with its own preprocessing, or a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

import vggfeat
from pretrain import evaluate, export
from pretrain.posteriors import how_trained
from pretrain.tables import RELEASED
from vggfeat import sources
from vggfeat.describe import describe
from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.images import CAFFE_MEAN_BGR, Preprocessing
from vggfeat.sources import Source
from vggfeat.terminal import run
from vggfeat.vgg import VGG
from vggfeat.weights import Network, Told, fingerprint

from ..conftest import Command, Nets, assert_same_descriptors, photograph, vgg_of
from .conftest import Ours, Tensors, cells, zeros


def test_a_name_that_is_not_the_files_net_is_refused(ours: Ours) -> None:
    with pytest.raises(VggfeatError, match="hold net A, not D"):
        vggfeat.load("D", weights=ours[0])


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


def test_preprocessing_that_was_asked_for_is_told(tmp_path: Path) -> None:
    """Of convolutions alone no name tells whose they are."""
    path = tmp_path / "f.pth"
    torch.save(VGG("D", until="pool5").state_dict(), path)
    for source in ("oxford:D", "torchvision:vgg16"):
        told = vggfeat.load(f"{source}@{path}").metadata["source"]
        assert told.endswith(f"; preprocessing as of {source}, as asked")


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


# --- what a file says of itself -------------------------------------------------------------------


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


# --- what words alone tell ------------------------------------------------------------------------


def told_of(spec: str) -> Told:
    name, _, what = spec.partition(":")
    row = sources.SOURCES[name]
    told = row.told and row.told(what)
    assert told
    return told


@pytest.mark.parametrize("spec", ["mini:A", "mini:D", "random:B,width=0.125,crop=64,classes=7"])
def test_words_tell_what_loading_gives(spec: str) -> None:
    told, network = told_of(spec), vggfeat.load(spec)
    assert (told.net, told.outline.layers) == (network.name, network.layers)
    for layer in network.layers:
        assert told.outline.min_side(layer) == network.min_side(layer)


@pytest.mark.parametrize(
    ("spec", "net"),
    [
        ("oxford:D", "D"),
        ("torchvision:vgg11", "A"),
        ("torchvision:vgg16.IMAGENET1K_FEATURES", "D"),
    ],
)
def test_words_tell_how_far_a_file_may_reach(tmp_path: Path, spec: str, net: str) -> None:
    """And which sides its layers need, by their crop and pooling."""
    zeros(tmp_path / "w.safetensors", convolutions(net), {})
    told, network = told_of(spec), vggfeat.load(f"{spec}@{tmp_path / 'w.safetensors'}")
    assert told.net == network.name
    assert told.outline.layers[: len(network.layers)] == network.layers
    assert (told.outline.layers == network.layers) == spec.endswith("FEATURES")
    for layer in network.layers:
        assert told.outline.min_side(layer) == network.min_side(layer)
    if "fc7" in told.outline.layers:
        assert told.outline.min_side("fc7") == vgg_of(network).crop == 224


def test_a_file_that_may_end_early_is_asked_for_its_layer() -> None:
    """The scales that the deepest layer needs are known where it is."""
    for spec in ("oxford:D@w.pth", "torchvision:vgg16@w.pth", "w.pth"):
        sources.refuse_contradictions("", spec, scales=[16])
    given = {"D": (), "oxford:D@w.pth": ("pool4", "fc7"), "timm:resnet18@w.pth": ()}
    for spec, layers in given.items():
        with pytest.raises(WrongUsage, match="scale 16 is too small"):
            sources.refuse_contradictions("", spec, layers, [16])


def test_a_short_word_with_the_net_that_is_asked_for() -> None:
    assert vggfeat.load("A", "mini").spec == "mini:A" and vggfeat.load("mini").spec == "mini:D"
    with pytest.raises(WrongUsage, match="weights D hold net D, not E"):
        vggfeat.load("E", "D")


# --- a source from outside ------------------------------------------------------------------------


class Tiny(torch.nn.Module):
    """A backbone that is no VGG, of two layers."""

    layers = ["stem", "body"]  # noqa: RUF012
    channels = {"stem": 4, "body": 6}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 8, stride=8)
        self.body = torch.nn.Conv2d(4, 6, 3, stride=2)

    def min_side(self, layer: str) -> int:
        return {"stem": 8, "body": 24}[layer]

    def forward(self, x_NCHW: torch.Tensor, layer: str) -> torch.Tensor:
        return next(map_NDHW for _, map_NDHW in self.maps(x_NCHW, (layer,)))

    def maps(
        self, x_NCHW: torch.Tensor, layers: Sequence[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        x: torch.Tensor = self.stem(x_NCHW)
        if "stem" in layers:
            yield "stem", x
        if "body" in layers:
            yield "body", self.body(x)

    def pooled(self, map_NDHW: torch.Tensor, layer: str) -> torch.Tensor:
        return map_NDHW.mean(dim=(2, 3), dtype=torch.float32)

    def linear_pooled(
        self, coef_KD: np.ndarray, mean_D: np.ndarray, layer: str
    ) -> tuple[np.ndarray, np.ndarray]:
        return coef_KD, np.zeros(len(coef_KD))

    def looks_at(
        self, layer: str, grid: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, None]:
        rows, columns = (np.arange(count)[:, None] / count + [0, 1 / count] for count in grid)
        return rows, columns, None


def load_clip(source: str, what: str, file: Path | None) -> Network:
    torch.manual_seed(0)
    module = Tiny()
    spec = f"{source}:{what}" + (f"@{file}" if file else "")
    sha256 = fingerprint(module.state_dict())
    plain = Preprocessing(
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), channel_order="RGB", input_range=1.0
    )
    return Network(spec, module, plain, sha256, {"net": what, **plain.to_metadata()})


def clip_told(what: str) -> Told:
    with torch.device("meta"):
        return Told(what, Tiny())


def not_loaded(*_: object) -> NoReturn:
    raise AssertionError("its words tell")


@pytest.fixture(params=[clip_told, None], ids=["words tell", "only loading tells"])
def clip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A row of a source that knows a net "tiny", whose layers are none of Table 1's."""
    forms = (("clip:tiny", "a net of two layers"),)
    row = Source("clip", load_clip, "clip:tiny", forms, told=request.param)
    monkeypatch.setitem(sources.SOURCES, "clip", row)
    return row


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--layer", "fc7"), r"clip:tiny have no layer 'fc7'.* give --layer one of stem, body; "),
        (("--layer", "conv1_1"), "have no layer 'conv1_1'"),
        (("--net", "D"), "clip:tiny hold net tiny, not D: give that net, or the weights alone"),
        (("--net", "small"), "clip:tiny hold net tiny, not small"),
        (("--max-pool", "ceil"), "clip:tiny is no net of Table 1: its pooling can't be set"),
        (("--scales", "16,32"), "scale 16 is too small: body of net tiny needs at least 24"),
        (
            ("--scales", "7", "--layer", "stem"),
            "scale 7 is too small: stem of net tiny needs at least 8",
        ),
    ],
)
def test_what_a_source_from_outside_cant_do_is_wrong_usage(
    clip: Source,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    says: str,
) -> None:
    """Before anything is loaded, where its row tells."""
    if clip.told:
        monkeypatch.setitem(sources.SOURCES, "clip", replace(clip, load=not_loaded))
    out = ("--out", tmp_path / "f.h5")
    ran = command("extract", "--dataset", "digits", "--weights", "clip:tiny", *words, *out)
    assert (ran.status, ran.out, len(ran.err_lines)) == (2, "", 1), ran.err
    assert re.search(says, ran.err) and "conv5_3" not in ran.err
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_source_from_outside_may_end_early(clip: Source) -> None:
    """Which layer describes by default is the file's to say, unless it has but values."""
    early = sources.refuse_contradictions
    early("", "clip:tiny@f.pth", scales=[16])
    early("", "clip:tiny@f.pth", ("stem",), [16])
    assert not sources.of_words("clip:tiny@f.pth") and sources.of_words("clip:tiny")
    if clip.told:
        with pytest.raises(WrongUsage, match="hold net tiny, not D"):
            early("D", "clip:tiny@f.pth")
        with pytest.raises(WrongUsage, match="scale 16 is too small: body"):
            early("", "clip:tiny@f.pth", ("stem", "body"), [16])


def test_every_command_takes_a_source_from_outside(
    clip: Source, command: Command, made_folder: Path, tmp_path: Path
) -> None:
    features, model = tmp_path / "f.h5", tmp_path / "m.h5"
    images = ("--dataset", "folder", "--root", made_folder)
    weights = ("--weights", "clip:tiny", "--net", "tiny", "--layer", "body", "--scales", "32,48")
    out = ("--out", features)
    assert command("extract", *images, *weights, *out, "--dry-run").status == 0
    for line in (
        ("extract", *images, *weights, *out),
        ("svm", "--features", features, "--C", 1, "--workers", 1, "--out", model),
        ("info", features, "--all"),
        ("info", model),
        ("predict", made_folder / "red" / "01.jpg", "--model", model),
        ("report", "--model", model, "--features", features, "--out", tmp_path / "r.html"),
        ("neighbours", "--features", features, "--query", made_folder / "blue" / "01.jpg"),
        ("weights",),
    ):
        ran = command(*line)
        assert ran.status == 0, ran.err
        if line[0] == "info":
            assert cells(ran.out, "weights")[0].startswith("clip:tiny")
    assert "a net of two layers" in ran.out


def test_what_needs_a_net_of_table_1_refuses_a_source_from_outside(
    clip: Source, run_main: Command, made_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "val").symlink_to(made_folder)
    measured = ("--weights", "clip:tiny", "--data", tmp_path / "images")
    for module, *words in (
        (export, "clip:tiny", "--to", "onnx", "--out", tmp_path / "n.onnx"),
        (export, "clip:tiny", "--to", "float16", "--out", tmp_path / "n.safetensors"),
        (evaluate, *measured),
        (evaluate, *measured, "--max-pool", "ceil"),
    ):
        ran = run_main(partial(run, module.app, "python -m pretrain"), *words)
        assert (ran.status, len(ran.err_lines)) == (2, 1), ran.err
        assert "net of Table 1" in ran.err
    assert os.listdir(tmp_path) == ["images"]
