"""A weights file of any program -> tensors by name, or a sentence that names what it is."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from scipy.io import savemat

import vggfeat
from vggfeat import tensors, weights
from vggfeat.errors import VggfeatError
from vggfeat.images import CAFFE, Preprocessing
from vggfeat.table1 import layer_keys
from vggfeat.tensors import bare, read
from vggfeat.vgg import VGG

from ..conftest import Command, Nets, photograph

DOCUMENT = Path(__file__).parents[2] / "docs/weights.md"


def arrays_of(module: VGG) -> dict[str, np.ndarray]:
    """The layers' arrays by the paper's names."""
    state = module.state_dict()
    return {
        f"{layer}.{kind}": state[f"{key}.{kind}"].numpy()
        for layer, key in layer_keys(module.net).items()
        for kind in ("weight", "bias")
    }


def same_network(
    path: str, module: VGG, preprocessing: Preprocessing, pool: str
) -> vggfeat.Network:
    """What loads from `path` gives the scores that the net gives, saved as one of our own files."""
    ours = Path(path.rpartition("@")[2]).with_suffix(".ours.safetensors")
    module.set_pool(pool)
    weights.save_weights(ours, module, preprocessing)
    network, expected = vggfeat.load(path), vggfeat.load(ours)
    assert network.fingerprint == expected.fingerprint
    assert network.preprocessing.same(preprocessing) and network.metadata["pool"] == pool
    image = torch.from_numpy(photograph(0, 75, 91)[None])
    for q in (network, expected):
        q.module.eval()
    with torch.inference_mode():
        layer = "fc8" if module.crop <= 64 else "pool5"
        a = network.maps(network.preprocessing(image), layer)
        b = expected.maps(preprocessing(image), layer)
    assert torch.allclose(a, b, rtol=1e-5, atol=0) and a.abs().max() > 0
    return network


# --- checkpoints ----------------------------------------------------------------------------------


def small_state() -> dict[str, torch.Tensor]:
    return {
        "features.0.weight": torch.ones(4, 3, 3, 3),
        "features.0.bias": torch.zeros(4),
        "classifier.6.bias": torch.zeros(2),
    }


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in small_state().items()}


SHARED = small_state()
MOMENTUM = {
    "state": {0: {"momentum_buffer": torch.ones(4, 3, 3, 3), "step": 7}},
    "param_groups": [{"lr": 0.1}],
}
LIGHTNING = {
    "epoch": 3,
    "global_step": 100,
    "pytorch-lightning_version": "2.2",
    "loops": {"fit_loop": {"state_dict": {}}},
    "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
    "optimizer_states": [MOMENTUM],
    "lr_schedulers": [],
    "hyper_parameters": {"lr": 0.1, "name": None, "on": True},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "unwrapped"),
    [
        (small_state(), None),
        (prefixed("module."), "module."),
        (prefixed("_orig_mod."), "_orig_mod."),
        (prefixed("_orig_mod.module."), "module., _orig_mod."),
        (
            {
                "features.module.0.weight": torch.ones(4, 3, 3, 3),
                "features.module.0.bias": torch.zeros(4),
                "classifier.6.bias": torch.zeros(2),
            },
            "module.",
        ),
        (
            {
                "state_dict": small_state(),
                "epoch": 3,
                "arch": "vgg16",
                "best_acc1": torch.tensor(71.5),
            },
            "state_dict",
        ),
        (
            {"epoch": 3, "state_dict": prefixed("module."), "optimizer": MOMENTUM},
            "state_dict, module.",
        ),
        (
            {"model": small_state(), "optimizer": MOMENTUM, "loss": {"w": torch.ones(1, 3, 1, 1)}},
            "model",
        ),
        ({"best": SHARED, "model": SHARED}, "model"),
        ({"model": {"state_dict": small_state()}, "iteration": 9}, "model.state_dict"),
        ({"weights": small_state()}, "weights"),
        ({**LIGHTNING, "state_dict": prefixed("model.")}, "state_dict, model."),
        (
            {**LIGHTNING, "state_dict": {**prefixed("net."), "loss.weight": torch.ones(2)}},
            "state_dict, net. without the rest",
        ),
        ({**small_state(), "epoch": 3}, None),
    ],
)
def test_checkpoints_hold_a_net(
    tmp_path: Path, content: Any, unwrapped: str | None, zipped: bool
) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found, metadata = bare(*read(path), [["features.0.weight", "features.0.bias"]], path)
    assert found.keys() == small_state().keys() and metadata.get("unwrapped") == unwrapped
    assert torch.equal(found["features.0.weight"], torch.ones(4, 3, 3, 3))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"generator": small_state(), "critic": small_state()},
            r"several state dicts, 'generator', 'critic'",
        ),
        (
            {"state_dict": {**prefixed("model."), **prefixed("teacher.")}},
            r"several nets, under 'model.', 'teacher.'",
        ),
        (
            {"model": small_state(), "model_ema": prefixed("module.")},
            r"several state dicts, 'model', 'model_ema'",
        ),
        (
            {"model": small_state(), "x": {"ema": small_state()}},
            r"several state dicts, 'model', 'x.ema'",
        ),
        (
            {"state_dict": {**small_state(), **prefixed("ema.module.")}},
            r"several nets, under '', 'ema.module.'",
        ),
        (
            {"state_dict": {**prefixed("net."), **prefixed("ema.module.")}},
            r"several nets, under 'ema.', 'net.'",
        ),
        ({"optimizer": MOMENTUM, "epoch": 3}, "no plain state dict"),
        ({"a": {"b": {"c": {"d": small_state()}}}}, "no plain state dict"),
        ({"state_dict": {}}, "no plain state dict"),
    ],
)
def test_checkpoints_that_hold_no_one_net(
    tmp_path: Path, content: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.ckpt"
    torch.save(content, path)
    with pytest.raises(VggfeatError, match=says) as refused:
        bare(*read(path), [["features.0.weight"]], path)
    monkeypatch.chdir(tmp_path)
    if "several" in says:  # the lines in the message make a plain file
        exec(str(refused.value)[str(refused.value).index("import ") :], {})
        plain = tmp_path / "plain.pth"
        assert bare(*read(plain), [["features.0.weight"]], plain)[0].keys() == small_state().keys()


def test_a_record_that_is_held_a_million_times_is_looked_at_once(tmp_path: Path) -> None:
    inner = {str(i): 0 for i in range(2000)}
    outer = {str(i): inner for i in range(2000)}
    torch.save({str(i): outer for i in range(2000)}, tmp_path / "c.pth")
    with pytest.raises(VggfeatError, match="no plain state dict"):
        read(tmp_path / "c.pth")


def test_a_checkpoint_describes_as_the_net_in_it(tmp_path: Path, he: Nets) -> None:
    """Through a source: the PyTorch examples' way of saving a VGG in training."""
    state = he("A", until="pool5").state_dict()
    torch.save(state, tmp_path / "plain.pth")
    wrapped = {key.replace("features.", "features.module."): value for key, value in state.items()}
    torch.save(
        {"epoch": 1, "state_dict": wrapped, "optimizer": MOMENTUM}, tmp_path / "checkpoint.pth.tar"
    )
    plain, network = (
        vggfeat.load(f"torchvision:vgg11@{tmp_path / name}")
        for name in ("plain.pth", "checkpoint.pth.tar")
    )
    assert network.fingerprint == plain.fingerprint
    assert (
        network.metadata["unwrapped"] == "state_dict, module." and "unwrapped" not in plain.metadata
    )


