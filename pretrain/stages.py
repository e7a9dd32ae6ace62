"""A whole run: colours, then stage after stage, each from the weights of the one before it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from pretrain.checkpoint import State
from pretrain.colour import Colours, Sums, measure
from pretrain.init import copy_layers, learning_layers, randomise, take_our_pixels, weight_layers
from pretrain.loader import TrainingSet
from pretrain.plan import fitting_micro_batch, net_of
from pretrain.readers import Readers
from pretrain.recipe import CLASSIFICATION, LOCALISATION, UNKNOWN, Past, Recipe, history_of
from pretrain.report import REPORT, write_report
from pretrain.standing import DONE, FAILED, INTERRUPTED, LOCK, End, Planned, Standing
from pretrain.trainer import Machine, Trainer
from pretrain.watch import BEST, CHECKPOINT, WEIGHTS, Stop
from vggfeat.checked import shown
from vggfeat.datasets.items import name_digest
from vggfeat.errors import VggfeatError, reason
from vggfeat.files import place_of, scratch, whole
from vggfeat.ranks import Ranks
from vggfeat.sources import load
from vggfeat.table1 import FC_LAYERS
from vggfeat.tensors import metadata_of
from vggfeat.terminal import in_options, list_unreadable, progress, say
from vggfeat.vgg import VGG
from vggfeat.weights import Network

COLOURS = "colours.json"


@dataclass(frozen=True)
class Run:
    """What `train` was asked for.

    recipe: the whole chain; chosen: positions of the stages to train. out: the run's folder, one
    folder a stage in it. start: weights file for the first chosen stage. colours_from: another
    run's colours.json.
    """

    recipe: Recipe
    chosen: Sequence[int]
    data: TrainingSet
    out: Path
    start: Path | None
    colours_from: Path | None
    ranks: Ranks
    machine: Machine

    def fitted(self) -> Run:
        """The same run, its micro-batch set to what fits in memory where it was left open."""
        if self.machine.micro_batch:
            return self
        nets = [net_of(self.recipe, number, len(self.data.classes)) for number in self.chosen]
        n = fitting_micro_batch(self.recipe, nets, self.machine.precision, self.ranks)
        return replace(self, machine=replace(self.machine, micro_batch=n))

    @property
    def of_classes(self) -> bool:
        """Whether its last net says classes, and becomes the run's own: what is made of a chain's
        nets besides, for boxes or to compare with, takes the place of none of them.
        """
        return self.recipe.stages[self.chosen[-1]].task == CLASSIFICATION

    def folder(self, number: int) -> Path:
        """Where a stage of the chain keeps its files."""
        return self.out / self.recipe.stages[number].name


@dataclass
class Ended:
    """How a run ended. unreadable: name -> reason of the training images that were left out."""

    finished: bool
    unreadable: dict[str, str]
    stages: list[tuple[str, State]]
    """Name of each stage that was trained or found, and where it is."""


def check(run: Run) -> None:
    """Refuse what the run could not begin with, or would overwrite, before any work; it writes
    nothing.

    Raises VggfeatError: no or unfit weights to start from; a folder with the weights of another net
    or recipe.
    """
    names = [stage.name for stage in run.recipe.stages]
    places = [(run.folder(number), [names[number]]) for number in run.chosen]
    if run.of_classes:
        places.insert(0, (run.out, names))
    for folder, stages in places:
        path = folder / WEIGHTS
        if path.is_file():
            source = metadata_of(path).get("source", "")
            if source not in [f"pretrain {run.recipe.name} {stage}" for stage in stages]:
                raise VggfeatError(
                    f"{path} has other weights"
                    f" ({shown(source) if source else 'of unknown source'}), which this run would"
                    " replace: give another `out`"
                )
    for number in run.chosen:
        _refuse_idle(run, number)
    made: set[int] = set()
    for number in run.chosen:  # what no stage of this run makes must be there
        before = run.recipe.before(number)
        typed = number == run.chosen[0] and run.start is not None
        if typed or (before is not None and before not in made):
            set_weights(run, number, net_of(run.recipe, number, len(run.data.classes)))
        made.add(number)
    for stage in (run.recipe.stages[number] for number in run.chosen):
        run.data.of_stage(stage, run.recipe.batch_size)


def train_stages(run: Run, stop: Stop, readers: Readers) -> Ended:
    """Train the chosen stages one after another, or until a signal. The last one's weights go to
    `run.out`, where they are `of_classes`.

    Raises VggfeatError; see `Trainer`. A stage whose predecessor isn't trained says which one that
    is.
    """
    check(run)
    with _alone(run) if run.ranks.first else nullcontext():
        return _train_stages(run, stop, readers)


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Hold the run's folder, until the process ends: two runs in it would overwrite each other's
    checkpoints.
    """
    folders = [run.folder(number) for number in run.chosen]
    try:
        for folder in (*folders, run.out):
            folder.mkdir(parents=True, exist_ok=True)
            # it can be written in; and what a killed process has left there is gone
            with scratch(folder):
                pass
        # not through a link, nor waiting for what reads a pipe
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = os.open(run.out / LOCK, flags, 0o666)
    except OSError as error:
        what = "its file lock is a link" if error.errno == errno.ELOOP else reason(error)
        raise VggfeatError(f"can't write in the folder {folder}: {what}") from error
    try:
        try:
            # lockf, not flock: NFS has it between machines, too
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise VggfeatError(
                f"another run is at work in {run.out}: wait for it, or give another `out`"
            ) from None
        except OSError as error:
            say(f"warning: {run.out} can't be locked ({reason(error)}): start no other run there")
        # an odd one is refused now, and not when hours of work are to be written there
        place_of(run.out / WEIGHTS)
        for folder in folders:
            for name in (CHECKPOINT, BEST, WEIGHTS):
                place_of(folder / name)
        yield
    finally:
        os.close(lock)


