"""The apps that are measured: each as a WSGI app and as an ASGI app, with the same answer.

They do as little as they can, so that what is measured is the way to them. Whoever calls them checks what they answer.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

HELLO = b"Hello, world!"
BLOCK = b"0123456789abcdef" * 256
BLOCKS = 256
READ = 65_536


# WSGI


def hello(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(HELLO)))])
    return [HELLO]


def hello_generator(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
    """As hello, but nothing tells beforehand that its one block is all."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield HELLO


def echo(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    start_response("200 OK", [("Content-Type", "application/octet-stream"), ("Content-Length", str(len(body)))])
    return [body]


def upload(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Reads the whole body in 64 KiB reads and answers its size."""
    read = environ["wsgi.input"].read
    size = 0
    while block := read(READ):
        size += len(block)
    answer = str(size).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(answer)))])
    return [answer]


def stream(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    for _ in range(BLOCKS):
        yield BLOCK


def sleep(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    time.sleep(0.02)
    return hello(environ, start_response)


# ASGI


def _only_http(scope: dict[str, Any]) -> None:
    """As most plain apps do: a lifespan scope is refused by raising."""
    if scope["type"] != "http":
        raise ValueError(f"expected scope type 'http', got {scope['type']!r}")


def _start(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain"), *headers]}


async def async_hello(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    _only_http(scope)
    await send(_start((b"content-length", b"13")))
    await send({"type": "http.response.body", "body": HELLO})


async def async_echo(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    _only_http(scope)
    body, more_body = b"", True
    while more_body:
        message = await receive()
        body += message["body"]
        more_body = message["more_body"]
    await send(_start((b"content-length", str(len(body)).encode())))
    await send({"type": "http.response.body", "body": body})


async def async_upload(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    _only_http(scope)
    size, more_body = 0, True
    while more_body:
        message = await receive()
        size += len(message["body"])
        more_body = message["more_body"]
    answer = str(size).encode()
    await send(_start((b"content-length", str(len(answer)).encode())))
    await send({"type": "http.response.body", "body": answer})


async def async_stream(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    _only_http(scope)
    await send(_start())
    for _ in range(BLOCKS):
        await send({"type": "http.response.body", "body": BLOCK, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def fastapi_hello() -> Any:
    from fastapi import FastAPI

    site = FastAPI()

    @site.get("/")
    async def hello() -> dict[str, str]:
        return {"hello": "world"}

    return site
