"""The plan of the house, in imports: which module may take what from which."""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import house

from .conftest import HANG

ROOT = Path(__file__).parents[1]
FEATURES = ROOT / "tests/formats/version2/features.h5"

# The only ones that print, or hand over what does: the others give back what there is to say.
PRINTING = {
    "vggfeat.cli",
    "vggfeat.cli_classify",
    "vggfeat.cli_explain",
    "vggfeat.cli_extract",
    "vggfeat.cli_info",
    "vggfeat.cli_neighbours",
    "vggfeat.cli_push",
    "vggfeat.describe",  # the bar of `embed(progress=True)`
    "vggfeat.ranks",  # no wait for another process is silent
    "pretrain.train",
    "pretrain.evaluate",
    "pretrain.localise",
    "pretrain.reproduce",
    "pretrain.reproduction",  # a bar for each net, the tables as they are made
    "pretrain.export",
    "pretrain.report",
    "pretrain.runs",  # nets and rows that are left out; a bar for each net
    "pretrain.stages",  # what a run says as it goes
    "pretrain.trainer",
    "pretrain.replica",  # that a net can't be compiled
    "pretrain.watch",
    "pretrain.readers",
}
# What takes seconds to import, and what does without it.
HEAVY = {"torch", "torchvision", "timm", "sklearn"}
LIGHT = (
    *("vggfeat", "vggfeat.__main__", "vggfeat.start", "vggfeat.cli", "vggfeat.options"),
    *("vggfeat.cli_classify", "vggfeat.cli_extract", "vggfeat.cli_info"),
    *("vggfeat.cli_explain", "vggfeat.cli_neighbours"),
    *("vggfeat.cli_push", "vggfeat.hub", "vggfeat.place", "vggfeat.parquet"),
    *("vggfeat.features", "vggfeat.shards.plan", "vggfeat.shards.sharded"),
    *("vggfeat.datasets.remote", "vggfeat.datasets.containers"),
    *("vggfeat.terminal", "vggfeat.machine", "vggfeat.devices", "vggfeat.errors"),
    *("vggfeat.files", "vggfeat.checked", "vggfeat.hdf5", "vggfeat.store", "vggfeat.writer"),
    *("vggfeat.convert", "vggfeat.aggregate", "vggfeat.metrics", "vggfeat.page"),
    *("vggfeat.decode", "vggfeat.headers", "vggfeat.images", "vggfeat.notebook"),
    *("vggfeat.datasets", "vggfeat.datasets.items", "vggfeat.datasets.protocol"),
    *("vggfeat.datasets.voc", "vggfeat.datasets.caltech", "vggfeat.datasets.imagenet"),
    *("vggfeat.datasets.folder", "vggfeat.datasets.csv_file", "vggfeat.datasets.digits"),
    "vggfeat.datasets.photographs",
    *("vggfeat.datasets.splits", "vggfeat.datasets.download", "vggfeat.datasets.devkit"),
    *("vggfeat.datasets.annotation", "vggfeat.datasets.boxes"),
    *("vggfeat.datasets.voc_action", "vggfeat.regions"),
    *("vggfeat.results", "vggfeat.problem", "vggfeat.classify", "vggfeat.report"),
    *("vggfeat.mistakes", "vggfeat.exhibits", "vggfeat.same_run"),
    *("vggfeat.table1", "vggfeat.versions"),
    *("vggfeat.audit", "vggfeat.audit_page"),
    *("pretrain.recipe", "pretrain.train", "pretrain.report", "pretrain.tables"),
    "pretrain.standing",
    *("pretrain.claims", "pretrain.ledger", "vggfeat.ledger", "vggfeat.transfer"),
    *("pretrain.evaluate", "pretrain.export", "pretrain.submission", "pretrain.figures"),
    *("pretrain.localise", "pretrain.boxes", "pretrain.merging", "pretrain.box_figures"),
    *("pretrain.kept", "pretrain.watch", "pretrain.readers", "pretrain.augment", "pretrain.colour"),
)

