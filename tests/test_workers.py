"""The worker threads: on demand, reused, in order, let go; and what a fork or a full machine does to them."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from bridge.workers import Place, Workers
from tests.drivers import Signal, in_thread, run_in_threads


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers(threads=4, streams=2)
    yield workers
    assert workers.stop(10)


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can: what can go wrong between two instructions does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Job:
    """A job that waits to be let go."""

    def __init__(self) -> None:
        self.begun = Signal("job begun")
        self.go = Signal("go")
        self.ended = Signal("job ended")
        self.place: Place | None = None
        self.thread = 0

    def __call__(self, place: Place | None) -> None:
        self.place = place
        self.thread = threading.get_ident()
        self.begun.set()
        self.go.wait()
        self.ended.set()


def until(probe: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def run(workers: Workers) -> int:
    """Run a short job; return its thread's ident once the thread is idle again."""
    job = Job()
    job.go.set()
    workers.submit(job)
    job.ended.wait()
    until(lambda: not workers.running and len(workers._idle) == workers.alive)
    return job.thread


def test_the_last_word_of_a_job_comes_when_its_thread_has_nothing_left_to_do() -> None:
    """Lest whoever it wakes has to wait for the thread; but before the next job, which may take long."""
    workers = Workers(threads=1, streams=0)
    told: list[tuple[object, ...]] = []
    over = Signal("over")

    def job(number: int, place: Place | None) -> Callable[[], object]:
        told.append((number, "runs"))
        if number == 1:
            workers.submit(partial(job, 2))
        return partial(say, number)

    def say(number: int) -> None:
        told.append((number, workers.running, len(workers._idle)))
        if number == 2:
            over.set()

    workers.submit(partial(job, 1))
    over.wait()
    assert told == [(1, "runs"), (1, 1, 0), (2, "runs"), (2, 0, 1)]
    workers.stop()


def test_nothing_starts_before_the_first_job() -> None:
    """[S2] Nor is anything left of one that had none."""
    assert Workers(4, 4).alive == 0


def test_threads_start_on_demand_and_are_reused(workers: Workers) -> None:
    """[W19] As many as are of use at once."""
    assert len({run(workers) for _ in range(10)}) == 1
    assert workers.alive == 1
    jobs = [Job() for _ in range(3)]
    for job in jobs:
        workers.submit(job)
    for job in jobs:
        job.begun.wait()
    assert (workers.alive, workers.running, workers.waiting) == (3, 3, 0)
    for job in jobs:
        job.go.set()


def test_latest_idle_thread_is_called_first(workers: Workers) -> None:
    """[W19] It has its connections warm, and the others can grow old."""
    jobs = [Job() for _ in range(3)]
    for job in jobs:
        workers.submit(job)
        job.begun.wait()
    for count, job in enumerate(jobs, start=1):
        job.go.set()
        until(lambda count=count: len(workers._idle) == count)  # type: ignore[misc]
    assert [run(workers) for _ in range(3)] == [jobs[-1].thread] * 3


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_jobs_wait_in_order_for_a_place(threads: int) -> None:
    """[W19] No more than `threads` run at once, and none overtakes another."""
    workers = Workers(threads, 0)
    jobs = [Job() for _ in range(4 * threads)]
    for job in jobs:
        workers.submit(job)
    for number, job in enumerate(jobs):
        for other in jobs[: number + threads]:
            other.begun.wait()
        until(lambda: not workers._coming)
        assert [other.begun.is_set() for other in jobs] == [True] * min(number + threads, len(jobs)) + [False] * max(
            len(jobs) - number - threads, 0
        )
        assert workers.running == min(threads, len(jobs) - number)
        job.go.set()
        if number + threads < len(jobs):
            jobs[number + threads].begun.wait()
        else:
            until(lambda number=number: workers.running == len(jobs) - number - 1)  # type: ignore[misc]
    assert workers.alive == threads
    assert workers.stop(10)


def test_idle_threads_leave() -> None:
    """[W19] After their time; and others come for the next job."""
    workers = Workers(4, 0, idle_seconds=0.05)
    first = run(workers)
    assert workers.alive == 1
    until(lambda: workers.alive == 0)
    until(lambda: first not in [thread.ident for thread in threading.enumerate()])
    run(workers)
    until(lambda: workers.alive == 0)


