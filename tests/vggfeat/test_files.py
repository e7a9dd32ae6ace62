"""Files that appear whole or not at all, and the one rule for what may lie where a command
writes.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vggfeat
from pretrain import train
from vggfeat import cli, files
from vggfeat.errors import CantWrite, VggfeatError
from vggfeat.files import (
    absolute_source,
    check_outputs,
    plain,
    try_each,
    whole,
    write_json,
    write_text,
)
from vggfeat.terminal import run
from vggfeat.weights import save_weights

from ..conftest import Command, photograph, vgg_of

HOLDER = """
import sys
from pathlib import Path
from vggfeat.files import whole
with whole(Path(sys.argv[1])) as partial:
    partial.write_text("new")
    print(partial.parent, flush=True)
    sys.stdin.read()
"""


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def listing(folder: Path) -> dict[str, bytes | None]:
    """All that lies under a folder: of files their bytes, of anything else nothing."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


# --- whole ----------------------------------------------------------------------------------------


def test_a_umask_that_takes_all_leaves_what_is_being_made_to_its_maker(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    old = os.umask(0o777)
    try:
        with whole(path, durable=True) as partial:
            assert mode_of(partial.parent) == 0o700 and mode_of(partial) == 0o600
            assert "unheld" not in partial.parent.name or files._machine() == "unheld"
    finally:
        os.umask(old)
    assert [(p.name, mode_of(p)) for p in tmp_path.iterdir()] == [("x.bin", 0)]


def test_a_file_has_the_mode_of_the_old_one_or_of_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    old = os.umask(0o027)
    try:
        with whole(path) as partial:
            partial.write_text("1")
            partial.chmod(0o600)  # as safetensors does
        assert mode_of(path) == 0o640
        path.chmod(0o604)
        with whole(path) as partial:
            partial.write_text("2")
    finally:
        os.umask(old)
    assert (path.read_text(), mode_of(path)) == ("2", 0o604)
    assert os.listdir(tmp_path) == ["x.bin"]


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_text("old")
    with pytest.raises(KeyError), whole(path) as partial:
        partial.write_text("half")
        raise KeyError("x")
    with (
        pytest.raises(CantWrite, match=f"^can't write {path}: No space left on device$"),
        whole(path),
    ):
        raise OSError(errno.ENOSPC, "ten lines of HDF5's")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.h5"]


def test_the_place_of_a_file_in_the_making_is_private_and_never_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that somebody has planted under a name that can be foreseen would be written
    through.
    """
    number = 987_654_321_098_765  # so long that no random name has it by chance
    monkeypatch.setattr(os, "getpid", lambda: number)
    seen = set()
    for _ in range(2):
        with whole(tmp_path / "m.h5") as partial:
            assert partial.suffix == ".h5" and mode_of(partial.parent) == 0o700
            assert partial.parent.parent == tmp_path and str(number) not in partial.parent.name
            seen.add(partial.parent.name)
    assert len(seen) == 2


@pytest.mark.parametrize(
    "name", ["n" * 255, "a." + "n" * 253, "é" * 127, ".h5", os.fsdecode(b"caf\xe9.h5")]
)
def test_any_name_that_a_file_can_have(tmp_path: Path, name: str) -> None:
    check_outputs({"--out": tmp_path / name})
    assert os.listdir(tmp_path) == []
    with whole(tmp_path / name) as partial:
        partial.write_text("x")
    assert os.listdir(tmp_path) == [name]


def test_the_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to("there/x.json")
    write_text(link, "new")
    assert link.is_symlink() and (tmp_path / "there" / "x.json").read_text() == "new"


def test_where_no_file_can_be_put(tmp_path: Path) -> None:
    (tmp_path / "nothing.h5").symlink_to(tmp_path / "victim")
    (tmp_path / "round.h5").symlink_to(tmp_path / "round.h5")
    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "folder.h5").mkdir()
    for name, why in {
        "nothing.h5": "is a link to nothing",
        "round.h5": "can't write",
        "pipe.h5": "is no regular file",
        "folder.h5": "is a folder",
        "no/x.h5": "there is no folder",
        "pipe.h5/x.h5": "there is no folder",
    }.items():
        with pytest.raises(CantWrite, match=why), whole(tmp_path / name):
            raise AssertionError("the body isn't reached")
    assert not (tmp_path / "victim").exists()


def test_durable_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "x", []
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        seen.append((stat.S_ISDIR(os.fstat(fd).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with whole(path) as partial:
        partial.write_text("x")
    assert seen == []
    path.unlink()
    with whole(path, durable=True) as partial:
        partial.write_text("x")
    assert seen == [(False, False), (True, True)]


# --- what others leave, and what others are making ------------------------------------------------


def hold(path: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that is writing path, and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_goes_and_what_lives_stays(tmp_path: Path, locks: None) -> None:
    killed, left = hold(tmp_path / "x.h5")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    alive, making = hold(tmp_path / "x.h5")  # the same name, as two containers would
    assert making.is_dir() and not left.exists()
    foreign = tmp_path / ".vggfeat-00000000-0123456789abcdef.partial"  # of another machine
    foreign.mkdir()
    write_text(tmp_path / "x.h5", "mine")
    assert making.is_dir() and foreign.is_dir()
    alive.communicate("")
    assert alive.returncode == 0 and (tmp_path / "x.h5").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == [foreign.name, "x.h5"]


@pytest.mark.parametrize(("where", "call"), [(os, "open"), (files, "_own"), (fcntl, "flock")])
def test_a_folder_that_is_swept_before_its_lock_is_made_again(
    where: Any, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever another process, that begins at the same moment, comes between."""
    real, swept = getattr(where, call), list[Path]()

    def first_sweeps(*arguments: Any, **options: Any) -> Any:
        if not swept and (there := list(tmp_path.iterdir())):
            swept.extend(there)
            there[0].rmdir()
        return real(*arguments, **options)

    monkeypatch.setattr(where, call, first_sweeps)
    with whole(tmp_path / "x") as partial:
        assert partial.parent not in swept
        partial.write_text("x")
    assert os.listdir(tmp_path) == ["x"] and swept


def test_without_locks_files_are_written_and_nothing_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    (left := tmp_path / f".vggfeat-{files._machine()}-0123456789abcdef.partial").mkdir()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with whole(tmp_path / "x") as partial:
        partial.write_text("x")
        kept = tmp_path / partial.parent.name.replace("-", "-1", 2)
        shutil.copytree(partial.parent, kept)  # as if its process had been killed
    monkeypatch.undo()
    write_text(tmp_path / "y", "y")
    assert sorted(os.listdir(tmp_path)) == sorted([kept.name, "x", "y"]) and not left.exists()


# --- what lies at a path --------------------------------------------------------------------------


def test_the_one_rule(tmp_path: Path) -> None:
    source, old = tmp_path / "in.h5", tmp_path / "old.json"
    source.write_text("input")
    old.write_text("old")
    (tmp_path / "link").symlink_to("in.h5")
    os.link(source, tmp_path / "hard")
    (tmp_path / "nothing").symlink_to("gone")
    (tmp_path / "same").mkdir()
    (tmp_path / "again").symlink_to("same")
    os.mkfifo(tmp_path / "pipe")
    here = os.open(tmp_path, os.O_RDONLY)  # a socket's path has a short bound
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{here}/socket")
    os.close(here)
    before = listing(tmp_path)
    for name, why in {
        "in.h5": "is what the command reads",
        "./same/../in.h5": "is what the command reads",
        "link": "is what the command reads",
        "hard": "is what the command reads",
        "unmade": "is what the command reads",
        "again/unmade": "is what the command reads",
        "same": "is what the command reads",
        "nothing": "is a link to nothing",
        ".": "is a folder",
        "socket": "is no regular file",
        "no/x": "there is no folder",
        "old.json/x": "there is no folder",
        "n" * 256: "File name too long",
        "a\0b": "null",
    }.items():
        for kind in ("file", "text"):
            outputs = {"--out": tmp_path / name}
            with pytest.raises(VggfeatError, match=why):
                check_outputs(
                    outputs if kind == "file" else {},
                    texts=outputs if kind == "text" else {},
                    inputs=[
                        source,
                        None,
                        tmp_path / "unmade",
                        tmp_path / "same" / "unmade",
                        tmp_path / "same",
                    ],
                    overwrite=True,
                )
    with pytest.raises(VggfeatError, match=f"^{old} exists; give `overwrite`, or another --json$"):
        check_outputs({}, texts={"--json": old})
    check_outputs({}, texts={"--json": old}, overwrite=True)
    for device in (tmp_path / "pipe", Path("/dev/null")):
        check_outputs({}, texts={"--json": device, "--csv": device})
        with pytest.raises(VggfeatError, match="is no regular file"):
            check_outputs({"--out": device}, overwrite=True)
    for a, b in (("new", "new"), ("same/new", "again/new"), ("old.json", "old.json")):
        with pytest.raises(VggfeatError, match="--out and --json are one file"):
            check_outputs({"--out": tmp_path / a}, texts={"--json": tmp_path / b}, overwrite=True)
    with pytest.raises(VggfeatError, match=r"^can't write /proc/x\.h5: "):
        check_outputs({"--out": Path("/proc/x.h5")})
    assert listing(tmp_path) == before


def test_a_folder_is_free_or_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    before = listing(tmp_path)
    for name in ("empty", "new", "a/b/c"):
        check_outputs({}, folders={"--submission": tmp_path / name})
    for name, why in {
        "full": "isn't an empty folder",
        "full/x": "isn't an empty folder",
        "full/x/y": "can't write|isn't an empty",
        "n" * 256: "File name too long",
        "a/" + "n" * 256: "File name too long",
        "empty": "is what the command reads",
    }.items():
        with pytest.raises(VggfeatError, match=why):
            check_outputs(
                {},
                folders={"--submission": tmp_path / name},
                inputs=[tmp_path / "empty"],
                overwrite=True,
            )
    assert listing(tmp_path) == before


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_found_before_the_work(tiny: Path) -> None:
    check_outputs({"--out": tiny / "x"})
    filler = os.open(tiny / "filler", os.O_CREAT | os.O_WRONLY)
    with pytest.raises(OSError, match="No space left on device"):
        while os.write(filler, bytes(4096)):
            pass
    os.close(filler)
    with pytest.raises(VggfeatError, match="No space left on device"):
        check_outputs({"--out": tiny / "x"})
    assert os.listdir(tiny) == ["filler"]


# --- texts ----------------------------------------------------------------------------------------


def test_stdouts_own_file_is_written_into_and_not_replaced(tmp_path: Path) -> None:
    code = "from pathlib import Path; from vggfeat.files import write_text, check_outputs\n"
    code += "check_outputs({}, texts={'--json': Path('/dev/stdout')})\n"
    code += "write_text(Path('/dev/stdout'), 'json\\n'); print('table')"
    with open(tmp_path / "all.txt", "w") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "all.txt").read_text() == "json\ntable\n"
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (piped.stdout, piped.stderr) == ("json\ntable\n", "")


