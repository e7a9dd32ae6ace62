"""What `reproduce` does with a graph of steps: train each, and ask the trained nets for the figures
of every table. What exists is used, and nothing is done twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.box_cells import images_with_boxes
from pretrain.box_figures import Truth
from pretrain.graph import BY_BOXES, BY_POSTERIORS, JITTERED, Step
from pretrain.kept import KeptPosteriors
from pretrain.ledger import THEIRS, read_cells, sections, with_section
from pretrain.loader import TrainingSet
from pretrain.localise import Asked as Localising
from pretrain.localise import Made
from pretrain.locations import rated_by, told_by
from pretrain.merging import MERGED_ABOVE
from pretrain.plan import Trials
from pretrain.posteriors import GRID, images_of
from pretrain.readers import Readers
from pretrain.recipe import CLASSIFICATION, LOCALISATION, identity
from pretrain.replica import passes
from pretrain.runs import (
    Trained,
    asked_of,
    measure_net,
    nets_of,
    rows_of,
    wanted_rows,
    write_tables,
)
from pretrain.stages import COLOURS, Run, train_stages
from pretrain.tables import BOXES, PAPER, BoxNet, Cell, Member, PaperRow, box_scales
from pretrain.trainer import Machine
from pretrain.watch import Stop
from vggfeat import datasets, ledger, protocols
from vggfeat import transfer as transfer_tables
from vggfeat.checked import read_text
from vggfeat.classify import problem_from
from vggfeat.datasets import Items
from vggfeat.datasets.boxes import Boxes, read_boxes
from vggfeat.errors import Interrupted, VggfeatError
from vggfeat.extract import extract
from vggfeat.files import write_text
from vggfeat.ranks import Ranks
from vggfeat.sources import load
from vggfeat.store import open_features
from vggfeat.table1 import FC_CHANNELS
from vggfeat.terminal import command, in_options, out, progress, say
from vggfeat.transfer import cell_of, write_cell
from vggfeat.weights import trained_at
from vggfeat.writer import stamp

POSTERIORS, FEATURES = "posteriors", "features"  # folders of a seed
ACTION = "voc2012action"
VOC_Q, CALTECH_Q = 5, 3  # how many scales, a step apart (Appendix B)


@dataclass(frozen=True)
class Asked:
    """What is reproduced, of what, where and by whom. tables: those whose data are given. source:
    of the true boxes of `data`.
    """

    data: Path
    out: Path
    page: Path
    tables: Sequence[int]
    images: TrainingSet
    ranks: Ranks
    machine: Machine
    readers: Readers
    source: Path | None
    voc: Path | None
    caltech: Path | None

    def run_of(self, step: Step) -> Run:
        """The run that trains a step."""
        # measured once: they are of the images, and not of a net or a seed
        colours = min(self.out.glob(f"seed*/*/{COLOURS}"), default=None)
        run = Run(
            step.recipe,
            [step.number],
            self.images,
            self.out / step.seed / step.run,
            step.start.weights(self.out) if step.start else None,
            self.ranks.same(colours),
            self.ranks,
            self.machine,
        )
        return run.fitted()

    @property
    def how(self) -> dict[str, Any]:
        """How images are described and scored."""
        return {"batch_size": None, "workers": self.ranks.cores}

    def roots(self) -> dict[str, Path]:
        """Data set -> where it is looked for, of those that the tables are of."""
        of_table = {
            11: {
                "voc2007": self.voc,
                "voc2012": self.voc,
                "caltech101": self.caltech,
                "caltech256": self.caltech,
            },
            12: {ACTION: self.voc},
        }
        return {
            name: root
            for table, roots in of_table.items()
            for name, root in roots.items()
            if root is not None and table in self.tables
        }

    def ledgers(self) -> list[Path]:
        """The files of cells of Tables 3 to 9 that are beside the page."""
        there = sorted(self.page.parent.glob("ledger-*.json"))
        return [path for path in there if path.name != transfer_tables.CELLS]

    def cells(self) -> list[Cell]:
        """All of them."""
        return [cell for path in self.ledgers() for cell in read_cells(path)]


def train(asked: Asked, steps: Sequence[Step], stop: Stop) -> dict[str, str]:
    """Train each step that isn't done; name -> reason of training images that can't be read.

    Raises Interrupted after a signal, all saved.
    """
    unreadable: dict[str, str] = {}
    for number, step in enumerate(steps, 1):
        if asked.ranks.first:
            say(f"{step.seed}/{step.name}, stage {number} of {len(steps)}")
        ended = train_stages(asked.run_of(step), stop, asked.readers)
        unreadable |= ended.unreadable
        if not ended.finished:
            raise Interrupted("stopped and saved; the same command goes on", stop.signal)
    return unreadable


@dataclass(frozen=True)
class Validation:
    """The validation images, what their files are, and their true boxes. In the first process,
    where they are compared with what was measured before; in the others crc32_N is zeros.
    """

    items: Items
    crc32_N: np.ndarray
    boxes: Boxes | None

    @classmethod
    def of(cls, asked: Asked) -> Validation:
        """Reads every file once."""
        items, first = images_of(asked.data, "val", 0), asked.ranks.first
        crc32_N = np.zeros(len(items), np.uint32)
        with progress("reading", quiet=not first) as advance:
            for i in range(len(items) if first else 0):
                with suppress(OSError):  # 0, as where an image can't be read
                    crc32_N[i] = stamp(items.source(i))[3]
                advance(i + 1, len(items))
        boxes = None
        if asked.source is not None and first:
            # what is to be said of them was said of all images
            boxes, _ = read_boxes(asked.source, items)
        return cls(items, crc32_N, boxes)

    def same(self, kept: KeptPosteriors) -> bool:
        """Whether posteriors are of these files, in these classes."""
        assert self.items.labels is not None
        truth = [self.items.classes[label] for label in self.items.labels]
        theirs = [kept.classes[label] for label in kept.labels]
        if kept.names != self.items.names or theirs != truth or not len(kept.crc32):
            return False
        return bool((kept.crc32 == self.crc32_N)[kept.crc32 > 0].all())


def classify(asked: Asked, steps: Sequence[Step], images: Validation) -> None:
    """Tables 3 to 7, of posteriors that are kept net by net, so that what is measured isn't
    measured again.
    """
    numbers = [n for n in asked.tables if n in BY_POSTERIORS]
    ranks = asked.ranks
    if not numbers:
        return
    found = nets_of([step.weights(asked.out) for step in steps]) if ranks.first else []
    nets: list[Trained] = ranks.same(found)
    parts: list[tuple[str, KeptPosteriors]] = []
    for i, rows in wanted_rows(numbers, nets).items():
        kept = _posteriors(asked, nets[i], rows, images)[1]
        if kept is not None:
            parts.append((nets[i].weights, kept))
    if ranks.first:
        write_tables(numbers, KeptPosteriors.joined(parts), asked.page)
    ranks.barrier()


def _posteriors(
    asked: Asked, net: Trained, rows: Sequence[PaperRow], images: Validation
) -> tuple[Path, KeptPosteriors | None]:
    """A net's posteriors as rows want them, measured unless they are kept, and their file. In the
    first process complete.
    """
    ranks, stage = asked.ranks, Path(net.weights).parent
    folder = stage.parents[1] / POSTERIORS
    path = folder / f"{stage.parent.name}-{stage.name}.h5"
    kept = _kept(asked, path, net, rows, images) if ranks.first else None
    if ranks.same(kept is None):
        precision = asked.machine.precision
        kept = measure_net(net, rows, images.items, "val", ranks, precision, asked.how)
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            kept.save(path)
        ranks.barrier()
    return path, kept


def _kept(
    asked: Asked, path: Path, net: Trained, rows: Sequence[PaperRow], images: Validation
) -> KeptPosteriors | None:
    """A net's posteriors, where they are kept for these images, in this precision, at the Q and
    modes that are asked; else None.
    """
    if not path.exists():
        return None
    kept = KeptPosteriors.read(path)
    scales, modes = asked_of(net, rows)
    (its,) = kept.nets
    told = its.facts["fingerprint"], its.facts["precision"]
    same = told == (_fingerprint(Path(net.weights)), asked.machine.precision)
    there = {*scales} <= {*its.scales} and {*modes} <= {*its.modes}
    return kept if same and there and images.same(kept) else None


def _fingerprint(weights: Path) -> str:
    return load(str(weights), device="cpu", precision="float32").fingerprint


def write_page(asked: Asked) -> None:
    """All cells that there are, into the page, also where a run before was ended between the two;
    what stands in it of others stays.
    """
    before = read_text(asked.page, "ledger") if asked.page.exists() else ""
    text = before
    for path in asked.ledgers():
        for heading, cells in sections(read_cells(path), path.name == THEIRS).items():
            text = with_section(text, heading, cells)
    for heading, part in transfer_tables.sections(
        transfer_tables.read_cells(asked.page.with_name(transfer_tables.CELLS))
    ).items():
        body = transfer_tables.section_markdown(heading, part)
        text = ledger.with_section(text, heading, body)
    if text != before:
        write_text(asked.page, text)


# --- what it will take ----------------------------------------------------------------------------

ASPECT = 4 / 3  # of a photograph, which a dense pass is reckoned for


@dataclass(frozen=True)
class Cost:
    """Of asking trained nets. what: in words. seconds: on one device. size: bytes of its files."""

    what: str
    seconds: float
    size: int


def costs(asked: Asked, steps: Sequence[Step], trials: Trials) -> Iterator[Cost]:
    """Of all that a seed's nets are asked, by arithmetic from the trials of training them."""
    forward = {
        step.name: trials[_stage(step).net, _stage(step).learn, _stage(step).boxes][0]
        / passes(_stage(step).learn)
        for step in steps
    }
    n, K = len(asked.images.val), len(asked.images.classes)

    def views(step: Step, Q: int, mode: str = "dense") -> float:
        """Crops that take as long as an image."""
        dense = 2 * ASPECT * (Q / step.recipe.crop) ** 2
        return {"dense": dense, "crops": 2.0 * GRID * GRID, "centre": 1.0}[mode]

    if numbers := [table for table in asked.tables if table in BY_POSTERIORS]:
        nets = [(step, _planned(step)) for step in steps if _stage(step).task != LOCALISATION]
        rows = rows_of(numbers, [net.member for _, net in nets])
        seconds, size = 0.0, 0
        for step, net in nets:
            its = [row for row in rows if net.member in row.members]
            scales, modes = asked_of(net, its) if its else ([], [])
            each = sum(views(step, Q, mode) for Q in scales for mode in modes)
            seconds += n * each * forward[step.name]
            size += 4 * n * K * len(scales) * len(modes)
        yield Cost("posteriors of Tables 3 to 7", seconds, size)
    if any(table in asked.tables for table in BY_BOXES):
        boxed = [step for step in steps if _stage(step).task == LOCALISATION]
        each = sum(
            forward[step.name] * sum(views(step, Q) for Q in _Q(step, True)) for step in boxed
        )
        yield Cost("boxes of Tables 8 to 10", n * each, 0)
    describing = [step for step in steps if _planned(step).member in JITTERED]
    for dataset, root in asked.roots().items():
        if (items := _there(dataset, root)) is not None:
            Q = [scales_at(_stage(step).train_scale, dataset) for step in describing]
            each = sum(
                forward[step.name] * sum(views(step, q) for q in qs)
                for step, qs in zip(describing, Q, strict=True)
            )
            fc7 = round(FC_CHANNELS * describing[0].recipe.width)
            sides = 3 if dataset == ACTION else 1  # the image twice, the box once
            size = 4 * len(items) * fc7 * sum(map(len, Q)) * sides
            yield Cost(f"descriptors of {dataset}", len(items) * each * sides, size)