def test_a_checkpoint_of_timm(tmp_path: Path) -> None:
    import timm

    state = timm.create_model("resnet18", num_classes=0).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "c.pth.tar")
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    network = vggfeat.load(f"timm:resnet18@{tmp_path / 'c.pth.tar'}")
    assert network.metadata["unwrapped"] == "state_dict, module."
    assert (
        network.fingerprint
        == vggfeat.load(f"timm:resnet18@{tmp_path / 'plain.safetensors'}").fingerprint
    )


def test_what_was_unwrapped_is_told_by_info(
    tmp_path: Path, he: Nets, plain: Preprocessing, run_main: Command
) -> None:
    from vggfeat import cli

    path = tmp_path / "w.safetensors"
    weights.save_weights(path, he("A", width=0.125, crop=32), plain)
    with safetensors.safe_open(path, "pt") as file:
        renamed = {f"module.{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        safetensors.torch.save_file(renamed, path, file.metadata())
    words = ("--limit", 2, "--weights", path, "--scales", 32, "--out", tmp_path / "f.h5")
    assert run_main(cli.main, "extract", "--dataset", "digits", *words).status == 0
    ran = run_main(cli.main, "info", tmp_path / "f.h5", "--json", tmp_path / "i.json")
    assert ran.status == 0
    told = json.loads((tmp_path / "i.json").read_text())["weights_metadata"]
    assert told["unwrapped"] == "module." and told["source"] == str(path)
    assert "FILE.caffemodel" in run_main(cli.main, "weights").out


# --- what holds more than tensors, or none --------------------------------------------------------


def save_objects(folder: Path) -> dict[str, str]:
    """Files with Python objects -> what their messages say."""
    torch.save(
        {"state_dict": small_state(), "args": argparse.Namespace(lr=0.1)}, folder / "namespace.pth"
    )
    torch.save({"model": small_state(), "best": np.float64(3)}, folder / "numpy.pth")
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), folder / "module.pth")
    torch.save(
        {"net": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), "epoch": 1}, folder / "inside.ckpt"
    )
    torch.save({"state_dict": small_state()}, folder / "protocol4.bin", pickle_protocol=4)
    with open(folder / "plain.pkl", "wb") as file:
        pickle.dump({"conv1_1": np.zeros((3, 3))}, file)
    with open(folder / "numbers.pkl", "wb") as file:
        pickle.dump({"conv1_1": [0.5]}, file)
    return {
        "namespace.pth": r"'argparse\.Namespace'.*torch\.save\(x\['state_dict'\], 'plain.pth'\)",
        "numpy.pth": r"'numpy\..*scalar'.*torch\.save\(x\['model'\], ",
        "module.pth": (
            r"'torch\.nn\.modules\.container\.Sequential'.*torch\.save\(x\.state_dict\(\), "
        ),
        "inside.ckpt": r"torch\.save\(x\['net'\]\.state_dict\(\), ",
        "protocol4.bin": r"OrderedDict|_rebuild_tensor",
        "plain.pkl": r"Python objects \('numpy.*in a plain pickle",
        "numbers.pkl": "a plain pickle, and not one that PyTorch has written",
    }


