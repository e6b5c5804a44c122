"""Life: what an app has in one process: its lifespan, its loops and its requests; startup, shutdown, exit and fork."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import logging
import math
import os
import sys
import threading
import time
import traceback
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from bridge import threads
from bridge.errors import LifespanFailure, shown_requests
from bridge.lifespan import Lifespan, Stage
from bridge.loops import LoopPool, Turn, TurnedLoop, notice_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from bridge.loops import LentLoop

__all__ = ["GuestLife", "Life", "Request"]

WAIT_SECONDS = 0.005
"""How often a shutdown looks whether the requests in flight have ended."""

NOTICE_SECONDS = 2.0
"""After that a shutdown says what it waits for: before the patience ends of whoever waits for the shutdown."""

SHUTDOWN_SECONDS = 30.0
"""How long the requests in flight may take to end, and then the app's shutdown, before they are given up: gunicorn's
grace."""

EXIT_SECONDS = 5.0
"""The same at the interpreter's exit, which servers wait for with less patience."""

MARGIN_SECONDS = 1.0
"""What is added for whoever waits for somebody that keeps to the same limit."""

logger: logging.Logger = logging.getLogger("bridge")


class Request(Protocol):
    """A request, as a life knows it.

    Attributes:
        meets: Whether it wants to be with others, on one loop.
        lent_loop: The loop outside of ours that it has come by, if it has.
        closed: Whether the server has done with it.
    """

    meets: bool
    lent_loop: LentLoop | None
    closed: bool

    @property
    def app(self) -> Any:
        """The ASGI app that it is for."""
        ...

    @property
    def name(self) -> str:
        """What it is called in a log."""
        ...

    @property
    def loop(self) -> TurnedLoop | None:
        """The loop that it was given, if it has been."""
        ...

    @property
    def streams(self) -> bool:
        """Whether its response has begun, and goes on."""
        ...

    def go_away(self) -> None:
        """The app is about to be shut down: end what would never end by itself."""
        ...

    def runs_in(self, native: asyncio.AbstractEventLoop) -> bool:
        """Whether its task does."""
        ...


