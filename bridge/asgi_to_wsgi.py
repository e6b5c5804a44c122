"""AsgiToWsgi: an ASGI app as a WSGI app, and one request's way through it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import math
import select
import signal
import socket
import ssl
import time
import types
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from anyio import EndOfStream
from anyio.lowlevel import checkpoint
from asgiref.sync import SyncToAsync, ThreadSensitiveContext

from bridge import threads
from bridge.body import BodyReader, LengthRequired
from bridge.errors import BadRequest, ClientDisconnected, ProtocolError, shown
from bridge.files import PathFile
from bridge.kinds import Kind, check_app
from bridge.life import GuestLife, Life
from bridge.loops import LentLoop, LoopPool, Turn, TurnedLoop, has_ended, is_cancellation
from bridge.nesting import LOOP, THREAD, WholeAnswer, inherit, outer_scope
from bridge.response import (
    COMPLETE,
    NOTHING,
    STARTED,
    Accept,
    AsgiResponse,
    AsgiWebsocket,
    Close,
    Data,
    Denial,
    WebsocketState,
)
from bridge.scope import build_scope, build_websocket_scope, wants_websocket
from bridge.websocket import Connection, Handshake, Refusal, find_socket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
    from types import TracebackType
    from typing import Self, TypeAlias
    from wsgiref.types import StartResponse, WSGIEnvironment

    from asgiref.typing import ASGIReceiveEvent, ASGISendEvent

    # What asgiref.typing and Starlette have in common: each takes the other's apps for wrong.
    ASGIApp: TypeAlias = Callable[[Any, Any, Any], Awaitable[object]]
    # What a server may promise of them: gunicorn, as its stubs tell, no dict, and a start_response without exc_info.
    AnyEnvironment: TypeAlias = WSGIEnvironment | Any
    AnyStartResponse: TypeAlias = StartResponse | Any

T = TypeVar("T")

__all__ = ["AsgiToWsgi", "AsgiToWsgiStatistics"]

WINDOW = 64 * 1024
"""Bytes of a response that may lie here while a loop that is run by another thread goes on."""

GRACE_SECONDS = 1.0
"""How long an app that has lost its client may go on before it is cancelled."""

WEBSOCKET_GRACE_SECONDS = 10.0
"""The same for a WebSocket's app that has heard of it: daphne's limit. No thread of the server waits for it."""

DEAF_SECONDS = 60.0
"""The same for one that does not listen. It may be at work on a message, and knows its client as present until then;
uvicorn leaves it alone, daphne gives it 10 s. A guess."""

RESTART_SECONDS = 3.0
"""The same for one that does not listen when the process is about to end: less than what the exit waits for."""

BREAK_SECONDS = 1.0
"""How long a thread that was interrupted waits for its WebSocket to be ended in the loop, which code of the app may
block. gunicorn kills a worker a second after it has interrupted it."""

PATIENCE_SECONDS = 5.0
"""How long it may go on after that. Then the server's thread leaves it alone."""

LOOK_SECONDS = 0.2
"""How often a request that waits or streams looks whether its client is still there."""

STARTUP_SECONDS = 60.0
"""How long an app may take to start, as under hypercorn: some load a model, or wait for their database. A server with
less patience, as gunicorn's 30 s for a sync worker, says so by itself."""

LOOP_NOTE = (
    "each request has an event loop of its own here, as with any app that takes no part in lifespan; "
    'AsgiToWsgi(app, loop="shared") has one for all, on which what one request has made works in the next'
)

logger: logging.Logger = logging.getLogger("bridge")


@dataclass(frozen=True, slots=True)
class AsgiToWsgiStatistics:
    """What an `AsgiToWsgi` is doing at this moment, in this process.

    Attributes:
        requests: Requests in the app, in background work after their response as well.
        streaming: Of these, the responses that have begun and go on.
        background: Of these, the ones that the server has done with.
        waiting: Server threads that sleep while another one runs the shared loop. They wait for their app's next word,
            and are no sign of a bottleneck.
        handovers: How often one thread has handed the shared loop to another, since the startup.
        loops: Event loops there are, idle ones too.
        threads: Threads of our own that look after loops nobody waits for.
    """

    requests: int
    streaming: int
    background: int
    waiting: int
    handovers: int
    loops: int
    threads: int