def test_python_objects_are_named_and_never_made(tmp_path: Path) -> None:
    for name, says in save_objects(tmp_path).items():
        with pytest.raises(VggfeatError, match=says) as refused:
            vggfeat.load(f"torchvision:vgg16@{tmp_path / name}")
        assert "\x1b" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["namespace.pth", "numpy.pth", "module.pth", "inside.ckpt", "protocol4.bin"]
)
def test_the_lines_that_a_message_gives_make_a_plain_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_objects(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VggfeatError) as refused:
        read(tmp_path / name)
    exec(str(refused.value)[str(refused.value).index("import torch") :], {})
    assert read(tmp_path / "plain.pth")[0]


def test_torchscript_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.pt", "w", zipfile.ZIP_DEFLATED) as script:
        for name in ("data.pkl", "code/__torch__/torch/nn/modules/conv.py", "constants.pkl"):
            script.writestr(f"t/{name}", b"")
    with pytest.raises(VggfeatError, match=r"is a TorchScript program; .*torch\.jit\.load"):
        vggfeat.load(f"torchvision:vgg16@{tmp_path / 't.pt'}")


OTHERS = {
    b"": "is empty",
    b"<!DOCTYPE html><html><head>": "is a web page, not weights",
    b"\n  <html lang='en'>": "is a web page, not weights",
    b"<?xml version='1.0'?><Error><Code>AccessDenied": "is a web page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n": (
        "Git LFS pointer.*git lfs pull"
    ),
    b"/annex/objects/MD5E-s553--0.pth\n": "is a git-annex pointer.*git annex get",
    b"../.git/annex/objects/x/y/MD5E-s553--0.pth": "is a git-annex pointer.*git annex get",
    b'name: "VGG"\ninput: "data"\nlayers {\n  bottom: "data"': (
        "is text for Caffe, .*: give the .caffemodel"
    ),
    b"Entry not found": "is text, not weights: it begins with 'Entry not found'",
    '{"error": "Zugriff verweigert für dieses Modell"}'.encode(): "is text, not weights",
    b"\x1f\x8b\x08\x00" + bytes(40): "is a gzip archive",
    b"7z\xbc\xaf\x27\x1c" + bytes(40): "is a 7z archive",
    b"\x89HDF\r\n\x1a\n" + bytes(40): "is an HDF5 file, as of Keras: docs/weights.md",
    b"MATLAB 5.0 MAT-file, Platform: GLNXA64": (
        "is a MATLAB file, as of MatConvNet: docs/weights.md"
    ),
    b"MATLAB 7.3 MAT-file, Platform: GLNXA64": "save it with -v7 in MATLAB",
    b"vggfeat2" + bytes(40): "is a feature file or a model of this program",
    b"\x93NUMPY\x01\x00": "is a NumPy array",
    b"\x08\x07\x12\x07pytorch\x1a\x05": "is an ONNX graph",
    b"PK\x03\x04" + bytes(60): "is damaged or cut off",
    b"\xff\xd8\xff\xe0" + bytes(60): "is no weights file that is known",
}


