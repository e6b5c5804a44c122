"""Faults injected where a server, an app or the machine can fail, each with its outcome.

What an app raises at each step, and send() and receive() that fail, is held by the wrappers' own tests; here are the
rest: threads that cannot be started, answers out of order, streams that fail in odd ways, calls after the end, forks.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from bridge import AsgiToWsgi, WsgiToAsgi
from bridge.errors import BridgeError, ClientDisconnected, ProtocolError
from tests.drivers import (
    AsgiServer,
    FakeInput,
    Signal,
    WsgiServer,
    complaints,
    in_thread,
    make_environ,
    make_scope,
    run_in_thread,
)

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment


class OnPurpose(Exception):
    """Raised by what is to fail."""


ODD_ERRORS = [OnPurpose, MemoryError, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, EOFError]


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Say by their name's beginning which threads cannot be started; "-" for none."""
    start = threading.Thread.start
    refused = ["-"]

    def start_some(thread: threading.Thread) -> None:
        if thread.name.startswith(refused[0]):
            raise RuntimeError("can't start new thread")
        start(thread)

    def refuse(name: str) -> None:
        refused[0] = name

    monkeypatch.setattr(threading.Thread, "start", start_some)
    yield refuse
    refuse("-")


# No thread can be started ---------------------------------------------------------------------------------------------


def test_requests_are_served_where_no_thread_can_watch_the_loop(
    no_thread: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A15][A16] What the loop still has to do waits for the next request, and for a thread once there can be one."""
    monkeypatch.setattr("bridge.loops._watch", type(__import__("bridge.loops").loops._watch)())
    done = Signal("the background task")

    async def background() -> None:
        await asyncio.sleep(0.01)
        done.set()

    tasks: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not tasks:
            tasks.append(asyncio.ensure_future(background()))
        await hello(scope, receive, send)

    with AsgiToWsgi(app, loop="shared", lifespan="off") as wrapped:
        no_thread("bridge-watch")
        assert run_in_thread(WsgiServer().run, wrapped).body == b"hello"
        no_thread("-")
        assert run_in_thread(WsgiServer().run, wrapped).body == b"hello"
        done.wait()


def test_a_request_within_a_loop_fails_where_no_thread_can_lead(no_thread: Callable[[str], None]) -> None:
    """[A15] As itself; and the loop is nobody's, so that the next ones are served."""
    with AsgiToWsgi(hello, loop="shared", lifespan="off") as wrapped:

        async def within() -> Any:
            return WsgiServer().run(wrapped)

        no_thread("bridge-keeper")
        failed = asyncio.run(within())
        assert isinstance(failed.error, RuntimeError)
        assert run_in_thread(WsgiServer().run, wrapped).body == b"hello"
        no_thread("-")
        assert asyncio.run(within()).body == b"hello"


def test_who_cannot_lead_is_served_once_a_thread_can_be_started(no_thread: Callable[[str], None]) -> None:
    """[A15] The leader leaves, nobody else can lead, and no thread can be started: the watch tries until one can."""
    entered, go_on = Signal("the first in the app"), Signal("its leave to go on")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/first":
            entered.set()
            await go_on.wait_async()
        else:
            go_on.set()
            await asyncio.sleep(0.05)  # the leader has gone by then
        await hello(scope, receive, send)

    with AsgiToWsgi(app, loop="shared", lifespan="off") as wrapped:

        async def within() -> Any:
            return WsgiServer().run(wrapped, make_environ(path="/second"))

        no_thread("bridge-keeper")
        first = in_thread(WsgiServer().run, wrapped, make_environ(path="/first"))
        entered.wait()
        second = in_thread(asyncio.run, within())
        assert first.result().body == b"hello"
        no_thread("-")
        assert second.result().body == b"hello"


# A loop that cannot be made, or dies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["shared", "request"])
@pytest.mark.parametrize("lifespan", ["off", "auto"])
def test_a_loop_that_cannot_be_made_fails_its_request_alone(loop: Any, lifespan: Any) -> None:
    """[A14] The process has no descriptor left, say: the server hears it as itself, and the next request is served."""
    error = OSError(errno.EMFILE, "Too many open files")
    failures = [error]

    def factory() -> asyncio.AbstractEventLoop:
        if failures:
            raise failures.pop()
        return asyncio.new_event_loop()

    wrapped = AsgiToWsgi(hello, loop=loop, loop_factory=factory, lifespan=lifespan)
    assert WsgiServer().run(wrapped).error is error
    assert dataclasses.astuple(wrapped.statistics()) == (0,) * 7
    assert WsgiServer().run(wrapped).body == b"hello"
    wrapped.close()


