"""`python -m benchmarks.conformance`: which promises bridge and its peers keep, each seen by a small public check.

A check drives one contestant in memory, by the specification, and fails with a reason. Each runs in a process of its
own with a time limit, so that none can hang or spoil another. Of the peers only a2wsgi does both directions.

    python -m benchmarks.conformance                    the tables, and the reasons of those that fail
    python -m benchmarks.conformance --only streams     the checks with that word in their name
    python -m benchmarks.conformance --write            puts the tables into README.md, between the markers
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import importlib.metadata
import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["CHECKS", "CONTESTANTS", "MARKERS", "Broken", "Check", "main", "tables"]

LIMIT = 20.0
"""Seconds that the process of one check may take; the checks themselves wait for at most half of that."""

PATIENCE = 5.0
"""Seconds that a contestant is given for what takes the others milliseconds."""

YES, NO = "✓", "\N{EN DASH}"

README = Path(__file__).parent.parent / "README.md"
MARKERS = ("<!-- conformance: made by python -m benchmarks.conformance --write -->", "<!-- /conformance -->")


class Broken(Exception):
    """Raised by a check for a promise that is not kept."""


# --- The contestants ----------------------------------------------------------------------------------------------


def _bridge(app: Any) -> Any:
    from bridge import WsgiToAsgi

    return WsgiToAsgi(app)


def _asgiref(app: Any) -> Any:
    from asgiref.wsgi import WsgiToAsgi

    return WsgiToAsgi(app)  # type: ignore[no-untyped-call]


def _a2wsgi(app: Any) -> Any:
    from a2wsgi import WSGIMiddleware

    return WSGIMiddleware(app)


def _starlette(app: Any) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from starlette.middleware.wsgi import WSGIMiddleware

        return WSGIMiddleware(app)


def _uvicorn(app: Any) -> Any:
    from uvicorn.middleware.wsgi import WSGIMiddleware  # type: ignore[attr-defined, unused-ignore]

    return WSGIMiddleware(app)


def _hypercorn(app: Any) -> Any:
    from hypercorn.middleware import AsyncioWSGIMiddleware

    return AsyncioWSGIMiddleware(app, 2**30)


def _bridge_back(app: Any) -> Any:
    from bridge import AsgiToWsgi

    return AsgiToWsgi(app)


def _a2wsgi_back(app: Any) -> Any:
    from a2wsgi import ASGIMiddleware

    return ASGIMiddleware(app)


Wrap = Callable[[Any], Any]

CONTESTANTS: dict[str, dict[str, Wrap]] = {
    "WSGI app under ASGI": {
        "bridge": _bridge,
        "asgiref": _asgiref,
        "a2wsgi": _a2wsgi,
        "starlette": _starlette,
        "uvicorn": _uvicorn,
        "hypercorn": _hypercorn,
    },
    "ASGI app under WSGI": {"bridge": _bridge_back, "a2wsgi": _a2wsgi_back},
}
"""By direction. Each is made with just the app; hypercorn's needs a limit for bodies."""

NAMES = list(CONTESTANTS["WSGI app under ASGI"])


# --- A server in memory: ASGI -------------------------------------------------------------------------------------


class AsgiClient:
    """One request to an ASGI app, and what came of it.

    Args:
        pieces: Of the body. An event among them is waited for; at None the client leaves.
    """

    def __init__(self, pieces: Iterable[bytes | threading.Event | None] = (b"",), **scope: Any) -> None:
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST" if pieces != (b"",) else "GET",
            "scheme": "http",
            "path": "/",
            "raw_path": scope.get("path", "/").encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"testserver")],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 80),
        } | scope
        self.pieces = list(pieces)
        self.messages: list[Mapping[str, Any]] = []
        self.left = asyncio.Event()
        self.first_block = asyncio.Event()
        self.take = asyncio.Event()  # unset: the client takes nothing more
        self.take.set()

    async def receive(self) -> Any:
        while self.pieces:
            piece = self.pieces.pop(0)
            if isinstance(piece, threading.Event):
                await until(piece.is_set)
            elif piece is None:
                self.left.set()
            else:
                more = any(not isinstance(other, threading.Event) for other in self.pieces)
                return {"type": "http.request", "body": piece, "more_body": more}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)
        if message.get("body"):
            self.first_block.set()
        await self.take.wait()

    async def run(self, application: Any) -> None:
        await asyncio.wait_for(application(self.scope, self.receive, self.send), PATIENCE)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def ended(self) -> bool:
        return any(m["type"] == "http.response.body" and not m.get("more_body") for m in self.messages)


