"""What reaches the terminal, what its troubles do to a command, and how a process ends."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import vggfeat
from vggfeat import cli, terminal
from vggfeat.errors import VggfeatError
from vggfeat.terminal import (
    columns,
    gpu_failed,
    list_unreadable,
    out,
    print_table,
    printable,
    progress,
    say,
)

from ..conftest import HANG, Command
from .conftest import NET

ROOT = Path(__file__).parents[2]
EVIL = (
    "a\x1b[2J\r\nvggfeat:"
    " forged\x07\x9b31m\u202egnp.exe\u2066\u200b\u2028\x7f\udcff\U000e0041[bold]{0} b"
)
SHOWN = EVIL.encode("unicode_escape").decode()  # the halves of characters, too


def run_code(code: str, *words: str, **settings: object) -> subprocess.CompletedProcess[str]:
    settings = {"capture_output": True, "text": True, "timeout": HANG, **settings}
    return subprocess.run([sys.executable, "-c", code, *words], **settings)  # type: ignore[call-overload,no-any-return]


# --- nothing of a stranger's reaches the terminal as it is ----------------------------------------


def test_of_many_unreadable_images_the_first_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    list_unreadable({f"{i}.jpg": "away" for i in range(9963)}, "FILE has them")
    lines = capsys.readouterr().err.splitlines()
    assert lines[19:] == ["unreadable: 19.jpg: away", "unreadable: and 9,943 more; FILE has them"]
    list_unreadable({f"{i}.jpg": "away" for i in range(20)})
    assert len(capsys.readouterr().err.splitlines()) == 20


def test_controls_are_shown() -> None:
    assert printable(EVIL) == SHOWN
    for plain in (
        "",
        "a b",
        "[bold]:smile:",
        "Ωµ 日本 é",
        "1\u00a0000",
        "\U0001f600",
        "back\\slash",
    ):
        assert printable(plain) == plain
    shown = printable("".join(map(chr, range(sys.maxunicode + 1))))
    assert not re.search(
        "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ud800-\udfff]",
        shown,
    )


def test_every_way_to_the_terminal_shows_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out, "width", 400)
    out.print(EVIL)
    print_table(EVIL, [(EVIL, EVIL)])
    table = columns(EVIL, title=EVIL)
    table.add_row(EVIL)
    out.print(table)
    say(EVIL)
    list_unreadable({EVIL: EVIL})
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    with progress(EVIL) as show:
        show(1, 9)
        show(2, 9)
    printed = capsys.readouterr()
    assert (printed.out.count(SHOWN), printed.err.count(SHOWN)) == (7, 4)
    assert not re.search("[^\n -~─-╿]", printed.out + printed.err)


def test_progress_tells_what_is_being_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images with their rate; of other work, which comes in unequal pieces, the time left alone."""
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    with progress("svm", unit="fits") as show:
        show(0, 4, "choosing C")
        show(3, 4, "training")
    with progress("extract") as show:
        show(0, 4)
        show(2, 4)
    with progress("none", quiet=True) as show:
        show(2, 4, "training")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"svm: training: 3 of 4 fits, \S+ s left", first)
    assert re.fullmatch(r"extract: 2 of 4 images, \S+ images/s, \S+ s left", second)


