"""ASGI apps under WSGI: the contestants, the cases, and the smallest WSGI server that tells right from wrong."""

from __future__ import annotations

import asyncio
import functools
import gc
import io
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from . import apps
from .rounds import Limits, WrongAnswer, check_body

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication

__all__ = ["CASES", "CONTESTANTS", "LIMIT", "Case", "ThreadPlayer", "call", "request_environ"]

ASGIApp = Callable[[dict[str, Any], apps.Receive, apps.Send], Coroutine[Any, Any, None]]

Contestant = Callable[[ASGIApp, str], Any]

MIB = 1024 * 1024

STATUS = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


# The contestants. Each is made of the ASGI app and the name of the kind of loop it shall use.


def _new_loop(loop: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if loop == "asyncio":
        return asyncio.new_event_loop
    if loop != "uvloop":
        raise ValueError(f"expected 'asyncio' or 'uvloop', got {loop!r}")
    import uvloop

    return uvloop.new_event_loop


def _loop_in_a_thread(loop: str) -> asyncio.AbstractEventLoop:
    running = _new_loop(loop)()
    threading.Thread(target=running.run_forever, daemon=True).start()
    return running


def bridge_shared(app: Any, loop: str) -> Any:
    from bridge import AsgiToWsgi

    return AsgiToWsgi(app, loop="shared", loop_factory=_new_loop(loop))


def bridge_request(app: Any, loop: str) -> Any:
    from bridge import AsgiToWsgi

    return AsgiToWsgi(app, loop="request", loop_factory=_new_loop(loop))


def a2wsgi(app: ASGIApp, loop: str) -> Any:
    from a2wsgi import ASGIMiddleware

    return ASGIMiddleware(app, loop=_loop_in_a_thread(loop))  # type: ignore[arg-type, unused-ignore]


class Collected:
    """One request of the contestants written by hand: receive() reads, send() collects; no streaming, no checks."""

    __slots__ = ("blocks", "left", "more_body", "read", "start")

    def __init__(self, environ: dict[str, Any]) -> None:
        self.read = environ["wsgi.input"].read
        self.left = int(environ.get("CONTENT_LENGTH") or 0)
        self.more_body = True
        self.start: dict[str, Any] = {}
        self.blocks: list[bytes] = []

    async def receive(self) -> dict[str, Any]:
        if not self.more_body:
            return {"type": "http.disconnect"}
        body = self.read(min(self.left, apps.READ)) if self.left else b""
        self.left -= len(body)
        self.more_body = self.left > 0
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            self.blocks.append(message.get("body", b""))
        else:
            self.start = message

    def answer(self, start_response: StartResponse) -> list[bytes]:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.start.get("headers", ())]
        start_response(STATUS[self.start["status"]], headers)
        return self.blocks


def _build_scope(environ: dict[str, Any]) -> dict[str, Any]:
    """A scope for well-behaved environs only, while bridge's translation is not there."""
    headers = [
        (key.removeprefix("HTTP_").lower().replace("_", "-").encode("latin-1"), value.encode("latin-1"))
        for key, value in environ.items()
        if key.startswith("HTTP_") or key in ("CONTENT_TYPE", "CONTENT_LENGTH")
    ]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": environ["SERVER_PROTOCOL"].removeprefix("HTTP/"),
        "method": environ["REQUEST_METHOD"],
        "scheme": environ["wsgi.url_scheme"],
        "path": environ["PATH_INFO"].encode("latin-1").decode(),
        "raw_path": environ["PATH_INFO"].encode("latin-1"),
        "query_string": environ["QUERY_STRING"].encode("latin-1"),
        "root_path": environ["SCRIPT_NAME"],
        "headers": headers,
        "server": (environ["SERVER_NAME"], int(environ["SERVER_PORT"])),
        "client": (environ["REMOTE_ADDR"], int(environ["REMOTE_PORT"])),
    }


