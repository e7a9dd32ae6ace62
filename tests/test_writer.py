"""An extraction that is killed, interrupted, refused by the disk or shared goes on, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import vggfeat
from vggfeat import cli, datasets, extract, store, writer
from vggfeat.errors import Interrupted, UnreadableImage, VggfeatError
from vggfeat.extract import by_shape, description_of

from .conftest import Command, photograph

KILLS = int(os.environ.get("KILLS", "10"))
WEIGHTS = "random:B,width=0.125,crop=32,classes=4"


def words(root: Path, out: Path, *more: object) -> list[str]:
    fixed = ["extract", "--dataset", "folder", "--root", root, "--weights", WEIGHTS, "--scales", "40,64"]
    return [
        *map(str, fixed),
        "--out",
        str(out),
        "--batch-size",
        "1",
        "--precision",
        "float32",
        *map(str, more),
    ]


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def contents(path: Path) -> dict[str, np.ndarray]:
    """All that a feature file holds, but for how long it took."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None
        )
        found |= {f"@{key}": np.asarray(value) for key, value in file.attrs.items() if key != "command"}
    del found["seconds"]
    return found


def assert_same_file(a: Path, b: Path) -> None:
    one, other = contents(a), contents(b)
    assert one.keys() == other.keys()
    for name in one:
        if name == "descriptors":  # a batch of another size sums in another order
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)
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


# Forked from one process that has imported everything: a start takes milliseconds, and kills fall into the work.
# What is described is logged as it happens, and a flush is due every 50 ms.
KILLER = """
    import json, os, random, signal, sys, time
    import torch
    from vggfeat import cli, store, writer
    import vggfeat.extract
    log, seed, kills, longest, *command = sys.argv[1:]
    torch.set_num_threads(1)
    writer.FLUSH_SECONDS = 0.05
    write = writer.FeatureWriter.write
    log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    def logged(self, row, scale, descriptor):
        os.write(log, f"{time.monotonic()} {row} {scale}\\n".encode())
        time.sleep(0.01)
        write(self, row, scale, descriptor)
    writer.FeatureWriter.write = logged
    sys.argv = ["vggfeat", *command]
    random.seed(int(seed))
    out = command[command.index("--out") + 1]
    killed = []
    while True:
        child = os.fork()
        if not child:
            cli.main()
        if len(killed) < int(kills):
            time.sleep(random.uniform(0, float(longest)))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        killed.append(time.monotonic())
        os.write(log, f"{killed[-1]} kill -1\\n".encode())
        if os.path.exists(out):  # it had its name already
            status = 3 << 8
            break
        if os.path.exists(out + ".partial") and os.path.getsize(out + ".partial"):
            place = writer._Place
            with store.open_hdf5(writer.Path(out + ".partial"), store.FORMAT, 1, unfinished=True) as file:
                there = file["described"][:].nonzero()
            os.write(log, f"{killed[-1]} there {list(map(list, zip(*map(list, map(lambda a: a.tolist(), there)))))}\\n"
                     .encode())
    print(json.dumps({"kills": len(killed), "status": os.WEXITSTATUS(status)}))
"""


def test_killed_at_any_moment_it_goes_on(spoilt: Path, whole: Path, tmp_path: Path) -> None:
    """KILLS random SIGKILLs, a new extraction whenever one is finished; the file is that of an uninterrupted run."""
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
        described: dict[tuple[int, int], float] = {}
        safe: set[tuple[int, int]] = set()
        for line in log.read_text().splitlines():
            when, what, rest = line.split(" ", 2)
            if what == "kill":
                killed = float(when)
            elif what == "there":
                there = {(row, scale) for row, scale in json.loads(rest)}
                assert safe <= there, "a row that was there is lost"
                # lost is only what was described since the last flush: 50 ms, and what a busy machine adds
                lost = [described[cell] for cell in described.keys() - there]
                assert all(killed - at < 1.0 for at in lost)
                safe = there
                described = {cell: at for cell, at in described.items() if cell in there}
            else:
                cell = (int(what), int(rest))
                assert cell not in safe, "described again although it was there"
                described[cell] = float(when)
    print(f"{kills} kills over {round_} extractions")
    assert kills >= KILLS


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_extraction_says_what_it_keeps(
    spoilt: Path, whole: Path, tmp_path: Path, run_main: Command, number: int, status: int
) -> None:
    script = """
        import os, sys
        from vggfeat import cli, writer
        write = writer.FeatureWriter.write
        def then_signal(self, row, scale, descriptor):
            write(self, row, scale, descriptor)
            if len(self._values) == 13:
                os.kill(os.getpid(), int(number))
        writer.FeatureWriter.write = then_signal
        number, *sys.argv[1:] = sys.argv[1:]
        cli.main()
    """
    out = tmp_path / "f.h5"
    ran = run_script(script, int(number), *words(spoilt, out))
    assert ran.returncode == status and ran.stdout == ""
    line = ran.stderr.splitlines()[-1]
    assert line.startswith("vggfeat: interrupted; ") and line.endswith("the same command goes on from there")
    assert "of 24 images are in" in line and not out.exists()
    with pytest.raises(VggfeatError, match="half-written"):
        vggfeat.open_features(tmp_path / "f.h5.partial")
    again = run_main(cli.main, *words(spoilt, out))
    assert again.status == 3 and "going on: " in again.err
    assert_same_file(out, whole)