async def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for what threads or the loop will bring about.

    Raises:
        Broken: They have not.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(f"nothing came within {seconds:g} s")
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(coroutine: Any) -> Any:
    """A task for the time of a block; it is ended with it, whatever it makes of that."""
    task = asyncio.ensure_future(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=1)


def expect(condition: object, reason: str) -> None:
    if not condition:
        raise Broken(reason)


def hello(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


async def environ_of(wrap: Wrap, client: AsgiClient) -> dict[str, Any]:
    """What a WSGI app is told of a request; empty if it is not called."""
    seen: dict[str, Any] = {}

    def app(environ: Any, start_response: Any) -> Any:
        seen.update(environ)
        return hello(environ, start_response)

    with contextlib.suppress(Exception):  # it is refused
        await client.run(wrap(app))
    return seen


# --- The checks: WSGI app under ASGI ------------------------------------------------------------------------------


async def request_streams(wrap: Wrap) -> None:
    """The request's body streams into the app while it arrives"""
    has_read = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        first = environ["wsgi.input"].read(3)
        has_read.set()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [first + environ["wsgi.input"].read(3)]

    client = AsgiClient((b"abc", has_read, b"def"), headers=[(b"content-length", b"6")])
    await client.run(wrap(app))
    expect(client.body == b"abcdef", f"the app read {client.body!r} of b'abcdef'")


async def response_streams(wrap: Wrap) -> None:
    """A block that the app yields is sent before the app goes on"""
    seen = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"first"
        seen.wait(PATIENCE * 2)
        yield b"second"

    client = AsgiClient()
    async with running(client.run(wrap(app))):
        try:
            await until(client.first_block.is_set)
        finally:
            seen.set()


async def client_leaves(wrap: Wrap) -> None:
    """A client that leaves ends the app's stream, and `close()` is called"""
    closed = threading.Event()
    stop = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])
        try:
            while not stop.is_set():
                yield b"tick"
                time.sleep(0.01)
        finally:
            if not stop.is_set():
                closed.set()

    client = AsgiClient()
    async with running(client.run(wrap(app))):
        try:
            await until(client.first_block.is_set)
            client.left.set()
            await until(closed.is_set)
        finally:
            stop.set()


async def close_is_called(wrap: Wrap) -> None:
    """`close()` is called exactly once, after an error too"""
    closes = [0, 0]

    class Body:
        def __init__(self, number: int) -> None:
            self.number = number

        def __iter__(self) -> Iterator[bytes]:
            yield b"block"
            if self.number:
                raise LookupError("on purpose")

        def close(self) -> None:
            closes[self.number] += 1

    for number in range(2):

        def app(environ: Any, start_response: Any, number: int = number) -> Any:
            start_response("200 OK", [("Content-Type", "text/plain")])
            return Body(number)

        with contextlib.suppress(LookupError, ExceptionGroup):
            await AsgiClient().run(wrap(app))
    with contextlib.suppress(Broken):  # it may come later
        await until(lambda: closes == [1, 1], 0.5)
    expect(closes == [1, 1], f"it was called {closes[0]} times after a success, {closes[1]} after an error")


_variable: contextvars.ContextVar[str] = contextvars.ContextVar("conformance", default="nothing")


async def contextvars_pass(wrap: Wrap) -> None:
    """Context variables pass into the app and back out"""
    seen: list[str] = []

    def app(environ: Any, start_response: Any) -> Any:
        seen.append(_variable.get())
        _variable.set("inside")
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield _variable.get().encode()

    _variable.set("outside")
    client = AsgiClient()
    await wrap(app)(client.scope, client.receive, client.send)
    expect(seen == ["outside"], f"the app saw {seen[0]!r}, not 'outside'")
    expect(client.body == b"inside", f"while it streamed, the app saw {client.body.decode()!r} of itself")
    expect(_variable.get() == "inside", "what the app had set was not seen outside")


