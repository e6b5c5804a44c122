"""Lifespan: startup once, state, shutdown (ASGI, "Lifespan Protocol"). Drive an app's; answer a server's."""

from __future__ import annotations

import enum
import traceback
from typing import TYPE_CHECKING, Any

import anyio

from bridge.errors import ProtocolError, shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, MutableMapping
    from contextlib import AbstractAsyncContextManager

__all__ = ["Lifespan", "Stage", "answer_lifespan"]


async def answer_lifespan(
    context: AbstractAsyncContextManager[Mapping[str, Any] | None],
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[Any]],
    send: Callable[[Any], Awaitable[None]],
) -> None:
    """Answer a server's lifespan by a context manager: entered at startup, left at shutdown.

    Args:
        context: What it gives, a mapping or None, goes into the state that the server copies into each request's scope.
    """
    await receive()
    stopping = False
    try:
        async with context as state:
            if state and "state" in scope:
                scope["state"].update(state)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            stopping = True
    except Exception:
        step = "shutdown" if stopping else "startup"
        await send({"type": f"lifespan.{step}.failed", "message": traceback.format_exc()})
        raise
    await send({"type": "lifespan.shutdown.complete"})


class Stage(enum.Enum):
    """How far an app has come in its life."""

    STARTING = enum.auto()
    UNSUPPORTED = enum.auto()
    """It knows no lifespan: it raised, returned, or answered in other words."""
    FAILED = enum.auto()
    """It refused to start."""
    LATE = enum.auto()
    """It has not started in time."""
    STARTED = enum.auto()
    STOPPING = enum.auto()
    STOPPED = enum.auto()
    """It has shut down, or ended by itself."""


class Lifespan:
    """An app's lifespan: one task in which it starts and shuts down.

    Everything but the attributes is for the loop of that task.

    Args:
        app: The ASGI app.
        on_change: Called whenever ``stage`` has changed.

    Attributes:
        stage: How far the app has come.
        state: What the app left in ``scope["state"]`` at startup; a copy goes into each request's scope.
        message: Why the app refused to start, or to stop; or that it took too long; else empty.
        error: What the app raised.
    """

    def __init__(self, app: Any, on_change: Callable[[], None]) -> None:
        self.stage: Stage = Stage.STARTING
        self.state: dict[str, Any] = {}
        self.message: str = ""
        self.error: BaseException | None = None
        self._app = app
        self._on_change = on_change
        self._started = False  # the app has received lifespan.startup
        self._stop = anyio.Event()

    @property
    def has_started(self) -> bool:
        """Whether the app has ever started; it may have ended by itself, right after its word.

        Not where a signal's handler has ended it there, in the main thread: the signal is for who starts the app.
        """
        has_said_so = self.stage in (Stage.STARTED, Stage.STOPPING, Stage.STOPPED)
        return has_said_so and not isinstance(self.error, (KeyboardInterrupt, SystemExit))

    async def run(self) -> None:
        """Live, from startup to shutdown."""
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
        }
        try:
            await self._app(scope, self._receive, self._send)
        except BaseException as error:
            self.error = error
        if self.stage is Stage.STARTING:
            self._enter(Stage.UNSUPPORTED)
        elif self.stage in (Stage.STARTED, Stage.STOPPING):
            self._enter(Stage.STOPPED)

    def stop(self) -> None:
        """Ask the app to shut down."""
        if self.stage is Stage.STARTED:
            self._enter(Stage.STOPPING)
        self._stop.set()

    def give_up(self, seconds: float) -> None:
        """Wait no longer for the app to have started, or stopped, if it has not.

        Args:
            seconds: How long it has had.
        """
        if self.stage in _LATE_STAGE:
            step = "startup" if self.stage is Stage.STARTING else "shutdown"
            self.message = f"it sent neither lifespan.{step}.complete nor lifespan.{step}.failed within {seconds:g} s"
            self._enter(_LATE_STAGE[self.stage])

    def _enter(self, stage: Stage) -> None:
        self.stage = stage
        self._on_change()

    async def _receive(self) -> Any:
        if not self._started:
            self._started = True
            return {"type": "lifespan.startup"}
        await self._stop.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Mapping[str, Any]) -> None:
        kind = message.get("type")
        next_stage = _NEXT_STAGE.get((self.stage, kind))
        if next_stage is None:
            raise ProtocolError(
                f"send() in a lifespan expected {_EXPECTED.get(self.stage, 'no message')}, got {shown(kind)}"
            )
        self.message = str(message.get("message", "")) if str(kind).endswith(".failed") else ""
        self._enter(next_stage)


_NEXT_STAGE: dict[tuple[Stage, Any], Stage] = {
    (Stage.STARTING, "lifespan.startup.complete"): Stage.STARTED,
    (Stage.STARTING, "lifespan.startup.failed"): Stage.FAILED,
    (Stage.STOPPING, "lifespan.shutdown.complete"): Stage.STOPPED,
    (Stage.STOPPING, "lifespan.shutdown.failed"): Stage.STOPPED,
}

_EXPECTED = {
    Stage.STARTING: "'lifespan.startup.complete' or 'lifespan.startup.failed'",
    Stage.STARTED: "no message before the app has received 'lifespan.shutdown'",
    Stage.STOPPING: "'lifespan.shutdown.complete' or 'lifespan.shutdown.failed'",
}

_LATE_STAGE = {Stage.STARTING: Stage.LATE, Stage.STOPPING: Stage.STOPPED}
