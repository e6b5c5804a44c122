"""WsgiToAsgi: a WSGI app as an ASGI app, and one request's way through it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import logging
import os
import sys
import tempfile
import threading
import types
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import asgiref.local
from asgiref.sync import SyncToAsync

from bridge.body import WsgiInput
from bridge.channel import Closed, StepsToLoop, StepsToThread, ToLoop, ToThread, current_door
from bridge.environ import build_environ
from bridge.errors import BadRequest, ClientDisconnected, ProtocolError, UnsupportedScope, shown, shown_requests
from bridge.files import FileWrapper, sendable_path
from bridge.headers import encode_headers
from bridge.kinds import Kind, check_app
from bridge.lifespan import answer_lifespan
from bridge.loops import LentLoop, ServedLoop, has_ended
from bridge.nesting import LOOP, WholeAnswer, borrow_thread
from bridge.response import BODY, COMPLETE, NOTHING, STARTED, WsgiResponse
from bridge.threads import who
from bridge.workers import Workers

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        Awaitable,
        Callable,
        Coroutine,
        Iterable,
        Iterator,
        Mapping,
        MutableMapping,
    )
    from contextlib import AbstractAsyncContextManager
    from typing import IO, BinaryIO, TypeAlias
    from wsgiref.types import WSGIApplication

    from anyio.abc import TaskGroup
    from asgiref.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope

    from bridge.channel import SideTask
    from bridge.nesting import LentThread
    from bridge.workers import Place

    _Item: TypeAlias = "_Word | tuple[tuple[ASGISendEvent, ...], int]"
    # What asgiref.typing and Starlette have in common: each takes the other's apps for wrong.
    Receive: TypeAlias = Callable[[], Awaitable[Any]]
    Send: TypeAlias = Callable[[Any], Awaitable[None]]
    _Guest: TypeAlias = tuple[object, Callable[[], Coroutine[Any, Any, None]]]  # its loop, and what stops it
    LifespanFactory = Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]]

__all__ = ["WsgiToAsgi", "WsgiToAsgiStatistics"]

WINDOW = 256 * 1024
"""Bytes of a response that may be under way: a slow client's share of memory, and a fast one's batch."""

INPUT_WINDOW = 256 * 1024
"""Bytes of a request's body that may lie here before the app reads them."""

AHEAD = 64 * 1024
"""A body of so many bytes is asked for at once: it mostly is there already, and no read has to wake the loop for it."""

ITEM_SIZE = 512
"""Bytes that a block takes beside its own: one that comes a byte at a time shall fill the window, too."""

BROUGHT = 1024 * 1024
"""Bytes of a body that are kept in memory, and not in a file, where it has to be brought before the app asks for it."""

RECEIVER_SECONDS = 0.1
"""How long a request's end waits for a receive() that it has cancelled. A server's ends at the loop's next turn;
middleware may refuse to."""

SHUTDOWN_SECONDS = 30.0
"""How long a shutdown waits for the requests in flight, before it leaves them: uvicorn's and gunicorn's grace."""

NOTICE_SECONDS = 2.0
"""After that a shutdown says what it waits for: before the patience ends of whoever waits for the shutdown."""

STREAM_SECONDS = 1.0
"""After its first second, a response that streams gives its place among the threads back."""

CROWDED_SECONDS = 0.05
"""After these it does so where others wait for a place: of four threads, forty streams that come at once are out of the
way in half a second. Most responses of a few blocks are over by then, and stay within the number of threads."""

# How what asgiref's Locals keep in a context is moved to this thread, and what it is. Neither is there before asgiref
# 3.12, nor needed: a Local was seen wherever its context was.
_move_here: Any = getattr(asgiref.local, "_rehome", None)
_LocalStorage: Any = _move_here and getattr(asgiref.local, "_Storage", None)

# Where anyio.run says what runs in its thread: anyio uses sniffio if it is there.
_running_library: Any = getattr(sys.modules.get("sniffio"), "current_async_library_cvar", None)

SETTLE_TURNS = 60
"""Turns of the loop that middleware may take to hand a block on, before its app is asked for the next. Each
BaseHTTPMiddleware takes three. Where the loop lets it be seen, it ends as soon as there is nothing to be run."""

logger: logging.Logger = logging.getLogger("bridge")


@dataclass(frozen=True, slots=True)
class WsgiToAsgiStatistics:
    """What a `WsgiToAsgi` is doing at this moment, in this process.

    Attributes:
        threads: Worker threads there are, idle ones too.
        running: Requests in the app that count against ``threads=``.
        streaming: Requests in the app beside those: they have streamed for a while, and count against ``streams=``.
        waiting: Requests that wait for a thread. If it stays above 0, ``threads=`` is too small, or the app too slow.
    """

    threads: int
    running: int
    streaming: int
    waiting: int


