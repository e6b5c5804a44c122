"""WsgiToAsgi, one request at a time: every promise about environ, body, response, errors and the other scopes."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from wsgiref.validate import validator

import anyio
import anyio.from_thread
import pytest
import sniffio
from asgiref.sync import async_to_sync

from bridge import BridgeError, ClientDisconnected, ProtocolError, WsgiToAsgi
from tests.drivers import AsgiServer, HttpExchange, Journal, Message, Piece, Signal, http_request, make_scope

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path
    from types import TracebackType

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], object]]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

GONE: Message = {"type": "http.disconnect"}
EXPECT = [(b"expect", b"100-continue"), (b"content-length", b"5")]
PATHSEND = {"http.response.pathsend": {}}


class Body:
    """What an app returns: blocks, of which the closes are counted."""

    def __init__(self, blocks: Iterable[Any], on_close: Callable[[], object] = lambda: None) -> None:
        self.blocks = iter(blocks)
        self.on_close = on_close
        self.closes = 0
        self.closed = Signal("close()")

    def __iter__(self) -> Iterator[Any]:
        return self.blocks

    def close(self) -> None:
        self.closes += 1
        self.closed.set()
        self.on_close()


def answer(body: Iterable[Any], status: str = "200 OK", headers: Iterable[tuple[str, str]] = ()) -> App:
    """An app that answers always the same."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, list(headers))
        return body

    return app


def hello(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"hello"]


def echo(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


async def serve(
    app: App, scope: dict[str, Any] | None = None, body: bytes | Iterable[Piece] = b"", **server: bool
) -> HttpExchange:
    bridge = WsgiToAsgi(app)  # type: ignore[arg-type]
    exchange = await AsgiServer(**server).run(bridge, scope, body)
    assert bridge._workers.stop(5)  # the thread is free, whatever has happened
    return exchange


def poll(probe: Callable[[], object], timeout: float = 5.0) -> None:
    """Wait, in an app's thread, for what no one signals."""
    deadline = time.monotonic() + timeout
    while not probe():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.001)


async def settle() -> None:
    """Let every task that can go on do so, and be slow enough that a watch on the client has begun."""
    await anyio.sleep(0.1)


