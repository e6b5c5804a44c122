"""Who runs the event loop where the server has none. No app is known here."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["LoopPool", "Turn", "TurnedLoop"]

WATCH_SECONDS = 0.005
"""How long a loop that has work left may stand still before its keeper takes it: twice that at the most. Timers of apps
are late by no more; asyncio's own are late by a millisecond or two."""

CANCEL_SECONDS = 5.0
"""How long tasks may go on after they were cancelled because their loop is closed. Guessed; those that do are left."""

POOLED_LOOPS = 64
"""Loops that one pool keeps. Each holds three file descriptors."""

_numbers = itertools.count(1)


# -- Theory: the thread that waits runs the loop (Leader/Followers) ----------------------------------------------------------
#
# The parties are threads that wait for something to happen in the loop: a server's thread for its app's next word, the
# keeper for a wish to have the loop. Each waits by a Turn. One of them, the leader, runs the loop; the followers sleep,
# each on its Turn's lock; whoever finds no leader becomes it.
#
# What a thread waits for is told to its Turn from within the loop, by `tell`. If the leader itself is told, the loop is
# stopped, so that the leader comes out; any other thread is woken. Who comes out with its Turn told steps down: it hands
# the loop to the first follower that still waits, or leaves it alone. So a lone thread runs its app without any other
# thread's help, and of many threads one works for all until its own work is done.
#
# A stop is a hint. It may come late (uvloop runs what is ready first), twice, or to the next leader: whoever comes out of
# run_forever() looks whether its Turn was told, and goes back if it was not.
#
# A loop that is left alone with work (`needs_keeper`) is watched by one thread of the process. If nobody has taken it for
# a whole period, its keeper leads it, until a thread that waits wants it. In a busy time that never happens. Threads that
# must not run a loop, because another one runs in them, wait as followers and have the keeper lead at once.
#
# `_mutex` guards the leader, the followers and what the watch knows; it is held for a few instructions, never while a
# callback or the loop runs. A Turn's lock is unlocked while a wake-up is on its way, and locked otherwise.
#
# Lost wake-ups: `tell` runs in the loop, where the leader cannot change. Each follower checks its Turn under the mutex
# before it sleeps and after it was woken, and a loop is handed over under the same mutex, and only to one that is in the
# list: so it is never handed to a thread that has gone.
#
# Exceptions out of run_forever(): KeyboardInterrupt and SystemExit out of a signal's handler, which runs in the main
# thread in the middle of whatever it does. The leader steps down all the same; the loop has lost at most the callback in
# which it was.
#
# Fork: the child has none of the threads, and must not touch the loop: it shares its selector with the parent's. It drops
# the loop unclosed, and makes a new one when it needs one.
# Exit: keepers and the watch are daemons; `close` ends what a loop still runs.


class Turn:
    """One thread's wait for what happens in a loop.

    Attributes:
        told: Whether it has happened. Set by `TurnedLoop.tell`; the thread itself takes it back before it waits anew.
    """

    __slots__ = ("_lock", "leads", "told")

    def __init__(self) -> None:
        self.told = False
        self.leads = True  # whether the thread may run a loop
        self._lock: threading.Lock | None = None

    def _sleep(self) -> None:
        assert self._lock is not None
        self._lock.acquire()

    def _wake(self) -> None:
        lock = self._lock
        if lock is not None:
            # An earlier wake-up may not have been slept for: one is enough.
            with contextlib.suppress(RuntimeError):
                lock.release()

    def _prepare(self) -> None:
        if self._lock is None:
            self._lock = threading.Lock()
            self._lock.acquire()


