"""A name or a path -> a network with its own preprocessing, or a sentence."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

import vggfeat
from vggfeat import weights
from vggfeat.describe import describe
from vggfeat.errors import VggfeatError
from vggfeat.images import CAFFE_MEAN_BGR
from vggfeat.vgg import NETS, VGG

from .conftest import photograph


@pytest.fixture
def ours(tmp_path, he, plain):
    path = tmp_path / "a.safetensors"
    module = he("A", num_classes=3, width=0.125, crop=32)
    weights.save_weights(
        path, module, plain, classes=["x", "y", "z"], train_scale="36", source="test", recipe="{}"
    )
    return path, module


def test_our_file_comes_back_whole(ours, plain):
    path, module = ours
    network = vggfeat.load("A", weights=path)
    assert network.preprocessing == plain
    assert network.classes == ["x", "y", "z"]
    assert network.metadata["train_scale"] == "36" and network.metadata["source"] == "test"
    for key, value in module.state_dict().items():
        assert torch.equal(network.module.state_dict()[key], value)
    assert (network.module.width, network.module.crop, network.layers[-1]) == (0.125, 32, "fc8")
    with safetensors.safe_open(path, framework="np") as file:  # readable without this project
        assert {"net", "num_classes", "width", "crop", "mean", "std", "channel_order", "input_range"} <= set(
            file.metadata()
        )
        assert json.loads(file.metadata()["classes"]) == ["x", "y", "z"]


def test_a_name_that_is_not_the_files_net_is_refused(ours):
    with pytest.raises(VggfeatError, match="hold net A, not D"):
        vggfeat.load("D", weights=ours[0])


def test_fingerprint_changes_with_one_bit_and_not_with_order():
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    same = weights.fingerprint(dict(reversed(tensors.items())))
    assert weights.fingerprint(tensors) == same
    tensors["b"][1] = 1e-45
    assert weights.fingerprint(tensors) != same
    assert weights.fingerprint({"a": torch.zeros(2, 3)}) != weights.fingerprint({"a": torch.zeros(3, 2)})


def test_the_oxford_convention(tmp_path, monkeypatch):
    """classifier.1|4|6, BGR 0-255 minus the mean, ceil pooling; from a file, by keys alone, and downloaded."""
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

    def download(url, **settings):
        asked.append((url.rpartition("/")[2], settings["check_hash"], settings["weights_only"]))
        return torch.load(path, weights_only=True)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    networks = [vggfeat.load(spec) for spec in (f"oxford:D@{path}", str(path), "oxford:D", "D")]
    assert asked == [("vgg16-00b39a1b.pth", True, True)] * 2
    assert len({n.fingerprint for n in networks}) == 1
    network = networks[0]
    assert network.name == "D" and network.default_layer == "fc7" and network.metadata["pool"] == "ceil"
    assert (
        network.classes is not None
        and network.classes[:2] == ["tench", "goldfish"]
        and len(network.classes) == 1000
    )
    assert torch.equal(network.module.classifier[3].weight, state["classifier.3.weight"])
    image = torch.from_numpy(photograph(0, 20, 30)[None])
    x = network.preprocessing(image)
    assert x.shape == (1, 3, 20, 30)
    for c, (channel, mean) in enumerate(zip((2, 1, 0), CAFFE_MEAN_BGR, strict=True)):
        torch.testing.assert_close(x[0, c], image[0, ..., channel].float() - mean)


def test_the_real_convolutions_without_fc_layers(data):
    network = vggfeat.load(str(data / "vgg16_conv_caffe.safetensors"))
    assert network.name == "D" and network.layers[-1] == "pool5" and network.dim("pool5") == 512
    assert network.metadata["pool"] == "ceil"
    assert (network.preprocessing.channel_order, network.preprocessing.input_range) == ("BGR", 255.0)
    assert network.preprocessing.mean == CAFFE_MEAN_BGR
    with pytest.raises(VggfeatError, match="no layer 'fc7': they reach pool5; give --layer"):
        _ = network.default_layer


def test_real_convolutions_see_the_world(data):
    """The mean pool5 of two tench photographs is nearer than that of a tench and a church (real weights work)."""
    network = vggfeat.load(str(data / "vgg16_conv_caffe.safetensors"))
    val = data / "imagenette144" / "val"
    fish = sorted((val / "n01440764").iterdir())[:4]
    church = sorted((val / "n03028079").iterdir())[:4]
    x = vggfeat.embed(network, [*fish, *church], scales=(144,), layer="pool5")
    similarity = x @ x.T
    within = (similarity[:4, :4].sum() - 4) / 12
    assert within > similarity[:4, 4:].mean() + 0.05


def test_torchvisions_enums(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.vgg11()
    path = tmp_path / "v.pth"
    torch.save(theirs.state_dict(), path)
    network = vggfeat.load(f"torchvision:vgg11@{path}")
    assert network.name == "A" and network.metadata["pool"] == "floor" and network.layers[-1] == "fc8"
    image = torch.from_numpy(photograph(1, 224, 224)[None])
    transform = torchvision.models.VGG11_Weights.IMAGENET1K_V1.transforms()
    expected = torchvision.transforms.functional.normalize(
        image.permute(0, 3, 1, 2).float() / 255, transform.mean, transform.std
    )
    torch.testing.assert_close(network.preprocessing(image), expected)
    with torch.inference_mode():
        torch.testing.assert_close(
            describe(network, image, "fc8", mirror=False), theirs.eval()(expected), rtol=1e-4, atol=1e-5
        )


def test_torchvisions_features_enum_has_no_usable_fc_layers(tmp_path):
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


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_timm_backbones_are_pooled_over_their_dense_map(tmp_path, name):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    network = vggfeat.load(f"timm:{name}@{tmp_path / 'w.safetensors'}")
    assert network.preprocessing.mean == pytest.approx(model.pretrained_cfg["mean"])
    image = torch.from_numpy(photograph(2, 96, 160)[None])
    with torch.inference_mode():
        expected = model.forward_features(network.preprocessing(image)).mean((2, 3))
    torch.testing.assert_close(
        describe(network, image, "features", mirror=False), expected, rtol=1e-4, atol=1e-4
    )
    assert network.dim("features") == expected.shape[1]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_a_timm_model_of_one_size_says_so(tmp_path, name):
    import timm

    safetensors.torch.save_file(timm.create_model(name).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(VggfeatError, match=f"timm:{name} takes only 224x224 images"):
        vggfeat.load(f"timm:{name}@{tmp_path / 'w.safetensors'}")


def test_random_nets_come_from_their_seed():
    a, b = vggfeat.load("random:A,width=0.125,crop=32"), vggfeat.load("random:A,width=0.125,crop=32,seed=1")
    assert a.fingerprint == vggfeat.load("random:A,width=0.125,crop=32,seed=0").fingerprint != b.fingerprint
    weight = vggfeat.load("random:D,crop=32").module.features[28].weight
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)


def test_no_pickle_is_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"features.0.weight": Bomb()}))
    torch.save({"x": Bomb()}, tmp_path / "v.pth")
    for name in ("w.pth", "v.pth"):
        with pytest.raises(VggfeatError, match="can't be read as weights"):
            vggfeat.load(f"oxford:D@{tmp_path / name}")
    assert not (tmp_path / "ran").exists()


def test_what_is_wrong_is_said_in_one_line(tmp_path, ours, he):
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
        str(tmp_path / "empty.pth"): "can't be read as weights",
        f"oxford:D@{tmp_path / 'list.pth'}": "holds no plain state dict",
        str(tmp_path / "plain.pth"): "doesn't say which preprocessing",
        f"torchvision:vgg11@{tmp_path / 'narrow.pth'}": r"features.0.weight has shape \(8, 3, 3, 3\), the net's is",
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


def test_a_half_written_weights_file_is_never_left(tmp_path, he, plain, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        weights.save_weights(tmp_path / "w.safetensors", he("A", width=0.125, crop=32), plain)
    assert list(tmp_path.iterdir()) == []


def test_precision_and_device_are_resolved_or_refused():
    cpu = torch.device("cpu")
    assert weights.resolve_precision("float32", cpu) == "float32"
    assert weights.resolve_precision("auto", cpu) in ("float32", "bfloat16")
    with pytest.raises(VggfeatError, match="precision 'int4' is not one of"):
        weights.resolve_precision("int4", cpu)
    with pytest.raises(VggfeatError, match="no device 'tpu9'"):
        weights.resolve_device("tpu9")
    if not torch.cuda.is_available():
        assert weights.resolve_device("auto") == cpu
        with pytest.raises(VggfeatError, match="PyTorch sees 0 GPUs"):
            weights.resolve_device("cuda")


def test_bfloat16_stays_near_float32(data):
    network = vggfeat.load(str(data / "vgg16_conv_caffe.safetensors"))
    photos = sorted((data / "photos").iterdir())[:3]
    exact = vggfeat.embed(network, photos, scales=(128,), layer="pool5")
    rough = vggfeat.embed(network.to("cpu", "bfloat16"), photos, scales=(128,), layer="pool5")
    assert not np.array_equal(exact, rough)
    assert (exact * rough).sum(1).min() > 0.9995


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("net", NETS)
def test_every_net_of_table_1_in_every_precision(net, precision):
    network = vggfeat.load(f"random:{net},width=0.125,crop=32").to("cpu", precision)
    x = vggfeat.embed(network, [photograph(0, 40, 50)], scales=(32,))
    assert x.shape == (1, 512) and x.dtype == np.float32
    assert abs(np.linalg.norm(x) - 1) < 1e-5
