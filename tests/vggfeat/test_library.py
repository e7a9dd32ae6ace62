"""The library as a person meets it in Python: what it shows, what it takes, and what it says to the
rest.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vggfeat
from vggfeat.aggregate import POOLINGS
from vggfeat.errors import VggfeatError
from vggfeat.index import build_index, index_of

from ..conftest import HANG, Command, assert_same_descriptors, photograph, vgg_of
from .conftest import unit

NET = "random:A,width=0.125,crop=32"


@pytest.fixture(scope="module")
def network() -> vggfeat.Network:
    return vggfeat.load(NET)


# --- what there is --------------------------------------------------------------------------------


def test_the_docstrings_example_runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parent)
    build_index("feats.index", index_of(vggfeat.open_features("feats.h5")))
    pixels = photograph(0, 40, 50)
    Image.fromarray(pixels).save("a.jpg")
    assert vggfeat.__doc__ is not None
    names: dict[str, Any] = {"pil_image": Image.fromarray(pixels), "array_HWC": pixels}
    exec(vggfeat.__doc__.partition("\n")[2], names)
    assert names["rows"].shape == names["cosines"].shape == (1, 10)
    assert names["X"].shape[0] == 3 and names["svm"].classes_.tolist() == ["cat", "dog"]


def test_the_library_as_in_its_docstring(command: Command, folder: Path, extracted: Path) -> None:
    net = vggfeat.load("A", weights=NET)
    feats = vggfeat.open_features(extracted)
    paths = [str(folder / name) for name in feats.names]
    with Image.open(paths[1]) as image:
        pixels = np.asarray(image)
        three = vggfeat.embed(net, [paths[0], image, pixels], scales=(32, 48))
    assert three.shape == (3, 512) and three.dtype == np.float32
    expected = unit(feats.descriptors.astype(np.float64).mean(1))
    assert_same_descriptors(three, expected[[0, 1, 1]].astype(np.float32))
    train, test = feats.splits["split0/train"], feats.splits["split0/test"]
    assert feats.labels is not None
    svm = vggfeat.LinearSVM(C=4.0).fit(expected[train], feats.labels[train])
    assert svm.score(expected[test], feats.labels[test]) == 1.0
    assert feats.classes == ["blue", "red"] and feats.readable.all()


def test_all_is_shown_and_only_loaded_when_used() -> None:
    """In a process of its own, where nothing is loaded yet."""
    script = """
        import sys
        import vggfeat
        assert dir(vggfeat) == sorted([*vggfeat.__all__, "__version__"]), dir(vggfeat)
        assert "torch" not in sys.modules
        try:
            vggfeat.embedd
        except AttributeError as error:
            assert str(error) == "module 'vggfeat' has no attribute 'embedd'"
            assert error.name == "embedd"
            sys.excepthook(AttributeError, error, None)
        from vggfeat import *
        assert all(callable(globals()[name]) for name in vggfeat.__all__)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert ran.returncode == 0, ran.stderr
    if sys.version_info >= (3, 12):  # 3.11 suggests names in its own traceback only
        assert "Did you mean: 'embed'?" in ran.stderr


def test_these_names_are_public() -> None:
    """People's programs hold them: renaming or dropping one is a decision, not a slip."""
    assert sorted(vggfeat.__all__) == [
        "Evidence",
        "Features",
        "Index",
        "LinearSVM",
        "LinearSVMCV",
        "LogisticRegression",
        "Model",
        "NearestNeighbours",
        "Network",
        "Prediction",
        "RidgeClassifier",
        "UnreadableImage",
        "VggFeaturizer",
        "VggfeatError",
        "embed",
        "evidence",
        "load",
        "open_features",
        "open_index",
        "open_model",
        "predict_all",
    ]


def test_who_reads_types_sees_the_same_names() -> None:
    """The imports that are for them only, against where each name is loaded from."""
    tree = ast.parse(Path(vggfeat.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == {name: f"vggfeat.{module}" for name, module in vggfeat._WHERE.items()}


# --- what it takes --------------------------------------------------------------------------------

HINT = r"give a list of images, and for one image \[image\]"
PIXELS = photograph(0, 40, 50)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (Image.fromarray(PIXELS), f"`images` is a PIL image: {HINT}"),
        (PIXELS, rf"`images` is an array of shape \(40, 50, 3\) and dtype uint8: {HINT}"),
        (PIXELS[..., 0], rf"`images` is an array of shape \(40, 50\) and dtype uint8: {HINT}"),
        ("a.jpg", f"`images` is 'a.jpg': {HINT}"),
        (Path("a.jpg"), f"`images` is of type PosixPath: {HINT}"),
        (b"GIF89a", f"`images` is of type bytes: {HINT}"),
        (None, f"`images` is None: {HINT}"),
        (3, f"`images` is 3: {HINT}"),
        ({"a": "a.jpg"}, f"`images` is of type dict: {HINT}"),
        ({"a.jpg"}, f"`images` is of type set: {HINT}"),
        (torch.zeros(2, 3, 40, 40), rf"`images` is a PyTorch tensor \(2, 3, 40, 40\) .*: {HINT}"),
        ([], "`images` is empty"),
        (
            [PIXELS, torch.zeros(3, 40, 40)],
            r"image 1 of `images` is a PyTorch tensor .*permute\(1, 2, 0\)",
        ),
        (
            [PIXELS, None],
            r"image 1 of `images` is None: give a path, the bytes of a file, a PIL image",
        ),
        ([["a.jpg"]], "image 0 of `images` is of type list: give a path"),
        (
            np.zeros((1, 3, 40, 50), np.uint8),
            r"image 0: .*expected .*\(H, W, 3\).*transpose\(1, 2, 0\)",
        ),
        ([PIXELS.astype(float)], r"image 0: float values span .*must lie in 0\.\.1"),
    ],
)
def test_what_is_no_list_of_images_is_told(
    network: vggfeat.Network, images: Any, told: str
) -> None:
    with pytest.raises(VggfeatError, match=told):
        vggfeat.embed(network, images, (32,))


