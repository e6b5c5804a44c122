"""The worker threads: long-lived, started on demand, let go when idle. No app is known here."""

from __future__ import annotations

import contextvars
import itertools
import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Job = Callable[["Place | None"], "Callable[[], object] | None"]

__all__ = ["Place", "Workers"]

IDLE_SECONDS = 10.0
"""How long a thread without work stays. trio's and anyio's threads stay as long; the number is a guess there, too."""

_numbers = itertools.count(1)


# -- Theory -----------------------------------------------------------------------------------------------------------
#
# A job is a callable that gets the Place it runs in. It may return its last word: what wakes whoever waits for it, to
# be called when this thread has nothing left to do. For whoever wakes up wants the interpreter lock, and if he does not
# get it, since this thread looks for its next job and lies down, he falls asleep again, and has to be woken twice.
#
# Jobs wait in the backlog and begin in the order in which they came, at most `threads` of them at once; one that
# streams for long may move from its place among the threads to one among the streams, so that the next job can begin.
# Where no thread can be started and there is none, or none but those that stream, nobody may ever come to the backlog:
# then all that wait there get None for a Place, which tells them to give up.
#
# At most one thread at a time is on its way to the backlog (`_coming`). It takes the first job, and then calls the next
# thread if a job and a place are left. So of many jobs that come at once and are short, the threads that already run do
# most, and only as many are woken as can be of use: with one interpreter lock, to wake a thread for each job would cost
# more than the jobs. None of them waits for another, though: behind a job that blocks comes the thread it has called.
#
# Idle threads lie on a stack, the latest on top: it has its memory warm and its database connections open, and those at
# the bottom grow old and leave. Each sleeps on its own lock, which is unlocked while it is called and locked otherwise.
# Only what is taken off the stack may be unlocked, so nobody is called twice; a thread whose patience ends takes itself
# off, and if it is not there any more, then it was called.
#
# `_mutex` guards all of this. A thread looks at the backlog under it before it lies down, and so does who brings a job.
#
# Fork: the child has none of the threads, so it begins anew; what waited in the backlog belongs to the parent. A thread
# that forked in the middle of a job finds out at its end that it belongs to no one, and leaves.
# Exit: the threads are daemons, for an app that never ends must not keep the interpreter from its exit; `stop` waits.


class Place:
    """A job's place among those that run at once."""

    __slots__ = ("_job", "_over", "_streaming", "_workers")

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._job: Job | None = None
        self._streaming = False
        self._over = False

    def give_back(self) -> bool:
        """Move to a place among the streams, so that the next job may begin; from any thread.

        Returns:
            False if all places among the streams are taken.
        """
        return self._workers._move_to_streams(self)


