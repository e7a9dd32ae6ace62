"""`vggfeat explain`: where in images the score of a class comes from."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vggfeat.errors import UnreadableImage, VggfeatError, WrongUsage
from vggfeat.files import (
    check_outputs,
    refuse_inputs,
    weights_files,
    whole,
    whole_folder,
    write_text,
)
from vggfeat.machine import size
from vggfeat.options import (
    CLASSIFIER,
    Device,
    Overwrite,
    leave,
    refuse_repeated,
    sides_typed,
    with_debug,
)
from vggfeat.place import local
from vggfeat.terminal import list_unreadable, out, progress, say

if TYPE_CHECKING:
    from vggfeat.explain import Evidence


@with_debug
def explain_command(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Images, folders, a CSV file or a list (.txt) of images, - for a list on stdin."
        ),
    ],
    out_name: Annotated[
        str,
        typer.Option(
            "--out",
            help="The page to write, .html; a picture of one image and class, .png; or a folder for"
            " pictures, DIR/.",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(help=CLASSIFIER, show_default=False),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Where the weights of the classifier's nets lie now, if they have moved; without"
            " --model: a net with fc8, whose own scores are explained.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            help="The class, by its name; may be given several times. Default: the best-scored.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1, help="So many of the best-scored classes, instead of one.", show_default=False
        ),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            help="Of a net alone: smallest sides in pixels, comma-separated; default: its own.",
            show_default=False,
        ),
    ] = None,
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror",
            help="Of a net alone: average with the mirror image; it does, by default.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Show where in images the score of a class comes from: the contribution of every position."""
    qs = None if scales is None else sides_typed(scales)
    out_file, kind = Path(out_name), _kind(out_name)
    _refuse_idle(model, weights, classes, top, qs is not None or mirror is not None)
    read = [*local(source), model, *weights_files(*(weights or []))]
    if kind == "folder":
        check_outputs({}, folders={"--out": out_file}, inputs=read, overwrite=overwrite)
    else:
        check_outputs({"--out": out_file}, inputs=read, overwrite=overwrite)
    from vggfeat.explain import FIGURES, Explainer
    from vggfeat.model import open_model
    from vggfeat.predict import images_of
    from vggfeat.sources import load

    if model is None:
        assert weights
        explainer = Explainer(load(weights[0], device=device), qs, mirror)
    else:
        explainer = Explainer(open_model(model, weights=weights or (), device=device))
    explainer.numbers(classes or [])
    rows = images_of(source, explainer.classes)
    refuse_inputs({"--out": out_file}, rows.paths())
    for line in rows.remarks:
        say(line)
    figures = len(rows) * len(classes or range(min(top or 1, len(explainer.classes))))
    if kind == "picture" and figures > 1:
        raise VggfeatError(
            f"--out {out_file} takes one picture, and {figures:,} are asked for: give a page,"
            " .html, or a folder, DIR/"
        )
    if kind == "page" and figures > FIGURES:
        raise VggfeatError(
            f"{figures:,} figures are more than {FIGURES} of a page: give fewer images or classes,"
            " or a folder for pictures, --out DIR/"
        )
    unreadable: dict[str, str] = {}
    labels = itertools.repeat(-1) if rows.labels is None else rows.labels

    def explained() -> Iterator[tuple[Evidence, str]]:
        """Each with the image's label, "" where it isn't known."""
        with progress("explain") as show:
            for i, (name, k) in enumerate(zip(rows.names, labels, strict=False)):
                show(i, len(rows))
                try:
                    of_image = explainer(name, classes, top or 1, name)
                except UnreadableImage as error:
                    unreadable[name] = str(error.__cause__)
                else:
                    yield of_image, explainer.classes[k] if k >= 0 else ""
            show(len(rows), len(rows))

    try:
        told = _write(out_file, kind, explained(), figures)
    finally:
        list_unreadable(unreadable)
    out.print(told, soft_wrap=True)
    leave(unreadable)


def _write(
    out_file: Path, kind: str, explained: Iterator[tuple[Evidence, str]], figures: int
) -> str:
    """All of it; what was written, in words. Raises VggfeatError where no image is left."""
    from vggfeat.explain import card, evidence_page

    if kind == "folder":
        with whole_folder(out_file) as folder:
            pictures = [
                _picture(folder / _file_name(i, k, of_image), of_image, k)
                for i, (of_image, _) in enumerate(explained)
                for k in range(len(of_image.classes))
            ]
            _refuse_nothing(pictures)
        return f"{out_file}: {len(pictures):,} pictures"
    if kind == "picture":
        ((of_image, _),) = _refuse_nothing(list(explained))
        with whole(out_file) as partial:
            _picture(partial, of_image, 0)
        return f"{out_file}: {of_image.says()}"
    cards, sees = [], ""
    for of_image, label in explained:
        cards.append(card(of_image, figures, label))
        sees = of_image.sees()
    text = evidence_page(_refuse_nothing(cards), sees)
    write_text(out_file, text)
    return f"{out_file}: {size(len(text))}"


def _refuse_nothing(made: list[Any]) -> list[Any]:
    if not made:
        raise VggfeatError("no image can be read: nothing is written")
    return made


def _picture(path: Path, of_image: Evidence, k: int) -> Path:
    from PIL import Image

    Image.fromarray(of_image.overlay(k)).save(path)
    return path


def _file_name(number: int, k: int, of_image: Evidence) -> str:
    """0007-0-image_0012-roses.png of the k-th class of an image, whatever both are called: the
    numbers alone tell them from each other.
    """
    words = f"{Path(of_image.name).stem[:80]}-{of_image.classes[k][:80]}"
    stem = re.sub(r"[^\w-]+", "_", words, flags=re.ASCII)
    return f"{number:04d}-{k}-{stem}.png"


def _kind(out_name: str) -> str:
    if out_name.endswith("/"):
        return "folder"
    kinds = {".html": "page", ".png": "picture"}
    if (ending := Path(out_name).suffix.lower()) not in kinds:
        raise WrongUsage(f"--out {out_name} must end in .html or .png, or be a folder, DIR/")
    return kinds[ending]


def _refuse_idle(
    model: Path | None,
    weights: list[str] | None,
    classes: list[str] | None,
    top: int | None,
    of_net: bool,
) -> None:
    """Options that change nothing, or can't be."""
    if model is None and not weights:
        raise WrongUsage("give --model, or --weights of a net whose own scores are explained")
    if model is None and weights and len(weights) > 1:
        raise WrongUsage("--weights without --model is of one net: give one")
    if model is not None and of_net:
        raise WrongUsage(
            "--scales and --mirror are of a net alone: --model describes images as it learned"
        )
    if classes and top:
        raise WrongUsage("--class names the classes, --top takes the best: give one of them")
    refuse_repeated("--class", classes or [])
