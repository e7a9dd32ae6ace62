"""`vggfeat classify`, and `vggfeat svm`, its short way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vggfeat.errors import VggfeatError, WrongUsage
from vggfeat.files import check_outputs, refuse_same_names, try_each, write_json
from vggfeat.machine import CORES
from vggfeat.options import (
    Device,
    Json,
    Overwrite,
    Pool,
    StoredScales,
    costs_typed,
    layers_typed,
    refuse_repeated,
    sides_typed,
    typed,
    with_debug,
)
from vggfeat.place import local
from vggfeat.results import K_NEAREST, TEMPERATURE
from vggfeat.terminal import (
    command,
    in_options,
    out,
    print_columns,
    print_table,
    progress,
    refused_otherwise,
    say,
)

if TYPE_CHECKING:
    from vggfeat.problem import Problem
    from vggfeat.protocols import Outcome
    from vggfeat.results import Results
    from vggfeat.store import Description


OF_HEADS = {
    "C": ("svm", "logistic", "ridge"),
    "k": ("knn",),
    "temperature": ("knn",),
    "loss": ("svm",),
    "solver": ("svm",),
    "dry_run": ("svm",),
    "device": ("svm", "logistic"),
    "ledger": ("svm",),
}
"""Option -> heads that it says something to."""
SHOWN = 20  # rows of a table of values of C, or of classes, at most; of more there is none


@with_debug
def classify_command(
    context: typer.Context,
    features: Annotated[
        list[str],
        typer.Option(
            metavar="PATH",
            help=(
                "A feature file, or a set of shards; several of one dataset are stacked (fusion of"
                " nets)."
            ),
        ),
    ],
    head: Annotated[
        Literal["svm", "logistic", "ridge", "knn"],
        typer.Option(
            help="The classifier: linear SVMs, logistic or ridge regression, nearest neighbours."
        ),
    ] = "svm",
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help=(
                "Which of the stored layers is used, where there are several; of several files one,"
                " or one each, comma-separated."
            ),
            show_default=False,
        ),
    ] = None,
    pool: Pool = None,
    scales: StoredScales = None,
    C: Annotated[
        str,
        typer.Option(
            "--C",
            help="The weight of errors, of ridge 1 / alpha: a value or a list; auto: chosen on the"
            " validation part.",
        ),
    ] = "auto",
    k: Annotated[
        int, typer.Option(min=1, help="knn: how many of the nearest images vote.")
    ] = K_NEAREST,
    temperature: Annotated[
        float,
        typer.Option(min=1e-6, max=1e6, help="knn: of a vote's weight, exp(cosine / temperature)."),
    ] = TEMPERATURE,
    loss: Annotated[
        Literal["squared_hinge", "hinge"],
        typer.Option(help="svm: what it minimises, beside the norm of its weights."),
    ] = "squared_hinge",
    class_weight: Annotated[
        Literal["balanced"] | None,
        typer.Option(
            help="balanced: errors of small classes count for more, as in scikit-learn.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Draw the random splits anew from this seed; default: those in the file.",
            show_default=False,
        ),
    ] = None,
    submission: Annotated[
        Path | None,
        typer.Option(
            help="Also write VOC's comp2 (comp10) files of the test images into this folder."
        ),
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="Also save the classifier, but knn, in this HDF5 file."),
    ] = None,
    solver: Annotated[
        Literal["newton", "liblinear"],
        typer.Option(
            help="svm: newton trains all classes at once; liblinear is scikit-learn's, as a"
            " reference."
        ),
    ] = "newton",
    device: Device = "auto",
    workers: Annotated[
        int,
        typer.Option(
            min=1, help="Threads that train the SVMs.", show_default="as many as there are cores"
        ),
    ] = CORES,
    overwrite: Overwrite = False,
    json_file: Json = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="svm: print how often it trains and the memory that it takes, and write nothing.",
        ),
    ] = False,
    ledger: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Also put the figure into Table 11 or 12 of this page, beside the paper's; its"
                " cells are kept beside it."
            ),
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train and score a classifier by the dataset's protocol."""
    qs = None if scales is None else sides_typed(scales)
    cs = costs_typed(C)
    layers = layers_typed(layer, different=False) or ()
    if len(set(layers)) < 2:  # else two layers of one file may be stacked
        refuse_repeated("--features", features)
    _refuse_of_others(typed(context), head, out_file)
    if solver == "liblinear":
        _refuse_of_newton(context, dry_run)

    def check() -> None:
        check_outputs(
            {"--out": out_file},
            texts={} if dry_run else {"--json": json_file},
            folders={"--submission": submission},
            inputs=local(features),
            overwrite=overwrite,
        )
        if ledger:
            _check_ledger(ledger, [*local(features), out_file, json_file])

    if dry_run:
        outputs = {"--out": out_file, "--json": json_file, "--submission": submission}
        refuse_same_names({**outputs, "--ledger": ledger}, local(features))
        check_outputs({}, texts={"--json": json_file}, inputs=local(features), overwrite=overwrite)
    else:
        check()
    import torch

    from vggfeat import protocols
    from vggfeat.classify import problem_from
    from vggfeat.ranks import joined
    from vggfeat.results import seen_by_net
    from vggfeat.transfer import refuse_other_data

    protocols.grid_of(cs)
    with joined(device) as ranks:

        def tell(line: str) -> None:
            if ranks.first:
                say(in_options(line))

        problem, parts, made = problem_from(
            features,
            pool,
            qs,
            layers=layers,
            read=not dry_run,
            say=tell,
            processes=ranks.local_world,
        )
        if ledger:
            refuse_other_data(problem.dataset)
        if submission:
            _check_submission(submission, problem)
        if dry_run:
            if ranks.first:
                _plan_svm(json_file, problem, cs, seed, str(ranks.device))
                refused_otherwise(check)
            return
        # each takes memory at once, whether there is a core for it or not
        torch.set_num_threads(min(workers, ranks.cores))
        with progress(head, quiet=not ranks.first, unit="fits") as advance:
            outcome = protocols.run(
                problem,
                C=cs,
                seed=seed,
                loss=loss,
                solver=solver,
                device=str(ranks.device),
                class_weight=class_weight,
                head=head,
                k=k,
                temperature=temperature,
                progress=advance,
                say=tell,
            )
        results = replace(outcome.results, made=replace(made, command=command()))
        seen, scored = seen_by_net(results)
        if scored:
            tell(f"warning: the net was trained on {seen}")
        for line in results.same_images:
            tell(f"warning: {line}")

        if ranks.first:
            _put_svm(outcome, problem, parts, results, out_file, json_file, submission, ledger)