class Life:
    """What an app has in this process: its lifespan and its loops.

    `_mutex` is held during startup and shutdown: threads that race for the first request wait for the one that starts,
    and hear it if that one has waited in vain. A startup that blocks its loop holds the thread that runs it, and the
    mutex with it, for as long as it likes; who waits for the mutex does not.
    A request enters without it: it says that it is there, then looks whether the app still lives; who stops the app
    says that it does not, then looks who is there. So one of them sees the other.

    A life that has started is held by this module, and with it its tasks, which loops hold weakly, and its loops: the
    garbage collector would end them by force, together with a wrapper that was dropped. It knows neither the wrapper
    nor, but for its lifespan, the app.

    Attributes:
        started: Whether requests can be served.
        requests: The requests in flight.
        shared: The process's loop for this app; None if each request has its own.
        common: The loop of its WebSockets, and of all requests from then on, where ``loop="auto"`` has come to loops
            for requests; made for the first WebSocket.
        pool: The loops for one request each.
        state: What the app left at startup.
    """

    started: bool
    pool: LoopPool

    def __init__(
        self,
        loop: str,
        loop_factory: Callable[[], asyncio.AbstractEventLoop],
        lifespan: str,
        startup_timeout: float | None,
    ) -> None:
        self.loop_factory = loop_factory
        self._loop_wish = loop
        self._lifespan_wish = lifespan
        self._startup_timeout = startup_timeout
        self.reset()
        _every.add(self)

    def reset(self) -> None:
        """Begin anew: at first, and in a child after a fork."""
        self.started = False
        self.requests: set[Request] = set()
        self.shared: TurnedLoop | None = None
        self.common: TurnedLoop | None = None
        self.pool = LoopPool(self.loop_factory)
        self.state: dict[str, Any] = {}
        self._home: _Home | None = None
        self._common_mutex = threads.BriefMutex()  # guards the making of `common`
        self._mutex = threads.Mutex()
        self._late_startups = 0
        self._late_message = ""  # of the last of them

    def enter(self, request: Request) -> TurnedLoop:
        """Let a request in; the app is started for the first one.

        WebSockets meet: what one of them says, the app tells the others. So they have a loop in common, unless the user
        asks for one each. And a plain request meets them there, as soon as there are any: what a view has to say to
        a WebSocket, to the group of a Channels layer for one, would arrive late from another loop, if at all.

        Returns:
            The loop that it is to use.
        """
        while True:
            if os.getpid() != _pid:
                _notice_fork()
            if not self.started:
                self.start(request.app)
            self.requests.add(request)
            try:
                if self.started:
                    return self.shared or self._get_common(request.meets) or self.pool.take()
            except BaseException:
                self.requests.discard(request)
                raise
            self.requests.discard(request)

    def start(self, app: Any) -> None:
        _notice_fork()
        if _starting.get() is self:
            raise _asked_too_early()
        late_startups = self._late_startups
        with self._changing(self._startup_timeout):
            if self.started:
                return
            if self._late_startups != late_startups:  # while we waited: many more would wait as long as that, in turn
                raise LifespanFailure(self._late_message)
            _register_exit()
            if self._lifespan_wish != "off":
                self._start_lifespan(app)
            if self._shares_loop():
                self.shared = self._home.loop if self._home else TurnedLoop(self.loop_factory, needs_keeper=True)
            self.started = True
            _started.add(self)

    def _get_common(self, make: bool) -> TurnedLoop | None:
        """The loop in common, if there shall be one. Not under `_mutex`: who holds it may wait for this request."""
        if make and self.common is None and self._loop_wish == "auto":
            with self._common_mutex:
                if self.started and self.common is None:
                    self.common = TurnedLoop(self.loop_factory, needs_keeper=True)
        return self.common

    def _shares_loop(self) -> bool:
        if threads.is_patched():
            return True  # gevent's locks do not hold between many real threads
        if self._loop_wish == "auto":
            # Greenlets come by hundreds, and a loop for each would take a real thread for each.
            return self._home is not None or not threads.may_run_loops()
        return self._loop_wish == "shared"

    def _start_lifespan(self, app: Any) -> None:
        home = _Home(app, self.loop_factory)
        token = _starting.set(self)  # the lifespan's task and what it starts see it
        try:
            home.start(self._startup_timeout)
        finally:
            _starting.reset(token)
        if home.lifespan.has_started:
            self._home, self.state = home, home.lifespan.state
            return
        home.loop.close()
        try:
            _check_refusal(home.lifespan, self._lifespan_wish)
        except LifespanFailure as error:
            if home.lifespan.stage is Stage.LATE:
                self._late_startups += 1
                self._late_message = str(error)
            raise

    @contextlib.contextmanager
    def _changing(self, timeout: float | None) -> Generator[None]:
        """Hold the mutex; an error if this thread does already, in the middle of which a signal's handler runs.

        Args:
            timeout: How long whoever else holds it may do so; a little more, for it may keep to the same limit.
        """
        me, other = threads.Holder(), self._mutex.holder
        if other is not None and other.who == me.who:
            raise RuntimeError("a startup or a shutdown of this app is under way in this very thread")
        try:
            self._wait_for_change(me, math.inf if timeout is None else timeout + MARGIN_SECONDS)
            yield
        finally:
            self._mutex.release(me)

    def _wait_for_change(self, me: threads.Holder, limit: float) -> None:
        while not self._mutex.acquire(me, 0):
            other = self._mutex.holder
            rest = limit if other is None else other.since + limit - me.since
            if self._mutex.acquire(me, rest):
                return
            if other is not None and self._mutex.holder is other:
                raise LifespanFailure(
                    "a startup or a shutdown of the app has been under way for "
                    f"{time.monotonic() - other.since:.3g} s, it is left {_shown_thread(other.who)}"
                )

    def stop(self, timeout: float = SHUTDOWN_SECONDS) -> None:
        _notice_fork()
        running = asyncio._get_running_loop()
        try:
            with self._changing(3 * timeout):
                if not self.started:
                    return
                if running is not None and self._lives_in(running):
                    raise RuntimeError("close() was called in the app's own event loop, which it has to wait for")
                self._stop(timeout)
        except LifespanFailure as error:
            logger.error("the app cannot be shut down: %s", error)

    def _stop(self, timeout: float) -> None:
        """End this life, or leave what cannot be ended to a thread of its own: code of the app may block its loop."""
        self.started = False
        home, pool = self._home, self.pool
        with self._common_mutex:  # from here on nobody makes one
            shared = self.shared or self.common
        try:
            end = partial(self._end, home, shared, pool, timeout)
            try:
                wait = threads.begin(end)
            except RuntimeError:  # can't start new thread: the interpreter is on its way out
                end()
                return
            if not wait(3 * timeout):  # for the requests, for the shutdown, and for what is then cancelled
                leaders = {loop.leader for loop in (shared, home.loop if home else None) if loop is not None}
                places = " and ".join(map(_shown_thread, leaders - {0})) or "alone"
                logger.error("the app has not ended within %.3g s: its event loop is left %s", 3 * timeout, places)
        finally:
            self.pool = LoopPool(self.loop_factory)
            self.shared = self.common = self._home = None
            self.state = {}
            _started.discard(self)

    def _end(self, home: _Home | None, shared: TurnedLoop | None, pool: LoopPool, timeout: float) -> bool:
        try:
            for request in list(self.requests):
                request.go_away()
            self._wait_for_requests(timeout)
            if home is not None:
                home.stop(timeout)
        except Exception:
            logger.exception("the app could not be shut down")
        finally:
            for loop in (shared, home.loop if home else None):
                if loop is not None:
                    loop.close()  # twice is once
            pool.close()
        return True

    def _lives_in(self, native: asyncio.AbstractEventLoop) -> bool:
        home = self._home
        return (home is not None and home.loop.native is native) or any(
            request.runs_in(native) for request in list(self.requests)
        )

    def _wait_for_requests(self, timeout: float) -> None:
        for _ in _until_empty(self.requests, timeout):
            threads.pause(WAIT_SECONDS)