class _Bed:
    """Where an idle thread sleeps."""

    __slots__ = ("dismissed", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()
        self.dismissed = False


class Workers:
    """Threads that run jobs.

    Args:
        threads: How many jobs run at once.
        streams: How many more may have given their place back.
        idle_seconds: How long a thread waits for its next job.
    """

    def __init__(self, threads: int, streams: int, idle_seconds: float = IDLE_SECONDS) -> None:
        self._threads = threads
        self._streams = streams
        self._idle_seconds = idle_seconds
        self._begin()
        _every.add(self)

    def _begin(self) -> None:
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)  # told when a thread leaves, if someone waits for it
        self._backlog: deque[Job] = deque()
        self._idle: list[_Bed] = []
        self._coming = False  # whether a thread is on its way to the backlog
        self._running = 0
        self._streaming = 0
        self._alive = 0
        self._threads_made: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # those that have ended are gone
        self._jobs: set[Job] = set()  # that run
        self._stopping = 0  # calls of `stop` that wait
        self._generation = object()  # a new one after a fork

    @property
    def running(self) -> int:
        """The jobs that have a place among the threads."""
        return self._running

    @property
    def streaming(self) -> int:
        """The jobs that have given their place back, and run on."""
        return self._streaming

    @property
    def waiting(self) -> int:
        """The jobs that wait for a place, or for the thread that is on its way."""
        return len(self._backlog)

    @property
    def jobs(self) -> list[Job]:
        """The jobs that run."""
        return list(self._jobs)

    @property
    def alive(self) -> int:
        """The threads there are."""
        return self._alive

    def submit(self, job: Job) -> None:
        """Have a thread run a job, which must not raise, as soon as a place is free. Never waits."""
        with self._mutex:
            self._backlog.append(job)
            starts = self._call_thread()
        if starts:
            self._start()

    def _call_thread(self) -> bool:
        """Have a thread come if there is something for it; True if it must be started first. Under the mutex."""
        if self._coming or not self._backlog or self._running >= self._threads:
            return False
        self._coming = True
        if self._idle:
            self._idle.pop().lock.release()
            return False
        self._alive += 1
        return True

    def _start(self) -> None:
        # An empty context: with thread_inherit_context a thread would start in that of the request that made it.
        thread = threading.Thread(
            target=contextvars.Context().run,
            args=(_run, weakref.ref(self), self._generation, self._idle_seconds),
            name=f"bridge-worker-{next(_numbers)}",
            daemon=True,
        )
        with self._mutex:
            self._threads_made.add(thread)
        try:
            thread.start()
        except RuntimeError:  # can't start new thread
            jobs: deque[Job] = deque()
            with self._mutex:
                self._coming = False
                self._leave()
                if self._idle:  # it has lain down meanwhile, and left the job to the thread that was to be started
                    self._call_thread()
                elif self._alive <= self._streaming:  # else one of those there are takes the job at the end of its own
                    jobs, self._backlog = self._backlog, jobs
            for job in jobs:
                _say(job(None))

    def _take(self) -> _Step:
        """Come to the backlog."""
        with self._mutex:
            self._coming = False
            return self._next()

    def _finish(self, place: Place) -> _Step:
        """End a job, and take the next one."""
        with self._mutex:
            place._over = True
            self._jobs.discard(place._job)
            place._job = None  # the place may be kept for longer
            if place._streaming:
                self._streaming -= 1
            else:
                self._running -= 1
            return self._next()

    def _next(self) -> _Step:
        place = Place(self)
        if not self._backlog or self._running >= self._threads:
            return None, place, False
        job = self._backlog.popleft()
        self._running += 1
        place._job = job
        self._jobs.add(job)
        return job, place, self._call_thread()

    def _move_to_streams(self, place: Place) -> bool:
        with self._mutex:
            if place._streaming or place._over:
                return True
            if self._streaming >= self._streams:
                return False
            place._streaming = True
            self._streaming += 1
            self._running -= 1
            starts = self._call_thread()
        if starts:
            self._start()
        return True

    def _lie_down(self, bed: _Bed) -> bool:
        """Join the idle threads; False if the thread shall leave instead."""
        with self._mutex:
            if self._stopping and not self._backlog:
                self._leave()
                return False
            self._idle.append(bed)
            self._call_thread()  # perhaps this one, for what has come since it looked
        return True

    def _tire(self, bed: _Bed) -> bool:
        """Let an idle thread leave; False if it was called."""
        with self._mutex:
            if bed not in self._idle:
                return False
            self._idle.remove(bed)
            self._leave()
        return True

    def _leave(self) -> None:
        self._alive -= 1
        if self._stopping:
            self._changed.notify_all()

    def stop(self, timeout: float | None = None) -> bool:
        """Let the jobs that run or wait come to their end, and stop the threads. A later job starts new ones.

        Args:
            timeout: Seconds to wait for them.

        Returns:
            Whether all threads have ended.
        """
        with self._mutex:
            self._dismiss_idle()
            self._stopping += 1
            try:
                if not self._changed.wait_for(lambda: not self._alive, timeout):
                    return False
                leaving = list(self._threads_made)
            finally:
                self._stopping -= 1
        for thread in leaving:  # nothing is left for them to do, but to end
            if thread.ident is not None:
                thread.join()
        return True

    def _dismiss_idle(self) -> None:
        self._alive -= len(self._idle)
        while self._idle:
            bed = self._idle.pop()
            bed.dismissed = True
            bed.lock.release()

    def __del__(self) -> None:
        self._dismiss_idle()  # nobody else has us, so the mutex is not needed


_Step = tuple["Job | None", Place, bool]
"""A thread's next job or None, the job's place, and whether another thread must be started for the job behind it."""


def _run(owner: weakref.ref[Workers], generation: object, idle_seconds: float) -> None:
    """The life of a thread. It holds its owner only while it works, so that an owner that is dropped can go."""
    bed = _Bed()
    last_word: Callable[[], object] | None = None
    while not bed.dismissed and (workers := owner()) is not None:
        job, place, starts = workers._take()
        while job is not None:
            if starts:
                workers._start()
            last_word = job(place)
            del job  # nothing of a request stays here
            if workers._generation is not generation:
                _say(last_word)
                return
            job, place, starts = workers._finish(place)
            if job is not None:
                _say(last_word)
                last_word = None
        stays = workers._lie_down(bed)
        _say(last_word)
        last_word = None
        if not stays:
            return
        del workers, place
        if not bed.lock.acquire(timeout=idle_seconds):
            workers = owner()
            if workers is None or workers._tire(bed):
                return
            del workers
            bed.lock.acquire()


def _say(last_word: Callable[[], object] | None) -> None:
    if last_word is not None:
        last_word()


_every: weakref.WeakSet[Workers] = weakref.WeakSet()


def _after_fork() -> None:
    for workers in list(_every):
        workers._begin()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