class AsgiToWsgi:
    """An ASGI 3 app as a WSGI app, under any PEP 3333 server.

    Args:
        app: The ASGI app: ``app(scope, receive, send)``.
        loop: ``"shared"``: one event loop per process; what was made in one request works in the next.
            ``"request"``: one for each request; apps that block inside ``async def`` hold up no others. ``"auto"``:
            shared for an app that takes part in lifespan, else one for each request, until the app is asked for its
            first WebSocket: that, all others and all requests from then on have one loop in common. Under gevent it is
            shared, and where gevent has patched the standard library it always is.
        loop_factory: Makes event loops, as ``uvloop.new_event_loop`` does.
        lifespan: ``"auto"``: an app that knows no lifespan is served all the same. ``"on"``: it must. ``"off"``: it
            is not asked.
        startup_timeout: Seconds that the app may take to start; None: as many as it likes.

    Raises:
        TypeError: It is no ASGI app for sure: a WSGI app, a class, a module, a string... Or an option's type is wrong.
        ValueError: ``loop`` or ``lifespan`` is none of these words, or ``startup_timeout`` no positive number.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        loop: Literal["auto", "shared", "request"] = "auto",
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
        lifespan: Literal["auto", "on", "off"] = "auto",
        startup_timeout: float | None = STARTUP_SECONDS,
    ) -> None:
        check_app(app, Kind.ASGI)
        if loop not in ("auto", "shared", "request"):
            raise ValueError(f"loop expected 'auto', 'shared' or 'request', got {loop!r}")
        if lifespan not in ("auto", "on", "off"):
            raise ValueError(f"lifespan expected 'auto', 'on' or 'off', got {lifespan!r}")
        if startup_timeout is not None and not isinstance(startup_timeout, (int, float)):
            raise TypeError(f"startup_timeout expected a number of seconds, or None, got {shown(startup_timeout)}")
        if startup_timeout is not None and not 0 < startup_timeout < math.inf:
            raise ValueError(f"startup_timeout expected seconds, more than 0, or None, got {startup_timeout!r}")
        if not callable(loop_factory):
            raise TypeError(
                "loop_factory expected a function that makes event loops, as uvloop.new_event_loop does, "
                f"got {shown(loop_factory)}"
            )
        self.app = app
        self._life = Life(loop, loop_factory, lifespan, startup_timeout)
        self._guest_lives: dict[object, GuestLife] = {}  # by the loops that lie outside
        self._make_guest_life = partial(GuestLife, app, lifespan, startup_timeout)

    def __call__(self, environ: AnyEnvironment, start_response: AnyStartResponse) -> Iterable[bytes]:
        """Serve one request (PEP 3333).

        Raises:
            LifespanFailure: The app refused to start, or did not in time.
            ProtocolError: The app broke the ASGI specification, or raised what says something else in a server's
                thread: CancelledError, GeneratorExit, StopIteration.
            ClientDisconnected: The client left before the response began.
            BaseException: Whatever else the app raised before its response began, as itself.
        """
        try:
            lend_loop = environ.get(LOOP)
            if lend_loop is not None:
                cycle: _Cycle = _GuestCycle(self, environ, start_response, lend_loop())
            elif "HTTP_UPGRADE" in environ and wants_websocket(environ):
                cycle = self._make_websocket_cycle(environ, start_response)
            else:
                cycle = _Cycle(self, self._life, environ, start_response)
        except Refusal as error:
            return _refuse(error.status, error.headers, f"No WebSocket: {error}", start_response)
        except LengthRequired as error:
            return _refuse("411 Length Required", [], f"Length Required: {error}", start_response)
        except BadRequest as error:
            return _refuse("400 Bad Request", [], f"Bad Request: {error}", start_response)
        return cycle.begin()

    def _make_websocket_cycle(self, environ: WSGIEnvironment, start_response: StartResponse) -> _Cycle:
        """The cycle of a request that asks for a WebSocket; for the app it is plain http where it cannot have one."""
        lent = find_socket(environ)
        if lent is not None:
            try:
                return _WebsocketCycle(self, self._life, environ, start_response, Handshake(environ), lent)
            except ImportError:
                _ask_for_websockets()
        return _Cycle(self, self._life, environ, start_response)

    def _add_guest_life(self, loop: object) -> GuestLife:
        for other in list(self._guest_lives):
            if has_ended(other):
                self._guest_lives.pop(other, None)
        life = self._make_guest_life(partial(self._guest_lives.pop, loop, None))
        return self._guest_lives.setdefault(loop, life)

    def startup(self) -> None:
        """Start the app now, and not at the first request.

        Raises:
            LifespanFailure: The app refused to start, or did not in time.
        """
        self._life.start(self.app)

    def close(self) -> None:
        """Shut the app down, and give its loops and threads back. Twice is once; a later request starts it anew.

        Requests in flight and background work are waited for, for a bounded time. What is left after it, as by code
        that blocks the event loop, is told to the log.

        Raises:
            RuntimeError: The caller runs in one of the app's own loops, which would have to wait for itself.
        """
        self._life.stop()

    def statistics(self) -> AsgiToWsgiStatistics:
        """What is going on, for metrics; from any thread, at the cost of a look at each request."""
        cycles, shared = list(self._life.requests), self._life.shared or self._life.common
        loops = {shared, *self._life.pool.idle, *(cycle.loop for cycle in cycles)} - {None}
        return AsgiToWsgiStatistics(
            requests=len(cycles),
            streaming=sum(cycle.streams for cycle in cycles),
            background=sum(cycle.closed for cycle in cycles),
            waiting=shared.waiting if shared else 0,
            handovers=shared.handovers if shared else 0,
            loops=len(loops),
            threads=sum(loop.has_keeper for loop in loops if loop),
        )

    def __enter__(self) -> Self:
        self.startup()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        life = getattr(self, "_life", None)
        if life is not None and life.started:
            # The garbage collector may have come in the middle of anything, our own loop and locks as well: so not
            # here.
            with contextlib.suppress(RuntimeError):  # can't start new thread at interpreter shutdown
                threads.start(life.stop, "bridge-closer")


# -- Theory -----------------------------------------------------------------------------------------------------------
#
# One request has two parties: the app's task in the loop, and the server's thread. The thread waits by its Turn, and
# runs the loop meanwhile if nobody else does. The task tells the Turn when there is something for the thread: a block,
# a wish to read, the end. The thread then comes out of the loop, hands it on, and serves: start_response, the block to
# the server, a read() of wsgi.input. All of these may block, and hold up nobody: from the first of them on the loop has
# a keeper.
#
# Both run at once where another thread runs the loop, so each attribute has one writer. What is for the thread, the
# task's side lays down first and tells after; the thread takes `told` back before it looks, so that whatever it misses
# is told again. It looks for an end before it looks for blocks, since the task lays them down in the other order.
#
# A block must have reached the server before the app can go on to block (A7). If the thread itself runs the loop, it
# has to come out first: send() waits until the thread comes back for more. If another thread runs the loop, ours is
# awake and on its way, so send() waits only when the window is full.
#
# The end: when the server has the last block, it calls close(). The app may be at work still. On a loop of its own it
# is waited for, on a shared loop it goes on alone. If the response is not complete, the client has left: the app hears
# http.disconnect, is cancelled after GRACE_SECONDS, and left alone after PATIENCE_SECONDS more, on a loop of its own
# with a thread of its own. The same happens when the client is seen to have left before the server has noticed it
# (A11).
#
# A response without a body (to HEAD; 204, 304) is whole for the server with the first message of the body that nobody
# gets, as it is for WSGI frameworks, which close that body unread. The app is not told: it may need a moment to come to
# the end of it, and to what it does then. If it needs longer than GRACE_SECONDS, as a stream without end does, its
# client has left.
#
# An error of the app is taken out of `_errors` once: by the thread, which raises it, or by whoever comes after the
# thread has gone, who logs it.


class _Cycle:
    """One HTTP request through an ASGI app."""

    meets: bool = False
    lent_loop: LentLoop | None = None

    __slots__ = (
        "_asked",
        "_begun",
        "_blocks",
        "_body_received",
        "_closers_turn",
        "_ended",
        "_environ",
        "_errors",
        "_given",
        "_given_up",
        "_gone",
        "_left",
        "_lent",
        "_life",
        "_loop",
        "_messages",
        "_opened",
        "_pool",
        "_reader",
        "_readers",
        "_receivers",
        "_response",
        "_scope",
        "_senders",
        "_start_response",
        "_step",
        "_taken",
        "_task",
        "_timer",
        "_turn",
        "_watched",
        "_whole",
        "_wishes",
        "_write",
        "closed",
        "owner",
    )  # more than the 30 attributes up to which a plain object is as quick

    def __init__(
        self, owner: AsgiToWsgi, life: Life | GuestLife, environ: WSGIEnvironment, start_response: StartResponse
    ) -> None:
        self.owner = owner  # a wrapper that is dropped closes its loop: not before its requests have ended
        self._life = life
        self._environ = environ
        self._start_response = start_response
        self._turn = Turn()
        # The thread's
        self._begun = False  # status and headers are known to the server
        self._closers_turn: Turn | None = None  # of another thread, which closes while ours may be at work
        self._wishes: list[None] = []  # one, if a chunk is wanted: set by the task, taken by pop() by one thread
        self._taken = 0  # bytes of the blocks that the server has
        self.closed = False
        self._left = False  # the thread will not look at anything any more
        self._write: Callable[[bytes], object] | None = None  # the server's, while the app may use it
        # The thread, lent to a WsgiToAsgi inside
        self._lent: _LentThread | None = None
        self._step: Callable[[], Callable[[], object]] | None = None  # that it is asked for; set in the loop
        self._readers: list[Turn] = []  # of the guest's other threads that want the body, and read it for themselves
        # The task's, read by the thread
        self._blocks: deque[bytes] = deque()
        self._given = 0  # bytes of all blocks so far
        self._whole = False  # the last block is among the blocks, or was
        self._errors: list[BaseException] = []
        self._ended = False
        self._given_up = False
        # The task's alone
        self._task: asyncio.Task[None] | None = None
        self._messages: deque[ASGIReceiveEvent] = deque()  # read, and not yet received
        self._asked = False  # the thread was asked for a chunk that it has not delivered yet
        self._body_received = False
        self._opened = False  # the first message of the response's body was sent
        self._gone = False  # the client, or the server's wish for an answer
        self._watched = False  # the client
        self._timer: asyncio.TimerHandle | None = None
        self._receivers: list[asyncio.Future[None]] = []  # woken when there is something to receive
        self._senders: list[asyncio.Future[None]] = []  # woken when the window has room
        # What the server says is translated before anything is begun that would have to be ended.
        has_body = environ.get("CONTENT_LENGTH") or "HTTP_TRANSFER_ENCODING" in environ
        self._reader = BodyReader(environ) if has_body else None
        self._scope = self._build_scope()
        extensions = self._scope["extensions"]
        # A WebSocket's has no method: it is that of a GET.
        self._response = AsgiResponse(self._scope.get("method", "GET"), extensions.copy())
        extensions[THREAD] = self._lend  # in the app's dict alone, or we would hold ourselves
        self._pool: LoopPool | None = None  # of a loop of our own

    # -- The server's thread ------------------------------------------------------------------------------------------

    def begin(self) -> Iterable[bytes]:
        """Run the app until its response begins."""
        try:
            life = self._life
            self._loop = life.enter(self)
            if self._loop is not life.shared and self._loop is not life.common:
                self._pool = life.pool
            scope, self._scope = self._scope, {}
            scope["state"] = self._get_state()
            response = self._response
            self._wait(partial(self._create_task, scope))
            if not self._opened:
                self._raise_failure(
                    "the app ended without sending a response"
                    if response.state is NOTHING
                    else "the app ended after 'http.response.start', without any 'http.response.body'"
                )
            result = _Result(self)
            file = self._open_file(response.path, result) if response.path is not None else None
            if not self._begun:
                self._open()
            self._write = None  # the blocks of an iterable come after all that was written (PEP 3333)
            if file is not None:
                self._send_trailers()
                return self._environ["wsgi.file_wrapper"](file)  # type: ignore[no-any-return]
        except BaseException:
            self.close()
            raise
        if not self._whole:
            self._loop.keep()
        return result

    def _open_file(self, path: str, result: _Result) -> PathFile:
        """Open the file that is the body; before the server knows of the response, which may have to become a 500."""
        file = PathFile(path, result.close)
        try:
            self._response.check_file(file.size())
        except BaseException:
            file.close()
            raise
        return file

    def _get_state(self) -> dict[str, Any]:
        return self._life.state.copy()

    def _open(self) -> None:
        self._begun = True
        self._write = self._start_response(self._response.status, self._response.headers)

    def _build_scope(self) -> dict[str, Any]:
        environ = self._environ
        scope: dict[str, Any] = build_scope(environ)  # type: ignore[assignment]
        extensions = scope["extensions"]
        if "wsgi.file_wrapper" in environ:
            extensions["http.response.pathsend"] = {}
        if "wsgi.early_hints" in environ:
            extensions["http.response.early_hint"] = {}
        if "gunicorn.http2.send_trailers" in environ or "wsgi.ext.http.send_trailers" in environ:
            extensions["http.response.trailers"] = {}
        return scope

    def next_block(self) -> bytes:
        """The next block for the server."""
        while True:
            over = self._whole or self._ended or self._given_up or self.closed
            if self._blocks:
                block = self._blocks.popleft()
                self._taken += len(block)
                if self._senders and not self._blocks:
                    # They may fill the window while the server sends its last block.
                    self._loop.post(self._wake_senders)
                return block
            if over:
                if self._whole or self.closed:
                    self._send_trailers()
                    raise StopIteration
                self._raise_failure("the app ended before it had sent its whole body")
            self._wait(self._wake_senders if self._senders else None)

    def _wait(self, callback: Callable[[], object] | None) -> None:
        """Wait for the response to go on, or to end; meanwhile read the request's body as the app wishes."""
        turn = self._turn
        turn.told = False
        # What was told before that line is here already.
        while True:
            over = self._whole or self._ended or self._given_up or self.closed  # that by another thread
            if self._response.hints:
                self._environ["wsgi.early_hints"](self._response.hints.popleft())
            elif self._blocks or over or (self._opened and not self._begun):
                break
            elif self._wishes and not self._readers:
                if callback is not None:
                    self._loop.post(callback)
                callback = self._read_chunk()
            elif self._step is not None:
                if callback is not None:
                    self._loop.post(callback)
                callback = self._run_step()
            else:
                self._loop.wait(turn, callback)
                turn.told = False
                callback = None
        if callback is not None:
            self._loop.post(callback)

    def _get_reader(self) -> BodyReader:
        if self._reader is None:
            self._reader = BodyReader(self._environ)
        return self._reader

    def _read_chunk(self) -> Callable[[], object] | None:
        try:
            self._wishes.pop()
        except IndexError:  # another thread reads
            return None
        self._loop.keep()
        return partial(self._deliver, self._get_reader().next_message())

    def _run_step(self) -> Callable[[], object] | None:
        step, self._step = self._step, None
        lent = self._lent
        return None if step is None or lent is None else lent.run(step)

    def _serve(self, until: Callable[[], bool], callback: Callable[[], object] | None) -> None:
        """Within such a step: do what is asked for, until something is so.

        What is for the server goes first: where another thread runs the loop, send() was back before we came to it.
        """
        turn = self._turn
        turn.told = False
        while True:
            is_so = until()  # before we look for what was laid down before it
            if self._response.hints:
                self._environ["wsgi.early_hints"](self._response.hints.popleft())
            elif self._blocks and self._lets_write():
                self._write_block()
            elif is_so:
                break
            elif self._wishes and not self._readers:
                if callback is not None:
                    self._loop.post(callback)
                callback = self._read_chunk()
            else:
                self._loop.wait(turn, callback)
                turn.told = False
                callback = None
        if callback is not None:
            self._loop.post(callback)

    def _wait_beside(
        self, turn: Turn, until: Callable[[], bool], callback: Callable[[], object] | None, reads: bool
    ) -> None:
        """Wait in another thread than the server's until something is so; for the request, read its body at most."""
        if reads:
            self._readers.append(turn)
        try:
            while True:
                turn.told = False
                if until():
                    break
                if reads and self._wishes:
                    if callback is not None:
                        self._loop.post(callback)
                    callback = self._read_chunk()
                else:
                    self._loop.wait(turn, callback)
                    callback = None
        finally:
            if reads:
                self._stop_reading(turn)
        if callback is not None:
            self._loop.post(callback)

    def _stop_reading(self, turn: Turn) -> None:
        """Leave the readers, and what they leave undone to the server's thread, which counts on them."""
        self._readers.remove(turn)
        if self._wishes and not self._readers:
            self._loop.post(lambda: self._loop.tell(self._turn))

    def _lets_write(self) -> bool:
        """Whether blocks can go to the server's write(): while our iterable is not returned (PEP 3333)."""
        return not self.closed and (not self._begun or self._write is not None) and self._response.path is None

    def _write_block(self) -> None:
        if not self._begun:
            self._open()
        if self._write is not None:  # granian has none
            block = self._blocks.popleft()
            self._taken += len(block)
            self._write(block)
            if self._senders:
                self._loop.post(self._wake_senders)

    def _send_trailers(self) -> None:
        trailers, self._response.trailers = self._response.trailers, []
        if trailers:
            environ = self._environ
            send = environ.get("gunicorn.http2.send_trailers") or environ["wsgi.ext.http.send_trailers"]
            send(trailers)

    def close(self) -> None:
        """End the request (PEP 3333: the server calls it once, whether the response is whole or not)."""
        if self.closed:
            return
        self.closed = True
        if self.loop is None:  # it was not let in, or an interrupt came right then
            self._life.requests.discard(self)
            return
        if self._lent is not None:
            self._lent.leave()
        self._blocks.clear()
        if self._pool is not None:
            try:
                self._run_to_end()
            finally:
                self._life.requests.discard(self)
        elif self._ended:
            self._life.requests.discard(self)
        elif not self._whole:
            self._loop.post(self._hang_up)
        self._left = True
        if self._ended:
            if self._whole and not self._gone:
                self._raise_error()
            self._log_error()

    def _run_to_end(self, patient: bool = False) -> None:
        """Run the app on its own loop to its end, and give the loop back.

        Args:
            patient: Also if the app refuses to end. Else a thread of its own is left with it.
        """
        assert self._pool is not None
        assert isinstance(self._loop, TurnedLoop)
        turn = self._turn
        if turn.thread != threads.get_ident():  # the other one may be in the middle of a wait
            turn = self._closers_turn = Turn()
        turn.told = False
        while not self._ended:
            if self._given_up and not patient:
                threads.start(partial(self._run_to_end, True), "bridge-closer")
                return
            self._loop.wait(turn, None if self._whole else self._hang_up)
            turn.told = False
        self._pool.give_back(self._loop, ready=self._gone or bool(self._errors))
        self._life.requests.discard(self)

    def _raise_failure(self, message: str) -> None:
        """Say why the response does not come, or does not go on."""
        self._raise_error()
        raise _client_left() if self._gone else ProtocolError(message)

    def _raise_error(self) -> None:
        error = self._take_error()
        if error is None or (self._gone and _tells_of_leaving(error)):
            return
        try:
            if is_cancellation(error) or isinstance(error, (StopIteration, GeneratorExit)):
                if self._gone:
                    return
                # Out of an iterator they would say something else.
                raise ProtocolError(f"the app raised {shown(error)}") from error
            raise error
        finally:
            del error  # a frame that holds its own traceback is a cycle

    def _log_error(self) -> None:
        error = self._take_error()
        if error is not None and not (self._gone and _tells_of_leaving(error)):
            words = "its client had left" if self._gone else "its response"
            logger.error("the app failed after %s", words, exc_info=error)

    def _take_error(self) -> BaseException | None:
        try:
            return self._errors.pop() if self._errors else None
        except IndexError:  # two came for it at once
            return None

    @property
    def app(self) -> Any:
        return self.owner.app

    @property
    def name(self) -> str:
        """What the request is called in a log."""
        environ = self._environ
        return f"{environ['REQUEST_METHOD']} {environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"

    @property
    def loop(self) -> TurnedLoop | None:
        """None until it has one."""
        return getattr(self, "_loop", None)

    @property
    def streams(self) -> bool:
        """Whether the response has begun, and goes on."""
        return self._begun and not self._whole and not self.closed

    def go_away(self) -> None:
        """The app is about to be shut down: end what would never end by itself.

        A request does, but where its server has all of the response and does not close it: nobody runs its loop then.
        """
        if self._pool is not None and self._whole and not self.closed:
            self._loop.keep()

    def runs_in(self, native: asyncio.AbstractEventLoop) -> bool:
        return self._task is not None and self._task.get_loop() is native

    # -- In the loop --------------------------------------------------------------------------------------------------

    def _lend(self) -> _LentThread | None:
        """Lend the server's thread, to one at a time, as long as it is there.

        In our loop alone: an app may also run a loop of its own, by ``asyncio.run`` or ``async_to_sync`` in a thread.
        """
        if self.closed or self._lent is not None or not self._loop.runs_here():
            return None
        return _LentThread(self)

    def _create_task(self, scope: dict[str, Any]) -> None:
        if self.closed:  # an interrupt came between
            self._end(None)
            return
        coroutine = self._run_app(scope)
        try:
            self._task = self._loop.native.create_task(coroutine)
        except Exception as error:  # an app's own task factory: the thread that waits may be another one than this
            coroutine.close()
            self._end(error)

    async def _run_app(self, scope: Any) -> None:
        # Each request's sync_to_async code has a thread of its own (A17). To set it is enough: the task's context ends
        # with the task, and asgiref drops the thread with it.
        SyncToAsync.thread_sensitive_context.set(ThreadSensitiveContext())
        try:
            await self.owner.app(scope, self._receive, self._send)
        except BaseException as error:  # and no longer: a frame that holds its own traceback is a cycle
            self._end(error)
        else:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            if self._pool is not None:
                _explain(error)
            self._errors.append(error)
        self._ended = True
        self._life.requests.discard(self)  # a server that never closes the response shall not hold a shutdown up
        self._stop_timer()
        self._wake_receivers()
        if self._left:
            self._log_error()
        self._tell_of_end()

    def _tell_of_end(self) -> None:
        self._loop.tell(self._turn)
        if self._closers_turn is not None:
            self._loop.tell(self._closers_turn)

    async def _receive(self) -> ASGIReceiveEvent:
        while not self._messages:
            if self._gone or self._ended or self._response.state is COMPLETE:
                return {"type": "http.disconnect"}
            if self._body_received:
                self._watch_client()
            elif not self._asked:
                self._asked = True
                reader = self._get_reader()
                if reader.complete:  # so nothing has to be read
                    self._deliver(reader.next_message())
                    continue
                self._loop.native.call_soon(self._ask_for_chunk)
            await self._wait_to_receive()
        return self._messages.popleft()

    async def _wait_to_receive(self) -> None:
        receiver = self._loop.native.create_future()
        self._receivers.append(receiver)
        try:
            await receiver
        except asyncio.CancelledError:
            self._receivers = [receiver for receiver in self._receivers if not receiver.done()]
            raise

    def _ask_for_chunk(self) -> None:
        """Have the server's thread read, which nobody can take back, if it is still wanted.

        Starlette's ``is_disconnected()`` calls receive() in a scope that is cancelled already, and hears of that at the
        loop's next turn: it wants what is here, and not to have the response wait for a client that sends slowly.
        """
        if all(receiver.done() for receiver in self._receivers):
            self._asked = False
            self._watch_client()
        else:
            self._wishes.append(None)
            for turn in self._readers[:] or (self._turn,):
                self._loop.tell(turn)

    def _deliver(self, message: ASGIReceiveEvent) -> None:
        self._asked = False
        if message["type"] == "http.disconnect":
            self._body_received = True  # there is no more of it
            self._hang_up()
        else:
            self._messages.append(message)
            self._body_received = not message["more_body"]  # type: ignore[typeddict-item]
            self._wake_receivers()

    async def _send(self, message: ASGISendEvent) -> None:
        if self._gone:
            raise _client_left()
        response = self._response
        block = response.send(message)
        # Where another thread runs the loop, the server's may look at this in the middle: for what is open at last.
        if block:
            self._opened = True
            self._blocks.append(block)
            self._given += len(block)
        if response.state is COMPLETE:
            self._opened = self._whole = True
            self._wake_receivers()
        elif response.bodiless and response.state not in (NOTHING, STARTED):
            if self._whole:
                await checkpoint()  # an app that never ends may wait for nothing else
                return
            self._opened = self._whole = True
            self._set_timer(GRACE_SECONDS, self._hang_up)
        elif block or not (self._opened or response.state in (NOTHING, STARTED)):
            self._opened = True
            self._watch_client()
        elif not response.hints:
            return
        self._loop.tell(self._turn)
        # Go on when the server's thread is on its way with the block, and the window has room for another.
        while self._turn.told and self._loop.is_led_by(self._turn):
            await _yield_once()  # the loop was told to stop: once on asyncio, twice on uvloop
        if self._given - self._taken > WINDOW:
            await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        while self._given - self._taken > WINDOW and not (self._gone or self._whole):
            sender = self._loop.native.create_future()
            self._senders.append(sender)
            if self._given - self._taken > WINDOW:  # still: the thread looks for senders after it has taken a block
                await sender

    def _wake_senders(self) -> None:
        self._senders = _wake(self._senders)

    def _wake_receivers(self) -> None:
        if self._receivers:
            self._receivers = _wake(self._receivers)

    # -- In the loop: when the client has left ------------------------------------------------------------------------

    def _watch_client(self) -> None:
        """Look from time to time whether the client is still there, where the server lets it be seen (A11)."""
        if not self._watched:
            self._watched = True
            has_left = _find_probe(self._environ)
            if has_left is not None:
                self._set_timer(LOOK_SECONDS, self._look_at_client, has_left)

    def _look_at_client(self, has_left: Callable[[], bool]) -> None:
        if has_left():
            self._hang_up()
        elif self._response.state is not COMPLETE:
            self._set_timer(LOOK_SECONDS, self._look_at_client, has_left)

    def _hang_up(self) -> None:
        """The client has left: the app hears of it, and may clean up for a while."""
        if self._gone or self._ended or self._response.state is COMPLETE:
            return
        self._gone = True
        if self._task is None:  # nor will there be one: an interrupt came before
            self._end(None)
            return
        self._wake_receivers()
        self._wake_senders()
        self._start_grace()

    def _start_grace(self) -> None:
        self._set_timer(GRACE_SECONDS, self._cancel)

    def _cancel(self) -> None:
        assert self._task is not None
        self._task.cancel()
        self._set_timer(PATIENCE_SECONDS, self._give_up)

    def _give_up(self) -> None:
        logger.error("the app goes on although its client has left and it was cancelled: it is left alone")
        self._given_up = True
        self._life.requests.discard(self)
        self._tell_of_end()

    def _set_timer(self, seconds: float, callback: Callable[..., object], *args: Any) -> None:
        self._stop_timer()
        self._timer = self._loop.native.call_later(seconds, callback, *args)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