def by_hand(app: ASGIApp, loop: str) -> WSGIApplication:
    """The limit: the coroutine is stepped without any loop, so the app must never wait for anything."""
    build_scope = translation()

    def application(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        collected = Collected(environ)
        coroutine = app(build_scope(environ), collected.receive, collected.send)
        try:
            coroutine.send(None)
        except StopIteration:
            return collected.answer(start_response)
        coroutine.close()
        raise RuntimeError("the app waits, and there is no loop")

    return application


def run_each_time(app: ASGIApp, loop: str) -> WSGIApplication:
    build_scope = translation()
    new_loop = _new_loop(loop)

    def application(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        collected = Collected(environ)
        with asyncio.Runner(loop_factory=new_loop) as runner:  # asyncio.run() of any loop
            runner.run(app(build_scope(environ), collected.receive, collected.send))
        return collected.answer(start_response)

    return application


def background_loop(app: ASGIApp, loop: str) -> WSGIApplication:
    build_scope = translation()
    running = _loop_in_a_thread(loop)

    def application(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        collected = Collected(environ)
        coroutine = app(build_scope(environ), collected.receive, collected.send)
        asyncio.run_coroutine_threadsafe(coroutine, running).result()
        return collected.answer(start_response)

    return application


def translation() -> Callable[[dict[str, Any]], Any]:
    """bridge's own environ -> scope, so that a limit differs from bridge in nothing but the loop."""
    try:
        from bridge.scope import build_scope
    except ImportError:
        return _build_scope
    return build_scope


CONTESTANTS: dict[str, Contestant] = {
    "bridge shared": bridge_shared,
    "bridge request": bridge_request,
    "by hand": by_hand,
    "background loop": background_loop,
    "asyncio.run": run_each_time,
    "a2wsgi": a2wsgi,
}

LIMIT = "by hand"


# The cases


@dataclass(frozen=True)
class Case:
    """One app, one kind of request, how many of them a round."""

    name: str
    app: Callable[[], ASGIApp]  # makes it
    answer: bytes
    requests: int
    threads: int = 1  # the server's
    body: bytes = b""
    loops: tuple[str, ...] = ("asyncio",)
    rounds: int | None = None

    def players(self, loop: str, limits: Limits, chosen: Iterable[str]) -> Mapping[str, Callable[[], ThreadPlayer]]:
        return {name: functools.partial(ThreadPlayer, self, CONTESTANTS[name], loop, limits) for name in chosen}


KIB = bytes(range(256)) * 4

CASES = [
    Case("hello", lambda: apps.async_hello, apps.HELLO, requests=400, loops=("asyncio", "uvloop")),
    Case("hello_8_threads", lambda: apps.async_hello, apps.HELLO, requests=800, threads=8),
    Case("echo", lambda: apps.async_echo, KIB, requests=400, body=KIB),
    Case("stream", lambda: apps.async_stream, apps.BLOCK * apps.BLOCKS, requests=20),
    Case("upload", lambda: apps.async_upload, str(64 * MIB).encode(), requests=2, body=bytes(64 * MIB)),
    Case("fastapi", apps.fastapi_hello, b'{"hello":"world"}', requests=200),
]


# The smallest WSGI server


def request_environ(body: bytes) -> dict[str, Any]:
    """The environ of a request, as gunicorn gives it, but for wsgi.input."""
    environ = {
        "REQUEST_METHOD": "POST" if body else "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/",
        "QUERY_STRING": "",
        "RAW_URI": "/",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_SOFTWARE": "benchmarks",
        "REMOTE_ADDR": "127.0.0.1",
        "REMOTE_PORT": "50000",
        "HTTP_HOST": "localhost:8000",
        "HTTP_USER_AGENT": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
        "HTTP_ACCEPT": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
        "HTTP_ACCEPT_LANGUAGE": "en-US,en;q=0.5",
        "HTTP_ACCEPT_ENCODING": "gzip, deflate, br",
        "HTTP_COOKIE": "session=0123456789abcdef",
        "HTTP_CONNECTION": "keep-alive",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
    }
    if body:
        environ |= {"CONTENT_TYPE": "application/octet-stream", "CONTENT_LENGTH": str(len(body))}
    return environ


def call(app: WSGIApplication, environ: dict[str, Any]) -> tuple[str, list[bytes]]:
    """Calls the app as a server would and returns its status and the blocks."""
    statuses: list[str] = []
    blocks: list[bytes] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        statuses.append(status)
        return blocks.append

    result = app(environ, start_response)
    try:
        blocks.extend(result)
    finally:
        if hasattr(result, "close"):
            result.close()
    return statuses[-1] if statuses else "no status", blocks


def check(status: str, blocks: list[bytes], answer: bytes) -> None:
    """Raises WrongAnswer unless the status is 200 and the body this one."""
    if not status.startswith("200 "):
        raise WrongAnswer(f"status {status}")
    check_body(b"".join(blocks), answer)


class ThreadPlayer:
    """One contestant with server threads of its own, which live as long as the case."""

    def __init__(self, case: Case, contestant: Contestant, loop: str, limits: Limits) -> None:
        self.case = case
        self.limits = limits
        self.environ = request_environ(case.body)
        self.app: Any = contestant(case.app(), loop)
        self.threads = ThreadPoolExecutor(case.threads)
        self.ready = threading.Barrier(case.threads)

    def play(self) -> float:
        gc.collect()
        each = self.case.requests // self.case.threads
        turns = [self.threads.submit(self._turn, each) for _ in range(self.case.threads)]
        _, late = wait(turns, self.limits.seconds)
        if late:
            raise TimeoutError(f"no answer within {self.limits.seconds:g} s")
        for error in filter(None, (turn.exception() for turn in turns)):
            if not isinstance(
                error, threading.BrokenBarrierError
            ):  # those are the others, let go by the one that failed
                raise error
        times = [turn.result() for turn in turns]
        return (max(end for _, end in times) - min(begin for begin, _ in times)) / (each * self.case.threads)

    def close(self, *, hangs: bool) -> None:
        self.threads.shutdown(wait=not hangs)
        if not hangs and hasattr(self.app, "close"):
            self.app.close()

    def _turn(self, requests: int) -> tuple[float, float]:
        """One thread's part of a round: when it began and ended."""
        try:
            check(*self._request(), self.case.answer)
        except BaseException:
            self.ready.abort()
            raise
        self.ready.wait()
        began = time.perf_counter()
        for _ in range(requests):
            status, blocks = self._request()
        ended = time.perf_counter()
        check(status, blocks, self.case.answer)
        return began, ended

    def _request(self) -> tuple[str, list[bytes]]:
        environ = self.environ.copy()
        environ["wsgi.input"] = io.BytesIO(self.case.body)
        return call(self.app, environ)
