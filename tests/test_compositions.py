"""Wrappers in wrappers: a WSGI app inside ASGI middleware under a WSGI server, and the other way round (C1 to C3)."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import gzip
import io
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import uvloop
from asgiref.sync import async_to_sync
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware

import bridge.asgi_to_wsgi
from bridge import AsgiToWsgi, ClientDisconnected, LifespanFailure, ProtocolError, WsgiToAsgi
from bridge.channel import PATIENCE
from bridge.life import WAIT_SECONDS
from tests.drivers import (
    LIMIT,
    AsgiServer,
    EarlyHints,
    FakeInput,
    FileWrapper,
    Journal,
    Signal,
    WsgiServer,
    client_socket,
    in_thread,
    make_environ,
    make_scope,
    run_in_thread,
    run_in_threads,
)

pytestmark = pytest.mark.leaves("threads")  # the keeper of a shared loop, until the wrapper is closed

PLAIN = [("Content-Type", "text/plain")]


def pass_on(app: Any) -> Any:
    """ASGI middleware that does nothing."""

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return middleware


def around(handle: Callable[..., Any]) -> Callable[[Any], Any]:
    """ASGI middleware that serves http by `handle(app, scope, receive, send)`, and passes all else on."""

    def wrap(app: Any) -> Any:
        async def middleware(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                await handle(app, scope, receive, send)
            else:
                await app(scope, receive, send)

        return middleware

    return wrap


def by_a_task(app: Any) -> Any:
    """ASGI middleware that hands messages on by tasks of its own."""

    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    return BaseHTTPMiddleware(app, dispatch=dispatch)


MIDDLEWARE = pytest.mark.parametrize("middleware", [pass_on, by_a_task])


@pytest.fixture(params=["shared", "request"])
def wrap(request: pytest.FixtureRequest) -> Iterator[Callable[..., AsgiToWsgi]]:
    """Make the composition of C1, on either kind of loop."""
    made: list[AsgiToWsgi] = []

    def wrap(app: Any, middleware: Callable[[Any], Any] = pass_on) -> AsgiToWsgi:
        made.append(AsgiToWsgi(middleware(WsgiToAsgi(app)), loop=request.param))
        return made[-1]

    yield wrap
    for application in made:
        application.close()


class Site:
    """A WSGI app that notes the thread of all that is done with it."""

    def __init__(self, blocks: Iterable[bytes], *, length: int | None = None) -> None:
        self.journal = Journal()
        self.environ: dict[str, Any] = {}
        self._blocks = blocks
        self._headers = PLAIN + ([("Content-Length", str(length))] if length is not None else [])

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        self.journal.note("call")
        self.environ = environ
        start_response("200 OK", self._headers)
        self._iterator = iter(self._blocks)
        return self

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.journal.note("next")
        return next(self._iterator)

    def close(self) -> None:
        self.journal.note("close")

    @property
    def threads(self) -> set[int]:
        return {entry.thread for entry in self.journal.entries}


# C1: the server's own thread ------------------------------------------------------------------------------------------


@MIDDLEWARE
def test_the_app_is_called_iterated_and_closed_in_the_servers_thread(wrap: Any, middleware: Any) -> None:
    """[C1], [W13]"""
    site = Site([b"one", b"two", b"three"])
    exchange = WsgiServer().run(wrap(site, middleware))
    assert exchange.body == b"onetwothree"
    assert site.journal.events == ["call", "next", "next", "next", "next", "close"]
    assert site.threads == {threading.get_ident()}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bridge-worker")]


def test_an_answer_of_known_length_is_closed_when_the_server_closes_it(wrap: Any) -> None:
    """[C1] As Django's are: a content length, one block, and close() with request_finished."""
    site = Site([b"four"], length=4)
    with WsgiServer().start(wrap(site)) as exchange:
        assert next(exchange) == b"four"
    assert site.journal.count("close") == 1
    assert site.threads == {threading.get_ident()}


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_an_empty_piece_of_a_body_is_not_its_end(in_a_thread: bool) -> None:
    """[W8] [C1] Middleware that unpacks a body has nothing to give for the first bytes of it."""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        read = partial(environ["wsgi.input"].read, 5)
        body = in_thread(read).result() if in_a_thread else read()
        start_response("200 OK", PLAIN)
        return [body]

    def unpack(inner: Any) -> Any:
        async def middleware(scope: Any, receive: Any, send: Any) -> None:
            pieces = [b"", b""]

            async def receive_unpacked() -> Any:
                if pieces:
                    return {"type": "http.request", "body": pieces.pop(), "more_body": True}
                return await receive()

            await inner(scope, receive_unpacked, send)

        return middleware

    with AsgiToWsgi(unpack(WsgiToAsgi(app)), lifespan="off") as application:
        environ = make_environ("POST", CONTENT_LENGTH="5") | {"wsgi.input": io.BytesIO(b"hello")}
        assert WsgiServer().run(application, environ).body == b"hello"


def test_many_server_threads_each_run_their_own_requests(wrap: Any) -> None:
    """[C1]"""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        yield b"%d " % threading.get_ident()
        yield b"%d" % threading.get_ident()

    application = wrap(app)

    def serve() -> set[bool]:
        mine = b"%d" % threading.get_ident()
        return {word == mine for _ in range(30) for word in WsgiServer().run(application).body.split()}

    calls = [in_thread(serve) for _ in range(6)]
    assert [call.result(30) for call in calls] == [{True}] * 6


def test_the_app_sees_the_servers_keys_and_what_middleware_has_changed(wrap: Any) -> None:
    """[C1]"""

    @around
    async def proxied(app: Any, scope: Any, receive: Any, send: Any) -> None:
        headers = [*scope["headers"], (b"x-user", b"me")]
        await app(scope | {"path": "/new", "client": ("203.0.113.9", 1), "headers": headers}, receive, send)

    site = Site([b"x"])
    own = {"REMOTE_USER": "me", "SSL_CLIENT_CERT": "pem", "mod_wsgi.version": (5, 0), "wsgi.multithread": False}
    WsgiServer().run(wrap(site, proxied), make_environ(path="/old") | own)
    assert {key: site.environ[key] for key in own} == own
    assert site.environ["PATH_INFO"] == "/new"
    assert site.environ["REMOTE_ADDR"] == "203.0.113.9"
    assert site.environ["HTTP_X_USER"] == "me"


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@MIDDLEWARE
def test_one_context_from_middleware_through_the_app_and_back(wrap: Any, middleware: Any) -> None:
    """[W13], [C1]"""
    seen = []
    ended = Signal("the middleware's end")  # on a shared loop it goes on by itself

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        seen.append(VARIABLE.get())
        VARIABLE.set("app")
        yield b"x"
        seen.append(VARIABLE.get())

    @around
    async def setting(app: Any, scope: Any, receive: Any, send: Any) -> None:
        VARIABLE.set("middleware")
        await app(scope, receive, send)
        seen.append(VARIABLE.get())
        ended.set()

    WsgiServer().run(wrap(app, lambda inner: middleware(setting(inner))))
    ended.wait()
    assert seen == ["middleware", "app", "app"]
    assert VARIABLE.get() == "unset"