# -- Theory: WebSockets -----------------------------------------------------------------------------------------------
#
# Until the app has answered the handshake, its WebSocket is an http request: what it answers instead of accepting is a
# response as any other, sent by the server; an error before that is the server's 500.
#
# When it accepts, the loop takes the server's socket over, and the thread has nothing to do but to run the loop. It
# comes out when the connection is over, and the server gets what all servers understand: a whole and empty response,
# "101 Switching Protocols". They log it, try to send it, and find the socket shut down, which they take for a client
# that has left. To raise something would do as well for them, but not for a debugger or a monitor between.
#
# If an interrupt takes the thread away before (a signal that ends the process, a greenlet's timeout), the server would
# go on with what it does about an error: it sends a page that says 500, into the WebSocket. So the thread has the
# connection broken off in the loop, or does it itself if the loop stands still, and only then lets the server have its
# socket.
#
# The connection ends before the app, or after it. An app that ends closes its connection, and that is waited for. An
# app whose client has left knows of it when it receives websocket.disconnect, behind the messages that were left for
# it, or when a send() raises: from then on it has WEBSOCKET_GRACE_SECONDS. Until then it is at work, and a cancellation
# in the middle would keep it from ever knowing: it would go on to count its client among the present. So that comes
# late, after DEAF_SECONDS without a receive().


