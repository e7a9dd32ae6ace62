"""What the tables need, each stage once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.graph import TABLES, graph
from pretrain.recipe import CONTROL, LOCALISATION
from pretrain.tables import PAPER, Member
from vggfeat.errors import VggfeatError


def arrows(recipe: str, tables: tuple[int, ...] = TABLES, boxes: bool = True) -> dict[str, str]:
    """Step -> the one that it starts from, "" for none."""
    steps = graph(recipe, 0, tables, boxes).steps
    found = {step.name: step.start.name if step.start else "" for step in steps}
    assert len(found) == len(steps)
    for i, step in enumerate(steps):  # each behind what it starts from
        assert step.start is None or step.start in steps[:i]
    return found


def test_the_papers_recipe_is_the_papers_graph() -> None:
    assert arrows("paper") == {
        "A/A-256": "",
        "A-LRN/A-LRN-256": "",
        "B/B-256": "A/A-256",
        "B-5x5/B-5x5-256": "",
        "C/C-256": "A/A-256",
        "C/C-384": "C/C-256",
        "C/C-256-512": "C/C-384",
        "D/D-256": "A/A-256",
        "D/D-384": "D/D-256",
        "D/D-256-512": "D/D-384",
        "D-fc/D-256-512-fc": "D/D-384",
        "E/E-256": "A/A-256",
        "E/E-384": "E/E-256",
        "E/E-256-512": "E/E-384",
        "D-scr-fc/D-384-scr-fc": "D/D-384",
        "D-pcr-fc/D-384-pcr-fc": "D/D-384",
        "D-pcr/D-384-pcr": "D/D-384",
        "D-pcr/D-256-pcr": "D/D-256",
    }


def test_one_table_needs_its_own_nets_and_what_they_start_from() -> None:
    assert arrows("paper", (5,)).keys() == {
        *("A/A-256", "D/D-256", "D/D-384", "D/D-256-512", "E/E-256", "E/E-384", "E/E-256-512"),
    }
    six = arrows("paper", (6,))
    assert "D-fc/D-256-512-fc" in six and "C/C-384" in six and "B/B-256" not in six
    assert arrows("paper", (7,)).keys() == six.keys()  # rows of 5 and 6
    assert arrows("paper", (8,)).keys() == {
        *("A/A-256", "D/D-256", "D/D-384"),
        *("D-scr-fc/D-384-scr-fc", "D-pcr-fc/D-384-pcr-fc", "D-pcr/D-384-pcr"),
    }
    # which classes are likely is told by D and E
    assert arrows("paper", (9,)).keys() - arrows("paper", (5,)).keys() == {
        *("D-pcr/D-384-pcr", "D-pcr/D-256-pcr"),
    }
    assert arrows("paper", (10,)) == arrows("paper", (9,))
    assert arrows("paper", (11,)) == arrows("paper", (12,)) == arrows("paper", (5,))


def test_without_boxes_no_net_learns_them() -> None:
    steps = graph("paper", 0, TABLES, boxes=False).steps
    assert all(step.recipe.stages[step.number].task != LOCALISATION for step in steps)


def test_every_net_of_the_tables_is_there() -> None:
    """By what the recipe says that its S stand for, not by names."""
    found = {
        (step.recipe.stages[step.number].net, step.recipe.stages[step.number].train_scale)
        for step in graph("tables", 0, TABLES, boxes=True).steps
    }
    S = {"256": (73, 73), "384": (110, 110), "256-512": (73, 146)}
    assert {(m.net, S[m.S]) for row in PAPER for m in row.members} <= found


def test_controls_start_where_what_they_control_for_did() -> None:
    controls = {
        step.name: step.start.name if step.start else ""
        for step in graph("tables", 3, (3,), boxes=False).steps
        if step.recipe.stages[step.number].task == CONTROL
    }
    assert controls == {
        "A-control/A-73-control": "A/A-73",
        "B-control/B-73-control": "",
        **{f"{net}-control/{net}-73-control": f"{net}/{net}-73" for net in "CDE"},
    }


def test_a_control_sees_as_many_images_as_what_it_is_compared_with() -> None:
    steps = {step.name: step for step in graph("tables", 0, (3,), boxes=False).steps}

    def epochs(name: str) -> float:
        step = steps[name]
        own = step.recipe.stages[step.number].epochs
        return own + (epochs(step.start.name) if step.start else 0.0)

    assert epochs("A-control/A-73-control") == epochs("B/B-73") == 40
    assert epochs("B-control/B-73-control") == epochs("B-5x5/B-5x5-73") == 20
    for net in "CDE":
        assert epochs(f"{net}-control/{net}-73-control") == epochs(f"{net}/{net}-73-146") == 62


def test_an_a_that_learned_otherwise_is_another_run() -> None:
    """mini's A has 35 epochs as a net of its own, 30 as the start of others."""
    mini = arrows("mini", (3,))
    assert mini["D/D-112"] == mini["E/E-112"] == "A-start/A-112"
    assert mini["A/A-112"] == ""
    assert graph("mini", 0, (3,), boxes=False).lacking == ["C 384", "D 384", "E 384"]


def test_a_recipe_whose_s_stand_for_nothing_makes_no_table(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'crop = 32\nwidth = 0.1\n[[stages]]\nnet = "NET"\ntrain_scale = [36, 36]\n'
        "learning_rate = 1e-2\nepochs = 1\n"
    )
    with pytest.raises(VggfeatError, match="makes none of the nets of table 3: its"):
        graph(str(own), 0, (3,), boxes=False)


def test_each_seed_has_its_folder() -> None:
    first, other = (graph("tables", seed, (3,), boxes=False).steps[0] for seed in (0, 7))
    assert (first.seed, other.seed) == ("seed0", "seed7")
    assert other.recipe.seed == 7 and other.weights(Path("out")).parts[:3] == ("out", "seed7", "A")
    assert Member("A", "256").name == "A 256"
