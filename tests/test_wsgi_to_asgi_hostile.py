"""WsgiToAsgi among apps with threads of their own, clients that stall, servers that misbehave."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from asgiref.sync import async_to_sync

from bridge import ClientDisconnected, ProtocolError, WsgiToAsgi
from bridge.wsgi_to_asgi import NOTICE_SECONDS
from tests.drivers import LIMIT, AsgiServer, Signal, complaints, http_request, in_thread, make_scope
from tests.wsgi_apps import Body, Environ, StartResponse, answer, echo, hello, serve, settle

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


async def test_a_client_may_wait_for_what_another_thread_writes_before_it_sends_its_body() -> None:
    """[W12] Both ways at once: a read that waits keeps nobody from being heard."""
    heard = Signal("the client has heard the first block")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [])

        def speak() -> None:
            reading.wait()
            write(b"send it, ")

        helper = in_thread(speak)
        body = environ["wsgi.input"].read()
        helper.result()
        return [body]

    reading = Signal("receive() waits")
    exchange = AsgiServer().start(WsgiToAsgi(app), make_scope("POST"), [heard, b"here it is"])
    async with exchange:
        await exchange.until(lambda: exchange.journal.count("receive"))
        reading.set()
        await exchange.messages_sent(2)
        heard.set()
        await exchange.finish()
    assert exchange.error is None
    assert exchange.body == b"send it, here it is"


async def test_a_small_body_is_there_before_the_app_reads(anyio_backend_name: str) -> None:
    """[W7] It is asked for at once where that costs less than to be asked by the read."""
    if anyio_backend_name == "trio":
        pytest.skip("asyncio alone has tasks that are cheap")
    reads: list[bytes] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        exchange.journal.wait_until(lambda: exchange.journal.count("http.request"))
        reads.append(environ["wsgi.input"].read())
        return hello(environ, start_response)

    exchange = AsgiServer().start(WsgiToAsgi(app), POST, b"12345")
    async with exchange:
        await exchange.finish()
    assert (exchange.error, exchange.body, reads) == (None, b"hello", [b"12345"])
    assert exchange.journal.count("receive") == 1


@pytest.mark.parametrize("end", [[], [http_request(b"", more_body=False)]], ids=["one message", "an end of its own"])
@pytest.mark.parametrize("yields", [False, True])
async def test_no_read_is_lost_or_answered_twice_whatever_comes_first(end: list[Any], yields: bool) -> None:
    """[W7] [W8] The read may ask while its body is on its way already, and have it before anybody has heard it ask.

    No receive() is cancelled for that: granian, which ends a body by a message of its own, would lose it.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        bridge = WsgiToAsgi(echo)
        for _ in range(200):
            body = [http_request(b"12345", more_body=bool(end)), *end]
            exchange = await AsgiServer(keep=False, yields=yields).run(bridge, POST, body)
            assert (exchange.error, exchange.body_length) == (None, 5)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("blocks", [1, 3])
async def test_an_answer_does_not_wait_for_a_small_body_that_nobody_reads(blocks: int) -> None:
    """[W7] [S2] Nor is the receive() left behind that has asked for it."""
    asked = Signal("receive() waits")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        asked.wait()
        start_response("413 Content Too Large", [])
        return iter([b"no"] * blocks)

    exchange = AsgiServer().start(WsgiToAsgi(app), POST, [])
    async with exchange:
        await exchange.until(lambda: exchange.journal.count("receive"))
        asked.set()
        await exchange.finish()
    assert (exchange.error, exchange.status, exchange.body) == (None, 413, b"no" * blocks)


async def test_a_class_of_error_that_ends_coroutines_is_an_error_of_the_request() -> None:
    """[W15] Out of a receive() that the app's read waits for."""

    async def receive() -> Any:
        await anyio.lowlevel.checkpoint()
        raise GeneratorExit

    async def send(message: Any) -> None:
        pass

    with anyio.fail_after(10), pytest.raises(ProtocolError, match="receive"):
        await WsgiToAsgi(echo)(POST, receive, send)  # type: ignore[arg-type, unused-ignore]


