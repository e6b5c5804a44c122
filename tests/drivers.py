"""Strict in-memory servers of both kinds, with which the promises are tested.

`AsgiServer` drives an ASGI app through one request, lifespan or websocket; `WsgiServer` a WSGI app through one request.
They are fakes, not mocks: they do what real servers do, check what the specifications ask of an app, and write a
journal of what happened in which order. Every wait has a time limit, and what does not end says where its threads
stand. Here is no test, and nothing of `bridge` is imported.
"""

from __future__ import annotations

import asyncio
import copy
import enum
import io
import math
import os.path
import queue
import re
import socket
import sys
import threading
import time
import traceback
import wsgiref.util
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar
from urllib.parse import quote
from wsgiref.validate import validator

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from types import TracebackType
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = [
    "AsgiServer",
    "EarlyHints",
    "FakeInput",
    "FileWrapper",
    "HttpExchange",
    "Journal",
    "LifespanExchange",
    "RunningCall",
    "Signal",
    "Stuck",
    "Violation",
    "WebSocketExchange",
    "WsgiExchange",
    "WsgiServer",
    "client_socket",
    "http_request",
    "in_thread",
    "make_environ",
    "make_scope",
    "run_in_thread",
    "run_in_threads",
]

Message = dict[str, Any]
Scope = dict[str, Any]
AsgiApp = Callable[..., Any]  # any ASGI app, however its author spells the types of scope, receive and send
T = TypeVar("T")

# Seconds after which a wait has failed: far more than a loaded machine needs, far less than a whole run is given.
LIMIT = 10.0


class Violation(AssertionError):
    """The app under test broke a rule of its specification."""


class Stuck(TimeoutError):
    """What should have ended did not; the message tells where every thread stands."""


def stacks() -> str:
    """Return the stack of each living thread, as text."""
    frames = sys._current_frames()
    told = []
    for thread in threading.enumerate():
        if frame := frames.get(thread.ident or 0):
            told.append(f"--- {thread.name}\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(told)


def complaints(stderr: str) -> str:
    """What a process has said, but for asyncio's word in its debug mode that a callback took 0.1 s: on a busy machine
    each does now and then.
    """
    slow = re.compile(r"Executing <.* took .* seconds")
    return "".join(line for line in stderr.splitlines(keepends=True) if not slow.match(line))


# Waiting, from threads and tasks --------------------------------------------------------------------------------------


class Signal:
    """An event that any thread or task may set, and any thread or task may wait for."""

    def __init__(self, name: str = "signal") -> None:
        self.name = name
        self._event = threading.Event()
        self._lock = threading.Lock()  # guards the step from "not set" to "set" against new callbacks
        self._callbacks: list[Callable[[], object]] = []

    def set(self) -> None:
        with self._lock:
            self._event.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def is_set(self) -> bool:
        return self._event.is_set()

    def then(self, callback: Callable[[], object]) -> None:
        """Have `callback()` called by the thread that sets the signal; now, if it is set."""
        with self._lock:
            if not self._event.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def wait(self, timeout: float | None = LIMIT) -> None:
        """Wait in a thread.

        Raises:
            Stuck: it was not set within `timeout` seconds.
        """
        if not self._event.wait(timeout):
            raise Stuck(f"{self.name!r} was not set within {timeout} s\n{stacks()}")

    async def wait_async(self, timeout: float | None = LIMIT) -> None:
        """Wait in a task, on any event loop. Raises `Stuck` as `wait` does."""
        if self._event.is_set():
            return
        event = anyio.Event()
        loop: Any = anyio.lowlevel.current_token().native_token
        schedule = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has ended, and the waiter with it
                schedule(event.set)

        self.then(wake)
        with anyio.move_on_after(timeout):
            await event.wait()
            return
        raise Stuck(f"{self.name!r} was not set within {timeout} s\n{stacks()}")


class Entry(NamedTuple):
    """One thing that happened."""

    event: str
    detail: Any
    time: float
    """`time.monotonic()` at that moment."""
    thread: int


class Journal:
    """What happened, in order, written by any thread and waited for in any thread or task."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._lock = threading.Lock()  # guards `_stirred`: each stir sets one signal and puts up the next
        self._stirred = Signal("journal")

    @property
    def events(self) -> list[str]:
        return [entry.event for entry in self.entries]

    def note(self, event: str, detail: Any = None) -> None:
        self.entries.append(Entry(event, detail, time.monotonic(), threading.get_ident()))
        self.stir()

    def stir(self) -> None:
        """Have all waiters look again."""
        with self._lock:
            stirred, self._stirred = self._stirred, Signal("journal")
        stirred.set()

    def index(self, event: str) -> int:
        """Return the place of the first such event, for comparing places."""
        return self.events.index(event)

    def count(self, event: str) -> int:
        return self.events.count(event)

    def wait_until(self, probe: Callable[[], T | None], timeout: float = LIMIT) -> T:
        """Wait, in a thread, until `probe()` gives something true, and return that."""
        deadline = time.monotonic() + timeout
        while True:
            stirred = self._stirred  # taken before the look, so that no stir is missed
            if found := probe():
                return found
            if not stirred._event.wait(deadline - time.monotonic()):
                raise Stuck(self._story(timeout))

    async def until(self, probe: Callable[[], T | None], timeout: float | None = LIMIT) -> T:
        """Wait, in a task, until `probe()` gives something true, and return that."""
        with anyio.move_on_after(timeout):
            while True:
                stirred = self._stirred
                if found := probe():
                    return found
                await stirred.wait_async(None)
        raise Stuck(self._story(timeout))

    def _story(self, timeout: float | None) -> str:
        return f"what was waited for did not come within {timeout} s; so far: {self.events}\n{stacks()}"


class RunningCall(Generic[T]):
    """A function that runs in a thread of its own."""

    def __init__(self, func: Callable[..., T], *args: Any) -> None:
        self.ended = Signal(f"end of {func!r}")
        self._outcome: list[tuple[T | None, BaseException | None]] = []
        # A daemon, so that one that is stuck cannot hold up the end of the whole run.
        self.thread = threading.Thread(target=self._run, args=(func, args), name=f"call of {func!r}", daemon=True)
        self.thread.start()

    def _run(self, func: Callable[..., T], args: tuple[Any, ...]) -> None:
        try:
            self._outcome.append((func(*args), None))
        except BaseException as error:  # carried over to the thread that asks for the result
            self._outcome.append((None, error))
        finally:
            self.ended.set()

    def result(self, timeout: float = LIMIT) -> T:
        """Wait for the function's end; return its value or raise its error.

        Raises:
            Stuck: it did not end within `timeout` seconds.
        """
        self.ended.wait(timeout)
        return self._unwrap()

    async def result_async(self, timeout: float = LIMIT) -> T:
        """Do as `result` does, in a task."""
        await self.ended.wait_async(timeout)
        return self._unwrap()

    def _unwrap(self) -> T:
        self.thread.join(LIMIT)  # it has nothing left to do; a test leaves no thread behind
        value, error = self._outcome[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # there is a value where there is no error


def in_thread(func: Callable[..., T], *args: Any) -> RunningCall[T]:
    """Start `func(*args)` in a thread of its own."""
    return RunningCall(func, *args)


def run_in_thread(func: Callable[..., T], *args: Any, timeout: float = LIMIT) -> T:
    """Run `func(*args)` to its end in a thread of its own; raises `Stuck` if it does not end in time."""
    return RunningCall(func, *args).result(timeout)


def run_in_threads(func: Callable[[int], T], count: int, *, threads: int = 8, timeout: float = 3 * LIMIT) -> list[T]:
    """Call `func(0)` ... `func(count - 1)` from `threads` server threads; return their values in that order.

    Raises:
        Stuck: they did not all end within `timeout` seconds.
    """
    results: dict[int, T] = {}
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(count):
        numbers.put(number)

    def serve() -> None:
        with suppress(queue.Empty):
            while True:
                number = numbers.get_nowait()
                results[number] = func(number)

    calls = [RunningCall(serve) for _ in range(threads)]
    deadline = time.monotonic() + timeout
    for call in calls:
        call.result(max(0.0, deadline - time.monotonic()))
    return [results[number] for number in range(count)]


# The ASGI server ------------------------------------------------------------------------------------------------------


def make_scope(
    method: str = "GET",
    path: str = "/",
    query: str | bytes = b"",
    headers: Iterable[tuple[bytes, bytes]] = (),
    *,
    drop: Iterable[str] = (),
    **overrides: Any,
) -> Scope:
    """Return a complete http scope, less the keys in `drop`."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": quote(path).encode("ascii"),
        "query_string": query if isinstance(query, bytes) else query.encode("latin-1"),
        "root_path": "",
        "headers": [(b"host", b"testserver:8000"), *headers],
        "client": ("192.0.2.7", 54321),
        "server": ("testserver", 8000),
        "state": {},
        "extensions": {},
    }
    return {key: value for key, value in (scope | overrides).items() if key not in set(drop)}


