"""WSGI apps under ASGI: the contestants, the cases, and the smallest ASGI server that tells right from wrong."""

from __future__ import annotations

import asyncio
import functools
import gc
import io
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from anyio.from_thread import BlockingPortal, start_blocking_portal

from . import apps
from .rounds import Limits, WrongAnswer, check_body

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    from .apps import Receive, Send

__all__ = ["CASES", "CONTESTANTS", "LIMIT", "Case", "Exchange", "LoopPlayer", "open_loop", "request_scope"]

Contestant = Callable[["WSGIApplication", str], Any]

# Everybody who can be told gets this many threads; the loop's default executor has them too.
THREADS = 40

MIB = 1024 * 1024


# The contestants. Each is made of the WSGI app and the name of the loop it will run on.


def bridge(app: WSGIApplication, loop: str) -> Any:
    from bridge import WsgiToAsgi

    return WsgiToAsgi(app, threads=THREADS)


def asgiref(app: WSGIApplication, loop: str) -> Any:
    from asgiref.wsgi import WsgiToAsgi

    return WsgiToAsgi(app)  # type: ignore[no-untyped-call]


def a2wsgi(app: WSGIApplication, loop: str) -> Any:
    from a2wsgi import WSGIMiddleware

    return WSGIMiddleware(app, workers=THREADS)  # type: ignore[arg-type, unused-ignore]


