"""The whole paper in small: every net trained once, every figure in the page, killed and gone on
with; what exists is used.
"""

from __future__ import annotations

import functools
import json
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

from pretrain import localise, reproduction
from pretrain.ledger import read_cells
from pretrain.reproduce import app
from pretrain.tables import Cell, Key
from pretrain.trainer import Trainer
from tests import prepared
from tests.conftest import HANG, Command, Ran, photograph, ran
from tests.pretrain.conftest import environment, write_boxes
from tests.vggfeat.datasets.made import Persons, annotation, make_action
from vggfeat import protocols, terminal
from vggfeat.datasets.voc_action import ACTIONS
from vggfeat.sources import load

# Three nets, which fill rows of every table; a control; boxes at both S.
RECIPE = """
width = 0.05
crop = 32
batch_size = 16
held_out = 0
chance_after = 0
random_layers = "glorot"
[stands_for]
36 = "256"
44 = "384"
36-64 = "256-512"
[[stages]]
net = "A"
train_scale = [36, 36]
learning_rate = 1e-2
iterations = 2
nets = ["A", "D", "E"]
[[stages]]
net = "NET"
train_scale = [36, 36]
learning_rate = 1e-2
iterations = 2
nets = ["A", "D", "E"]
[[stages]]
net = "NET"
train_scale = [44, 44]
learning_rate = 1e-3
iterations = 2
nets = ["D", "E"]
[[stages]]
net = "NET"
train_scale = [36, 64]
learning_rate = 1e-3
iterations = 2
nets = ["D", "E"]
[[stages]]
net = "NET"
task = "localisation"
train_scale = [36, 36]
learning_rate = 1e-3
iterations = 2
[[stages]]
net = "NET"
task = "localisation"
train_scale = [44, 44]
learning_rate = 1e-3
iterations = 2
nets = ["D"]
[[stages]]
net = "NET"
task = "control"
train_scale = [36, 36]
learning_rate = 1e-2
iterations = 4
nets = ["D"]
"""


class Folder:
    """What is reproduced, and where."""

    def __init__(self, root: Path, images: Path) -> None:
        self.root, self.out = root, root / "runs"
        self.page = self.out / "results.md"
        (root / "own.toml").write_text(RECIPE)
        self.words: list[object] = [
            *("--data", images, "--out", self.out, "--recipe", root / "own.toml"),
            *("--annotations", write_boxes(root / "boxes.csv", images)),
            *("--device", "cpu", "--precision", "float32", "--workers", "0"),
        ]

    def weights(self) -> dict[str, str]:
        """Stage -> fingerprint."""
        return {
            path.parent.relative_to(self.out).as_posix(): load(str(path)).fingerprint
            for path in self.out.rglob("*/*/weights.safetensors")
            if (path.parent / "last.safetensors").exists()
        }

    def cells(self) -> list[Cell]:
        return [c for path in self.out.glob("ledger-own*.json") for c in read_cells(path)]

    def tables(self) -> set[Key]:
        return {cell.key for cell in self.cells()}