def _planned(step: Step) -> Trained:
    """The net that a step will leave."""
    stage, recipe = _stage(step), step.recipe
    told = identity(recipe, stage.name)
    return Trained(
        stage.net,
        stage.train_scale,
        recipe.crop,
        stage.learn,
        told.recipe,
        step.name,
        recipe.seed,
        told.stands_for,
        told.changes,
        task=stage.task,
    )


# --- Tables 8 to 10 -------------------------------------------------------------------------------


def localise(asked: Asked, steps: Sequence[Step], images: Validation) -> None:
    """Tables 8 to 10, of the nets that say boxes: each alone by protocol 1; by protocol 2 at its S,
    and all those of Table 9 at its last row's Q, alone and together. "Our best-performing
    classification system" (A.2) says which classes are likely: the jittered D and E, crops and
    dense; their dense maps rate the boxes.
    """
    if asked.source is None:
        return
    boxed = {_name(step): step for step in steps if _stage(step).task == LOCALISATION}
    for table in (8, 9):
        if table not in asked.tables and not (table == 9 and 10 in asked.tables):
            continue
        nets = [net for row in BOXES if row.table == table for net in row.nets]
        its = [boxed[name] for name in dict.fromkeys(n.name for n in nets) if name in boxed]
        if table == 8:
            for step in its:
                _locate(asked, images, [step], [_Q(step, lower=False)])
            continue
        classifiers = _classifiers(asked, steps)
        if not classifiers:
            if asked.ranks.first:
                say("left out: table 9, whose classes a D or E with scale jitter would say")
            continue
        best = [row for row in PAPER if row.members == JITTERED and row.mode == "both"]
        said = [nets_of([Path(path)])[0] for path in classifiers] if asked.ranks.first else []
        files = [_posteriors(asked, net, best, images)[0] for net in asked.ranks.same(said)]
        together = [_Q(step, lower=step is its[-1]) for step in its]
        for step, Q in zip(its, together, strict=True):
            alone = _Q(step, lower=False)
            if alone != Q or len(its) == 1:  # else it has its row there
                _locate(asked, images, [step], [alone], classifiers, files)
        if len(its) > 1:
            _locate(asked, images, its, together, classifiers, files)