class TurnedLoop:
    """An event loop that is run by turns.

    Args:
        factory: Makes the event loop.
        needs_keeper: Whether the loop has to be run while nobody waits for it.

    Attributes:
        native: The event loop.
    """

    def __init__(self, factory: Callable[[], asyncio.AbstractEventLoop], needs_keeper: bool) -> None:
        self.native = factory()
        self.needs_keeper = needs_keeper
        self.handovers = 0
        self._mutex = threading.Lock()
        self._leader: Turn | None = None
        self._followers: list[Turn] = []
        self._keeper: Turn | None = None  # once there is one
        self._watched = False
        self._left = 0  # how often a leader has left the loop alone
        self._left_before = 0  # at the watch's last look
        self._closed = False
        _every.add(self)

    # -- Waiting ----------------------------------------------------------------------------------------------------

    def wait(self, turn: Turn, callback: Callable[[], object] | None = None) -> None:
        """Return once the turn was told; run the loop meanwhile, if nobody else does.

        Args:
            callback: Run in the loop first. It sees the caller's context.
        """
        if self._take(turn, callback):
            try:
                while not turn.told:
                    self.native.run_forever()
            finally:
                self._step_down()

    def tell(self, turn: Turn) -> None:
        """Say that what a turn waits for has happened. From within the loop only."""
        turn.told = True
        if self._leader is turn:
            self.native.stop()
        else:
            turn._wake()

    def is_led_by(self, turn: Turn) -> bool:
        """Whether the loop is run by the thread of this turn. From within the loop only."""
        return self._leader is turn

    def post(self, callback: Callable[[], object]) -> None:
        """Have the loop run a callback, whoever runs it next. From any thread; harmless if the loop is closed."""
        with self._mutex:
            if self._closed:
                return
            if self._leader is None:
                self.native.call_soon(callback)  # nobody sleeps in it, so nobody has to be woken
                return
            self.native.call_soon_threadsafe(callback)

    def _take(self, turn: Turn, callback: Callable[[], object] | None) -> bool:
        """Become the leader: True; or wait as a follower until the turn was told: False."""
        leads = turn.leads = asyncio._get_running_loop() is None
        keeper = None
        asks = False
        with self._mutex:
            if self._leader is None and leads:
                self._leader = turn
            else:
                turn._prepare()
                self._followers.append(turn)
                if self._leader is None:
                    keeper = self._leader = self._get_keeper()
                asks = leads and self._leader is self._keeper
        if self._leader is turn:
            if callback is not None:
                try:
                    callback()  # as good as call_soon: nobody else runs the loop
                except BaseException:
                    self._step_down()
                    raise
            return True
        if keeper is not None:
            keeper._wake()
        if asks:
            self.native.call_soon_threadsafe(self._arrive, callback)
        elif callback is not None:
            self.native.call_soon_threadsafe(callback)
        return self._follow(turn)

    def _arrive(self, callback: Callable[[], object] | None) -> None:
        if callback is not None:
            callback()
        if self._keeper is not None:
            self.tell(self._keeper)

    def _follow(self, turn: Turn) -> bool:
        try:
            while True:
                with self._mutex:
                    if turn.told or self._leader is turn:
                        break
                turn._sleep()
        finally:
            # Also where a signal's handler raises. The loop may have been handed to us at this very moment.
            with self._mutex:
                led = self._leader is turn
                if not led:
                    self._followers.remove(turn)
            if led and turn.told:
                self._step_down()
        return not turn.told

    def _step_down(self) -> None:
        watch = False
        with self._mutex:
            heir = self._choose_heir()
            self._leader = heir
            if heir is None:
                self._left += 1
                if self.needs_keeper and not self._watched:
                    watch = self._watched = True
        if heir is not None:
            heir._wake()
        elif watch:
            _watch.add(self)

    def _choose_heir(self) -> Turn | None:
        """Who shall lead next. Under the mutex."""
        waits = False
        for turn in self._followers:
            if not turn.told:
                if turn.leads:
                    self._followers.remove(turn)
                    self.handovers += 1
                    return turn
                waits = True
        return self._get_keeper() if waits else None

    # -- The keeper ---------------------------------------------------------------------------------------------------

    def _get_keeper(self) -> Turn:
        """The keeper's turn; its thread is started with it. Under the mutex."""
        if self._keeper is None:
            self._keeper = Turn()
            self._keeper._prepare()
            threading.Thread(target=self._keep, name=f"bridge-keeper-{next(_numbers)}", daemon=True).start()
        return self._keeper

    def _keep(self) -> None:
        """The keeper's life: sleep, lead until the loop is wanted, step down."""
        keeper = self._keeper
        assert keeper is not None
        while not self._closed:
            keeper._sleep()
            if self._leader is not keeper:
                continue
            while True:
                while not keeper.told:
                    self.native.run_forever()
                keeper.told = False
                with self._mutex:
                    heir = self._choose_heir()
                    if heir is None and not self._closed:
                        continue  # who wanted the loop has got what it waited for
                    if heir is not keeper:
                        self._leader = heir
                        break
            if heir is not None:
                heir._wake()

    def tend(self) -> bool:
        """Have the keeper lead if nobody has since the last look. From the watch only.

        Returns:
            Whether to look again.
        """
        with self._mutex:
            if self._closed or not self.needs_keeper or (self._leader is not None and self._leader is self._keeper):
                self._watched = False
                return False
            if self._leader is not None or self._left != self._left_before:
                self._left_before = self._left
                return True
            self._watched = False
            keeper = self._leader = self._get_keeper()
        keeper._wake()
        return False

    # -- The end ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _led(self) -> Iterator[None]:
        """Lead the loop as soon as it can be had, to run it otherwise than by turns."""
        self._take(Turn(), None)
        try:
            yield
        finally:
            self._step_down()

    def cancel_leftovers(self) -> None:
        """Cancel what tasks there are, as ``asyncio.run`` does, and wait for their end."""
        tasks = asyncio.all_tasks(self.native)
        if tasks:
            with self._led():
                self.native.run_until_complete(_cancel(tasks))

    def close(self) -> None:
        """End all tasks, asynchronous generators and executor threads of the loop, and close it. Twice is once."""
        if asyncio._get_running_loop() is not None:
            closer = threading.Thread(target=self.close, name="bridge-closer")
            closer.start()
            closer.join()
            return
        with self._mutex:
            if self._closed:
                return
            self._closed = True
        with self._led():
            native = self.native
            if not native.is_closed():
                native.run_until_complete(_cancel(asyncio.all_tasks(native)))
                native.run_until_complete(native.shutdown_asyncgens())
                native.run_until_complete(native.shutdown_default_executor())
                native.close()
        if self._keeper is not None:
            self._keeper._wake()  # to find the loop closed

    def _drop_after_fork(self) -> None:
        # The loop would unregister its descriptors from a selector that the parent uses, too; it must never be closed,
        # and never be missed. Its finalizer asks is_closed().
        with contextlib.suppress(AttributeError):
            self.native.is_closed = lambda: True  # type: ignore[method-assign]
        _orphans.append(self.native)
        self._closed = True
        self._mutex = threading.Lock()
        self._leader = self._keeper = None
        self._followers = []


