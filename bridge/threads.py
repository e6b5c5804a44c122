"""Real threads, their locks and clock, whatever gevent has put in their places; and how a greenlet waits for one."""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import gc
import importlib
import inspect
import logging
import os
import queue
import re
import select
import selectors
import signal
import socket
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from asgiref.sync import SyncToAsync

if TYPE_CHECKING:
    import asyncio
    from _thread import start_new_thread
    from collections.abc import Callable, Generator
    from queue import SimpleQueue
    from threading import Lock, get_ident
    from time import sleep

T = TypeVar("T")

__all__ = [
    "AnyLock",
    "Holder",
    "Lock",
    "Mutex",
    "SimpleQueue",
    "at_home",
    "begin",
    "call",
    "get_ident",
    "is_patched",
    "locked",
    "make_loop",
    "may_run_loops",
    "pause",
    "poll",
    "serve_hub",
    "sleep",
    "spare_exit",
    "start",
    "who",
]

GEVENT = (26, 8)
"""The first gevent of which a lock that is released by a real thread wakes a greenlet. Tried: 26.7 and older do not."""

POLL_SECONDS = 0.005
"""How often a greenlet looks whether a mutex is free: that is asked for at startup and shutdown alone."""

SLEEP_SECONDS = 0.2
"""The same for a thread, which is woken when it is: but one that is interrupted takes its wake-up with it."""

ANSWER_SECONDS = 5.0
"""How long the main thread's hub may take to answer, else nobody is taken to run it; asked where another thread makes
the first loop. Also how long it stands still at most while a child is made. Guessed, as is the next."""

HOME_SECONDS = 30.0
"""How long a hub may be busy while a loop's thread waits for it to start a thread."""

logger: logging.Logger = logging.getLogger("bridge")


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
# it is imported before the patch or after.
#
# The app runs in a real thread, then, but its synchronous code does not: sockets and locks of a patched process belong
# to the hub that made them, and a connection pool hands them from one thread to another. So what the app starts as a
# thread becomes a greenlet beside all others, in the hub of the main thread, or of the one that has made the first
# loop: Thread.start() sees to that. Executors and anyio start their threads so. The loop's thread has a hub, too, whose
# part is to pass on what gevent's locks have to tell (`serve_hub`).
#
# In a patched process there is one such thread for an app, however many loops it asks for: gevent's locks hold between
# the greenlets and one real thread, but many real threads that want the same lock, as all that log do, come to wait for
# each other's hubs.
#
# Of gevent's other things, its sockets, queues and child watchers belong to one hub for good. They are mended when the
# first loop is made, each as little as its kind allows: a socket is waited for by a watcher of the hub that waits; a
# child is made while the main hub, which alone hears of its end, stands still; queues, whose compiled classes cannot be
# changed, are made of locks from then on. The thread's hub always expects something: gevent ends a wait by LoopExit
# where it sees nobody who could end it, and does not see other hubs.
#
# None of it exists while gevent is not imported. Whether it is, is asked where a thread begins to wait.


def _original(module: str, name: str) -> Any:
    monkey = sys.modules.get("gevent.monkey")
    return getattr(importlib.import_module(module), name) if monkey is None else monkey.get_original(module, name)


if not TYPE_CHECKING:
    Lock = _original("_thread", "allocate_lock")
    get_ident = _original("_thread", "get_ident")
    start_new_thread = _original("_thread", "start_new_thread")
    sleep = _original("time", "sleep")
    SimpleQueue = _original("queue", "SimpleQueue")

poll: Callable[[], select.poll] | None = _original("select", "poll") if hasattr(select, "poll") else None
_REAL_FOR_LOOPS = [
    (module, name, _original(module.__name__, name))
    for module, name in ((selectors, "DefaultSelector"), (socket, "socket"), (socket, "socketpair"))
]

_Local: Any = _original("_thread", "_local")
_Thread: Any = _original("threading", "Thread")
_start_thread: Callable[[threading.Thread], None] = _Thread.start

_making: list[None] = []  # one for each loop that is being made
_making_mutex = Lock()  # guards what is put in the places of the patched ones meanwhile
_patched: list[tuple[Any, str, Any]] = []
_ours: set[int] = set()  # the real threads that were started here, in a patched process
_home: Any = None  # the hub for the app's synchronous code, in a patched process
_warned = False