async def back_pressure(wrap: Wrap) -> None:
    """A slow client holds a fast app back"""
    made = 0

    def app(environ: Any, start_response: Any) -> Any:
        nonlocal made
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        for _ in range(64):
            made += 1
            yield bytes(2**20)

    client = AsgiClient()
    client.take.clear()
    async with running(client.run(wrap(app))):
        try:
            await until(lambda: made)
            with contextlib.suppress(Broken):
                await until(lambda: made > 16, 1.0)
            expect(made <= 16, f"{made} MiB were made for a client that took nothing")
        finally:
            client.take.set()


async def repeated_headers(wrap: Wrap) -> None:
    """Repeated headers cost linear time"""
    seconds = []
    for count in (10_000, 40_000):
        best = float("inf")
        for _ in range(3):
            client = AsgiClient(headers=[(b"x-repeated", b"a" * 20)] * count)
            start = time.process_time()
            await environ_of(wrap, client)
            best = min(best, time.process_time() - start)
        seconds.append(best)
    expect(  # linear is 4, quadratic 16
        seconds[1] < 8 * seconds[0] or seconds[1] < 0.1,
        f"10,000 took {seconds[0] * 1000:.0f} ms, 40,000 took {seconds[1] * 1000:.0f} ms",
    )


async def underscores(wrap: Wrap) -> None:
    """A header `X_User` cannot pass for `X-User`"""
    environ = await environ_of(wrap, AsgiClient(headers=[(b"x_user", b"admin")]))
    expect(environ.get("HTTP_X_USER") != "admin", "HTTP_X_USER was 'admin'")


async def response_length(wrap: Wrap) -> None:
    """A response shorter than its Content-Length is an error, not an answer"""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "10")])
        return [b"abc"]

    client = AsgiClient()
    with contextlib.suppress(Exception):
        await client.run(wrap(app))
    expect(not client.ended, "3 bytes of 10 were sent as a whole response")


async def request_length(wrap: Wrap) -> None:
    """An upload that breaks off is an error for the app, not a short body"""
    read: list[bytes] = []

    def app(environ: Any, start_response: Any) -> Any:
        read.append(environ["wsgi.input"].read(10))
        return hello(environ, start_response)

    client = AsgiClient((b"abc", None), headers=[(b"content-length", b"10")])
    with contextlib.suppress(Exception, ExceptionGroup):
        await client.run(wrap(app))
    expect(not read, f"the app read {read[0]!r} as the whole body of 10 bytes" if read else "")


async def injection(wrap: Wrap) -> None:
    """A CR or LF in a response header is refused"""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain"), ("X-A", "a\r\nSet-Cookie: b=c")])
        return [b"hello"]

    client = AsgiClient()
    with contextlib.suppress(Exception):
        await client.run(wrap(app))
    headers = [header for message in client.messages for header in message.get("headers", ())]
    expect(all(b"\n" not in value for _, value in headers), "it was handed to the server")


async def prefix(wrap: Wrap) -> None:
    """A prefix `/app` leaves `/apple` whole"""
    environ = await environ_of(wrap, AsgiClient(path="/apple", root_path="/app"))
    expect(environ.get("PATH_INFO") == "/apple", f"PATH_INFO of /apple was {environ.get('PATH_INFO')!r}")


async def exact_path(wrap: Wrap) -> None:
    """`%FF` in a path arrives as it was sent"""
    environ = await environ_of(wrap, AsgiClient(path="/\ufffd", raw_path=b"/%FF"))
    expect(environ.get("PATH_INFO") == "/\xff", f"PATH_INFO of /%FF was {environ.get('PATH_INFO')!r}")


async def lifespan(wrap: Wrap) -> None:
    """The server's lifespan is answered"""
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[str] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    await asyncio.wait_for(wrap(hello)(scope, receive, send), PATIENCE)
    expect("lifespan.startup.complete" in sent, f"it answered {sent}")