def test_nothing_is_left_of_an_extraction_that_described_nothing(folder: Path, tmp_path: Path) -> None:
    items = datasets.load("folder", folder)

    def interrupt(done: float, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"^interrupted$"):
        extract.extract(items, vggfeat.load(WEIGHTS), tmp_path / "f.h5", scales=(40,), progress=interrupt)
    assert not list(tmp_path.glob("f.h5*"))


def test_a_disk_that_fails_later_loses_nothing(
    spoilt: Path, whole: Path, tmp_path: Path, run_main: Command
) -> None:
    """A limit on the file's length that falls after the first flush."""
    script = """
        import resource, sys
        from vggfeat import cli, writer
        writer.FLUSH_ROWS = 4
        flush, count = writer.FeatureWriter.flush, 0
        def limited(self):
            global count
            count += 1
            if count == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            flush(self)
        writer.FeatureWriter.flush = limited
        cli.main()
    """
    out = tmp_path / "f.h5"
    ran = run_script(script, *words(spoilt, out))
    assert ran.returncode == 1, ran.stderr
    line = ran.stderr.splitlines()[-1]
    assert line.startswith("vggfeat: can't write") and "File too large" in line and "goes on" in line
    assert ran.stderr.count("\n") == 1
    again = run_main(cli.main, *words(spoilt, out))
    assert again.status == 3 and "going on: " in again.err
    assert_same_file(out, whole)


def test_two_writers_on_one_file(folder: Path, tmp_path: Path) -> None:
    items = datasets.load("folder", folder)
    description = description_of(vggfeat.load(WEIGHTS), "fc7", (40,), True)
    script = """
        import sys
        from pathlib import Path
        import vggfeat
        from vggfeat import datasets, writer
        from vggfeat.extract import description_of
        items = datasets.load("folder", Path(sys.argv[1]))
        description = description_of(vggfeat.load(sys.argv[3]), "fc7", (40,), True)
        with writer.FeatureWriter(sys.argv[2], items, description, 512):
            print("open", flush=True)
            sys.stdin.read()
            raise SystemExit
    """
    command = [sys.executable, "-c", textwrap.dedent(script), folder, tmp_path / "f.h5", WEIGHTS]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "open\n"
    for overwrite in (False, True):
        with pytest.raises(VggfeatError, match="another process is writing"):
            writer.FeatureWriter(tmp_path / "f.h5", items, description, 512, overwrite=overwrite)
    other.kill()
    other.wait()
    # the file of a dead process is taken over
    with writer.FeatureWriter(tmp_path / "f.h5", items, description, 512) as own:
        for i in range(24):
            own.write(i, 0, np.full(512, i, np.float32))
        own.finish()
    assert vggfeat.open_features(tmp_path / "f.h5").descriptors[:, 0, 0].tolist() == list(range(24))
    assert not list(tmp_path.glob("*.partial*"))


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    items = datasets.Items("csv", "unlabelled", tmp_path, ["a.jpg", "b\0.jpg"], None, [])
    with pytest.raises(VggfeatError, match="holds a zero byte"):
        extract.extract(items, vggfeat.load(WEIGHTS), tmp_path / "f.h5", scales=(40,))
    assert not list(tmp_path.iterdir())


