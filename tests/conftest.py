"""What holds for every test: async ones run on three event loops, and none leaves anything behind.

A test that leaves a thread, an event loop, a task, a socket or another open file fails, with the names of what it
left. Where that is meant (worker threads kept for the next request, a server that lives as long as the session), the
test says so:

    @pytest.mark.leaves("threads", "files")
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib
import itertools
import math
import os
import sys
import threading
import time
import traceback
import weakref
from inspect import iscoroutinefunction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import anyio
import pytest
import trio
import uvloop
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator

# Seconds that what is already ending gets to end. A leak costs this long, a clean test nothing.
GRACE = 5.0

# Threads that outlive their test by design.
LASTING_THREADS = (
    "bridge-watch",  # one for the process, from the first use of a loop on
    "Trio thread ",  # trio keeps idle threads for 10 s; one at work bears the name of its work instead
)

# For every loop of every test, those in the servers' processes as well, but for who asks for `loops_as_in_production`.
os.environ["PYTHONASYNCIODEBUG"] = "1"

# No deadline: how long one example takes says more about the machine than about the code.
settings.register_profile("dev", deadline=None)
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,  # a red run is red again when it is repeated
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("asyncio", {}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """What every async test runs on; anyio's pytest plugin asks for it by this name."""
    backend: tuple[str, dict[str, Any]] = request.param
    return backend


@pytest.fixture(scope="module")
def loops_as_in_production() -> Iterator[None]:
    """Loops without debug mode, for many requests at once.

    It notes a traceback for each callback, two thirds of their time, in which races find less room.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONASYNCIODEBUG")
        yield


# What is alive
#
# A census maps each living thing, by kind and by a key that is never used again, to words for a human. Two of them,
# before and after a test, tell what it left. Keys hold no reference: a census that kept a loop or a thread alive would
# hide, or cause, the very leak it is there to find.

Census = dict[str, dict[object, str]]
KINDS = ("threads", "loops", "tasks", "files")

_loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
_serials: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
_next_serial = itertools.count().__next__


def _remember_loops(loop_class: type[asyncio.AbstractEventLoop]) -> None:
    """Have every new loop noted: asyncio has no list of them, and a search of all objects after each test is slow."""
    original = loop_class.__init__

    @functools.wraps(original)
    def init(self: asyncio.AbstractEventLoop, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _loops.add(self)

    loop_class.__init__ = init  # type: ignore[assignment, method-assign]


def _warm_up_uvloop() -> None:
    """Have libuv make what it keeps for the life of the process, or else the first test that uses it is blamed.

    The first loop opens a pipe for signals, the first look-up of a name starts a pool of native threads.
    """
    loop = uvloop.new_event_loop()
    loop.run_until_complete(loop.getaddrinfo("localhost", None))
    loop.close()


_warm_up_uvloop()
_remember_loops(asyncio.BaseEventLoop)
_remember_loops(uvloop.Loop)


def _serial(thing: object) -> int:
    """A number of its own for a thing: unlike id(), not given again after the thing has died."""
    return _serials.setdefault(thing, _next_serial())


def _list_loops() -> list[asyncio.AbstractEventLoop]:
    while True:
        try:
            return list(_loops)
        except RuntimeError:  # another thread has just made a loop; a lock instead would be lost over a fork
            continue


def _native_threads() -> set[int] | None:
    """The threads that the kernel knows, None where it does not tell.

    Its list ends early where a thread ends that is just being listed, and then lacks threads that live on. Two lists
    that are alike are whole: what the first one ended with had not ended before the second one was made.
    """
    directory = Path("/proc/self/task")
    if not directory.exists():
        return None
    names, before = os.listdir(directory), None
    while names != before:
        names, before = os.listdir(directory), names
    return {int(name) for name in names}


def _threads() -> Iterator[tuple[object, str]]:
    alive = _native_threads()
    for thread in threading.enumerate():
        # Foreign threads that `threading` once met stay on its list for ever, ended or not.
        if (alive is None or thread.native_id in alive) and not thread.name.startswith(LASTING_THREADS):
            yield _serial(thread), f"thread {thread.name}"
    # `threading` never hears of threads that `_thread` or C code starts.
    for ident in (alive or set()) - {thread.native_id for thread in threading.enumerate()}:
        yield ident, f"native thread {ident}"


def _loops_open() -> Iterator[tuple[object, str]]:
    return ((_serial(loop), f"loop {loop!r}") for loop in _list_loops() if not loop.is_closed())


def _tasks() -> Iterator[tuple[object, str]]:
    # A closed loop is asked as well: its pending tasks will never end.
    return itertools.chain.from_iterable(_asyncio_tasks(loop) for loop in _list_loops())


def _asyncio_tasks(loop: asyncio.AbstractEventLoop) -> Iterator[tuple[object, str]]:
    return ((_serial(task), f"task {task.get_name()}: {task.get_coro()}") for task in asyncio.all_tasks(loop))


def _trio_tasks(parent: trio.lowlevel.Task) -> Iterator[tuple[object, str]]:
    for nursery in parent.child_nurseries:
        for task in nursery.child_tasks:
            yield _serial(task), f"task {task.name}"
            yield from _trio_tasks(task)


def _files() -> Iterator[tuple[object, str]]:
    directory = Path("/proc/self/fd")
    for name in os.listdir(directory) if directory.exists() else []:
        try:
            target = os.readlink(directory / name)
        except FileNotFoundError:  # closed meanwhile, as the descriptor that listed the directory is
            continue
        yield (name, target), f"file descriptor {name}: {target}"


def _take_census() -> Census:
    return {
        "threads": dict(_threads()),
        "loops": dict(_loops_open()),
        "tasks": dict(_tasks()),
        "files": dict(_files()),
    }


def _newcomers(before: Census, allowed: Iterable[str]) -> list[str]:
    now = _take_census()
    return [
        words for kind in KINDS if kind not in allowed for key, words in now[kind].items() if key not in before[kind]
    ]


def _wait_for_newcomers_to_go(before: Census, allowed: Iterable[str]) -> list[str]:
    """What is still there after the time of grace."""
    deadline = time.monotonic() + GRACE
    pause = 0.001
    while left := _newcomers(before, allowed):
        if pause > 0.01:  # most threads are only just ending: a collection is needed seldom, and costs 50 ms and more
            gc.collect()
            left = _newcomers(before, allowed)
        if not left or time.monotonic() > deadline:
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    return left


# Judging a test

_ended_early = pytest.StashKey[bool]()


def _import_without_greenlet(name: str) -> None:
    """Import a library that imports gevent and greenlet wherever they are installed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ModuleNotFoundError):
        for hidden in ("gevent", "greenlet"):
            patch.setitem(sys.modules, hidden, None)
        importlib.import_module(name)


