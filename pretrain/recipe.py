"""The numbers of Sect. 3.1 and the chain of stages, as data. S training scale: length of the
smallest side in pixels.

A recipe is a TOML file, each number with its reason: one of `recipes/`, or one of your own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pretrain.colour import refuse_impossible
from vggfeat.checked import Range, fitted, fitted_field, parse_json, parse_toml, read_text
from vggfeat.errors import VggfeatError, WrongUsage, as_typed
from vggfeat.table1 import NETS, parameter_count

RECIPES = Path(__file__).parent / "recipes"
# Eleven weight layers and fewer start from random weights, as A does; deeper nets start from a
# trained A.
SHALLOW = ("A", "A-LRN", "B-5x5")
INITS = ("A", "normal", "glorot")
MOST_BYTES = 1 << 16  # of a recipe file: both of ours have two thousand
PAPER_S = ("256", "384", "256-512")  # Sect. 3.1
LENGTHS = ("iterations", "epochs")  # of a stage: one of them
CLASSIFICATION, LOCALISATION, CONTROL = TASKS = ("classification", "localisation", "control")
"""What a stage is for: classes (Sect. 3); boxes (Appendix A); or a net that another is to be
compared with, which has learned for as long.
"""
LEARN = ("all", "fc", "fc8")  # the layers of a stage that learn
OF_BOXES = ("box_unit", "box_cover")
"""Numbers of a recipe that only its localisation stages depend on."""
TOLD = ("nets", "learn", "task", "boxes")  # of a stage, by its name or by where it stands
# of a recipe, what doesn't decide which net comes out; and the seed, which a table has several of
ASIDE = ("name", "file", "stages", "seed", "chance_after")


@dataclass(frozen=True)
class Stage:
    """One stage of the chain: a net at a training scale. It starts where another one ended
    (`Recipe.before`).
    """

    net: str
    """A net of Table 1, or NET: the one that `--net` asks for."""
    train_scale: tuple[int, int]
    """Smallest and largest S in pixels; equal for a fixed scale. Each image draws its own (scale
    jitter).
    """
    learning_rate: float
    """At the start of the stage; divided each time the held-out error stops falling."""
    iterations: int = 0
    """Most iterations (mini-batches) of the stage; 0 where `epochs` says it."""
    epochs: float = 0.0
    """Most passes over the training set; 0 where `iterations` says it."""
    learn: str = "all"
    """all layers, or only the "fc" layers (Table 6: so was the submitted jittered D fine-tuned), or
    only the last one, "fc8"; the others are constant.
    """
    nets: tuple[str, ...] = NETS
    """Nets whose chain has this stage (Table 3 has A, A-LRN and B at S=256 only)."""
    task: str = CLASSIFICATION
    """What it is for, one of `TASKS`."""
    boxes: str = ""
    """Of localisation: "scr", four numbers for all classes, or "pcr", four a class: what `--boxes`
    asks for.
    """
    from_random: bool = False
    """Of a control: whether it starts from random weights, and not from the net at its S."""

    def __post_init__(self) -> None:
        if len(self.train_scale) != 2 or not 0 < self.train_scale[0] <= self.train_scale[1] <= 8192:
            raise VggfeatError(
                "train_scale must be [smallest, largest] S, at most 8192, not"
                f" {list(self.train_scale)}"
            )
        where = f"stage {self.name}"
        if self.net != "NET" and self.net not in NETS:
            raise VggfeatError(
                f"{where}: there is no net {self.net!r}; Table 1 has {', '.join(NETS)}, or NET"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise VggfeatError(f"{where}: learning_rate must be positive, not {self.learning_rate}")
        if (self.iterations > 0) == (self.epochs > 0) or min(self.iterations, self.epochs) < 0:
            raise VggfeatError(f"{where}: give either iterations or epochs, a positive number")
        if not max(self.iterations, self.epochs) <= 1e9:
            raise VggfeatError(f"{where}: iterations and epochs are at most 1e9")
        if self.learn not in LEARN:
            raise VggfeatError(f"{where}: learn must be all, fc or fc8, not {self.learn!r}")
        if unknown := sorted(set(self.nets) - set(NETS)):
            raise VggfeatError(f"{where}: nets has {unknown[0]!r}; Table 1 has {', '.join(NETS)}")
        if self.task not in TASKS:
            raise VggfeatError(f"{where}: task must be {', '.join(TASKS)}, not {self.task!r}")
        if self.boxes and (self.task != LOCALISATION or self.boxes not in ("scr", "pcr")):
            raise VggfeatError(
                f"{where}: boxes must be scr or pcr, of localisation, not {self.boxes!r}"
            )
        if self.from_random and self.task != CONTROL:
            raise VggfeatError(f"{where}: from_random is for a control")

    @property
    def name(self) -> str:
        """Net and S: "D-256", "D-256-512"; behind it "-boxes" (or which) of localisation,
        "-control", and "-fc" or "-fc8" where only these layers learn.
        """
        low, high = self.train_scale
        task = {CLASSIFICATION: "", LOCALISATION: f"-{self.boxes or 'boxes'}", CONTROL: "-control"}
        return (
            f"{self.net}-{low}"
            + (f"-{high}" if high != low else "")
            + task[self.task]
            + ("" if self.learn == "all" else f"-{self.learn}")
        )

    def for_net(self, net: str, boxes: str = "") -> Stage:
        """The stage for this net, where the recipe says NET, and for these boxes, where it is of
        localisation.
        """
        stage = replace(self, net=net) if self.net == "NET" and net in NETS else self
        return replace(stage, boxes=boxes) if boxes and self.task == LOCALISATION else stage

    @property
    def test_scale(self) -> int:
        """Q of the held-out check: S, and the middle of the range for a jittered stage (Sect.
        4.1).
        """
        return sum(self.train_scale) // 2

    def iterations_of(self, images: int, batch_size: int) -> int:
        """The cap in iterations, for a training set of so many images."""
        return self.iterations or max(1, round(self.epochs * (images // batch_size)))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which net comes out, but the images. Bad values raise
    VggfeatError.
    """

    name: str
    """Of the recipe, for the record."""
    stages: tuple[Stage, ...]
    """The chain, before `--net` and `--init` are filled in."""
    width: float = 1.0
    """Factor on the channels of every hidden layer; 1 is the paper's."""
    crop: int = 224
    """Side of the training crop in pixels (Sect. 2.1)."""
    batch_size: int = 256
    """Images an iteration, over all processes together (Sect. 3.1)."""
    momentum: float = 0.9
    """Sect. 3.1."""
    weight_decay: float = 5e-4
    """L2 penalty's multiplier (Sect. 3.1), on weights and biases alike."""
    caffe_biases: bool = False
    """Biases with twice the learning rate and no decay, as in Caffe's example nets; the paper
    doesn't say.
    """
    dropout: float = 0.5
    """Share of the units of fc6 and fc7 that are dropped (Sect. 3.1)."""
    random_layers: str = "normal"
    """Weights of layers that aren't copied: "normal" (mean 0, init_std) or "glorot" (Glorot &
    Bengio); biases 0.
    """
    init_std: float = 0.01
    """Standard deviation of "normal", in the paper's words "10^-2 variance": as a variance it can't
    be trained.
    """
    rate_divisor: float = 10.0
    """The learning rate is divided by it (Sect. 3.1)."""
    rate_drops: int = 3
    """Times that it is divided in a stage (Sect. 3.1)."""
    patience: int = 3
    """Checks in a row without a lower held-out top-1 error before a division; the paper doesn't
    say.
    """
    drop_by: tuple[float, ...] = ()
    """Shares of the stage's length by which the first, second … division is due even without a
    plateau.
    """
    held_out: float = 0.01
    """Share of each class's training images that only steer the schedule; the official validation
    set only reports.
    """
    flip: bool = True
    """Random horizontal flips (Sect. 3.1)."""
    colour_std: float = 0.1
    """Standard deviation of Krizhevsky's random factors on the principal components of the RGB
    values; 0 for none.
    """
    mean: tuple[float, ...] = ()
    """Mean RGB in 0..255; empty: measured on the training set."""
    covariance: tuple[tuple[float, ...], ...] = ()
    """3x3 covariance of RGB in [0, 1]; empty: measured on the training set."""
    box_unit: float = 0.25
    """Of localisation: what the numbers of a box are counted in, as a share of the crop's side; the
    paper doesn't say.
    """
    box_cover: float = 0.5
    """Of localisation: the share of a box that a training crop must have in it, where one of ten
    draws has; the paper doesn't say.
    """
    new_classes: bool = False
    """Whether the weights that `--from` gives may have learned other classes: fc8 is then drawn
    anew, FC layers that they lack as well, and their mean is kept. No net of such a recipe stands
    for one of the paper's.
    """
    chance_after: int = 5000
    """Iterations in a row, of any stage, after which a loss that is no better than chance's stops
    the run; and a stage that ends no better than chance is refused. 0: neither. The net doesn't
    depend on it."""
    seed: int = 0
    """Of the initialisation, the held-out slice, the order and every augmentation."""
    stands_for: dict[str, str] = field(default_factory=dict)
    """In tables, a small recipe's S -> the paper's that it stands for: "112" -> "256". The others
    stand for none.
    """
    file: str = ""
    """The numbers of a file of one's own before any was replaced, as `to_json`; of ours they are
    known.
    """

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "width": (1e-3, 16),
            "batch_size": (1, 1 << 20),
            "momentum": (0, 0.9999),
            "weight_decay": (0, 1),
            "dropout": (0, 0.99),
            "init_std": (1e-9, 10),
            "rate_divisor": (1.0001, 1e6),
            "rate_drops": (0, 100),
            "patience": (1, 10**6),
            "held_out": (0, 0.5),
            "colour_std": (0, 10),
            "box_unit": (1e-3, 1e3),
            "box_cover": (0, 1),
            "chance_after": (0, 10**9),
            "seed": (0, 2**63 - 1),
            "crop": (32, 4096),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise VggfeatError(
                    f"{name} must lie in {low:g}..{high:g}, not {getattr(self, name)!r}"
                )
        if self.crop % 32:
            raise VggfeatError(f"crop {self.crop} is not a multiple of 32, the stride of pool5")
        if self.random_layers not in ("normal", "glorot"):
            raise VggfeatError(
                f"random_layers must be normal or glorot, not {self.random_layers!r}"
            )
        rising = list(self.drop_by) == sorted(self.drop_by) and all(
            0 < share <= 1 for share in self.drop_by
        )
        if len(self.drop_by) > self.rate_drops or not rising:
            raise VggfeatError(
                f"drop_by must be at most rate_drops rising shares, not {self.drop_by}"
            )
        theirs = list(self.stands_for.values())
        odd = [S for S in self.stands_for if not re.fullmatch(r"[0-9]{1,4}(-[0-9]{1,4})?", S)]
        if odd or set(theirs) - set(PAPER_S) or len(set(theirs)) < len(theirs):
            raise VggfeatError(
                f"stands_for must give to an S, as 112 or 112-160, one of {', '.join(PAPER_S)},"
                f" each once, not {json.dumps(self.stands_for)[:60]}"
            )
        # one that isn't given stands for a possible one
        refuse_impossible(self.mean or (0, 0, 0), self.covariance or 3 * ((0, 0, 0),))
        self.refuse_small(CLASSIFICATION)

    def refuse_small(self, task: str) -> None:
        """Raise VggfeatError where S of a task's stage is smaller than the crop."""
        for stage in self.stages:
            if stage.task == task and stage.train_scale[0] < self.crop:
                raise VggfeatError(
                    f"stage {stage.name}: S={stage.train_scale[0]} is smaller than the crop of"
                    f" {self.crop}"
                )

    def before(self, number: int) -> int | None:
        """The stage whose weights a stage starts from, by their places; None: random ones.

        Of classification the one before it; of localisation and of a control that of the same net
        and S (A.1: "initialised with the corresponding classification models"). Raises
        VggfeatError where the chain doesn't have it.
        """
        stage = self.stages[number]
        if stage.from_random:
            return None
        places = [i for i, each in enumerate(self.stages[:number]) if each.task == CLASSIFICATION]
        if stage.task == CLASSIFICATION:
            return places[-1] if places else None
        for i in reversed(places):
            if (self.stages[i].net, self.stages[i].train_scale) == (stage.net, stage.train_scale):
                return i
        raise VggfeatError(
            f"stage {stage.name}: recipe {self.name} has no stage of {stage.net} at that S before"
            " it, to start from"
        )

    def path(self, number: int) -> list[int]:
        """Places of the stages that the net at the end of one has been through, its own last."""
        before = self.before(number)
        return [*([] if before is None else self.path(before)), number]

    def needed(self, task: str) -> list[int]:
        """Places of the task's stages, and of those that they start from, in the chain's order."""
        ours = (number for number, stage in enumerate(self.stages) if stage.task == task)
        return sorted({place for number in ours for place in self.path(number)})

    def to_json(self) -> str:
        """The recipe as one JSON object, for a weights file's metadata."""
        return json.dumps(asdict(self))


