"""What a client must not get: another's secret, a request in the place of another's, a key of the environ.

Response splitting, joined and dropped headers, lengths that make no sense, and linear time for equal names are held by
the tests of `headers`, `environ`, `scope` and `response`; here are whole requests, and what one leaves for the next.
"""

from __future__ import annotations

import contextvars
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import AsgiToWsgi, WsgiToAsgi
from bridge.environ import build_environ
from bridge.headers import from_cgi
from bridge.scope import build_scope
from tests.drivers import AsgiServer, FakeInput, WsgiServer, make_environ, make_scope
from tests.servers import SERVERS, Running, until
from tests.test_servers import require

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

SECRET = "s3cret-of-the-first"
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")


# No secret of one request in the next ---------------------------------------------------------------------------------

ENDINGS = ["whole", "rest unread", "error", "error in mid-response", "client left", "cancelled"]


class Boom(Exception):
    """The app's own mistake, with the secret in it."""


def wsgi_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
    """Plants a secret wherever a request can leave one, or tells all it sees."""
    ending = environ["asgi.scope"]["ending"]
    if ending == "look":
        body = environ["wsgi.input"].read()
        seen = repr({key: value for key, value in environ.items() if key != "wsgi.input"})
        start_response("200 OK", [("X-Variable", variable.get())])
        yield seen.encode() + body
        return
    variable.set(SECRET)
    environ["bridge.planted"] = environ["asgi.scope"]["planted"] = SECRET
    environ["wsgi.input"].read(3)
    start_response("200 OK", [("X-Secret", SECRET)])
    if ending == "error":
        raise Boom(SECRET)
    yield SECRET.encode()
    if ending == "error in mid-response":
        raise Boom(SECRET)
    if ending in ("client left", "cancelled"):
        environ["asgi.scope"]["leave"]()
        while True:
            time.sleep(0.005)
            yield SECRET.encode()
    if ending == "whole":
        environ["wsgi.input"].read()


@pytest.mark.parametrize("ending", ENDINGS)
async def test_nothing_of_a_request_is_seen_by_the_next_in_its_thread(ending: str) -> None:
    """[W13][W19] Headers, body, context, environ and scope, however the one before has ended."""
    wrapped = WsgiToAsgi(wsgi_app, threads=1)
    extensions: dict[str, Any] = {}
    state: dict[str, Any] = {"of": "the server"}
    leave: list[Callable[[], None]] = []
    scope = make_scope(
        "POST",
        headers=[(b"authorization", SECRET.encode()), (b"cookie", SECRET.encode())],
        query=SECRET,
        ending=ending,
        extensions=extensions,
        state=dict(state),
        leave=lambda: leave[0](),
    )
    token = anyio.lowlevel.current_token()

    async with AsgiServer().start(wrapped, scope, [SECRET.encode(), SECRET.encode()]) as exchange:

        def go() -> None:
            action = exchange.cancel if ending == "cancelled" else exchange.disconnect
            anyio.from_thread.run_sync(action, token=token)

        leave.append(go)
        await exchange.finish()

    look = make_scope("POST", ending="look", extensions=extensions, state=dict(state))
    seen = await AsgiServer().run(wrapped, look, [b"own ", b"body"])
    assert seen.error is None
    assert SECRET.encode() not in seen.body
    assert seen.body.endswith(b"own body")
    assert seen.headers == [(b"x-variable", b"nothing")]
    wrapped.close()


