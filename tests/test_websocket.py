"""WebSockets through AsgiToWsgi [A22], on a socket pair: a strict server that lends its socket, a client that says all.

The framing, as the sections of the Autobahn test-suite look at it, is in tests/test_websocket_frames.py, real servers
and clients are in tests/test_websocket_servers.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import io
import logging
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

import bridge.asgi_to_wsgi
import bridge.websocket
from bridge import AsgiToWsgi, ClientDisconnected, ProtocolError
from tests.drivers import (
    LIMIT,
    Journal,
    Message,
    RunningCall,
    Signal,
    WsgiExchange,
    WsgiServer,
    in_thread,
    make_environ,
)
from tests.raw_websocket import (
    BINARY,
    CLOSE,
    CONTINUATION,
    HANDSHAKE,
    PING,
    PONG,
    TEXT,
    Frame,
    RawWebSocket,
    close_data,
    deflated,
    frame,
)

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FACTORIES = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
SERVER_TIMEOUT = 77.0  # of the server's socket, which it wants back

FLOOD = 4 * 1024 * 1024  # bytes: more than what the kernel holds for a socket pair, and a window

ACCEPT = {"type": "websocket.accept"}
GONE = {"type": "websocket.disconnect", "code": 1006, "reason": ""}


@pytest.fixture(params=["request", "shared"])
def loop(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(params=list(FACTORIES))
def factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    return FACTORIES[request.param]


class Exchange:
    """One WebSocket through the app, served in a thread of its own.

    Args:
        extra: What the client has sent behind its handshake, and the server has read already.
        handshake: What is different in the handshake.
        environ: What is different in the environ.
        validate: Whether `wsgiref.validate` stands between; it hides what the server has read.
        as_gunicorn: Whether the socket is lent by gunicorn's key.
        tls: For the server's side, and for the client's.
    """

    def __init__(
        self,
        application: AsgiToWsgi,
        *,
        extra: bytes = b"",
        handshake: dict[str, str | None] | None = None,
        environ: dict[str, Any] | None = None,
        validate: bool = True,
        as_gunicorn: bool = False,
        tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
    ) -> None:
        client, self.server = socket.socketpair()
        client.settimeout(LIMIT)
        if tls is not None:
            wrapping = in_thread(partial(tls[0].wrap_socket, self.server, server_side=True))
            client = tls[1].wrap_socket(client)
            self.server = wrapping.result()
        self.ws = RawWebSocket(client)
        self.server.settimeout(SERVER_TIMEOUT)
        self.rfile = self.server.makefile("rb")
        if extra:
            client.sendall(extra)
            self.rfile.peek()
        headers = [(k, v) for k, v in (HANDSHAKE | (handshake or {})).items() if v is not None]
        # By "werkzeug.socket", as werkzeug does: with a file that has read ahead.
        own = {"wsgi.input": self.rfile, "gunicorn.socket" if as_gunicorn else "werkzeug.socket": self.server}
        self.environ: WSGIEnvironment = make_environ("GET", "/chat", "a=1", headers) | own | (environ or {})
        self.journal = Journal()
        self.application = application
        self._wsgi = WsgiServer(validate=validate)
        self._call: RunningCall[WsgiExchange] = in_thread(self._serve)

    def _serve(self) -> WsgiExchange:
        try:
            exchange = self._wsgi.run(self._called, self.environ, journal=self.journal)
            if exchange.started:
                self._answer(exchange)
            return exchange
        finally:
            assert self.server.gettimeout() == SERVER_TIMEOUT, "the socket came back in another mode"
            self.rfile.close()
            self.server.close()

    def _answer(self, exchange: WsgiExchange) -> None:
        """Send the response, as far as the socket can still be used."""
        head = "".join(f"{name}: {value}\r\n" for name, value in exchange.headers)
        answer = f"HTTP/1.1 {exchange.status}\r\n{head}\r\n".encode("latin-1") + exchange.body
        if exchange.status_code != 101:
            self.server.sendall(answer)
            return
        assert exchange.complete
        assert exchange.blocks == []
        with pytest.raises(BrokenPipeError):  # what all servers take for a client that has left
            self.server.sendall(answer)
        with contextlib.suppress(ConnectionResetError):
            assert self.rfile.read() == b"", "the server would have to wait for what the client sends"

    def _called(self, environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        return self.application(environ, start_response)

    def result(self, timeout: float = LIMIT) -> WsgiExchange:
        """What came of it, in the eyes of the server: either a response, or a lent socket that came back."""
        exchange = self._call.result(timeout)
        assert exchange.close_error is None
        return exchange

    def ended(self) -> bool:
        return self._call.ended.is_set()

    def __enter__(self) -> RawWebSocket:
        return self.ws

    def __exit__(self, *_: object) -> None:
        self.ws.sock.close()
        with contextlib.suppress(BaseException):
            self._call.result()


@pytest.fixture
def serve(loop: str, factory: Callable[[], asyncio.AbstractEventLoop]) -> Iterator[Callable[..., Exchange]]:
    """Have an app serve a client; all ends with the test."""
    with contextlib.ExitStack() as stack:

        def served(app: App, **options: Any) -> Exchange:
            application = AsgiToWsgi(app, loop=loop, loop_factory=factory, lifespan="off")  # type: ignore[arg-type]
            stack.callback(application.close)
            exchange = Exchange(application, **options)
            stack.enter_context(exchange)
            return exchange

        yield served


Serve = Callable[..., Exchange]

only_plain = pytest.mark.parametrize(("loop", "factory"), [("shared", "asyncio")], indirect=True)
"""For what does not depend on who runs the loop, nor which one."""


two_kinds = pytest.mark.parametrize(("loop", "factory"), [("shared", "asyncio"), ("request", "uvloop")], indirect=True)
"""For what takes its time."""


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    assert await receive() == {"type": "websocket.connect"}
    await send(ACCEPT)
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})


class Heard:
    """An app that accepts, and keeps all it receives."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.messages: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        while True:
            message = await receive()
            self.messages.append(message)
            self.journal.note("received", message)
            if message["type"] == "websocket.disconnect":
                return

    def wait(self, count: int) -> list[Message]:
        self.journal.wait_until(lambda: len(self.messages) >= count)
        return self.messages


