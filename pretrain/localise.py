"""Localise as Appendix A tests it: from a central crop, of the true class (protocol 1); or densely,
of the likeliest classes, with greedy merging, over several Q, one net or several (protocol 2).

One net by protocol 1; by protocol 2 with a classification net; two nets together, each at its own
Q, for the classes of kept posteriors; the devkit's file of the test images; on four GPUs:

    python -m pretrain.localise --weights loc256.safetensors --data /imagenet --annotations boxes
    python -m pretrain.localise --weights loc256.safetensors --classifier d.safetensors \
        --data /imagenet --annotations boxes --page boxes.html
    python -m pretrain.localise --weights loc256.safetensors --scales 256 \
        --weights loc384.safetensors --scales 352,384 --posteriors de.h5 \
        --data /imagenet --annotations boxes
    python -m pretrain.localise --weights loc384.safetensors --classifier d.safetensors \
        --data /imagenet --split test --submission s.txt --devkit ILSVRC2012_devkit_t12
    torchrun --nproc-per-node 4 -m pretrain.localise --weights loc256.safetensors \
        --data /imagenet --annotations boxes

Exit status: 0 done; 1 it failed, one line says why; 2 usage; 3 done, but some images can't be read:
they count as errors and are listed (0 under torchrun, which takes any other status for a crash).
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes time
    from vggfeat.start import begin

    begin("pretrain.localise")

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pretrain.submission import refuse_unknown, write_localisation
from vggfeat.datasets.devkit import devkit_numbers
from vggfeat.errors import VggfeatError, WrongUsage, as_typed
from vggfeat.files import (
    check_outputs,
    refuse_inputs,
    refuse_inside,
    try_each,
    weights_files,
    write_json,
    write_text,
)
from vggfeat.options import (
    BatchSize,
    Json,
    Overwrite,
    OwnDevice,
    Precision,
    Strict,
    Workers,
    leave,
    refuse_repeated,
    sides_typed,
    typed,
    with_debug,
)
from vggfeat.terminal import (
    command,
    in_options,
    list_unreadable,
    out,
    print_columns,
    progress,
    run,
    say,
)

if TYPE_CHECKING:
    from pretrain.box_figures import Located, Truth
    from pretrain.locations import Guessed, Seen
    from vggfeat.datasets import Items
    from vggfeat.datasets.boxes import Boxes
    from vggfeat.ranks import Ranks
    from vggfeat.weights import Network

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Option = typer.Option
TRAINING_IMAGES = 20_000  # evenly spread, whose boxes give the constants


@app.command("localise", cls=Strict)
@with_debug
def localise_command(
    context: typer.Context,
    weights: Annotated[
        list[str],
        Option(help="A weights file of a localisation net; of several, the union of their boxes."),
    ],
    source: Annotated[
        Path | None,
        Option(
            "--annotations", help="True boxes: a folder of XML files (CLS-LOC, VOC), or a CSV file."
        ),
    ] = None,
    data: Annotated[
        Path,
        Option(
            "--data",
            "--root",
            envvar="VGGFEAT_DATA",
            help="The folder that holds train/WNID and val/WNID, or test, a flat folder.",
        ),
    ] = Path("data"),
    split: Annotated[
        Literal["val", "train", "test"],
        Option(help="Which images; those of test are without labels."),
    ] = "val",
    protocol: Annotated[
        int | None,
        Option(
            min=1,
            max=2,
            help=(
                "1: a central crop and the true class; 2: dense, and the five likeliest classes;"
                " default: 2 where these are known, by --classifier or --posteriors."
            ),
            show_default=False,
        ),
    ] = None,
    scales: Annotated[
        list[str],
        Option(
            help=(
                "Smallest sides Q in pixels, comma-separated: once for all nets, or once for"
                " each; default: the S of each."
            ),
            show_default=False,
        ),
    ] = [],  # noqa: B006
    classifier: Annotated[
        list[str],
        Option(
            help=(
                "A classification net, whose scores at each window rate the boxes, and which tells"
                " the classes unless --posteriors do; several fuse."
            ),
            show_default=False,
        ),
    ] = [],  # noqa: B006
    posteriors: Annotated[
        list[Path],
        Option(
            help="Kept posteriors that tell the classes, of pretrain.evaluate; several fuse.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    mode: Annotated[
        Literal["dense", "crops", "both", "centre"],
        Option(help="Which of the kept posteriors: dense, crops, both averaged, or centre."),
    ] = "dense",
    merge_above: Annotated[
        float,
        Option(min=0, max=1, help="Two boxes are merged while their IoU is above this."),
    ] = 0.5,
    mirror: Annotated[
        bool, Option(help="Whether the boxes of the mirror image count, too (protocol 2).")
    ] = True,
    submission: Annotated[
        Path | None,
        Option(help="Also write five classes and boxes an image, as the devkit scores them."),
    ] = None,
    devkit: Annotated[
        Path | None, Option(help="The folder ILSVRC2012_devkit_t12, for --submission.")
    ] = None,
    page: Annotated[
        Path | None, Option(help="Also write a page that draws boxes on images, worst and best.")
    ] = None,
    json_file: Json = None,
    ledger: Annotated[
        Path | None,
        Option(help="The page whose Tables 8 to 10 have these figures.", show_default=False),
    ] = None,
    overwrite: Overwrite = False,
    limit: Annotated[
        int, Option(min=0, help="Only so many images, evenly spread; 0: all of them.")
    ] = 0,
    batch_size: BatchSize = None,
    device: OwnDevice = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
) -> None:
    """Print localisation errors as the paper does, beside those of constants."""
    protocol = protocol or (2 if classifier or posteriors else 1)
    qs = [sides_typed(text) for text in scales]
    _refuse_contradictions(typed(context), protocol, split, len(weights), qs)
    refuse_repeated("--weights", weights)
    refuse_repeated("--classifier", classifier)
    refuse_repeated("--posteriors", posteriors)
    inputs = [*posteriors, *weights_files(*weights, *classifier), data, devkit, source]
    texts = {"--submission": submission, "--page": page, "--json": json_file}
    check_outputs({}, texts=texts, inputs=inputs, overwrite=overwrite)
    for folder in (source, devkit):
        refuse_inside(texts, folder)
    if ledger is not None:
        from pretrain.ledger import THEIRS, check_ledger

        updated = {"--ledger": ledger, "the cells beside it": ledger.with_name(THEIRS)}
        check_outputs(updated, inputs=inputs, overwrite=True)  # in place, by design
        check_ledger(ledger)
    numbers = devkit_numbers(devkit) if devkit is not None else {}
    # PyTorch is imported from here on: wrong options are answered at once
    from pretrain.posteriors import images_of
    from vggfeat import datasets
    from vggfeat.ranks import joined

    with joined(device) as ranks:
        items = images_of(data, split, limit)
        for remark in items.remarks if ranks.first else ():
            say(in_options(remark))
        refuse_inputs(texts, items.paths())
        asked = Asked(
            protocol=protocol,
            weights=weights,
            scales=qs,
            classifiers=classifier,
            posteriors=posteriors,
            mode=mode,
            above=merge_above,
            mirror=mirror,
            numbers=numbers if submission else {},
            precision=precision,
            how={"batch_size": batch_size, "workers": workers or ranks.cores},
        )
        boxes, every = None, None
        if source is not None and ranks.first:
            every = datasets.load("imagenet", data)
            boxes = _true_boxes(source, items, every)
        found, seen = asked.localise(items, split, ranks)
        if not ranks.first:
            return
        shares = {}
        if source is not None and every is not None:
            shares = _training_shares(source, every, found[0].classes)
    made = Made(protocol, found, seen, items, boxes, shares, split)
    made.write(submission, numbers, page, json_file, ledger)
    leave(seen.failures)


def _refuse_contradictions(
    given: set[str], protocol: int, split: str, nets: int, scales: Sequence[tuple[int, ...]]
) -> None:
    """Options that don't go together, that miss one, or that would change nothing. given: the
    names of those that are typed.
    """
    if protocol == 2 and not given & {"classifier", "posteriors"}:
        raise WrongUsage(
            "--protocol 2 needs the classes of each image: --classifier or --posteriors"
        )
    if len(scales) not in (0, 1, nets):
        raise WrongUsage(f"--scales is there {len(scales)} times: give it once, or once a net")
    if protocol == 1 and any(len(each) > 1 for each in scales):
        raise WrongUsage("--protocol 1 is of one central crop: give --scales one Q")
    if "source" not in given and "submission" not in given:
        raise WrongUsage("give --annotations, with the true boxes, or --submission")
    if split == "test" and given & {"source", "page", "json_file", "ledger"}:
        raise WrongUsage(
            "--split test has no labels to judge by: no --annotations, --page, --json or --ledger"
        )
    if "ledger" in given and (split != "val" or "limit" in given):
        raise WrongUsage(
            "--ledger is of the whole validation set, as the paper's tables are: no --split or"
            " --limit with it"
        )
    if split == "test" and protocol == 1:
        raise WrongUsage("--protocol 1 takes the true class, which --split test doesn't have")
    if "submission" in given and "devkit" not in given:
        raise WrongUsage("--submission needs --devkit: its meta.mat has the numbers of the classes")
    for what_for, idle in (
        ("--protocol 2", ("classifier", "posteriors", "merge_above", "mirror", "submission")),
        ("--posteriors", () if "posteriors" in given else ("mode",)),
        ("--submission", () if "submission" in given else ("devkit",)),
        ("--annotations", () if "source" in given else ("page", "json_file", "ledger")),
    ):
        for name in () if what_for == "--protocol 2" and protocol == 2 else idle:
            if name in given:
                raise WrongUsage(f"`{name}` is for {what_for}: leave it out")


def _true_boxes(source: Path, items: Items, every: Items) -> Boxes:
    """Of the images, which are some of all; what doesn't fit is said."""
    from vggfeat.datasets.boxes import read_boxes

    boxes, remarks = read_boxes(source, items, every.names)
    for remark in remarks:
        say(remark)
    return boxes