async def errors_propagate(wrap: Wrap) -> None:
    """The app's error reaches the server as itself"""

    def app(environ: Any, start_response: Any) -> Any:
        raise LookupError("on purpose")

    try:
        await AsgiClient().run(wrap(app))
    except LookupError:
        return
    except BaseException as error:
        raise Broken(f"{type(error).__name__} came of a LookupError") from error
    raise Broken("nothing was raised")


async def parallel(wrap: Wrap) -> None:
    """Sixteen requests that wait are in the app at once"""
    meeting = threading.Barrier(16, timeout=PATIENCE)

    def app(environ: Any, start_response: Any) -> Any:
        meeting.wait()
        return hello(environ, start_response)

    application = wrap(app)
    results = await asyncio.gather(*(AsgiClient().run(application) for _ in range(16)), return_exceptions=True)
    expect(results == [None] * 16, "they waited for each other")


# --- A server in memory: WSGI -------------------------------------------------------------------------------------


class Trickle(io.RawIOBase):
    """A request's body: pieces, and events that the server waits for as it reads."""

    def __init__(self, *pieces: bytes | threading.Event) -> None:
        self.pieces = list(pieces)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while self.pieces:
            piece = self.pieces.pop(0)
            if not isinstance(piece, threading.Event):
                if 0 <= size < len(piece):
                    self.pieces.insert(0, piece[size:])
                    piece = piece[:size]
                return piece
            if not piece.wait(PATIENCE):
                raise Broken("nothing came of the first piece of the body")
        return b""


def make_environ(body: Any = b"", **more: Any) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": "POST" if body else "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/",
        "QUERY_STRING": "",
        "SERVER_NAME": "testserver",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body) if isinstance(body, bytes) else body,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    } | more


class WsgiClient:
    """One request to a WSGI app, from the thread that makes it."""

    def __init__(self, application: Any, environ: dict[str, Any]) -> None:
        self.status = ""
        self.result: Any = ()

        def start_response(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], None]:
            self.status = status
            return lambda data: None

        self.result = application(environ, start_response)
        self.status_in_call = self.status
        self.blocks = iter(self.result)

    def close(self) -> None:
        close = getattr(self.result, "close", None)
        if close is not None:
            close()


def ask(application: Any, environ: dict[str, Any]) -> bytes:
    client = WsgiClient(application, environ)
    try:
        return b"".join(client.blocks)
    finally:
        client.close()


async def in_thread(call: Callable[[], Any]) -> Any:
    """What a server's thread does; no loop runs in it. A thread that hangs is left."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def run() -> None:
        try:
            result, error = call(), None
        except BaseException as exc:
            result, error = None, exc
        with contextlib.suppress(RuntimeError):
            future.get_loop().call_soon_threadsafe(settle, result, error)

    def settle(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wait_for(future, PATIENCE)


async def respond(send: Any, *blocks: bytes, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    for block in blocks[:-1]:
        await send({"type": "http.response.body", "body": block, "more_body": True})
    await send({"type": "http.response.body", "body": blocks[-1] if blocks else b""})


def http_only(app: Callable[[Any, Any, Any], Awaitable[None]]) -> Any:
    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError(scope["type"])
        await app(scope, receive, send)

    return asgi


# --- The checks: ASGI app under WSGI ------------------------------------------------------------------------------


async def back_status_first(wrap: Wrap) -> None:
    """`start_response` is called before the body is iterated, as granian's WSGI server needs them"""

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"not here", status=404)

    def serve() -> str:
        client = WsgiClient(wrap(app), make_environ())
        b"".join(client.blocks)
        client.close()
        return client.status_in_call

    status = await in_thread(serve)
    expect(status.startswith("404"), f"the status was {status!r} then")


async def back_request_streams(wrap: Wrap) -> None:
    """The request's body streams into the app while it arrives"""
    got = threading.Event()

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            got.set()
            if not message.get("more_body"):
                break
        await respond(send, body)

    environ = make_environ(Trickle(b"abc", got, b"def"), CONTENT_LENGTH="6")
    body = await in_thread(lambda: ask(wrap(app), environ))
    expect(body == b"abcdef", f"the app received {body!r} of b'abcdef'")


