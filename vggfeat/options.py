"""The options that several commands share, each declared once, and what may be typed for one.

    @app.command("svm", cls=Strict)
    @with_debug
    def svm_command(scales: StoredScales = None, json_file: Json = None) -> None:
        qs = None if scales is None else sides_typed(scales)

A default that differs by command stands at the command. What is wrong on a command line is answered
at once: nothing here imports NumPy or PyTorch.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sized
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

import typer
from typer import Option
from typer.core import TyperCommand

from vggfeat.checked import MAX_Q, MAX_SCALES, Number, number_of
from vggfeat.devices import BATCH_SIZE
from vggfeat.errors import WrongUsage

Parameters = ParamSpec("Parameters")

PRECISION = (
    "Of the nets' arithmetic; auto: bfloat16 where the hardware multiplies it, else float32."
)

Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[Path | None, Option("--json", help="Also write the result as JSON to this file.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace output files that exist.")]
Root = Annotated[
    Path | None,
    Option(
        "--root",
        help="Where the images lie now; default: where they were described.",
        show_default=False,
    ),
]
Moved = "Where the weights that described the images lie now, if they have moved"
MovedNets = Annotated[
    list[str] | None,
    Option("--weights", help=f"{Moved}; of several nets, each in its order.", show_default=False),
]
CLASSIFIER = "A classifier of `vggfeat svm --out` or `classify --out`, or hf:OWNER/NAME."
Device = Annotated[
    str,
    Option(help="What it runs on: cpu, cuda, cuda:N, or auto: a GPU where there is one."),
]
OwnDevice = Annotated[
    Literal["auto", "cpu", "cuda"],
    Option(
        help=(
            "What it runs on; auto: a GPU where there is one. Under torchrun each process has"
            " its own GPU."
        )
    ),
]
Precision = Annotated[Literal["auto", "float32", "bfloat16"], Option(help=PRECISION)]
MaxPool = Annotated[
    Literal["floor", "ceil"] | None,
    Option(
        help="How the nets' max-pooling rounds odd sides; default: as the weights were trained.",
        show_default=False,
    ),
]
Pool = Annotated[
    Literal["average", "stack", "max"] | None,
    Option(
        help=(
            "How the descriptors of several scales become one; default: as the protocol has it,"
            " stack for Caltech, else average."
        ),
        show_default=False,
    ),
]
StoredLayer = Annotated[
    str | None,
    Option(
        "--layer",
        help="Which of the stored layers is used, where there are several.",
        show_default=False,
    ),
]
StoredScales = Annotated[
    str | None,
    Option(
        help="Use only these of the stored scales, comma-separated; default: all.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    Option(
        min=1,
        help=(
            "Threads that read, decode and rescale images; default: as many as there are cores. Of"
            " a set of shards (--out DIR/): processes that describe, default one a device; with"
            " Ray: tasks at once."
        ),
        show_default=False,
    ),
]
Processes = Annotated[
    int | None,
    Option(
        "--workers",
        min=0,
        help="Processes that read images, beside each that trains; default: one a core, 16 at"
        " most.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str],
    Option(
        "--set",
        help="Replace a number of the recipe: KEY=VALUE or STAGE.KEY=VALUE.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None,
    Option(
        min=1,
        help="Images of 224x224 in a forward pass; of larger images there are fewer in one; default"
        f" {BATCH_SIZE['cpu']}, on a GPU {BATCH_SIZE['cuda']}.",
        show_default=False,
    ),
]


def sides_typed(text: str) -> tuple[int, ...]:
    """--scales 256,384,512: smallest sides in pixels. Raises typer.BadParameter where none of our
    files can have them.
    """
    scales = _numbers(text, int, "--scales", "256,384,512")
    if len(scales) > MAX_SCALES or max(scales) > MAX_Q:
        raise typer.BadParameter(
            f"at most {MAX_SCALES} scales, of at most {MAX_Q:,} pixels", param_hint="'--scales'"
        )
    return scales


def layers_typed(text: str | None, different: bool = True) -> tuple[str, ...] | None:
    """--layer pool5,fc7: names of layers; None where it isn't given. Raises typer.BadParameter
    where one is empty, or, where they are to be different, there twice.
    """
    if text is None:
        return None
    layers = tuple(name.strip() for name in text.split(","))
    if "" in layers or (different and len(set(layers)) < len(layers)):
        what = "has a layer twice" if all(layers) else "is not a list of layers like pool5,fc7"
        raise typer.BadParameter(f"{text!r} {what}", param_hint="'--layer'")
    return layers


def costs_typed(text: str) -> list[float] | Literal["auto"]:
    """--C 1,4,16, or auto. Raises typer.BadParameter for anything else."""
    return "auto" if text == "auto" else list(_numbers(text, float, "--C", "1,4,16"))


def _numbers(text: str, kind: type[Number], option: str, example: str) -> tuple[Number, ...]:
    """Positive, finite and different numbers."""

    def wrong(what: str) -> typer.BadParameter:
        return typer.BadParameter(f"{text!r} {what}", param_hint=f"'{option}'")

    try:
        values = tuple(number_of(part, kind) for part in text.split(","))
    except ValueError as error:
        raise wrong(f"is not a list of numbers like {example}") from error
    if not all(0 < value < float("inf") for value in values):
        raise wrong("has numbers that are not positive and finite")
    if len(set(values)) != len(values):
        raise wrong("has a number twice")
    return values


def refuse_repeated(option: str, given: Iterable[str | Path]) -> None:
    """Raise WrongUsage where one thing is given twice to an option that takes several, by the same
    name.
    """
    seen = set()
    for value in given:
        if Path(value) in seen:
            raise WrongUsage(f"{option} {value} is given twice")
        seen.add(Path(value))


def typed(context: typer.Context) -> set[str]:
    """The parameters, by their names in Python, that are on the command line; not those of the
    environment.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def leave(unreadable: Sized) -> None:
    """End a command that is done: with status 3 where images couldn't be read; but 0 under
    torchrun, which takes any other for a crash and ends the processes that still write.
    """
    if unreadable and "WORLD_SIZE" not in os.environ:
        raise typer.Exit(3)


class Strict(TyperCommand):
    """A command that takes no empty value: `--out "$out"` is mostly a variable that isn't set, and
    a path of nothing would be the working folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises typer.BadParameter."""
        if not ctx.resilient_parsing:  # as while a shell completes a word
            parsed: Any = self.make_parser(ctx).parse_args(args=list(args))
            given, _, parameters = parsed
            for parameter in parameters:
                value = given.get(parameter.name)
                if "" in (value if isinstance(value, list | tuple) else [value]):
                    raise typer.BadParameter("it is empty: give a value", ctx, parameter)
        rest: list[str] = super().parse_args(ctx, args)
        return rest


def with_debug(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """A command that has --debug, too.

    `terminal` and `start` look for the word themselves: an error may come before it is parsed.
    """

    command.__doc__ = " ".join(inspect.cleandoc(command.__doc__ or "").split())  # as help has it

    @wraps(command)
    def run(*args: Parameters.args, **settings: Parameters.kwargs) -> None:
        settings.pop("debug")
        command(*args, **settings)

    signature = inspect.signature(command, eval_str=True)
    own = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
    )
    shown = signature.replace(parameters=[*signature.parameters.values(), own])
    run.__signature__ = shown  # type: ignore[attr-defined]
    return run
