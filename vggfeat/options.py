"""The options that several commands share, each declared once, and how a list of numbers is typed.

    @app.command("svm")
    @with_debug
    def svm_command(scales: StoredScales = None, json_file: Json = None) -> None:
        qs = None if scales is None else numbers(scales, int, "--scales")

A default that differs by command stands at the command. What is wrong on a command line is answered
at once: nothing here imports NumPy or PyTorch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Literal, ParamSpec, TypeVar

import typer
from typer import Option

Number = TypeVar("Number", int, float)
Parameters = ParamSpec("Parameters")

PRECISION = (
    "Of the nets' arithmetic; auto: bfloat16 where the hardware multiplies it, else float32."
)
BATCH_SIZE = "Images of 224x224 in a forward pass; of larger images there are fewer in one"

Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[Path | None, Option("--json", help="Also write the result as JSON to this file.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace output files that exist.")]
Images = Annotated[
    Path | None,
    Option(
        "--root",
        help="Where the images lie now; default: where they were described.",
        show_default=False,
    ),
]
Moved = "Where the weights that described the images lie now, if they have moved"
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
        help="Threads that read, decode and rescale images; default: as many as there are cores.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None,
    Option(min=1, help=f"{BATCH_SIZE}; default 8, on a GPU 64.", show_default=False),
]


def numbers(text: str, kind: type[Number], option: str) -> tuple[Number, ...]:
    """The numbers of "256,384,512", all of them positive, finite and different.

    option: which has them, as "--scales". Raises typer.BadParameter for anything else.
    """

    def wrong(what: str) -> typer.BadParameter:
        return typer.BadParameter(f"{text!r} {what}", param_hint=f"'{option}'")

    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise wrong("is not a list of numbers like 256,384,512") from error
    if not all(0 < value < float("inf") for value in values):
        raise wrong("has numbers that are not positive and finite")
    if len(set(values)) != len(values):
        raise wrong("has a number twice")
    return values


def with_debug(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """A command that has --debug, too.

    `terminal` and `start` look for the word themselves: an error may come before it is parsed.
    """

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
