"""An extraction that is killed, interrupted, refused by the disk or shared goes on, and ends as if
nothing had been.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

import vggfeat
from vggfeat import batches, cli, datasets, extract, hdf5, store, writer
from vggfeat.decode import read_rgb
from vggfeat.describe import description_of
from vggfeat.errors import Interrupted, VggfeatError
from vggfeat.versions import versions

from .. import prepared
from ..conftest import HANG, Command, assert_same_descriptors, photograph, torchrun

KILLS = int(os.environ.get("KILLS", "5"))
WEIGHTS = "random:B,width=0.125,crop=32,classes=4"


def words(root: Path, out: Path, *more: object) -> list[str]:
    fixed = [
        "extract",
        "--dataset",
        "folder",
        "--root",
        root,
        "--weights",
        WEIGHTS,
        "--scales",
        "40,64",
    ]
    return [
        *map(str, fixed),
        "--out",
        str(out),
        "--batch-size",
        "1",
        "--precision",
        "float32",
        "--device",
        "cpu",
        *map(str, more),
    ]


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG)


def contents(path: Path) -> dict[str, np.ndarray]:
    """All that a feature file holds, but for how long it took, by which command."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None
            )
        )
    facts = {**json.loads(found.pop("facts").tobytes()), "command": ""}
    del found["seconds"]
    return {**found, "facts": np.array(json.dumps(facts))}


def assert_same_file(a: Path, b: Path) -> None:
    one, other = contents(a), contents(b)
    assert one.keys() == other.keys()
    vggfeat.open_features(a)
    for name in one:
        if name == "descriptors":
            assert_same_descriptors(one[name], other[name])
        else:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture
def spoilt(folder: Path) -> Path:
    """The photographs with two that can't be read."""
    (folder / "red" / "03.jpg").write_bytes(b"")
    (folder / "blue" / "07.jpg").write_bytes((folder / "blue" / "07.jpg").read_bytes()[:200])
    return folder


@pytest.fixture
def whole(spoilt: Path, tmp_path: Path, run_main: Command) -> Path:
    """The file of an uninterrupted run."""
    assert run_main(cli.main, *words(spoilt, tmp_path / "whole.h5")).status == 3
    return tmp_path / "whole.h5"


# Forked from one process that has imported everything: a start takes milliseconds, and kills fall
# into the work. What is described is logged as it happens, what is flushed when it is; a flush is
# due every 50 ms.
KILLER = """
    import json, os, random, signal, sys, time
    import torch
    from vggfeat import cli, hdf5, store, writer
    import vggfeat.extract
    log, seed, kills, longest, *command = sys.argv[1:]
    torch.set_num_threads(1)
    writer.FLUSH_SECONDS = 0.05
    write, flush = writer.FeatureWriter.write, writer.FeatureWriter.flush
    log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    def say(*words):
        os.write(log, (" ".join(map(str, words)) + "\\n").encode())
    def logged(self, row, scale, descriptor):
        say("described", row, scale)
        time.sleep(0.01)
        write(self, row, scale, descriptor)
    def flushed(self):
        cells = list(self._values)
        flush(self)
        for row, scale in cells:
            say("flushed", row, scale)
    writer.FeatureWriter.write, writer.FeatureWriter.flush = logged, flushed
    sys.argv = ["vggfeat", *command]
    random.seed(int(seed))
    out = writer.Path(command[command.index("--out") + 1])
    partial = out.with_name(out.name + ".partial")
    killed = 0
    while True:
        child = os.fork()
        if not child:
            cli.main()
        if killed < int(kills):
            time.sleep(random.uniform(0, float(longest)))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        killed += 1
        if out.exists():  # it had its name already
            status = 3 << 8
            break
        there = []
        if hdf5.format_of(partial):
            kind = store.FORMAT, store.FORMAT_VERSION
            with hdf5.open_file(partial, *kind, unfinished=True) as file:
                there = (file.arrays["status"].read(file.descriptor) == store.DONE).nonzero()
            there = list(zip(*(indices.tolist() for indices in there)))
        say("there", json.dumps(there))
    print(json.dumps({"kills": killed, "status": os.WEXITSTATUS(status)}))
"""