def test_a_dead_loop_fails_every_request_and_hangs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """[A15] As the loop itself says it: who waits for it, who leads it, and who comes later."""
    loops: list[Any] = []
    entered, go_on = Signal("the first in the app"), Signal("its leave to go on")
    error = OSError(errno.EBADF, "Bad file descriptor")

    def factory() -> asyncio.AbstractEventLoop:
        loops.append(asyncio.SelectorEventLoop())
        return loops[0]  # type: ignore[no-any-return]

    def select(timeout: float | None) -> Any:
        raise error

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            entered.set()
            await go_on.wait_async()
        elif scope["path"] == "/die":  # as if something had closed what the loop polls
            patch.setattr(loops[0]._selector, "select", select)
        await asyncio.sleep(0.001)  # what waits for nothing needs no loop
        await hello(scope, receive, send)

    with AsgiToWsgi(app, loop="shared", loop_factory=factory, lifespan="off") as wrapped:
        assert WsgiServer().run(wrapped).body == b"hello"
        with monkeypatch.context() as patch:
            waiting = in_thread(WsgiServer().run, wrapped, make_environ(path="/wait"))
            entered.wait()
            assert run_in_thread(WsgiServer().run, wrapped, make_environ(path="/die")).error is error
            assert waiting.result().error is error
            assert [WsgiServer().run(wrapped).error for _ in range(2)] == [error] * 2
        go_on.set()  # all that it had to do is still there
        assert WsgiServer().run(wrapped).body == b"hello"


# A server that answers oddly ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        None,
        {},
        [],
        "http.request",
        {"type": 5},
        {"type": "http.request", "body": 5},
    ],
    ids=repr,
)
@pytest.mark.parametrize("reads", [True, False])
async def test_what_is_no_message_is_an_error_and_no_hang(message: Any, reads: bool) -> None:
    """[W9][W15] An app that does not read never hears of it."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        data = environ["wsgi.input"].read() if reads else b"unread"
        start_response("200 OK", [])
        return [data]

    async def receive() -> Any:
        return message

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    wrapped = WsgiToAsgi(app)
    call = wrapped(make_scope("POST"), receive, send)
    if reads:
        with pytest.raises((TypeError, KeyError, BridgeError)):
            await call
        assert sent == []
    else:
        await call
        assert sent[-1]["body"] == b"unread"
    wrapped.close()


WHOLE: Any = {"type": "http.request", "body": b"ab"}
PART: Any = {"type": "http.request", "body": b"ab", "more_body": True}
DISCONNECT: Any = {"type": "http.disconnect"}
FOREIGN: Any = {"type": "websocket.receive", "text": "ab"}


@pytest.mark.parametrize(
    ("messages", "read", "error"),
    [
        ([WHOLE, WHOLE], b"ab", None),
        ([DISCONNECT, WHOLE], ClientDisconnected, None),
        ([PART, DISCONNECT, WHOLE], ClientDisconnected, None),
        ([FOREIGN, WHOLE], ClientDisconnected, ProtocolError),
        ([PART, FOREIGN, WHOLE], ClientDisconnected, ProtocolError),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
async def test_answers_out_of_order_end_the_body_or_are_an_error(
    messages: list[Any], read: Any, error: type[Exception] | None, streams: bool
) -> None:
    """[W9][W15] Nothing of a body counts behind its end, nor behind a disconnect."""
    heard: list[Any] = []
    closed = Signal("the app's iterable")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        try:
            start_response("200 OK", [])
            if streams:
                yield b"begun"
            heard.extend([environ["wsgi.input"].read(), environ["wsgi.input"].read()])
            yield b"ended"
        except ClientDisconnected as left:
            heard.append(type(left))
            raise
        finally:
            closed.set()

    left = iter(messages)

    async def receive() -> Any:
        for message in left:
            return message
        await anyio.sleep_forever()

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    wrapped = WsgiToAsgi(app)
    with anyio.fail_after(20), contextlib.nullcontext() if error is None else pytest.raises(error):
        await wrapped(make_scope("POST"), receive, send)
    await closed.wait_async()
    whole = read == b"ab"
    assert heard == ([read, b""] if whole else [read])
    assert sent == [None] * (streams or whole) + [b"begun"] * streams + [b"ended", b""] * whole
    wrapped.close()


@pytest.mark.parametrize("kind", ODD_ERRORS)
@pytest.mark.parametrize("loop", ["shared", "request"])
@pytest.mark.parametrize("phase", ["before", "mid-response"])
def test_an_odd_error_of_the_input_reaches_the_server_and_the_app_hears_of_the_end(
    kind: type[BaseException], loop: Any, phase: str
) -> None:
    """[A4][A10] It is the server's own, so raised as itself in its own thread; the app hears http.disconnect."""
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if phase != "before":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        heard.append((await receive())["type"])

    with AsgiToWsgi(app, loop=loop, lifespan="off") as wrapped:
        error = kind("of the input")
        body = FakeInput([error])
        exchange = WsgiServer(validate=False).run(wrapped, make_environ("POST", body=body, CONTENT_LENGTH="5"))
        assert exchange.error is error
        assert (
            run_in_thread(WsgiServer(validate=False).run, AsgiToWsgi(hello, loop="request", lifespan="off")).body
            == b"hello"
        )
    assert heard == ["http.disconnect"]