def _stage(step: Step) -> Any:
    return step.recipe.stages[step.number]


def _name(step: Step) -> str:
    """As Tables 8 and 9 call it, without Q."""
    stage = _stage(step)
    S = identity(step.recipe, stage.name).stands_for
    return BoxNet(stage.net, S, stage.boxes, stage.learn, "").name


def _Q(step: Step, lower: bool) -> tuple[int, ...]:
    return box_scales(_stage(step).train_scale, step.recipe.crop, lower)


def _classifiers(asked: Asked, steps: Sequence[Step]) -> list[str]:
    """The jittered D and E, as far as there are any."""
    found = []
    for step in steps:
        stage = _stage(step)
        S = identity(step.recipe, stage.name).stands_for
        if Member(stage.net, S, stage.learn) in JITTERED and stage.task == CLASSIFICATION:
            found.append(str(step.weights(asked.out)))
    return found


def _locate(
    asked: Asked,
    images: Validation,
    its: Sequence[Step],
    scales: Sequence[tuple[int, ...]],
    classifiers: Sequence[str] = (),
    posteriors: Sequence[Path] = (),
) -> None:
    """Test nets, alone and together, unless their cells are there. By protocol 2 where
    classifiers rate the boxes, for the classes of posteriors.
    """
    ranks, items = asked.ranks, images.items
    weights = [step.weights(asked.out) for step in its]
    there = ranks.first and _tested(asked, images, weights, scales, classifiers, posteriors)
    if ranks.same(there):
        return
    asking = Localising(
        protocol=2 if classifiers else 1,
        weights=list(map(str, weights)),
        scales=list(scales),
        classifiers=list(classifiers),
        posteriors=list(posteriors),
        mode="both",
        above=MERGED_ABOVE,
        mirror=True,
        numbers={},
        precision=asked.machine.precision,
        how=asked.how,
    )
    found, seen = asking.localise(items, "val", ranks)
    if images.boxes is not None:
        made = Made(asking.protocol, found, seen, items, images.boxes, {}, "val")
        made.to_ledger(images.boxes, asked.page)
    ranks.barrier()


