"""Who waits for another process says for which, and not for ever."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.pretrain.conftest import command, environment

SCRIPT = """
import sys, time
from vggfeat import ranks
from vggfeat.errors import VggfeatError
ranks.WARN_SECONDS = 1.0
with ranks.joined("cpu", minutes=MINUTES) as job:
    assert job.gather(job.rank) == [0, 1, 2]
    if job.rank == 1:
        time.sleep(SLEEP)
    try:
        total = job.sum([job.rank, 1.0])
        print(f"{job.rank} has {total}", file=sys.stderr, flush=True)
    except VggfeatError as error:
        print(f"{job.rank} says {error}", file=sys.stderr, flush=True)
        time.sleep(3)
"""


def job(tmp_path: Path, minutes: float, sleep: float) -> list[str]:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.replace("MINUTES", str(minutes)).replace("SLEEP", str(sleep)))
    done = subprocess.run(
        command([], 3, script), env=environment(), text=True, capture_output=True, timeout=300
    )
    return done.stderr.splitlines()


def test_a_slow_process_is_named(tmp_path: Path) -> None:
    lines = job(tmp_path, 30, 6)
    assert {f"{rank} has [3.0, 3.0]" for rank in range(3)} <= set(lines)
    assert any(line.startswith("waiting for process 1 of this job") for line in lines), lines


def test_a_process_that_does_not_come_is_given_up_in_a_sentence(tmp_path: Path) -> None:
    lines = job(tmp_path, 0.1, 15)
    says = [line for line in lines if " says waited" in line]
    assert says and all("for process 1 of this job" in line or "has ended" in line for line in says), lines
