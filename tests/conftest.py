"""What several tests need: any machine made equal, the real data (skipped where it is missing),
small nets.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from vggfeat import extract, terminal, writer
from vggfeat.errors import UnreadableImage
from vggfeat.images import Preprocessing
from vggfeat.vgg import VGG
from vggfeat.weights import Network

DATA = Path(__file__).parents[2] / "shared" / "data"
# seconds after which a process that a test waits for counts as one that hangs; none takes a tenth
# of them
HANG = 600

# The same examples each time, however long they take: what fails, fails for everybody. FUZZ asks
# for others.
settings.register_profile(
    "any machine",
    deadline=None,
    derandomize="FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any machine")

# What nohup or a shell's `&` has switched off stays off in a command, and most tests of signals
# would wait for ever.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )


# Tests that take over a third of a second, on two cores of a Xeon (see `pytest --durations=0`), as
# NAME, or FILE::NAME where several files have one of that name; `-m "not slow"` leaves them out.
TESTS = Path(__file__).parent
SLOW = set((TESTS / "slow.txt").read_text().split())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.name.partition("[")[0]
        if SLOW & {name, f"{item.path.relative_to(TESTS)}::{name}"}:
            item.add_marker(pytest.mark.slow)


# CUDA reads CUDA_VISIBLE_DEVICES once in a process: now, by the user's; what is set later is for
# the commands that tests start, whose `--device auto` would take a GPU. The processes that xdist
# starts have the environment of the one that starts them: what the user had is handed on to them.
USERS = "VGGFEAT_TESTS_CUDA_VISIBLE_DEVICES"
if "PYTEST_XDIST_WORKER" in os.environ:
    del os.environ["CUDA_VISIBLE_DEVICES"]
    if USERS in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[USERS]
elif "CUDA_VISIBLE_DEVICES" in os.environ:
    os.environ[USERS] = os.environ["CUDA_VISIBLE_DEVICES"]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def any_hardware() -> Iterator[None]:
    """The device and the precision "auto" are the CPU and float32 in this process, and the device
    in those that it starts, whatever the hardware has.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setattr(terminal, "gpu_failed", lambda error: False)  # it would end this process
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            patch.setattr(torch.cpu, name, lambda: False)
        yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The machine's last GPU, which is not the current one where it has several, shown to this test
    alone; skipped where there is none.
    """
    if not GPUS:
        pytest.skip("no GPU that PyTorch can use")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: GPUS)
    return torch.device("cuda", GPUS - 1)


def without_clock(patch: pytest.MonkeyPatch) -> None:
    """What a command does by the clock, it does not in this process.

    One thread for each test anew, as a command that takes --workers leaves its number behind. A
    slow machine would flush, tell how far it is and advise after ten seconds.
    """
    torch.set_num_threads(1)
    patch.setattr(writer, "FLUSH_SECONDS", float("inf"))
    patch.setattr(terminal, "LINE_SECONDS", float("inf"))
    patch.setattr(extract, "ADVICE_SECONDS", float("inf"))


@pytest.fixture(autouse=True)
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test is without a clock."""
    without_clock(monkeypatch)


# What a process says of itself by this: the most memory that it has had, in bytes.
PEAK = (
    "1024 * int(next(line for line in open('/proc/self/status') if"
    " line.startswith('VmHWM')).split()[1])"
)
STATUS = Path("/proc/self/status")
needs_peak = pytest.mark.skipif(
    not STATUS.exists() or "VmHWM" not in STATUS.read_text(),
    reason="the system doesn't tell the peak of memory",
)


