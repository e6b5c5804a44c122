"""Who runs the event loop where the server has none. No app is known here."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
import math
import os
import queue
import sys
import threading
import time
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from bridge import hubs, threads
from bridge.threads import Lock, get_ident

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

T = TypeVar("T")

__all__ = [
    "LentLoop",
    "LoopPool",
    "ServedLoop",
    "Turn",
    "TurnedLoop",
    "has_ended",
    "is_cancellation",
    "notice_fork",
]

WATCH_SECONDS = 0.012
"""How often the watch looks at loops that may be left alone. Each look costs the threads that are busy then a hand-over
of the interpreter lock, so it shall be seldom; together with IDLE_SECONDS it bounds by how much timers may be late."""

IDLE_SECONDS = 0.004
"""How long nobody must have run a loop before its keeper takes it."""

GIVE_WAY_SECONDS = 0.00005
"""How long a thread sleeps so that the watch can look: about what it takes a thread to wake up."""

CANCEL_SECONDS = 5.0
"""How long tasks may go on after they were cancelled because their loop is closed, and threads after them. Guessed;
those that do are left."""

TURN_SECONDS = 0.004
"""How long a loop may be led without a turn of its own, in which its timers and descriptors get theirs: as long as it
may be left alone."""

STEPS = 32
"""How often a leader runs what is ready before it gives the loop such a turn: an app may wait for a descriptor by
looking at it again and again. A guess."""

NESTS = "nest_asyncio"
"""Has apps run a loop within what it runs: that one waits for what is ready, which must then lie where it looks."""

DEBUG_STACK_DEPTH = 10
"""How much of where it was made a coroutine knows in debug mode: as much as asyncio has it know."""

MADE_TASKS = 64
"""Tasks that a request may make before those that have ended are sorted out."""

LOOK_SECONDS = 1.0
"""How often a thread that waits for a lent loop looks whether there still is one."""

POOLED_LOOPS = 64
"""Loops that one pool keeps. Each holds three file descriptors."""

_numbers = itertools.count(1)


# -- Theory: the thread that waits runs the loop (Leader/Followers) ----------------------------------------------------
#
# The parties are threads that wait for something to happen in the loop: a server's thread for its app's next word, the
# keeper for a wish to have the loop. Each waits by a Turn. One of them, the leader, runs the loop; the followers sleep,
# each on its Turn's lock; whoever finds no leader becomes it.
#
# What a thread waits for is told to its Turn from within the loop, by `tell`. If the leader itself is told, the loop is
# stopped, so that the leader comes out; any other thread is woken. Who comes out with its Turn told steps down: it
# hands the loop to the first follower that still waits, or leaves it alone. So a lone thread runs its app without any
# other thread's help, and of many threads one works for all until its own work is done.
#
# Most of what an app does for a request waits for nothing. So a leader steps before it runs the loop: what is ready to
# be run comes into a queue of our own (`_queue`) as long as nobody is in run_forever(), since `call_soon` is diverted;
# the leader runs it from there as the loop would, which is marked as running meanwhile. Only if that does not come to
# the turn's end, as where the app waits for a timer, a descriptor or another thread, it goes on in run_forever(); or if
# the loop has not had a turn for TURN_SECONDS. What is left in the queue is run by the next leader, or by the keeper. A
# step costs half of a run; and since it never lets the interpreter lock go, as a run does at each turn, other threads
# seldom find a leader for whom they would have to wait. Loops whose methods cannot be replaced are run from the first.
#
# A stop is a hint. It may come late (uvloop runs what is ready first), twice, or to the next leader: whoever comes out
# of run_forever() looks whether its Turn was told, and goes back if it was not.
#
# A loop that is left alone with work (`needs_keeper`) is watched by one thread of the process. If nobody has taken it
# for IDLE_SECONDS, its keeper leads it, until a thread that waits wants it. In a busy time that never happens.
# Threads that must not run a loop, because another one (trio's, too) runs in them, wait as followers and have the
# keeper lead at once.
#
# Greenlets cannot be moved to another thread, and SQLAlchemy's async engine waits in the middle of one. So where they
# are used, each loop has one thread for ever: every thread waits as a follower, and the keeper leads until the end.
# "Used" means that the package is imported, which costs a thread hop for each request also where only Sentry's SDK has
# imported it. To wait until a greenlet is really suspended in a leader's thread (greenlet.settrace would tell) is too
# late: the thread has to go and serve its own request, and its greenlet can be continued nowhere else. Nor can it stay
# until all of them have ended: under load there may be no such moment, and a greenlet that itself awaits send() or
# receive() waits for the very thread that would wait for it. Only what is known before the first of them is safe.
# gevent's greenlets wait so, too. All locks and threads are real ones, therefore, also where gevent has patched the
# standard library (bridge/threads.py); a Turn's lock is one that a greenlet can wait for.
#
# `_mutex` guards the leader, the followers and what the watch knows; it is held for a few instructions, never while a
# callback or the loop runs. A Turn's lock is unlocked while a wake-up is on its way, and locked otherwise.
#
# Lost wake-ups: `tell` runs in the loop, where the leader cannot change. Each follower checks its Turn under the mutex
# before it sleeps and after it was woken, and a loop is handed over under the same mutex, and only to one that is in
# the list: so it is never handed to a thread that has gone. Whoever has something for the loop puts it into the queue,
# or wakes the loop if somebody is in run_forever() (`_runs`); whoever goes there says so first, and looks at the queue
# after that.
#
# Exceptions out of run_forever(): KeyboardInterrupt and SystemExit out of a signal's handler, which runs in the main
# thread in the middle of whatever it does. The leader steps down all the same; the loop has lost at most the callback
# in which it was. In other threads only a task or a callback of the loop can have raised them: no reason to end the
# thread that happens to lead, nor the keeper.
#
# Fork: the child has none of the threads, and must not touch the loop: it shares its selector with the parent's. It
# drops the loop unclosed, with its tasks, and makes a new one when it needs one. Exit: keepers and the watch are
# daemons; `close` ends what a loop still runs.
#
# The garbage collector may run in the middle of any of this, under any lock: no finalizer may call in here.


class Turn:
    """One thread's wait for what happens in a loop.

    Attributes:
        told: Whether it has happened. Set by `TurnedLoop.tell`; the thread itself takes it back before it waits anew.
    """

    # Set where they change: most turns are told by the loop that their own thread runs, and need no more than that.
    told: bool = False
    leads: bool = True  # whether the thread may run a loop
    forced: bool = False  # also where greenlets bind the loop to its keeper
    thread: int = 0  # that waits
    failure: BaseException | None = None  # of the keeper: nobody will tell
    _lock: threads.AnyLock | None = None  # once it has lined up

    def _sleep(self) -> None:
        assert self._lock is not None
        self._lock.acquire()

    def _sleep_for(self, seconds: float) -> bool:
        assert self._lock is not None
        return self._lock.acquire(timeout=seconds)

    def _wake(self) -> None:
        lock = self._lock
        if lock is not None:
            # An earlier wake-up may not have been slept for: one is enough.
            with contextlib.suppress(RuntimeError):
                lock.release()

    def _prepare(self) -> None:
        if self._lock is None:
            self._lock = threads.locked()


class TurnedLoop:
    """An event loop that is run by turns.

    Args:
        factory: Makes the event loop.
        needs_keeper: Whether the loop has to be run while nobody waits for it.

    Attributes:
        native: The event loop.
        handovers: How often one thread has handed it to another.
    """

    def __init__(self, factory: Callable[[], asyncio.AbstractEventLoop], needs_keeper: bool) -> None:
        self.native: asyncio.AbstractEventLoop = hubs.make_loop(factory)
        self.handovers: int = 0
        self.needs_keeper: bool = needs_keeper
        self._executor = _Executor()
        self.native.set_default_executor(self._executor)
        self._factory: Any = None  # the task factory that we have set
        self._root = self._make_root()
        self._mutex = threads.mutex()
        self._leader: Turn | None = None
        self._followers: list[Turn] = []
        self._keeper: Turn | None = None  # once there is one
        self._keeper_over = Lock()  # locked while the keeper's thread lives
        self._watched = False
        # What the loop has to run by itself, if it lets it be seen (asyncio's): what came from other threads, or was
        # left when it stopped.
        self._ready: deque[asyncio.Handle] | None = getattr(self.native, "_ready", None)
        self._left_at = 0.0  # when somebody has last come out of run_forever(), by time.monotonic(); 0 to have it run
        self._queue: deque[asyncio.Handle] = deque()  # what is ready to be run
        self._stepping = False  # the leader runs what is in the queue
        self._runs = False  # somebody is in run_forever()
        self._callers_hooks: Any = (None, None)  # for asynchronous generators, of the leader's thread
        self._callers_depth: int | None = None  # to which its coroutines know where they were made, in debug mode
        self._hooks: Any = self._find_hooks()  # the loop's own; None if it has no queue
        self._divert()
        self._closed = False  # somebody closes it, or has
        self._over = False  # the event loop is closed
        _every.add(self)

    def _make_root(self) -> asyncio.Task[None]:
        """The task that anyio takes for the one with which the loop was started.

        anyio ends its worker threads with that task, and knows it by the callback of ``run_until_complete()``, which is
        private to asyncio. Without it each request would start threads of its own for its sync endpoints.
        """
        root = self.native.create_task(_sleep_forever())
        mark = getattr(asyncio.base_events, "_run_until_complete_cb", None)
        if mark is not None:
            root.add_done_callback(mark)  # at the loop's end; all it does is to stop the loop, which is a hint
        return root

    def _find_hooks(self) -> Any:
        """What run_forever() gives to sys.set_asyncgen_hooks(); None where the loop's methods cannot be replaced."""
        native: Any = self.native
        if not hasattr(native, "__dict__"):
            return None
        try:
            return native._asyncgen_firstiter_hook, native._asyncgen_finalizer_hook
        except AttributeError:
            return None

    def _tasks(self) -> set[asyncio.Task[Any]]:
        """What runs in the loop for others."""
        factory: Any = self.native.get_task_factory()
        if isinstance(factory, _Made):  # an app may have set another
            return factory.pending()
        tasks = asyncio.all_tasks(self.native)
        tasks.discard(self._root)
        return tasks

    def count_tasks(self) -> None:
        """Know from now on which tasks the loop has. To ask asyncio means to look through those of all loops."""
        self._factory = _Made(self.native.get_task_factory())
        self.native.set_task_factory(self._factory)

    @property
    def waiting(self) -> int:
        """The threads that wait while another one runs the loop."""
        return len(self._followers)

    @property
    def has_keeper(self) -> bool:
        """Whether a thread of its own was started for it."""
        return self._keeper is not None

    # -- Waiting ----------------------------------------------------------------------------------------------------

    def wait(self, turn: Turn, callback: Callable[[], object] | None = None) -> None:
        """Return once the turn was told; run the loop meanwhile, if nobody else does.

        Args:
            callback: Run in the loop first. It sees the caller's context.
        """
        try:
            asks = self._take(turn)
            if asks is None:
                self._lead(turn, callback)
            elif self._follow(turn, callback, asks):
                self._lead(turn, None)
        finally:
            if self._leader is turn or turn._lock is not None:
                try:
                    self._step_down(turn)
                except BaseException:  # a signal's handler has raised in the middle of it
                    self._step_down(turn)
                    raise

    def keep(self) -> None:
        """Have the loop run from now on also while nobody waits for it."""
        if not self.needs_keeper:
            with self._mutex:
                self.needs_keeper = True  # whoever leads has it watched when it leaves
                watch = self._leader is None and not self._watched
            if watch:
                _watch.add(self)

    def hand_over(self) -> None:
        """Have the keeper run the loop now, if nobody does."""
        with self._mutex:
            if self._closed or self._leader is not None:
                return
            self._hand_to(self._get_keeper())

    def tell(self, turn: Turn) -> None:
        """Say that what a turn waits for has happened. From within the loop only."""
        turn.told = True
        if self._leader is not turn:
            turn._wake()
        elif not self._stepping:
            self.native.stop()

    @property
    def leader(self) -> int:
        """The thread that runs the loop, 0 for none."""
        leader = self._leader
        return leader.thread if leader is not None else 0

    def is_led_by(self, turn: Turn) -> bool:
        """Whether the loop is run by the thread of this turn. From within the loop only."""
        return self._leader is turn

    def runs_here(self) -> bool:
        """Whether the caller is within the loop."""
        return asyncio._get_running_loop() is self.native

    def is_busy(self) -> bool:
        """Whether something is ready to be run; True as well where the loop does not let it be seen. In the loop."""
        return bool(self._queue or getattr(self.native, "_ready", True))

    def post(self, callback: Callable[[], object]) -> None:
        """Have the loop run a callback, whoever runs it next. From any thread; harmless if the loop is closed."""
        with self._mutex:
            if not self._closed:
                self._hand_in(callback)

    def _hand_in(self, callback: Callable[[], object]) -> None:
        """Make a callback ready to be run. Under the mutex, from any thread."""
        if self._runs or (self._hooks is None and self._leader is not None):
            self.native.call_soon_threadsafe(callback)
        else:
            self.native.call_soon(callback)  # nobody sleeps in it, so nobody has to be woken

    def _take(self, turn: Turn) -> bool | None:
        """Become the leader, or join the followers.

        Whoever calls it has the turn leave after it, also where it raises.

        Returns:
            None for the leader; for a follower, whether the keeper has to be asked for the loop.
        """
        running = _get_running_loop()
        leads = running is None and (turn.forced or "greenlet" not in sys.modules)
        turn.thread = get_ident()
        asks = False
        with self._mutex:
            if self._leader is None and leads and not self._over:
                self._leader = turn
            else:
                turn.leads = leads
                asks = self._line_up(turn, running)
        return None if self._leader is turn else asks  # at once, or handed over in this very moment

    def _line_up(self, turn: Turn, running: object) -> bool:
        """Join the followers, or lead after all. Under the mutex.

        Returns:
            Whether the keeper has to be asked for the loop.
        """
        if self._over:
            raise RuntimeError("the event loop is closed")
        if running is not None and running is self.native:
            raise RuntimeError("an event loop cannot be waited for by what runs in it")
        if running is None and self._leader is not None and self._leader.thread == turn.thread:
            # It is ourselves, before an interrupt kept us from stepping down.
            self._leader = turn if turn.leads else None
            if turn.leads:
                return False
        # First of all: where no thread can be started, nothing has changed.
        keeper = self._get_keeper() if self._leader is None else None
        turn._prepare()
        self._followers.append(turn)
        if keeper is not None:
            self._hand_to(keeper)
        return turn.leads and self._leader is self._keeper

    def _arrive(self, callback: Callable[[], object] | None) -> None:
        if callback is not None:
            callback()
        if self._keeper is not None:
            self.tell(self._keeper)

    def _follow(self, turn: Turn, callback: Callable[[], object] | None, asks: bool) -> bool:
        """Wait until the turn was told: False; or until the loop is handed over: True."""
        if callback is not None and _get_running_loop() is _TRIO:
            callback = partial(_call_out_of_trio, contextvars.copy_context(), callback)
        if asks:
            callback = partial(self._arrive, callback)
        if callback is not None:
            with self._mutex:
                self._hand_in(callback)
        while True:
            with self._mutex:
                if turn.told or self._leader is turn:
                    return not turn.told
                failure, turn.failure = turn.failure, None  # which another wait shall not hear of
                if failure is not None:
                    raise RuntimeError("the thread that ran the event loop has failed") from failure
                if self._over:
                    raise RuntimeError("the event loop was closed before it came to what was waited for")
            turn._sleep()

    def _lead(self, turn: Turn, callback: Callable[[], object] | None) -> None:
        """Do what the loop has to do until the turn was told. For the leader."""
        if self._may_step():
            self._step(turn, callback)
        elif callback is not None:
            callback()  # as good as call_soon: nobody else runs the loop
        while not turn.told:
            self._run()

    def _may_step(self) -> bool:
        """Whether the leader may begin without the loop: not before it has had its first turn, nor for long."""
        if self._hooks is None or not self._left_at or NESTS in sys.modules:
            return False
        return not self.needs_keeper or time.monotonic() - self._left_at < TURN_SECONDS

    def _step(self, turn: Turn, callback: Callable[[], object] | None) -> None:
        """Do as the loop does, without it, until the turn was told or nothing is ready to be run."""
        queue, run = self._queue, _run
        steps, ends = STEPS, time.monotonic() + TURN_SECONDS
        self._callers_hooks = sys.get_asyncgen_hooks()
        try:
            self._stepping = True
            asyncio._set_running_loop(self.native)
            sys.set_asyncgen_hooks(*self._hooks)
            if self.native.get_debug():
                run = _run_watched
                self._callers_depth = sys.get_coroutine_origin_tracking_depth()
                sys.set_coroutine_origin_tracking_depth(DEBUG_STACK_DEPTH)
            while self._ready:
                queue.append(self._ready.popleft())
            if callback is not None:
                callback()
            while queue and steps and not turn.told and time.monotonic() < ends:
                steps -= 1
                for _ in range(len(queue)):  # all of them, as the loop does at a turn, also behind its stop()
                    run(queue.popleft())
        except (KeyboardInterrupt, SystemExit) as error:
            if not self._survives(error):
                raise
        finally:
            self._stop_stepping()

    def _stop_stepping(self) -> None:
        """Leave all as it was before; or do what is left of that, after an interrupt."""
        asyncio._set_running_loop(None)
        sys.set_asyncgen_hooks(*self._callers_hooks)
        if self._callers_depth is not None:
            sys.set_coroutine_origin_tracking_depth(self._callers_depth)
            self._callers_depth = None
        self._stepping = False

    def _divert(self) -> None:
        """Have what is made ready to be run come into the queue, from here on."""
        if self._hooks is not None:
            native: Any = self.native
            native.call_soon = self._call_soon
            native.is_running = self._is_running

    def _divert_no_more(self) -> None:
        if self._hooks is not None:
            self.native.__dict__.pop("call_soon", None)

    def _call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """The loop's ``call_soon()`` while it is not run; and while it is, for who has got hold of it before."""
        native: Any = self.native
        if self._runs or self._over or NESTS in sys.modules:
            return type(native).call_soon(native, callback, *args, context=context)  # type: ignore[no-any-return]
        handle = asyncio.Handle(callback, args, native, context)
        self._queue.append(handle)
        return handle

    def _is_running(self) -> bool:
        """The loop's ``is_running()``.

        Other threads shall see no gap between the steps and run_forever(): asgiref before 3.9 took it for the loop's
        end. In this thread there is one, or run_forever() would refuse.
        """
        native, leader = self.native, self._leader
        if leader is not None and leader.thread != get_ident():
            return True
        return self._stepping or type(native).is_running(native)

    def _run(self) -> None:
        """Run the loop until it is told to stop."""
        try:
            with self._mutex:
                self._divert_no_more()
                self._runs = True
            while self._queue:  # no name is bound here: the keeper would hold it for as long as it leads
                if self._ready is None:
                    self.native.call_soon(_run, self._queue.popleft())
                else:  # so that in debug mode the loop says which was slow
                    self._ready.append(self._queue.popleft())
            self.native.run_forever()
        except (KeyboardInterrupt, SystemExit) as error:
            if not self._survives(error):
                raise
        finally:
            with self._mutex:
                self._runs = False
                self._divert()
            self._left_at = time.monotonic()

    def _survives(self, error: BaseException) -> bool:
        """Whether the leader goes on behind an exit that was raised in the loop."""
        if threading.current_thread() is threading.main_thread():
            return False
        self.native.call_exception_handler(
            {"message": "a task or a callback tried to end the thread in which it was run", "exception": error}
        )
        return True

    def _step_down(self, turn: Turn) -> None:
        """Wait no more, and hand the loop on if it is ours; or do what is left of that, after an interrupt."""
        if self._stepping and self._leader is turn:
            self._stop_stepping()
        with self._mutex:
            if turn in self._followers:
                self._followers.remove(turn)
            if self._leader is turn:
                heir = self._choose_heir() if self._followers else None
                if heir is not None:
                    self._hand_to(heir)
                    return
                self._leader = None
            elif self._leader is not None:
                return
        if self.needs_keeper and not self._watched:
            _watch.add(self)
        elif self._left_at > _watch.due:
            _watch.give_way()

    def _hand_to(self, heir: Turn) -> None:
        """Make it the leader. Under the mutex, which it waits for before it looks whether it leads."""
        # In this order: an interrupt in between leaves the leader as it was, or one that is awake.
        heir._wake()
        if self._leader is not None:
            self.handovers += 1
        self._leader = heir
        if heir in self._followers:
            self._followers.remove(heir)

    def _choose_heir(self) -> Turn | None:
        """Who shall lead next. Under the mutex."""
        if self._over:
            return None
        waits = False
        bound = "greenlet" in sys.modules  # perhaps since they lined up
        for turn in self._followers:
            if not turn.told:
                if turn.leads and (turn.forced or not bound):
                    return turn
                waits = True
        try:
            return self._get_keeper() if waits else None
        except RuntimeError:  # can't start new thread: the watch tries again
            self.needs_keeper = True
            return None

    # -- The keeper ---------------------------------------------------------------------------------------------------

    def _get_keeper(self) -> Turn:
        """The keeper's turn; its thread is started with it. Under the mutex."""
        if self._keeper is None:
            keeper = Turn()
            keeper._prepare()
            over = Lock()
            over.acquire()
            self._keeper, self._keeper_over = keeper, over
            try:
                threads.start(partial(self._keep, keeper), f"bridge-keeper-{next(_numbers)}", over)
            except BaseException:  # can't start new thread; or an interrupt, and it may have started
                self._keeper, self._keeper_over = None, Lock()
                keeper._wake()  # to find that it is not the keeper
                raise
        return self._keeper

    def _keep(self, keeper: Turn) -> None:
        """The keeper's thread."""
        keeper.thread = get_ident()
        try:
            hubs.serve_hub(self.native)
            self._live(keeper)
        except BaseException as error:
            self._bury(keeper, error)

    def _bury(self, keeper: Turn, error: BaseException) -> None:
        """End the keeper's rule, which an error has ended, and the wait of all that it was to run the loop for.

        An event loop that cannot be run, as one without its selector, will not be so by the next thread either. Whoever
        comes next tries anew, by a new keeper; the watch does not.
        """
        with self._mutex:
            if self._leader is keeper:
                self._leader = None
            if self._keeper is keeper:
                self._keeper = None
            for turn in self._followers:
                turn.failure = error
                turn._wake()
        self.native.call_exception_handler({"message": "the thread that runs the loop has failed", "exception": error})

    def _live(self, keeper: Turn) -> None:
        """The keeper's life: sleep, lead until the loop is wanted, step down."""
        while True:
            keeper._sleep()
            with self._mutex:
                leads, over = self._leader is keeper, self._over or self._keeper is not keeper
            if leads:
                self._lead_until_wanted(keeper)
            elif over:
                return

    def _lead_until_wanted(self, keeper: Turn) -> None:
        while True:
            while not keeper.told:
                self._run()
            keeper.told = False
            with self._mutex:
                heir = self._choose_heir()
                if heir is not None and heir is not keeper:
                    self._hand_to(heir)
                    return
            # Who wanted the loop has got what it waited for already.

    def tend(self) -> bool:
        """Have the keeper lead if nobody has for IDLE_SECONDS. From the watch only.

        Returns:
            Whether to look again.
        """
        with self._mutex:
            if self._closed or not self.needs_keeper or (self._leader is not None and self._leader is self._keeper):
                self._watched = False
                return False
            if self._leader is not None or time.monotonic() - self._left_at < IDLE_SECONDS:
                return True
            try:
                self._hand_to(self._get_keeper())
            except RuntimeError:  # can't start new thread
                return True
            self._watched = False
        return False

    # -- The end ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _led(self) -> Generator[None, None, None]:
        """Lead the loop as soon as it can be had, to run nothing in it."""
        turn = Turn()
        turn.forced = True
        try:
            asks = self._take(turn)
            if asks is not None:
                self._follow(turn, None, asks)
            yield
        finally:
            self._step_down(turn)

    def _complete(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end, whoever leads."""
        turn = Turn()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(asyncio.Task(coroutine, loop=self.native))  # whatever an app's task factory does
            tasks[0].add_done_callback(lambda _: self.tell(turn))

        self.wait(turn, begin)
        return tasks[0].result()

    def clear(self, ready: bool = False) -> bool:
        """End what a request has left: cancel its tasks, let go the threads of its executor, call off the keeper.

        Args:
            ready: Also run what is ready to be run, as the finalizers of asynchronous generators are that were dropped
                half-way. Else that waits until the loop is run again, but where the loop lets it be seen (asyncio's).

        Returns:
            Whether nothing is left.
        """
        self.needs_keeper = False
        if self._is_altered():
            return False
        if self._executor.used:
            self._executor.shutdown(wait=False)
            self._executor = _Executor()
            self.native.set_default_executor(self._executor)
        ready = ready or bool(self._queue or self._ready)
        bound = "greenlet" in sys.modules  # then the keeper may as well go on, and knows best what there is
        if not (ready or bound) and self._leader is None and not self._tasks():
            return not self._expects_more()
        if _get_running_loop() is not None:
            return bool(threads.call(partial(self.clear, ready)))
        self._left_at = 0.0
        cleared = self._complete(self._clear(ready))
        if not bound:
            with self._led():  # so that the keeper does not
                pass
        return cleared and not self._expects_more()

    def _is_altered(self) -> bool:
        """Whether somebody has put things of his own in the places of the loop's, where it lets that be seen."""
        native = self.native
        return (
            native.get_task_factory() is not self._factory
            or native.get_exception_handler() is not None
            or getattr(native, "_default_executor", self._executor) is not self._executor
        )

    def _expects_more(self) -> bool:
        """Whether timers or descriptors are left that would call somebody, where the loop lets it be seen."""
        native: Any = self.native
        if len(getattr(native, "_scheduled", ())) > getattr(native, "_timer_cancelled_count", 0):
            return True
        get_map = getattr(getattr(native, "_selector", None), "get_map", None)  # the proactor of Windows has none
        if get_map is None or len(get_map()) == 1:  # what wakes the loop itself
            return False
        # Open connections are left to their pools: they work, as long as the next request happens to have this loop.
        connections = getattr(native, "_transports", ())
        return sum(descriptor not in connections for descriptor in get_map()) > 1

    async def _clear(self, ready: bool) -> bool:
        if ready:
            await _run_what_is_ready()
        tasks = self._tasks()
        tasks.discard(asyncio.current_task())
        return await _cancel(tasks)

    def close(self) -> None:
        """End all tasks, asynchronous generators and executor threads of the loop, and close it. Twice is once."""
        if asyncio._get_running_loop() is self.native:
            threads.start(self.close, "bridge-closer")
            return
        if _get_running_loop() is not None or not threads.may_run_loops():
            threads.call(self.close)
            return
        with self._mutex:
            if self._closed:
                return
            self._closed = True
        self._left_at = 0.0  # what is being closed, as uvloop's connections, has its turn
        try:
            self._complete(_cancel(asyncio.all_tasks(self.native)))
            self._complete(self.native.shutdown_asyncgens())
            if self._executor.used:
                threads.call(self._executor.shutdown, CANCEL_SECONDS)
        finally:
            with self._led():
                if self._hooks is not None:
                    for name in ("call_soon", "is_running"):  # which hold us
                        self.native.__dict__.pop(name, None)
                self.native.close()
                with self._mutex:
                    self._over = True
                    waiters = [*self._followers, self._keeper] if self._keeper else self._followers
                    for turn in waiters:
                        turn._wake()  # to find the loop closed
                self._keeper_over.acquire(timeout=CANCEL_SECONDS)

    def _drop_after_fork(self, tasks: set[asyncio.Task[Any]]) -> None:
        # The loop would unregister its descriptors from a selector that the parent uses, too; it must never be closed,
        # and never be missed. Its finalizer asks is_closed().
        with contextlib.suppress(AttributeError):
            self.native.is_closed = lambda: True  # type: ignore[method-assign]
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # the child's exit destroys it: no mistake
        _orphans.append((self.native, tasks, self._queue))
        self._queue = deque()
        self._closed = self._over = True
        self._mutex = threads.mutex()
        self._leader = self._keeper = None
        self._followers = []


class _Executor(ThreadPoolExecutor):
    """A loop's default executor, which knows whether it has threads to be ended."""

    used = False

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        self.used = True
        return super().submit(*args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        hubs.at_home(partial(super().shutdown, wait, cancel_futures=cancel_futures))


class _Made:
    """A task factory that knows what it has made, and does what the one before it would do."""

    def __init__(self, factory: Callable[..., Any] | None) -> None:
        self._factory = factory
        self._tasks: list[weakref.ref[asyncio.Task[Any]]] = []
        self._limit = MADE_TASKS

    def __call__(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        if self._factory is None:
            task = asyncio.Task(coroutine, loop=loop, **options)
        else:
            task = self._factory(loop, coroutine, **options)
        self._tasks.append(weakref.ref(task))
        if len(self._tasks) > self._limit:
            self._limit = MADE_TASKS + 2 * len(self.pending())
        return task

    def pending(self) -> set[asyncio.Task[Any]]:
        """The tasks that have not ended; the others are forgotten."""
        tasks = {task for made in self._tasks if (task := made()) is not None and not task.done()}
        self._tasks = [weakref.ref(task) for task in tasks]
        return tasks


def _run(handle: asyncio.Handle) -> None:
    if not handle._cancelled:
        handle._run()


def _run_watched(handle: asyncio.Handle) -> None:
    """Run it as a loop does in debug mode."""
    loop: Any = handle._loop  # type: ignore[attr-defined]
    callback = handle._callback  # type: ignore[attr-defined]
    began = time.monotonic()
    _run(handle)
    took = time.monotonic() - began
    if took >= loop.slow_callback_duration:
        task = getattr(callback, "__self__", None)
        shown = task if isinstance(task, asyncio.Task) else handle
        logging.getLogger("asyncio").warning("Executing %r took %.3f seconds", shown, took)


async def _run_what_is_ready() -> None:
    for _ in range(3):  # the loop makes the finalizer's task, then begins it
        await asyncio.sleep(0)


async def _sleep_forever() -> None:
    await asyncio.get_running_loop().create_future()


async def _cancel(tasks: set[asyncio.Task[Any]]) -> bool:
    """Cancel tasks, and wait for their end, which they may refuse: then False."""
    for task in tasks:
        task.cancel()
    if not tasks:
        return True
    done, pending = await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
    for task in done:
        if not task.cancelled() and task.exception() is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a task failed when it was cancelled", "exception": task.exception(), "task": task}
            )
    return not pending


class LoopPool:
    """Loops for one request each, kept for the next one.

    Args:
        factory: Makes an event loop.
    """

    def __init__(self, factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._factory = factory
        self._loops: list[TurnedLoop] = []
        self._closed = False

    @property
    def idle(self) -> list[TurnedLoop]:
        """The loops that no request has."""
        return list(self._loops)

    def take(self) -> TurnedLoop:
        """A loop that nobody else has."""
        while True:
            try:
                loop = self._loops.pop()
            except IndexError:
                loop = TurnedLoop(self._factory, needs_keeper=False)
                loop.count_tasks()
                return loop
            if not loop._closed:  # as those are that were made before a fork
                return loop

    def give_back(self, loop: TurnedLoop, ready: bool = False) -> None:
        """Take a loop back, without what is left on it. For ``ready`` see `TurnedLoop.clear`."""
        if loop.clear(ready) and not self._closed and len(self._loops) < POOLED_LOOPS:
            self._loops.append(loop)
            if self._closed:  # at this very moment: then close() may have missed it
                self.close()
        else:
            loop.close()

    def close(self) -> None:
        """Close the loops that are here, and from now on those that are given back."""
        self._closed = True
        while self._loops:
            with contextlib.suppress(IndexError):  # two close at once
                self._loops.pop().close()


# -- Theory: a loop that is lent ---------------------------------------------------------------------------------------
#
# Where a server outside runs a loop, nobody here has to: whoever waits is a follower for ever, and all that has to be
# done in the loop is posted. The loop may be trio's. Then `native` does for it what asyncio's loops do by themselves,
# as far as a request needs it; its tasks are trio's system tasks, for what they belong to is a request that may end by
# itself before they do, and no nursery of it can wait for them without holding it up.


class LentLoop:
    """A loop that a server outside runs, as a `TurnedLoop` that somebody else leads.

    Args:
        native: The event loop, or trio's token.
        runs_here: Whether the caller is within the loop.
        ring: Has the loop run a callback; from any thread. Raises RuntimeError where the loop has ended.
        at_shutdown: Takes a coroutine function, to be called when the server outside shuts down.

    Attributes:
        native: The event loop, or what can be done with trio's in the manner of asyncio's.
        key: What the loop is known by.
    """

    def __init__(
        self,
        native: Any,
        runs_here: Callable[[], bool],
        ring: Callable[[Callable[[], None]], None],
        at_shutdown: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
    ) -> None:
        self.key = native
        self.native: Any = native if isinstance(native, asyncio.AbstractEventLoop) else _TrioLoop()
        self.at_shutdown = at_shutdown
        self.runs_here = runs_here
        self._ring = ring

    def wait(self, turn: Turn, callback: Callable[[], object] | None = None) -> None:
        """Return once the turn was told; see `TurnedLoop.wait`."""
        if self.runs_here():
            raise RuntimeError("an event loop cannot be waited for by what runs in it")
        turn._prepare()
        if callback is not None:
            self._ring(partial(_call, contextvars.copy_context(), callback))
        while not turn.told:
            if not turn._sleep_for(LOOK_SECONDS):
                self._ring(_nothing)  # raises, if nobody will ever tell

    def is_busy(self) -> bool:
        """See `TurnedLoop.is_busy`."""
        return bool(getattr(self.native, "_ready", True))

    def tell(self, turn: Turn) -> None:
        if not turn.told:  # else its thread is on its way to look
            turn.told = True
            turn._wake()

    def is_led_by(self, turn: Turn) -> bool:
        return False

    def post(self, callback: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._ring(partial(_call, contextvars.copy_context(), callback))

    def keep(self) -> None:
        """Nothing to be done: the loop runs."""

    def hand_over(self) -> None:
        """Nothing to be done: the loop runs."""


class ServedLoop(LentLoop):
    """A lent loop of which the server's thread is lent, too: to wait is to serve, in that thread and in others.

    Args:
        thread: Of the outer request; see `nesting.LentThread`.
    """

    def __init__(
        self,
        native: Any,
        runs_here: Callable[[], bool],
        thread: Any,
        at_shutdown: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
    ) -> None:
        super().__init__(native, runs_here, thread.post, at_shutdown)
        self._thread = thread

    def wait(self, turn: Turn, callback: Callable[[], object] | None = None) -> None:
        self._thread.serve(lambda: turn.told, callback, reads=False)

    def is_busy(self) -> bool:
        return bool(self._thread.loop_is_busy)

    def tell(self, turn: Turn) -> None:
        turn.told = True
        self._thread.wake()

    def hand_over(self) -> None:
        self._thread.leave_loop()


def _call(context: contextvars.Context, callback: Callable[[], object]) -> None:
    context.run(callback)


def _nothing() -> None:
    pass


_TRIO = object()


def _get_running_loop() -> object:
    """What runs in this thread already: asyncio's loop; or trio's (`_TRIO`), for which anyio would take ours."""
    running = asyncio._get_running_loop()
    if running is None and "trio.lowlevel" in sys.modules:
        # A module that another thread imports at this moment may lack what it will have.
        in_trio_run = getattr(sys.modules["trio.lowlevel"], "in_trio_run", None)
        return _TRIO if in_trio_run is not None and in_trio_run() else None
    return running


def _call_out_of_trio(context: contextvars.Context, callback: Callable[[], object]) -> None:
    """Call what is asyncio's in a context which may tell that it is trio's, as anyio.run() lets its contexts tell."""
    context.run(sys.modules["sniffio"].current_async_library_cvar.set, None)  # trio has it imported
    context.run(callback)


def has_ended(loop: object) -> bool:
    """Whether nothing will ever run on a loop again; of trio's that is not known."""
    return isinstance(loop, asyncio.AbstractEventLoop) and loop.is_closed()


def is_cancellation(error: BaseException | None) -> bool:
    """Whether an error is a loop's word that a task is to end."""
    trio = sys.modules.get("trio")
    return isinstance(error, asyncio.CancelledError) or (trio is not None and isinstance(error, trio.Cancelled))


class _TrioLoop:
    """What a request asks of an asyncio loop, on trio. To be used in the loop alone."""

    def create_future(self) -> _TrioFuture:
        return _TrioFuture()

    def create_task(self, coroutine: Coroutine[Any, Any, None]) -> _TrioTask:
        return _TrioTask(coroutine)

    def call_soon(self, callback: Callable[[], object]) -> None:
        import trio

        trio.lowlevel.current_trio_token().run_sync_soon(callback)

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> _TrioTask:
        return _TrioTask(_call_later(delay, partial(callback, *args)))


async def _call_later(delay: float, callback: Callable[[], object]) -> None:
    await anyio.sleep(delay)
    callback()


class _TrioFuture:
    def __init__(self) -> None:
        self._event = anyio.Event()

    def done(self) -> bool:
        return self._event.is_set()

    def set_result(self, result: None) -> None:
        self._event.set()

    def __await__(self) -> Any:
        return self._event.wait().__await__()


class _TrioTask:
    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        import trio

        self._scope = trio.CancelScope()
        trio.lowlevel.spawn_system_task(self._run, coroutine, context=contextvars.copy_context())

    async def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        with self._scope:
            await coroutine

    def cancel(self) -> None:
        self._scope.cancel()

    def get_loop(self) -> None:
        """None of asyncio's."""


class _Watch:
    """The one thread of the process that looks after loops which were left alone."""

    def __init__(self) -> None:
        self._newcomers: threads.SimpleQueue[TurnedLoop] = threads.SimpleQueue()
        self._started = False
        self._mutex = threads.BriefMutex()  # guards the start
        self.due = math.inf  # when the next look is due, by time.monotonic()

    def give_way(self) -> None:
        """Let the watch look, which is due: it waits for the interpreter lock.

        A thread that lets the lock go for a moment only, as a loop does at each turn, tries to wake who waits for it,
        and has it again before the other is awake. So both would be held up for the switch interval, 5 ms.
        """
        self.due = math.inf
        threads.sleep(GIVE_WAY_SECONDS)

    def add(self, loop: TurnedLoop) -> None:
        if not self._started:
            with self._mutex:
                try:
                    if not self._started:
                        threads.start(self._watch, "bridge-watch")
                        self._started = True
                except RuntimeError:  # can't start new thread: who leaves the loop next tries again
                    return
        loop._watched = True  # two may come to it at once: then it is looked at twice
        self._newcomers.put(loop)  # C's, so that no signal's handler runs in between

    def _watch(self) -> None:
        self._started = True  # its starter may have been interrupted
        while True:
            loops = [self._newcomers.get()]
            while loops:
                self.due = time.monotonic() + WATCH_SECONDS
                threads.sleep(WATCH_SECONDS)
                self.due = math.inf
                with contextlib.suppress(queue.Empty):
                    while True:
                        loops.append(self._newcomers.get_nowait())
                loops = [loop for loop in loops if loop.tend()]


_watch = _Watch()
_pid = os.getpid()
_every: weakref.WeakSet[TurnedLoop] = weakref.WeakSet()
_tasks_at_fork: dict[TurnedLoop, set[asyncio.Task[Any]]] = {}
"""What the loops run, while a fork is under way: from Python 3.14 on the child's asyncio does not know it any more."""
_orphans: list[tuple[object, ...]] = []


def _before_fork() -> None:
    with contextlib.suppress(RuntimeError):  # a thread has just made a loop: the child may complain of a task
        for loop in list(_every):
            _tasks_at_fork[loop] = asyncio.all_tasks(loop.native)


def _after_fork() -> None:
    global _pid, _watch
    _pid = os.getpid()
    _watch = _Watch()
    for loop in list(_every):
        tasks = _tasks_at_fork.get(loop)
        loop._drop_after_fork(asyncio.all_tasks(loop.native) if tasks is None else tasks)
    _tasks_at_fork.clear()


def notice_fork() -> None:
    """Do what is to be done in a child, where the fork was not Python's own, and has called nobody."""
    if os.getpid() != _pid:
        _after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before_fork, after_in_parent=_tasks_at_fork.clear, after_in_child=_after_fork)