def http_request(body: bytes = b"", more_body: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more_body}


Piece = bytes | Message | Signal


def _script(body: bytes | Iterable[Piece]) -> Iterator[Message | Signal]:
    """Make messages of pieces. In bytes or a list the last piece of bytes ends the body; else an empty message does."""
    pieces = [body] if isinstance(body, bytes) else body
    last = None
    if isinstance(pieces, list):
        last = max((index for index, piece in enumerate(pieces) if isinstance(piece, bytes)), default=-1)
    for index, piece in enumerate(pieces):
        yield http_request(piece, index != last) if isinstance(piece, bytes) else piece
    if last is None:
        yield http_request(b"", more_body=False)


class AsgiServer:
    """An ASGI server for one request at a time.

    Args:
        slow: the client takes nothing until the exchange's `take()` or `resume()` is called.
        gone_raises: send() raises OSError once the client has left; else it says nothing, as most real servers do.
        yields: receive() and send() always give up the loop once, as hypercorn's; else only to wait, as uvicorn's.
        lossy: a receive() that is cancelled takes the body's next message with it, as granian's does.
        keep: all is recorded; else what goes on in the middle of a body leaves no trace but `body_length`, for tests
            that look at memory.
    """

    def __init__(
        self,
        *,
        slow: bool = False,
        gone_raises: bool = False,
        yields: bool = False,
        lossy: bool = True,
        keep: bool = True,
    ) -> None:
        self.slow = slow
        self.gone_raises = gone_raises
        self.yields = yields
        self.lossy = lossy
        self.keep = keep

    def start(
        self,
        app: AsgiApp,
        scope: Scope | None = None,
        body: bytes | Iterable[Piece] = b"",
        *,
        journal: Journal | None = None,
    ) -> HttpExchange:
        """Return an exchange; `async with` it to have the app run until the block is left, or its end.

        Args:
            body: bytes, or pieces of: bytes, whole messages, and signals which receive() waits for before it goes on.
                In a list the last bytes end the body, and an empty list leaves all to `feed()`; any other iterable is
                drawn from as receive() is called, and an empty message ends it.
        """
        if scope is None:
            length = [(b"content-length", b"%d" % len(body))] if isinstance(body, bytes) and body else []
            scope = make_scope("POST" if body else "GET", headers=length)
        return HttpExchange(self, app, scope, body, journal)

    async def run(
        self,
        app: AsgiApp,
        scope: Scope | None = None,
        body: bytes | Iterable[Piece] = b"",
        *,
        journal: Journal | None = None,
    ) -> HttpExchange:
        """Drive one request to the app's end. The app's error is recorded; a violation is raised."""
        async with self.start(app, scope, body, journal=journal) as exchange:
            await exchange.finish()
        return exchange

    def lifespan(self, app: AsgiApp, **overrides: Any) -> LifespanExchange:
        """Return a lifespan; `async with` it for startup, and shutdown at the end of the block."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
        return LifespanExchange(self, app, scope | overrides)

    async def websocket(self, app: AsgiApp, scope: Scope | None = None) -> WebSocketExchange:
        """Open a websocket, leave again, and return what the app made of it."""
        if scope is None:
            scope = make_scope(type="websocket", scheme="ws", subprotocols=[], drop=["method"])
        async with WebSocketExchange(self, app, scope) as exchange:
            await exchange.finish()
        return exchange


class _AsgiExchange:
    """One call of an ASGI app, in a task of its own that the test can cancel without being cancelled itself."""

    def __init__(self, server: AsgiServer, app: AsgiApp, scope: Scope, journal: Journal | None = None) -> None:
        self.server = server
        self.app = app
        self.scope = scope
        self.journal = Journal() if journal is None else journal
        self.messages: list[Message] = []  # what the app sent and the client took
        self.violations: list[Violation] = []
        self.error: BaseException | None = None  # what the app raised, be it its own cancellation
        self.ended = False  # whether the app has returned or raised
        self._cancel_scope = anyio.CancelScope()
        self._group = anyio.create_task_group()
        self._task: asyncio.Task[Any] | None = None  # under asyncio, the app's
        self._thread = threading.get_ident()  # the event loop's
        self._receiving = False
        self._sending = False
        self._to_lose = 0  # messages that cancelled calls of receive() take with them

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._group.start_soon(self._run)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        try:
            if error is None:
                await self.finish()
        finally:
            self._let_go()
            # The group is not told the error, which so stays itself instead of becoming part of an exception group.
            await self._group.__aexit__(None, None, None)
        if error is None and self.violations:
            raise self.violations[0]

    async def _run(self) -> None:
        self._task = asyncio.current_task() if _on_asyncio() else None
        with self._cancel_scope:
            try:
                await self.app(self.scope, self.receive, self.send)
            except BaseException as error:
                self.error = error
                # A cancellation goes on to the scope that asked for it; one that no scope asked for is an error.
                if (
                    isinstance(error, anyio.get_cancelled_exc_class())
                    and anyio.current_effective_deadline() == -math.inf
                ):
                    raise
            finally:
                self.ended = True
                self._check_end()
                self.journal.note("ended")

    def _let_go(self) -> None:
        """End the app if it still runs: the test is over."""
        self._cancel_scope.cancel()

    def _check_end(self) -> None:
        """Check what only the app's end can tell."""

    @property
    def cancelled(self) -> bool:
        return self._cancel_scope.cancelled_caught

    def cancel(self, *, native: bool = False) -> None:
        """Cancel the app: by its cancel scope, or, `native`, by asyncio's Task.cancel() as some servers do."""
        if not native:
            return self._cancel_scope.cancel()
        assert self._task is not None, "the app has not begun yet, or the loop is not asyncio's"
        self._task.cancel()

    async def until(self, probe: Callable[[], T | None], timeout: float = LIMIT) -> T:
        """Wait until `probe()` is true. It is asked again after each entry of the journal."""
        return await self.journal.until(probe, timeout)

    async def finish(self, timeout: float = LIMIT) -> Self:
        """Wait until the app has ended."""
        await self.until(lambda: self.ended, timeout)
        return self

    async def messages_sent(self, count: int, timeout: float = LIMIT) -> list[Message]:
        """Wait until the client took that many messages."""
        await self.until(lambda: len(self.messages) >= count, timeout)
        return self.messages

    def violate(self, what: str) -> Violation:
        """Record that the app broke a rule; the caller raises it, and the exchange does once more at its end."""
        self.violations.append(Violation(what))
        self.journal.note("violation", what)
        return self.violations[-1]

    async def receive(self) -> Message:
        self._trace("receive")
        self._check_call("receive()", self._receiving)
        self._receiving = True
        try:
            if self.server.yields:
                await anyio.lowlevel.checkpoint()
            self._before_receive()
            message = await self.journal.until(self._at_hand, None)
        except anyio.get_cancelled_exc_class():
            self._to_lose += self.server.lossy
            raise
        finally:
            self._receiving = False
        self._trace(message["type"], message)
        return message

    async def send(self, message: Any) -> None:
        self._trace("send", message)
        self._check_call("send()", self._sending)
        if not isinstance(message, dict) or type(message.get("type")) is not str:
            raise self.violate(f"expected a dict with a type, got {message!r}")
        message = self._checked(dict(message))
        self._sending = True
        try:
            if self.server.yields:
                await anyio.lowlevel.checkpoint()
            await self._take(message)
        finally:
            self._sending = False

    def _check_call(self, name: str, waits: bool) -> None:
        if waits:
            raise self.violate(f"{name} called while another {name} waits")
        if self.ended:
            raise self.violate(f"{name} called after the app had ended")
        if threading.get_ident() != self._thread:
            raise self.violate(f"{name} called outside of the event loop's thread")

    def _trace(self, event: str, message: Any = None) -> None:
        """Note an event, unless it is one of very many."""
        if self.server.keep or (isinstance(message, dict) and not message.get("more_body", False)):
            self.journal.note(event, message)
        else:
            self.journal.stir()

    def _before_receive(self) -> None:
        """Do what a real server does at the call of receive()."""

    def _at_hand(self) -> Message | None:
        """Return the message that receive() may give now."""
        raise NotImplementedError

    def _checked(self, message: Message) -> Message:
        """Check a message against what was sent before it."""
        raise NotImplementedError

    async def _take(self, message: Message) -> None:
        self._record(message)

    def _record(self, message: Message) -> None:
        if self.server.keep or not message.get("more_body", False):
            self.messages.append(message)
        self._trace("sent", message)


