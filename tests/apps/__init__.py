"""The apps under test: one small site, written once with each framework, and bare without any.

Here is what they share: the board, what they do alike, their lifespan. wsgi.py and asgi.py have a function for each
framework that makes the site, and a bare one; Django is both, and has django.py.

Every site has the same paths, so that one test fits them all:

    /hello                   text; HEAD as well
    /echo/<anything>         the request as the app got it: path, raw path, query string, headers; sets two cookies
    /empty                   204
    /unchanged               304
    /error                   an exception
    /broken                  an exception after the first 5 of 1000 promised bytes
    /form, /json             POST: what came, as JSON
    /multipart               POST: the file's name, size and SHA-256
    /upload/<key>            POST: size and SHA-256 of the body, read in pieces
    /refuse                  POST: 413, the body not read
    /download                DOWNLOAD_SIZE bytes
    /events/<key>            two server-sent events: the second one is made once "<key>-confirmed" is on the board
    /ticks/<key>             a stream without end
    /slow/<key>              takes SLOW seconds; "<key>-begun" is put on the board first. One of many, for which the
                             key is <group>-<number>-of-<many>, takes until all of them have begun, see `pauses`
    /document                a file of the disk, by whatever the framework has for files
    /board/<name>            GET: what is on the board by that name, or 404; POST: puts it there

A bare app has only what a server without a framework can be asked for, but all that a server may offer:

    /hints                   an early hint before the response
    /trailers                a trailer behind it
    /gone/<key>              no response before the client has left: "<key>-gone" is put on the board then
    /like/<that>             a response, or an error, like one of a framework's: what `Like` tells

Frameworks are imported by those apps that use them. There is no `from __future__ import annotations` in asgi.py:
FastAPI and Litestar read the annotations of functions that are made within a function.
"""

import hashlib
import os
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import anyio
import anyio.to_thread

__all__ = [
    "BLOCK",
    "COOKIES",
    "DOCUMENT",
    "DOWNLOAD_SIZE",
    "ETAG",
    "EVENTS",
    "HINT",
    "SLOW",
    "TRAILER",
    "Board",
    "Like",
    "OnPurpose",
    "below",
    "lifespan",
    "noting_asgi",
    "noting_wsgi",
]

BLOCK = bytes(range(256)) * 256
DOWNLOAD_SIZE = 320 * len(BLOCK)  # 20 MiB
SLOW = 0.5
LIMIT = 10.0  # seconds that an app waits for a client's word
GATHERING = 5.0  # and that a slow request waits for the others: on a busy machine, too, they are there by then


class OnPurpose(Exception):
    """What the apps raise when they are asked to."""