def test_json_of_whatever_there_is(tmp_path: Path) -> None:
    value = {
        1: np.float32(0.5),
        None: np.int64(3),
        False: np.array([[1.0, np.nan]]),
        2.5: float("inf"),
        "b": b"caf\xe9",
        ("a", 1): {"set"},
        "path": Path("x/y"),
        "half": "caf\udce9",
        "none": None,
        "flag": np.bool_(True),
    }
    write_json(tmp_path / "x.json", value)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "x.json").read_text(encoding="ascii")
    assert json.loads(text, parse_constant=refuse) == {
        "1": 0.5,
        "null": 3,
        "false": [[1.0, None]],
        "2.5": None,
        "b": "caf\udce9",
        '["a", 1]': ["set"],
        "path": "x/y",
        "half": "caf\udce9",
        "none": None,
        "flag": True,
    }
    assert plain(np.float64(1.5)) == 1.5 and type(plain(np.float64(1.5))) is float


def test_each_output_is_tried(tmp_path: Path) -> None:
    done: list[int] = []

    def fail(text: str) -> None:
        raise VggfeatError(text)

    with pytest.raises(VggfeatError, match=r"^first$"):
        try_each(
            lambda: fail("first"),
            lambda: done.append(1),
            lambda: fail("second"),
            lambda: done.append(2),
        )
    assert done == [1, 2]
    try_each(lambda: done.append(3))


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def inputs(run_main: Command, tmp_path: Path) -> dict[str, Path]:
    """An image folder, a feature file, a model and results."""
    for c in "ab":
        (tmp_path / "images" / c).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(photograph(ord(c) + i, 40, 40)).save(
                tmp_path / "images" / c / f"{i}.png"
            )
    there = {name: tmp_path / name for name in ("f.h5", "m.h5", "r.json", "images")}
    small = ("--weights", "random:A,width=0.125,crop=32", "--scales", 32, "--device", "cpu")
    main = functools.partial(run_main, cli.main)
    ran = main(
        "extract", "--dataset", "folder", "--root", there["images"], *small, "--out", there["f.h5"]
    )
    assert ran.status == 0, ran.err
    ran = main(
        "svm",
        "--features",
        there["f.h5"],
        "--C",
        1,
        "--out",
        there["m.h5"],
        "--json",
        there["r.json"],
    )
    assert ran.status == 0, ran.err
    return there