async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
    ending = scope["path"][1:]
    if ending == "look":
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        in_thread = await anyio.to_thread.run_sync(variable.get)
        shown = {key: value for key, value in scope.items() if key != "extensions"}
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"x-variable", f"{variable.get()} {in_thread}".encode())],
            }
        )
        await send({"type": "http.response.body", "body": repr(shown).encode() + body})
        return
    variable.set(SECRET)
    await anyio.to_thread.run_sync(variable.set, SECRET)
    scope["state"]["planted"] = scope["extensions"]["planted"] = scope["planted"] = SECRET
    await receive()
    if ending == "error":
        raise Boom(SECRET)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-secret", SECRET.encode())]})
    await send({"type": "http.response.body", "body": SECRET.encode(), "more_body": True})
    if ending == "error_in_mid-response":
        raise Boom(SECRET)
    while ending == "client_left":
        await send({"type": "http.response.body", "body": SECRET.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("loop", ["shared", "request"])
@pytest.mark.parametrize("ending", ["whole", "error", "error_in_mid-response", "client_left"])
def test_nothing_of_a_request_is_seen_by_the_next_in_its_loop(ending: str, loop: Any) -> None:
    """[A2][A18][A19] Nor in the server's thread, whose context stays its own."""
    with AsgiToWsgi(asgi_app, loop=loop, lifespan="off") as wrapped:
        headers = [("Authorization", SECRET), ("Cookie", SECRET)]
        body = FakeInput([SECRET.encode(), bytes(200_000), SECRET.encode()], fills=False)
        environ = make_environ(
            "POST", f"/{ending}", SECRET, headers, body, CONTENT_LENGTH=str(200_000 + 2 * len(SECRET))
        )
        first = WsgiServer(validate=False).start
        try:
            with first(wrapped, environ) as exchange:
                next(exchange)
                if ending != "client_left":
                    for _ in exchange:
                        pass
        except Boom:
            assert ending.startswith("error")
        assert variable.get() == "nothing"

        seen = WsgiServer(validate=False).run(wrapped, make_environ("POST", "/look", body=b"own body"))
        assert SECRET.encode() not in seen.body
        assert seen.body.endswith(b"own body")
        assert seen.header("x-variable") == "nothing nothing"


# No header is anything but a header -----------------------------------------------------------------------------------

NAMES = st.sampled_from(
    "script-name path-info request-method remote-addr remote-user server-name https wsgi.url_scheme wsgi.input "
    "asgi.scope content_length http_host HTTP_HOST http-host x_forwarded_for proxy query-string \xe9 :path".split()
) | st.text(st.characters(min_codepoint=33, max_codepoint=255), min_size=1, max_size=8)
VALUES = st.sampled_from(["", "on", "/evil", "5", "a,b", "\r\nX: y", "\0", "\xff"])


@given(headers=st.lists(st.tuples(NAMES.map(lambda name: name.encode("latin-1")), VALUES.map(str.encode)), max_size=8))
def test_no_header_changes_the_environ_beside_the_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """[W4] Whatever its name: what the server says stays what it says."""
    headers = [header for header in headers if header[0].lower() not in (b"content-type", b"content-length", b"host")]
    stream: Any = object()
    plain = build_environ(make_scope(), stream)
    environ = build_environ(make_scope(headers=headers), stream)
    assert all(key[:5] == "HTTP_" for key in environ.keys() - plain.keys())
    assert "HTTP_PROXY" not in environ
    for key in plain.keys() - {"asgi.scope"}:
        assert environ[key] == plain[key], key


@given(keys=st.dictionaries(NAMES.map(lambda name: "HTTP_" + name.upper().replace("-", "_")), VALUES, max_size=8))
def test_no_header_changes_the_scope_beside_the_headers(keys: dict[str, str]) -> None:
    """[A1] The other way round."""
    keys.pop("HTTP_HOST", None)
    plain: Any = build_scope(make_environ())
    scope: Any = build_scope(make_environ() | keys)
    for key in plain.keys() - {"headers", "extensions"}:
        assert scope[key] == plain[key], key
    assert all(name not in (b"proxy", b"content-length", b"content-type") for name, _ in scope["headers"])


def test_a_hundred_thousand_headers_take_linear_time() -> None:
    """[W4] Ten times as many take about ten times as long, not a hundred times; both ways."""

    def seconds(count: int) -> float:
        headers = [(b"x-%d" % number, b"value") for number in range(count)]
        best = 1e9
        for _ in range(3):
            began = time.process_time()
            environ = build_environ(make_scope(headers=headers), object())  # type: ignore[arg-type]
            assert len(from_cgi(environ)) >= count
            best = min(best, time.process_time() - began)
        return best

    assert seconds(100_000) < 40 * seconds(10_000)


# Real servers, hostile requests ---------------------------------------------------------------------------------------

APPLICATION = """
import json
from bridge import AsgiToWsgi, WsgiToAsgi

seen = []

def wsgi(environ, start_response):
    target = environ["REQUEST_URI"]
    if not target.endswith("/seen"):
        seen.append(target)
    body = environ["wsgi.input"].read()
    kept = {key: value for key, value in environ.items() if type(value) is str}
    answer = json.dumps({"seen": seen, "environ": kept, "length": len(body), "body": body.decode("latin-1")}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
    return [answer]

async def asgi(scope, receive, send):
    if scope["type"] != "http":
        raise ValueError(scope["type"])
    target = scope["raw_path"].decode("latin-1")
    if target != "/seen":
        seen.append(target)
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    kept = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    answer = json.dumps({"seen": seen, "environ": kept, "length": len(body), "body": body.decode("latin-1")}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})

application = WRAP
"""


@pytest.fixture(scope="module", params=["uvicorn-h11", "gunicorn-gthread"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterable[Running]:
    require(request.param)
    wrap = "WsgiToAsgi(wsgi)" if request.param.startswith("uvicorn") else "AsgiToWsgi(asgi)"
    kind = SERVERS[request.param]
    with Running(kind, APPLICATION.replace("WRAP", wrap), tmp_path_factory.mktemp(request.param)) as running:
        yield running


INNER = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

HOSTILE = {
    "length and chunks": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + INNER,
    "two lengths": b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(INNER) + INNER,
    "two lengths in one": b"Content-Length: %d, 0\r\n\r\n" % len(INNER) + INNER,
    "a signed length": b"Content-Length: +%d\r\n\r\n" % len(INNER) + INNER,
    "a length with an underscore": b"Content-Length: 3_7\r\n\r\n" + INNER,
    "a negative length": b"Content-Length: -1\r\n\r\n" + INNER,
    "an odd coding": b"Transfer-Encoding: xchunked\r\nContent-Length: %d\r\n\r\n" % len(INNER) + INNER,
    "a coding twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + INNER,
    "an underscore for a hyphen": b"Content_Length: %d\r\nContent-Length: 0\r\n\r\n" % len(INNER),
    "a space before the colon": b"Content-Length : %d\r\n\r\n" % len(INNER) + INNER,
    "a NUL in a value": b"X: a\0b\r\nContent-Length: 0\r\n\r\n",
    "a bare CR in a value": b"X: a\rContent-Length: 9\r\nContent-Length: 0\r\n\r\n",
    "a folded line": b"X: a\r\n Content-Length: 9\r\nContent-Length: 0\r\n\r\n",
    "a bad chunk": b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "a chunk too long": b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "a proxy": b"Proxy: http://evil/\r\nX_Forwarded_For: 1.2.3.4\r\nContent-Length: 0\r\n\r\n",
}


def talk(server: Running, data: bytes) -> bytes:
    """All that the server says to it, until it closes or has nothing to say for a second."""
    with server.connect(timeout=1.0) as connection:
        connection.sendall(data)
        said = b""
        try:
            while piece := connection.recv(65_536):
                said += piece
                if said.count(b"HTTP/1.1 ") > 3:
                    break
        except (TimeoutError, ConnectionError):
            pass
        return said


def ask(server: Running, target: str = "/seen") -> dict[str, Any]:
    said = talk(server, f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer: dict[str, Any] = json.loads(said.partition(b"\r\n\r\n")[2])
    return answer


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_a_hostile_request_gets_no_other_in(server: Running, what: str) -> None:
    """[W4][A3] It is refused, or served as what the server took it for; and the app sees no key that it must not."""
    said = talk(server, b"POST /outer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + HOSTILE[what])
    statuses = [int(part[:3]) for part in said.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]
    assert len(statuses) <= 1
    assert all(status in (200, 400, 411, 501) for status in statuses), said[:300]
    if statuses == [200]:
        answer = json.loads(said.partition(b"\r\n\r\n")[2])
        assert answer["body"] in ("", INNER.decode())
        keys = {key.upper().replace("-", "_") for key in answer["environ"]}
        assert not keys & {"HTTP_PROXY", "PROXY", "HTTP_CONTENT_LENGTH", "HTTP_X_FORWARDED_FOR"}
    assert "/smuggled" not in ask(server)["seen"]


@pytest.mark.parametrize(
    "target", ["*", "http://evil:99/abs?x=1", "//double/slash", "/a/../b", "/%2e%2e/%00", "/%0d%0aX:y"]
)
def test_an_odd_target_is_a_path_or_refused(server: Running, target: str) -> None:
    """[W2][A1] Nothing of it gets into another key, and the answer is one."""
    said = talk(server, b"OPTIONS %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % target.encode())
    assert said.count(b"HTTP/1.1 ") == 1
    status = int(said[9:12])
    assert status in (200, 400), said[:300]
    assert b"\r\nX:y" not in said


def test_requests_by_h11_come_back_whole(server: Running) -> None:
    """[W7][A3] Legal ones, oddly made, several on one connection."""
    with server.connect() as connection:
        client = h11.Connection(h11.CLIENT)
        for number in range(5):
            pieces = [b"x" * (number + 1), b"\r\n\r\n0\r\n\r\n", INNER]
            headers = [("Host", "x"), ("Transfer-Encoding", "chunked"), ("X-Long", "v" * 5000)]
            out = client.send(h11.Request(method="POST", target=f"/h11/{number}", headers=headers)) or b""
            for piece in pieces:
                out += client.send(h11.Data(data=piece)) or b""
            connection.sendall(out + (client.send(h11.EndOfMessage()) or b""))
            body = read_by_h11(client, connection)
            assert json.loads(body)["body"].encode("latin-1") == b"".join(pieces)
            if client.our_state is not h11.DONE or client.their_state is not h11.DONE:
                break
            client.start_next_cycle()
    assert "/smuggled" not in ask(server)["seen"]


def read_by_h11(client: h11.Connection, connection: socket.socket) -> bytes:
    body = b""
    for _ in until(10, pause=0):
        event = client.next_event()
        if event is h11.NEED_DATA:
            client.receive_data(connection.recv(65_536))
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return body
        elif isinstance(event, h11.ConnectionClosed):
            break
    raise AssertionError(f"the answer broke off after {body!r:.200}")
