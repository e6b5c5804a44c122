"""Middleware that people use, of either world, around an app of the other, on servers of both (C1 to C3)."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import json
import logging
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio.from_thread
import flask
import httpx
import pytest
import sentry_sdk
from asgi_correlation_id import CorrelationIdMiddleware, correlation_id
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware as OtelAsgi
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware as OtelWsgi
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from secure import Secure
from secure.middleware import SecureASGIMiddleware, SecureWSGIMiddleware
from sentry_sdk.integrations.asgi import SentryAsgiMiddleware
from sentry_sdk.integrations.wsgi import SentryWsgiMiddleware
from sentry_sdk.transport import Transport
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.profiler import ProfilerMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.middleware.shared_data import SharedDataMiddleware
from whitenoise import WhiteNoise

from bridge import AsgiToWsgi, WsgiToAsgi
from tests.drivers import AsgiServer

pytestmark = pytest.mark.leaves("threads")  # keepers and workers, until the wrapper that is dropped has let them go

Get = Callable[..., httpx.Response]


# The apps -------------------------------------------------------------------------------------------------------------


def make_wsgi_app() -> flask.Flask:
    app = flask.Flask("site")

    @app.get("/")
    def index() -> Any:
        scope = flask.request.environ["asgi.scope"]
        scope.get("session", {}).update(seen=scope.get("session", {}).get("seen", 0) + 1)
        return {"url": flask.request.url, "client": flask.request.remote_addr, "id": correlation_id.get()}

    @app.post("/echo")
    def echo() -> Any:
        stream = flask.request.stream
        return flask.Response(iter(lambda: stream.read(1000), b""), mimetype="text/plain")

    @app.get("/long")
    def long() -> Any:
        return flask.Response((b"line %d\n" % number for number in range(1000)), mimetype="text/plain")

    @app.get("/error")
    def error() -> Any:
        raise KeyError("of the app")

    return app


def make_asgi_app() -> Starlette:
    async def index(request: Request) -> Response:
        client = request.client and request.client.host
        return JSONResponse({"url": str(request.url), "client": client, "user": request.headers.get("x-user")})

    async def echo(request: Request) -> Response:
        return StreamingResponse(request.stream(), media_type="text/plain")

    async def long(request: Request) -> Response:
        return StreamingResponse((b"line %d\n" % number for number in range(1000)), media_type="text/plain")

    async def error(request: Request) -> Response:
        raise KeyError("of the app")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.alive = True
        yield

    routes = [Route("/", index), Route("/echo", echo, methods=["POST"]), Route("/long", long), Route("/error", error)]
    return Starlette(routes=routes, lifespan=lifespan)


LONG = b"".join(b"line %d\n" % number for number in range(1000))


def wsgi_around(app: Any) -> Any:
    return lambda environ, start_response: app(environ, start_response)


# The servers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def wsgi_client(application: Any, wrapper: AsgiToWsgi, **options: Any) -> Iterator[httpx.Client]:
    with wrapper, httpx.Client(transport=httpx.WSGITransport(application), base_url="http://site", **options) as client:
        yield client


@contextlib.contextmanager
def asgi_client(application: Any, **options: Any) -> Iterator[httpx.Client]:
    """A client that may be used from this thread, of an app on a loop of another."""
    with anyio.from_thread.start_blocking_portal() as portal:

        async def ask(request: httpx.Request) -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(application)) as client:
                return await client.send(request)

        @contextlib.asynccontextmanager
        async def live() -> AsyncIterator[None]:
            async with AsgiServer().lifespan(application):
                yield

        class InPortal(httpx.BaseTransport):
            def handle_request(self, request: httpx.Request) -> httpx.Response:
                request.read()
                response = portal.call(ask, request)
                return httpx.Response(response.status_code, headers=response.headers.raw, stream=Whole(response))

        with (
            portal.wrap_async_context_manager(live()),
            httpx.Client(transport=InPortal(), base_url="http://site", **options) as client,
        ):
            yield client


class Whole(httpx.SyncByteStream):
    """A body that was read, and decoded, elsewhere; here it comes as it was sent."""

    def __init__(self, response: httpx.Response) -> None:
        encoded = response.headers.get("content-encoding") == "gzip"
        self._content = gzip.compress(response.content) if encoded else response.content

    def __iter__(self) -> Iterator[bytes]:
        yield self._content


@pytest.fixture(params=["wsgi server", "asgi server"])
def around_wsgi(request: pytest.FixtureRequest) -> Any:
    """Serve Flask inside of ASGI middleware: `with around_wsgi(middleware) as client`."""

    def serve(middleware: Callable[[Any], Any], app: Any = None, **options: Any) -> Any:
        application = middleware(WsgiToAsgi(make_wsgi_app() if app is None else app))
        if request.param == "asgi server":
            return asgi_client(application, **options)
        wrapper = AsgiToWsgi(application)
        return wsgi_client(wrapper, wrapper, **options)

    return serve


@pytest.fixture(params=["wsgi server", "asgi server"])
def around_asgi(request: pytest.FixtureRequest) -> Any:
    """Serve Starlette inside of WSGI middleware: `with around_asgi(middleware) as client`."""

    def serve(middleware: Callable[[Any], Any], app: Any = None, **options: Any) -> Any:
        inner: Any = make_asgi_app() if app is None else app
        wrapper = AsgiToWsgi(inner)
        application = middleware(wrapper)
        if request.param == "asgi server":
            return asgi_client(WsgiToAsgi(application), **options)
        return wsgi_client(application, wrapper, **options)

    return serve


# ASGI middleware around a WSGI app ------------------------------------------------------------------------------------


def test_cors(around_wsgi: Any) -> None:
    def cors(app: Any) -> Any:
        return CORSMiddleware(app, allow_origins=["https://example.com"])

    with around_wsgi(cors) as client:
        headers = {"Origin": "https://example.com", "Access-Control-Request-Method": "GET"}
        assert client.options("/", headers=headers).status_code == 200
        answer = client.get("/", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://example.com"
        assert answer.json()["url"] == "http://site/"


def test_gzip(around_wsgi: Any) -> None:
    with around_wsgi(GZipMiddleware) as client:
        answer = client.get("/long", headers={"Accept-Encoding": "gzip"})
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.content == LONG
        assert client.post("/echo", content=LONG, headers={"Accept-Encoding": "identity"}).content == LONG


def test_trusted_host(around_wsgi: Any) -> None:
    with around_wsgi(lambda app: TrustedHostMiddleware(app, allowed_hosts=["site"])) as client:
        assert client.get("/").status_code == 200
        assert client.get("/", headers={"Host": "evil"}).status_code == 400


def test_session(around_wsgi: Any) -> None:
    """What the WSGI app puts into the session of the ASGI middleware is in the cookie."""
    with around_wsgi(lambda app: SessionMiddleware(app, secret_key="of the tests")) as client:
        first = client.get("/").headers["set-cookie"]
        second = client.get("/").headers["set-cookie"]
        assert first != second
        assert json.loads(_unsigned(first)) == {"seen": 1}
        assert json.loads(_unsigned(second)) == {"seen": 2}


def _unsigned(cookie: str) -> bytes:
    import base64

    return base64.b64decode(cookie.partition("=")[2].partition(".")[0])


def test_correlation_id(around_wsgi: Any) -> None:
    with around_wsgi(CorrelationIdMiddleware) as client:
        answer = client.get("/")
        assert answer.json()["id"] == answer.headers["x-request-id"]


def test_secure_headers_by_asgi(around_wsgi: Any) -> None:
    with around_wsgi(lambda app: SecureASGIMiddleware(app, secure=Secure.with_default_headers())) as client:
        assert "strict-transport-security" in client.get("/").headers
        assert client.get("/long").content == LONG


# WSGI middleware around an ASGI app -----------------------------------------------------------------------------------


def test_whitenoise(around_asgi: Any, tmp_path: Any) -> None:
    (tmp_path / "style.css").write_bytes(b"body {}" * 1000)
    with around_asgi(lambda app: WhiteNoise(app, root=tmp_path, prefix="static/")) as client:
        assert client.get("/static/style.css").content == b"body {}" * 1000
        assert client.get("/static/style.css", headers={"Range": "bytes=0-3"}).content == b"body"
        assert client.get("/").json()["url"] == "http://site/"


def test_proxy_fix(around_asgi: Any) -> None:
    """[C2] What WSGI middleware has changed in the environ, the ASGI app sees in its scope."""
    headers = {
        "X-Forwarded-For": "203.0.113.9",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "example.com",
        "X-Forwarded-Prefix": "/app",
    }
    with around_asgi(lambda app: ProxyFix(app, x_host=1, x_prefix=1)) as client:
        answer = client.get("/", headers=headers).json()
        assert answer["url"] == "https://example.com/app/"
        assert answer["client"] == "203.0.113.9"


def test_shared_data(around_asgi: Any, tmp_path: Any) -> None:
    (tmp_path / "style.css").write_bytes(b"body {}")
    with around_asgi(lambda app: SharedDataMiddleware(app, {"/static": str(tmp_path)})) as client:
        assert client.get("/static/style.css").content == b"body {}"
        assert client.get("/long").content == LONG


def test_profiler(around_asgi: Any) -> None:
    report = io.StringIO()
    with around_asgi(lambda app: ProfilerMiddleware(app, stream=report)) as client:
        assert client.get("/long").content == LONG
        assert client.post("/echo", content=LONG).content == LONG
    assert "function calls" in report.getvalue()


def test_secure_headers_by_wsgi(around_asgi: Any) -> None:
    with around_asgi(lambda app: SecureWSGIMiddleware(app, secure=Secure.with_default_headers())) as client:
        assert "strict-transport-security" in client.get("/").headers
        assert client.get("/long").content == LONG


# Tracing --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracing() -> Iterator[tuple[TracerProvider, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider, exporter
    provider.shutdown()


def _instrument(span: Any) -> str:
    name: str = span.instrumentation_scope.name
    return name


@pytest.mark.parametrize("path", ["/", "/long"])
def test_wsgi_spans_inside_of_asgi_spans(around_wsgi: Any, tracing: Any, path: str) -> None:
    """One trace: the WSGI middleware's span is the child of the ASGI middleware's."""
    provider, exporter = tracing
    inner = OtelWsgi(make_wsgi_app(), tracer_provider=provider)
    with around_wsgi(lambda app: OtelAsgi(app, tracer_provider=provider), inner) as client:
        assert client.get(path).status_code == 200
    _check_one_trace(exporter, outer="opentelemetry.instrumentation.asgi", inner="opentelemetry.instrumentation.wsgi")


@pytest.mark.parametrize("path", ["/", "/long"])
def test_asgi_spans_inside_of_wsgi_spans(around_asgi: Any, tracing: Any, path: str) -> None:
    provider, exporter = tracing
    inner = OtelAsgi(make_asgi_app(), tracer_provider=provider)
    with around_asgi(lambda app: OtelWsgi(app, tracer_provider=provider), inner) as client:
        assert client.get(path).status_code == 200
    _check_one_trace(exporter, outer="opentelemetry.instrumentation.wsgi", inner="opentelemetry.instrumentation.asgi")


def _check_one_trace(exporter: InMemorySpanExporter, outer: str, inner: str) -> None:
    spans = exporter.get_finished_spans()
    assert len({span.context.trace_id for span in spans}) == 1
    [root] = [span for span in spans if span.parent is None]
    assert _instrument(root) == outer
    children = [span for span in spans if span.parent and span.parent.span_id == root.context.span_id]
    assert inner in {_instrument(span) for span in children}
    assert trace.get_current_span() is trace.INVALID_SPAN


class Collected(Transport):
    """What Sentry would send."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def capture_envelope(self, envelope: Any) -> None:
        self.events += [item.payload.json for item in envelope.items if item.type in ("event", "transaction")]