# C1: streams ----------------------------------------------------------------------------------------------------------


@MIDDLEWARE
def test_a_block_reaches_the_server_before_the_app_is_asked_for_the_next(wrap: Any, middleware: Any) -> None:
    """[W12], [A7], [C1]"""
    journal = Journal()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        for number in range(4):
            journal.note(f"asked for {number}")
            yield b"%d" % number

    with WsgiServer().start(wrap(app, middleware)) as exchange:
        for number, block in enumerate(exchange):
            assert block == b"%d" % number
            journal.note(f"got {number}")
    assert journal.events == [f"{word} {number}" for number in range(4) for word in ("asked for", "got")]


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_block_passes_many_tasks_before_the_app_is_asked_for_the_next(factory: Any) -> None:
    """[W12], [C1]"""
    arrived = Signal("the first block is with the server")

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        yield b"first"
        arrived.wait()
        yield b"second"

    wrapped: Any = WsgiToAsgi(app)
    for _ in range(15):
        wrapped = by_a_task(wrapped)
    with AsgiToWsgi(wrapped, loop_factory=factory) as application, WsgiServer().start(application) as exchange:
        assert next(exchange) == b"first"
        arrived.set()
        assert list(exchange) == [b"second"]


@MIDDLEWARE
def test_the_body_is_read_as_the_app_reads_it(wrap: Any, middleware: Any) -> None:
    """[W7], [A3], [C1] What the app reads is asked of the middleware, and by that of the server, in its own thread."""
    gate = Signal()
    stream = FakeInput([b"first", gate, b"second"], fills=False)
    threads = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        threads.append(threading.get_ident())
        yield environ["wsgi.input"].read1(100)
        gate.set()
        yield environ["wsgi.input"].read()

    environ = make_environ("POST", body=stream, CONTENT_LENGTH="11", CONTENT_TYPE="text/plain")
    exchange = WsgiServer().run(wrap(app, middleware), environ)
    assert exchange.blocks == [b"first", b"second"]
    assert stream.threads == {threading.get_ident()} == set(threads)