class AnyLock(Protocol):
    """A real lock, or a `_GreenletLock`."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
    def release(self) -> None: ...


# -- What gevent does here ---------------------------------------------------------------------------------------------


def is_patched() -> bool:
    """Whether gevent has put greenlets in the place of threads."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")


def _hub_of_thread() -> Any:
    """gevent's hub of this thread, None if there is none: it has no greenlets then."""
    module = sys.modules.get("gevent._hub_local")
    # A module that another thread imports at this moment may lack what it will have.
    get_hub_if_exists = getattr(module, "get_hub_if_exists", None)
    return None if get_hub_if_exists is None else get_hub_if_exists()


def _hub() -> Any:
    """The hub that runs the other greenlets of this thread while this one waits; None if there is nothing to run."""
    hub = _hub_of_thread()
    if hub is None:
        # The app's synchronous code may need one, to end what is waited for.
        return sys.modules["gevent"].get_hub() if is_patched() and get_ident() not in _ours else None
    if hub is sys.modules["greenlet"].getcurrent() or get_ident() in _ours:
        return None
    return hub


def may_run_loops() -> bool:
    """Whether this thread may run an event loop, for all that gevent does in it.

    Without gevent it may; callers on a hot path look for themselves whether gevent is in ``sys.modules``.
    """
    return get_ident() in _ours if is_patched() else _hub_of_thread() is None


def who() -> int:
    """Who runs: a number of this thread, or of this greenlet."""
    if "gevent" not in sys.modules:
        return get_ident()
    return get_ident() if _hub() is None else id(sys.modules["greenlet"].getcurrent())


# -- Waiting -----------------------------------------------------------------------------------------------------------


def pause(seconds: float) -> None:
    """Wait a while; other greenlets run meanwhile."""
    if _hub() is None:
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
            if _hub() is None:
                self._freed.acquire(timeout=min(deadline - now, SLEEP_SECONDS))
            else:
                pause(POLL_SECONDS)

    def release(self, holder: Holder) -> None:
        """Let it go, if it is held by this one."""
        if self.holder is holder:
            del self._holders[""]
            with contextlib.suppress(RuntimeError):  # it was released before, and nobody has slept on it
                self._freed.release()


def locked() -> AnyLock:
    """A new lock, locked, to sleep on until another thread releases it."""
    lock = _GreenletLock() if "gevent" in sys.modules else Lock()
    lock.acquire()
    return lock


class _GreenletLock:
    """A lock on which one greenlet may sleep, or one thread, and which any thread may release.

    `_mutex` guards the watcher: it must not be sent to once it is closed. A greenlet holds it without switching.
    """

    __slots__ = ("_lock", "_mutex", "_watcher")

    def __init__(self) -> None:
        self._lock = Lock()
        self._mutex = Lock()
        self._watcher: Any = None  # of the greenlet that sleeps

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        hub = _hub()
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
        hub = _hub_of_thread()
        if hub is not None:
            hub.destroy(destroy_loop=True)
        if over is not None:
            over.release()


def _run_beside_greenlets(func: Callable[[], object], over: AnyLock | None) -> None:
    ident = get_ident()
    _ours.add(ident)
    try:
        _run(func, None)
    finally:
        _ours.discard(ident)
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


# -- The app's synchronous code ----------------------------------------------------------------------------------------


def make_loop(factory: Callable[[], asyncio.AbstractEventLoop]) -> asyncio.AbstractEventLoop:
    """Make an event loop for real threads to run."""
    if "gevent" not in sys.modules:
        return factory()
    monkey = sys.modules.get("gevent.monkey")
    if is_patched():
        _settle()
        _Thread.start = _start_beside_greenlets
        _mend_libraries()
    elif monkey is not None and monkey.is_module_patched("queue"):
        # Real threads wait in queues: gevent's wait in a hub, of which such a thread has nothing to expect.
        _give_queues(_original("queue", "SimpleQueue"))
    _mend_asgiref()
    if monkey is None:
        return factory()
    with _real_for_loops():  # what is patched may be these alone
        return factory()