@pytest.mark.parametrize("kind", ODD_ERRORS)
@pytest.mark.parametrize("loop", ["shared", "request"])
def test_start_response_that_raises_ends_the_request(kind: type[BaseException], loop: Any) -> None:
    """[A6][A10] The server gets its own error back, the app hears http.disconnect, and the next request is served."""
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello", "more_body": True})
        await receive()
        heard.append((await receive())["type"])

    error = kind("of start_response")

    def start_response(*_: Any) -> Any:
        raise error

    wrapped = AsgiToWsgi(app, loop=loop, lifespan="off")
    with pytest.raises(kind) as raised:
        wrapped(make_environ(), start_response)
    assert raised.value is error
    with WsgiServer(validate=False).start(wrapped) as exchange:
        assert next(exchange) == b"hello"
    wrapped.close()
    assert heard == ["http.disconnect"] * 2


@pytest.mark.parametrize("kind", ODD_ERRORS)
@pytest.mark.parametrize("loop", ["shared", "request"])
def test_a_servers_write_that_raises_is_heard_by_the_app(kind: type[BaseException], loop: Any) -> None:
    """[C1][W13][W15] As write()'s error, which ends the request; what the app returned is closed, all goes on."""
    error = kind("of write()")
    heard: list[BaseException] = []
    closes: list[str] = []

    def blocks(write: Callable[[bytes], object]) -> Iterator[bytes]:
        try:
            write(b"begun")
            yield b"the rest"
        except BaseException as caught:
            heard.append(caught)
            raise
        finally:
            closes.append("closed")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return blocks(start_response("200 OK", []))

    def fail(block: bytes) -> object:
        raise error

    wrapped = AsgiToWsgi(WsgiToAsgi(app), loop=loop, lifespan="off")
    with pytest.raises((kind, BridgeError)) as raised:
        b"".join(wrapped(make_environ(), lambda *_: fail))
    assert error in (raised.value, raised.value.__cause__)
    assert (heard, closes) == ([error], ["closed"])
    assert WsgiServer(validate=False).run(wrapped).body == b"begunthe rest"
    wrapped.close()


@pytest.mark.parametrize("loop", ["shared", "request"])
def test_calls_after_the_end_are_harmless(loop: Any) -> None:
    """[A6][A10] next() after the end or after close(), close() twice, from whatever thread."""
    with AsgiToWsgi(hello, loop=loop, lifespan="off") as wrapped:
        for early in (True, False):
            result: Any = wrapped(make_environ(), lambda *_: bytes)
            if not early:
                assert list(result) == [b"hello"]
            result.close()
            result.close()
            assert run_in_thread(lambda result=result: (next(result, None), result.close())) == (None, None)


async def test_write_after_the_end_raises() -> None:
    """[W13][W16] A thread of the app that has kept write() hears that nobody listens."""
    kept: list[Any] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        kept.append(start_response("200 OK", []))
        kept.append(environ["wsgi.input"])
        return [b"done"]

    wrapped = WsgiToAsgi(app)
    assert (await AsgiServer().run(wrapped)).body == b"done"
    with pytest.raises(BridgeError):
        kept[0](b"more")
    with pytest.raises((BridgeError, OSError)):
        kept[1].read()
    wrapped.close()