def test_middleware_may_change_the_body_on_its_way(wrap: Any) -> None:
    """[C1]"""

    @around
    async def shouting(app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def shout() -> Any:
            message = await receive()
            return message | {"body": message["body"].upper()}

        await app(scope, shout, send)

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        return [environ["wsgi.input"].read()]

    environ = make_environ("POST", body=b"quiet" * 50_000, CONTENT_TYPE="text/plain")
    assert WsgiServer().run(wrap(app, shouting), environ).body == b"QUIET" * 50_000


def test_a_body_that_nobody_reads_is_not_read(wrap: Any) -> None:
    """[W7], [C1]"""
    stream = FakeInput([Signal()])
    exchange = WsgiServer().run(
        wrap(Site([b"no"])), make_environ("POST", body=stream, CONTENT_LENGTH="5", CONTENT_TYPE="text/plain")
    )
    assert exchange.body == b"no"
    assert stream.sizes == []


def test_a_short_body_is_an_error_for_the_app(wrap: Any) -> None:
    """[W9], [A4], [C1]"""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        with pytest.raises(ClientDisconnected):
            environ["wsgi.input"].read()
        raise KeyError("unreadable")

    environ = make_environ("POST", body=FakeInput(b"shor"), CONTENT_LENGTH="5", CONTENT_TYPE="text/plain")
    assert isinstance(WsgiServer().run(wrap(app), environ).error, KeyError)


def test_a_thread_of_the_app_reads_the_body_while_the_app_waits_for_it(wrap: Any) -> None:
    """[C1]"""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        return [run_in_thread(environ["wsgi.input"].read)]

    environ = make_environ("POST", body=b"x" * 200_000, CONTENT_TYPE="text/plain")
    assert WsgiServer().run(wrap(app), environ).body == b"x" * 200_000


@MIDDLEWARE
def test_gzip_and_tasks_between(wrap: Any, middleware: Any) -> None:
    """[C1] Middleware that keeps blocks for itself holds nothing up."""
    blocks = [b"block %d" % number * 300 for number in range(20)]
    application = wrap(Site(blocks), lambda app: GZipMiddleware(middleware(app)))
    exchange = WsgiServer().run(application, make_environ(headers=[("Accept-Encoding", "gzip")]))
    assert gzip.decompress(exchange.body) == b"".join(blocks)


# C1: write(), hints, files --------------------------------------------------------------------------------------------


def test_a_written_block_is_with_the_server_when_write_returns(wrap: Any) -> None:
    """[W13], [C1]"""
    journal = Journal()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", PLAIN)
        for block in (b"one", b"two"):
            write(block)
            journal.note("written")
        return [b"three"]

    exchange = WsgiServer().run(wrap(app), journal=journal)
    assert journal.events == ["start_response", "write", "written", "write", "written", "block", "end", "close"]
    assert exchange.body == b"onetwothree"


def test_a_server_without_write_gets_what_was_written_all_the_same(wrap: Any) -> None:
    """[W13], [C1] granian's start_response returns None."""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", PLAIN)
        for _ in range(8):
            write(b"x" * 50_000)
        return [b"end"]

    assert WsgiServer(write=False, validate=False).run(wrap(app)).body == b"x" * 400_000 + b"end"


def test_more_is_written_than_a_window_holds(wrap: Any) -> None:
    """[W13], [C1]"""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", PLAIN)
        for _ in range(20):
            write(b"x" * 100_000)
        yield b"end"

    assert WsgiServer().run(wrap(app)).body_length == 2_000_003


@MIDDLEWARE
def test_a_slow_app_may_write_all_the_same(wrap: Any, middleware: Any) -> None:
    """[W13], [C1] Slow enough for a watch to be due, and for the keeper to run the loop."""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", PLAIN)
        for block in (b"one", b"two", b"three"):
            time.sleep(PATIENCE)
            write(block)
        return [b"four"]

    assert WsgiServer().run(wrap(app, middleware)).body == b"onetwothreefour"


def test_hints_are_out_before_the_app_goes_on(wrap: Any) -> None:
    """[W6], [C1]"""
    hints = EarlyHints()
    seen = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        environ["wsgi.early_hints"]([("Link", "</style.css>; rel=preload")])
        seen.extend(hints.calls)
        start_response("200 OK", PLAIN)
        return [b"x"]

    WsgiServer().run(wrap(app), make_environ() | {"wsgi.early_hints": hints})
    assert seen == [[("Link", "</style.css>; rel=preload")]]


def test_a_file_goes_to_the_servers_own_wrapper(wrap: Any, tmp_path: Any) -> None:
    """[W18], [A12], [C1]"""
    path = tmp_path / "file"
    path.write_bytes(b"content" * 1000)

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        return environ["wsgi.file_wrapper"](path.open("rb"))

    exchange = WsgiServer().run(wrap(app), make_environ() | {"wsgi.file_wrapper": FileWrapper})
    assert exchange.body == b"content" * 1000
    assert exchange.file is not None
    assert exchange.file.filelike.name == str(path)


def test_what_is_no_whole_file_comes_in_blocks(wrap: Any) -> None:
    """[W18], [C1]"""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        return environ["wsgi.file_wrapper"](io.BytesIO(b"content" * 10_000))

    exchange = WsgiServer().run(wrap(app), make_environ() | {"wsgi.file_wrapper": FileWrapper})
    assert exchange.body == b"content" * 10_000


# C1: ends -------------------------------------------------------------------------------------------------------------


@MIDDLEWARE
def test_a_server_that_closes_early_has_the_app_closed_at_once(wrap: Any, middleware: Any) -> None:
    """[W16], [C1]"""
    site = Site(iter(lambda: b"x", b""))
    exchange = WsgiServer().start(wrap(site, middleware))
    assert next(exchange) == b"x"
    exchange.close()
    assert site.journal.events == ["call", "next", "close"]
    assert site.threads == {threading.get_ident()}


@MIDDLEWARE
def test_the_client_leaves_while_the_app_computes(wrap: Any, middleware: Any) -> None:
    """[W16], [A11], [C1]"""
    journal = Journal()
    with client_socket() as (client, server):

        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", PLAIN)
            try:
                yield b"x"
                journal.note("disconnected", environ["waitress.client_disconnected"]())
                client.close()
                journal.note("disconnected", environ["waitress.client_disconnected"]())
            finally:
                journal.note("closed")

        WsgiServer().run(wrap(app, middleware), make_environ() | {"gunicorn.socket": server})
    assert [entry.detail for entry in journal.entries] == [False, True, None]


class AppError(Exception):
    pass


@MIDDLEWARE
def test_an_error_before_the_start_is_raised_as_itself(wrap: Any, middleware: Any) -> None:
    """[W15], [A9], [C1]"""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        raise AppError

    exchange = WsgiServer().run(wrap(app, middleware))
    assert isinstance(exchange.error, AppError)
    assert not exchange.started


def test_an_error_in_mid_response_aborts_it(wrap: Any) -> None:
    """[W15], [A9], [C1]"""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", PLAIN)
        yield b"x"
        raise AppError

    exchange = WsgiServer().run(wrap(app))
    assert isinstance(exchange.error, AppError)
    assert exchange.aborted


@pytest.mark.parametrize(
    "kind", [MemoryError, KeyboardInterrupt, SystemExit, StopIteration, GeneratorExit, asyncio.CancelledError]
)
def test_no_class_of_error_makes_a_request_hang(wrap: Any, kind: type[BaseException]) -> None:
    """[W15], [C1]"""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        raise kind

    with pytest.raises((kind, ProtocolError)):
        WsgiServer().start(wrap(app))


def test_an_interrupt_in_a_step_leaves_nothing_locked(wrap: Any) -> None:
    """[W15], [C1]"""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        if environ["PATH_INFO"] == "/bad":
            raise SystemExit(3)
        return [b"fine"]

    application = wrap(app)
    with pytest.raises(SystemExit):
        WsgiServer().start(application, make_environ(path="/bad"))
    assert WsgiServer().run(application).body == b"fine"


def test_middleware_that_answers_by_itself_never_calls_the_app(wrap: Any) -> None:
    """[C1]"""

    @around
    async def refusing(app: Any, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": b"no"})

    site = Site([b"yes"])
    exchange = WsgiServer().run(wrap(site, refusing))
    assert (exchange.status_code, exchange.body) == (403, b"no")
    assert site.journal.events == []


def test_middleware_that_cancels_the_app_has_it_closed_in_the_servers_thread(wrap: Any) -> None:
    """[W16], [C1]"""

    @around
    async def impatient(app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def stuck(message: Any) -> None:
            await anyio.sleep_forever()

        with anyio.move_on_after(0.02):
            await app(scope, receive, stuck)
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 504, "headers": headers})
        await send({"type": "http.response.body", "body": b"late"})

    site = Site([b"one", b"two"])
    exchange = WsgiServer().run(wrap(site, impatient))
    assert (exchange.status_code, exchange.body) == (504, b"late")
    assert site.journal.events == ["call", "next", "close"]
    assert site.threads == {threading.get_ident()}


def test_middleware_cuts_an_endless_response_short(wrap: Any) -> None:
    """[W16], [C1]"""

    @around
    async def cutting(app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def once(message: Any) -> None:
            if message["type"] == "http.response.body":
                await send(message | {"more_body": False})
                raise OSError("enough")
            await send(message)

        await app(scope, receive, once)

    site = Site(iter(lambda: b"x", b""))
    assert WsgiServer().run(wrap(site, cutting)).body == b"x"
    assert site.journal.events == ["call", "next", "close"]


def test_two_apps_at_once_in_one_request(wrap: Any) -> None:
    """[C1] There is one thread to be lent: the second app gets a worker's, and neither waits for the other."""
    meet = threading.Barrier(2, timeout=10)

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        meet.wait()
        return [b"%d" % threading.get_ident()]

    @around
    async def both(app: Any, scope: Any, receive: Any, send: Any) -> None:
        bodies: list[bytes] = []

        async def keep(message: Any) -> None:
            bodies.append(message.get("body", b""))

        async with anyio.create_task_group() as group:
            group.start_soon(app, scope, receive, keep)
            group.start_soon(app, scope, receive, keep)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b" ".join(filter(None, bodies))})

    idents = WsgiServer().run(wrap(app, both)).body.split()
    assert b"%d" % threading.get_ident() in idents
    assert len(set(idents)) == 2