class Board:
    """Where an app and its test leave word for each other, whichever process or thread they are in: small files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def put(self, name: str, text: str = "") -> None:
        unfinished = self.directory / f"{name}.{os.getpid()}.{threading.get_ident()}.unfinished"
        unfinished.write_text(text)
        unfinished.rename(self.directory / name)

    def get(self, name: str) -> str | None:
        try:
            return (self.directory / name).read_text()
        except FileNotFoundError:
            return None

    def names(self, prefix: str) -> list[str]:
        return sorted(path.name for path in self.directory.glob(f"{prefix}*"))

    def wait(self, name: str) -> None:
        for _ in self._patience(name):
            time.sleep(0.005)

    async def wait_async(self, name: str) -> None:
        for _ in self._patience(name):
            await anyio.sleep(0.005)

    def _patience(self, name: str) -> Iterator[None]:
        deadline = time.monotonic() + LIMIT
        while self.get(name) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} was not put on the board within {LIMIT:g} s")
            yield


board = Board(Path(os.environ.get("BOARD", "")))


# What all sites do alike


def environ_seen(environ: dict[str, Any]) -> dict[str, Any]:
    path_info = environ["SCRIPT_NAME"] + environ.get("tests.path_info", environ["PATH_INFO"])
    path = path_info.encode("latin-1")
    target = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""  # not every WSGI server tells
    state = environ.get("asgi.scope", {}).get("state") or {}
    return {
        "path": path.decode("utf-8", "replace"),
        "path_info": path_info,
        "root_path": environ["SCRIPT_NAME"],
        "raw_path": target.partition("?")[0] or quote_from_bytes(path, "/:@!$&'()*+,;=~"),
        "query": environ["QUERY_STRING"],
        "headers": [[key[5:].replace("_", "-").lower(), environ[key]] for key in environ if key.startswith("HTTP_")],
        "pid": os.getpid(),
        "started_in": state.get("started_in"),
        "scheme": environ["wsgi.url_scheme"],
        "protocol": environ["SERVER_PROTOCOL"].partition("/")[2],
        "server": [environ["SERVER_NAME"], environ["SERVER_PORT"]],
    }


def scope_seen(scope: dict[str, Any]) -> dict[str, Any]:
    return {
        "path": scope["path"],
        "root_path": scope.get("root_path", ""),
        "raw_path": scope["raw_path"].decode("latin-1"),
        "query": scope["query_string"].decode("latin-1"),
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
        "pid": os.getpid(),
        "started_in": (scope.get("state") or {}).get("started_in"),
        "scheme": scope["scheme"],
        "protocol": scope["http_version"],
        "server": scope.get("server"),
    }


COOKIES = ["a=1; Path=/", "b=2; Path=/"]
ETAG = '"of the tests"'
HINT = "</style.css>; rel=preload"
TRAILER = ("x-checksum", "of the tests")
DOCUMENT = b"document\r\n" + 4 * BLOCK
EVENTS = [b"data: first\n\n", b"data: second\n\n"]


def download() -> Iterator[bytes]:
    for _ in range(DOWNLOAD_SIZE // len(BLOCK)):
        yield BLOCK


def document() -> Path:
    """The file on the disk."""
    path = board.directory / "document.bin"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        unfinished.write_bytes(DOCUMENT)
        unfinished.rename(path)
    return path


def pauses(key: str) -> Iterator[float]:
    """What a slow request waits for. If not all of the group are there in time, "alone-<group>" is put on the board."""
    if "-of-" not in key:
        yield SLOW
        return
    group, _, _, many = key.split("-")
    deadline = time.monotonic() + GATHERING
    while sum(name.endswith("-begun") for name in board.names(f"{group}-")) < int(many):
        if time.monotonic() > deadline or board.get(f"alone-{group}") is not None:
            board.put(f"alone-{group}")
            return
        yield 0.03


def slow(key: str) -> bytes:
    board.put(f"{key}-begun")
    for seconds in pauses(key):
        time.sleep(seconds)
    return b"slow"


async def slow_async(key: str) -> bytes:
    board.put(f"{key}-begun")
    for seconds in pauses(key):
        await anyio.sleep(seconds)
    return b"slow"


def broken() -> Iterator[bytes]:
    yield b"begun"
    raise OnPurpose("in the middle of a response")


def events(key: str) -> Iterator[bytes]:
    yield EVENTS[0]
    board.wait(f"{key}-confirmed")
    yield EVENTS[1]


def ticks(key: str) -> Iterator[bytes]:
    try:
        while True:
            yield b"data: tick\n\n"
            time.sleep(0.02)
    finally:
        board.put(f"{key}-closed")


async def download_async() -> AsyncIterator[bytes]:
    for block in download():
        yield block


async def broken_async() -> AsyncIterator[bytes]:
    for block in broken():
        yield block


async def events_async(key: str) -> AsyncIterator[bytes]:
    yield EVENTS[0]
    await board.wait_async(f"{key}-confirmed")
    yield EVENTS[1]


async def ticks_async(key: str) -> AsyncIterator[bytes]:
    try:
        while True:
            yield b"data: tick\n\n"
            await anyio.sleep(0.02)
    finally:
        board.put(f"{key}-closed")


class Upload:
    """A body as it comes in; the board tells when it begins, and how it fails."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._size = 0
        self._hash = hashlib.sha256()

    def read(self, read: Callable[[int], bytes]) -> dict[str, Any]:
        try:
            while chunk := read(65536):
                self._take(chunk)
        except BaseException as error:
            self._fail(error)
            raise
        return self._result()

    async def read_async(self, chunks: AsyncIterable[bytes]) -> dict[str, Any]:
        try:
            async for chunk in chunks:
                self._take(chunk)
        except BaseException as error:
            self._fail(error)
            raise
        return self._result()

    def _take(self, chunk: bytes) -> None:
        if chunk and not self._size:
            board.put(f"{self._key}-begun")
        self._size += len(chunk)
        self._hash.update(chunk)

    def _fail(self, error: BaseException) -> None:
        board.put(f"{self._key}-failed", f"{type(error).__name__}: {error}")

    def _result(self) -> dict[str, Any]:
        board.put(f"{self._key}-whole")
        return {"size": self._size, "sha256": self._hash.hexdigest()}