class WsgiToAsgi:
    """A WSGI app as an ASGI 3 app, on asyncio, uvloop and trio.

    Args:
        app: The WSGI app: ``app(environ, start_response)`` (PEP 3333).
        threads: How many requests are in the app at once. More wait, in order.
        streams: How many more may be streaming a response for longer than a second; a moment, where others wait.
        lifespan: ``lifespan(self)`` gives an async context manager, which is entered at startup and left at shutdown.
            The mapping that it yields, if any, is the app's in ``environ["asgi.scope"]["state"]``.

    Raises:
        TypeError: It is no WSGI app for sure: an ASGI app, a class, a module, a string... Or an option's type is wrong.
        ValueError: ``threads`` is less than 1, or ``streams`` less than 0.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        threads: int = 40,
        streams: int = 1000,
        lifespan: LifespanFactory | None = None,
    ) -> None:
        check_app(app, Kind.WSGI)
        for name, count, least in ("threads", threads, 1), ("streams", streams, 0):
            if not isinstance(count, int):
                raise TypeError(f"{name} expected a whole number, got {shown(count)}")
            if count < least:
                raise ValueError(f"{name} expected {least} or more, got {count}")
        if lifespan is not None and not callable(lifespan):
            raise TypeError(f"lifespan expected a function that gives an async context manager, got {shown(lifespan)}")
        self.app = app
        self._workers = Workers(threads, streams)
        self._lifespan = lifespan
        self._state: Mapping[str, Any] | None = None  # where the server carries none
        self._guests: list[_Guest] = []

    async def __call__(self, scope: Scope | MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one scope of a server.

        Raises:
            UnsupportedScope: Its type is none of http, websocket and lifespan.
            ProtocolError: The app broke PEP 3333.
            BaseException: Whatever the app raised, as itself.
        """
        kind = scope["type"]
        if kind == "http":
            if self._state is not None and "state" not in scope:
                scope["state"] = dict(self._state)
            thread = borrow_thread(scope)
            if thread is None:
                await _Cycle(self, scope, receive, send).run()
            else:
                await _LentCycle(self, scope, receive, send, thread).run()
        elif kind == "lifespan":
            await answer_lifespan(self._live(), cast("dict[str, Any]", scope), receive, send)
        elif kind == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000, "reason": "no WebSockets here"})
        else:
            raise UnsupportedScope(
                f"WsgiToAsgi expected a scope of type 'http', 'websocket' or 'lifespan', got {shown(kind)}"
            )

    @contextlib.asynccontextmanager
    async def _live(self) -> AsyncGenerator[Mapping[str, Any] | None]:
        async with contextlib.AsyncExitStack() as stack:
            state = await stack.enter_async_context(self._lifespan(self)) if self._lifespan else None
            stack.push_async_callback(self._stop_guests)
            # Left first: the requests in flight still have what the lifespan made.
            stack.push_async_callback(self._stop_workers)
            self._state = state
            try:
                yield state
            finally:
                self._state = None

    async def _stop_workers(self) -> None:
        await anyio.to_thread.run_sync(self.close, abandon_on_cancel=True)

    def _in_app(self) -> str:
        cycles = [job.__self__ for job in self._workers.jobs if isinstance(job, types.MethodType)]
        return shown_requests([cycle.name for cycle in cycles if isinstance(cycle, _Cycle)])

    def statistics(self) -> WsgiToAsgiStatistics:
        """What is going on, for metrics; from any thread, at the cost of reading a few numbers."""
        workers = self._workers
        return WsgiToAsgiStatistics(workers.alive, workers.running, workers.streaming, workers.waiting)

    async def _stop_guests(self) -> None:
        """Have those shut down that have started on this loop at a request of ours."""
        here = current_door().native
        mine = [guest for guest in self._guests if guest[0] is here]
        self._drop_guests(mine)
        for _, stop in mine:
            await stop()

    def _drop_guests(self, guests: Iterable[_Guest]) -> None:
        """Take them off the list, one by one: other threads may do so, or add to it."""
        for guest in guests:
            with contextlib.suppress(ValueError):
                self._guests.remove(guest)

    def close(self) -> None:
        """Stop the threads; a later request starts new ones.

        Requests in flight are waited for, for a bounded time. What is left after it is told to the log.
        """
        patience = min(NOTICE_SECONDS, SHUTDOWN_SECONDS)
        if self._workers.stop(patience):
            return
        if patience < SHUTDOWN_SECONDS:
            logger.warning("the shutdown waits for %s", self._in_app())
            if self._workers.stop(SHUTDOWN_SECONDS - patience):
                return
        logger.error("the shutdown leaves alone what has not ended in %.3g s: %s", SHUTDOWN_SECONDS, self._in_app())


class _Word(enum.Enum):
    """What a cycle's host is told, beside the messages to be sent."""

    READ = enum.auto()
    """The app waits for the next chunk of the request's body."""
    READ_ASIDE = enum.auto()
    """Another thread of the app does, so that the worker may have more to say meanwhile."""
    SLOW = enum.auto()
    """The request takes long enough to watch for its client's leaving."""
    DONE = enum.auto()
    """The app has ended, and its iterable is closed; or it will never be called."""