_DISCONNECTS = frozenset(["WebSocketDisconnect", "WebSocketDisconnected"])
"""What Starlette, Litestar and Falcon raise out of their receive() when the client has left; FastAPI's first example
lets it go on. The classes have nothing in common but their names."""


class _WebsocketCycle(_Cycle):
    """One WebSocket through an ASGI app."""

    meets = True

    __slots__ = (
        "_app_ended",
        "_bell",
        "_connection",
        "_get_unread",
        "_goes",
        "_greeted",
        "_handshake",
        "_knows",
        "_socket",
        "_websocket",
    )

    def __init__(
        self,
        owner: AsgiToWsgi,
        life: Life,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        handshake: Handshake,
        lent: tuple[socket.socket, Callable[[], bytes]],
    ) -> None:
        self._app_ended = False
        self._bell: asyncio.TimerHandle | None = None  # rings for a look whether the server is about to end
        self._handshake = handshake
        self._socket, self._get_unread = lent
        self._connection: Connection | None = None  # once the app has accepted
        self._greeted = False  # the app has received websocket.connect
        self._goes = False  # the app is about to be shut down, or the server to end
        self._knows = False  # the app has heard that its client has left
        super().__init__(owner, life, environ, start_response)
        self._websocket = AsgiWebsocket(self._scope["subprotocols"], self._response)

    # -- The server's thread ------------------------------------------------------------------------------------------

    def _build_scope(self) -> dict[str, Any]:
        scope: dict[str, Any] = build_websocket_scope(self._environ)  # type: ignore[assignment]
        scope["extensions"]["websocket.http.response"] = {}
        return scope

    def close(self) -> None:
        connection = self._connection
        if connection is not None and not (self.closed or connection.is_over):
            self._break_off(connection)
        super().close()

    def _break_off(self, connection: Connection) -> None:
        """End a connection, in this thread that is about to leave it."""

        def break_off() -> None:
            self._goes = True
            connection.break_off(Close(1012, ""))

        try:
            self._loop.post(break_off)
            self._loop.hand_over()
            deadline = time.monotonic() + BREAK_SECONDS
            while not connection.is_over and time.monotonic() < deadline:
                threads.pause(0.005)
        finally:
            if not connection.is_over:  # or a second interrupt has come
                connection.cut()

    def go_away(self) -> None:
        self._goes = True
        loop: TurnedLoop | None = getattr(self, "_loop", None)
        if loop is not None:
            loop.post(self._close_for_restart)

    # -- In the loop --------------------------------------------------------------------------------------------------

    def _end(self, error: BaseException | None) -> None:
        connection = self._connection
        if connection is None:
            super()._end(error)
            return
        told = self._gone and error is not None and _tells_of_disconnect(error)
        if error is not None and not told:
            words = "its client had left" if self._gone else "it had accepted a WebSocket"
            logger.error("the app failed after %s", words, exc_info=error)
        self._stop_timer()
        self._app_ended = True
        if connection.is_over:
            super()._end(None)
        else:
            connection.close(Close(1000, "") if error is None else Close(1011, ""))

    def _end_connection(self) -> None:
        """The socket is the server's again."""
        if self._bell is not None:
            self._bell.cancel()
        self._opened = self._whole = True
        if self._app_ended:
            super()._end(None)
        else:
            self._loop.tell(self._turn)

    async def _receive(self) -> Any:
        if not self._greeted:
            self._greeted = True
            return {"type": "websocket.connect"}
        while self._connection is None:
            if self._gone or self._ended or self._response.state is COMPLETE:
                return {"type": "websocket.disconnect", "code": 1006, "reason": ""}
            self._watch_client()
            await self._wait_to_receive()
        if self._knows:
            await _yield_once()  # to whoever takes no notice, which would never let the loop turn
        message = await self._connection.receive()
        if self._gone:
            if message["type"] == "websocket.disconnect":
                self._learn()
            else:
                self._start_grace()
        return message

    async def _send(self, message: Any) -> None:
        try:
            if self._gone:
                raise _client_left()
            await self._send_step(message)
        except ClientDisconnected:
            # Not by a task of somebody else, who says something to all: the app may be at work, and know nothing.
            if asyncio.current_task() is self._task:
                self._learn()
            raise

    async def _send_step(self, message: Any) -> None:
        step = self._websocket.send(message)
        if isinstance(step, Accept):
            self._accept(step)
        elif isinstance(step, Denial):
            for part in step.messages:
                await super()._send(part)
        else:
            assert self._connection is not None
            if isinstance(step, Data):
                await self._connection.send(step)
            else:
                self._connection.close(step)

    def _accept(self, step: Accept) -> None:
        if self.closed:  # an interrupt has taken the thread away: the socket is the server's again
            raise _client_left()
        self._stop_timer()
        # `wsgiref.validate` wants a type with what it thinks to have a body.
        self._response.status, self._response.headers = "101 Switching Protocols", [("Content-Type", "text/plain")]
        connection = self._connection = Connection(
            self._loop.native, self._socket, self._handshake, super()._hang_up, self._end_connection
        )
        connection.open(step, self._get_unread)
        self._wake_receivers()
        self._look_at_server(_find_farewell(self._environ))

    def _look_at_server(self, is_ending: Callable[[], bool] | None) -> None:
        """Look from time to time whether the server is about to end, where it lets it be seen."""
        assert self._connection is not None
        if self._goes or (is_ending is not None and is_ending()):
            self._close_for_restart()
        elif is_ending is not None and not self._connection.is_over:
            loop = self._loop.native
            when = math.ceil(loop.time()) + 1.0  # all connections at once: so the loop wakes up once
            self._bell = loop.call_at(when, self._look_at_server, is_ending)

    def _close_for_restart(self) -> None:
        self._goes = True
        if self._connection is not None:
            self._connection.go_away(Close(1012, ""))
            if self._gone and not (self._knows or self._app_ended):
                self._start_grace()  # anew, and a short one

    def _start_grace(self) -> None:
        if self._connection is None:
            super()._start_grace()  # as in http: the server's thread waits for an answer
        else:
            self._set_timer(RESTART_SECONDS if self._goes else DEAF_SECONDS, self._cancel)

    def _learn(self) -> None:
        """The app has heard that its client has left."""
        if self._connection is not None and not (self._knows or self._app_ended):
            self._knows = True
            self._set_timer(WEBSOCKET_GRACE_SECONDS, self._cancel)

    def _cancel(self) -> None:
        if self._connection is not None:
            ending = "and has heard of it" if self._knows else "and does not listen"
            logger.warning("the app goes on although its client has left, %s: it is cancelled (%s)", ending, self.name)
        super()._cancel()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.abort()
        if self._websocket.state is not WebsocketState.CLOSED:
            super()._hang_up()

    def _give_up(self) -> None:
        if self._connection is not None:
            self._connection.abort()
        super()._give_up()