def test_killed_at_any_moment_it_goes_on(spoilt: Path, whole: Path, tmp_path: Path) -> None:
    """KILLS random SIGKILLs, a new extraction whenever one is finished; the file is that of an
    uninterrupted run.
    """
    kills, round_ = 0, 0
    while kills < KILLS:
        out, log = tmp_path / f"{round_}.h5", tmp_path / f"{round_}.log"
        ran = run_script(KILLER, log, round_, KILLS - kills, 0.6, *words(spoilt, out))
        assert ran.returncode == 0, ran.stderr
        ended = json.loads(ran.stdout.splitlines()[-1])
        assert ended["status"] == 3  # two images are unreadable
        kills += ended["kills"]
        round_ += 1
        assert_same_file(out, whole)
        assert not list(tmp_path.glob("*.partial*"))
        safe: set[tuple[int, int]] = set()
        for line in log.read_text().splitlines():
            what, rest = line.split(" ", 1)
            if what == "there":
                there = {(row, scale) for row, scale in json.loads(rest)}
                assert safe <= there, "what had been flushed is lost"
                safe = there
            else:
                row, scale = map(int, rest.split())
                assert what == "flushed" or (row, scale) not in safe, (
                    "described again although it was there"
                )
                if what == "flushed":
                    safe.add((row, scale))
    print(f"{kills} kills over {round_} extractions")
    assert kills >= KILLS


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_extraction_says_what_it_keeps(
    spoilt: Path,
    whole: Path,
    tmp_path: Path,
    run_main: Command,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    out, write = tmp_path / "f.h5", writer.FeatureWriter.write

    def then_signal(
        self: writer.FeatureWriter, row: int, scale: int, descriptor: np.ndarray
    ) -> None:
        write(self, row, scale, descriptor)
        if len(self._values) == 13:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(writer.FeatureWriter, "write", then_signal)
        ran = run_main(cli.main, *words(spoilt, out))
    assert ran.status == status and ran.out == ""
    line = ran.err_lines[-1]
    assert line.startswith("vggfeat: interrupted; ") and line.endswith(
        "the same command goes on from there"
    )
    assert "of 24 images are in" in line and not out.exists()
    with pytest.raises(VggfeatError, match="half-written"):
        vggfeat.open_features(tmp_path / "f.h5.partial")
    again = run_main(cli.main, *words(spoilt, out))
    assert again.status == 3 and "going on: " in again.err
    assert_same_file(out, whole)


def test_nothing_is_left_of_an_extraction_that_described_nothing(
    folder: Path, tmp_path: Path
) -> None:
    items = datasets.load("folder", folder)

    def interrupt(done: float, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"^interrupted$"):
        extract.extract(
            items, vggfeat.load(WEIGHTS), tmp_path / "f.h5", scales=(40,), progress=interrupt
        )
    assert not list(tmp_path.glob("f.h5*"))


def test_a_disk_that_fails_later_loses_nothing(
    spoilt: Path, whole: Path, tmp_path: Path, run_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the file's length that falls after the first flush."""
    out, flush, count = tmp_path / "f.h5", writer.FeatureWriter.flush, 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self: writer.FeatureWriter) -> None:
        nonlocal count
        count += 1
        if count == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        flush(self)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "FLUSH_ROWS", 4)
        patch.setattr(writer.FeatureWriter, "flush", limited)
        try:
            ran = run_main(cli.main, *words(spoilt, out))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = ran.err_lines[-1]
    assert ran.status == 1 and line.startswith("vggfeat: can't write")
    assert "File too large" in line and "goes on" in line
    again = run_main(cli.main, *words(spoilt, out))
    assert again.status == 3 and "going on: " in again.err
    assert_same_file(out, whole)


def test_two_writers_on_one_file(folder: Path, tmp_path: Path, locks: None) -> None:
    items = datasets.load("folder", folder)
    description = description_of(vggfeat.load(WEIGHTS), "fc7", (40,), True)
    script = """
        import sys
        from pathlib import Path
        import vggfeat
        from vggfeat import datasets, writer
        from vggfeat.describe import description_of
        items = datasets.load("folder", Path(sys.argv[1]))
        network = vggfeat.load(sys.argv[3], device="cpu", precision="float32")
        description = description_of(network, "fc7", (40,), True)
        with writer.FeatureWriter.open(sys.argv[2], items, description, 512):
            print("open", flush=True)
            sys.stdin.read()
            raise SystemExit
    """
    arguments = [str(folder), str(tmp_path / "f.h5"), WEIGHTS]
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "open\n"
    for overwrite in (False, True):
        with pytest.raises(VggfeatError, match="another process is writing"):
            writer.FeatureWriter.open(
                tmp_path / "f.h5", items, description, 512, overwrite=overwrite
            )
    other.kill()
    other.wait()
    # the file of a dead process is taken over
    with writer.FeatureWriter.open(tmp_path / "f.h5", items, description, 512) as own:
        for i in range(24):
            own.write(i, 0, np.full(512, i, np.float32))
        own.finish()
    assert vggfeat.open_features(tmp_path / "f.h5").descriptors[:, 0, 0].tolist() == list(range(24))
    assert not list(tmp_path.glob("*.partial*"))


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    Image.fromarray(photograph(1, 40, 60)).save(tmp_path / "a.jpg")
    items = datasets.Items("csv", "unlabelled", tmp_path, ["a.jpg", "b\0.jpg"], None, [])
    with pytest.raises(VggfeatError, match="holds a zero byte"):
        extract.extract(items, vggfeat.load(WEIGHTS), tmp_path / "f.h5", scales=(40,))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_a_file_with_pending_rows_is_not_finished(folder: Path, tmp_path: Path) -> None:
    items = datasets.load("folder", folder)
    description = description_of(vggfeat.load(WEIGHTS), "fc7", (40,), True)
    with (
        pytest.raises(VggfeatError, match=r"23 rows of .* were never described"),
        writer.FeatureWriter.open(tmp_path / "f.h5", items, description, 512) as own,
    ):
        own.write(3, 0, np.zeros(512, np.float32))
        own.finish()
    assert [path.name for path in tmp_path.glob("*.h5*")] == ["f.h5.partial"]


