"""The door between threads and a loop: nothing is lost, nobody sleeps for ever, a window bounds what is under way."""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from bridge.channel import PATIENCE, Closed, Door, StepsToLoop, StepsToThread, ToLoop, ToThread, current_door
from tests.drivers import LIMIT, Signal, in_thread, run_in_thread

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can: what can go wrong between two instructions does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


async def get_all(channel: ToLoop[Any], count: int) -> list[Any]:
    got: list[Any] = []
    while len(got) < count:
        got += await channel.get()
    return got


# The door -------------------------------------------------------------------------------------------------------------


async def test_loop_has_one_door() -> None:
    """Every request finds the same, and it knows the loop's thread and token."""
    door = current_door()
    assert current_door() is door
    assert door.thread == threading.get_ident()
    assert door.token.native_token is door.native


def test_next_loop_of_a_thread_has_another_door() -> None:
    """The former loop has ended, and who rings there is told, each time."""

    async def main() -> Door:
        return current_door()

    for backend in ("asyncio", "trio", "asyncio"):
        doors = [anyio.run(main, backend=backend) for _ in range(2)]
        assert doors[0] is not doors[1]
        for _ in range(2):
            with pytest.raises(Closed):
                doors[0].ring(lambda: None)


async def test_ringing_runs_a_callback_in_the_loop_in_nobodys_context() -> None:
    """Not in that of the thread, nor of the task that made the door."""
    seen: list[tuple[int, str]] = []
    rung = Signal("callback")
    variable.set("the request's")
    door = current_door()

    def callback() -> None:
        seen.append((threading.get_ident(), variable.get()))
        rung.set()

    run_in_thread(door.ring, callback)
    await rung.wait_async()
    assert seen == [(threading.get_ident(), "unset")]