class _GuestCycle(_Cycle):
    """One HTTP request through an ASGI app, on the loop of the ASGI server that lies outside (C2).

    The thread is that of a WsgiToAsgi, which has a window of its own on the way to the server.
    """

    __slots__ = ("lent_loop",)

    def __init__(
        self, owner: AsgiToWsgi, environ: WSGIEnvironment, start_response: StartResponse, loop: LentLoop
    ) -> None:
        self.lent_loop = loop
        life = owner._guest_lives.get(loop.key) or owner._add_guest_life(loop.key)
        super().__init__(owner, life, environ, start_response)

    def _build_scope(self) -> dict[str, Any]:
        scope = super()._build_scope()
        outer = outer_scope(self._environ)
        if outer is not None:
            inherit(scope, outer)
        return scope

    def begin(self) -> Iterable[bytes]:
        """Run the app until its response begins; give it whole, if that was all of it."""
        result = super().begin()
        if self._ended and self._whole and len(self._blocks) == 1 and not (self._errors or self._response.trailers):
            answer = WholeAnswer(self._blocks)
            self.close()
            return answer
        return result

    def _open(self) -> None:
        if self._response.has_trailers:
            self._environ["wsgi.ext.http.send_trailers"]([])  # which are told of in http.response.start
        super()._open()

    def _get_state(self) -> dict[str, Any]:
        outer = outer_scope(self._environ)
        state: dict[str, Any] = {} if outer is None else outer.get("state", {})  # the very object
        for name, value in self._life.state.items():
            state.setdefault(name, value)
        return state


