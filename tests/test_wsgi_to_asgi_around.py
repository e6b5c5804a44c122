"""WsgiToAsgi around the app: its thread and context, its errors, files, the loop inside of it, the other scopes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import pytest
import sniffio
from asgiref.sync import async_to_sync

from bridge import BridgeError, ProtocolError, WsgiToAsgi
from tests.drivers import AsgiServer, HttpExchange, Journal, Signal, make_scope
from tests.wsgi_apps import (
    PATHSEND,
    App,
    Body,
    Environ,
    StartResponse,
    answer,
    echo,
    hello,
    never,
    serve,
    settle,
)

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

# close(), threads and contexts ----------------------------------------------------------------------------------------

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

Middleware = Callable[[Any, Any, Any], Any]

ENDINGS: dict[str, Callable[[], Iterable[Any]]] = {
    "success": lambda: [b"a", b"b"],
    "error in iteration": lambda: raising(LookupError()),
    "bad block": lambda: [b"a", "b"],
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_close_is_called_once(ending: str) -> None:
    """[W13] However the response ends."""
    body = Body(ENDINGS[ending]())
    exchange = await serve(answer(body))
    assert body.closes == 1
    assert (exchange.error is None) is (ending == "success")


async def test_body_that_cannot_be_iterated_is_closed() -> None:
    """[W13] Never iterated, still closed."""

    class Closable:
        closes = 0

        def close(self) -> None:
            self.closes += 1

    body = Closable()
    assert isinstance((await serve(answer(body))).error, ProtocolError)  # type: ignore[arg-type]
    assert body.closes == 1


async def test_call_iteration_and_close_share_one_thread_and_context() -> None:
    """[W13] The context is a copy of the caller's; what the app sets is seen outside once it is done."""
    places: list[tuple[int, str]] = []
    after: list[str] = []

    def note(value: str) -> None:
        places.append((threading.get_ident(), variable.get()))
        variable.set(value)

    def blocks() -> Iterator[bytes]:
        note("iterated")
        yield b"a"
        note("iterated again")
        yield b"b"

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        note("called")
        start_response("200 OK", [])
        return Body(blocks(), functools.partial(note, "closed"))

    bridge = WsgiToAsgi(app)

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        variable.set("outside")
        await bridge(scope, receive, send)
        after.append(variable.get())

    await AsgiServer().run(middleware)
    assert len({thread for thread, _ in places}) == 1
    assert places[0][0] != threading.get_ident()
    assert [value for _, value in places] == ["outside", "called", "iterated", "iterated again"]
    assert after == ["closed"]


@pytest.mark.parametrize("fails", [False, True])
async def test_middleware_sees_what_the_app_has_set(fails: bool) -> None:
    """[W13] Also where the app failed: that is when a request's id is logged."""
    seen: list[str] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        variable.set("request 7")
        if fails:
            raise LookupError
        return hello(environ, start_response)

    bridge = WsgiToAsgi(app)

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        try:
            await bridge(scope, receive, send)
        finally:
            seen.append(variable.get())

    await AsgiServer().run(middleware)
    assert seen == ["request 7"]


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_leaks_into_a_request_begun_during_a_send(stream: bool) -> None:
    """[W13] Servers copy the context of a send() for the next request of the connection."""
    copies: list[contextvars.Context] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        variable.set("private")
        start_response("200 OK", [])
        return iter([b"a", b"b"]) if stream else [b"a"]

    bridge = WsgiToAsgi(app)

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def copying(message: Any) -> None:
            copies.append(contextvars.copy_context())
            await send(message)

        await bridge(scope, receive, copying)

    await AsgiServer().run(middleware)
    assert copies
    assert [copy.get(variable, "unset") for copy in copies] == ["unset"] * len(copies)


async def test_nothing_of_a_request_is_left_in_its_thread() -> None:
    """[W13] The next request in the same thread starts from its own caller's context."""
    seen: list[tuple[int, str]] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        seen.append((threading.get_ident(), variable.get()))
        variable.set("left")
        return hello(environ, start_response)

    bridge = WsgiToAsgi(app, threads=1)
    for _ in range(3):
        await AsgiServer().run(bridge)
    assert seen == [(seen[0][0], "unset")] * 3


