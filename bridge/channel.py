"""The only door between a thread and a loop. Neither HTTP, WSGI nor ASGI is known here.

A hand-over is nearly free, a wake-up is dear: so whoever hands something over wakes the other side only if it sleeps,
and the threads that ring one loop at the same time share one wake-up of it.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import functools
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import anyio
from anyio.lowlevel import current_token

from bridge import threads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from anyio.lowlevel import EventLoopToken

__all__ = ["Closed", "Door", "SideTask", "StepsToLoop", "StepsToThread", "ToLoop", "ToThread", "current_door"]

T = TypeVar("T")

PATIENCE = 0.03
"""Seconds after which a sleeper is told that it takes long: a client's leaving shall be noticed within 100 ms, and a
request that is answered sooner shall pay for no watch."""


class Closed(Exception):
    """Raised where a thread uses a channel that is closed, or of which the loop is."""


# -- The door ---------------------------------------------------------------------------------------------------------
#
# One Door stands before each running loop. Threads ring it with a callback, which then runs in the loop. `_rung` says
# that an answer is on its way, so that no one else needs to wake the loop:
#
#   thread                                    loop
#   append the callback                       _rung = False
#   if not _rung: _rung = True, wake the loop run callbacks until there are none
#
# The order on the loop's side matters: a callback that comes after the last look finds _rung False and wakes the loop
# again. Two threads may both find it False; then the loop is woken twice, which is harmless.


class Sleeper(Protocol):
    """What one task of the loop waits on; made by the door, awaited once."""

    def __await__(self) -> Any: ...


class SideTask(Protocol):
    """What `Door.start` has started."""

    def cancel(self) -> object: ...


class Door(abc.ABC):
    """How threads reach one running loop. Get it by `current_door`.

    Attributes:
        native: The event loop, or trio's token.
        thread: The ident of the loop's thread.
        token: anyio's token, for ``anyio.from_thread.run(..., token=)``.
    """

    def __init__(self, native: object) -> None:
        self.native = native
        self.thread: int = threading.get_ident()
        self.token: EventLoopToken = current_token()
        self._callbacks: deque[Callable[[], object]] = deque()
        self._rung = False
        # Callbacks run in no one's context: not in that of the request whose thread happened to ring.
        self._context = contextvars.Context()
        # Who shall be told that it takes long, in two generations: the elder has waited a whole sweep.
        self._recent: dict[object, Callable[[], None]] = {}
        self._elder: dict[object, Callable[[], None]] = {}
        self._sweeping = False

    @abc.abstractmethod
    def make_sleeper(self) -> Sleeper:
        """Something that a task can await, and that ``wake`` ends."""

    @abc.abstractmethod
    def wake(self, sleeper: Any) -> None:
        """End a sleeper's wait, from within the loop; harmless if it has ended."""

    @abc.abstractmethod
    def start(self, function: Callable[[], Coroutine[Any, Any, None]]) -> SideTask:
        """Run a coroutine function, which must not raise, in a task beside the one that runs. In the loop only.

        A task group costs a short request more than the rest of its crossing, and ends with whoever opened it.
        """

    @abc.abstractmethod
    async def join(self, task: Any) -> None:
        """Wait until such a task has ended."""

    @abc.abstractmethod
    def _call_soon(self, callback: Callable[[], None]) -> None:
        """Wake the loop to run a callback. Raises RuntimeError if the loop has ended."""

    @abc.abstractmethod
    def _call_later(self, delay: float, callback: Callable[[], None]) -> None:
        """Run a callback after some seconds, from within the loop."""

    def runs_here(self) -> bool:
        """Whether the caller is within the loop.

        Any of a `TurnedLoop`'s threads may run it. A patched loop may be run by a greenlet, and asyncio's mark is its
        whole thread's.
        """
        if asyncio._get_running_loop() is not self.native:
            return False
        return not threads.is_patched() or threading.get_ident() == self.thread

    def ring(self, callback: Callable[[], object]) -> None:
        """Have the loop run a callback, which must not raise; from any thread.

        Raises:
            Closed: The loop has ended.
        """
        self._callbacks.append(callback)
        if not self._rung:
            self._rung = True
            try:
                self._call_soon(self._answer)
            except RuntimeError as error:  # trio.RunFinishedError is one, too
                self._rung = False  # no answer is on its way, as the next thread shall be told as well
                raise Closed("the event loop has ended") from error

    def _answer(self) -> None:
        self._rung = False
        callbacks = self._callbacks
        while callbacks:
            callbacks.popleft()()

    def alarm(self, key: object, callback: Callable[[], None]) -> None:
        """Call back, once, after PATIENCE to twice that, unless `disarm` comes first. In the loop only.

        One timer serves all: a timer for each request would cost as much as the rest of its crossing.
        """
        self._recent[key] = callback
        if not self._sweeping:
            self._sweeping = True
            self._call_later(PATIENCE, self._sweep)

    def disarm(self, key: object) -> None:
        """Take an alarm back, if it has not gone off. In the loop only."""
        if self._recent.pop(key, None) is None:
            self._elder.pop(key, None)

    def _sweep(self) -> None:
        due, self._elder, self._recent = self._elder, self._recent, {}
        self._sweeping = bool(self._elder)
        if self._sweeping:
            self._call_later(PATIENCE, self._sweep)
        for callback in due.values():
            callback()