def _tested(
    asked: Asked,
    images: Validation,
    weights: Sequence[Path],
    scales: Sequence[tuple[int, ...]],
    classifiers: Sequence[str],
    posteriors: Sequence[Path],
) -> bool:
    """Whether a cell is there of these nets and Q, of these files and boxes, by these
    classifiers. (Not where an image can't be read: its cell doesn't have its file's checksum.)
    """
    assert images.boxes is not None and images.items.labels is not None, "the first process"
    judged = Truth(images.items.labels, images.boxes).judged
    classes = images.items.classes
    ours = images_with_boxes(
        images.items, "val", classes, images.boxes, judged, crc32_N=images.crc32_N
    )
    teller = ""
    if classifiers:
        nets = [net for path in posteriors for net in KeptPosteriors.read(path).nets]
        words = told_by([(net.facts, net.scales) for net in nets], "both")
        words += rated_by(_fingerprint(Path(path)) for path in classifiers)
        teller = hashlib.sha256(words.encode()).hexdigest()
    precision = asked.machine.precision
    prints = [(_fingerprint(path), precision) for path in weights]
    Q = " + ".join(dict.fromkeys(",".join(map(str, each)) for each in scales))
    return any(
        (cell.table, cell.Q, cell.classifier) == (9 if classifiers else 8, Q, teller)
        and (cell.image_set, cell.box_set) == (ours.image_set, ours.box_set)
        and [(net.fingerprint, net.precision) for net in cell.nets] == prints
        for cell in asked.cells()
    )


