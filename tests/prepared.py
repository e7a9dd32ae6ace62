"""Processes forked from one that has imported PyTorch and this program: a start of their own takes
seconds.

For tests of what a command does once it runs. What a start does (imports, signals during them,
options that are answered before them), what torchrun does, and how much memory a process takes, is
tested with processes that are started. The one that forks has no threads and has computed nothing,
so a fork of it is as sound as a start. It begins with the first use, and ends with the tests.

    python -m tests.prepared FD    # that process
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import pkgutil
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

import pretrain
import vggfeat

ROOT = Path(__file__).parents[1]
# of other programs: what is imported where it is used, and takes long
OTHERS = (
    *("torch._dynamo", "torch.distributed", "scipy.optimize"),
    *("tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer"),
)
PACKAGES = (pretrain, vggfeat)
# what scikit-learn imports where it is there, and starts a thread
THREADED = ("pandas", "pyarrow")


class Request(NamedTuple):
    """words: as after `python`: -m MODULE, -c CODE or a script, and its arguments."""

    words: list[str]
    environment: dict[str, str]
    folder: str
    session: bool
    limits: dict[int, int]


class Process:
    """One of them, with what subprocess.Popen has of use here."""

    def __init__(self, line: socket.socket, args: list[str]) -> None:
        self._line, self.args = line, args
        self.returncode: int | None = None
        self.pid = self._number()

    def _number(self) -> int:
        said = self._line.recv(64)
        if not said:
            raise RuntimeError("the process that forks has ended")
        return int(said)

    def poll(self) -> int | None:
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # until then nobody else has its number
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._line.settimeout(timeout)
            with contextlib.suppress(TimeoutError, BlockingIOError):
                self.returncode = self._number()
                self._line.close()
        return self.returncode


_server: list[socket.socket] = []


def _connected() -> socket.socket:
    if not _server:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.prepared", str(theirs.fileno())],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a Ctrl-C is for the tests
        )
        theirs.close()
        _server.append(ours)
        atexit.register(process.wait)
        atexit.register(ours.close)  # which comes first
    return _server[0]


def start(
    words: Sequence[object],
    environment: dict[str, str],
    stdout: int | IO[Any] = subprocess.DEVNULL,
    stderr: int | IO[Any] = subprocess.DEVNULL,
    session: bool = False,
    limits: dict[int, int] | None = None,
) -> Process:
    """A process of Python. words: as in Request. session: in one of its own, whose group it leads.
    limits: of resources, both soft and hard.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    args = [str(word) for word in words]
    request = Request(args, environment, os.getcwd(), session, limits or {})
    with theirs, TemporaryFile() as long, open(os.devnull, "w") as nothing:
        long.write(pickle.dumps(request))
        long.flush()
        outputs = [nothing if each == subprocess.DEVNULL else each for each in (stdout, stderr)]
        files = [each if isinstance(each, int) else each.fileno() for each in outputs]
        socket.send_fds(_connected(), [b"one"], [long.fileno(), theirs.fileno(), *files])
    return Process(ours, args)


def run(
    words: Sequence[object],
    environment: dict[str, str],
    processes: int = 1,
    limits: dict[int, int] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run processes of one job to their end, as subprocess.run(…, capture_output=True, text=True)
    does one.

    The status is the first one's that isn't 0; the others of the job are then ended, as torchrun
    does.
    """
    until = None if timeout is None else time.monotonic() + timeout
    with ExitStack() as stack:
        job = stack.enter_context(job_of(processes)) if processes > 1 else [{}]
        # pipes, not files, which a limit of bytes a file would keep from growing
        out, err = (stack.enter_context(_Pipe()) for _ in range(2))
        started = [
            start(words, environment | place, out.end, err.end, limits=limits) for place in job
        ]
        out.hear()
        err.hear()
        status, left = 0, list(started)
        while left:
            for process in [each for each in left if each.poll() is not None]:
                left.remove(process)
                if process.returncode and not status:
                    status = process.returncode
                    for other in left:
                        other.send_signal(signal.SIGTERM)
            if until is not None and time.monotonic() > until:
                for process in left:
                    process.kill()
                raise subprocess.TimeoutExpired(started[0].args, timeout or 0.0)
            time.sleep(0.005 if left else 0)
        said = [out.said(), err.said()]
    return subprocess.CompletedProcess(started[0].args, status, *said)


class _Pipe:
    """What processes say, read in a thread."""

    def __init__(self) -> None:
        self._reading, self.end = os.pipe()
        self._open, self._text = True, ""
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            os.close(self.end)

    def hear(self) -> None:
        """All who write have its end."""
        os.close(self.end)
        self._open = False
        self._thread.start()

    def said(self) -> str:
        """All, once nobody can write any more."""
        self._thread.join()
        return self._text

    def _read(self) -> None:
        with open(self._reading, errors="backslashreplace") as file:
            self._text = file.read()


@contextmanager
def job_of(processes: int) -> Iterator[list[dict[str, str]]]:
    """What torchrun puts into the environment of each process of a job; they meet here."""
    from torch.distributed import TCPStore

    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=10)
    )
    same = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    yield [{**same, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
    del store


# --- the process that forks, and what it forks ----------------------------------------------------


def _serve(line: socket.socket) -> Request:
    """Fork for each request; returns in the process that is to be one, and in no other."""
    watching: list[int] = []
    while True:
        said, files, *_ = socket.recv_fds(line, 16, 4)
        if not said:  # the tests have ended
            os.killpg(0, signal.SIGKILL)
        watching = [pid for pid in watching if os.waitpid(pid, os.WNOHANG)[0] == 0]
        watcher = os.fork()
        if watcher == 0:
            line.close()
            request, told, out, err = files
            if _watched(told):
                os.close(told)
                os.lseek(request, 0, os.SEEK_SET)
                with open(request, "rb") as file:
                    asked: Request = pickle.load(file)
                for file_number, number in ((out, 1), (err, 2)):
                    os.dup2(file_number, number)
                    os.close(file_number)
                return asked
        watching.append(watcher)
        for number in files:
            os.close(number)


def _watched(told: int) -> bool:
    """Fork the process that is to be; whether this is that. The other tells its number and its
    status, and ends.
    """
    pid = os.fork()
    if pid == 0:
        return True
    os.closerange(0, told)  # what it was handed is the other's
    os.closerange(told + 1, 1024)
    with socket.socket(fileno=told) as line, contextlib.suppress(BrokenPipeError):
        line.send(b"%d" % pid)
        _, status = os.waitpid(pid, 0)
        line.send(b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(request: Request) -> None:
    """Do what Python does that was started with these words."""
    if request.session:
        os.setsid()
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    for what, most in request.limits.items():
        resource.setrlimit(what, (most, most))
    kind, *rest = request.words
    sys.argv[:] = request.words[1:] if kind in ("-m", "-c") else request.words
    if kind == "-m":
        sys.path.insert(0, request.folder)
        sys.modules.pop(rest[0], None)  # it is another module, when it is the main program
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[0] = "-c"
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    import gc
    import importlib

    for name in THREADED:  # as if they weren't there
        sys.modules[name] = None  # type: ignore[assignment]
    for name in OTHERS:
        importlib.import_module(name)
    for package in PACKAGES:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
    for name in THREADED:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # so that a collection doesn't touch what both share
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads is not to be forked"
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
