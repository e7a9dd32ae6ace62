"""Classifiers for other programs: the arrays by NumPy alone, the graph by onnxruntime."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vggfeat
from vggfeat import export
from vggfeat.describe import description_of
from vggfeat.errors import VggfeatError
from vggfeat.images import Preprocessing, smallest_side
from vggfeat.model import Model, save_model
from vggfeat.store import Description
from vggfeat.weights import save_weights

from ..conftest import Command, Nets, photograph
from .conftest import NET, OTHER, assert_same_scores, unit

FORMATS = (Path(__file__).parents[2] / "docs/formats.md").read_text()


def made_of(parts: Sequence[Description], length: int, pool: str = "average", K: int = 3) -> Model:
    """A classifier of K classes by random weights, none of which is small."""
    rng = np.random.default_rng(5)
    coef = rng.standard_normal((K, length))
    classes = ["ant", "b\u00e9e", "caf\udce9"][:K]
    return Model(classes, coef, rng.standard_normal(K), tuple(parts), pool, False, None)


def how(spec: str, *, scales: Sequence[int], mirror: bool = True) -> Description:
    return description_of(vggfeat.load(spec, precision="float32"), None, scales, mirror)


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    """model.h5, of the mini net at one scale."""
    save_model(tmp_path / "model.h5", made_of([how("mini", scales=(104,))], 896))
    return tmp_path / "model.h5"


@pytest.fixture
def no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs take seconds; what stands in their place is a file of four bytes."""
    monkeypatch.setattr(export, "write_graph", lambda path, *rest: path.write_bytes(b"onnx"))


# --- the arrays -----------------------------------------------------------------------------------


def test_npz_is_read_by_numpy_alone(command: Command, folder: Path, tmp_path: Path) -> None:
    """Of two nets at several scales."""
    parts = [how(NET, scales=(32, 48)), how(OTHER, scales=(40,), mirror=False)]
    model = made_of(parts, 3 * 512, "stack")
    save_model(tmp_path / "model.h5", model)
    out = tmp_path / "model.npz"
    ran = command("export", tmp_path / "model.h5", "--to", "npz", "--out", out)
    assert (ran.status, ran.err) == (0, "") and "1,536 values" in ran.out
    with np.load(out, allow_pickle=False) as file:
        found = dict(file)
    np.testing.assert_array_equal(found["coef"], model.coef_KD)
    np.testing.assert_array_equal(found["intercept"], model.intercept_K)
    assert found["classes"].tolist() == model.classes
    assert (str(found["pool"]), bool(found["multi_label"])) == ("stack", False)
    told = json.loads(str(found["descriptions"]))
    assert told == [part.to_dict() for part in parts]

    images = sorted(folder.rglob("*.jpg"))[:3]
    described = []
    for part in told:
        network = vggfeat.load(part["weights"], precision=part["precision"])
        assert network.fingerprint == part["fingerprint"]
        described.append(
            vggfeat.embed(
                network,
                images,
                part["scales"],
                layer=part["layer"],
                mirror=part["mirror"],
                pool=str(found["pool"]),
            )
        )
    scores = unit(np.concatenate(described, axis=1)) @ found["coef"].T + found["intercept"]
    assert_same_scores(scores, vggfeat.open_model(tmp_path / "model.h5").scores(images))
    arrays, _, facts = FORMATS.partition("\n## Exported classifiers\n")[2].partition("ONNX: ")
    assert told_of(arrays) == found.keys() and told_of(facts.partition("\n## ")[0]) == FACTS