@pytest.mark.parametrize("scope", [make_scope(), POST])
async def test_a_cancellation_out_of_receive_is_an_error_of_the_request(scope: Any, anyio_backend_name: str) -> None:
    """[W15] No class of error makes a request hang; one of a receive() ahead of the app leaves it uncalled."""
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
        await WsgiToAsgi(answer(body))(scope, receive, send)  # type: ignore[arg-type, unused-ignore]
    if scope is POST:
        assert (waiting.is_set(), body.closes) == (True, 0)
    else:
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


@pytest.mark.parametrize("at", ["http.response.start", "http.response.pathsend"])
async def test_a_file_whose_request_is_cancelled_leaves_its_thread_free(tmp_path: Any, at: str) -> None:
    """[W16] The thread waits until the file was sent, which nobody will tell it any more."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    files: list[Any] = []
    sending = anyio.Event()

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        files.append(path.open("rb"))
        return environ["wsgi.file_wrapper"](files[0])  # type: ignore[no-any-return]

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        if message["type"] == at:
            sending.set()
            await anyio.sleep_forever()

    bridge = WsgiToAsgi(app, threads=1)
    async with anyio.create_task_group() as group:
        group.start_soon(bridge, make_scope(extensions={"http.response.pathsend": {}}), receive, send)
        await sending.wait()
        group.cancel_scope.cancel()
    with anyio.fail_after(10):
        while bridge.statistics().running or bridge.statistics().streaming:
            await anyio.sleep(0.01)
    assert files[0].closed


async def test_early_hints_fill_the_window_too() -> None:
    """[W17]"""
    count = 0

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        nonlocal count
        for count in range(100_000):  # noqa: B007
            environ["wsgi.early_hints"]([("Link", "</style.css>; rel=preload; as=style")])
        return hello(environ, start_response)

    scope = make_scope(extensions={"http.response.early_hint": {}})
    async with AsgiServer(slow=True).start(WsgiToAsgi(app), scope) as exchange:
        with anyio.fail_after(10):
            while count < 100:
                await anyio.sleep(0.01)
        await settle()
        assert count < 2_000
        exchange.disconnect()
        exchange.resume()
        await exchange.finish()


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


@pytest.mark.parametrize(("by", "seconds"), [("lifespan", 0.05), ("close", 0.05), ("close", 2.05)])
async def test_a_shutdown_leaves_an_app_that_does_not_end(
    by: str, seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[W22] [S2] Also by close(): a process that is about to end need not wait for ever."""
    monkeypatch.setattr("bridge.wsgi_to_asgi.SHUTDOWN_SECONDS", seconds)
    stuck = Signal("stuck")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        inside.set()
        stuck.wait()
        return hello(environ, start_response)

    inside = Signal("inside")
    bridge = WsgiToAsgi(app)
    async with AsgiServer().start(bridge) as exchange:
        await inside.wait_async()
        if by == "close":
            await anyio.to_thread.run_sync(bridge.close)
        else:
            async with AsgiServer().lifespan(bridge) as lifespan:
                await lifespan.startup()
                await lifespan.shutdown()
        words = [f"the shutdown leaves alone what has not ended in {seconds:.3g} s: 1 request in the app: 'GET /'"]
        if seconds > NOTICE_SECONDS:
            words.insert(0, "the shutdown waits for 1 request in the app: 'GET /'")
        assert [record.getMessage() for record in caplog.records if record.name == "bridge"] == words
        stuck.set()
        await exchange.finish()
    bridge.close()