def read_recipe(name: str, overrides: Sequence[str] = (), net: str = "", boxes: str = "") -> Recipe:
    """A recipe by name ("paper", "mini") or from a .toml file, some of its numbers replaced.

    overrides: KEY=VALUE with a field of Recipe, or STAGE.KEY=VALUE with a field of Stage, where
    STAGE is a stage's name, as the recipe spells it ("NET-384") or with the name of `net` and of
    `boxes` ("D-384", "D-384-pcr"), or * for all; VALUE is written as in TOML. They hold together:
    names are those before any of them, and of two for one number the last holds. Raises
    VggfeatError: no such file, a file's value that can't be, a stage that a file of one's own
    doesn't have. WrongUsage: no recipe
    of ours, a key that there isn't, a value that can't be.
    """
    known = _ours()
    if name not in known and not name.endswith(".toml"):
        raise WrongUsage(f"there is no recipe {name!r}; give {', '.join(known)}, or a .toml file")
    path = RECIPES / f"{name}.toml" if name in known else Path(name)
    record = parse_toml(read_text(path, "recipe", most=MOST_BYTES), path)
    if not record.get("stages"):
        raise VggfeatError(f"{path} has no [[stages]]")
    recipe: Recipe = fitted({"name": path.stem, **record}, Recipe, path)
    if name not in known:
        recipe = replace(recipe, file=recipe.to_json())
    return _overridden(recipe, overrides, net, boxes)