def told_of(text: str) -> set[str]:
    """The names in the first cells of a table."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return set(re.findall(r"`(\w+)`", " ".join(rows)))


def test_npz_of_a_model_that_a_graph_cannot_have(command: Command, tmp_path: Path) -> None:
    boxes = replace(how(NET, scales=(32,)), regions=("image", "box"))
    save_model(tmp_path / "model.h5", made_of([boxes], 1024))
    ran = command("export", tmp_path / "model.h5", "--to", "npz", "--out", tmp_path / "m.npz")
    assert ran.status == 0
    with np.load(tmp_path / "m.npz") as file:
        assert json.loads(str(file["descriptions"]))[0]["regions"] == ["image", "box"]


# --- the graph ------------------------------------------------------------------------------------

FACTS = {"classes", "multi_label", "Q", "filter", "layer", "description", "version"}


def test_a_graph_scores_images_as_its_classifier(
    command: Command, mini: Path, folder: Path, tmp_path: Path
) -> None:
    """Of every shape and number, from pixels that the caller has rescaled."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "model.onnx"
    ran = command("export", mini, "--to", "onnx", "--out", out)
    assert (ran.status, ran.err) == (0, "")
    (difference,) = re.findall(r"([0-9.e-]+) of the largest, in float32", ran.out)
    assert float(difference) < 1e-4 and not list(tmp_path.glob("*.data"))
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert told.keys() == FACTS
    assert (told["Q"], told["layer"], told["filter"]) == ("104", "fc7", "bilinear, antialiased")
    model = vggfeat.open_model(mini)
    assert json.loads(told["classes"]) == model.classes
    assert json.loads(told["description"]) == model.parts[0].to_dict()
    paths = sorted(folder.rglob("*.jpg"))[:6]
    expected = model.scores(paths)
    for path, row in zip(paths, expected, strict=True):
        with Image.open(path) as image:
            pixels = smallest_side(np.asarray(image), int(told["Q"]))
        (scores,) = session.run(None, {"images": pixels[None]})
        assert scores.dtype == np.float32 and scores.shape == (1, 3)
        np.testing.assert_allclose(scores[0], row, rtol=0, atol=1e-4 * np.abs(expected).max())
    several = np.stack([photograph(i, 104, 141) for i in range(5)])
    (scores,) = session.run(None, {"images": several})
    expected = model.scores(several)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_graph_of_another_net_and_description(command: Command, he: Nets, tmp_path: Path) -> None:
    """A preprocessing that shows when it is forgotten, odd sides rounded up, bfloat16, neither
    FC layers nor mirror images; weights that have moved.
    """
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    weights = tmp_path / "c.safetensors"
    unusual = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "BGR", 1.0)
    save_weights(weights, he("A-LRN", num_classes=5, width=0.125, crop=32, pool="ceil"), unusual)
    network = vggfeat.load(weights, precision="bfloat16")
    model = made_of([description_of(network, "pool5", (33,), False)], 64, "stack", K=2)
    assert (model.parts[0].pool, model.parts[0].precision) == ("ceil", "bfloat16")
    save_model(tmp_path / "model.h5", model)
    moved, out = weights.rename(tmp_path / "moved.safetensors"), tmp_path / "model.onnx"
    words = ("export", tmp_path / "model.h5", "--to", "onnx", "--out", out)
    ran = command(*words)
    assert ran.status == 1 and "no weights file at" in ran.err and not out.exists()
    ran = command(*words, "--weights", moved)
    assert (ran.status, ran.err) == (0, "")
    (own,) = re.findall(r"in bfloat16, the classifier's own +│ ([0-9.e-]+) of the largest", ran.out)
    assert 1e-5 < float(own) < 0.1
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    exact = replace(
        model, parts=(replace(model.parts[0], precision="float32"),), weights=(str(moved),)
    )
    for shape in ((33, 33), (33, 58), (47, 33)):
        image = photograph(sum(shape), *shape)
        expected = exact.scores([image])
        (scores,) = session.run(None, {"images": image[None]})
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_what_no_graph_can_have_is_refused(
    command: Command, tmp_path: Path, no_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = how(NET, scales=(32,))
    resnet = replace(part, weights="timm:resnet18", net="resnet18")
    cases: list[tuple[Model, str]] = [
        (made_of([part, how(OTHER, scales=(32,))], 1024), "of 2 nets, and a graph of one"),
        (
            made_of([how(NET, scales=(32, 48))], 512),
            "of 2 scales, 32, 48, and a graph of one: give --to npz, or a classifier of one of"
            " them (`vggfeat svm --scales Q`)",
        ),
        (made_of([replace(part, regions=("box",))], 512), "learned from boxes in images"),
        (made_of([replace(part, weights=OTHER)], 512), "are not those that described the images"),
        (made_of([part], 9), "weighs 9 values"),
    ]
    out = tmp_path / "m.onnx"
    for i, (model, told) in enumerate(cases):
        save_model(tmp_path / f"{i}.h5", model)
        ran = command("export", tmp_path / f"{i}.h5", "--to", "onnx", "--out", out)
        assert ran.status == 1 and told in ran.err and len(ran.err_lines) == 1, ran.err
    network = vggfeat.load(NET)
    monkeypatch.setattr(export, "MOST_BYTES", 1_000_000)
    with pytest.raises(VggfeatError, match=r"a graph can't hold 0\.0 GB: give `to` npz"):
        export.write_onnx(out, made_of([part], 512))
    network.module = object()  # type: ignore[assignment]  # no net of Table 1
    monkeypatch.setattr(Model, "networks", [network])
    with pytest.raises(VggfeatError, match="is no net of Table 1: give `to` npz"):
        export.write_onnx(out, made_of([resnet], 512))
    assert not out.exists() and not list(tmp_path.glob(".vggfeat*"))


@pytest.mark.parametrize("factor", [1.002, np.nan])
def test_a_graph_that_scores_otherwise_is_not_written(
    command: Command,
    mini: Path,
    tmp_path: Path,
    no_graph: None,
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
) -> None:
    model, off = vggfeat.open_model(mini), [1.0]

    class Session:
        def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [off[0] * model.scores(feed["images"]).astype(np.float32)]

    monkeypatch.setattr(export, "session_of", lambda path: Session())
    out = tmp_path / "m.onnx"
    words = ("export", mini, "--to", "onnx", "--out", out)
    assert command(*words).status == 0 and out.read_bytes() == b"onnx"
    out.write_bytes(b"before")
    off[0] = factor
    ran = command(*words, "--overwrite")
    assert ran.status == 1 and len(ran.err_lines) == 1
    assert "onnxruntime gives other scores than the classifier (" in ran.err
    assert ran.err.rstrip().endswith("of the largest): not written")
    assert out.read_bytes() == b"before"


def test_without_onnxruntime_it_is_said_that_scores_were_not_compared(
    command: Command,
    mini: Path,
    tmp_path: Path,
    no_graph: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    ran = command("export", mini, "--to", "onnx", "--out", tmp_path / "m.onnx")
    assert (ran.status, ran.err) == (0, "") and (tmp_path / "m.onnx").exists()
    assert "not checked: onnxruntime isn't there (pip install 'vggfeat[export]')" in ran.out


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_a_package_for_onnx_it_is_told_which(
    command: Command, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    before = sorted(tmp_path.iterdir())
    ran = command("export", mini, "--to", "onnx", "--out", tmp_path / "m.onnx")
    assert ran.status == 1 and len(ran.err_lines) == 1
    assert f"ONNX needs the package {package}: pip install 'vggfeat[export]'" in ran.err
    assert sorted(tmp_path.iterdir()) == before


def test_what_pytorch_cannot_export_is_one_line(
    command: Command, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")

    def fail(*args: object, **settings: object) -> None:
        logging.getLogger("torch._guards").error("a page")
        raise torch.onnx.OnnxExporterError("Failed\nto export")

    monkeypatch.setattr(torch.onnx, "export", fail)
    ran = command("export", mini, "--to", "onnx", "--out", tmp_path / "m.onnx")
    assert ran.status == 1 and len(ran.err_lines) == 1
    assert "can't make a graph of this net: another version may" in ran.err
    assert not (tmp_path / "m.onnx").exists() and logging.root.manager.disable == 0


def test_scores_of_zero_have_no_size() -> None:
    zeros: Any = np.zeros((2, 3))
    assert export._difference(zeros, zeros) == 0 and export._difference(zeros + 1, zeros) == 1