FORKS = """
    import os, sys, threading
    from functools import partial
    import anyio
    from bridge import WsgiToAsgi
    from tests.drivers import AsgiServer, in_thread, make_scope

    backend, where = sys.argv[1:]
    held, go = threading.Event(), threading.Event()
    children = []

    def app(environ, start_response):
        start_response("200 OK", [])
        body = environ["wsgi.input"].read()
        path = environ["PATH_INFO"]
        if path == "/held":
            held.set()
            assert go.wait(10)
        if path == "/fork":
            children.append(fork())
        if path == "/return":  # twice, but only the parent's loop has a client
            children.append(os.fork())
        return [body]

    application = WsgiToAsgi(app, threads=3)

    def serve(path, body):
        async def main():
            return await AsgiServer().run(application, make_scope("POST", path), [body[:1], body[1:]])
        exchange = anyio.run(main, backend=backend)
        assert (exchange.error, exchange.body) == (None, body), exchange.error

    def fork():
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            assert application._workers.alive == 0
            for number in range(3):
                serve("/", b"in the child")
            application.close()
            code = 0
        finally:
            os._exit(code)

    serve("/", b"before")
    if where in ("/fork", "/return"):
        serve(where, b"of the request")
    elif where == "idle":
        children.append(fork())
    else:
        calls = [in_thread(serve, "/held", b"held") for _ in range(5)]
        assert held.wait(10)
        children.append(fork())
        go.set()
        for call in calls:
            call.result()
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    serve("/", b"after")
    application.close()
    print(len(children))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("where", ["/fork", "/return", "idle", "while requests run"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_fork_in_the_middle_of_use_harms_neither_side(backend: str, where: str) -> None:
    """[W19] In the app or beside it: both processes serve on, and no answer is given twice."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        # Of forks beside threads, and of trio in what has just become a main thread, Python and trio warn.
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKS), backend, where],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert (done.returncode, complaints(done.stderr), done.stdout) == (0, "", "1\n")


@pytest.mark.parametrize("size", [5, 100_000])
async def test_a_client_that_leaves_while_its_body_is_brought_is_noticed(size: int, anyio_backend_name: str) -> None:
    """[W16] [W20] Async code of the app that reads as far as the break hears of it; and no file is left open."""
    if anyio_backend_name == "trio":
        pytest.skip("asgiref knows asyncio alone")
    heard: list[Any] = []
    body = Body([])

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        async def view() -> None:
            heard.append(environ["wsgi.input"].read(size))
            heard.append(environ["waitress.client_disconnected"]())
            try:
                environ["wsgi.input"].read(1)
            except ClientDisconnected as error:
                heard.append(type(error))

        start_response("200 OK", [])
        async_to_sync(view)()
        return body

    piece = b"x" * size
    scope = make_scope("POST", headers=[(b"content-length", b"%d" % (2 * size))])
    async with AsgiServer().start(WsgiToAsgi(app), scope, [http_request(piece)]) as exchange:
        await exchange.until(lambda: exchange.journal.count("receive") >= 2)
        assert not heard
        exchange.disconnect()
        await exchange.finish()
    assert (exchange.error, heard) == (None, [piece, True, ClientDisconnected])
    await body.closed.wait_async()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio's eager tasks are of CPython 3.12")
@pytest.mark.parametrize("tail", [False, True], ids=["whole", "with an empty tail"])
async def test_eager_tasks_change_nothing(tail: bool, anyio_backend_name: str) -> None:
    """[W8] [W16] A body that is at hand is read, and that the client leaves behind it is noticed."""
    if anyio_backend_name == "trio":
        pytest.skip("they are asyncio's")
    reading = Signal()

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        assert environ["wsgi.input"].read() == b"x" * 6
        reading.set()
        while not environ["waitress.client_disconnected"]():
            time.sleep(0.01)
        start_response("200 OK", [])
        return [b"left"]

    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
    try:
        scope = make_scope("POST", headers=[(b"content-length", b"6")])
        pieces = [http_request(b"x" * 6, tail)] + ([http_request(b"", False)] if tail else [])
        async with AsgiServer().start(WsgiToAsgi(app), scope, pieces) as exchange:
            await reading.wait_async()
            exchange.disconnect()
            await exchange.finish()
    finally:
        loop.set_task_factory(None)


async def test_a_receive_that_refuses_to_be_cancelled_does_not_hold_the_request_up() -> None:
    """[W16] It is waited for, but not for long."""
    refused = anyio.Event()

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    async def receive() -> Any:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await refused.wait()

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = make_scope("POST", headers=[(b"content-length", b"6")])
    with anyio.fail_after(LIMIT):
        await WsgiToAsgi(app)(scope, receive, send)
    refused.set()
    await anyio.sleep(0.05)
    assert sent[-1]["body"] == b"ok"
