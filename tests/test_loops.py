"""Who runs the loop: leaders, followers, the keeper; interrupts, forks and ends. No app is needed for it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import statistics
import sys
import threading
import time
import types
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import pytest
import uvloop

from bridge import loops, threads
from bridge.loops import LoopPool, Turn, TurnedLoop
from tests.drivers import LIMIT, RunningCall, Signal, in_thread, run_in_thread, run_in_threads

FACTORIES = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

Factory = Callable[[], asyncio.AbstractEventLoop]

T = TypeVar("T")


@pytest.fixture(params=list(FACTORIES))
def factory(request: pytest.FixtureRequest) -> Factory:
    return FACTORIES[request.param]


@pytest.fixture
def loop(factory: Factory) -> Iterator[TurnedLoop]:
    loop = TurnedLoop(factory, needs_keeper=False)
    yield loop
    loop.close()


def in_turn(*callbacks: Callable[[], object]) -> Callable[[], None]:
    """A callback that calls others, one after the other."""

    def call() -> None:
        for callback in callbacks:
            callback()

    return call


def teller(loop: TurnedLoop, turn: Turn, delay: float = 0.0) -> Callable[[], object]:
    """A callback that tells a turn, now or later."""
    if delay:
        return lambda: loop.native.call_later(delay, loop.tell, turn)
    return lambda: loop.tell(turn)


def wait_for(probe: Callable[[], object]) -> None:
    """Wait for what nothing tells of."""
    deadline = time.monotonic() + LIMIT
    while not probe():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.002)


@pytest.mark.parametrize("delay", [0.0, 0.001])
def test_a_lone_thread_runs_the_loop_itself(loop: TurnedLoop, delay: float) -> None:
    """[A15]"""
    threads: list[int] = []
    turn = Turn()

    def begin() -> None:
        loop.native.call_later(delay, in_turn(lambda: threads.append(threading.get_ident()), teller(loop, turn)))

    loop.wait(turn, begin)
    assert turn.told
    assert threads == [threading.get_ident()]


def count_runs(loop: TurnedLoop, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that somebody runs the loop."""
    runs: list[int] = []
    run = loop._run

    def note() -> None:
        runs.append(threading.get_ident())
        run()

    monkeypatch.setattr(loop, "_run", note)
    return runs


