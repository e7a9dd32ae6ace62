"""Commands that write, killed at some of the calls that change files; `benchmarks.reliability` has them all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = os.environ.get("KILLS", "1")  # of each command
COMMANDS = [
    *("extract-unreadable", "extract-retry", "extract-overwrite", "extract-two", "svm-submission", "predict"),
    *("report", "neighbours", "convert", "training", "evaluate", "ledger", "export"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the end of processes")
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
def test_what_a_killed_command_leaves_is_whole_and_the_same_command_ends_as_ever() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.reliability", "kills", *COMMANDS, "--most", KILLS, "--halves"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()[1:]] == COMMANDS
