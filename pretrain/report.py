"""A run to look at: loss, held-out errors, learning rate and images/s of its stages, as one HTML
page.

    python -m pretrain.report runs/D        # writes runs/D/report.html, also while the run goes on

`pretrain.train` writes it whenever a stage ends, fails or is interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes time
    from vggfeat.start import begin

    begin("pretrain.report")

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from pretrain.watch import LOG, WEIGHTS, events
from vggfeat.checked import regular
from vggfeat.errors import VggfeatError, reason
from vggfeat.files import check_outputs, whole
from vggfeat.machine import duration
from vggfeat.metrics import error_text
from vggfeat.options import Overwrite, Strict, with_debug
from vggfeat.page import Section, Series, chart, html, join, page, table
from vggfeat.terminal import out, run, say

REPORT = "report.html"
MOST_BYTES = 1 << 28  # of a log: a week of training at its default pace is 4 MB


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Strict)
@with_debug
def report(
    folder: Annotated[
        Path, typer.Argument(help="The folder of a run, with a folder for each stage.")
    ],
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The page to write; default: FOLDER/report.html.", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a page of a run's curves."""
    check_outputs({"--out": out_file}, inputs=[folder], overwrite=overwrite)
    target = out_file or folder / REPORT  # the run's own page is written anew whenever a stage ends
    write_report(folder, target)
    out.print(str(target))


ERRORS = {"top1_error": "top-1", "top5_error": "top-5", "localisation_error": "boxes"}


def write_report(folder: Path, target: Path) -> None:
    """The page of all stages under a run's folder. Raises VggfeatError where there are none, or a
    log is damaged.
    """
    stages = _stages(folder)
    series: dict[str, list[Series]] = {"loss": [], "learning_rate": [], "images_per_second": []}
    errors: list[Series] = []
    rows = []
    done = 0
    for name, log in stages:
        train = [event for event in log if event["event"] == "train"]
        held_out = [event for event in log if event["event"] == "held_out"]
        val = next((event for event in log if event["event"] == "val"), None)
        for key, curves in series.items():
            curves.append(_curve(name, train, key, done))
        for key, kind in ERRORS.items():
            if any(key in event for event in held_out):
                errors.append(_curve(f"{name} {kind}", held_out, key, done))
        last = train[-1] if train else {"iteration": 0, "seconds": 0.0}
        ended = "done" if val or (folder / name / WEIGHTS).exists() else ""
        rows.append(
            (
                name,
                last["iteration"],
                f"{last.get('epoch') or 0:.1f}",
                *_errors(held_out[-1] if held_out else None),
                *_errors(val),
                duration(last.get("seconds") or 0.0),
                ended,
            )
        )
        done += int(last["iteration"])
    head = (
        "stage",
        "iterations",
        "epochs",
        "held-out top-1, %",
        "top-5, %",
        "validation top-1, %",
        "top-5, %",
        "time",
        "",
    )
    charts = [
        chart(series["loss"], "iterations", "training loss", y_range=_from_zero(series["loss"])),
        chart(errors, "iterations", "held-out error, %", y_range=_from_zero(errors)),
        chart(series["learning_rate"], "iterations", "learning rate", log_y=True),
        chart(
            series["images_per_second"],
            "iterations",
            "images/s",
            y_range=_from_zero(series["images_per_second"]),
        ),
    ]
    identity = next((event for event in stages[0][1] if event["event"] == "start"), {}).get(
        "identity"
    )
    identity = identity if isinstance(identity, dict) else {}
    classes = identity.get("classes")
    shown = {
        k: v for k, v in identity.items() if not isinstance(v, list | dict) or len(str(v)) < 60
    }
    recipe = [(key, json.dumps(value)) for key, value in shown.items()]
    text = page(
        f"Training: {', '.join(name for name, _ in stages)}",
        f"{identity.get('training images', '?')} training images of "
        f"{len(classes) if isinstance(classes, list) else '?'} classes",
        [
            Section("stages", "Stages", table(head, rows, numbers=range(1, 8))),
            Section(
                "curves",
                "Curves",
                html('<div class="charts">{c}</div>', c=join(charts)),
                "Held-out and validation errors are of a central crop. Loss and images/s are means"
                " of the iterations between two lines of the log.",
            ),
            Section("recipe", f"Recipe of {stages[0][0]}", table(("", ""), recipe, numbers=())),
        ],
    )
    with whole(target) as partial:  # not into a pipe, whose reader may never come
        partial.write_bytes(text.encode())


def _stages(folder: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, events) of each stage with a log, in the order in which they were begun."""
    logs = sorted(folder.glob(f"*/{LOG}"))
    if not logs:
        raise VggfeatError(f"no stage with a {LOG} under {folder}: give the folder of a run")
    found = []
    for path in logs:
        if regular(path, "log") > MOST_BYTES:
            raise VggfeatError(
                f"{path} is no log of a stage: it is longer than {MOST_BYTES:,} bytes"
            )
        try:
            lines, dropped = events(path)
            log = [_without_nan(event) for event in lines]
            start = next((event for event in log if event["event"] == "start"), {})
            began = float(start.get("time") or path.stat().st_mtime)  # older logs have none
        except OSError as error:
            raise VggfeatError(f"{path} can't be read: {reason(error)}") from error
        if dropped and log:
            say(f"warning: {path}: {dropped} lines are no events of a stage and are left out")
        elif dropped:
            raise VggfeatError(f"{path} is no log of a stage: none of its lines is an event")
        found.append((began, path.parent.name, log))
    return [(name, log) for _, name, log in sorted(found, key=lambda stage: stage[0])]


def _without_nan(event: dict[str, Any]) -> dict[str, Any]:
    """An event whose figures that are not finite, as a loss may be, are None."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()
    }


def _curve(name: str, log: list[dict[str, Any]], key: str, start: int) -> Series:
    points = [
        (start + event["iteration"], event[key]) for event in log if event.get(key) is not None
    ]
    x, y = np.array(points, float).reshape(-1, 2).T
    return Series(name, x, y)


def _from_zero(series: list[Series]) -> tuple[float, float]:
    values = np.concatenate([s.y[np.isfinite(s.y)] for s in series]) if series else np.zeros(0)
    return 0.0, 1.05 * float(values.max()) if len(values) and values.max() > 0 else 1.0


def _errors(event: dict[str, Any] | None) -> tuple[str, str]:
    if event is None:
        return "-", "-"
    if "localisation_error" in event:
        return f"{error_text(event['localisation_error'])} (boxes)", "-"
    return tuple(  # type: ignore[return-value]
        error_text(event.get(key)) for key in ("top1_error", "top5_error")
    )


if __name__ == "__main__":
    run(app, "python -m pretrain.report")
