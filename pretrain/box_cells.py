"""Tables 8 and 9 of what nets said of boxes (Appendix A): their cells, and the ledger with them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from pretrain.kept import KeptPosteriors
from pretrain.runs import Trained, is_ilsvrc, put_into
from pretrain.tables import BoxRow, Cell, Learned, pack
from vggfeat.datasets import Items
from vggfeat.datasets.boxes import Boxes
from vggfeat.errors import VggfeatError
from vggfeat.ledger import plain_word
from vggfeat.writer import stamp


@dataclass(frozen=True)
class Images:
    """What boxes were looked for on. data: name of the images' folder; image_set: as of
    `KeptPosteriors`, so that they stand beside their errors of classes; box_set: digest of the true
    boxes; classes: how many to choose among; ilsvrc: as `runs.put_into`; unreadable: how many can't
    be read.
    """

    data: str
    split: str
    image_set: str
    box_set: str
    classes: int
    ilsvrc: bool = False
    unreadable: int = 0


def images_with_boxes(
    items: Items,
    split: str,
    classes: Sequence[str],
    boxes: Boxes,
    judged_N: np.ndarray,
    unreadable: Collection[int] = (),
    crc32_N: np.ndarray | None = None,
) -> Images:
    """What tells some images, their boxes and their files. classes: K names, all that were to
    choose among. judged_N: bool, those that an error is of. crc32_N: of the files; None: each is
    read for it.
    """
    assert items.labels is not None
    rows = np.flatnonzero(judged_N)
    place = {name: k for k, name in enumerate(classes)}
    labels = np.array([place[items.classes[items.labels[i]]] for i in rows], np.int64)
    names = [items.names[i] for i in rows]
    every = {
        i: int(stamp(items.source(i))[3] if crc32_N is None else crc32_N[i])
        for i in rows.tolist()
        if i not in unreadable
    }
    crc32 = [every.get(i, 0) for i in rows.tolist()]
    folder = items.root.absolute().name
    kept = KeptPosteriors(
        items.dataset,
        folder,
        split,
        names,
        labels,
        list(classes),
        {},
        [],
        np.array(crc32, np.uint32),
    )
    told = hashlib.sha256()
    own = judged_N[boxes.rows_M] & (boxes.labels_M == items.labels[boxes.rows_M])
    for row, corners in zip(boxes.rows_M[own].tolist(), boxes.corners_M4[own], strict=True):
        name = items.names[row].encode("utf-8", "surrogateescape")
        told.update(name + b"\0" + np.asarray(corners, "<f8").tobytes())
    return Images(
        folder,
        split,
        kept.image_set,
        told.hexdigest(),
        len(classes),
        is_ilsvrc(kept),
        crc32.count(0),
    )


@dataclass(frozen=True)
class Boxed:
    """What one or several nets, merged, found. facts: of each net, as `posteriors.facts_of`, and
    `boxes`, "scr" or "pcr". scales: Q of each.

    wrong_top1, wrong_top5: (N,) bool, of the images that are judged. Without the latter it was a
    central crop and the true class (Table 8: one net, one Q), else boxes of the likeliest classes
    (Table 9), told by `classifier`: what tells it from another, as its fingerprints and mode.
    unlike: as of `Located`; such a cell has a row of its own.
    """

    facts: Sequence[Mapping[str, str]]
    scales: Sequence[tuple[int, ...]]
    wrong_top1: np.ndarray
    wrong_top5: np.ndarray | None = None
    classifier: str = ""
    unlike: tuple[str, ...] = ()


def box_cell(found: Boxed, images: Images, command: str) -> Cell:
    """A cell of Table 8 or 9 that a command made, in a row of the paper's or one of its own. Raises
    VggfeatError: nets that don't tell how they were trained, or not alike; another part than the
    validation set.
    """
    if images.split != "val":
        raise VggfeatError(
            f"the boxes are of the {images.split} images: a table is of the validation set"
        )
    nets = [Trained.from_facts(facts) for facts in found.facts]
    if len({(net.recipe, net.changes, net.seed) for net in nets}) > 1:
        raise VggfeatError(
            f"{' and '.join(net.weights for net in nets)} are of different recipes or seeds: a row"
            " of a table is of nets that were trained alike"
        )
    judged, wrong = "top1", found.wrong_top1
    if found.wrong_top5 is not None:
        judged, wrong = "top5", found.wrong_top5
    its = [
        net.box_net(facts["boxes"], Q)
        for net, facts, Q in zip(nets, found.facts, found.scales, strict=True)
    ]
    row = BoxRow(8 if judged == "top1" else 9, tuple(its))
    scales = [",".join(map(str, Q)) for Q in found.scales]
    return Cell(
        row.table,
        row.name,
        row.mode,
        " + ".join(facts["train_scale"] for facts in found.facts),
        " + ".join(dict.fromkeys(scales)),
        100 * float(found.wrong_top1.mean()),
        None if found.wrong_top5 is None else 100 * float(found.wrong_top5.mean()),
        plain_word(images.data),
        images.split,
        len(wrong),
        images.classes,
        images.image_set,
        nets[0].recipe,
        [*nets[0].changes, *found.unlike],
        nets[0].seed,
        [
            Learned(facts["fingerprint"], net.epochs, net.training_set, facts["precision"])
            for net, facts in zip(nets, found.facts, strict=True)
        ],
        command,
        date.today().isoformat(),
        pack(wrong),
        images.box_set,
        hashlib.sha256(found.classifier.encode()).hexdigest() if found.classifier else "",
        judged,
        images.unreadable,
    )


def write_box_tables(found: Sequence[Boxed], images: Images, command: str, ledger: Path) -> None:
    """The cells of Tables 8 and 9 from what was found: printed beside the paper's, and put into the
    ledger, as `runs.write_tables` does.
    """
    cells = [box_cell(each, images, command) for each in found]
    tables = sorted({cell.table for cell in cells})
    put_into(ledger, cells, images.ilsvrc, [*tables, *([10] if 9 in tables else [])])