def test_two_apps_in_turn_in_one_request(wrap: Any) -> None:
    """[C1] Each has the thread while it needs it."""
    site = Site([b"x"])

    @around
    async def twice(app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def drop(message: Any) -> None:
            pass

        await app(scope, receive, drop)
        await app(scope, receive, send)

    assert WsgiServer().run(wrap(site, twice)).body == b"x"
    assert site.journal.count("close") == 2
    assert site.threads == {threading.get_ident()}


@pytest.mark.parametrize("ask", [lambda app: lambda *args: asyncio.run(app(*args)), async_to_sync])
def test_the_app_is_asked_in_another_loop(wrap: Any, ask: Any) -> None:
    """[C1] A synchronous endpoint asks it, with the request's scope: a worker runs it then."""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        return [environ["PATH_INFO"].encode()]

    @around
    async def asking(app: Any, scope: Any, receive: Any, send: Any) -> None:
        messages: list[Any] = []

        async def receive_nothing() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def keep(message: Any) -> None:
            messages.append(message)

        await anyio.to_thread.run_sync(ask(app), scope | {"path": "/part"}, receive_nothing, keep)
        for message in messages:
            await send(message)

    assert in_thread(WsgiServer().run, wrap(app, asking)).result().body == b"/part"


def test_an_app_that_has_ended_keeps_the_thread_from_no_other(wrap: Any) -> None:
    """[C1] The first is refused while its last block is sent, in the moment in which the second has the thread."""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        return [environ["PATH_INFO"].encode()]

    @around
    async def refusing(app: Any, scope: Any, receive: Any, send: Any) -> None:
        sends = anyio.Event()

        async def refuse(message: Any) -> None:
            await anyio.sleep(0.01)  # so the thread is back from the step, and is given back
            sends.set()
            await anyio.lowlevel.checkpoint()  # in the same turn of the loop, behind the second's beginning
            raise ValueError("refused")

        async def ask_second() -> None:
            await sends.wait()
            await app(scope | {"path": "/second"}, receive, send)

        async with anyio.create_task_group() as group:
            group.start_soon(ask_second)
            with contextlib.suppress(ValueError):
                await app(scope | {"path": "/first"}, receive, refuse)

    assert in_thread(WsgiServer().run, wrap(app, refusing)).result().body == b"/second"


def test_an_app_that_outlives_the_response_gets_a_worker(wrap: Any) -> None:
    """[C1] Shadow traffic: the server's thread has gone before the app is called."""
    done = Signal("the shadow's end")

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        done.set()
        return [b"shadow"]

    @around
    async def shadow(app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def drop(message: Any) -> None:
            pass

        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"light"})
        await anyio.sleep(0.01)
        await app(scope, receive, drop)

    assert WsgiServer().run(wrap(app, shadow)).body == b"light"
    done.wait()


# C1: other threads of the app -----------------------------------------------------------------------------------------


class Gated:
    """A wsgi.input that gives a piece whenever it is allowed."""

    def __init__(self) -> None:
        self.pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.asked = Signal("the first read")

    def read(self, size: int) -> bytes:
        self.asked.set()
        return self.pieces.get(timeout=LIMIT)


def upload(stream: Any, length: int) -> dict[str, Any]:
    return make_environ("POST", CONTENT_LENGTH=str(length)) | {"wsgi.input": stream}


LENIENT = WsgiServer(validate=False)  # wsgiref.validate takes no other thread's reads


def test_a_thread_reads_on_when_the_app_has_answered(wrap: Any) -> None:
    """[W9], [C1] Its read ends with the request; the loop is in order for the next."""
    stream = Gated()
    readers = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            readers.append(in_thread(environ["wsgi.input"].read))
            stream.asked.wait()
        start_response("200 OK", PLAIN)
        return [b"answer"]

    application = wrap(app)
    assert in_thread(LENIENT.run, application, upload(stream, 8)).result().body == b"answer"
    for _ in range(3):
        assert in_thread(LENIENT.run, application).result().body == b"answer"
    stream.pieces.put(b"late")
    with pytest.raises(ClientDisconnected):
        readers[0].result()
    assert in_thread(LENIENT.run, application).result().body == b"answer"


def test_a_thread_begins_to_read_when_the_app_has_answered(wrap: Any) -> None:
    """[W9], [C1]"""
    readers = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        stream = environ["wsgi.input"]
        ended = Signal("the request's end")
        start_response("200 OK", PLAIN)

        def read() -> bytes:
            ended.wait()
            return bytes(stream.read())

        readers.append((in_thread(read), ended))
        return [b"answer"]

    application = wrap(app)
    assert LENIENT.run(application, make_environ("POST", body=b"x" * 100)).body == b"answer"
    reader, ended = readers[0]
    ended.set()
    with pytest.raises(ClientDisconnected):
        reader.result()


@MIDDLEWARE
def test_a_thread_reads_while_the_app_streams(wrap: Any, middleware: Any) -> None:
    """[W7], [W12], [C1] Both ways at once: the client sends on when it has what the app says to the piece before."""
    stream = Gated()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()

        def read() -> None:
            for _ in range(3):
                pieces.put(environ["wsgi.input"].read(5))

        reader = in_thread(read)
        start_response("200 OK", PLAIN)
        stream.asked.wait()
        yield b"ready"
        for _ in range(3):
            yield pieces.get(timeout=LIMIT)
        reader.result()

    def serve() -> list[bytes]:
        blocks = []
        with LENIENT.start(wrap(app, middleware), upload(stream, 15)) as exchange:
            for block in exchange:
                blocks.append(block)
                stream.pieces.put(b"piece")
        return blocks

    assert in_thread(serve).result() == [b"ready", b"piece", b"piece", b"piece"]