@pytest.fixture
def sentry() -> Iterator[Collected]:
    collected = Collected()
    client = sentry_sdk.Client(
        dsn="https://key@localhost/1",
        transport=collected,
        traces_sample_rate=1.0,
        default_integrations=False,
        auto_enabling_integrations=False,
    )
    with sentry_sdk.isolation_scope():
        scope = sentry_sdk.get_global_scope()
        former = scope.client
        scope.set_client(client)
        yield collected
        scope.set_client(former)
    client.close()


def test_sentry_by_asgi(around_wsgi: Any, sentry: Collected, caplog: pytest.LogCaptureFixture) -> None:
    app = make_wsgi_app()
    app.config["PROPAGATE_EXCEPTIONS"] = True
    with around_wsgi(SentryAsgiMiddleware, app) as client, pytest.raises(KeyError):
        client.get("/error")
    [error] = [event for event in sentry.events if "exception" in event]
    assert error["exception"]["values"][-1]["type"] == "KeyError"


def test_sentry_by_wsgi(around_asgi: Any, sentry: Collected, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        raise KeyError("of the app")

    with around_asgi(SentryWsgiMiddleware, app) as client, pytest.raises(KeyError):
        client.get("/error")
    [error] = [event for event in sentry.events if "exception" in event]
    assert error["exception"]["values"][-1]["type"] == "KeyError"


@pytest.mark.parametrize("touch", ["POST", "body", "make_body_seekable"])
def test_webob_outside_and_inside(touch: str) -> None:
    """[C1] As with Pyramid, and WebTest before it: what is noted of the outer wsgi.input is not so of the inner."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses cgi
        webob: Any = importlib.import_module("webob")

    def app(environ: Any, start_response: Any) -> Any:
        return webob.Response(json={"post": dict(webob.Request(environ).POST)})(environ, start_response)

    with AsgiToWsgi(WsgiToAsgi(app)) as wrapper:
        request = webob.Request.blank("/", POST={"a": "1"})
        getattr(request, touch)() if touch == "make_body_seekable" else getattr(request, touch)
        assert request.get_response(wrapper).json == {"post": {"a": "1"}}


# C3: mounts -----------------------------------------------------------------------------------------------------------


def mounted(path: str) -> Callable[[Any], Any]:
    """Below Starlette's Mount."""
    return lambda app: Starlette(routes=[Mount(path, app=app), Route("/", lambda request: PlainTextResponse("above"))])


def test_a_flask_site_below_starlettes_mount(around_wsgi: Any) -> None:
    """[C3]"""
    with around_wsgi(mounted("/site")) as client:
        assert client.get("/").text == "above"
        assert client.get("/site/").json()["url"] == "http://site/site/"
        assert client.get("/site/long").content == LONG
        assert client.get("/site/missing").status_code == 404


def test_a_flask_site_below_fastapis_mount(around_wsgi: Any) -> None:
    """[C3]"""

    def below(app: Any) -> Any:
        api = FastAPI()
        api.add_api_route("/", lambda: "above")
        api.mount("/site", app)
        return api

    with around_wsgi(below) as client:
        assert client.get("/").json() == "above"
        assert client.get("/site/").json()["url"] == "http://site/site/"


def test_an_asgi_app_below_werkzeugs_dispatcher(around_asgi: Any) -> None:
    """[C3]"""

    def below(app: Any) -> Any:
        site = flask.Flask("above")
        site.add_url_rule("/", view_func=lambda: "above")
        return DispatcherMiddleware(site, {"/api": app})

    with around_asgi(below) as client:
        assert client.get("/").text == "above"
        assert client.get("/api/").json()["url"] == "http://site/api/"
        assert client.post("/api/echo", content=LONG).content == LONG
        assert client.get("/api/missing").status_code == 404


def test_a_fastapi_app_keeps_its_documentation_below_a_prefix(around_asgi: Any) -> None:
    """[C3]"""
    api = FastAPI(title="below")
    with around_asgi(lambda app: DispatcherMiddleware(flask.Flask("above"), {"/api": app}), api) as client:
        assert "/api/openapi.json" in client.get("/api/docs").text
        assert client.get("/api/openapi.json").json()["servers"] == [{"url": "/api"}]


@pytest.mark.parametrize("kind", [Starlette, FastAPI])
def test_an_app_below_a_mount_knows_its_own_urls(kind: Callable[[], Any]) -> None:
    """[C2], [C3] The router above is asked for the way to WsgiToAsgi; it knows none of the app's routes."""

    async def item(request: Request) -> Response:
        url = request.url_for("item", number=request.path_params["number"])
        return JSONResponse({"url": str(url), "path_params": request.path_params})

    app = kind()
    app.add_route("/items/{number:int}", item, name="item")
    site = Starlette(routes=[Mount("/{tenant}", WsgiToAsgi(wsgi_around(AsgiToWsgi(app))))])
    with asgi_client(site) as client:
        answer = client.get("/mine/items/3").json()
    assert answer == {"url": "http://site/mine/items/3", "path_params": {"tenant": "mine", "number": 3}}


def test_the_lifespan_of_an_app_below_a_dispatcher_runs_once(around_asgi: Any) -> None:
    """[C3], [A19]"""
    events = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, str]]:
        events.append("startup")
        yield {"pool": "made"}
        events.append("shutdown")

    async def index(request: Request) -> Response:
        return PlainTextResponse(request.state.pool)

    app = Starlette(routes=[Route("/", index)], lifespan=lifespan)
    with around_asgi(lambda app: DispatcherMiddleware(flask.Flask("above"), {"/api": app}), app) as client:
        assert [client.get("/api/").text for _ in range(3)] == ["made"] * 3
        assert events == ["startup"]
    assert events == ["startup", "shutdown"]


def test_threads_of_a_wsgi_server_do_not_grow(around_wsgi: Any) -> None:
    with around_wsgi(CorrelationIdMiddleware) as client:
        client.get("/")
        before = threading.active_count()
        for _ in range(20):
            client.get("/")
        assert threading.active_count() <= before + 1  # a keeper, where the machine is slow