# -- Theory -----------------------------------------------------------------------------------------------------------
#
# The server's thread is the cycle's, which waits for it; its guest, a WsgiToAsgi inside, borrows it for steps. Within a
# step it may wait itself: then it does all that it does where it waits between steps, but for the next step.
#
# The guest's app may have other threads, which wait as well: for a piece of wsgi.input, or for an AsgiToWsgi inside of
# the guest. They wait side by side, each by a Turn of its own: the server's thread by the cycle's, each other by one
# that it makes. So each may lead the loop, and none waits for another's wait; and they may go on when the guest has
# ended, as long as there is the loop. `wake` tells all of them, for each to look at what it waits for.
#
# Whose is what the cycle asks for: the response is the server's thread's alone. A chunk of the body is read by a thread
# that wants the body, as it would do without us. For the server's thread may be in a step, and wait for that thread; or
# it may be wanted for the next step, and the client waits for that block before it sends on. Only where no such
# thread is (`_readers`) the server's own reads. So a reader enters the list before it wants anything, and when it
# leaves it, tells the server's thread of a wish that nobody has taken.
#
# `_stepping` is locked by the thread that runs a step, which is the server's. Whoever closes the request has the guest
# come to its end: by itself if no step is under way; else whoever runs the step does it, when it is over. Both say
# first what they do, and look at the other after it: so one of them sees the other. The lock is only ever tried.


