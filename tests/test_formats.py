"""Files of every kind as a released version wrote them (`tests/formats`), opened by the program's
own readers.

Their values are those that stand in them: whatever machine reads them reads the same.
"""

from __future__ import annotations

import ast
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vggfeat
from pretrain import kept
from pretrain.checkpoint import load_checkpoint, read_state
from pretrain.colour import Colours
from pretrain.kept import KeptPosteriors
from pretrain.ledger import read_cells
from pretrain.posteriors import how_trained
from pretrain.recipe import history_of, read_recipe
from pretrain.watch import events
from tests.conftest import Command
from tests.formats.make import (
    CLASSES,
    COUNT,
    MADE_WITH,
    SCALES,
    STOPPED,
    TRAINING,
    begun,
    descriptor,
    draw,
    write_rows,
)
from tests.pretrain.conftest import training
from vggfeat import index, ledger, model, store
from vggfeat.errors import VggfeatError
from vggfeat.hdf5 import format_of
from vggfeat.model import open_model
from vggfeat.results import read_results
from vggfeat.shards import plan
from vggfeat.tensors import metadata_of
from vggfeat.vgg import VGG

FORMATS = Path(__file__).parent / "formats"
NOW = FORMATS / "version2"
MORE = NOW / "more"
FINGERPRINT = "3990d47f561d5eb407d5f8d0f372b4460516639e569afb2ffdcbaf5bb4a2513c"
TRAINING_SET = "4f3275529ed281b65403e891261d9416fb6b2697a0a62a2534de3490b26fc3c7"
# set -> shape, type and checksum of its readable rows
SETS = {
    "imagenet": ((17, 2, 64), "float16", 2051637963),
    "webdataset": ((17, 2, 64), "float32", 1266245651),
}
# format -> its versions, of each of which there is a file; "" is the ledger, which has no name
VERSIONS = {
    store.FORMAT: {1: "features.h5", 2: "features.h5"},
    model.FORMAT: {1: "model.h5", 2: "model.h5"},
    index.FORMAT: {2: "index/small.index"},
    kept.FORMAT: {1: "posteriors.h5", 2: "posteriors.h5"},
    plan.FORMAT: {1: "imagenet.set/plan.json"},
    "": {2: "ledger.json"},
}


def constants(path: Path) -> dict[str, object]:
    """A module's names that are given a plain value."""
    found: dict[str, object] = {}
    for line in ast.parse(path.read_text()).body:
        if isinstance(line, ast.Assign):
            for target in line.targets:
                pairs = [(target, line.value)]
                if isinstance(target, ast.Tuple) and isinstance(line.value, ast.Tuple):
                    pairs = list(zip(target.elts, line.value.elts, strict=False))
                for name, value in pairs:
                    if isinstance(name, ast.Name) and isinstance(value, ast.Constant):
                        found[name.id] = value.value
    return found


def test_every_version_of_a_format_has_a_file() -> None:
    """Who changes a format's version adds a file of the new one, and leaves those of the old."""
    written = set()
    for package in (vggfeat, kept):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            names = constants(path)
            for name, value in names.items():
                if name.endswith("VERSION") and type(value) is int:
                    written.add((names.get("FORMAT", ""), value))
    assert written == {(name, max(versions)) for name, versions in VERSIONS.items()}
    for name, versions in VERSIONS.items():
        assert sorted(versions) == list(range(min(versions), max(versions) + 1))
        for version, file in versions.items():
            path = FORMATS / f"version{version}" / file
            assert path.is_file()
            if version == 2 and name:
                assert format_of(path) == name
    assert json.loads((NOW / "ledger.json").read_text())["version"] == ledger.VERSION


@pytest.mark.parametrize("name", ["imagenet", "webdataset"])
def test_a_set_of_shards(name: str) -> None:
    features = vggfeat.open_features(FORMATS / "version1" / f"{name}.set")
    of_tars = name == "webdataset"
    first = "train.tar/ant0.ppm" if of_tars else "train/ant/0.ppm"
    assert features.names[0] == first and features.classes == ["ant", "bee"]
    assert features.labels is not None
    assert features.labels.tolist() == [0] * 7 + [1] * 6 + [0] * 2 + [1] * 2
    assert {part: len(rows) for part, rows in features.splits.items()} == {"train": 13, "val": 4}
    assert list(features.errors.values()) == ["empty file (0 bytes)"]
    features.verify()
    values = features.read()
    assert (values.shape, str(values.dtype)) == SETS[name][:2]
    assert zlib.crc32(values[features.readable].tobytes()) == SETS[name][2]


