"""Who waits for another process says for which, and not for ever."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.conftest import HANG
from tests.pretrain.conftest import command, environment

SCRIPT = """
import sys, time
from pathlib import Path
from vggfeat import ranks, terminal
from vggfeat.errors import VggfeatError

here = Path(__file__).parent

def until_told(*names):
    while not all((here / name).exists() for name in names):
        time.sleep(0.01)

def tell(text):
    terminal.say(text)
    (here / "waiting").touch()

with ranks.joined("cpu") as job:
    assert job.gather(job.rank) == [0, 1, 2]
    ranks.WARN_SECONDS, ranks.say, job.meeting.minutes = 0.0, tell, MINUTES
    if job.rank == 1:
        until_told(*NAMES)
    try:
        total = job.sum([job.rank, 1.0])
        terminal.say(f"{job.rank} has {total}")
    except VggfeatError as error:
        terminal.say(f"{job.rank} says {error}")
    (here / str(job.rank)).touch()
    until_told("0", "1", "2")
"""


def job(tmp_path: Path, minutes: float, *names: str) -> list[str]:
    """What three processes say, of which the second doesn't come until these files are there."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.replace("MINUTES", str(minutes)).replace("NAMES", repr(names)))
    done = subprocess.run(
        command([], 3, script), env=environment(), text=True, capture_output=True, timeout=HANG
    )
    return done.stderr.splitlines()


def test_a_slow_process_is_named(tmp_path: Path) -> None:
    lines = job(tmp_path, 30, "waiting")
    assert {f"{rank} has [3.0, 3.0]" for rank in range(3)} <= set(lines)
    whom = re.compile(r"waiting for process (0, )?1(, 2)? of this job")  # 0 and 2 may be late, too
    assert any(map(whom.match, lines)), lines


def test_a_process_that_does_not_come_is_given_up_in_a_sentence(tmp_path: Path) -> None:
    lines = job(tmp_path, 0.02, "0", "2")
    says = [line for line in lines if line[:7] in ("0 says ", "2 says ")]
    whom = re.compile(r"says waited .* for process (0, )?1(, 2)? of this job")  # 0 and 2 may be late, too
    assert len(says) == 2 and all(map(whom.search, says)), lines
