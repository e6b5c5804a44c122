"""Small WSGI apps that the tests of WsgiToAsgi share, and how one request is served by one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import anyio
import pytest

from bridge import WsgiToAsgi
from tests.drivers import AsgiServer, HttpExchange, Message, Piece, Signal

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], object]]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

GONE: Message = {"type": "http.disconnect"}
EXPECT = [(b"expect", b"100-continue"), (b"content-length", b"5")]
PATHSEND: dict[str, Any] = {"http.response.pathsend": {}}


class Body:
    """What an app returns: blocks, of which the closes are counted."""

    def __init__(self, blocks: Iterable[Any], on_close: Callable[[], object] = lambda: None) -> None:
        self.blocks = iter(blocks)
        self.on_close = on_close
        self.closes = 0
        self.closed_at = 0.0  # time.monotonic() of the last close
        self.closed = Signal("close()")

    def __iter__(self) -> Iterator[Any]:
        return self.blocks

    def close(self) -> None:
        self.closes += 1
        self.closed_at = time.monotonic()
        self.closed.set()
        self.on_close()


def answer(body: Iterable[Any], status: str = "200 OK", headers: Iterable[Any] = ()) -> App:
    """An app that answers always the same."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, list(headers))
        return body

    return app


def hello(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"hello"]


def never(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    pytest.fail("the app was called")


def echo(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


async def serve(
    app: App, scope: dict[str, Any] | None = None, body: bytes | Iterable[Piece] = b"", **server: bool
) -> HttpExchange:
    """Serve one request, after which the app's thread is free, whatever has happened."""
    bridge = WsgiToAsgi(app)
    exchange = await AsgiServer(**server).run(bridge, scope, body)
    assert bridge._workers.stop(5)
    return exchange


async def settle() -> None:
    """Let every task that can go on do so, and be slow enough that a watch on the client has begun."""
    await anyio.sleep(0.1)