@pytest.mark.parametrize("loop", ["shared", "request"])
def test_an_app_that_stops_its_loop_is_served(loop: Any) -> None:
    """[A14] A stop is a hint, whoever gives it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(3):
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0)
        await hello(scope, receive, send)

    with AsgiToWsgi(app, loop=loop, lifespan="off") as wrapped:
        assert [WsgiServer().run(wrapped).body for _ in range(3)] == [b"hello"] * 3


def test_the_end_of_the_loop_frees_the_thread_in_the_app() -> None:
    """[W16] A server whose loop ends with requests in flight, as at its exit: reads and writes raise."""
    entered, over, go_on = Signal("the app"), Signal("its end"), Signal("the loop has ended")
    errors: list[BaseException] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        write = start_response("200 OK", [])
        entered.set()
        go_on.wait()
        for attempt in (lambda: write(b"x"), lambda: environ["wsgi.input"].read()):
            try:
                attempt()
            except Exception as error:
                errors.append(error)
        over.set()
        yield b"nobody gets this"

    wrapped = WsgiToAsgi(app)

    async def main() -> None:
        task = asyncio.ensure_future(AsgiServer().run(wrapped, None, []))
        await entered.wait_async()
        task.cancel()

    asyncio.run(main())
    go_on.set()
    over.wait()
    assert [isinstance(error, OSError) for error in errors] == [True, True]
    wrapped.close()


# A lifespan that fails oddly ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ODD_ERRORS)
@pytest.mark.parametrize("loop", ["shared", "request"])
def test_an_odd_error_of_the_apps_shutdown_is_logged(
    kind: type[BaseException], loop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """[A20] As it comes too late for any server. The app is down: another request starts it anew."""
    starts: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            starts.append((await receive())["type"])
            await send({"type": "lifespan.startup.complete"})
            await receive()
            raise kind("of the shutdown")
        await hello(scope, receive, send)

    wrapped = AsgiToWsgi(app, loop=loop)
    for _ in range(2):
        assert WsgiServer().run(wrapped).body == b"hello"
        wrapped.close()
    assert starts == ["lifespan.startup"] * 2
    logged = [record.exc_info[1] for record in caplog.records if record.name == "bridge" and record.exc_info]
    assert [type(error) for error in logged] == [kind] * 2


@pytest.mark.parametrize("kind", ODD_ERRORS)
@pytest.mark.parametrize("step", ["startup", "shutdown"])
async def test_an_odd_error_of_a_lifespan_of_ours_reaches_the_server(kind: type[BaseException], step: str) -> None:
    """[W22] As itself; and in words as well, if it is no word of an interpreter's or a loop's that ends."""
    error = kind("of the lifespan")
    sent: list[str] = []
    asked = iter(["lifespan.startup", "lifespan.shutdown"])

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        if step == "startup":
            raise error
        yield
        raise error

    async def receive() -> Any:
        return {"type": next(asked)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    wrapped = WsgiToAsgi(lambda environ, start_response: [], lifespan=lifespan)
    with pytest.raises(kind) as raised:
        await wrapped({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert raised.value is error
    complete = [] if step == "startup" else ["lifespan.startup.complete"]
    assert sent == [*complete, *([f"lifespan.{step}.failed"] if isinstance(error, Exception) else [])]


# Forks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("moment", ["in the startup", "in a request", "in a shutdown", "in the app"])
def test_a_fork_at_the_worst_time_leaves_both_serving(moment: str) -> None:
    """[A20][W19] The child has locks that nobody in it holds, and begins anew; the parent goes on."""
    script = """
        import asyncio, os, threading
        import anyio._backends._asyncio  # by name: a fork in the middle of anyone's import would leave its lock held
        from bridge import AsgiToWsgi, WsgiToAsgi
        from tests.drivers import AsgiServer, Signal, WsgiServer, in_thread, make_environ

        moment = MOMENT
        there, go_on = Signal("there"), Signal("go on")
        parent = os.getpid()

        async def stop_here():
            if os.getpid() == parent and not there.is_set():
                there.set()
                await go_on.wait_async()

        async def app(scope, receive, send):
            if scope["type"] == "lifespan":
                await receive()
                if moment == "in the startup":
                    await stop_here()
                await send({"type": "lifespan.startup.complete"})
                await receive()
                if moment == "in a shutdown":
                    await stop_here()
                await send({"type": "lifespan.shutdown.complete"})
                return
            if moment == "in a request":
                await stop_here()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"a/b")]})
            await send({"type": "http.response.body", "body": b"hello"})

        def wsgi(environ, start_response):
            start_response("200 OK", [])
            if moment == "in the app" and os.getpid() == parent and not there.is_set():
                there.set()
                go_on.wait()
            return [b"hello"]

        application, other = AsgiToWsgi(app), WsgiToAsgi(wsgi)

        def ask():
            assert WsgiServer().run(application).body == b"hello"

        def ask_other():
            assert asyncio.run(AsgiServer().run(other)).body == b"hello"

        if moment == "in a shutdown":
            ask()
        call = in_thread({"in a shutdown": application.close, "in the app": ask_other}.get(moment, ask))
        there.wait()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                ask()
                ask_other()
                application.close()
                other.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        go_on.set()
        call.result()
        ask()
        ask_other()
        application.close()
        other.close()
    """
    code = textwrap.dedent(script).replace("MOMENT", repr(moment))
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], capture_output=True, text=True, timeout=25
    )
    assert (done.returncode, complaints(done.stderr)) == (0, "")
