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
