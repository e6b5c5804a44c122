"""The drivers themselves: they serve right apps rightly, and each check is seen to fire on a wrong one."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.drivers import (
    AsgiServer,
    EarlyHints,
    FakeInput,
    FileWrapper,
    Journal,
    Signal,
    Stuck,
    Violation,
    WsgiServer,
    client_socket,
    http_request,
    in_thread,
    make_environ,
    make_scope,
    run_in_thread,
    run_in_threads,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from wsgiref.types import StartResponse, WSGIEnvironment

SHORT = 0.02  # a time limit that is meant to be hit

# Waiting, from threads and tasks --------------------------------------------------------------------------------------


async def test_signal_set_by_a_thread_wakes_tasks_and_threads() -> None:
    signal = Signal()
    call = in_thread(signal.wait)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(signal.wait_async)
        await anyio.lowlevel.checkpoint()
        run_in_thread(signal.set)
    await call.result_async()
    assert signal.is_set()


async def test_signal_that_is_set_lets_all_pass() -> None:
    signal = Signal()
    signal.set()
    await signal.wait_async(0.0)
    signal.wait(0.0)


async def test_signal_names_itself_when_time_is_up() -> None:
    signal = Signal("upload over")
    with pytest.raises(Stuck, match="'upload over' was not set within"):
        await signal.wait_async(SHORT)
    with pytest.raises(Stuck, match="'upload over' was not set within"):
        signal.wait(SHORT)
    signal.set()  # whoever has stopped waiting is no trouble


def test_signal_outlives_the_loop_of_a_waiter() -> None:
    signal = Signal()
    with pytest.raises(Stuck):
        anyio.run(signal.wait_async, SHORT)
    signal.set()


async def test_journal_wakes_a_task_and_a_thread_by_a_note_from_any_thread() -> None:
    journal = Journal()
    call = in_thread(journal.wait_until, lambda: journal.count("b"))
    async with anyio.create_task_group() as group:
        group.start_soon(journal.until, lambda: journal.count("b"))
        await anyio.lowlevel.checkpoint()
        journal.note("a")
        run_in_thread(journal.note, "b", 7)
    assert await call.result_async() == 1
    assert journal.events == ["a", "b"]
    assert journal.index("b") == 1
    assert journal.entries[1].detail == 7
    assert journal.entries[0].thread == threading.get_ident() != journal.entries[1].thread
    assert journal.entries[0].time <= journal.entries[1].time


async def test_journal_tells_its_story_when_time_is_up() -> None:
    journal = Journal()
    journal.note("a")
    with pytest.raises(Stuck, match=r"so far: \['a'\]"):
        await journal.until(lambda: None, SHORT)
    with pytest.raises(Stuck, match=r"so far: \['a'\]"):
        journal.wait_until(lambda: None, SHORT)


def test_run_in_thread_returns_the_value() -> None:
    assert run_in_thread(lambda number: number + 1, 1) == 2
    assert run_in_thread(threading.get_ident) != threading.get_ident()


def test_run_in_thread_raises_the_error_itself() -> None:
    error = SystemExit(3)

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_in_thread(fail)
    assert caught.value is error


def test_stuck_thread_is_shown_with_its_stack() -> None:
    release = Signal()

    def wait_for_what_never_comes() -> None:
        release.wait()

    call = in_thread(wait_for_what_never_comes)
    with pytest.raises(Stuck, match="in wait_for_what_never_comes"):
        call.result(SHORT)
    release.set()
    call.result()


def test_run_in_threads_keeps_the_order_and_uses_several_threads() -> None:
    together = threading.Barrier(4)

    def serve(number: int) -> int:
        if number < 4:
            together.wait(10)
        return number * number

    assert run_in_threads(serve, 100, threads=4) == [number * number for number in range(100)]


def test_run_in_threads_raises_what_a_request_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        run_in_threads(lambda number: 1 // number, 3, threads=2)


# The ASGI server: right apps ------------------------------------------------------------------------------------------


def start(status: Any = 200, headers: Any = (), **more: Any) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers, **more}


def block(body: Any = b"", more_body: Any = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more_body}


def sends(*messages: Any) -> Callable[..., Any]:
    """Make an app that sends these messages."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await send(start(200, [(b"content-type", b"text/plain")]))
    more_body = True
    while more_body:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        more_body = message.get("more_body", False)
        if message["body"] or not more_body:
            await send(block(message["body"], more_body))


async def sleeper(scope: Any, receive: Any, send: Any) -> None:
    await anyio.sleep_forever()


