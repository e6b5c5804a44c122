"""AsgiToWsgi among servers with odd environs, interrupts, and apps that ask too early."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from bridge import AsgiToWsgi, LifespanFailure
from bridge.loops import TurnedLoop
from tests.drivers import FakeInput, WsgiServer, make_environ, run_in_thread

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


async def answer(send: Send, body: bytes = b"ok") -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send)


def wrap(app: Any, loop: Any = "shared", lifespan: Any = "off") -> AsgiToWsgi:
    return AsgiToWsgi(app, loop=loop, lifespan=lifespan)


@pytest.mark.parametrize("loop", ["request", "shared"])
@pytest.mark.parametrize(
    ("odd", "status"),
    [
        ({"RAW_URI": b"/bytes"}, "200 OK"),
        ({"CONTENT_LENGTH": 5}, "400 Bad Request"),
        ({"CONTENT_LENGTH": b"x"}, "400 Bad Request"),
    ],
    ids=["bytes as RAW_URI", "an int as CONTENT_LENGTH", "bytes as CONTENT_LENGTH"],
)
def test_an_odd_environ_leaves_nothing_behind(loop: str, odd: dict[str, Any], status: str) -> None:
    """[A1, A3, S2]"""
    with wrap(plain, loop) as application:
        for _ in range(3):
            result = WsgiServer(validate=False).run(application, make_environ() | odd)
            assert result.status == status
    assert not application._life.cycles


@pytest.mark.parametrize("loop", ["request", "shared"])
def test_an_environ_without_a_method_is_the_servers_error(loop: str) -> None:
    """[S2]"""
    with wrap(plain, loop) as application:
        with pytest.raises(KeyError, match="REQUEST_METHOD"):
            application({"wsgi.input": FakeInput()}, lambda *arguments: None)  # type: ignore[arg-type]
        assert not application._life.cycles
        assert WsgiServer().run(application).body == b"ok"


def test_a_thread_that_was_kept_from_stepping_down_takes_its_loop_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """[A16] A signal's handler may raise anywhere in the main thread, there as well."""
    with wrap(plain) as application:
        assert WsgiServer().run(application).body == b"ok"

        def interrupted(loop: TurnedLoop) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(TurnedLoop, "_step_down", interrupted)
            WsgiServer().run(application)
        assert WsgiServer().run(application).body == b"ok"


def test_an_app_that_asks_its_own_wrapper_during_startup_gets_an_error() -> None:
    """[A19] And no deadlock."""
    application: AsgiToWsgi
    errors: list[RuntimeError] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            return await answer(send)
        await receive()
        try:
            await anyio.to_thread.run_sync(application, make_environ(), lambda *arguments: None)  # type: ignore[arg-type]
        except RuntimeError as error:
            errors.append(error)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    application = wrap(app, lifespan="on")
    try:
        result = run_in_thread(WsgiServer().run, application)
        assert result.body == b"ok"
        assert "before its startup was complete" in str(errors[0])
    finally:
        application.close()


@pytest.mark.parametrize("word", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_during_startup_is_raised_as_itself(word: type[BaseException]) -> None:
    """[A19] It says nothing of whether the app knows lifespan."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise word

    application = wrap(app, lifespan="auto")
    with pytest.raises(word):
        application.startup()
    application.close()


def test_closing_in_a_signals_handler_during_startup_is_an_error() -> None:
    """[A20] And no deadlock."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(1000):  # the handler runs in this thread, between two of its instructions
            await anyio.lowlevel.checkpoint()
        await send({"type": "lifespan.startup.failed", "message": "not reached"})

    application = wrap(app, lifespan="on")
    former = signal.signal(signal.SIGUSR1, lambda *arguments: application.close())
    try:
        assert threading.current_thread() is threading.main_thread()
        with pytest.raises(LifespanFailure) as raised:
            application.startup()
        assert "under way" in str(raised.value.__cause__)  # the handler ran in the app's own code
    finally:
        signal.signal(signal.SIGUSR1, former)
        application.close()


def test_a_group_of_errors_that_tell_of_leaving_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """[A10] As a task group makes one of them."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
                await anyio.sleep(0.001)

        async with anyio.create_task_group() as group:
            group.start_soon(stream)

    with wrap(app) as application:
        exchange = WsgiServer().start(application)
        next(exchange)
        exchange.close()
    assert "failed" not in caplog.text