class _LentThread:
    """The server's thread of a request, while it is lent; see `nesting.LentThread`."""

    __slots__ = ("_cycle", "_finish", "_leaving", "_runner", "_stepping", "_turns", "_waits")

    def __init__(self, cycle: _Cycle) -> None:
        self._cycle = cycle
        self._finish: Callable[[], None] = _nothing_to_finish
        self._leaving = False  # the server has done with the request
        self._runner = 0  # who runs a step
        self._stepping = threads.Lock()
        self._turns: list[Turn] = []  # of the guest's other threads that wait
        self._waits = False  # the server's thread does, in a step

    # In the loop

    def begin(self, finish: Callable[[], None]) -> bool:
        self._finish = finish
        self._cycle._lent = self
        return not self._cycle.closed  # the thread sets this, then looks for a guest: one of us sees the other

    def ask(self, step: Callable[[], Callable[[], object]]) -> None:
        cycle = self._cycle
        if cycle._lent is self:  # else it was given back, and may have been lent to another
            cycle._step = step
            cycle._loop.tell(cycle._turn)

    def wake(self) -> None:
        cycle = self._cycle
        if self._waits:
            cycle._loop.tell(cycle._turn)
        if self._turns:
            for turn in self._turns[:]:
                cycle._loop.tell(turn)

    @property
    def given(self) -> int:
        return self._cycle._given

    @property
    def loop_is_busy(self) -> bool:
        return self._cycle._loop.is_busy()

    # The server's thread, and what it runs

    def run(self, step: Callable[[], T]) -> T | None:
        """Run a step, which may block as long as it likes."""
        if not self._stepping.acquire(blocking=False):
            return None  # another thread closes the request, and runs what is left
        self._cycle._loop.keep()
        self._runner = threads.who()
        try:
            return step()
        finally:
            self._runner = 0
            self._stepping.release()
            if self._leaving:
                self._end_steps()

    def leave(self) -> None:
        """Have the guest come to its end: the thread is about to leave."""
        self._leaving = True
        self._end_steps()

    def _end_steps(self) -> None:
        if self._stepping.acquire(blocking=False):
            self._runner = threads.who()
            try:
                self._finish()
            finally:
                self._runner = 0
                self._stepping.release()

    def serve(self, until: Callable[[], bool], callback: Callable[[], object] | None, reads: bool) -> None:
        if self._runner != threads.who():
            self._wait_beside(until, callback, reads)
            return
        self._waits = True
        try:
            self._cycle._serve(until, callback)
        finally:
            self._waits = False

    def _wait_beside(self, until: Callable[[], bool], callback: Callable[[], object] | None, reads: bool) -> None:
        cycle, turn = self._cycle, Turn()
        if cycle._left and cycle._pool is not None:
            raise RuntimeError("the request has ended, and its event loop with it")
        self._turns.append(turn)
        try:
            cycle._wait_beside(turn, until, callback, reads)
        finally:
            self._turns.remove(turn)

    def give_back(self) -> None:
        self._finish = _nothing_to_finish
        self._cycle._lent = None
        self._cycle._step = None

    def leave_loop(self) -> None:
        self._cycle._loop.hand_over()

    @property
    def writes(self) -> bool:
        return self._cycle._lets_write()

    def post(self, callback: Callable[[], object]) -> None:
        self._cycle._loop.post(callback)

    def has_left(self) -> bool:
        cycle = self._cycle
        if cycle._gone:
            return True
        probe = _find_probe(cycle._environ)
        return probe is not None and probe()


