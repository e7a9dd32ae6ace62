"""Who waits for another process says for which, and not for ever."""

from __future__ import annotations

import re
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore

from tests import prepared
from tests.conftest import HANG
from tests.pretrain.conftest import environment
from vggfeat import ranks
from vggfeat.errors import VggfeatError

# the second of two processes, which nobody has told where the first one is
JOB = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "nowhere",
}
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
    return prepared.run([script], environment(), 3, timeout=HANG).stderr.splitlines()


def test_a_slow_process_is_named(tmp_path: Path) -> None:
    lines = job(tmp_path, 30, "waiting")
    assert {f"{rank} has [3.0, 3.0]" for rank in range(3)} <= set(lines), lines
    whom = re.compile(r"waiting for process (0, )?1(, 2)? of this job")  # 0 and 2 may be late, too
    assert any(map(whom.match, lines)), lines


def test_a_process_that_does_not_come_is_given_up_in_a_sentence(tmp_path: Path) -> None:
    lines = job(tmp_path, 0.02, "0", "2")
    says = [line for line in lines if line[:7] in ("0 says ", "2 says ")]
    # 0 and 2 may be late, too
    whom = re.compile(r"says waited .* for process (0, )?1(, 2)? of this job")
    assert len(says) == 2 and all(map(whom.search, says)), lines


class Exchange:
    """One that ends at the moment when a wait for it has given up."""

    def __init__(self, failure: str) -> None:
        self.failure, self.waits = failure, 0

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: timedelta | None = None) -> None:
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.failure:
            raise RuntimeError(self.failure)


def test_an_exchange_that_ends_as_a_wait_for_it_gives_up_has_ended_well() -> None:
    meeting = ranks.Meeting(HashStore(), 0, 1, 1.0)
    meeting.wait(Exchange(""))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the other has left"):
        meeting.wait(Exchange("the other has left"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=, not 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2"}, "RANK=nothing, not 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, not 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "LOCAL_WORLD_SIZE=nothing"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "1"},
            "LOCAL_RANK=1, not 0 to 0",
        ),
        (JOB, r"can't meet the other processes of this job at nowhere:\?: .*MASTER_PORT"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(
    environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(VggfeatError, match=says), ranks.joined("cpu"):
        pass


def test_a_first_process_that_is_not_there_yet_is_waited_for_with_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, lines = threading.Event(), []

    def rendezvous(*_: object, **__: object) -> None:
        told.wait()
        raise RuntimeError("nobody")

    def say(text: str) -> None:
        lines.append(text)
        told.set()

    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "rendezvous", rendezvous)
    monkeypatch.setattr(ranks, "WARN_SECONDS", 0.0)
    monkeypatch.setattr(ranks, "say", say)
    with (
        pytest.raises(VggfeatError, match=r"can't meet the other processes of this job.*nobody"),
        ranks.joined("cpu"),
    ):
        pass
    assert lines[0].startswith("waiting for the first process of this job, at nowhere:?")