def serve_hub(native: asyncio.AbstractEventLoop) -> None:
    """Have this thread's hub served by the event loop that the thread runs, in a patched process.

    gevent's locks belong to the hub of the thread that takes them first, and tell their waiters by it. But nobody runs
    the hub of a thread that waits in an event loop.
    """
    if not is_patched():
        return
    kind: Any = _home.loop.__class__

    class Loop(kind):  # type: ignore[misc]
        """gevent's loop of the hub, which calls for the event loop whenever it has something to do."""

        awaited: Any = None
        called = False
        served = False

        def run_callback(self, func: Any, *args: Any) -> Any:
            callback = kind.run_callback(self, func, *args)
            self.call()
            return callback

        def run_callback_threadsafe(self, func: Any, *args: Any) -> Any:
            callback = kind.run_callback_threadsafe(self, func, *args)
            self.call()
            return callback

        def call(self) -> None:
            if not self.called:
                self.called = True
                with contextlib.suppress(RuntimeError):  # the event loop is closed
                    native.call_soon_threadsafe(self.serve)

        def serve(self) -> None:
            if _hub_of_thread() is not hub or self.served:  # a closer runs the event loop, or a greenlet of the hub
                self.called = False
                return
            self.served = self.called = True  # not for our own wake-up
            try:
                waiter = sys.modules["gevent.hub"].Waiter(hub)
                kind.run_callback(self, waiter.switch, None)
                self.called = False  # but for what comes in the meantime
                waiter.get()
            finally:
                self.served = False

    hub = sys.modules["gevent.hub"].Hub(Loop(default=False))
    # Whoever waits for another hub's word has nothing that would keep this one's loop going: gevent would give up.
    hub.loop.awaited = hub.loop.async_()
    hub.loop.awaited.start(_nothing)
    sys.modules["gevent._hub_local"].set_hub(hub)


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _real_for_loops() -> Generator[None, None, None]:
    """Let what is made now be real: a loop's selector, and the sockets by which it is woken.

    A patched selector waits in a hub. Patched sockets belong to the hub of the thread that makes them: they crash if
    another thread closes them. Of many threads that make loops at once, the last one puts the patched ones back.
    """
    with _making_mutex:
        if not _making:
            _patched[:] = [(module, name, getattr(module, name)) for module, name, _ in _REAL_FOR_LOOPS]
        _making.append(None)
        for module, name, real in _REAL_FOR_LOOPS:
            setattr(module, name, real)
    try:
        yield
    finally:
        with _making_mutex:
            _making.pop()
            if not _making:
                _put_patched_back()


def _put_patched_back() -> None:
    for module, name, value in _patched:
        setattr(module, name, value)


def _mend_libraries() -> None:
    """Let the libraries that run an app's synchronous code do so between a real thread and greenlets.

    What they note for each thread must be noted for each greenlet, and what waits for work must wait in the hub, also
    where they were imported before the patch.
    """
    global _warned
    version = sys.modules["gevent"].__version__.split(".")
    if tuple(map(int, version[:2])) < GEVENT and not _warned:
        _warned = True
        logger.warning("gevent is older than %d.%d: what an app runs in threads may hang", *GEVENT)
    _mend_queues()
    _mend_children()
    _mend_sockets()
    anyio_backend = _give_queues(queue.SimpleQueue)
    if type(anyio_backend.threadlocals) is _Local:
        local = threading.local()
        for module in [module for name, module in list(sys.modules.items()) if name.startswith("anyio.")]:
            if hasattr(module, "threadlocals"):
                module.threadlocals = local  # type: ignore[attr-defined]


def _mend_asgiref() -> None:
    """Let asgiref note for each greenlet what it notes for each thread, as the loop that async_to_sync returns to.

    Greenlets share a thread also where nothing is patched: one that waits in the middle of a request left its loop to
    those of other requests.
    """
    if type(SyncToAsync.threadlocal) is _Local:
        SyncToAsync.threadlocal = importlib.import_module("gevent.local").local()
        if is_patched():
            SyncToAsync.single_thread_executor = ThreadPoolExecutor(max_workers=1)