@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".caffemodel", ".bin"])
@pytest.mark.parametrize("content", OTHERS, ids=lambda content: repr(content[:12]))
def test_what_is_no_weights_file_is_named(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"w{ending}"
    path.write_bytes(content)
    says = OTHERS[content]
    if says.startswith("is no weights") and ending in (".safetensors", ".caffemodel"):
        says = "can't be read as weights"
    for spec in (str(path), f"oxford:D@{path}", f"timm:resnet18@{path}"):
        with pytest.raises(VggfeatError, match=says) as refused:
            vggfeat.load(spec)
        assert str(refused.value).startswith(str(path))


def test_a_prototxt_is_named(tmp_path: Path) -> None:
    (tmp_path / "solver.prototxt").write_text('net: "train_val.prototxt"\nbase_lr: 0.01\n')
    with pytest.raises(VggfeatError, match=r"is text for Caffe, .*: give the \.caffemodel"):
        read(tmp_path / "solver.prototxt")


def test_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        tar.add(tmp_path / "x", "x")
    np.savez(tmp_path / "w.npz", conv1_1=np.zeros(3))
    np.savez_compressed(tmp_path / "small.npz", conv1_1=np.zeros(3))
    kinds = {"w.keras": ("config.json", "model.weights.h5"), "w.zip": ("vgg16.pth",)}
    for name, inside in kinds.items():
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as other:
            for entry in inside:
                other.writestr(entry, b"x")
    for name, says in (
        ("w.tar", "is a tar archive"),
        ("w.keras", r"is a Keras 3 file: save it in Keras as \.h5; docs/weights.md"),
        ("w.npz", r"is NumPy's \.npz"),
        ("small.npz", r"is NumPy's \.npz"),
        ("w.zip", r"is a zip archive of 'vgg16\.pth', not of PyTorch: unpack it"),
    ):
        with pytest.raises(VggfeatError, match=says):
            read(tmp_path / name)


def test_the_ending_doesnt_matter(tmp_path: Path, he: Nets, plain: Preprocessing) -> None:
    weights.save_weights(tmp_path / "w.safetensors", he("A", width=0.125, crop=32), plain)
    expected = vggfeat.load(tmp_path / "w.safetensors").fingerprint
    for name in ("w.pth", "w.bin", "w"):
        os.replace(next(tmp_path.glob("w*")), tmp_path / name)
        assert vggfeat.load(tmp_path / name).fingerprint == expected


# --- conversions ----------------------------------------------------------------------------------


def run_lines_for(what: str, width: float) -> None:
    """The lines of docs/weights.md that convert a file, for a narrower net."""
    [lines] = [
        block
        for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
        if what in block
    ]
    exec(lines.replace('{"net": "D"', f'{{"net": "D", "width": "{width}"'), {})


@pytest.mark.parametrize("root", ["", "model_weights/"])
def test_the_lines_for_keras(
    tmp_path: Path, he: Nets, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    monkeypatch.chdir(tmp_path)
    module = he("D", width=0.03125, num_classes=5)
    names = {"fc6": "fc1", "fc7": "fc2", "fc8": "predictions"}
    with h5py.File("vgg16_weights_tf_dim_ordering_tf_kernels.h5", "w") as file:
        for key, value in arrays_of(module).items():
            layer, _, kind = key.partition(".")
            name = names.get(layer) or f"block{layer[4]}_conv{layer[6]}"
            if layer == "fc6" and kind == "weight":  # Keras flattens (h, w, channels)
                value = value.reshape(-1, 16, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(value))
            elif value.ndim == 4:
                value = value.transpose(2, 3, 1, 0)
            file[f"{root}{name}/{name}/{'kernel' if kind == 'weight' else 'bias'}:0"] = (
                value.T if key in ("fc7.weight", "fc8.weight") else value
            )
        if root:
            file["optimizer_weights/block1_conv1/kernel/m:0"] = np.zeros((3, 3, 3, 2))
    run_lines_for("h5py", 0.03125)
    same_network("vgg16_keras.safetensors", module, CAFFE, "ceil")


def test_the_lines_for_keras_stop_where_nothing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of a .weights.h5 file of Keras 3."""
    monkeypatch.chdir(tmp_path)
    with h5py.File("vgg16_weights_tf_dim_ordering_tf_kernels.h5", "w") as file:
        file["layers/conv2d/vars/0"] = np.zeros((3, 3, 3, 64))
    with pytest.raises(SystemExit, match="block1_conv1"):
        run_lines_for("h5py", 1)
    assert not Path("vgg16_keras.safetensors").exists()


@pytest.mark.parametrize("newer", [True, False])
def test_the_lines_for_matconvnet(
    tmp_path: Path, he: Nets, monkeypatch: pytest.MonkeyPatch, newer: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    module = he("D", width=0.03125, num_classes=5)
    arrays, layers = arrays_of(module), []
    for layer in layer_keys("D"):
        weight = arrays[f"{layer}.weight"]
        side = 7 if layer == "fc6" else weight.shape[-1] if weight.ndim == 4 else 1
        filters = weight.reshape(len(weight), -1, side, side).transpose(2, 3, 1, 0)
        both = np.empty((1, 2), object)
        both[0, 0], both[0, 1] = filters, arrays[f"{layer}.bias"][None]
        values = {"weights": both} if newer else {"filters": filters, "biases": both[0, 1]}
        layers += [{"type": "conv", "name": layer, **values}, {"type": "relu", "name": "relu"}]
    mean = np.broadcast_to(
        np.array([123.68, 116.779, 103.939]), (1, 1, 3) if newer else (224, 224, 3)
    )
    normalization = {"averageImage": mean}
    cells = np.empty((1, len(layers)), object)
    cells[0] = layers
    meta = {"meta": {"normalization": normalization}} if newer else {"normalization": normalization}
    savemat("imagenet-vgg-verydeep-16.mat", {"layers": cells, **meta})
    run_lines_for("scipy", 0.03125)
    rgb = Preprocessing((123.68, 116.779, 103.939))
    same_network("vgg16_matconvnet.safetensors", module, rgb, "ceil")


def test_the_lines_for_a_checkpoint_with_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"state_dict": small_state(), "args": argparse.Namespace(lr=0.1)}, "checkpoint.pth.tar"
    )
    run_lines_for("weights_only=False", 1)
    assert read(tmp_path / "plain.pth")[0].keys() == small_state().keys()


def test_quantised_and_cut_files_are_told(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # that PyTorch will do without these
        quantised = torch.quantize_per_tensor(torch.ones(4, 3, 3, 3), 0.1, 0, torch.qint8)
    for value in (quantised, torch.ones(4, 3, 3, 3, dtype=torch.int8)):
        torch.save({"features.0.weight": value}, tmp_path / "q.pth")
        with pytest.raises(
            VggfeatError, match=r"8-bit \(quantised\) tensors.*: save the net in float"
        ):
            read(tmp_path / "q.pth")
    torch.save(
        {"features.0.weight": torch.ones(64, 3, 3, 3)},
        tmp_path / "o.pth",
        _use_new_zipfile_serialization=False,
    )
    safetensors.torch.save_file(
        {"features.0.weight": torch.ones(64, 3, 3, 3)}, tmp_path / "s.safetensors"
    )
    for name, sizes in (("o.pth", (3000,)), ("s.safetensors", (60, 3000))):
        whole = (tmp_path / name).read_bytes()
        for size in sizes:
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(VggfeatError, match="cut off: fetch or save it again"):
                read(tmp_path / name)


def test_a_length_that_isnt_there(tmp_path: Path) -> None:
    """A .safetensors file that was cut off is told as one, not as something else."""
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 5000) + b'{"a": 1')
    with pytest.raises(VggfeatError, match="can't be read as weights"):
        tensors.read(tmp_path / "w.safetensors")