# environ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"a=1\nb=2"])
async def test_environ_and_calls_are_clean_under_the_validator(body: bytes) -> None:
    """[W1] wsgiref.validate finds nothing; the environ is an exact dict."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        assert type(environ) is dict
        data = b"".join(iter(functools.partial(environ["wsgi.input"].read, 3), b""))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [data or b"none"]

    exchange = await serve(validator(app), None, body)  # type: ignore[arg-type]
    assert (exchange.error, exchange.body) == (None, body or b"none")


OPTIONAL = "scheme root_path query_string headers server client raw_path extensions state http_version".split()


@pytest.mark.parametrize(
    "scope",
    [
        *(make_scope(drop=[key]) for key in OPTIONAL),
        make_scope(drop=OPTIONAL),
        make_scope(client=["192.0.2.7", "54321"], server=["testserver", "8000"]),
        make_scope(server=("/run/socket", None), client=None),
    ],
)
async def test_optional_scope_keys_may_be_missing(scope: dict[str, Any]) -> None:
    """[W1] A request without them is served like any other."""
    exchange = await serve(validator(hello), scope)  # type: ignore[arg-type]
    assert (exchange.status, exchange.body) == (200, b"hello")


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ([(b"content-length", b"3"), (b"content-length", b"4")], b"Content-Length"),
        ([(b"content-length", b"+3")], b"Content-Length"),
        ([(b"content-length", b"3_0")], b"Content-Length"),
    ],
)
async def test_content_length_that_makes_no_sense_is_400(headers: list[tuple[bytes, bytes]], why: bytes) -> None:
    """[W4] The app is not called."""
    exchange = await serve(pytest.fail, make_scope("POST", headers=headers), b"abc")
    assert exchange.status == 400
    assert why in exchange.body


async def test_environ_has_what_the_server_offers() -> None:
    """[W6] Each key is there, early hints only where they are on offer."""
    seen: list[Environ] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(environ)
        if "wsgi.early_hints" in environ:
            environ["wsgi.early_hints"]([("Link", "</style.css>; rel=preload"), ("X-Not", "a link")])
        return hello(environ, start_response)

    scope = make_scope()
    await serve(app, scope)
    hinting = await serve(app, make_scope(extensions={"http.response.early_hint": {}}))

    assert seen[0]["asgi.scope"] is scope
    assert (seen[0]["wsgi.multithread"], seen[0]["wsgi.input_terminated"]) == (True, True)
    assert seen[0]["wsgi.errors"] is sys.stderr
    assert seen[0]["waitress.client_disconnected"]() is False
    assert callable(seen[0]["wsgi.file_wrapper"])
    assert ["wsgi.early_hints" in environ for environ in seen] == [False, True]
    assert hinting.messages[0] == {"type": "http.response.early_hint", "links": [b"</style.css>; rel=preload"]}
    assert hinting.body == b"hello"


# The request's body ---------------------------------------------------------------------------------------------------


async def test_app_starts_before_the_body_is_complete() -> None:
    """[W7] The first bytes can be read while the client still sends."""
    read = Signal("first piece read")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        first = environ["wsgi.input"].read(3)
        read.set()
        start_response("200 OK", [])
        return [first, environ["wsgi.input"].read()]

    exchange = await serve(app, None, [b"abc", read, b"def"])
    assert exchange.blocks[:2] == [b"abc", b"def"]


@pytest.mark.parametrize("length", [True, False])
async def test_upload_is_received_only_a_bit_ahead_of_the_reads(length: bool) -> None:
    """[W7] An upload of 16 MiB lies here by a few pieces at most, whatever pauses the app makes."""
    piece, count = bytes(32 * 1024), 512
    drawn = got = most = 0
    paused = Signal("the app has read a bit")
    resume = Signal("go on reading")

    def pieces() -> Iterator[bytes]:
        nonlocal drawn, most
        for _ in range(count):
            drawn += len(piece)
            most = max(most, drawn - got)
            yield piece

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        nonlocal got
        while data := environ["wsgi.input"].read(10_000):
            got += len(data)
            if got > 200_000 and not paused.is_set():
                paused.set()
                resume.wait()
        start_response("200 OK", [])
        return [b"%d" % got]

    headers = [(b"content-length", b"%d" % (count * len(piece)))] if length else []
    async with AsgiServer(keep=False).start(
        WsgiToAsgi(app), make_scope("POST", headers=headers), pieces()
    ) as exchange:
        await paused.wait_async()
        await settle()
        resume.set()
    assert got == count * len(piece)
    assert most < 256 * 1024
    assert exchange.body_length == len(str(got))


@pytest.mark.parametrize("way", ["short", "streaming", "slow", "hints", "empty"])
async def test_answer_without_reading_asks_for_no_body(way: str) -> None:
    """[W7] Under `Expect: 100-continue`, nothing is received before the response has started."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if way == "slow":
            time.sleep(0.15)
        if way == "hints":
            environ["wsgi.early_hints"]([("Link", "</style.css>")])
            time.sleep(0.15)
        start_response("413 Content Too Large", [])
        yield from {"streaming": [b"no", b"!"], "empty": []}.get(way, [b"no"])

    scope = make_scope("POST", headers=EXPECT, extensions={"http.response.early_hint": {}})
    exchange = await serve(app, scope, [Signal("a body that never comes")])
    events = exchange.journal.events
    starts = [entry for entry in exchange.journal.entries if entry.event == "send" and "status" in entry.detail]
    assert exchange.status == 413
    assert not exchange.continued
    assert "receive" not in events[: exchange.journal.entries.index(starts[0])]


@pytest.mark.parametrize("pause", [0, 0.15])
async def test_reading_asks_the_client_to_go_on(pause: float) -> None:
    """[W7] `100 Continue` is sent by the first read, not before."""
    order: list[bool] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        time.sleep(pause)
        order.append(exchange.continued)
        return echo(environ, start_response)

    exchange = AsgiServer().start(WsgiToAsgi(app), make_scope("POST", headers=EXPECT), b"hello")
    async with exchange:
        await exchange.finish()
    assert (order, exchange.continued, exchange.body) == ([False], True, b"hello")


READS: list[tuple[str, Callable[[Any], Any]]] = [
    ("read", lambda stream: stream.read()),
    ("read -1", lambda stream: stream.read(-1)),
    ("read some", lambda stream: [stream.read(4), stream.read(0), stream.read(100), stream.read(1), stream.read()]),
    ("readline", lambda stream: [stream.readline() for _ in range(6)]),
    ("readline some", lambda stream: [stream.readline(2), stream.readline(100), stream.readline(0)]),
    ("readlines", lambda stream: stream.readlines()),
    ("readlines hint", lambda stream: stream.readlines(5)),
    ("iteration", list),
]