def _training_shares(source: Path, every: Items, classes: Sequence[str]) -> dict[int, Any]:
    """Class -> its boxes in training images, as shares of them; {} where none are known. What
    doesn't fit is said: the images that are tested don't need it.
    """
    import numpy as np

    from pretrain.box_figures import shares_of
    from vggfeat.datasets.boxes import read_boxes

    train = every.splits.get("train", np.zeros(0, np.int64))
    if not len(train):
        return {}
    spread = np.linspace(0, len(train) - 1, min(len(train), TRAINING_IMAGES)).round()
    items = every.take(train[spread.astype(np.int64)])
    try:
        boxes, remarks = read_boxes(source, items, every.names)
    except VggfeatError as error:
        say(f"left out: the mean boxes of training images: {error}")
        return {}
    for remark in remarks:
        say(f"training images: {remark}")
    place = {name: k for k, name in enumerate(classes)}
    return {
        place[items.classes[label]]: shares
        for label, shares in shares_of(boxes, items).items()
        if items.classes[label] in place
    }


@dataclass(frozen=True)
class Asked:
    """What is to be localised, and how.

    scales: none: each net's own; one: of all; else of each. numbers: the devkit's, of each class
    that may be submitted; {} where nothing is. how: batch_size and workers.
    """

    protocol: int
    weights: Sequence[str]
    scales: Sequence[tuple[int, ...]]
    classifiers: Sequence[str]
    posteriors: Sequence[Path]
    mode: str
    above: float
    mirror: bool
    numbers: dict[str, int]
    precision: str
    how: dict[str, Any]

    def localise(self, items: Items, split: str, ranks: Ranks) -> tuple[list[Located], Seen]:
        """Where each net, and all together, say that things are. What can't be asked of a net in
        the end is refused first.
        """
        from pretrain.kept import refuse_twice
        from pretrain.locations import (
            columns_of,
            facts,
            fitting_scales,
            refuse_other_windows,
            refuse_unboxed,
        )
        from vggfeat.sources import of_words

        each = self.scales if len(self.scales) > 1 else [*self.scales, ()][:1] * len(self.weights)
        chosen, there = [], []
        guessing = self._may_say()
        for spec, asked in zip(self.weights, each, strict=True):
            network = self._load(spec, "cpu", "float32")
            with as_typed(of_words(spec)):
                chosen.append(fitting_scales(network, asked))
            columns_of(network, items.classes)
            for where, classes in guessing:
                refuse_unboxed(network, classes, where)
            there.append(facts(network))
        refuse_twice(there)
        if self.protocol == 1:
            return self._central(chosen, items, ranks)
        for spec in self.classifiers:
            refuse_other_windows(self._load(spec, "cpu", "float32"), there)
        return self._dense(chosen, self._guessed(items, split, ranks), items, ranks)

    def _may_say(self) -> list[tuple[str, list[str]]]:
        """Who tells which classes are likely, and which there are to choose among."""
        from pretrain.kept import KeptPosteriors

        if self.posteriors:
            return [(str(path), KeptPosteriors.read(path).classes) for path in self.posteriors]
        networks = [self._load(spec, "cpu", "float32") for spec in self.classifiers]
        return [(network.spec, network.classes or []) for network in networks]

    def _load(self, spec: str, device: Any, precision: str) -> Network:
        from vggfeat.sources import load

        return load(spec, device=device, precision=precision)

    def _central(
        self, scales: Sequence[tuple[int, ...]], items: Items, ranks: Ranks
    ) -> tuple[list[Located], Seen]:
        import numpy as np

        from pretrain.locations import central

        assert items.labels is not None
        labels_N, found = np.asarray(items.labels), []
        for spec, (q,) in zip(self.weights, scales, strict=True):
            network = self._load(spec, ranks.device, self.precision)
            with progress("localise", quiet=not ranks.first) as advance:
                located, seen = central(
                    network, items, labels_N, q, ranks, advance=advance, **self.how
                )
            found.append(located)
        return found, seen

    def _guessed(self, items: Items, split: str, ranks: Ranks) -> Guessed:
        """The likeliest classes of the images, in every process."""
        from pretrain.kept import KeptPosteriors, refuse_twice
        from pretrain.locations import guesses, rated_by
        from pretrain.posteriors import evaluate

        if self.posteriors:
            where = " and ".join(map(str, self.posteriors))
            kept = KeptPosteriors.joined(
                (str(path), KeptPosteriors.read(path)) for path in self.posteriors
            )
        else:
            where = " and ".join(self.classifiers)
            networks = (self._load(spec, ranks.device, self.precision) for spec in self.classifiers)
            with progress("classify", quiet=not ranks.first) as advance:
                kept = evaluate(
                    networks, (), ("dense",), items, split, ranks, advance=advance, **self.how
                )
        refuse_twice(net.facts for net in kept.nets)
        if self.numbers:
            refuse_unknown(kept.classes, self.numbers)
        if not ranks.first:  # where the posteriors are a part of all
            guessed: Guessed = ranks.same(None)
            return guessed
        guessed = guesses(kept, self.mode, items, where)
        if self.posteriors and self.classifiers:
            rating = rated_by(
                self._load(spec, "cpu", "float32").fingerprint for spec in self.classifiers
            )
            guessed = replace(guessed, told_by=guessed.told_by + rating)
        ranks.same(guessed)
        return guessed

    def _dense(
        self,
        scales: Sequence[tuple[int, ...]],
        guessed: Guessed,
        items: Items,
        ranks: Ranks,
    ) -> tuple[list[Located], Seen]:
        from pretrain.locations import dense

        networks, rating = (
            [self._load(spec, ranks.device, self.precision) for spec in specs]
            for specs in (self.weights, self.classifiers)
        )
        with progress("localise", quiet=not ranks.first) as advance:
            return dense(
                networks,
                scales,
                items,
                guessed,
                rating,
                ranks,
                above=self.above,
                mirror_too=self.mirror,
                advance=advance,
                **self.how,
            )


