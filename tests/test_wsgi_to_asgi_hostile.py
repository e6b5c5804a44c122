"""WsgiToAsgi among apps with threads of their own, clients that stall, servers that misbehave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import anyio
import pytest
from asgiref.sync import async_to_sync

from bridge import ProtocolError, WsgiToAsgi
from tests.drivers import AsgiServer, Signal, http_request, in_thread, make_scope
from tests.wsgi_apps import Body, Environ, StartResponse, answer, hello, serve, settle

POST = make_scope("POST", headers=[(b"content-length", b"5")])
HINTS: dict[str, Any] = {"http.response.early_hint": {}}


async def test_a_stream_of_small_blocks_leaves_the_loop_to_others() -> None:
    """[W16] Neither a send() that never waits nor a receive() that is ready keeps the loop to itself."""
    stop = threading.Event()

    def small() -> Iterator[bytes]:
        while not stop.is_set():
            yield b"x"

    async def send(message: Any) -> None:
        pass  # it never waits

    async def receive() -> Any:
        await anyio.sleep_forever()

    bridge: Any = WsgiToAsgi(answer(small()))
    turns = 0
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(bridge, make_scope(), receive, send)
            try:
                for turns in range(1, 21):  # noqa: B007
                    await anyio.sleep(0.001)
            finally:
                stop.set()
    assert turns == 20


async def test_an_app_that_yields_nothing_while_it_waits_hears_that_its_client_left() -> None:
    """[W16]"""
    begun = Signal("the first block")
    wait = threading.Event()

    def idle() -> Iterator[bytes]:
        yield b"first"
        begun.set()
        while not wait.wait(0.01):
            yield b""

    body = Body(idle())
    try:
        async with AsgiServer().start(WsgiToAsgi(answer(body))) as exchange:
            await begun.wait_async()
            exchange.disconnect()
            await body.closed.wait_async()
            await exchange.finish()
        assert body.closes == 1
    finally:
        wait.set()


@pytest.mark.parametrize("leaves", [False, True])
async def test_every_thread_that_writes_is_woken(leaves: bool) -> None:
    """[W13, W16] An app may write() from threads of its own."""
    writers: list[threading.Thread] = []
    blocked = Signal("three writers")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [])

        def work() -> None:
            try:
                for _ in range(5):
                    write(b"x" * 300_000)
            except ConnectionError:
                pass

        writers.extend(threading.Thread(target=work) for _ in range(3))
        for writer in writers:
            writer.start()
        blocked.set()
        for writer in writers:
            writer.join()
        return []

    async with AsgiServer(slow=True).start(WsgiToAsgi(app)) as exchange:
        await blocked.wait_async()
        if leaves:
            exchange.disconnect()
        else:
            exchange.resume()
        await exchange.finish()
    assert not any(writer.is_alive() for writer in writers)
    assert leaves or exchange.body_length == 15 * 300_000


async def test_an_answer_does_not_wait_for_a_body_that_another_thread_reads() -> None:
    """[W12] Nor is that thread left behind when the request has ended."""
    readers: list[Any] = []
    reading = Signal("a thread reads")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        def read() -> Any:
            reading.set()
            try:
                return environ["wsgi.input"].read()
            except ConnectionError as error:
                return error

        readers.append(in_thread(read))
        reading.wait()
        start_response("413 Content Too Large", [("Content-Length", "3")])
        return [b"no\n"]

    async with AsgiServer().start(WsgiToAsgi(app), POST, []) as exchange:
        await exchange.finish()
    assert exchange.status == 413
    assert isinstance(await readers[0].result_async(), ConnectionError)


async def test_a_cancellation_out_of_receive_is_an_error_of_the_request(anyio_backend_name: str) -> None:
    """[W15] No class of error makes a request hang."""
    if anyio_backend_name == "trio":
        pytest.skip("trio's cancellations cannot be made")
    waiting = Signal("receive()")
    body = Body(iter(waiting_blocks(waiting)))

    async def receive() -> Any:
        waiting.set()
        raise asyncio.CancelledError

    async def send(message: Any) -> None:
        pass

    with anyio.fail_after(10), pytest.raises(ProtocolError, match="receive"):
        await WsgiToAsgi(answer(body))(make_scope(), receive, send)  # type: ignore[arg-type]
    await body.closed.wait_async()


def waiting_blocks(signal: Signal) -> Iterator[bytes]:
    yield b"one"
    signal.wait()
    for _ in range(10_000):
        yield b"more"


@pytest.mark.parametrize("kind", ["stream", "file"])
async def test_stalled_readers_give_their_places_back(
    kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[W19] A client that takes nothing holds up no short request, from the first block on."""
    monkeypatch.setattr("bridge.wsgi_to_asgi.STREAM_SECONDS", 0.02)
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/short":
            return hello(environ, start_response)
        start_response("200 OK", [])
        if kind == "file":
            return environ["wsgi.file_wrapper"](path.open("rb"))  # type: ignore[no-any-return]
        return (b"x" * 100_000 for _ in range(100))

    bridge = WsgiToAsgi(app, threads=2)
    stalled = make_scope(extensions={"http.response.pathsend": {}})
    slow = AsgiServer(slow=True)
    async with slow.start(bridge, stalled) as one, slow.start(bridge, stalled) as other:
        short = await AsgiServer().run(bridge, make_scope(path="/short"))
        assert short.body == b"hello"
        one.resume()
        other.resume()
        await one.finish()
        await other.finish()