async def test_threads_that_ring_at_once_share_one_waking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hand-over is nearly free, a wake-up is dear."""
    door = current_door()
    wakings: list[object] = []
    call_soon = door._call_soon

    def counted(callback: Callable[[], None]) -> None:
        wakings.append(callback)
        call_soon(callback)

    monkeypatch.setattr(door, "_call_soon", counted)
    answered: list[int] = []
    done = Signal("all answered")
    for number in range(10):
        run_in_thread(door.ring, lambda number=number: answered.append(number))
    run_in_thread(door.ring, done.set)
    await done.wait_async()
    assert answered == list(range(10))
    assert len(wakings) == 1


async def test_alarm_goes_off_once() -> None:
    """After PATIENCE to twice that, and a little for a loaded machine."""
    door = current_door()
    gone_off: list[str] = []
    ringing = Signal("alarm")
    begun = anyio.current_time()

    def callback() -> None:
        gone_off.append("a")
        ringing.set()

    door.alarm("a", callback)
    await ringing.wait_async()
    assert anyio.current_time() - begun >= PATIENCE * 0.99
    door.disarm("a")
    await anyio.sleep(3 * PATIENCE)
    assert gone_off == ["a"]
    assert not door._sweeping


async def test_alarm_that_is_taken_back_does_not_go_off() -> None:
    """In its first sweep or its second."""
    door = current_door()
    door.alarm("young", pytest.fail)
    door.disarm("young")
    door.alarm("elder", pytest.fail)
    while "elder" not in door._elder:
        await anyio.sleep(PATIENCE / 10)
    door.disarm("elder")
    await anyio.sleep(3 * PATIENCE)
    assert not door._sweeping


# From a thread to the loop --------------------------------------------------------------------------------------------


async def test_items_arrive_in_order() -> None:
    """All there are at once; the loop's own between the thread's."""
    channel: ToLoop[str] = ToLoop(current_door(), 100)
    run_in_thread(channel.put, "a")
    channel.put_from_loop("b")
    run_in_thread(channel.put, "c")
    run_in_thread(channel.put_last, "d")
    assert [*await channel.get()] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("way", ["put", "put_last", "put_from_loop"])
async def test_sleeping_task_is_woken(way: str) -> None:
    """Whoever hands over wakes it."""
    channel: ToLoop[str] = ToLoop(current_door(), 100)
    got: list[str] = []

    async def get() -> None:
        got.extend(await channel.get())

    async with anyio.create_task_group() as group:
        group.start_soon(get)
        while channel._on_put is None:
            await anyio.lowlevel.checkpoint()
        if way == "put_from_loop":
            channel.put_from_loop("item")
        else:
            run_in_thread(getattr(channel, way), "item")
    assert got == ["item"]


async def test_what_is_started_beside_a_task_can_be_joined_and_cancelled() -> None:
    door = current_door()
    gate, told = anyio.Event(), []

    async def work() -> None:
        told.append(word.get())
        try:
            await gate.wait()
            told.append("done")
        except anyio.get_cancelled_exc_class():
            told.append("cancelled")
            raise

    word: contextvars.ContextVar[str] = contextvars.ContextVar("word")
    word.set("told")
    ends = door.start(work)
    cancelled = door.start(work)
    door.start(work).cancel()  # before it has begun
    await anyio.wait_all_tasks_blocked()
    assert told == ["told", "told"]
    cancelled.cancel()
    await door.join(cancelled)
    assert told[2:] == ["cancelled"]
    gate.set()
    await door.join(ends)
    await door.join(ends)
    assert told[3:] == ["done"]


async def test_cancelled_get_loses_nothing() -> None:
    """Neither what comes afterwards, nor its waking."""
    channel: ToLoop[str] = ToLoop(current_door(), 100)
    with anyio.move_on_after(0.01):
        await channel.get()
    run_in_thread(channel.put, "first")
    await anyio.lowlevel.checkpoint()
    assert [*await channel.get()] == ["first"]
    call = in_thread(channel.put, "second")
    assert [*await channel.get()] == ["second"]
    await call.result_async()


async def test_put_waits_until_half_of_the_window_has_left() -> None:
    """One item may always be under way, and the window bounds the rest."""
    channel: ToLoop[int] = ToLoop(current_door(), 100)
    run_in_thread(channel.put, 1, 60)
    waiting = in_thread(channel.put, 2, 60)
    await get_all(channel, 2)
    channel.sent(40)  # 80 are left
    await anyio.sleep(0.02)
    assert not waiting.ended.is_set()
    channel.sent(30)
    await waiting.result_async()


async def test_close_ends_the_wait_of_put() -> None:
    """It raises; what lies in the channel can still be got."""
    channel: ToLoop[int] = ToLoop(current_door(), 100)
    waiting = in_thread(channel.put, 1, 200)
    assert [*await channel.get()] == [1]
    channel.close()
    with pytest.raises(Closed):
        await waiting.result_async()
    with pytest.raises(Closed):
        run_in_thread(channel.put, 2)
    run_in_thread(channel.put_last, 3)
    assert [*await channel.get()] == [3]


def test_put_after_the_end_of_the_loop_raises() -> None:
    """Also where the window is full; and put_last says nothing."""

    async def main() -> list[ToLoop[int]]:
        channels: list[ToLoop[int]] = [ToLoop(current_door(), 100) for _ in range(3)]
        for channel in channels:
            with anyio.move_on_after(0.01):
                await channel.get()
        return channels

    for backend in ("asyncio", "trio"):
        channels = anyio.run(main, backend=backend)
        for channel in channels[:2]:
            with pytest.raises(Closed):
                run_in_thread(channel.put, 1, 200)
        channels[2].put_last(1)


# From the loop to a thread --------------------------------------------------------------------------------------------


async def test_thread_gets_what_the_task_puts() -> None:
    """In order, whether it waits or not; None says that there is nothing yet."""
    channel: ToThread[bytes] = ToThread(current_door(), 100)
    assert run_in_thread(channel.get_nowait) is None
    waiting = in_thread(channel.get)
    channel.put(b"a", 1)
    assert await waiting.result_async() == b"a"
    channel.put(b"", 0)
    channel.put(b"b", 1)
    channel.close()
    assert [run_in_thread(channel.get_nowait), run_in_thread(channel.get)] == [b"", b"b"]
    for get in (channel.get, channel.get_nowait):
        with pytest.raises(Closed):
            run_in_thread(get)


async def test_close_ends_the_wait_of_get() -> None:
    """For ever."""
    channel: ToThread[bytes] = ToThread(current_door(), 100)
    waiting = in_thread(channel.get)
    await anyio.sleep(0.01)
    channel.close()
    with pytest.raises(Closed):
        await waiting.result_async()


async def test_room_waits_until_half_of_the_window_was_got() -> None:
    """And no longer, whichever way the thread gets."""
    channel: ToThread[int] = ToThread(current_door(), 100)
    await channel.room()
    for number in range(3):
        channel.put(number, 50)
    roomy = Signal("room")

    async def wait() -> None:
        await channel.room()
        roomy.set()

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.sleep(0.01)
        run_in_thread(channel.get)
        await anyio.sleep(0.01)
        assert not roomy.is_set()
        run_in_thread(channel.get_nowait)
        await roomy.wait_async()


async def test_close_ends_the_wait_for_room() -> None:
    """The task, too, may go."""
    channel: ToThread[int] = ToThread(current_door(), 10)
    channel.put(1, 50)
    async with anyio.create_task_group() as group:
        group.start_soon(channel.room)
        await anyio.sleep(0.01)
        channel.close()


# Lost wake-ups --------------------------------------------------------------------------------------------------------

ITEMS = 2000
PAIRS = 6


async def test_no_waking_is_lost_on_the_way_to_the_loop(hasty: None) -> None:
    """Threads and their tasks go to sleep and wake each other at every possible moment."""
    sums: list[int] = []

    def produce(channel: ToLoop[int]) -> None:
        for number in range(ITEMS):
            channel.put(number, 1 + number % 40)
        channel.put_last(-1)

    async def consume(channel: ToLoop[int]) -> None:
        got: list[int] = []
        while not got or got[-1] != -1:
            for number in await channel.get():
                got.append(number)
                if number >= 0:
                    channel.sent(1 + number % 40)
                if number % 7 == 0:
                    await anyio.lowlevel.checkpoint()
        assert got == [*range(ITEMS), -1]
        sums.append(len(got))

    door = current_door()
    channels: list[ToLoop[int]] = [ToLoop(door, 100) for _ in range(PAIRS)]
    calls = [in_thread(produce, channel) for channel in channels]
    async with anyio.create_task_group() as group:
        for channel in channels:
            group.start_soon(consume, channel)
    for call in calls:
        await call.result_async()
    assert sums == [ITEMS + 1] * PAIRS


async def test_no_waking_is_lost_on_the_way_to_a_thread(hasty: None) -> None:
    """The other way round, with a task that waits for room."""

    def consume(channel: ToThread[int]) -> list[int]:
        got: list[int] = []
        while True:
            try:
                number = channel.get_nowait() if len(got) % 3 else None
                got.append(channel.get() if number is None else number)
            except Closed:
                return got

    async def produce(channel: ToThread[int]) -> None:
        for number in range(ITEMS):
            await channel.room()
            channel.put(number, 1 + number % 40)
            if number % 7 == 0:
                await anyio.lowlevel.checkpoint()
        channel.close()

    door = current_door()
    channels: list[ToThread[int]] = [ToThread(door, 100) for _ in range(PAIRS)]
    calls = [in_thread(consume, channel) for channel in channels]
    async with anyio.create_task_group() as group:
        for channel in channels:
            group.start_soon(produce, channel)
    for call in calls:
        assert await call.result_async() == list(range(ITEMS))


async def test_no_waking_is_lost_where_both_sides_answer_each_other(hasty: None) -> None:
    """One item to and one item fro: each side sleeps each time."""

    def ask(out: ToLoop[int], back: ToThread[int]) -> int:
        for number in range(ITEMS // 4):
            out.put(number)
            assert back.get() == number
        out.put_last(-1)
        return number

    async def reply(out: ToLoop[int], back: ToThread[int]) -> None:
        while True:
            for number in await out.get():
                if number < 0:
                    return
                back.put(number)

    door = current_door()
    pairs: list[tuple[ToLoop[int], ToThread[int]]] = [(ToLoop(door, 10), ToThread(door, 10)) for _ in range(PAIRS)]
    calls = [in_thread(ask, *pair) for pair in pairs]
    async with anyio.create_task_group() as group:
        for pair in pairs:
            group.start_soon(reply, *pair)
    for call in calls:
        await call.result_async()


# A thread that comes step by step -------------------------------------------------------------------------------------


async def test_the_thread_is_asked_for_a_step_once_nothing_is_left() -> None:
    """[C1]"""
    asked: list[int] = []

    async def ask() -> None:
        asked.append(len(asked))
        channel.put(f"item {len(asked)}", 1)  # as a thread does that is quick

    channel: StepsToLoop[str] = StepsToLoop(current_door(), ask, lambda: None)
    assert list(await channel.get()) == ["item 1"]
    channel.end_step()
    assert list(await channel.get()) == ["item 2"]
    assert asked == [0, 1]


async def test_who_waits_for_all_to_be_sent_is_woken_whatever_else_lies_there() -> None:
    """[C1] A word from within the loop may have come meanwhile, which nobody sends."""

    async def ask() -> None:
        pass

    woken = []
    channel: StepsToLoop[str] = StepsToLoop(current_door(), ask, lambda: woken.append(channel.empty))
    channel.put("block", 5)
    assert not channel.empty
    assert list(await channel.get()) == ["block"]
    channel.put_from_loop("word")
    channel.sent(5)
    assert woken == [True]


async def test_a_closed_channel_of_steps_refuses_what_is_put_but_the_last() -> None:
    """[C1], [W16]"""

    async def ask() -> None:
        pass

    woken = []
    channel: StepsToLoop[str] = StepsToLoop(current_door(), ask, lambda: woken.append(channel.empty))
    channel.close()
    assert woken == [True]
    with pytest.raises(Closed):
        channel.put("block", 5)
    channel.put_last("end")
    assert list(await channel.get()) == ["end"]


async def test_a_thread_that_reads_serves_meanwhile() -> None:
    """[C1] It serves until there is an item, or never will be one."""
    woken = []
    brings = [lambda: channel.put(b"chunk", 5), lambda: channel.close()]

    def serve(until: Callable[[], bool]) -> None:
        assert not until()
        brings.pop(0)()
        assert until()

    channel: StepsToThread[bytes] = StepsToThread(current_door(), serve, lambda: woken.append(True))
    assert channel.get() == b"chunk"
    with pytest.raises(Closed):
        channel.get()
    assert woken == [True, True]


async def test_steps_to_thread_has_room_for_each_item_that_is_wanted() -> None:
    channel: StepsToThread[bytes] = StepsToThread(current_door(), lambda until: None, lambda: None)
    channel.want()
    channel.want()
    await channel.room()
    await channel.room()
    with anyio.move_on_after(0.01) as nobody_wants_more:
        await channel.room()
    assert nobody_wants_more.cancelled_caught
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as group:
            group.start_soon(channel.room)
            await anyio.lowlevel.checkpoint()
            channel.want()
        channel.close()
        await channel.room()


async def test_a_door_tells_whether_the_caller_is_within_its_loop() -> None:
    """[C1], [C2]"""
    door = current_door()
    assert door.runs_here()
    assert await anyio.to_thread.run_sync(door.runs_here) is False
