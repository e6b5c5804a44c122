"""WsgiToAsgi, one request at a time: its environ, its body, and the order of its response."""

from __future__ import annotations

import functools
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast
from wsgiref.validate import validator

import pytest

from bridge import ClientDisconnected, ProtocolError, WsgiToAsgi
from tests.drivers import AsgiServer, Piece, Signal, http_request, make_scope
from tests.wsgi_apps import (
    EXPECT,
    GONE,
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
    pass

# environ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"a=1\nb=2"])
async def test_environ_and_calls_are_clean_under_the_validator(body: bytes) -> None:
    """[W1] wsgiref.validate finds nothing; the environ is an exact dict."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        assert type(environ) is dict
        data = b"".join(iter(functools.partial(environ["wsgi.input"].read, 3), b""))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [data or b"none"]

    exchange = await serve(validator(app), None, body)
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
    exchange = await serve(validator(hello), scope)
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
    exchange = await serve(never, make_scope("POST", headers=headers), b"abc")
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
    async with AsgiServer(keep=False).start(WsgiToAsgi(app), make_scope("POST", headers=headers), pieces()) as exchange:
        await paused.wait_async()
        await settle()
        resume.set()
    assert got == count * len(piece)
    assert most < 512 * 1024
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
    begun = Signal("in the app")  # which is not called for a client that has left before

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        begun.set()
        for _ in range(2):
            try:
                read(environ["wsgi.input"])
            except ConnectionError as error:
                errors.append(type(error))
        start_response("400 Bad Request", [])
        return [b"broken"]

    exchange = await serve(app, make_scope("POST", headers=headers), [begun, *pieces])
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
            ("X", "a\r\nB: c"),
            ("X", "a\nb"),
            ("X", "a\rb"),
            ("X", "a\0b"),
            ("X\n", "a"),
            ("X:", "a"),
            ("X Y", "a"),
            ("", "a"),
            ("Ü", "a"),
            ("X", "\u20ac"),
            ("X", b"a"),
            (b"X", "a"),
            ("X", 1),
            ("X", None),
            ("X",),
            ("X", "a", "b"),
            "X",
            None,
            ("Content-Length", "-1"),
            ("Content-Length", "many"),
        )
    },
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
    "write of text": lambda environ, start_response: [
        str(start_response("200 OK", [])(cast("bytes", "text"))).encode()
    ],
}


@pytest.mark.parametrize("app", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_response_is_an_error_and_nothing_is_sent(app: App) -> None:
    """[W10][W14] Neither a part of it, nor what a client could take for a second response."""
    exchange = await serve(app)
    assert isinstance(exchange.error, ProtocolError)
    assert exchange.messages == []


@pytest.mark.parametrize(
    ("status", "code"), [("200", 200), ("200 ", 200), ("404 Not Found", 404), ("299 Ünusual", 299)]
)
async def test_status_needs_no_reason(status: str, code: int) -> None:
    """[W10] Three digits alone are a status."""
    assert (await serve(answer([b"x"], status))).status == code


def exc_info() -> Any:
    try:
        raise LookupError("in the app")
    except LookupError:
        return sys.exc_info()


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


@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", "200 OK"), ("GET", "204 No Content"), ("GET", "304 Not Modified")]
)
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


# A wrapper by itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("threads", 0, ValueError),
        ("threads", "4", TypeError),
        ("threads", None, TypeError),
        ("threads", 1.5, TypeError),
        ("streams", -1, ValueError),
        ("streams", "1000", TypeError),
        ("lifespan", "on", TypeError),
    ],
)
def test_wrong_options_are_told_at_once(option: str, value: object, error: type[Exception]) -> None:
    """[S1]"""
    options: dict[str, Any] = {option: value}
    with pytest.raises(error, match=f"^{option} expected .*, got {value!r}$"):
        WsgiToAsgi(hello, **options)
