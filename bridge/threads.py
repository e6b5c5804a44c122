"""Real threads, their locks and clock, whatever gevent has put in their places; and how a greenlet waits for one."""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from _thread import start_new_thread
    from collections.abc import Callable
    from queue import SimpleQueue
    from threading import Lock, get_ident
    from time import sleep

T = TypeVar("T")

__all__ = [
    "AnyLock",
    "BriefMutex",
    "Holder",
    "Lock",
    "Mutex",
    "SimpleQueue",
    "begin",
    "call",
    "get_ident",
    "hub_beside",
    "hub_of_thread",
    "is_patched",
    "locked",
    "may_run_loops",
    "mutex",
    "original",
    "ours",
    "pause",
    "poll",
    "sleep",
    "spare_exit",
    "start",
    "who",
]

POLL_SECONDS = 0.005
"""How often a greenlet looks whether a mutex is free: that is held for long at startup and shutdown alone."""

BRIEFLY = 0.001
"""Seconds that a greenlet waits for a mutex, and its hub with it, before it takes the holder for one of its hub."""

SLEEP_SECONDS = 0.2
"""The same for a thread, which is woken when it is: but one that is interrupted takes its wake-up with it."""


# -- Theory: gevent ----------------------------------------------------------------------------------------------------
#
# gevent runs many greenlets in one thread: whoever waits switches to the thread's hub, which runs the others. asyncio
# marks the whole thread when it runs a loop in it. So no greenlet may run a loop of ours, or all others would be taken
# to be in it; and none may block, or all others would stand still.
#
# A greenlet follows, therefore, and a real thread leads (bridge/loops.py). The greenlet waits as gevent's own thread
# pool does, by an async watcher of its hub, which any thread may send to. A thread that has no hub has no greenlets,
# and waits for a real lock.
#
# Where gevent has patched the standard library, `threading` makes greenlets, and locks and queues of the real ones'
# names wait in a hub. What is shared with a real thread must be real itself: this module keeps the originals, whether
# it is imported before the patch or after. What the app's synchronous code needs then, is in bridge/hubs.py.
#
# And whoever holds a mutex may be left with it: the garbage collector may run in the middle of anything, and what it
# calls, as the callback by which a ThreadPoolExecutor hears that it was dropped, may wait for a patched lock. The hub
# then runs the other greenlets, none of which may block the thread for a mutex whose holder has to go on there.
#
# None of it exists while gevent is not imported. Whether it is, is asked where a thread begins to wait.


def original(module: str, name: str) -> Any:
    """What the standard library has by this name, whatever gevent has put in its place."""
    monkey = sys.modules.get("gevent.monkey")
    return getattr(importlib.import_module(module), name) if monkey is None else monkey.get_original(module, name)


if not TYPE_CHECKING:
    Lock = original("_thread", "allocate_lock")
    get_ident = original("_thread", "get_ident")
    start_new_thread = original("_thread", "start_new_thread")
    sleep = original("time", "sleep")
    SimpleQueue = original("queue", "SimpleQueue")

poll: Callable[[], select.poll] | None = original("select", "poll") if hasattr(select, "poll") else None
ours: set[int] = set()
"""The real threads that were started here, in a patched process."""


class AnyLock(Protocol):
    """A real lock, or a `_GreenletLock`."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
    def release(self) -> None: ...


# -- What gevent does here ---------------------------------------------------------------------------------------------


def is_patched() -> bool:
    """Whether gevent has put greenlets in the place of threads."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")


def hub_of_thread() -> Any:
    """gevent's hub of this thread, None if there is none: it has no greenlets then."""
    module = sys.modules.get("gevent._hub_local")
    # A module that another thread imports at this moment may lack what it will have.
    get_hub_if_exists = getattr(module, "get_hub_if_exists", None)
    return None if get_hub_if_exists is None else get_hub_if_exists()