class Phase(enum.Enum):
    """What an http app may send next, besides interim messages."""

    START = "http.response.start"
    BODY = "http.response.body"
    TRAILERS = "http.response.trailers"
    NOTHING = "nothing"


class HttpExchange(_AsgiExchange):
    """One http request: what the test lets its client do, and what the app answered.

    The journal says, in order: "receive" and "send" as the app calls them, "100-continue" where a receive() makes the
    server send that, the type of each message that receive() gives, "sent" as the client takes a message, "client
    gone", "ended", "violation".
    """

    def __init__(
        self, server: AsgiServer, app: AsgiApp, scope: Scope, body: bytes | Iterable[Piece], journal: Journal | None
    ) -> None:
        super().__init__(server, app, scope, journal)
        self.gone = False  # whether the client has left
        self.complete = False  # whether the client took the whole response
        self.pending = 0  # bytes in the send() that waits for a slow client
        self.lost: list[Message] = []  # what was sent after the client had left
        self.body_length = 0  # body bytes that the app sent
        self._script = _script(body)
        self._fed: deque[Message | Signal] = deque()  # what comes after the script
        self._head: Message | Signal | None = None  # a closed gate which receive() has reached
        self._permits: float = 0 if server.slow else math.inf  # messages that the client will take
        self._phase = Phase.START
        self._content_length: int | None = None
        self._trailers = False
        self._bodiless = scope.get("method") == "HEAD"
        self._extensions = copy.deepcopy(scope.get("extensions"))

    # The client's side: every method may be called from any thread.

    def feed(self, body: bytes | Message | Signal, more_body: bool = True) -> None:
        """Put one more piece behind the script."""
        self._fed.append(http_request(body, more_body) if isinstance(body, bytes) else body)
        self.journal.stir()

    def disconnect(self) -> None:
        """Have the client leave: receive() gives http.disconnect from now on, and a send() that waits comes back."""
        self.gone = True
        self.journal.note("client gone")

    def take(self, count: int = 1) -> None:
        """Have a slow client take that many messages more."""
        self._permits += count
        self.journal.stir()

    def pause(self) -> None:
        """Have the client take nothing any more."""
        self._permits = 0

    def resume(self) -> None:
        """Have the client take all there is."""
        self._permits = math.inf
        self.journal.stir()

    # What came of it.

    @property
    def started(self) -> bool:
        return any(message["type"] == "http.response.start" for message in self.messages)

    @property
    def continued(self) -> bool:
        """Whether `100 Continue` was sent."""
        return "100-continue" in self.journal.events

    @property
    def status(self) -> int:
        status: int = self._start["status"]
        return status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        headers: list[tuple[bytes, bytes]] = self._start["headers"]
        return headers

    def header(self, name: bytes) -> bytes | None:
        """Return the first header of that name."""
        return next((value for key, value in self.headers if key == name), None)

    @property
    def blocks(self) -> list[bytes]:
        """The body messages' bodies, as they were sent."""
        return [message.get("body", b"") for message in self.messages if message["type"] == "http.response.body"]

    @property
    def body(self) -> bytes:
        paths = [message["path"] for message in self.messages if message["type"] == "http.response.pathsend"]
        return b"".join(self.blocks) + b"".join(_content(path) for path in paths)

    @property
    def _start(self) -> Message:
        for message in self.messages:
            if message["type"] == "http.response.start":
                return message
        raise AssertionError(f"no response was started; the app's error: {self.error!r}") from self.error

    async def response_started(self, timeout: float = LIMIT) -> Self:
        await self.until(lambda: self.started, timeout)
        return self

    # The server's side.

    def _let_go(self) -> None:
        super()._let_go()
        if not self.ended:  # an app that shields itself from the cancellation hears it this way
            self.disconnect()

    def _before_receive(self) -> None:
        expects = (b"expect", b"100-continue") in [
            (name, value.lower()) for name, value in self.scope.get("headers", ())
        ]
        if expects and self._phase is Phase.START and not self.continued:
            self.journal.note("100-continue")

    def _at_hand(self) -> Message | None:
        if self.gone or self.complete:
            return {"type": "http.disconnect"}
        while (head := self._draw() if self._head is None else self._head) is not None:
            self._head = head if isinstance(head, Signal) and not head.is_set() else None
            if self._head is not None:
                return None
            if not isinstance(head, Signal):
                if head["type"] == "http.disconnect":
                    self.gone = True
                elif self._to_lose:
                    self._to_lose -= 1
                    continue
                return head
        return None

    def _draw(self) -> Message | Signal | None:
        """Take the next piece of the script, or of what was fed."""
        piece = next(self._script, None)
        if piece is None and self._fed:
            piece = self._fed.popleft()
        if isinstance(piece, Signal):
            piece.then(self.journal.stir)
        return piece

    async def _take(self, message: Message) -> None:
        self.pending = len(message.get("body", b""))
        self.journal.stir()
        try:
            await self.journal.until(lambda: self.gone or self._permits > 0, None)
        finally:
            self.pending = 0
        if self.gone:
            self.lost.append(message)
            if self.server.gone_raises:
                raise OSError("the client has left")
            return
        self._permits -= 1
        self.complete = self._phase is Phase.NOTHING
        self._record(message)

    def _checked(self, message: Message) -> Message:
        match message["type"]:
            case "http.response.start":
                return self._checked_start(message)
            case "http.response.body":
                self._check_body(message)
            case "http.response.trailers":
                self._expect(Phase.TRAILERS, message)
                message["headers"] = self._checked_headers(message.get("headers", ()))
                self._phase = Phase.TRAILERS if message.get("more_trailers", False) else Phase.NOTHING
            case "http.response.pathsend":
                self._check_pathsend(message)
            case "http.response.early_hint" | "http.response.push" | "http.response.debug" as kind:
                self._check_offered(kind)
                if self._phase is not Phase.START:
                    raise self.violate(f"{kind!r} sent after the response was started")
            case kind:
                raise self.violate(f"unknown message type {kind!r}")
        return message

    def _expect(self, phase: Phase, message: Message) -> None:
        if self._phase is not phase:
            raise self.violate(f"expected {self._phase.value!r}, got {message['type']!r}")

    def _check_offered(self, extension: str) -> None:
        if extension not in (self.scope.get("extensions") or {}):
            raise self.violate(f"{extension!r} sent to a server that does not offer it")

    def _checked_start(self, message: Message) -> Message:
        self._expect(Phase.START, message)
        status = message.get("status")
        if not isinstance(status, int) or isinstance(status, bool) or not 100 <= status <= 999:
            raise self.violate(f"expected a status of three digits, got {status!r}")
        message["headers"] = headers = self._checked_headers(message.get("headers", ()))
        lengths = {value for name, value in headers if name == b"content-length"}
        if len(lengths) > 1 or not all(length.isdigit() for length in lengths):
            raise self.violate(f"expected one decimal Content-Length, got {sorted(lengths)}")
        if message.get("trailers", False):
            self._check_offered("http.response.trailers")
            self._trailers = True
        self._content_length = int(lengths.pop()) if lengths else None
        self._bodiless = self._bodiless or status in (204, 304)
        self._phase = Phase.BODY
        return message

    def _checked_headers(self, headers: Any) -> list[tuple[bytes, bytes]]:
        checked = []
        for header in headers:
            if not isinstance(header, (tuple, list)) or [type(part) for part in header] != [bytes, bytes]:
                raise self.violate(f"expected a header of two bytes, got {header!r}")
            name, value = header
            if not name or name != name.lower() or any(byte <= 32 or byte >= 127 or byte == 58 for byte in name):
                raise self.violate(f"expected a lower-case header name, got {name!r}")
            if any(byte in b"\r\n\0" for byte in value):
                raise self.violate(f"CR, LF or NUL in the value of {name!r}: {value!r}")
            if wsgiref.util.is_hop_by_hop(name.decode("ascii")):
                raise self.violate(f"hop-by-hop header {name!r}")
            checked.append((name, value))
        return checked

    def _check_body(self, message: Message) -> None:
        self._expect(Phase.BODY, message)
        body, more_body = message.get("body", b""), message.get("more_body", False)
        if type(body) is not bytes or type(more_body) is not bool:
            raise self.violate(f"expected bytes and a bool, got body={body!r:.40} and more_body={more_body!r}")
        if more_body and not body:
            raise self.violate("an empty body message in the middle of the response")
        self._count(len(body), final=not more_body)

    def _check_pathsend(self, message: Message) -> None:
        self._check_offered("http.response.pathsend")
        self._expect(Phase.BODY, message)
        path = message.get("path")
        if self.body_length or not isinstance(path, str) or not os.path.isabs(path):
            raise self.violate(
                f"expected an absolute path in place of the body, got {path!r} after {self.body_length} bytes"
            )
        self._count(os.path.getsize(path), final=True)

    def _count(self, length: int, *, final: bool) -> None:
        body_length, expected = self.body_length + length, self._content_length
        short = final and not self._bodiless and body_length < (expected or 0)
        if expected is not None and (short or body_length > expected):
            raise self.violate(f"{body_length} body bytes{' in all' if final else ''}, Content-Length is {expected}")
        self.body_length = body_length
        if final:
            self._phase = Phase.TRAILERS if self._trailers else Phase.NOTHING

    def _check_end(self) -> None:
        if self.error is None and not self.complete and not self.gone:
            self.violate(f"the app returned where {self._phase.value!r} was expected")
        # Some servers share one extensions dict between all requests.
        if self.scope.get("extensions") != self._extensions:
            self.violate("the app changed scope['extensions']")


