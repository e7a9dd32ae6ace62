"""What a release says of itself: the changelog, the version, and what is installed with it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import vggfeat

ROOT = Path(__file__).parents[1]
PACKAGES = ("vggfeat", "pretrain")
# the extras that a user's command asks for; the others are a contributor's
FOR_USERS = ("demo", "export", "cloud", "ray", "search")
DRIVERS = {"s3fs", "gcsfs"}  # which fsspec imports by itself


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == vggfeat.__version__
    assert len(set(headings)) == len(headings)


def test_the_demo_is_what_the_readme_shows() -> None:
    (demo,) = re.findall(
        r"^define DEMO\n(.*?)^endef", (ROOT / "Makefile").read_text(), re.DOTALL | re.MULTILINE
    )
    shown = re.findall(r"^\$ (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    first = shown.index(demo.splitlines()[0])
    assert shown[first : first + 3] == demo.splitlines()


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """The distributions that the packages import from, wherever in a module."""
    modules = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    known = packages_distributions()
    # Triton comes with PyTorch where that has CUDA; elsewhere nothing needs it
    others = modules - sys.stdlib_module_names - set(PACKAGES) - {"triton"}
    return {plain(known[module][0]) for module in others}


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *(line for name in FOR_USERS for line in extras[name])]
    names = [plain(re.split(r"[<>=!~\[; ]", line)[0]) for line in declared]
    assert len(set(names)) == len(names)
    assert set(names) - DRIVERS == imported()


def test_the_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:vggfeat|pretrain|tests|docs|benchmarks)/[\w/.]*)`", text))
    # X and NEW stand for a name
    assert {name for name in named if not (ROOT / name).exists()} == {
        "pretrain/X.py",
        "tests/pretrain/test_X.py",
        "tests/vggfeat/datasets/test_NEW.py",
        "tests/vggfeat/test_X.py",
        "vggfeat/X.py",
        "vggfeat/datasets/NEW.py",
    }
