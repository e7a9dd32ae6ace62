"""The kinds of failure that a user can meet: a request that can't be done, an image or a disk that
refuses.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class VggfeatError(Exception):
    """A request that can't be done. The message is one line: what is wrong, with which input, what
    to do.

    The command line prints it and exits with `status`; `--debug` shows the traceback as well.
    """

    status = 1

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # names from files may hold line ends


class WrongUsage(VggfeatError):  # noqa: N818 - named as what happened
    """What was asked for can't be, whatever lies on the disk: a word that is none of those that
    there are, a number out of its range, arguments that contradict each other or miss one.
    """

    status = 2


@contextmanager
def as_typed(typed: bool = True) -> Iterator[None]:
    """Inside, a request that can't be done is WrongUsage, if all that decides it was `typed`."""
    try:
        yield
    except VggfeatError as error:
        if not typed or type(error) is not VggfeatError:  # a disk that refuses is no word
            raise
        raise WrongUsage(str(error)) from error


class NoData(VggfeatError):  # noqa: N818 - named as what happened
    """There is nothing of a data set where it was looked for; what is there and wrong is another
    error.
    """


class CantWrite(VggfeatError, OSError):  # noqa: N818 - named as what happened
    """A path that refuses to be written, or the disk under it; the message is the whole line."""


class UnreadableImage(VggfeatError):  # noqa: N818 - the paper trail's word: a row is unreadable
    """One image can't be read; the message is the reason. Extraction marks its row and goes on."""


class UnreachableImage(UnreadableImage):
    """The system doesn't give an image's file: it isn't there, or not now, as on a share that is
    away.
    """


class Interrupted(VggfeatError):  # noqa: N818 - named as what happened
    """Ctrl-C, or a signal to end; what was done until then is kept. The command exits with 128 +
    signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
        self.status = 128 + signal


def reason(error: BaseException) -> str:
    """Why a file can't be read or written, in a few words; libraries' own texts have many lines."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else " ".join(str(error).split())


def not_read(where: str, kind: str, error: Exception) -> VggfeatError:
    """What to raise where a library fails on a file: the system can't read it, as where a share
    has gone; or it is of another kind, or damaged.
    """
    if isinstance(error, OSError) and error.errno:
        return VggfeatError(f"can't read {where}: {reason(error)}")
    told = " ".join(str(error).split())[:160]
    return VggfeatError(f"{where} is damaged, or no {kind} file ({told})")
