"""A run to look at: how it stands, and loss, held-out errors, learning rate and images/s of its
stages, as one HTML page.

    python -m pretrain.report runs/D        # writes runs/D/report.html, also while the run goes on

`pretrain.train` writes it whenever a stage ends, fails or is interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes time
    from vggfeat.start import begin

    begin("pretrain.report")

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from markupsafe import Markup

from pretrain.standing import DONE, FAILED, Standing, at_work, standing_of
from pretrain.watch import LOG, WEIGHTS, events, is_number
from vggfeat.checked import regular
from vggfeat.errors import VggfeatError, reason
from vggfeat.files import check_outputs, whole
from vggfeat.machine import duration
from vggfeat.metrics import error_text
from vggfeat.options import Overwrite, Strict, with_debug
from vggfeat.page import Section, Series, chart, html, join, legend, page, table
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
HEADLINES = {"localisation_error": "localisation error", "top1_error": "validation top-1 error"}
HEAD = (
    *("stage", "state", "iterations", "epochs", "held-out top-1, %", "top-5, %"),
    *("validation top-1, %", "top-5, %", "time"),
)
CURVES = {  # key of a line of the log -> what it is called, and whether its axis is logarithmic
    "loss": ("training loss", False),
    "learning_rate": ("learning rate", True),
    "images_per_second": ("images/s", False),
}


def write_report(folder: Path, target: Path, *, working: bool = False) -> None:
    """The page of all stages under a run's folder. working: this process is at work in it; else
    whether another one is, is asked. Raises VggfeatError where there are no stages, or a log is
    damaged.
    """
    logs = _stages(folder)
    standing = standing_of(folder)
    at = standing.end is None if working else at_work(folder)
    if at:  # what has ended was an earlier command
        standing = replace(standing, end=None)
    stages = _told(folder, logs, standing, at)
    identity = next((event for event in logs[0][1] if event["event"] == "start"), {}).get(
        "identity"
    )
    identity = identity if isinstance(identity, dict) else {}
    classes = identity.get("classes")
    shown = {
        k: v for k, v in identity.items() if not isinstance(v, list | dict) or len(str(v)) < 60
    }
    recipe = [(key, json.dumps(value)) for key, value in shown.items()]
    text = page(
        f"Training: {', '.join(name for name, _ in logs)}",
        f"{_counted(identity.get('training images'), 'training image')} of "
        f"{_counted(len(classes) if isinstance(classes, list) else None, 'class', 'classes')}",
        [
            Section("state", "", html('<p class="state">{x}</p>', x=_in_words(stages, standing))),
            Section(
                "stages",
                "Stages",
                table(HEAD, [stage.row() for stage in stages], numbers=range(2, 9)),
                "Iterations are of the most that a stage takes; it ends earlier where its held-out"
                " error stops falling.",
            ),
            Section(
                "curves",
                "Curves",
                _curves(stages),
                "Held-out and validation errors are of a central crop. Loss and images/s are means"
                " of the iterations between two lines of the log.",
            ),
            Section("recipe", f"Recipe of {logs[0][0]}", table(("", ""), recipe, numbers=())),
        ],
    )
    with whole(target) as partial:  # not into a pipe, whose reader may never come
        partial.write_bytes(text.encode())


def _counted(n: Any, one: str, many: str = "") -> str:
    """ "1 class", "1,000 classes"; of an older log, which doesn't tell, "? classes"."""
    told = f"{n:,}" if is_number(n) else "?"
    return f"{told} {one if n == 1 else many or one + 's'}"


@dataclass(frozen=True)
class Told:
    """A stage of the run. log: its events, [] of one to come. planned: the most iterations, 0 where
    nothing tells them. state: in a word or two.
    """

    name: str
    log: list[dict[str, Any]]
    planned: int
    iteration: int
    state: str

    def of(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.log if each["event"] == event]

    @property
    def progress(self) -> str:
        """ "547 of 4,200"."""
        return f"{self.iteration:,}" + (f" of {self.planned:,}" if self.planned else "")

    def row(self) -> tuple[str, ...]:
        """Of `HEAD`."""
        if not self.log:
            return (self.name, self.state, self.progress, *("-" for _ in HEAD[3:]))
        last = next(reversed(self.of("train")), {"epoch": 0.0, "seconds": 0.0})
        return (
            self.name,
            self.state,
            self.progress,
            f"{last.get('epoch') or 0:.1f}",
            *_errors(next(reversed(self.of("held_out")), None)),
            *_errors(next(iter(self.of("val")), None)),
            duration(last.get("seconds") or 0.0),
        )


TO_COME, RUNNING, STOPPED = "to come", "running", "stopped"