def test_the_servers_thread_reads_what_a_reader_leaves_behind(wrap: Any) -> None:
    """[A3], [C1] Middleware wants the body in the moment in which the app's reader has enough."""
    rest = Signal("the middleware has the rest")

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        yield run_in_thread(environ["wsgi.input"].read1, 4)
        rest.wait()
        yield b"end"

    @around
    async def reading(app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def read_rest() -> None:
            while (await receive())["more_body"]:
                pass
            rest.set()

        async with anyio.create_task_group() as group:

            async def receive_piece() -> Any:
                message = await receive()
                group.start_soon(read_rest)
                return message

            await app(scope, receive_piece, send)

    stream = FakeInput([b"some", b"more", b"last"], fills=False)
    exchange = in_thread(LENIENT.run, wrap(app, reading), upload(stream, 12)).result()
    assert exchange.body == b"someend"


def shouting_slowly(met: threading.Barrier | None = None) -> Any:
    """An ASGI app that waits for others like it, if it shall, and streams."""

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if met is not None:
            await anyio.to_thread.run_sync(met.wait)
        await respond(send, scope["path"].encode(), b";")

    return app


def test_the_parts_of_a_page_are_made_side_by_side(wrap: Any) -> None:
    """[A15], [C1], [C2] WSGI middleware asks an app inside for them in threads, as for edge side includes."""
    parts = AsgiToWsgi(shouting_slowly(threading.Barrier(4, timeout=LIMIT)))

    def page(environ: Any, start_response: Any) -> Iterable[bytes]:
        def ask(number: int) -> bytes:
            return LENIENT.run(parts, environ | {"PATH_INFO": f"/{number}"}).body

        start_response("200 OK", PLAIN)
        return [b"".join(run_in_threads(ask, 4, threads=4))]

    assert in_thread(LENIENT.run, wrap(page)).result().body == b"/0;/1;/2;/3;"


def test_middleware_beats_while_it_iterates_the_app_in_a_thread(wrap: Any) -> None:
    """[W12], [C1], [C2] What its thread waits for holds up none of its own blocks."""
    beaten = Signal("the client has a beat")

    @no_lifespan
    async def events(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await beaten.wait_async()
        await send({"type": "http.response.body", "body": b"last"})

    inner = AsgiToWsgi(events)

    def beating(environ: Any, start_response: Any) -> Iterable[bytes]:
        blocks: queue.SimpleQueue[bytes] = queue.SimpleQueue()

        def iterate() -> None:
            for block in inner(environ, start_response):
                blocks.put(block)

        iteration = in_thread(iterate)
        yield blocks.get(timeout=LIMIT)
        yield b"beat"
        yield blocks.get(timeout=LIMIT)
        iteration.result()

    def serve() -> list[bytes]:
        blocks = []
        with LENIENT.start(wrap(beating)) as exchange:
            for block in exchange:
                blocks.append(block)
                if block == b"beat":
                    beaten.set()
        return blocks

    assert in_thread(serve).result() == [b"first", b"beat", b"last"]


def test_a_part_that_outlives_the_page(wrap: Any, request: Any) -> None:
    """[A16], [C1], [C2] Shadow traffic by WSGI middleware: a shared loop goes on; a request's own ends with it."""
    may_go_on = Signal("the page is out")
    begun = Signal("the part is asked for")
    shadows = []

    @no_lifespan
    async def part(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await may_go_on.wait_async()
        await respond(send, b"part")

    inner = AsgiToWsgi(part)

    def page(environ: Any, start_response: Any) -> Iterable[bytes]:
        shadows.append(in_thread(LENIENT.run, inner, dict(environ)))
        begun.wait()
        start_response("200 OK", PLAIN)
        return [b"page"]

    application = wrap(page)
    assert in_thread(LENIENT.run, application).result().body == b"page"
    may_go_on.set()
    shadow = shadows[0].result()
    if request.node.callspec.params["wrap"] == "shared":
        assert shadow.body == b"part"
    else:
        assert isinstance(shadow.error, (ProtocolError, RuntimeError))


def test_a_server_closes_in_another_thread_while_the_app_is_at_work(wrap: Any) -> None:
    """[W13], [C1] It is closed once, by the thread that runs it, when its step is over."""
    works, may_end = Signal("the app is at work"), Signal("it may end")

    def blocks() -> Iterator[bytes]:
        yield b"one"
        works.set()
        may_end.wait()
        yield b"two"
        raise AssertionError("asked for more")

    site = Site(blocks())
    result = wrap(site)(make_environ(), lambda *args: lambda data: None)
    iterator = iter(result)
    assert next(iterator) == b"one"
    iteration = in_thread(list[bytes], iterator)
    works.wait()
    closing = in_thread(result.close)
    journal = site.journal
    may_end.set()
    closing.result()
    iteration.result()
    journal.wait_until(lambda: journal.count("close"))
    assert journal.count("close") == 1
    assert journal.entries[-1].thread == journal.entries[-2].thread != threading.get_ident()


# C1: async code of the app --------------------------------------------------------------------------------------------


def test_async_views_run_on_the_loop_of_the_middleware(wrap: Any) -> None:
    """[W20], [C1]"""
    loops = []

    async def view() -> bytes:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return b"async"

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        return [async_to_sync(view)()]

    @around
    async def noting(app: Any, scope: Any, receive: Any, send: Any) -> None:
        loops.append(asyncio.get_running_loop())
        await app(scope, receive, send)

    assert WsgiServer().run(wrap(app, noting)).body == b"async"
    assert loops[0] is loops[1]


def test_the_token_reaches_the_loop_of_the_middleware(wrap: Any) -> None:
    """[W20], [C1]"""

    async def view() -> bytes:
        await anyio.sleep(0)
        return b"async"

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        return [anyio.from_thread.run(view, token=environ["asgi.event_loop_token"])]

    assert WsgiServer().run(wrap(app)).body == b"async"


def test_while_the_app_blocks_tasks_of_the_middleware_go_on(wrap: Any) -> None:
    """[A5], [C1]"""
    ticked = Signal("tick")

    @around
    async def ticking(app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def tick() -> None:
            await anyio.sleep(0.01)
            ticked.set()

        async with anyio.create_task_group() as group:
            group.start_soon(tick)
            await app(scope, receive, send)

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        ticked.wait()
        start_response("200 OK", PLAIN)
        return [b"ticked"]

    assert WsgiServer().run(wrap(app, ticking)).body == b"ticked"


def test_a_thread_with_a_loop_is_lent_as_well() -> None:
    """[A15], [C1]"""
    site = Site([b"one", b"two"])

    async def main() -> bytes:
        with AsgiToWsgi(pass_on(WsgiToAsgi(site))) as application:
            return WsgiServer().run(application).body

    assert asyncio.run(main()) == b"onetwo"
    assert site.threads == {threading.get_ident()}


# C2: the server's own loop --------------------------------------------------------------------------------------------


def wsgi_around(app: Any) -> Any:
    """WSGI middleware that does nothing."""

    def middleware(environ: Any, start_response: Any) -> Any:
        return app(environ, start_response)

    return middleware


def by_a_generator(app: Any) -> Any:
    """WSGI middleware with an iterable of its own."""

    def middleware(environ: Any, start_response: Any) -> Any:
        result = app(environ, start_response)

        def blocks() -> Iterator[bytes]:
            try:
                yield from result
            finally:
                result.close()

        return blocks()

    return middleware


WSGI_MIDDLEWARE = pytest.mark.parametrize("middleware", [wsgi_around, by_a_generator])


def inside(app: Any, middleware: Callable[[Any], Any] = wsgi_around) -> WsgiToAsgi:
    """Make the composition of C2."""
    return WsgiToAsgi(middleware(AsgiToWsgi(app)))


async def respond(send: Any, *blocks: bytes, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    for number, block in enumerate(blocks, 1):
        await send({"type": "http.response.body", "body": block, "more_body": number < len(blocks)})


def no_lifespan(app: Any) -> Any:
    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await app(scope, receive, send)

    return wrapped


@WSGI_MIDDLEWARE
async def test_the_app_runs_on_the_servers_loop(middleware: Any) -> None:
    """[C2] Where what was made on that loop works: here an event that the server's side sets."""
    event = anyio.Event()
    seen = []

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((threading.get_ident(), anyio.lowlevel.current_token()))
        await event.wait()
        await respond(send, b"one", b"two")

    application = inside(app, middleware)
    async with AsgiServer().start(application) as exchange:
        await exchange.until(lambda: seen)
        event.set()
        await exchange.finish()
    assert exchange.body == b"onetwo"
    assert seen == [(threading.get_ident(), anyio.lowlevel.current_token())]
    assert not application_loops()
    await close(application)


def application_loops() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bridge-keeper")]


def has_sent(exchange: Any, length: int) -> bool:
    return bool(exchange.body_length == length)


async def close(application: WsgiToAsgi) -> None:
    await anyio.to_thread.run_sync(application.close)


async def test_state_and_what_asgi_middleware_has_put_into_the_scope_reach_the_app() -> None:
    """[C2]"""
    session: dict[str, int] = {}
    seen: dict[str, Any] = {}

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope)
        scope["state"]["after"] = 2
        scope["session"]["count"] = 1
        await respond(send, b"x")

    application = inside(app)
    scope = make_scope(path="/a/é", root_path="/a", state={"before": 1}, session=session)
    await AsgiServer().run(application, scope)
    assert scope["state"] == {"before": 1, "after": 2}
    assert seen["state"] is scope["state"]
    assert session == {"count": 1}
    assert {key: seen[key] for key in ("path", "root_path", "raw_path", "client", "server", "method")} == {
        key: scope[key] for key in ("path", "root_path", "raw_path", "client", "server", "method")
    }
    await close(application)


@WSGI_MIDDLEWARE
async def test_bodies_stream_both_ways_at_once(middleware: Any) -> None:
    """[C2], [A3], [A7], [W7], [W12]"""

    @no_lifespan
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        more = True
        while more:
            message = await receive()
            more = message["more_body"]
            await send({"type": "http.response.body", "body": message["body"], "more_body": more})

    application = inside(echo, middleware)
    async with AsgiServer().start(application, make_scope("POST"), []) as exchange:
        for number in range(1, 6):
            exchange.feed(b"piece %d" % number)
            await exchange.until(partial(has_sent, exchange, 7 * number))
        exchange.feed(b"", more_body=False)
    assert exchange.blocks == [b"piece %d" % number for number in range(1, 6)] + [b""]
    await close(application)


async def test_contextvars_of_both_sides_reach_the_app() -> None:
    """[A18], [W13], [C2]"""
    inner: contextvars.ContextVar[str] = contextvars.ContextVar("inner")
    seen = []

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([VARIABLE.get(), inner.get()])
        await respond(send, b"x")

    def setting(app: Any) -> Any:
        def middleware(environ: Any, start_response: Any) -> Any:
            inner.set("of the wsgi middleware")
            return app(environ, start_response)

        return middleware

    application = inside(app, setting)
    token = VARIABLE.set("of the server")
    await AsgiServer().run(application)
    VARIABLE.reset(token)
    assert seen == ["of the server", "of the wsgi middleware"]
    await close(application)


async def test_a_client_that_leaves_is_heard_by_the_app() -> None:
    """[W16], [A10], [C2]"""
    journal = Journal()

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        journal.note((await receive())["type"])
        with pytest.raises(OSError):  # noqa: PT011
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        journal.note("ended")

    application = inside(app)
    async with AsgiServer().start(application) as exchange:
        await exchange.until(lambda: exchange.body_length)
        exchange.disconnect()
        await journal.until(lambda: "ended" in journal.events)
    assert journal.events == ["http.disconnect", "ended"]
    await close(application)


async def test_an_app_that_ignores_the_leaving_is_cancelled() -> None:
    """[A10], [C2]"""
    journal = Journal()

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        try:
            await anyio.sleep_forever()
        finally:
            journal.note("cancelled")

    application = inside(app)
    async with AsgiServer().start(application) as exchange:
        await exchange.until(lambda: exchange.body_length)
        exchange.disconnect()
        await journal.until(lambda: "cancelled" in journal.events)
    await close(application)


@MIDDLEWARE
def test_a_body_without_end_that_nobody_gets_is_not_made(wrap: Any, middleware: Any) -> None:
    """[A10], [C1] The iterable is closed after its first block."""
    site = Site(itertools.repeat(b"block"))
    exchange = WsgiServer().run(wrap(site, middleware), make_environ("HEAD"))
    assert exchange.complete
    assert exchange.body == b""
    assert site.journal.events == ["call", "next", "close"]


async def test_a_stream_that_nobody_gets_is_a_whole_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """[A10], [C2] And its app hears soon that its client has left."""
    monkeypatch.setattr(bridge.asgi_to_wsgi, "GRACE_SECONDS", 0.05)
    journal = Journal()

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        except OSError:
            journal.note("ended")

    application = inside(app)
    exchange = await AsgiServer().run(application, make_scope(method="HEAD"))
    assert exchange.header(b"content-length") == b"1000"
    assert exchange.body == b""
    await journal.until(lambda: "ended" in journal.events)
    await close(application)


async def test_a_cancelled_request_ends_the_app() -> None:
    """[W16], [C2]"""
    journal = Journal()

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
            journal.note("waits")
            await receive()
            journal.note("heard")
        finally:
            journal.note("ended")

    application = inside(app)
    async with AsgiServer().start(application) as exchange:
        await journal.until(lambda: "waits" in journal.events)
        exchange.cancel()
        await journal.until(lambda: "ended" in journal.events)
    assert "heard" in journal.events
    await close(application)


async def test_errors_of_the_app_come_out_as_themselves() -> None:
    """[W15], [A9], [C2]"""

    @no_lifespan
    async def early(scope: Any, receive: Any, send: Any) -> None:
        raise AppError

    @no_lifespan
    async def late(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise AppError

    for app, messages in (early, 0), (late, 2):
        application = inside(app)
        exchange = AsgiServer().start(application)
        async with exchange:
            await exchange.finish()
            exchange.violations.clear()
        assert isinstance(exchange.error, AppError)
        assert len(exchange.messages) == messages
        await close(application)


async def test_a_path_goes_to_the_server_that_offers_it(tmp_path: Any) -> None:
    """[A12], [W18], [C2]"""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    offers = []

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        offers.append("http.response.pathsend" in scope["extensions"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"7")]})
        if offers[-1]:
            await send({"type": "http.response.pathsend", "path": str(path)})
        else:
            await send({"type": "http.response.body", "body": path.read_bytes()})

    application = inside(app)
    exchange = await AsgiServer().run(application, make_scope(extensions={"http.response.pathsend": {}}))
    assert [message["type"] for message in exchange.messages] == ["http.response.start", "http.response.pathsend"]
    assert (await AsgiServer().run(application)).body == b"content"
    assert offers == [True, False]
    await close(application)


async def test_early_hints_go_to_the_server_that_offers_them() -> None:
    """[A12], [W6], [C2]"""

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload", b"</b.css>; rel=preload"]})
        await respond(send, b"x")

    application = inside(app)
    exchange = await AsgiServer().run(application, make_scope(extensions={"http.response.early_hint": {}}))
    assert exchange.messages[0] == {
        "type": "http.response.early_hint",
        "links": [b"</a.css>; rel=preload", b"</b.css>; rel=preload"],
    }
    await close(application)


async def test_trailers_go_to_the_server_that_offers_them() -> None:
    """[A12], [C2]"""

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b"y"})
        await send({"type": "http.response.trailers", "headers": [(b"x-sum", b"2")], "more_trailers": True})
        await send({"type": "http.response.trailers", "headers": [(b"x-sum", b"3")]})

    application = inside(app, by_a_generator)
    exchange = await AsgiServer().run(application, make_scope(extensions={"http.response.trailers": {}}))
    assert exchange.body == b"xy"
    assert exchange.messages[0]["trailers"] is True
    assert exchange.messages[-1]["headers"] == [(b"x-sum", b"2"), (b"x-sum", b"3")]
    await close(application)


async def test_the_lifespan_of_the_app_runs_on_the_servers_loop() -> None:
    """[C2] It starts with the first request, and ends with the server's."""
    journal = Journal()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            scope["state"]["made"] = anyio.Event(), anyio.lowlevel.current_token()
            await send({"type": "lifespan.startup.complete"})
            journal.note("started")
            await receive()
            journal.note("stopped")
            await send({"type": "lifespan.shutdown.complete"})
        else:
            event, token = scope["state"]["made"]
            assert token == anyio.lowlevel.current_token()
            event.set()
            await event.wait()
            await respond(send, b"x")

    application = inside(app)
    async with AsgiServer().lifespan(application):
        assert journal.events == []
        for _ in range(2):
            assert (await AsgiServer().run(application)).body == b"x"
        assert journal.events == ["started"]
    assert journal.events == ["started", "stopped"]


@pytest.mark.parametrize("takes_part", [True, False])
async def test_the_shutdown_waits_for_background_work(takes_part: bool) -> None:
    """[A10], [W22], [C2] As a server waits for the app itself. What the work uses is closed behind it."""
    journal = Journal()
    allowed = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await respond(send, b"x")
            journal.note("works")
            await allowed.wait()
            journal.note("done")
            return
        if not takes_part:
            raise ValueError("no lifespan here")
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        journal.note("stopped")
        await send({"type": "lifespan.shutdown.complete"})

    application = inside(app)
    async with AsgiServer().lifespan(application) as server, anyio.create_task_group() as group:
        assert (await AsgiServer().run(application)).body == b"x"
        await server.until(lambda: "works" in journal.events)
        group.start_soon(server.shutdown)
        with anyio.move_on_after(5 * WAIT_SECONDS):
            await server.until(lambda: server.stopped is not None)
        assert server.stopped is None
        allowed.set()
    assert journal.events == ["works", "done", *(["stopped"] if takes_part else [])]


def test_the_lifespans_on_several_loops_end_each_with_its_own() -> None:
    """[C2] One application, served by two threads with a loop each."""
    journal = Journal()
    first_may_end, second_may_end = Signal("the first may end"), Signal("the second may end")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await respond(send, b"x")
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        journal.note("started")
        assert (await receive())["type"] == "lifespan.shutdown"
        journal.note("stopped")
        await send({"type": "lifespan.shutdown.complete"})

    application = inside(app)

    async def serve(may_end: Signal) -> None:
        async with AsgiServer().lifespan(application):
            assert (await AsgiServer().run(application)).body == b"x"
            await may_end.wait_async()

    first, second = [in_thread(asyncio.run, serve(may_end)) for may_end in (first_may_end, second_may_end)]
    journal.wait_until(lambda: len(journal.events) == 2)
    first_may_end.set()
    first.result()
    assert journal.events == ["started", "started", "stopped"]
    second_may_end.set()
    second.result()
    assert journal.events == ["started", "started", "stopped", "stopped"]


async def test_an_app_that_refuses_to_start_is_not_called() -> None:
    """[A19], [C2]"""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    application = inside(app)
    for _ in range(2):
        exchange = await AsgiServer().run(application)
        assert isinstance(exchange.error, LifespanFailure)
        assert "no database" in str(exchange.error)
    await close(application)


async def test_an_app_that_does_not_start_in_time_is_cancelled_and_asked_again() -> None:
    """[A19], [C2] It hangs once; those who came meanwhile need not wait as long again."""
    journal = Journal()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await respond(send, b"x")
            return
        await receive()
        if not journal.events:
            try:
                await anyio.sleep_forever()
            finally:
                journal.note("cancelled")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    application = WsgiToAsgi(wsgi_around(AsgiToWsgi(app, startup_timeout=0.2)))
    async with AsgiServer().lifespan(application):
        errors: list[Any] = []

        async def ask() -> None:
            errors.append((await AsgiServer().run(application)).error)

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(ask)
        late = [error for error in errors if error is not None]  # who came afterwards was served
        assert late
        assert all(isinstance(error, LifespanFailure) and "within 0.2 s" in str(error) for error in late)
        assert (await AsgiServer().run(application)).body == b"x"
        assert journal.events == ["cancelled"]


async def test_an_app_that_asks_itself_before_it_has_started() -> None:
    """[A19], [C2] An error, and no deadlock."""
    errors = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        await receive()
        errors.append((await AsgiServer().run(application)).error)
        await send({"type": "lifespan.startup.failed", "message": "as it should"})

    application = inside(app)
    assert isinstance((await AsgiServer().run(application)).error, LifespanFailure)
    assert isinstance(errors[0], RuntimeError)
    assert "before its startup was complete" in str(errors[0])
    await close(application)


def test_nothing_of_a_request_waits_for_the_garbage_collector() -> None:
    """[S2], [C1], [C2]"""

    def cycles() -> list[Any]:
        return [thing for thing in gc.get_objects() if type(thing).__name__ in ("_Cycle", "_LentCycle", "_GuestCycle")]

    site = Site([b"one", b"two"])
    with AsgiToWsgi(pass_on(WsgiToAsgi(by_a_generator(AsgiToWsgi(pass_on(WsgiToAsgi(site))))))) as application:
        gc.collect()
        gc.disable()
        try:
            result: Any = application(make_environ(), lambda *_: lambda _: None)  # the driver would hold itself
            assert b"".join(result) == b"onetwo"
            result.close()
            del result
            site.environ.clear()
            deadline = time.monotonic() + 10
            while cycles() and time.monotonic() < deadline:  # the middleware's task ends by itself
                time.sleep(0.01)
            assert cycles() == []
        finally:
            gc.enable()


# Any depth ------------------------------------------------------------------------------------------------------------


def test_four_deep_under_a_wsgi_server() -> None:
    """[C1], [C2] Still one thread and one loop."""
    site = Site([b"one", b"two", b"three"])
    with AsgiToWsgi(pass_on(WsgiToAsgi(by_a_generator(AsgiToWsgi(by_a_task(WsgiToAsgi(site))))))) as application:
        exchange = WsgiServer().run(application, make_environ() | {"REMOTE_USER": "me"})
        assert exchange.body == b"onetwothree"
        assert site.threads == {threading.get_ident()}
        assert site.environ["REMOTE_USER"] == "me"


def test_a_body_comes_four_deep() -> None:
    """[C1], [C2]"""
    stream = FakeInput([b"x" * 100_000, b"y" * 100_000], fills=False)

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        while block := environ["wsgi.input"].read(30_000):
            yield block

    with AsgiToWsgi(pass_on(WsgiToAsgi(by_a_generator(AsgiToWsgi(by_a_task(WsgiToAsgi(app))))))) as application:
        environ = make_environ("POST", body=stream, CONTENT_LENGTH="200000", CONTENT_TYPE="text/plain")
        assert WsgiServer().run(application, environ).body == b"x" * 100_000 + b"y" * 100_000
    assert stream.threads == {threading.get_ident()}


async def test_four_deep_under_an_asgi_server() -> None:
    """[C1], [C2] Still one worker and one loop."""
    seen = []

    @no_lifespan
    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(threading.get_ident())
        await respond(send, b"one", b"two")

    application = WsgiToAsgi(by_a_generator(AsgiToWsgi(pass_on(WsgiToAsgi(by_a_generator(AsgiToWsgi(app)))))))
    async with AsgiServer().lifespan(application):  # the inner WsgiToAsgi takes part
        before = threading.active_count()
        exchange = await AsgiServer().run(application)
        assert exchange.body == b"onetwo"
        assert seen == [threading.get_ident()]
        assert threading.active_count() <= before + 1


# The same messages as without any wrapper ----------------------------------------------------------------------------


PATTERN = bytes(range(251)) * 600


def made(sizes: list[int]) -> list[bytes]:
    """Pieces of these sizes. An example that shows the sizes can be read; one with the bytes is megabytes long."""
    return [PATTERN[:size] for size in sizes]


SIZES = st.lists(st.sampled_from([0, 1, 13, 5000, 70_000, 150_000]), max_size=6)
BODIES = st.lists(st.sampled_from([1, 100, 40_000, 80_000]), max_size=5)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["x-a", "x-b", "set-cookie", "etag", "vary"]),
        st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20),
    ),
    max_size=5,
)


