"""AsgiToWsgi: an ASGI app as a WSGI app, and one request's way through it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import types
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from asgiref.sync import SyncToAsync, ThreadSensitiveContext

from bridge.body import BodyReader
from bridge.errors import BadRequest, ClientDisconnected, LifespanFailure, ProtocolError, shown
from bridge.files import PathFile
from bridge.lifespan import Lifespan, Stage
from bridge.loops import LoopPool, Turn, TurnedLoop
from bridge.response import AsgiResponse, State
from bridge.scope import build_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import Self
    from wsgiref.types import StartResponse, WSGIEnvironment

    from asgiref.typing import ASGI3Application, ASGIReceiveEvent, ASGISendEvent

__all__ = ["AsgiToWsgi"]

WINDOW = 64 * 1024
"""Bytes of a response that may lie here while a loop that is run by another thread goes on."""

GRACE_SECONDS = 1.0
"""How long an app that has lost its client may go on before it is cancelled."""

SHUTDOWN_SECONDS = 30.0
"""How long an app's shutdown may take before it is given up: uvicorn's and gunicorn's grace."""

EXIT_SECONDS = 5.0
"""The same at the interpreter's exit, which servers wait for with less patience."""

logger = logging.getLogger("bridge")


class AsgiToWsgi:
    """An ASGI 3 app as a WSGI app, under any PEP 3333 server.

    Args:
        app: The ASGI app: ``app(scope, receive, send)``.
        loop: ``"shared"``: one event loop per process; what was made in one request works in the next. ``"request"``: one
            for each request; apps that block inside ``async def`` hold up no others. ``"auto"``: shared for an app that
            takes part in lifespan, else one for each request.
        loop_factory: Makes event loops, as ``uvloop.new_event_loop`` does.
        lifespan: ``"auto"``: an app that knows no lifespan is served all the same. ``"on"``: it must. ``"off"``: it is not
            asked.

    Raises:
        TypeError: The app is not callable.
        ValueError: ``loop`` or ``lifespan`` is none of these words.
    """

    def __init__(
        self,
        app: ASGI3Application,
        *,
        loop: Literal["auto", "shared", "request"] = "auto",
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
        lifespan: Literal["auto", "on", "off"] = "auto",
    ) -> None:
        if not callable(app):
            raise TypeError(f"AsgiToWsgi expected an ASGI app, a callable, got {shown(app)}")
        if loop not in ("auto", "shared", "request"):
            raise ValueError(f"loop expected 'auto', 'shared' or 'request', got {loop!r}")
        if lifespan not in ("auto", "on", "off"):
            raise ValueError(f"lifespan expected 'auto', 'on' or 'off', got {lifespan!r}")
        self.app = app
        self._life = _Life(app, loop, loop_factory, lifespan)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request (PEP 3333).

        Raises:
            LifespanFailure: The app refused to start.
            ProtocolError: The app broke the ASGI specification.
            BaseException: Whatever the app raised before its response began, as itself.
        """
        life = self._life
        if not life.started:
            life.start()
        return _Cycle(self, life, environ, start_response).begin()

    def startup(self) -> None:
        """Start the app now, and not at the first request.

        Raises:
            LifespanFailure: The app refused to start.
        """
        self._life.start()

    def close(self) -> None:
        """Shut the app down, and give its loops and threads back. Twice is once; a later request starts it anew."""
        self._life.stop()

    def __enter__(self) -> Self:
        self.startup()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        life = getattr(self, "_life", None)
        if life is None or not life.started:
            return
        if asyncio._get_running_loop() is None:
            life.stop()
        else:  # perhaps within our own loop, which could not be closed before we return
            with contextlib.suppress(RuntimeError):  # can't start new thread at interpreter shutdown
                threading.Thread(target=life.stop, name="bridge-closer", daemon=True).start()


class _Life:
    """What an app has in this process: its lifespan and its loops.

    `_mutex` is held during startup and shutdown: threads that race for the first request wait for the one that starts.

    Attributes:
        started: Whether requests can be served.
        shared: The process's loop for this app; None if each request has its own.
        pool: The loops for one request each.
        state: What the app left at startup, None without a lifespan.
    """

    def __init__(
        self, app: Any, loop: str, loop_factory: Callable[[], asyncio.AbstractEventLoop], lifespan: str
    ) -> None:
        self.app = app
        self.loop_factory = loop_factory
        self._loop_wish = loop
        self._lifespan_wish = lifespan
        self.reset()
        _every.add(self)

    def reset(self) -> None:
        """Begin anew: at first, and in a child after a fork."""
        self.started = False
        self.shared: TurnedLoop | None = None
        self.pool = LoopPool(self.loop_factory)
        self.state: dict[str, Any] | None = None
        self._home: TurnedLoop | None = None  # where the lifespan's task lives
        self._lifespan: Lifespan | None = None
        self._lifespan_task: asyncio.Task[None] | None = None  # loops hold their tasks weakly
        self._turn = Turn()
        self._mutex = threading.Lock()

    def start(self) -> None:
        with self._mutex:
            if self.started:
                return
            _register_exit()
            if self._lifespan_wish != "off":
                self._start_lifespan()
            if self._loop_wish == "shared" or (self._loop_wish == "auto" and self._home is not None):
                self.shared = self._home or TurnedLoop(self.loop_factory, needs_keeper=True)
            self.started = True

    def _start_lifespan(self) -> None:
        home = TurnedLoop(self.loop_factory, needs_keeper=True)
        turn = self._turn
        lifespan = Lifespan(self.app, lambda: home.tell(turn))

        def begin() -> None:
            self._lifespan_task = home.native.create_task(lifespan.run())

        try:
            turn.told = False
            home.wait(turn, begin)
        except BaseException:
            home.close()
            raise
        if lifespan.stage is Stage.STARTED:
            self._home, self._lifespan, self.state = home, lifespan, lifespan.state
            return
        home.close()
        if lifespan.stage is Stage.FAILED:
            raise LifespanFailure(f"the app refused to start: {lifespan.message}") from lifespan.error
        if self._lifespan_wish == "on":
            raise LifespanFailure("the app knows no lifespan, and lifespan='on' asks for one") from lifespan.error

    def stop(self, timeout: float = SHUTDOWN_SECONDS) -> None:
        running = asyncio._get_running_loop()
        with self._mutex:
            if not self.started:
                return
            if running is not None and self._home is not None and self._home.native is running:
                raise RuntimeError("close() was called in the app's own event loop, which it has to wait for")
            self.started = False
            try:
                if self._home is not None and self._lifespan is not None:
                    self._stop_lifespan(self._home, self._lifespan, timeout)
            finally:
                for loop in {self.shared, self._home} - {None}:
                    loop.close()
                self.pool.close()
                self.shared = self._home = self._lifespan = self._lifespan_task = None

    def _stop_lifespan(self, home: TurnedLoop, lifespan: Lifespan, timeout: float) -> None:
        turn = self._turn

        def begin() -> None:
            lifespan.stop()
            home.native.call_later(timeout, give_up)

        def give_up() -> None:
            if lifespan.stage is Stage.STOPPING:
                lifespan.stage, lifespan.message = Stage.STOPPED, f"it took longer than {timeout} s"
                home.tell(turn)

        callback: Callable[[], None] | None = begin
        while lifespan.stage is not Stage.STOPPED:
            turn.told = False
            home.wait(turn, callback)
            callback = None
        if lifespan.message:
            logger.error("the app refused to stop: %s", lifespan.message)
        elif lifespan.error is not None:
            logger.error("the app failed when it was to stop", exc_info=lifespan.error)


_every: weakref.WeakSet[_Life] = weakref.WeakSet()
_exit_registered = False


def _register_exit() -> None:
    """Shut down at the interpreter's exit, while the app can still use worker threads.

    concurrent.futures stops its threads before `atexit` handlers run, so theirs is the place: what is registered later
    runs earlier. `asgiref.sync`, imported above, has brought concurrent.futures in.
    """
    global _exit_registered
    if not _exit_registered:
        _exit_registered = True
        register = getattr(threading, "_register_atexit", atexit.register)
        with contextlib.suppress(RuntimeError):  # the interpreter is on its way out already
            register(_at_exit)


def _at_exit() -> None:
    for life in list(_every):
        try:
            life.stop(EXIT_SECONDS)
        except Exception:
            logger.exception("a shutdown at the interpreter's exit failed")


def _after_fork() -> None:
    for life in list(_every):
        life.reset()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


# -- Theory -----------------------------------------------------------------------------------------------------------
#
# One request has two parties: the app's task in the loop, and the server's thread. The thread waits by its Turn, and
# runs the loop meanwhile if nobody else does. The task tells the Turn when there is something for the thread: a block, a
# wish to read, the end. The thread then comes out of the loop, hands it on, and serves: start_response, the block to the
# server, a read() of wsgi.input. All of these may block, and hold up nobody.
#
# What is for the thread lies in `_blocks`, `_wants_chunk` and `_ended`; only the task's side sets them, and tells after.
# The thread takes `told` back before it looks at them, so that whatever it misses is told again.
#
# A block must have reached the server before the app can go on to block (A7). If the thread itself runs the loop, it has
# to come out first: send() waits until the thread comes back for more. If another thread runs the loop, ours is awake
# and on its way, so send() waits only when the window is full.
#
# The end: when the server has the last block, it calls close(). The app may be at work still. On a loop of its own it is
# waited for, on a shared loop it goes on alone. If the response is not complete, the client has left: the app hears
# http.disconnect, and is cancelled after GRACE_SECONDS.


class _Cycle:
    """One HTTP request through an ASGI app; the iterable that the server gets."""

    def __init__(
        self, owner: AsgiToWsgi, life: _Life, environ: WSGIEnvironment, start_response: StartResponse
    ) -> None:
        self._owner = owner  # a wrapper that is dropped closes its loop: not before its requests have ended
        self._life = life
        self._environ = environ
        self._start_response = start_response
        self._loop = life.shared or life.pool.take()
        self._turn = Turn()
        self._closed = False
        # The task's, read by the thread
        self._blocks: deque[bytes] = deque()
        self._size = 0  # of the blocks
        self._wants_chunk = False
        self._hints: deque[list[tuple[str, str]]] = deque()
        self._ended = False
        self._error: BaseException | None = None
        # The task's alone
        self._task: asyncio.Task[None] | None = None
        self._messages: deque[ASGIReceiveEvent] = deque()  # read, and not yet received
        self._body_received = False
        self._gone = False  # the client, or the server's wish for an answer
        self._receivers: list[asyncio.Future[None]] = []  # woken when there is something to receive
        self._senders: list[asyncio.Future[None]] = []  # woken when the window has room

    # -- The server's thread ------------------------------------------------------------------------------------------

    def begin(self) -> Iterable[bytes]:
        """Run the app until its response begins."""
        try:
            self._reader = BodyReader(self._environ)
        except BadRequest as error:
            return self._refuse(error)
        scope: dict[str, Any] = build_scope(self._environ)  # type: ignore[assignment]
        if self._life.state is not None:
            scope["state"] = self._life.state.copy()
        extensions = scope["extensions"]
        if "wsgi.file_wrapper" in self._environ:
            extensions["http.response.pathsend"] = {}
        if "wsgi.early_hints" in self._environ:
            extensions["http.response.early_hint"] = {}
        self._response = AsgiResponse(scope["method"], extensions)
        self._loop.needs_keeper = True
        try:
            self._wait(partial(self._create_task, scope))
            response = self._response
            if response.state in (State.NOTHING, State.STARTED):
                # No block, and nothing more to come: the app has ended too early.
                self._raise_error()
                raise ProtocolError(f"the app ended without a response: it is {response.state.name} of it")
            self._start_response(response.status, response.headers)
        except BaseException:
            self.close()
            raise
        if response.path is not None:
            return self._environ["wsgi.file_wrapper"](PathFile(response.path, self.close))  # type: ignore[no-any-return]
        return self

    def _refuse(self, error: BadRequest) -> Iterable[bytes]:
        self._release_loop()
        text = f"Bad Request: {error}\n".encode("utf-8", "replace")
        headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text)))]
        self._start_response("400 Bad Request", headers)
        return [text]

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while not self._blocks:
            if self._response.state is State.COMPLETE or self._closed:
                raise StopIteration
            if self._ended:
                self._raise_error()
                raise ProtocolError("the app ended before it had sent its whole body")
            self._wait(self._wake_senders if self._senders else None)
        block = self._blocks.popleft()
        self._size -= len(block)
        return block

    def _wait(self, callback: Callable[[], object] | None) -> None:
        """Wait for a block, or the end; meanwhile read the request's body as the app wishes."""
        turn = self._turn
        turn.told = False
        # What was told before that line is here already.
        while not (self._blocks or self._ended or self._response.state is State.COMPLETE):
            if self._hints:
                self._environ["wsgi.early_hints"](self._hints.popleft())
            elif self._wants_chunk:
                self._wants_chunk = False
                callback = partial(self._deliver, self._reader.next_message())
            else:
                self._loop.wait(turn, callback)
                turn.told = False
                callback = None
        if callback is not None:
            self._loop.post(callback)

    def close(self) -> None:
        """End the request (PEP 3333: the server calls it once, whether the response is whole or not)."""
        if self._closed:
            return
        self._closed = True
        self._blocks.clear()
        whole = self._response.state is State.COMPLETE
        if self._loop is not self._life.shared:
            self._end_request_loop(None if whole else self._hang_up)
        elif not self._ended and not whole:
            self._loop.post(self._hang_up)
        if self._ended and whole:
            self._raise_error()

    def _end_request_loop(self, callback: Callable[[], object] | None) -> None:
        """Run the app to its end, then give its loop back."""
        turn = self._turn
        while not self._ended:
            turn.told = False
            self._loop.wait(turn, callback)
            callback = None
            if self._wants_chunk:
                self._wants_chunk = False
                callback = self._hang_up  # nobody reads any more
        self._release_loop()

    def _release_loop(self) -> None:
        if self._loop is not self._life.shared:
            self._life.pool.give_back(self._loop)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is None:
            return
        try:
            if isinstance(error, (asyncio.CancelledError, StopIteration, GeneratorExit)):
                # Out of an iterator they would say something else.
                raise ProtocolError(f"the app raised {shown(error)}") from error
            raise error
        finally:
            del error  # a frame that holds its own traceback is a cycle

    # -- In the loop --------------------------------------------------------------------------------------------------

    def _create_task(self, scope: dict[str, Any]) -> None:
        self._task = self._loop.native.create_task(self._run_app(scope))

    async def _run_app(self, scope: dict[str, Any]) -> None:
        # Each request's sync_to_async code has a thread of its own (A17). To set it is enough: the task's context ends
        # with the task, and asgiref drops the thread with it.
        SyncToAsync.thread_sensitive_context.set(ThreadSensitiveContext())
        error = None
        try:
            await self._life.app(scope, self._receive, self._send)
        except BaseException as raised:
            error = raised
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        if error is not None and self._closed:  # the thread has gone, so nobody else would tell
            if not self._gone:
                logger.error("the app failed after its response", exc_info=error)
            elif not _tells_of_leaving(error):
                logger.error("the app failed after its client had left", exc_info=error)
            error = None
        self._error = error
        self._ended = True
        self._wake_receivers()
        self._loop.tell(self._turn)

    async def _receive(self) -> ASGIReceiveEvent:
        while not self._messages:
            if self._gone or self._response.state is State.COMPLETE:
                return {"type": "http.disconnect"}
            if not self._body_received and not self._wants_chunk and not self._receivers:
                self._wants_chunk = True
                self._loop.tell(self._turn)
            receiver = self._loop.native.create_future()
            self._receivers.append(receiver)
            try:
                await receiver
            finally:
                if receiver in self._receivers:
                    self._receivers.remove(receiver)
        return self._messages.popleft()

    def _deliver(self, message: ASGIReceiveEvent) -> None:
        if message["type"] == "http.disconnect":
            self._gone = True
        else:
            self._messages.append(message)
            self._body_received = not message["more_body"]  # type: ignore[typeddict-item]
        self._wake_receivers()

    async def _send(self, message: ASGISendEvent) -> None:
        if self._gone:
            raise ClientDisconnected("the client left before the whole response was sent")
        if message.get("type") == "http.response.early_hint":
            self._hint(message)
            return
        block = self._response.send(message)
        if block:
            self._blocks.append(block)
            self._size += len(block)
        state = self._response.state
        if state is State.COMPLETE:
            self._wake_receivers()
        elif not block:
            return
        self._loop.tell(self._turn)
        await self._let_thread_take()

    async def _let_thread_take(self) -> None:
        """Go on when the server's thread is on its way with the block, and the window has room for another."""
        while self._turn.told and self._loop.is_led_by(self._turn):
            await _yield_once()  # the loop was told to stop: once on asyncio, twice on uvloop
        while self._size > WINDOW and not self._gone:
            sender = self._loop.native.create_future()
            self._senders.append(sender)
            try:
                await sender
            finally:
                if sender in self._senders:
                    self._senders.remove(sender)

    def _wake_senders(self) -> None:
        self._senders = _wake(self._senders)

    def _wake_receivers(self) -> None:
        self._receivers = _wake(self._receivers)

    def _hint(self, message: Mapping[str, Any]) -> None:
        if "wsgi.early_hints" not in self._environ:
            raise ProtocolError("send() got 'http.response.early_hint', which was not offered to the app")
        self._hints.append([("Link", link.decode("latin-1")) for link in message["links"]])
        self._loop.tell(self._turn)

    def _hang_up(self) -> None:
        """The client has left: the app hears of it, and may clean up for a while."""
        self._gone = True
        self._wake_receivers()
        self._wake_senders()
        if self._task is not None and not self._task.done():
            self._loop.native.call_later(GRACE_SECONDS, self._task.cancel)


@types.coroutine
def _yield_once() -> Iterator[None]:
    """Come back at the loop's next turn."""
    yield


def _tells_of_leaving(error: BaseException | None) -> bool:
    """Whether an app's error only says that its client has left, or that it was cancelled for that.

    Starlette raises a ClientDisconnect of its own out of ours.
    """
    while error is not None:
        if isinstance(error, (ClientDisconnected, asyncio.CancelledError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _wake(futures: list[asyncio.Future[None]]) -> list[asyncio.Future[None]]:
    """End the wait of each, and give back the new list of those who wait."""
    for future in futures:
        if not future.done():
            future.set_result(None)
    return []