def _told(
    folder: Path,
    logs: Sequence[tuple[str, list[dict[str, Any]]]],
    standing: Standing,
    working: bool,
) -> list[Told]:
    """Every stage, those to come last. working: whether a process is at work in the run."""
    end, found = standing.end, list[Told]()
    planned = {stage.name: stage.iterations for stage in standing.stages}
    begun = dict(logs)
    for name in dict.fromkeys((*begun, *planned)):
        log = begun.get(name, [])
        iteration = max((e["iteration"] for e in log if e["event"] != "compiled"), default=0)
        done = (folder / name / WEIGHTS).exists() or any(e["event"] == "val" for e in log)
        state = STOPPED if log else TO_COME
        if done:
            state = DONE
        elif end is not None and name == end.stage:
            state, iteration = end.how, end.iteration
        elif working and name in (planned or [logs[-1][0]]):
            before = [each.state for each in found if each.name in planned]
            state = RUNNING if all(each == DONE for each in before) else TO_COME
        found.append(Told(name, log, planned.get(name) or _most(log), iteration, state))
    return found


def _most(log: Sequence[Mapping[str, Any]]) -> int:
    """The iterations that a stage takes at most, as the start of its log has them; else 0."""
    identity = next((event.get("identity") for event in log if event["event"] == "start"), None)
    if not isinstance(identity, dict):
        return 0
    names = ("iterations", "epochs", "training images", "batch_size")
    values = [identity.get(name) for name in names]
    iterations, epochs, images, size = (x if x and is_number(x) else 0 for x in values)
    if iterations or not (epochs and size):
        return int(iterations)
    return max(1, round(epochs * (images // size)))


def _in_words(stages: Sequence[Told], standing: Standing) -> str:
    """How the run stands, in a sentence."""
    # what the last command trains, not what others have left in the folder
    last = {stage.name for stage in standing.stages}
    stages = [each for each in stages if each.name in last] or stages
    at = next((each for each in stages if each.state not in (DONE, TO_COME)), None)
    to_come = [each for each in stages if each.state == TO_COME]
    rest = f"; {len(to_come)} stage{'s' * (len(to_come) > 1)} to come" if to_come else ""
    if at is None:
        if to_come:
            return f"{STOPPED}{rest}"
        val: Mapping[str, Any] = next(iter(stages[-1].of("val")), {})
        for key, kind in HEADLINES.items():
            if val.get(key) is not None:
                return f"{DONE}: {kind} {error_text(val[key])} %"
        return DONE
    where = f"{at.progress} iterations of {at.name}"
    if at.state == FAILED and standing.end is not None:
        return f"failed: {standing.end.why or where}{rest}"
    return f"{at.state}{':' if at.state == RUNNING else ' at'} {where}{rest}"


def _curves(stages: Sequence[Told]) -> Markup:
    """Four charts of one size and with one axis below them, a colour a stage in each."""
    curves: dict[str, list[Series]] = {key: [] for key in CURVES}
    errors: list[Series] = []
    begun, done = [each for each in stages if each.log], 0
    for i, stage in enumerate(begun):
        for key, series in curves.items():
            series.append(_curve(stage.name, stage.of("train"), key, done, i))
        held_out = stage.of("held_out")
        for key, kind in ERRORS.items():
            if any(key in event for event in held_out):
                style = "dashed" if key == "top5_error" else ""
                errors.append(_curve(f"{stage.name} {kind}", held_out, key, done, i, style))
        done += stage.iteration
    charts = [("held-out error, %", errors, False)]
    charts[:0] = [(CURVES["loss"][0], curves["loss"], False)]
    charts += [(CURVES[key][0], curves[key], CURVES[key][1]) for key in [*CURVES][1:]]
    drawn = []
    for name, series, log in charts:
        caption = name[0].upper() + name[1:]
        if not any(len(s.x) for s in series):
            nothing = (
                '<figure class="chart"><figcaption>{x}: none measured yet</figcaption></figure>'
            )
            drawn.append(html(nothing, x=caption))
            continue
        if any(s.style == "dashed" for s in series):
            caption += "; dashed: top-5"
        drawn.append(
            chart(
                series,
                "iterations",
                name,
                x_range=(0, done or 1),
                y_range=None if log else _from_zero(series),
                log_y=log,
                caption=caption,
                named=False,
            )
        )
    names = legend([stage.name for stage in begun]) if len(begun) > 1 else ""
    return html('{names}<div class="charts two">{c}</div>', names=names, c=join(drawn))


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


def _curve(
    name: str,
    log: list[dict[str, Any]],
    key: str,
    start: int,
    colour: int,
    style: str = "",
) -> Series:
    points = [
        (start + event["iteration"], event[key]) for event in log if event.get(key) is not None
    ]
    x, y = np.array(points, float).reshape(-1, 2).T
    return Series(name, x, y, style=style, colour=colour)


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
