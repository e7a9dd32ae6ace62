"""Small training sets and short recipes: the same code as a real run, a few seconds of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from tests import prepared
from tests.conftest import HANG, photograph, torchrun

# A net of a tenth of the width on crops of 32 pixels, every augmentation on.
SHORT = [
    *("--recipe", "mini", "--device", "cpu", "--workers", "1", "--log-every", "1"),
    *(
        f"--set={override}"
        for override in ("width=0.1", "crop=32", "batch_size=32", "held_out=0.05", "chance_after=0")
    ),
    *(
        "--set=A-112.train_scale=[36,36]",
        "--set=NET-112.train_scale=[36,36]",
        "--set=NET-112-160.train_scale=[36,64]",
    ),
]


@pytest.fixture(scope="session")
def photos(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photographs, links: 24 training images of each of ten classes and 5 for validation."""
    root = tmp_path_factory.mktemp("photos")
    for split, n in (("train", 24), ("val", 5)):
        for folder in sorted((data / "imagenette144" / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:n]:
                (root / split / folder.name / image.name).symlink_to(image)
    return root


@pytest.fixture(scope="session")
def made_drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    for c, name in enumerate(("blue", "red")):
        for split, n in (("train", 40), ("val", 4)):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = photograph(1000 * c + i + 500 * (split == "val"), 48, 40 + i)
                image[..., 0 if c == 0 else 2] //= 4
                Image.fromarray(image).save(root / split / name / f"{i:02d}.jpg", quality=95)
    return root


@pytest.fixture
def drawings(made_drawings: Path, tmp_path: Path) -> Path:
    """Generated, 40 training images of each of two classes: for what needs no photographs."""
    return Path(shutil.copytree(made_drawings, tmp_path / "drawings"))


def words_of(arguments: Sequence[object], script: Path | None = None) -> list[str]:
    """What stands behind `python`: pretrain.train, or a script in its place, and its arguments."""
    what = ["-m", "pretrain.train"] if script is None else [str(script)]
    return [*what, *map(str, arguments)]


def command(
    arguments: Sequence[object], processes: int = 1, script: Path | None = None
) -> list[str]:
    """The command line, under torchrun for several processes."""
    python = torchrun(processes) if processes > 1 else [sys.executable]
    return [*python, *words_of(arguments, script)]


def environment() -> dict[str, str]:
    """Of a process that is started in any folder."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def processes_of(mark: str) -> list[int]:
    """Those whose environment has the mark, NAME=VALUE."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="session")
def train() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run pretrain.train in processes of its own, which are forked (`tests.prepared`)."""

    def run(
        *arguments: object, processes: int = 1, script: Path | None = None, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        done = prepared.run(words_of(arguments, script), environment(), processes, timeout=HANG)
        assert done.returncode == status, done.stderr[-3000:]
        return done

    return run
