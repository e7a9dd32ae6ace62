"""The page of a run: every stage's figures and curves; written by training itself, and by hand at
any time.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

import pytest

from pretrain import report
from pretrain.standing import DONE, FAILED, INTERRUPTED, RUN, End, Planned, Standing
from pretrain.watch import WEIGHTS
from tests.conftest import Command
from vggfeat.errors import VggfeatError
from vggfeat.terminal import run


def write_log(folder: Path, stage: str, iterations: int, started: float, finished: bool) -> None:
    (folder / stage).mkdir(parents=True)
    identity = {"classes": ["a", "b"], "training images": 40, "learning_rate": 0.01, "crop": 32}
    events = [
        {"event": "start", "iteration": 0, "time": started, "stage": stage, "identity": identity}
    ]
    for i in range(1, iterations + 1):
        train = {
            "loss": 2.0 / i,
            "learning_rate": 0.01,
            "images_per_second": 50.0 + i,
            "seconds": 2.0 * i,
        }
        events.append({"event": "train", "iteration": i, "epoch": i / 10, **train})
    errors = {"top1_error": 31.25, "top5_error": 4.5, "images": 16}
    events.append({"event": "held_out", "iteration": iterations, **errors})
    if finished:
        events.append({"event": "val", "iteration": iterations} | errors | {"top1_error": 27.5})
    (folder / stage / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_stages_in_the_order_in_which_they_began(tmp_path: Path, run_main: Command) -> None:
    write_log(tmp_path, "D-256", 8, 2.0, False)
    write_log(tmp_path, "Z-first", 5, 1.0, True)
    command = functools.partial(run_main, lambda: run(report.app, "python -m pretrain.report"))
    ran = command(tmp_path)
    assert (ran.status, ran.err) == (0, "")
    page = (tmp_path / "report.html").read_text()
    assert page.index("Z-first") < page.index("D-256")
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", row)
        for row in re.findall(r"<tr>(<td>.*?)</tr>", page, re.S)
    ]
    errors = ["31.25", "4.50"]
    assert rows[0] == ["Z-first", "done", "5", "0.5", *errors, "27.50", "4.50", "10.0 s"]
    assert rows[1] == ["D-256", "stopped", "8", "0.8", *errors, "-", "-", "16.0 s"]
    assert state_of(page) == "stopped at 8 iterations of D-256"
    assert page.count("<svg") == 4 and page.count("<polyline") == 3 * 2 + 4
    # the second stage's curve goes on where the first one's ends; all charts have one axis of
    # iterations, and one legend
    loss = re.findall(r'points="([^"]*)"', page)[:2]
    assert float(loss[0].split()[-1].split(",")[0]) < float(loss[1].split()[0].split(",")[0])
    charts = re.findall(r'<svg viewBox="([^"]*)".*?</svg>', page)
    assert len({*charts}) == 1 and page.count('class="soft legend"') == 1
    axes = [
        re.findall(r'<text x="([^"]*)" y="[^"]*" text-anchor="middle">(\d+)</text>', svg)
        for svg in re.findall(r"<svg.*?</svg>", page)
    ]
    assert len(axes[0]) > 2 and all(axis == axes[0] for axis in axes)


def state_of(page: str) -> str:
    [state] = re.findall(r'<p class="state">([^<]*)</p>', page)
    return str(state)


def test_how_a_run_stands_is_said_at_the_top(tmp_path: Path) -> None:
    """What was trained, what ended it, and what is to come, as its folder tells."""

    def told(end: End | None, working: bool = False) -> tuple[str, list[str]]:
        Standing(stages=stages, end=end).write(tmp_path)
        report.write_report(tmp_path, tmp_path / "r.html", working=working)
        page = (tmp_path / "r.html").read_text()
        every = re.findall(r"<tr>(<td>.*?)</tr>", page, re.S)
        rows = [row for row in every if any(f">{stage.name}<" in row for stage in stages)]
        return state_of(page), [", ".join(re.findall(r">([^<>]+)</td>", row)[:3]) for row in rows]

    write_log(tmp_path, "A-1", 5, 1.0, True)
    write_log(tmp_path, "D-1", 540, 2.0, False)
    write_log(tmp_path, "B-0", 5, 0.5, False)  # of another command
    lengths = {"A-1": 4200, "D-1": 4200, "D-2": 1200}
    stages = [Planned(name=name, iterations=n) for name, n in lengths.items()]
    end = End(how=INTERRUPTED, stage="D-1", iteration=547)
    state, rows = told(end)
    assert state == "interrupted at 547 of 4,200 iterations of D-1; 1 stage to come"
    assert rows == [
        *("A-1, done, 5 of 4,200", "D-1, interrupted, 547 of 4,200", "D-2, to come, 0 of 1,200")
    ]
    assert told(None)[0] == "stopped at 540 of 4,200 iterations of D-1; 1 stage to come"
    state, rows = told(None, working=True)
    assert state == "running: 540 of 4,200 iterations of D-1; 1 stage to come"
    assert rows[1:] == ["D-1, running, 540 of 4,200", "D-2, to come, 0 of 1,200"]
    failed = End(how=FAILED, stage="D-1", iteration=547, why="D-1, iteration 547: out of <memory>")
    state, rows = told(failed)
    assert state.startswith("failed: D-1, iteration 547: out of &lt;memory&gt;")
    assert rows[1] == "D-1, failed, 547 of 4,200"
    (tmp_path / "D-1" / WEIGHTS).touch()
    assert told(None)[0] == "stopped; 1 stage to come"
    del stages[2:]
    assert told(End(how=DONE, stage="D-1", iteration=600))[0] == "done"
    (tmp_path / RUN).write_text('{"end": {"how": "well", "stage": "D-1", "iteration": 1}}')
    with pytest.raises(VggfeatError, match=r"run\.json: .*how"):
        report.write_report(tmp_path, tmp_path / "r.html")


def test_an_older_log_tells_how_long_its_stage_will_be(tmp_path: Path) -> None:
    write_log(tmp_path, "A-1", 5, 1.0, False)
    log = tmp_path / "A-1" / "log.jsonl"
    for lengths in ({"iterations": 9, "epochs": 0}, {"iterations": 0, "epochs": 1.75}):
        events = [json.loads(line) for line in log.read_text().splitlines()]
        events[0]["identity"] |= {**lengths, "batch_size": 8}  # 40 images: 5 an epoch
        log.write_text("".join(json.dumps(event) + "\n" for event in events))
        report.write_report(tmp_path, tmp_path / "r.html")
        assert "stopped at 5 of 9 iterations of A-1" in (tmp_path / "r.html").read_text()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VggfeatError, match="no stage with a log"):
        report.write_report(tmp_path, tmp_path / "r.html")
    (tmp_path / "A-1").mkdir()
    (tmp_path / "A-1" / "log.jsonl").write_text("no json\n")
    with pytest.raises(VggfeatError, match="is no log of a stage"):
        report.write_report(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "text", [b"[1]\n", b"null\n", b"[" * 100_000 + b"\n", b"\xff\n", b"9" * 5000 + b"\n"]
)
def test_a_line_that_is_no_event_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "A-1").mkdir()
    (tmp_path / "A-1" / "log.jsonl").write_bytes(text)
    with pytest.raises(VggfeatError, match=r"log\.jsonl"):
        report.write_report(tmp_path, tmp_path / "r.html")


def test_a_loss_that_left_the_numbers_is_shown_as_none(tmp_path: Path) -> None:
    write_log(tmp_path, "A-1", 1, 1.0, False)
    with open(tmp_path / "A-1" / "log.jsonl", "a") as log:
        log.write('{"event": "train", "iteration": 2, "loss": NaN, "seconds": Infinity}\n')
    report.write_report(tmp_path, tmp_path / "r.html")
    assert "nan" not in (tmp_path / "r.html").read_text().lower().partition("<body")[2]


def test_one_measurement_is_a_dot_and_none_is_said(tmp_path: Path) -> None:
    """Of a localisation run, whose error isn't called top-1."""
    write_log(tmp_path, "A-1", 1, 1.0, False)
    log = tmp_path / "A-1" / "log.jsonl"
    start, train = log.read_text().splitlines(keepends=True)[:2]
    log.write_text(start + train)
    report.write_report(tmp_path, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == page.count('<circle class="dot"') == 3
    assert "Held-out error, %: none measured yet" in page
    with open(log, "a") as more:
        more.write('{"event": "val", "iteration": 1, "localisation_error": 100.0}\n')
    report.write_report(tmp_path, tmp_path / "r.html")
    assert state_of((tmp_path / "r.html").read_text()) == "done: localisation error 100.00 %"


def test_a_page_is_never_written_into_a_pipe(tmp_path: Path) -> None:
    """Training writes it, too: its reader would be waited for, in a wait that no signal ends."""
    write_log(tmp_path, "A-1", 1, 1.0, False)
    os.mkfifo(tmp_path / "report.html")
    reader = os.open(tmp_path / "report.html", os.O_RDONLY | os.O_NONBLOCK)  # one that would come
    try:
        with pytest.raises(VggfeatError, match=r"report\.html is no regular file"):
            report.write_report(tmp_path, tmp_path / "report.html")
    finally:
        os.close(reader)