async def back_response_streams(wrap: Wrap) -> None:
    """A block that the app sends reaches the server before the app goes on"""
    seen = threading.Event()

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await until(seen.is_set)
        await send({"type": "http.response.body", "body": b"second"})

    def serve() -> bytes:
        client = WsgiClient(wrap(app), make_environ())
        first: bytes = next(block for block in client.blocks if block)
        seen.set()
        rest = b"".join(client.blocks)
        client.close()
        return first + rest

    expect(await in_thread(serve) == b"firstsecond", "the blocks were others")


async def back_client_leaves(wrap: Wrap) -> None:
    """A client that leaves is told to the app by `http.disconnect`"""
    heard = threading.Event()

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        if (await receive())["type"] == "http.disconnect":
            heard.set()

    application = wrap(app)

    def serve() -> None:
        client = WsgiClient(application, make_environ())
        next(block for block in client.blocks if block)
        client.close()

    await in_thread(serve)
    await until(heard.is_set)


async def back_request_length(wrap: Wrap) -> None:
    """An upload that breaks off is a disconnect for the app, not a short body"""
    received: list[str] = []

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(3):
            message = await receive()
            received.append(message["type"] if message.get("more_body") or message["type"] != "http.request" else "end")
            if received[-1] != "http.request":
                break
        await respond(send, b"done")

    environ = make_environ(b"abc", CONTENT_LENGTH="10")
    with contextlib.suppress(Exception):
        await in_thread(lambda: ask(wrap(app), environ))
    expect(received[-1:] == ["http.disconnect"], f"the app received {received}")


async def back_lifespan(wrap: Wrap) -> None:
    """Startup runs before the first request, and its state reaches it"""
    started: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            scope.get("state", {})["database"] = "open"
            started.append("yes")
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await respond(send, f"{scope.get('state', {}).get('database')} {len(started)}".encode())

    application = wrap(app)
    body = await in_thread(lambda: ask(application, make_environ()))
    expect(body == b"open 1", f"the app's state was {body.decode()!r}")


async def back_one_loop(wrap: Wrap) -> None:
    """What one request makes on the event loop works in the next"""
    locks: list[asyncio.Lock] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            return
        locks.append(locks[0] if locks else asyncio.Lock())
        async with locks[0]:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(locks[0].acquire(), 0.01)
        await respond(send, b"done")

    application = wrap(app)
    for _ in range(2):
        await in_thread(lambda: ask(application, make_environ()))


async def back_errors_propagate(wrap: Wrap) -> None:
    """The app's error reaches the server as itself"""

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("on purpose")

    try:
        await in_thread(lambda: ask(wrap(app), make_environ()))
    except LookupError:
        return
    except BaseException as error:
        raise Broken(f"{type(error).__name__} came of a LookupError") from error
    raise Broken("nothing was raised")


async def back_no_response(wrap: Wrap) -> None:
    """An app that ends without an answer is an error, not an empty 200"""

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    client: WsgiClient | None = None
    try:
        client = await in_thread(lambda: (lambda c: (b"".join(c.blocks), c)[1])(WsgiClient(wrap(app), make_environ())))
    except TimeoutError:
        raise Broken("the server's thread hangs") from None
    except Exception:
        return
    expect(client is None or client.status.startswith("5"), f"the status was {client and client.status!r}")


async def back_fork(wrap: Wrap) -> None:
    """An app that was wrapped before a fork works after it"""
    import os

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"hello")

    application = wrap(app)
    child = os.fork()
    if child == 0:
        threading.Timer(PATIENCE, os._exit, (3,)).start()
        body = ThreadPoolExecutor(1).submit(ask, application, make_environ()).result()
        os._exit(0 if body == b"hello" else 4)
    _, status = await in_thread(lambda: os.waitpid(child, 0))
    expect(os.waitstatus_to_exitcode(status) == 0, "the child hung")


async def back_odd_path(wrap: Wrap) -> None:
    """A path of any bytes is served"""

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"hello")

    body = await in_thread(lambda: ask(wrap(app), make_environ(PATH_INFO="/\xff")))
    expect(body == b"hello", f"the answer was {body!r}")