def hub_beside() -> Any:
    """The hub that runs the other greenlets of this thread while this one waits; None if there is nothing to run."""
    hub = hub_of_thread()
    if hub is None:
        # The app's synchronous code may need one, to end what is waited for.
        return sys.modules["gevent"].get_hub() if is_patched() and get_ident() not in ours else None
    if hub is sys.modules["greenlet"].getcurrent() or get_ident() in ours:
        return None
    return hub


def may_run_loops() -> bool:
    """Whether this thread may run an event loop, for all that gevent does in it.

    Without gevent it may; callers on a hot path look for themselves whether gevent is in ``sys.modules``.
    """
    return get_ident() in ours if is_patched() else hub_of_thread() is None


def who() -> int:
    """Who runs: a number of this thread, or of this greenlet."""
    if "gevent" not in sys.modules:
        return get_ident()
    return get_ident() if hub_beside() is None else id(sys.modules["greenlet"].getcurrent())


# -- Waiting -----------------------------------------------------------------------------------------------------------


def pause(seconds: float) -> None:
    """Wait a while; other greenlets run meanwhile."""
    if hub_beside() is None:
        sleep(seconds)
    else:
        sys.modules["gevent"].sleep(seconds)


class Holder:
    """Who wants a mutex once, or holds it.

    Attributes:
        who: The thread or greenlet.
        since: When it has last tried to have the mutex; where it holds it, since when. By time.monotonic().
    """

    __slots__ = ("since", "who")

    def __init__(self) -> None:
        self.who: int = who()
        self.since: float = time.monotonic()


class Mutex:
    """A lock that is held while its holder waits, and that threads and greenlets share.

    Who holds it is known in the moment in which it is taken: a signal's handler may raise right after that, and whoever
    is kept waiting looks for whom. So it is taken by one instruction, of the dict; the lock beside it is to sleep on
    alone. Who finds it held looks again and again, so it is for what is seldom wanted by two.
    """

    def __init__(self) -> None:
        self._holders: dict[str, Holder] = {}
        self._freed = Lock()  # locked, but for a moment
        self._freed.acquire()

    @property
    def holder(self) -> Holder | None:
        return self._holders.get("")

    def acquire(self, holder: Holder, seconds: float) -> bool:
        """Take it, if it can be had in so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            now = holder.since = time.monotonic()
            if self._holders.setdefault("", holder) is holder:
                return True
            if now >= deadline:
                return False
            if hub_beside() is None:
                self._freed.acquire(timeout=min(deadline - now, SLEEP_SECONDS))
            else:
                pause(POLL_SECONDS)

    def release(self, holder: Holder) -> None:
        """Let it go, if it is held by this one."""
        if self.holder is holder:
            del self._holders[""]
            with contextlib.suppress(RuntimeError):  # it was released before, and nobody has slept on it
                self._freed.release()


class BriefMutex:
    """A mutex that is held for a few instructions, unless the hub comes in between."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = Lock()

    def __enter__(self) -> None:
        if self._lock.acquire(blocking=False):
            return
        if hub_beside() is None:
            self._lock.acquire()
        elif not self._lock.acquire(timeout=BRIEFLY):  # a real thread would have let it go
            while not self._lock.acquire(blocking=False):
                pause(POLL_SECONDS)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def mutex() -> BriefMutex | Lock:
    """A new mutex for what is done often: a real lock where there are no greenlets."""
    return BriefMutex() if "gevent" in sys.modules else Lock()


def locked() -> AnyLock:
    """A new lock, locked, to sleep on until another thread releases it."""
    lock = _GreenletLock() if "gevent" in sys.modules else Lock()
    lock.acquire()
    return lock