class LifespanExchange(_AsgiExchange):
    """One lifespan: `async with` it, or call `startup()` and `shutdown()` inside such a block."""

    def __init__(self, server: AsgiServer, app: AsgiApp, scope: Scope) -> None:
        super().__init__(server, app, scope)
        self.state: dict[str, Any] = scope.get("state", {})
        self._events: list[str] = []  # what the app is asked
        self._given = 0  # how many of them it has received
        self._replies: dict[str, Message] = {}

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        try:
            await self.startup()
        except BaseException as error:
            await super().__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        if error is None and not self.ended:
            await self.shutdown()
        await super().__aexit__(kind, error, tb)

    @property
    def started(self) -> Message | None:
        """The app's answer to startup: complete, failed, or None if it ended without one."""
        return self._replies.get("startup")

    @property
    def stopped(self) -> Message | None:
        """The app's answer to shutdown."""
        return self._replies.get("shutdown")

    async def startup(self, timeout: float = LIMIT) -> Message | None:
        return await self._ask("startup", timeout)

    async def shutdown(self, timeout: float = LIMIT) -> Message | None:
        return await self._ask("shutdown", timeout)

    async def _ask(self, event: str, timeout: float) -> Message | None:
        if event not in self._replies and event not in self._events:
            self._events.append(event)
            self.journal.stir()
        await self.until(lambda: event in self._replies or self.ended, timeout)
        return self._replies.get(event)

    def _at_hand(self) -> Message | None:
        if self._given == len(self._events):
            return None
        self._given += 1
        return {"type": f"lifespan.{self._events[self._given - 1]}"}

    def _checked(self, message: Message) -> Message:
        _, event, outcome = [*message["type"].split("."), "", ""][:3]
        if event not in self._events or event in self._replies or outcome not in ("complete", "failed"):
            raise self.violate(f"{message['type']!r} answers nothing that was asked")
        if type(message.get("message", "")) is not str:
            raise self.violate(f"expected a message of type str, got {message['message']!r}")
        self._replies[event] = message
        return message


