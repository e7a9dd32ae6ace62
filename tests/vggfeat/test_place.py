"""Places: files whole, once, by names; a store that refuses for a moment is asked again."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from vggfeat import place as places
from vggfeat.errors import CantWrite, VggfeatError
from vggfeat.place import AbsentError, Place, StorageError, is_url, patiently, place_of

numbers = itertools.count()


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return place_of(tmp_path / "set" if request.param == "folder" else f"memory://b{next(numbers)}")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "FIRST_WAIT", 0.0)


def test_the_first_that_is_put_stays(place: Place, tmp_path: Path) -> None:
    assert place.names("data") == {} and place.size("data/1") is None
    with pytest.raises(AbsentError, match=r"there is no .*data/1"):
        place.read("data/1")
    with pytest.raises(AbsentError):
        place.open("data/1")
    assert place.put_new("data/1", b"first") and not place.put_new("data/1", b"second")
    assert place.put_new("data/2", b"a file") and not place.put_new("data/2", b"x")
    assert place.names("data") == {"1": 5, "2": 6} and place.size("data/2") == 6
    assert place.read("data/1") == b"first" and place.read("data/2", 3) == b"a f"
    with place.open("data/1") as file:
        file.seek(-3, 2)
        assert file.read() == b"rst" and file.seek(1) == 1 and file.read(2) == b"ir"


def test_of_many_that_put_one_name_one_wins(tmp_path: Path) -> None:
    place, ready = place_of(tmp_path), threading.Barrier(4)

    def put(number: int) -> bool:
        ready.wait()
        return place.put_new("x", bytes([number]) * 1000)

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(put, range(4)))
    assert sum(won) == 1 and place.read("x") == bytes([won.index(True)]) * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["x"]  # nothing half-made


def test_what_a_folder_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CantWrite, match=r"can't write .*/file/x"):
        place_of(tmp_path / "file").put_new("x", b"")
    with pytest.raises(VggfeatError, match="Is a directory"):
        place_of(tmp_path.parent).read(tmp_path.name)


def test_urls() -> None:
    assert is_url("s3://b/x") and is_url("memory://x") and not is_url("/s3:/x") and not is_url("x")
    with pytest.raises(VggfeatError, match=r"nosuch://b can't be reached here .* pip install"):
        place_of("nosuch://b")


class Moody:
    """A file system that fails in turn."""

    def __init__(self, moods: Iterator[Exception | None]) -> None:
        self.moods, self.real = moods, fsspec.filesystem("memory")

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.real, name)
        if name not in ("ls", "info", "cat_file", "pipe_file"):
            return real

        def moody(*words: Any, **more: Any) -> Any:
            mood = next(self.moods, None)
            if mood is not None:
                raise mood
            return real(*words, **more)

        return moody


@pytest.mark.parametrize("error", [TimeoutError("slow"), OSError("503"), RuntimeError("reset")])
def test_a_store_that_refuses_for_a_moment_is_asked_again(
    error: Exception, no_waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(f"memory://b{next(numbers)}")
    monkeypatch.setattr(place, "_files", Moody(itertools.cycle([error, None, None])))
    assert place.put_new("x", b"abc") and place.read("x") == b"abc" and place.names("") == {"x": 3}
    monkeypatch.setattr(place, "_files", Moody(itertools.repeat(error)))
    with pytest.raises(StorageError, match=r"can't read memory://.*/x: .*, 6 times"):
        place.read("x")
    with pytest.raises(CantWrite, match="6 times"):
        place.put_new("y", b"")


def test_a_body_that_is_cut_short_is_no_file(
    no_waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(f"memory://b{next(numbers)}")
    place.put_new("x", b"abcdef")
    bodies = iter([b"abc", b"", b"abcdef"])
    files = place._files  # type: ignore[attr-defined]
    monkeypatch.setattr(type(files), "cat_file", lambda *_, **__: next(bodies))
    assert place.read("x") == b"abcdef"


def test_what_is_refused_for_good_is_asked_once(no_waiting: None) -> None:
    asked = 0

    class NoCredentialsError(Exception):
        pass

    def ask(error: Exception) -> None:
        nonlocal asked
        asked += 1
        raise error

    for error, kind in (
        (PermissionError("no"), PermissionError),
        (FileNotFoundError("none"), FileNotFoundError),
        (NoCredentialsError("key?"), StorageError),
    ):
        asked = 0
        with pytest.raises(kind):
            patiently("x", partial(ask, error))
        assert asked == 1


class Answers(BaseHTTPRequestHandler):
    """/404 answers with that status, and so on; /cut with half of a body; other names with one."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        name = self.path[1:]
        self.asked.append(f"{self.command} {name}")
        status = int(name) if name.isdecimal() else 200
        if status == 503 and self.asked.count(f"GET {name}") > 2:
            status = 200
        if "Range" in self.headers and name in ("empty", "part"):
            status = 416 if name == "empty" else 206
        body = b"" if name == "empty" else b"abcdef"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:3] if name == "cut" else body)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Answers.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as its:
        thread = threading.Thread(target=its.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{its.server_port}"
        its.shutdown()
        thread.join()


def test_a_web_servers_refusal_is_no_absence(server: str, no_waiting: None) -> None:
    place = place_of(server)
    assert place.read("a.png") == b"abcdef" and place.read("503") == b"abcdef"
    assert Answers.asked == ["GET a.png", *["GET 503"] * 3]  # one request, where none fails
    assert place.read("empty", 9) == b"" and place.read("long", 4) == b"abcd"
    for name in ("404", "410"):
        with pytest.raises(AbsentError):
            place.read(name)
        with pytest.raises(AbsentError):
            place.open(name)
        assert place.size(name) is None
    for name, times in (("403", ""), ("401", ""), ("500", ", 6 times"), ("cut", ", 6 times")):
        with pytest.raises(StorageError, match=f"can't read {server}/{name}: .*{times}$"):
            place.read(name)
    for name in ("403", "500"):
        with pytest.raises(StorageError):
            place.size(name)
    assert place.size("a.png") == 6
    with pytest.raises(VggfeatError, match="6 of 4 bytes"), place.open("a.png") as file:
        file.seek(2)  # this server ignores which part is asked for
        file.read()


def test_a_web_server_that_is_down_is_no_absence(no_waiting: None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = place_of(f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(StorageError, match="6 times"):
            place.read("x")
        with pytest.raises(StorageError, match="6 times"):
            place.size("x")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBUSY])
def test_who_lost_is_told_by_looking(
    number: int, no_waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(f"memory://b{next(numbers)}")
    real = place._files  # type: ignore[attr-defined]

    def taken(path: str, value: bytes, mode: str) -> None:
        """Another has put it meanwhile; s3fs says EINVAL for 412."""
        real.store.setdefault(path, MemoryFile(real, path, b"theirs"))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(type(real), "pipe_file", staticmethod(taken))
    assert not place.put_new("x", b"ours") and place.read("x") == b"theirs"
    monkeypatch.setattr(type(real), "pipe_file", lambda *_, **__: taken("/else", b"", ""))
    with pytest.raises(CantWrite, match=r"can't write memory://.*/y: "):
        place.put_new("y", b"")


def test_an_address_is_asked_for_as_it_stands(server: str) -> None:
    for path in ("a//b.png", "image/", "c?size=1", "d::e/f", "g?u=http://h"):
        Answers.asked.clear()
        assert place_of(f"{server}/{path}").read("") == b"abcdef"
        assert Answers.asked == [f"GET {path}"]


def test_a_web_server_that_does_not_answer_is_not_waited_for(
    server: str, no_waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "WAIT", 0.05)
    monkeypatch.setattr(places, "TRIES", 2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(StorageError, match=", 2 times"):
            place_of(f"http://127.0.0.1:{silent.getsockname()[1]}/x").read("")


def test_a_disk_by_its_url_is_a_folder(tmp_path: Path) -> None:
    place = place_of(f"file://{tmp_path}/set")
    assert place.put_new("x", b"abc") and (tmp_path / "set" / "x").read_bytes() == b"abc"
    assert not place.put_new("x", b"def")
    (tmp_path / "set" / "y").symlink_to("/nowhere")
    with pytest.raises(CantWrite, match=r"can't write .*/set/y: Too many levels of symbolic links"):
        place.put_new("y", b"abc")


def test_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    place = place_of(tmp_path)
    assert place.put_new("data/x", b"abc") and not place.put_new("data/x", b"def")
    assert place.read("data/x") == b"abc" and place.names("") == {}
