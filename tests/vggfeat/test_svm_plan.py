"""What `vggfeat svm --dry-run` says of fits and memory, and that a run stays within it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from vggfeat.classify import problem_from
from vggfeat.solver import Solver
from vggfeat.spaces import FACTORS, Examples
from vggfeat.store import Features
from vggfeat.svm_plan import svm_memory, svm_plan

from ..conftest import HANG, Command
from .conftest import cells, contents, feature_file


def test_dry_run_reads_no_descriptor_and_writes_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = feature_file(tmp_path / "f.h5", 50, 8, scales=(32, 48), bad=(4, 9))
    monkeypatch.setattr(Features, "_read", None)
    line = ("svm", "--features", path, "--device", "cpu", "--dry-run")
    before = contents(tmp_path)
    outputs = ("--out", tmp_path / "m.h5", "--submission", tmp_path / "s")
    ran = command(*line, *outputs[:2])
    assert (ran.status, ran.err) == (0, "") and contents(tmp_path) == before
    assert cells(ran.out, "images") == ["50 (2 unreadable)"]
    assert cells(ran.out, "classes") == ["4"] and cells(ran.out, "descriptor") == ["8 values"]
    assert "held in memory" in ran.out and "Gram matrix" in ran.out and "on cpu" in ran.out
    fits = "7 (up to 10) to choose C, then 1 with it, of"
    assert cells(ran.out, "fits")[0].startswith(fits)
    monkeypatch.setattr("vggfeat.descriptors.memory", lambda: 1 << 10)
    ran = command(*line, "--pool", "stack", "--C", 3)
    assert cells(ran.out, "descriptor") == ["16 values"] and "at each pass" in ran.out
    assert cells(ran.out, "fits")[0].startswith("1 with it, of at most")
    assert contents(tmp_path) == before
    (tmp_path / "m.h5").write_bytes(b"")
    ran = command(*line, *outputs[:2])
    told = "without --dry-run this would be refused: "
    assert ran.status == 0 and ran.err_lines == [
        f"{told}{tmp_path / 'm.h5'} exists; give --overwrite, or another --out"
    ]
    assert command(*line, *outputs[:2], "--overwrite").err == ""


def test_what_is_wrong_with_inputs_is_refused_without_reading_descriptors(
    command: Command, tmp_path: Path
) -> None:
    path = feature_file(tmp_path / "f.h5", 50, 8)
    other = feature_file(tmp_path / "g.h5", 40, 8, seed=1)
    few = feature_file(tmp_path / "few.h5", 4, 8, classes=9)
    for words, why in (
        ((path, "--scales", 99), "has no scale 99; it has 32"),
        ((path, "--features", other), "they have 50 and 40 images"),
        ((path, "--ledger", tmp_path / "l.md"), "folder"),
        ((few,), "no readable training image of: "),
        ((tmp_path / "none.h5",), "no feature file at"),
    ):
        ran = command("svm", "--features", *words, "--dry-run")
        assert (ran.status, ran.out) == (1, "") and why in ran.err, words
    assert {each.name for each in tmp_path.iterdir()} == {"f.h5", "g.h5", "few.h5"}


def test_the_plan_is_of_what_the_work_reads(command: Command, tmp_path: Path) -> None:
    files = [
        feature_file(tmp_path / "f.h5", 50, 8, scales=(32, 48), bad=(4,)),
        feature_file(tmp_path / "g.h5", 50, 5, seed=1, dtype="float16"),
    ]
    problem, _, _ = problem_from(files, "stack", read=False)
    planned = svm_plan(problem, C=[1, 2])
    held, _, _ = problem_from(files, "stack")
    assert isinstance(held.X, np.ndarray)
    assert (planned.X, (planned.images, planned.descriptor)) == (held.X.nbytes, held.X.shape)
    assert planned.held and planned.bytes >= planned.X + planned.solver.bytes
    report = tmp_path / "plan.json"
    line = ("svm", *(word for path in files for word in ("--features", path)))
    options = ("--pool", "stack", "--C", "1,2", "--dry-run", "--json", report)
    assert command(*line, *options).status == 0
    assert json.loads(report.read_text()) == asdict(planned)
    assert command(*line, *options).status == 1  # it exists


@pytest.mark.parametrize(("N", "D"), [(30, 8), (64, 8), (65, 8), (300, 4)])
def test_the_space_is_the_solvers_own(N: int, D: int) -> None:
    X = np.random.default_rng(0).random((N, D), dtype=np.float32)
    solver = Solver(X)
    told = svm_memory(N, D, 3)
    assert told.gram == isinstance(solver.space, Examples)
    size = solver.space.size
    assert told.products == (12 if told.gram else 32 + 4 * FACTORS) * size**2
    assert told.states > solver.space.state_bytes * N * 3


def test_memory_grows_with_the_data_up_to_the_blocks() -> None:
    small, large = svm_memory(1_000_000, 256, 10), svm_memory(4_000_000, 256, 10)
    assert not large.gram and large.blocks == small.blocks and large.products == small.products
    # of X as float64 this is a part
    assert large.bytes < 0.6 * 8 * 4_000_000 * 256 + large.states


# Blocks of a few MB, so that what is held shows beside them; and the peak of this process, as the
# kernel tells it. (What getrusage tells begins with that of the process that started it.)
MEASURED = """
import sys
from vggfeat import matrix, rows, solver, store
matrix.BLOCK_BYTES, solver.HELD_BYTES, store.READ_BYTES = 1 << 22, 1 << 22, 1 << 22
rows.BLOCK_VALUES["cpu"] = 1 << 20
from vggfeat.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
[told] = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
print(told.split()[1], file=sys.__stderr__)
"""


def peak(*words: object) -> int:
    """Bytes that a process of the command has held at most."""
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert ran.returncode == 0, ran.stderr
    return 1024 * int(ran.stderr.split()[-1])


def test_a_run_stays_within_what_the_plan_says(tmp_path: Path) -> None:
    """Beside what the program itself takes, which is that of the dry run: X once as float32, and
    never as float64.
    """
    path, report = feature_file(tmp_path / "f.h5", 40_000, 512), tmp_path / "plan.json"
    line = ("svm", "--features", path, "--C", "0.1", "--device", "cpu", "--workers", 1)
    program = peak(*line, "--dry-run", "--json", report)
    planned = json.loads(report.read_text())
    X = 4 * 40_000 * 512
    assert planned["X"] == X and planned["bytes"] < 2 * X
    taken = peak(*line) - program
    # the half is for what libraries load as they run; a second X would take twice that
    assert X < taken < planned["bytes"] + X / 2