def starlette(app: WSGIApplication, loop: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so on import
        from starlette.middleware.wsgi import WSGIMiddleware

    return WSGIMiddleware(app)


def uvicorn(app: WSGIApplication, loop: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as starlette's
        from uvicorn.middleware.wsgi import WSGIMiddleware  # type: ignore[attr-defined]

    return WSGIMiddleware(app, workers=THREADS)  # type: ignore[arg-type, unused-ignore]


def hypercorn(app: WSGIApplication, loop: str) -> Any:
    from hypercorn.middleware import AsyncioWSGIMiddleware, TrioWSGIMiddleware

    # Its limit of 64 KiB a body is a setting of the user's, not a matter of speed.
    middleware = TrioWSGIMiddleware if loop == "trio" else AsyncioWSGIMiddleware
    return middleware(app, max_body_size=1 << 62)  # type: ignore[arg-type, unused-ignore]


class Hop:
    """What one would write by hand: receive all, call the app in a thread, send all. One hop, no streaming, no checks.

    Args:
        hop: Runs a function in another thread.
        translated: False for the barest of all: only the first request's environ is built, the others get a copy.
    """

    def __init__(self, app: WSGIApplication, hop: Callable[..., Awaitable[Any]], *, translated: bool = True) -> None:
        self.app = app
        self.hop = hop
        self.translated = translated
        self.environ: dict[str, Any] = {}

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        message = await receive()
        body = message["body"]
        if message["more_body"]:
            blocks = [body]
            while message["more_body"]:
                message = await receive()
                blocks.append(message["body"])
            body = b"".join(blocks)
        if self.translated or not self.environ:
            self.environ = _translate(scope)
        environ = self.environ.copy()
        environ["wsgi.input"] = io.BytesIO(body)
        status, headers, blocks = await self.hop(_collect, self.app, environ)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for block in blocks[:-1]:
            await send({"type": "http.response.body", "body": block, "more_body": True})
        await send({"type": "http.response.body", "body": blocks[-1] if blocks else b""})


def _translate(scope: dict[str, Any]) -> dict[str, Any]:
    """An environ for well-behaved scopes only."""
    environ = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": scope["root_path"],
        "PATH_INFO": scope["path"].encode().decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_NAME": scope["server"][0],
        "SERVER_PORT": str(scope["server"][1]),
        "SERVER_PROTOCOL": "HTTP/" + scope["http_version"],
        "REMOTE_ADDR": scope["client"][0],
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope["scheme"],
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in scope["headers"]:
        key = name.decode("latin-1").upper().replace("-", "_")
        environ[key if key in ("CONTENT_LENGTH", "CONTENT_TYPE") else "HTTP_" + key] = value.decode("latin-1")
    return environ


def _collect(app: WSGIApplication, environ: dict[str, Any]) -> tuple[int, list[tuple[bytes, bytes]], list[bytes]]:
    started: list[Any] = []
    blocks: list[bytes] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        started[:] = status, headers
        return blocks.append

    result = app(environ, start_response)
    try:
        blocks.extend(result)
    finally:
        if hasattr(result, "close"):
            result.close()
    status, headers = started
    pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return int(status[:3]), pairs, blocks


async def _hop_in_executor(function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def _hop_in_trio(function: Callable[..., Any], *args: Any) -> Any:
    import trio

    return await trio.to_thread.run_sync(function, *args)


def hop(app: WSGIApplication, loop: str) -> Any:
    return Hop(app, _hop_in_trio if loop == "trio" else _hop_in_executor)


def bare_hop(app: WSGIApplication, loop: str) -> Any:
    return Hop(app, _hop_in_trio if loop == "trio" else _hop_in_executor, translated=False)


def anyio_hop(app: WSGIApplication, loop: str) -> Any:
    return Hop(app, anyio.to_thread.run_sync)


CONTESTANTS: dict[str, Contestant] = {
    "bridge": bridge,
    "bare hop": bare_hop,
    "hop": hop,
    "anyio hop": anyio_hop,
    "asgiref": asgiref,
    "a2wsgi": a2wsgi,
    "starlette": starlette,
    "uvicorn": uvicorn,
    "hypercorn": hypercorn,
}

LIMIT = "bare hop"


# The cases


@dataclass(frozen=True)
class Case:
    """One app, one kind of request, how many of them a round."""

    name: str
    app: WSGIApplication
    answer: bytes
    requests: int
    at_once: int = 1
    body: Sequence[bytes] = (b"",)  # the http.request messages
    loops: tuple[str, ...] = ("asyncio",)
    rounds: int | None = None  # fewer than asked for, where a round is long

    def players(self, loop: str, limits: Limits, chosen: Iterable[str]) -> Mapping[str, Callable[[], LoopPlayer]]:
        return {name: functools.partial(LoopPlayer, self, CONTESTANTS[name], loop, limits) for name in chosen}


KIB = bytes(range(256)) * 4
MESSAGE = bytes(65_536)

CASES = [
    Case("hello", apps.hello, apps.HELLO, requests=400, loops=("asyncio", "uvloop", "trio")),
    Case("hello_64_at_once", apps.hello, apps.HELLO, requests=640, at_once=64),
    Case("generator", apps.hello_generator, apps.HELLO, requests=400),
    Case("echo", apps.echo, KIB, requests=400, body=[KIB]),
    Case("upload", apps.upload, str(64 * MIB).encode(), requests=2, body=[MESSAGE] * 1024),
    Case("stream", apps.stream, apps.BLOCK * apps.BLOCKS, requests=20),
    Case("growth_1", apps.sleep, apps.HELLO, requests=20, at_once=1, rounds=3),
    Case("growth_10", apps.sleep, apps.HELLO, requests=200, at_once=10, rounds=3),
    Case("growth_100", apps.sleep, apps.HELLO, requests=400, at_once=100, rounds=3),
    Case("growth_1000", apps.sleep, apps.HELLO, requests=1000, at_once=1000, rounds=3),
    Case("growth_5000", apps.sleep, apps.HELLO, requests=5000, at_once=5000, rounds=3),
]


# The smallest ASGI server


_HEADERS = [
    (b"host", b"localhost:8000"),
    (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
    (b"accept", b"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
    (b"accept-language", b"en-US,en;q=0.5"),
    (b"accept-encoding", b"gzip, deflate, br"),
    (b"cookie", b"session=0123456789abcdef"),
    (b"connection", b"keep-alive"),
]


def request_scope(size: int) -> dict[str, Any]:
    """The scope of a request with a body of `size` bytes, as uvicorn gives it."""
    body_headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(size).encode())]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50_000),
        "scheme": "http",
        "method": "POST" if size else "GET",
        "root_path": "",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": _HEADERS + body_headers if size else _HEADERS,
        "state": {},
    }


class Exchange:
    """One request's receive() and send(). Like a server's while the client keeps up, neither waits for anything."""

    __slots__ = ("body", "messages", "over", "received")

    def __init__(self, body: Sequence[bytes]) -> None:
        self.body = body
        self.received = 0  # messages given
        self.messages: list[dict[str, Any]] = []  # what the app sent
        self.over: anyio.Event | None = None  # made only for an app that waits for http.disconnect

    async def receive(self) -> dict[str, Any]:
        given = self.received
        if given < len(self.body):
            self.received = given + 1
            return {"type": "http.request", "body": self.body[given], "more_body": given + 1 < len(self.body)}
        if not self.complete:
            self.over = self.over or anyio.Event()
            await self.over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        if self.over is not None and self.complete:
            self.over.set()

    @property
    def complete(self) -> bool:
        if not self.messages:
            return False
        last = self.messages[-1]
        return last["type"] == "http.response.body" and not last.get("more_body", False)

    def check(self, answer: bytes) -> None:
        """Raises WrongAnswer unless one whole response was sent, with status 200 and this body."""
        start, *bodies = self.messages or [{"type": "nothing"}]
        if start["type"] != "http.response.start" or any(body["type"] != "http.response.body" for body in bodies):
            raise WrongAnswer(f"sent {[message['type'] for message in self.messages[:4]]}")
        if start["status"] != 200:
            raise WrongAnswer(f"status {start['status']}")
        check_body(b"".join(body.get("body", b"") for body in bodies), answer)
        if not self.complete:
            raise WrongAnswer("the response does not end")


def open_loop(loop: str) -> AbstractContextManager[BlockingPortal]:
    """A loop of this kind, running in a daemon thread."""
    if loop == "trio":
        return start_blocking_portal("trio")
    return start_blocking_portal("asyncio", {"use_uvloop": loop == "uvloop"})


async def _set_executor(loop: str) -> None:
    if loop != "trio":
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))


