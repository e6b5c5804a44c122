"""Wrappers in wrappers: a WSGI app inside ASGI middleware (C1), an ASGI app inside WSGI middleware (C2).

The middleware does nothing. The players are those of the two directions.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import apps, asgi_to_wsgi, wsgi_to_asgi
from .rounds import Limits

__all__ = ["CASES", "CONTESTANTS", "LIMIT", "Case"]


def asgi_middleware(app: Any) -> Any:
    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return middleware


def wsgi_middleware(app: Any) -> Any:
    def middleware(environ: Any, start_response: Any) -> Any:
        return app(environ, start_response)

    return middleware


# The contestants. Each is made of the app, in both of its kinds, and the name of the loop. "one wrapper" is the limit:
# of C1 AsgiToWsgi, around a coroutine that translates by bridge's own means and calls the WSGI app right in the loop;
# of C2 WsgiToAsgi, around the app of the other kind.


def bridge_c1(case: Case, loop: str) -> Any:
    from bridge import AsgiToWsgi, WsgiToAsgi

    return AsgiToWsgi(asgi_middleware(WsgiToAsgi(case.wsgi_app)), loop_factory=asgi_to_wsgi._new_loop(loop))


def one_wrapper_c1(case: Case, loop: str) -> Any:
    from bridge.environ import build_environ
    from bridge.response import WsgiResponse

    app: Any = case.wsgi_app

    async def in_the_loop(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]
        response = WsgiResponse(scope["method"])
        result = app(build_environ(scope, io.BytesIO(body)), response.start)
        for block in result:
            for message in response.block(block):
                await send(message)
        for message in response.end():
            await send(message)

    return asgi_to_wsgi.bridge_shared(in_the_loop, loop)


def a2wsgi_c1(case: Case, loop: str) -> Any:
    return asgi_to_wsgi.a2wsgi(asgi_middleware(wsgi_to_asgi.a2wsgi(case.wsgi_app, loop)), loop)


def bridge_c2(case: Case, loop: str) -> Any:
    from bridge import AsgiToWsgi, WsgiToAsgi

    app: Any = case.asgi_app
    return WsgiToAsgi(wsgi_middleware(AsgiToWsgi(app)))


def one_wrapper_c2(case: Case, loop: str) -> Any:
    return wsgi_to_asgi.bridge(case.wsgi_app, loop)


def a2wsgi_c2(case: Case, loop: str) -> Any:
    return wsgi_to_asgi.a2wsgi(wsgi_middleware(asgi_to_wsgi.a2wsgi(case.asgi_app, "asyncio")), loop)


CONTESTANTS: dict[str, dict[str, Callable[[Case, str], Any]]] = {
    "bridge": {"c1": bridge_c1, "c2": bridge_c2},
    "one wrapper": {"c1": one_wrapper_c1, "c2": one_wrapper_c2},
    "a2wsgi": {"c1": a2wsgi_c1, "c2": a2wsgi_c2},
}

LIMIT = "one wrapper"


@dataclass(frozen=True)
class Case:
    """One app, in both kinds, one kind of request, how many of them a round."""

    name: str
    wsgi_app: Any
    asgi_app: Any
    answer: bytes
    requests: int
    body: bytes = b""
    loops: tuple[str, ...] = ("asyncio",)
    rounds: int | None = None

    def players(self, loop: str, limits: Limits, chosen: Iterable[str]) -> Mapping[str, Callable[[], Any]]:
        kind = self.name.partition("_")[0]
        enter = self._enter_threads if kind == "c1" else self._enter_loop
        return {name: functools.partial(enter, CONTESTANTS[name][kind], loop, limits) for name in chosen}

    def _enter_threads(self, contestant: Any, loop: str, limits: Limits) -> asgi_to_wsgi.ThreadPlayer:
        case = asgi_to_wsgi.Case(self.name, lambda: self.asgi_app, self.answer, self.requests, body=self.body)
        return asgi_to_wsgi.ThreadPlayer(case, lambda app, loop: contestant(self, loop), loop, limits)

    def _enter_loop(self, contestant: Any, loop: str, limits: Limits) -> wsgi_to_asgi.LoopPlayer:
        case = wsgi_to_asgi.Case(self.name, self.wsgi_app, self.answer, self.requests, body=[self.body])
        return wsgi_to_asgi.LoopPlayer(case, lambda app, loop: contestant(self, loop), loop, limits)


KIB = bytes(range(256)) * 4

CASES = [
    Case("c1_hello", apps.hello, apps.async_hello, apps.HELLO, requests=400, loops=("asyncio", "uvloop")),
    Case("c1_echo", apps.echo, apps.async_echo, KIB, requests=400, body=KIB),
    Case("c1_stream", apps.stream, apps.async_stream, apps.BLOCK * apps.BLOCKS, requests=20),
    Case("c2_hello", apps.hello, apps.async_hello, apps.HELLO, requests=400, loops=("asyncio", "uvloop")),
    Case("c2_echo", apps.echo, apps.async_echo, KIB, requests=400, body=KIB),
    Case("c2_stream", apps.stream, apps.async_stream, apps.BLOCK * apps.BLOCKS, requests=20),
]