# Read by name, and not by way of the enum, in what runs for every request.
READ: Final = _Word.READ
READ_ASIDE: Final = _Word.READ_ASIDE
SLOW: Final = _Word.SLOW
DONE: Final = _Word.DONE


class _LoopForAsgiref:
    """The server's loop as asgiref's async_to_sync finds it.

    Args:
        loop: The loop.
        prepare: Called in the worker's thread before anything is handed to the loop.
    """

    def __init__(self, loop: Any, prepare: Callable[[], None]) -> None:
        self._loop = loop
        self._prepare = prepare

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        self._prepare()
        self._loop.call_soon_threadsafe(callback, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


# -- Theory -----------------------------------------------------------------------------------------------------------
#
# One request has two parties. The host is the task that the server has made: it alone calls send(). The worker is a
# thread, in which the app is called, iterated and closed. Between them lie two channels: the outlet brings messages and
# Words to the host, the inlet brings the body's chunks to the worker.
#
# A short request is served by the host alone: it sends what the worker gave. When the worker waits for input, and for a
# small body ahead of that, a receiver calls receive() once: a task, which nothing interrupts before the request is
# over, since a server may lose what a cancelled receive() was about to give. Only receive() tells that a client has
# left, though. So a request that streams, that is not done within PATIENCE, or of which the body comes in pieces, gets
# a watch: a task that takes over when the receiver, if there is one, has ended, and alone calls receive() from then on.
# It brings the body ahead of the reads as far as the inlet's window goes, and hears http.disconnect behind it. While
# the window is full it is deaf: a body that nobody reads may neither take more memory than that nor be thrown away, and
# ASGI tells of a disconnect behind the body alone. (Nor does a server know: it stops reading the socket, too.) The
# app's next reads make room, and so it is heard then.
#
# The end: the worker puts DONE, when the iterable is closed. If the client left, hang_up() closes both channels, so
# that whatever the worker waits for or does next raises, and the host waits on for DONE. If the host is cancelled, it
# hangs up and goes at once; the worker then ends by itself.
#
# `_claim` is locked by the one who decides whether the app is called: the worker, when its turn comes, or the host,
# when the client has left before.


class _Cycle:
    """One HTTP request through a WSGI app."""

    # Thousands may wait: with a dict each of them would hold five times as much.
    __slots__ = tuple(
        "_app_context _app_error _body_begun _body_complete _body_read _brought _caller_context "
        "_claim _deaf _door _environ _expected _gone _inlet _items _last_item _outlet _owner _place _receive "
        "_receiver _response _scope _send _server_error _streams _wanted _worker _writing".split()
    )

    def __init__(
        self,
        owner: WsgiToAsgi,
        scope: MutableMapping[str, Any] | Scope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
    ) -> None:
        self._owner = owner
        self._scope = cast("dict[str, Any]", scope)
        self._receive = receive
        self._send = send
        self._door = door = current_door()
        self._outlet: ToLoop[_Item] = ToLoop(door, WINDOW)
        self._inlet: ToThread[bytes] = ToThread(door, INPUT_WINDOW)
        self._claim = threading.Lock()
        self._writing = threading.Lock()  # held from a write()'s place in the order of all until it has been put
        self._caller_context = contextvars.copy_context()
        self._app_context = self._caller_context.copy()
        self._gone = False  # the client, or the server's wish for an answer
        # The host's
        self._items: list[_Item] | None = None  # got, and not yet served
        self._expected: int | None = None  # the body's bytes that have yet to come; None if nobody knows
        self._body_begun = False
        self._body_complete = False
        self._deaf = False  # receive() tells no more: middleware that has read the body gives it again and again
        self._streams = False  # the response comes in more than one block
        self._receiver: SideTask | None = None  # calls receive(), once, where there is no watch yet
        self._wanted: anyio.Event | None = None  # set once receive() may bring the body, if the client waits for a word
        self._server_error: BaseException | None = None  # out of send() or receive()
        # The worker's
        self._environ: dict[str, Any] = {}
        self._response = WsgiResponse(self._scope["method"])
        self._place: Place | None = None
        self._worker = 0  # its thread
        self._body_read = False  # to its end
        self._brought: IO[bytes] | None = None  # the body, where it was brought before the app asked for it
        self._last_item: _Item | None = None  # to be put together with DONE
        self._app_error: BaseException | None = None

    @property
    def name(self) -> str:
        """What the request is called in a log."""
        return f"{self._scope['method']} {self._scope['path']}"

    # -- The host: in the loop --------------------------------------------------------------------------------------

    async def run(self) -> None:
        try:
            self._environ = self._build_environ()
        except BadRequest as error:
            await self._refuse(error)
            return
        self._door.alarm(self, self._on_slow)
        try:
            self._items = await self._outlet.get(self._begin_work)
            if not await self._relay(None):
                await self._relay_watched()
        except BaseException:
            self._hang_up()
            self._outlet.close()  # also if a whole response lies in it: nobody is left to say that it was sent
            raise
        finally:
            self._door.disarm(self)
            self._inlet.close()  # a thread of the app may still be reading
            receiver, self._receiver = self._receiver, None
            if receiver is not None:
                receiver.cancel()
                if not isinstance(sys.exception(), GeneratorExit):  # behind which nothing can be waited for
                    with anyio.move_on_after(RECEIVER_SECONDS, shield=True):
                        await self._door.join(receiver)
        self._hand_context_back()
        self._raise_error()

    def _build_environ(self) -> dict[str, Any]:
        stream = WsgiInput(self._next_chunk)
        environ = build_environ(self._scope, cast("BinaryIO", stream))
        environ["asgi.event_loop_token"] = self._door.token
        environ["waitress.client_disconnected"] = self._is_gone
        environ[LOOP] = self._lend_loop
        environ.setdefault("wsgi.file_wrapper", FileWrapper)
        extensions = self._scope.get("extensions")
        if extensions and "http.response.early_hint" in extensions:
            environ["wsgi.early_hints"] = self._send_early_hints
        if extensions and "http.response.trailers" in extensions:
            environ["wsgi.ext.http.send_trailers"] = self._response.add_trailers
        length = environ.get("CONTENT_LENGTH")
        self._expected = int(length) if length else None
        if environ.get("HTTP_EXPECT", "").lower() == "100-continue":
            self._wanted = anyio.Event()
        return environ

    def _begin_work(self) -> None:
        if not self._receive_ahead():
            self._owner._workers.submit(self._work)

    def _lend_loop(self) -> LentLoop:
        """The server's loop, for an AsgiToWsgi inside."""
        return LentLoop(self._door.native, self._door.runs_here, self._ring, self._add_guest)

    def _ring(self, callback: Callable[[], None]) -> None:
        try:
            self._door.ring(callback)
        except Closed as error:
            raise RuntimeError("the event loop of the server has ended") from error

    def _add_guest(self, stop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        owner = self._owner
        owner._drop_guests([guest for guest in owner._guests if has_ended(guest[0])])
        owner._guests.append((self._door.native, stop))

    async def _refuse(self, error: BadRequest) -> None:
        text = f"Bad Request: {error}\n".encode("utf-8", "replace")
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(text))]
        await self._send({"type": "http.response.start", "status": 400, "headers": headers, "trailers": False})
        await self._send({"type": "http.response.body", "body": text, "more_body": False})

    async def _relay(self, group: TaskGroup | None) -> bool:
        """Serve the worker until it is done.

        Args:
            group: The task group of the watch, None if there is no watch yet.

        Returns:
            False where a watch is needed before anything else is done.
        """
        while True:
            if not self._items:
                self._items = await self._outlet.get()
            if group is None and self._needs_watch(self._items):
                return False
            while self._items:
                item = self._items.pop(0)
                if item is DONE:
                    return True
                if item is READ or item is READ_ASIDE:
                    if self._wanted is not None:
                        self._wanted.set()
                    if group is None and item is READ:
                        await self._receive_for_worker()
                elif item is not SLOW:
                    messages, size = item
                    if group is not None and not self._streams and _streams(messages):
                        self._streams = True
                        group.start_soon(self._give_place_back)
                    await self._send_messages(messages)
                    self._outlet.sent(size)
            if group is not None:
                # A send() that never waits, for a client that is fast or has left, must not keep the loop from others.
                await anyio.lowlevel.checkpoint()

    def _receive_ahead(self) -> bool:
        """Call receive() at once for a body that is small, and not held back until the app asks for it.

        In a task of its own, since the app may answer while a slow client still sends. asyncio's costs a fifth of what
        it spares; a nursery of trio's would cost more. The app begins right behind it in the loop's queue: what is at
        hand is there before the first read, then.

        Returns:
            False if it is not called, and the app has yet to begin.
        """
        loop = self._door.native
        if not (self._expected and self._expected <= AHEAD and self._wanted is None):
            return False
        if not isinstance(loop, asyncio.AbstractEventLoop):
            return False
        self._start_receiver()
        loop.call_soon(self._owner._workers.submit, self._work)
        return True

    async def _receive_for_worker(self) -> None:
        """Have receive() called, since the worker waits for it."""
        if not (self._receiver or self._body_complete or self._gone):  # it may have come while the worker asked
            self._start_receiver()

    def _start_receiver(self) -> None:
        self._receiver = self._door.start(self._receive_aside)

    async def _receive_aside(self) -> None:
        """Call receive() in a task that nothing but the request's end interrupts.

        What a receive() was about to give when it is cancelled is lost on some servers (granian), for all that asyncio
        and trio advise. And the host has to be free for what the app says meanwhile: the client may send no more before
        it has heard that.
        """
        try:
            await self._receive_chunk()
        except BaseException:
            if self._receiver is not None:
                self._refuse_cancellation()
        self._receiver = None

    def _refuse_cancellation(self) -> None:
        self._server_error = ProtocolError("receive() raised a cancellation, and the request was not cancelled")
        self._hang_up()

    def _needs_watch(self, items: list[_Item]) -> bool:
        if DONE in items or self._gone:
            return False  # nothing is left to be stopped
        for item in items:
            if item is SLOW or item is READ_ASIDE:
                return True
            if item is READ:
                # In pieces, or big enough to be sent in pieces: then it is brought ahead of the reads. hypercorn ends
                # every body by an empty message, which is no piece.
                return self._expected != 0 if self._body_begun else (self._expected or 0) > INPUT_WINDOW
            if item is not DONE and _streams(item[0]):
                return True
        return False

    async def _relay_watched(self) -> None:
        done = False
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch)
                done = await self._relay(group)
                group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # out of send(), and no Exception: KeyboardInterrupt, say
        if not done:
            # A CancelledError out of receive() that nobody sent: the group takes it for the end of all.
            self._refuse_cancellation()
            await self._relay(None)

    async def _watch(self) -> None:
        """Bring the body, then wait for the client to leave. Alone calls receive() while it lives."""
        if self._wanted is not None:
            await self._wanted.wait()
        if self._receiver is not None:
            await self._door.join(self._receiver)
        while not self._gone and not self._deaf:
            if not self._body_complete:
                await self._inlet.room()
            await self._receive_chunk()

    async def _receive_chunk(self) -> None:
        """Call receive() until it tells something: middleware that unpacks a body may give it an empty piece first."""
        try:
            told = False
            while not told:
                message: Any = await self._receive()
                kind = message["type"]
                if kind == "http.disconnect":
                    self._hang_up()
                    return
                if kind != "http.request":
                    raise ProtocolError(f"receive() expected 'http.request' or 'http.disconnect', got {shown(kind)}")
                if self._body_complete:
                    self._deaf = True
                    return
                told = self._take_chunk(message.get("body", b""), message.get("more_body", False))
        except BaseException as error:
            if isinstance(error, (anyio.get_cancelled_exc_class(), GeneratorExit)):
                raise
            # Whatever else it is, the host raises it: SystemExit out of the watch's task would end the whole loop.
            self._server_error = error
            self._hang_up()

    def _take_chunk(self, chunk: bytes, more_body: bool) -> bool:
        self._body_begun = True
        if self._expected is not None:
            self._expected = max(self._expected - len(chunk), 0)
        if chunk:
            self._inlet.put(chunk, len(chunk) + ITEM_SIZE)
        if not more_body:
            self._body_complete = True
            if self._expected:
                self._inlet.close()  # the rest will never come: the read that wants it must not take this for the end
            else:
                self._inlet.put(b"")
        return bool(chunk) or not more_body

    async def _send_messages(self, messages: Iterable[ASGISendEvent]) -> None:
        try:
            for message in messages:
                if self._gone:
                    return
                await self._send(message)
                kind: str = message["type"]
                if self._wanted is not None and kind != "http.response.early_hint":
                    self._wanted.set()  # the answer has begun, and no word will be sent before it any more
        except OSError:
            self._hang_up()
        except Exception as error:
            self._server_error = error
            self._hang_up()

    async def _give_place_back(self) -> None:
        due = anyio.current_time() + STREAM_SECONDS
        while True:
            await anyio.sleep(CROWDED_SECONDS)
            leaves = self._owner._workers.waiting or anyio.current_time() >= due
            if leaves and self._place is not None and self._place.give_back():
                return

    def _on_slow(self) -> None:
        if self._receiver is not None:  # which hears that the client has left, too
            self._door.alarm(self, self._on_slow)
        else:
            self._outlet.put_from_loop(SLOW)

    def _hang_up(self) -> None:
        """Nobody waits for the answer any more: let the worker find out at its next read, write or block."""
        self._gone = True
        self._inlet.close()
        if self._response.state is not COMPLETE:  # else nothing is refused any more, and what waits is sent
            self._outlet.close()
        if self._claim.acquire(blocking=False):
            self._outlet.put_from_loop(DONE)  # the worker's turn never came
            self._environ = {}  # it may lie in the backlog for long

    def _hand_context_back(self) -> None:
        """Let middleware outside see what the app has set (W13).

        Only here, behind the last send(): a server may copy the context of this task during a send(), for the next
        request of the connection (uvicorn does, where it resumes reading).
        """
        before = self._caller_context
        for variable, value in self._app_context.items():
            if variable not in before or before[variable] is not value:
                variable.set(_move_here(value) if type(value) is _LocalStorage else value)

    def _raise_error(self) -> None:
        error = self._app_error
        if error is None or (self._gone and isinstance(error, ClientDisconnected)):
            error = self._server_error
        self._app_error = self._server_error = None
        if error is None:
            return
        try:
            if isinstance(error, (StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError)):
                # Out of a coroutine they would say something else, and a server might never answer.
                raise ProtocolError(f"the app raised {shown(error)}") from error
            raise error
        finally:
            del error  # a frame that holds its own traceback is a cycle

    # -- The worker: in its thread ------------------------------------------------------------------------------------

    def _work(self, place: Place | None) -> Callable[[], object] | None:
        if not self._claim.acquire(blocking=False):
            return None  # the client left before its turn came
        self._place = place
        self._worker = threading.get_ident()
        try:
            if place is None:
                raise RuntimeError("no thread can be started for the app")
            self._app_context.run(self._run_app)
        except BaseException as error:
            self._app_error = error
        SyncToAsync.threadlocal.main_event_loop = None  # an idle thread keeps neither a loop nor a request
        return self._end_work()

    def _end_work(self) -> Callable[[], object] | None:
        """Hand over what is left.

        Returns:
            What wakes the host.
        """
        if self._brought is not None:
            self._brought.close()
        if self._last_item is None:
            return self._outlet.lay_last(DONE)
        return self._outlet.lay_last(self._last_item, DONE)

    def _show_loop_to_asgiref(self) -> None:
        """Leave the server's loop where async_to_sync finds it; sync_to_async leaves the same in its threads.

        It knows asyncio alone: under trio it makes a loop of its own, rather than take that of this thread's former
        request.
        """
        loop = self._door.native
        known = isinstance(loop, asyncio.AbstractEventLoop)
        SyncToAsync.threadlocal.main_event_loop = _LoopForAsgiref(loop, self._bring_body) if known else None
        SyncToAsync.threadlocal.main_event_loop_pid = os.getpid()

    def _run_app(self) -> None:
        self._settle_context()
        self._show_loop_to_asgiref()
        # The environ holds us by wsgi.input: let go of it, so that no request has to wait for the garbage collector.
        environ, self._environ = self._environ, {}
        result = self._owner.app(environ, self._start_response)
        del environ
        try:
            for _ in self._give_body(result):
                pass
        finally:
            _close(result)

    def _settle_context(self) -> None:
        """Make what the context says of a thread true of this one.

        The app shall see what middleware outside has set in asgiref's Locals: Django's translation and timezone, say.
        Since asgiref 3.12 a context alone does not carry them into another thread. Its sync_to_async moves them so; of
        its public means only a round trip through the loop would do the same. And no event loop runs here, so the app
        may run one.
        """
        settled = False
        for variable, value in self._caller_context.items():
            if type(value) is _LocalStorage:
                variable.set(_move_here(value))
                settled = True
            elif variable is _running_library:
                variable.set(None)
                settled = True
        if settled:
            self._caller_context = contextvars.copy_context()  # only what the app changes goes back

    def _give_body(self, result: Iterable[bytes]) -> Iterable[None]:
        """Give what the app returned, by steps: at the end of each, what was given has to be sent before the next.

        Returns:
            The steps that are left.
        """
        response = self._response
        if type(result) in _LISTS and len(cast("list[bytes]", result)) == 1:
            # The common answer: one block, no close(), and nothing left to do. It crosses together with the end.
            messages = response.block(cast("list[bytes]", result)[0], last=True) + response.end_trailers()
            self._last_item = (messages, 0) if messages else None
            return ()
        file = self._get_wrapped_file(result)
        if file is not None and self._offers("http.response.pathsend"):
            path = sendable_path(file, response.declared)
            if path is not None and response.state is STARTED and not response.bodiless:
                # No room is left beside it, so that close(), which may remove the file, waits until it was sent.
                self._put(response.file(path) + response.end_trailers(), WINDOW + 1)
                return (None,)
        if not (hasattr(result, "__iter__") or hasattr(result, "__getitem__")):
            raise ProtocolError(f"the app expected to return an iterable of bytes, returned {shown(result)}")
        return self._give_blocks(iter(result))

    def _get_wrapped_file(self, result: Any) -> Any:
        """What the app has put into its ``wsgi.file_wrapper``, None if it has returned something else."""
        return result.filelike if isinstance(result, FileWrapper) else None

    def _give_blocks(self, blocks: Iterator[bytes]) -> Iterator[None]:
        response = self._response
        for block in blocks:
            messages = response.block(block)
            if messages:
                # Behind the last block nothing comes, so nothing has to wait for it, and the thread is free.
                self._put(messages, len(block) if response.state is BODY else None)
                if response.bodiless:
                    return
                yield
            elif self._gone:  # an app that yields nothing while it waits shall not wait for nobody
                raise _client_left()
        messages = response.end() + response.end_trailers()
        if messages:
            self._put(messages)

    def _offers(self, extension: str) -> bool:
        return extension in (self._scope.get("extensions") or ())

    def _put(self, messages: tuple[ASGISendEvent, ...], size: int | None = None) -> None:
        """Hand messages over; wait for room in the window if they have a size."""
        size = 0 if size is None else size + ITEM_SIZE
        try:
            self._outlet.put((messages, size), size)
        except Closed:
            raise _client_left() from None

    def _next_chunk(self) -> bytes:
        """The next of the body's bytes, for ``wsgi.input``."""
        if self._brought is not None:
            chunk = self._brought.read(INPUT_WINDOW)
            if chunk:
                return chunk
        if self._body_read:
            return b""
        try:
            item = self._inlet.get_nowait()
            if item is None:
                self._ask_for_chunk()
                item = self._inlet.get()
        except Closed:
            raise ClientDisconnected("the client left before the whole body was read") from None
        self._body_read = not item
        return item

    def _ask_for_chunk(self) -> None:
        thread = threading.get_ident()
        if thread == self._door.thread:
            raise _read_in_the_loop()
        self._outlet.put(READ if thread == self._worker else READ_ASIDE)

    def _bring_body(self) -> None:
        """Bring the body before code of the app runs in the loop, which may read it there, but cannot wait for it."""
        if self._brought is not None:
            return
        brought: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=BROUGHT)  # noqa: SIM115  # the worker closes it
        try:
            while chunk := self._next_chunk():
                brought.write(chunk)
        except ClientDisconnected:
            pass  # the app hears it when it reads that far
        brought.seek(0)
        self._brought = brought

    # -- What the app calls -------------------------------------------------------------------------------------------

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        self._response.start(status, headers, exc_info)
        return self._write

    def _write(self, data: bytes) -> None:
        with self._writing:  # threads of the app's own may write at once: the first one's goes out with the start
            messages = self._response.block(data)
            if messages:
                self._put(messages, len(data))
                return
        if self._gone:
            raise _client_left()

    def _send_early_hints(self, links: Iterable[tuple[str, str]]) -> None:
        """``wsgi.early_hints``: takes (name, value) pairs, of which the Link headers go out (gunicorn's convention)."""
        values = [value for name, value in encode_headers(list(links)) if name == b"link"]
        if values and self._response.state in (NOTHING, STARTED):  # later they are no hints any more
            message: Any = {"type": "http.response.early_hint", "links": values}
            self._put((message,), sum(map(len, values)))

    def _is_gone(self) -> bool:
        """``waitress.client_disconnected``: whether the client has left."""
        return self._gone


