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
from vggfeat import cli
from vggfeat.aggregate import POOLINGS
from vggfeat.errors import UnreadableImage, VggfeatError

from ..conftest import HANG, Command, assert_same_descriptors, photograph, vgg_of

NET = "random:A,width=0.125,crop=32"
SMALL = ("--weights", NET, "--scales", "32,40", "--device", "cpu", "--precision", "float32")


@pytest.fixture(scope="module")
def network() -> vggfeat.Network:
    return vggfeat.load(NET)


@pytest.fixture
def trained(folder: Path, run_main: Command) -> Path:
    """feats.h5 of `folder`'s reddish and bluish images, and model.h5."""
    f, m = folder.parent / "feats.h5", folder.parent / "model.h5"
    ran = run_main(cli.main, "extract", "--dataset", "folder", "--root", folder, *SMALL, "--out", f)
    assert ran.status == 0, ran.err
    ran = run_main(cli.main, "svm", "--features", f, "--pool", "stack", "--C", 8, "--out", m)
    assert ran.status == 0, ran.err
    return m


# --- what there is --------------------------------------------------------------------------------


def test_the_docstrings_example_runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parent)
    pixels = photograph(0, 40, 50)
    Image.fromarray(pixels).save("a.jpg")
    assert vggfeat.__doc__ is not None
    names: dict[str, Any] = {"pil_image": Image.fromarray(pixels), "array_HWC": pixels}
    exec(vggfeat.__doc__.partition("\n")[2], names)
    assert names["X"].shape[0] == 3 and names["svm"].classes_.tolist() == ["cat", "dog"]


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
        "Features",
        "LinearSVM",
        "LinearSVMCV",
        "Model",
        "Network",
        "UnreadableImage",
        "VggfeatError",
        "embed",
        "load",
        "open_features",
        "open_model",
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


# --- saved classifiers ----------------------------------------------------------------------------


def test_a_model_names_and_scores_images(
    trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    real = vggfeat.sources.load

    def load(spec: str, **how: Any) -> vggfeat.Network:
        loaded.append(spec)
        return real(spec, **how)

    monkeypatch.setattr(vggfeat.sources, "load", load)
    model = vggfeat.open_model(trained)
    assert not loaded and model.classes == ["blue", "red"]
    paths = [folder / name / f"{i:02d}.jpg" for i in range(3) for name in ("red", "blue")]
    images = [
        paths[0],
        Image.open(paths[1]),
        np.asarray(Image.open(paths[2])),
        paths[3].read_bytes(),
        *paths[4:],
    ]
    assert model.predict(images) == ["red", "blue"] * 3
    scores = model.scores(images)
    assert scores.shape == (6, 2) and (scores.argmax(1) == [1, 0] * 3).all()
    assert loaded == [NET]  # once
    features = vggfeat.open_features(trained.parent / "feats.h5")
    rows = [features.names.index(f"{path.parent.name}/{path.name}") for path in paths]
    stacked = vggfeat.aggregate.aggregate(features.descriptors[rows], "stack")
    np.testing.assert_allclose(scores, model.decision_function(stacked), rtol=1e-3, atol=1e-4)


def test_a_model_keeps_the_place_of_what_it_cannot_read(trained: Path, folder: Path) -> None:
    model = vggfeat.open_model(trained, device="cpu")
    images: list[Any] = [folder / "gone.jpg", folder / "red/00.jpg", b"no image"]
    names, unreadable = model.predict(images, return_unreadable=True)
    assert names == [None, "red", None]
    assert unreadable == {0: "no such file", 2: unreadable[2]} and unreadable[2].startswith(
        ("not an", "damaged")
    )
    scores, told = model.scores(images, return_unreadable=True)
    assert told == unreadable and np.isnan(scores[[0, 2]]).all() and np.isfinite(scores[1]).all()
    scores, told = model.scores(images[:1], return_unreadable=True)
    assert np.isnan(scores).all() and scores.shape == (1, 2) and list(told) == [0]
    for method in (model.predict, model.scores):
        with pytest.raises(UnreadableImage, match="image 0: no such file"):
            method(images[:1])
        with pytest.raises(VggfeatError, match=HINT):
            method(str(images[1]))


def test_a_multi_label_model_names_all_that_is_present(
    trained: Path, folder: Path, run_main: Command, tmp_path: Path
) -> None:
    rows = [
        f"images/{c}/{i:02d}.jpg,{c if i % 3 else c + ';small'}"
        for c in ("red", "blue")
        for i in range(12)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,labels", *rows]) + "\n")
    f, m = tmp_path / "several.h5", tmp_path / "several-model.h5"
    words = ("extract", "--dataset", "csv", "--root", tmp_path / "list.csv", *SMALL, "--out", f)
    assert run_main(cli.main, *words).status == 0
    assert run_main(cli.main, "svm", "--features", f, "--C", 1000, "--out", m).status == 0
    model = vggfeat.open_model(m)
    assert model.multi_label and set(model.classes) == {"red", "blue", "small"}
    images = [folder / "red/00.jpg", folder / "blue/01.jpg"]
    names, scores = model.predict(images), model.scores(images)
    for own, row in zip(names, scores, strict=True):
        assert sorted(own) == sorted(c for c, s in zip(model.classes, row, strict=True) if s > 0)
        assert [row[model.classes.index(c)] for c in own] == sorted(row[row > 0], reverse=True)
    assert "red" in names[0] and "blue" in names[1]


def test_a_models_weights_that_have_moved(trained: Path, folder: Path) -> None:
    images = [folder / "red/00.jpg"]
    expected = vggfeat.open_model(trained).scores(images)
    for weights in (NET, [NET]):
        np.testing.assert_array_equal(
            vggfeat.open_model(trained, weights=weights).scores(images), expected
        )
    with pytest.raises(VggfeatError, match="needs 1 `weights`, in its order; 2 given"):
        vggfeat.open_model(trained, weights=[NET, NET])
    with pytest.raises(VggfeatError, match="are not those that described the images"):
        vggfeat.open_model(trained, weights=f"{NET},seed=1").scores(images)