def _ours() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _lacks(recipe: Recipe, what: str) -> VggfeatError:
    """What to raise for a word that a recipe doesn't have: of one of ours the word is wrong, of
    one's own it may be the file.
    """
    return VggfeatError(what) if recipe.file else WrongUsage(what)


def _overridden(recipe: Recipe, overrides: Sequence[str], net: str, boxes: str) -> Recipe:
    numbers = _shallow(recipe)
    stages = [_shallow(stage) for stage in recipe.stages]
    for override in overrides:
        where = f"`set` {override[:60]}"
        stage_name, key, text, value = _parsed(override, where)
        if not stage_name:
            if key in ("stages", "file"):
                raise WrongUsage(
                    f"{where}: write STAGE.KEY=VALUE, STAGE one of {_names(recipe)} or *"
                )
            if key in stages[0] and key not in numbers:
                raise WrongUsage(
                    f"{where}: {key} is a stage's: write *.{key}={text} for all stages, or"
                    f" STAGE.{key}, STAGE one of {_names(recipe)}"
                )
            with as_typed():
                numbers[key] = fitted_field(value, Recipe, key, where)
            continue
        meant = [
            record
            for record, stage in zip(stages, recipe.stages, strict=True)
            if stage_name in ("*", stage.name, stage.for_net(net, boxes).name)
        ]
        if not meant:
            raise _lacks(
                recipe,
                f"{where}: there is no stage {stage_name!r}; the recipe has {_names(recipe)}, or *",
            )
        if key in numbers and key not in stages[0]:
            raise WrongUsage(f"{where}: {key} is of the whole recipe: write {key}={text}")
        for record in meant:
            with as_typed():
                record[key] = fitted_field(value, Stage, key, where)
            if key in LENGTHS:  # one length replaces the other
                record["iterations" if key == "epochs" else "epochs"] = 0
    with as_typed():  # the file's own numbers were good
        return Recipe(**{**numbers, "stages": tuple(Stage(**record) for record in stages)})


