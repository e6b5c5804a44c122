"""AsgiToWsgi among servers with odd environs, interrupts, and apps that ask too early."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from bridge import AsgiToWsgi, LifespanFailure, threads
from bridge.asgi_to_wsgi import _Cycle
from bridge.life import Life
from bridge.loops import LoopPool, TurnedLoop
from tests.drivers import FakeInput, WsgiServer, in_thread, make_environ, run_in_thread, run_in_threads

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
    assert not application._life.requests


@pytest.mark.parametrize("loop", ["request", "shared"])
def test_an_environ_without_a_method_is_the_servers_error(loop: str) -> None:
    """[S2]"""
    with wrap(plain, loop) as application:
        with pytest.raises(KeyError, match="REQUEST_METHOD"):
            application({"wsgi.input": FakeInput()}, lambda *arguments: None)
        assert not application._life.requests
        assert WsgiServer().run(application).body == b"ok"


def test_a_task_factory_that_raises_fails_the_request() -> None:
    """[A9] Also where another thread runs the loop: whose request it is would wait for ever."""
    holds, leave = threading.Event(), asyncio.Event()

    def fail(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        raise RuntimeError("no task today")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        if scope["path"] == "/hold":
            loop.set_task_factory(fail)
            loop.call_soon(holds.set)
            await leave.wait()
            loop.set_task_factory(None)
        await answer(send)

    with wrap(app) as application:
        holder = in_thread(WsgiServer().run, application, make_environ(path="/hold"))
        assert holds.wait(10)
        loop = application._life.shared
        assert loop is not None
        assert str(WsgiServer().run(application).error) == "no task today"
        loop.post(leave.set)
        assert holder.result().body == b"ok"
        assert WsgiServer().run(application).body == b"ok"
    assert not application._life.requests


def test_a_servers_thread_may_look_at_its_response_in_the_middle_of_a_send() -> None:
    """[A7] Where another thread runs the loop, and it was woken for something else."""
    holds, looked, leave = threading.Event(), threading.Event(), asyncio.Event()
    cycle: Any = None

    class Blocks(deque[bytes]):
        """Have the request's thread look as soon as there is one."""

        def append(self, block: bytes) -> None:
            super().append(block)
            if not looked.is_set():
                loop.tell(cycle._turn)
                assert looked.wait(10)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/hold":
            asyncio.get_running_loop().call_soon(holds.set)
            await leave.wait()
        await answer(send)

    def bridged(environ: Any, start_response: Any) -> Any:
        nonlocal cycle
        cycle = _Cycle(application, application._life, environ, start_response)
        cycle._blocks = Blocks()
        try:
            return cycle.begin()
        finally:
            looked.set()

    with wrap(app) as application:
        holder = in_thread(WsgiServer().run, application, make_environ(path="/hold"))
        assert holds.wait(10)
        assert application._life.shared is not None
        loop = application._life.shared
        exchange = WsgiServer().run(bridged)
        loop.post(leave.set)
        assert (exchange.error, exchange.body) == (None, b"ok")
        assert holder.result().body == b"ok"


def test_a_thread_that_was_kept_from_stepping_down_takes_its_loop_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """[A16] A signal's handler may raise anywhere in the main thread, there as well."""
    with wrap(plain) as application:
        assert WsgiServer().run(application).body == b"ok"

        def interrupted(*_: object) -> None:
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
            await anyio.to_thread.run_sync(application, make_environ(), lambda *arguments: None)
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


def test_the_limit_of_the_startup_does_not_end_the_shutdown() -> None:
    """[A20] Also where it would be reached in the middle of it."""
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.sleep(0.3)  # longer than the startup's limit
        ended.append("shutdown")
        await send({"type": "lifespan.shutdown.complete"})

    application = AsgiToWsgi(app, startup_timeout=0.2)
    application.startup()
    application.close()
    assert ended


def test_threads_that_race_for_the_first_request_wait_for_the_one_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """[A19] None of them takes a startup that has just begun for one that never ends."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            return await answer(send)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    real = threads.Mutex.acquire

    def acquire(mutex: threads.Mutex, *arguments: Any, **options: Any) -> bool:
        taken = real(mutex, *arguments, **options)
        if taken:
            time.sleep(0.02)  # the others come meanwhile
        return taken

    monkeypatch.setattr(threads.Mutex, "acquire", acquire)
    with contextlib.closing(AsgiToWsgi(app)) as application:
        barrier = threading.Barrier(8)

        def serve(number: int) -> bytes:
            barrier.wait()
            return WsgiServer().run(application).body

        assert run_in_threads(serve, 8, threads=8) == [b"ok"] * 8


def test_an_interrupt_leaves_the_startup_to_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """[A19] A signal's handler raises when the mutex has just been taken."""
    real = threads.Mutex.acquire

    def acquire(mutex: threads.Mutex, *arguments: Any, **options: Any) -> bool:
        real(mutex, *arguments, **options)
        raise KeyboardInterrupt

    with contextlib.closing(wrap(plain)) as application:
        with monkeypatch.context() as patch:
            patch.setattr(threads.Mutex, "acquire", acquire)
            with pytest.raises(KeyboardInterrupt):
                application.startup()
        assert run_in_thread(WsgiServer().run, application).body == b"ok"


@pytest.mark.parametrize("word", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_right_after_the_apps_word_that_it_has_started_is_not_lost(word: type[BaseException]) -> None:
    """[A19] [A20] Else SIGTERM would be: a server's worker that is stopped while it starts would go on for ever."""
    words: list[BaseException] = [word()]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            return await answer(send)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        if words:
            raise words.pop()
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    with contextlib.closing(wrap(app, lifespan="on")) as application:
        with pytest.raises(word):
            application.startup()
        assert WsgiServer().run(application).body == b"ok"


@pytest.mark.parametrize("loop", ["request", "shared"])
def test_an_interrupt_right_after_a_request_was_let_in_lets_it_go(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[A20] No shutdown waits for it."""
    real = Life.enter

    def enter(life: Life, cycle: Any) -> TurnedLoop:
        entered = real(life, cycle)
        if loop == "request":
            life.pool.give_back(entered)
        raise KeyboardInterrupt

    with contextlib.closing(wrap(plain, loop)) as application:
        with monkeypatch.context() as patch:
            patch.setattr(Life, "enter", enter)
            with pytest.raises(KeyboardInterrupt):
                list(application(make_environ(), lambda *arguments: None))
        assert not application._life.requests


def test_an_interrupt_while_a_loop_is_given_back_lets_its_request_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """[A20]"""
    real = LoopPool.give_back

    def give_back(pool: LoopPool, *arguments: Any, **options: Any) -> None:
        real(pool, *arguments, **options)
        raise KeyboardInterrupt

    with contextlib.closing(wrap(plain, "request")) as application:
        with monkeypatch.context() as patch:
            patch.setattr(LoopPool, "give_back", give_back)
            result: Any = application(make_environ(), lambda *arguments: None)
            with pytest.raises(KeyboardInterrupt):
                result.close()
        assert not application._life.requests


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


@pytest.mark.parametrize("loop", ["request", "shared"])
def test_responses_that_nobody_closes_do_not_hold_up_the_shutdown(loop: str) -> None:
    """[A20] werkzeug's test client reads to the end, and may keep the response."""
    application = wrap(plain, loop)
    results: list[Any] = [application(make_environ(), lambda *_: lambda _: None) for _ in range(3)]
    assert [b"".join(result) for result in results] == [b"ok"] * 3
    began = time.monotonic()
    application.close()
    assert time.monotonic() - began < 5
    assert application.statistics().requests == 0
    for result in results:
        result.close()
