"""AsgiToWsgi under many threads: requests of ten kinds at random, every answer right, nothing left."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import time
import types
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest
import uvloop
from asgiref.sync import sync_to_async

from bridge import AsgiToWsgi
from tests.drivers import LIMIT, FakeInput, Message, WsgiServer, make_environ, run_in_threads

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

FACTORIES = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
SEED = 20_240_615
REQUESTS = int(os.environ.get("BRIDGE_STRESS", "1250"))
"""In each of the sixteen cases: 20,000 in all. A release is worth BRIDGE_STRESS=20000, ten minutes."""

pytestmark = pytest.mark.usefixtures("loops_as_in_production")


class Boom(Exception):
    """An app's own mistake."""


class Site:
    """An app of ten kinds of requests, and what each must give."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.background: list[int] = []
        self.left: list[int] = []
        self.lock: asyncio.Lock | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, kind, number = scope["path"].split("/")
        await getattr(self, kind)(int(number), receive, send)

    async def answer(self, send: Send, *blocks: bytes) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        for block in blocks[:-1]:
            await send({"type": "http.response.body", "body": block, "more_body": True})
        await send({"type": "http.response.body", "body": blocks[-1]})

    async def plain(self, number: int, receive: Receive, send: Send) -> None:
        await self.answer(send, b"%d" % number)

    async def stream(self, number: int, receive: Receive, send: Send) -> None:
        await self.answer(send, *[b"%d," % part for part in range(number % 20)], b".")

    async def big(self, number: int, receive: Receive, send: Send) -> None:
        await self.answer(send, *[bytes(20_000)] * 10)

    async def body(self, number: int, receive: Receive, send: Send) -> None:
        data, more_body = b"", True
        while more_body:
            message = await receive()
            data, more_body = data + message["body"], message["more_body"]
        await self.answer(send, data)

    async def task(self, number: int, receive: Receive, send: Send) -> None:
        await self.answer(send, b"%d" % number)
        await asyncio.sleep(0.001)
        self.background.append(number)

    async def early(self, number: int, receive: Receive, send: Send) -> None:
        try:
            await self.answer(send, *[b"%6d" % number * 1000] * 50)
        except OSError:
            self.left.append(number)

    async def error(self, number: int, receive: Receive, send: Send) -> None:
        if number % 2:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise Boom(number)

    async def timeout(self, number: int, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await asyncio.wait_for(receive(), 0.002)
        except TimeoutError:
            await self.answer(send, b"%d" % number)

    async def group(self, number: int, receive: Receive, send: Send) -> None:
        results: list[int] = []

        async def work(part: int) -> None:
            results.append(await anyio.to_thread.run_sync(lambda: part))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work, 1)
            tasks.start_soon(work, 2)
        await self.answer(send, b"%d" % sum(results))

    async def locked(self, number: int, receive: Receive, send: Send) -> None:
        if self.lock is None or not self.shared:
            self.lock = asyncio.Lock()
        async with self.lock:
            await asyncio.sleep(0)
            thread = await sync_to_async(threading.get_ident)()
        assert thread != threading.get_ident()
        await self.answer(send, b"%d" % number)


KINDS = "plain stream big body task early error timeout group locked".split()


def visit(application: AsgiToWsgi, kind: str, number: int) -> None:
    """One request, and whether its answer is right."""
    path = f"/{kind}/{number}"
    expected = b"%d" % number
    environ = make_environ(path=path)
    if kind == "body":
        parts = [b"%d" % number, b"-", b"x" * (number % 1000), b"!"]
        expected = b"".join(parts)
        stream = FakeInput(parts, fills=False)
        environ = make_environ("POST", path, body=stream, CONTENT_LENGTH=str(len(expected)))
    elif kind == "stream":
        expected = b"".join(b"%d," % part for part in range(number % 20)) + b"."
    elif kind == "big":
        expected = bytes(200_000)
    elif kind == "group":
        expected = b"3"
    if kind == "early":
        expected = b"%6d" % number * 1000
        with WsgiServer().start(application, environ) as exchange:
            assert next(exchange) == expected
        return
    exchange = WsgiServer().run(application, environ)
    if kind == "error":
        assert isinstance(exchange.error, Boom)
        assert exchange.error.args == (number,)
        assert exchange.body == (b"x" if number % 2 else b"")
        return
    for error in (exchange.error, exchange.close_error):
        if error is not None:
            raise error
    assert exchange.body == expected, path


@pytest.mark.timeout(60 + REQUESTS // 50)
@pytest.mark.parametrize("threads_of_a_loop", ["many", "one"])
@pytest.mark.parametrize("interval", [0.005, 1e-6], ids=["as usual", "hectic"])
@pytest.mark.parametrize("factory", list(FACTORIES))
@pytest.mark.parametrize("loop", ["request", "shared"])
def test_every_answer_is_right_under_sixteen_threads(
    loop: Any, factory: str, interval: float, threads_of_a_loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A14] [A15] [A16] [S2] [S3]"""
    if threads_of_a_loop == "one":
        monkeypatch.setitem(sys.modules, "greenlet", types.ModuleType("greenlet"))
    site = Site(loop == "shared")
    choice = random.Random(SEED)
    kinds = [choice.choice(KINDS) for _ in range(REQUESTS)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        with AsgiToWsgi(site, loop=loop, loop_factory=FACTORIES[factory], lifespan="off") as application:
            run_in_threads(
                lambda number: visit(application, kinds[number], number),
                REQUESTS,
                threads=16,
                timeout=50 + REQUESTS // 50,
            )
            if loop == "request":
                assert len(site.background) == kinds.count("task")
    finally:
        sys.setswitchinterval(before)
    assert len(site.background) == kinds.count("task")
    assert sorted(site.left) == [number for number, kind in enumerate(kinds) if kind == "early"]


@pytest.mark.parametrize("loop", ["request", "shared"])
def test_close_in_the_middle_of_traffic_loses_no_request(loop: Any) -> None:
    """[A20] Each close ends a life, each next request begins one."""
    site = Site(loop == "shared")
    application = AsgiToWsgi(site, loop=loop, lifespan="off")
    stop = threading.Event()

    def close_often() -> None:
        while not stop.wait(0.003):
            application.close()

    closer = threading.Thread(target=close_often)
    closer.start()
    try:
        run_in_threads(
            lambda number: visit(application, ("plain", "stream", "body")[number % 3], number), 600, threads=8
        )
    finally:
        stop.set()
        closer.join(LIMIT)
        application.close()


def test_many_short_lives_leave_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """[A21]"""
    began = time.monotonic()
    for number in range(50):
        with AsgiToWsgi(Site(True), loop="shared") as application:
            visit(application, "plain", number)
    assert time.monotonic() - began < LIMIT
    assert not [record for record in caplog.records if record.name == "bridge"]
