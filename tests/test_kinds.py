"""Which kind an app is: told for sure where a wrapper refuses, guessed where the command line has to choose."""

from __future__ import annotations

import functools
import inspect
import posixpath
import types
from typing import TYPE_CHECKING, Any
from unittest import mock

import django.core.handlers.asgi
import django.core.handlers.wsgi
import fastapi
import flask
import pytest
import werkzeug.local
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint

from bridge import AsgiToWsgi, WsgiToAsgi
from bridge.kinds import Kind, check_app, kind_of, possible_kinds
from tests.ids import lasting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def wsgi(environ: Any, start_response: Any) -> Any: ...


def wsgi_generator(environ: Any, start_response: Any) -> Any:
    yield b""


def wsgi_with_more(environ: Any, start_response: Any, exc_info: Any = None) -> Any: ...


async def asgi(scope: Any, receive: Any, send: Any) -> None: ...


def asgi_not_async(scope: Any, receive: Any, send: Any) -> Any: ...


def asgi_with_defaults(scope: Any, receive: Any = None, send: Any = None) -> Any: ...


async def asgi_of_anything(*args: Any) -> None: ...


class WsgiObject:
    def __call__(self, environ: Any, start_response: Any) -> Any: ...

    def method(self, environ: Any, start_response: Any) -> Any: ...


class AsgiObject:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    async def method(self, scope: Any, receive: Any, send: Any) -> None: ...


class AsgiObjectNotAsync:
    def __call__(self, scope: Any, receive: Any, send: Any) -> Any: ...


class WsgiClass:
    """As PEP 3333's AppClass."""

    def __init__(self, environ: Any, start_response: Any) -> None: ...

    def __iter__(self) -> Iterator[bytes]:
        yield b""