def test_a_feature_file() -> None:
    features = vggfeat.open_features(NOW / "features.h5")
    assert features.names[:2] == ["train/bee/0.png", "train/bee/1.png"]
    assert features.names[-1] == "val/caf\u00e9/2.png" and features.classes == CLASSES
    assert features.labels is not None
    assert features.labels.tolist() == [0] * 6 + [1] * 6 + [0] * 4 + [1] * 3
    assert {name: rows.tolist() for name, rows in features.splits.items()} == {
        "train": list(range(12)),
        "val": list(range(12, 19)),
    }
    assert features.errors == {15: "empty file (0 bytes)"}
    how = features.description
    assert (how.net, how.layer, how.scales, how.mirror) == ("A", "fc7", (32, 40), True)
    assert (how.fingerprint, how.precision) == (FINGERPRINT, "float32")
    features.verify()
    x = features.descriptors
    assert x.shape == (19, 2, 64) and x.dtype == np.float32
    assert zlib.crc32(x.tobytes()) == 3011251419


def test_feature_files_with_random_splits_with_several_labels_and_without_any() -> None:
    features = vggfeat.open_features(MORE / "splits.h5")
    assert (features.names[10], features.classes) == ("bee/0.ppm", ["ant", "bee"])
    assert features.labels is not None and features.labels.tolist() == [0] * 10 + [1] * 10
    assert [*features.splits] == [
        f"split{i}/{p}" for i in range(3) for p in ("train", "val", "test")
    ]
    assert features.splits["split2/test"].tolist() == [3, 9, 13, 16]
    features = vggfeat.open_features(MORE / "several.h5")
    assert features.names[10] == "images/train/bee/0.ppm" and features.classes == ["ant", "bee"]
    assert features.labels is not None  # of ant, ant and bee, bee, ant and a difficult bee, neither
    assert features.labels.tolist() == [[1, -1], [1, 1], [-1, 1], [1, 0], [-1, -1]] * 4
    assert features.splits["val"].tolist() == [*range(1, 20, 3)]
    features = vggfeat.open_features(MORE / "unlabelled.h5")
    assert (features.labels, features.classes, features.splits) == (None, [], {})
    for name in ("splits", "several", "unlabelled"):
        features = vggfeat.open_features(MORE / f"{name}.h5")
        features.verify()
        assert features.shape == (len(features.names), 1, 32) and features.readable.all()


