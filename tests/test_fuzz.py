"""Both cycles against a model, step by step: whatever server and app do in whatever order, bridge changes nothing.

The app is a puppet: it does what the machine tells it, one step at a time, and says what came of it. The server is a
strict driver, whose client feeds, rests, leaves. The model is the same puppet, told the same steps, on the driver of
its own world, with no bridge between: a naked app on a naked server.

What tests/fuzz.py does for the translations runs here for a few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import os
import queue
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import pytest
import uvloop
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bridge import AsgiToWsgi, WsgiToAsgi
from bridge.errors import BridgeError
from tests.drivers import (
    AsgiServer,
    FakeInput,
    HttpExchange,
    Signal,
    Violation,
    WsgiExchange,
    WsgiServer,
    in_thread,
    make_environ,
    make_scope,
)

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
FACTORIES: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}

SIZES = st.sampled_from([0, 1, 2, 17, 1000, 70_000])
LINES = st.lists(st.sampled_from([b"a", b"bc\n", b"\n", b"\r\n", b"\x00\xff"]), min_size=1, max_size=5).map(b"".join)
PIECES = LINES | st.sampled_from([1000, 40_000, 200_000]).map(bytes)
BLOCKS = st.sampled_from([0, 1, 5, 5000, 120_000]).map(bytes)
STATUSES = st.sampled_from(["200 OK", "404 Not Found", "599 Odd"])
HEADERS: st.SearchStrategy[list[tuple[str, str]]] = st.sampled_from(
    [
        [],
        [("X-One", "1"), ("Set-Cookie", "a"), ("Set-Cookie", "b")],
        [("Content-Length", "5")],
        [("Content-Length", "0")],
        [("Content-Length", "120001")],
        [("X-Broken", "a\r\nb")],
    ]
)


def when(probe: Callable[[Any], object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule that does nothing where it does not apply.

    hypothesis's own preconditions must give the same each time a case is repeated, and here threads are at work.
    """

    def decorate(rule: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(rule)
        def guarded(self: Any, **arguments: Any) -> None:
            if probe(self):
                rule(self, **arguments)

        return guarded

    return decorate


class OnPurpose(Exception):
    """Raised by a puppet that was told to."""


class Step:
    """One thing that a puppet is told to do, and what came of it."""

    def __init__(self, name: str, argument: Any = None, *, swallow: bool = True) -> None:
        self.name = name
        self.argument = argument
        self.swallow = swallow  # an error of bridge's or the server's, as apps do that carry on
        self.done = Signal(f"end of the step {name}")
        self.value: Any = None
        self.error: BaseException | None = None

    def finish(self, value: Any = None) -> None:
        self.value = value
        self.done.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.done.set()

    def again(self) -> Step:
        return Step(self.name, self.argument, swallow=self.swallow)

    def __repr__(self) -> str:
        return f"<{self.name} {self.argument!r:.30}: {self.value!r:.30} {self.error!r}>"


class WsgiPuppet:
    """A WSGI app and its iterable."""

    def __init__(self, steps: list[Step] | None = None) -> None:
        self.steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
        for step in steps or ():
            self.steps.put(step)
        self.closes = 0
        self.closed = Signal("close() of the iterable")
        self.ended = Signal("the end of the app, before close()")
        self._yielded: Step | None = None

    @property
    def over(self) -> bool:
        return self.closed.is_set() or self.ended.is_set()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> WsgiPuppet:
        self._input = environ["wsgi.input"]
        self._start_response = start_response
        self._write: Any = None
        self._perform_until("return")
        return self

    def __iter__(self) -> WsgiPuppet:
        return self

    def __next__(self) -> bytes:
        self._let_go()
        step = self._perform_until("yield", "end")
        if step.name == "end":
            self.ended.set()
            step.finish()
            raise StopIteration
        self._yielded = step
        block: bytes = step.argument
        return block

    def close(self) -> None:
        self.closes += 1
        self.closed.set()
        self._let_go()

    def _let_go(self) -> None:
        if self._yielded is not None:
            self._yielded.finish()
            self._yielded = None

    def _perform_until(self, *names: str) -> Step:
        while True:
            step = self.steps.get()
            if step.name in names:
                if step.name == "return":
                    step.finish()
                return step
            try:
                step.finish(getattr(self, f"_{step.name}")(step.argument))
            except BaseException as error:
                if not step.swallow:
                    self.ended.set()  # before the step is done: nothing must be told any more
                step.fail(error)
                if not step.swallow:
                    raise

    def _start(self, argument: tuple[str, list[tuple[str, str]], bool]) -> None:
        status, headers, replaces = argument
        if replaces:
            try:
                raise LookupError("the reason to replace it")
            except LookupError:
                self._write = self._start_response(status, headers, sys.exc_info())
        else:
            self._write = self._start_response(status, headers)

    def _writes(self, block: bytes) -> None:
        self._write(block)

    def _read(self, size: int) -> bytes:
        data: bytes = self._input.read(size)
        return data

    def _readline(self, size: int) -> bytes:
        data: bytes = self._input.readline(size)
        return data

    def _raise(self, _: object) -> None:
        raise OnPurpose("the app was told to")


class WsgiAppUnderAsgi(RuleBasedStateMachine):
    """WsgiToAsgi: [W7] to [W17], in any order."""

    @initialize(backend=st.sampled_from(sorted(BACKENDS)), yields=st.booleans(), raises=st.booleans())
    def begin(self, backend: str, yields: bool, raises: bool) -> None:
        self.puppet = WsgiPuppet()
        self.steps: list[Step] = []
        self.fed: list[bytes] = []
        self.complete = False  # the body
        self.paused = False
        self.gone = False  # the client, or the server's wish for an answer
        self.started = False
        self.returned = False
        self.exits = contextlib.ExitStack()
        name, options = BACKENDS[backend]
        self.portal = self.exits.enter_context(anyio.from_thread.start_blocking_portal(name, options))
        self.wrapped = WsgiToAsgi(self.puppet)
        self.exits.callback(self.wrapped.close)
        self.left = Signal("the test's leave for the server to go")
        self.ready = Signal("the server")
        self.future = self.portal.start_task_soon(self.serve, AsgiServer(yields=yields, gone_raises=raises))
        self.ready.wait()

    async def serve(self, server: AsgiServer) -> None:
        async with server.start(self.wrapped, make_scope("POST"), []) as exchange:
            self.exchange: HttpExchange = exchange
            self.ready.set()
            await self.left.wait_async(None)
            await exchange.finish()

    # What the app does

    def idle(self) -> bool:
        return (not self.steps or self.steps[-1].done.is_set()) and not self.puppet.over

    def tell(self, step: Step) -> None:
        self.steps.append(step)
        self.puppet.steps.put(step)
        self.wait_where_due()

    @invariant()
    def wait_where_due(self) -> None:
        """The last step must come to its end if nothing holds it up: else a wake-up was lost."""
        step = self.steps[-1] if getattr(self, "steps", None) else None
        if step is not None and not step.done.is_set() and not self.puppet.over and self.is_due(step):
            step.done.wait()

    def is_due(self, step: Step) -> bool:
        if step.name in ("yield", "writes"):
            return not self.paused or self.gone
        if step.name not in ("read", "readline") or self.complete or self.gone:
            return True
        there = b"".join(self.fed)[self.count_read() :]
        if step.name == "readline" and b"\n" in there:
            return True
        return bool(0 <= step.argument <= len(there))

    def count_read(self) -> int:
        return sum(len(step.value) for step in self.steps if step.name in ("read", "readline") and step.value)

    @rule(status=STATUSES, headers=HEADERS, replaces=st.booleans(), swallow=st.booleans())
    @when(idle)
    def start(self, status: str, headers: list[tuple[str, str]], replaces: bool, swallow: bool) -> None:
        self.tell(Step("start", (status, headers, replaces), swallow=swallow))
        self.started = self.started or self.steps[-1].error is None

    @rule(block=BLOCKS, swallow=st.booleans())
    @when(lambda self: self.idle() and self.started)
    def write(self, block: bytes, swallow: bool) -> None:
        self.tell(Step("writes", block, swallow=swallow))

    @rule(size=SIZES | st.just(-1), line=st.booleans(), swallow=st.booleans())
    @when(idle)
    def read(self, size: int, line: bool, swallow: bool) -> None:
        self.tell(Step("readline" if line else "read", size, swallow=swallow))

    @rule()
    @when(lambda self: self.idle() and not self.returned)
    def return_iterable(self) -> None:
        self.returned = True
        self.tell(Step("return"))

    @rule(block=BLOCKS)
    @when(lambda self: self.idle() and self.returned)
    def yield_block(self, block: bytes) -> None:
        if block or self.started:  # an empty block before the start is an error for bridge alone
            self.tell(Step("yield", block))

    @rule()
    @when(lambda self: self.idle() and len(self.steps) > 5)
    def raise_error(self) -> None:
        self.tell(Step("raise", swallow=False))

    @rule()
    @when(lambda self: self.idle() and self.returned and len(self.steps) > 5)
    def end(self) -> None:
        self.tell(Step("end"))

    # What the client does

    @rule(piece=PIECES, last=st.booleans())
    @when(lambda self: not self.complete and not self.gone)
    def feed(self, piece: bytes, last: bool) -> None:
        self.fed.append(piece)
        self.complete = last
        self.exchange.feed(piece, more_body=not last)

    @rule(last=st.booleans())
    @when(lambda self: not self.complete and not self.gone)
    def feed_nothing(self, last: bool) -> None:
        self.complete = last
        self.exchange.feed(b"", more_body=not last)

    @rule(paused=st.booleans())
    def rest(self, paused: bool) -> None:
        if self.gone:  # there must always be something to do
            return
        self.paused = paused
        if paused:
            self.exchange.pause()
        else:
            self.exchange.resume()

    @rule()
    @when(lambda self: not self.gone and len(self.steps) > 3)
    def leave(self) -> None:
        self.gone = True
        self.exchange.disconnect()

    @rule()
    @when(lambda self: not self.gone and len(self.steps) > 3)
    def cancel(self) -> None:
        self.gone = True
        self.portal.call(self.exchange.cancel)

    # The end

    def teardown(self) -> None:
        if not hasattr(self, "exits"):
            return
        with self.exits:
            try:
                self.come_to_the_end()
            except BaseException:
                self.puppet.steps.put(Step("raise", swallow=False))  # let the thread go
                raise
            finally:
                self.left.set()
            self.future.result(20)
        self.compare()

    def come_to_the_end(self) -> None:
        if not self.gone:
            if not self.complete:
                self.feed_nothing(last=True)
            self.rest(paused=False)
        self.wait_where_due()
        if not self.puppet.over and not self.returned:
            self.return_iterable()
        if not self.puppet.over:
            self.tell(Step("end"))

    def compare(self) -> None:
        steps = [step for step in self.steps if step.done.is_set()]
        again = [step.again() for step in steps]
        naked_app = WsgiPuppet([*again, Step("return"), Step("end")])
        naked = WsgiExchange(
            WsgiServer(validate=False),
            naked_app,
            make_environ("POST", body=FakeInput(self.fed)),
            None,
        )
        with contextlib.suppress(Exception, Violation):
            naked.begin()
            for _ in naked:
                pass
        with contextlib.suppress(Violation):
            naked.close()

        real = self.exchange
        if self.puppet.closed.is_set() or self.returned:
            assert self.puppet.closes == 1
        if self.gone:
            assert naked.body.startswith(real.body)
            data = b"".join(step.value for step in steps if step.name in ("read", "readline") and step.value)
            assert b"".join(self.fed).startswith(data)
            assert real.error is None or isinstance(real.error, (OnPurpose, LookupError, BridgeError)) or real.cancelled
            return
        for step, model in zip(steps, again, strict=True):
            if step.name in ("read", "readline"):
                assert (step.value, step.error) == (model.value, model.error)
            else:
                assert (step.error is None) == (model.error is None), (step, model)
        if isinstance(naked.error, Violation) or naked.violations:
            assert naked.body.startswith(real.body)
            assert real.error is None or isinstance(real.error, (OnPurpose, LookupError, BridgeError))
            assert (real.error is None) == (naked.error is None)
            return
        assert type(real.error) is type(naked.error)
        assert real.started == naked.headers_sent
        if real.started:
            assert naked.status.startswith(f"{real.status} ")
            assert real.headers == [(name.lower().encode(), value.encode()) for name, value in naked.headers]
            assert real.body == naked.body
            assert real.complete or naked.error is not None


TestWsgiAppUnderAsgi = pytest.mark.timeout(120)(WsgiAppUnderAsgi.TestCase)
TestWsgiAppUnderAsgi.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


class AsgiPuppet:
    """An ASGI app; `tell` gives it a step from any thread."""

    def __init__(self, steps: list[Step] | None = None) -> None:
        self.steps: list[Step] = steps or []
        self.given = [Signal("the next step")]
        for _ in self.steps:
            self.give()
        self.ended = Signal("the end of the app")
        self.aside: list[asyncio.Task[Any]] = []

    def give(self) -> None:
        self.given.append(Signal("the next step"))
        self.given[-2].set()

    def tell(self, step: Step) -> None:
        self.steps.append(step)
        self.give()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            for number in range(10_000):
                await self.given[number].wait_async(None)
                step = self.steps[number]
                if step.name == "return":
                    self.ended.set()
                    step.finish()
                    return
                try:
                    step.finish(await getattr(self, f"_{step.name}")(step.argument, receive, send))
                except BaseException as error:
                    if not step.swallow or not isinstance(error, Exception):
                        self.ended.set()
                        step.fail(error)
                        raise
                    step.fail(error)
        finally:
            self.ended.set()

    async def _start(self, argument: Any, receive: Any, send: Any) -> None:
        status, headers = argument
        await send({"type": "http.response.start", "status": status, "headers": headers})

    async def _body(self, argument: tuple[bytes, bool], receive: Any, send: Any) -> None:
        block, more_body = argument
        await send({"type": "http.response.body", "body": block, "more_body": more_body})

    async def _receive(self, _: object, receive: Any, send: Any) -> Any:
        return await receive()

    async def _cancel_receive(self, _: object, receive: Any, send: Any) -> Any:
        """As a timeout around receive() does; what it might have brought must come next time."""
        with anyio.move_on_after(0):
            return await receive()
        return None

    async def _raise(self, _: object, receive: Any, send: Any) -> None:
        raise OnPurpose("the app was told to")


class Feed(io.RawIOBase):
    """A wsgi.input that waits for its client, and gives what there is."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._data = b""
        self._ended = False
        self._gone = False

    def leave(self) -> None:
        with self._changed:
            self._gone = True
            self._changed.notify()

    def feed(self, piece: bytes, last: bool = False) -> None:
        with self._changed:
            self._data += piece
            self._ended = self._ended or last
            self._changed.notify()

    def read(self, size: int = -1, /) -> bytes:
        assert size > 0, "bridge reads by read(n) with n > 0 alone"
        with self._changed:
            self._changed.wait_for(lambda: self._data or self._ended or self._gone)
            if self._gone:
                raise ConnectionResetError("the client has left")
            data, self._data = self._data[:size], self._data[size:]
            return data


class AsgiAppUnderWsgi(RuleBasedStateMachine):
    """AsgiToWsgi: [A3] to [A10], in any order."""

    @initialize(loop=st.sampled_from(["shared", "request"]), factory=st.sampled_from(sorted(FACTORIES)))
    def begin(self, loop: Any, factory: str) -> None:
        self.puppet = AsgiPuppet()
        self.fed: list[bytes] = []
        self.complete = False  # the body
        self.begun = False  # the response's body
        self.whole = False
        self.gone = False
        self.ready = threading.Event()  # the client is, for the next block
        self.ready.set()
        self.input = Feed()
        self.wrapped = AsgiToWsgi(self.puppet, loop=loop, loop_factory=FACTORIES[factory], lifespan="off")
        environ = make_environ("POST") | {
            "wsgi.input": self.input,
            "wsgi.input_terminated": True,
            "waitress.client_disconnected": lambda: self.gone,
        }
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("bridge.asgi_to_wsgi.LOOK_SECONDS", 0.005)
        self.real = WsgiExchange(WsgiServer(validate=False), self.wrapped, environ, None)
        self.call = in_thread(self.serve)

    def serve(self) -> None:
        with contextlib.suppress(Exception):
            self.real.begin()
            while self.ready.wait() and not self.gone:
                next(self.real)
        with contextlib.suppress(Exception):
            self.real.close()

    # What the app does

    @property
    def steps(self) -> list[Step]:
        return self.puppet.steps

    def idle(self) -> bool:
        return (not self.steps or self.steps[-1].done.is_set()) and not self.puppet.ended.is_set()

    def tell(self, step: Step) -> None:
        self.puppet.tell(step)
        self.wait_where_due()

    @invariant()
    def wait_where_due(self) -> None:
        step = self.steps[-1] if hasattr(self, "puppet") and self.steps else None
        if step is None or self.puppet.ended.is_set() or not self.ready.is_set():
            return
        if step.name != "receive" or self.gone or self.whole or self.has_more():
            if not step.done.is_set():
                step.done.wait()
            if step.name == "body" and step.error is None and not self.gone:
                size = sum(len(step.argument[0]) for step in self.steps if step.name == "body" and step.error is None)
                self.real.journal.wait_until(lambda: self.real.body_length == size)  # [A7]

    def has_more(self) -> bool:
        received = [step.value for step in self.steps if "receive" in step.name and step.value]
        if any(message["type"] == "http.request" and not message["more_body"] for message in received):
            return False
        return self.complete or len(b"".join(self.fed)) > sum(len(message.get("body", b"")) for message in received)

    @rule(
        status=st.sampled_from([200, 404, 599, 99]),
        headers=HEADERS.map(lambda pairs: [(name.lower().encode(), value.encode()) for name, value in pairs]),
        swallow=st.booleans(),
    )
    @when(idle)
    def start(self, status: int, headers: list[tuple[bytes, bytes]], swallow: bool) -> None:
        self.tell(Step("start", (status, headers), swallow=swallow))

    @rule(block=BLOCKS, more_body=st.integers(0, 4).map(bool), swallow=st.booleans())
    @when(idle)
    def send_body(self, block: bytes, more_body: bool, swallow: bool) -> None:
        if block or not more_body:  # the naked server takes no empty messages in the middle
            self.tell(Step("body", (block, more_body), swallow=swallow))
            done = self.steps[-1].done.is_set() and self.steps[-1].error is None
            self.whole = self.whole or (done and not more_body)

    @rule()
    @when(idle)
    def receive(self) -> None:
        self.tell(Step("receive"))

    @rule()
    @when(lambda self: self.idle() and self.has_more())
    def cancel_receive(self) -> None:
        self.tell(Step("cancel_receive"))

    @rule()
    @when(lambda self: self.idle() and len(self.steps) > 4)
    def raise_error(self) -> None:
        self.tell(Step("raise", swallow=False))

    @rule()
    @when(lambda self: self.idle() and len(self.steps) > 4)
    def return_(self) -> None:
        self.tell(Step("return"))

    # What the client does

    @rule(piece=PIECES, last=st.booleans())
    @when(lambda self: not self.complete)
    def feed(self, piece: bytes, last: bool) -> None:
        self.fed.append(piece)
        self.complete = last
        self.input.feed(piece, last)

    @rule(ready=st.booleans())
    def rest(self, ready: bool) -> None:
        if ready or self.gone:
            self.ready.set()
        else:
            self.ready.clear()

    @rule()
    @when(lambda self: not self.gone and len(self.steps) > 3)
    def leave(self) -> None:
        self.go()

    def go(self) -> None:
        """The server's reads fail, and whoever asks it for the client hears that it has left."""
        self.gone = True
        self.input.leave()
        self.ready.set()

    # The end

    def teardown(self) -> None:
        if not hasattr(self, "call"):
            return
        try:
            self.ready.set()
            if not self.complete:
                self.feed(piece=b"", last=True)
            self.wait_where_due()
            if not self.idle():  # in receive(), which waits for the client to leave
                self.go()
                self.wait_where_due()
            if not self.puppet.ended.is_set():
                self.tell(Step("return"))
            self.call.result()
            self.puppet.ended.wait()
        finally:
            self.puppet.tell(Step("raise", swallow=False))
            self.go()
            self.wrapped.close()
            self.patch.undo()
        self.compare()

    def compare(self) -> None:
        steps = [step for step in self.steps if step.done.is_set()]
        received = [step.value for step in steps if "receive" in step.name and step.value]
        body = b"".join(message.get("body", b"") for message in received)
        assert b"".join(self.fed).startswith(body)
        if any(message["type"] == "http.request" and not message["more_body"] for message in received):
            assert body == b"".join(self.fed)

        said = [step for step in steps if "receive" not in step.name]
        again = [step.again() for step in said]
        naked = anyio.run(self.run_naked, AsgiPuppet([*again, Step("return")]))
        real = self.real
        if self.gone:
            assert naked.body.startswith(real.body)
            return
        for step, model in zip(said, again, strict=True):
            if model.done.is_set():
                assert (step.error is None) == (model.error is None), (step, model)
        bodies = [step for step in again if step.name == "body" and step.done.is_set() and step.error is None]
        assert real.started == bool(bodies)
        assert real.complete == naked.complete
        if bodies:
            assert (real.status_code, real.body) == (naked.status, naked.body)
            assert [(name.lower().encode(), value.encode()) for name, value in real.headers] == naked.headers
        errors = [error for error in (real.error, real.close_error) if error is not None]
        if naked.complete:
            assert all(isinstance(error, (OnPurpose, BridgeError)) for error in errors)
        elif isinstance(naked.error, OnPurpose):
            assert [type(error) for error in errors] == [OnPurpose]
        else:
            assert errors
            assert all(isinstance(error, BridgeError) for error in errors)

    @staticmethod
    async def run_naked(app: AsgiPuppet) -> HttpExchange:
        server = AsgiServer()
        exchange = server.start(app, make_scope("POST"), b"")
        with contextlib.suppress(Violation):
            async with exchange:
                await exchange.finish()
        return exchange


TestAsgiAppUnderWsgi = pytest.mark.timeout(120)(AsgiAppUnderWsgi.TestCase)
TestAsgiAppUnderWsgi.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# The translations, by atheris


@pytest.fixture
def fuzz(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run tests/fuzz.py, for so many examples, after some code that may break a rule of bridge's."""
    if find_spec("atheris") is None:
        if os.environ.get("BRIDGE_REQUIRE_SERVERS") == "1":
            pytest.fail("atheris is not installed")
        pytest.skip("atheris is not installed")

    def run(code: str = "") -> subprocess.CompletedProcess[str]:
        code = f"import tests.fuzz\n{textwrap.dedent(code)}\ntests.fuzz.main(sys.argv[1:])"
        options = ["-runs=20000", "-max_total_time=40", "-seed=1", f"-artifact_prefix={tmp_path}/"]
        return subprocess.run(
            [sys.executable, "-c", f"import sys\n{code}", *options], capture_output=True, text=True, timeout=55
        )

    return run


def test_no_example_of_atheris_breaks_a_translation(fuzz: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = fuzz()
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DONE" in done.stderr
    assert int(done.stderr.rpartition("cov: ")[2].split()[0]) > 200  # places in bridge's code: they are seen


def test_atheris_finds_a_translation_that_is_broken(fuzz: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = fuzz("""
        import re
        import bridge.headers
        bridge.headers._has_forbidden = re.compile("[\\0\\r]").search  # and no newline
    """)
    assert done.returncode != 0
    assert "test_nothing_can_be_injected_by_a_response_header, for [[(" in done.stderr
