"""What the paper's tables need, as a graph: each stage that has to be trained, once, and where it
starts.

    A-256 -> B-256, C-256, D-256, E-256;  D-256 -> D-384 -> D-256-512, D-256-512-fc, D-384-pcr ...
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pretrain.recipe import (
    CLASSIFICATION,
    CONTROL,
    LOCALISATION,
    Recipe,
    chain,
    identity,
    read_recipe,
)
from pretrain.tables import BOXES, COMPARED, JITTER, PAPER, BoxNet, Member
from pretrain.watch import WEIGHTS
from vggfeat.errors import VggfeatError
from vggfeat.table1 import NETS

TABLES = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
BY_POSTERIORS = (3, 4, 5, 6, 7)
BY_BOXES = (8, 9, 10)
BY_FEATURES = (11, 12)
JITTERED = (Member("D", JITTER), Member("E", JITTER))
"""The nets that describe images in Tables 11 and 12, and say in Table 9 which classes are
likely.
"""


@dataclass(frozen=True)
class Step:
    """A stage to train. run: its folder, in that of the seed. recipe: the whole chain, in which it
    has this number. start: whose weights it begins with; None: random ones.
    """

    run: str
    recipe: Recipe
    number: int
    start: Step | None = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.run}/{self.recipe.stages[self.number].name}"

    @property
    def seed(self) -> str:
        """The folder of its seed."""
        return f"seed{self.recipe.seed}"

    def weights(self, out: Path) -> Path:
        """Its weights file."""
        return out / self.seed / self.name / WEIGHTS


@dataclass(frozen=True)
class Graph:
    """The steps of one seed, each behind what it starts from; and what the tables have that this
    recipe can't make, in words.
    """

    steps: list[Step]
    lacking: list[str]


def graph(
    recipe: str,
    seed: int,
    tables: Collection[int],
    boxes: bool,
    overrides: Sequence[str] = (),
) -> Graph:
    """What these tables need of a recipe. boxes: whether there are true boxes to learn from.
    overrides: as of `read_recipe`.

    Raises VggfeatError where the recipe makes none of the paper's nets.
    """
    maker = _Maker(recipe, seed, overrides)
    for member in _members(tables):
        maker.classes(member)
    if 3 in tables or 4 in tables:
        maker.controls()
    if boxes:
        for net in _boxes(tables):
            maker.boxes(net)
    if not maker.made:
        raise VggfeatError(
            f"recipe {recipe} makes none of the nets of table {', '.join(map(str, tables))}: its"
            " [stands_for] says which S stands for the paper's"
        )
    return Graph(list(maker.made.values()), maker.lacking)


def _members(tables: Collection[int]) -> Iterator[Member]:
    """The nets that say classes, in the order of Table 1 and of the chain."""
    wanted = {row.key for row in COMPARED if row.table in tables}
    found = {
        member
        for row in PAPER
        if row.table in tables or row.key in wanted
        for member in row.members
        if not member.control
    }
    if {*tables} & {9, 10, *BY_FEATURES}:
        found |= {*JITTERED}
    yield from sorted(found, key=lambda m: (NETS.index(m.net), m.learn, len(m.S), m.S))


def _boxes(tables: Collection[int]) -> list[BoxNet]:
    """The nets that say boxes, each once: the Q of a row is no part of its training."""
    numbers = {8: {8}, 9: {9}, 10: {9}}
    wanted = set().union(*(numbers.get(table, set()) for table in tables))
    nets = [net for row in BOXES if row.table in wanted for net in row.nets]
    return list({(net.net, net.S, net.boxes, net.learn): net for net in nets}.values())


class _Maker:
    """Makes each step once, with what it starts from before it."""

    def __init__(self, recipe: str, seed: int, overrides: Sequence[str]) -> None:
        self.recipe, self.numbers = recipe, [*overrides, f"seed={seed}"]
        self.stages = read_recipe(recipe).stages
        self.made: dict[str, Step] = {}
        self.lacking: list[str] = []

    def classes(self, member: Member) -> Step | None:
        """The stage that a net of the tables ends with; None where the recipe has none."""
        found = self._at(member.net, CLASSIFICATION, member.S)
        if found is None:
            self._lack(member.name)
            return None
        its_chain, number = found
        if member.learn == "all":
            return self._step(member.net, its_chain, number)
        name = its_chain.stages[number].name
        own = self._chain(member.net, [f"{name}.learn={member.learn}"])
        return self._step(f"{member.net}-{member.learn}", own, number)

    def controls(self) -> None:
        """All that the recipe has."""
        for net in NETS:
            if not self._has(net, CONTROL):
                continue
            its_chain = self._chain(net, task=CONTROL)
            for number, stage in enumerate(its_chain.stages):
                if stage.task == CONTROL:
                    self._step(f"{net}-control", its_chain, number)

    def boxes(self, net: BoxNet) -> None:
        """A net that says boxes."""
        found = self._at(net.net, LOCALISATION, net.S, net.boxes)
        if found is None:
            self._lack(net.name)
            return
        its_chain, number = found
        run = f"{net.net}-{net.boxes}"
        if net.learn != "all":
            name = its_chain.stages[number].name
            overrides = [f"{name}.learn={net.learn}"]
            its_chain = self._chain(net.net, overrides, task=LOCALISATION, boxes=net.boxes)
            run += f"-{net.learn}"
        self._step(run, its_chain, number)

    def _lack(self, name: str) -> None:
        if name not in self.lacking:
            self.lacking.append(name)

    def _chain(
        self, net: str, overrides: Sequence[str] = (), task: str = CLASSIFICATION, boxes: str = ""
    ) -> Recipe:
        numbers = [*self.numbers, *overrides]
        return chain(read_recipe(self.recipe, numbers, net, boxes), net, "A", task, boxes)

    def _has(self, net: str, task: str) -> bool:
        return any(net in stage.nets and stage.task == task for stage in self.stages)

    def _at(self, net: str, task: str, S: str, boxes: str = "") -> tuple[Recipe, int] | None:
        """A net's chain, and the place of the stage that stands for the paper's S, if it has
        one.
        """
        if not self._has(net, task):
            return None
        its_chain = self._chain(net, task=task, boxes=boxes)
        for number, stage in enumerate(its_chain.stages):
            ours = (stage.task, stage.net) == (task, net)
            if ours and identity(its_chain, stage.name).stands_for == S:
                return its_chain, number
        return None

    def _step(self, run: str, its_chain: Recipe, number: int) -> Step:
        stage = its_chain.stages[number]
        name = f"{run}/{stage.name}"
        if name not in self.made:
            before = its_chain.before(number)
            start = None if before is None else self._before(its_chain, before)
            self.made[name] = Step(run, its_chain, number, start)
        return self.made[name]

    def _before(self, its_chain: Recipe, number: int) -> Step:
        """What a stage starts from: a net of the tables, where it learned as such; so A is trained
        once.
        """
        stage = its_chain.stages[number]
        own = self._chain(stage.net)
        its_own = [replace(each, nets=stage.nets) for each in own.stages[number : number + 1]]
        if its_own == [stage]:
            return self._step(stage.net, own, number)
        return self._step(f"{stage.net}-start", its_chain, number)