class _GreenletLock:
    """A lock on which one greenlet may sleep, or one thread, and which any thread may release.

    `_mutex` guards the watcher: it must not be sent to once it is closed.
    """

    __slots__ = ("_lock", "_mutex", "_watcher")

    def __init__(self) -> None:
        self._lock = Lock()
        self._mutex = BriefMutex()
        self._watcher: Any = None  # of the greenlet that sleeps

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        hub = hub_beside()
        if hub is None or not blocking:
            return self._lock.acquire(blocking, timeout)
        if self._lock.acquire(blocking=False):
            return True
        waiter = sys.modules["gevent.hub"].Waiter(hub)
        watcher = hub.loop.async_()
        watcher.start(waiter.switch, None)
        timer = hub.loop.timer(timeout) if timeout >= 0 else None
        if timer is not None:
            timer.start(waiter.switch, None)
        self._watcher = watcher
        try:
            if not self._lock.acquire(blocking=False):  # who releases it from now on finds the watcher
                waiter.get()
                return self._lock.acquire(blocking=False)
            return True
        finally:  # also where the greenlet is killed, or its time is over
            with self._mutex:
                self._watcher = None
            for each in filter(None, (watcher, timer)):
                each.stop()
                each.close()

    def release(self) -> None:
        self._lock.release()
        with self._mutex:
            if self._watcher is not None:
                self._watcher.send()


# -- Threads -----------------------------------------------------------------------------------------------------------
#
# uWSGI's workers end in C's handler of a signal, by exit(), in whatever thread the signal comes to; Python's exit and
# the app's shutdown run in there. While they do, a second signal goes to another thread, and its exit() cuts them off.
# There is a second one as a rule: a terminal and systemd tell master and workers alike, and the master tells the
# workers, too. So our threads block these signals there, as uWSGI's do, and processes that the app starts in them begin
# with them blocked, as in uWSGI's. Threads of the app's own are spared when the exit has come as far as to us.

_ENDS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


def spare_exit() -> None:
    """Let no second signal cut off the interpreter's exit, where it would. From the exit alone."""
    if "uwsgi" in sys.modules and threading.current_thread() is threading.main_thread():
        for number in _ENDS:
            signal.signal(number, signal.SIG_IGN)


def start(func: Callable[[], object], name: str, over: AnyLock | None = None) -> None:
    """Call a function in a new real thread, which holds up no exit.

    Args:
        over: Released when the thread has nothing more to do.

    Raises:
        RuntimeError: No thread can be started.
    """
    if is_patched():
        # Not by threading.Thread: its patched parts would wait in a hub.
        start_new_thread(_run_beside_greenlets, (func, over))
    else:
        threading.Thread(target=_run, args=(func, over), name=name, daemon=True).start()


def _run(func: Callable[[], object], over: AnyLock | None) -> None:
    if "uwsgi" in sys.modules:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        func()
    finally:
        # Patched sockets, locks and clocks have made a hub. Its end must not fall into the interpreter's.
        hub = hub_of_thread()
        if hub is not None:
            hub.destroy(destroy_loop=True)
        if over is not None:
            over.release()


def _run_beside_greenlets(func: Callable[[], object], over: AnyLock | None) -> None:
    ident = get_ident()
    ours.add(ident)
    try:
        _run(func, None)
    finally:
        ours.discard(ident)
        if over is not None:
            over.release()


def begin(func: Callable[[], T]) -> Callable[[float], T | None]:
    """Call a function in a new real thread.

    Returns:
        What waits for its end, or for so many seconds if they are not -1; it gives what the function has returned,
        None if it raises, which the thread reports, or if the time is over.
    """
    results: list[T] = []
    over = locked()

    def wait(timeout: float) -> T | None:
        over.acquire(timeout=timeout)
        return results[0] if results else None

    start(lambda: results.append(func()), "bridge-closer", over)
    return wait


def call(func: Callable[[], T], timeout: float = -1) -> T | None:
    """Call a function in a new real thread, and wait for it: see `begin`."""
    return begin(func)(timeout)


def _after_fork() -> None:
    ours.clear()  # none of the threads is there any more


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