def _train_stages(run: Run, stop: Stop, readers: Readers) -> Ended:
    ranks = run.ranks
    ranks.barrier()
    colours = training_colours(run)
    data = run.data.without(set(colours.unreadable))
    if len(data.train) < run.recipe.batch_size:
        raise VggfeatError(
            f"only {len(data.train)} training images can be read, fewer than a batch of"
            f" {run.recipe.batch_size}"
        )
    ended = Ended(False, colours.unreadable, [])
    standing = _planned(run, data)
    _tell(run, standing)
    for number in run.chosen:
        net = net_of(run.recipe, number, len(data.classes))
        start = set_weights(run, number, net)
        own_mean = run.recipe.mean or run.colours_from is not None
        if run.recipe.new_classes and start.mean is not None and not own_mean:
            # the layers that go on learned with it
            colours = replace(colours, mean=start.mean)
        trainer = Trainer(
            run.recipe,
            number,
            net,
            data.of_stage(run.recipe.stages[number], run.recipe.batch_size),
            colours,
            ranks,
            run.machine,
            run.folder(number),
            readers,
            from_random=start.record.startswith("random"),
            start=start.record,
            history=start.history,
        )
        if ranks.first:
            say(f"{trainer.stage.name}: {_begins(trainer, start)}")
            _warn_of_mean(start, colours)
        with stop.saving():
            try:
                finished = trainer.run(stop)
            except VggfeatError as error:  # the page, to look at what went wrong
                _tell(run, _at_end(standing, trainer, FAILED, str(error)), page=True)
                raise
            ended.stages.append((trainer.stage.name, trainer.state))
            # all leave together, if one does; and the next stage starts from what the first process
            # has just written
            stop.signal = max(ranks.gather(stop.signal))
            if stop.signal or number == run.chosen[-1]:
                standing = _at_end(standing, trainer, INTERRUPTED if stop.signal else DONE)
            _tell(run, standing, page=True)
        if stop.signal:
            if ranks.first:
                what = (
                    "finished"
                    if finished
                    else f"stopped and saved at iteration {trainer.state.iteration}"
                )
                say(f"{trainer.stage.name}: {what}; the same command goes on from there")
            return ended
    if ranks.first and run.of_classes:
        with whole(run.out / WEIGHTS) as made:
            shutil.copyfile(run.folder(run.chosen[-1]) / WEIGHTS, made)
    ranks.barrier()  # all that a run writes is there when it has ended
    ended.finished = True
    return ended


