"""What `reproduce` does with a graph of steps: train each, and ask the trained nets for the figures
of every table. What exists is used, and nothing is done twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.box_cells import images_with_boxes
from pretrain.box_figures import Truth
from pretrain.checkpoint import read_state
from pretrain.graph import BY_POSTERIORS, JITTERED, Step
from pretrain.kept import KeptPosteriors
from pretrain.ledger import THEIRS, read_cells, sections, with_section
from pretrain.loader import TrainingSet
from pretrain.localise import Asked as Localising
from pretrain.localise import Made
from pretrain.locations import UNLIKE, rated_by, told_by
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
from pretrain.watch import CHECKPOINT, Stop
from vggfeat import datasets, ledger, protocols
from vggfeat import transfer as transfer_tables
from vggfeat.checked import read_text
from vggfeat.classify import problem_from
from vggfeat.datasets import Items
from vggfeat.datasets.boxes import Boxes, read_boxes
from vggfeat.datasets.items import name_digest
from vggfeat.datasets.protocol import pool_of
from vggfeat.decode import read_rgb
from vggfeat.errors import Interrupted, NoData, UnreadableImage, VggfeatError, reason
from vggfeat.extract import extract, is_of
from vggfeat.features import open_features
from vggfeat.files import write_text
from vggfeat.ranks import Ranks
from vggfeat.sources import load
from vggfeat.store import Features
from vggfeat.svm import LinearSVM
from vggfeat.table1 import FC_CHANNELS
from vggfeat.tensors import metadata_of
from vggfeat.terminal import command, out, progress, say
from vggfeat.transfer import cell_of, write_cell
from vggfeat.transfer import read_cells as read_transfer
from vggfeat.weights import trained_at
from vggfeat.writer import stamp

POSTERIORS, FEATURES = "posteriors", "features"  # folders of a seed
ACTION = "voc2012action"
VOC_Q, CALTECH_Q = 5, 3  # how many scales, a step apart (Appendix B)


@dataclass(frozen=True)
class Asked:
    """What is reproduced, of what, where and by whom. tables: those whose data are given. source:
    of the true boxes of `data`. sets: the data sets of Tables 11 and 12 that are there.
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
    sets: dict[str, Items]

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

    def ledgers(self) -> list[Path]:
        """The files of cells of Tables 3 to 9 that are beside the page."""
        there = sorted(self.page.parent.glob("ledger-*.json"))
        return [path for path in there if path.name != transfer_tables.CELLS]

    def cells(self) -> list[Cell]:
        """All of them."""
        return [cell for path in self.ledgers() for cell in read_cells(path)]


def data_sets(
    tables: Collection[int], voc: Path | None, caltech: Path | None, each: bool
) -> tuple[dict[str, Items], dict[str, str]]:
    """Name -> the data sets of Tables 11 and 12, those of these tables that are under the roots
    that are given; and why others aren't. Raises VggfeatError where one is malformed; NoData where
    there is nothing at all, or, for `each` table, nothing for one.
    """
    roots = {
        11: {"voc2007": voc, "voc2012": voc, "caltech101": caltech, "caltech256": caltech},
        12: {ACTION: voc},
    }
    found: dict[str, Items] = {}
    lacking: dict[str, str] = {}
    places: dict[object, list[str]] = {}  # a root, or a table -> the data sets that it may have
    for number in {*tables} & {*roots}:
        for name, root in roots[number].items():
            if root is None:
                continue
            for place in (root, *([number] if each else [])):
                places.setdefault(place, []).append(name)
            try:
                items = datasets.load(name, root)
                datasets.refuse_absent(items)
                found[name] = items
            except NoData:
                option = "voc" if root is voc else "caltech"
                nothing = "nothing of it under" if root.is_dir() else "no folder"
                lacking[name] = f"{name}: there is {nothing} `{option}` {root}"
    for names in places.values():
        if not {*names} & {*found}:
            raise NoData("; ".join(lacking[name] for name in names))
    return found, lacking


@contextmanager
def remade(asked: Asked, steps: Sequence[Step]) -> Iterator[None]:
    """Inside, what to do about weights of ours that can't be read is told, whoever reads them."""
    try:
        yield
    except VggfeatError as error:
        ours = [str(step.weights(asked.out)) for step in steps]
        if not any(f"{path} can't be read" in str(error) for path in ours):
            raise
        told = str(error).replace(": fetch or save it again", "")
        raise VggfeatError(f"{told}; remove it, and the same command makes it again") from error