def test_no_command_overwrites_what_it_reads(
    run_main: Command, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extract = (
        "extract --dataset folder --root images --weights random:A,width=0.125,crop=32 --scales 32"
        " --out"
    )
    net = vggfeat.load("random:A,width=0.125,crop=32")
    save_weights("w@x.safetensors", vgg_of(net), net.preprocessing)
    own = "extract --dataset folder --root images --weights w@x.safetensors --scales 32 --out"
    assert run_main(cli.main, *f"{own} fw.h5".split()).status == 0
    assert (
        run_main(cli.main, *["svm", "--features", "fw.h5", "--C", "1", "--out", "mw.h5"]).status
        == 0
    )
    os.link("images/a/1.png", "h.h5.partial")
    os.link("w@x.safetensors", "i.h5.partial")
    os.link("w@x.safetensors", "w@x.csv")
    os.link("images/a/0.png", "q.csv.partial")
    Path("list.csv").write_text("path,label\nimages/a/0.png,a\n")
    look = "neighbours --features f.h5 --query a/0.png"
    reads = {
        "svm --features f.h5 --C 1 --json f.h5": 2,
        "svm --features f.h5 --C 1 --out ./f.h5": 2,
        "predict list.csv --model m.h5 --out list.csv": 2,
        "predict images/a/0.png --model m.h5 --out q.csv": 1,
        "report --features f.h5 --model m.h5 --results r.json --out r.json": 2,
        "neighbours --features f.h5 --query a/0.png --json f.h5": 2,
        "neighbours --features f.h5 --query images/a/0.png --picture images/a/0.png": 2,
        "info f.h5 --json f.h5": 2,
        f"{extract} images": 2,
        f"{extract} g.h5 --json g.h5": 2,
        f"{extract} g.h5 --json g.h5.partial": 2,
        f"{extract} g.h5 --json images/a/1.png": 1,
        f"{extract} h.h5": 1,
        f"{own} i.h5": 1,
        f"{own} w@x.safetensors": 2,
        "predict images/a/0.png --model mw.h5 --out w@x.csv": 1,
        "neighbours --features fw.h5 --query images/a/0.png --json w@x.safetensors": 1,
        f"{look} --root images --picture p.png --json images/b/0.png": 1,
    }
    exists = (
        "svm --features f.h5 --C 1 --json r.json",
        "svm --features f.h5 --C 1 --out m.h5",
        "predict images/a/0.png --model m.h5 --out list.csv",
        "report --features f.h5 --model m.h5 --out r.json",
        "neighbours --features f.h5 --query a/0.png --json r.json",
        "neighbours --features f.h5 --query a/0.png --picture images/b/0.png",
        "info f.h5 --json r.json",
        f"{extract} f.h5",
        f"{extract} g.h5 --json r.json",
    )
    before = listing(tmp_path)
    for line, status in reads.items():  # by the same name, or by what lies there
        ran = run_main(cli.main, *line.split(), "--overwrite")
        assert (line, ran.status, ran.out, len(ran.err_lines)) == (line, status, "", 1), ran.err
        assert listing(tmp_path) == before, line
    for line in exists:
        ran = run_main(cli.main, *line.split())
        assert (line, ran.status, ran.out, len(ran.err_lines)) == (line, 1, "", 1), ran.err
        assert (
            "exists; give --overwrite, or another --" in ran.err and listing(tmp_path) == before
        ), line


def test_training_does_not_replace_the_weights_that_it_starts_from(
    run_main: Command, tmp_path: Path
) -> None:
    for place in ("", "A-256"):
        start = tmp_path / "A" / place / "weights.safetensors"
        start.parent.mkdir(exist_ok=True)
        start.write_bytes(b"mine")
        main = functools.partial(run, train.app, "python -m pretrain.train")
        ran = run_main(
            main, "--net", "A", "--from", start, "--out", tmp_path / "A", "--data", tmp_path
        )
        assert (ran.status, ran.out) == (2, "") and "is what the command reads" in ran.err
        assert start.read_bytes() == b"mine"


def test_results_are_written_and_printed_though_one_file_fails(
    run_main: Command, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up during the work loses one file, and not what can still be told."""
    monkeypatch.chdir(tmp_path)

    def broken(*more: object) -> None:
        raise CantWrite("can't write that one")

    lines = {
        "svm --features f.h5 --C 1 --json x.json --out x.h5": "vggfeat.model.save_model",
        "svm --features f.h5 --C 1 --json y.json --out y.h5": "vggfeat.cli_classify.write_json",
        "neighbours --features f.h5 --query a/0.png --json y.json --picture y.png": (
            "vggfeat.cli_neighbours.write_json"
        ),
        "neighbours --features f.h5 --query a/0.png --json x.json --picture x.png": (
            "vggfeat.neighbours.draw"
        ),
    }
    for line, writer in lines.items():
        for made in tmp_path.glob("[xy].*"):
            made.unlink()
        with monkeypatch.context() as broke:
            broke.setattr(writer, broken)
            ran = run_main(cli.main, *line.split())
        assert ran.status == 1 and ran.err_lines[-1] == "vggfeat: can't write that one", (
            line,
            ran.err,
        )
        assert "│" in ran.out, line
        *_, first, _, second = line.split()
        assert Path(first).exists() == ("write_json" not in writer), line
        assert Path(second).exists() == ("write_json" in writer), line


def test_a_source_of_weights_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("w.pth", "a@b.pth"):
        Path(name).touch()
    for spec, wanted in {
        "w.pth": f"{tmp_path}/w.pth",
        "a@b.pth": f"{tmp_path}/a@b.pth",
        "oxford:D@w.pth": f"oxford:D@{tmp_path}/w.pth",
        "oxford:D": "oxford:D",
        "random:A,width=0.05": "random:A,width=0.05",
    }.items():
        assert absolute_source(spec) == wanted