def _mend_queues() -> None:
    """Let the queues that are made from now on work between the loop's thread and greenlets.

    gevent's wake their waiters by the hub of the thread that has made them, and lose items between threads. The
    standard library's in Python are built of locks, and gevent's locks work between threads. So these come into the
    module's places again, and into those of all that has imported them from there by name, as aiosqlite does.
    ``gevent.queue`` itself stays what it is, and so does a queue that was made before.
    """
    lasting: dict[int, Any] = {}  # by the id of what is replaced
    for name in ("Queue", "LifoQueue", "PriorityQueue", "SimpleQueue"):
        patched = getattr(queue, name)
        real: Any = queue._PySimpleQueue if name == "SimpleQueue" else _original("queue", name)  # type: ignore[attr-defined]
        if patched is not real:
            lasting[id(patched)] = real
            setattr(queue, name, real)
    if not lasting:
        return
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in lasting and _imports_from_queue(module):
                setattr(module, name, lasting[id(value)])


def _imports_from_queue(module: types.ModuleType) -> bool:
    """Whether its source says so; it may as well have a class from gevent.queue, and mean that."""
    try:
        return re.search(r"^\s*from queue import", inspect.getsource(module), re.MULTILINE) is not None
    except (OSError, TypeError):  # there is no source
        return False


def _give_queues(simple: Any) -> Any:
    """Have anyio and concurrent.futures hand over their work by the standard library's queues.

    Returns:
        anyio's module that runs threads.
    """
    anyio_backend: Any = importlib.import_module("anyio._backends._asyncio")
    futures: Any = concurrent.futures.thread
    if futures.queue is queue:
        queues = types.SimpleNamespace(**vars(queue))
        queues.Queue = _original("queue", "Queue")
        queues.SimpleQueue = simple
        anyio_backend.Queue = queues.Queue
        futures.queue = queues
        for executor in _instances(ThreadPoolExecutor):  # made at import, as asgiref's
            if not executor._threads and executor._work_queue.empty():
                executor._work_queue = simple()
    return anyio_backend


def _instances(kind: type[Any]) -> list[Any]:
    """All objects of a class; by their true class, since some claim another one when they are asked."""
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]


def _start_beside_greenlets(thread: threading.Thread) -> None:
    """Thread.start() in a patched process: what a loop's thread starts becomes a greenlet of the hub."""
    at_home(partial(_start_thread, thread))


def _settle() -> None:
    """Have a hub where the app's threads are at home: that of the main thread, if somebody runs it, or of this one.

    It stays the same as long as its thread lives. Another thread than the main one may be a server's, but also one that
    will not be there for long, as those of gevent's pool.
    """
    global _home
    if _home is None or not _lives(_home):
        main, own = _main_hub(), _hub()
        _home = main if main is not None and (main is own or own is None or _is_run(main)) else own


def _lives(hub: Any) -> bool:
    return hub.loop is not None and hub.thread_ident in sys._current_frames()


def _main_hub() -> Any:
    """The hub of the main thread, whichever thread asks; None if there is none."""
    hubs = _instances(sys.modules["gevent.hub"].Hub)  # gevent finds them so, too
    return next((hub for hub in hubs if hub.loop is not None and hub.loop.default and _lives(hub)), None)


def _is_run(hub: Any) -> bool:
    answer = locked()
    hub.loop.run_callback_threadsafe(answer.release)
    return answer.acquire(timeout=ANSWER_SECONDS)


def at_home(func: Callable[[], T]) -> T:
    """Call a function where the app's threads are at home, and wait for it; the hub has to come to it.

    Raises:
        RuntimeError: It does not.
    """
    if get_ident() not in _ours:
        return func()
    claim, over = Lock(), Lock()
    over.acquire()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        if not claim.acquire(blocking=False):
            return
        try:
            results.append(func())
        except BaseException as error:
            errors.append(error)
        finally:
            over.release()

    _spawn(run)
    if not over.acquire(timeout=HOME_SECONDS):
        if claim.acquire(blocking=False):
            raise _nobody_at_home()
        over.acquire()
    if errors:
        raise errors.pop()
    return results.pop()


