"""An app's lifespan, step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bridge.errors import ProtocolError
from bridge.lifespan import Lifespan, Stage

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def live(app: Any, *, stop: bool = True) -> tuple[Lifespan, list[Stage]]:
    """Run an app's lifespan to its end, and return it with the stages it has gone through."""
    stages: list[Stage] = []

    async def main() -> Lifespan:
        lifespan = Lifespan(app, lambda: stages.append(lifespan.stage))
        task = asyncio.create_task(lifespan.run())
        for _ in range(5):
            await asyncio.sleep(0)
        if stop:
            lifespan.stop()
        await task
        return lifespan

    return asyncio.run(main()), stages


def sends(*kinds: str | None, error: BaseException | None = None, **more: str) -> Any:
    """An app that sends these messages, and receives one before each; None: it receives no more."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert scope["type"] == "lifespan"
        assert scope["asgi"] == {"version": "3.0", "spec_version": "2.0"}
        for kind in kinds:
            await receive()
            await send({"type": kind, **more})
        if error is not None:
            raise error

    return app


COMPLETE, FAILED = "lifespan.startup.complete", "lifespan.startup.failed"
STOPPED, NOT_STOPPED = "lifespan.shutdown.complete", "lifespan.shutdown.failed"
BOOM = ValueError("boom")


@pytest.mark.parametrize(
    ("app", "stages", "message", "error"),
    [
        (sends(COMPLETE, STOPPED), [Stage.STARTED, Stage.STOPPING, Stage.STOPPED], "", None),
        (sends(COMPLETE, NOT_STOPPED, message="x"), [Stage.STARTED, Stage.STOPPING, Stage.STOPPED], "x", None),
        (sends(COMPLETE, NOT_STOPPED), [Stage.STARTED, Stage.STOPPING, Stage.STOPPED], "", None),
        (sends(COMPLETE, STOPPED, error=BOOM), [Stage.STARTED, Stage.STOPPING, Stage.STOPPED], "", BOOM),
        (sends(COMPLETE), [Stage.STARTED, Stage.STOPPED], "", None),
        (sends(COMPLETE, error=BOOM), [Stage.STARTED, Stage.STOPPED], "", BOOM),
        (sends(FAILED, message="no"), [Stage.FAILED], "no", None),
        (sends(FAILED, message="no", error=BOOM), [Stage.FAILED], "no", BOOM),
        (sends(error=BOOM), [Stage.UNSUPPORTED], "", BOOM),
        (sends(error=asyncio.CancelledError()), [Stage.UNSUPPORTED], "", asyncio.CancelledError),
        (sends(), [Stage.UNSUPPORTED], "", None),
        (sends("http.response.start"), [Stage.UNSUPPORTED], "", ProtocolError),
        (sends(STOPPED), [Stage.UNSUPPORTED], "", ProtocolError),
        (sends(None), [Stage.UNSUPPORTED], "", ProtocolError),
        (sends(COMPLETE, COMPLETE), [Stage.STARTED, Stage.STOPPING, Stage.STOPPED], "", ProtocolError),
        (sends(COMPLETE, "lifespan.nonsense"), [Stage.STARTED, Stage.STOPPING, Stage.STOPPED], "", ProtocolError),
    ],
)
def test_the_stages_of_an_apps_life(app: Any, stages: list[Stage], message: str, error: Any) -> None:
    """[A19] [A20]"""
    lifespan, gone_through = live(app)
    assert gone_through == stages
    assert lifespan.message == message
    assert lifespan.error is error if not isinstance(error, type) else isinstance(lifespan.error, error)
    BOOM.__traceback__ = None


def test_what_the_app_leaves_in_its_state_is_kept() -> None:
    """[A19]"""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        assert await receive() == {"type": "lifespan.startup"}
        scope["state"]["x"] = 1
        await send({"type": COMPLETE})
        assert await receive() == {"type": "lifespan.shutdown"}
        await send({"type": STOPPED})

    lifespan, _ = live(app)
    assert lifespan.state == {"x": 1}
    assert lifespan.error is None


@pytest.mark.parametrize("word", [None, COMPLETE, FAILED])
def test_an_app_that_is_not_waited_for_any_more_cannot_start(word: str | None) -> None:
    """[A19]"""
    stages: list[Stage] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if word is not None:
                await send({"type": word})
            raise

    async def main() -> Lifespan:
        lifespan = Lifespan(app, lambda: stages.append(lifespan.stage))
        task = asyncio.create_task(lifespan.run())
        await asyncio.sleep(0)
        lifespan.give_up(0.5)
        lifespan.give_up(0.7)
        task.cancel()
        await task
        return lifespan

    lifespan = asyncio.run(main())
    assert stages == [Stage.LATE]
    assert lifespan.message == "it sent neither lifespan.startup.complete nor lifespan.startup.failed within 0.5 s"
    assert isinstance(lifespan.error, ProtocolError if word else asyncio.CancelledError)


def test_an_app_that_lives_or_is_dead_is_not_given_up() -> None:
    """[A20] A timer that comes late changes nothing; one that comes in time ends the shutdown."""

    async def main() -> None:
        ended = Lifespan(sends(COMPLETE), lambda: None)
        await ended.run()
        ended.give_up(1)
        assert (ended.stage, ended.message) == (Stage.STOPPED, "")

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await sends(COMPLETE)(scope, receive, send)
            await asyncio.Event().wait()

        stages: list[Stage] = []
        lifespan = Lifespan(app, lambda: stages.append(lifespan.stage))
        task = asyncio.create_task(lifespan.run())
        await asyncio.sleep(0)
        lifespan.give_up(1)
        lifespan.stop()
        lifespan.give_up(0.25)
        assert stages == [Stage.STARTED, Stage.STOPPING, Stage.STOPPED]
        assert lifespan.message.endswith("lifespan.shutdown.failed within 0.25 s")
        task.cancel()
        await task

    asyncio.run(main())


def test_shutdown_is_not_heard_before_it_is_asked_for() -> None:
    """[A20]"""

    async def main() -> None:
        stages: list[Stage] = []
        lifespan = Lifespan(sends(COMPLETE, STOPPED), lambda: stages.append(lifespan.stage))
        task = asyncio.create_task(lifespan.run())
        await asyncio.sleep(0.01)
        assert stages == [Stage.STARTED]
        assert not task.done()
        lifespan.stop()
        lifespan.stop()
        await task
        assert stages == [Stage.STARTED, Stage.STOPPING, Stage.STOPPED]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("app", "words"),
    [
        (
            sends("http.response.start"),
            "expected 'lifespan.startup.complete' or 'lifespan.startup.failed', got 'http.response.start'",
        ),
        (
            sends(COMPLETE, "lifespan.nonsense"),
            "expected 'lifespan.shutdown.complete' or 'lifespan.shutdown.failed', got",
        ),
        (sends(COMPLETE, STOPPED, STOPPED), "expected no message, got 'lifespan.shutdown.complete'"),
    ],
)
def test_a_message_out_of_order_is_told_with_what_was_expected(app: Any, words: str) -> None:
    """[S1]"""
    lifespan, _ = live(app)
    assert words in str(lifespan.error)