def file_seen(name: str | None, content: bytes) -> dict[str, Any]:
    return {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True)
class Like:
    """What a bare app is to do as a framework has done it, for what the server then makes of the connection.

    Attributes:
        is_sized: Whether there is a Content-Length.
        raises: Whether an error comes through to the server: "before" the response, "behind" it, or "never".
    """

    status: int
    is_sized: bool
    raises: str

    @classmethod
    def told_by(cls, path: str) -> "Like":
        status, is_sized, raises = path.split("/")
        return cls(int(status), is_sized == "True", raises)

    @property
    def path(self) -> str:
        return f"{self.status}/{self.is_sized}/{self.raises}"

    @property
    def body(self) -> bytes:
        return b"" if self.status in (204, 304) else b"like it"


@asynccontextmanager
async def lifespan(_: object = None) -> AsyncIterator[dict[str, Any]]:
    """Tells on the board in which process it ran, and how often; its end needs the loop and a thread."""
    count = len(board.names(f"startup-{os.getpid()}-"))
    board.put(f"startup-{os.getpid()}-{count}")
    yield {"started_in": os.getpid()}
    await anyio.to_thread.run_sync(time.sleep, 0)
    board.put(f"shutdown-{os.getpid()}-{count}")


def noting_path_info(app: Any) -> Any:
    """For frameworks that put a text of their own there."""

    def noting(environ: dict[str, Any], start_response: Any) -> Any:
        return app({**environ, "tests.path_info": environ["PATH_INFO"]}, start_response)

    return noting


def below(prefix: str, app: Any, is_asgi: bool) -> Any:
    """An app below a prefix, by what users of a server take that has nothing for it."""
    if is_asgi:
        from starlette.applications import Starlette
        from starlette.routing import Mount

        return Starlette(routes=[Mount(prefix, app)])
    from werkzeug.exceptions import NotFound
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    return DispatcherMiddleware(NotFound(), {prefix: app})


def noting_wsgi(app: Any) -> Any:
    """Puts on the board when /error's error comes through as "raised", see `Like`."""

    def noting(environ: dict[str, Any], start_response: Any) -> Any:
        raised = "before"
        try:
            response = app(environ, start_response)
            raised = "never"
        finally:
            if environ["PATH_INFO"] == "/error":
                board.put("raised", raised)
        return response

    return noting


def noting_asgi(app: Any) -> Any:
    """As `noting_wsgi` does; and puts "asked" on the board if /refuse asks for the body before it answers."""

    async def noting(scope: dict[str, Any], receive: Any, send: Any) -> None:
        answered = False

        async def receive_and_note() -> Any:
            if not answered and scope["path"] == "/refuse":
                board.put("asked")
            return await receive()

        async def send_and_note(message: Any) -> None:
            nonlocal answered
            answered = True
            await send(message)

        if scope.get("path") not in ("/refuse", "/error"):
            await app(scope, receive, send)
            return
        raised = "never"
        try:
            await app(scope, receive_and_note, send_and_note)
        except OnPurpose:
            raised = "behind" if answered else "before"
            raise
        finally:
            if scope["path"] == "/error":
                board.put("raised", raised)

    return noting
