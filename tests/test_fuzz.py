"""Files from strangers: damaged or made up, they are read or refused in one sentence, within a
gigabyte.
"""

from __future__ import annotations

import io
import os
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.datasets.utils import extract_archive

import vggfeat
from pretrain.kept import KeptPosteriors
from vggfeat import datasets, writer
from vggfeat.datasets.download import downloading
from vggfeat.describe import description_of
from vggfeat.errors import VggfeatError
from vggfeat.extract import extract
from vggfeat.model import model_from, open_model, save_model
from vggfeat.protocols import Outcome
from vggfeat.results import Results, Scored
from vggfeat.tensors import bare, read
from vggfeat.weights import save_weights

from .vggfeat.test_caffe import caffemodel
from .vggfeat.test_hdf5 import posteriors_at, reseal
from .vggfeat.test_tensors import MOMENTUM, arrays_of

LISTED = Path(__file__).parent / "formats/version2/index/small.index"
EXAMPLES = int(os.environ.get("FUZZ", "60"))  # damaged files of each kind; more in a longer check
WEIGHTS = "random:A,width=0.125,crop=32,classes=3"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each kind that is read."""
    folder = tmp_path_factory.mktemp("good")
    network = vggfeat.load(WEIGHTS)
    items = datasets.load("digits", None).first(6)
    extract(items, network, folder / "features.h5", scales=(40,), layer="pool1")
    with pytest.raises(KeyboardInterrupt), begun(folder / "begun.h5") as file:
        file.note_source(0, items.source(0))
        file.write(0, 0, np.zeros(8, np.float32))
        raise KeyboardInterrupt
    svm = vggfeat.LinearSVM().fit(np.random.default_rng(0).random((30, 8)), np.arange(30) % 3)
    part = description_of(network, "pool1", (40,), True)
    scored = {"test": Scored(np.arange(4), np.zeros((4, 3)))}
    outcome = Outcome(Results(protocol="single-label", dataset="digits"), svm, scored)
    save_model(
        folder / "model.h5",
        model_from(outcome, ["a", "b", "c"], (part,), outcome.results),
    )
    save_weights(
        folder / "weights.safetensors",
        network.vgg(),
        network.preprocessing,
        classes=["a", "b", "c"],
    )
    posteriors_at(folder / "posteriors.h5")
    shutil.copy(LISTED, folder)
    released = vggfeat.load("random:D,width=0.03125,crop=32").module.state_dict()
    torch.save(released, folder / "weights.pth")
    wrapped = {f"module.{key}": value for key, value in released.items()}
    torch.save(
        {"epoch": 1, "state_dict": wrapped, "optimizer": MOMENTUM}, folder / "checkpoint.ckpt"
    )
    (folder / "net.caffemodel").write_bytes(caffemodel(arrays_of(network.vgg())))
    (folder / "old.caffemodel").write_bytes(caffemodel(arrays_of(network.vgg()), old=True))
    return {path.name: path for path in folder.iterdir()}


def begun(path: Path) -> writer.FeatureWriter:
    items = datasets.load("digits", None).first(6)
    return writer.FeatureWriter.open(
        path, items, description_of(vggfeat.load(WEIGHTS), "pool1", (40,), True), 8
    )


def go_on(path: Path) -> None:
    with begun(path.with_suffix("")):
        pass


def search(path: Path) -> None:
    """Whatever stands in a file, faiss is built of it, and looks through all of its lists."""
    found = vggfeat.open_index(path)
    if found.tuning is not None:
        found.search(found.rows[:2], probes=10**6, candidates=10**6)


READERS: dict[str, Callable[[Path], Any]] = {
    "features.h5": lambda path: vggfeat.open_features(path).descriptors,
    "begun.h5.partial": go_on,
    "model.h5": open_model,
    "posteriors.h5": KeptPosteriors.read,
    "small.index": search,
    "weights.safetensors": lambda path: vggfeat.load(str(path)),
    "weights.pth": lambda path: vggfeat.load(f"torchvision:vgg16@{path}"),
    "checkpoint.ckpt": lambda path: bare(
        *read(path), [["features.0.weight", "features.0.bias"]], path
    ),
    "net.caffemodel": vggfeat.load,
    "old.caffemodel": vggfeat.load,
}


@pytest.fixture
def a_gigabyte() -> Iterator[None]:
    """No more than that in addition to what the process has."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read_or_refused(name: str, path: Path) -> None:
    try:
        READERS[name](path)
    except VggfeatError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="asks Linux for the size of the process"
)
def test_damage(
    good: dict[str, Path], tmp_path: Path, a_gigabyte: None, name: str, data: st.DataObject
) -> None:
    """A few bytes changed, more of them where the structure is, and sometimes the end cut off."""
    raw = bytearray(good[name].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.floats(0, 1, exclude_max=True)) ** data.draw(st.sampled_from([1, 3]))
        at = min(int(place * len(raw)), len(raw) - 1)
        width = data.draw(st.sampled_from([1, 1, 4, 8]))
        value = data.draw(st.sampled_from([0, 1, 0x7F, 0xFF, 0x41]))
        raw[at : at + width] = bytes([value]) * len(raw[at : at + width])
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path / name
    path.write_bytes(raw)
    if (".h5" in name or name == "small.index") and data.draw(st.booleans()):
        reseal(path)  # a stranger's, not the disk's: what reads the values meets it
    read_or_refused(name, path)


@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(raw=st.binary(max_size=300))
def test_noise(tmp_path: Path, name: str, raw: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    read_or_refused(name, path)


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("../outside.txt")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    with (
        pytest.raises(VggfeatError, match="could not download"),
        downloading("voc2007", tmp_path / "root"),
    ):
        extract_archive(str(archive), str(tmp_path / "root"))
    assert not (tmp_path / "outside.txt").exists()
    assert tarfile.TarFile.extraction_filter is None