class Script(NamedTuple):
    """What an app does: read so much of the body, answer by a status, headers and blocks, fail behind some of them."""

    status: int
    headers: list[tuple[str, str]]
    sizes: list[int]
    declares_length: bool
    reads: int  # bytes at once; 0 for none of it, -1 for all
    writes: int  # so many blocks go by write()
    fails_after: int | None

    @property
    def blocks(self) -> list[bytes]:
        return made(self.sizes)

    @property
    def all_headers(self) -> list[tuple[str, str]]:
        length = [("content-length", str(sum(map(len, self.blocks))))] if self.declares_length else []
        return [("content-type", "text/plain"), *self.headers, *length]


SCRIPTS = st.builds(
    Script,
    status=st.sampled_from([200, 201, 404, 500]),
    headers=HEADERS,
    sizes=SIZES,
    declares_length=st.booleans(),
    reads=st.sampled_from([-1, 0, 1000, 70_000]),
    writes=st.sampled_from([0, 0, 1, 2]),
    fails_after=st.none() | st.integers(0, 6),
)


def wsgi_app(script: Script, read: list[bytes]) -> Any:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        stream = environ["wsgi.input"]
        if script.reads:
            while data := stream.read(script.reads):
                read.append(data)
        write = start_response(f"{script.status} Because", script.all_headers)
        for block in script.blocks[: script.writes]:
            write(block)

        def blocks() -> Iterator[bytes]:
            for number, block in enumerate(script.blocks[script.writes :], script.writes):
                if number == script.fails_after:
                    raise AppError
                yield block

        return blocks()

    return app