# -- Theory -----------------------------------------------------------------------------------------------------------
#
# Behind an AsgiToWsgi the thread that has brought the request waits for it, and nobody needs another: it is lent, and
# runs the app in steps (C1). A step ends with the next block that the app yields. The host sends it, and asks for the
# next step when send() is back: so the thread is free to carry the block to its server, and then to ask the app again.
# What a step cannot do by itself, it has the thread do on the spot: where the app reads, the thread serves the request
# meanwhile, and is asked, through all the middleware, for a piece of its own wsgi.input.
#
# The worker's part in _Cycle is kept by whoever runs the step, mostly the server's thread. It alone calls the app, and
# closes what it returned: at the last step; or at the first that finds the client gone; or when its server has done
# with the request, and it has to leave (`_finish`). Only if it never came to the first step, a worker has to do it all.
#
# There is no watch of the client. The server tells its thread that it has left; and to call receive() before the app
# reads would have the thread wait for a body that nobody may want. But where another thread of the app reads, the host
# must not be in receive(), while the app may have blocks for it. From the first such read on (`_aside`) a second task
# calls receive(): it is _Cycle's watch, with an inlet that has room whenever somebody reads.

_UNSTARTED: Iterator[None] = iter(())


class _LentCycle(_Cycle):
    """One HTTP request through a WSGI app, on the thread of the WSGI server that lies outside."""

    def __init__(
        self,
        owner: WsgiToAsgi,
        scope: MutableMapping[str, Any] | Scope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
        thread: LentThread,
    ) -> None:
        super().__init__(owner, scope, receive, send)
        self._thread = thread
        self._out: StepsToLoop[_Item] = StepsToLoop(self._door, self._ask, thread.wake)
        self._outlet = self._out
        self._in: StepsToThread[bytes] = StepsToThread(self._door, self._read, thread.wake)
        self._inlet = self._in
        self._given = 0  # of the outer response, when the last step was asked for
        self._refused = False  # the thread has left before the first step
        self._aside = False  # another thread of the app has read
        # The steps'
        self._steps = _UNSTARTED
        self._result: Any = None
        self._file_wrapper: Any = None  # the server's own, where it has one
        self._over = False

    # -- The host: in the loop --------------------------------------------------------------------------------------

    async def run(self) -> None:
        await super().run()
        self._out.detach()
        self._in.detach()
        if self._refused and not self._is_gone():
            await _Cycle(self._owner, self._scope, self._receive, self._send).run()

    def _begin_work(self) -> None:
        if not self._thread.begin(self._finish):
            self._refuse_work()

    def _lend_loop(self) -> LentLoop:
        return ServedLoop(self._door.native, self._door.runs_here, self._thread, self._add_guest)

    def _refuse_work(self) -> None:
        self._refused = True
        self._outlet.put_from_loop(DONE)

    def _needs_watch(self, items: list[_Item]) -> bool:
        return self._aside and DONE not in items

    async def _receive_for_worker(self) -> None:
        await self._in.room()
        await self._receive_chunk()

    async def _give_place_back(self) -> None:
        """It has none among the workers."""

    def _want_chunk(self, aside: bool) -> None:
        self._aside = self._aside or aside
        self._in.want()
        self._out.put_from_loop(READ_ASIDE if self._aside else READ)

    async def _ask(self) -> None:
        """Ask the thread for the next step, when what the last one gave is on its way to the server (W12).

        Middleware may hand a block on by a task of its own, as Starlette's BaseHTTPMiddleware does: then send() is back
        some turns of the loop before the block is out. It may also keep it for itself, as GZipMiddleware does.
        """
        if self._steps is not _UNSTARTED:
            await self._settle()
        self._given = self._thread.given
        self._thread.ask(self._step)

    async def _settle(self) -> None:
        """Give way until the block is with the server, or nobody is on the way with it any more."""
        turns = 0
        while turns < SETTLE_TURNS and self._thread.given == self._given and self._thread.loop_is_busy:
            turns += 1
            await anyio.lowlevel.checkpoint()

    def _hang_up(self) -> None:
        self._gone = True
        self._inlet.close()
        if self._response.state is not COMPLETE:
            self._outlet.close()
        self._thread.ask(self._step)  # it closes what the app has returned; if it is in a step, that one does

    # -- The steps: in the server's thread ----------------------------------------------------------------------------

    def _step(self) -> Callable[[], object]:
        if not self._over and (self._worker or self._claim.acquire(blocking=False)):
            self._worker = who()
            local = SyncToAsync.threadlocal
            former = getattr(local, "main_event_loop", None), getattr(local, "main_event_loop_pid", None)
            self._show_loop_to_asgiref()
            try:
                self._over = self._app_context.run(self._advance)
            except BaseException as error:
                self._app_error = error
                self._over = True
            local.main_event_loop, local.main_event_loop_pid = former
            if self._over:
                self._steps, self._result = iter(()), None
                self._end_work()
                self._thread.give_back()
        return self._out.end_step

    def _advance(self) -> bool:
        """Run the app to its next block.

        Returns:
            Whether it has come to its end.
        """
        if self._gone and self._steps is _UNSTARTED:
            self._environ = {}
            return True
        over = True
        try:
            if self._steps is _UNSTARTED:
                self._settle_context()
                environ, self._environ = self._environ, {}
                self._file_wrapper = environ["wsgi.file_wrapper"]
                self._result = self._owner.app(environ, self._start_response)
                del environ
                self._steps = iter(self._give_body(self._result))
            over = self._gone or next(self._steps, _END) is _END or self._gone
        finally:
            if over:
                _close(self._result)
        return over

    def _finish(self) -> None:
        """Come to the end, since the thread is about to leave: of the steps, if all of the response was given."""
        if self._claim.acquire(blocking=False):
            self._thread.post(self._refuse_work)
            return
        if self._response.state is not COMPLETE:
            self._gone = True
            self._outlet.close()
        while not self._over:
            self._step()
        self._thread.post(self._out.end_step)

    def _get_wrapped_file(self, result: Any) -> Any:
        if isinstance(self._file_wrapper, type) and isinstance(result, self._file_wrapper):
            return getattr(result, "filelike", None) or getattr(result, "file", None)  # waitress calls it so
        return None

    def _read(self, until: Callable[[], bool]) -> None:
        # Said in the loop, and not by a put: who reads is to be known there before the chunk is wanted.
        self._thread.serve(until, partial(self._want_chunk, who() != self._worker), reads=True)

    def _ask_for_chunk(self) -> None:
        if self._door.runs_here():
            raise _read_in_the_loop()

    def _bring_body(self) -> None:
        super()._bring_body()
        self._thread.leave_loop()

    def _put(self, messages: tuple[ASGISendEvent, ...], size: int | None = None) -> None:
        super()._put(messages, size or 0)  # each has a size, so that the outlet knows what was sent

    def _write(self, data: bytes) -> None:
        """``write()``: the block goes to the server's own write(), or where it has none, waits here for the step's end.

        Nothing but memory bounds what waits; for such servers PEP 3333 has the iterable.
        """
        super()._write(data)
        self._flush()

    def _send_early_hints(self, links: Iterable[tuple[str, str]]) -> None:
        super()._send_early_hints(links)
        self._flush()

    def _flush(self) -> None:
        if self._thread.writes and who() == self._worker:
            self._thread.serve(lambda: self._out.empty or not self._thread.writes, self._out.wake, reads=False)
        if self._gone:
            raise _client_left()

    def _is_gone(self) -> bool:
        return self._gone or self._thread.has_left()


_END = object()
_LISTS = (list, tuple, WholeAnswer)


def _close(result: Any) -> None:
    close = getattr(result, "close", None)
    if close is not None:
        close()


def _read_in_the_loop() -> ProtocolError:
    return ProtocolError("the app read wsgi.input in the event loop, where its body cannot be waited for")


def _streams(messages: tuple[ASGISendEvent, ...]) -> bool:
    """Whether the thread stays with the response after these messages."""
    last: Any = messages[-1]
    return bool(last.get("more_body")) or last["type"] == "http.response.pathsend"


def _client_left() -> ClientDisconnected:
    return ClientDisconnected("the client left before the whole response was sent")