@contextlib.contextmanager
def _home_stopped() -> Generator[None, None, None]:
    """Stop the hub where the app's threads are at home: what belongs to it may be touched meanwhile."""
    stopped, go_on = Lock(), Lock()
    stopped.acquire()
    go_on.acquire()

    def stop() -> None:
        stopped.release()
        # Not for ever: what is called at a fork may want a lock that another greenlet of the hub has.
        go_on.acquire(timeout=ANSWER_SECONDS)

    _spawn(stop)
    try:
        if not stopped.acquire(timeout=HOME_SECONDS):
            raise _nobody_at_home()
        yield
    finally:
        go_on.release()


def _mend_sockets() -> None:
    """Let a socket that was made in one hub be waited for and closed in another.

    A connection pool hands them on, between what the app does in its loop and in its threads. A watcher is its hub's,
    but there may be many on one descriptor.
    """
    gevent_socket: Any = importlib.import_module("gevent._socketcommon")
    kind: Any = getattr(gevent_socket, "SocketMixin", None)
    wait, drop = getattr(kind, "_wait", None), getattr(kind, "_drop_events_and_close", None)
    if wait is None or drop is None or wait.__module__ == __name__:  # unknown; or they have been mended
        return
    get_hub = sys.modules["gevent"].get_hub

    def _wait(sock: Any, watcher: Any, timeout_exc: Any = None) -> None:
        hub = get_hub()
        if watcher is None or hub is sock.hub:
            wait(sock, watcher, timeout_exc)
            return
        passing = hub.loop.io(sock.fileno(), 1 if watcher is sock._read_event else 2)
        try:
            wait(types.SimpleNamespace(timeout=sock.timeout, hub=hub), passing, timeout_exc)
        finally:
            passing.close()

    def _drop(sock: Any, closefd: bool = True, *args: Any) -> None:
        own = sock.hub
        if own is _hub_of_thread():
            drop(sock, closefd, *args)
            return
        watchers = sock._read_event, sock._write_event
        sock._read_event = sock._write_event = None
        if _lives(own):
            cancel, then = own.cancel_waits_close_and_then, sock._drop_ref_on_close if closefd else id
            own.loop.run_callback_threadsafe(cancel, watchers, gevent_socket.cancel_wait_ex, then, sock._sock)
        elif closefd:
            sock._sock.close()

    kind._wait, kind._drop_events_and_close = _wait, _drop


def _mend_children() -> None:
    """Let the loop's thread have children: gevent hears of their end in the main thread's hub alone.

    That hub must not come to a child's end before it watches the child, so it stands still while one is made.
    """
    gevent_os: Any = importlib.import_module("gevent.os")
    gevent_subprocess: Any = importlib.import_module("gevent.subprocess")
    fork_and_watch = getattr(gevent_os, "fork_and_watch", None)
    if fork_and_watch is None or isinstance(fork_and_watch, partial):  # on Windows; or they have been mended
        return
    gevent_os.fork_and_watch = gevent_subprocess.fork_and_watch = partial(_fork_and_watch, fork_and_watch)
    for name in ("waitpid", "posix_spawn", "posix_spawnp"):
        func = getattr(gevent_os, name, None)
        if func is not None and getattr(os, name) is func:
            mended = partial(_call_at_home, func)
            setattr(gevent_os, name, mended)
            setattr(os, name, mended)


def _fork_and_watch(
    fork_and_watch: Callable[..., int], callback: Any = None, loop: Any = None, *args: Any, **kwargs: Any
) -> int:
    if get_ident() not in _ours:
        return fork_and_watch(callback, loop, *args, **kwargs)
    with _home_stopped():
        return fork_and_watch(callback, _home.loop, *args, **kwargs)


def _call_at_home(func: Callable[..., T], *args: Any) -> T:
    return at_home(partial(func, *args))


def _nobody_at_home() -> RuntimeError:
    return RuntimeError(f"no thread runs gevent's hub {_home!r}, in which the app's threads are to run")


def _spawn(func: Callable[[], object]) -> None:
    _settle()
    if _home is None:
        raise _nobody_at_home()
    _home.loop.run_callback_threadsafe(sys.modules["gevent"].spawn, func)


def _after_fork() -> None:
    """None of the threads is there any more, whatever it was about."""
    global _making_mutex
    _ours.clear()
    if _making:
        _put_patched_back()
    _making.clear()
    _making_mutex = Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
