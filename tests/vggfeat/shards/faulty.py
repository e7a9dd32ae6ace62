"""A store that fails as stores do: `faulty://`, around fsspec's `memory://`."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Faults:
    """Which requests fail. every: so many-th of each file's requests works, others fail in turn by
    503, by a timeout, by a body cut short. late: a listing lacks what was put since the last one.
    """

    def __init__(self) -> None:
        self.every, self.late = 1, False
        self.asked: Counter[str] = Counter()
        self.failed = 0
        self.known: dict[str, set[str]] = {}

    def request(self, path: str) -> str:
        """How the next request for a file ends: "", "503", "timeout" or "cut"."""
        self.asked[path] += 1
        turn = self.asked[path] % self.every
        if not turn:
            return ""
        self.failed += 1
        return ("503", "timeout", "cut")[turn % 3]


FAULTS = Faults()


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://"))
        return stripped

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **k: Any
    ) -> Any:
        how = FAULTS.request(path)
        if how == "503":
            raise OSError("503 Slow Down")
        if how == "timeout":
            raise TimeoutError("read timed out")
        data = super().cat_file(path, start=start, end=end, **k)
        return data[: len(data) // 2] if how == "cut" else data

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **k: Any) -> None:
        if FAULTS.request(path) in ("503", "timeout"):
            raise OSError("503 Slow Down")
        super().pipe_file(path, value, mode=mode, **k)

    def ls(self, path: str, detail: bool = True, **k: Any) -> Any:
        found = super().ls(path, detail=detail, **k)
        if not FAULTS.late or "/photos" in path:  # what is there for long is listed
            return found
        names = {each["name"] if detail else each for each in found}
        known = FAULTS.known.setdefault(path, set())
        seen = [each for each in found if (each["name"] if detail else each) in known]
        known |= names
        return seen


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