async def test_request_dies_without_the_garbage_collector() -> None:
    """[S2] Neither the thread nor a cycle of references keeps what a request had."""
    import gc
    import weakref

    class Marker:
        pass

    markers: list[weakref.ref[Marker]] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        marker = environ["marker"] = Marker()
        markers.append(weakref.ref(marker))
        environ["wsgi.input"].read()
        return hello(environ, start_response)

    gc.collect()
    gc.disable()
    try:
        bridge = WsgiToAsgi(app)
        for body in (b"", b"abc"):
            await AsgiServer().run(bridge, None, body)
        with anyio.fail_after(5):
            while any(marker() for marker in markers):
                await anyio.sleep(0.001)
    finally:
        gc.enable()


# Errors ---------------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Iterator[bytes]:
    raise error
    yield b""


class Custom(BaseException):
    pass


ERRORS: list[type[BaseException]] = [
    Exception,
    OSError,
    MemoryError,
    Custom,
    SystemExit,
    KeyboardInterrupt,
    asyncio.CancelledError,
    GeneratorExit,
    StopIteration,
    StopAsyncIteration,
]
PLACES = ("call", "first block", "second block", "close")


def failing(error: BaseException, place: str) -> App:
    """An app that raises in some place."""

    class Blocks:
        """An iterator that is no generator, since that would make something else of a StopIteration."""

        def __init__(self) -> None:
            self.asked = 0

        def __iter__(self) -> Blocks:
            return self

        def __next__(self) -> bytes:
            self.asked += 1
            if place == "first block" or (place == "second block" and self.asked == 2):
                raise error
            if self.asked > 2:
                raise StopIteration
            return b"block"

        def close(self) -> None:
            if place == "close":
                raise error

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if place == "call":
            raise error
        start_response("200 OK", [])
        return Blocks()

    return app


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ERRORS)
async def test_error_of_the_app_reaches_the_server(kind: type[BaseException], place: str) -> None:
    """[W15] As itself; those that a coroutine cannot raise as the cause of a ProtocolError. Never a hang."""
    if kind is StopIteration and "block" in place:
        return  # that is how an iteration ends
    error = kind("of the app")
    exchange = await serve(failing(error, place))
    if kind in (asyncio.CancelledError, GeneratorExit, StopIteration, StopAsyncIteration):
        assert isinstance(exchange.error, ProtocolError)
        assert exchange.error.__cause__ is error
    else:
        assert exchange.error is error
    assert exchange.started is (place not in ("call", "first block"))
    assert exchange.complete is (place == "close")


@pytest.mark.parametrize("kind", [LookupError, OSError])
async def test_app_that_waits_fails_as_itself(kind: type[Exception]) -> None:
    """[W15] Also where a watch has begun: no exception group."""
    error = kind("late")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        time.sleep(0.1)
        raise error

    exchange = await serve(app)
    assert exchange.error is error


async def test_error_of_close_keeps_that_of_the_iteration() -> None:
    """[W15] As its context, as Python has it."""
    first, second = LookupError("first"), ValueError("second")

    def close() -> None:
        raise second

    exchange = await serve(answer(Body(raising(first), close)))
    assert exchange.error is second
    assert second.__context__ is first


class Interrupt(BaseException):
    """What only a server's own machinery raises."""


@pytest.mark.parametrize("kind", [LookupError, Interrupt, SystemExit])
@pytest.mark.parametrize("stream", [False, True])
async def test_error_of_send_reaches_the_server(kind: type[BaseException], stream: bool) -> None:
    """[W15][W16] As itself; the app is not asked for more, and close() is called."""
    error = kind("in send()")
    body = Body(iter([b"a", b"b", b"c"]) if stream else [b"a"])
    bridge = WsgiToAsgi(answer(body))

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def failing_send(message: Any) -> None:
            if message["type"] == "http.response.body":
                raise error
            await send(message)

        await bridge(scope, receive, failing_send)

    exchange = await AsgiServer().run(middleware)
    assert exchange.error is error
    await body.closed.wait_async()
    assert body.closes == 1