def test_the_live_bar_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here(io.StringIO):
        def isatty(self) -> bool:
            return True

    bar = terminal.Screen()
    bar.file, bar.width = Here(), 400
    monkeypatch.setattr(terminal, "err", bar)
    for name in ("TERM", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    with progress("svm", unit="fits") as show:
        show(1, 9, EVIL)
    text = bar.file.getvalue()
    assert "svm: " in text and "1/9" in text and "images" not in text
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert not terminal.live()  # of a notebook
    monkeypatch.delenv("JPY_PARENT_PID")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert terminal.live()
    bar.file = io.StringIO()
    assert bar.is_terminal and not terminal.live()  # colours in a pipe
    assert SHOWN in text and "\x1b[2J" not in text and "\u202e" not in text


def test_a_commands_errors_and_usage_show_them(run_main: Command, tmp_path: Path) -> None:
    evil = EVIL.replace("\r\n", "")  # line ends become spaces in an error
    for words, status in (
        (["svm", "--features", tmp_path / evil], 1),
        (["svm", "--features", "x.h5", "--pool", evil], 2),
        (["svm", "--" + evil], 2),
        ([evil], 2),
        (["info", "x.h5", evil], 2),
    ):
        ran = run_main(cli.main, *words)
        assert (ran.status, ran.out, len(ran.err_lines)) == (status, "", 1), words
        assert "\\x1b[2J" in ran.err and "\\u202e" in ran.err and not re.search("[^ -~\n]", ran.err)
    ran = run_main(cli.main, "svm", "--nonsense")
    assert ran.err.startswith("vggfeat svm: ") and "--nonsense" in ran.err
    assert ran.err.endswith("; see vggfeat svm --help\n")
    ran = run_main(cli.main, "svm", "--features", tmp_path / evil, "--debug")
    assert "Traceback" in ran.err and not re.search("[^ -~\n]", ran.err)


COMMAND = """
import os, sys, time, typer
from pathlib import Path
from vggfeat import terminal
from vggfeat.start import begin

app = typer.Typer()

@app.command()
def work(kind: str = "", file: Path | None = None) -> None:
    if kind == "warn":
        import logging, warnings
        warnings.warn(sys.argv[-1] + "\\x1b[2J\\nforged")
        logging.getLogger("x").warning("log \\x1b[2J")
    if kind == "wait":
        print("ready", flush=True)
        time.sleep(600)
    if kind == "end":
        import atexit
        atexit.register(lambda: (print("ready", flush=True), time.sleep(600)))
    for _ in range(40):
        terminal.say("progress")
    for _ in range(4000):
        terminal.out.print("\\xe9 \\u2502 a line of a table")
    if file:
        with open(file, "w") as opened:
            opened.write(str(opened.fileno()))
    raise typer.Exit(3)

begin()
terminal.run(app, "python -m some.work")
"""


def test_the_lines_of_several_processes_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []

    # as PYTHONUNBUFFERED makes it: each write of a text is one to the terminal
    class Unbuffered(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            written.append(bytes(data))  # type: ignore[call-overload]
            return len(written[-1])

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(Unbuffered(), write_through=True))  # type: ignore[type-var]
    say("0 has [3.0, 3.0]")
    assert [text for text in written if text] == [b"0 has [3.0, 3.0]\n"]


def test_warnings_of_libraries_are_lines(tmp_path: Path) -> None:
    ran = run_code(
        COMMAND,
        "--kind",
        "warn",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        capture_output=False,
    )
    assert ran.stderr.splitlines()[:2] == ["warning: warn\\x1b[2J\\nforged", "log \\x1b[2J"]


def test_only_terminal_speaks_to_the_terminal() -> None:
    """Any other way would print names as they are, and fail where the terminal does."""
    allowed = {
        ("vggfeat/datasets/download.py", "sys.stderr"),  # where torchvision's own lines are sent
        ("vggfeat/decode.py", "sys.stdout"),  # a child's, which is a pipe to its parent
        ("vggfeat/datasets/devkit.py", "sys.stdout"),  # the same
        ("vggfeat/shards/worker.py", "sys.stdout"),
        ("vggfeat/shards/worker.py", "sys.stderr"),
    }
    found = set()
    for path in sorted([*ROOT.glob("vggfeat/**/*.py"), *ROOT.glob("pretrain/**/*.py")]):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
            if re.fullmatch(
                r"print|input|Console|Progress|Text|sys\.(__)?std(out|err)(__)?|(typer|click)\.s?echo",
                name,
            ):
                found.add((str(path.relative_to(ROOT)), name))
    assert found == allowed


# --- arguments and options ------------------------------------------------------------------------


def test_an_argument_is_told_as_the_commands_option(run_main: Command, tmp_path: Path) -> None:
    """In Python `layer` is an argument; who typed a command is told of --layer, if it has that."""
    app = typer.Typer()

    @app.command()
    def work(
        layer: str = "",
        out_file: str = typer.Option("", "--out"),
        micro_batch: int = 0,
        data: str = typer.Option("", "--data", "--root"),
        kind: str = typer.Option("", "--C"),
    ) -> None:
        raise VggfeatError(
            f"`layer` `out` `micro_batch` `root` `C` `pool` `out_file`, or `vggfeat svm` {layer}"
        )

    def main() -> None:
        terminal.run(app, "vggfeat")

    ran = run_main(main, "--layer", "x")
    assert (
        ran.err
        == "vggfeat: --layer --out --micro-batch --root --C `pool` `out_file`, or `vggfeat svm` x\n"
    )

    @app.command()
    def other(pool: str = "") -> None:
        raise VggfeatError("`layer`, `pool`")

    assert run_main(main, "other").err == "vggfeat: `layer`, --pool\n"
    assert run_main(main, "work").err.startswith("vggfeat: --layer --out ")


LIBRARY = sorted(
    path
    for folder in ("vggfeat", "pretrain")
    for path in (ROOT / folder).glob("**/*.py")
    if "@app.command" not in (text := path.read_text(encoding="utf-8"))
    and "terminal.run" not in text
    and "import argparse" not in text  # a process's own words
    and not path.stem.startswith("cli_")
    and path.name not in ("terminal.py", "start.py")  # they are of every command
)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_library_names_no_options(path: Path) -> None:
    """Whoever calls it from Python has none: arguments are named in backticks, and `terminal` makes
    options of them.

    A whole command to type may stand in backticks, as `vggfeat svm --out`, where nothing else does
    what is needed.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant)]
    # docstrings, and parts of what is looked at whole
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.JoinedStr):
            inside = [node.value] if isinstance(node, ast.Expr) else node.values
            told = [each for each in told if each not in inside]
    for node in told:
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        values = [part.value if isinstance(part, ast.Constant) else "" for part in parts]
        text = "".join(value for value in values if isinstance(value, str))
        text = re.sub(r"`(vggfeat|python -m|torchrun|sbatch) [^`]*`", "", text)
        assert not re.search(r"(^|[\s(`])--[a-zA-Z]", text), f"{path}:{node.lineno}: {text}"


# --- the shell's completion -----------------------------------------------------------------------


def completed(line: str) -> subprocess.CompletedProcess[str]:
    """What bash would offer behind a line, and what was imported for it."""
    asked = {
        "_VGGFEAT_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - (0 if line.endswith(" ") else 1)),
    }
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vggfeat"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=HANG,
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vggfeat ext", ["extract"]),
        ("vggfeat extract --da", ["--dataset"]),
        ("vggfeat extract --dataset cal", ["caltech101", "caltech256"]),
        ("vggfeat extract --precision b", ["bfloat16"]),
        ("vggfeat extract --out no", []),  # the shell completes files by itself
    ],
)
def test_the_shell_completes_commands_and_options(line: str, offered: list[str]) -> None:
    ran = completed(line)
    assert (ran.returncode, ran.stdout.split()) == (0, offered)
    imported = {words.rpartition("|")[2].strip() for words in ran.stderr.splitlines()}
    assert "typer" in imported and "torch" not in imported  # a key press waits for it
    assert all(words.startswith("import time:") for words in ran.stderr.splitlines())


def test_completion_is_installed_for_the_shell(tmp_path: Path) -> None:
    home = {**os.environ, "HOME": str(tmp_path)}
    command = f"{sys.executable} -m vggfeat"
    for asked in ("--show-completion", "--install-completion"):
        # the second command keeps bash from becoming the first
        ran = subprocess.run(
            ["bash", "-c", f"{command} {asked}; exit $?"],
            env=home,
            capture_output=True,
            text=True,
            timeout=HANG,
            cwd=ROOT,
        )
        assert (ran.returncode, ran.stderr) == (0, "")
    assert "vggfeat" in (tmp_path / ".bashrc").read_text()
    [script] = (tmp_path / ".bash_completions").iterdir()
    assert "_VGGFEAT_COMPLETE" in script.read_text()


# --- a terminal that is closed, full or gone ------------------------------------------------------


@pytest.mark.parametrize(
    ("redirect", "status", "errors"),
    [
        (">&-", 3, 40),
        ("2>&-", 3, 0),
        ("<&- >&- 2>&-", 3, 0),
        (">/dev/full", 1, 41),
        ("2>/dev/full", 3, 0),
        (">/dev/full 2>/dev/full", 1, 0),
        ("| true", 3, 40),
    ],
)
def test_the_terminals_troubles_lose_nothing(
    tmp_path: Path, redirect: str, status: int, errors: int
) -> None:
    script, file, told = tmp_path / "work.py", tmp_path / "result", tmp_path / "status"
    script.write_text(COMMAND)
    line = f"{{ {sys.executable} {script} --file {file}; echo $? > {told}; }} {redirect}"
    if "|" not in redirect:
        line = f"{sys.executable} {script} --file {file} {redirect}; echo $? > {told}"
    ran = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=HANG)
    assert int(told.read_text()) == status, ran.stderr
    assert int(file.read_text()) > 2  # a file with number 2 would hold what libraries say on stderr
    lines = ran.stderr.splitlines()
    assert len(lines) == errors and lines[:40] == ["progress"] * min(errors, 40)
    assert lines[40:] == ["some.work: can't write to stdout: No space left on device"] * (
        errors > 40
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"TERM": "dumb"},
        {"COLUMNS": "0"},
        {"COLUMNS": "1"},
    ],
)
def test_any_character_set_and_width(environment: dict[str, str]) -> None:
    ran = run_code(COMMAND, env={**os.environ, **environment})
    assert ran.returncode == 3 and ran.stderr == "progress\n" * 40
    assert len(ran.stdout.splitlines()) >= 4000 and "line" in ran.stdout


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    """Other programs leave a shared pipe so: a write that finds it full says EAGAIN."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    with open(read, "rb") as pipe:
        lines = pipe.read().decode().splitlines()
    _, errors = process.communicate(timeout=HANG)
    assert (process.returncode, len(lines)) == (3, 4000) and errors.count(b"\n") == 40


# --- how a process ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("kind", "says"), [("wait", "some.work: interrupted\n"), ("end", "progress\n" * 40)]
)
def test_ctrl_c_at_work_and_at_the_end(number: signal.Signals, kind: str, says: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--kind", kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    process.send_signal(number)  # once: a line can come twice where a signal meets it
    _, errors = process.communicate(timeout=HANG)
    assert (process.returncode, errors) == (128 + number, says)


def test_an_ignored_signal_stays_ignored() -> None:
    """As a shell starts what it runs in the background."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            COMMAND.replace("time.sleep(600)", "sys.stdin.read()"),
            "--kind",
            "wait",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.communicate("", timeout=HANG)
    assert process.returncode == 3


def test_a_second_signal_at_once_is_the_same_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sends its processes what the terminal has sent them already; later, it is an
    order.
    """
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(terminal, "SAME_SECONDS", 3600.0)
    with pytest.raises(KeyboardInterrupt), terminal.ending_well() as caught:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            assert (caught.signal, left) == (signal.SIGTERM, [])
            caught.at -= terminal.SAME_SECONDS + 1
            signal.raise_signal(signal.SIGINT)
    assert left == [130] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --- names in bytes -------------------------------------------------------------------------------


def test_names_that_are_no_utf8(
    run_main: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux's names are bytes: of images, outputs and the folder where the command is given."""
    small = ("--weights", "random:A,width=0.125,crop=32", "--scales", "32", "--device", "cpu")
    f, m = tmp_path / "f.h5", tmp_path / "m.h5"
    assert (
        run_main(
            cli.main, "extract", "--dataset", "folder", "--root", folder, *small, "--out", f
        ).status
        == 0
    )
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    place.mkdir()
    monkeypatch.chdir(place)
    name = os.fsdecode(b"\xfcber.jpg")
    Path(name).write_bytes((folder / "red" / "00.jpg").read_bytes())
    endings = (b".h5", b".json", b".csv", b".html", b".png")
    model, result, table, page, picture = (os.fsdecode(b"x\xff" + ending) for ending in endings)
    for words in (
        ["svm", "--features", f, "--C", 1, "--out", model, "--json", result],
        ["info", model, "--json", f"2{result}"],
        ["predict", name, "--model", model, "--out", table],
        ["predict", name, "--model", model, "--out", f"{result}l"],
        ["report", "--features", f, "--model", model, "--root", folder, "--out", page],
        ["neighbours", "--features", f, "--query", name, "--root", folder, "--picture", picture],
    ):
        ran = run_main(cli.main, *words)
        assert (ran.status, "unexpected" in ran.err) == (0, False), ran.err
        assert not re.search("[\ud800-\udfff]", ran.out + ran.err)
    record = json.loads(Path(f"{result}l").read_text())
    assert os.fsencode(record["image"]) == b"\xfcber.jpg"
    assert model in json.loads(Path(result).read_text())["command"]
    assert (
        all(Path(made).stat().st_size for made in (model, table, page, picture)) and not m.exists()
    )


def test_names_in_brackets_and_in_bytes_are_printed_as_they_are(
    command: Command, folder: Path, trained: Path, tmp_path: Path
) -> None:
    """Square brackets and colons are no markup, and a name need not be UTF-8."""
    odd = tmp_path / "odd[bold][final]:smile:.jpg"
    shutil.copy(folder / "red" / "00.jpg", odd)
    ran = command("predict", odd, "--model", trained)
    assert (ran.status, ran.err) == (0, "") and odd.name in ran.out
    latin = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    shutil.copy(folder / "red" / "00.jpg", latin)
    ran = command("predict", latin, "--model", trained)
    assert (ran.status, ran.err) == (0, "") and "caf" in ran.out and "red" in ran.out


def test_nothing_is_cut_off_where_the_terminal_is_narrow(
    command: Command, extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.out, "width", 60)
    fingerprint = vggfeat.load(NET).fingerprint
    ran = command("info", extracted, "--all")
    assert "…" not in ran.out
    second = "".join(
        line.split("│")[2].strip() for line in ran.out.splitlines() if line.startswith("│")
    )
    assert fingerprint in second


def test_a_gpu_that_failed_is_found_behind_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for lost in (RuntimeError("CUDA error: unspecified launch failure"), ValueError("x")):
        try:
            try:
                raise lost
            except (RuntimeError, ValueError) as error:
                raise VggfeatError("cuda has failed") from error
        except VggfeatError as error:
            assert gpu_failed(error) == isinstance(lost, RuntimeError)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not gpu_failed(RuntimeError("CUDA error: unspecified launch failure"))
