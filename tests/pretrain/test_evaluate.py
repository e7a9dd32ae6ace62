"""The evaluating command: figures, kept posteriors, submissions, tables, two processes; and what it
refuses.
"""

from __future__ import annotations

import functools
import json
import shutil
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from scipy.io import savemat

import vggfeat
from pretrain.evaluate import app
from pretrain.figures import told_apart
from pretrain.kept import KeptPosteriors
from pretrain.posteriors import how_trained
from pretrain.recipe import Past, Recipe, chain, read_recipe
from pretrain.runs import Trained, roles
from pretrain.tables import RELEASED, Cell, Member, read_cells
from tests import prepared
from tests.conftest import HANG, Command, Nets, photograph, vgg_of
from tests.pretrain.conftest import environment
from vggfeat.errors import VggfeatError
from vggfeat.images import Preprocessing
from vggfeat.sources import OXFORD
from vggfeat.terminal import run
from vggfeat.vgg import VGG
from vggfeat.weights import save_weights

CLASSES = [f"n{i:02d}" for i in range(7)]
FAST = ["--device", "cpu", "--precision", "float32"]


@pytest.fixture
def command(run_main: Command) -> Command:
    return functools.partial(run_main, functools.partial(run, app, "python -m pretrain.evaluate"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six validation images of each class, of several shapes; four test images without labels."""
    root = tmp_path / "images"
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, he: Nets, plain: Preprocessing) -> Path:
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
def weights(made: Path, tmp_path: Path) -> dict[str, Path]:
    """Nets as runs leave them in `runs`."""
    runs = Path(shutil.copytree(made, tmp_path / "runs"))
    return {f"{net}-{S}": runs / net / f"{net}-{S}" / "weights.safetensors" for net, S in NETS}


def cells_in(folder: Path) -> list[Cell]:
    """Of the one ledger of cells that is there."""
    (path,) = folder.glob("ledger-*.json")
    return read_cells(path)


def test_figures_kept_and_fused(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    d, e = weights["D-36-64"], weights["E-36-64"]
    words = ["--data", images, *FAST, "--scales", "36,50,64", "--mode", "both", "--json"]
    ran = command(
        "--weights",
        d,
        "--weights",
        e,
        *words,
        tmp_path / "r.json",
        "--posteriors",
        tmp_path / "de.h5",
    )
    assert ran.status == 0, ran.err
    result = json.loads((tmp_path / "r.json").read_text())
    rows = {(len(row["nets"]), row["nets"][0]["net"], row["mode"]): row for row in result["rows"]}
    assert len(rows) == 9  # D, E and both nets fused, each dense, crops and both
    assert rows[2, "D", "both"]["images"] == 42
    fused = rows[2, "D", "both"]
    kept = KeptPosteriors.read(tmp_path / "de.h5")
    posteriors = kept.fused("both")
    truth = np.repeat(np.arange(7), 6)
    assert fused["top1_error"] == pytest.approx(100 * np.mean(posteriors.argmax(1) != truth))
    best = np.argsort(-posteriors, 1)[:, :5]
    assert fused["top5_error"] == pytest.approx(
        100 * np.mean([t not in b for t, b in zip(truth, best, strict=True)])
    )
    recall = fused["per_class"]["n03"]
    assert recall["images"] == 6
    assert recall["top1_error"] == pytest.approx(100 * np.mean(posteriors.argmax(1)[18:24] != 3))
    assert (
        sum(pair["images"] for pair in fused["confusions"]) == (posteriors.argmax(1) != truth).sum()
    )

    # again from what was kept, and from two files, with no net at hand
    for path in weights.values():
        path.unlink()
    again = command(
        "--from", tmp_path / "de.h5", "--mode", "both", "--json", tmp_path / "again.json"
    )
    assert again.status == 0
    assert again.out == ran.out
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == result["rows"]
    subset = command("--from", tmp_path / "de.h5", "--scales", "50")
    assert subset.status == 0
    assert "no Q=51" in command("--from", tmp_path / "de.h5", "--scales", "51").err


def test_two_processes_give_the_same_table(
    images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [
        "--weights",
        weights["D-36-64"],
        "--data",
        images,
        *FAST,
        "--mode",
        "both",
        "--batch-size",
        "3",
    ]
    tables = []
    for processes in (1, 2):
        words = ["-m", "pretrain.evaluate", *arguments]
        words += ["--posteriors", tmp_path / f"{processes}.h5"]
        done = prepared.run(words, environment(), processes, timeout=HANG)
        assert done.returncode == 0, done.stderr[-3000:]
        tables.append(done.stdout)
    assert tables[0] == tables[1]
    one, two = (KeptPosteriors.read(tmp_path / f"{n}.h5") for n in (1, 2))
    for mode in ("dense", "crops"):
        assert np.abs(one.nets[0].modes[mode] - two.nets[0].modes[mode]).max() < 1e-4


def test_unreadable_images_count_as_errors(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--weights", weights["A-36"], "--data", images, *FAST, "--json"]
    assert command(*words, tmp_path / "good.json").status == 0
    (images / "val" / "n02" / "1.png").write_bytes(b"nothing")
    ran = command(*words, tmp_path / "bad.json")
    assert ran.status == 3
    assert "unreadable: val/n02/1.png" in ran.err
    good, bad = (
        json.loads((tmp_path / f"{n}.json").read_text())["rows"][0] for n in ("good", "bad")
    )
    assert bad["images"] == 42
    assert bad["unreadable"] == 1
    gained = bad["per_class"]["n02"]["top5_error"] - good["per_class"]["n02"]["top5_error"]
    assert gained in (0, pytest.approx(100 / 6))
    assert bad["per_class"]["n02"]["top5_error"] >= 100 / 6
    assert bad["per_class"]["n03"] == good["per_class"]["n03"]


def test_classes_are_matched_by_name(
    command: Command,
    images: Path,
    weights: dict[str, Path],
    he: Nets,
    plain: Preprocessing,
    tmp_path: Path,
) -> None:
    ours = vgg_of(vggfeat.load("A", weights=weights["A-36"]))
    wide = he("A", num_classes=9, width=0.05, crop=32)
    order = [8, 1, 3, 0, 2, 5, 7]  # where the wide net has the seven classes
    names = [f"other{i}" for i in range(9)]
    with torch.no_grad():
        fc8 = {
            key: value for key, value in wide.state_dict().items() if key.startswith("classifier.6")
        }
        wide.load_state_dict({**ours.state_dict(), **fc8})
        for key, elsewhere in (("classifier.6.weight", 0.0), ("classifier.6.bias", -50.0)):
            wide.get_parameter(key).fill_(elsewhere)[order] = ours.get_parameter(key)
    for i, place in enumerate(order):
        names[place] = CLASSES[i]
    save_weights(tmp_path / "wide.safetensors", wide, plain, classes=names, train_scale="36")
    for path in (weights["A-36"], tmp_path / "wide.safetensors"):
        ran = command(
            "--weights", path, "--data", images, *FAST, "--json", tmp_path / f"{path.stem}.json"
        )
        assert ran.status == 0, ran.err
    narrow, wide_rows = (
        json.loads((tmp_path / f"{n}.json").read_text())["rows"][0] for n in ("weights", "wide")
    )
    assert narrow["per_class"] == wide_rows["per_class"]
    (images / "val" / "n06").rename(images / "val" / "n99")
    ran = command("--weights", weights["A-36"], "--data", images, *FAST)
    assert ran.status == 1
    assert "doesn't know 1 of the data's 7 classes, such as 'n99'" in ran.err


def test_other_words_for_the_splits(
    command: Command, images: Path, weights: dict[str, Path]
) -> None:
    (images / "val").rename(images / "Validation")
    (images / "test").rename(images / "Testing")
    (images / "Validation" / CLASSES[0] / "a.heic").touch()
    words = ["--weights", weights["A-36"], "--data", images, "--scales", "36", *FAST]
    ran = command(*words, "--limit", "4")
    assert ran.status == 0, ran.err
    assert "imagenet val: 4 images" in ran.out
    assert ran.err_lines[0].startswith("left out: 1 file without an image's ending (.heic 1)")
    ran = command(*words, "--split", "test")
    assert ran.status == 0, ran.err
    assert "folder test: 4 images" in ran.out


def test_submission(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    numbers = {name: 100 - i for i, name in enumerate(CLASSES)}
    synsets = [(number, name, 0) for name, number in numbers.items()] + [(1001, "n99", 3)]
    record = np.array(
        synsets, dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")]
    )
    (tmp_path / "devkit" / "data").mkdir(parents=True)
    savemat(tmp_path / "devkit" / "data" / "meta.mat", {"synsets": record})
    (images / "test" / "ILSVRC2012_test_00000002.png").write_bytes(b"nothing")
    words = [
        "--weights",
        weights["D-36"],
        "--data",
        images,
        "--split",
        "test",
        *FAST,
        "--submission",
        tmp_path / "s.txt",
    ]
    ran = command(*words, "--devkit", tmp_path / "devkit", "--posteriors", tmp_path / "p.h5")
    assert ran.status == 3
    lines = [list(map(int, line.split())) for line in (tmp_path / "s.txt").read_text().splitlines()]
    assert len(lines) == 4
    assert lines[2] == [0] * 5
    best = np.argsort(-KeptPosteriors.read(tmp_path / "p.h5").fused("dense"), 1)[:, :5]
    for i in (0, 1, 3):
        assert lines[i] == [numbers[CLASSES[k]] for k in best[i]]
    assert "--devkit" in command(*words, "--overwrite").err
    assert "meta.mat" in command(*words, "--overwrite", "--devkit", tmp_path).err


def test_tables_and_the_ledger(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    ledger = tmp_path / "results.md"
    ledger.write_text("# Results\n\nBefore.\n\n## After\n")
    words = ["--runs", tmp_path / "runs", "--data", images, *FAST, "--ledger", ledger]
    ran = command("--table", "all", *words, "--posteriors", tmp_path / "all.h5")
    assert ran.status == 0, ran.err
    assert "not run" not in ran.err  # the table says it, in one line
    text = ledger.read_text()
    assert text.startswith("# Results\n\nBefore.")
    assert "## After" in text
    # the ledger of the paper's own data is there, and nobody has run it
    ilsvrc, standin = text.split("<!-- end of ledger: Tables 3 to 6, ILSVRC-2012 -->")
    assert "Not run: all 32 rows." in ilsvrc
    (path,) = tmp_path.glob("ledger-small-*-images.json")
    recipe = path.name.removeprefix("ledger-").removesuffix("-images.json")
    assert f"stand-in: recipe {recipe} on images val, 42 images of 7 classes" in standin
    assert "Not run: C 256; C 384; C 256-512; D 384; E 256; E 384." in standin
    cells = read_cells(path)
    by_key = {cell.key: cell for cell in cells}
    assert {"A 256", "A-LRN 256", "B 256", "B-5x5 256", "D 256", "D 256-512", "E 256-512"} == {
        c.row for c in cells if c.table == 3
    }
    assert by_key[4, "D 256", "dense"].Q == "32,36,41"
    assert by_key[3, "D 256-512", "dense"].Q == "50"
    assert by_key[5, "E 256-512", "both"].Q == "36,50,64"
    epochs = {c.row: c.nets[0].epochs for c in cells if c.table == 3}
    assert epochs["A 256"] == epochs["B-5x5 256"] == 20
    assert epochs["B 256"] == epochs["D 256"] == 40 and epochs["D 256-512"] == 56
    assert "| confounded: 56 epochs against 40 |" in standin
    # a cell is what the command gives for the same net and Q
    command(
        "--weights",
        weights["D-36-64"],
        "--data",
        images,
        *FAST,
        "--scales",
        "36,50,64",
        "--mode",
        "both",
        "--json",
        tmp_path / "r.json",
    )
    both = json.loads((tmp_path / "r.json").read_text())["rows"][2]
    cell = by_key[5, "D 256-512", "both"]
    assert (cell.top1, cell.top5, cell.images) == (both["top1_error"], both["top5_error"], 42)
    assert cell.wrong_images().mean() * 100 == pytest.approx(cell.top1)
    assert "B with 5x5 layers is worse than B" in text
    # from kept posteriors, with no net at hand: the same tables and cells
    for path in weights.values():
        path.unlink()
    (tmp_path / "later").mkdir()
    later = tmp_path / "later" / "results.md"
    again = command("--table", "all", "--from", tmp_path / "all.h5", "--ledger", later)
    assert again.status == 0, again.err
    without_command = [
        [replace(c, command="") for c in cells_in(path.parent)] for path in (ledger, later)
    ]
    assert without_command[0] == without_command[1]


def test_tables_again_and_an_unreadable_image(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    ledger = tmp_path / "results.md"
    words = [
        "--runs",
        tmp_path / "runs",
        "--data",
        images,
        *FAST,
        "--ledger",
        ledger,
        "--table",
        "3",
    ]
    assert command(*words).status == 0
    before = {c.key: c for c in cells_in(tmp_path)}
    (images / "val" / "n02" / "1.png").write_bytes(b"nothing")
    ran = command(*words)
    assert ran.status == 3
    assert "unreadable: val/n02/1.png" in ran.err
    after = {c.key: c for c in cells_in(tmp_path)}
    assert set(after) == set(before)
    for key, cell in after.items():
        # the image counts, and counts as wrong; nothing else has changed
        assert cell.images == 42
        changed = cell.wrong_images() != before[key].wrong_images()
        assert cell.wrong_images()[2 * 6 + 1]
        assert not np.delete(changed, 2 * 6 + 1).any()
    # a file that can't be read is not the one that was: a table of its own, and again: the same
    # heading, not twice
    assert command(*words).status == 3
    assert ledger.read_text().count("## Tables 3 to 6, stand-in: recipe small") == 2


def test_the_released_nets_stand_in_the_papers_own_table() -> None:
    """Beside a net of ours by the same recipe, not in its place."""
    source = {
        "source": OXFORD["D"],
        "net": "D",
        "train_scale": "256-512",
        "crop": "224",
        "weights": "oxford:D",
    }
    released = Trained.of({**source, **how_trained(source)})
    ours = replace(released, changes=())
    jittered = Member("D", "256-512")
    assert roles([released, ours]) == {
        ("paper", (), 0): {jittered: 1},
        ("paper", (RELEASED,), 0): {jittered: 0},
    }
    assert released.recipe == "paper" and released.epochs is None


def test_other_images_have_a_table_of_their_own(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """`--limit` and `--split train` filled the whole validation set's cells, and claims were
    decided on both.
    """
    ledger = tmp_path / "results.md"
    words = [
        "--runs",
        tmp_path / "runs",
        "--data",
        images,
        *FAST,
        "--ledger",
        ledger,
        "--table",
        "3",
    ]
    assert command(*words).status == 0
    ran = command(*words, "--limit", "9")
    assert ran.status == 0, ran.err
    cells = cells_in(tmp_path)
    assert sorted({(c.images, len(c.image_set)) for c in cells}) == [(9, 64), (42, 64)]
    assert len(cells) == 2 * len([c for c in cells if c.images == 42])
    text = ledger.read_text()
    assert "val, 9 images of 7 classes" in text and "val, 42 images of 7 classes" in text
    (images / "val").rename(images / "train")
    before = {path: path.read_bytes() for path in (ledger, *tmp_path.glob("ledger-*.json"))}
    assert "--table is of the validation set" in command(*words, "--split", "train").err
    kept = tmp_path / "train.h5"
    a = [
        "--weights",
        weights["A-36"],
        "--data",
        images,
        *FAST,
        "--split",
        "train",
        "--posteriors",
        kept,
    ]
    assert command(*a).status == 0
    ran = command("--table", "3", "--from", kept, "--ledger", ledger)
    assert ran.status == 1 and "of the train images: a table is of the validation set" in ran.err
    assert {path: path.read_bytes() for path in before} == before


def test_a_table_is_written_whole_or_the_next_run_goes_on(
    command: Command,
    images: Path,
    weights: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger, kept = tmp_path / "results.md", tmp_path / "p.h5"
    words = ["--table", "3", "--from", kept, "--ledger", ledger]
    a = ["--weights", weights["A-36"], "--data", images, *FAST, "--posteriors", kept]
    assert command(*a).status == 0
    with monkeypatch.context() as patch:  # what is computed last goes wrong
        patch.setattr("pretrain.tables.claims_markdown", lambda cells: 1 / 0)
        assert command(*words).status == 1
    assert not ledger.exists() and not list(tmp_path.glob("ledger-*.json"))
    with monkeypatch.context() as patch:  # the disk is full for the second file

        def refuse(path: Path, text: str) -> None:
            raise VggfeatError(f"can't write {path}: No space left on device")

        patch.setattr("pretrain.runs.write_text", refuse)
        assert "No space left" in command(*words).err
    assert len(cells_in(tmp_path)) == 1 and not ledger.exists()
    assert command(*words).status == 0
    assert "| A 256 | dense |" in ledger.read_text() and len(cells_in(tmp_path)) == 1


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


def test_what_is_of_other_images_is_not_fused(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """The same names in other classes were fused, and one file's labels taken for both."""
    words = ["--weights", weights["A-36"], *FAST, "--data"]
    assert command(*words, images, "--posteriors", tmp_path / "a.h5").status == 0
    kept = KeptPosteriors.read(tmp_path / "a.h5")
    for change, says in (
        ({"labels": kept.labels[::-1]}, "has the same images in other classes"),
        (
            {"names": kept.names[::-1]},
            "is of other images (42 of imagenet val, not 42 of imagenet val)",
        ),
        ({"split": "train"}, "is of other images (42 of imagenet train, not"),
    ):
        replace(kept, **change).save(tmp_path / "b.h5")
        ran = command("--from", tmp_path / "a.h5", "--from", tmp_path / "b.h5")
        assert ran.status == 1 and says in ran.err
    moved = replace(kept, data="moved")
    moved.nets[0].of["fingerprint"] = "of another net"
    moved.save(tmp_path / "b.h5")
    joined = KeptPosteriors.joined(
        [(name, KeptPosteriors.read(tmp_path / name)) for name in ("a.h5", "b.h5")]
    )
    assert joined.data == "images and moved"


def test_other_pictures_under_the_same_names_are_not_fused(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """Two folders with the same names, classes and split gave one figure, and one table of the
    ledger.
    """
    words = ["--data", images, *FAST, "--scales", "36", "--posteriors"]
    assert command("--weights", weights["A-36"], *words, tmp_path / "a.h5").status == 0
    picture = images / "val" / "n03" / "2.png"
    Image.fromarray(photograph(900, 44, 60)).save(picture)
    assert command("--weights", weights["D-36"], *words, tmp_path / "d.h5").status == 0
    a, d = (KeptPosteriors.read(tmp_path / f"{net}.h5") for net in "ad")
    assert d.crc32[3 * 6 + 2] == zlib.crc32(picture.read_bytes()) and d.image_set != a.image_set
    ran = command("--from", tmp_path / "a.h5", "--from", tmp_path / "d.h5")
    assert (ran.status, ran.out, len(ran.err_lines)) == (1, "", 1)
    assert (
        "d.h5 is of other pictures under the same names (1 of 42, such as val/n03/2.png)" in ran.err
    )
    # an older file doesn't tell: it is fused, and so doesn't the whole
    older = replace(d, crc32=d.crc32[:0])
    older.save(tmp_path / "old.h5")
    older = KeptPosteriors.read(tmp_path / "old.h5")
    ran = command(
        "--from",
        tmp_path / "a.h5",
        "--from",
        tmp_path / "old.h5",
        "--posteriors",
        tmp_path / "j.h5",
    )
    assert ran.status == 0, ran.err
    assert len(older.crc32) == len(KeptPosteriors.read(tmp_path / "j.h5").crc32) == 0
    assert KeptPosteriors.read(tmp_path / "j.h5").image_set == older.image_set != d.image_set
    # nor does it stand between two that tell
    ran = command(
        "--from", tmp_path / "a.h5", "--from", tmp_path / "old.h5", "--from", tmp_path / "d.h5"
    )
    assert ran.status == 1 and "is of other pictures" in ran.err


def test_an_image_that_one_net_could_not_read_is_that_nets_error(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """The other's row was told to count it; and of kept posteriors nothing was listed, with status
    0.
    """
    words = ["--data", images, *FAST, "--scales", "36", "--posteriors"]
    assert command("--weights", weights["A-36"], *words, tmp_path / "a.h5").status == 0
    (images / "val" / "n02" / "1.png").write_bytes(b"nothing")
    assert command("--weights", weights["D-36"], *words, tmp_path / "d.h5").status == 3
    ran = command(
        "--from", tmp_path / "a.h5", "--from", tmp_path / "d.h5", "--json", tmp_path / "r.json"
    )
    assert ran.status == 3
    (told,) = ran.err_lines
    assert told.startswith("unreadable: val/n02/1.png: ")
    rows = [line.split("│")[1:-1] for line in ran.out.splitlines() if "dense" in line]
    assert [(row[0].strip(), row[6].strip()) for row in rows] == [
        ("A", "0"),
        ("D", "1"),
        ("A + D", "1"),
    ]
    assert (
        "imagenet val: 42 images, 1 of them unreadable, an error in each row that counts it"
        in ran.out
    )
    record = json.loads((tmp_path / "r.json").read_text())
    assert [row["unreadable"] for row in record["rows"]] == [0, 1, 1] and len(
        record["unreadable"]
    ) == 1
    alone = command("--from", tmp_path / "a.h5")
    assert alone.status == 0 and "unreadable" not in alone.out + alone.err


def test_a_net_and_a_scale_are_averaged_once(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """Twice the same net was a fusion of two; of --scales 36,36,50 the first weighed twice."""

    def says(*words: object, status: int = 1) -> str:
        ran = command(*words)
        assert (ran.status, ran.out, len(ran.err_lines)) == (status, "", 1)
        return ran.err

    a, d, kept = weights["A-36"], weights["D-36"], tmp_path / "a.h5"
    words = ["--data", images, *FAST]
    assert command("--weights", a, *words, "--scales", "36,50", "--posteriors", kept).status == 0
    copy, again = tmp_path / "copy.safetensors", tmp_path / "again.h5"
    copy.write_bytes(a.read_bytes())
    again.write_bytes(kept.read_bytes())
    out = tmp_path / "no.h5"
    for twice in (["--from", kept, "--from", again], ["--weights", a, "--weights", copy, *words]):
        told = says(*twice, "--posteriors", out)
        assert "net A (" in told and "is there twice" in told and not out.exists()
    assert "'--scales': '36,36,50' has a number twice" in says(
        "--from", kept, "--scales", "36,36,50", status=2
    )
    assert "has a number twice" in says("--weights", a, *words, "--scales", "36,50,36", status=2)
    # what is wrong with the second net is told before the first one is evaluated
    assert "smaller than the crop of 32" in says(
        "--weights", a, "--weights", d, *words, "--scales", "31"
    )


def test_pooling_of_odd_sides_by_option(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    d = ["--weights", weights["D-36"], "--data", images, *FAST, "--scales", "50", "--posteriors"]
    for pool in ("floor", "ceil"):
        assert command(*d, tmp_path / f"{pool}.h5", "--max-pool", pool).status == 0
    assert command(*d, tmp_path / "own.h5").status == 0
    floor, ceil, own = (
        KeptPosteriors.read(tmp_path / f"{n}.h5").nets[0] for n in ("floor", "ceil", "own")
    )
    assert (floor.of, ceil.of) == (own.of, {**own.of, "pool": "ceil"})
    assert np.array_equal(floor.mean("dense"), own.mean("dense"))
    assert not np.allclose(ceil.mean("dense"), own.mean("dense"), atol=1e-6)
    # it isn't the same net: it can be fused, has a name of its own, and in a table a mark
    assert (
        "there twice" in command("--from", tmp_path / "own.h5", "--from", tmp_path / "floor.h5").err
    )
    both = ["--from", tmp_path / "own.h5", "--from", tmp_path / "ceil.h5"]
    assert "D (max-pool floor) + D (max-pool ceil)" in command(*both).out
    trained = [Trained.of(net.of) for net in (own, ceil)]
    assert [net.changes for net in trained] == [(), ("max_pool=ceil",)] and len(roles(trained)) == 2
    assert "--max-pool is for --weights" in command(*both, "--max-pool", "ceil").err


def test_rows_of_nets_of_one_kind_are_told_apart() -> None:
    net = {
        "net": "D",
        "train_scale": "256",
        "pool": "floor",
        "seed": "0",
        "weights": "a",
        "fingerprint": "f1",
    }
    other = {**net, "fingerprint": "f2"}
    assert told_apart([net]) == ["D"]
    assert told_apart([net, {**other, "train_scale": "384"}]) == ["D", "D"]  # beside their S
    assert told_apart([net, {**other, "seed": "1", "weights": "b"}]) == ["D (seed 0)", "D (seed 1)"]
    assert told_apart([net, {**other, "seed": "", "weights": "b"}]) == ["D (a)", "D (b)"]
    assert told_apart([net, other, {**net, "net": "E"}]) == ["D (sha256 f1)", "D (sha256 f2)", "E"]


def test_a_top_5_error_among_five_classes_is_none(
    command: Command,
    images: Path,
    he: Nets,
    plain: Preprocessing,
    tmp_path: Path,
) -> None:
    """It was 0.00, a faultless net's."""
    for name in CLASSES[5:]:
        shutil.rmtree(images / "val" / name)
    path = tmp_path / "five.safetensors"
    five = he("A", num_classes=5, width=0.05, crop=32)
    save_weights(path, five, plain, classes=CLASSES[:5], train_scale="36")
    kept, record = tmp_path / "p.h5", tmp_path / "r.json"
    for words in (
        ["--weights", path, "--data", images, *FAST, "--posteriors", kept],
        ["--from", kept],
    ):
        ran = command(*words, "--json", record, "--overwrite")
        assert ran.status == 0, ran.err
        (row,) = (line.split("│")[1:-1] for line in ran.out.splitlines() if "dense" in line)
        assert float(row[4]) > 0 and row[5].strip() == "-"
        (figures,) = json.loads(record.read_text())["rows"]
        assert figures["top1_error"] > 0 and figures["top5_error"] is None
        assert {each["top5_error"] for each in figures["per_class"].values()} == {None}


def test_older_posteriors_are_read_and_kept_out_of_tables(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--weights", weights["A-36"], "--data", images, *FAST]
    assert command(*words, "--posteriors", tmp_path / "a.h5").status == 0
    kept = KeptPosteriors.read(tmp_path / "a.h5")
    older = (
        "net",
        "train_scale",
        "crop",
        "learn",
        "recipe",
        "seed",
        "weights",
        "fingerprint",
        "precision",
    )
    kept.nets[0].of = {fact: kept.nets[0].of[fact] for fact in older}
    kept.save(tmp_path / "old.h5")
    assert command("--from", tmp_path / "old.h5").status == 0
    ran = command(
        "--from", tmp_path / "old.h5", "--table", "3", "--ledger", tmp_path / "results.md"
    )
    assert ran.status == 1 and len(ran.err_lines) == 1
    assert "where an older version kept its posteriors, evaluate it again" in ran.err


def test_nets_of_several_recipes_and_of_none(
    command: Command,
    images: Path,
    weights: dict[str, Path],
    small: Path,
    plain: Preprocessing,
    tmp_path: Path,
) -> None:
    """A folder with runs of two recipes, the default's `runs` with README's two nets, was refused
    whole.
    """
    recipe = replace(chain(read_recipe(str(small)), "A"), batch_size=4)
    module = vgg_of(vggfeat.load("A", weights=weights["A-36"]))
    save_trained(tmp_path / "runs/half/A-36/weights.safetensors", module, plain, recipe, "A-36")
    other = tmp_path / "other.toml"
    other.write_text(SMALL)
    recipe = chain(read_recipe(str(other)), "A")
    save_trained(tmp_path / "runs/other/A-36/weights.safetensors", module, plain, recipe, "A-36")
    lost = replace(recipe, name="lost", file="")
    save_trained(tmp_path / "runs/lost/A-36/weights.safetensors", module, plain, lost, "A-36")
    ledger = tmp_path / "results.md"
    words = [
        "--runs",
        tmp_path / "runs",
        "--data",
        images,
        *FAST,
        "--ledger",
        ledger,
        "--table",
        "3",
    ]
    ran = command(*words)
    assert ran.status == 0, ran.err
    assert "left out: net A" in ran.err and "lost/A-36" in ran.err
    files = {path.name.split("-")[1]: read_cells(path) for path in tmp_path.glob("ledger-*.json")}
    assert files.keys() == {"small", "other"} and len(files["other"]) == 1
    rows = [(c.row, c.changes) for c in files["small"] if c.row == "A 256"]
    assert rows == [("A 256", []), ("A 256", ["batch_size=4"])]
    text = ledger.read_text()
    assert "| A 256 [1] | dense |" in ran.out and "- [1]: the recipe with batch_size=4" in ran.out
    assert "| A 256 [1] | dense |" in text and "- [1]: the recipe with batch_size=4" in text
    assert text.count("## Tables 3 to 6, stand-in") == 2


def test_rows_whose_posteriors_were_not_kept_are_left_out(
    command: Command, images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """Kept at one Q, a net of Table 3 ended in an error for Table 4, and had no table at all."""
    words = ["--weights", weights["D-36"], "--data", images, *FAST, "--scales", "36"]
    assert command(*words, "--posteriors", tmp_path / "d.h5").status == 0
    ran = command(
        "--from", tmp_path / "d.h5", "--table", "all", "--ledger", tmp_path / "results.md"
    )
    assert ran.status == 0, ran.err
    assert "table 4, D 256, dense: left out, the posteriors of net D" in ran.err
    assert "have no Q=32, only Q = 36" in ran.err
    assert [c.key for c in cells_in(tmp_path)] == [(3, "D 256", "dense")]
    ran = command("--from", tmp_path / "d.h5", "--table", "5", "--ledger", tmp_path / "no.md")
    assert ran.status == 1 and "none of these nets fills a row of table 5" in ran.err
    assert not (tmp_path / "no.md").exists()


def test_what_cannot_be_evaluated(
    command: Command, images: Path, weights: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    def says(*words: object, status: int = 1) -> str:
        ran = command(*words, *([] if "--from" in words else FAST))
        assert ran.status == status, ran.err
        assert len(ran.err_lines) == 1, ran.err
        return ran.err

    a = weights["A-36"]
    assert "smaller than the crop of 32" in says("--weights", a, "--data", images, "--scales", "31")
    assert "give one of --weights, --from and --table" in says("--data", images, status=2)
    assert "no folder" in says("--weights", a, "--data", tmp_path / "nowhere")
    assert "'--scales': '3x'" in says("--weights", a, "--data", images, "--scales", "3x", status=2)
    assert "reach pool5" in says(
        "--weights", data / "vgg16_conv_caffe.safetensors", "--data", images
    )
    backbone = timm.create_model("resnet10t")
    safetensors.torch.save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    named = f"timm:resnet10t@{tmp_path / 'backbone.safetensors'}"
    assert "is no net of Table 1" in says("--weights", named, "--data", images, status=2)
    tensors = safetensors.torch.load_file(a)
    with safetensors.safe_open(a, "pt") as file:
        metadata = file.metadata()
    tensors["classifier.6.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / "nan.safetensors", metadata=metadata)
    assert "of fc8 is not finite" in says(
        "--weights", tmp_path / "nan.safetensors", "--data", images
    )
    (tmp_path / "x.h5").write_bytes(b"no")
    assert "x.h5" in says("--from", tmp_path / "x.h5")
    assert "no --scales" in says("--table", "3", "--scales", "36", "--data", images, status=2)
    command("--weights", a, "--data", images, *FAST, "--posteriors", tmp_path / "a.h5")
    command(
        "--weights",
        a,
        "--data",
        images,
        *FAST,
        "--split",
        "test",
        "--posteriors",
        tmp_path / "t.h5",
    )
    assert "have no labels" in says("--table", "3", "--from", tmp_path / "t.h5")
    network = vggfeat.load("B", weights=weights["B-36"])
    save_weights(
        tmp_path / "b.safetensors",
        vgg_of(network),
        network.preprocessing,
        classes=CLASSES,
        train_scale="36",
    )
    command(
        "--weights",
        tmp_path / "b.safetensors",
        "--data",
        images,
        *FAST,
        "--posteriors",
        tmp_path / "b.h5",
    )
    assert "doesn't tell by which recipe it was trained" in says(
        "--table", "3", "--from", tmp_path / "b.h5"
    )
    (tmp_path / "copy.h5").write_bytes((tmp_path / "a.h5").read_bytes())
    assert "both stand for A at 256" in says(
        "--table", "3", "--from", tmp_path / "a.h5", "--from", tmp_path / "copy.h5"
    )
    assert "no trained nets under" in says(
        "--table", "3", "--runs", tmp_path / "devkit", "--data", images
    )
    # --table updates its ledger in place, and that only
    picture = next((images / "val").rglob("*.png"))
    before = picture.read_bytes()
    for ledger, why, status in (
        (picture, "is not UTF-8 text", 1),
        (tmp_path / "a.h5", "is what the command reads", 2),
        (tmp_path / "no" / "results.md", "there is no folder", 1),
    ):
        words = ["--table", "3", "--from", tmp_path / "a.h5", "--ledger", ledger]
        assert why in says(*words, status=status)
    assert picture.read_bytes() == before