class WebSocketExchange(_AsgiExchange):
    """One websocket whose client says nothing, and leaves as soon as it is accepted."""

    ORDER: ClassVar = {
        "": ("websocket.accept", "websocket.close", "websocket.http.response.start"),
        "websocket.accept": ("websocket.send", "websocket.close"),
        "websocket.send": ("websocket.send", "websocket.close"),
        "websocket.http.response.start": ("websocket.http.response.body",),
        "websocket.http.response.body": ("websocket.http.response.body",),
        "websocket.close": (),
    }

    @property
    def accepted(self) -> bool:
        return self._sent("websocket.accept")

    @property
    def refused(self) -> bool:
        """Whether it was closed, or answered by an http response, before it was accepted."""
        return bool(self.messages) and not self.accepted

    @property
    def _denied(self) -> bool:
        """Whether a whole http response was sent."""
        last = self.messages[-1] if self.messages else {"type": ""}
        return last["type"] == "websocket.http.response.body" and not last.get("more_body", False)

    def _sent(self, kind: str) -> bool:
        return any(message["type"] == kind for message in self.messages)

    def _at_hand(self) -> Message | None:
        if "websocket.connect" not in self.journal.events:
            return {"type": "websocket.connect"}
        if self.accepted or self._sent("websocket.close") or self._denied:
            return {"type": "websocket.disconnect", "code": 1005, "reason": ""}
        return None

    def _checked(self, message: Message) -> Message:
        last = self.messages[-1] if self.messages else {"type": ""}
        if self._denied or message["type"] not in self.ORDER[last["type"]]:
            raise self.violate(f"{message['type']!r} sent after {last['type']!r}")
        if "http" in message["type"] and "websocket.http.response" not in (self.scope.get("extensions") or {}):
            raise self.violate(f"{message['type']!r} sent to a server that does not offer it")
        return message

    def _check_end(self) -> None:
        if self.error is None and not self.messages:
            self.violate("the app returned without an answer to websocket.connect")


