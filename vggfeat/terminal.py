"""What every command of the project has in common: tables, progress, output files, and errors in one line.

Results go to stdout, everything else to stderr. Exit status: 0 done; 1 it failed, one line says why;
2 usage; 3 done, but some inputs were unreadable.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from vggfeat.errors import Interrupted, VggfeatError

# names are printed as they are: square brackets in them are no markup
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)
CORES = os.cpu_count() or 1


def columns(*headers: str, **settings: Any) -> Table:
    """A table whose cells go on in a further line where the terminal is narrow, instead of being cut off."""
    return Table(*(Column(header, overflow="fold") for header in headers), **settings)


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print rows of (name, value) on stdout."""
    table = columns("", "", title=printable(title), show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, printable(value))
    out.print(table)


def list_unreadable(bad: dict[str, str]) -> None:
    """Print each unreadable image's name and reason on stderr."""
    for name, reason in bad.items():
        print(f"unreadable: {printable(name)}: {printable(reason)}", file=sys.stderr)


def printable(text: str) -> str:
    """text without the half characters that a file name can hold and no terminal can print."""
    return text.encode("utf-8", "backslashreplace").decode()


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would say: "90.0 s", "12.5 min", "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def command() -> str:
    """The command line that this process was started with, as it can be typed again."""
    return f"{sys.argv[0]} {shlex.join(sys.argv[1:])}"


@contextmanager
def ending_well() -> Iterator[None]:
    """Inside, SIGTERM (a scheduler's, torchrun's) is what Ctrl-C is: a KeyboardInterrupt, of its own number."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def progress(verb: str, quiet: bool = False) -> Iterator[Any]:
    """A bar with rate and time left on a terminal; a line every ten seconds elsewhere.

    What was done before the first report (by an earlier run) doesn't count for the rate.
    """
    if quiet:
        yield lambda done, total: None
        return
    if err.is_terminal:
        columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err) as bar:
            task = bar.add_task(verb, total=None, rate="")
            started = time.monotonic()
            earlier: float | None = None

            def show(done: float, total: int) -> None:
                nonlocal earlier
                earlier = done if earlier is None else earlier
                rate = (done - earlier) / max(time.monotonic() - started, 1e-9)
                bar.update(task, completed=done, total=total, rate=f"{rate:.1f} images/s")

            yield show
        return
    started = last = time.monotonic()
    before: float | None = None

    def line(done: float, total: int) -> None:
        nonlocal last, before
        now = time.monotonic()
        before = done if before is None else before
        if now - last >= 10 and done > before:
            last = now
            rate = (done - before) / (now - started)
            left = duration((total - done) / rate)
            print(
                f"{verb}: {done:.0f}/{total} images, {rate:.1f} images/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    yield line


def keep_memory() -> None:
    """Make a process keep what its forward passes have freed, for the next: a third of their time on a CPU.

    PyTorch asks for large pages, a layer's map of 50 MB is faulted in by 25 of them instead of by 12,000 small ones
    (read at its first allocation, so call this before PyTorch is imported); and glibc gives a freed map to the next
    layer instead of back to the system.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def run(app: typer.Typer, name: str) -> None:
    """Run a command; turn errors into one line and an exit status. name: what a user types to start it."""
    sys.argv[0] = name
    keep_memory()
    try:
        app(prog_name=name)
    except SystemExit as ended:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        # gloo's threads outlive the process group (DDP holds it); one that frees its last tensor while the
        # interpreter ends aborts a run that went well
        _leave(int(ended.code or 0))
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        text = " ".join(str(error).split())
        if not isinstance(error, VggfeatError):
            text = f"unexpected {type(error).__name__}: {text} (--debug shows where)"
        print(f"{name.split()[-1]}: {printable(text)}", file=sys.stderr)
        status = 128 + error.signal if isinstance(error, Interrupted) else 1
        if os.environ.get("WORLD_SIZE", "1") != "1":
            _leave(status)
        sys.exit(status)


def _leave(status: int) -> None:
    """Exit without Python's own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