# --- Tables 11 and 12 -----------------------------------------------------------------------------


def transfer(asked: Asked, steps: Sequence[Step]) -> None:
    """Tables 11 and 12: the jittered D and E describe each data set that is there, a linear SVM is
    scored on each of them and on both.
    """
    for dataset, root in asked.roots().items():
        items = _there(dataset, root, tell=asked.ranks.first)
        if items is None:
            continue
        for regions in ("image", "image,box") if dataset == ACTION else ("",):
            files = [_described(asked, path, items, regions) for path in _classifiers(asked, steps)]
            if asked.ranks.first:
                # Table 12 is of both nets together
                alone = [[path] for path in files] if dataset != ACTION else []
                for part in [*alone, *([files] if len(files) > 1 else [])]:
                    _score(asked, part)
            asked.ranks.barrier()


def _there(dataset: str, root: Path, tell: bool = False) -> Items | None:
    """A data set, unless it isn't under its root; which is told."""
    try:
        items = datasets.load(dataset, root)
        datasets.refuse_absent(items)
    except VggfeatError as error:
        if tell:
            say(f"left out: {dataset}: {in_options(str(error))}")
        return None
    return items


def _described(asked: Asked, weights: str, items: Items, regions: str) -> Path:
    """A net's feature file of a data set, made unless it is there."""
    network = load(weights, device=asked.ranks.device, precision=asked.machine.precision)
    S = trained_at(network.metadata["train_scale"])
    assert S is not None, "our own weights tell it"
    folder = Path(weights).parents[2] / FEATURES
    words = [network.name, items.dataset, *([regions.replace(",", "-")] if regions else [])]
    path = folder / f"{'-'.join(words)}.h5"
    there = path.exists() and open_features(path).description.fingerprint == network.fingerprint
    if asked.ranks.same(there):
        return path
    if asked.ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
    asked.ranks.barrier()
    with progress(path.stem, quiet=not asked.ranks.first) as advance:
        report = extract(
            items,
            network,
            path,
            scales=scales_at(S, items.dataset),
            regions=regions or None,
            workers=asked.ranks.cores,
            overwrite=True,
            command=command(),
            ranks=asked.ranks,
            progress=advance,
            say=say if asked.ranks.first else lambda line: None,
        )
    if report.unreadable and asked.ranks.first:
        say(f"{path}: {len(report.unreadable)} images can't be read")
    return path


def scales_at(train_scale: tuple[int, int], dataset: str) -> tuple[int, ...]:
    """Q of Appendix B, for the S that a net learned at: of [256, 512] they are 256, 384, 512 for
    Caltech, and 640, 768 besides for VOC.
    """
    low, high = train_scale
    number = VOC_Q if dataset.startswith("voc") else CALTECH_Q
    if low == high:
        return (low,)
    return tuple(low + (high - low) * k // 2 for k in range(number))


def _score(asked: Asked, files: Sequence[Path]) -> None:
    """A linear SVM on feature files, and its cell."""
    problem, _, made = problem_from(list(files), None, None)
    say(f"linear SVM on {' and '.join(path.stem for path in files)}")
    outcome = protocols.run(problem)
    results = replace(outcome.results, made=replace(made, command=command()))
    heading, lines = write_cell(cell_of(results), asked.page)
    for line in ["", heading, "", *lines]:
        out.print(line, soft_wrap=True)