def _nothing_to_finish() -> None:
    pass


class _Result:
    """What the server gets: the blocks of a cycle's response."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: _Cycle) -> None:
        self._cycle = cycle

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return self._cycle.next_block()

    def close(self) -> None:
        self._cycle.close()

    def __del__(self) -> None:
        # Broken servers and middleware drop it without close(). As in AsgiToWsgi's: not in this thread.
        if not self._cycle.closed:
            with contextlib.suppress(RuntimeError):
                threads.start(partial(self._close_late, self._cycle), "bridge-closer")

    @staticmethod
    def _close_late(cycle: _Cycle) -> None:
        try:
            cycle.close()
        except BaseException:
            logger.exception("the app failed after its response")


@types.coroutine
def _yield_once() -> Generator[None, None, None]:
    """Come back at the loop's next turn."""
    yield


def _refuse(status: str, headers: list[tuple[str, str]], words: str, start_response: StartResponse) -> Iterable[bytes]:
    text = f"{words}\n".encode("utf-8", "replace")
    described = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text)))]
    start_response(status, described + headers)
    return [text]


@functools.cache  # once is enough
def _ask_for_websockets() -> None:
    logger.warning(
        "a client asks for a WebSocket, and gets plain http: for WebSockets, install wsgi-asgi-bridge[websocket]"
    )


def _client_left() -> ClientDisconnected:
    # Servers know by the number that nobody has made a mistake.
    return ClientDisconnected(errno.ECONNRESET, "the client left before the whole response was sent")


def _tells_of_leaving(error: BaseException | None) -> bool:
    """Whether an app's error only says that its client has left, or that it was cancelled for that.

    Starlette raises a ClientDisconnect of its own while it handles ours, and its BaseHTTPMiddleware a RuntimeError if
    the app inside has left without a response. What else fails meanwhile, as a clean-up does, is a mistake of the
    app's.
    """
    while error is not None:
        if isinstance(error, ClientDisconnected) or is_cancellation(error):
            return True
        if type(error) is RuntimeError and type(error.__cause__) is EndOfStream:
            return True
        if isinstance(error, BaseExceptionGroup):
            return all(map(_tells_of_leaving, cast("BaseExceptionGroup[BaseException]", error).exceptions))
        error = error.__cause__ or (error.__context__ if "Disconnect" in type(error).__name__ else None)
    return False


def _tells_of_disconnect(error: BaseException) -> bool:
    """The same of a WebSocket's app, which may say so in its framework's word."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_tells_of_disconnect, cast("BaseExceptionGroup[BaseException]", error).exceptions))
    return type(error).__name__ in _DISCONNECTS or _tells_of_leaving(error)


def _explain(error: BaseException) -> None:
    """Add to an error of another event loop what to do about it."""
    with contextlib.suppress(Exception):  # whatever the error's class makes of being asked
        if _tells_of_another_loop(error):
            error.add_note(LOOP_NOTE)


def _tells_of_another_loop(error: BaseException) -> bool:
    """Whether an app's error says that it used in one event loop what it had made in another."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(_tells_of_another_loop, cast("BaseExceptionGroup[BaseException]", error).exceptions))
    # asyncio's locks and queues, its futures and tasks, in their words.
    words = ("different event loop", "different loop", "Event loop is closed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _wake(futures: list[asyncio.Future[None]]) -> list[asyncio.Future[None]]:
    """End the wait of each, and give back the new list of those who wait."""
    for future in futures:
        if not future.done():
            future.set_result(None)
    return []


def _find_probe(environ: WSGIEnvironment) -> Callable[[], bool] | None:
    """What tells whether the client has left, None where nothing does."""
    probe: Callable[[], bool] | None = environ.get("waitress.client_disconnected")
    if probe is None and environ.get("SERVER_PROTOCOL") in ("HTTP/1.1", "HTTP/1.0"):  # HTTP/2 shares it between streams
        sock = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
        if sock is not None:
            return partial(_has_left, sock)
    return probe


def _find_farewell(environ: WSGIEnvironment) -> Callable[[], bool] | None:
    """What tells whether the server is about to end, None where nothing does.

    gunicorn's workers wait for all requests to end before they go, and are killed if that takes long. Nothing but the
    handler of its signal leads to the worker.
    """
    worker: Any = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if "gunicorn.socket" in environ and isinstance(getattr(worker, "alive", None), bool):
        return lambda: not worker.alive
    return None


def _has_left(sock: socket.socket) -> bool:
    """Whether the peer has closed its end, seen without a read: whatever it has sent before stays where it is.

    A peer that has only ended its sending counts as gone, as it does for most servers.
    """
    try:
        hang_up = getattr(select, "POLLRDHUP", 0)  # Linux: behind unread data, and under TLS, as well
        if isinstance(sock, ssl.SSLSocket) and not hang_up:
            return False
        if threads.poll is None:  # Windows
            is_ready = bool(select.select([sock], [], [], 0)[0])
        else:  # select() takes no descriptor above 1023
            poll = threads.poll()
            poll.register(sock.fileno(), hang_up or select.POLLIN)
            is_ready = bool(poll.poll(0))
        return is_ready and (bool(hang_up) or not sock.recv(1, socket.MSG_PEEK))
    except (OSError, ValueError):  # reset, or closed by the server
        return True