def state_of(asked: Asked, step: Step) -> str:
    """Whether a step is done, begun, or can't be gone on with, in a word or two."""
    weights = step.weights(asked.out)
    checkpoint = weights.with_name(CHECKPOINT)
    there = weights.exists()
    if not there and not checkpoint.exists():
        return "-"
    learned = name_digest(asked.images.names())
    try:
        if there:
            metadata_of(weights)
        if checkpoint.exists() and read_state(checkpoint)[1]["training set"] != learned:
            return "of other images"
    except VggfeatError:
        return "damaged"
    return "done" if there else "begun"


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

    crc32_N: 0 of an image that can't be read. unreadable: name -> reason.
    """

    items: Items
    crc32_N: np.ndarray
    unreadable: dict[str, str]
    boxes: Boxes | None

    @classmethod
    def of(cls, asked: Asked) -> Validation:
        """Reads every image once."""
        items, first = images_of(asked.data, "val", 0), asked.ranks.first
        crc32_N, unreadable = np.zeros(len(items), np.uint32), dict[str, str]()

        def look(i: int) -> tuple[int, str]:
            try:
                crc32 = stamp(items.source(i))[3]
                read_rgb(items.source(i))
            except (OSError, UnreadableImage) as error:
                return 0, reason(error)
            return crc32, ""

        with (
            ThreadPoolExecutor(asked.ranks.cores) as pool,
            progress("reading", quiet=not first) as advance,
        ):
            for i, (crc32, why) in enumerate(pool.map(look, range(len(items) if first else 0))):
                crc32_N[i] = crc32
                if why:
                    unreadable[items.names[i]] = why
                advance(i + 1, len(items))
        boxes = None
        if asked.source is not None and first:
            # what is to be said of them was said of all images
            boxes, _ = read_boxes(asked.source, items)
        return cls(items, crc32_N, asked.ranks.same(unreadable), boxes)

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
    try:
        kept = KeptPosteriors.read(path)
    except VggfeatError as error:
        say(f"measured again: {error}")
        return None
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
    with ledger.alone(asked.page):
        before = read_text(asked.page, "ledger") if asked.page.exists() else ""
        text = before
        for path in asked.ledgers():
            for heading, cells in sections(read_cells(path), path.name == THEIRS).items():
                text = with_section(text, heading, cells)
        for heading, part in transfer_tables.sections(
            read_transfer(asked.page.with_name(transfer_tables.CELLS))
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

    numbers = [table for table in asked.tables if table in BY_POSTERIORS]
    rates = any(table in asked.tables for table in (9, 10)) and asked.source is not None
    if numbers or rates:
        nets = [(step, _planned(step)) for step in steps if _stage(step).task != LOCALISATION]
        rows = rows_of(numbers, [net.member for _, net in nets])
        rows += _best() if rates else []
        seconds, size = 0.0, 0
        for step, net in nets:
            its = [row for row in rows if net.member in row.members]
            scales, modes = asked_of(net, its) if its else ([], [])
            each = sum(views(step, Q, mode) for Q in scales for mode in modes)
            seconds += n * each * forward[step.name]
            size += 4 * n * K * len(scales) * len(modes)
        what = "Tables 3 to 7 and 9" if rates else "Tables 3 to 7"
        yield Cost(f"posteriors of {what if numbers else 'Table 9'}", seconds, size)
    describing = [step for step in steps if _planned(step).member in JITTERED]
    boxed = {_name(step): step for step in steps if _stage(step).task == LOCALISATION}
    if passes_of := list(_passes(asked, boxed)):
        rating = sum(forward[step.name] for step in describing)
        each = 0.0
        for table, together, of_each in passes_of:
            mode = "centre" if table == 8 else "dense"
            for step, Qs in zip(together, of_each, strict=True):
                each += forward[step.name] * sum(views(step, q, mode) for q in Qs)
            # the classifiers' maps at every Q beside
            union = {q for Qs in of_each for q in Qs} if table == 9 else set()
            each += rating * sum(views(together[0], q) for q in union)
        yield Cost("boxes of Tables 8 to 10", n * each, 0)
    for dataset, items in asked.sets.items():
        at = [scales_at(_stage(step).train_scale, dataset) for step in describing]
        each = sum(
            forward[step.name] * sum(views(step, q) for q in Qs)
            for step, Qs in zip(describing, at, strict=True)
        )
        fc7 = round(FC_CHANNELS * describing[0].recipe.width)
        sides = 3 if dataset == ACTION else 1  # the image twice, the box once
        size = 4 * len(items) * fc7 * sum(map(len, at)) * sides
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
    boxed = {_name(step): step for step in steps if _stage(step).task == LOCALISATION}
    classifiers = _classifiers(asked, steps)
    files: list[Path] = []
    for table, its, scales in _passes(asked, boxed):
        if table == 8:
            _locate(asked, images, its, scales)
            continue
        if not classifiers:
            if asked.ranks.first:
                say("left out: table 9, whose classes a D or E with scale jitter would say")
            return
        if not files:
            said = [nets_of([Path(path)])[0] for path in classifiers] if asked.ranks.first else []
            nets = asked.ranks.same(said)
            files = [_posteriors(asked, net, _best(), images)[0] for net in nets]
        _locate(asked, images, its, scales, classifiers, files)


def _best() -> list[PaperRow]:
    """The rows of the system that says in Table 9 which classes are likely."""
    return [row for row in PAPER if row.members == JITTERED and row.mode == "both"]


def _passes(
    asked: Asked, boxed: Mapping[str, Step]
) -> Iterator[tuple[int, list[Step], list[tuple[int, ...]]]]:
    """What is localised for Tables 8 to 10: the table, nets and the Q of each. boxed: the nets that
    say boxes, by their names.
    """
    if asked.source is None:
        return
    for table in (8, 9):
        if table not in asked.tables and not (table == 9 and 10 in asked.tables):
            continue
        nets = [net for row in BOXES if row.table == table for net in row.nets]
        its = [boxed[name] for name in dict.fromkeys(n.name for n in nets) if name in boxed]
        together = [_Q(step, lower=table == 9 and step is its[-1]) for step in its]
        for step, Q in zip(its, together, strict=True):
            alone = _Q(step, lower=False)
            if table == 8 or alone != Q or len(its) == 1:  # else it has its row there
                yield table, [step], [alone]
        if table == 9 and len(its) > 1:
            yield table, its, together


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
    classifiers, tested as the paper does.
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
        and not any(change.startswith(UNLIKE) for change in cell.changes)
        for cell in asked.cells()
    )


# --- Tables 11 and 12 -----------------------------------------------------------------------------


def transfer(asked: Asked, steps: Sequence[Step]) -> dict[str, str]:
    """Tables 11 and 12: the jittered D and E describe each data set that is there, a linear SVM is
    scored on each of them and on both. Data set and name -> reason of images that can't be read.
    """
    unreadable: dict[str, str] = {}
    for dataset, items in asked.sets.items():
        for regions in ("image", "image,box") if dataset == ACTION else ("",):
            files = [_described(asked, path, items, regions) for path in _classifiers(asked, steps)]
            if asked.ranks.first:
                for file in map(open_features, files):
                    bad = sorted(file.errors.items())
                    unreadable |= {f"{dataset}: {file.names[i]}": why for i, why in bad}
                # Table 12 is of both nets together
                alone = [[path] for path in files] if dataset != ACTION else []
                for part in [*alone, *([files] if len(files) > 1 else [])]:
                    _score(asked, part)
            asked.ranks.barrier()
    shared: dict[str, str] = asked.ranks.same(unreadable)
    return shared


def _described(asked: Asked, weights: str, items: Items, regions: str) -> Path:
    """A net's feature file of a data set, made unless it is there."""
    network = load(weights, device=asked.ranks.device, precision=asked.machine.precision)
    S = trained_at(network.metadata["train_scale"])
    assert S is not None, "our own weights tell it"
    folder = Path(weights).parents[2] / FEATURES
    words = [network.name, items.dataset, *([regions.replace(",", "-")] if regions else [])]
    path = folder / f"{'-'.join(words)}.h5"
    scales = scales_at(S, items.dataset)
    there = asked.ranks.first and is_of(
        path, items, network, scales=scales, regions=regions or None
    )
    there = asked.ranks.same(there)
    if there and not asked.ranks.same(asked.ranks.first and bool(open_features(path).errors)):
        return path
    if asked.ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
    asked.ranks.barrier()
    with progress(path.stem, quiet=not asked.ranks.first) as advance:
        extract(
            items,
            network,
            path,
            scales=scales,
            regions=regions or None,
            workers=asked.ranks.cores,
            overwrite=not there,
            retry=there,  # what couldn't be read may have been brought back
            command=command(),
            ranks=asked.ranks,
            progress=advance,
            say=say if asked.ranks.first else lambda line: None,
        )
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
    """A linear SVM on feature files, and its cell, unless that is there."""
    page, pages = asked.page, asked.page.with_name(transfer_tables.CELLS)
    described = list(map(open_features, files))
    if any(_is_scored(cell, described) for cell in read_transfer(pages)):
        return
    problem, _, made = problem_from(list(files), None, None, say=say)
    say(f"linear SVM on {' and '.join(path.stem for path in files)}")
    outcome = protocols.run(problem)
    results = replace(outcome.results, made=replace(made, command=command()))
    heading, lines = write_cell(cell_of(results), page)
    for line in ["", heading, "", *lines]:
        out.print(line, soft_wrap=True)


def _is_scored(cell: transfer_tables.Cell, files: Sequence[Features]) -> bool:
    """Whether a cell is what `vggfeat svm` finds of these files of a data set, by its defaults."""
    parts = [file.description for file in files]
    nets = [(d.net, d.fingerprint, d.layer, list(d.scales), d.mirror) for d in parts]
    return (
        nets == [(n.name, n.fingerprint, n.layer, n.scales, n.mirror) for n in cell.nets]
        and (cell.dataset, cell.rows) == (files[0].attributes["dataset"], files[0].rows_digest)
        and cell.pool == pool_of(files[0].attributes["protocol"])[0]
        and cell.regions == ",".join(parts[0].regions)
        and cell.svm == protocols.solver_words(LinearSVM())
        and "seed" not in cell.drawn
        and transfer_tables.GIVEN not in cell.other
    )