class Check(NamedTuple):
    """One promise; its words stand in the function's docstring."""

    direction: str
    function: Callable[[Wrap], Coroutine[Any, Any, None]]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def words(self) -> str:
        return (self.function.__doc__ or "").strip()


_FORTH = [
    request_streams,
    response_streams,
    client_leaves,
    close_is_called,
    back_pressure,
    contextvars_pass,
    parallel,
    response_length,
    request_length,
    errors_propagate,
    lifespan,
    prefix,
    exact_path,
    underscores,
    injection,
    repeated_headers,
]
_BACK = [
    back_request_streams,
    back_response_streams,
    back_status_first,
    back_client_leaves,
    back_request_length,
    back_no_response,
    back_errors_propagate,
    back_lifespan,
    back_one_loop,
    back_fork,
    back_odd_path,
]
CHECKS = {
    check.name: check
    for direction, functions in zip(CONTESTANTS, (_FORTH, _BACK), strict=True)
    for check in (Check(direction, function) for function in functions)
}


# --- Running them -------------------------------------------------------------------------------------------------


def run_one(check: Check, contestant: str) -> None:
    """Run a check in this process, and end it: exit status 0 if the promise is kept, 1 and a reason if not."""
    import os

    try:
        asyncio.run(check.function(CONTESTANTS[check.direction][contestant]))
        status, reason = 0, ""
    except BaseException as error:
        status, reason = 1, str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
    print(reason.splitlines()[0] if reason else "", flush=True)
    os._exit(status)  # threads of a contestant that hangs would hold the interpreter back


def run_in_process(check: Check, contestant: str) -> str | None:
    """The reason why the promise is not kept; None if it is."""
    command = [sys.executable, "-m", "benchmarks.conformance", "--one", check.name, contestant]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it hung for {LIMIT:g} s"
    return None if done.returncode == 0 else (done.stdout.strip() or done.stderr.strip()[-200:] or "no reason")


Results = dict[str, dict[str, str | None]]


def run_all(checks: Iterable[Check]) -> Results:
    results: Results = {}
    for check in checks:
        results[check.name] = {name: run_in_process(check, name) for name in CONTESTANTS[check.direction]}
        shown = "  ".join(f"{name} {'no' if reason else 'yes'}" for name, reason in results[check.name].items())
        print(f"{check.name}: {shown}", flush=True)
        for name, reason in results[check.name].items():
            if reason:
                print(f"    {name}: {reason}", flush=True)
    return results


def tables(results: Results) -> str:
    """The tables of README.md."""
    lines: list[str] = []
    for direction, contestants in CONTESTANTS.items():
        rows = [check for check in CHECKS.values() if check.direction == direction and check.name in results]
        if not rows:
            continue
        head = [name for name in NAMES if name in contestants]
        lines += [f"| {direction} | {' | '.join(head)} |", f"|---|{':-:|' * len(head)}"]
        for check in rows:
            cells = [YES if results[check.name][name] is None else NO for name in head]
            lines.append(f"| {check.words} | {' | '.join(cells)} |")
        lines.append("")
    packages = ["anyio", *NAMES[1:]]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return "\n".join([*lines, f"<sup>Python {sys.version.split()[0]}, {versions}</sup>"])


def write(text: str) -> None:
    readme = README.read_text(encoding="utf-8")
    pattern = f"{re.escape(MARKERS[0])}.*?{re.escape(MARKERS[1])}"
    block = f"{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}"
    if not re.search(pattern, readme, re.DOTALL):
        raise SystemExit(f"README.md has no {MARKERS[0]} ... {MARKERS[1]}")
    README.write_text(re.sub(pattern, lambda _: block, readme, flags=re.DOTALL), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.conformance", description="Which promises are kept by whom.")
    parser.add_argument("--only", default="", metavar="WORD", help="the checks with that word in their name")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    parser.add_argument("--one", nargs=2, metavar=("CHECK", "CONTESTANT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        run_one(CHECKS[options.one[0]], options.one[1])
    results = run_all(check for check in CHECKS.values() if options.only in check.name)
    text = tables(results)
    print(f"\n{text}")
    if options.write:
        if options.only:
            parser.error("--write needs all checks")
        write(text)


if __name__ == "__main__":
    main()