# --- what may have changed ------------------------------------------------------------------------


@pytest.fixture
def begun(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_main: Command) -> Path:
    """OUT, of which OUT.partial holds the first rows."""

    def stop(self: writer.FeatureWriter, row: int, scale: int, descriptor: np.ndarray) -> None:
        write(self, row, scale, descriptor)
        if len(self._values) == 21:
            raise VggfeatError("stop")

    write = writer.FeatureWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(writer, "FLUSH_SECONDS", float("inf"))
        patch.setattr(writer.FeatureWriter, "write", stop)
        ran = run_main(cli.main, *words(folder, tmp_path / "f.h5"))
    assert ran.status == 1 and "images are in" in ran.err
    return tmp_path / "f.h5"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--weights", "random:B,width=0.125,crop=32,classes=4,seed=1"], "other weights, sha256"),
        (["--weights", "random:A,width=0.125,crop=32"], "net B, not A"),
        (["--layer", "pool3"], "layer fc7, not pool3"),
        (["--scales", "40,65"], "scales 40,64, not 40,65"),
        (["--no-mirror"], "mirror True, not False"),
        (["--store", "float16"], "--store float32, not float16"),
        (["--precision", "bfloat16"], "precision float32, not bfloat16"),
        (["--max-pool", "ceil"], "max-pooling floor, not ceil"),
        (["--limit", "20"], "24 images, not 20"),
    ],
)
def test_other_options_are_refused(
    begun: Path, folder: Path, run_main: Command, change: list[str], told: str
) -> None:
    before = Path(f"{begun}.partial").read_bytes()
    ran = run_main(cli.main, *words(folder, begun, *change))
    assert ran.status == 1 and ran.err.count("\n") == 1
    assert f"was begun with {told}" in ran.err and "give --overwrite to begin anew" in ran.err
    assert Path(f"{begun}.partial").read_bytes() == before and not begun.exists()
    assert run_main(cli.main, *words(folder, begun, *change, "--overwrite")).status == 0
    assert vggfeat.open_features(begun).readable.all()


def test_other_images_are_refused(begun: Path, folder: Path, run_main: Command) -> None:
    first = folder / "blue" / "01.jpg"  # of the first shape
    kept, times = first.read_bytes(), first.stat()
    Image.fromarray(photograph(9, 60, 40)).save(first, quality=95)
    ran = run_main(cli.main, *words(folder, begun))
    assert (
        ran.status == 1
        and "was begun with another image blue/01.jpg: it has changed since" in ran.err
    )
    first.unlink()
    assert run_main(cli.main, *words(folder, begun)).status == 1
    first.write_bytes(kept)  # a copy, later; the same picture
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns + 10**10))
    (folder / "red" / "11.jpg").rename(folder / "red" / "12.jpg")
    ran = run_main(cli.main, *words(folder, begun))
    assert ran.status == 1 and "an image red/11.jpg where there is red/12.jpg now" in ran.err
    (folder / "red" / "12.jpg").rename(folder / "red" / "11.jpg")
    assert run_main(cli.main, *words(folder, begun)).status == 0


