"""How a process begins: what interrupts it or fails then ends it in a line, or in none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vggfeat.machine import CORES

from ..conftest import HANG

ROOT = Path(__file__).parents[2]


def interrupted_at(import_: int, *words: str) -> tuple[int, str]:
    """SIGINT after so many imports that follow the process's own beginning: a moment that no load
    can move.

    The process is at most two pages, of some sixty imports each, ahead of who reads of them.
    """
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        pipesize=4096,
    )
    assert process.stderr is not None
    lines, began = [], None
    for line in process.stderr:
        lines.append(line)
        if began is None and line.rstrip().endswith(("| signal", "| vggfeat.start")):
            began = len(lines) + (0 if "vggfeat.start" in line else 1)
        if began is not None and len(lines) == began + import_:
            process.send_signal(signal.SIGINT)
    return process.wait(timeout=HANG), "".join(lines)


@pytest.mark.parametrize(
    "words", ["vggfeat datasets", "vggfeat.cli datasets", "pretrain.report nowhere"]
)
def test_ctrl_c_at_the_start_leaves_no_traceback(words: str) -> None:
    for import_ in (1, 5, 25, 75, 150):
        status, errors = interrupted_at(import_, "-m", *words.split())
        # where the signal meets an exec() of a library's, Python ends itself by it: a shell's 130,
        # too
        assert status in (130, -signal.SIGINT) and "Traceback" not in errors, (
            import_,
            errors[-2000:],
        )


def test_a_working_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    """PyTorch's libraries end the process there, with a sentence of theirs."""
    script = """
import os, sys
from vggfeat.__main__ import main
os.chdir(sys.argv.pop(1))
os.rmdir(os.getcwd())
main()
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, tmp_path, "datasets"],
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    told = "vggfeat: the working folder is gone: change to one that is there\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", told)


@pytest.mark.parametrize("debug", [False, True])
def test_what_fails_before_a_command_begins_is_a_line(debug: bool) -> None:
    """Libraries are imported there, for which memory may be short."""
    script = "from vggfeat.start import begin\nbegin()\nraise ImportError('no memory\\nto map it')"
    line = [sys.executable, "-c", script, *["--debug"] * debug]
    ran = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=HANG)
    lines = ran.stderr.splitlines()
    assert ran.returncode == 1
    assert lines[-1] == "vggfeat: unexpected ImportError: no memory to map it (--debug shows where)"
    assert ("Traceback" in ran.stderr) == debug == (len(lines) > 1)


@pytest.mark.parametrize(
    "module",
    ["vggfeat", *(f"pretrain.{name}" for name in ("train", "evaluate", "export", "report"))],
)
def test_another_system_than_linux_is_told_in_a_line(module: str) -> None:
    """By whichever command was typed."""
    script = (
        "import runpy, sys\nsys.platform = 'darwin'\n"
        f"runpy.run_module('{module}', run_name='__main__')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=HANG
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"{module}: it runs on Linux only; on darwin, take a container")
    assert len(ran.stderr.splitlines()) == 1


def test_what_pytorch_reads_once_is_settled_before_it_is_imported() -> None:
    """A user's own settings win, and processes that are started inherit them."""
    script = """
import os, sys
from vggfeat.start import begin
begin()
assert "torch" not in sys.modules
print(*map(os.environ.get, sys.argv[1:]))
"""
    names = ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", "OMP_NUM_THREADS")

    def said(**settings: str) -> str:
        inherited = {key: value for key, value in os.environ.items() if key not in names}
        ran = subprocess.run(
            [sys.executable, "-c", script, *names],
            env=inherited | settings,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            check=True,
            timeout=HANG,
        )
        return ran.stdout.strip()

    limited = str(CORES) if len(os.sched_getaffinity(0)) > CORES else "None"
    assert said() == f"passive 1 {limited}"
    own = {"OMP_WAIT_POLICY": "active", "THP_MEM_ALLOC_ENABLE": "0", "OMP_NUM_THREADS": "3"}
    assert said(**own) == "active 0 3"