@pytest.mark.parametrize("read", [read for _, read in READS], ids=[name for name, _ in READS])
@pytest.mark.parametrize("pieces", [[], [b"one\ntwo\nthree"], [b"o", b"ne\nt", b"wo\n", b"three"], [b"one\n", b""]])
async def test_reads_are_those_of_a_file(read: Callable[[Any], Any], pieces: list[bytes]) -> None:
    """[W8] Every way of reading, past the end too, gives what io.BytesIO gives."""
    results = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        results.append(read(environ["wsgi.input"]))
        return hello(environ, start_response)

    exchange = await serve(app, make_scope("POST"), [*pieces] or b"")
    assert exchange.error is None
    assert results == [read(io.BytesIO(b"".join(pieces)))]


BROKEN: list[tuple[str, list[tuple[bytes, bytes]], list[Piece]]] = [
    ("at once", [(b"content-length", b"9")], [GONE]),
    ("in the middle", [(b"content-length", b"9")], [http_request(b"ab"), http_request(b"c"), GONE]),
    ("chunked", [], [http_request(b"abc"), GONE]),
    ("short", [(b"content-length", b"9")], [b"ab", b"c"]),
]


@pytest.mark.parametrize(("headers", "pieces"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
@pytest.mark.parametrize("read", [read for _, read in READS[:1] + READS[3:4] + READS[-1:]])
async def test_body_that_breaks_off_is_an_error(
    headers: list[tuple[bytes, bytes]], pieces: list[Piece], read: Callable[[Any], Any]
) -> None:
    """[W9] A read that wants more than came raises ClientDisconnected, and so does each one after it."""
    errors: list[type[BaseException]] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        for _ in range(2):
            try:
                read(environ["wsgi.input"])
            except ConnectionError as error:
                errors.append(type(error))
        start_response("400 Bad Request", [])
        return [b"broken"]

    exchange = await serve(app, make_scope("POST", headers=headers), [*pieces])
    assert errors == [ClientDisconnected] * 2
    assert exchange.error is None


async def test_bytes_before_the_break_can_be_read() -> None:
    """[W9] What came is not lost."""
    got: list[bytes] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        got.append(environ["wsgi.input"].read(3))
        with pytest.raises(ClientDisconnected):
            environ["wsgi.input"].read(3)
        return hello(environ, start_response)

    await serve(app, make_scope("POST", headers=[(b"content-length", b"9")]), [http_request(b"abcd"), GONE])
    assert got == [b"abc"]


async def test_short_body_can_still_be_answered() -> None:
    """[W9] A body shorter than its length is no sign that the client has left: it gets the app's answer."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        with pytest.raises(ClientDisconnected):
            environ["wsgi.input"].read()
        start_response("400 Bad Request", [])
        return [b"broken"]

    exchange = await serve(app, make_scope("POST", headers=[(b"content-length", b"9")]), [b"abc"])
    assert (exchange.status, exchange.body) == (400, b"broken")


async def test_unhandled_break_of_a_body_is_no_error_of_the_app() -> None:
    """[W9] The client has left, and the server's log stays quiet."""
    exchange = await serve(echo, make_scope("POST", headers=[(b"content-length", b"9")]), [http_request(b"abc"), GONE])
    assert (exchange.error, exchange.messages) == (None, [])


# start_response and the order of a response ---------------------------------------------------------------------------


def raising(error: BaseException) -> Iterator[bytes]:
    raise error
    yield b""


MALFORMED: dict[str, App] = {
    "no start": lambda environ, start_response: [b"block"],
    "no start, no block": lambda environ, start_response: [],
    "two starts": lambda environ, start_response: (start_response("200 OK", []), start_response("200 OK", []))[:0],
    **{
        f"status {status!r}": answer([b"x"], status)
        for status in ("", "20", "2000 OK", "OK", " 200 OK", "200OK", "200 O\nK", "200 O\rK", "200 O\0K", "1e2 OK")
    },
    **{f"status {status!r}": answer([b"x"], status) for status in (b"200 OK", 200, None)},  # type: ignore[arg-type]
    **{
        f"header {header!r}": answer([b"x"], headers=[header])
        for header in (
            ("X", "a\r\nB: c"), ("X", "a\nb"), ("X", "a\rb"), ("X", "a\0b"), ("X\n", "a"), ("X:", "a"), ("X Y", "a"),
            ("", "a"), ("Ü", "a"), ("X", "\u20ac"), ("X", b"a"), (b"X", "a"), ("X", 1), ("X", None), ("X",),
            ("X", "a", "b"), "X", None, ("Content-Length", "-1"), ("Content-Length", "many"),
        )
    },  # fmt: skip
    "headers None": lambda environ, start_response: (start_response("200 OK", None), [b"x"])[1],
    "headers tuple": lambda environ, start_response: (start_response("200 OK", (("X", "a"),)), [b"x"])[1],
    "two lengths": answer([b"x"], headers=[("Content-Length", "1"), ("Content-Length", "2")]),
    "str block": answer(["text"]),
    "None block": answer([None]),
    "int block": answer([1]),
    "str body": answer("text"),
    "bytes body": answer(b"text"),
    "None body": answer(None),  # type: ignore[arg-type]
    "int body": answer(1),  # type: ignore[arg-type]
    "too long": answer([b"abc"], headers=[("Content-Length", "2")]),
    "too short": answer([b"a"], headers=[("Content-Length", "2")]),
    "nothing of it": answer([], headers=[("Content-Length", "2")]),
    "write of text": lambda environ, start_response: start_response("200 OK", [])("text") and [],  # type: ignore
}


@pytest.mark.parametrize("app", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_response_is_an_error_and_nothing_is_sent(app: App) -> None:
    """[W10][W14] Neither a part of it, nor what a client could take for a second response."""
    exchange = await serve(app)
    assert isinstance(exchange.error, ProtocolError)
    assert exchange.messages == []


@pytest.mark.parametrize(("status", "code"), [("200", 200), ("200 ", 200), ("404 Not Found", 404), ("299 Ünusual", 299)])
async def test_status_needs_no_reason(status: str, code: int) -> None:
    """[W10] Three digits alone are a status."""
    assert (await serve(answer([b"x"], status))).status == code


def exc_info() -> tuple[type[BaseException], BaseException, TracebackType]:
    try:
        raise LookupError("in the app")
    except LookupError as error:
        assert error.__traceback__ is not None
        return LookupError, error, error.__traceback__


@pytest.mark.parametrize("blocks", [[], [b""]])
async def test_exc_info_replaces_a_start_that_is_not_sent(blocks: list[bytes]) -> None:
    """[W10] Status, headers and length are the later ones."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Length", "1"), ("X", "first")])
        yield from blocks
        start_response("500 Oops", [("Y", "second")], exc_info())
        yield b"sorry"

    exchange = await serve(app)
    assert (exchange.status, exchange.headers, exchange.body) == (500, [(b"y", b"second")], b"sorry")


async def test_exc_info_after_the_headers_raises_it() -> None:
    """[W10] The response is aborted by the very error."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        yield b"begun"
        start_response("500 Oops", [], exc_info())
        yield b"never"

    exchange = await serve(app)
    assert isinstance(exchange.error, LookupError)
    assert (exchange.status, exchange.blocks, exchange.complete) == (200, [b"begun"], False)


async def test_start_response_may_be_called_by_the_first_iteration() -> None:
    """[W10] As generators do; and empty blocks may come before."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        yield b""
        start_response("202 Accepted", [])
        yield b""
        yield b"late"

    exchange = await serve(app)
    assert (exchange.status, exchange.body) == (202, b"late")


HEADERS = [("X-One", "1"), ("Set-Cookie", "a=1"), ("SET-COOKIE", "b=2"), ("Connection", "close"), ("TE", "x")]


@pytest.mark.parametrize(
    ("blocks", "sent"),
    [
        ([], [b""]),
        ([b""], [b""]),
        ([b"a"], [b"a"]),
        ([b"", b"a", b"", b"b", b""], [b"a", b"b", b""]),
        ({b"a": 1}.keys(), [b"a", b""]),
        ((b"a",), [b"a"]),
    ],
)
async def test_start_goes_out_with_the_first_block(blocks: Iterable[bytes], sent: list[bytes]) -> None:
    """[W11] No empty messages in between; headers lower-case, in order, without hop-by-hop ones."""
    exchange = await serve(answer(blocks, headers=HEADERS))
    assert exchange.blocks == sent
    assert exchange.headers == [(b"x-one", b"1"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]


async def test_complete_body_needs_no_empty_message() -> None:
    """[W11] Where the declared length is reached, the last block says that it is the last."""
    exchange = await serve(answer(iter([b"ab", b"c"]), headers=[("Content-Length", "3")]))
    assert exchange.blocks == [b"ab", b"c"]


@pytest.mark.parametrize(("method", "status"), [("HEAD", "200 OK"), ("GET", "204 No Content"), ("GET", "304 Not Modified")])
async def test_response_without_a_body_sends_none(method: str, status: str) -> None:
    """[W11] The app's blocks are not asked for beyond the first, and close() is called."""
    asked: list[int] = []

    def blocks() -> Iterator[bytes]:
        for number in range(3):
            asked.append(number)
            yield b"block"

    body = Body(blocks())
    headers = [("Content-Length", "15")] if method == "HEAD" else []
    exchange = await serve(answer(body, status, headers), make_scope(method))
    assert (exchange.blocks, exchange.error, asked, body.closes) == ([b""], None, [0], 1)
    assert exchange.headers == [(name.lower().encode(), value.encode()) for name, value in headers]


@pytest.mark.parametrize("way", ["yield", "write"])
async def test_block_is_seen_before_the_app_goes_on(way: str) -> None:
    """[W12] An app that gives a block and then blocks has been heard by the client."""
    seen = [Signal("client has seen 1"), Signal("client has seen 2")]

    def blocks(write: Callable[[bytes], object]) -> Iterator[bytes]:
        for number, signal in enumerate(seen):
            if way == "write":
                write(b"%d" % number)
            else:
                yield b"%d" % number
            signal.wait()

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        return blocks(start_response("200 OK", []))

    async with AsgiServer().start(WsgiToAsgi(app)) as exchange:
        for count, signal in enumerate(seen, start=2):
            await exchange.messages_sent(count)
            signal.set()
    assert exchange.body == b"01"


async def test_write_comes_before_the_blocks() -> None:
    """[W13] In the order in which the app gave them, and before start_response has returned nothing goes out."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [("Content-Length", "6")])
        for data in (b"a", b"", b"b", b"c"):
            write(data)
        yield b"de"
        write(b"f")

    exchange = await serve(app)
    assert b"".join(exchange.blocks) == b"abcdef"
    assert exchange.complete


# close(), threads and contexts ------------------------------------------------------------------------------------------

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


# Errors -----------------------------------------------------------------------------------------------------------------


class Custom(BaseException):
    pass


ERRORS: list[type[BaseException]] = [
    Exception,
    OSError,
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


# Files ------------------------------------------------------------------------------------------------------------------


def download(path: Path, headers: list[tuple[str, str]], position: int = 0) -> tuple[App, list[Any]]:
    files: list[Any] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", headers)
        file = path.open("rb")  # noqa: SIM115  # closed by the wrapper
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


# The loop inside of the app ---------------------------------------------------------------------------------------------


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

    exchange = await serve(site, None, b"you")  # type: ignore[arg-type]
    assert (exchange.error, exchange.body) == (None, b"hello you")
    assert loops == [asyncio.get_running_loop()]


async def test_token_leads_to_the_servers_loop() -> None:
    """[W20] anyio.from_thread.run, on any loop."""
    loops: list[object] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        loops.append(anyio.from_thread.run(current_loop, token=environ["asgi.event_loop_token"]))
        return hello(environ, start_response)

    exchange = await serve(app)
    assert exchange.error is None
    assert loops == [await current_loop()]


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
        await anyio.to_thread.run_sync(functools.partial(anyio.run, functools.partial(AsgiServer().run, bridge), backend="trio"))

    anyio.run(main)
    assert len(loops) == 2
    assert loops[0] is not loops[1]


# The other scopes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extensions", [{}, {"websocket.http.response": {}}])
async def test_websocket_is_refused(extensions: dict[str, Any]) -> None:
    """[W21] By a close before it was accepted."""
    scope = make_scope(type="websocket", scheme="ws", subprotocols=[], extensions=extensions, drop=["method"])
    exchange = await AsgiServer().websocket(WsgiToAsgi(pytest.fail), scope)
    assert (exchange.error, exchange.refused) == (None, True)
    assert [message["type"] for message in exchange.messages] == ["websocket.close"]


async def test_unknown_scope_type_is_named() -> None:
    """[W21][S1] ValueError, and a BridgeError too."""
    exchange = AsgiServer().start(WsgiToAsgi(pytest.fail), make_scope(type="telepathy"))
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
    import contextlib

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


# Calling ----------------------------------------------------------------------------------------------------------------


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