def test_an_open_file_is_no_list_of_images(network: vggfeat.Network, tmp_path: Path) -> None:
    """It is iterable, line by line."""
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file, pytest.raises(VggfeatError, match=HINT):
        vggfeat.embed(network, file, (32,))


def test_iterators_and_batches_are_lists_of_images(network: vggfeat.Network) -> None:
    expected = vggfeat.embed(network, [PIXELS, PIXELS[::-1]], (32,))
    for images in (
        iter([PIXELS, PIXELS[::-1]]),
        np.stack([PIXELS, PIXELS[::-1]]),
        (PIXELS / 255, PIXELS[::-1]),
    ):
        assert_same_descriptors(vggfeat.embed(network, images, (32,)), expected)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"scales": 256},
            r"`scales` must be whole numbers of pixels, as \(256, 384, 512\), not 256",
        ),
        ({"scales": "256"}, "`scales` must be .* not '256'"),
        ({"scales": (40.5,)}, r"`scales` must be .* not \(40.5,\)"),
        ({"layer": 7}, "no layer 7"),
        ({"layer": ""}, "no layer ''"),
        ({"mirror": "no"}, "`mirror` must be True or False, not 'no'"),
        ({"pool": "avg"}, f"`pool` must be one of {', '.join(POOLINGS)}, not 'avg'"),
        ({"batch_size": 0}, "`batch_size` must be a whole number from 1 up, not 0"),
        ({"batch_size": "8"}, "`batch_size` must be .* not '8'"),
        ({"workers": 0}, "`workers` must be a whole number from 1 up, not 0"),
    ],
)
def test_settings_of_the_wrong_kind_are_told(
    network: vggfeat.Network, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(VggfeatError, match=told):
        vggfeat.embed(network, [PIXELS], **settings)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: vggfeat.embed("mini", [PIXELS]),  # type: ignore[call-overload]
            "`network` must be one that vggfeat.load returns, not 'mini'",
        ),
        (lambda: vggfeat.load(None), "`name` must be a source of weights, .* or a path, not None"),  # type: ignore[arg-type]
        (lambda: vggfeat.load(5), "`name` must be .* not 5"),  # type: ignore[arg-type]
        (lambda: vggfeat.load("D", 5), "`weights` must be a source of weights, .* not 5"),  # type: ignore[arg-type]
        (
            lambda: vggfeat.load(NET, device="gpu"),
            "no device 'gpu'; give auto, cpu, cuda or cuda:N",
        ),
        (lambda: vggfeat.load(NET, device=None), "no device None; give auto"),  # type: ignore[arg-type]
        (
            lambda: vggfeat.load(NET, device="cuda"),
            "device 'cuda' is not there: PyTorch sees 0 GPUs",
        ),
        (lambda: vggfeat.load(NET).to("cuda"), "device 'cuda' is not there: PyTorch sees 0 GPUs"),
        (lambda: vggfeat.load(NET, precision=16), "precision 16 is not one of auto, float32"),  # type: ignore[arg-type]
        (
            lambda: vggfeat.load(NET, precision="half"),
            "precision 'half' is not one of auto, float32",
        ),
        (lambda: vggfeat.open_features(3), "give the path of a feature file, not 3"),  # type: ignore[arg-type]
        (lambda: vggfeat.open_features(None), "give the path of a feature file, not None"),  # type: ignore[arg-type]
        (lambda: vggfeat.open_model(3), "give the path of a model file, not 3"),  # type: ignore[arg-type]
        (lambda: vggfeat.open_model("m.h5", device="gpu"), "no device 'gpu'"),
        (lambda: vggfeat.open_model("m.h5", weights=3), "`weights` must be .* not 3"),  # type: ignore[arg-type]
        (lambda: vggfeat.LinearSVM(device="gpu").fit([[0.0], [1.0]], [0, 1]), "no device 'gpu'"),
        (
            lambda: vggfeat.LinearSVMCV(device="cuda").fit([[0.0], [1.0]] * 5, [0, 1] * 5),
            "sees 0 GPUs",
        ),
    ],
)
def test_arguments_of_the_wrong_kind_are_told(call: Callable[[], Any], told: str) -> None:
    with pytest.raises(VggfeatError, match=told):
        call()


# --- devices and precisions -----------------------------------------------------------------------


def test_a_net_is_loaded_in_the_hardwares_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vggfeat.load(NET).precision == "float32"  # as the tests' hardware has nothing else
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    fast, exact = vggfeat.load(NET), vggfeat.load(NET, precision="float32")
    assert (fast.precision, exact.precision) == ("bfloat16", "float32")
    assert {p.dtype for p in vgg_of(fast).parameters()} == {torch.bfloat16}
    assert fast.fingerprint == exact.fingerprint and str(fast.device) == "cpu"


def test_rounded_weights_are_no_float32_again() -> None:
    network = vggfeat.load(NET, precision="bfloat16")
    assert network.to("cpu", "bfloat16") is network
    with pytest.raises(
        VggfeatError, match="were rounded to bfloat16: load them again with `precision` float32"
    ):
        network.to("cpu", "float32")
    assert (
        network.precision == "bfloat16"
        and next(vgg_of(network).parameters()).dtype == torch.bfloat16
    )