async def test_the_window_counts_what_a_block_takes_beside_its_bytes() -> None:
    """[W17] A byte at a time fills it, too."""
    count = 0

    def small() -> Iterator[bytes]:
        nonlocal count
        for count in range(100_000):  # noqa: B007
            yield b"x"

    async with AsgiServer(slow=True).start(WsgiToAsgi(answer(small()))) as exchange:
        with anyio.fail_after(10):
            while count < 100:
                await anyio.sleep(0.01)
        await settle()
        assert count < 2_000
        exchange.disconnect()
        exchange.resume()
        await exchange.finish()


@pytest.mark.parametrize(("method", "length"), [("GET", "5"), ("HEAD", "5")])
async def test_what_write_has_completed_may_be_followed_by_a_block_of_nothing(method: str, length: str) -> None:
    """[W13]"""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Length", length)])(b"hello")
        return [b""]

    exchange = await AsgiServer().run(WsgiToAsgi(app), make_scope(method))
    assert exchange.error is None
    assert exchange.complete


@pytest.mark.parametrize(
    ("links", "sent"),
    [
        ([("Link", "</a.css>; rel=preload")], [b"</a.css>; rel=preload"]),
        ([("X-Other", "1"), ("link", "</b.js>")], [b"</b.js>"]),
        ([("X-Other", "1")], None),
    ],
)
async def test_early_hints_go_out_before_the_response(links: Any, sent: list[bytes] | None) -> None:
    """[W6]"""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        environ["wsgi.early_hints"](links)
        start_response("200 OK", [])
        yield b"body"
        environ["wsgi.early_hints"](links)  # too late

    exchange = await AsgiServer().run(WsgiToAsgi(app), make_scope(extensions=HINTS))
    assert exchange.error is None
    hints = [message["links"] for message in exchange.messages if message["type"] == "http.response.early_hint"]
    assert hints == ([sent] if sent else [])


async def test_early_hints_inject_nothing() -> None:
    """[W10]"""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        environ["wsgi.early_hints"]([("Link", "</a.css>\r\nSet-Cookie: evil=1")])
        return []

    exchange = await AsgiServer().run(WsgiToAsgi(app), make_scope(extensions=HINTS))
    assert isinstance(exchange.error, ProtocolError)
    assert exchange.messages == []


async def test_an_error_of_the_apps_own_iteration_is_raised_as_itself() -> None:
    """[W15]"""

    class Wrong:
        def __iter__(self) -> Iterator[bytes]:
            raise TypeError("of the app")

    exchange = await AsgiServer().run(WsgiToAsgi(answer(Wrong())))
    assert isinstance(exchange.error, TypeError)
    assert str(exchange.error) == "of the app"


async def test_async_code_reads_a_big_body_in_the_loop(anyio_backend_name: str) -> None:
    """[W20, W8] It cannot wait there, so the body is brought before, and not kept in memory."""
    if anyio_backend_name == "trio":
        pytest.skip("asgiref knows asyncio alone")
    size = 3 * 1024 * 1024

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        async def view() -> int:
            return len(environ["wsgi.input"].read())

        length = async_to_sync(view)()
        start_response("200 OK", [])
        return [str(length).encode()]

    pieces = [b"x" * 65536] * (size // 65536)
    scope = make_scope("POST", headers=[(b"content-length", str(size).encode())])
    exchange = await serve(app, scope, [http_request(piece) for piece in pieces] + [http_request(b"", False)])
    assert exchange.body == str(size).encode()


@pytest.mark.parametrize("server", [["h"], ["h", None], [], None])
async def test_a_server_without_a_port_is_no_error(server: Any) -> None:
    """[W1, W5]"""
    exchange = await AsgiServer().run(WsgiToAsgi(hello), make_scope(server=server, client=["1.2.3.4"]))
    assert exchange.body == b"hello"


async def test_a_shutdown_leaves_an_app_that_does_not_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[W22]"""
    monkeypatch.setattr("bridge.wsgi_to_asgi.SHUTDOWN_SECONDS", 0.05)
    stuck = Signal("stuck")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        inside.set()
        stuck.wait()
        return hello(environ, start_response)

    inside = Signal("inside")
    bridge = WsgiToAsgi(app)
    async with AsgiServer().start(bridge) as exchange:
        await inside.wait_async()
        async with AsgiServer().lifespan(bridge) as lifespan:
            await lifespan.startup()
            await lifespan.shutdown()
        assert "1 requests are still in the app" in caplog.text
        stuck.set()
        await exchange.finish()
