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
    assert rows[0] == ["Z-first", "5", "0.5", "31.25", "4.50", "27.50", "4.50", "10.0 s", "done"]
    assert rows[1] == ["D-256", "8", "0.8", "31.25", "4.50", "-", "-", "16.0 s", ""]
    assert page.count("<svg") == 4 and page.count("<polyline") == 3 * 2 + 4
    # the second stage's curve goes on where the first one's ends
    loss = re.findall(r'points="([^"]*)"', page)[:2]
    assert float(loss[0].split()[-1].split(",")[0]) < float(loss[1].split()[0].split(",")[0])


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