@pytest.fixture(params=[False, True], ids=["eager", "yields"])
def server(request: pytest.FixtureRequest) -> AsgiServer:
    return AsgiServer(yields=request.param)


async def test_request_is_served(server: AsgiServer) -> None:
    response = await server.run(echo, body=b"hello")
    assert response.status == 200
    assert response.headers == [(b"content-type", b"text/plain")]
    assert response.header(b"content-type") == b"text/plain"
    assert response.header(b"x-none") is None
    assert response.body == b"hello"
    assert response.body_length == 5
    assert response.complete
    assert response.error is None
    assert not response.cancelled
    assert response.scope["method"] == "POST"
    assert (b"content-length", b"5") in response.scope["headers"]
    assert response.journal.events == ["send", "sent", "receive", "http.request", "send", "sent", "ended"]


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        (b"", [http_request(b"", False)]),
        ([b"a", b"b"], [http_request(b"a"), http_request(b"b", False)]),
        ((b"a", b"b"), [http_request(b"a"), http_request(b"b"), http_request(b"", False)]),
        ([b"a", http_request(b"", True), b"b"], [http_request(b"a"), http_request(), http_request(b"b", False)]),
        ([http_request(b"a"), {"type": "http.disconnect"}], [http_request(b"a"), {"type": "http.disconnect"}]),
    ],
)
async def test_receive_gives_the_script(body: Any, messages: list[Any]) -> None:
    given: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while len(given) < len(messages):
            given.append(await receive())
        await send(start())
        await send(block())

    await AsgiServer().run(app, body=body)
    assert given == messages


async def test_gate_holds_a_piece_back_until_a_thread_opens_it(server: AsgiServer) -> None:
    gate = Signal()
    async with server.start(echo, body=[b"a", gate, b"b"]) as exchange:
        await exchange.messages_sent(2)
        assert exchange.blocks == [b"a"]
        run_in_thread(gate.set)
        await exchange.finish()
    assert exchange.blocks == [b"a", b"b"]


async def test_body_is_fed_on_demand(server: AsgiServer) -> None:
    async with server.start(echo, body=[]) as exchange:
        await exchange.until(lambda: exchange.journal.count("receive"))
        exchange.feed(b"a")
        await exchange.messages_sent(2)
        exchange.feed(b"b", more_body=False)
    assert exchange.blocks == [b"a", b"b"]


async def test_receive_waits_after_the_body_until_the_response_is_complete(server: AsgiServer) -> None:
    given: list[Any] = []
    over = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def listen() -> None:
            for _ in range(3):
                given.append(await receive())
            over.set()

        async with anyio.create_task_group() as group:
            group.start_soon(listen)
            await send(start())
            await anyio.wait_all_tasks_blocked()
            assert given == [http_request(b"", False)]
            await send(block())
            await over.wait()

    await server.run(app)
    assert given[1:] == [{"type": "http.disconnect"}] * 2


async def test_client_that_leaves_is_told_by_receive_and_send_is_silent(server: AsgiServer) -> None:
    given: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(start())
        for _ in range(2):
            given.append(await receive())
        await send(block(b"lost", True))

    async with server.start(app) as exchange:
        await exchange.response_started()
        exchange.disconnect()
    assert given == [{"type": "http.disconnect"}] * 2
    assert [message["body"] for message in exchange.lost] == [b"lost"]
    assert exchange.body == b""
    assert not exchange.complete


async def test_client_that_leaves_makes_send_raise_where_asked() -> None:
    async with AsgiServer(gone_raises=True).start(sends(start(), block())) as exchange:
        exchange.disconnect()
    assert isinstance(exchange.error, OSError)


async def test_slow_client_takes_as_it_pleases(server: AsgiServer) -> None:
    server.slow = True
    async with server.start(sends(start(), block(b"12345", True), block(b"678"))) as exchange:
        await exchange.until(lambda: exchange.journal.count("send") == 1)
        assert exchange.messages == []
        exchange.take(1)
        await exchange.until(lambda: exchange.pending == 5)
        assert [message["type"] for message in exchange.messages] == ["http.response.start"]
        exchange.take(1)
        await exchange.until(lambda: exchange.pending == 3)
        exchange.resume()
    assert exchange.blocks == [b"12345", b"678"]
    assert exchange.pending == 0


async def test_client_that_leaves_frees_a_send_that_waits(server: AsgiServer) -> None:
    async with server.start(sends(start(), block(b"a", True), block(b"b"))) as exchange:
        exchange.pause()
        await exchange.until(lambda: exchange.journal.count("send") == 1)
        exchange.disconnect()
    assert exchange.messages == []
    assert len(exchange.lost) == 3