def training_colours(run: Run) -> Colours:
    """The mean and covariance: given by the recipe or a file, read from the run's folder, or
    measured and kept there.

    Measuring reads every training image, held-out ones too, and so finds the unreadable ones before
    training does.
    """
    recipe, ranks = run.recipe, run.ranks
    items, names = run.data.items, run.data.names()
    cache = run.out / COLOURS
    if run.colours_from is not None:
        colours = Colours.read(run.colours_from)
        if colours.training_set != name_digest(names):
            # another set's mean is a choice; its bad images are not here
            colours = replace(colours, unreadable={})
    elif recipe.mean and recipe.covariance:
        return Colours(recipe.mean, recipe.covariance, training_set=name_digest(names))
    elif ranks.same(cache.exists()):
        colours = Colours.read(cache)
        if colours.training_set != name_digest(names):
            raise VggfeatError(
                f"{cache} was measured on another training set: give another `out`, or delete it"
            )
    else:
        low, high = ranks.share(0, len(names))
        with progress("measuring colours", quiet=not ranks.first) as advance:
            show = partial(advance, total=high - low)
            mine = measure(items.root, names[low:high], ranks.cores, show)
        total = Sums()
        for sums in ranks.gather(mine):
            total.add(sums)
        colours = total.colours(names)
        if ranks.first:
            try:
                colours.save(cache)
            except VggfeatError as error:
                say(f"warning: {error}; training goes on, and the next run measures them again")
            list_unreadable(colours.unreadable)
    if ranks.first and colours.unreadable:
        say(
            f"{len(colours.unreadable)} training images can't be read and are left out (named in"
            f" {cache})"
        )
    return replace(
        colours,
        mean=recipe.mean or colours.mean,
        covariance=recipe.covariance or colours.covariance,
    )


def _planned(run: Run, data: TrainingSet) -> Standing:
    """The stages to come, each with the most iterations that it will take."""
    size = run.recipe.batch_size
    every = [run.recipe.stages[number] for number in run.chosen]
    lengths = [stage.iterations_of(len(data.of_stage(stage, size).train), size) for stage in every]
    return Standing(
        stages=[
            Planned(name=stage.name, iterations=n) for stage, n in zip(every, lengths, strict=True)
        ]
    )


def _at_end(standing: Standing, trainer: Trainer, how: str, why: str | None = None) -> Standing:
    stage, iteration = trainer.stage.name, trainer.state.iteration
    return replace(standing, end=End(how=how, stage=stage, iteration=iteration, why=why))


def _tell(run: Run, standing: Standing, page: bool = False) -> None:
    """How the run stands, for programs and, on its page, for people."""
    if not run.ranks.first:
        return
    for write in (standing.write, _write_page)[: 1 + page]:
        try:
            write(run.out)
        except VggfeatError as error:  # no reason to lose the stages that follow
            say(f"warning: {error}; training goes on")


def _write_page(folder: Path) -> None:
    write_report(folder, folder / REPORT, working=True)


GREY_LEVELS = 1.0  # means that differ by less are of the same images, a few more or less of them


def _warn_of_mean(start: Start, colours: Colours) -> None:
    """Where a net goes on with another mean than it learned with."""
    if start.mean is None:
        return
    theirs, ours = (", ".join(f"{x:.2f}" for x in mean) for mean in (start.mean, colours.mean))
    if max(abs(a - b) for a, b in zip(start.mean, colours.mean, strict=True)) > GREY_LEVELS:
        say(
            in_options(
                f"warning: the weights to start from learned minus the mean RGB {theirs}, and here"
                f" {ours} is subtracted: `set` mean=[{theirs}] keeps theirs"
            )
        )


def _begins(trainer: Trainer, start: Start) -> str:
    """How a stage begins, in words."""
    if trainer.done:
        return "done before"
    if trainer.state.finished:
        return "going on from its end"
    iteration = trainer.state.iteration
    return f"going on from iteration {iteration}" if iteration else start.said


@dataclass(frozen=True)
class Start:
    """Where a stage's weights come from. record: "random …", or their fingerprint. said: the same
    for people.
    """

    record: str
    said: str
    history: tuple[Past, ...]
    """The stages that they have been through, from the first; UNKNOWN where their file doesn't
    tell.
    """
    mean: tuple[float, float, float] | None = None
    """RGB, 0..255, that they learned with; None of random ones."""