def wait_for_task(loop: TurnedLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """What it returns. Its task is made in this thread."""
    turn = Turn()
    tasks: list[asyncio.Task[T]] = []

    def begin() -> None:
        tasks.append(loop.native.create_task(coroutine))
        tasks[0].add_done_callback(lambda _: loop.tell(turn))

    loop.wait(turn, begin)
    return tasks[0].result()


def test_what_waits_for_nothing_needs_no_turn_of_the_loop(loop: TurnedLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """[A15]"""

    async def work() -> asyncio.Task[Any] | None:
        assert asyncio.get_running_loop() is loop.native
        assert loop.native.is_running()
        await asyncio.sleep(0)
        async with asyncio.Lock():
            pass
        future = loop.native.create_future()
        loop.native.call_soon(future.set_result, None)
        loop.native.call_soon(pytest.fail, "it was cancelled").cancel()
        await future
        return asyncio.current_task()

    monkeypatch.setattr(loops, "TURN_SECONDS", LIMIT)  # on a machine that stands still now and then, too
    hooks = sys.get_asyncgen_hooks()
    wait_for_task(loop, asyncio.sleep(0))  # its first turn
    runs = count_runs(loop, monkeypatch)
    for _ in range(3):
        assert wait_for_task(loop, work()) is not None
        assert asyncio._get_running_loop() is None
        assert not loop.native.is_running()
        assert sys.get_asyncgen_hooks() == hooks
    assert not runs


def test_an_asynchronous_generator_that_is_dropped_is_finalized_by_the_loop(loop: TurnedLoop) -> None:
    """[A16] Also one that was begun without a turn of it."""
    closed: list[object] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            closed.append(asyncio.get_running_loop())

    async def work() -> None:
        async for _ in numbers():
            break

    wait_for_task(loop, asyncio.sleep(0))
    wait_for_task(loop, work())
    gc.collect()
    wait_for_task(loop, asyncio.sleep(0.001))
    assert closed == [loop.native]


def test_a_callback_that_fails_is_told_to_the_loop(loop: TurnedLoop) -> None:
    errors: list[Any] = []
    loop.native.set_exception_handler(lambda _, context: errors.append(context["exception"]))

    async def work() -> None:
        loop.native.call_soon(int, "x")
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    wait_for_task(loop, asyncio.sleep(0))
    wait_for_task(loop, work())
    assert [type(error) for error in errors] == [ValueError]


def test_who_has_got_hold_of_a_method_while_the_loop_is_not_run_may_use_it_while_it_is(loop: TurnedLoop) -> None:
    async def work() -> bool:
        is_running = loop.native.is_running
        future = loop.native.create_future()
        loop.native.call_later(0.001, loop.native.call_soon, future.set_result, None)
        await asyncio.wait_for(future, LIMIT)
        return is_running()

    wait_for_task(loop, asyncio.sleep(0))
    assert wait_for_task(loop, work())


def test_a_method_that_somebody_has_got_hold_of_tells_when_the_loop_is_closed(factory: Factory) -> None:
    with contextlib.closing(TurnedLoop(factory, needs_keeper=False)) as loop:
        call_soon = loop.native.call_soon
    with pytest.raises(RuntimeError, match="closed"):
        call_soon(print)


def test_other_threads_see_no_gap_between_the_steps_and_the_run(
    loop: TurnedLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A16] asgiref before 3.9 has async code run by a loop of its own where the one it knows does not run."""
    seen: list[bool] = []
    run = loop._run

    def look() -> None:
        seen.append(run_in_thread(loop.native.is_running))
        run()

    wait_for_task(loop, asyncio.sleep(0))
    monkeypatch.setattr(loop, "_run", look)
    wait_for_task(loop, asyncio.sleep(0.001))
    assert seen == [True]


def test_a_loop_that_is_run_within_what_it_runs_finds_what_is_ready(
    loop: TurnedLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nest_asyncio does so, from its import on: by then the loop may be stepped, but never again."""
    if loop._ready is None:
        pytest.skip("nest_asyncio takes asyncio's loops alone")
    found: list[bool] = []

    def nest() -> None:
        monkeypatch.setitem(sys.modules, "nest_asyncio", types.ModuleType("nest_asyncio"))
        handle = loop.native.call_soon(print)
        assert loop._ready is not None
        found.append(loop._ready.pop() is handle)

    wait_for_task(loop, asyncio.sleep(0))
    runs = count_runs(loop, monkeypatch)
    for _ in range(2):
        runs.clear()
        turn = Turn()
        loop.wait(turn, in_turn(partial(loop.native.call_soon, nest), partial(loop.native.call_soon, loop.tell, turn)))
    assert found == [True, True]
    assert len(runs) == 1


def test_what_is_left_to_be_run_is_run_by_whoever_leads_next(factory: Factory) -> None:
    """[A16] By the keeper, if nobody comes."""
    ended = Signal("ended")
    tasks: list[asyncio.Task[None]] = []

    async def work(turn: Turn) -> None:
        loop.tell(turn)
        await asyncio.sleep(0)
        order.append(turn)

    async def end() -> None:
        await work(Turn())
        ended.set()

    def begin(coroutine: Coroutine[Any, Any, None]) -> None:
        tasks.append(loop.native.create_task(coroutine))

    with contextlib.closing(TurnedLoop(factory, needs_keeper=True)) as loop:
        order: list[Turn] = []
        turns = [Turn() for _ in range(3)]
        for turn in turns:
            loop.wait(turn, partial(begin, work(turn)))
        loop.post(partial(begin, end()))
        ended.wait()
    assert order[:3] == turns


def test_the_keeper_holds_nothing_that_it_has_run(factory: Factory) -> None:
    """[S2] It may lead for hours."""

    class Callback:
        def __call__(self) -> None:
            ran.set()

    ran = Signal("ran")
    callback = Callback()
    held = weakref.ref(callback)
    with contextlib.closing(TurnedLoop(factory, needs_keeper=True)) as loop:
        loop.post(callback)
        del callback
        loop.hand_over()
        ran.wait()
        wait_for(lambda: held() is None)


def test_a_loop_has_its_turn_among_threads_that_need_none(factory: Factory) -> None:
    """[A16] A timer is on time though each of those who lead it would do without."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.monotonic() + 0.01
            await asyncio.sleep(0.01)
            late.append(time.monotonic() - due)

    with contextlib.closing(TurnedLoop(factory, needs_keeper=True)) as loop:
        loop.post(lambda: tasks.append(loop.native.create_task(tick())))
        tasks: list[asyncio.Task[None]] = []
        ends = time.monotonic() + 0.5
        while time.monotonic() < ends:
            wait_for_task(loop, asyncio.sleep(0))
    assert len(late) > 20
    assert statistics.median(late) < 0.01


def test_a_task_that_looks_again_and_again_sees_what_the_loop_brings(loop: TurnedLoop) -> None:
    reads, writes = socket.socketpair()
    seen: list[bytes] = []

    async def work() -> None:
        loop.native.add_reader(reads, lambda: seen.append(reads.recv(1)))
        writes.send(b"x")
        while not seen:
            await asyncio.sleep(0)
        loop.native.remove_reader(reads)

    with reads, writes:
        wait_for_task(loop, asyncio.sleep(0))
        wait_for_task(loop, work())
    assert seen == [b"x"]


def test_a_timer_is_served_among_callbacks_that_take_their_time(loop: TurnedLoop) -> None:
    """[A16] An app that computes gives way to the others by sleep(0)."""
    served: list[int] = []

    async def compute() -> None:
        loop.native.call_later(0.001, served.append, 0)
        for _ in range(loops.STEPS // 2):
            time.sleep(0.001)
            await asyncio.sleep(0)
        served.append(1)

    wait_for_task(loop, asyncio.sleep(0))
    wait_for_task(loop, compute())
    assert served == [0, 1]


@pytest.mark.parametrize("debug", [True, False])
def test_a_coroutine_knows_where_it_was_made_in_debug_mode(loop: TurnedLoop, debug: bool) -> None:
    """[S3] And the thread's are as before, afterwards."""

    async def work() -> bool:
        coroutine: Any = asyncio.sleep(0)
        coroutine.close()
        return coroutine.cr_origin is not None

    wait_for_task(loop, asyncio.sleep(0))
    loop.native.set_debug(debug)
    assert wait_for_task(loop, work()) is debug
    assert sys.get_coroutine_origin_tracking_depth() == 0


def test_what_was_left_to_the_loop_has_its_name_in_debug_mode(
    loop: TurnedLoop, caplog: pytest.LogCaptureFixture
) -> None:
    """[S3] Where the loop lets what it has to run be seen: asyncio's."""
    if loop._ready is None:
        pytest.skip("uvloop's does not")

    def dawdle() -> None:
        time.sleep(0.002)

    loop.native.set_debug(True)
    loop.native.slow_callback_duration = 0.002
    loop.post(dawdle)
    wait_for_task(loop, asyncio.sleep(0))  # its first turn
    assert "dawdle" in caplog.text


@pytest.mark.parametrize("debug", [True, False])
def test_a_slow_callback_is_told_of_in_debug_mode(
    loop: TurnedLoop, debug: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """[S3]"""

    async def dawdle() -> None:
        time.sleep(0.002)

    wait_for_task(loop, asyncio.sleep(0))
    loop.native.set_debug(debug)
    loop.native.slow_callback_duration = 0.002
    wait_for_task(loop, dawdle())
    assert ("dawdle" in caplog.text) is debug


def test_a_turn_that_was_told_before_does_not_wait(loop: TurnedLoop) -> None:
    turn = Turn()
    turn.told = True
    loop.wait(turn)
    loop.wait(turn, teller(loop, turn))  # and leaves a stop behind, which must not disturb the next wait

    another = Turn()
    loop.wait(another, teller(loop, another, 0.01))
    assert another.told


def test_a_stop_that_comes_twice_or_for_another_is_a_hint(loop: TurnedLoop) -> None:
    turn = Turn()

    def begin() -> None:
        for _ in range(3):
            loop.native.call_soon(loop.native.stop)
        loop.native.call_later(0.02, loop.tell, turn)
        loop.native.call_later(0.02, loop.tell, turn)

    loop.wait(turn, begin)
    assert turn.told
    loop.close()  # is not disturbed by a second stop either


def test_the_leader_works_for_its_followers_and_hands_the_loop_on(loop: TurnedLoop) -> None:
    """[A14]"""
    leader, told, heir = Turn(), Turn(), Turn()
    leads = Signal("leads")
    leading = in_thread(loop.wait, leader, leads.set)
    leads.wait()
    follower = in_thread(loop.wait, told, teller(loop, told, 0.01))
    follower.result()
    assert not leader.told

    waiting = in_thread(loop.wait, heir, None)
    wait_for(lambda: loop._followers)
    loop.post(teller(loop, leader))
    leading.result()
    loop.post(teller(loop, heir))  # the heir runs it now
    waiting.result()


def test_a_loop_that_is_left_alone_with_work_gets_its_keeper(factory: Factory) -> None:
    """[A16]"""
    with contextlib.closing(TurnedLoop(factory, needs_keeper=True)) as loop:
        threads: list[str] = []
        ticked = Signal("ticked")
        turn = Turn()

        def tick() -> None:
            threads.append(threading.current_thread().name)
            ticked.set()

        def begin() -> None:
            loop.native.call_later(0.03, tick)
            loop.tell(turn)

        loop.wait(turn, begin)
        ticked.wait()
        assert threads[0].startswith("bridge-keeper")
        # Whoever wants the loop gets it.
        again = Turn()
        loop.wait(again, lambda: loop.native.call_later(0.01, in_turn(tick, teller(loop, again))))
        assert threads[1] == threading.current_thread().name


def test_keep_calls_the_keeper_to_a_loop_that_stands_still(loop: TurnedLoop) -> None:
    """[A5]"""
    fired = Signal("fired")
    turn = Turn()
    loop.wait(turn, in_turn(lambda: loop.native.call_later(0.01, fired.set), teller(loop, turn)))
    loop.keep()
    fired.wait()


def test_a_callback_posted_to_a_kept_loop_is_run(factory: Factory) -> None:
    with contextlib.closing(TurnedLoop(factory, needs_keeper=True)) as loop:
        turn = Turn()
        loop.wait(turn, teller(loop, turn))
        for _ in range(20):
            ran = Signal("ran")
            loop.post(ran.set)
            ran.wait()


def test_a_thread_in_which_a_loop_runs_waits_while_the_keeper_leads(loop: TurnedLoop) -> None:
    """[A15]"""

    async def main() -> None:
        for _ in range(3):
            turn = Turn()
            loop.wait(turn, teller(loop, turn, 0.001))
            assert turn.told
        assert loop.clear()

    asyncio.run(main())


def test_who_runs_in_a_loop_cannot_wait_for_it(loop: TurnedLoop) -> None:
    """[A15]"""
    turn = Turn()
    errors: list[BaseException] = []

    def begin() -> None:
        try:
            loop.wait(Turn())
        except RuntimeError as error:
            errors.append(error)
        loop.tell(turn)

    loop.wait(turn, lambda: loop.native.call_soon(begin))
    assert len(errors) == 1


@pytest.mark.parametrize("threads", [2, 16])
def test_no_wake_up_is_lost(factory: Factory, threads: int) -> None:
    """[A14] However the threads are switched."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with contextlib.closing(TurnedLoop(factory, needs_keeper=True)) as loop:

            def serve(number: int) -> None:
                turn = Turn()
                for step in range(3):
                    turn.told = False
                    loop.wait(turn, teller(loop, turn, 0.0001 * ((number + step) % 3)))
                    assert turn.told

            run_in_threads(serve, 1500, threads=threads)
            assert loop._leader in (None, loop._keeper)
            assert not loop._followers
    finally:
        sys.setswitchinterval(interval)


def test_an_exit_raised_in_the_loop_does_not_end_a_thread_that_happens_to_lead(
    loop: TurnedLoop, caplog: pytest.LogCaptureFixture
) -> None:
    """[A9] Nor the keeper."""

    def leave() -> None:
        raise SystemExit("not yours")

    for lead in (run_in_thread, lambda func: asyncio.run(_call(func))):
        turn = Turn()
        lead(lambda turn=turn: loop.wait(turn, in_turn(lambda: loop.native.call_soon(leave), teller(loop, turn, 0.02))))
        assert turn.told
    # uvloop does what else is ready before it raises: where the keeper leads, the log hears of it behind who waits.
    wait_for(lambda: caplog.text.count("tried to end the thread") == 2)
    # In a step, now that the loop has had its turn.
    turn = Turn()
    tell = partial(loop.native.call_soon, loop.tell, turn)
    run_in_thread(lambda: loop.wait(turn, in_turn(lambda: loop.native.call_soon(leave), tell)))
    assert turn.told
    wait_for(lambda: caplog.text.count("tried to end the thread") == 3)


def test_a_keeper_that_fails_fails_who_waits_for_it_and_another_one_comes(
    loop: TurnedLoop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A9] As where the loop has lost its selector."""
    monkeypatch.setitem(sys.modules, "greenlet", types.ModuleType("greenlet"))  # so that the keeper leads
    run = loop._run

    def fail() -> None:
        wait_for(lambda: len(loop._followers) == 2)
        raise OSError("the selector is gone")

    monkeypatch.setattr(loop, "_run", fail)
    turn = Turn()
    waiting = [in_thread(loop.wait, each, None) for each in (turn, Turn())]
    for each in waiting:
        with pytest.raises(RuntimeError, match="the thread that ran the event loop has failed") as raised:
            each.result()
        assert str(raised.value.__cause__) == "the selector is gone"
    monkeypatch.setattr(loop, "_run", run)
    run_in_thread(lambda: loop.wait(turn, teller(loop, turn)))
    assert turn.told
    wait_for(lambda: caplog.text)  # the keeper tells the log behind those who wait
    assert caplog.text.count("the thread that runs the loop has failed") == 1


async def _call(func: Callable[[], object]) -> None:
    func()


def test_the_keeper_takes_no_signal_that_would_end_uwsgi(loop: TurnedLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """[A20] uWSGI's handlers end the process in whatever thread the signal comes to; elsewhere they are Python's."""
    blocked = partial(signal.pthread_sigmask, signal.SIG_BLOCK, [])
    assert signal.SIGTERM not in (threads.call(blocked) or ())
    monkeypatch.setitem(sys.modules, "uwsgi", types.ModuleType("uwsgi"))
    loop.keep()
    masks: list[set[Any]] = []
    loop.post(lambda: masks.append(blocked()))
    wait_for(lambda: masks)
    assert masks[0] >= {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def test_an_interrupt_gives_the_loop_up(loop: TurnedLoop) -> None:
    """[A20] The handler of a signal raises in the main thread: as the leader, and as a follower."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            loop.wait(Turn())
        assert loop._leader is None

        leader, leads = Turn(), Signal("leads")
        leading = in_thread(loop.wait, leader, leads.set)
        leads.wait()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            loop.wait(Turn())
        assert not loop._followers
        loop.post(teller(loop, leader))
        leading.result()
    finally:
        signal.signal(signal.SIGALRM, before)
    turn = Turn()
    loop.wait(turn, teller(loop, turn, 0.01))
    assert turn.told


class Interrupt(KeyboardInterrupt):
    """Out of a signal's handler; of a class that loops let through."""


@contextlib.contextmanager
def interrupt_at(number: int) -> Iterator[list[str]]:
    """Raise at one of the points at which CPython runs a signal's handler here: calls and their ends.

    Here is loops.py, threads.py, and where they wait for a thread that they have started.
    """
    places: list[str] = []

    def is_here(frame: types.FrameType | None) -> bool:
        return frame is not None and frame.f_code.co_filename in (loops.__file__, threads.__file__)

    def waits_for_start(frame: types.FrameType) -> bool:
        starts = frame.f_back
        return frame.f_code is threading.Event.wait.__code__ and starts is not None and is_here(starts.f_back)

    def is_before_with(event: str, argument: object) -> bool:
        # Between the lock of a `with` and its block. CPython 3.14 runs handlers there, which no code written in Python
        # is safe from; 3.15 does not, but tells a profiler of the place. Before 3.14 there is no such place.
        return event == "c_return" and getattr(argument, "__name__", "") == "__enter__"

    def look(frame: types.FrameType, event: str, argument: object) -> None:
        if is_before_with(event, argument):
            return
        if event in ("call", "c_return") and (is_here(frame) or waits_for_start(frame)):
            places.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            if len(places) == number:
                sys.setprofile(None)
                raise Interrupt

    sys.setprofile(look)
    try:
        yield places
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("bound", [False, True], ids=["threads", "greenlets"])
def test_an_interrupt_at_any_point_leaves_no_party_that_has_gone(
    factory: Factory, bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A20] The thread may lead, follow, hand the loop on, and start the keeper; the others go on as if it had told."""
    if bound:
        monkeypatch.setitem(sys.modules, "greenlet", types.ModuleType("greenlet"))
    for needs_keeper in (False, True):
        for steps in (False, True):
            number = 1
            while wait_interrupted(factory, number, needs_keeper, steps):
                number += 1
            assert number > 10


def wait_interrupted(factory: Factory, number: int, needs_keeper: bool, steps: bool) -> bool:
    """Whether so many points lie in a thread's wait, to which another one comes, and to which it leaves the loop."""
    with contextlib.closing(TurnedLoop(factory, needs_keeper)) as loop:
        mine, theirs = Turn(), Turn()
        if steps:
            wait_for_task(loop, asyncio.sleep(0))  # the loop's first turn
        others: list[RunningCall[None]] = []

        def meet() -> None:
            others.append(in_thread(loop.wait, theirs))
            wait_for(lambda: theirs in loop._followers)
            loop.tell(mine)

        interrupted = False
        with interrupt_at(number) as places:
            try:
                loop.wait(mine, meet)
            except Interrupt:
                interrupted = True
        third = Turn()
        run_in_thread(loop.wait, third, teller(loop, third))
        loop.post(teller(loop, theirs))
        for other in others:
            other.result()
        assert not loop._followers, places[-1]
        assert loop._leader is None or loop._leader is loop._keeper, places[-1]
    return interrupted


def test_an_interrupt_at_any_point_leaves_the_loop_to_its_keeper(factory: Factory) -> None:
    """[A16] [A20] From which the thread has taken it."""
    number = 1
    with contextlib.closing(TurnedLoop(factory, needs_keeper=False)) as loop:
        loop.keep()
        while interrupted_while_kept(loop, number):
            number += 1
    assert number > 10


def interrupted_while_kept(loop: TurnedLoop, number: int) -> bool:
    """Whether so many points lie in a thread's wait, before and after which the keeper leads."""
    wait_for(lambda: loop._leader is loop._keeper is not None)
    interrupted = False
    turn, ticked = Turn(), Signal(f"ticked after an interrupt at point {number}")
    with interrupt_at(number):
        try:
            loop.wait(turn, teller(loop, turn, 0.001))
        except Interrupt:
            interrupted = True
    loop.post(lambda: loop.native.call_later(0.001, ticked.set))
    ticked.wait()
    return interrupted


def test_greenlets_that_come_into_use_bind_a_loop_to_its_keeper(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A16] Also where threads wait for their turn to lead it."""
    with contextlib.closing(TurnedLoop(factory, needs_keeper=False)) as loop:
        leader, heir = Turn(), Turn()
        leads = Signal("leads")
        leading = in_thread(loop.wait, leader, leads.set)
        leads.wait()
        waiting = in_thread(loop.wait, heir, None)
        wait_for(lambda: loop._followers)
        monkeypatch.setitem(sys.modules, "greenlet", types.ModuleType("greenlet"))
        loop.post(teller(loop, leader))
        leading.result()
        assert loop._leader is loop._keeper is not None
        loop.post(teller(loop, heir))
        waiting.result()


def test_where_greenlets_are_used_a_loop_has_one_thread(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """[A16] Whoever waits for it; also while nobody does, and for its end."""
    # The package itself would stay for all tests that follow.
    monkeypatch.setitem(sys.modules, "greenlet", types.ModuleType("greenlet"))
    threads: set[int] = set()

    def note() -> None:
        threads.add(threading.get_ident())

    async def work() -> None:
        note()
        try:
            await asyncio.sleep(100)
        finally:
            note()

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            note()

    generator = numbers()
    tasks: list[asyncio.Task[None]] = []
    with contextlib.closing(TurnedLoop(factory, needs_keeper=False)) as loop:

        def begin() -> None:
            tasks.append(loop.native.create_task(work()))

        def serve(number: int) -> None:
            turn = Turn()
            loop.wait(turn, in_turn(note, teller(loop, turn, 0.001 * (number % 3))))

        run_in_threads(serve, 30, threads=8)
        serve(0)
        turn = Turn()
        loop.wait(turn, in_turn(begin, teller(loop, turn, 0.001)))
        assert loop.clear(ready=True)
        assert tasks[0].cancelled()
        assert loop.clear()
        fired = Signal("fired")
        turn = Turn()
        loop.wait(turn, in_turn(lambda: loop.native.call_later(0.02, in_turn(note, fired.set)), teller(loop, turn)))
        fired.wait()
        turn = Turn()

        async def open_generator() -> None:
            await anext(generator)
            loop.tell(turn)

        loop.wait(turn, lambda: tasks.append(loop.native.create_task(open_generator())))
        loop.wait(turn, begin)
        serve(0)
    assert loop.native.is_closed()
    assert len(threads) == 1
    assert threading.get_ident() not in threads


# -- The end -----------------------------------------------------------------------------------------------------------


def test_close_ends_tasks_generators_and_threads(factory: Factory) -> None:
    """[A21]"""
    loop = TurnedLoop(factory, needs_keeper=True)
    ended: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            ended.append("generator")

    generator = numbers()

    async def work() -> None:
        await anext(generator)
        await asyncio.to_thread(ended.append, "thread")
        try:
            loop.tell(turn)
            await asyncio.sleep(100)
        finally:
            ended.append("task")

    turn = Turn()
    tasks = []
    loop.wait(turn, lambda: tasks.append(loop.native.create_task(work())))
    loop.close()
    loop.close()
    assert ended == ["thread", "task", "generator"]
    assert loop.native.is_closed()
    loop.post(ended.clear)
    assert ended
    with pytest.raises(RuntimeError, match="closed"):
        loop.wait(Turn())


def test_close_waits_for_no_task_that_refuses_to_end(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[A20]"""
    monkeypatch.setattr("bridge.loops.CANCEL_SECONDS", 0.05)
    loop = TurnedLoop(factory, needs_keeper=True)
    loop.native.set_exception_handler(lambda loop, context: None)
    may_end = False

    async def refuse() -> None:
        while not may_end:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1)

    turn = Turn()
    tasks: list[asyncio.Task[None]] = []
    loop.wait(turn, in_turn(lambda: tasks.append(loop.native.create_task(refuse())), teller(loop, turn)))
    loop.close()
    assert loop.native.is_closed()
    may_end = True
    coroutine = tasks.pop().get_coro()
    with contextlib.suppress(StopIteration, RuntimeError, asyncio.CancelledError):
        coroutine.throw(asyncio.CancelledError)


def test_a_thread_that_waits_when_the_loop_is_closed_hears_of_it(loop: TurnedLoop) -> None:
    async def wait() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            loop.wait(Turn())

    waiting = in_thread(asyncio.run, wait())
    wait_for(lambda: loop._followers)
    loop.close()
    waiting.result()


def test_close_within_a_loop(factory: Factory) -> None:
    """[A21] Within another one it is waited for, within its own it comes later."""

    async def main() -> None:
        other = TurnedLoop(factory, needs_keeper=False)
        other.close()
        assert other.native.is_closed()

    asyncio.run(main())
    own = TurnedLoop(factory, needs_keeper=True)
    turn = Turn()
    own.wait(turn, lambda: own.native.call_soon(in_turn(own.close, teller(own, turn))))
    wait_for(own.native.is_closed)


def test_a_pool_gives_a_loop_to_one_at_a_time_and_takes_it_back_clean(factory: Factory) -> None:
    """[A14] [S2]"""
    with contextlib.closing(LoopPool(factory)) as pool:
        first, second = pool.take(), pool.take()
        assert first is not second
        turn = Turn()
        tasks: list[asyncio.Task[None]] = []
        sleep = asyncio.sleep(100)
        first.wait(turn, in_turn(lambda: tasks.append(first.native.create_task(sleep)), teller(first, turn)))
        first.keep()
        wait_for(lambda: first._leader)
        pool.give_back(first)
        assert tasks[0].cancelled()
        assert first._leader is None
        assert pool.take() is first
        pool.give_back(first)
        pool.give_back(second)
    assert first.native.is_closed()
    assert second.native.is_closed()


@pytest.mark.parametrize("own_factory", [False, True], ids=["", "task factory"])
def test_a_pool_ends_each_of_many_tasks(factory: Factory, own_factory: bool) -> None:
    """[A10] [A14]: whether the app makes its tasks as the loop came, or has set a task factory."""
    kept: list[asyncio.Task[None]] = []
    ended: list[int] = []

    async def note(number: int) -> None:
        ended.append(number)

    async def make() -> None:
        loop = asyncio.get_running_loop()
        if own_factory:
            loop.set_task_factory(lambda loop, coroutine, **options: asyncio.Task(coroutine, loop=loop, **options))
        for number in range(300):
            await loop.create_task(note(number))
            if number % 3 == 0:
                kept.append(loop.create_task(asyncio.sleep(100)))

    with contextlib.closing(LoopPool(factory)) as pool:
        loop = pool.take()
        turn = Turn()

        def begin() -> None:
            kept.append(loop.native.create_task(make()))
            kept[0].add_done_callback(lambda _: loop.tell(turn))

        loop.wait(turn, begin)
        pool.give_back(loop)
        assert len(ended) == 300
        assert [task.cancelled() for task in kept] == [False] + [True] * 100
        assert loop.native.is_closed() is own_factory


@pytest.mark.parametrize(
    ("change", "factories"),
    [
        (lambda loop: loop.set_task_factory(None), ["asyncio", "uvloop"]),
        (lambda loop: loop.set_exception_handler(lambda loop, context: None), ["asyncio", "uvloop"]),
        (lambda loop: loop.set_default_executor(ThreadPoolExecutor(1)), ["asyncio"]),
        (lambda loop: loop.call_later(100, print), ["asyncio"]),
        (lambda loop: loop.add_reader(loop._csock, print), ["asyncio"]),
    ],
    ids=["task factory", "exception handler", "executor", "timer", "descriptor"],
)
def test_a_loop_that_a_request_has_altered_is_no_more_given_out(
    change: Callable[[Any], object], factories: list[str]
) -> None:
    """[A14] [S2] What one request sets does not meet the next, where the loop lets it be seen."""
    for name in factories:
        alter_loop(FACTORIES[name], change)


def alter_loop(factory: Factory, change: Callable[[Any], object]) -> None:
    with contextlib.closing(LoopPool(factory)) as pool:
        loop = pool.take()
        turn = Turn()
        loop.wait(turn, in_turn(lambda: loop.native.call_later(100, print).cancel(), teller(loop, turn)))
        pool.give_back(loop)
        assert pool.take() is loop
        turn = Turn()
        loop.wait(turn, in_turn(lambda: change(loop.native), teller(loop, turn)))
        pool.give_back(loop)
        assert loop.native.is_closed()


def test_a_loop_with_an_open_connection_is_kept(factory: Factory) -> None:
    """[A14] It may be in a pool of the app's, which finds it in order as long as the next request has this loop."""
    with contextlib.closing(LoopPool(factory)) as pool, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        loop = pool.take()
        turn = Turn()
        transports: list[asyncio.BaseTransport] = []

        async def connect() -> None:
            transport, _ = await loop.native.create_connection(asyncio.Protocol, *listener.getsockname())
            transports.append(transport)

        def begin() -> None:
            loop.native.create_task(connect()).add_done_callback(lambda _: loop.tell(turn))

        loop.wait(turn, begin)
        pool.give_back(loop)
        assert pool.take() is loop
        turn.told = False
        loop.wait(turn, in_turn(transports[0].close, teller(loop, turn)))
        pool.give_back(loop)


def test_a_loop_that_comes_back_to_a_closed_pool_is_closed(factory: Factory) -> None:
    """[A21]"""
    pool = LoopPool(factory)
    loop = pool.take()
    pool.close()
    pool.close()
    pool.give_back(loop)
    assert loop.native.is_closed()


def test_a_pool_keeps_no_more_than_its_measure(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.loops.POOLED_LOOPS", 1)
    with contextlib.closing(LoopPool(factory)) as pool:
        loops = [pool.take(), pool.take()]
        for loop in loops:
            pool.give_back(loop)
        assert [loop.native.is_closed() for loop in loops] == [False, True]


def test_a_loop_that_cannot_be_cleared_is_no_more_given_out(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """[A10]"""
    monkeypatch.setattr("bridge.loops.CANCEL_SECONDS", 0.05)
    cancels: list[int] = []

    async def refuse() -> None:
        while len(cancels) < 2:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                cancels.append(1)

    with contextlib.closing(LoopPool(factory)) as pool:
        loop = pool.take()
        turn = Turn()
        tasks: list[asyncio.Task[None]] = []
        make = in_turn(lambda: tasks.append(loop.native.create_task(refuse())), teller(loop, turn, 0.001))
        loop.wait(turn, make)
        pool.give_back(loop)
        assert loop.native.is_closed()
        assert tasks[0].done()


# CPython 3.12 and newer warn of forks beside threads, in the parent; from 3.15 on before the fork.
@pytest.mark.filterwarnings("ignore:.*is multi-threaded:DeprecationWarning")
def test_a_child_drops_the_loop_unclosed(factory: Factory) -> None:
    """[A20]"""
    with contextlib.closing(TurnedLoop(factory, needs_keeper=True)) as loop:
        reads, writes = os.pipe()
        heard = Signal("heard")
        turn = Turn()
        loop.wait(turn, in_turn(lambda: loop.native.add_reader(reads, heard.set), teller(loop, turn)))
        wait_for(lambda: loop._leader)  # the keeper, in the middle of it
        child = os.fork()
        if not child:
            status = 1
            with contextlib.suppress(BaseException):
                loop.close()
                loop.post(lambda: None)
                try:
                    loop.wait(Turn())
                except RuntimeError:
                    another = TurnedLoop(factory, needs_keeper=False)
                    turn = Turn()
                    another.wait(turn, teller(another, turn, 0.001))
                    another.close()
                    status = 0
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        os.write(writes, b"x")
        heard.wait()
        again = Turn()
        loop.wait(again, in_turn(lambda: loop.native.remove_reader(reads), teller(loop, again)))
        os.close(reads)
        os.close(writes)
