"""How every command's process begins: `vggfeat`, `python -m vggfeat`, and `python -m pretrain.X`.

It imports next to nothing, so that Ctrl-C finds this in place while PyTorch is being imported.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from functools import partial
from types import FrameType, TracebackType


def begin(program: str = "vggfeat") -> None:
    """Until `terminal.run` takes over, and after it, Ctrl-C and SIGTERM end the process without a
    traceback.

    Descriptors 0 to 2 that are closed are opened on nothing: else the next file would get such a
    number, and what a library says on stderr would be written into a result. A working folder that
    is gone is told: PyTorch's libraries can't be loaded there. What fails while they are imported,
    as for want of memory, is one line, too. And on another system than Linux, whose locks, limits
    and memory files are used throughout, that is said. program: the command, which begins each
    line that is said.
    """
    if sys.platform != "linux":
        sys.exit(
            f"{program}: it runs on Linux only; on {sys.platform}, take a container or a virtual"
            " machine"
        )
    sys.excepthook = partial(_unexpected, program)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # the lowest number that is free
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    try:
        os.getcwd()
    except OSError:
        with suppress(OSError):
            line = f"{program}: the working folder is gone: change to one that is there\n"
            os.write(2, line.encode())
        os._exit(1)
    settle()


def settle() -> None:
    """What PyTorch reads once, when it is imported or first allocates, and what glibc does with
    memory. A user's own settings win, and processes that this one starts inherit it.

    PyTorch asks for large pages: a layer's map of 50 MB is faulted in by 25 of them instead of by
    12,000 small ones; and glibc gives a freed map to the next layer instead of back to the system:
    a third of a forward pass on a CPU. OpenMP's threads sleep between two layers instead of
    spinning: where others use the processors, too, they would take them from whoever has work, the
    threads that decode among them. And there are no more of them than `machine.CORES`, of which
    OpenMP itself counts those of the affinity mask.
    """
    import ctypes  # not until Ctrl-C ends the process without a traceback

    from vggfeat.machine import CORES

    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if len(os.sched_getaffinity(0)) > CORES:
        os.environ.setdefault("OMP_NUM_THREADS", str(CORES))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library than glibc
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _unexpected(
    program: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    line = (
        f"{program}: unexpected {kind.__name__}: {' '.join(str(error).split())} (--debug shows"
        " where)\n"
    )
    with suppress(OSError):
        os.write(2, line.encode(errors="backslashreplace"))


def _leave(number: int, _frame: FrameType | None, leave: object = os._exit) -> None:
    """leave: as the interpreter's own end takes a module's names away."""
    leave(128 + number)  # type: ignore[operator]