async def test_expect_is_answered_by_the_first_receive_only(server: AsgiServer) -> None:
    scope = make_scope("POST", headers=[(b"expect", b"100-Continue")])
    refused = await server.run(sends(start(413), block()), scope)
    assert not refused.continued

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()
        await sends(start(), block())(scope, receive, send)

    accepted = await server.run(app, scope, [b"a", b"b"])
    assert accepted.journal.events[:3] == ["receive", "100-continue", "http.request"]
    assert accepted.journal.count("100-continue") == 1
    late = await server.run(echo, scope, b"")  # receives after its start: the final response is under way
    assert not late.continued


async def test_cancelled_app_does_not_cancel_the_test(server: AsgiServer) -> None:
    async with server.start(sleeper) as exchange:
        await anyio.wait_all_tasks_blocked()
        exchange.cancel()
        await exchange.finish()
    await anyio.lowlevel.checkpoint()
    assert exchange.cancelled
    assert isinstance(exchange.error, anyio.get_cancelled_exc_class())


def test_app_cancelled_by_asyncio_itself() -> None:
    async def main() -> None:
        async with AsgiServer().start(sleeper) as exchange:
            await anyio.wait_all_tasks_blocked()
            exchange.cancel(native=True)
        await anyio.lowlevel.checkpoint()
        assert isinstance(exchange.error, anyio.get_cancelled_exc_class())

    anyio.run(main, backend="asyncio")


@pytest.mark.parametrize(("lossy", "left"), [(False, b"ab"), (True, b"b")])
async def test_cancellation_in_receive_loses_no_piece_but_on_a_lossy_server(lossy: bool, left: bytes) -> None:
    gate = Signal()
    given: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with anyio.move_on_after(SHORT):
            await receive()
        gate.set()
        while not given or given[-1]["more_body"]:
            given.append(await receive())
        await sends(start(), block())(scope, receive, send)

    await AsgiServer(lossy=lossy).run(app, body=[gate, b"a", b"b"])
    assert b"".join(message["body"] for message in given) == left


async def test_eager_receive_gives_what_is_there_even_in_a_cancelled_scope() -> None:
    given: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with anyio.CancelScope() as cancelled:
            cancelled.cancel()
            given.append(await receive())
        await sends(start(), block())(scope, receive, send)

    await AsgiServer().run(app, body=b"a")
    assert given == [http_request(b"a", False)]


async def test_cancellation_of_the_test_cancels_the_app(server: AsgiServer) -> None:
    with anyio.move_on_after(SHORT) as limit:
        async with server.start(sleeper) as exchange:
            await anyio.sleep_forever()
    assert limit.cancelled_caught
    assert exchange.ended


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), GeneratorExit(), KeyboardInterrupt()])
async def test_error_of_the_app_is_recorded_whatever_its_class(server: AsgiServer, error: BaseException) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    response = await server.run(app)
    assert response.error is error
    assert not response.started
    with pytest.raises(AssertionError, match="no response was started") as caught:
        _ = response.status
    assert caught.value.__cause__ is error


async def test_failing_test_ends_the_app_and_keeps_its_error(server: AsgiServer) -> None:
    failure = RuntimeError("the test's own")
    with pytest.raises(RuntimeError) as caught:
        async with server.start(sleeper) as exchange:
            raise failure
    assert caught.value is failure
    assert exchange.ended


async def test_app_that_hangs_is_reported() -> None:
    with pytest.raises(Stuck, match="so far: "):
        async with AsgiServer().start(sleeper) as exchange:
            await exchange.finish(SHORT)


async def test_offered_extensions_are_allowed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"from a file")
    extensions: dict[str, Any] = {
        f"http.response.{name}": {} for name in ("pathsend", "early_hint", "trailers", "push", "debug")
    }
    scope = make_scope(extensions=extensions)
    hint = {"type": "http.response.early_hint", "links": [b"</style.css>; rel=preload"]}
    pathsend = {"type": "http.response.pathsend", "path": str(file)}
    response = await AsgiServer().run(sends(hint, start(headers=[[b"content-length", b"11"]]), pathsend), scope)
    assert response.body == b"from a file"
    assert response.complete
    trailers = {"type": "http.response.trailers", "headers": [(b"x-sum", b"1")], "more_trailers": False}
    response = await AsgiServer().run(sends(start(trailers=True), block(b"a"), trailers), scope)
    assert response.complete
    assert response.messages[-1] == trailers


