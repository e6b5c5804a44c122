"""Random schedules: real threads that run one at a time, in an order that a seed chooses, by a clock of their own.

A `Schedule` lets one of its threads go on and keeps all others waiting. Who is next is drawn anew, by the seed, between
any two bytecode instructions of the modules in `SCHEDULED`, and wherever a lock is taken, let go or slept on. These
modules are loaded anew for each schedule, upon locks, threads, queues, a clock and event loops that are the schedule's.
So what happens to a server once in a million requests, some seed has happen every time. Where nobody can go on any more
that is seen at once, and by no time-out: a wake-up was lost.

Time passes only when all threads sleep, and then at once to the end of the first sleep; by some seeds also now and then
while others would go on, as it does for threads that a busy machine keeps from running.

Not scheduled: what asyncio, anyio and the standard library do between two instructions of their own; uvloop and trio,
which have no loops that could be built on such a clock.
"""

from __future__ import annotations

import asyncio
import builtins
import functools
import gc
import importlib
import importlib.util
import math
import os
import queue
import random
import sys
import threading
import time
import traceback
import types
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import bridge
from tests.drivers import LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

PACKAGE = Path(bridge.__file__).parent
SCHEDULED = ("threads", "hubs", "channel", "workers", "loops", "lifespan", "life", "wsgi_to_asgi", "asgi_to_wsgi")
"""The modules that are loaded anew: all that know threads or loops, but for WebSockets."""

BEGIN = 1000.0
"""What the clock shows first: no 0, for which a machine may forget to look."""

PATIENCE = 10.0
"""Seconds of that clock that a schedule may take. What is woken by somebody's patience alone was not woken."""

STEPS = 1_000_000
"""Points that one schedule may pass before it is taken for one that goes round in circles. Most have
less than 20,000."""

FAIR = 5_000
"""Points after which a thread steps back that nothing has stopped: it may be waiting for another in a circle."""

HURRY_SECONDS = 0.1
"""Sleeps that may be over although others could go on: a machine that is busy for longer hurts no rule."""

Mutation = str
"""The name of a module of SCHEDULED, and below it a hunk of a diff that fits it at one place."""


class Stuck(AssertionError):
    """Nobody can go on, or there is no end to it."""


class Misfit(Exception):
    """A mutation is of something that is not there: it proves nothing."""


class _Abandoned(BaseException):
    """Ends a thread of a schedule that is over, wherever it stands."""


class _Thread:
    """A thread under a schedule."""

    def __init__(self, name: str, priority: float) -> None:
        self.name = name
        self.priority = priority
        self.lasting = name.startswith("bridge-watch")  # it may still be there at the end
        self.gate = threading.Lock()  # locked, but while it is this thread's turn to go on
        self.gate.acquire()
        self.ident = 0
        self.over = False
        self.waits_for: object = None
        self.deadline = math.inf


# -- Theory: who goes on -----------------------------------------------------------------------------------------------
#
# Each thread sleeps on its gate, a real lock, unless it is the one that runs, `_current`. It passes on by choosing the
# next, opening that one's gate and closing its own. So all that a schedule knows is touched by one thread at a time.
#
# A seed chooses in one of two ways. A walk: after some instructions anybody goes on. Or priorities (PCT, probabilistic
# concurrency testing): the highest goes on until it sleeps, or wakes a higher one; at few random points it falls to the
# lowest. That finds what needs one thread to be very late, which a walk hardly ever makes.
#
# When only threads are left that last as long as the process, or when one has failed, the others are woken one after
# the other, and each ends by an exception where it stands.


