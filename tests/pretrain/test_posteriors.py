"""Posteriors against a slow reference: one image and one view at a time, in float64; what the
weights tell of their training.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

import vggfeat
from pretrain.kept import MODES
from pretrain.posteriors import centre, evaluate, how_trained
from pretrain.readers import CentreCrops
from pretrain.recipe import Past, chain, read_recipe
from tests.conftest import Nets, photograph
from tests.pretrain.conftest import SMALL
from vggfeat.datasets import Items
from vggfeat.images import Preprocessing
from vggfeat.ranks import Ranks
from vggfeat.weights import Network, save_weights

CROP, CLASSES = 32, ["ant", "bee", "cat", "dog", "eel", "fox"]
SHAPES = [(40, 60), (60, 40), (45, 45), (33, 90), (200, 133), (40, 60)]


@pytest.fixture
def nets(tmp_path: Path, he: Nets, plain: Preprocessing) -> list[Network]:
    """D, and E with its classes in another order."""
    order = {"D": CLASSES, "E": CLASSES[::-1]}
    networks = []
    for net in ("D", "E"):
        module = he(net, num_classes=len(CLASSES), width=0.1, crop=CROP)
        with torch.no_grad():
            # posteriors that are neither 0 nor 1
            module.get_parameter("classifier.6.weight").mul_(0.05)
        path = tmp_path / f"{net}.safetensors"
        save_weights(path, module, plain, classes=order[net], train_scale="36-64")
        networks.append(vggfeat.load(net, weights=path))
    return networks


@pytest.fixture(params=["made", "real"])
def items(request: pytest.FixtureRequest, tmp_path: Path) -> Items:
    """Made images of six shapes; or six real photographs, the first of each shape that there is."""
    if request.param == "made":
        root, names = tmp_path, [f"{i}.png" for i in range(len(SHAPES))]
        for i, (height, width) in enumerate(SHAPES):
            Image.fromarray(photograph(i, height, width)).save(tmp_path / names[i])
    else:
        root = request.getfixturevalue("data") / "photos"
        of_shape = {
            Image.open(path).size: path.name for path in sorted(root.glob("*.JPEG"), reverse=True)
        }
        names = sorted(of_shape.values())[: len(CLASSES)]
        assert len(names) == len(CLASSES)
    labels = np.arange(len(names), dtype=np.int32)
    return Items("imagenet", "single-label", root, names, labels, CLASSES)


def rescaled(path: Path, Q: int) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    short, long = min(image.size), max(image.size)
    other = int(long * Q / short + 0.5)
    size = (Q, other) if image.width <= image.height else (other, Q)
    return (
        np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        if size != image.size
        else np.asarray(image)
    )


def reference(network: Network, path: Path, Q: int, mode: str) -> np.ndarray:
    """The paper's sentence, as loops: views of one image, one after another, in float64."""
    module = copy.deepcopy(network.vgg()).double()
    mean = np.array(network.preprocessing.mean)
    pixels = rescaled(path, Q).astype(np.float64) - mean
    posteriors = []
    if mode == "centre":
        top, left = ((n - CROP) // 2 for n in pixels.shape[:2])
        x = torch.from_numpy(pixels[top : top + CROP, left : left + CROP].copy())
        return F.softmax(module.eval().crop_scores(x.permute(2, 0, 1)[None])[0], 0).detach().numpy()
    for flipped in (False, True):
        if mode == "dense":
            view = pixels[:, ::-1] if flipped else pixels
            x = torch.from_numpy(view.copy()).permute(2, 0, 1)[None]
            pool5 = module.features(x)
            size = CROP // 32
            # the FC layers slide over pool5, one window at a time
            scores = [
                module.classifier.eval()(pool5[:, :, i : i + size, j : j + size].flatten(1))
                for i in range(pool5.shape[2] - size + 1)
                for j in range(pool5.shape[3] - size + 1)
            ]
            posteriors.append(F.softmax(torch.cat(scores).mean(0), 0))
            continue
        height, width = pixels.shape[:2]
        crops = []
        for i in range(5):
            for j in range(5):
                # evenly spaced, halves towards the top left
                top, left = (
                    int(np.ceil((n - CROP) * k / 4 - 0.5)) for n, k in ((height, i), (width, j))
                )
                crop = pixels[top : top + CROP, left : left + CROP]
                crop = crop[:, ::-1] if flipped else crop
                crops.append(torch.from_numpy(crop.copy()).permute(2, 0, 1))
        posteriors += F.softmax(module.eval().crop_scores(torch.stack(crops)), 1)
    return torch.stack(posteriors).mean(0).detach().numpy()


def test_dense_crops_both_and_fused(nets: list[Network], items: Items) -> None:
    scales = (36, 45, 64)
    kept = evaluate(
        nets,
        scales,
        MODES,
        items,
        "val",
        Ranks(torch.device("cpu")),
        batch_size=2,
        workers=2,
        advance=lambda done, total: None,
    )
    expected: dict[tuple[int, str, int], np.ndarray] = {}
    for n, network in enumerate(nets):
        order = [network.classes.index(name) for name in CLASSES]  # type: ignore[union-attr]
        for mode in MODES:
            for s, Q in enumerate(scales):
                rows = [reference(network, items.root / name, Q, mode) for name in items.names]
                expected[n, mode, Q] = np.stack(rows)[:, order]
                ours = kept.nets[n].modes[mode][s]
                assert np.abs(ours - expected[n, mode, Q]).max() < 1e-4
                assert expected[n, mode, Q].max() < 0.99  # else any scores would agree
    for n in (0, 1):
        multi = {m: np.mean([expected[n, m, Q] for Q in scales], axis=0) for m in MODES}
        for mode, posteriors in multi.items():
            assert np.abs(kept.nets[n].mean(mode) - posteriors).max() < 1e-4
        both = (multi["dense"] + multi["crops"]) / 2
        assert np.abs(kept.nets[n].mean("both") - both).max() < 1e-4
        assert np.abs(kept.nets[n].mean("dense", [45]) - expected[n, "dense", 45]).max() < 1e-4
    fused = np.mean(
        [expected[n, m, Q] for n in (0, 1) for m in ("dense", "crops") for Q in scales], axis=0
    )
    assert np.abs(kept.fused("both") - fused).max() < 1e-4
    # the errors, by counting
    guess = fused.argmax(1)
    truth = np.arange(len(items))
    assert kept.errors(kept.fused("both"))[0] == pytest.approx(100 * np.mean(guess != truth))


def test_a_central_crop_is_the_one_that_training_checks(nets: list[Network], items: Items) -> None:
    """Training rescales no more than the crop, to within 2 grey levels of the whole image."""
    for path in (items.root / name for name in items.names):
        for Q in (36, 45, 64):
            whole = torch.from_numpy(rescaled(path, Q).copy())[None]
            crop = torch.from_numpy(CentreCrops(Q, CROP).read(path, (0, 0)).crop)[None]
            ours = centre(nets[0], whole)
            theirs = nets[0].crop_scores_of(crop).softmax(1)
            assert (ours - theirs).abs().max() < 0.02
            # another place, or the mirror image, is further away than that
            moved = centre(nets[0], whole.roll(6, 2))
            assert (moved - theirs).abs().max() > 2 * (ours - theirs).abs().max()


@pytest.mark.parametrize(
    ("overrides", "stage", "changes", "stands_for"),
    [
        ((), "D-256", (), "256"),
        (("seed=3", "chance_after=0"), "D-384", (), "384"),
        (("width=0.25",), "D-256-512", ("width=0.25",), "256-512"),
        (("*.epochs=2",), "D-384", ("*.epochs=2.0",), "384"),
        (("D-384.learning_rate=5e-4",), "D-256", (), "256"),
        (("D-384.learning_rate=5e-4",), "D-384", ("NET-384.learning_rate=0.0005",), "384"),
        (("A-256.iterations=7",), "D-256", ("A-256.iterations=7",), "256"),
        (("D-384.train_scale=[300, 300]",), "D-300", ("NET-384.train_scale=[300, 300]",), ""),
        (("D-256-512.learn=fc",), "D-256-512-fc", (), "256-512"),  # told by the row
    ],
)
def test_a_net_tells_what_its_recipe_was(
    overrides: tuple[str, ...], stage: str, changes: tuple[str, ...], stands_for: str
) -> None:
    """A quarter of the width still counted as the paper's recipe."""
    recipe = chain(read_recipe("paper", overrides, "D"), "D")
    facts = how_trained({"source": f"pretrain paper {stage}", "recipe": recipe.to_json()})
    assert (facts["recipe"], facts["changes"], facts["stands_for"]) == (
        "paper",
        "\n".join(changes),
        stands_for,
    )
    assert facts["seed"] == str(recipe.seed) and facts["learn"] == (
        "fc" if "-fc" in stage else "all"
    )
    assert facts["epochs"] == facts["training_set"] == ""  # no history


def test_recipes_of_ones_own_are_told_apart_by_their_numbers(small: Path, tmp_path: Path) -> None:
    def facts(path: Path, *overrides: str, net: str = "B", init: str = "A") -> dict[str, str]:
        recipe = chain(read_recipe(str(path), overrides, net), net, init)
        stage = recipe.stages[-1].name
        return how_trained(
            {"source": f"pretrain {recipe.name} {stage}", "recipe": recipe.to_json()}
        )

    own = facts(small)
    assert (
        own["recipe"].startswith("small-") and own["changes"] == "" and own["stands_for"] == "256"
    )
    assert (
        facts(small, net="A") == own and facts(small, "batch_size=4")["changes"] == "batch_size=4"
    )
    assert facts(small, "NET-36.epochs=9")["changes"] == "NET-36.epochs=9.0"
    assert facts(small, init="glorot")["changes"] == 'random_layers="glorot"'
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "small.toml"
    other.write_text(SMALL.replace("batch_size = 8", "batch_size = 4"))
    assert facts(other)["recipe"] != own["recipe"]
    # a file of one's own with the name of one of ours is another recipe
    paper = tmp_path / "paper.toml"
    paper.write_text(SMALL)
    assert facts(paper)["recipe"] not in ("paper", own["recipe"])
    stage = {"net": "A", "train_scale": [256, 256], "learning_rate": 1, "epochs": 1}
    for name in ("lost", str(small)):  # a path that a stranger's file names is not opened
        lost = json.dumps({"name": name, "stages": [stage]})
        assert set(how_trained({"source": f"pretrain {name} A-256", "recipe": lost}).values()) == {
            ""
        }


def test_an_a_that_a_deeper_net_starts_from_is_told_by_as_own_chain(tmp_path: Path) -> None:
    """A of 20 epochs under D and of 9 by `--net A` were seeds of one row."""

    def changes(text: str, net: str, *overrides: str) -> str:
        (tmp_path / "own.toml").write_text(text)
        recipe = chain(read_recipe(str(tmp_path / "own.toml"), overrides, net), net)
        return how_trained({"source": "pretrain own A-36", "recipe": recipe.to_json()})["changes"]

    own = "epochs = 9\n".join(SMALL.rsplit("epochs = 20\n", 1))
    assert changes(own, "A") == "" and changes(own, "D") == "*.epochs=20.0"
    assert changes(own, "A", "NET-36.epochs=20") == "*.epochs=20.0"  # the same training
    assert changes(own, "D", "A-36.epochs=9") == ""
    assert changes(SMALL, "A") == changes(SMALL, "D") == ""
    # where no `--net A` makes one, the file's own stage is meant
    only = own.replace('net = "NET"', 'net = "NET"\nnets = ["D"]', 1)
    assert changes(only, "D") == "" and changes(only, "D", "A-36.epochs=9") == "*.epochs=9.0"


def test_a_chain_that_began_elsewhere_says_so(small: Path) -> None:
    recipe = chain(read_recipe(str(small)), "D")
    metadata = {"source": "pretrain small D-36", "recipe": recipe.to_json()}

    def facts(*past: Past) -> dict[str, str]:
        return how_trained(metadata | {"history": json.dumps([asdict(each) for each in past])})

    a, d = (Past(name, "small", 0, 20.0, 42, "ab12") for name in ("A-36", "D-36"))
    assert facts(a, d) | {"changes": ""} == facts(a, d)
    assert (facts(a, d)["epochs"], facts(a, d)["training_set"]) == ("40.00", "ab12")
    longer = facts(replace(a, recipe="mini", epochs=30.5, training_set="ef56"), d)
    assert longer["changes"] == "chain=A-36 of mini > D-36"
    assert (longer["epochs"], longer["training_set"]) == ("50.50", "ef56 ab12")
    assert facts(d)["changes"] == "chain=D-36"
    assert facts(replace(a, seed=1), d)["changes"] == "chain=A-36 of seed 1 > D-36"