@pytest.mark.parametrize("kind", [LookupError, Interrupt, SystemExit, OSError])
@pytest.mark.parametrize("reads", [False, True])
async def test_error_of_receive_reaches_the_server(kind: type[BaseException], reads: bool) -> None:
    """[W15][W16] As itself, whether the host or a watch has called it; the app's next read or block ends it."""
    error = kind("in receive()")
    body = Body([])

    def blocks(environ: Environ) -> Iterator[bytes]:
        if reads:
            yield environ["wsgi.input"].read()
        for _ in range(5000):
            time.sleep(0.001)
            yield b"block"

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        body.blocks = blocks(environ)
        return body

    bridge = WsgiToAsgi(app)

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def failing_receive() -> Any:
            await anyio.lowlevel.checkpoint()
            raise error

        await bridge(scope, failing_receive, send)

    exchange = await AsgiServer().run(middleware)
    assert exchange.error is error
    await body.closed.wait_async()


async def test_receive_that_repeats_the_body_does_no_harm() -> None:
    """[W15] Middleware that has read a body often gives it again and again; the response goes on."""

    def blocks() -> Iterator[bytes]:
        for _ in range(3):
            time.sleep(0.05)
            yield b"block"

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        body = environ["wsgi.input"].read()
        start_response("200 OK", [])
        yield body
        yield from blocks()

    bridge = WsgiToAsgi(app)

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def again() -> Any:
            return {"type": "http.request", "body": b"same"}

        await bridge(scope, again, send)

    exchange = await AsgiServer().run(middleware)
    assert (exchange.error, exchange.body) == (None, b"sameblockblockblock")


async def test_receive_of_an_unknown_message_is_an_error() -> None:
    """[W15][S1] It names what came."""
    bridge = WsgiToAsgi(echo)

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def strange() -> Any:
            return {"type": "http.nonsense"}

        await bridge(scope, strange, send)

    exchange = await AsgiServer().run(middleware, make_scope("POST"))
    assert isinstance(exchange.error, ProtocolError)
    assert "'http.nonsense'" in str(exchange.error)