def _parsed(override: str, where: str) -> tuple[str, str, str, Any]:
    """Stage, "" for none, and key of KEY=VALUE or STAGE.KEY=VALUE; the value as a message may show
    it, and the value.
    """
    name, equals, text = override.partition("=")
    if not equals:
        raise WrongUsage(f"{where}: write KEY=VALUE or STAGE.KEY=VALUE")
    try:
        value = parse_toml(f"value = {text}", where)["value"]
    except VggfeatError:
        value = text  # a word needs no quotes
    stage_name, dot, key = name.strip().rpartition(".")
    if dot and not stage_name:
        raise WrongUsage(f"{where}: write KEY=VALUE or STAGE.KEY=VALUE")
    return stage_name, key, text[:60].strip(), value


def _shallow(record: Any) -> dict[str, Any]:
    return {each.name: getattr(record, each.name) for each in fields(record)}


def _names(recipe: Recipe) -> str:
    return ", ".join(stage.name for stage in recipe.stages)


def chain(
    recipe: Recipe, net: str, init: str = "A", task: str = CLASSIFICATION, boxes: str = ""
) -> Recipe:
    """The recipe whose stages are net's whole chain.

    init: "A" trains A first, for a net deeper than A; "normal" or "glorot" skips it, and is how
    random layers are made. task: what the last stages are for, behind those of classification;
    boxes: of localisation, which ones. Raises WrongUsage: no such net or init, no stage left, two
    of one name, a net that is too large (`table1.parameter_count`); VggfeatError where a file of
    one's own has that by itself.
    """
    if net not in NETS:
        raise WrongUsage(f"there is no net {net!r}; Table 1 has {', '.join(NETS)}")
    if init not in INITS:
        raise WrongUsage(f"`init` must be one of {', '.join(INITS)}, not {init!r}")
    asked = net, init, task, boxes
    with as_typed(not recipe.file or _can_be(_own_file(recipe), *asked)):
        return _chain(recipe, *asked)


