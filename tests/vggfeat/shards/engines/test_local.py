"""Worker processes of this machine: each shard once; one that dies is started again; an image that
ends whoever reads it is found, marked and named.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from tests.vggfeat.shards.made import job
from vggfeat.shards.engines import local
from vggfeat.shards.engines.failed import Failed
from vggfeat.shards.shard import Facts
from vggfeat.shards.worker import Work

# A worker that needs no net: it ends in the shards that its folder names, as often as told there.
STUB = """
import json, os, sys
from pathlib import Path
where = Path(sys.argv[1])
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    k = int(line)
    left = where / f"dies-{k}"
    if left.exists() and (n := int(left.read_text())):
        left.write_text(str(n - 1))
        os.kill(os.getpid(), 9)
    if (where / f"fails-{k}").exists():
        print(json.dumps({"shard": k, "why": "503, 6 times", "refused": False}), flush=True)
        continue
    facts = {"shard": k, "rows": 2, "unreadable": 0, "seconds": 0.1, "put": True}
    print(json.dumps(facts), flush=True)
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setattr(Work, "words", lambda self: [sys.executable, "-c", STUB, self.where])
    return Work(str(tmp_path), "cpu", 1)


def test_a_process_that_dies_is_started_again_and_so_is_its_shard(
    stub: Work, tmp_path: Path
) -> None:
    (tmp_path / "dies-1").write_text("2")
    (tmp_path / "dies-3").write_text("1")
    (tmp_path / "fails-2").touch()
    results = {r.shard: r for r in local.run(stub, range(6), ["cpu", "cpu"])}
    assert sorted(results) == list(range(6))
    assert results.pop(2) == Failed(2, "503, 6 times", False)
    assert all(isinstance(each, Facts) for each in results.values())


def test_a_shard_that_ends_every_process_is_given_up(stub: Work, tmp_path: Path) -> None:
    (tmp_path / "dies-0").write_text("99")
    results = {r.shard: r for r in local.run(stub, [0, 1], ["cpu"])}
    failed = results[0]
    assert isinstance(failed, Failed) and "6 processes ended in it" in failed.why
    assert isinstance(results[1], Facts) and (tmp_path / "dies-0").read_text() == "93"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([sys.executable, "-c", "import sys; sys.exit(3)"], "can't start, it ends with status 3"),
        (["/nowhere/python"], "can't start a worker process: No such file or directory"),
    ],
)
def test_a_process_that_cannot_start_is_told_once(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Work, "words", lambda self: words)
    (result,) = local.run(Work("s", "cpu", 1), range(9), ["cpu"])
    assert isinstance(result, Failed) and result.refused and why in result.why


def test_leaving_early_ends_the_processes(stub: Work) -> None:
    results = local.run(stub, range(100), ["cpu", "cpu"])
    next(iter(results))
    results.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "shards"]


def test_a_process_that_refuses_is_asked_nothing_more(tmp_path: Path) -> None:
    job(tmp_path / "images", n=4).begun(tmp_path / "set", 2)
    work = Work(str(tmp_path / "set"), "cpu", 1, weights="random:A,width=0.06,crop=32")
    (result,) = local.run(work, [0, 1], ["cpu"])
    assert isinstance(result, Failed) and result.refused and "are not those" in result.why
