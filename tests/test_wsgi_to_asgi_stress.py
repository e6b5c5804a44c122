"""WsgiToAsgi under clients that leave, servers that cancel, slow readers, and many requests at once."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import sniffio

import bridge.wsgi_to_asgi
from bridge import ClientDisconnected, WsgiToAsgi
from bridge.wsgi_to_asgi import WINDOW
from tests.drivers import AsgiServer, HttpExchange, Piece, Signal, http_request, in_thread, make_scope
from tests.wsgi_apps import Body, Environ, StartResponse

LONG = [(b"content-length", b"1000000")]

pytestmark = pytest.mark.usefixtures("loops_as_in_production")


class Held:
    """An app that can be held in any step of a request, and notes how it goes on.

    Args:
        step: "computes", "streams", "writes", "reads", or "waits for the client", which does not take what it gives.
    """

    def __init__(self, step: str, threads: int = 40) -> None:
        self.step = step
        self.entered = Signal(step)
        self.resume = Signal("resume")
        self.went_on = 0.0  # when the next yield, read or write was made
        self.calls = 0
        self.error: BaseException | None = None
        self.body = Body(iter([]))
        self.saw_gone: Callable[[], bool] = lambda: False
        self.bridge = WsgiToAsgi(self, threads=threads)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        self.calls += 1
        self.saw_gone = environ["waitress.client_disconnected"]
        write = start_response("200 OK", [])
        self.body.blocks = self.run(environ["wsgi.input"], write)
        return self.body

    def run(self, stream: Any, write: Callable[[bytes], object]) -> Iterator[bytes]:
        try:
            if self.step == "streams":
                yield b"first"
            elif self.step == "writes":
                write(b"first")
            self.entered.set()
            if self.step not in ("reads", "waits for the client"):
                self.resume.wait()
            self.went_on = time.monotonic()
            while True:
                if self.step == "reads":
                    stream.read(1)
                elif self.step == "writes":
                    write(b"next")
                else:
                    yield bytes(10_000)
        except BaseException as error:
            self.error = error
            raise

    @property
    def pieces(self) -> list[Piece]:
        return [Signal("more of the body")] if self.step == "reads" else []

    def start(self) -> HttpExchange:
        scope = make_scope("POST", headers=LONG) if self.step == "reads" else make_scope()
        return AsgiServer(slow=self.step == "waits for the client").start(self.bridge, scope, self.pieces)


STEPS = ["computes", "streams", "writes", "reads", "waits for the client"]


async def check_end(app: Held) -> None:
    """The app has heard it at its next step, its iterable is closed once, its thread is free."""
    await app.body.closed.wait_async()
    if app.step in ("reads", "writes"):
        assert isinstance(app.error, ClientDisconnected)
    if app.step not in ("reads", "waits for the client"):  # these went on before the client left
        assert app.body.closed_at - app.went_on < 0.1
    assert app.saw_gone()
    await in_thread(app.bridge._workers.stop, 5).result_async()
    assert (app.body.closes, app.calls) == (1, 1)
    assert (app.bridge._workers.running, app.bridge._workers.streaming, app.bridge._workers.alive) == (0, 0, 0)


# The client leaves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
async def test_client_that_leaves_is_noticed(step: str) -> None:
    """[W16][W6] In whatever step the app is: it is told, and close() runs at its next one."""
    app = Held(step)
    async with app.start() as exchange:
        await app.entered.wait_async()
        exchange.disconnect()
        with anyio.fail_after(1):
            while not app.saw_gone():
                await anyio.sleep(0.001)
        app.resume.set()
    await check_end(app)
    assert exchange.error is None


async def test_send_that_raises_oserror_ends_the_request_quietly() -> None:
    """[W16] Servers may say it this way."""
    app = Held("streams")
    async with AsgiServer(gone_raises=True).start(app.bridge, make_scope(), [Signal("nothing more")]) as exchange:
        await app.entered.wait_async()
        await exchange.messages_sent(2)
        exchange.gone = True  # only the next send() will tell
        app.resume.set()
    await check_end(app)
    assert exchange.error is None


@pytest.mark.parametrize("cancel", [False, True])
async def test_request_whose_client_left_in_the_queue_never_reaches_the_app(cancel: bool) -> None:
    """[W16] Nor does it take a place."""
    app = Held("computes", threads=1)
    async with app.start() as first:
        await app.entered.wait_async()
        async with AsgiServer().start(app.bridge) as second:
            await anyio.sleep(0.01)
            if cancel:
                second.cancel()
            else:
                second.disconnect()
            await second.finish(2)
        assert (second.error is None) is not cancel
        first.disconnect()
        app.resume.set()
    await check_end(app)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("step", STEPS)
async def test_cancellation_is_let_through_at_once(step: str, native: bool) -> None:
    """[W16] The thread that is still in the app stays counted, and the app hears of it at its next step."""
    if native and sniffio.current_async_library() != "asyncio":
        pytest.skip("only asyncio's tasks can be cancelled so")
    app = Held(step)
    async with app.start() as exchange:
        await app.entered.wait_async()
        exchange.cancel(native=native)
        await exchange.finish(1)
        assert step not in ("computes", "streams", "writes") or app.bridge._workers.running == 1
        app.resume.set()
    await check_end(app)
    assert type(exchange.error) is anyio.get_cancelled_exc_class()


@pytest.mark.timeout(90)
@pytest.mark.parametrize("yields", [False, True])
async def test_thousands_of_requests_that_end_at_random_moments(yields: bool) -> None:
    """[W16][W13] Cancelled, left, or served: then every thread is idle and every iterable was closed once.

    Five thousand on each loop: half of them where receive() and send() yield, half of them where they do not.
    """
    rng = random.Random(5000)
    bodies: dict[int, Body] = {}
    to_be_served: set[int] = set()
    on_asyncio = sniffio.current_async_library() == "asyncio"

    def blocks(seed: random.Random, stream: Any, write: Callable[[bytes], object], endless: bool) -> Iterator[bytes]:
        while endless or seed.random() < 0.7:
            choice = seed.randrange(6)
            if choice == 0:
                stream.read(seed.choice([1, 100, 100_000]))
            elif choice == 1:
                write(b"written")
            elif choice == 2:
                time.sleep(0.0005)
            elif choice == 3 and seed.random() < 0.1:
                raise LookupError("the app's own")
            else:
                yield bytes(seed.choice([0, 1, 1000, 200_000]))

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        number = environ["asgi.scope"]["seed"]
        assert number not in bodies
        seed = random.Random(number)
        body = Body(blocks(seed, environ["wsgi.input"], start_response("200 OK", []), environ["asgi.scope"]["endless"]))
        bodies[number] = body
        return body

    wrapped = WsgiToAsgi(app, threads=6)
    server = AsgiServer(keep=False, yields=yields)
    errors: list[BaseException] = []

    async def serve(number: int) -> None:
        action = rng.choice(["serve", "disconnect", "cancel", "cancel", "native"])
        if action == "native" and not on_asyncio:
            action = "cancel"
        if action == "serve":
            to_be_served.add(number)
        sizes = [rng.choice([1, 30_000]) for _ in range(rng.randrange(5))]
        pieces: list[Piece] = [http_request(bytes(size)) for size in sizes]
        headers = [(b"content-length", b"%d" % sum(sizes))] if rng.random() < 0.5 else []
        scope = make_scope("POST", headers=headers, seed=number, endless=action != "serve" and rng.random() < 0.5)
        async with server.start(wrapped, scope, [*pieces, http_request(b"", more_body=False)]) as exchange:
            for _ in range(rng.randrange(1, 15)):
                await anyio.lowlevel.checkpoint()
            if rng.random() < 0.3:
                await anyio.sleep(rng.random() * 0.02)
            if action == "disconnect":
                exchange.disconnect()
            elif action != "serve":
                exchange.cancel(native=action == "native")
        if exchange.error is not None:
            errors.append(exchange.error)

    async def client(numbers: Iterator[int]) -> None:
        for number in numbers:
            await serve(number)

    numbers = iter(range(2500))
    async with anyio.create_task_group() as group:
        for _ in range(30):
            group.start_soon(client, numbers)

    await in_thread(wrapped._workers.stop, 10).result_async()
    workers = wrapped._workers
    assert (workers.running, workers.streaming, workers.waiting, workers.alive) == (0, 0, 0, 0)
    # Of the others, the slower the machine, the more end before they reach the app.
    assert to_be_served <= bodies.keys()
    assert len(to_be_served) > 400
    assert [body.closes for body in bodies.values()] == [1] * len(bodies)
    assert {type(error) for error in errors} <= {LookupError, anyio.get_cancelled_exc_class()}


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 16_384, WINDOW * 2])
@pytest.mark.parametrize("way", ["yield", "write"])
async def test_slow_client_bounds_what_a_fast_app_makes(size: int, way: str) -> None:
    """[W17] To a window of bytes, counted in blocks; and all of them arrive in the end."""
    count = 4_000_000 // size
    made = 0

    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        nonlocal made
        write = start_response("200 OK", [])
        for _ in range(count):
            made += 1
            if way == "write":
                write(bytes(size))
            else:
                yield bytes(size)

    wrapped = WsgiToAsgi(app)
    async with AsgiServer(slow=True, keep=False).start(wrapped) as exchange:
        most = 0
        for taken in range(1, 40):
            exchange.take()
            await anyio.sleep(0.005)
            most = max(most, made * size - max(taken - 2, 0) * size)
        assert most <= WINDOW + 3 * size
        exchange.resume()
    assert exchange.body_length == count * size


async def test_last_block_of_a_slow_client_keeps_no_thread() -> None:
    """[W17][W19] Nothing comes behind it, so the app is closed while the client still takes it."""
    body = Body(iter([bytes(WINDOW * 4)]))

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Length", str(WINDOW * 4))])
        return body

    async with AsgiServer(slow=True).start(WsgiToAsgi(app)) as exchange:
        await body.closed.wait_async()
        assert exchange.messages == []
        exchange.resume()
    assert exchange.body_length == WINDOW * 4


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
async def test_as_many_requests_as_threads_are_in_the_app_at_once(threads: int) -> None:
    """[W19] The rest wait in order; all threads are used, and no more."""
    count = 5 * threads
    order: list[int] = []
    gates = [Signal(f"gate {number}") for number in range(count)]
    inside = most = 0
    lock = threading.Lock()
    changed = [Signal(f"{number} inside") for number in range(count)]

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            number = environ["asgi.scope"]["number"]
            order.append(number)
            changed[len(order) - 1].set()
        gates[number].wait()
        with lock:
            inside -= 1
        start_response("200 OK", [])
        return [b"done"]

    wrapped = WsgiToAsgi(app, threads=threads)

    async def request(number: int, *, task_status: Any) -> None:
        task_status.started()
        await AsgiServer().run(wrapped, make_scope(number=number))

    async with anyio.create_task_group() as group:
        for number in range(count):
            await group.start(request, number)
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
        await changed[threads - 1].wait_async()
        for number in range(count):
            gates[number].set()
            if number + threads < count:
                await changed[number + threads].wait_async()
    assert most == threads
    assert sorted(order[:threads]) == list(range(threads))
    assert order[threads:] == list(range(threads, count))
    assert wrapped._workers.alive <= threads


async def test_threads_are_reused() -> None:
    """[W19] One request after the other is served by one thread: database connections live on."""
    idents: set[int] = set()

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        idents.add(threading.get_ident())
        start_response("200 OK", [])
        return [b"done"]

    wrapped = WsgiToAsgi(app)
    for _ in range(20):
        await AsgiServer().run(wrapped)
        while wrapped._workers.running:
            await anyio.sleep(0)
    assert len(idents) <= 2  # the next request may come before a thread lies down
    assert wrapped._workers.alive == len(idents)


async def test_endless_streams_leave_short_requests_their_threads() -> None:
    """[W19] Forty that come at once give their places back soon; a short request behind them all need not wait long."""
    over = Signal("streams over")

    def stream() -> Iterator[bytes]:
        yield b"event"
        over.wait()
        yield b"last"

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return stream() if environ["PATH_INFO"] == "/events" else [b"short"]

    wrapped = WsgiToAsgi(app, threads=4)
    exchanges = [AsgiServer().start(wrapped, make_scope(path="/events"), []) for _ in range(40)]

    async def client(exchange: HttpExchange) -> None:
        async with exchange:
            await exchange.finish()

    async with anyio.create_task_group() as group:
        for exchange in exchanges:
            group.start_soon(client, exchange)
        while wrapped._workers.waiting + wrapped._workers.running < len(exchanges):
            await anyio.lowlevel.checkpoint()
        assert wrapped._workers.streaming == 0
        begun = anyio.current_time()
        assert (await AsgiServer().run(wrapped)).body == b"short"
        assert anyio.current_time() - begun < 2  # half a second where nothing else runs; ten at a second a place
        assert wrapped._workers.streaming >= 36
        over.set()
    assert {exchange.body for exchange in exchanges} == {b"eventlast"}


async def test_streams_keep_their_places_while_nobody_waits() -> None:
    """[W19] For a second: most are over by then, and as many as `threads` are in the app at once."""
    app = Held("streams")
    async with app.start() as exchange:
        await app.entered.wait_async()
        begun = anyio.current_time()
        while not app.bridge._workers.streaming:
            assert app.bridge._workers.running == 1
            await anyio.sleep(0.01)
        assert anyio.current_time() - begun > 0.8
        exchange.disconnect()
        app.resume.set()
    await check_end(app)


async def test_streams_beyond_their_number_keep_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """[W19] `streams=` bounds how many give their place back."""
    monkeypatch.setattr(bridge.wsgi_to_asgi, "STREAM_SECONDS", 0.01)
    apps = [Held("streams") for _ in range(3)]
    wrapped = WsgiToAsgi(lambda environ, start_response: apps.pop()(environ, start_response), threads=3, streams=1)
    held = list(apps)
    async with anyio.create_task_group() as group:
        for _ in held:
            group.start_soon(AsgiServer().run, wrapped, make_scope(), [{"type": "http.disconnect"}])
        for app in held:
            await app.entered.wait_async()
        await anyio.sleep(0.1)
        assert (wrapped._workers.running, wrapped._workers.streaming) in ((2, 1), (3, 0))
        for app in held:
            app.resume.set()


async def test_thread_that_cannot_be_started_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """[W19][W15] It is an error, not a hang; and the next request finds a thread again."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return [b"done"]

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    wrapped = WsgiToAsgi(app)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        failed = await AsgiServer().run(wrapped)
    assert isinstance(failed.error, RuntimeError)
    assert (await AsgiServer().run(wrapped)).body == b"done"


@pytest.mark.parametrize("other", ["asyncio", "trio"])
def test_one_wrapper_serves_two_loops_at_once(other: str) -> None:
    """[W19] In two threads: each request is answered on its own loop."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        data = environ["wsgi.input"].read()
        start_response("200 OK", [])
        yield data
        yield threading.current_thread().name.encode()

    wrapped = WsgiToAsgi(app, threads=3)

    async def main() -> int:
        served = 0

        async def client() -> None:
            nonlocal served
            for number in range(30):
                body = b"%d" % number
                exchange = await AsgiServer().run(wrapped, None, [body, b""])
                assert exchange.body.startswith(body + b"bridge-worker-")
                served += 1

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(client)
        return served

    calls = [in_thread(functools.partial(anyio.run, main, backend=backend)) for backend in ("asyncio", other)]
    assert [call.result(30) for call in calls] == [150, 150]
    wrapped.close()