@pytest.mark.parametrize(("folder", "facts"), [(NOW, {}), (MORE, {"versions": MADE_WITH})])
def test_a_feature_file_that_was_begun_is_gone_on_with(
    folder: Path, facts: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copy(folder / "begun.h5.partial", tmp_path / "features.h5.partial")
    other = {"versions": {**facts.get("versions", {}), "torch": "2.0.0"}}
    with pytest.raises(VggfeatError, match=r"torch .*, not 2\.0\.0"):
        begun(tmp_path / "features.h5", other)
    with begun(tmp_path / "features.h5", facts) as file:
        assert file.seconds > 0
        write_rows(file, range(2, COUNT))
        file.finish()
    x = vggfeat.open_features(tmp_path / "features.h5").descriptors
    every = [[descriptor(row, scale) for scale in range(len(SCALES))] for row in range(COUNT)]
    np.testing.assert_array_equal(x, np.array(every))


def test_a_model_and_its_results() -> None:
    model = open_model(NOW / "model.h5")
    assert (model.classes, model.pool, model.multi_label) == (CLASSES, "average", False)
    assert model.coef_KD.shape == (2, 64) and zlib.crc32(model.coef_KD.tobytes()) == 1309182570
    assert model.intercept_K == pytest.approx([0.00048577, -0.00048577], abs=1e-8)
    assert [part.fingerprint for part in model.parts] == [FINGERPRINT]
    scored = model.scored["val"]
    assert scored.rows.tolist() == [12, 13, 14, 16, 17, 18]
    assert scored.scores[:2, 0] == pytest.approx([-0.00210132, 0.00012542], abs=1e-8)
    results = read_results(NOW / "results.json")
    assert model.results == results
    assert (results.protocol, results.choice.C, results.n_train) == ("single-label", 0.03125, 12)
    assert results.figures.accuracy == pytest.approx(2 / 3) and results.n_unreadable == 1


def test_an_index_with_lists() -> None:
    made = vggfeat.open_index(NOW / "index/small.index")
    assert (made.names[1], made.classes, made.pool) == ("caf\u00e9/1.png", CLASSES, "max")
    assert made.labels is not None and made.labels[:3].tolist() == [0, 1, 0]
    assert made.errors == {9: "empty file (0 bytes)"} and not made.readable[9]
    assert (made.description.layer, made.description.scales) == ("pool2", (32, 40))
    assert (made.dataset, made.root, made.rows_digest[:8]) == ("folder", "/images", "127f9148")
    assert made.lists is not None and made.tuning is not None
    assert {name: values.shape for name, values in made.lists.arrays().items()} == {
        "axes": (8, 8),
        "centroids": (32, 8),
        "codebooks": (2, 256, 4),
        "codes": (299, 2),
        "rows": (299,),
        "ends": (32,),
    }
    assert made.tuning["probes"] == 16 and made.tuning["candidates"] == 100
    x = made.rows[:]
    assert zlib.crc32(x.tobytes()) == 316184551
    exact, by_lists = made.search(x[:1], 4, exact=True), made.search(x[:1], 4, probes=32)
    for rows, _ in (exact, by_lists):
        assert rows.tolist() == [[0, 218, 213, 186]]


def test_models_of_several_splits_and_of_several_labels() -> None:
    model, results = open_model(MORE / "splits-model.h5"), read_results(MORE / "splits.json")
    assert model.results == results and model.coef_KD.shape == (2, 32)
    assert [*model.scored] == [split.name for split in results.per_split]
    assert model.scored["split2"].rows.tolist() == [3, 9, 13, 16]
    assert [split.choice.C for split in results.per_split] == [0.03125] * 3
    assert [split.choice.C_curve[4] for split in results.per_split] == [0.75, 0.75, 0.0]
    assert results.figures.mean_class_recall_std == 0.0
    model, results = open_model(MORE / "several-model.h5"), read_results(MORE / "several.json")
    assert model.results == results and (model.multi_label, model.pool) == (True, "average")
    assert [part.layer for part in model.parts] == ["fc7", "fc6"]
    assert model.coef_KD.shape == (2, 64) and [*model.scored] == ["test"]
    assert (results.protocol, results.difficult) == ("multi-label", "left out")
    assert results.figures.map_11point == pytest.approx((15 / 22 + 0.6) / 2)
    assert results.figures.map_allpoint == pytest.approx((2 / 3 + 0.6) / 2)
    assert results.figures.accuracy is None and results.per_class["ant"].n_positive == 3


def test_kept_posteriors_and_the_ledgers_cells() -> None:
    posteriors = KeptPosteriors.read(NOW / "posteriors.h5")
    assert (posteriors.dataset, posteriors.data, posteriors.split) == ("imagenet", "images", "val")
    assert posteriors.classes == CLASSES and posteriors.names[6] == "val/caf\u00e9/2.png"
    assert posteriors.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert posteriors.unreadable == {3: "empty file (0 bytes)"}
    assert posteriors.crc32.tolist()[:4] == [2177943554, 3382748948, 2236438805, 0]
    (net,) = posteriors.nets
    assert (net.scales, list(net.modes), net.facts["epochs"]) == ((36,), ["dense", "crops"], "1.50")
    assert net.modes["crops"][0, 4] == pytest.approx([0.2663398, 0.7336601], abs=1e-7)
    assert np.isnan(net.modes["dense"][0, 3]).all()
    (crop,) = KeptPosteriors.read(NOW / "centre/posteriors.h5").nets
    assert (crop.scales, list(crop.modes), crop.facts["fingerprint"]) == (
        (36,),
        ["centre"],
        FINGERPRINT,
    )
    assert crop.mean("centre")[0] == pytest.approx([0.2913091, 0.7086909], abs=1e-7)
    (cell,) = read_cells(NOW / "ledger.json")
    assert (cell.key, cell.S, cell.Q, cell.images) == ((3, "A 256", "dense"), "36", "36", 7)
    assert cell.wrong_images().tolist() == [True, True, True, True, False, False, False]
    assert cell.top1 == pytest.approx(400 / 7) and cell.top5 is None
    assert [each.fingerprint for each in cell.nets] == [FINGERPRINT]


def test_weights_and_what_they_tell() -> None:
    network = vggfeat.load(NOW / "weights.safetensors")
    assert (network.name, network.classes, network.fingerprint) == ("A", CLASSES, FINGERPRINT)
    assert (network.vgg().width, network.vgg().crop, network.layers[-1]) == (1 / 64, 32, "fc8")
    assert network.preprocessing.mean == pytest.approx((79.43125, 127.641898, 79.875637))
    (past,) = history_of(network.metadata)
    assert (past.stage, past.epochs, past.images) == ("A-36", 1.5, 10)
    assert past.training_set == TRAINING_SET
    facts = how_trained(metadata_of(NOW / "weights.safetensors"))
    assert (facts["recipe"], facts["stands_for"]) == ("small-71424393", "256")
    assert json.loads(network.metadata["errors"])["held_out"] == {"top1": 50.0, "top5": None}


def test_a_checkpoint_its_log_and_its_colours() -> None:
    state, identity = read_state(NOW / "last.safetensors")
    assert (state.iteration, state.finished, state.held_out) == (3, True, (50.0, None))
    assert (identity["net"], identity["classes"]) == ("A", CLASSES)
    net = VGG("A", num_classes=2, width=1 / 64, crop=32)
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    load_checkpoint(NOW / "last.safetensors", net, optimiser)
    ours = vggfeat.load(NOW / "weights.safetensors").module.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in net.state_dict().items())
    last = net.classifier[-1].weight
    assert isinstance(last, torch.Tensor) and optimiser.state[last]["momentum_buffer"].any()
    told, dropped = events(NOW / "log.jsonl")
    assert [event["event"] for event in told] == ["start", "held_out", "train", "held_out", "val"]
    assert dropped == 0 and told[2]["loss"] > 0
    colours = Colours.read(NOW / "colours.json")
    assert colours.mean == pytest.approx((79.43125, 127.641898, 79.875637))
    assert (colours.images, colours.training_set) == (12, TRAINING_SET)


