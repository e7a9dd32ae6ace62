"""What the code looks like, by the same rules before and after a change: arrows, sizes, types.

    python -m benchmarks.house BEFORE AFTER
    python -m benchmarks.house . --features feats.h5 --json house.json

Each argument is a checkout; `--features` is a file for `vggfeat info`. A module is a file of
`vggfeat` or `pretrain`, an arrow an import of one by another, wherever it stands, but for those
that only a type checker reads. A level is the longest way down, 0 where there is a circle. A
function's lines count its docstring; its branches are those of McCabe's measure, and lines are long
as ruff has it, which lets a trailing remark for a tool pass. Starts are seconds of whole processes,
the checkouts taking turns; medians, and modules that a process has imported.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from vggfeat.terminal import columns, out

PACKAGES, OTHERS = ("vggfeat", "pretrain"), ("benchmarks", "tests")
LONG_FILE, LONG_FUNCTION, LONG_LINE, BRANCHY = 300, 60, 100, 15
STARTS = {
    "import vggfeat": ["-c", "import vggfeat"],
    "vggfeat --help": ["-m", "vggfeat", "--help"],
    "vggfeat info": ["-m", "vggfeat", "info"],
}


def sources(root: Path, *packages: str) -> dict[str, Path]:
    """Module -> its file, a package by its own name."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(node: ast.AST, inside: bool = True) -> Iterator[str]:
    """Full names of all that a file imports. inside: functions, too; never under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.FunctionDef) and not inside:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module and not child.level, "imports name the package"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imported(child, inside)


def arrows(
    root: Path, *packages: str, inside: bool = True, others: bool = False
) -> dict[str, set[str]]:
    """Module -> the modules that it imports. others: and the names of other packages.

    `from vggfeat import load` is an arrow to vggfeat itself, `from vggfeat import svm` to the
    module.
    """
    files = sources(root, *packages)
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        found[module] = set()
        for name in imported(ast.parse(path.read_text(encoding="utf-8")), inside):
            ours = [part for part in (name, name.rpartition(".")[0]) if part in files]
            if ours or others:
                found[module].add(ours[0] if ours else name.partition(".")[0])
        found[module].discard(module)
    return found


def levels(graph: dict[str, set[str]]) -> int:
    """How many modules the longest way down has; 0 where there is a circle."""
    depth: dict[str, int] = {}
    try:
        for name in TopologicalSorter(graph).static_order():
            depth[name] = 1 + max((depth[below] for below in graph[name]), default=0)
    except CycleError:
        return 0
    return max(depth.values())


def circles(graph: dict[str, set[str]]) -> int:
    """Groups of modules that reach each other."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for below in graph[todo.pop()] - seen:
                seen.add(below)
                todo.append(below)
        return seen

    reached = {name: reach(name) for name in graph}
    groups = {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in graph
        if name in reached[name]
    }
    return len(groups)


def functions(path: Path) -> Iterator[int]:
    """Lines of each function and method."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def complaints(root: Path, *words: str) -> int:
    """Lines of a checker's output that name a place in a file."""
    ran = subprocess.run([sys.executable, "-m", *words], cwd=root, capture_output=True, text=True)
    return sum(
        re.match(r"\S+:\d+:(\d+:)? \S", line) is not None for line in ran.stdout.splitlines()
    )


def lint(root: Path, rule: str, setting: str, *folders: str) -> int:
    """Complaints by one of ruff's rules alone."""
    words = ["ruff", "check", "--isolated", "--select", rule, "--config", setting]
    return complaints(root, *words, "--output-format", "concise", *folders)


def shape(root: Path) -> dict[str, Any]:
    """What can be counted without running the code."""
    files = sources(root, *PACKAGES)
    lengths = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    long = [n for n in lengths.values() if n > LONG_FILE]
    longest = max(lengths, key=lengths.__getitem__)
    function_lines = [n for path in files.values() for n in functions(path)]
    library, both = arrows(root, "vggfeat"), arrows(root, *PACKAGES)
    return {
        "modules, vggfeat": len(library),
        "arrows, vggfeat": sum(map(len, library.values())),
        "levels, vggfeat": levels(library),
        "modules, both": len(both),
        "arrows, both": sum(map(len, both.values())),
        "levels, both": levels(both),
        "circles": circles(both),
        "arrows from vggfeat to pretrain": sum(
            below.startswith("pretrain") for name in library for below in both[name]
        ),
        "lines": sum(lengths.values()),
        "longest file": f"{lengths[longest]} ({longest})",
        f"files over {LONG_FILE} lines": len(long),
        "functions": len(function_lines),
        "median function, lines": statistics.median(function_lines),
        f"functions over {LONG_FUNCTION} lines": sum(n > LONG_FUNCTION for n in function_lines),
        f"functions over {BRANCHY} branches": lint(
            root, "C901", f"lint.mccabe.max-complexity={BRANCHY}", *PACKAGES
        ),
        f"lines over {LONG_LINE}, all Python": lint(
            root, "E501", f"lint.pycodestyle.max-line-length={LONG_LINE}", *PACKAGES, *OTHERS
        ),
        "mypy --strict, vggfeat and pretrain": complaints(
            root,
            "mypy",
            "--strict",
            "--ignore-missing-imports",
            *(f"-p{name}" for name in PACKAGES),
        ),
    }


def start(root: Path, words: list[str]) -> tuple[float, int]:
    """Seconds that a process takes, and how many modules it imports."""
    env = {**os.environ, "PYTHONPATH": str(root.resolve())}
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], env=env, cwd="/", capture_output=True, check=True)
    seconds = time.perf_counter() - began
    told = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        env=env,
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    return seconds, told.stderr.count("import time:") - 1


def main() -> None:
    """Print a table with a column a checkout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("roots", type=Path, nargs="+", metavar="CHECKOUT")
    parser.add_argument("--features", type=Path, help="a feature file, for `vggfeat info`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    figures = {str(root): shape(root) for root in options.roots}
    for what, words in STARTS.items():
        if words[-1] == "info":
            if options.features is None:
                continue
            words = [*words, str(options.features.resolve())]
        runs: dict[str, list[tuple[float, int]]] = {str(root): [] for root in options.roots}
        for _ in range(options.repeats):
            for root in options.roots:
                runs[str(root)].append(start(root, words))
        for root, measured in runs.items():
            figures[root][f"{what}, s"] = round(statistics.median(s for s, _ in measured), 2)
            figures[root][f"{what}, modules"] = measured[-1][1]
    table = columns("", *figures)
    for what in next(iter(figures.values())):
        table.add_row(what, *(str(figures[root][what]) for root in figures))
    out.print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
