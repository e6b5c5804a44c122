"""What an operator sees of a wrapper: its statistics, what it logs, and the notes on errors."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from bridge import AsgiToWsgi, WsgiToAsgi, asgi_to_wsgi, life, wsgi_to_asgi
from bridge.errors import shown_requests
from tests.drivers import LIMIT, AsgiServer, Signal, WsgiServer, in_thread, make_environ, make_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIEnvironment


def of_wsgi(application: WsgiToAsgi) -> dict[str, int]:
    return dataclasses.asdict(application.statistics())


def of_asgi(application: AsgiToWsgi) -> dict[str, int]:
    return dataclasses.asdict(application.statistics())


class Rooms:
    """An app whose requests stay inside until they are let go."""

    def __init__(self) -> None:
        self.inside = Signal("inside")
        self.leave = Signal("leave")

    def wsgi(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        self.inside.set()
        self.leave.wait()
        return [b"hello"]

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise ValueError("none here")
        self.inside.set()
        await self.leave.wait_async()
        await respond(send)


async def respond(send: Any, *blocks: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    for block in blocks:
        await send({"type": "http.response.body", "body": block, "more_body": True})
    await send({"type": "http.response.body", "body": b"end"})


# Statistics


async def test_statistics_of_wsgi_to_asgi_count_threads_and_requests() -> None:
    rooms = Rooms()
    application = WsgiToAsgi(rooms.wsgi, threads=1)
    assert of_wsgi(application) == {"threads": 0, "running": 0, "streaming": 0, "waiting": 0}
    async with AsgiServer().start(application) as first:
        await rooms.inside.wait_async()
        async with AsgiServer().start(application) as second:
            while not application.statistics().waiting:
                await asyncio_or_trio_pause()
            assert of_wsgi(application) == {"threads": 1, "running": 1, "streaming": 0, "waiting": 1}
            rooms.leave.set()
            await second.finish()
        await first.finish()
    await in_a_thread(application.close)
    assert of_wsgi(application) == {"threads": 0, "running": 0, "streaming": 0, "waiting": 0}


async def asyncio_or_trio_pause() -> None:
    import anyio

    await anyio.sleep(0.001)


async def in_a_thread(call: Callable[[], object]) -> None:
    import anyio.to_thread

    await anyio.to_thread.run_sync(call)


async def test_statistics_of_wsgi_to_asgi_count_streams_beside_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """[W19]"""
    monkeypatch.setattr(wsgi_to_asgi, "STREAM_SECONDS", 0.01)
    leave = Signal("leave")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"a"
        leave.wait()
        yield b"b"

    application = WsgiToAsgi(app)
    async with AsgiServer().start(application) as exchange:
        while not application.statistics().streaming:
            await asyncio_or_trio_pause()
        assert of_wsgi(application) == {"threads": 1, "running": 0, "streaming": 1, "waiting": 0}
        leave.set()
        await exchange.finish()


def test_statistics_of_asgi_to_wsgi_count_requests_and_loops() -> None:
    rooms = Rooms()
    application = AsgiToWsgi(rooms.asgi)
    nothing = dict.fromkeys(of_asgi(application), 0)
    assert of_asgi(application) == nothing
    call = in_thread(lambda: WsgiServer().run(application))
    rooms.inside.wait()
    assert of_asgi(application) == nothing | {"requests": 1, "loops": 1}
    rooms.leave.set()
    assert call.result().body == b"end"
    assert of_asgi(application) == nothing | {"loops": 1}  # in the pool, for the next one
    application.close()
    assert of_asgi(application) == nothing


def test_statistics_of_asgi_to_wsgi_tell_streams_from_background_work() -> None:
    """[A10]"""
    go_on = Signal("go on")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"a", b"b")
        await go_on.wait_async()

    with AsgiToWsgi(app, loop="shared", lifespan="off") as application:
        with WsgiServer().start(application) as exchange:
            assert next(exchange) == b"a"
            assert application.statistics().streaming == 1
            assert b"".join(exchange) == b"bend"
        after = application.statistics()
        assert (after.requests, after.streaming, after.background, after.loops) == (1, 0, 1, 1)
        go_on.set()
    assert application.statistics().requests == 0


def test_statistics_of_asgi_to_wsgi_count_threads_that_wait_and_handovers() -> None:
    """[A15] The thread that waits first runs the loop, the other one waits; when the first is done it hands over."""
    rooms = {"/1": Rooms(), "/2": Rooms()}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await rooms[scope["path"]].asgi(scope, receive, send)

    with AsgiToWsgi(app, loop="shared", lifespan="off") as application:
        calls = []
        for path, room in rooms.items():
            calls.append(in_thread(lambda path=path: WsgiServer().run(application, make_environ(path=path))))
            room.inside.wait()
        busy = application.statistics()
        assert (busy.requests, busy.waiting, busy.handovers) == (2, 1, 0)
        rooms["/1"].leave.set()
        calls[0].result()
        assert application.statistics().handovers == 1
        rooms["/2"].leave.set()
        calls[1].result()
        assert application.statistics().waiting == 0


def test_statistics_can_be_asked_for_from_within_the_app_and_from_many_threads() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert application.statistics().requests >= 1
        await respond(send)

    application = AsgiToWsgi(app, lifespan="off")
    threads = [threading.Thread(target=lambda: [WsgiServer().run(application) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert application.statistics().requests <= 4
    application.close()


# A slow shutdown


async def test_a_slow_shutdown_of_wsgi_to_asgi_names_the_request_that_holds_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[W22]"""
    monkeypatch.setattr(wsgi_to_asgi, "NOTICE_SECONDS", 0.02)
    rooms = Rooms()
    application = WsgiToAsgi(rooms.wsgi)
    caplog.handler.addFilter(lambda record: rooms.leave.set() or True)  # type: ignore[func-returns-value]
    async with AsgiServer().start(application, make_scope("GET", "/slow\n", query_string=b"token=x")) as exchange:
        await rooms.inside.wait_async()
        await in_a_thread(application.close)
        await exchange.finish()
    assert [record.message for record in caplog.records] == [
        r"the shutdown waits for 1 request in the app: 'GET /slow\n'"
    ]


