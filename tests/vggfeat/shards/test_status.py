"""How far a set is, by the names of its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Command
from tests.vggfeat.shards.made import Job, job
from vggfeat import cli
from vggfeat.shards.shard import describe_shard
from vggfeat.shards.sharded import seal
from vggfeat.shards.status import status_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job(tmp_path_factory.mktemp("images"), bad={3})


def test_what_is_done_begun_failed_and_left(made: Job, tmp_path: Path, run_main: Command) -> None:
    place, plan = made.begun(tmp_path / "set", 2)
    for k in (0, 3):
        describe_shard(place, plan, made.network, k, workers=1)
    for name in ("00000.0", "00001.0", "00002.0", "00002.1", "00002.2"):
        place.put_new(f"attempts/{name}", b"")
    place.put_new("failed/00004.0", b"503, 6 times")
    place.put_new("failed/00004.1", b"no space left")
    place.put_new("failed/00003.0", b"it was described later")
    status = status_of(place, plan)
    assert (status.shards, status.done, status.begun, status.killing) == (6, 2, 2, 1)
    assert (status.failed, status.left, status.sealed) == ({4: "no space left"}, 1, False)
    assert status.images == 4 and status.rate > 0
    ran = run_main(cli.main, "info", str(tmp_path / "set"))
    assert ran.status == 0
    for words in ("2 of 6 done, 2 begun, 1 failed, 1 not begun", "no space left", "4 of 12 done"):
        assert words in " ".join(ran.out.replace("\u2502", " ").split())
    ran = run_main(cli.main, "info", str(tmp_path / "set"), "--verify")
    assert ran.status == 0 and "every byte of 2 shards" in ran.out
    path = tmp_path / "set" / "data" / "00003.parquet"
    content = path.read_bytes()
    spoilt = bytearray(content)
    spoilt[len(spoilt) // 4] ^= 1
    path.write_bytes(spoilt)
    ran = run_main(cli.main, "info", str(tmp_path / "set"), "--verify")
    assert ran.status == 1 and "00003.parquet is" in ran.err
    path.write_bytes(content)
    for k in range(6):
        describe_shard(place, plan, made.network, k, workers=1)
    seal(place, plan)
    assert status_of(place, plan).sealed
    ran = run_main(cli.main, "info", str(tmp_path / "set"), "--verify", "--all")
    assert ran.status == 0 and "every byte" in ran.out and "killing" in ran.out