def test_stream_gives_its_place_back(workers: Workers) -> None:
    """[W19] The next job begins; as many as `streams` may do so."""
    jobs = [Job() for _ in range(7)]
    for job in jobs:
        workers.submit(job)
    for job in jobs[:4]:
        job.begun.wait()
    assert workers.waiting == 3
    places = [job.place for job in jobs[:4] if job.place is not None]
    assert [place.give_back() for place in places] == [True, True, False, False]
    assert places[0].give_back()  # twice is once
    for job in jobs[4:6]:
        job.begun.wait()
    assert (workers.running, workers.streaming, workers.waiting) == (4, 2, 1)
    jobs[0].go.set()
    until(lambda: workers.streaming == 1)
    assert not jobs[6].begun.is_set()  # a stream that ends frees no place among the threads
    assert places[2].give_back()
    jobs[6].begun.wait()
    for job in jobs:
        job.go.set()
    until(lambda: (workers.running, workers.streaming) == (0, 0))
    assert places[3].give_back()  # a job that is over has none to give
    assert (workers.running, workers.streaming) == (0, 0)


def test_stop_waits_for_all_jobs(workers: Workers) -> None:
    """[W22] Those that wait for a place, too; and a later job starts new threads."""
    jobs = [Job() for _ in range(6)]
    for job in jobs:
        workers.submit(job)
    jobs[0].begun.wait()
    assert not workers.stop(0.05)
    stopping = [in_thread(workers.stop) for _ in range(2)]
    for job in jobs:
        job.go.set()
    assert [call.result() for call in stopping] == [True, True]
    assert all(job.ended.is_set() for job in jobs)
    assert workers.alive == 0
    run(workers)
    assert workers.alive == 1


def test_stopped_threads_have_ended(hasty: None) -> None:
    """[W22] Not only have they nothing to do any more."""
    for _ in range(100):
        workers = Workers(4, 0)
        jobs = [Job() for _ in range(4)]
        for job in jobs:
            workers.submit(job)
        for job in jobs:
            job.begun.wait()
        idents = {job.thread for job in jobs}
        threads = [thread for thread in threading.enumerate() if thread.ident in idents]
        assert len(threads) == 4
        for job in jobs:
            job.go.set()
        assert workers.stop(10)
        assert not any(thread.is_alive() for thread in threads)


def test_threads_leave_an_owner_that_is_dropped() -> None:
    """[S2] Those that are idle at once, one at work at the end of its job."""
    before = threading.active_count()
    workers = Workers(4, 0)
    job = Job()
    workers.submit(job)
    job.begun.wait()
    short = Job()
    short.go.set()
    workers.submit(short)
    short.ended.wait()
    job.place = short.place = None  # a place leads to its owner
    del workers
    gc.collect()
    job.go.set()
    until(lambda: threading.active_count() == before)


def refuse(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_jobs_give_up_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch, workers: Workers) -> None:
    """[W19] All that wait, for nobody might ever come; the next one tries again."""
    told: list[tuple[int, Place | None]] = []

    def refuse_late(self: threading.Thread) -> None:
        if not told and workers.waiting == 1:
            workers.submit(lambda place: told.append((2, place)))  # comes while the thread is being started
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_late)
        workers.submit(lambda place: told.append((1, place)))
    assert told == [(1, None), (2, None)]
    assert (workers.alive, workers.waiting, workers.running) == (0, 0, 0)
    run(workers)


def test_the_last_word_of_a_job_that_gives_up_is_said(monkeypatch: pytest.MonkeyPatch, workers: Workers) -> None:
    """[W15] Else nobody wakes whoever waits for it."""
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        workers.submit(lambda place: partial(said.append, "given up" if place is None else "run"))
    assert said == ["given up"]