class _AsyncioDoor(Door):
    """asyncio's loop and uvloop."""

    native: asyncio.AbstractEventLoop

    def make_sleeper(self) -> asyncio.Future[None]:
        return self.native.create_future()

    def wake(self, sleeper: asyncio.Future[None]) -> None:
        if not sleeper.done():  # a cancelled one is
            sleeper.set_result(None)

    def start(self, function: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        # Not by the loop's factory, which may run it at once, as asyncio.eager_task_factory does: it starts beside us.
        return asyncio.Task(function(), loop=self.native)

    async def join(self, task: asyncio.Task[None]) -> None:
        await asyncio.wait([task])

    def _call_soon(self, callback: Callable[[], None]) -> None:
        self.native.call_soon_threadsafe(callback, context=self._context)

    def _call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.native.call_later(delay, callback, context=self._context)


class _EventSleeper:
    """anyio's Event as a Sleeper."""

    def __init__(self) -> None:
        self.event = anyio.Event()

    def __await__(self) -> Any:
        return self.event.wait().__await__()


class _TrioSideTask:
    """A system task of trio's that can be cancelled."""

    def __init__(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        import trio

        self._function = function
        self._scope = trio.CancelScope()
        self._ended = False
        self._joined: anyio.Event | None = None

    async def run(self) -> None:
        with self._scope:
            if not self._scope.cancel_called:  # trio would start it all the same
                await self._function()
        self._ended = True
        if self._joined is not None:
            self._joined.set()

    def cancel(self) -> None:
        self._scope.cancel()

    async def join(self) -> None:
        if not self._ended:
            self._joined = anyio.Event()
            await self._joined.wait()


class _TrioDoor(Door):
    """trio, by its token."""

    native: Any

    def make_sleeper(self) -> _EventSleeper:
        return _EventSleeper()

    def wake(self, sleeper: _EventSleeper) -> None:
        sleeper.event.set()

    def start(self, function: Callable[[], Coroutine[Any, Any, None]]) -> _TrioSideTask:
        import trio.lowlevel

        task = _TrioSideTask(function)
        trio.lowlevel.spawn_system_task(task.run, context=contextvars.copy_context())
        return task

    async def join(self, task: _TrioSideTask) -> None:
        await task.join()

    def runs_here(self) -> bool:
        import trio.lowlevel

        try:
            return trio.lowlevel.current_trio_token() is self.native
        except RuntimeError:  # the caller is in none of trio's
            return False

    def _call_soon(self, callback: Callable[[], None]) -> None:
        self.native.run_sync_soon(callback)

    def _call_later(self, delay: float, callback: Callable[[], None]) -> None:
        import trio.lowlevel

        async def later() -> None:
            await trio.sleep(delay)
            callback()

        # Trio has no timers outside of tasks. A system task belongs to no request, and may outlive it.
        trio.lowlevel.spawn_system_task(later, context=contextvars.Context())


class _ThreadDoor(threading.local):
    door: Door | None = None


_local = _ThreadDoor()


def current_door() -> Door:
    """The door of the loop that runs in this thread."""
    loop = asyncio._get_running_loop()
    door = _local.door
    if door is None or loop is None or door.native is not loop:
        door = _local.door = _make_door(loop, door)
    return door


def _make_door(loop: asyncio.AbstractEventLoop | None, former: Door | None) -> Door:
    # Under trio in guest mode an asyncio loop runs as well, so anyio is asked which of them runs the current task.
    native = current_token().native_token
    if former is not None and former.native is native:
        return former
    return _AsyncioDoor(native) if native is loop else _TrioDoor(native)


# -- The channels ------------------------------------------------------------------------------------------------------
#
# A channel has one thread at one end and one task at the other. `_mutex` guards what both ends touch: the items, their
# size, whether an end sleeps, and whether the channel is closed. It is held for a few instructions and never while
# anyone waits. A sleeper is marked under the mutex, after a last look at the items, so that no wake-up can be lost; the
# waking itself comes after the mutex was let go.
#
# Who ends a wait:
#   ToLoop.get     a put, a close, a cancellation
#   ToLoop.put     the loop's `sent`, a close
#   ToThread.get   a put, a close
#   ToThread.room  the thread's get, a close, a cancellation


class _Latch:
    """Where a single thread sleeps. Its lock is unlocked while a wake-up is on its way, else locked."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def sleep(self) -> None:
        self._lock.acquire()

    def wake(self) -> None:
        self._lock.release()


_NOBODY: list[_Latch] = []


class ToLoop(Generic[T]):
    """Items from a thread to a task, each with a size in bytes, of which a window bounds what is under way.

    Args:
        door: Of the task's loop.
        window: Bytes that may be under way before ``put`` waits, until half of them have left. One item may always be.
    """

    def __init__(self, door: Door, window: int) -> None:
        self._door = door
        self._window = window
        self._mutex = threading.Lock()
        self._items: list[T] = []
        self._size = 0  # of all that was put and not yet sent
        self._on_put: Callable[[], object] | None = None  # wakes the task, while it sleeps
        self._latches: list[_Latch] = []  # of the thread, while it sleeps; an app may have others that put or get, too
        self._closed = False

    def put(self, item: T, size: int = 0) -> None:
        """Hand an item over, then wait until what is under way fits the window. For the thread.

        Raises:
            Closed: The channel was closed, before or during the wait.
        """
        latch = None
        with self._mutex:
            if self._closed:
                raise Closed
            self._items.append(item)
            on_put, self._on_put = self._on_put, None
            self._size += size
            if self._size > self._window and size:
                latch = _Latch()
                self._latches.append(latch)
        if on_put is not None:
            self._ring(on_put)
        if latch is not None:
            latch.sleep()
            if self._closed:
                raise Closed

    def put_last(self, *items: T) -> None:
        """Hand over the last items; whether the channel is closed or not. For the thread, which never waits here."""
        wake = self.lay_last(*items)
        if wake is not None:
            wake()

    def lay_last(self, *items: T) -> Callable[[], object] | None:
        """`put_last`, but for the waking.

        Returns:
            What wakes the task, for the thread to call before it sleeps; None if the task is awake.
        """
        with self._mutex:
            self._closed = True
            self._items.extend(items)
            on_put, self._on_put = self._on_put, None
        return None if on_put is None else functools.partial(self._ring_last, on_put)

    def _ring_last(self, on_put: Callable[[], object]) -> None:
        with contextlib.suppress(Closed):  # then nobody is there to get it
            self._ring(on_put)

    def _ring(self, on_put: Callable[[], object]) -> None:
        try:
            self._door.ring(on_put)
        except Closed:
            self.close()
            raise

    def put_from_loop(self, item: T) -> None:
        """Hand an item over from within the loop."""
        with self._mutex:
            self._items.append(item)
            on_put, self._on_put = self._on_put, None
        if on_put is not None:
            on_put()

    async def get(self, begin: Callable[[], object] | None = None) -> list[T]:
        """All the items there are, at least one. For the task.

        Args:
            begin: Wakes the thread that is to put them. It is called at the last moment: a thread that wakes up while
                this one still has the interpreter lock falls asleep again.
        """
        while True:
            with self._mutex:
                if self._items:
                    items, self._items = self._items, []
                    return items
                sleeper = self._door.make_sleeper()
                self._on_put = functools.partial(self._door.wake, sleeper)
            if begin is not None:
                begin()
                begin = None
            await sleeper

    def sent(self, size: int) -> None:
        """Say that an item's bytes have left, which makes room in the window. For the task."""
        latches = _NOBODY
        with self._mutex:
            self._size -= size
            if self._latches and self._size <= self._window // 2:
                latches, self._latches = self._latches, []
        for latch in latches:
            latch.wake()

    def close(self) -> None:
        """Refuse what the thread puts from now on, and end its wait. What lies in the channel can still be got."""
        with self._mutex:
            self._closed = True
            latches, self._latches = self._latches, []
        for latch in latches:
            latch.wake()


class ToThread(Generic[T]):
    """Items from a task to a thread, each with a size in bytes; the task may ask for room before it brings more.

    Args:
        door: Of the task's loop.
        window: Bytes that may lie in the channel before ``room`` waits, until half of them were got.
    """

    def __init__(self, door: Door, window: int) -> None:
        self._door = door
        self._window = window
        self._mutex = threading.Lock()
        self._items: list[tuple[T, int]] = []
        self._size = 0
        self._sleeper: Any = None  # of the task, while it waits for room
        self._latches: list[_Latch] = []  # of the thread, while it sleeps; an app may have others that put or get, too
        self._closed = False

    def put(self, item: T, size: int = 0) -> None:
        """Hand an item over. For the task, which never waits here."""
        latches = _NOBODY
        with self._mutex:
            self._items.append((item, size))
            self._size += size
            if self._latches:
                latches, self._latches = self._latches, []
        for latch in latches:
            latch.wake()

    async def room(self) -> None:
        """Wait until what lies in the channel is less than its window. For the task."""
        while True:
            with self._mutex:
                if self._size < self._window or self._closed:
                    return
                sleeper = self._sleeper = self._door.make_sleeper()
            await sleeper

    def get(self) -> T:
        """The next item. For the thread.

        Raises:
            Closed: The channel was closed, and is empty.
        """
        while True:
            with self._mutex:
                if self._items:
                    item, sleeper = self._take()
                    break
                if self._closed:
                    raise Closed
                latch = _Latch()
                self._latches.append(latch)
            latch.sleep()
        if sleeper is not None:
            self._ring(sleeper)
        return item

    def get_nowait(self) -> T | None:
        """The next item, None if there is none yet. For the thread.

        Raises:
            Closed: The channel was closed, and is empty.
        """
        with self._mutex:
            if not self._items:
                if self._closed:
                    raise Closed
                return None
            item, sleeper = self._take()
        if sleeper is not None:
            self._ring(sleeper)
        return item

    def _take(self) -> tuple[T, Any]:
        item, size = self._items.pop(0)
        self._size -= size
        if self._size > self._window // 2:
            return item, None
        sleeper, self._sleeper = self._sleeper, None
        return item, sleeper

    def _ring(self, sleeper: Any) -> None:
        wake = self._door.wake
        try:
            self._door.ring(lambda: wake(sleeper))
        except Closed:
            self.close()  # what is here can still be got

    def close(self) -> None:
        """End the thread's wait, now and for ever. What lies in the channel can still be got."""
        with self._mutex:
            self._closed = True
            latches, self._latches = self._latches, []
            sleeper, self._sleeper = self._sleeper, None
        for latch in latches:
            latch.wake()
        if sleeper is not None:
            # From the loop's own thread: nobody else closes.
            self._door.wake(sleeper)


# -- The channels of a thread that comes step by step ------------------------------------------------------------------
#
# The thread has other work, too: it waits for the loop, or runs it. So it never sleeps in a channel. Between two steps
# it is away; within a step it waits by `serve`, which does that other work meanwhile. What it puts is seen by the task
# when the step is over, or when the thread serves: each of these runs `wake` in the loop.


class StepsToLoop(ToLoop[T]):
    """A `ToLoop` of which the thread comes for a step whenever the task has nothing left to do.

    Args:
        door: Of the task's loop.
        ask: Asks the thread for its next step. Awaited by the task.
        wake: Has the thread, if it serves, look again at what it waits for. In the loop.
    """

    def __init__(self, door: Door, ask: Callable[[], Awaitable[object]], wake: Callable[[], None]) -> None:
        super().__init__(door, 0)
        self._ask = ask
        self._wake_thread = wake
        self._asked = False  # the thread has been asked for a step, which is not over

    def put(self, item: T, size: int = 0) -> None:
        """Hand an item over. It is not waited for: the thread is asked for more when all of it was sent."""
        with self._mutex:
            if self._closed:
                raise Closed
            self._items.append(item)
            self._size += size

    def lay_last(self, *items: T) -> None:
        with self._mutex:
            self._closed = True
            self._items.extend(items)

    async def get(self, begin: Callable[[], object] | None = None) -> list[T]:
        if begin is not None:
            begin()
        while True:
            with self._mutex:
                if self._items:
                    items, self._items = self._items, []
                    return items
            if not self._asked:
                self._asked = True
                await self._ask()
            with self._mutex:
                if self._items:
                    continue
                sleeper = self._door.make_sleeper()
                self._on_put = functools.partial(self._door.wake, sleeper)
            await sleeper

    def sent(self, size: int) -> None:
        with self._mutex:
            self._size -= size
        if self.empty:
            self._wake_thread()

    def close(self) -> None:
        super().close()
        self._wake_thread()

    def wake(self) -> None:
        """Have the task look for items. In the loop."""
        on_put, self._on_put = self._on_put, None
        if on_put is not None:
            on_put()

    def end_step(self) -> None:
        """Say that the step is over. In the loop."""
        self._asked = False
        self.wake()

    def detach(self) -> None:
        """Let go of those who are asked and woken: they hold this channel."""
        self._ask, self._wake_thread = _ask_nobody, _wake_nobody

    @property
    def empty(self) -> bool:
        """Whether all that was put with a size has been sent, or never will be."""
        return self._closed or not self._size


class StepsToThread(ToThread[T]):
    """A `ToThread` of which the thread waits by serving.

    Args:
        door: Of the task's loop.
        serve: Waits until something is so, or will never be. In the thread.
        wake: Has it look again. In the loop.
    """

    def __init__(self, door: Door, serve: Callable[[Callable[[], bool]], None], wake: Callable[[], None]) -> None:
        super().__init__(door, 0)
        self._serve = serve
        self._wake = wake
        self._wanted = 0  # items that threads wait for, and that nobody brings yet

    def put(self, item: T, size: int = 0) -> None:
        super().put(item, size)
        self._wake()

    def want(self) -> None:
        """Say that a thread waits for an item. In the loop."""
        with self._mutex:
            self._wanted += 1
            sleeper, self._sleeper = self._sleeper, None
        if sleeper is not None:
            self._door.wake(sleeper)

    async def room(self) -> None:
        """Wait until an item is wanted, which is to be brought then. For the task."""
        while True:
            with self._mutex:
                if self._wanted or self._closed:
                    self._wanted -= 1
                    return
                sleeper = self._sleeper = self._door.make_sleeper()
            await sleeper

    def get(self) -> T:
        self._serve(self._has_news)
        item = self.get_nowait()
        if item is None:  # whoever was to bring it has gone, or another thread was quicker
            raise Closed
        return item

    def _has_news(self) -> bool:
        return bool(self._items) or self._closed

    def detach(self) -> None:
        """Let go of those who serve and are woken: they hold this channel."""
        self._serve, self._wake = _serve_nobody, _wake_nobody

    def close(self) -> None:
        super().close()
        self._wake()


async def _ask_nobody() -> None:
    pass


def _wake_nobody() -> None:
    pass


def _serve_nobody(until: Callable[[], bool]) -> None:
    pass
