"""Where gevent is, the loop lives in a real thread: gevent's hubs beside it, and what works from one to the other."""

from __future__ import annotations

import ast
import concurrent.futures.thread
import contextlib
import gc
import importlib
import inspect
import logging
import os
import queue
import selectors
import socket
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from asgiref.sync import SyncToAsync

from bridge.threads import BriefMutex, Lock, get_ident, hub_beside, hub_of_thread, is_patched, locked, original, ours

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator

T = TypeVar("T")

__all__ = ["at_home", "make_loop", "serve_hub"]

GEVENT = (26, 8)
"""The first gevent of which a lock that is released by a real thread wakes a greenlet. Tried: 26.7 and older do not."""

ANSWER_SECONDS = 5.0
"""How long the main thread's hub may take to answer, else nobody is taken to run it; asked where another thread makes
the first loop. Also how long it stands still at most while a child is made. Guessed, as is the next."""

HOME_SECONDS = 30.0
"""How long a hub may be busy while a loop's thread waits for it to start a thread."""

logger: logging.Logger = logging.getLogger("bridge")


# -- Theory ------------------------------------------------------------------------------------------------------------
#
# Where gevent is, the loop lives in a real thread (bridge/threads.py), and the app with it. Where gevent has patched
# the standard library, the app's synchronous code cannot: sockets and locks of a patched process belong to the hub that
# made them, and a connection pool hands them from one thread to another. So what the app starts as a thread becomes a
# greenlet beside all others, in the hub of the main thread, or of the one that has made the first loop: Thread.start()
# sees to that. Executors and anyio start their threads so. The loop's thread has a hub, too, whose part is to pass on
# what gevent's locks have to tell (`serve_hub`).
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


def _find_selector() -> Any:
    """A selector that waits in no hub.

    CPython 3.13 and newer may come to the module of selectors when gevent has patched what these are made of.
    """
    found = original("selectors", "DefaultSelector")
    if getattr(found, "_selector_cls", found).__module__.startswith("gevent."):
        return type("RealSelector", (found,), {"_selector_cls": original("select", "poll")})
    return found


_REAL_FOR_LOOPS = [
    (selectors, "DefaultSelector", _find_selector()),
    *((socket, name, original("socket", name)) for name in ("socket", "socketpair")),
]

_Local: Any = original("_thread", "_local")
_Thread: Any = original("threading", "Thread")
_start_thread: Callable[[threading.Thread], None] = _Thread.start

_making: list[None] = []  # one for each loop that is being made
_making_mutex = BriefMutex()  # guards what is put in the places of the patched ones meanwhile
_patched: list[tuple[Any, str, Any]] = []
_home: Any = None  # the hub for the app's synchronous code, in a patched process
_warned = False


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
        _give_queues(original("queue", "SimpleQueue"))
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
            if hub_of_thread() is not hub or self.served:  # a closer runs the event loop, or a greenlet of the hub
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
        real: Any = queue._PySimpleQueue if name == "SimpleQueue" else original("queue", name)  # type: ignore[attr-defined]
        if patched is not real:
            lasting[id(patched)] = real
            setattr(queue, name, real)
    if not lasting:
        return
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in lasting and name in _imported_from_queue(module):
                setattr(module, name, lasting[id(value)])


def _imported_from_queue(module: types.ModuleType) -> set[str]:
    """What its source says that it has from there; it may as well have a class from gevent.queue, and mean that."""
    try:
        nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    except (OSError, TypeError, SyntaxError):  # there is no source
        return set()
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    names = {
        name: {alias.asname or alias.name for node in imports if node.module == name for alias in node.names}
        for name in ("queue", "gevent.queue")
    }
    return names["queue"] - names["gevent.queue"]


def _give_queues(simple: Any) -> Any:
    """Have anyio and concurrent.futures hand over their work by the standard library's queues.

    Returns:
        anyio's module that runs threads.
    """
    anyio_backend: Any = importlib.import_module("anyio._backends._asyncio")
    futures: Any = concurrent.futures.thread
    if futures.queue is queue:
        queues = types.SimpleNamespace(**vars(queue))
        queues.Queue = original("queue", "Queue")
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
        main, own = _main_hub(), hub_beside()
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
    if get_ident() not in ours:
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
        if own is hub_of_thread():
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
    # C waits for that child, where the hub could be quicker.
    os.system = partial(_call_at_home, os.system)  # pyright: ignore[reportDeprecated]  # apps call it


def _fork_and_watch(
    fork_and_watch: Callable[..., int], callback: Any = None, loop: Any = None, *args: Any, **kwargs: Any
) -> int:
    if get_ident() not in ours:
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
    """Nobody makes a loop any more who did."""
    global _making_mutex
    if _making:
        _put_patched_back()
    _making.clear()
    _making_mutex = BriefMutex()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