def pytest_collection_finish() -> None:
    # Whoever has imported greenlet has loops that are bound to a thread: that is tested in processes of their own.
    if "greenlet" in sys.modules:
        raise pytest.UsageError("a module of the tests, or what it imports, has imported greenlet")
    # What the frameworks have made of modules is there for good. To go through it takes 0.1 s for each collection, and
    # many tests ask for some.
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    _import_without_greenlet("sentry_sdk")
    config.addinivalue_line("markers", f"leaves(*kinds): the test may leave behind any of {', '.join(KINDS)}")


def _may_leave(item: pytest.Item) -> set[str]:
    kinds = {kind for mark in item.iter_markers("leaves") for kind in mark.args}
    if unknown := kinds.difference(KINDS):
        raise pytest.UsageError(f"{item.nodeid}: leaves() takes any of {KINDS}, got {sorted(unknown)}")
    return kinds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if call.excinfo is not None:
        item.stash[_ended_early] = True
    return (yield)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test that leaves something behind. Set up first, this judges after all fixtures of the test have ended."""
    test: pytest.Function = request.node
    allowed = _may_leave(test)
    before = _take_census()
    yield
    if test.stash.get(_ended_early, False):
        return  # its traceback holds on to all it had, and one failure is enough
    # What gives back its threads and loops when it is dropped must not be kept by pytest: neither as an argument of the
    # test nor by a traceback in the log.
    test.funcargs.clear()
    caplog.get_records("setup").clear()
    caplog.get_records("call").clear()
    if left := _wait_for_newcomers_to_go(before, allowed):
        pytest.fail(f"left behind {GRACE:g} s after the test:\n  " + "\n  ".join(left), pytrace=False)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Put `_watched` around an async test, inside of what anyio's plugin puts around it."""
    test = pyfuncitem.obj
    if iscoroutinefunction(test):
        pyfuncitem.obj = _watched(test, pyfuncitem)
        try:
            return (yield)
        finally:
            pyfuncitem.obj = test
    handle = getattr(test, "hypothesis", None)
    if handle is None or not iscoroutinefunction(inner := handle.inner_test):
        return (yield)
    handle.inner_test = _watched(inner, pyfuncitem)
    try:
        return (yield)
    finally:
        handle.inner_test = inner  # anyio's plugin has left one of its own there, bound to this backend


def _watched(test: Callable[..., Awaitable[None]], item: pytest.Function) -> Callable[..., Awaitable[None]]:
    """The test, failing if it waits for ever or leaves tasks running.

    Tasks must be looked for before the test's loop ends, since that cancels them all. And a test that waits for ever
    must be cancelled: the exception of pytest-timeout's signal is raised in whatever runs at the time, which is not the
    test, and the end of a trio loop then waits for it for ever too.
    """
    backend, _ = cast("tuple[str, object]", item.funcargs["anyio_backend"])
    seconds = 0.9 * _timeout(item)
    may_leave_tasks = "tasks" in _may_leave(item)

    def tasks_here() -> dict[object, str]:
        if backend == "trio":
            root = trio.lowlevel.current_root_task()
            return {} if root is None else dict(_trio_tasks(root))
        return dict(_asyncio_tasks(asyncio.get_running_loop()))

    @functools.wraps(test)
    async def watched(*args: Any, **kwargs: Any) -> None:
        before = tasks_here().keys()
        place = ""
        with anyio.move_on_after(seconds) as scope:
            try:
                await test(*args, **kwargs)
            except BaseException as error:
                if scope.cancel_called:
                    place = "".join(traceback.format_exception(error))
                raise
        if scope.cancel_called:
            pytest.fail(f"still waiting after {seconds:g} s\n{place}", pytrace=False)
        deadline = time.monotonic() + GRACE
        while (left := tasks_here()).keys() - before and not may_leave_tasks and time.monotonic() < deadline:
            await anyio.sleep(0.01)
        if (new := left.keys() - before) and not may_leave_tasks:
            words = "\n  ".join(left[key] for key in new)
            pytest.fail(f"still running {GRACE:g} s after the test:\n  {words}", pytrace=False)

    return watched


def _timeout(item: pytest.Function) -> float:
    """The seconds that pytest-timeout gives a test."""
    if mark := item.get_closest_marker("timeout"):
        seconds = mark.args[0] if mark.args else mark.kwargs["timeout"]
    else:
        seconds = item.config.getoption("timeout")
        seconds = item.config.getini("timeout") if seconds is None else seconds
    return float(seconds) or math.inf