def asgi_app(script: Script, read: list[bytes]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        more = bool(script.reads)
        while more:
            message = await receive()
            read.append(message["body"])
            more = message["more_body"]
        headers = [(name.encode(), value.encode()) for name, value in script.all_headers]
        await send({"type": "http.response.start", "status": script.status, "headers": headers})
        for number, block in enumerate(script.blocks):
            if number == script.fails_after:
                raise AppError
            if block:
                await send({"type": "http.response.body", "body": block, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def told_by_wsgi(app: Any, sizes: list[int]) -> tuple[Any, ...]:
    body = made(sizes)
    whole = b"".join(body)
    environ = make_environ("POST", body=FakeInput(body, fills=False), CONTENT_TYPE="text/plain")
    if whole:
        environ["CONTENT_LENGTH"] = str(len(whole))
    exchange = WsgiServer(validate=False).run(app, environ)
    # write() lets an empty block pass; of others the server sees each.
    blocks = [block for block in exchange.blocks if block]
    began = (int(exchange.status[:3]), sorted_names(exchange.headers)) if exchange.started else None
    return began, blocks, type(exchange.error or exchange.close_error)


def sorted_names(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in headers]


@given(script=SCRIPTS, body=BODIES, middleware=st.sampled_from([pass_on, by_a_task]))
@settings(max_examples=60)
def test_a_wsgi_server_sees_what_it_sees_of_the_naked_app(script: Script, body: list[int], middleware: Any) -> None:
    """[C1] Block by block."""
    read: list[bytes] = []
    naked = told_by_wsgi(wsgi_app(script, read), body)
    read_inside: list[bytes] = []
    with AsgiToWsgi(middleware(WsgiToAsgi(wsgi_app(script, read_inside))), lifespan="off") as application:
        inside = told_by_wsgi(application, body)
    assert b"".join(read_inside) == b"".join(read)
    if middleware is by_a_task and naked[2] is AppError:
        # It ends the response behind an error, which so may be too short, and raises it only then.
        assert (inside[1], inside[2] in (AppError, ProtocolError)) == (naked[1], True)
    elif naked[2] is AppError and not naked[1]:
        # Nothing was sent yet: the server that has not heard of a start can answer 500 by itself.
        assert inside[1:] == naked[1:]
    else:
        assert inside == naked


async def told_by_asgi(app: Any, sizes: list[int]) -> tuple[Any, ...]:
    body = made(sizes)
    whole = b"".join(body)
    length = [(b"content-length", b"%d" % len(whole))] if whole else []
    exchange = AsgiServer().start(app, make_scope("POST", headers=length), body or b"")
    async with exchange:
        await exchange.finish()
        exchange.violations.clear()  # a failing app returns too early
    started = [message for message in exchange.messages if message["type"] == "http.response.start"]
    began = [(message["status"], message["headers"]) for message in started]
    blocks = [block for block in exchange.blocks if block]
    # Whoever has all that was declared has the whole response, whether the app has said so or has failed by then.
    has_all = bool(blocks) and (b"content-length", b"%d" % sum(map(len, blocks))) in began[0][1]
    return began, blocks, type(exchange.error), exchange.complete or has_all


@given(script=SCRIPTS, body=BODIES, middleware=st.sampled_from([wsgi_around, by_a_generator]))
@settings(max_examples=30)
async def test_an_asgi_server_sees_what_it_sees_of_the_naked_app(
    script: Script, body: list[int], middleware: Any
) -> None:
    """[C2] Message by message, but for the empty one at the end."""
    read: list[bytes] = []
    naked = await told_by_asgi(asgi_app(script, read), body)
    read_inside: list[bytes] = []
    application = inside(asgi_app(script, read_inside), middleware)
    told = await told_by_asgi(application, body)
    await close(application)
    assert b"".join(read_inside) == b"".join(read)
    if naked[2] is AppError and not naked[1]:
        assert told[1:] == naked[1:]
    else:
        assert told == naked
