"""Small training sets and short recipes: the same code as a real run, a few seconds of it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.claims import claims_markdown
from pretrain.evaluate import app as evaluate_app
from pretrain.init import weight_layers
from pretrain.ledger import read_cells
from pretrain.localise import app as localise_app
from pretrain.recipe import Past, Recipe, chain, read_recipe
from pretrain.tables import Cell, Learned, pack
from pretrain.train import app as train_app
from tests import prepared
from tests.conftest import HANG, Command, Nets, photograph, torchrun
from vggfeat import terminal
from vggfeat.images import Preprocessing
from vggfeat.sources import load
from vggfeat.vgg import VGG
from vggfeat.weights import outputs, save_weights

# A net of a tenth of the width on crops of 32 pixels, every augmentation on.
SHORT = [
    *("--recipe", "mini", "--device", "cpu", "--workers", "1", "--log-every", "1"),
    *(
        f"--set={override}"
        for override in ("width=0.1", "crop=32", "batch_size=32", "held_out=0.05", "chance_after=0")
    ),
    *(
        "--set=A-112.train_scale=[36,36]",
        "--set=NET-112.train_scale=[36,36]",
        "--set=NET-112-160.train_scale=[36,64]",
        "--set=NET-112-boxes.train_scale=[36,36]",
    ),
]


@pytest.fixture(scope="session")
def photos(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photographs, links: 24 training images of each of ten classes and 5 for validation."""
    root = tmp_path_factory.mktemp("photos")
    for split, n in (("train", 24), ("val", 5)):
        for folder in sorted((data / "imagenette144" / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:n]:
                (root / split / folder.name / image.name).symlink_to(image)
    return root


@pytest.fixture(scope="session")
def made_drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    for c, name in enumerate(("blue", "red")):
        for split, n in (("train", 40), ("val", 4)):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = photograph(1000 * c + i + 500 * (split == "val"), 48, 40 + i)
                image[..., 0 if c == 0 else 2] //= 4
                Image.fromarray(image).save(root / split / name / f"{i:02d}.jpg", quality=95)
    return root


@pytest.fixture
def drawings(made_drawings: Path, tmp_path: Path) -> Path:
    """Generated, 40 training images of each of two classes: for what needs no photographs."""
    return Path(shutil.copytree(made_drawings, tmp_path / "drawings"))


def words_of(arguments: Sequence[object], script: Path | None = None) -> list[str]:
    """What stands behind `python`: pretrain.train, or a script in its place, and its arguments."""
    what = ["-m", "pretrain.train"] if script is None else [str(script)]
    return [*what, *map(str, arguments)]


def command(
    arguments: Sequence[object], processes: int = 1, script: Path | None = None
) -> list[str]:
    """The command line, under torchrun for several processes."""
    python = torchrun(processes) if processes > 1 else [sys.executable]
    return [*python, *words_of(arguments, script)]


def environment() -> dict[str, str]:
    """Of a process that is started in any folder."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def processes_of(mark: str) -> list[int]:
    """Those whose environment has the mark, NAME=VALUE."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="session")
def train() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run pretrain.train in processes of its own, which are forked (`tests.prepared`)."""

    def run(
        *arguments: object, processes: int = 1, script: Path | None = None, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        done = prepared.run(words_of(arguments, script), environment(), processes, timeout=HANG)
        assert done.returncode == status, done.stderr[-3000:]
        return done

    return run


CLASSES = [f"n{i:02d}" for i in range(7)]
FAST = ["--device", "cpu", "--precision", "float32"]


@pytest.fixture(scope="session")
def made_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "images"
    for c, name in enumerate(CLASSES):
        (root / "val" / name).mkdir(parents=True)
        for i in range(6):
            pixels = photograph(10 * c + i, 40 + 5 * (i % 3), 60)
            pixels[..., c % 3] //= 1 + c // 3
            Image.fromarray(pixels).save(root / "val" / name / f"{i}.png")
    (root / "test").mkdir()
    for i in range(4):
        Image.fromarray(photograph(500 + i, 44, 50)).save(
            root / "test" / f"ILSVRC2012_test_{i:08d}.png"
        )
    return root


@pytest.fixture
def images(made_images: Path, tmp_path: Path) -> Path:
    """Six validation images of each class, of several shapes; four test images without labels."""
    return Path(shutil.copytree(made_images, tmp_path / "images"))


SMALL = """
width = 0.05
crop = 32
batch_size = 8
[stands_for]
36 = "256"
36-64 = "256-512"
[[stages]]
net = "A"
train_scale = [36, 36]
learning_rate = 1e-2
epochs = 20
[[stages]]
net = "NET"
train_scale = [36, 36]
learning_rate = 1e-2
epochs = 20
[[stages]]
net = "NET"
train_scale = [36, 64]
learning_rate = 1e-2
epochs = 16
nets = ["C", "D", "E"]
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe of one's own."""
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path / "small.toml"


def save_trained(path: Path, module: VGG, plain: Preprocessing, recipe: Recipe, stage: str) -> None:
    """A net as a run leaves it: RUN/STAGE/weights.safetensors beside a checkpoint."""
    names = [each.name for each in recipe.stages]
    past = [Past(s.name, recipe.name, recipe.seed, s.epochs, 42, "ab12") for s in recipe.stages]
    low, high = recipe.stages[names.index(stage)].train_scale
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(
        path,
        module,
        plain,
        classes=CLASSES,
        train_scale=str(low) if low == high else f"{low}-{high}",
        source=f"pretrain {recipe.name} {stage}",
        recipe=recipe.to_json(),
        history=json.dumps(list(map(asdict, past[: names.index(stage) + 1]))),
    )
    (path.parent / "last.safetensors").write_bytes(b"")


NETS = (
    *(("A", "36"), ("A-LRN", "36"), ("B", "36"), ("B-5x5", "36")),
    *(("D", "36"), ("D", "36-64"), ("E", "36-64")),
)


@pytest.fixture(scope="session")
def made_runs(tmp_path_factory: pytest.TempPathFactory, he: Nets, plain: Preprocessing) -> Path:
    root = tmp_path_factory.mktemp("made")
    (root / "small.toml").write_text(SMALL)
    for net, S in NETS:
        module = he(net, num_classes=len(CLASSES), width=0.05, crop=32)
        with torch.no_grad():
            module.get_parameter("classifier.6.weight").mul_(0.1)
        path = root / "runs" / net / f"{net}-{S}" / "weights.safetensors"
        recipe = chain(read_recipe(str(root / "small.toml")), net)
        save_trained(path, module, plain, recipe, f"{net}-{S}")
    return root / "runs"


@pytest.fixture
def weights(made_runs: Path, tmp_path: Path) -> dict[str, Path]:
    """Nets as runs leave them in `runs`."""
    runs = Path(shutil.copytree(made_runs, tmp_path / "runs"))
    return {f"{net}-{S}": runs / net / f"{net}-{S}" / "weights.safetensors" for net, S in NETS}


def save_boxes(
    path: Path, module: VGG, plain: Preprocessing, boxes: str, unit: float = 0.5, S: str = "36"
) -> Path:
    """A localisation net of the seven classes."""
    save_weights(path, module, plain, classes=CLASSES, train_scale=S, boxes=boxes, box_unit=unit)
    return path


@pytest.fixture(scope="session")
def made_localisers(
    tmp_path_factory: pytest.TempPathFactory, he: Nets, plain: Preprocessing
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    paths = {}
    for kind in ("scr", "pcr"):
        module = he("A", num_classes=outputs(kind, len(CLASSES)), width=0.05, crop=32)
        with torch.no_grad():
            module.get_parameter("classifier.6.weight").mul_(0.01)
            bias = module.get_parameter("classifier.6.bias").view(-1, 4)
            bias.mul_(0.5).add_(torch.tensor([0, 0, 1.5, 1.5]))
        paths[kind] = save_boxes(folder / f"{kind}.safetensors", module, plain, kind)
    return paths


@pytest.fixture
def localisers(made_localisers: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Localisation nets of random layers, whose boxes are some three quarters of the crop."""
    return {
        kind: Path(shutil.copy(path, tmp_path / path.name))
        for kind, path in made_localisers.items()
    }


@pytest.fixture
def boxes_csv(tmp_path: Path) -> Path:
    """A true box in the middle of each validation image but the last one of each class, which has
    none; the first of each has two.
    """
    lines = ["path,class,x1,y1,x2,y2"]
    for name in CLASSES:
        lines += [f"val/{name}/{i}.png,{name},15,8,45,{36 + i % 3}" for i in range(5)]
        lines += [f"val/{name}/0.png,{name},0,0,10,10"]
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "boxes.csv"


def cells_in(folder: Path) -> list[Cell]:
    """Of the one ledger of cells that is there."""
    (path,) = folder.glob("ledger-*.json")
    return read_cells(path)


Train = Callable[..., subprocess.CompletedProcess[str]]
A_STAGE, D_STAGE, JITTER = "A-36", "D-36", "D-36-64"
FEW = [
    *SHORT,
    "--workers",
    "0",
    "--set=batch_size=16",
    "--set=*.iterations=6",
    "--precision",
    "float32",
]


def write_boxes(path: Path, root: Path, but: Collection[str] = ()) -> Path:
    """A CSV file with a box for every image under root/train and root/val, in a place of its own;
    but: names without one.
    """
    lines = ["path,class,x1,y1,x2,y2"]
    for i, image in enumerate(sorted(root.glob("*/*/*.*"))):
        name = image.relative_to(root).as_posix()
        if name not in but and "test" not in name.split("/"):
            left, top = 2 + i % 7, 3 + i % 5
            lines.append(f"{name},{image.parent.name},{left},{top},{left + 24},{top + 20}")
    path.write_text("\n".join(lines) + "\n")
    return path


def one_line(text: str) -> str:
    """The last line of stderr, which is the command's own."""
    line = text.strip().splitlines()[-1]
    assert line.startswith("pretrain.train: "), text
    assert "Traceback" not in text
    return line


def layers(path: Path) -> dict[str, torch.Tensor]:
    module = load(str(path)).module
    assert isinstance(module, VGG)
    return {name: layer.weight.detach() for name, layer in weight_layers(module).items()}


def losses(out: Path) -> list[float]:
    events = [json.loads(line) for line in (out / A_STAGE / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "train"]


def training(run_main: Command) -> Command:
    """`training(run_main)("--net", "A", …)`: pretrain.train in this process."""
    return functools.partial(
        run_main, functools.partial(terminal.run, train_app, "python -m pretrain.train")
    )


def evaluating(run_main: Command) -> Command:
    """As `training`, pretrain.evaluate."""
    return functools.partial(
        run_main, functools.partial(terminal.run, evaluate_app, "python -m pretrain.evaluate")
    )


def localising(run_main: Command) -> Command:
    """As `training`, pretrain.localise."""
    return functools.partial(
        run_main, functools.partial(terminal.run, localise_app, "python -m pretrain.localise")
    )


IMAGES = 400


def cell(
    row: str,
    errors: float,
    seed: int = 0,
    key: int = 0,
    table: int = 3,
    epochs: float | None = 20.0,
    **others: Any,
) -> Cell:
    """A cell with this many per cent of wrong images, drawn by key; of one net, known by row and
    seed.
    """
    wrong = np.zeros(IMAGES, bool)
    wrong[
        np.random.default_rng([key, seed]).permutation(IMAGES)[: round(errors / 100 * IMAGES)]
    ] = True
    top1 = 100 * float(wrong.mean())
    made = Cell(
        table,
        row,
        "dense",
        "36",
        "36",
        top1,
        top1 / 4,
        "images",
        "val",
        IMAGES,
        7,
        "ab12",
        "mini",
        [],
        seed,
        [Learned(f"{row} {seed}", epochs, "cd34", "float32")],
        "cmd",
        "2026-01-01",
        pack(wrong),
    )
    return replace(made, **others)


def verdicts(*cells: Cell) -> dict[str, str]:
    """The pair -> its verdict."""
    lines = [
        line.split("|")
        for line in claims_markdown(cells).splitlines()
        if " against " in line and line[0] == "|"
    ]
    return {line[2].strip(): line[5].strip() for line in lines}
