"""What every command of the project has in common: the only way to the terminal, progress, and
errors in one line.

Results go to stdout, everything else to stderr. Exit status: 0 done; 1 it failed, one line says
why; 2 what was typed is wrong, whatever lies on the disk; 3 done, but some inputs were unreadable;
130, 143 left on Ctrl-C, SIGTERM.

Names and attributes come from strangers' files: no text reaches the terminal but through
`printable`. And a terminal that is closed, full or gone ends no work: what can't be written there
is dropped, and `run` says so at the end.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import select
import shlex
import signal
import sys
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
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
from rich.text import Text

from vggfeat.devices import device_failed, out_of_memory
from vggfeat.errors import VggfeatError, WrongUsage, reason
from vggfeat.machine import duration

NARROWEST = 20  # columns; where COLUMNS says 0, rich prints nothing
LISTED = 20  # unreadable images that are told one by one
LINE_SECONDS = 10.0  # between lines of progress, where there is no terminal
SIGNALS = signal.SIGINT, signal.SIGTERM
# signals so near to the first are the same wish: torchrun sends on what the terminal sent to all
SAME_SECONDS = 2.0


class Screen(Console):
    """rich's console, to which a text is one line: controls in it are shown, and square brackets
    are no markup.
    """

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)
        if self.width < NARROWEST:
            self.width = NARROWEST

    def render_str(self, text: str, **settings: Any) -> Text:
        """All that rich is given as a string comes through here, cells and titles of tables,
        too.
        """
        return super().render_str(printable(text), **settings)


out = Screen()
err = Screen(stderr=True)


def printable(text: str) -> str:
    """text as a terminal may have it: what can't be seen or could steer the terminal, as escapes
    like \\x1b.

    Those are controls (line ends, too), separators of lines, marks of writing direction, what has
    no width, and the halves of characters that file names can hold.
    """
    if text.isprintable():
        return text
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in hidden else c
        for c in text
    )


_rewriting = False


def say(text: str) -> None:
    """A line on stderr."""
    _write_line(text, "\n")


def rewrite(text: str) -> None:
    """A line on stderr that the next one takes the place of; for a `live` terminal."""
    _write_line(text, "")


def _write_line(text: str, end: str) -> None:
    global _rewriting
    # in one piece, so that the lines of several processes on one terminal don't run into each other
    text = ("\r\x1b[K" if _rewriting or not end else "") + printable(text) + end
    print(text, end="", file=sys.stderr, flush=True)
    _rewriting = not end


def live() -> bool:
    """Whether stderr is a terminal on which a line can be rewritten: not where FORCE_COLOR alone
    says so, nor in a notebook, which runs commands in a terminal and shows what they print.
    """
    here = err.file.isatty() and "JPY_PARENT_PID" not in os.environ
    return here and err.is_terminal and not err.is_dumb_terminal


def columns(*headers: str, numbers: Sequence[int] = (), **settings: Any) -> Table:
    """A table whose cells go on in a further line where the terminal is narrow, instead of being
    cut off. numbers: columns that hold numbers, which stand at the right.
    """
    made = [Column(header, overflow="fold") for header in headers]
    for i in numbers:
        made[i].justify = "right"
    return Table(*made, **settings)


def print_columns(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()
) -> None:
    """Print such a table on stdout."""
    table = columns(*head, numbers=numbers)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print rows of (name, value) on stdout."""
    table = columns("", "", title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def list_unreadable(bad: dict[str, str], rest: str = "", count: int | None = None) -> None:
    """Print the names and reasons of the first unreadable images on stderr. rest: what tells the
    others, too. count: how many there are, where these are but the first.
    """
    for name, why in islice(bad.items(), LISTED):
        say(f"unreadable: {name}: {why}")
    if (more := (len(bad) if count is None else count) - min(len(bad), LISTED)) > 0:
        say(f"unreadable: and {more:,} more" + (f"; {rest}" if rest else ""))


_running: typer.Typer | None = None


def in_options(text: str) -> str:
    """What the library says, for whoever typed a command: an argument in backticks, as `layer`, is
    its option, --layer.

    One that the command doesn't have stays as it is.
    """
    if _running is None or "`" not in text:
        return text
    options = _options_of(_running)
    return re.sub(r"`(\w+)`", lambda found: options.get(found[1], found[0]), text)


def refused_otherwise(check: Callable[[], object]) -> None:
    """For a dry run: say what `check` would refuse, were it none."""
    try:
        check()
    except VggfeatError as error:
        say(in_options(f"without --dry-run this would be refused: {error}"))


def _options_of(app: typer.Typer) -> dict[str, str]:
    """The options of the command that was typed, by the arguments that they stand for."""
    command = typer.main.get_command(app)
    if commands := getattr(command, "commands", None):
        command = commands.get(_typed(app))
    options = [
        option
        for parameter in getattr(command, "params", [])
        for option in (*parameter.opts, *parameter.secondary_opts)
    ]
    return {option[2:].replace("-", "_"): option for option in options if option.startswith("--")}


def _typed(app: typer.Typer) -> str:
    """Which of several commands was typed, as "svm"; "" where there is but one, or none was."""
    commands = getattr(typer.main.get_command(app), "commands", {})
    return next((word for word in sys.argv[1:] if word in commands), "")


def command() -> str:
    """The command line that this process was started with, as it can be typed again."""
    return f"{sys.argv[0]} {shlex.join(sys.argv[1:])}"


@dataclass
class Caught:
    """The number of the signal that asked to end, 0 until one did, and when."""

    signal: int = 0
    at: float = 0.0


@contextmanager
def ending_well() -> Iterator[Caught]:
    """Inside, Ctrl-C and SIGTERM (a scheduler's, torchrun's) raise KeyboardInterrupt, of their
    number; once.

    Later than SAME_SECONDS after the first, one ends the process at once. What is ignored stays so
    (nohup's, `&`'s).
    """
    caught = Caught()

    def end(number: int, _frame: Any) -> None:
        if caught.signal:
            if time.monotonic() - caught.at > SAME_SECONDS:
                os._exit(128 + number)
            return
        caught.signal, caught.at = number, time.monotonic()
        raise KeyboardInterrupt(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {
        number: handler for number, handler in before.items() if handler is not signal.SIG_IGN
    }
    try:
        for number in before:
            signal.signal(number, end)
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def progress(verb: str, quiet: bool = False, unit: str = "images") -> Iterator[Any]:
    """A bar with rate and time left on a terminal; a line every ten seconds elsewhere. It is called
    with how much is done, of how much, and, where that changes, with what is being done.

    What was done before the first report (by an earlier run), and the time until then, don't count
    for the rate, which is told of images alone: other work comes in unequal pieces.
    """
    if quiet:
        yield lambda done, total, doing="": None
        return

    def named(doing: str) -> str:
        return f"{verb}: {doing}" if doing else verb

    def rated(rate: float) -> str:
        return f"{rate:,.1f} images/s" if unit == "images" else ""

    if live():
        what, rate_ = (
            TextColumn(f"{{task.{part}}}", markup=False) for part in ("description", "fields[rate]")
        )
        parts = (
            what,
            BarColumn(),
            MofNCompleteColumn(),
            rate_,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*parts, console=err) as bar:
            task = bar.add_task(printable(verb), total=None, rate="")
            started = time.monotonic()
            earlier: float | None = None

            def show(done: float, total: int, doing: str = "") -> None:
                nonlocal earlier, started
                if earlier is None:
                    earlier, started = done, time.monotonic()
                rate = (done - earlier) / max(time.monotonic() - started, 1e-9)
                told = printable(named(doing))
                bar.update(task, description=told, completed=done, total=total, rate=rated(rate))

            yield show
        return
    started = last = time.monotonic()
    before: float | None = None

    def line(done: float, total: int, doing: str = "") -> None:
        nonlocal last, before, started
        now = time.monotonic()
        if before is None:
            before, started = done, now
        if now - last >= LINE_SECONDS and done > before:
            last = now
            rate = (done - before) / (now - started)
            left = duration((total - done) / rate)
            told = ", ".join(filter(None, (f"{total:,} {unit}", rated(rate), f"{left} left")))
            say(f"{named(doing)}: {done:,.0f} of {told}")

    yield line


class Sturdy(io.RawIOBase):
    """A descriptor that swallows what it can't write: `failure` says why, the first time."""

    def __init__(self, fd: int) -> None:
        self._fd, self.failure = fd, None

    failure: OSError | None

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._fd)

    def write(self, data: Any) -> int:
        """Never raises; waits where a pipe that doesn't block is full."""
        while self.failure is None:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:
                select.select([], [self._fd], [])
            except OSError as error:
                self.failure = error
        return len(data)


def _sturdy(stream: Any, original: Any, fd: int) -> Any:
    """stream, if it is the process's own and not a test's, as one that never fails and knows every
    character.
    """
    if stream is not original:
        return stream
    with suppress(OSError, AttributeError):  # None, where it was closed
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Sturdy(fd)),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=fd == 2 or os.isatty(fd),
    )


