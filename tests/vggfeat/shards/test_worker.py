"""A process that describes shards for whoever tells it which, and how an image that ends it is
found. With images that do: `engines/test_ray.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vggfeat.shards.made import Job, job
from vggfeat.errors import VggfeatError
from vggfeat.shards.shard import Facts
from vggfeat.shards.worker import Work, attempt, killers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job(tmp_path_factory.mktemp("images"), bad={1})


def test_it_answers_line_by_line(made: Job, tmp_path: Path) -> None:
    place, _ = made.begun(tmp_path / "set", 6)
    words = Work(str(tmp_path / "set"), "cpu", 1).words()
    assert words[0] == sys.executable
    ran = subprocess.run(words, input="1\n0\n1\n", capture_output=True, text=True, check=True)
    first, *answers = [json.loads(line) for line in ran.stdout.splitlines()]
    assert first == "ready"
    told = [(a["shard"], a["rows"], a["unreadable"], a["put"]) for a in answers]
    assert told == [(1, 6, 1, True), (0, 6, 0, True), (1, 0, 0, False)]
    assert sorted(place.names("attempts")) == ["00000.0", "00001.0"]


# What a task in a process of its own does, by what its folder's name says.
STUB = """
import json, os, signal, sys
told, task = json.loads(sys.argv[1]), sys.argv[-1]
k, start, stop = map(int, (task.partition("=")[2] + ":0:99").split(":")[:3])
inside = [row for row in told.get("killers", []) if start <= row < stop]
if inside or stop - start > told.get("most", 99) or (told.get("empty") and start == stop):
    os.kill(os.getpid(), signal.SIGKILL)
if told.get("term") and stop > start:
    os.kill(os.getpid(), signal.SIGTERM)
if told.get("exits") in range(start, stop):
    sys.exit(7)
if told.get("why") and stop > start:
    print(json.dumps({"shard": k, "why": told["why"], "refused": False}))
else:
    print(json.dumps({"shard": k, "rows": 9, "unreadable": 0, "seconds": 1.0, "put": True}))
"""


def stub(monkeypatch: pytest.MonkeyPatch, **told: Any) -> Work:
    monkeypatch.setattr(Work, "words", lambda self: [sys.executable, "-c", STUB, self.where])
    return Work(json.dumps(told), "cpu", 1)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"killers": [0, 5, 11]}, {0: "SIGKILL", 5: "SIGKILL", 11: "SIGKILL"}),
        ({"exits": 7}, {7: "status 7"}),
        ({"most": 4}, {}),  # memory for four at once: no image's fault
    ],
)
def test_images_are_tried_by_halves(
    told: dict[str, Any],
    found: dict[int, str],
    made: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, plan = made.begun(tmp_path / "set", 12)
    what = "it ends the process that reads it ({})"
    assert killers(place, plan, 0, stub(monkeypatch, **told)) == {
        row: what.format(how) for row, how in found.items()
    }


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"empty": 1}, r"a process that reads no image ends, too \(SIGKILL\): see whether"),
        ({"term": 1}, "a process was ended by SIGTERM"),
        ({"why": "503, 6 times"}, "503, 6 times"),
    ],
)
def test_what_is_no_images_fault_marks_none(
    told: dict[str, Any],
    words: str,
    made: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, plan = made.begun(tmp_path / "set", 12)
    with pytest.raises(VggfeatError, match=words):
        killers(place, plan, 0, stub(monkeypatch, **told))


def test_a_shard_that_three_have_begun_is_described_in_a_process_of_its_own(
    made: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, plan = made.begun(tmp_path / "set", 12)
    for number in range(3):
        place.put_new(f"attempts/00000.{number}", b"")
    answer = attempt(place, plan, made.network, 0, stub(monkeypatch))
    assert answer == Facts(0, 9, 0, 1.0, put=True)  # its own, and no other attempt
    assert len(place.names("attempts")) == 3 and place.names("data") == {}
    facts = attempt(place, plan, made.network, 0, stub(monkeypatch, killers=[4]))
    assert (facts.rows, facts.unreadable, facts.put) == (12, 2, True)