async def test_bodies_are_let_go_where_asked() -> None:
    server = AsgiServer(keep=False)
    response = await server.run(sends(start(), block(b"a" * 5, True), block(b"b" * 5)), make_scope())
    assert response.body_length == 10
    assert response.body == b"b" * 5
    assert response.complete
    assert response.journal.events == ["send", "sent", "send", "sent", "ended"]


def test_scope_has_all_keys_but_the_dropped() -> None:
    scope = make_scope("PUT", "/é", "a=1", drop=["server", "state"], root_path="/app")
    assert scope["raw_path"] == b"/%C3%A9"
    assert scope["query_string"] == b"a=1"
    assert scope["root_path"] == "/app"
    assert "server" not in scope
    assert "state" not in scope


# The ASGI server: wrong apps ------------------------------------------------------------------------------------------

OFFERED: dict[str, Any] = {"http.response.pathsend": {}, "http.response.trailers": {}}


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([block()], "expected 'http.response.start', got 'http.response.body'"),
        ([start(), start()], "expected 'http.response.body', got 'http.response.start'"),
        ([start(), block(), block()], "'http.response.body' sent|expected 'nothing'"),
        ([start(), block(b"", True)], "an empty body message"),
        ([start(), block("text")], "expected bytes and a bool"),
        ([start(), block(bytearray(b"a"))], "expected bytes and a bool"),
        ([start(), block(b"a", 1)], "expected bytes and a bool"),
        ([start("200")], "expected a status"),
        ([start(True)], "expected a status"),
        ([start(99)], "expected a status"),
        ([start(headers=[("a", "b")])], "expected a header of two bytes"),
        ([start(headers=[b"ab"])], "expected a header of two bytes"),
        ([start(headers=[(b"a", b"b", b"c")])], "expected a header of two bytes"),
        ([start(headers=[(b"X-A", b"b")])], "expected a lower-case header name"),
        ([start(headers=[(b"a:", b"b")])], "expected a lower-case header name"),
        ([start(headers=[(b"", b"b")])], "expected a lower-case header name"),
        ([start(headers=[(b"a", b"b\r\nc: d")])], "CR, LF or NUL"),
        ([start(headers=[(b"a", b"b\0")])], "CR, LF or NUL"),
        ([start(headers=[(b"connection", b"close")])], "hop-by-hop"),
        ([start(headers=[(b"content-length", b"1"), (b"content-length", b"2")])], "one decimal Content-Length"),
        ([start(headers=[(b"content-length", b"-1")])], "one decimal Content-Length"),
        ([start(headers=[(b"content-length", b"1")]), block(b"ab")], "2 body bytes in all, Content-Length is 1"),
        ([start(headers=[(b"content-length", b"1")]), block(b"ab", True)], "2 body bytes, Content-Length is 1"),
        ([start(headers=[(b"content-length", b"3")]), block(b"ab")], "2 body bytes in all, Content-Length is 3"),
        ([start(trailers=True), block(), block()], "expected 'http.response.trailers'"),
        ([start(), {"type": "http.response.trailers"}], "expected 'http.response.body'"),
        ([start(), {"type": "http.response.pathsend", "path": "here"}], "expected an absolute path"),
        ([start(), {"type": "http.response.early_hint", "links": []}], "does not offer"),
        ([{"type": "http.response.zerocopysend"}], "unknown message type"),
        ([{"type": "websocket.accept"}], "unknown message type"),
        ([{"body": b""}], "expected a dict with a type"),
        ([None], "expected a dict with a type"),
        ([], "returned where 'http.response.start' was expected"),
        ([start()], "returned where 'http.response.body' was expected"),
        ([start(), block(b"a", True)], "returned where 'http.response.body' was expected"),
    ],
)
async def test_wrong_message_is_a_violation(messages: list[Any], what: str) -> None:
    with pytest.raises(Violation, match=what):
        await AsgiServer().run(sends(*messages), make_scope(extensions=dict(OFFERED)))


async def test_early_hint_after_the_start_is_a_violation() -> None:
    hint = {"type": "http.response.early_hint", "links": []}
    with pytest.raises(Violation, match="after the response was started"):
        await AsgiServer().run(sends(start(), hint), make_scope(extensions={"http.response.early_hint": {}}))


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 304), ("GET", 204)])
async def test_response_without_a_body_may_declare_its_length(method: str, status: int) -> None:
    app = sends(start(status, [(b"content-length", b"3")]), block())
    response = await AsgiServer().run(app, make_scope(method))
    assert response.complete


async def test_violation_that_the_app_swallows_is_still_raised() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(Violation):
            await send(block())
        await sends(start(), block())(scope, receive, send)

    with pytest.raises(Violation, match=r"expected 'http\.response\.start'"):
        await AsgiServer().run(app)