# Where the tests of modules are that have none of their own name.
TESTED_BY = {
    "vggfeat/__init__.py": "tests/vggfeat/test_library.py",  # what stands in it is the library
    "vggfeat/__main__.py": "tests/vggfeat/test_start.py",  # it starts the program
    "vggfeat/options.py": "tests/test_usage.py",  # what both programs take
    "vggfeat/problem.py": "tests/vggfeat/test_protocols.py",  # what a protocol is run on
    "vggfeat/datasets/__init__.py": "tests/vggfeat/datasets/test_registry.py",  # the registry
    "vggfeat/cli_classify.py": "tests/vggfeat/test_cli.py",  # one program
    "vggfeat/cli_explain.py": "tests/vggfeat/test_explain.py",
    "vggfeat/cli_extract.py": "tests/vggfeat/test_cli.py",
    "vggfeat/cli_info.py": "tests/vggfeat/test_cli.py",
    "vggfeat/cli_neighbours.py": "tests/vggfeat/test_neighbours.py",
    "vggfeat/lists.py": "tests/vggfeat/test_index.py",  # what an index is made with
    "vggfeat/cli_push.py": "tests/vggfeat/test_hub.py",  # what is put there is taken from there
    "vggfeat/exhibits.py": "tests/vggfeat/test_report.py",  # one page
    "vggfeat/same_run.py": "tests/vggfeat/test_report.py",
    "vggfeat/audit_page.py": "tests/vggfeat/test_audit.py",  # what it shows
    "vggfeat/features.py": "tests/vggfeat/shards/test_sharded.py",  # a file or a set
    "vggfeat/shards/__init__.py": "",
    "vggfeat/shards/engines/__init__.py": "",
    "vggfeat/shards/engines/failed.py": "tests/vggfeat/shards/test_run.py",
    "pretrain/reproduction.py": "tests/pretrain/test_reproduce.py",  # what the command does
    "pretrain/__init__.py": "",  # there is nothing in it
}
OF_SEVERAL = {
    "tests/pretrain/test_resume.py",  # whole runs that are killed: readers, trainer, stages
    "tests/pretrain/test_same_result.py",  # loader, readers and trainer, in one process or many
}


@functools.cache
def arrows(inside: bool) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, and the others' packages."""
    return house.arrows(ROOT, *house.PACKAGES, inside=inside, others=True)


def _path(graph: dict[str, set[str]], start: str, ends: set[str]) -> list[str]:
    """The shortest way from a module to one of these; [] where there is none."""
    ways, seen = [[start]], {start}
    for way in ways:
        if way[-1] in ends:
            return way
        for name in sorted(graph.get(way[-1], set()) - seen):
            seen.add(name)
            ways.append([*way, name])
    return []


def test_vggfeat_never_imports_pretrain() -> None:
    wrong = [
        f"{module} -> {name}"
        for module, names in arrows(inside=True).items()
        for name in names
        if module.startswith("vggfeat") and name.startswith("pretrain")
    ]
    assert not wrong


def test_no_circle_even_inside_functions() -> None:
    try:
        graphlib.TopologicalSorter(arrows(inside=True)).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_only_these_print() -> None:
    graph = arrows(inside=True)
    found = {module for module in graph if "vggfeat.terminal" in graph[module]}
    assert sorted(f"{module} -> vggfeat.terminal" for module in found - PRINTING) == []
    assert PRINTING - found == set(), "these print no more"


@pytest.mark.parametrize("module", LIGHT)
def test_these_need_no_torch(module: str) -> None:
    graph = {  # a package's own file is read before its modules
        name: names | {package for package in [name.rpartition(".")[0]] if package}
        for name, names in arrows(inside=False).items()
    }
    assert " -> ".join(_path(graph, module, HEAVY)) == ""


def _bound(function: ast.AST) -> Iterator[tuple[int, str | None]]:
    """Line and name of what a function calls its own."""
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.FunctionDef | ast.ExceptHandler) and node is not function:
            yield node.lineno, node.name


def test_no_name_of_a_functions_own_hides_what_its_module_imports() -> None:
    hidden = set()
    for path in (path for name in house.PACKAGES for path in (ROOT / name).rglob("*.py")):
        tree = ast.parse(path.read_text())
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.asname or alias.name for node in imports for alias in node.names}
        functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.Lambda))
        found = (each for function in functions for each in _bound(function))
        hidden |= {f"{path.relative_to(ROOT)}:{at} {name}" for at, name in found if name in names}
    assert sorted(hidden) == []


def test_the_tests_lie_as_the_code_does() -> None:
    modules = [
        path.relative_to(ROOT) for name in house.PACKAGES for path in (ROOT / name).rglob("*.py")
    ]
    due = {
        TESTED_BY.get(str(path), str("tests" / path.with_name(f"test_{path.name}")))
        for path in modules
    } - {""}
    found = {
        str(path.relative_to(ROOT))
        for name in house.PACKAGES
        for path in (ROOT / "tests" / name).rglob("test_*.py")
    }
    assert sorted(each for each in due if not (ROOT / each).is_file()) == [], "without tests"
    assert sorted(found - due - OF_SEVERAL) == [], "without a module"
    assert TESTED_BY.keys() <= {*map(str, modules)} and found >= OF_SEVERAL


LOADED = "import json, sys; print(json.dumps(sorted(sys.modules)), file=sys.__stderr__)"
RUN = f"""
import sys
from vggfeat.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
{LOADED}
"""


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (f"import {', '.join(LIGHT)}\n{LOADED}", ()),
        (RUN, ("--help",)),
        (RUN, ("datasets",)),
        (RUN, ("info", FEATURES)),
        (RUN, ("info", FEATURES, "--all", "--verify")),
    ],
    ids=["modules", "--help", "datasets", "info", "info --all --verify"],
)
def test_nor_do_they_load_it(script: str, words: tuple[object, ...]) -> None:
    """In a process of its own, where nothing is loaded yet."""
    ran = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=HANG,
    )
    assert ran.returncode == 0, ran.stderr
    assert HEAVY & set(json.loads(ran.stderr.splitlines()[-1])) == set()