class Schedule:
    """One run of some threads, by one seed.

    Args:
        seed: Chooses all.
        mutation: What to break first.
        refusals: How often no thread can be started, from 0 to 1.

    Attributes:
        now: The time, in seconds.
        random: For the scenario's own choices.
        course: Who went on, each time that somebody else did.
        modules: The modules of the package that run under this schedule, by name.
    """

    def __init__(self, seed: int, mutation: Mutation | None = None, refusals: float = 0.0) -> None:
        self.now = BEGIN
        self.random = random.Random(f"scenario {seed}")
        self.course: list[str] = []
        self._choice = random.Random(seed)
        self._by_priority = self._choice.random() < 0.5
        self._mean = self._choice.choice((100, 400, 1600) if self._by_priority else (1, 4, 16, 64, 256))
        self._hurry = self._choice.choice((0.0, 0.0, 0.01))
        self._refusals = refusals
        self._points = 0
        self._left = self._draw()  # points until somebody else may go on
        self._chosen_at = 0
        self._threads: list[_Thread] = []
        self._by_ident: dict[int, _Thread] = {}
        self._current: _Thread | None = None
        self._ending = False
        self._failure: BaseException | None = None
        self._over = threading.Lock()
        self._over.acquire()
        self.loops: list[Loop] = []
        self.modules = _Modules(self, mutation)

    # -- From outside -------------------------------------------------------------------------------------------------

    def run(self, *actors: Callable[[], object]) -> None:
        """Run functions, each in a thread, until these have ended, and all threads that they have started.

        Raises:
            Stuck: It did not come to that.
            BaseException: What one of them has raised.
        """
        collecting = gc.isenabled()
        gc.disable()  # it may come at any time, which no seed knows of
        try:
            for number, actor in enumerate(actors):
                self.start(actor, f"{getattr(actor, '__name__', 'actor')}-{number}")
            self._pass_to(self._choose())
            assert self._over.acquire(timeout=3 * LIMIT), f"a thread does not come to a point\n{self._stacks()}"
        finally:
            self._ending = True
            for loop in self.loops:
                loop.give_up()
            if collecting:
                gc.enable()
        if self._failure is not None:
            raise self._failure

    # -- What threads do ----------------------------------------------------------------------------------------------

    def start(self, func: Callable[[], object], name: str) -> _Thread:
        """Start a thread."""
        if self._ending:  # by a finalizer
            raise RuntimeError("can't start new thread at interpreter shutdown")
        if self._current is not None and self.random.random() < self._refusals:
            raise RuntimeError("can't start new thread")
        thread = _Thread(name, self._choice.random())
        native = threading.Thread(target=self._live, args=(thread, func), name=f"scheduled {name}", daemon=True)
        native.start()
        assert native.ident is not None
        thread.ident = native.ident
        self._threads.append(thread)
        self._by_ident[thread.ident] = thread
        return thread

    def point(self) -> None:
        """Perhaps somebody else goes on here."""
        self._points += 1
        self._left -= 1
        if self._left <= 0:
            thread = self._here()
            if thread is not None:
                if self._by_priority:
                    thread.priority = -self._points
                self._left = self._draw()
                self._pass_on(thread)

    def wait(self, thing: object, seconds: float = math.inf) -> bool:
        """Sleep until `wake` is called for this thing; False if the time is over before."""
        thread = self._here()
        if thread is None:
            raise _Abandoned
        thread.waits_for, thread.deadline = thing, self.now + max(seconds, 0.0)
        self._pass_on(thread)
        return thread.waits_for is not _TIME

    def wake(self, thing: object) -> None:
        """Let all who sleep for this thing go on."""
        self._let_go(thing)
        thread = self._here()
        if thread is not None and self._by_priority:
            self._pass_on(thread)
        else:
            self.point()

    def work(self, most: int = 3000) -> None:
        """Be busy for a while, so that others come to different places meanwhile."""
        for _ in range(int(self.random.random() ** 3 * most)):
            self.point()

    def sleep(self, seconds: float) -> None:
        self.wait(object(), seconds)

    def time(self) -> float:
        return self.now

    def run_loop(self, func: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine in an event loop, as a server does; no task may be left then."""
        loop = Loop(self)
        try:
            result = loop.run_until_complete(func())
            left = asyncio.all_tasks(loop)
            assert not left, f"tasks are left: {left}"
            return result
        finally:
            loop.close()

    # -- Who goes on --------------------------------------------------------------------------------------------------

    def _here(self) -> _Thread | None:
        """The thread that runs; None if it is none of ours, as a finalizer's may be, or not any more."""
        if self._ending:
            return None
        thread = self._by_ident.get(threading.get_ident())
        return thread if thread is self._current else None

    def _draw(self) -> int:
        return 1 + int(self._choice.expovariate(1 / self._mean))

    def _pass_on(self, thread: _Thread) -> None:
        try:
            heir = self._choose()
        except Stuck as error:
            self._fail(error)
            raise _Abandoned from None
        if heir is not thread:
            self._pass_to(heir)
            thread.gate.acquire()
            if self._ending:
                raise _Abandoned

    def _pass_to(self, heir: _Thread) -> None:
        self.course.append(heir.name)
        self._current = heir
        self._chosen_at = self._points
        heir.gate.release()

    def _choose(self) -> _Thread:
        self._points += 1
        if self._points > STEPS or self.now > BEGIN + PATIENCE:
            raise Stuck(f"there is no end to it\n{self._stacks()}")
        alive = [thread for thread in self._threads if not thread.over]
        while True:
            ready = [thread for thread in alive if thread.waits_for is None or thread.waits_for is _TIME]
            if ready and (not self._hurry or self._choice.random() >= self._hurry):
                break
            deadline = min((thread.deadline for thread in alive), default=math.inf)
            if deadline < math.inf and not (ready and deadline - self.now > HURRY_SECONDS):
                self.now = max(self.now, deadline)
                for thread in alive:
                    if thread.deadline <= self.now:
                        thread.waits_for, thread.deadline = _TIME, math.inf
            elif not ready:
                raise Stuck(f"nobody can go on\n{self._stacks()}")
            else:
                break
        if not self._by_priority:
            return self._choice.choice(ready)
        if self._points - self._chosen_at > FAIR and self._current is not None:
            self._current.priority = -self._points
        return max(ready, key=lambda thread: thread.priority)

    def _let_go(self, thing: object) -> None:
        for thread in self._threads:
            if thread.waits_for is thing:
                thread.waits_for, thread.deadline = None, math.inf

    # -- A thread's life ----------------------------------------------------------------------------------------------

    def _live(self, thread: _Thread, func: Callable[[], object]) -> None:
        thread.gate.acquire()
        try:
            if not self._ending:
                sys.settrace(self._trace)
                func()
        except _Abandoned:
            pass
        except BaseException as error:
            self._fail(error)
        finally:
            sys.settrace(None)
            del func
            thread.over = True
            self._let_go(thread)
            self._leave()

    def _fail(self, error: BaseException) -> None:
        if not self._ending:
            self._failure = error
            self._ending = True

    def _leave(self) -> None:
        """Have somebody else go on, since this thread is at its end."""
        alive = [thread for thread in self._threads if not thread.over]
        if not alive:
            self._over.release()
            return
        heir = alive[0]
        self._ending = self._ending or all(thread.lasting for thread in alive)
        if not self._ending:
            try:
                heir = self._choose()
            except Stuck as error:
                self._fail(error)
        self._pass_to(heir)

    def _trace(self, frame: types.FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in _FILES:
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self._trace_point

    def _trace_point(self, frame: types.FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            self.point()
        return self._trace_point

    def _stacks(self) -> str:
        frames = sys._current_frames()
        parts = [f"after {self._points} points, {self.now - BEGIN:g} s"]
        for thread in self._threads:
            if not thread.over:
                stack = traceback.extract_stack(frames.get(thread.ident))
                shown = [entry for entry in stack if entry.filename not in (__file__, threading.__file__)]
                state = "waits" if thread.waits_for not in (None, _TIME) else "could go on"
                parts.append(f"{thread.name} {state}:\n" + "".join(traceback.format_list(shown)))
        return "\n".join(parts)


def _nothing(*args: object) -> None:
    pass


_TIME = object()
"""What a thread waits for whose time is over."""


# -- What the modules find in the places of threading, queue and time --------------------------------------------------


class Lock:
    """`threading.Lock`."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._locked = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        schedule = self._schedule
        schedule.point()
        deadline = math.inf if timeout < 0 else schedule.now + timeout
        while self._locked:
            if not blocking or schedule.now >= deadline:
                return False
            schedule.wait(self, deadline - schedule.now)
        self._locked = True
        return True

    def release(self) -> None:
        if not self._locked:
            raise RuntimeError("release unlocked lock")
        self._locked = False
        self._schedule.wake(self)

    def locked(self) -> bool:
        return self._locked

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *args: object) -> None:
        self.release()


class Condition:
    """`threading.Condition`, as far as it is used."""

    def __init__(self, schedule: Schedule, lock: Lock) -> None:
        self._schedule = schedule
        self._lock = lock

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        schedule = self._schedule
        deadline = math.inf if timeout is None else schedule.now + timeout
        while not predicate():
            if schedule.now >= deadline:
                return False
            self._lock._locked = False  # in one step with the sleep
            schedule._let_go(self._lock)
            try:
                schedule.wait(self, deadline - schedule.now)
            finally:
                self._lock.acquire()
        return True

    def notify_all(self) -> None:
        assert self._lock.locked()
        self._schedule.wake(self)


class SimpleQueue:
    """`queue.SimpleQueue`."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)
        self._schedule.wake(self)

    def get(self) -> Any:
        self._schedule.point()
        while not self._items:
            self._schedule.wait(self)
        return self._items.popleft()

    def get_nowait(self) -> Any:
        self._schedule.point()
        if not self._items:
            raise queue.Empty
        return self._items.popleft()


class Thread:
    """`threading.Thread`."""

    def __init__(
        self, schedule: Schedule, *, target: Callable[..., object], name: str, args: tuple[Any, ...], daemon: bool
    ) -> None:
        self._schedule = schedule
        self._target: Callable[[], object] = functools.partial(target, *args)
        self._name = name
        self._thread: _Thread | None = None

    def start(self) -> None:
        self._thread = self._schedule.start(self._target, self._name)
        self._schedule.point()

    @property
    def ident(self) -> int | None:
        return None if self._thread is None else self._thread.ident

    def join(self) -> None:
        assert self._thread is not None
        self._schedule.point()
        while not self._thread.over:
            self._schedule.wait(self._thread)


class Loop(asyncio.BaseEventLoop):
    """asyncio's loop, which waits as a thread of a schedule: for nothing but its time and threads."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.set_debug(False)
        self._schedule = schedule
        self._selector = self
        self._called = False
        schedule.loops.append(self)

    def time(self) -> float:
        return self._schedule.now

    def select(self, timeout: float | None) -> list[object]:
        schedule = self._schedule
        schedule.point()
        if not self._called and timeout != 0:
            schedule.wait(self, math.inf if timeout is None else timeout)
        self._called = False
        return []

    def get_map(self) -> dict[int, object]:
        """What a selector holds of a loop that has no connections: the socket that wakes it."""
        return {0: self}

    def _write_to_self(self) -> None:
        self._called = True
        self._schedule.wake(self)

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def give_up(self) -> None:
        """Let go of all, when the schedule is over."""
        if not self.is_closed():
            for task in asyncio.all_tasks(self):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            self.close()


# -- The modules, upon these -------------------------------------------------------------------------------------------


class _Modules:
    """The modules of SCHEDULED for one schedule, loaded where they are first asked for."""

    def __init__(self, schedule: Schedule, mutation: Mutation | None) -> None:
        part = functools.partial
        lock: Any = part(Lock, schedule)
        shared = {"Lock": lock, "get_ident": threading.get_ident}
        clock = types.SimpleNamespace(monotonic=schedule.time, sleep=schedule.sleep)
        self._mutation = mutation
        self._loaded: dict[str, types.ModuleType] = {}
        self._fakes: dict[str, Any] = {
            "_thread": types.SimpleNamespace(**vars(importlib.import_module("_thread")) | {"allocate_lock": lock}),
            "queue": types.SimpleNamespace(**vars(queue) | {"SimpleQueue": part(SimpleQueue, schedule)}),
            "threading": types.SimpleNamespace(
                **vars(threading)
                | shared
                | {
                    "Thread": part(Thread, schedule),
                    "Condition": part(Condition, schedule),
                    "_register_atexit": _nothing,
                }
            ),
            "time": types.SimpleNamespace(**vars(time) | vars(clock)),
            "os": types.SimpleNamespace(**{name: value for name, value in vars(os).items() if "atfork" not in name}),
            "importlib": types.SimpleNamespace(import_module=self._import_for_original),
        }
        # partial objects have no attributes of what they make
        self._fakes["threading"].Thread.start = Thread.start

    def __getattr__(self, name: str) -> Any:
        return self._load(name)

    def _load(self, name: str) -> types.ModuleType:
        if name not in self._loaded:
            module = self._loaded[name] = types.ModuleType(f"bridge.{name}")
            module.__spec__ = importlib.util.find_spec(f"bridge.{name}")  # by which a traceback finds the source
            vars(module)["__builtins__"] = vars(builtins) | {"__import__": self._import}
            mutation = self._mutation if self._mutation and self._mutation.startswith(f"{name}\n") else None
            exec(_compile(name, mutation), vars(module))
        return self._loaded[name]

    def _import(self, name: str, scope: Any = None, local: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if name in self._fakes:
            return self._fakes[name]
        if name == "bridge" and fromlist:
            return types.SimpleNamespace(**{part: self._load(part) for part in fromlist})
        package, _, part = name.partition(".")
        if package == "bridge" and part in SCHEDULED:
            return self._load(part)
        return builtins.__import__(name, scope, local, fromlist, level)

    def _import_for_original(self, name: str) -> Any:
        return self._fakes.get(name) or importlib.import_module(name)


@functools.cache
def _compile(name: str, mutation: Mutation | None) -> types.CodeType:
    path = PACKAGE / f"{name}.py"
    source = path.read_text(encoding="utf-8")
    if mutation is not None:
        hunk = [line if line.strip() else " \n" for line in mutation.splitlines(keepends=True)[1:]]
        old, new = ("".join(line[1:] for line in hunk if line[0] in kinds) for kinds in (" -", " +"))
        if source.count(old) != 1:
            raise Misfit(f"{path} has {source.count(old)} times\n{old}")
        source = source.replace(old, new)
    return compile(source, str(path), "exec")


_FILES = {str(PACKAGE / f"{name}.py") for name in SCHEDULED}