def decorated(app: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(app)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return app(*args, **kwargs)

    return wrapper


def as_wsgi(app: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate so that the kind changes; `__wrapped__` still shows the other one."""

    @functools.wraps(app)
    def wrapper(environ: Any, start_response: Any) -> Any: ...

    return wrapper


def with_first(first: Any, a: Any, b: Any, c: Any = None) -> Any: ...


def django_handler(handler: type[object]) -> object:
    """Give a handler without what making one does, which needs settings and changes Django for all other tests."""
    return object.__new__(handler)


@pytest.mark.parametrize(
    "app",
    [
        wsgi,
        wsgi_generator,
        wsgi_with_more,
        WsgiObject(),
        WsgiObject().method,
        WsgiClass,
        functools.partial(with_first, 1, c=2),
        functools.partial(functools.partial(wsgi)),
        decorated(wsgi),
        decorated(decorated(WsgiObject().method)),
        as_wsgi(asgi),
        flask.Flask("app"),
        flask.Flask("app").wsgi_app,
        django_handler(django.core.handlers.wsgi.WSGIHandler),
        AsgiToWsgi(asgi),
        lambda environ, start_response: [],
    ],
    ids=lasting,
)
def test_wsgi_apps_are_known_as_such(app: object) -> None:
    assert kind_of(app) is Kind.WSGI


@pytest.mark.parametrize(
    "app",
    [
        asgi,
        asgi_not_async,
        asgi_with_defaults,
        asgi_of_anything,
        AsgiObject(),
        AsgiObject().method,
        AsgiObjectNotAsync(),
        HTTPEndpoint,
        functools.partial(asgi),
        decorated(asgi),
        decorated(AsgiObject().method),
        Starlette(),
        fastapi.FastAPI(),
        django_handler(django.core.handlers.asgi.ASGIHandler),
        WsgiToAsgi(wsgi),
        lambda scope, receive, send: None,
    ],
    ids=lasting,
)
def test_asgi_apps_are_known_as_such(app: object) -> None:
    assert kind_of(app) is Kind.ASGI


class Asgi2:
    def __init__(self, scope: Any) -> None: ...

    async def __call__(self, receive: Any, send: Any) -> None: ...


class Nothing: ...


async def make_async() -> Any: ...


async def asgi_with_environ(environ: Any, start_response: Any) -> None: ...


async def asgi_that_yields(scope: Any, receive: Any, send: Any) -> Any:
    yield b""


# Right apps of which Python knows little, or something wrong


class Meta(type):
    def __call__(cls, *args: Any) -> Any:
        return [b""]


class ByMeta(metaclass=Meta): ...


class ByNew:
    def __new__(cls, environ: Any, start_response: Any) -> Any:
        return [b""]


class Items:
    """Iterable in the old way."""

    def __init__(self, environ: Any, start_response: Any) -> None: ...

    def __getitem__(self, index: int) -> bytes:
        raise IndexError


class StaticCall:
    @staticmethod
    def __call__(*args: Any) -> Any: ...


class Proxy:
    """Pretends to be another object, whatever it is asked, as wrapt's proxies do."""

    def __init__(self, wrapped: Any) -> None:
        self.__dict__["wrapped"] = wrapped

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)

    def __call__(self, *args: Any) -> Any: ...


class Asleep:
    """Must not be woken by being wrapped, as Django's lazy objects are by any question."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")

    def __call__(self, *args: Any) -> Any: ...


def lying(environ: Any) -> Any: ...


lying.__signature__ = inspect.Signature()  # type: ignore[attr-defined]

RIGHT_FOR_BOTH = [
    lambda *args: None,
    lambda a, b, c=None: None,
    decorated(lambda *args: None),
    decorated(asgi),
    decorated(wsgi),
    mock.Mock(),
    mock.MagicMock(),
    mock.AsyncMock(),
    mock.Mock(spec=flask.Flask),
    mock.Mock(spec=fastapi.FastAPI),
    mock.Mock(spec=wsgi),
    max,
    print,
    ByMeta,
    ByNew,
    StaticCall(),
    Proxy(lambda: None),
    Proxy(flask.Flask("app")),
    werkzeug.local.LocalProxy(lambda: flask.Flask("app")),
    lying,
    functools.partial(print, sep=""),
    functools.partial(decorated(wsgi), 1),
]


@pytest.mark.parametrize("app", RIGHT_FOR_BOTH, ids=lambda app: type(app).__name__)
def test_what_may_be_both_is_refused_by_no_wrapper(app: Any) -> None:
    assert possible_kinds(app) == {Kind.WSGI, Kind.ASGI}
    wrappers: list[Any] = [WsgiToAsgi, AsgiToWsgi]
    assert [wrapper(app).app is app for wrapper in wrappers] == [True, True]


def test_an_object_is_not_asked_for_anything_by_being_wrapped() -> None:
    app: Any = Asleep()
    WsgiToAsgi(app)
    AsgiToWsgi(app)


BOTH = {Kind.WSGI, Kind.ASGI}


@pytest.mark.parametrize(
    ("app", "kinds"),
    [
        (Items, {Kind.WSGI}),
        (WsgiClass, {Kind.WSGI}),
        (HTTPEndpoint, {Kind.ASGI}),
        (asgi_of_anything, {Kind.ASGI}),
        (AsgiObjectNotAsync(), {Kind.ASGI}),
        (functools.partial(with_first, 1), BOTH),
        (functools.partial(with_first, 1, c=2), {Kind.WSGI}),
        (functools.partial(functools.partial(with_first, c=2), 1), {Kind.WSGI}),
        (functools.partial(asgi, send=None), set()),
        (functools.partial(wsgi, environ={}), set()),
    ],
    ids=lasting,
)
def test_the_possible_kinds_are_told_apart(app: object, kinds: set[Kind]) -> None:
    assert possible_kinds(app) == kinds


SHOP = types.ModuleType("shop.main")
SHOP.__dict__.update(helper=max, Flask=flask.Flask, site=flask.Flask("site"))
SHOP_WITH_FUNCTION = types.ModuleType("shop")
SHOP_WITH_FUNCTION.__dict__.update(join=posixpath.samefile, wsgi=wsgi)
SHOP_WITH_APP = types.ModuleType("shop")
SHOP_WITH_APP.__dict__["app"] = flask.Flask("app")


@pytest.mark.parametrize(
    ("app", "kind", "words"),
    [
        (
            asgi,
            Kind.WSGI,
            "WsgiToAsgi expected a WSGI app, got an ASGI app, tests.test_kinds.asgi: write AsgiToWsgi(app) for a WSGI "
            "server; an ASGI server runs it as it is",
        ),
        (
            wsgi,
            Kind.ASGI,
            "AsgiToWsgi expected an ASGI app, got a WSGI app, tests.test_kinds.wsgi: write WsgiToAsgi(app) for an ASGI "
            "server; a WSGI server runs it as it is",
        ),
        (fastapi.FastAPI(), Kind.WSGI, "got an ASGI app, <fastapi.applications.FastAPI object at "),
        (flask.Flask("app"), Kind.ASGI, "got a WSGI app, <Flask 'app'>: write WsgiToAsgi(app)"),
        (WsgiToAsgi(wsgi), Kind.WSGI, "got an ASGI app, <bridge.wsgi_to_asgi.WsgiToAsgi object at "),
        (AsgiToWsgi(asgi), Kind.ASGI, "got a WSGI app, <bridge.asgi_to_wsgi.AsgiToWsgi object at "),
        (asgi_of_anything, Kind.WSGI, "got an ASGI app"),
        (HTTPEndpoint, Kind.WSGI, "got an ASGI app, starlette.endpoints.HTTPEndpoint"),
        (WsgiClass, Kind.ASGI, "got a WSGI app, tests.test_kinds.WsgiClass"),
        (flask.Flask, Kind.WSGI, "got flask.app.Flask, which is a class; give it an instance of it, Flask(...)"),
        (fastapi.FastAPI, Kind.ASGI, "which is a class; give it an instance of it, FastAPI(...)"),
        (
            fastapi.FastAPI,
            Kind.WSGI,
            "got fastapi.applications.FastAPI, which is a class that makes an ASGI app: write AsgiToWsgi(FastAPI(...)) "
            "for a WSGI server; an ASGI server runs FastAPI(...) as it is",
        ),
        (flask.Flask, Kind.ASGI, "which is a class that makes a WSGI app: write WsgiToAsgi(Flask(...)) for an ASGI "),
        (WsgiToAsgi, Kind.WSGI, "which is a class that makes an ASGI app: write AsgiToWsgi(WsgiToAsgi(...))"),
        (Nothing, Kind.ASGI, "which is a class, and what it makes cannot be called"),
        (Asgi2, Kind.ASGI, "which is an ASGI 2 app; give it asgiref.compatibility.double_to_single_callable(Asgi2)"),
        (
            make_async,
            Kind.ASGI,
            "is async and takes no arguments; give it what it gives when it is awaited: asyncio.run(",
        ),
        (
            "shop.main:site",
            Kind.WSGI,
            "got 'shop.main:site', which is a string; give it the app itself, as in: from shop.main import site",
        ),
        ("site", Kind.ASGI, "which is a string; give it the app itself, as in: from site import app"),
        (SHOP, Kind.WSGI, "which is a module; give it the app in it, main.site"),
        (SHOP_WITH_APP, Kind.ASGI, "which is a module; give it the app in it, shop.app"),
        (SHOP_WITH_FUNCTION, Kind.WSGI, "which is a module; give it the app in it, shop.wsgi"),
        (posixpath, Kind.WSGI, "which is a module; give it the app in it"),
        (lambda: None, Kind.WSGI, "which takes no arguments; give it what it makes, <lambda>()"),
        (
            Asgi2.__init__.__get__(object.__new__(Asgi2)),
            Kind.ASGI,
            "which takes one argument, as ASGI 2 apps do; give it asgiref.compatibility.double_to_single_callable(",
        ),
        (asgi_with_environ, Kind.ASGI, "is async and takes two arguments: an ASGI app takes three"),
        (asgi_with_environ, Kind.WSGI, "is async and takes two arguments: an ASGI app takes three"),
        (asgi_that_yields, Kind.ASGI, "which is async and yields, as no app does"),
        (lambda a, b, c, d: None, Kind.WSGI, "which takes (a, b, c, d): a WSGI app takes (environ, start_response)"),
        (None, Kind.WSGI, "got None, which cannot be called"),
        (42, Kind.ASGI, "got 42, which cannot be called"),
    ],
    ids=lasting,
)
def test_what_is_wrapped_wrongly_is_refused_with_what_to_write_instead(app: Any, kind: Kind, words: str) -> None:
    wrapper: Any = WsgiToAsgi if kind is Kind.WSGI else AsgiToWsgi
    with pytest.raises(TypeError) as caught:
        wrapper(app)
    assert words in str(caught.value)
    assert app is not posixpath or str(caught.value).endswith(words)


class RaisesWhenAsked:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no app context")

    def __call__(self, environ: Any, start_response: Any) -> Any: ...


def test_an_object_that_raises_when_it_is_asked_is_refused_all_the_same() -> None:
    with pytest.raises(TypeError, match=r"got a WSGI app, <tests\.test_kinds\.RaisesWhenAsked object at "):
        check_app(RaisesWhenAsked(), Kind.ASGI)


def test_a_coroutine_of_a_factory_is_no_app() -> None:
    with pytest.raises(TypeError, match=r"got make_async, which .*; give it what it gives when it is awaited$"):
        check_app(make_async(), Kind.ASGI)


def test_a_coroutine_is_no_app_and_is_not_left_unawaited() -> None:
    with pytest.raises(TypeError, match=r"give it the function itself, asgi$"):
        check_app(asgi({}, None, None), Kind.ASGI)


def test_a_refused_wrapper_leaves_nothing_to_be_closed() -> None:
    """Its finalizer runs all the same."""
    with pytest.raises(TypeError):
        AsgiToWsgi(wsgi)  # type: ignore[arg-type]