class _Home:
    """Where an app's lifespan lives: the loop, and the task in which the app starts and shuts down.

    Attributes:
        loop: It is shared by the requests, unless each is to have its own.
        lifespan: How far the app has come.
    """

    def __init__(self, app: Any, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.loop = TurnedLoop(loop_factory, needs_keeper=True)
        self.lifespan = Lifespan(app, self._tell)
        self._turn = Turn()  # of the thread that starts or stops the app
        self._task: asyncio.Task[None] | None = None  # loops hold their tasks weakly
        self._timer: asyncio.TimerHandle | None = None  # of the stage that the app is in

    def start(self, timeout: float | None) -> None:
        """Run the app until it has started, or has not. If an interrupt comes, the loop is closed."""

        def begin() -> None:
            self._task = self.loop.native.create_task(self.lifespan.run())
            if timeout is not None:
                self._set_timer(timeout)

        try:
            self._turn.told = False
            self.loop.wait(self._turn, begin)
        except BaseException:
            self.loop.close()
            raise

    def stop(self, timeout: float) -> None:
        """Have the app shut down, and say in the log if it did not."""

        def begin() -> None:
            self.lifespan.stop()
            self._set_timer(timeout)

        callback: Callable[[], None] | None = begin
        while True:
            self._turn.told = False  # before we look: where the keeper leads, the app stops while we do
            if self.lifespan.stage is Stage.STOPPED:
                break
            self.loop.wait(self._turn, callback)
            callback = None
        _log_stop(self.lifespan)

    def _set_timer(self, seconds: float) -> None:
        self._timer = self.loop.native.call_later(seconds, self.lifespan.give_up, seconds)

    def _tell(self) -> None:
        if self._timer is not None:  # else it would come in the middle of the next stage, and end that
            self._timer.cancel()
            self._timer = None
        self.loop.tell(self._turn)


def _until_empty(requests: set[Request], timeout: float) -> Iterator[None]:
    """Go on as long as there are requests; say in the log what is waited for, and what is left when the time is over.

    They are dropped then: nobody shall wait for them again.
    """
    began = time.monotonic()
    told = False
    # One look for both questions: a request that finds us stopping is among them for a moment (`Life.enter`).
    while (left := list(requests)) and time.monotonic() < began + timeout:
        if not told and time.monotonic() > began + NOTICE_SECONDS:
            told = True
            logger.warning("the shutdown waits for %s", _in_app(requests))
        yield
    if left:
        logger.error("the shutdown leaves alone what has not ended in %.3g s: %s", timeout, _in_app(requests))
    requests.difference_update(left)


def _in_app(requests: set[Request]) -> str:
    """Requests in flight, as a log names them."""
    return shown_requests([request.name for request in list(requests)])


def _last_place(error: BaseException | None) -> str:
    """Where an app stood that was cancelled."""
    if error is None or error.__traceback__ is None:
        return ""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"; it waited in {frame.name}() ({frame.filename}:{frame.lineno})"


def _shown_thread(ident: int) -> str:
    """Where a thread stands that should be elsewhere."""
    name = next((thread.name for thread in threading.enumerate() if thread.ident == ident), str(ident))
    frame = sys._current_frames().get(ident)
    place = f", in {frame.f_code.co_name}() ({frame.f_code.co_filename}:{frame.f_lineno})" if frame is not None else ""
    return f"to the thread {name}{place}"


class GuestLife:
    """What an app has on a loop that lies outside of ours (C2): a lifespan there.

    It starts with the first request, and ends when the server outside shuts down: behind its last request, and behind
    what requests have left in the background, which the server does not see, since its thread is back.

    Args:
        app: The ASGI app.
        lifespan: The wish of whoever wrapped it.
        startup_timeout: Seconds that it may take to start.
        forget: Called at the end: a later request shall have another life.

    Attributes:
        requests: The requests in flight.
        state: What the app left at startup.
    """

    shared: TurnedLoop | None = None
    common: TurnedLoop | None = None
    pool: LoopPool | None = None

    def __init__(self, app: Any, lifespan: str, startup_timeout: float | None, forget: Callable[[], object]) -> None:
        self.requests: set[Request] = set()
        self.state: dict[str, Any] = {}
        self._app = app
        self._lifespan_wish = lifespan
        self._startup_timeout = startup_timeout
        self._forget = forget
        self._started = False
        self._lifespan: Lifespan | None = None
        self._lifespan_task: Any = None  # asyncio holds its tasks weakly
        self._tell: Callable[[], None] = _nothing  # whoever waits for the lifespan to change
        self._mutex = threading.Lock()  # held during startup
        self._late_startups = 0
        self._late_message = ""  # of the last of them

    def enter(self, request: Request) -> LentLoop:
        """Let a request in; the app is started for the first one."""
        loop = request.lent_loop
        assert loop is not None
        if not self._started:
            if _starting.get() is self:
                raise _asked_too_early()
            late_startups = self._late_startups
            with self._mutex:
                if self._late_startups != late_startups:  # while we waited: many more would wait as long, in turn
                    raise LifespanFailure(self._late_message)
                if not self._started:
                    self._start(loop)
                    loop.at_shutdown(self._stop)
                    self._started = True
        self.requests.add(request)
        return loop

    def _start(self, loop: LentLoop) -> None:
        if self._lifespan_wish == "off":
            return
        turn = Turn()
        lifespan = Lifespan(self._app, lambda: self._tell())
        self._tell = lambda: loop.tell(turn)
        timer: Any = None

        def begin() -> None:
            nonlocal timer
            self._lifespan_task = loop.native.create_task(lifespan.run())
            if self._startup_timeout is not None:
                timer = loop.native.call_later(self._startup_timeout, lifespan.give_up, self._startup_timeout)

        def end() -> None:
            if timer is not None:
                timer.cancel()
            if not (lifespan.has_started or self._lifespan_task is None):
                self._lifespan_task.cancel()

        context = contextvars.Context()  # not the request's, which the app's own tasks would go on to see
        context.run(_starting.set, self)
        try:
            context.run(loop.wait, turn, begin)
        finally:
            self._tell = _nothing
            loop.post(end)
        if lifespan.has_started:
            self._lifespan, self.state = lifespan, lifespan.state
            return
        try:
            _check_refusal(lifespan, self._lifespan_wish)
        except LifespanFailure as error:
            if lifespan.stage is Stage.LATE:
                self._late_startups += 1
                self._late_message = str(error)
            raise

    async def _stop(self) -> None:
        self._forget()
        for _ in _until_empty(self.requests, SHUTDOWN_SECONDS):
            await anyio.sleep(WAIT_SECONDS)
        if self._lifespan is not None:
            await self._stop_lifespan(self._lifespan)

    async def _stop_lifespan(self, lifespan: Lifespan) -> None:
        changed = anyio.Event()
        self._tell = changed.set
        with anyio.move_on_after(SHUTDOWN_SECONDS):
            lifespan.stop()
            while lifespan.stage is not Stage.STOPPED:
                await changed.wait()
                changed = anyio.Event()
                self._tell = changed.set
        if lifespan.stage is not Stage.STOPPED:
            lifespan.message = f"it took longer than {SHUTDOWN_SECONDS} s"
            self._lifespan_task.cancel()
        _log_stop(lifespan)


def _nothing() -> None:
    pass


def _asked_too_early() -> RuntimeError:
    return RuntimeError("the app asked its own wrapper for an answer before its startup was complete")


def _check_refusal(lifespan: Lifespan, wish: str) -> None:
    """Raise if an app that has not started refused to, or if it knows no lifespan and has to."""
    if isinstance(lifespan.error, (KeyboardInterrupt, SystemExit)):
        raise lifespan.error
    if lifespan.stage is Stage.LATE:
        place = _last_place(lifespan.error)
        raise LifespanFailure(f"the app did not start: {lifespan.message}{place}") from lifespan.error
    if lifespan.stage is Stage.FAILED:
        raise LifespanFailure(f"the app refused to start: {lifespan.message}") from lifespan.error
    if wish == "on":
        raise LifespanFailure("the app knows no lifespan, and lifespan='on' asks for one") from lifespan.error


def _log_stop(lifespan: Lifespan) -> None:
    if lifespan.message:
        logger.error("the app refused to stop: %s", lifespan.message)
    elif lifespan.error is not None:
        logger.error("the app failed when it was to stop", exc_info=lifespan.error)


_every: weakref.WeakSet[Life] = weakref.WeakSet()
_starting: contextvars.ContextVar[Life | GuestLife | None] = contextvars.ContextVar("bridge.starting", default=None)
_started: set[Life] = set()
_exit_registered = False
_pid = os.getpid()
_noticing = threading.Lock()  # threads of a child that notice at once


def _register_exit() -> None:
    """Shut down at the interpreter's exit, while the app can still use worker threads.

    concurrent.futures stops its threads before `atexit` handlers run, so theirs is the place: what is registered later
    runs earlier. `bridge.loops`, imported above, has brought concurrent.futures in.
    """
    global _exit_registered
    if not _exit_registered:
        _exit_registered = True
        register = getattr(threading, "_register_atexit", atexit.register)
        with contextlib.suppress(RuntimeError):  # the interpreter is on its way out already
            register(_at_exit)


def _at_exit() -> None:
    threads.spare_exit()
    # Each waits for requests, for the shutdown, and for what is then cancelled. An app that blocks its loop is left.
    deadline = time.monotonic() + 3 * EXIT_SECONDS + MARGIN_SECONDS
    for wait in [threads.begin(partial(life.stop, EXIT_SECONDS)) for life in list(_started)]:
        wait(max(0.0, deadline - time.monotonic()))


def _after_fork() -> None:
    global _pid
    _pid = os.getpid()
    _started.clear()
    for life in list(_every):
        life.reset()


def _notice_fork() -> None:
    """Begin anew in a child that nobody has told of the fork.

    uWSGI forks its workers without a word to Python, unless it is run with ``--py-call-osafterfork``. Apps that were
    used before, and not only wrapped, then have loops whose threads are missing.
    """
    if os.getpid() != _pid:
        with _noticing:
            notice_fork()
            if os.getpid() != _pid:
                _after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
