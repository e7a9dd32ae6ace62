"""Exported nets, opened by the programs that they are for."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision

import vggfeat
from pretrain.export import app
from tests.conftest import Command, Nets, photograph
from vggfeat.images import Preprocessing
from vggfeat.terminal import run
from vggfeat.vgg import VGG
from vggfeat.weights import save_weights

WHOLE = "random:A,classes=7"  # the only size that torchvision and timm have


@pytest.fixture
def export(run_main: Command) -> Command:
    return functools.partial(run_main, functools.partial(run, app, "python -m pretrain.export"))


@pytest.fixture
def small(tmp_path: Path, he: Nets, plain: Preprocessing) -> Path:
    """Net C at an eighth of the width, with a preprocessing that shows when it is forgotten."""
    path = tmp_path / "c.safetensors"
    unusual = Preprocessing(mean=(104.0, 117.0, 123.0), std=(2.0, 3.0, 4.0), channel_order="BGR")
    save_weights(path, he("C", num_classes=5, width=0.125, crop=32), unusual, classes=list("vwxyz"))
    return path


def scores_of(net: vggfeat.Network, x: torch.Tensor) -> torch.Tensor:
    assert isinstance(net.module, VGG)
    with torch.inference_mode():
        return net.module.crop_scores(x)


def test_torchvision_and_timm_give_the_same_scores(
    export: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = vggfeat.load(WHOLE)
    image = torch.from_numpy(photograph(1, 224, 224))[None]
    x = ours.preprocessing(image)
    expected = scores_of(ours, x)
    ran = export(WHOLE, "--to", "torchvision", "--out", tmp_path / "vgg11.pth")
    assert ran.status == 0, ran.err
    for name in ("kaiming_uniform_", "kaiming_normal_", "normal_", "uniform_"):
        # random weights take seconds, and are replaced
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    theirs = torchvision.models.vgg11(weights=None, num_classes=7).eval()
    theirs.load_state_dict(torch.load(tmp_path / "vgg11.pth", weights_only=True), assign=True)
    with torch.inference_mode():
        assert torch.allclose(theirs(x), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    del theirs

    ran = export(WHOLE, "--to", "timm", "--out", tmp_path / "vgg11.safetensors")
    assert ran.status == 0, ran.err
    model = timm.create_model(
        "vgg11", num_classes=7, checkpoint_path=str(tmp_path / "vgg11.safetensors")
    )
    with torch.inference_mode():
        assert torch.allclose(
            model.eval()(x), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
        )
    with safetensors.safe_open(tmp_path / "vgg11.safetensors", "pt") as file:
        assert file.metadata()["input_range"] == str(
            ours.preprocessing.to_metadata()["input_range"]
        )
    assert not list(tmp_path.glob("*.partial*"))
    # timm's names, and what the net's metadata tell
    alone = vggfeat.load(tmp_path / "vgg11.safetensors")
    assert alone.fingerprint == ours.fingerprint and alone.preprocessing == ours.preprocessing
    with pytest.raises(
        vggfeat.VggfeatError, match=r"says of itself input_range '0..255'.* give .* alone"
    ):
        vggfeat.load(f"timm:vgg11@{tmp_path / 'vgg11.safetensors'}")


def test_onnx_has_the_preprocessing_inside(
    export: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    path = tmp_path / "c.onnx"
    ran = export(small, "--to", "onnx", "--out", path)
    assert ran.status == 0, ran.err
    ours = vggfeat.load("C", weights=small)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for n in (1, 3):
        images = np.stack([photograph(i, 32, 32) for i in range(n)])
        theirs = session.run(None, {"images": images.transpose(0, 3, 1, 2).astype(np.float32)})[0]
        expected = scores_of(ours, ours.preprocessing(torch.from_numpy(images))).numpy()
        assert theirs.shape == (n, 5)
        assert np.abs(theirs - expected).max() < 1e-4 * np.abs(expected).max()
    assert path.exists() and not list(tmp_path.glob("*.data"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["SMALL", "--to", "torchvision", "--out", "c.pth"], "have no net C"),
        (["random:D,width=0.5", "--to", "timm", "--out", "d.pth"], "at width 1 and crop 224 only"),
        (["SMALL", "--to", "onnx", "--out", "there.onnx"], "--overwrite"),
        (["SMALL", "--to", "onnx", "--out", "nowhere/c.onnx"], "nowhere"),
        (["missing.safetensors", "--to", "onnx", "--out", "c.onnx"], "missing.safetensors"),
        (
            ["timm:resnet18@missing.safetensors", "--to", "onnx", "--out", "c.onnx"],
            "missing.safetensors",
        ),
    ],
)
def test_bad_requests(
    words: list[str],
    says: str,
    export: Command,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.onnx").write_bytes(b"kept")
    before = sorted(tmp_path.iterdir())
    ran = export(*[small if word == "SMALL" else word for word in words])
    typed = words[0].startswith("random:")  # of which all is typed
    assert ran.status == (2 if typed else 1)
    assert says in ran.err
    assert len(ran.err_lines) == 1
    assert sorted(tmp_path.iterdir()) == before
    assert Path("there.onnx").read_bytes() == b"kept"


def test_another_result_is_not_written(
    export: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    class Wrong(onnxruntime.InferenceSession):  # type: ignore[misc]  # it has no types
        def run(self, *words: object, **more: object) -> list[np.ndarray]:
            return [2 * array for array in super().run(*words, **more)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    ran = export(small, "--to", "onnx", "--out", tmp_path / "c.onnx")
    assert ran.status == 1
    assert "gives other scores than this net" in ran.err
    assert not list(tmp_path.glob("*.onnx"))


def test_a_file_without_fc_layers(export: Command, data: Path, tmp_path: Path) -> None:
    ran = export(
        data / "vgg16_conv_caffe.safetensors", "--to", "onnx", "--out", tmp_path / "d.onnx"
    )
    assert ran.status == 1
    assert "its FC layers are needed" in ran.err