def _short(of: Callable[..., None], doc: str, **fixed: Any) -> Callable[..., None]:
    """A command with some of another's options as they are by default, and out of sight."""

    @wraps(of)
    def short(**given: Any) -> None:
        of(**given, **fixed)

    short.__doc__ = doc
    shown = inspect.signature(of)
    kept = [each for each in shown.parameters.values() if each.name not in fixed]
    short.__signature__ = shown.replace(parameters=kept)  # type: ignore[attr-defined]
    return short


svm_command = _short(
    classify_command,
    "Train and score linear SVMs by the dataset's protocol.",
    head="svm",
    k=K_NEAREST,
    temperature=TEMPERATURE,
)


def _check_submission(folder: Path, problem: Problem) -> None:
    from vggfeat.datasets.voc import check_submission

    if "test" not in problem.splits:
        raise VggfeatError(
            "--submission is of the test part, and these features have none: VOC's is described"
            " where its list of test images, test.txt, is there with the images"
        )
    test = problem.splits["test"]
    check_submission(folder, test, problem.classes, problem.names, problem.protocol)


def _put_svm(
    outcome: Outcome,
    problem: Problem,
    parts: tuple[Description, ...],
    results: Results,
    out_file: Path | None,
    json_file: Path | None,
    submission: Path | None,
    ledger: Path | None,
) -> None:
    """All that is written, and the results on the screen; where one fails, the others are still
    there.
    """
    from vggfeat.datasets.voc import write_submission
    from vggfeat.model import model_from, save_model

    def submit() -> None:
        if submission:
            scored = outcome.scored["test"]
            write_submission(
                submission,
                scored.rows,
                scored.scores,
                problem.classes,
                problem.names,
                problem.protocol,
            )

    def save() -> None:
        if out_file:
            save_model(out_file, model_from(outcome, problem.classes, parts, results))

    try_each(
        lambda: write_json(json_file, results.to_json()),
        save,
        submit,
        lambda: _print_results(results),
        lambda: _to_ledger(results, ledger),
    )


