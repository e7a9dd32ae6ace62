"""Commands that write, killed at some of the calls by which they change files;
`benchmarks.reliability` has all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.watch import LOG, Log, events

KILLS = os.environ.get("KILLS", "1")  # of each command
# each writes in another way; with KILLS also those that write as one of them does
COMMANDS = ["extract-two", "svm-submission", "predict", "training"]
if "KILLS" in os.environ:
    COMMANDS += ["extract-unreadable", "report", "explain", "neighbours", "index", "convert"]
    COMMANDS += ["export", "extract-retry", "ledger"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the end of processes")
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
def test_what_a_killed_command_leaves_is_whole_and_the_same_command_ends_as_ever() -> None:
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.reliability",
            "kills",
            *COMMANDS,
            "--most",
            KILLS,
            "--halves",
        ],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()[1:]] == COMMANDS


def test_a_stage_that_was_killed_after_its_validation_says_its_end_once(tmp_path: Path) -> None:
    """The checkpoint that calls it finished is written after the line of the log."""
    for iteration in (0, 3):
        with Log(tmp_path, "A-36", iteration, 3) as log:
            if not iteration:
                log("train", 3, loss=1.0)
            log("val", 3, top1_error=50.0)
    kept, dropped = events(tmp_path / LOG)
    assert [event["event"] for event in kept] == ["train", "val"] and not dropped
