"""What users write, as mypy and pyright see it: `make lint` checks this file by both, strictly. It is no test to run.

A line that must be an error bears the error's name: where it is none, the unused ignore is one.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, assert_type

import fastapi
import flask
import gunicorn.app.base
import httpx
import starlette.applications
import starlette.middleware
import starlette.middleware.cors
import starlette.routing
import uvicorn
import werkzeug.middleware.dispatcher
import werkzeug.middleware.proxy_fix
import werkzeug.serving
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application

import bridge
from bridge import AsgiToWsgi, WsgiToAsgi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
    from contextlib import AbstractAsyncContextManager
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from asgiref.typing import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope
    from starlette.types import ASGIApp
    from starlette.types import Receive as StarletteReceive
    from starlette.types import Scope as StarletteScope
    from starlette.types import Send as StarletteSend

FLASK = flask.Flask("site")
FASTAPI = fastapi.FastAPI()
STARLETTE = starlette.applications.Starlette()


# WSGI apps


def wsgi_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [b"hello"]


def wsgi_by_hand(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [])
    return [b"hello"]


class WsgiObject:
    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return wsgi_app(environ, start_response)


def wsgi_apps(any_app: WSGIApplication) -> None:
    WsgiToAsgi(FLASK)
    WsgiToAsgi(FLASK.wsgi_app)
    WsgiToAsgi(any_app)
    WsgiToAsgi(wsgi_app)
    WsgiToAsgi(wsgi_by_hand)
    WsgiToAsgi(WsgiObject())
    WsgiToAsgi(partial(wsgi_app))
    WsgiToAsgi(werkzeug.middleware.proxy_fix.ProxyFix(FLASK))
    WsgiToAsgi(AsgiToWsgi(FASTAPI))
    WsgiToAsgi(FLASK, threads=20, streams=10, lifespan=None)


def lifespan(app: object) -> AbstractAsyncContextManager[Mapping[str, Any] | None]:
    raise NotImplementedError


def as_asgi(asgi: ASGI3Application, app: ASGIApp) -> None:
    """Where an ASGI app is wanted, a WsgiToAsgi is one."""
    as_asgi(WsgiToAsgi(FLASK), WsgiToAsgi(FLASK))
    uvicorn.run(WsgiToAsgi(FLASK))
    uvicorn.Config(WsgiToAsgi(FLASK))
    httpx.ASGITransport(WsgiToAsgi(FLASK))
    FASTAPI.mount("/site", WsgiToAsgi(FLASK))
    starlette.routing.Mount("/site", WsgiToAsgi(FLASK, lifespan=lifespan))
    starlette.middleware.cors.CORSMiddleware(WsgiToAsgi(FLASK), allow_origins=["*"])


# ASGI apps


async def asgi_app(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None: ...


async def starlette_app(scope: StarletteScope, receive: StarletteReceive, send: StarletteSend) -> None: ...


async def asgi_by_hand(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[Any]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None: ...


async def asgi_of_anything(scope: Any, receive: Any, send: Any) -> None: ...


class AsgiObject:
    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None: ...


def asgi_apps() -> None:
    AsgiToWsgi(FASTAPI)
    AsgiToWsgi(STARLETTE)
    AsgiToWsgi(asgi_app)
    AsgiToWsgi(starlette_app)
    AsgiToWsgi(asgi_by_hand)
    AsgiToWsgi(asgi_of_anything)
    AsgiToWsgi(AsgiObject())
    AsgiToWsgi(WsgiToAsgi(FLASK))
    AsgiToWsgi(FASTAPI, loop="shared", lifespan="off")


def as_wsgi(wsgi: WSGIApplication) -> None:
    """Where a WSGI app is wanted, an AsgiToWsgi is one."""
    from wsgiref.simple_server import make_server
    from wsgiref.validate import validator

    as_wsgi(AsgiToWsgi(FASTAPI))
    validator(AsgiToWsgi(FASTAPI))
    make_server("", 0, AsgiToWsgi(FASTAPI))
    werkzeug.serving.run_simple("", 0, AsgiToWsgi(FASTAPI))
    werkzeug.middleware.dispatcher.DispatcherMiddleware(FLASK, {"/api": AsgiToWsgi(FASTAPI)})
    werkzeug.middleware.proxy_fix.ProxyFix(AsgiToWsgi(FASTAPI))
    httpx.WSGITransport(AsgiToWsgi(FASTAPI))


# Both kinds


def django_site() -> None:
    """Not called when the tests run: Django wants to be set up for the whole process."""
    WsgiToAsgi(get_wsgi_application())
    AsgiToWsgi(get_asgi_application())


class GunicornOfWsgiApps(gunicorn.app.base.BaseApplication):
    def load(self) -> AsgiToWsgi:
        return AsgiToWsgi(FASTAPI)


class GunicornOfAsgiApps(gunicorn.app.base.BaseApplication):
    def load(self) -> WsgiToAsgi:
        return WsgiToAsgi(FLASK)


# What they give


def what_they_give() -> None:
    with AsgiToWsgi(FASTAPI) as application:
        assert_type(application, AsgiToWsgi)
        assert_type(application.statistics(), bridge.AsgiToWsgiStatistics)
        assert_type(application.statistics().handovers, int)
        assert_type(application.close(), None)
    assert_type(WsgiToAsgi(FLASK).statistics(), bridge.WsgiToAsgiStatistics)


# What must be an error


def mistakes(iterator: AsyncIterator[bytes]) -> None:
    WsgiToAsgi(FASTAPI)  # type: ignore[arg-type]
    WsgiToAsgi(asgi_app)  # type: ignore[arg-type]
    WsgiToAsgi("site:app")  # type: ignore[arg-type]
    AsgiToWsgi(FLASK)  # type: ignore[arg-type]
    AsgiToWsgi(wsgi_app)  # type: ignore[arg-type]
    AsgiToWsgi(AsgiToWsgi(FASTAPI))  # type: ignore[arg-type]
    WsgiToAsgi(WsgiToAsgi(FLASK))  # type: ignore[arg-type]
    WsgiToAsgi(get_asgi_application())  # type: ignore[arg-type]
    AsgiToWsgi(get_wsgi_application())  # type: ignore[arg-type]
    AsgiToWsgi(iterator)  # type: ignore[arg-type]
    AsgiToWsgi(FASTAPI, loop="own")  # type: ignore[arg-type]
    WsgiToAsgi(FLASK, 40)  # type: ignore[call-arg]