def _ignored(what: Any) -> None:
    """Of errors that Python ignores, as in destructors, one line each kind; h5py has twenty of a
    full disk.
    """
    if issubclass(what.exc_type, KeyboardInterrupt):
        os._exit(128 + int((what.exc_value.args or SIGNALS)[0]))  # else Ctrl-C would be forgotten
    if what.exc_type not in _told:
        _told.add(what.exc_type)
        say(f"warning: {what.exc_type.__name__}: {' '.join(str(what.exc_value).split())}")


_told: set[type] = set()


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _prepare(name: str) -> None:
    """Take over what the libraries would print, and the streams that they would print it on."""
    sys.argv[0] = name
    sys.stdout = _sturdy(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _sturdy(sys.stderr, sys.__stderr__, 2)
    sys.unraisablehook = _ignored
    warnings.showwarning = lambda message, *where, **more: say(f"warning: {message}")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_OneLine())


def run(app: typer.Typer, name: str) -> None:
    """Run a command; turn errors into one line and an exit status. name: what a user types to start
    it.
    """
    _prepare(name)
    program = name.split()[-1]
    try:
        with ending_well() as caught:
            status = _status(app, name, caught)
    except KeyboardInterrupt as error:  # between two lines of this file
        status = 128 + int((error.args or SIGNALS)[0])
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, Sturdy) and raw.failure is not None and raw.failure.errno != errno.EPIPE:
        say(f"{program}: can't write to stdout: {reason(raw.failure)}")
        status = status if status not in (0, 3) else 1
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # gloo's threads outlive the process group (DDP holds it); one that frees its last tensor
        # while the interpreter ends aborts a run that went well
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _status(app: typer.Typer, name: str, caught: Caught) -> int:
    """Run a command; say what went wrong in one line; the exit status."""
    global _running
    _running = app
    program = name.split()[-1]
    try:
        status = int(app(prog_name=name, standalone_mode=False) or 0)
        if not (caught.signal and status == 130):  # Typer's, of a KeyboardInterrupt
            return status
        error: BaseException = KeyboardInterrupt()
    except (Exception, SystemExit) as raised:
        error = raised
    if isinstance(error, SystemExit) and isinstance(error.__context__, OSError):
        # Typer leaves without a word where a pipe has broken, whichever it was
        error = error.__context__
    if isinstance(error, SystemExit) and _completing(name):
        return int(error.code or 0)
    if "--debug" in sys.argv:
        for line in "".join(traceback.format_exception(error)).splitlines():
            say(line)
    # a library can make another error of it
    if caught.signal and not isinstance(error, VggfeatError):
        say(f"{program}: interrupted")
        return 128 + caught.signal
    if hasattr(error, "format_message"):  # Typer's errors of usage
        context = getattr(error, "ctx", None)
        typed = context.command_path if context else f"{name} {_typed(app)}".rstrip()
        _say_wrong_usage(typed, error.format_message())
        return int(getattr(error, "exit_code", WrongUsage.status))
    if isinstance(error, WrongUsage):
        _say_wrong_usage(f"{name} {_typed(app)}".rstrip(), in_options(str(error)))
        return WrongUsage.status
    text = in_options(" ".join(str(error).split()))
    if isinstance(error, OSError) and isinstance(error.filename, str) and error.strerror:
        text = f"{error.filename}: {reason(error)}"  # a share that is away, a name that is too long
    elif not isinstance(error, VggfeatError) and out_of_memory(error):
        text = (
            f"not enough memory: {text}; free some, or take a part: fewer images, scales or classes"
            " at once"
        )
    elif not isinstance(error, VggfeatError):
        text = f"unexpected {type(error).__name__}: {text} (--debug shows where)"
    say(f"{program}: {text}")
    status = int(getattr(error, "status", 1))
    if gpu_failed(error):
        # what it shares memory with, it is asked about as that is freed: PyTorch would abort
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    return status


def gpu_failed(error: BaseException | None) -> bool:
    """Whether this process has a GPU, which has failed, by an error or one that led to it."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return False
    while error is not None:
        if device_failed(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _completing(name: str) -> bool:
    """Whether a shell asks what can be typed next, or a user for that: Typer answers by itself, and
    leaves.
    """
    asked = {"--install-completion", "--show-completion"} & {
        word.partition("=")[0] for word in sys.argv
    }
    return bool(asked) or f"_{name.upper()}_COMPLETE" in os.environ


def _say_wrong_usage(typed: str, text: str) -> None:
    """Say what is wrong with the command line, and where its help is."""
    text = " ".join(text.split()).rstrip(".")
    if text:  # none where nothing was typed: the help has been printed
        say(f"{typed.removeprefix('python -m ')}: {text}; see {typed} --help")