def set_weights(run: Run, number: int, net: VGG) -> Start:
    """Give a stage's net its starting weights."""
    recipe = run.recipe
    stage = recipe.stages[number]
    generator = torch.Generator().manual_seed((recipe.seed * 1000 + number) % 2**63)
    randomise(net, recipe.random_layers, recipe.init_std, generator)
    normal = recipe.random_layers == "normal"
    how = f"standard deviation {recipe.init_std:g}" if normal else "Glorot's way"
    source = None
    before = recipe.before(number)
    if number == run.chosen[0] and run.start is not None:
        source = load(str(run.start), device="cpu", precision="float32")
    elif before is not None:
        source = load(_trained(run, before, stage.name), device="cpu", precision="float32")
    if source is None:
        record = f"random normal {recipe.init_std:g}" if normal else "random glorot"
        return Start(record, f"all layers random ({how})", ())
    _refuse_boxes(source)
    module = source.vgg("give a weights file of one")
    anew = _anew(run, number, source, module)
    copied = copy_layers(net, module, but=anew)
    learning = learning_layers(net, stage.learn)
    if stuck := [n for n in weight_layers(net) if n not in copied and n not in learning]:
        raise VggfeatError(
            f"stage {stage.name}: only {', '.join(learning)} would learn, but {', '.join(stuck)}"
            f" of {source.spec} can't be had, and would stay random: `set` STAGE.learn=all"
            + (" or fc" if all(n.startswith("fc") for n in stuck) else "")
        )
    mean = take_our_pixels(net, source.preprocessing)
    same = source.name == stage.net
    rest = "" if same and not anew else f"; the others random ({how})"
    what = "all layers" if same else ", ".join(copied)
    what += f" but {', '.join(anew)}" if same and anew else ""
    said = f"{what} from {source.spec} (net {source.name}){rest}"
    if stage.learn != "all":
        said += f"; only {', '.join(learning)} learn{'s' if len(learning) == 1 else ''}"
    return Start(source.fingerprint, said, history_of(source.metadata) or (UNKNOWN,), mean)


def _anew(run: Run, number: int, source: Network, module: VGG) -> tuple[str, ...]:
    """The layers of a start that are drawn anew, though it is of the same net, or of A."""
    if run.recipe.stages[number].task == LOCALISATION:
        # A.1: "the last fully-connected layer was initialised randomly and trained from scratch"
        return ("fc8",)
    if run.recipe.new_classes and number == run.chosen[0] and run.start is not None:
        # outputs in another order, or of unknown meaning, are no start
        same = source.classes == run.data.classes
        return tuple(n for n in FC_LAYERS if n not in module.layers or (n == "fc8" and not same))
    _same_classes(source, run.data.classes)
    return ()


def _refuse_idle(run: Run, number: int) -> None:
    """Refuse a stage that would have nothing to learn, or would keep random layers."""
    stage, classes = run.recipe.stages[number], run.data.classes
    if len(classes) < 2 and stage.task == CLASSIFICATION:
        raise VggfeatError(
            f"stage {stage.name}: {run.data.items.root} has one class, {classes[0]}: a net that"
            " says classes needs two or more"
        )
    started = run.start is not None and number == run.chosen[0]
    if stage.learn != "all" and not started and run.recipe.before(number) is None:
        raise VggfeatError(
            f"stage {stage.name}: only {stage.learn} would learn, and the other layers would stay"
            " random: give weights to start from, `from` FILE"
        )


def _trained(run: Run, number: int, after: str) -> Path:
    path = run.folder(number) / WEIGHTS
    if not path.exists():
        name = run.recipe.stages[number].name
        raise VggfeatError(
            f"stage {after} starts from {name}, whose weights are not at {path}: train it first, or"
            " give `from` FILE"
        )
    return path


def _refuse_boxes(source: Network) -> None:
    if source.boxes:
        raise VggfeatError(f"{source.spec} says boxes: a stage starts from a net that says classes")


def _same_classes(source: Network, classes: list[str]) -> None:
    if source.classes and source.classes != classes:
        odd = sorted(set(source.classes) ^ set(classes))
        what = f"{odd[0]!r} is in one and not in the other" if odd else "their order differs"
        raise VggfeatError(
            f"{source.spec} was trained on {len(source.classes)} classes, here are {len(classes)}:"
            f" {what}; stages of a chain need the same classes, and `recipe` finetune takes others"
        )