def _refuse_of_others(given: set[str], head: str, out_file: Path | None) -> None:
    """Options that are of other heads."""
    for name, heads in OF_HEADS.items():
        if name in given and head not in heads:
            option = f"--{name.replace('_', '-')}"
            raise WrongUsage(
                f"{option} is of --head {' or '.join(heads)}, not {head}: leave it out"
            )
    if head == "knn" and out_file:
        raise WrongUsage("nearest neighbours are no classifier that is saved: leave out --out")


def _refuse_of_newton(context: typer.Context, dry_run: bool) -> None:
    """Options that change nothing with liblinear."""
    for option in ("device", "workers"):
        if option in typed(context):
            raise WrongUsage(f"--solver liblinear runs on one core: leave out --{option}")
    if dry_run:
        raise WrongUsage("--dry-run tells what newton takes: leave out --solver liblinear")


def _plan_svm(
    json_file: Path | None,
    problem: Problem,
    C: str | list[float],
    seed: int | None,
    device: str,
) -> None:
    """What `vggfeat svm` would take, as a table and as JSON."""
    from vggfeat.results import images
    from vggfeat.solver import FREE
    from vggfeat.svm_plan import svm_plan

    planned = svm_plan(problem, C=C, seed=seed)
    fits, solver = planned.fits, planned.solver
    write_json(json_file, asdict(planned))

    def size(count: int) -> str:
        return f"{count / 1e6:,.1f} MB"

    unreadable = f" ({planned.unreadable:,} unreadable)" if planned.unreadable else ""
    further = f" (up to {fits.at_most:,})" if fits.at_most > fits.to_choose else ""
    chosen = f"{fits.to_choose:,}{further} to choose C, then " if fits.to_choose else ""
    where = (
        "held in memory"
        if planned.held
        else f"over {100 * planned.share:.3g} % of the memory: read from the files at each pass"
    )
    place = "on cpu"
    if device != "cpu":
        place += f"; {device} holds what takes up to {100 * FREE:g} % of its free memory"
    rows = [
        ("images", f"{planned.images:,}{unreadable}"),
        ("classes", f"{planned.classes:,}"),
        ("descriptor", f"{planned.descriptor:,} values"),
        ("fits", f"{chosen}{fits.final:,} with it, of at most {images(fits.images)}"),
        ("descriptors", f"{size(planned.X)} as float32, {where}"),
        ("reading them", size(planned.reading)),
        ("Gram matrix" if solver.gram else "second moment", size(solver.products)),
        ("state of the problems", f"{size(solver.states)}, {fits.problems:,} of them"),
        ("their exact systems", size(solver.factors)),
        ("blocks of rows", size(solver.blocks)),
        ("memory in all", f"{size(planned.bytes)} beside the program, {place}"),
    ]
    print_table("plan", rows)


def _check_ledger(page: Path, inputs: Sequence[Path | None]) -> None:
    """Refuse a page that can't be written, or isn't one, before the work."""
    from vggfeat.transfer import CELLS, check_page

    updated = {"--ledger": page, "the cells beside it": page.with_name(CELLS)}
    check_outputs(updated, inputs=inputs, overwrite=True)  # in place, by design
    check_page(page)


def _to_ledger(results: Results, page: Path | None) -> None:
    """The figure into the page, and the table that it is in, printed."""
    if page is None:
        return
    from vggfeat.transfer import cell_of, write_cell

    heading, lines = write_cell(cell_of(results), page)
    for line in ["", heading, "", *lines]:
        out.print(line, soft_wrap=True)


def _print_results(results: Results) -> None:
    from vggfeat.results import choice_columns, class_columns, summary, title

    print_table(title(results), summary(results))
    head, rows = choice_columns(results)
    if 0 < len(rows) <= SHOWN:
        print_columns(head, rows, range(len(head) - 1))
    head, rows = class_columns(results)
    if 0 < len(rows) <= SHOWN:
        print_columns(head, rows, range(1, len(head)))