@pytest.mark.parametrize("which", ["receive", "send"])
async def test_two_calls_at_once_are_a_violation(which: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        call = receive if which == "receive" else partial(send, start())

        async def swallow() -> None:
            with pytest.raises(Violation):
                await call()

        with anyio.CancelScope() as enough:
            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await anyio.wait_all_tasks_blocked()
                await swallow()
                enough.cancel()

    server = AsgiServer(slow=True)
    with pytest.raises(Violation, match=rf"{which}\(\) called while another"):
        async with server.start(app, body=[]) as exchange:
            await exchange.finish()


async def test_calls_after_the_app_has_ended_are_violations() -> None:
    exchange = await AsgiServer().run(sends(start(), block()))
    with pytest.raises(Violation, match="after the app had ended"):
        await exchange.send(block())
    with pytest.raises(Violation, match="after the app had ended"):
        await exchange.receive()


async def test_calls_from_another_thread_are_violations() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(Violation):
            await anyio.to_thread.run_sync(lambda: receive().send(None))
        await sends(start(), block())(scope, receive, send)

    with pytest.raises(Violation, match="outside of the event loop's thread"):
        await AsgiServer().run(app)


async def test_changed_extensions_are_a_violation() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"]["mine"] = {}
        await sends(start(), block())(scope, receive, send)

    with pytest.raises(Violation, match="changed scope"):
        await AsgiServer().run(app)


# Lifespan and websocket -----------------------------------------------------------------------------------------------


async def lifespan_app(scope: Any, receive: Any, send: Any) -> None:
    assert (await receive())["type"] == "lifespan.startup"
    scope["state"]["ready"] = True
    await send({"type": "lifespan.startup.complete"})
    assert (await receive())["type"] == "lifespan.shutdown"
    await send({"type": "lifespan.shutdown.failed", "message": "no"})


async def test_lifespan_starts_and_stops() -> None:
    async with AsgiServer().lifespan(lifespan_app) as lifespan:
        assert lifespan.started == {"type": "lifespan.startup.complete"}
        assert lifespan.state == {"ready": True}
        assert lifespan.stopped is None
    assert lifespan.stopped == {"type": "lifespan.shutdown.failed", "message": "no"}
    assert lifespan.error is None


async def test_lifespan_that_ends_without_an_answer() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("unknown scope")

    async with AsgiServer().lifespan(app) as lifespan:
        assert lifespan.started is None
    assert isinstance(lifespan.error, ValueError)


async def test_lifespan_that_hangs_is_reported() -> None:
    lifespan = AsgiServer().lifespan(sleeper)
    startup = lifespan.startup
    lifespan.startup = partial(startup, SHORT)  # type: ignore[method-assign]
    with pytest.raises(Stuck):
        async with lifespan:
            pass
    assert lifespan.cancelled


@pytest.mark.parametrize(
    "kind",
    ["lifespan.startup.complete", "lifespan.shutdown.complete", "lifespan.startup.done", "http.response.start"],
)
async def test_wrong_lifespan_message_is_a_violation(kind: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await send({"type": kind})

    with pytest.raises(Violation, match="answers nothing that was asked"):
        async with AsgiServer().lifespan(app):
            pass


async def test_lifespan_failure_message_must_be_text() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": 1})

    with pytest.raises(Violation, match="expected a message of type str"):
        async with AsgiServer().lifespan(app):
            pass


def answers(*messages: Any) -> Callable[..., Any]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await sends(*messages)(scope, receive, send)
        assert (await receive())["type"] == "websocket.disconnect"

    return app


async def test_websocket_is_refused() -> None:
    websocket = await AsgiServer().websocket(answers({"type": "websocket.close", "code": 1000}))
    assert websocket.refused
    assert not websocket.accepted


async def test_websocket_is_denied_by_a_response() -> None:
    denial = [
        {"type": "websocket.http.response.start", "status": 403},
        {"type": "websocket.http.response.body", "body": b"no"},
    ]
    scope = make_scope(type="websocket", extensions={"websocket.http.response": {}})
    websocket = await AsgiServer().websocket(answers(*denial), scope)
    assert websocket.refused
    assert websocket.messages == denial


async def test_websocket_is_accepted() -> None:
    websocket = await AsgiServer().websocket(answers({"type": "websocket.accept"}))
    assert websocket.accepted
    assert not websocket.refused


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([{"type": "websocket.send", "text": "a"}], "'websocket.send' sent after ''"),
        ([{"type": "websocket.close"}, {"type": "websocket.close"}], "sent after 'websocket.close'"),
        ([start()], "'http.response.start' sent after ''"),
        ([{"type": "websocket.http.response.start", "status": 403}], "does not offer"),
    ],
)
async def test_wrong_websocket_message_is_a_violation(messages: list[Any], what: str) -> None:
    with pytest.raises(Violation, match=what):
        await AsgiServer().websocket(answers(*messages))