def reproducing(run: Command) -> Command:
    return functools.partial(
        run, functools.partial(terminal.run, app, "python -m pretrain.reproduce")
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes, so that there is a top-5 error; eight training images each, two to report."""
    root = tmp_path_factory.mktemp("six")
    for c in range(6):
        for part, n in (("train", 8), ("val", 2)):
            (root / part / f"n{c}").mkdir(parents=True)
            for i in range(n):
                pixels = photograph(100 * c + 10 * i + (part == "val"), 48, 40 + 3 * i)
                pixels[..., c % 3] //= 1 + c // 3
                Image.fromarray(pixels).save(root / part / f"n{c}" / f"{part}{c}{i}.png")
    return root


@pytest.fixture(scope="module")
def caltech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("caltech")
    for c, name in enumerate(("BACKGROUND_Google", "ant", "crab")):
        (root / "101_ObjectCategories" / name).mkdir(parents=True)
        for i in range(33):
            pixels = photograph(1000 * c + i, 40, 36)
            pixels[..., c] //= 3
            path = root / "101_ObjectCategories" / name / f"image_{i:04d}.jpg"
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def made(
    images: Path, caltech: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Folder, Ran]:
    folder = Folder(tmp_path_factory.mktemp("made"), images)
    done = reproducing(ran)(*folder.words, "--caltech", caltech)
    assert done.status == 0, done.err
    return folder, done


def test_each_stage_is_trained_once_and_from_where_it_should(made: tuple[Folder, Ran]) -> None:
    folder, told = made
    assert folder.weights().keys() == {
        f"seed0/{name}"
        for name in (
            *("A/A-36", "D/D-36", "D/D-44", "D/D-36-64", "E/E-36", "E/E-44", "E/E-36-64"),
            *("D-fc/D-36-64-fc", "D-control/D-36-control"),
            *("D-scr-fc/D-44-scr-fc", "D-pcr-fc/D-44-pcr-fc", "D-pcr/D-44-pcr", "D-pcr/D-36-pcr"),
        )
    }
    assert len(list(folder.out.rglob("colours.json"))) == 1
    a = folder.out / "seed0" / "A" / "A-36" / "weights.safetensors"
    assert told.err.count(f"from {a} (net A)") == 2  # D and E
    for name in ("A-LRN 256", "B 256", "C 256-512"):
        assert f"left out: {name}, which recipe {folder.root / 'own.toml'} doesn't" in told.err


def test_every_table_has_its_rows(made: tuple[Folder, Ran]) -> None:
    folder, _ = made
    there = folder.tables()
    assert {key for key in there if key[0] in (3, 4)} >= {
        *((3, f"D {S}", "dense") for S in ("256", "384", "256-512")),
        *((4, f"E {S}", "dense") for S in ("256", "384", "256-512")),
        *((3, "A 256", "dense"), (3, "D 256 (control)", "dense")),
    }
    assert {key for key in there if key[0] in (5, 6)} == {
        *((5, f"{net} 256-512", mode) for net in "DE" for mode in ("dense", "crops", "both")),
        (5, "D 256 (control)", "crops"),
        *((6, "D 256-512 + E 256-512", mode) for mode in ("dense", "crops", "both")),
    }
    assert {key for key in there if key[0] in (8, 9)} == {
        *((8, f"D 384, {kind}", "centre") for kind in ("SCR, FC1-2", "PCR, FC1-2")),
        (8, "D 384, PCR, all layers", "centre"),
        *((9, f"D {at}", "dense") for at in ("256 at 256", "384 at 384", "384 at 352,384")),
        (9, "D 256 at 256 + D 384 at 352,384", "dense"),
    }
    cells = json.loads((folder.out / "ledger-transfer.json").read_text())["cells"]
    assert [[net["name"] for net in cell["nets"]] for cell in cells] == [["D"], ["E"], ["D", "E"]]
    assert all(net["scales"] == [36, 50, 64] for cell in cells for net in cell["nets"])
    text = folder.page.read_text()
    assert "**Table 9**" in text and "Caltech-101" in text


def test_what_exists_is_used(
    made: tuple[Folder, Ran], caltech: Path, run_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = made

    def again(*_: object, **__: object) -> None:
        pytest.fail("it was done before")

    monkeypatch.setattr(Trainer, "step", again)
    monkeypatch.setattr(reproduction, "measure_net", again)
    monkeypatch.setattr(reproduction, "extract", again)
    monkeypatch.setattr(localise.Asked, "localise", again)
    monkeypatch.setattr(protocols, "run", again)
    before = folder.weights(), folder.tables()
    done = reproducing(run_main)(*folder.words, "--caltech", caltech)
    assert done.status == 0, done.err
    assert (folder.weights(), folder.tables()) == before
    assert done.err.count("done before") == 13


def test_a_dry_run_is_the_graph_and_writes_nothing(
    made: tuple[Folder, Ran], images: Path, run_main: Command, tmp_path: Path
) -> None:
    fresh = Folder(tmp_path, images)
    done = reproducing(run_main)(*fresh.words, "--only", "table 5, table 8", "--dry-run")
    assert done.status == 0, done.err
    assert not fresh.out.exists()
    lines = done.out.splitlines()
    assert sum("seed0/" in line for line in lines) == 10 and "where no stage ends early" in done.out
    assert "posteriors of Tables 3 to 7: " in done.out and "boxes of Tables 8 to 10: " in done.out
    nine = reproducing(run_main)(*fresh.words, "--only", "table 9", "--dry-run")
    assert "posteriors of Table 9: " in nine.out
    assert any("D-pcr/D-44-pcr" in line and "D/D-44" in line for line in lines)
    folder, _ = made
    done = reproducing(run_main)(*folder.words, "--only", "table 5", "--dry-run")
    assert sum("done" in line for line in done.out.splitlines()) == 7


def test_weights_that_are_damaged_and_images_that_are_fewer(
    made: tuple[Folder, Ran], images: Path, run_main: Command, tmp_path: Path
) -> None:
    """Told before anything is trained, and with what to do."""
    folder, _ = made
    own = Path(shutil.copytree(images, tmp_path / "images"))
    again = Folder(tmp_path, own)
    shutil.copytree(folder.out, again.out)
    dry = [*again.words, "--only", "table 5", "--dry-run"]
    last = again.out / "seed0/D/D-44/weights.safetensors"
    was = load(str(last)).fingerprint
    last.write_bytes(last.read_bytes()[:3000])
    states = [line for line in reproducing(run_main)(*dry).out.splitlines() if "D/D-44" in line]
    assert "damaged" in states[0]
    done = reproducing(run_main)(*again.words, "--only", "table 5")
    assert (
        done.status == 1 and "remove it, and the same command makes it again" in done.err_lines[-1]
    )
    last.unlink()
    assert reproducing(run_main)(*again.words, "--only", "table 5").status == 0
    assert load(str(last)).fingerprint == was
    one = next((own / "train" / "n0").iterdir())
    shutil.copy(one, one.with_name("another.png"))
    assert "of other images" in reproducing(run_main)(*dry).out
    one.with_name("another.png").unlink()
    assert "of other images" not in reproducing(run_main)(*dry).out
    one.unlink()
    assert "of other images" in reproducing(run_main)(*dry).out
    done = reproducing(run_main)(*again.words, "--only", "table 5")
    assert done.status == 1 and "training images" in done.err_lines[-1]
    assert done.err_lines[-1].endswith("bring the same images back or give another --out")


def test_an_out_that_cant_be_is_refused_before_the_work(
    images: Path, run_main: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        folder = Folder(tmp_path, images)
        words = [tmp_path / name if word == folder.out else word for word in folder.words]
        done = reproducing(run_main)(*words, "--dry-run")
        assert done.status == 1
        assert f"--out {tmp_path / name}: {tmp_path / 'file'} is no folder" in done.err


def test_pictures_that_are_others_are_measured_again(
    images: Path, run_main: Command, tmp_path: Path
) -> None:
    """Under the same names; and a page that is gone, or was cut off, is made of its cells."""
    own = Path(shutil.copytree(images, tmp_path / "images"))
    folder = Folder(tmp_path, own)
    words = [*folder.words, "--only", "table 5, table 8"]
    assert reproducing(run_main)(*words).status == 0
    before, text = folder.cells(), folder.page.read_text()
    folder.page.unlink()
    assert reproducing(run_main)(*words).status == 0
    assert folder.page.read_text() == text
    files = sorted((own / "val").rglob("*.png"))
    pictures = [path.read_bytes() for path in files]
    for path, picture in zip(files, [*pictures[1:], pictures[0]], strict=True):
        path.write_bytes(picture)
    done = reproducing(run_main)(*words)
    assert done.status == 0, done.err
    new = [cell for cell in folder.cells() if cell not in before]
    assert {cell.key for cell in new} == {cell.key for cell in before}
    assert not {cell.image_set for cell in new} & {cell.image_set for cell in before}


def test_images_that_cant_be_read_are_told_and_measured_once(
    images: Path, caltech: Path, run_main: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(images, tmp_path / "images"))
    (own / "val" / "n0" / "val00.png").write_bytes(b"no picture")
    there = Path(shutil.copytree(caltech, tmp_path / "caltech"))
    (there / "101_ObjectCategories" / "ant" / "image_0003.jpg").write_bytes(b"nor this")
    folder = Folder(tmp_path, own)
    words = [*folder.words, "--caltech", there, "--only", "table 5, table 9, table 11"]
    first = reproducing(run_main)(*words)
    monkeypatch.setattr(localise.Asked, "localise", lambda *_: pytest.fail("done before"))
    for done in (first, reproducing(run_main)(*words)):
        assert done.status == 3, done.err
        assert "unreadable: val/n0/val00.png: " in done.err
        assert "unreadable: caltech101: ant/image_0003.jpg: " in done.err
    assert {cell.unreadable for cell in folder.cells()} == {1}
    assert (
        "\n1 of the images can't be read, and are errors in every row.\n" in folder.page.read_text()
    )
    # other pictures of the same names are described
    cells = json.loads((folder.out / "ledger-transfer.json").read_text())["cells"]
    (there / "101_ObjectCategories" / "ant" / "image_0003.jpg").write_bytes(
        (there / "101_ObjectCategories" / "ant" / "image_0004.jpg").read_bytes()
    )
    assert reproducing(run_main)(*words).status == 3
    after = json.loads((folder.out / "ledger-transfer.json").read_text())["cells"]
    assert {cell["rows"] for cell in after} - {cell["rows"] for cell in cells}


def test_data_sets_are_looked_for_before_anything_is_trained(
    images: Path, caltech: Path, run_main: Command, tmp_path: Path
) -> None:
    folder = Folder(tmp_path, images)
    nowhere = tmp_path / "nowhere"
    for only in ((), ("--only", "table 11"), ("--only", "table 3, table 11")):
        done = reproducing(run_main)(*folder.words, "--caltech", nowhere, *only)
        assert done.status == 1
        assert f"caltech101: there is no folder --caltech {nowhere}" in done.err
    some = Path(shutil.copytree(caltech, tmp_path / "some"))
    done = reproducing(run_main)(*folder.words, "--caltech", some, "--dry-run")
    assert done.status == 0, done.err
    assert f"left out: caltech256: there is nothing of it under --caltech {some}" in done.err
    assert "descriptors of caltech101: " in done.out
    # what is there and wrong is no data set that isn't there
    (some / "101_ObjectCategories" / "empty").mkdir()
    done = reproducing(run_main)(*folder.words, "--caltech", some, "--only", "table 11")
    assert done.status == 1 and "empty" in done.err and "left out" not in done.err
    done = reproducing(run_main)(*folder.words, "--ledger", nowhere / "x.md")
    assert done.status == 1 and f"no folder {nowhere}" in done.err
    assert not folder.out.exists()
    folder.out.mkdir()
    (folder.out / "ledger-transfer.json").write_text("{")
    done = reproducing(run_main)(*folder.words, "--dry-run")
    assert done.status == 1 and "ledger-transfer.json is not JSON" in done.err


def test_actions_stand_in_table_12(
    made: tuple[Folder, Ran], images: Path, run_main: Command, tmp_path: Path
) -> None:
    """On a devkit as the real one is laid out; with the nets that are there."""
    folder = Folder(tmp_path, images)
    shutil.copytree(made[0].out / "seed0", folder.out / "seed0")
    kit = tmp_path / "voc" / "VOCdevkit" / "VOC2012"
    lists: dict[str, Persons] = {"train": {}, "val": {}}
    for n in range(44):
        person = (f"2010_{n:06d}", 1)
        lists["val" if n % 2 else "train"][person] = (ACTIONS[n // 2 % 11],)
        for name, picture in (("JPEGImages", None), ("Annotations", "xml")):
            (kit / name).mkdir(parents=True, exist_ok=True)
            if picture is None:
                Image.fromarray(photograph(n, 48, 64)).save(kit / name / f"{person[0]}.jpg")
            else:
                text = annotation((8, 4, 40, 44), size=(64, 48), name="person")
                (kit / name / f"{person[0]}.xml").write_text(text)
    make_action(kit, lists, ("train", "val"))
    words = [*folder.words, "--voc", tmp_path / "voc", "--only", "table 12"]
    done = reproducing(run_main)(*words)
    assert done.status == 0, done.err
    cells = json.loads((folder.out / "ledger-transfer.json").read_text())["cells"]
    told = [(cell["dataset"], cell["regions"], [n["name"] for n in cell["nets"]]) for cell in cells]
    assert told == [("voc2012action", each, ["D", "E"]) for each in ("image", "image,box")]
    assert "Table 12, stand-in: voc2012action, 22 persons of 10 classes" in done.out


def test_tables_without_their_data_are_left_out_with_a_word(
    images: Path, run_main: Command, tmp_path: Path
) -> None:
    folder = Folder(tmp_path, images)
    words = [word for word in folder.words if "boxes" not in str(word) and word != "--annotations"]
    done = reproducing(run_main)(*words, "--dry-run")
    assert done.status == 0, done.err
    assert done.err.count("needs --annotations") == 3
    assert "left out: table 11 needs --voc or --caltech" in done.err
    assert "pcr" not in done.out
    (tmp_path / "flat").mkdir()
    done = reproducing(run_main)("--data", tmp_path / "flat", *words[2:])
    assert done.status == 1 and not folder.out.exists()


KILLED = """
import os, signal
from pretrain import reproduce, reproduction, trainer
from vggfeat import terminal
steps, real = 0, trainer.Trainer.step
def step(self, batch, images):
    global steps
    steps += 1
    if steps == 8:
        os.kill(os.getpid(), signal.{signal})
    return real(self, batch, images)
trainer.Trainer.step = step
terminal.run(reproduce.app, "python -m pretrain.reproduce")
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_killed_it_goes_on_to_the_same_nets_and_figures(
    name: str, made: tuple[Folder, Ran], images: Path, run_main: Command, tmp_path: Path
) -> None:
    first, _ = made
    folder = Folder(tmp_path, images)
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("{signal}", name))
    words = [*map(str, folder.words), "--only", "table 5"]
    ended = prepared.run([str(script), *words], environment(), 1, timeout=HANG).returncode
    assert ended == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 128 + signal.SIGTERM}[name]
    assert 0 < len(folder.weights()) < 7 and not folder.page.exists()
    done = reproducing(run_main)(*words)
    assert done.status == 0, done.err
    theirs = first.weights()
    ours = folder.weights()
    assert len(ours) == 7 and ours == {name: theirs[name] for name in ours}
    figures = [
        {
            cell.key: (cell.top1, cell.wrong)
            for path in where.glob("ledger-own*.json")
            for cell in read_cells(path)
            if cell.table == 5 and "control" not in cell.row  # which Table 3 asks for
        }
        for where in (folder.out, first.out)
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 6


def test_two_processes_make_the_same_tables_killed_and_gone_on_with(
    made: tuple[Folder, Ran], images: Path, tmp_path: Path
) -> None:
    folder = Folder(tmp_path, images)
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("{signal}", "SIGKILL"))
    more = [*map(str, folder.words), "--only", "table 5, table 9"]
    assert prepared.run([str(script), *more], environment(), 2, timeout=HANG).returncode
    assert 0 < len(folder.weights()) < 9 and not folder.page.exists()
    words = ["-m", "pretrain.reproduce", *more]
    done = prepared.run(words, environment(), 2, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    first, _ = made
    wanted = {key for key in first.tables() if key[0] in (5, 9) and "control" not in key[1]}
    assert folder.tables() == wanted


@pytest.mark.parametrize(
    ("train_scale", "dataset", "scales"),
    [
        ((256, 512), "caltech101", (256, 384, 512)),
        ((256, 512), "voc2007", (256, 384, 512, 640, 768)),
        ((112, 160), "voc2012action", (112, 136, 160, 184, 208)),
        ((256, 256), "voc2007", (256,)),
    ],
)
def test_scales_are_those_of_appendix_b(
    train_scale: tuple[int, int], dataset: str, scales: tuple[int, ...]
) -> None:
    assert reproduction.scales_at(train_scale, dataset) == scales