def test_a_slow_shutdown_of_asgi_to_wsgi_names_the_request_that_holds_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[A20]"""
    monkeypatch.setattr(life, "NOTICE_SECONDS", 0.02)
    rooms = Rooms()
    application = AsgiToWsgi(rooms.asgi)
    caplog.handler.addFilter(lambda record: rooms.leave.set() or True)  # type: ignore[func-returns-value]
    call = in_thread(lambda: WsgiServer().run(application, make_environ(path="/slow", SCRIPT_NAME="/api")))
    rooms.inside.wait()
    application.close()
    assert call.result().body == b"end"
    assert [record.message for record in caplog.records] == [
        "the shutdown waits for 1 request in the app: 'GET /api/slow'"
    ]


def test_a_few_requests_are_named_and_the_rest_is_counted() -> None:
    assert shown_requests([f"GET /{n}" for n in range(7)]) == (
        "7 requests in the app: 'GET /0', 'GET /1', 'GET /2', 'GET /3', 'GET /4', 2 more"
    )


# Another event loop


def use_twice(error: Callable[[], BaseException], loop: str) -> list[str]:
    """The notes on an error of the app, or what it is otherwise."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error()

    application = AsgiToWsgi(app, loop=loop, lifespan="off")  # type: ignore[arg-type]
    caught = WsgiServer().run(application).error
    application.close()
    return getattr(caught, "__notes__", [])


def test_a_lock_of_another_request_is_an_error_that_names_the_shared_loop() -> None:
    """[A14] The very error, as asyncio raises it."""
    lock = asyncio.Lock()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with lock:
            with contextlib.suppress(TimeoutError):  # only one who has to wait binds the lock to its loop
                await asyncio.wait_for(lock.acquire(), 0.001)
        await respond(send)

    first, second = AsgiToWsgi(app, lifespan="off"), AsgiToWsgi(app, lifespan="off")
    assert WsgiServer().run(first).body == b"end"
    error = WsgiServer().run(second).error
    first.close()
    second.close()
    assert isinstance(error, RuntimeError)
    assert "is bound to a different event loop" in str(error)
    assert error.__notes__ == [asgi_to_wsgi.LOOP_NOTE]
    assert 'loop="shared"' in asgi_to_wsgi.LOOP_NOTE


@pytest.mark.parametrize(
    "error",
    [
        lambda: RuntimeError("Task got Future attached to a different loop"),
        lambda: ExceptionGroup("two", [ValueError(), RuntimeError("is bound to a different event loop")]),
    ],
)
def test_the_note_is_only_for_a_loop_of_the_request(error: Callable[[], BaseException]) -> None:
    """[A14]"""
    assert use_twice(error, "request") == [asgi_to_wsgi.LOOP_NOTE]
    assert use_twice(error, "shared") == []


def test_other_errors_get_no_note() -> None:
    assert use_twice(lambda: RuntimeError("no database"), "request") == []


class Silent(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("no words")


def test_an_error_that_cannot_be_shown_reaches_the_server_all_the_same() -> None:
    """[A9]"""
    assert use_twice(Silent, "request") == []


# Logging


def test_the_logger_has_no_handler_and_no_level_of_its_own() -> None:
    """What to do with records is the application's choice (Python's logging HOWTO)."""
    logger = logging.getLogger("bridge")
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)


QUIET = """
import asyncio, contextlib, threading
from bridge import AsgiToWsgi
from tests.drivers import WsgiServer, make_environ

closed = threading.Event()

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"hello"})
    while not closed.is_set():
        await asyncio.sleep(0.001)
    if scope["method"] == "POST":
        raise ValueError("after the response")

with contextlib.closing(AsgiToWsgi(app, loop="shared", lifespan="off")) as application:
    WsgiServer().run(application, make_environ("METHOD"))
    closed.set()
"""


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_any_settings_only_what_went_wrong_is_written(method: str) -> None:
    """[A9] To stderr, as the logging HOWTO has it for libraries: a handler that does nothing would hide it."""
    command = [sys.executable, "-c", QUIET.replace("METHOD", method)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    lines = done.stderr.splitlines() or ["", ""]
    expected = ("the app failed after its response", "ValueError: after the response") if method == "POST" else ("", "")
    assert (lines[0], lines[-1]) == expected
    assert done.stdout == ""