async def test_websocket_without_an_answer_is_a_violation() -> None:
    with pytest.raises(Violation, match="without an answer"):
        await AsgiServer().websocket(sends())


# The WSGI server: right apps ------------------------------------------------------------------------------------------

PLAIN = [("Content-Type", "text/plain")]


class Blocks:
    """An iterable that tells the journal of its close()."""

    def __init__(self, blocks: Iterable[Any], journal: Journal) -> None:
        self._blocks = iter(blocks)
        self._journal = journal

    def __iter__(self) -> Iterator[Any]:
        return self._blocks

    def close(self) -> None:
        self._journal.note("app closed")


def answer(*blocks: Any, status: Any = "200 OK", headers: Any = PLAIN) -> Callable[..., Any]:
    """Make an app that starts a response and returns these blocks."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[Any]:
        start_response(status, headers if headers is not PLAIN else list(PLAIN))
        return list(blocks)

    return app


def wsgi_echo(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.errors"].write("seen\n")
    start_response("200 OK", list(PLAIN))
    return [body]


@pytest.mark.parametrize("validate", [True, False])
def test_wsgi_request_is_served(validate: bool) -> None:
    response = WsgiServer(validate=validate).run(wsgi_echo, make_environ("POST", body=b"hello"))
    assert response.status == "200 OK"
    assert response.status_code == 200
    assert response.headers == PLAIN
    assert response.header("content-type") == "text/plain"
    assert response.header("x-none") is None
    assert response.blocks == [b"hello"]
    assert response.body == b"hello"
    assert response.complete
    assert response.closed
    assert response.started_in_call
    assert response.error is None
    assert response.thread == threading.get_ident()
    assert response.input.sizes == [5]
    assert response.errors.getvalue() == "seen\n"
    assert response.input.threads == {threading.get_ident()}
    assert response.journal.events == ["start_response", "block", "end", "close"]


def test_wsgi_request_goes_step_by_step() -> None:
    journal = Journal()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Blocks:
        def produce() -> Iterator[bytes]:
            start_response("200 OK", list(PLAIN))
            for number in range(3):
                journal.note(f"app makes {number}")
                yield b"%d" % number

        return Blocks(produce(), journal)

    with WsgiServer().start(app, journal=journal) as response:
        assert not response.started_in_call
        assert next(response) == b"0"
        assert response.headers_sent
        assert next(response) == b"1"
        response.close()
        response.close()
    expected = ["app makes 0", "start_response", "block", "app makes 1", "block", "close", "app closed"]
    assert sorted(journal.events) == sorted(expected)
    assert journal.count("app closed") == 1
    assert not response.complete
    with pytest.raises(RuntimeError, match="after close"):
        next(response)


def test_result_that_cannot_be_iterated_is_closed() -> None:
    journal = Journal()

    class Broken(Blocks):
        def __iter__(self) -> Iterator[Any]:
            raise ValueError("no")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Broken:
        start_response("200 OK", list(PLAIN))
        return Broken([], journal)

    server = WsgiServer(validate=False)
    with pytest.raises(ValueError, match="no"):
        server.start(app)
    assert isinstance(server.run(app).error, ValueError)
    assert journal.events == ["app closed", "app closed"]


def test_write_sends_before_the_blocks() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        write = start_response("200 OK", list(PLAIN))
        write(b"a")
        return [b"b"]

    response = WsgiServer().run(app)
    assert response.blocks == [b"a", b"b"]
    assert response.journal.events == ["start_response", "write", "block", "end", "close"]


def test_server_without_write() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        assert start_response("200 OK", list(PLAIN)) is None
        return []

    assert WsgiServer(validate=False, write=False).run(app).complete


def test_exc_info_replaces_before_and_raises_after_the_headers() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", list(PLAIN))
        try:
            raise ValueError("early")
        except ValueError as error:
            start_response("500 Oh", list(PLAIN), (ValueError, error, error.__traceback__))  # type: ignore[arg-type]
        yield b"page"
        try:
            raise KeyError("late")
        except KeyError as error:
            start_response("500 No", list(PLAIN), (KeyError, error, error.__traceback__))  # type: ignore[arg-type]

    response = WsgiServer().run(app)
    assert response.status == "500 Oh"
    assert isinstance(response.error, KeyError)
    assert response.aborted


def test_error_before_the_start_is_recorded_by_run_and_raised_by_start() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        raise SystemExit(3)

    response = WsgiServer().run(app)
    assert isinstance(response.error, SystemExit)
    assert not response.aborted
    assert response.closed
    with pytest.raises(AssertionError, match="start_response was not called") as caught:
        _ = response.status
    assert caught.value.__cause__ is response.error
    with pytest.raises(SystemExit):
        WsgiServer().start(app)


def test_error_of_close_is_recorded_by_itself() -> None:
    class Failing(Blocks):
        def close(self) -> None:
            raise OSError("no")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Failing:
        start_response("200 OK", list(PLAIN))
        return Failing([b"a"], Journal())

    response = WsgiServer().run(app)
    assert response.complete
    assert response.error is None
    assert isinstance(response.close_error, OSError)


def test_file_wrapper_is_seen_through_the_validator(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"from a file")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", list(PLAIN))
        wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](path.open("rb"))
        return wrapped

    response = WsgiServer().run(app, make_environ() | {"wsgi.file_wrapper": FileWrapper})
    assert response.file is response.result
    assert isinstance(response.file, FileWrapper)
    assert response.body == b"from a file"
    assert WsgiServer().run(answer(b"a")).file is None


def test_what_servers_offer_besides() -> None:
    hints = EarlyHints()
    gone = Signal()
    with client_socket() as (client, server_end):
        environ = make_environ() | {
            "wsgi.early_hints": hints,
            "waitress.client_disconnected": gone.is_set,
            "gunicorn.socket": server_end,
        }
        environ["wsgi.early_hints"]([("Link", "</style.css>")])
        assert hints.calls == [[("Link", "</style.css>")]]
        assert not environ["waitress.client_disconnected"]()
        gone.set()
        assert environ["waitress.client_disconnected"]()
        client.close()
        assert environ["gunicorn.socket"].recv(1) == b""


def test_blocks_are_let_go_where_asked() -> None:
    response = WsgiServer(keep=False).run(answer(b"a" * 5, b"b" * 5))
    assert response.body_length == 10
    assert response.blocks == []


def test_environ_is_valid_and_less_the_dropped() -> None:
    headers = [("Content-Type", "text/plain"), ("X-One", "1")]
    environ = make_environ("POST", "/é", "a=1", headers, b"body", drop=["REMOTE_ADDR"], SERVER_PORT="80")
    assert environ["PATH_INFO"] == "/Ã©"
    assert environ["CONTENT_LENGTH"] == "4"
    assert environ["CONTENT_TYPE"] == "text/plain"
    assert environ["HTTP_X_ONE"] == "1"
    assert environ["SERVER_PORT"] == "80"
    assert "REMOTE_ADDR" not in environ
    assert WsgiServer().run(answer(b"a"), environ).complete


def test_many_requests_from_several_threads() -> None:
    def request(number: int) -> tuple[bytes, int]:
        response = WsgiServer().run(wsgi_echo, make_environ("POST", body=b"%d" % number))
        return response.body, response.thread

    results = run_in_threads(request, 50, threads=4)
    assert [body for body, _ in results] == [b"%d" % number for number in range(50)]
    assert threading.get_ident() not in {thread for _, thread in results}


# The WSGI server: wrong apps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("app", "what"),
    [
        (answer(status="OK"), "expected a status"),
        (answer(status="20 OK"), "expected a status"),
        (answer(status="200OK"), "expected a status"),
        (answer(status="200 O\r\nK"), "expected a status"),
        (answer(status="200 \u20ac"), "latin-1"),
        (answer(status=b"200 OK"), "expected a status"),
        (answer(headers=()), "expected a list of pairs"),
        (answer(headers=[["a", "b"]]), "expected a list of pairs"),
        (answer(headers=[("a", "b", "c")]), "expected a list of pairs"),
        (answer(headers=[("a", b"b")]), "expected latin-1 text"),
        (answer(headers=[("a", "b\nc")]), "expected latin-1 text"),
        (answer(headers=[("a", "\u20ac")]), "expected latin-1 text"),
        (answer(headers=[("a b", "c")]), "expected a header name"),
        (answer(headers=[("a:", "c")]), "expected a header name"),
        (answer(headers=[("", "c")]), "expected a header name"),
        (answer(headers=[("Transfer-Encoding", "chunked")]), "hop-by-hop"),
        (answer(headers=[("Content-Length", "x")]), "a decimal Content-Length"),
        (answer(b"ab", headers=[("Content-Length", "1")]), "2 body bytes, Content-Length is 1"),
        (answer(b"ab", headers=[("Content-Length", "3")]), "2 body bytes in all, Content-Length is 3"),
        (answer("text"), "expected a block of bytes"),
        (answer(bytearray(b"a")), "expected a block of bytes"),
        (lambda environ, start_response: [], "ended without start_response"),
        (lambda environ, start_response: [b"a"], "a block before start_response"),
    ],
)
def test_wrong_wsgi_app_is_a_violation(app: Any, what: str) -> None:
    with pytest.raises(Violation, match=what):
        WsgiServer(validate=False).run(app)


def test_second_start_response_without_exc_info_is_a_violation_even_when_swallowed() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        start_response("200 OK", list(PLAIN))
        with pytest.raises(Violation):
            start_response("404 Not Found", list(PLAIN))
        return [b"a"]

    with pytest.raises(Violation, match="a second time"):
        WsgiServer().run(app)
    with pytest.raises(Violation, match="a second time"), WsgiServer().start(app) as response:
        assert next(response) == b"a"
    assert response.status == "200 OK"


def test_validator_speaks_up_unless_switched_off() -> None:
    app = answer(b"a", headers=[])
    with pytest.raises(AssertionError, match="No Content-Type header"):
        WsgiServer().run(app)
    assert WsgiServer(validate=False).run(app).complete


@pytest.mark.parametrize(("method", "status"), [("HEAD", "200 OK"), ("GET", "304 Not Modified")])
def test_wsgi_response_without_a_body_may_declare_its_length(method: str, status: str) -> None:
    app = answer(status=status, headers=[("Content-Length", "3")])
    assert WsgiServer(validate=False).run(app, make_environ(method)).complete


# wsgi.input -----------------------------------------------------------------------------------------------------------


def test_input_reads_as_a_file_does() -> None:
    body = b"one\ntwo\nthree"
    assert FakeInput(body).read() == body
    assert FakeInput([b"on", b"e\n"]).read(3) == b"one"
    assert FakeInput(body).readlines() == list(FakeInput(body)) == [b"one\n", b"two\n", b"three"]
    assert FakeInput(body).readlines(5) == [b"one\n", b"two\n"]
    stream = FakeInput(body)
    assert [
        stream.readline(2),
        stream.readline(),
        stream.read(0),
        stream.read(100),
        stream.read(1),
        stream.readline(),
    ] == [
        b"on",
        b"e\n",
        b"",
        b"two\nthree",
        b"",
        b"",
    ]
    assert [read.method for read in stream.reads] == ["readline", "readline", "read", "read", "read", "readline"]
    assert stream.given == len(body)


def test_input_fills_a_read_or_gives_what_there_is() -> None:
    assert FakeInput([b"ab", b"cd"], fills=True).read(3) == b"abc"
    assert FakeInput([b"ab", b"cd"], fills=False).read(3) == b"ab"


def test_input_waits_for_its_gate() -> None:
    gate = Signal()
    stream = FakeInput([b"a", gate, b"b"], fills=False)
    assert stream.read(5) == b"a"
    call = in_thread(stream.read, 5)
    with pytest.raises(Stuck):
        call.result(SHORT)
    gate.set()
    assert call.result() == b"b"
    assert stream.read(5) == b""


def test_input_of_sized_reads_only() -> None:
    stream = FakeInput(b"abc", only_sized_reads=True)
    with pytest.raises(OverflowError):
        stream.read()
    with pytest.raises(OverflowError):
        stream.read(-1)
    with pytest.raises(NotImplementedError):
        stream.readline()
    assert stream.read(3) == b"abc"


def test_input_raises_each_time_where_the_client_left() -> None:
    stream = FakeInput([b"ab", OSError("reset")])
    assert stream.read(2) == b"ab"
    for _ in range(2):
        with pytest.raises(OSError, match="reset"):
            stream.read(1)


def test_read_past_an_open_end_is_a_violation() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        with pytest.raises(Violation):
            environ["wsgi.input"].read(4)
        return answer(b"a")(environ, start_response)  # type: ignore[no-any-return]

    with pytest.raises(Violation, match="read past the end of the body, after 3 bytes"):
        WsgiServer().run(app, make_environ("POST", body=FakeInput(b"abc", open_ended=True)))


def test_two_threads_that_read_at_once_are_a_violation() -> None:
    gate = Signal()
    stream = FakeInput([gate, b"a"])
    call = in_thread(stream.read, 1)
    while not stream.reads:
        time.sleep(0)
    with pytest.raises(Violation, match="two threads read"):
        stream.read(1)
    gate.set()
    assert call.result() == b"a"