def test_a_file_with_pending_rows_is_not_finished(folder: Path, tmp_path: Path) -> None:
    items = datasets.load("folder", folder)
    description = description_of(vggfeat.load(WEIGHTS), "fc7", (40,), True)
    with (
        pytest.raises(VggfeatError, match=r"23 rows of .* were never described"),
        writer.FeatureWriter(tmp_path / "f.h5", items, description, 512) as own,
    ):
        own.write(3, 0, np.zeros(512, np.float32))
        own.finish()
    assert [path.name for path in tmp_path.glob("*.h5*")] == ["f.h5.partial"]


# --- what may have changed ---------------------------------------------------------------------------------


@pytest.fixture
def begun(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_main: Command) -> Path:
    """OUT, of which OUT.partial holds the first rows."""

    def stop(self: writer.FeatureWriter, row: int, scale: int, descriptor: np.ndarray) -> None:
        write(self, row, scale, descriptor)
        if len(self._values) == 21:
            raise VggfeatError("stop")

    write = writer.FeatureWriter.write
    with monkeypatch.context() as patch:
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
    first = folder / "blue" / "00.jpg"
    kept, times = first.read_bytes(), first.stat()
    Image.fromarray(photograph(9, 40, 60)).save(first, quality=95)
    ran = run_main(cli.main, *words(folder, begun))
    assert ran.status == 1 and "was begun with another image blue/00.jpg: it has changed since" in ran.err
    first.unlink()
    assert run_main(cli.main, *words(folder, begun)).status == 1
    first.write_bytes(kept)  # a copy, later; the same picture
    assert first.stat().st_mtime_ns != times.st_mtime_ns
    (folder / "red" / "11.jpg").rename(folder / "red" / "12.jpg")
    ran = run_main(cli.main, *words(folder, begun))
    assert ran.status == 1 and "an image red/11.jpg where there is red/12.jpg now" in ran.err
    (folder / "red" / "12.jpg").rename(folder / "red" / "11.jpg")
    assert run_main(cli.main, *words(folder, begun)).status == 0