@pytest.fixture
def locks(tmp_path: Path) -> None:
    """For what needs a file system with locks."""
    with open(tmp_path / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pytest.skip(f"no locks in {tmp_path}: {error.strerror}")
    (tmp_path / "lock").unlink()


@pytest.fixture(scope="session")
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip("the real data are not beside this checkout")
    return DATA


@dataclass
class Ran:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def err_lines(self) -> list[str]:
        return self.err.splitlines()


Command = Callable[..., Ran]
Nets = Callable[..., VGG]


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`run_main(main, "svm", "--features", path)`: a command's main in this process, which saves
    the imports.
    """
    monkeypatch.setattr(terminal.out, "width", 240)

    def run(main: Callable[[], None], *words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Ran(int(ended.value.code or 0), printed.out, printed.err)

    return run


def ran(main: Callable[[], None], *words: object) -> Ran:
    """As `run_main` gives it, for a fixture that several tests share."""
    printed, told = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(told),
    ):
        without_clock(patch)
        patch.setattr(terminal.out, "width", 240)
        patch.setattr(sys, "argv", ["program", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    return Ran(int(ended.value.code or 0), printed.getvalue(), told.getvalue())


@pytest.fixture(scope="session")
def he() -> Nets:
    """A net with He's initialisation: signals neither vanish nor explode, so that equality means
    something.
    """

    def make(net: str, **settings: Any) -> VGG:
        module = VGG(net, **settings)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in module.parameters():
                std = (2.0 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
                parameter.normal_(0, std, generator=generator)
        return module.eval()

    return make


def vgg_of(network: Network) -> VGG:
    """A network's module, which is a net of Table 1."""
    assert isinstance(network.module, VGG)
    return network.module


@pytest.fixture(scope="session")
def plain() -> Preprocessing:
    return Preprocessing(
        mean=(123.68, 116.779, 103.939), std=(1.0, 1.0, 1.0), channel_order="RGB", input_range=255.0
    )


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: smooth colours with some texture, so that JPEG and rescaling behave as on
    photographs.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    smooth = np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16
    )
    pixels: np.ndarray = np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255)
    return pixels.astype(np.uint8)


def python_that_runs(folder: Path, script: str) -> str:
    """To stand in place of sys.executable: runs this script, whatever module it is asked for."""
    ours = f"import sys\nsys.path.insert(0, {str(TESTS.parent)!r})\n"
    (folder / "script.py").write_text(ours + script)
    line = shlex.join([sys.executable, str(folder / "script.py")])
    (folder / "python").write_text(f'#!/bin/sh\nexec {line} "$@"\n')
    (folder / "python").chmod(0o755)
    return str(folder / "python")


def torchrun(processes: int) -> list[str]:
    """The words before a script or `-m module`; on this machine alone, whatever its name resolves
    to.
    """
    alone = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    return [sys.executable, "-m", "torch.distributed.run", *alone]


def all_read(
    results: Iterable[tuple[int, np.ndarray | UnreadableImage]],
) -> dict[int, np.ndarray]:
    """Image -> its descriptors; each could be read."""
    read: dict[int, np.ndarray] = {}
    for i, result in results:
        assert isinstance(result, np.ndarray), result
        read[i] = result
    return read


def assert_same_descriptors(a: np.ndarray, b: np.ndarray) -> None:
    """Equal to what a batch of another size rounds otherwise: 1e-4 of each descriptor's largest
    value.
    """
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    a, b = np.nan_to_num(a).astype(np.float64), np.nan_to_num(b).astype(np.float64)
    largest = np.abs(b).max(-1, keepdims=True)
    assert (np.abs(a - b) <= 1e-4 * largest).all(), np.abs(a - b).max()


@pytest.fixture(scope="session")
def made_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "images"
    shapes = [(40, 60), (60, 40), (48, 48)]
    for c, name in enumerate(("blue", "red")):
        (root / name).mkdir(parents=True)
        for i in range(12):
            image = photograph(100 * c + i, *shapes[i % 3])
            image[..., 0 if c == 0 else 2] //= 4
            Image.fromarray(image).save(root / name / f"{i:02d}.jpg", quality=95)
    return root


@pytest.fixture
def folder(made_folder: Path, tmp_path: Path) -> Path:
    """Two classes of 12 JPEGs of three shapes: reddish and bluish."""
    return Path(shutil.copytree(made_folder, tmp_path / "images"))
