"""docs/tour.ipynb runs, in a kernel of its own and an empty folder, and shows what is stored in it.

`python -m tests.test_tour` runs it, and stores what it shows.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from ast import literal_eval
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from .conftest import HANG

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "docs/tour.ipynb"
LARGEST = 200_000  # bytes of the notebook, with its pictures


def run_tour(folder: Path) -> Any:
    """The notebook with the outputs of a run in that folder. Raises where a cell does."""
    notebook = nbformat.read(TOUR, as_version=4)
    firsts = {"PATH": Path(sys.executable).parent, "PYTHONPATH": ROOT}
    paths = {key: f"{path}{os.pathsep}{os.environ.get(key, '')}" for key, path in firsts.items()}
    own = dict.fromkeys(("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"), str(folder))
    client = NotebookClient(
        notebook,
        timeout=HANG,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env={**os.environ, **paths, **own})
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def shown(notebook: Any) -> list[list[tuple[str, ...]]]:
    """What each cell shows, without what another machine has otherwise: kinds, and how texts
    begin. Progress, on stderr, is left out.
    """
    return [
        [
            (
                output.output_type,
                *sorted(output.get("data", {})),
                *re.findall(r"^<?\w+", output.get("data", {}).get("text/plain", "")),
            )
            for output in cell.get("outputs", [])
            if output.get("name") != "stderr"
        ]
        for cell in notebook.cells
    ]


def guesses(notebook: Any) -> list[str]:
    """What the classifier says of pieces that are new to it."""
    (found,) = (
        cell.outputs[0] for cell in notebook.cells if cell.source == "model.predict(pieces)"
    )
    classes: list[str] = literal_eval(found.data["text/plain"])
    return classes


def test_the_tour_runs_and_shows_what_is_stored(tmp_path: Path) -> None:
    stored, made = nbformat.read(TOUR, as_version=4), run_tour(tmp_path)
    assert shown(made) == shown(stored)
    same = [one == other for one, other in zip(guesses(made), guesses(stored), strict=True)]
    assert sum(same) >= 13


def test_the_tour_is_small_and_of_no_machine() -> None:
    nbformat.validate(nbformat.read(TOUR, as_version=4))
    text = TOUR.read_text()
    assert len(text) < LARGEST
    for word in (str(ROOT), str(Path.home()), tempfile.gettempdir(), "arning", "Traceback"):
        assert word not in text
    for target in re.findall(r"\]\(([\w.-]+\.md)\)", text):
        assert (TOUR.parent / target).is_file(), target


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        nbformat.write(run_tour(Path(empty)), TOUR)