@dataclass(frozen=True)
class Made:
    """What was found, and what it is held against. shares: see `box_figures.constants`."""

    protocol: int
    found: Sequence[Located]
    seen: Seen
    items: Items
    boxes: Boxes | None
    shares: dict[int, Any]
    split: str

    def write(
        self,
        submission: Path | None,
        numbers: dict[str, int],
        page: Path | None,
        json_file: Path | None,
        ledger: Path | None,
    ) -> None:
        """Each file, and then what is printed; where one fails, the others all the same."""
        writes: list[Callable[[], object]] = []
        last = self.found[-1]
        if submission is not None:
            writes.append(
                partial(
                    write_localisation,
                    last,
                    self.items.names,
                    self.seen.sizes_N2,
                    numbers,
                    submission,
                )
            )
        if self.boxes is not None:
            writes.append(partial(self._figures, self._truth(), page, json_file))
            if ledger is not None:
                writes.append(partial(self.to_ledger, self.boxes, ledger))
        bad = {self.items.names[i]: why for i, why in sorted(self.seen.failures.items())}
        try_each(*writes, lambda: list_unreadable(bad))

    def to_ledger(self, boxes: Boxes, ledger: Path) -> None:
        """The cells of Tables 8 and 9, into the page; its tables printed."""
        from pretrain.box_cells import Boxed, images_with_boxes, write_box_tables

        truth = self._truth()
        judged = truth.judged
        images = images_with_boxes(
            self.items, self.split, self.found[0].classes, boxes, judged, self.seen.failures
        )
        found = [
            Boxed(
                one.nets,
                one.scales,
                one.wrong(truth, 1)[judged],
                one.wrong(truth, 5)[judged] if self.protocol == 2 else None,
                one.told_by,
                one.unlike,
            )
            for one in self.found
        ]
        write_box_tables(found, images, command(), ledger)

    def _truth(self) -> Truth:
        from pretrain.box_figures import Truth

        assert self.boxes is not None and self.items.labels is not None
        truth = Truth(self.items.labels, self.boxes)
        classes = self.found[0].classes
        if classes is self.items.classes:
            return truth
        return truth.named_as([classes.index(name) for name in self.items.classes])

    def _figures(self, truth: Truth, page: Path | None, json_file: Path | None) -> None:
        from pretrain.box_figures import constants, left_out, report

        last = self.found[-1]
        baselines = constants(last, self.seen.sizes_N2, self.shares)
        rows, (head, *lines) = report(self.protocol, self.found, baselines, truth)
        told = left_out(truth, self.items, last.classes)
        content = {
            "rows": rows,
            "dataset": self.items.dataset,
            "split": self.split,
            "left_out": told,
            "unreadable": {
                self.items.names[i]: why for i, why in sorted(self.seen.failures.items())
            },
            "command": command(),
        }
        bad = f", {len(self.seen.failures)} of them unreadable" if self.seen.failures else ""
        about = (
            f"{self.items.dataset} {self.split}, protocol {self.protocol}:"
            f" {truth.judged.sum()} of {len(self.items)} images{bad}"
        )
        for sentence in told:
            say(sentence)
        try_each(
            lambda: write_json(json_file, content),
            lambda: self._page(truth, page, [head, *lines]),
            lambda: print_columns(head, lines, range(5, len(head))),
            lambda: out.print(about),
        )

    def _page(self, truth: Truth, page: Path | None, shown: Sequence[Sequence[str]]) -> None:
        from pretrain.box_figures import write_page

        if page is not None:
            text = write_page(self.protocol, self.found[-1], truth, self.items, shown)
            write_text(page, text)


if __name__ == "__main__":
    run(app, "python -m pretrain.localise")