async def _cancel(tasks: set[asyncio.Task[object]]) -> None:
    tasks = tasks - {asyncio.current_task()}  # type: ignore[arg-type]
    for task in tasks:
        task.cancel()
    if tasks:
        done, _ = await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
        for task in done:
            if not task.cancelled() and task.exception() is not None:
                asyncio.get_running_loop().call_exception_handler(
                    {"message": "a task failed when it was cancelled", "exception": task.exception(), "task": task}
                )


class LoopPool:
    """Loops for one request each, kept for the next one.

    Args:
        factory: Makes an event loop.
    """

    def __init__(self, factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._factory = factory
        self._loops: list[TurnedLoop] = []

    def take(self) -> TurnedLoop:
        """A loop that nobody else has."""
        while True:
            try:
                loop = self._loops.pop()
            except IndexError:
                return TurnedLoop(self._factory, needs_keeper=False)
            if not loop._closed:  # as those are that were made before a fork
                return loop

    def give_back(self, loop: TurnedLoop) -> None:
        """Take a loop back, without the tasks that are left on it."""
        loop.needs_keeper = False
        loop.cancel_leftovers()
        if len(self._loops) < POOLED_LOOPS:
            self._loops.append(loop)
        else:
            loop.close()

    def close(self) -> None:
        """Close the loops that are here."""
        while self._loops:
            self._loops.pop().close()


class _Watch:
    """The one thread of the process that looks after loops which were left alone."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._loops: list[TurnedLoop] = []
        self._bell = threading.Event()
        self._started = False

    def add(self, loop: TurnedLoop) -> None:
        with self._mutex:
            self._loops.append(loop)
            starts, self._started = not self._started, True
        if starts:
            threading.Thread(target=self._run, name="bridge-watch", daemon=True).start()
        self._bell.set()

    def _run(self) -> None:
        while True:
            self._bell.wait()
            self._bell.clear()
            while self._loops:
                # Nobody sets this: it is a sleep that holds no loop alive for longer than it lasts.
                threading.Event().wait(WATCH_SECONDS)
                self._look()

    def _look(self) -> None:
        with self._mutex:
            loops, self._loops = self._loops, []
        again = [loop for loop in loops if loop.tend()]
        with self._mutex:
            self._loops += again


_watch = _Watch()
_every: weakref.WeakSet[TurnedLoop] = weakref.WeakSet()
_orphans: list[asyncio.AbstractEventLoop] = []


def _after_fork() -> None:
    global _watch
    _watch = _Watch()
    for loop in list(_every):
        loop._drop_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