# The handshake


def test_app_gets_a_websocket_scope(serve: Serve) -> None:
    """[A22]"""
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await echo(scope, receive, send)

    exchange = serve(app, handshake={"Sec-WebSocket-Protocol": "a, b", "Cookie": "c=1"})
    assert exchange.ws.read_answer() == 101
    exchange.ws.close()
    exchange.result()
    (scope,) = scopes
    assert (scope["type"], scope["scheme"], scope["path"], scope["query_string"]) == (
        "websocket",
        "ws",
        "/chat",
        b"a=1",
    )
    assert scope["subprotocols"] == ["a", "b"]
    assert (b"cookie", b"c=1") in scope["headers"]
    assert scope["client"] == ("192.0.2.7", 54321)
    assert scope["state"] == {}
    assert scope["extensions"]["websocket.http.response"] == {}
    assert "http.response.pathsend" not in scope["extensions"]
    assert scope["extensions"]["wsgi.environ"]["werkzeug.socket"] is exchange.server


def test_messages_go_both_ways(serve: Serve) -> None:
    """[A22]"""
    exchange = serve(echo)
    ws = exchange.ws
    assert ws.read_answer() == 101
    assert ws.header("Sec-WebSocket-Accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    for opcode, data in [(TEXT, "grüße".encode()), (BINARY, b"\x00\xff"), (TEXT, b""), (BINARY, b"x" * 1_000_000)]:
        ws.send(opcode, data)
        assert ws.read() == Frame(opcode, data)
    ws.close(1000, b"bye")
    assert ws.read() == Frame(CLOSE, close_data(1000, b"bye"))
    ws.read_end()
    ws.sock.close()
    assert exchange.result().status == "101 Switching Protocols"


@only_plain
def test_subprotocol_and_headers_of_accept_reach_the_client(serve: Serve) -> None:
    """[A22]"""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=\xe4"), (b"Connection", b"close")]
        await send({"type": "websocket.accept", "subprotocol": "b", "headers": headers})

    ws = serve(app, handshake={"Sec-WebSocket-Protocol": "a, b"}).ws
    assert ws.read_answer() == 101
    assert ws.header("Sec-WebSocket-Protocol") == "b"
    assert [value for name, value in ws.headers if name == "Set-Cookie"] == ["a=1", "b=ä"]
    assert [value for name, value in ws.headers if name == "Connection"] == ["Upgrade"]


@only_plain
@pytest.mark.parametrize(
    "handshake",
    [
        {"Sec-WebSocket-Key": None},
        {"Sec-WebSocket-Key": "short"},
        {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==,dGhlIHNhbXBsZSBub25jZQ=="},
        {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZ\xe4=="},
        {"Sec-WebSocket-Extensions": "permessage-deflate; =;;"},
        {"Content-Length": "5"},
        {"Transfer-Encoding": "chunked"},
    ],
)
def test_wrong_handshake_is_refused_and_the_app_not_called(serve: Serve, handshake: dict[str, str | None]) -> None:
    """[A22]"""
    called: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        called.append(scope)

    assert serve(app, handshake=handshake).result().status == "400 Bad Request"
    assert called == []


@pytest.mark.parametrize("version", ["8", "13, 8", None])
def test_426_says_which_version_is_spoken(version: str | None) -> None:
    """[A22] RFC 6455, 4.4; RFC 9110, 15.5.22"""
    with pytest.raises(bridge.websocket.Refusal) as caught:
        bridge.websocket.Handshake({} if version is None else {"HTTP_SEC_WEBSOCKET_VERSION": version})
    assert caught.value.status == "426 Upgrade Required"
    assert dict(caught.value.headers) == {
        "Sec-WebSocket-Version": "13",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
    }


@only_plain
@pytest.mark.parametrize(
    ("handshake", "environ"),
    [
        ({"Upgrade": "h2c"}, {}),
        ({"Connection": "keep-alive"}, {}),
        ({}, {"SERVER_PROTOCOL": "HTTP/1.0"}),
        ({}, {"SERVER_PROTOCOL": "HTTP/2.0"}),
        ({}, {"REQUEST_METHOD": "PUT"}),
        ({}, {"werkzeug.socket": None, "wsgi.input": io.BytesIO()}),
    ],
)
def test_what_cannot_be_a_websocket_is_plain_http(
    serve: Serve, handshake: dict[str, str | None], environ: dict[str, Any]
) -> None:
    """[A22]: HTTP/2 streams share one socket, and some servers show none."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"plain"})

    exchange = serve(app, handshake=handshake, environ=environ).result()
    assert exchange.body == b"plain"


@only_plain
def test_without_the_package_it_is_plain_http_and_a_log_line_says_once_what_to_install(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[A22]"""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    monkeypatch.setitem(sys.modules, "websockets.server", None)
    bridge.asgi_to_wsgi._ask_for_websockets.cache_clear()
    for _ in range(2):
        assert serve(app).result().status_code == 204
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "install wsgi-asgi-bridge[websocket]" in caplog.text


def test_what_the_server_has_read_ahead_is_not_lost(serve: Serve) -> None:
    """[A22]"""
    early = frame(TEXT, b"early") + frame(TEXT, b"split")[:3]
    ws = serve(echo, extra=early, validate=False).ws
    assert ws.read_answer() == 101
    assert ws.read() == Frame(TEXT, b"early")
    ws.sock.sendall(frame(TEXT, b"split")[3:])
    assert ws.read() == Frame(TEXT, b"split")


def test_what_gunicorn_has_read_ahead_is_not_lost() -> None:
    """[A22]: with its own parser and classes."""
    from gunicorn.config import Config
    from gunicorn.http.parser import RequestParser

    client, server = socket.socketpair()
    with client, server:
        RawWebSocket(client).ask(extra=frame(TEXT, b"early"))
        parser = RequestParser(Config(), server, ("127.0.0.1", 1))
        request = next(parser)
        lent = bridge.websocket.find_socket({"gunicorn.socket": server, "wsgi.input": request.body})
        assert lent is not None
        assert lent[0] is server
        assert lent[1]() == frame(TEXT, b"early")
        assert parser.unreader.buf.getvalue() == b""


# Accept, deny, close


def test_close_before_accept_is_a_403(serve: Serve) -> None:
    """[A22]"""
    received: list[Message] = []
    done = Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.close", "code": 4000})
        received.append(await receive())
        done.set()

    exchange = serve(app)
    assert exchange.result().status == "403 Forbidden"
    assert exchange.ws.read_answer() == 403
    done.wait()
    assert received == [GONE]


def test_denial_response_streams(serve: Serve) -> None:
    """[A22] [A7]: it is sent by the server, block by block."""
    go_on = Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"Content-Type", b"text/plain"), (b"X-Why", b"not you")]
        await send({"type": "websocket.http.response.start", "status": 401, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": b"first", "more_body": True})
        await go_on.wait_async()
        await send({"type": "websocket.http.response.body", "body": b"last"})

    exchange = serve(app)
    exchange.journal.wait_until(lambda: "block" in exchange.journal.events)
    assert exchange.journal.entries[-1].detail == b"first"
    go_on.set()
    result = exchange.result()
    assert (result.status, result.header("X-Why"), result.body) == ("401 Unauthorized", "not you", b"firstlast")


ERRORS = [LookupError, MemoryError, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]


@pytest.mark.parametrize("kind", ERRORS)
def test_error_before_accept_propagates_to_the_server(serve: Serve, kind: type[BaseException]) -> None:
    """[A22] [A9]: which answers 500."""
    error = kind("no such room")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    exchange = serve(app).result()
    assert exchange.error is not None
    assert error in (exchange.error, exchange.error.__cause__)
    assert not exchange.started


def test_app_that_never_answers_is_an_error(serve: Serve) -> None:
    """[A22] [A9]"""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    assert isinstance(serve(app).result().error, ProtocolError)


@pytest.mark.parametrize("kind", ERRORS)
def test_error_after_accept_is_1011_and_logged_once(
    serve: Serve, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """[A22]"""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        raise kind("no such room")

    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    assert exchange.ws.read_close() == 1011
    exchange.ws.close(1011)
    exchange.result()
    (record,) = [record for record in caplog.records if record.name == "bridge"]  # asyncio tells what was slow
    assert record.getMessage() == "the app failed after it had accepted a WebSocket"
    assert record.exc_info
    assert isinstance(record.exc_info[1], kind)


def test_app_that_ends_after_accept_closes_the_connection(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """[A22]"""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)

    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    assert exchange.ws.read_close() == 1000
    exchange.ws.close()
    exchange.result()
    assert caplog.records == []


def test_app_closes_with_code_and_reason(serve: Serve) -> None:
    """[A22]: it hears of its own close, and may work on."""
    received: list[Message] = []
    go_on, done = Signal(), Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        await send({"type": "websocket.close", "code": 4001, "reason": "grün"})
        received.extend([await receive(), await receive()])
        with pytest.raises(ProtocolError):
            await send({"type": "websocket.send", "text": "more"})
        await go_on.wait_async()
        done.set()

    exchange = serve(app)
    ws = exchange.ws
    assert ws.read_answer() == 101
    assert ws.read() == Frame(CLOSE, close_data(4001, "grün".encode()))
    ws.send(TEXT, b"too late")
    ws.close(4001)
    ws.read_end()
    ws.sock.close()
    go_on.set()
    exchange.result()
    done.wait()
    assert received == [{"type": "websocket.disconnect", "code": 4001, "reason": "grün"}] * 2


@pytest.mark.parametrize(
    ("data", "code", "reason"),
    [
        (close_data(1000, b"bye"), 1000, "bye"),
        (close_data(3999, "grün".encode()), 3999, "grün"),
        (close_data(1001), 1001, ""),
        (b"", 1005, ""),
    ],
)
@only_plain
def test_client_closes_with_code_and_reason(serve: Serve, data: bytes, code: int, reason: str) -> None:
    """[A22]"""
    app = Heard()
    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    exchange.ws.send(TEXT, b"last words")
    exchange.ws.send(CLOSE, data)
    assert exchange.ws.read() == Frame(CLOSE, data)
    exchange.ws.read_end()
    exchange.ws.sock.close()
    exchange.result()
    assert app.wait(2) == [
        {"type": "websocket.receive", "text": "last words"},
        {"type": "websocket.disconnect", "code": code, "reason": reason},
    ]


@only_plain
@pytest.mark.parametrize(
    ("mistake", "code"), [(frame(3), 1002), (frame(TEXT, b"\xff"), 1007), (frame(TEXT, length=1 << 40), 1009)]
)
def test_app_hears_what_came_before_a_mistake_and_what_the_client_was_told(
    serve: Serve, mistake: bytes, code: int
) -> None:
    """[A22]"""
    app = Heard()
    ws = serve(app).ws
    assert ws.read_answer() == 101
    ws.sock.sendall(frame(TEXT, b"before") + mistake + frame(TEXT, b"after"))
    assert ws.read_close() == code
    first, last = app.wait(2)
    assert first == {"type": "websocket.receive", "text": "before"}
    assert (last["type"], last["code"]) == ("websocket.disconnect", code)


def test_client_that_leaves_without_a_word_is_1006(serve: Serve) -> None:
    """[A22]"""
    app = Heard()
    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    exchange.ws.sock.close()
    exchange.result()
    assert app.wait(1) == [GONE]


def test_reset_behind_data_is_noticed() -> None:
    """[A22]: on uvloop, which tells of both at once."""
    gone = Signal()
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        ws.read_answer()
        ws.send(TEXT, b"part", fin=False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()  # while the loop looks elsewhere: here
        assert (await receive())["code"] == 1006
        gone.set()

    ws = RawWebSocket(client)
    client.settimeout(LIMIT)
    environ = make_environ("GET", "/", "", list(HANDSHAKE.items()))
    environ |= {"werkzeug.socket": server, "wsgi.input": io.BytesIO()}
    with (
        listener,
        client,
        server,
        AsgiToWsgi(app, loop_factory=uvloop.new_event_loop, lifespan="off") as application,
    ):
        in_thread(partial(WsgiServer().run, application, environ)).result()
    gone.wait()


def test_client_that_leaves_before_the_answer_is_1006(serve: Serve) -> None:
    """[A22] [A11]"""
    received: list[Message] = []
    asked, done = Signal(), Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        asked.set()
        received.append(await receive())
        with pytest.raises(ClientDisconnected):
            await send(ACCEPT)
        done.set()

    exchange = serve(app)
    asked.wait()
    exchange.ws.sock.close()
    assert isinstance(exchange.result().error, ClientDisconnected)
    done.wait()
    assert received == [GONE]


def test_send_after_the_client_left_raises(serve: Serve) -> None:
    """[A22] [A8]: an OSError, as the specification asks (2.4)."""
    errors: list[BaseException] = []
    done = Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        assert await receive() == GONE
        assert await receive() == GONE
        for message in ({"type": "websocket.send", "text": "x"}, {"type": "websocket.close"}):
            try:
                await send(message)
            except OSError as error:
                errors.append(error)
        done.set()

    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    exchange.ws.sock.close()
    exchange.result()
    done.wait()
    assert [type(error) for error in errors] == [ClientDisconnected] * 2


@only_plain
def test_wrong_order_raises_in_the_app_and_changes_nothing(serve: Serve) -> None:
    """[A22] [A8]"""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in ({"type": "websocket.send", "text": "x"}, {"type": "http.response.start", "status": 200}):
            with pytest.raises(ProtocolError):
                await send(message)
        await send(ACCEPT)
        for message in (ACCEPT, {"type": "websocket.send"}, {"type": "websocket.close", "code": 1006}):
            with pytest.raises(ProtocolError):
                await send(message)
        await send({"type": "websocket.send", "text": "fine"})

    ws = serve(app).ws
    assert ws.read_answer() == 101
    assert ws.read() == Frame(TEXT, b"fine")
    assert ws.read_close() == 1000


@only_plain
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["WebSocketDisconnect", "WebSocketDisconnected"])
def test_a_frameworks_error_that_says_the_client_left_is_not_logged(
    serve: Serve, name: str, grouped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """[A22]: Starlette's and Falcon's, raised out of receive(), where the app or its task group lets them go on."""
    error: Exception = type(name, (Exception,), {})()
    if grouped:
        error = ExceptionGroup("unhandled errors in a TaskGroup", [error, ExceptionGroup("", [ClientDisconnected()])])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await receive()
        await receive()
        raise error

    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    exchange.ws.close()
    exchange.ws.read_close()
    exchange.ws.sock.close()
    exchange.result()
    exchange.application.close()  # so that the app has ended
    assert caplog.records == []


# Time


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What is ours: on a loaded machine asyncio has a word to say, too."""
    return [record for record in caplog.records if record.name == "bridge"]


async def hear_nothing(receive: Receive, send: Send) -> None:
    pass


async def hear_by_receive(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "websocket.disconnect":
        pass


async def hear_by_send(receive: Receive, send: Send) -> None:
    with contextlib.suppress(ClientDisconnected):
        while True:
            await send({"type": "websocket.send", "bytes": b"x" * 65536})


async def take_no_notice(receive: Receive, send: Send) -> None:
    while True:
        await receive()


@pytest.mark.parametrize(
    ("hear", "limit", "words"),
    [
        (hear_nothing, "DEAF_SECONDS", "does not listen"),
        (hear_by_receive, "WEBSOCKET_GRACE_SECONDS", "has heard of it"),
        (hear_by_send, "WEBSOCKET_GRACE_SECONDS", "has heard of it"),
        (take_no_notice, "WEBSOCKET_GRACE_SECONDS", "has heard of it"),
    ],
)
def test_app_is_cancelled_a_while_after_it_has_heard_that_its_client_left(
    serve: Serve,
    hear: Callable[[Receive, Send], Awaitable[None]],
    limit: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """[A22] [A10]: and a log line says so."""
    monkeypatch.setattr(bridge.asgi_to_wsgi, limit, 0.1)
    cancelled = Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        try:
            await hear(receive, send)
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    exchange.ws.close()
    assert exchange.ws.read_close() == 1000
    exchange.ws.sock.close()
    exchange.result()
    cancelled.wait()
    (record,) = logged(caplog)
    assert record.levelname == "WARNING"
    assert words in record.getMessage()


def test_app_at_work_when_its_client_leaves_hears_of_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[A22]: it is not cancelled before, or it would count its client among the present for ever."""
    monkeypatch.setattr(bridge.asgi_to_wsgi, "GRACE_SECONDS", 0.05)
    present: set[int] = set()
    left, done = Signal(), Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        present.add(1)
        while (await receive())["type"] == "websocket.receive":
            await left.wait_async()
            await asyncio.sleep(0.3)
        await asyncio.sleep(0.3)
        present.remove(1)
        done.set()

    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    exchange.ws.send(TEXT, b"work")
    exchange.ws.close()
    assert exchange.ws.read_close() == 1000
    exchange.ws.sock.close()
    left.set()
    exchange.result()
    done.wait()
    assert present == set()
    assert logged(caplog) == []


@pytest.mark.parametrize("loop", ["shared"], indirect=True)
def test_app_at_work_does_not_hear_what_another_one_is_told_of_its_client(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[A22] Who says something to all hears that one of them has left."""
    monkeypatch.setattr(bridge.asgi_to_wsgi, "WEBSOCKET_GRACE_SECONDS", 0.05)
    left, done = Signal(), Signal()
    words: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)

        async def say() -> None:
            await left.wait_async()
            while True:
                await send({"type": "websocket.send", "text": "to all"})
                await asyncio.sleep(0.01)

        with pytest.raises(ClientDisconnected):
            await asyncio.ensure_future(say())
        await asyncio.sleep(0.3)  # at work
        words.append(await receive())
        done.set()

    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    exchange.ws.sock.close()
    left.set()
    exchange.result()
    done.wait()
    assert words[0]["type"] == "websocket.disconnect"
    assert logged(caplog) == []


@pytest.mark.parametrize("leaves", ["before", "then"])
@pytest.mark.parametrize("loop", ["shared"], indirect=True)
def test_app_that_does_not_listen_does_not_hold_up_the_shutdown(
    serve: Serve, leaves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A20] [A22]"""
    monkeypatch.setattr(bridge.asgi_to_wsgi, "RESTART_SECONDS", 0.1)
    cancelled = Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    exchange = serve(app)
    ws = exchange.ws
    assert ws.read_answer() == 101
    if leaves == "before":
        ws.sock.close()
        exchange.result()
    closing = in_thread(exchange.application.close)
    if leaves == "then":
        assert ws.read_close() == 1012
        ws.close(1012)
        ws.sock.close()
    cancelled.wait()
    closing.result()
    exchange.result()


@only_plain
def test_app_may_take_what_its_client_left_behind_before_it_is_cancelled(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A22]: each message gives it anew the time that it has to end."""
    monkeypatch.setattr(bridge.asgi_to_wsgi, "DEAF_SECONDS", 0.3)
    texts: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        while (message := await receive())["type"] == "websocket.receive":
            texts.append(message["text"])
            await asyncio.sleep(0.05)

    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    exchange.ws.sock.sendall(b"".join(frame(TEXT, b"%d" % n) for n in range(10)) + frame(CLOSE, close_data(1000)))
    exchange.ws.read_close()
    exchange.ws.sock.close()
    exchange.result()
    deadline = time.monotonic() + LIMIT
    while len(texts) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert texts == [str(n) for n in range(10)]


def test_app_that_refuses_to_end_is_left_alone(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[A22] [A10]"""
    monkeypatch.setattr(bridge.asgi_to_wsgi, "DEAF_SECONDS", 0.05)
    monkeypatch.setattr(bridge.asgi_to_wsgi, "PATIENCE_SECONDS", 0.05)
    go_on = Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        while not go_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    exchange.ws.sock.close()
    exchange.result()
    journal = Journal()
    with contextlib.suppress(Exception):
        journal.wait_until(lambda: "it is left alone" in caplog.text, timeout=0.5)
    go_on.set()
    assert "it is left alone" in caplog.text


def test_ping_is_answered_while_the_app_does_something_else(serve: Serve) -> None:
    """[A22]"""
    go_on = Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await go_on.wait_async()

    ws = serve(app).ws
    assert ws.read_answer() == 101
    ws.send(PING, b"are you there?")
    assert ws.read() == Frame(PONG, b"are you there?")
    go_on.set()


@two_kinds
def test_client_is_pinged_and_given_up_when_it_gives_no_sign(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """[A22]"""
    monkeypatch.setattr(bridge.websocket, "PING_SECONDS", 0.1)
    app = Heard()
    exchange = serve(app)
    ws = exchange.ws
    assert ws.read_answer() == 101
    for _ in range(3):
        ping = ws.read()
        assert ping.opcode == PING
        ws.send(PONG, ping.data)
    assert app.messages == []
    assert ws.read_close() == 1011
    ws.sock.close()
    exchange.result()
    assert app.wait(1) == [GONE]


@only_plain
def test_client_whose_pong_is_not_read_for_a_slow_app_is_not_given_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A22]"""
    monkeypatch.setattr(bridge.websocket, "PING_SECONDS", 0.05)
    go_on = Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        await go_on.wait_async()
        for _ in range(101):
            message = await receive()
        await send({"type": "websocket.send", "text": message["text"]})
        await receive()

    ws = serve(app).ws
    assert ws.read_answer() == 101
    ws.sock.sendall(frame(TEXT, b"x" * 1000) * 100)
    pings = [ws.read() for _ in range(4)]  # more than two: it was not given up between them
    assert {ping.opcode for ping in pings} == {PING}
    go_on.set()
    ws.send(TEXT, b"still here")
    while (got := ws.read()).opcode == PING:
        ws.send(PONG, got.data)
    assert got == Frame(TEXT, b"still here")


def test_client_that_never_closes_its_side_is_not_waited_for_long(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A22]"""
    monkeypatch.setattr(bridge.websocket, "CLOSE_SECONDS", 0.1)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)

    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    exchange.result()
    assert exchange.ws.read_close() == 1000
    exchange.ws.read_end()


# Back-pressure


def test_app_that_sends_to_a_client_that_does_not_read_is_held(serve: Serve) -> None:
    """[A22] [A13]"""
    sent: list[int] = []
    journal = Journal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        for number in range(1000):
            await send({"type": "websocket.send", "bytes": b"x" * 65536})
            sent.append(number)
            journal.stir()

    ws = serve(app).ws
    assert ws.read_answer() == 101
    count = -1
    while count != len(sent):  # until it stands still
        count = len(sent)
        time.sleep(0.2)
    assert count * 65536 < FLOOD  # what the kernel holds, and a window
    for _ in range(1000):
        assert len(ws.read().data) == 65536
    assert ws.read_close() == 1000


@only_plain
def test_calls_that_are_cancelled_leave_nothing_behind(serve: Serve) -> None:
    """[A22] [S2] [A4]: receive() with a timeout is how an app looks after two things in turn."""
    waiting: list[int] = []
    done = Signal()

    async def give_up(call: Callable[[], Awaitable[object]]) -> None:
        for _ in range(100):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(call(), 0.001)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        cycle: Any = receive.__self__  # type: ignore[attr-defined]
        await receive()
        await give_up(receive)
        waiting.append(len(cycle._receivers))
        await send(ACCEPT)
        await give_up(receive)
        await give_up(partial(send, {"type": "websocket.send", "bytes": b"x" * 1_000_000}))
        connection = cycle._connection
        waiting.extend([len(connection._receivers), len(connection._senders)])
        done.set()
        assert (await receive())["text"] == "still heard"

    ws = serve(app).ws
    assert ws.read_answer() == 101
    done.wait()
    ws.send(TEXT, b"still heard")
    assert len(ws.read().data) == 1_000_000
    assert ws.read().opcode == CLOSE, "it went on to fill the memory"
    assert waiting == [0, 0, 0]


@only_plain
def test_app_that_is_held_hears_that_its_client_left(serve: Serve) -> None:
    """[A22]"""
    errors: list[BaseException] = []
    done = Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        try:
            while True:
                await send({"type": "websocket.send", "bytes": b"x" * 65536})
        except OSError as error:
            errors.append(error)
            done.set()

    exchange = serve(app)
    assert exchange.ws.read_answer() == 101
    exchange.ws.read()
    exchange.ws.sock.close()
    exchange.result()
    done.wait()
    assert [type(error) for error in errors] == [ClientDisconnected]


@two_kinds
@pytest.mark.parametrize("size", [0, 1000])
def test_client_that_floods_an_app_that_does_not_receive_is_held(serve: Serve, size: int) -> None:
    """[A22] [A13]"""
    go_on, done = Signal(), Signal()
    total = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal total
        await receive()
        await send(ACCEPT)
        await go_on.wait_async()
        while (await receive())["type"] == "websocket.receive":
            total += 1
        done.set()

    exchange = serve(app)
    ws = exchange.ws
    assert ws.read_answer() == 101
    burst = frame(TEXT, b"x" * size) * (65536 // (size + 8))
    ws.sock.settimeout(0.3)
    written = 0
    with contextlib.suppress(TimeoutError):
        while written < FLOOD:
            written += ws.sock.send(burst[written % len(burst) :])
    assert written < FLOOD
    go_on.set()
    ws.sock.settimeout(LIMIT)
    ws.sock.sendall(burst[written % len(burst) :] + frame(CLOSE, close_data(1000)))
    assert ws.read_close() == 1000
    ws.sock.close()
    exchange.result()
    done.wait()
    length = len(frame(TEXT, b"x" * size))
    assert total == (written + len(burst) - written % len(burst)) // length


@two_kinds
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("held", [False, True], ids=["sending", "held"])
def test_thread_is_free_when_the_client_breaks_off_while_the_app_sends(
    serve: Serve,
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
    secure: bool,
    held: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """[A22]: TLS sends by Python code, whose frame a failure keeps, and with it what it was to send."""
    monkeypatch.setattr(bridge.websocket, "CLOSE_SECONDS", 3600.0)
    errors: list[BaseException] = []
    journal, done = Journal(), Signal()
    sent = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await receive()
        await send(ACCEPT)
        try:
            while True:
                await send({"type": "websocket.send", "bytes": b"x" * (65536 if held else 1000)})
                sent += 1
                await asyncio.sleep(0)
                journal.stir()
        except BaseException as error:
            errors.append(error)
            done.set()
            raise

    exchange = serve(app, tls=tls if secure else None)
    assert exchange.ws.read_answer() == 101
    count = -1
    while held and count != sent:  # until it stands still
        count = sent
        time.sleep(0.2)
    exchange.ws.sock.close()
    exchange.result()
    done.wait()
    assert [type(error) for error in errors] == [ClientDisconnected]
    assert logged(caplog) == []


@only_plain
def test_compressed_flood_is_unpacked_as_the_app_receives(serve: Serve) -> None:
    """[A22] [A13]: one message at a time, of many that came in one piece."""
    go_on = Signal()
    waiting: list[int] = []
    count, data = 20, bytes(1_000_000)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        cycle: Any = receive.__self__  # type: ignore[attr-defined]
        await receive()
        await send(ACCEPT)
        await go_on.wait_async()
        for _ in range(count):
            assert (await receive())["bytes"] == data
            waiting.append(len(cycle._connection._messages))
        assert (await receive())["code"] == 1001

    exchange = serve(app, handshake={"Sec-WebSocket-Extensions": "permessage-deflate"})
    ws = exchange.ws
    assert ws.read_answer() == 101
    ws.sock.sendall(frame(BINARY, deflated(data), rsv=4) * count + frame(PING) + frame(CLOSE, close_data(1001)))
    ws.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        ws.read()  # so that it is held
    go_on.set()
    ws.sock.settimeout(LIMIT)
    assert ws.read() == Frame(PONG, b"")
    assert ws.read_close() == 1001
    exchange.result()
    assert max(waiting) <= 2


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    from werkzeug.serving import make_ssl_devcert

    certificate, key = make_ssl_devcert(str(tmp_path_factory.mktemp("tls") / "tls"), cn="localhost")
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(certificate, key)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    return server, client


@pytest.mark.parametrize("size", [10, 1000])
def test_what_tls_has_decrypted_ahead_is_not_forgotten(
    serve: Serve, tls: tuple[ssl.SSLContext, ssl.SSLContext], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A22]: no descriptor tells of it, and the app has held the client meanwhile."""
    monkeypatch.setattr(bridge.websocket, "PIECE", 100)  # a record has up to 16 KiB, and comes as a whole
    go_on = Signal()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        await go_on.wait_async()
        for _ in range(100):
            message = await receive()
            await asyncio.sleep(0)
            await send({**message, "type": "websocket.send"})

    ws = serve(app, tls=tls).ws
    assert ws.read_answer() == 101
    ws.sock.sendall(b"".join(frame(TEXT, b"%d " % n + b"x" * size) for n in range(100)))
    ws.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        ws.read()  # so that it is held
    go_on.set()
    ws.sock.settimeout(LIMIT)
    for n in range(100):
        assert ws.read() == Frame(TEXT, b"%d " % n + b"x" * size)
    assert ws.read_close() == 1000
    ws.close()
    ws.read_end()


async def close_first(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send(ACCEPT)
    await send({"type": "websocket.close"})


@only_plain
@pytest.mark.parametrize("app", [echo, close_first])
def test_client_that_floods_with_pings_and_reads_nothing_is_held(serve: Serve, app: App) -> None:
    """[A22] [A13]: each of its pings is answered, into memory at last; by RFC 6455 also behind our close frame."""
    ws = serve(app).ws
    assert ws.read_answer() == 101
    ws.sock.settimeout(0.3)
    written = 0
    with contextlib.suppress(TimeoutError):
        while written < FLOOD:
            written += ws.sock.send(frame(PING, b"x" * 125) * 500)
    assert written < FLOOD


@only_plain
def test_app_that_only_sends_lets_the_loop_turn(serve: Serve) -> None:
    """[A22]: it hears of the client's close, and other tasks run."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        with contextlib.suppress(ClientDisconnected):
            while True:
                await send({"type": "websocket.send", "text": ""})

    exchange = serve(app)
    ws = exchange.ws
    assert ws.read_answer() == 101
    ws.read()
    ws.close()
    assert ws.read_close() == 1000
    ws.sock.close()
    exchange.result()


# Around


def test_contextvars_of_the_servers_thread_are_visible(serve: Serve) -> None:
    """[A18] [A22]"""
    variable = contextvars.ContextVar("variable", default="unset")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await send({"type": "websocket.send", "text": variable.get()})

    class Setting(AsgiToWsgi):
        def __call__(self, environ: Any, start_response: Any) -> Any:
            variable.set("set by the server's thread")
            return super().__call__(environ, start_response)

    with Setting(app, lifespan="off") as application, Exchange(application) as ws:
        assert ws.read_answer() == 101
        assert ws.read() == Frame(TEXT, b"set by the server's thread")


def test_lifespan_state_is_in_the_scope() -> None:
    """[A19] [A22]"""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            scope["state"]["name"] = "from startup"
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send(ACCEPT)
        await send({"type": "websocket.send", "text": scope["state"]["name"]})

    with AsgiToWsgi(app) as application, Exchange(application) as ws:
        assert ws.read_answer() == 101
        assert ws.read() == Frame(TEXT, b"from startup")


def test_close_of_the_wrapper_ends_connections_with_1012(
    loop: str, factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """[A20] [A22]: as uvicorn does at its end."""
    app = Heard()
    application = AsgiToWsgi(app, loop=loop, loop_factory=factory, lifespan="off")  # type: ignore[arg-type]
    exchanges = [Exchange(application) for _ in range(3)]
    for exchange in exchanges:
        assert exchange.ws.read_answer() == 101
    closing = in_thread(application.close)
    for exchange in exchanges:
        assert exchange.ws.read_close() == 1012
        exchange.ws.close(1012)
        exchange.ws.sock.close()
        exchange.result()
    closing.result()
    assert app.messages == [{"type": "websocket.disconnect", "code": 1012, "reason": ""}] * 3


class FakeWorker:
    """What the handler of gunicorn's signal leads to."""

    alive = True

    def handle_exit(self, *_: object) -> None:
        self.alive = False


@pytest.fixture
def worker() -> Iterator[FakeWorker]:
    worker = FakeWorker()
    before = signal.signal(signal.SIGTERM, worker.handle_exit)
    yield worker
    signal.signal(signal.SIGTERM, before)


class Interrupt(BaseException):
    """What a handler of a signal raises."""


@pytest.mark.parametrize(
    ("loop", "blocked"), [("shared", False), ("request", False), ("shared", True)], indirect=["loop"]
)
def test_interrupt_of_the_servers_thread_breaks_the_connection_off(
    loop: str, blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A20] [A22]: before the server can write its 500 page into it, also if the loop stands still."""
    go_on, left = Signal(), Signal()

    def block(*_: object) -> None:
        go_on.wait()

    def start_response(*_: object) -> Any:
        raise AssertionError("there is no response")

    if blocked:
        monkeypatch.setattr(bridge.asgi_to_wsgi, "BREAK_SECONDS", 0.2)
        monkeypatch.setattr(bridge.websocket.Connection, "break_off", block)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        await send({"type": "websocket.send", "text": "here"})
        assert (await receive())["type"] == "websocket.disconnect"
        left.set()

    def interrupt(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    client, server = socket.socketpair()
    ws = RawWebSocket(client)
    client.settimeout(LIMIT)
    environ = make_environ("GET", "/", "", list(HANDSHAKE.items())) | {
        "werkzeug.socket": server,
        "wsgi.input": io.BytesIO(),
    }
    main = threading.get_ident()

    def talk() -> int | None:
        assert ws.read_answer() == 101
        assert ws.read() == Frame(TEXT, b"here")
        time.sleep(0.1)  # so that the thread is where it waits, most probably
        signal.pthread_kill(main, signal.SIGUSR1)
        return ws.read_close()

    try:
        with client, server, AsgiToWsgi(app, loop=loop, lifespan="off") as application:  # type: ignore[arg-type]
            talking = in_thread(talk)
            with pytest.raises(Interrupt):
                application(environ, start_response)
            with pytest.raises(BrokenPipeError):
                server.sendall(b"HTTP/1.1 500 Internal Server Error\r\n\r\n")
            assert talking.result() == (None if blocked else 1012)
            go_on.set()
            left.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)


@two_kinds
def test_connection_ends_when_gunicorns_worker_is_told_to_end(serve: Serve, worker: FakeWorker) -> None:
    """[A20] [A22]"""
    app = Heard()
    exchange = serve(app, as_gunicorn=True)
    assert exchange.ws.read_answer() == 101
    exchange.ws.send(PING)
    assert exchange.ws.read() == Frame(PONG, b"")
    worker.handle_exit()
    assert exchange.ws.read_close() == 1012
    exchange.ws.close(1012)
    exchange.result()
    assert app.wait(1) == [{"type": "websocket.disconnect", "code": 1012, "reason": ""}]


@only_plain
def test_another_servers_handler_of_the_signal_means_nothing(serve: Serve, worker: FakeWorker) -> None:
    """[A22]"""
    worker.handle_exit()
    ws = serve(echo).ws
    assert ws.read_answer() == 101
    ws.send(TEXT, b"x")
    assert ws.read() == Frame(TEXT, b"x")


@pytest.mark.parametrize("kind", ["shared", "auto"])
def test_many_connections_at_once_share_what_the_app_has(
    factory: Callable[[], asyncio.AbstractEventLoop], kind: str
) -> None:
    """[A14] [A16] [A22]: a chat in memory, on one loop, also for an app that knows no lifespan."""
    members: set[Send] = set()

    async def chat(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        members.add(send)
        try:
            while (message := await receive())["type"] == "websocket.receive":
                for member in list(members):
                    await member({"type": "websocket.send", "text": message["text"]})
        finally:
            members.discard(send)

    with (
        AsgiToWsgi(chat, loop=kind, loop_factory=factory, lifespan="off") as application,  # type: ignore[arg-type]
        contextlib.ExitStack() as stack,
    ):
        exchanges = [Exchange(application) for _ in range(20)]
        sockets = [stack.enter_context(exchange) for exchange in exchanges]
        for ws in sockets:
            assert ws.read_answer() == 101
        deadline = time.monotonic() + LIMIT
        while len(members) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        for number, ws in enumerate(sockets):
            ws.send(TEXT, b"%d" % number)
            for other in sockets:
                assert other.read() == Frame(TEXT, b"%d" % number)
        # Whoever runs the loop for all may leave: it is handed on.
        for ws, exchange in zip(sockets, exchanges, strict=True):
            ws.close()
            assert ws.read_close() == 1000
            ws.sock.close()
            exchange.result()


@pytest.mark.parametrize(
    ("kind", "joined"),
    [("auto", [False, True, True]), ("shared", [True, True, True]), ("request", [True, False, False])],
)
def test_plain_requests_join_the_websockets_on_their_loop(
    factory: Callable[[], asyncio.AbstractEventLoop], kind: str, joined: list[bool]
) -> None:
    """[A14] [A16] [A22]: a view has something to say to a WebSocket. (The first one's loop is used again, or not.)"""
    loops: list[asyncio.AbstractEventLoop] = []
    told: list[asyncio.Event] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        loops.append(asyncio.get_running_loop())
        if scope["type"] == "http":
            for event in told:
                event.set()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"told"})
            return
        await send(ACCEPT)
        told.append(asyncio.Event())
        await send({"type": "websocket.send", "text": "here"})
        if kind != "request":
            await told[-1].wait()
        await send({"type": "websocket.send", "text": "told"})

    def ask() -> None:
        assert WsgiServer().run(application, make_environ("GET", "/")).body == b"told"

    with AsgiToWsgi(app, loop=kind, loop_factory=factory, lifespan="off") as application:  # type: ignore[arg-type]
        ask()
        with Exchange(application) as ws:
            assert ws.read_answer() == 101
            assert ws.read() == Frame(TEXT, b"here")
            for _ in range(2):
                ask()
            assert ws.read() == Frame(TEXT, b"told")
            assert ws.read_close() == 1000
            ws.close()
        before, websocket, *after = loops
        assert [loop is websocket for loop in (before, *after)] == joined
        statistics = application.statistics()
        assert statistics.loops == {"auto": 2, "shared": 1, "request": 2}[kind]


@two_kinds
def test_thread_that_waits_costs_no_time(serve: Serve) -> None:
    """[A22]: no busy waiting, neither while nothing happens nor while the client is held."""
    exchange = serve(echo)
    ws = exchange.ws
    assert ws.read_answer() == 101
    ws.send(TEXT, b"x" * 8_000_000)  # the echo of which is not read: both sides are held
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15
    assert len(ws.read().data) == 8_000_000
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15


@only_plain
def test_nothing_is_logged_of_a_connection_that_ends_well(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """[S2] [A22]"""
    caplog.set_level(logging.WARNING)
    for _ in range(5):
        exchange = serve(echo)
        assert exchange.ws.read_answer() == 101
        exchange.ws.close()
        exchange.ws.read_close()
        exchange.ws.sock.close()
        exchange.result()
    assert caplog.records == []


@only_plain
def test_fragments_and_compression_reach_the_app_whole(serve: Serve) -> None:
    """[A22]"""
    exchange = serve(echo, handshake={"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"})
    ws = exchange.ws
    assert ws.read_answer() == 101
    assert (ws.header("Sec-WebSocket-Extensions") or "").startswith("permessage-deflate")
    for piece, opcode, fin in [(b"gr\xc3", TEXT, False), (b"\xbc", CONTINUATION, False), (b"n", CONTINUATION, True)]:
        ws.send(opcode, piece, fin=fin)
    assert ws.read() == Frame(TEXT, "grün".encode())
    data = deflated(b"x" * 100_000)
    ws.send(TEXT, data[:10], fin=False, rsv=4)
    ws.send(PING, b"between")
    assert ws.read() == Frame(PONG, b"between")
    ws.send(CONTINUATION, data[10:])
    assert ws.read() == Frame(TEXT, b"x" * 100_000)