@pytest.mark.parametrize("raises", [False, True])
async def test_too_long_a_body_is_cut_off_by_an_error(raises: bool) -> None:
    """[W14] Not one byte more than declared."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Length", "3")])
        yield b"ab"
        yield b"c" if raises else b"cd"
        yield b"e"

    exchange = await serve(app)
    assert isinstance(exchange.error, ProtocolError)
    assert exchange.body == (b"abc" if raises else b"ab")


async def test_too_short_a_body_aborts_the_response() -> None:
    """[W14] The client can tell that something is missing."""
    exchange = await serve(answer(iter([b"ab"]), headers=[("Content-Length", "3")]))
    assert isinstance(exchange.error, ProtocolError)
    assert "2 bytes, Content-Length is 3" in str(exchange.error)
    assert (exchange.body, exchange.complete) == (b"ab", False)


# Files ----------------------------------------------------------------------------------------------------------------


def download(path: Path, headers: list[tuple[str, str]], position: int = 0) -> tuple[App, list[Any]]:
    files: list[Any] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", headers)
        file = path.open("rb")  # closed by the wrapper
        file.seek(position)
        files.append(file)
        wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](file, 8192)
        return wrapped

    return app, files


@pytest.mark.parametrize(
    ("offered", "position", "length", "by_path"),
    [
        (True, 0, None, True),
        (True, 0, 1_000_000, True),
        (False, 0, None, False),
        (True, 10, None, False),
        (True, 10, 999_990, False),
    ],
)
async def test_file_goes_by_path_or_in_big_blocks(
    tmp_path: Path, offered: bool, position: int, length: int | None, by_path: bool
) -> None:
    """[W18] By path only a whole file where the server offers it; it is closed once, after it was sent."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(250)) * 4000)
    headers = [] if length is None else [("Content-Length", str(length))]
    app, files = download(path, headers, position)
    closed: list[bool] = []
    bridge = WsgiToAsgi(app)

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def looking(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.pathsend":
                await anyio.sleep(0.05)
                closed.append(files[0].closed)

        await bridge(scope, receive, looking)

    exchange = await AsgiServer().run(middleware, make_scope(extensions=PATHSEND if offered else {}))
    assert exchange.error is None
    assert exchange.body == path.read_bytes()[position:]
    assert closed == [False] * by_path
    assert files[0].closed
    if not by_path:
        assert len(exchange.blocks) < 8


@pytest.mark.parametrize("length", [999_999, 1_000_001])
async def test_file_of_another_length_than_declared_is_an_error(tmp_path: Path, length: int) -> None:
    """[W18][W14] It does not go by path, and the response is aborted."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1_000_000))
    app, files = download(path, [("Content-Length", str(length))])
    exchange = await serve(app, make_scope(extensions=PATHSEND))
    assert isinstance(exchange.error, ProtocolError)
    assert not exchange.complete
    assert files[0].closed


async def test_any_file_like_is_streamed() -> None:
    """[W18] It needs no more than read()."""

    class FileLike:
        def __init__(self) -> None:
            self.left = 3

        def read(self, size: int) -> bytes:
            self.left -= 1
            return b"block" if self.left >= 0 else b""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](FileLike())
        return wrapped

    exchange = await serve(app, make_scope(extensions=PATHSEND))
    assert exchange.body == b"block" * 3


async def test_head_of_a_file_sends_no_path(tmp_path: Path) -> None:
    """[W18] A response without a body has no file."""
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    app, files = download(path, [("Content-Length", "3")])
    exchange = await serve(app, make_scope("HEAD", extensions=PATHSEND))
    assert (exchange.error, exchange.body, files[0].closed) == (None, b"", True)


# The loop inside of the app -------------------------------------------------------------------------------------------


async def current_loop() -> object:
    return anyio.lowlevel.current_token().native_token


async def test_async_to_sync_runs_on_the_servers_loop() -> None:
    """[W20] Under asyncio; a Lock of the loop can be shared."""
    if sniffio.current_async_library() != "asyncio":
        pytest.skip("asgiref knows asyncio alone")
    lock = asyncio.Lock()
    loops: list[object] = []

    async def locked() -> None:
        async with lock:
            loops.append(asyncio.get_running_loop())

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        async_to_sync(locked)()
        return hello(environ, start_response)

    await lock.acquire()
    async with AsgiServer().start(WsgiToAsgi(app)) as exchange:
        await settle()
        assert not loops
        lock.release()
    assert exchange.error is None
    assert loops == [asyncio.get_running_loop()]


async def test_flask_async_view_runs_on_the_servers_loop() -> None:
    """[W20] Flask's `async def` views go through asgiref."""
    if sniffio.current_async_library() != "asyncio":
        pytest.skip("asgiref knows asyncio alone")
    flask = pytest.importorskip("flask")
    site = flask.Flask(__name__)
    lock = asyncio.Lock()
    loops: list[object] = []

    @site.route("/", methods=["GET", "POST"])  # type: ignore[untyped-decorator]
    async def view() -> str:
        async with lock:
            await asyncio.sleep(0)
            loops.append(asyncio.get_running_loop())
        return f"hello {flask.request.get_data(as_text=True)}"

    exchange = await serve(site, None, b"you")
    assert (exchange.error, exchange.body) == (None, b"hello you")
    assert loops == [asyncio.get_running_loop()]


async def test_flask_async_views_share_what_the_lifespan_has_made() -> None:
    """[W20] [W22] An asyncio.Lock, and one httpx.AsyncClient, of which each request finds the same open connection."""
    if sniffio.current_async_library() != "asyncio":
        pytest.skip("asgiref knows asyncio alone")
    flask, httpx = pytest.importorskip("flask"), pytest.importorskip("httpx")
    site = flask.Flask(__name__)
    connections: list[object] = []

    async def serve_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while await reader.readline():
            while await reader.readline() != b"\r\n":
                pass
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nbehind")
        writer.close()

    @site.route("/")  # type: ignore[untyped-decorator]
    async def view() -> Any:
        state = flask.request.environ["asgi.scope"]["state"]
        async with state["lock"]:
            return (await state["client"].get(state["url"])).content

    @contextlib.asynccontextmanager
    async def lifespan(_: object) -> Any:
        server = await asyncio.start_server(serve_connection, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with server, httpx.AsyncClient(trust_env=False) as client:
            yield {"lock": asyncio.Lock(), "client": client, "url": f"http://{host}:{port}/"}

    bridge = WsgiToAsgi(site, lifespan=lifespan)
    exchanges: list[HttpExchange] = []

    async def request(state: dict[str, Any]) -> None:
        exchanges.append(await AsgiServer().run(bridge, make_scope(state=dict(state))))

    async with AsgiServer().lifespan(bridge) as server, anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(request, server.state)
    assert [(exchange.error, exchange.body) for exchange in exchanges] == [(None, b"behind")] * 8
    assert len(connections) == 1


@pytest.mark.parametrize("count", [4, 40])
async def test_async_code_reads_in_the_loop_what_is_left_of_a_body_of_any_size(count: int) -> None:
    """[W20][W8] Nothing can be waited for in the loop itself, so the body is there before."""
    if sniffio.current_async_library() != "asyncio":
        pytest.skip("asgiref knows asyncio alone")
    size = 200_000
    read: list[int] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        async def read_all() -> None:
            while data := environ["wsgi.input"].read(1000):
                read.append(len(data))

        read.append(len(environ["wsgi.input"].read(10)))
        async_to_sync(read_all)()
        return hello(environ, start_response)

    exchange = await serve(app, make_scope("POST"), [bytes(size)] * count)
    assert exchange.error is None
    assert sum(read) == size * count


async def test_token_leads_to_the_servers_loop() -> None:
    """[W20] anyio.from_thread.run, on any loop."""
    loops: list[object] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        loops.append(anyio.from_thread.run(current_loop, token=environ["asgi.event_loop_token"]))
        return hello(environ, start_response)

    exchange = await serve(app)
    assert exchange.error is None
    assert loops == [await current_loop()]


@pytest.mark.parametrize("library", ["asyncio", "trio"])
async def test_app_may_run_a_loop_of_its_own(library: str) -> None:
    """[W13] [W20] No context variable says that one runs in the app's thread; the caller's stays as it is."""
    before = sniffio.current_async_library()

    async def own() -> str:
        await anyio.sleep(0)
        return sniffio.current_async_library()

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return [anyio.run(own, backend=library).encode()]

    bridge = WsgiToAsgi(app)
    after: list[str] = []

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        await bridge(scope, receive, send)
        after.append(sniffio.current_async_library())

    exchange = await AsgiServer().run(middleware)
    assert (exchange.error, exchange.body, after) == (None, library.encode(), [before])


def test_async_to_sync_under_trio_takes_no_other_servers_loop() -> None:
    """[W20] A thread that has served asyncio before makes a loop of its own for asgiref then."""
    loops: list[object] = []

    async def note() -> None:
        loops.append(asyncio.get_running_loop())

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        async_to_sync(note)()
        return hello(environ, start_response)

    bridge = WsgiToAsgi(app, threads=1)

    async def main() -> None:
        await AsgiServer().run(bridge)
        # The asyncio loop runs on, in its thread, while trio's serves a request.
        await anyio.to_thread.run_sync(
            functools.partial(anyio.run, functools.partial(AsgiServer().run, bridge), backend="trio")
        )

    anyio.run(main)
    assert len(loops) == 2
    assert loops[0] is not loops[1]


# The other scopes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extensions", [{}, {"websocket.http.response": {}}])
async def test_websocket_is_refused(extensions: dict[str, Any]) -> None:
    """[W21] By a close before it was accepted."""
    scope = make_scope(type="websocket", scheme="ws", subprotocols=[], extensions=extensions, drop=["method"])
    exchange = await AsgiServer().websocket(WsgiToAsgi(never), scope)
    assert (exchange.error, exchange.refused) == (None, True)
    assert [message["type"] for message in exchange.messages] == ["websocket.close"]


async def test_unknown_scope_type_is_named() -> None:
    """[W21][S1] ValueError, and a BridgeError too."""
    exchange = AsgiServer().start(WsgiToAsgi(never), make_scope(type="telepathy"))
    async with exchange:
        await exchange.finish()
    assert isinstance(exchange.error, ValueError)
    assert isinstance(exchange.error, BridgeError)
    assert "'telepathy'" in str(exchange.error)


async def test_lifespan_is_answered() -> None:
    """[W22] Also without an own one."""
    async with AsgiServer().lifespan(WsgiToAsgi(hello)) as lifespan:
        assert lifespan.started == {"type": "lifespan.startup.complete"}
    assert lifespan.stopped == {"type": "lifespan.shutdown.complete"}
    assert lifespan.error is None


def lifespan_of(journal: Journal, value: Any, failing: str = "") -> Callable[[Any], AbstractAsyncContextManager[Any]]:
    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> Any:
        journal.note("enter", app)
        if failing == "startup":
            raise LookupError("no database")
        yield value
        journal.note("leave")
        if failing == "shutdown":
            raise LookupError("no database")

    return lifespan


@pytest.mark.parametrize("offers_state", [True, False])
async def test_state_of_the_lifespan_reaches_the_app(offers_state: bool) -> None:
    """[W22] Also where the server carries none; each request has its own copy."""
    journal = Journal()
    states: list[dict[str, Any]] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        state = environ["asgi.scope"]["state"]
        states.append(dict(state))
        state["mine"] = True
        return hello(environ, start_response)

    bridge = WsgiToAsgi(app, lifespan=lifespan_of(journal, {"pool": 7}))
    scopes = AsgiServer().lifespan(bridge)
    if not offers_state:
        del scopes.scope["state"]
    async with scopes as lifespan:
        for _ in range(2):
            state = {"state": dict(lifespan.state)} if offers_state else {}
            scope = make_scope(drop=["state"]) | state
            await AsgiServer().run(bridge, scope)
        assert journal.events == ["enter"]
    assert states == [{"pool": 7}] * 2
    assert journal.events == ["enter", "leave"]
    assert journal.entries[0].detail is bridge


async def test_lifespan_may_give_no_state() -> None:
    """[W22] As Starlette's may."""
    async with AsgiServer().lifespan(WsgiToAsgi(hello, lifespan=lifespan_of(Journal(), None))) as lifespan:
        assert (lifespan.started, lifespan.state) == ({"type": "lifespan.startup.complete"}, {})


@pytest.mark.parametrize("step", ["startup", "shutdown"])
async def test_failing_lifespan_is_told(step: str) -> None:
    """[W22] With its traceback, and the error itself."""
    bridge = WsgiToAsgi(hello, lifespan=lifespan_of(Journal(), None, step))
    async with AsgiServer().lifespan(bridge) as lifespan:
        pass
    told = lifespan.started if step == "startup" else lifespan.stopped
    assert told is not None
    assert told["type"] == f"lifespan.{step}.failed"
    assert "no database" in told["message"]
    assert isinstance(lifespan.error, LookupError)


async def test_shutdown_waits_for_requests_in_flight() -> None:
    """[W22] What the lifespan has made is there until they are done; then the threads are gone."""
    journal = Journal()
    entered, finish = Signal("in the app"), Signal("finish")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        entered.set()
        finish.wait()
        journal.note("served")
        return hello(environ, start_response)

    bridge = WsgiToAsgi(app, lifespan=lifespan_of(journal, None))
    async with AsgiServer().lifespan(bridge) as lifespan, AsgiServer().start(bridge) as exchange:
        await entered.wait_async()
        async with anyio.create_task_group() as group:
            group.start_soon(lifespan.shutdown)
            await settle()
            assert journal.events == ["enter"]
            finish.set()
        await exchange.finish()
    assert journal.events == ["enter", "served", "leave"]
    assert exchange.body == b"hello"
    assert bridge._workers.alive == 0


# Calling --------------------------------------------------------------------------------------------------------------


async def test_wrapper_can_be_called_by_keyword() -> None:
    """[W1] daphne does so."""
    bridge = WsgiToAsgi(hello)

    async def by_keyword(scope: Any, receive: Any, send: Any) -> None:
        await bridge(scope=scope, receive=receive, send=send)

    assert (await AsgiServer().run(by_keyword)).body == b"hello"


@pytest.mark.parametrize("app", [None, "app", 7])
def test_what_is_no_app_is_refused(app: Any) -> None:
    """[S1] At once, with what came."""
    with pytest.raises(TypeError, match=repr(app)):
        WsgiToAsgi(app)


def test_constructor_starts_nothing() -> None:
    """[S2] Neither thread nor loop."""
    before = threading.active_count()
    bridge = WsgiToAsgi(hello)
    assert (threading.active_count(), bridge._workers.alive) == (before, 0)
