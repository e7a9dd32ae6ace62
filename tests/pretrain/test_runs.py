"""Which trained net stands for which of the paper's, and the tables and the ledger of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vggfeat
from pretrain.kept import KeptPosteriors
from pretrain.ledger import read_cells, table_markdown
from pretrain.posteriors import how_trained, images_of
from pretrain.recipe import chain, read_recipe
from pretrain.runs import Trained, measure_tables, roles, rows_of, trained_nets
from pretrain.tables import PAPER, RELEASED, Member
from tests.conftest import Command, Ran, ran, vgg_of
from tests.pretrain.conftest import FAST, SMALL, cell, cells_in, evaluating, save_trained
from vggfeat.errors import VggfeatError
from vggfeat.images import Preprocessing
from vggfeat.ranks import joined
from vggfeat.sources import OXFORD


@pytest.fixture
def command(run_main: Command) -> Command:
    return evaluating(run_main)


@dataclass(frozen=True)
class Tables:
    """All tables of seven nets, in a folder that its tests leave as it is; the nets are gone."""

    root: Path
    ran: Ran

    @property
    def ledger(self) -> Path:
        return self.root / "results.md"

    @property
    def posteriors(self) -> Path:
        return self.root / "all.h5"

    @property
    def standin(self) -> str:
        """The ledger's part behind that of the paper's own data."""
        end = "<!-- end of ledger: Tables 3 to 10, ILSVRC-2012 -->"
        return self.ledger.read_text().split(end)[1]


@pytest.fixture(scope="module")
def tables(made_images: Path, made_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    root = tmp_path_factory.mktemp("tables")
    (root / "results.md").write_text("# Results\n\nBefore.\n\n## After\n")
    runs = shutil.copytree(made_runs, root / "runs")
    words = ["--runs", runs, "--data", made_images, *FAST, "--posteriors", root / "all.h5"]
    done = evaluating(ran)("--table", "all", *words, "--ledger", root / "results.md")
    assert done.status == 0, done.err
    shutil.rmtree(runs)
    return Tables(root, done)


def test_a_ledger_says_what_was_run_and_what_was_not(tables: Tables) -> None:
    assert "not run" not in tables.ran.err  # the table says it, in one line
    text = tables.ledger.read_text()
    assert text.startswith("# Results\n\nBefore.")
    assert "## After" in text
    # the ledger of the paper's own data is there, and nobody has run it
    assert "Not run: all 44 rows of Tables 3 to 6, 8 and 9." in text.removesuffix(tables.standin)
    (path,) = tables.root.glob("ledger-small-*-images.json")
    recipe = path.name.removeprefix("ledger-").removesuffix("-images.json")
    told = f"stand-in: recipe {recipe} on images val, 42 images of 7 classes"
    assert told in tables.standin
    assert "Not run: C 256; C 384; C 256-512; D 384; E 256; E 384." in tables.standin


def test_a_row_is_tested_at_the_q_of_its_table(tables: Tables) -> None:
    cells = cells_in(tables.root)
    by_key = {cell.key: cell for cell in cells}
    assert {"A 256", "A-LRN 256", "B 256", "B-5x5 256", "D 256", "D 256-512", "E 256-512"} == {
        c.row for c in cells if c.table == 3
    }
    assert by_key[4, "D 256", "dense"].Q == "32,36,41"
    assert by_key[3, "D 256-512", "dense"].Q == "50"
    assert by_key[5, "E 256-512", "both"].Q == "36,50,64"


def test_a_row_counts_the_epochs_of_its_whole_chain(tables: Tables) -> None:
    epochs = {c.row: c.nets[0].epochs for c in cells_in(tables.root) if c.table == 3}
    assert epochs["A 256"] == epochs["B-5x5 256"] == 20
    assert epochs["B 256"] == epochs["D 256"] == 40 and epochs["D 256-512"] == 56
    assert "| confounded: 56 epochs against 40 |" in tables.standin
    assert "B with 5x5 layers is worse than B" in tables.ledger.read_text()


def test_a_cell_is_what_the_command_gives_for_that_net_and_q(
    tables: Tables, command: Command, made_images: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    d, record = weights["D-36-64"], tmp_path / "r.json"
    words = ["--weights", d, "--data", made_images, *FAST, "--scales", "36,50,64"]
    command(*words, "--mode", "both", "--json", record)
    both = json.loads(record.read_text())["rows"][2]
    cell = next(c for c in cells_in(tables.root) if c.key == (5, "D 256-512", "both"))
    assert (cell.top1, cell.top5, cell.images) == (both["top1_error"], both["top5_error"], 42)
    assert cell.wrong_images().mean() * 100 == pytest.approx(cell.top1)


def test_kept_posteriors_give_the_same_tables_with_no_net_at_hand(
    tables: Tables, command: Command, tmp_path: Path
) -> None:
    later = tmp_path / "results.md"
    again = command("--table", "all", "--from", tables.posteriors, "--ledger", later)
    assert again.status == 0, again.err
    without_command = [
        [replace(c, command="") for c in cells_in(path.parent)] for path in (tables.ledger, later)
    ]
    assert without_command[0] == without_command[1]
    # Table 7 alone: the cells of Tables 5 and 6 that it has, beside the paper's
    seventh = tmp_path / "seven" / "results.md"
    seventh.parent.mkdir()
    ran = command("--table", "7", "--from", tables.posteriors, "--ledger", seventh)
    assert ran.status == 0, ran.err
    keys = [c.key for c in cells_in(seventh.parent)]
    assert keys == [
        (5, "E 256-512", "both"),
        (6, "D 256-512 + E 256-512", "both"),
    ]
    assert "| VGG, 2 nets, multi-crop and dense | the paper | 23.7 | 6.8 | 6.8 |" in ran.out
    assert "**Table 7**" in ran.out and "**Table 5**" not in ran.out


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
    for key, now in after.items():
        # the image counts, and counts as wrong; nothing else has changed
        assert now.images == 42
        changed = now.wrong_images() != before[key].wrong_images()
        assert now.wrong_images()[2 * 6 + 1]
        assert not np.delete(changed, 2 * 6 + 1).any()
    # a file that can't be read is not the one that was: a table of its own, and again: the same
    # heading, not twice
    assert command(*words).status == 3
    assert ledger.read_text().count("## Tables 3 to 10, stand-in: recipe small") == 2


def test_the_released_nets_stand_in_the_papers_own_table() -> None:
    """Beside a net of ours by the same recipe, not in its place."""
    source = {
        "source": OXFORD["D"],
        "net": "D",
        "train_scale": "256-512",
        "crop": "224",
        "weights": "oxford:D",
    }
    released = Trained.from_facts({**source, **how_trained(source)})
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
        patch.setattr("pretrain.ledger.claims_markdown", lambda cells: 1 / 0)
        assert command(*words).status == 1
    assert not ledger.exists() and not list(tmp_path.glob("ledger-*.json"))
    with monkeypatch.context() as patch:  # the disk is full for the second file

        def refuse(path: Path, text: str) -> None:
            raise VggfeatError(f"can't write {path}: No space left on device")

        patch.setattr("vggfeat.ledger.write_text", refuse)
        assert "No space left" in command(*words).err
    assert len(cells_in(tmp_path)) == 1 and not ledger.exists()
    assert command(*words).status == 0
    assert "| A 256 | dense |" in ledger.read_text() and len(cells_in(tmp_path)) == 1


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
    assert text.count("## Tables 3 to 10, stand-in") == 2


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


def trained(
    net: str = "A", S: tuple[int, int] = (36, 36), stands_for: str = "256", **others: Any
) -> Trained:
    return Trained(net, S, 32, "all", "mini", f"{net}-{S}", stands_for=stands_for, **others)


def test_roles_of_several_seeds() -> None:
    nets = [trained(seed=1), trained(), trained(S=(48, 48), stands_for="384", seed=1)]
    assert roles(nets) == {
        ("mini", (), 0): {Member("A", "256"): 1},
        ("mini", (), 1): {Member("A", "256"): 0, Member("A", "384"): 2},
    }
    with pytest.raises(VggfeatError, match="both stand for A at 256"):
        roles([*nets, trained()])
    slow = trained(changes=("*.learning_rate=0.002",))
    assert roles([*nets, slow])["mini", slow.changes, 0] == {Member("A", "256"): 3}


def test_an_S_stands_for_what_its_recipe_says_whatever_else_is_there() -> None:
    """A net of S=384 alone in its folder was "256"; a range was "256-512"."""
    for net, member in (
        (trained("D", (384, 384), "384"), Member("D", "384")),
        (trained("D", (224, 320), ""), Member("D", "S=224-320")),
        (trained("D", (256, 256), ""), Member("D", "S=256")),
    ):
        assert roles([net]) == {("mini", (), 0): {member: 0}}
    rows = rows_of(
        (3, 4, 5, 6), [Member("D", "S=224-320"), Member("D", "384"), Member("B-5x5", "256")]
    )
    own = [row for row in rows if row not in PAPER]
    assert [(row.table, row.name, row.multi) for row in own] == [
        (3, "D S=224-320", False),
        (3, "B-5x5 256", False),
        (4, "D S=224-320", True),
        (4, "B-5x5 256", True),
    ]
    table = table_markdown(3, [cell("D S=224-320", 20)])
    assert "| D S=224-320 | dense | 20.0 / 5.0 | 1 | S 36; Q 36 | 20 | 2026-01-01 | - |" in table


def test_controls_have_rows_of_their_own_and_boxes_none() -> None:
    control = trained("D", task="control")
    assert control.member == Member("D", "256", control=True)
    assert roles([trained("D"), control])["mini", (), 0].keys() == {
        Member("D", "256"),
        control.member,
    }
    own = [row for row in rows_of((3, 4), [control.member]) if row not in PAPER]
    assert [(row.table, row.name, row.mode) for row in own] == [
        (3, "D 256 (control)", "dense"),
        (4, "D 256 (control)", "dense"),
    ]
    # of Sect. 4.1: B and its twin on a central crop, beside their rows of Table 3
    centre = [row.name for row in rows_of((3,), []) if row.mode == "centre"]
    assert centre == ["B 256", "B 256 (control)", "B-5x5 256"]


def test_nets_that_tell_boxes_are_no_nets_of_these_tables(
    weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(metadata: dict[str, str]) -> dict[str, str]:
        task = "localisation" if metadata["net"] == "D" else "control"
        return {**how_trained(metadata), "task": task}

    monkeypatch.setattr("pretrain.runs.how_trained", told)
    nets = trained_nets(tmp_path / "runs")
    assert sorted({net.net for net in nets}) == ["A", "A-LRN", "B", "B-5x5", "E"]
    assert all(net.member.control for net in nets)


def test_table_7_takes_rows_of_tables_5_and_6() -> None:
    rows = rows_of((7,), [])
    assert [(row.table, row.mode) for row in rows] == [(5, "both"), (6, "dense"), (6, "both")]
    assert rows_of((5, 6, 7), []) == rows_of((5, 6), [])


def test_a_net_is_measured_in_the_modes_that_its_rows_ask_for(
    weights: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The central crop is B's and its twin's alone; the 150 crops are of Tables 5 to 7."""
    monkeypatch.setattr("pretrain.runs.MODES", ("dense", "crops", "centre"))
    asked: dict[str, list[str]] = {}

    def evaluate(networks: list[Any], scales: Any, modes: list[str], *rest: Any, **how: Any) -> Any:
        (network,) = networks
        asked[f"{network.name} {network.metadata['train_scale']}"] = modes
        return KeptPosteriors("imagenet", "images", "val", [], np.zeros(0), [], {}, [])

    monkeypatch.setattr("pretrain.runs.evaluate", evaluate)
    monkeypatch.setattr(KeptPosteriors, "joined", list)
    items = images_of(images, "val", 0)

    def measured(*numbers: int) -> dict[str, list[str]]:
        asked.clear()
        with joined("cpu") as ranks:
            measure_tables(numbers, tmp_path / "runs", items, "val", ranks, "float32", {})
        return dict(asked)

    three = measured(3)
    assert three.pop("B-5x5 36") == three.pop("B 36") == ["dense", "centre"]
    assert len(three) == 5 and {*map(tuple, three.values())} == {("dense",)}
    crops = ["dense", "crops"]
    assert measured(7) == {"D 36-64": crops, "E 36-64": crops}
    everything = measured(3, 4, 5, 6, 7)
    assert everything["D 36-64"] == crops and everything["D 36"] == ["dense"]
