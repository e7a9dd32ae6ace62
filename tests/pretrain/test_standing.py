"""How a run stands: what is written of it, and whether a process is at work in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.standing import (
    INTERRUPTED,
    LOCK,
    RUN,
    End,
    Planned,
    Standing,
    at_work,
    standing_of,
)
from vggfeat.errors import VggfeatError

HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print();"
    " sys.stdin.read()"
)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert standing_of(tmp_path) == Standing()  # of an older version
    one = Standing(stages=[Planned(name="A-256", iterations=74)])
    for standing in (one, Standing(end=End(how=INTERRUPTED, stage="A-256", iteration=7))):
        standing.write(tmp_path)
        assert standing_of(tmp_path) == standing
    (tmp_path / RUN).write_text("[]")
    with pytest.raises(VggfeatError, match=r"run\.json"):
        standing_of(tmp_path)


def test_another_process_at_work_is_seen_and_not_disturbed(tmp_path: Path) -> None:
    assert not at_work(tmp_path)
    (tmp_path / LOCK).touch()
    assert not at_work(tmp_path)
    line = [sys.executable, "-c", HOLD, str(tmp_path / LOCK)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert at_work(tmp_path) and at_work(tmp_path)
        other.communicate()
    assert not at_work(tmp_path)