def _on_asyncio() -> bool:
    return hasattr(anyio.lowlevel.current_token().native_token, "call_soon_threadsafe")


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# The WSGI server ------------------------------------------------------------------------------------------------------


def make_environ(
    method: str = "GET",
    path: str = "/",
    query: str = "",
    headers: Iterable[tuple[str, str]] = (),
    body: bytes | FakeInput = b"",
    *,
    drop: Iterable[str] = (),
    **overrides: Any,
) -> WSGIEnvironment:
    """Return an environ with all that PEP 3333 requires, less the keys in `drop`. For keys with a dot: `| {...}`.

    Args:
        path: as text; it becomes UTF-8, then latin-1, as WSGI has it.
        body: bytes, which set CONTENT_LENGTH too, or a stream.
    """
    environ: WSGIEnvironment = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path.encode().decode("latin-1"),
        "QUERY_STRING": query,
        "SERVER_NAME": "testserver",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "testserver:8000",
        "REMOTE_ADDR": "192.0.2.7",
        "REMOTE_PORT": "54321",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": body if isinstance(body, FakeInput) else FakeInput(body),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    if isinstance(body, bytes) and body:
        environ["CONTENT_LENGTH"] = str(len(body))
    for name, value in headers:
        key = name.upper().replace("-", "_")
        environ[key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"] = value
    return {key: value for key, value in (environ | overrides).items() if key not in set(drop)}


class Read(NamedTuple):
    """One call of a method of wsgi.input."""

    method: str
    size: int
    thread: int


class FakeInput:
    """A wsgi.input of the temperament that a test asks for.

    Args:
        pieces: bytes, or pieces of: bytes, signals which a read waits for, and exceptions which a read raises whenever
            it gets there. At the end reads give b"", also where that is short of CONTENT_LENGTH: a client that left.
        fills: read(n) waits for n bytes or the end, as gunicorn's and granian's; else it gives what there is.
        only_sized_reads: read() without a positive size, and lines, raise, as granian's do in part.
        open_ended: a read past the end is a violation: on a kept-alive connection it would wait for ever.
    """

    def __init__(
        self,
        pieces: bytes | Iterable[bytes | Signal | BaseException] = b"",
        *,
        fills: bool = True,
        only_sized_reads: bool = False,
        open_ended: bool = False,
    ) -> None:
        self.reads: deque[Read] = deque(maxlen=10_000)  # the latest: memory stays bounded however long the body
        self.given = 0  # bytes handed out
        self.violations: list[Violation] = []
        self._pieces = iter([pieces] if isinstance(pieces, bytes) else pieces)
        self._head: Signal | BaseException | None = None  # the piece that reads have reached and cannot pass yet
        self._buffer = bytearray()
        self._fills = fills
        self._only_sized_reads = only_sized_reads
        self._open_ended = open_ended
        self._reading = threading.Lock()  # locked while a thread reads

    @property
    def sizes(self) -> list[int]:
        return [read.size for read in self.reads]

    @property
    def threads(self) -> set[int]:
        return {read.thread for read in self.reads}

    def read(self, size: int = -1, /) -> bytes:
        if self._only_sized_reads and size <= 0:
            raise OverflowError(f"read({size})")
        with self._noted("read", size):
            while (size < 0 or len(self._buffer) < size) and (self._fills or not self._buffer) and self._pull():
                pass
            return self._cut(len(self._buffer) if size < 0 else size)

    def readline(self, size: int = -1, /) -> bytes:
        if self._only_sized_reads:
            raise NotImplementedError("readline()")
        with self._noted("readline", size):
            while b"\n" not in self._buffer and (size < 0 or len(self._buffer) < size) and self._pull():
                pass
            end = self._buffer.find(b"\n") + 1 or len(self._buffer)
            return self._cut(end if size < 0 else min(end, size))

    def readlines(self, hint: int = -1, /) -> list[bytes]:
        lines: list[bytes] = []
        while (hint <= 0 or sum(map(len, lines)) < hint) and (line := self.readline()):
            lines.append(line)
        return lines

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    @contextmanager
    def _noted(self, method: str, size: int) -> Iterator[None]:
        if not self._reading.acquire(blocking=False):
            raise self._violate("two threads read wsgi.input at once")
        try:
            self.reads.append(Read(method, size, threading.get_ident()))
            yield
        finally:
            self._reading.release()

    def _pull(self) -> bool:
        """Move the next bytes into the buffer; return whether there were any."""
        while True:
            piece = self._head if self._head is not None else next(self._pieces, None)
            self._head = None
            if isinstance(piece, bytes):
                self._buffer += piece
                return True
            if piece is None:
                if self._open_ended:
                    raise self._violate(f"read past the end of the body, after {self.given + len(self._buffer)} bytes")
                return False
            self._head = piece
            if isinstance(piece, BaseException):
                raise piece
            piece.wait()
            self._head = None

    def _cut(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        self.given += len(data)
        return data

    def _violate(self, what: str) -> Violation:
        self.violations.append(Violation(what))
        return self.violations[-1]


class FileWrapper(wsgiref.util.FileWrapper):
    """A `wsgi.file_wrapper`; the exchange's `file` is the app's result where that is one of these."""


class EarlyHints:
    """A `wsgi.early_hints` as gunicorn's, which records what it is called with."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, str]]] = []

    def __call__(self, headers: list[tuple[str, str]]) -> None:
        self.calls.append(headers)


@contextmanager
def client_socket() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give a connected pair: the client's end, and the server's for `gunicorn.socket` or `werkzeug.socket`."""
    client, server = socket.socketpair()
    with client, server:
        yield client, server


class WsgiServer:
    """A WSGI server for one request at a time, in the calling thread.

    Args:
        validate: put `wsgiref.validate` around the app. It forbids legal things too: a body without Content-Type, say.
        write: whether start_response returns a write(); granian's returns None.
        keep: blocks are recorded; else only `body_length`, for tests that look at memory.
    """

    def __init__(self, *, validate: bool = True, write: bool = True, keep: bool = True) -> None:
        self.validate = validate
        self.write = write
        self.keep = keep

    def start(
        self, app: WSGIApplication, environ: WSGIEnvironment | None = None, *, journal: Journal | None = None
    ) -> WsgiExchange:
        """Call the app and return the exchange: iterate and close() it. The app's error is raised as itself."""
        exchange = WsgiExchange(self, app, make_environ() if environ is None else environ, journal)
        try:
            exchange.begin()
        except BaseException:
            exchange.close()
            raise
        return exchange

    def run(
        self, app: WSGIApplication, environ: WSGIEnvironment | None = None, *, journal: Journal | None = None
    ) -> WsgiExchange:
        """Drive one request to its end. The app's error is recorded; an AssertionError, so any violation, is raised."""
        exchange = WsgiExchange(self, app, make_environ() if environ is None else environ, journal)
        try:
            exchange.begin()
            deque(exchange, maxlen=0)
        except BaseException as error:
            if error is not exchange.error:  # not the app's, but the test's: an interrupt, say
                raise
        try:
            exchange.close()
        except BaseException as error:
            if error is not exchange.close_error and error not in exchange.violations:
                raise
        for broken in (*exchange.violations, exchange.error, exchange.close_error):
            if isinstance(broken, AssertionError):
                raise broken
        return exchange


class WsgiExchange:
    """One request through a WSGI app, step by step: `next()`, `close()`, or as a context manager that closes."""

    def __init__(
        self, server: WsgiServer, app: WSGIApplication, environ: WSGIEnvironment, journal: Journal | None
    ) -> None:
        self.server = server
        self.environ = environ
        self.input: Any = environ.get("wsgi.input")  # the server's own; the validator puts another one into the environ
        self.errors: Any = environ.get("wsgi.errors")  # the same; by default an io.StringIO
        self.journal = Journal() if journal is None else journal
        self.blocks: list[bytes] = []  # all that was yielded or written, empty ones too
        self.violations: list[Violation] = getattr(self.input, "violations", [])  # its own and those of wsgi.input
        self.body_length = 0
        self.error: BaseException | None = None  # raised by the call or the iteration
        self.close_error: BaseException | None = None
        self.started_in_call = False  # whether start_response was called before the app returned
        self.headers_sent = False
        self.complete = False  # whether the iteration came to its end
        self.closed = False
        self.thread = threading.get_ident()
        self.result: Any = None  # the very object that the app returned
        self._app = app
        self._iterable: Iterable[bytes] | None = None
        self._iterator: Iterator[bytes] = iter(())
        self._response: tuple[str, list[tuple[str, str]]] | None = None

    # What came of it.

    @property
    def status(self) -> str:
        return self._started[0]

    @property
    def status_code(self) -> int:
        return int(self.status[:3])

    @property
    def headers(self) -> list[tuple[str, str]]:
        return self._started[1]

    def header(self, name: str) -> str | None:
        """Return the first header of that name, in whatever case."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    @property
    def body(self) -> bytes:
        return b"".join(self.blocks)

    @property
    def started(self) -> bool:
        return self._response is not None

    @property
    def aborted(self) -> bool:
        """Whether an error came too late for a 500."""
        return self.error is not None and self.headers_sent

    @property
    def file(self) -> FileWrapper | None:
        """The app's result, where a server may send that file by itself."""
        return self.result if isinstance(self.result, FileWrapper) else None

    @property
    def _started(self) -> tuple[str, list[tuple[str, str]]]:
        if self._response is None:
            raise AssertionError(f"start_response was not called; the app's error: {self.error!r}") from self.error
        return self._response

    # The server's steps.

    def begin(self) -> None:
        def called(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
            self.result = self._app(environ, start_response)
            return self.result

        app = validator(called) if self.server.validate else called
        try:
            self._iterable = app(self.environ, self._start_response)  # type: ignore[arg-type]  # granian's returns no write()
            self.started_in_call = self.started
            self._iterator = iter(self._iterable)
        except BaseException as error:
            self.error = error
            raise

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        if self.closed:
            raise RuntimeError("the test iterates after close()")
        try:
            block = next(self._iterator)
            self._transmit(block)
        except StopIteration:
            self._end()
            raise
        except BaseException as error:
            self.error = error
            raise
        return block

    def close(self) -> None:
        """Close the app's iterable, once, whatever happened before."""
        if self.closed:
            return
        self.closed = True
        self.journal.note("close")
        try:
            close = getattr(self.result if self._iterable is None else self._iterable, "close", None)
            if close is not None:
                close()
        except BaseException as error:
            self.close_error = error
            raise
        if self.error is None and self.violations:
            raise self.violations[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        self.close()

    def violate(self, what: str) -> Violation:
        self.violations.append(Violation(what))
        self.journal.note("violation", what)
        return self.violations[-1]

    def _start_response(
        self,
        status: str,
        headers: list[tuple[str, str]],
        exc_info: tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None] | None = None,
        /,
    ) -> Callable[[bytes], object] | None:
        self.journal.note("start_response", status)
        if exc_info and self.headers_sent:
            assert exc_info[1] is not None
            raise exc_info[1].with_traceback(exc_info[2])
        if not exc_info and self.started:
            raise self.violate("start_response called a second time without exc_info")
        self._check_start(status, headers)
        self._response = status, list(headers)
        return partial(self._transmit, name="write") if self.server.write else None

    def _check_start(self, status: Any, headers: Any) -> None:
        if type(status) is not str or not re.fullmatch(r"[1-9][0-9]{2}( [^\0-\x1f\x7f]*)?", status):
            raise self.violate(f"expected a status such as '200 OK', got {status!r}")
        if type(headers) is not list or any(type(header) is not tuple or len(header) != 2 for header in headers):
            raise self.violate(f"expected a list of pairs, got {headers!r}")
        for text in (status, *(part for header in headers for part in header)):
            if type(text) is not str or any(char in "\r\n\0" or ord(char) > 255 for char in text):
                raise self.violate(f"expected latin-1 text without CR, LF and NUL, got {text!r}")
        for name, value in headers:
            if not name or not name.isascii() or any(char <= " " or char == ":" for char in name):
                raise self.violate(f"expected a header name, got {name!r}")
            if wsgiref.util.is_hop_by_hop(name):
                raise self.violate(f"hop-by-hop header {name!r}")
            if name.lower() == "content-length" and not value.isdecimal():
                raise self.violate(f"expected a decimal Content-Length, got {value!r}")

    def _transmit(self, block: Any, name: str = "block") -> None:
        if self.server.keep:
            self.journal.note(name, block)
        if type(block) is not bytes:
            raise self.violate(f"expected a block of bytes, got {block!r:.40}")
        if block and not self.started:
            raise self.violate("a block before start_response")
        if self.server.keep:
            self.blocks.append(block)
        self.body_length += len(block)
        self.headers_sent = self.headers_sent or bool(block)
        expected = self._content_length
        if expected is not None and self.body_length > expected:
            raise self.violate(f"{self.body_length} body bytes, Content-Length is {expected}")

    def _end(self) -> None:
        self.complete = True
        self.journal.note("end")
        if not self.started:
            self.error = self.violate("the app ended without start_response")
            raise self.error
        self.headers_sent = True
        bodiless = self.environ.get("REQUEST_METHOD") == "HEAD" or self.status_code in (204, 304)
        expected = self._content_length
        if expected is not None and self.body_length < expected and not bodiless:
            self.error = self.violate(f"{self.body_length} body bytes in all, Content-Length is {expected}")
            raise self.error

    @property
    def _content_length(self) -> int | None:
        length = self.header("content-length") if self.started else None
        return None if length is None else int(length)