def test_a_recipe_of_ones_own() -> None:
    recipe = read_recipe(str(MORE / "recipe.toml"), [], "B")
    assert (recipe.name, recipe.width, recipe.crop, recipe.batch_size) == ("recipe", 1 / 128, 32, 4)
    assert (recipe.momentum, recipe.weight_decay, recipe.dropout) == (0.8, 1e-3, 0.25)
    assert (recipe.random_layers, recipe.init_std, recipe.caffe_biases) == ("glorot", 0.02, True)
    assert (recipe.rate_divisor, recipe.rate_drops, recipe.patience) == (5.0, 2, 9)
    assert (recipe.drop_by, recipe.held_out, recipe.chance_after) == ((0.5, 0.75), 0.2, 0)
    assert (recipe.flip, recipe.colour_std, recipe.seed) == (False, 0.05, 7)
    assert recipe.stands_for == {"36": "256"}
    first, second = recipe.stages
    assert (first.net, first.train_scale, first.epochs) == ("A", (36, 36), 1.5)
    assert (second.net, second.train_scale, second.iterations) == ("NET", (36, 40), 9)
    assert (second.learning_rate, second.learn, second.nets) == (1e-3, "all", ("A", "B", "D"))


def test_a_run_that_was_interrupted_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_main: Command
) -> None:
    """What a user has who brings the program up to date in the midst of a long training."""
    monkeypatch.chdir(tmp_path)
    draw(Path("images"), {"train": 10, "val": 2})
    shutil.copytree(MORE / STOPPED, STOPPED)
    shutil.copy(MORE / "recipe.toml", tmp_path)
    state, _ = read_state(Path(STOPPED, "B-36-40", "last.safetensors"))
    assert (state.iteration, state.finished) == (7, False)
    ran = training(run_main)(*TRAINING)
    assert ran.status == 0, ran.err
    told = [line for line in ran.err_lines if line.startswith(("A-36", "B-36-40"))]
    assert told[:2] == ["A-36: done before", "B-36-40: going on from iteration 7"]
    state, _ = read_state(Path(STOPPED, "B-36-40", "last.safetensors"))
    assert (state.iteration, state.finished) == (9, True)
    log, dropped = events(Path(STOPPED, "B-36-40", "log.jsonl"))
    assert [event["iteration"] for event in log if event["event"] == "train"] == [*range(1, 10)]
    assert dropped == 0
    network = vggfeat.load(Path(STOPPED, "weights.safetensors"))
    assert (network.name, network.classes) == ("B", ["ant", "bee"])
    assert [past.stage for past in history_of(network.metadata)] == ["A-36", "B-36-40"]