class LoopPlayer:
    """One contestant with a loop of its own, which lives as long as the case."""

    def __init__(self, case: Case, contestant: Contestant, loop: str, limits: Limits) -> None:
        self.case = case
        self.loop = loop
        self.limits = limits
        self.scope = request_scope(sum(map(len, case.body)))
        self.body = list(case.body)
        self.app = contestant(case.app, loop)
        self.opened = open_loop(loop)
        self.portal = self.opened.__enter__()
        self.portal.call(_set_executor, loop)

    def play(self) -> float:
        gc.collect()
        task = self.portal.start_task_soon(self._round)
        try:
            return task.result(self.limits.seconds)
        except TimeoutError:
            task.cancel()
            raise TimeoutError(f"no answer within {self.limits.seconds:g} s") from None

    def close(self, *, hangs: bool) -> None:
        if hangs:
            # One that is merely slow comes to its next receive(), waits there, and so its cancellation reaches it.
            self.body.clear()
            return  # its daemon thread ends with the process
        if hasattr(self.app, "close"):
            self.app.close()
        self.opened.__exit__(None, None, None)

    async def _round(self) -> float:
        (await self._request()).check(self.case.answer)
        at_once, times = self.case.at_once, self.case.requests // self.case.at_once
        began = time.perf_counter()
        if at_once == 1:
            for _ in range(times):
                last = await self._request()
        else:
            for _ in range(times):
                last = await self._together(at_once)
        seconds = time.perf_counter() - began
        last.check(self.case.answer)
        return seconds / (at_once * times)

    async def _request(self) -> Exchange:
        exchange = Exchange(self.body)
        await self.app(self.scope.copy(), exchange.receive, exchange.send)
        return exchange

    async def _together(self, number: int) -> Exchange:
        if self.loop != "trio":
            return (await asyncio.gather(*(self._request() for _ in range(number))))[-1]
        import trio

        async with trio.open_nursery() as nursery:
            for _ in range(number - 1):
                nursery.start_soon(self._request)
            return await self._request()