def test_other_labels_versions_and_damage_are_refused(begun: Path, folder: Path, tmp_path: Path) -> None:
    partial = Path(f"{begun}.partial")
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
    with h5py.File(partial, "r+") as file:
        file.attrs["versions"] = json.dumps({**json.loads(file.attrs["versions"]), "torch": "1.0"})
    refused(r"torch 1.0, not 2")
    partial.write_bytes(good[: len(good) // 2])
    refused("give --overwrite")
    partial.write_bytes(b"a text")
    refused("is not a feature file")
    partial.write_bytes(good)
    extract.extract(items, network, begun, scales=(40, 64), batch_size=1)


def test_an_unreadable_image_is_tried_again(spoilt: Path, tmp_path: Path, run_main: Command) -> None:
    kept = Image.fromarray(photograph(3, 40, 60))
    out = tmp_path / "f.h5"

    items, network = datasets.load("folder", spoilt), vggfeat.load(WEIGHTS)
    description = description_of(network, None, (40, 64), True)
    attributes = {"versions": extract.versions()}
    with (
        pytest.raises(KeyboardInterrupt),
        writer.FeatureWriter(out, items, description, 512, "float32", attributes) as own,
    ):
        bad = items.names.index("red/03.jpg")
        own.read(0, items.source(0))
        own.write(0, 0, np.zeros(512, np.float32))
        own.write(bad, 0, np.zeros(512, np.float32))
        own.flush()
        own.fail(bad, "a reason of ö" * 40)
        own.flush()
        raise KeyboardInterrupt
    own_again = writer.FeatureWriter(out, items, description, 512, "float32", attributes)
    assert own_again.unreadable[bad] == ("a reason of ö" * 40).encode()[:200].decode("utf-8", "ignore")
    assert not own_again.described[bad].any()
    own_again.__exit__(KeyboardInterrupt, None, None)
    kept.save(spoilt / "red" / "03.jpg")
    report = extract.extract(items, network, out, scales=(40, 64))
    assert list(report.unreadable) == ["blue/07.jpg"]
    features = vggfeat.open_features(out)
    assert features.readable[bad] and np.isfinite(features.descriptors[bad]).all()
    with h5py.File(out) as file:
        assert file["errors"][bad] == b""


# --- the device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_the_batch_and_says_so(kind: type[Exception]) -> None:
    """A device that holds three images of one size; the order and number of results stay."""
    told: list[str] = []
    sizes: list[int] = []

    def compute(images_NHWC: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images_NHWC))
        if len(images_NHWC) > 3:
            raise kind(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return images_NHWC[:, 0, 0, :1].float()

    images = [np.full((32, 32, 3), i, np.uint8) for i in range(40)]
    results = by_shape(images.__getitem__, range(40), (32,), compute, torch.device("cpu"), say=told.append)
    assert {i: int(value[0]) for i, _, value in results} == {i: i for i in range(40)}  # type: ignore[index]
    assert told[0] == "out of memory on cpu with 40 x 32x32 pixels: batches are half as large from here on"
    assert sizes[:5] == [40, 20, 10, 5, 2] and set(sizes[5:]) == {2} and len(told) == 4

    def too_small(images_NHWC: torch.Tensor) -> torch.Tensor:
        raise kind("can't allocate memory")

    with pytest.raises(VggfeatError, match="out of memory on cpu with 1 x 32x32 pixels; free some"):
        list(by_shape(images.__getitem__, range(40), (32,), too_small, torch.device("cpu")))


def test_one_huge_image_that_does_not_fit_is_left_out() -> None:
    def compute(images_NHWC: torch.Tensor) -> torch.Tensor:
        if images_NHWC.shape[2] > 1000:
            raise torch.OutOfMemoryError
        return images_NHWC[:, 0, 0, :1].float()

    images = [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((64, 6400, 3), np.uint8),
        np.ones((64, 64, 3), np.uint8),
    ]
    found = {
        i: result
        for i, _, result in by_shape(
            images.__getitem__, range(3), (64,), compute, torch.device("cpu"), batch_size=1
        )
    }
    assert isinstance(found[1], UnreadableImage)
    assert str(found[1]) == "out of memory on cpu with 1 x 64x6400 pixels, at Q=64"
    assert isinstance(found[0], np.ndarray) and isinstance(found[2], np.ndarray)


def test_other_errors_of_the_network_are_not_taken_for_memory() -> None:
    def compute(images_NHWC: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        list(by_shape([np.zeros((9, 9, 3), np.uint8)].__getitem__, [0], (9,), compute, torch.device("cpu")))


# --- several processes -------------------------------------------------------------------------------------


def torchrun(processes: int, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, script, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )


def test_a_rank_that_dies_loses_nobodys_rows(spoilt: Path, whole: Path, tmp_path: Path) -> None:
    """Three processes, of which one dies; then two go on. One file, that of one process."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, time
        from vggfeat import cli, writer
        writer.FLUSH_ROWS = 1
        write, count = writer.FeatureWriter.write, 0
        def deadly(self, row, scale, descriptor):
            global count
            count += 1
            write(self, row, scale, descriptor)
            if os.environ.get("DEADLY") and os.environ["RANK"] == "1" and count == 7:
                time.sleep(2)  # the others get somewhere
                os.kill(os.getpid(), signal.SIGKILL)
        writer.FeatureWriter.write = deadly
        cli.main()
        """)
    )
    out = tmp_path / "f.h5"
    os.environ["DEADLY"] = "1"
    try:
        died = torchrun(3, str(script), *words(spoilt, out))
    finally:
        del os.environ["DEADLY"]
    assert died.returncode != 0 and not out.exists()
    with store.open_hdf5(Path(f"{out}.partial"), store.FORMAT, 1, unfinished=True) as file:
        described = file["described"][:]
    of_rank = [int(described[rank::3].sum()) for rank in range(3)]
    assert of_rank[1] == 6 and min(of_rank[0], of_rank[2]) >= 6, died.stderr
    again = torchrun(2, str(script), *words(spoilt, out))
    assert again.stderr.count("going on: ") == 1, again.stderr
    assert again.stdout.count("descriptor") == 1 and "(2 unreadable)" in again.stdout
    assert again.stderr.count("unreadable: red/03.jpg: empty file") == 1
    assert_same_file(out, whole)
    assert not list(tmp_path.glob("*.partial*"))