def test_other_labels_versions_and_damage_are_refused(
    begun: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, extract_versions = Path(f"{begun}.partial"), versions()
    items = datasets.load("folder", folder)
    network = vggfeat.load(WEIGHTS)

    def refused(match: str) -> None:
        with pytest.raises(VggfeatError, match=match):
            extract.extract(items, network, begun, scales=(40, 64), batch_size=1)

    items.labels[0] += 1  # type: ignore[index]
    refused("other labels")
    items.labels[0] -= 1  # type: ignore[index]
    items.splits["split1/test"] = items.splits["split1/test"][1:]
    refused("another split split1/test")
    items = datasets.load("folder", folder)
    good = partial.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(extract, "versions", lambda: {**extract_versions, "torch": "3.0"})
        refused(r"torch 2\S+, not 3.0")
    partial.write_bytes(good[: len(good) // 2])
    refused(f"^{partial} is damaged: it has .*give `overwrite`")  # which file, once
    partial.write_bytes(b"a text")
    refused("is no half-written feature file of this version")
    partial.write_bytes(
        (Path(__file__).parents[1] / "formats" / "version1" / "features.h5").read_bytes()
    )
    refused("is no half-written feature file of this version")
    partial.write_bytes(good)
    extract.extract(items, network, begun, scales=(40, 64), batch_size=1)


def test_an_unreadable_image_is_tried_again(
    spoilt: Path, tmp_path: Path, run_main: Command
) -> None:
    kept = Image.fromarray(photograph(3, 40, 60))
    out = tmp_path / "f.h5"

    items, network = datasets.load("folder", spoilt), vggfeat.load(WEIGHTS)
    description = description_of(network, None, (40, 64), True)
    facts = {"versions": versions()}
    with (
        pytest.raises(KeyboardInterrupt),
        writer.FeatureWriter.open(out, items, description, 512, "float32", facts) as own,
    ):
        bad = items.names.index("red/03.jpg")
        own.note_source(0, items.source(0))
        own.write(0, 0, np.zeros(512, np.float32))
        own.write(bad, 0, np.zeros(512, np.float32))
        own.flush()
        own.fail(bad, "a reason of ö" * 40)
        own.flush()
        raise KeyboardInterrupt
    own_again = writer.FeatureWriter.open(out, items, description, 512, "float32", facts)
    assert own_again.unreadable[bad] == ("a reason of ö" * 40).encode()[:200].decode(
        "utf-8", "ignore"
    )
    assert not own_again.described[bad].any()
    own_again.__exit__(KeyboardInterrupt, None, None)
    kept.save(spoilt / "red" / "03.jpg")
    report = extract.extract(items, network, out, scales=(40, 64))
    assert list(report.unreadable) == ["blue/07.jpg"]
    features = vggfeat.open_features(out)
    assert features.readable[bad] and np.isfinite(features.descriptors[bad]).all()
    with h5py.File(out) as file:
        assert file["errors"][bad] == b""


# --- what others do to it -------------------------------------------------------------------------


def _meanwhile(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[Path], object]) -> None:
    """Once at descriptors are written, another program does something to the half-written file."""
    write, count = writer.FeatureWriter.write, 0

    def then(self: writer.FeatureWriter, row: int, scale: int, descriptor: np.ndarray) -> None:
        nonlocal count
        write(self, row, scale, descriptor)
        count += 1
        if count == at:
            self.flush()
            act(self.partial)

    monkeypatch.setattr(writer.FeatureWriter, "write", then)


def _another(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"something else")


def _lengthen(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _write_over(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(1 << 14))


@pytest.mark.parametrize("at", [7, 44])
@pytest.mark.parametrize(
    ("act", "told"),
    [
        (Path.unlink, "removed"),
        (lambda path: path.rename(path.with_name("moved")), "moved"),
        (_another, "replaced"),
        (lambda path: os.truncate(path, 5000), "cut off"),
        (_lengthen, "lengthened"),
        (_write_over, "written over"),
    ],
)
def test_a_file_that_others_spoil_while_it_is_written_is_noticed(
    spoilt: Path,
    tmp_path: Path,
    run_main: Command,
    monkeypatch: pytest.MonkeyPatch,
    act: Any,
    told: str,
    at: int,
) -> None:
    out = tmp_path / "f.h5"
    _meanwhile(monkeypatch, at, act)
    ran = run_main(cli.main, *words(spoilt, out))
    assert ran.status == 1 and not out.exists()
    assert f"{out}.partial was {told} by another program while it was being written" in ran.err
    assert "goes on from there" not in ran.err


def test_rows_that_others_spoil_while_the_file_is_written_are_noticed(
    spoilt: Path, whole: Path, tmp_path: Path, run_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of a descriptor change behind the writer's back: the look at the whole file sees it."""

    def scribble(path: Path) -> None:
        with hdf5.open_file(path, store.FORMAT, store.FORMAT_VERSION, unfinished=True) as file:
            done = file.arrays["status"].read(file.descriptor)[:, 0] == store.DONE
            at = (
                file.arrays["descriptors"].at
                + int(done.argmax()) * file.arrays["descriptors"].row_bytes
            )
        with open(path, "r+b") as stream:
            stream.seek(at)
            stream.write(b"scribble")

    out = tmp_path / "f.h5"
    _meanwhile(monkeypatch, 7, scribble)
    ran = run_main(cli.main, *words(spoilt, out))
    assert ran.status == 1 and not out.exists()
    assert "descriptors other than written: 1, first that of 'blue/0" in ran.err
    assert "21 of 24 images are in" in ran.err and "the same command goes on from there" in ran.err
    assert run_main(cli.main, *words(spoilt, out)).status == 3
    assert_same_file(out, whole)


def test_a_descriptor_that_the_disk_has_changed_is_described_again(
    spoilt: Path, whole: Path, tmp_path: Path, run_main: Command
) -> None:
    out = tmp_path / "f.h5"
    assert run_main(cli.main, *words(spoilt, out)).status == 3
    with hdf5.open_file(out, store.FORMAT, store.FORMAT_VERSION) as file:
        at = file.arrays["descriptors"].at + 5 * file.arrays["descriptors"].row_bytes
    raw = bytearray(out.read_bytes())
    raw[at] ^= 1
    out.write_bytes(raw)
    ran = run_main(cli.main, "info", out, "--verify")
    assert (
        ran.status == 1
        and "`vggfeat extract --retry`, otherwise as it was made, describes them again" in ran.err
    )
    ran = run_main(cli.main, *words(spoilt, out, "--retry"))
    assert ran.status == 3 and "going on: 21 of 24 images" in ran.err
    assert_same_file(out, whole)


def test_a_file_that_appears_meanwhile_stays(
    spoilt: Path, whole: Path, tmp_path: Path, run_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.h5"
    with monkeypatch.context() as patch:
        _meanwhile(patch, 7, lambda path: out.write_text("mine"))
        ran = run_main(cli.main, *words(spoilt, out))
    assert ran.status == 1 and "has appeared meanwhile" in ran.err and out.read_text() == "mine"
    out.unlink()
    again = run_main(cli.main, *words(spoilt, out))
    assert again.status == 3 and "going on: 22 of 24" in again.err
    assert_same_file(out, whole)


def test_facts_that_could_not_be_read_again_are_refused_before_the_work(
    folder: Path, tmp_path: Path
) -> None:
    """Else the last row is there, and the file can never be finished."""
    network = vggfeat.load(WEIGHTS)
    network.metadata["note"] = "é" * (hdf5.JSON_BYTES // 6)
    with pytest.raises(VggfeatError, match="shorten the weights' metadata"):
        extract.extract(datasets.load("folder", folder), network, tmp_path / "f.h5", scales=(40,))
    assert not list(tmp_path.glob("f.h5*"))


@pytest.mark.parametrize("what", ["link", "dangling", "pipe", "folder"])
def test_what_lies_at_the_half_written_files_name(
    folder: Path, tmp_path: Path, run_main: Command, what: str
) -> None:
    out, partial, precious = tmp_path / "f.h5", tmp_path / "f.h5.partial", tmp_path / "precious"
    if what == "pipe":
        os.mkfifo(partial)
    elif what == "folder":
        partial.mkdir()
    else:
        partial.symlink_to(precious)
    if what == "link":
        precious.write_text("mine")
    for more in ([], ["--overwrite"]):
        ran = run_main(cli.main, *words(folder, out, *more))
        assert ran.status == 1 and str(partial) in ran.err and ran.err.count("\n") == 1
        assert what == "folder" or "move it away" in ran.err or "remove it" in ran.err
    assert not out.exists() and precious.exists() == (what == "link")
    assert what != "link" or precious.read_text() == "mine"


def test_two_that_start_together_do_the_work_once(
    spoilt: Path, whole: Path, tmp_path: Path, run_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one ends between the second one's look at --out and its lock."""
    out, locked = tmp_path / "f.h5", writer.locked

    def late(*arguments: Any) -> int:
        out.write_bytes(whole.read_bytes())
        return locked(*arguments)

    monkeypatch.setattr(writer, "locked", late)
    ran = run_main(cli.main, *words(spoilt, out))
    assert ran.status == 1 and f"{out} exists; give --overwrite" in ran.err
    assert out.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("*.partial"))


def test_a_link_at_out_stays_one(
    spoilt: Path, whole: Path, tmp_path: Path, run_main: Command
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "f.h5").write_text("old")
    (tmp_path / "f.h5").symlink_to(tmp_path / "disk" / "f.h5")
    assert run_main(cli.main, *words(spoilt, tmp_path / "f.h5", "--overwrite")).status == 3
    assert (tmp_path / "f.h5").is_symlink()
    assert_same_file(tmp_path / "disk" / "f.h5", whole)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(
    spoilt: Path,
    whole: Path,
    tmp_path: Path,
    run_main: Command,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    def no(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no)
    ran = run_main(cli.main, *words(spoilt, tmp_path / "f.h5"))
    assert ran.status == 3 and "can't be locked" in ran.err and "start no other process" in ran.err
    assert_same_file(tmp_path / "f.h5", whole)


# --- images that go away, or were never there -----------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is one image: what has been read is described before much more is read."""
    monkeypatch.setattr(batches, "CROP_PIXELS", 1)


def _at_read(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Something happens before an image is read, the number-th from now."""
    count = itertools.count(1)

    def reading(source: Any) -> np.ndarray:
        if next(count) == number:
            act()
        return read_rgb(source)

    monkeypatch.setattr(extract, "read_rgb", reading)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("share", ["", "red"])
def test_a_share_that_goes_away_stops_it_and_it_goes_on(
    spoilt: Path,
    whole: Path,
    tmp_path: Path,
    run_main: Command,
    monkeypatch: pytest.MonkeyPatch,
    alone: None,
    share: str,
    workers: int,
) -> None:
    """All of the images, or those of one folder: no row is marked, nothing is finished; then the
    file is the same.
    """
    out, partial = tmp_path / "f.h5", tmp_path / "f.h5.partial"
    with monkeypatch.context() as patch:
        _at_read(patch, 21, lambda: (spoilt / share).rename(tmp_path / "away"))
        ran = run_main(cli.main, *words(spoilt, out, "--workers", workers))
    assert ran.status == 1 and not out.exists()
    told = ran.err_lines[-1]
    folders = "red" if share else "(blue|red)"
    lost = rf"the images in {spoilt}/{folders} can't be read any more \(no such file\): bring back"
    assert re.search(lost, told)
    assert f"of 24 images are in {partial}" in told and told.endswith(
        "the same command goes on from there"
    )
    with hdf5.open_file(partial, store.FORMAT, store.FORMAT_VERSION, unfinished=True) as file:
        status = file.arrays["status"].read(file.descriptor)
    assert (status == store.DONE).all(1).sum() >= 8
    damaged = np.flatnonzero((status == store.UNREADABLE).any(1))
    assert damaged.tolist() == [7, 15]

    before = partial.read_bytes()
    # of all, there is nothing to begin anew with
    for more in [()] if share else [(), ("--overwrite",)]:
        ran = run_main(cli.main, *words(spoilt, out, *more))
        assert ran.status == 1 and partial.read_bytes() == before, ran.err
    (tmp_path / "away").rename(spoilt / share)
    ran = run_main(cli.main, *words(spoilt, out))
    assert ran.status == 3 and "going on: " in ran.err and " are left" in ran.err
    assert_same_file(out, whole)


def test_what_is_missing_among_good_images_is_a_row_and_no_share(
    folder: Path, tmp_path: Path, run_main: Command
) -> None:
    lines = [
        f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.glob("*/*.jpg"))
    ]
    lines[3:3] = [f"gone/{i}.jpg,red" for i in range(9)]
    (folder / "list.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    line = words(folder / "list.csv", tmp_path / "f.h5")
    line[line.index("folder")] = "csv"
    ran = run_main(cli.main, *line)
    assert ran.status == 3 and "33 (9 unreadable)" in ran.out
    assert len(vggfeat.open_features(tmp_path / "f.h5").errors) == 9


def test_a_long_run_of_missing_images_is_no_row_by_row_matter(
    folder: Path, tmp_path: Path, run_main: Command, monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    """Few of all, but none of so many in a row: they are to come back, or to leave the list."""
    monkeypatch.setattr(extract, "MISSING", 9)
    there = [
        f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.glob("*/*.jpg"))
    ]
    gone = [f"gone/{i}.jpg,red" for i in range(9)]
    line = words(folder / "list.csv", tmp_path / "f.h5")
    line[line.index("folder")] = "csv"
    (folder / "list.csv").write_text(
        "\n".join(["path,label", *there[:9], *gone, *there[9:]]) + "\n"
    )
    for _ in range(2):
        ran = run_main(cli.main, *line)
        assert ran.status == 1 and not (tmp_path / "f.h5").exists()
        assert (
            f"no image from {folder}/gone/0.jpg to gone/8.jpg can be opened (no such file)"
            in ran.err_lines[-1]
        )
    (folder / "gone").symlink_to(folder / "red")
    for i, path in enumerate(sorted((folder / "red").glob("*.jpg"))[:9]):
        (folder / "red" / f"{i}.jpg").write_bytes(path.read_bytes())
    assert run_main(cli.main, *line).status == 0

    other = [*there[:9], *gone[:8], there[9], gone[8], *there[10:]]
    (folder / "list.csv").write_text("\n".join(["path,label", *other]) + "\n")
    (folder / "gone").unlink()
    line[line.index("--out") + 1] = str(tmp_path / "g.h5")
    assert run_main(cli.main, *line).status == 3


def test_lists_whose_images_are_mostly_missing_are_refused(
    folder: Path, tmp_path: Path, run_main: Command
) -> None:
    """In one line, before and instead of a file of nothing; by --dry-run, too."""
    lines = [f"{path.relative_to(folder)},red" for path in sorted(folder.glob("*/*.jpg"))]
    lines += [f"gone/{i:03d}.jpg,blue" for i in range(120)]
    (folder / "list.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    line = words(folder / "list.csv", tmp_path / "f.h5")
    line[line.index("folder")] = "csv"
    for more in ((), ("--dry-run",)):
        ran = run_main(cli.main, *line, *more)
        assert (ran.status, ran.out, ran.err_lines) == (
            1,
            "",
            [
                "vggfeat: 120 of 144 images that were looked at can't be opened, the first is"
                f" {folder}/gone/000.jpg: no such file; unpack the images there, or bring back the"
                " disk or share that they are on"
            ],
        )
    assert not list(tmp_path.glob("f.h5*"))


@pytest.mark.parametrize("kept", [0, 300])
def test_nothing_is_finished_where_no_image_can_be_read(
    folder: Path, tmp_path: Path, run_main: Command, kept: int
) -> None:
    """Neither by its header nor, where that is whole, by its pixels."""
    for path in folder.glob("*/*.jpg"):
        path.write_bytes(path.read_bytes()[: 2 * kept] if kept else b"")
    ran = run_main(cli.main, *words(folder, tmp_path / "f.h5"))
    assert ran.status == 1 and ran.out == ""
    assert (
        f"vggfeat: none of the 24 images can be read, the first is {folder}/blue/00.jpg: "
        in ran.err_lines[-1]
    )
    assert not list(tmp_path.glob("f.h5*"))


def test_a_retry_without_the_images_leaves_the_file_as_it_is(
    spoilt: Path, whole: Path, tmp_path: Path, run_main: Command
) -> None:
    before = whole.read_bytes()
    (spoilt / "blue").rename(tmp_path / "away")
    (spoilt / "blue").mkdir()
    for path in (tmp_path / "away").iterdir():
        (spoilt / "blue" / path.name).symlink_to("nowhere.jpg")
    ran = run_main(cli.main, *words(spoilt, whole, "--retry"))
    assert ran.status == 1 and whole.read_bytes() == before and not list(tmp_path.glob("*.partial"))
    assert ran.err_lines == [
        f"vggfeat: blue/00.jpg, which is described in {whole}, can't be read now (No such file or"
        " directory): bring it back, or the disk or share that it is on, and the same command goes"
        " on, or give another --out"
    ]


def test_a_run_that_goes_on_tells_its_own_images_from_earlier_ones(
    folder: Path, tmp_path: Path, run_main: Command, monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    out = tmp_path / "f.h5"

    def stop(*_: Any) -> None:
        raise VggfeatError("stop")

    with monkeypatch.context() as patch:
        _meanwhile(patch, 8, stop)
        assert run_main(cli.main, *words(folder, out, "--workers", 1)).status == 1
    ran = run_main(cli.main, *words(folder, out))
    assert ran.status == 0
    assert f"going on: 4 of 24 images are in {out}.partial; 20 are left" in ran.err_lines
    assert "24: 4 by earlier runs, 20 by this one" in ran.out and " in all" in ran.out


# --- unreadable rows of a finished file -----------------------------------------------------------


def test_what_was_unreadable_is_described_later(
    spoilt: Path, tmp_path: Path, run_main: Command
) -> None:
    out, away = tmp_path / "f.h5", spoilt / "red" / "03.jpg"
    assert run_main(cli.main, *words(spoilt, out)).status == 3
    before = vggfeat.open_features(out)
    ran = run_main(cli.main, *words(spoilt, out))
    assert ran.status == 1 and "exists; give --overwrite" in ran.err

    ran = run_main(cli.main, *words(spoilt, out, "--retry"))  # nothing is better yet
    assert ran.status == 3 and "unreadable: red/03.jpg" in ran.err
    assert_same_file(out, out)

    Image.fromarray(photograph(3, 40, 60)).save(away)
    ran = run_main(cli.main, *words(spoilt, out, "--retry", "--scales", "40"))
    assert ran.status == 1 and "was begun with scales 40,64, not 40" in ran.err
    assert vggfeat.open_features(out).errors == before.errors

    ran = run_main(cli.main, *words(spoilt, out, "--retry"))
    assert ran.status == 3 and "going on: 22 of 24" in ran.err and "red/03.jpg" not in ran.err
    after = vggfeat.open_features(out)
    row = after.names.index("red/03.jpg")
    assert (
        after.readable[row] and np.isfinite(after.descriptors[row]).all() and len(after.errors) == 1
    )
    kept = np.delete(np.arange(24), row)
    np.testing.assert_array_equal(after.descriptors[kept], before.descriptors[kept])
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_retry_goes_on(
    spoilt: Path, tmp_path: Path, run_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.h5"
    assert run_main(cli.main, *words(spoilt, out)).status == 3
    Image.fromarray(photograph(3, 40, 60)).save(spoilt / "red" / "03.jpg")
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> None:
            raise VggfeatError("stop")

        patch.setattr(writer.FeatureWriter, "write", stop)
        assert run_main(cli.main, *words(spoilt, out, "--retry")).status == 1
    with pytest.raises(VggfeatError, match="its extraction has not finished"):
        vggfeat.open_features(out)
    assert run_main(cli.main, *words(spoilt, out)).status == 3
    assert len(vggfeat.open_features(out).errors) == 1


def test_a_finished_file_without_any_row_is_only_retried_as_it_was_made(
    folder: Path, tmp_path: Path, run_main: Command
) -> None:
    """Earlier versions finished them. Descriptors of other weights would stand under the old
    description.
    """
    out, items, network = tmp_path / "f.h5", datasets.load("folder", folder), vggfeat.load(WEIGHTS)
    job = (
        items,
        description_of(network, None, (40, 64), True),
        512,
        "float32",
        {"versions": versions()},
    )
    with writer.FeatureWriter.open(out, *job) as file:
        for i in range(len(items)):
            file.fail(i, "away")
        file.finish()
    before = out.read_bytes()
    for option, value, what in (
        ("--scales", "64", "scales"),
        ("--weights", WEIGHTS + ",seed=7", "other weights"),
    ):
        ran = run_main(cli.main, *words(folder, out, "--retry", option, value))
        assert ran.status == 1 and f"{out} was begun with {what}" in ran.err
        assert out.read_bytes() == before
    assert run_main(cli.main, *words(folder, out, "--retry")).status == 0
    assert not vggfeat.open_features(out).errors


def test_a_reason_that_a_killed_run_has_left_is_gone_when_the_row_is_done(
    folder: Path, tmp_path: Path
) -> None:
    """It was written, its row's status not yet; `errors` is empty for each row that is done."""
    out = tmp_path / "f.h5"
    items, network = datasets.load("folder", folder), vggfeat.load(WEIGHTS)
    job = (
        items,
        description_of(network, None, (40, 64), True),
        512,
        "float32",
        {"versions": versions()},
    )
    with pytest.raises(KeyboardInterrupt), writer.FeatureWriter.open(out, *job) as file:
        file.note_source(0, items.source(0))
        file.write(0, 0, np.zeros(512, np.float32))
        file._put("errors", 5, b"away")
        raise KeyboardInterrupt
    extract.extract(items, network, out, scales=(40, 64))
    with h5py.File(out) as made:
        assert set(made["errors"][:]) == {b""}


def test_an_image_changed_in_its_middle_is_noticed(
    folder: Path, tmp_path: Path, run_main: Command
) -> None:
    """A BMP of 300 kB, a square in its middle painted over: the same length, another time."""
    out, bmp = tmp_path / "f.h5", folder / "blue" / "00.bmp"
    Image.fromarray(photograph(1, 400, 250)).save(bmp)  # the narrowest comes first
    items, network = datasets.load("folder", folder), vggfeat.load(WEIGHTS)

    def stop(done: float, total: int) -> None:
        if done > 6:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        extract.extract(items, network, out, scales=(40,), batch_size=1, progress=stop, workers=1)
    raw = bytearray(bmp.read_bytes())
    later = bmp.stat().st_mtime_ns + 10**10
    os.utime(bmp, ns=(later, later))  # only another time: the same image
    with writer.FeatureWriter.open(out, *_job(items, network)) as file:
        assert file.described[items.names.index("blue/00.bmp")].all()
    raw[len(raw) // 2 : len(raw) // 2 + 300] = bytes(300)
    bmp.write_bytes(raw)
    os.utime(bmp, ns=(later, later + 10**10))
    with pytest.raises(VggfeatError, match=r"another image blue/00.bmp: it has changed since"):
        extract.extract(items, network, out, scales=(40,), batch_size=1)
    status = bmp.stat()
    bmp.write_bytes(raw)
    # a time that is put back doesn't hide it
    os.utime(bmp, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(VggfeatError, match=r"another image blue/00.bmp"):
        extract.extract(items, network, out, scales=(40,), batch_size=1)


def _job(items: datasets.Items, network: Any) -> tuple[Any, ...]:
    facts = {"versions": versions()}
    return items, description_of(network, "fc7", (40,), True), 512, "float32", facts


# --- several processes ----------------------------------------------------------------------------


def run_ranks(
    processes: int, script: str, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    return prepared.run([script, *arguments], {**os.environ, **more}, processes, timeout=HANG)


def test_a_rank_that_dies_loses_nobodys_rows(spoilt: Path, whole: Path, tmp_path: Path) -> None:
    """Three processes, of which one dies; then two go on. One file, that of one process."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys, time
        from vggfeat import cli, writer
        writer.FLUSH_ROWS, writer.FLUSH_SECONDS = 1, float("inf")
        write, count = writer.FeatureWriter.write, 0
        def deadly(self, row, scale, descriptor):
            global count
            count += 1
            write(self, row, scale, descriptor)
            if os.environ.get("DEADLY") and os.environ["RANK"] == "1" and count == 7:
                while True:  # until the others have got somewhere
                    described = self._places["status"].read(self._file) == 1
                    if min(described[rank::3].sum() for rank in (0, 2)) >= 6:
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(0.05)
        writer.FeatureWriter.write = deadly
        cli.main()
        """)
    )
    out = tmp_path / "f.h5"
    died = run_ranks(3, str(script), *words(spoilt, out), DEADLY="1")
    assert died.returncode != 0 and not out.exists()
    partial = Path(f"{out}.partial")
    with hdf5.open_file(partial, store.FORMAT, store.FORMAT_VERSION, unfinished=True) as file:
        described = file.arrays["status"].read(file.descriptor) == store.DONE
    of_rank = [int(described[rank::3].sum()) for rank in range(3)]
    assert of_rank[1] == 6 and min(of_rank[0], of_rank[2]) >= 6, died.stderr
    again = run_ranks(2, str(script), *words(spoilt, out))
    assert again.returncode == 0 and again.stderr.count("going on: ") == 1, again.stderr
    assert again.stdout.count("descriptor") == 1 and "(2 unreadable)" in again.stdout
    assert again.stderr.count("unreadable: red/03.jpg: empty file") == 1
    assert_same_file(out, whole)
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_writes_the_file_of_one_process(
    spoilt: Path, whole: Path, tmp_path: Path, processes: int
) -> None:
    """Started as docs/gpus.md says: one file, told of once. Two images can't be read, of which no
    process makes a crash.
    """
    out = tmp_path / "f.h5"
    line = [*torchrun(processes), "-m", "vggfeat", *words(spoilt, out)]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=HANG)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("descriptor") == 1 and "(2 unreadable)" in ran.stdout
    assert ran.stderr.count("smallest side: ") == 1
    assert ran.stderr.count("unreadable: red/03.jpg: empty file") == 1
    assert_same_file(out, whole)
    assert not list(tmp_path.glob("*.partial*"))