def test_threads_there_are_do_all_where_no_other_can_be_started(
    monkeypatch: pytest.MonkeyPatch, workers: Workers
) -> None:
    """[W19] The jobs wait for them."""
    jobs = [Job() for _ in range(3)]
    workers.submit(jobs[0])
    jobs[0].begun.wait()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for job in jobs[1:]:
            workers.submit(job)
        assert (workers.alive, workers.waiting) == (1, 2)
        for job in jobs:
            job.go.set()
        for job in jobs:
            job.ended.wait()
            assert job.thread == jobs[0].thread


def test_jobs_give_up_where_all_threads_there_are_stream(monkeypatch: pytest.MonkeyPatch, workers: Workers) -> None:
    """[W19] A stream may never end."""
    stream = Job()
    workers.submit(stream)
    stream.begun.wait()
    assert stream.place is not None
    assert stream.place.give_back()
    told: list[Place | None] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        workers.submit(told.append)
    assert told == [None]
    stream.go.set()
    stream.ended.wait()


def test_job_goes_to_a_thread_that_lies_down_while_another_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, workers: Workers
) -> None:
    """[W19] It saw that a thread was on its way, and so did not look."""
    first, second = Job(), Job()
    workers.submit(first)
    first.begun.wait()
    second.go.set()

    def refuse_late(self: threading.Thread) -> None:
        first.go.set()
        until(lambda: bool(workers._idle))
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_late)
        workers.submit(second)
    second.ended.wait()
    assert second.thread == first.thread


@pytest.mark.parametrize("idle_seconds", [10.0, 0.0005])
def test_no_job_is_lost_or_run_twice(hasty: None, idle_seconds: float) -> None:
    """[W19] Whatever the threads that bring jobs, run them, tire and give places back do at the same time."""
    workers = Workers(3, 4, idle_seconds)
    ran: list[int] = []
    most = 0

    def bring(number: int) -> None:
        done = Signal(f"job {number}")
        rng = random.Random(number)

        def job(place: Place | None) -> None:
            nonlocal most
            assert place is not None
            most = max(most, workers.running)
            ran.append(number)
            if rng.random() < 0.2:
                place.give_back()
            done.set()

        if rng.random() < 0.05:
            time.sleep(rng.random() * 0.002)
        workers.submit(job)
        done.wait()

    run_in_threads(bring, 3000, threads=6)
    assert sorted(ran) == list(range(3000))
    assert most <= 3
    assert workers.stop(10)
    assert (workers.running, workers.streaming, workers.waiting) == (0, 0, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(
    "moment",
    [
        "idle: run(); in_child()",
        "busy: workers.submit(wait); run(); in_child(); hold.set()",
        "waiting: [workers.submit(wait) for _ in range(6)]; in_child(); hold.set()",
        "locked: workers._mutex.acquire(); in_child(); workers._mutex.release(); run()",
        "in a job: workers.submit(work); assert over.wait(10); run()",
    ],
)
def test_fork_gets_threads_of_its_own(moment: str) -> None:
    """[W19] Whatever the parent's are doing; and the parent goes on with its own."""
    script = """
        import os, sys, threading
        from bridge.workers import Workers

        workers = Workers(4, 4)
        hold, over = threading.Event(), threading.Event()

        def run():
            done = threading.Event()
            workers.submit(lambda place: done.set())
            assert done.wait(10)

        def wait(place):
            hold.wait()

        def work(place):
            in_child()
            over.set()

        def in_child():
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    assert (workers.alive, workers.running, workers.waiting) == (0, 0, 0)
                    run()
                    assert workers.stop(10)
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0)[1] == 0

        MOMENT
        assert workers.stop(10)
    """
    code = textwrap.dedent(script).replace("MOMENT", moment.partition(": ")[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_thread_that_forked_leaves_at_the_end_of_its_job() -> None:
    """[W19] In the child it belongs to no one, and takes no job from the child's own threads."""
    script = """
        import os, threading
        from bridge.workers import Workers

        workers = Workers(4, 4)
        pids = []
        workers.submit(lambda place: pids.append(os.fork()))  # append() gives None back: there is no last word
        while not pids or workers.running:
            pass
        # Only the parent's main thread comes here; in the child the process ends with its only thread.
        assert os.waitpid(pids[0], 0)[1] == 0
        assert workers.stop(10)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (0, "")