def _can_be(recipe: Recipe, *asked: str) -> bool:
    try:
        _chain(recipe, *asked)
    except VggfeatError:
        return False
    return True


def _chain(recipe: Recipe, net: str, init: str, task: str, boxes: str) -> Recipe:
    with_a = init == "A" and net not in SHALLOW
    stages = [stage.for_net(net, boxes) for stage in _stages_of(recipe, net, task, with_a)]
    if task not in {stage.task for stage in stages}:
        what = "" if task == CLASSIFICATION else f" of {task}"
        raise VggfeatError(f"recipe {recipe.name} has no stage{what} for net {net}")
    for stage in stages:
        parameter_count(stage.net, 1, recipe.width, recipe.crop)
    names = [stage.name for stage in stages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise VggfeatError(
            f"recipe {recipe.name} has two stages {twice[0]}: each needs its own train_scale or"
            " learn"
        )
    made = replace(
        recipe, stages=tuple(stages), random_layers=recipe.random_layers if init == "A" else init
    )
    made.refuse_small(task)
    made.needed(task)  # there is something to start from
    return made


def _stages_of(recipe: Recipe, net: str, task: str, with_a: bool) -> list[Stage]:
    """A net's, as the recipe has them: those of classification first."""
    stages = [
        stage for stage in recipe.stages if net in stage.nets and (stage.net == "NET" or with_a)
    ]
    tasks = dict.fromkeys((CLASSIFICATION, task))
    return [stage for each in tasks for stage in stages if stage.task == each]


def select(recipe: Recipe, stages: str, task: str = CLASSIFICATION) -> Sequence[int]:
    """Positions in the chain of "3", "2-4", "D-384" or "D-256:D-384", which must be neighbours; of
    "" all that the task's stages need.

    Raises VggfeatError for a stage that the chain doesn't have.
    """
    names = [stage.name for stage in recipe.stages]

    def position(text: str) -> int:
        if text in names:
            return names.index(text)
        if text.isdecimal() and text.isascii() and 1 <= int(text) <= len(names):
            return int(text) - 1
        numbered = ", ".join(f"{i} {name}" for i, name in enumerate(names, 1))
        raise _lacks(
            recipe, f"`stages` {stages}: there is no stage {text!r} in the chain {numbered}"
        )

    if not stages:
        return range(len(names)) if task == CLASSIFICATION else recipe.needed(task)
    if stages in names:
        return range(names.index(stages), names.index(stages) + 1)
    first, _, last = stages.partition(":") if ":" in stages else stages.partition("-")
    start, stop = position(first), position(last or first)
    if start > stop:
        raise _lacks(recipe, f"`stages` {stages}: {names[stop]} comes before {names[start]}")
    return range(start, stop + 1)


# --- which recipe a net is of ---------------------------------------------------------------------


@dataclass(frozen=True)
class Past:
    """A stage that a net has been through, for the history in its weights file. images: of its
    training set.

    training_set: `datasets.items.name_digest` of them.
    """

    stage: str
    recipe: str
    seed: int
    epochs: Annotated[float, Range(0, 1e9)]
    images: Annotated[int, Range(0, 10**12)]
    training_set: str


UNKNOWN = Past("unknown", "", 0, 0.0, 0, "")
"""What weights have been through whose file doesn't tell: the first of a history."""


def history_of(metadata: Mapping[str, str]) -> tuple[Past, ...]:
    """The stages behind a weights file, first to last, or UNKNOWN and those that followed; none
    where it doesn't tell. Raises VggfeatError: damaged.
    """
    where = "the metadata's history"
    return tuple(fitted(parse_json(metadata.get("history") or "[]", where), list[Past], where))


@dataclass(frozen=True)
class Identity:
    """Which recipe a net is of, and what was changed of it.

    recipe: the name; with the first digits of a digest, where the file is not one of ours.
    changes: KEY=VALUE and STAGE.KEY=VALUE, as `--set` takes them, of the stages up to the net's own
    and of all of them (`*`); NET is the net's own name. None where every number is the file's.
    stands_for: the paper's S that the net's stands for, "" for none of them.
    """

    recipe: str
    changes: tuple[str, ...]
    stands_for: str


def identity(recipe: Recipe, stage: str) -> Identity:
    """Of a net at the end of a stage, by the chain that its weights file keeps.

    Raises VggfeatError: no such stage; a file of one's own whose numbers were not kept.
    """
    names = [each.name for each in recipe.stages]
    if stage not in names:
        raise VggfeatError(f"recipe {recipe.name} has no stage {stage!r} in {', '.join(names)}")
    own = _own_file(recipe)
    found = []
    for key in (f.name for f in fields(Recipe) if f.name not in ASIDE):
        if key in OF_BOXES and not recipe.stages[names.index(stage)].boxes:
            continue
        told = key != "stands_for" or recipe.stands_for  # older weights files have none
        if told and getattr(recipe, key) != getattr(own, key):
            found.append(f"{key}={json.dumps(getattr(recipe, key))}")
    number = names.index(stage)
    task, net = recipe.stages[number].task, recipe.stages[number].net
    past = [recipe.stages[place] for place in recipe.path(number)]
    # an A that a deeper net starts from is told by A's own chain: what both call A may have learned
    # for other times
    its_own = [each for each in recipe.stages if each.task in (CLASSIFICATION, task)]
    last = its_own[-1].net
    if net != last:
        its_own = past
    with_a = any(each.net != net for each in its_own)
    meant = _stages_of(own, net, task, with_a)
    if net != last:
        meant = (meant or [each for each in own.stages if each.net == net and last in each.nets])[
            : len(past)
        ]
    if len(meant) == len(its_own):
        pairs = [
            (each, theirs) for each, theirs in zip(its_own, meant, strict=True) if each in past
        ]
        changed = [_changed(each, theirs.for_net(net)) for each, theirs in pairs]
        for item in dict.fromkeys(item for items in changed for item in items):
            where = [
                ("NET" if each.net == past[-1].net else each.net)
                + theirs.name.removeprefix(theirs.net)
                for (each, theirs), items in zip(pairs, changed, strict=True)
                if item in items
            ]
            found += (
                [f"*.{item}"] if len(where) == len(past) else [f"{name}.{item}" for name in where]
            )
    else:
        found.append(f"stages={' > '.join(names)}")
    low, high = past[-1].train_scale
    S = str(low) if low == high else f"{low}-{high}"
    stand_ins = recipe.stands_for or own.stands_for
    theirs = stand_ins.get(S, "") if stand_ins else S if recipe.crop == 224 and S in PAPER_S else ""
    theirs = "" if recipe.new_classes else theirs
    digest = f"-{hashlib.sha256(recipe.file.encode()).hexdigest()[:8]}" if recipe.file else ""
    return Identity(recipe.name + digest, tuple(found), theirs)


def _own_file(recipe: Recipe) -> Recipe:
    """The recipe as its file says it, before any number was replaced."""
    if recipe.file:
        where = f"the numbers of the file {recipe.name}.toml"
        as_written: Recipe = fitted(parse_json(recipe.file, where), Recipe, where)
        return as_written
    if recipe.name not in _ours():  # nor is a path that somebody's weights file names opened
        raise VggfeatError(
            f"recipe {recipe.name!r:.60} is none of {', '.join(_ours())}, and its file isn't known"
        )
    return read_recipe(recipe.name)


def _changed(stage: Stage, own: Stage) -> list[str]:
    """KEY=VALUE of a stage's numbers that are others; which layers learn is told by the stage's
    name.
    """
    different = [
        key
        for key in (f.name for f in fields(Stage) if f.name not in TOLD)
        if getattr(stage, key) != getattr(own, key)
    ]
    return [
        f"{key}={json.dumps(getattr(stage, key))}"
        for key in different
        if key not in LENGTHS or getattr(stage, key)
    ]
